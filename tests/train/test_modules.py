"""EGRU, its cell and the stack: torch's names and conventions, state, ragged batches, regularisers, errors."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from sparsefold.nn import EGRU, CausalConv1d, EGRUCell, EGRUState, Stack, Triangle, anneal, param_groups
from sparsefold.nn.kept import dropped
from sparsefold.nn.native import egru
from tolerances import CELL_F64

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=CELL_F64)


def equal(a: EGRUState, b: EGRUState) -> bool:
    return torch.equal(a.y, b.y) and torch.equal(a.h, b.h)


@pytest.mark.parametrize(
    ("layers", "bias", "bidirectional"), list(itertools.product((1, 2), (True, False), (True, False)))
)
def test_parameters_are_named_and_shaped_as_torch_names_them(layers, bias, bidirectional):
    args = (5, 6, layers, bias, False, 0.0, bidirectional)
    mine, theirs = EGRU(*args), torch.nn.GRU(*args)
    shapes = {n: p.shape for n, p in mine.named_parameters()}
    assert {n: s for n, s in shapes.items() if not n.startswith("threshold")} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    suffixes = [f"l{k}{d}" for k in range(layers) for d in (("", "_reverse") if bidirectional else ("",))]
    assert [n for n in shapes if n.startswith("threshold")] == [f"threshold_{s}" for s in suffixes]
    assert all(shapes[f"threshold_{s}"] == (6,) for s in suffixes)


def test_default_initialisation():
    layer = EGRU(100, 400, 2, threshold=0.25)
    for name, p in layer.named_parameters():
        if name.startswith("weight"):
            assert abs(p.std().item() * p.shape[1] ** 0.5 - 1) < 0.02
        elif name.startswith("threshold"):
            assert (p == 0.25).all()
            assert not p.requires_grad
        else:
            wanted = torch.zeros(1200)
            wanted[400:800] = float(name.startswith("bias_ih"))
            assert torch.equal(p, wanted)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("ragged", ["no", "sorted", "unsorted"])
def test_from_gru_that_always_speaks_is_that_gru(bidirectional, ragged):
    gru = torch.nn.GRU(3, 4, 2, bidirectional=bidirectional).double()
    layer = EGRU.from_gru(gru, event="always", reset="none", output="state")
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    h = torch.randn(2 * (1 + bidirectional), 4, 4, dtype=torch.float64)
    if ragged != "no":
        lengths = [6, 4, 4, 1] if ragged == "sorted" else [4, 1, 6, 4]
        x = pack_padded_sequence(x, lengths, enforce_sorted=ragged == "sorted")
    wanted, last = gru(x, h)
    output, state = layer(x, EGRUState(h, h))
    close(state.h, last)
    close(state.y, last)
    if ragged != "no":
        assert torch.equal(output.batch_sizes, wanted.batch_sizes)
        output, wanted = output.data, wanted.data
    close(output, wanted)


@pytest.mark.parametrize("output", ["events", "state"])
def test_a_ragged_batch_is_its_samples_one_by_one(output):
    layer = EGRU(3, 5, 2, bidirectional=True, output=output).double()
    samples = [torch.randn(n, 3, dtype=torch.float64) for n in (3, 7, 1, 3)]
    start = EGRUState(*(torch.rand(4, 4, 5, dtype=torch.float64) for _ in range(2)))
    packed, state, rates = layer(pack_sequence(samples, enforce_sorted=False), start, with_activity=True)
    padded, lengths = pad_packed_sequence(packed)
    assert lengths.tolist() == [3, 7, 1, 3]
    events = torch.zeros(4, 5, dtype=torch.float64)
    for b, sample in enumerate(samples):
        mine = EGRUState(start.y[:, b : b + 1], start.h[:, b : b + 1])
        one, s, r = layer(sample[:, None], mine, with_activity=True)
        close(padded[: len(sample), b], one[:, 0])
        close(state.y[:, b], s.y[:, 0])
        close(state.h[:, b], s.h[:, 0])
        events += torch.stack(r) * len(sample)
    close(torch.stack(rates), events / sum(map(len, samples)))


def test_padding_gets_no_gradient():
    layer, x = EGRU(3, 5, bidirectional=True), torch.randn(4, 2, 3, requires_grad=True)
    output, state, rates = layer(pack_padded_sequence(x, [4, 2]), with_activity=True)
    (output.data.sum() + state.y.sum() + state.h.sum() + sum(r.sum() for r in rates)).backward()
    assert (x.grad[2:, 1] == 0).all()
    assert (x.grad[:2] != 0).all()


def test_batch_first():
    layer = EGRU(3, 5, 2)
    other = EGRU(3, 5, 2, batch_first=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(6, 2, 3)
    (a, s), (b, t) = layer(x), other(x.transpose(0, 1))
    assert torch.equal(a.transpose(0, 1), b)
    assert equal(s, t)


def test_two_directions_are_two_runs():
    both = EGRU(3, 5, bidirectional=True)
    x, state = torch.randn(6, 2, 3), EGRUState(torch.rand(2, 2, 5), torch.rand(2, 2, 5))
    output, last = both(x, state)
    for d, suffix in enumerate(("", "_reverse")):
        one = EGRU(3, 5)
        mine = {n: p for n, p in both.state_dict().items() if n.endswith("_reverse") == bool(d)}
        one.load_state_dict({n.removesuffix(suffix): p for n, p in mine.items()})
        out, end = one(x.flip(0) if d else x, EGRUState(state.y[d : d + 1], state.h[d : d + 1]))
        close(output[..., 5 * d : 5 * d + 5], out.flip(0) if d else out)
        close(last.h[d], end.h[0])


def test_a_window_starts_where_the_last_one_ended():
    layer = EGRU(3, 5, 2).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:3])
    second, last = layer(x[3:], state.detach())
    assert not state.detach().h.requires_grad
    close(torch.cat([first, second]), whole)
    close(last.h, end.h)
    assert not torch.equal(layer(x[3:])[0], second)


def test_the_cell_is_one_step_of_the_layer():
    options = {"threshold": 0.1, "reset": "output", "reset_after": False, "output": "state", "zoneout": 0.2}
    layer, cell = EGRU(3, 5, **options).double().eval(), EGRUCell(3, 5, **options).double().eval()
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    output, end = layer(x)
    state, steps = None, []
    for x_t in x:
        step, state = cell(x_t, state)
        steps.append(step)
    close(torch.stack(steps), output)
    close(state.y, end.y[0])
    close(state.h, end.h[0])


@pytest.mark.parametrize("output", ["events", "state"])
def test_between_layers_it_is_events_whatever_the_reader_gets(output):
    layer, x, zero = EGRU(3, 5, 2, output=output), torch.randn(6, 2, 3), torch.zeros(2, 5)
    lower, upper = ([p for n, p in layer.named_parameters() if n.endswith(f"l{k}")] for k in range(2))
    trace = egru(egru(x, zero, zero, *lower).y, zero, zero, *upper)
    assert torch.equal(layer(x)[0], trace.y if output == "events" else trace.u)


def test_dropout_between_layers_in_training_only():
    layer, x = EGRU(3, 50, 2, dropout=0.5), torch.randn(6, 2, 3)
    plain = EGRU(3, 50, 2)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    layer.train()
    torch.manual_seed(1)
    output, state = layer(x)
    torch.manual_seed(1)
    lower = [p for n, p in plain.named_parameters() if n.endswith("l0")]
    zero = torch.zeros(2, 50)
    y = F.dropout(egru(x, zero, zero, *lower).y, 0.5)
    upper = [p for n, p in plain.named_parameters() if n.endswith("l1")]
    trace = egru(y, zero, zero, *upper)
    assert torch.equal(output, trace.y)
    assert torch.equal(state.h[1], trace.h_n)
    with pytest.warns(UserWarning, match="between layers"):
        EGRU(3, 5, dropout=0.5)


def test_recurrent_dropout_of_a_pruned_weight_draws_for_what_is_left():
    """As torch does: the share that it says, the rest scaled; the gradient goes by the same mask, the mark stays."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(320, 200))
    mask = torch.rand(320, 200) < 0.3
    with torch.no_grad():
        weight[~mask] = 0
    weight.kept = lambda: mask
    for p in (0.0, 0.25, 1.0):
        found = dropped(weight, p)
        assert found.kept is weight.kept
        assert not found[~mask].any()
        left = found[mask] != 0
        assert abs(float(left.double().mean()) - (1 - p)) <= 4 * (p * (1 - p) / int(mask.sum())) ** 0.5  # of its spread
        if p < 1:
            torch.testing.assert_close(found[mask][left], weight[mask][left] / (1 - p))
        (gradient,) = torch.autograd.grad(found.sum(), [weight])
        torch.testing.assert_close(gradient[mask], left / (1 - p) if p < 1 else torch.zeros(len(left)))
    torch.manual_seed(7)
    once, twice = dropped(weight, 0.5), dropped(weight, 0.5)
    assert not torch.equal(once, twice)
    mask[:, :100] = False  # another pattern, under the same tensor
    assert not dropped(weight, 0.5)[:, :100].any()
    assert dropped(weight, 0.5)[:, 100:].any()
    turned, other = torch.nn.Parameter(weight.detach().t()), mask.t()  # neither lies row by row
    turned.kept = lambda: other
    assert not dropped(turned, 0.5)[~other].any()
    assert dropped(turned, 0.5).any()


def test_recurrent_dropout_drops_weights_once_per_forward():
    layer, x = EGRU(3, 5, recurrent_dropout=0.5), torch.randn(6, 2, 3)
    torch.manual_seed(1)
    output, _ = layer(x)
    torch.manual_seed(1)
    p = dict(layer.named_parameters())
    p = {n.removesuffix("_l0"): q for n, q in p.items()}
    zero = torch.zeros(2, 5)
    dropped = F.dropout(p["weight_hh"], 0.5)
    assert torch.equal(output, egru(x, zero, zero, **{**p, "weight_hh": dropped}).y)
    assert torch.equal(layer.eval()(x)[0], egru(x, zero, zero, **p).y)


def test_zoneout_is_on_in_training_and_a_mean_in_evaluation():
    layer, x = EGRU(3, 5, zoneout=1.0, output="state"), torch.randn(6, 2, 3)
    assert not layer(x)[0].any()
    half = EGRU(3, 5, zoneout=0.5)
    assert not torch.equal(half(x)[0], half(x)[0])
    assert torch.equal(half.eval()(x)[0], half(x)[0])


def test_copies_are_equal():
    layer, x = EGRU(3, 5, 2, surrogate=Triangle(1.0, 0.25), learn_threshold=True), torch.randn(6, 2, 3)
    fresh = EGRU(3, 5, 2, surrogate=Triangle(1.0, 0.25))
    assert fresh.load_state_dict(layer.state_dict()).missing_keys == []
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x)[0], layer(x)[0])
    assert copy.deepcopy(layer).threshold_l1.requires_grad
    state = layer(x)[1]
    assert equal(pickle.loads(pickle.dumps(state)), state)
    assert state.to(torch.float64).h.dtype == torch.float64


def test_thresholds_learn_only_when_asked_and_act_from_zero_up():
    x = torch.randn(6, 2, 3)
    for learn in (False, True):
        layer = EGRU(3, 5, learn_threshold=learn)
        layer(x)[0].square().sum().backward()
        assert (layer.threshold_l0.grad is not None) == learn
    with torch.no_grad():
        layer.threshold_l0.fill_(-0.5)
        negative = layer(x)[0]
        assert (layer.threshold_l0 == -0.5).all()
        layer.threshold_l0.fill_(0.0)
        assert torch.equal(layer(x)[0], negative)


def test_autocast_leaves_the_cell_in_its_own_precision():
    layer, x = EGRU(3, 5), torch.randn(6, 2, 3)
    wanted, state = layer(x)
    cell = EGRUCell(3, 5)
    step, _ = cell(x[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(x)
        assert layer(x.bfloat16(), state)[0].dtype == torch.float32
        assert torch.equal(cell(x[0])[0], step)
    assert torch.equal(output, wanted)


def test_repr_says_what_differs_from_the_default():
    assert repr(EGRU(3, 5, 2, output="state")) == "EGRU(3, 5, num_layers=2, threshold=0.05, output='state')"
    assert repr(EGRUCell(3, 5, reset="none")) == "EGRUCell(3, 5, threshold=0.05, reset='none')"


X = torch.zeros(6, 2, 3)


def state_of(*shape, dtype=None):
    return EGRUState(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: EGRU(3, 0), "hidden_size is at least 1, got 0"),
        (lambda: EGRU(3, 5, num_layers=0), "num_layers is at least 1"),
        (lambda: EGRU(3, 5, threshold=-0.1), "finite and >= 0, got -0.1"),
        (lambda: EGRU(3, 5, threshold=float("nan")), "finite and >= 0, got nan"),
        (lambda: EGRU(3, 5, reset="soft"), "reset is one of 'threshold', 'output', 'none', got 'soft'"),
        (lambda: EGRU(3, 5, output="u"), "output is one of 'events', 'state', got 'u'"),
        (lambda: EGRU(3, 5, event="smooth"), "event is one of 'threshold', 'always', got 'smooth'"),
        (lambda: EGRU(3, 5, backend="torch"), "backend is one of 'auto', 'native', 'triton', 'reference', got 'torch'"),
        (lambda: EGRU(3, 5, zoneout=1.5), "zoneout is a probability"),
        (lambda: EGRU(3, 5, recurrent_dropout=-1), "recurrent_dropout is a probability"),
        (lambda: EGRU(3, 5, 2, dropout=2), "dropout is a probability"),
        (lambda: EGRU(3, 5)(X[0]), r"3 axes \(time, batch, feature\)"),
        (lambda: EGRU(4, 5)(X), "input has 3 features, this EGRU reads 4"),
        (lambda: EGRU(3, 5)(X.double()), "input is torch.float64, this EGRU is torch.float32"),
        (lambda: EGRU(3, 5)(X, state_of(1, 2, 4)), "hidden state has 4 units, this EGRU has 5. Pass the state this"),
        (lambda: EGRU(3, 5)(X, state_of(1, 3, 5)), "hidden state has 3 samples, the input has 2"),
        (lambda: EGRU(3, 5)(X, state_of(2, 2, 5)), "hidden state has 2 layers and directions, this EGRU has 1"),
        (lambda: EGRU(3, 5)(X, state_of(2, 5)), r"have shape \(1, 2, 5\), got \(2, 5\)"),
        (lambda: EGRU(3, 5)(X, state_of(1, 2, 5, dtype=torch.float64)), "hidden state is torch.float64"),
        (lambda: EGRU(3, 5)(X, torch.zeros(1, 2, 5)), r"state is an EGRUState\(y, h\), got Tensor"),
        (lambda: EGRUCell(3, 5)(X), r"2 axes \(batch, feature\)"),
        (lambda: EGRUCell(3, 5)(X[0], state_of(2, 4)), "hidden state has 4 units, this EGRUCell has 5"),
        (lambda: EGRU.from_gru(torch.nn.LSTM(3, 5)), "starts from a torch.nn.GRU, got LSTM"),
        (lambda: Stack(torch.nn.Sequential(EGRU(3, 5))), "module 0 .Sequential. holds a recurrent EGRU"),
        (lambda: Stack(EGRUCell(3, 5)), "module 0 .EGRUCell. holds a recurrent EGRUCell"),
        (lambda: Stack(EGRU(3, 5))(X, (None, None)), "state has 2 entries, this Stack has 1 modules"),
        (lambda: anneal(1, 0, 5, 4), "begin=5, until=4"),
    ],
)
def test_errors_say_what_came(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_stack_carries_every_state_and_gathers_every_rate():
    model = Stack(
        torch.nn.Embedding(7, 3), EGRU(3, 5, 2), torch.nn.GRU(5, 4), torch.nn.LSTM(4, 4), torch.nn.Linear(4, 7)
    ).double()
    assert "1.weight_hh_l1" in dict(model.named_parameters())
    x = torch.randint(7, (6, 2))
    whole, end, activity = model(x)
    first, state, _ = model(x[:2])
    state = state.detach()
    assert not any(t.requires_grad for t in (state[1].h, state[2], *state[3]))
    second, last, _ = model(x[2:], state)
    close(torch.cat([first, second]), whole)
    close(last[1].h, end[1].h)
    close(last[2], end[2])
    close(last[3][1], end[3][1])
    assert last[0] is None
    assert last[4] is None
    assert [len(r) for r in activity.rates] == [5, 5]
    assert equal(pickle.loads(pickle.dumps(state))[1], state[1])
    hidden, state, _ = model[:2](x)
    assert hidden.shape == (6, 2, 5)
    assert len(state) == 2


@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(1, 1, 1), (3, 1, 1), (2, 4, 1), (3, 2, 2), (5, 3, 6)])
def test_a_causal_convolution_is_torchs_over_zeros_in_front_and_goes_on_from_window_to_window(kernel, dilation, groups):
    torch.manual_seed(0)
    layer = CausalConv1d(6, 12, kernel, dilation, groups).double()
    plain = torch.nn.Conv1d(6, 12, kernel, dilation=dilation, groups=groups).double()
    plain.load_state_dict(layer.state_dict())  # torch's names and shapes
    x = torch.randn(17, 3, 6, dtype=torch.float64)
    padded = torch.nn.functional.pad(x.permute(1, 2, 0), ((kernel - 1) * dilation, 0))
    output, end = layer(x)
    torch.testing.assert_close(output, plain(padded).permute(2, 0, 1), rtol=0, atol=CELL_F64)
    assert end.shape == (layer.history, 3, 6)
    torch.testing.assert_close(end, padded[..., 17:].permute(2, 0, 1), rtol=0, atol=0)
    stack, state, windows = Stack(layer), None, []
    for window in (x[:1], x[1:1], x[1:4], x[4:15], x[15:]):
        y, state, _ = stack(window, state)
        windows.append(y)
        state = state.detach()
    torch.testing.assert_close(torch.cat(windows), output, rtol=0, atol=CELL_F64)


def test_what_does_not_fit_a_causal_convolution_is_refused():
    layer = CausalConv1d(3, 4, 3, 2)
    for call, sentence in (
        (lambda: layer(torch.zeros(5, 3)), r"input has shape \(time, batch, 3\), got \(5, 3\)"),
        (lambda: layer(torch.zeros(5, 2, 4)), r"got \(5, 2, 4\)"),
        (lambda: layer(torch.zeros(5, 2, 3), torch.zeros(4, 1, 3)), r"state has shape \(4, 2, 3\), got \(4, 1, 3\)"),
        (lambda: CausalConv1d(3, 4, 0), "kernel_size is a whole number, at least 1, got 0"),
        (lambda: CausalConv1d(3, 4, (3,)), "kernel_size is a whole number"),
        (lambda: CausalConv1d(3, 4, 3, -1), "dilation is a whole number, at least 1, got -1"),
        (lambda: CausalConv1d(3, 4, 3, groups=2), "in_channels must be divisible by groups"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_weight_decay_is_for_matrices():
    model = Stack(torch.nn.Embedding(7, 3), EGRU(3, 5, learn_threshold=True), torch.nn.Linear(5, 7))
    model[2].weight.requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    names = {p: n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0
    assert [names[p] for p in decayed["params"]] == ["0.weight", "1.weight_ih_l0", "1.weight_hh_l0"]
    assert [names[p] for p in plain["params"]] == ["1.bias_ih_l0", "1.bias_hh_l0", "1.threshold_l0", "2.bias"]
    torch.optim.AdamW(param_groups(torch.nn.Embedding(7, 3), 0.1))


def test_anneal_is_a_ramp():
    value = anneal(0.5, 0.1, begin=10, until=20)
    assert [value(s) for s in (0, 10, 15, 20, 99)] == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1])
    step = anneal(1.0, 0.0, 3, 3)
    assert [step(2), step(3)] == [1.0, 0.0]
