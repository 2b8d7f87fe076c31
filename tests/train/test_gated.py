"""GRU, LSTM and RNN: the definition against torch, the native cells against the definition, the modules on either."""

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import sparsefold as sf
from sparsefold import _native
from sparsefold.nn import GRU, LSTM, RNN, Stack, native, reference
from sparsefold.sparsify import Block, Pruner
from tolerances import CELL_F64, EPS32, FREE_RUNNING_F32, GRADCHECK, GRADIENT_F64, gradient_f32

torch.set_num_threads(2)

# cell, its options, the torch cell it is, gates
MANY = 20  # samples, which lie in the lanes where the weight is in blocks
KINDS: dict[str, tuple[str, dict[str, Any], Any, int]] = {
    "gru": ("gru", {}, torch.nn.GRUCell, 3),
    "lstm": ("lstm", {}, torch.nn.LSTMCell, 4),
    "tanh": ("rnn", {"nonlinearity": "tanh"}, torch.nn.RNNCell, 1),
    "relu": ("rnn", {"nonlinearity": "relu"}, lambda *a, **k: torch.nn.RNNCell(*a, nonlinearity="relu", **k), 1),
}
MODULES = [
    (GRU, torch.nn.GRU, {}),
    (LSTM, torch.nn.LSTM, {}),
    (RNN, torch.nn.RNN, {}),
    (RNN, torch.nn.RNN, {"nonlinearity": "relu"}),
]
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(kind: str, T=5, B=3, I=4, H=6, dtype=torch.float64, seed=0) -> dict[str, Tensor]:  # noqa: E741
    """Leaves, in the order of the cell's arguments."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    gates = KINDS[kind][3]
    p = {"x": draw(T, B, I), "h0": draw(B, H) / 2}
    if kind == "lstm":
        p["c0"] = draw(B, H)
    p |= {
        "weight_ih": draw(gates * H, I) / I**0.5,
        "weight_hh": draw(gates * H, H) / H**0.5,
        "bias_ih": draw(gates * H) / 4,
        "bias_hh": draw(gates * H) / 4,
    }
    return {k: v.to(dtype).requires_grad_() for k, v in p.items()}


def call(cells: Any, kind: str, p: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    name, form, _, _ = KINDS[kind]
    torch.manual_seed(3)
    return tuple(getattr(cells, name)(**p, **form, **options))


def cotangents(trace: Any, seed: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in trace]


def gradients(trace: Any, leaves: dict[str, Any], weights: list[Tensor]) -> dict[str, Tensor]:
    """Of every leaf, zeros where nothing reaches it."""
    used = [(t, c) for t, c in zip(trace, weights, strict=True) if t.requires_grad]
    real = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
    found = torch.autograd.grad(
        [t for t, _ in used], list(real.values()), [c for _, c in used], allow_unused=True, retain_graph=True
    )
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(real.items(), found, strict=True)}


def close(a: Tensor, b: Tensor, atol: float = CELL_F64) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("zoneout", [0.0, 0.3, 1.0])
def test_the_reference_is_torch_s_cell_step_by_step(kind, training, zoneout):
    p = inputs(kind)
    _, _, make, _ = KINDS[kind]
    cell = make(4, 6).double()
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(cell, name).copy_(p[name])
    keep = {"zoneout": zoneout} | ({"zoneout_cell": zoneout / 2} if kind == "lstm" else {})
    trace = call(reference, kind, p, training=training, **keep)
    torch.manual_seed(3)
    state = [p["h0"], p["c0"]] if kind == "lstm" else [p["h0"]]
    for t, x in enumerate(p["x"]):
        # h is made from the whole new c, before c's own zoneout: Krueger et al., equation 5.
        new = cell(x, tuple(state) if kind == "lstm" else state[0])
        for i, (fresh, q) in enumerate(zip(new if kind == "lstm" else (new,), keep.values(), strict=True)):
            drawn = torch.empty_like(fresh).bernoulli_(1 - q) if q else torch.ones_like(fresh)
            part = drawn if training else 1 - q
            state[i] = part * fresh + (1 - part) * state[i]
            close(trace[i][t], state[i])
    for last, s in zip(trace[-len(state) :], state, strict=True):
        close(last, s)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_at_its_end_keeps_its_state(kind):
    p = inputs(kind)
    lengths = torch.tensor([5, 3, 1])
    trace = call(reference, kind, p, lengths=lengths)
    half = len(trace) // 2
    for b, n in enumerate(lengths.tolist()):
        own = {k: v[:n, b : b + 1] if k == "x" else v[b : b + 1] if k in ("h0", "c0") else v for k, v in p.items()}
        alone = call(reference, kind, own)
        for i in range(half):
            close(trace[i][:n, b], alone[i][:, 0])
            close(trace[i][n:, b], alone[half + i].expand(5 - n, -1))
            close(trace[half + i][b], alone[half + i][0])


# --- the native cells ------------------------------------------------------------------------------------------------

# steps, batch, inputs, units: one of everything, below and above a vector, a panel and a block of samples
SHAPES = [(1, 1, 1, 1), (5, 3, 4, 6), (3, 2, 17, 33), (4, 9, 16, 64), (3, 19, 33, 130), (4, 1, 5, 100)]
FORMS: list[tuple[str, dict[str, Any]]] = [*((kind, {}) for kind in KINDS), ("gru", {"reset_after": False})]


def options_of(kind: str) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [{}, {"zoneout": 0.3, "training": True}, {"zoneout": 0.3}]
    return plain + [o | {"zoneout_cell": 0.6} for o in plain] if kind == "lstm" else plain


def compare_f64(kind: str, p: dict[str, Any], cells: Any = native, **options: Any) -> None:
    wanted, got = call(reference, kind, p, **options), call(cells, kind, p, **options)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in wanted]
    for a, b in zip(wanted, got, strict=True):
        close(b, a)
    weights = cotangents(wanted)
    mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
    size = sum(p[n].numel() for n in ("x", "h0")) / 16 + 8  # more than the 64 pairs of GRADIENT_F64
    for name, g in theirs.items():
        close(mine[name], g, GRADIENT_F64 * size)


def compare_f32(kind: str, p: dict[str, Tensor], **options: Any) -> None:
    """A float32 run against float64 on the same numbers."""
    q = {k: v.detach().double().requires_grad_() for k, v in p.items()}
    got, wanted = call(native, kind, p, **options), call(reference, kind, q, **options)
    T, B, _ = p["x"].shape
    H = p["h0"].shape[1]
    for a, b in zip(got, wanted, strict=True):
        close(a.double(), b, gradient_f32(T, B, H, float(b.detach().abs().max())))
    weights = cotangents(got)
    mine, theirs = gradients(got, p, weights), gradients(wanted, q, [w.double() for w in weights])
    for name, g in theirs.items():
        close(mine[name].double(), g, gradient_f32(T, B, H, float(g.abs().max())))


def test_signatures_are_the_reference_s():
    for name in ("gru", "lstm", "rnn"):
        assert inspect.signature(getattr(native, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_every_form_in_float64(shape, kind, form):
    for options in options_of(kind):
        compare_f64(kind, inputs(kind, *shape), **form, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_every_form_in_float32(shape, kind, form):
    for options in options_of(kind):
        if not options.get("training"):  # draws of another precision are others
            compare_f32(kind, inputs(kind, *shape, torch.float32), **form, **options)


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(isa, monkeypatch, kind, form, dtype):
    team = _native.Team(2, isa)
    monkeypatch.setattr(native, "_team", lambda: team)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 17):  # every block of samples
        (compare_f64 if dtype == torch.float64 else compare_f32)(kind, inputs(kind, 2, batch, 5, 70, dtype), **form)
    for batch in (4, 7, 17, 70):  # one by one, in lanes of some, and of more than are taken together
        p = in_blocks(kind, inputs(kind, 2, batch, 5, 70, dtype), 0.1)
        (compare_f64 if dtype == torch.float64 else compare_f32)(kind, p, **form)


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_it_passes_finite_differences(kind, form):
    for options in options_of(kind):
        p = inputs(kind, 3, 2, 2, 3)

        def run(*values, p=p, options=options):
            return call(native, kind, dict(zip(p, values, strict=True)), **form, **options)

        assert torch.autograd.gradcheck(run, tuple(p.values()), **GRADCHECK)


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [5, 5, 5, 5], [2, 1, 0, 0], [9, 5, 5, 4]], ids=str)
def test_samples_of_their_own_length(kind, form, lengths):
    for options in options_of(kind):
        compare_f64(kind, inputs(kind, 5, 4, 3, 20), **form, **options, lengths=torch.tensor(lengths))


def in_blocks(kind: str, p: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """The same with that share of the blocks of both weights left, drawn one by one."""
    q, g = {k: v.detach().clone() for k, v in p.items()}, torch.Generator().manual_seed(11)
    for name in ("weight_ih", "weight_hh"):
        gates, cols = KINDS[kind][3], q[name].shape[1]
        H = len(q[name]) // gates
        alive = torch.rand(gates, -(-H // 16), 1, cols, generator=g) < density
        q[name] *= alive.expand(-1, -1, 16, -1).flatten(1, 2)[:, :H].flatten(0, 1)
    return {k: v.requires_grad_() for k, v in q.items()}


@pytest.mark.parametrize("density", [0.0, 0.05, 0.1, 0.7])
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_weights_in_blocks(kind, form, density):
    """Sizes that a block does not divide; gradients of all weights, the missing ones too."""
    for shape in ((5, 3, 4, 6), (3, 2, 17, 33), (4, 1, 70, 64), (3, 19, 33, 150)):
        p = in_blocks(kind, inputs(kind, *shape), density)
        compare_f64(kind, p, **form)
        if shape[3] > 16:
            assert native._packs[p["weight_hh"]].sparse == (density < 0.7)
        compare_f32(kind, {k: v.detach().float().requires_grad_() for k, v in p.items()}, **form)
    for ends in ([5, 3, 3, 1], [5] * 9 + [3] * 8 + [1] * 3):
        p = in_blocks(kind, inputs(kind, 5, len(ends), 3, 40), density)
        compare_f64(kind, p, **form, lengths=torch.tensor(ends))


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_a_mark_leaves_out_the_gradient_of_what_is_held_at_zero(kind, form):
    for density in (0.1, 0.5):
        p = in_blocks(kind, inputs(kind, 4, 3, 36, 90), density)
        plain = call(native, kind, p, **form)
        full = gradients(plain, p, cotangents(plain))
        masks = {}
        for name in ("weight_ih", "weight_hh"):
            masks[name] = p[name].detach() != 0
            masks[name][:, 3] = True  # may grow: nobody holds it
            p[name].kept = lambda mask=masks[name]: mask
        compare_f64(kind, p, **form)
        trace = call(native, kind, p, **form)
        mine = gradients(trace, p, cotangents(trace))
        for name, mask in masks.items():
            assert not mine[name][~mask].any()
            assert mine[name][:, 3].any()
            assert full[name][~mask].any()
            close(mine[name][mask], full[name][mask], GRADIENT_F64 * 64)


@pytest.mark.filterwarnings("ignore:.*no multiple of 16")
def test_a_layer_under_a_pruner_gives_the_same_on_either_backend():
    for kind, options in itertools.product(MODULES, ({}, {"recurrent_dropout": 0.4, "zoneout": 0.2})):
        grads = []
        layers = [pair(kind, **options, backend=backend)[0] for backend in ("reference", "native")]
        layers[1].load_state_dict(layers[0].state_dict())
        for layer in layers:
            pruner = Pruner(layer, {"weight*": Block(density=0.2, block=(16, 1))})
            pruner.step()
            x = torch.randn(6, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            torch.manual_seed(5)
            layer(x)[0].square().sum().backward()
            grads.append([p.grad for p in layer.parameters()])
            assert not layer.weight_hh_l0.grad[~pruner.masks["weight_hh_l0"]].any()
        for a, b in zip(*grads, strict=True):
            close(b, a, 64 * GRADIENT_F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch, dtype, kind, form):
    for density, batch in ((1.0, 7), (0.1, 3), (0.1, 7)):
        p = in_blocks(kind, inputs(kind, 6, batch, 20, 330, dtype), density)
        found = []
        for threads, runtime in ((1, True), (2, True), (2, False), (3, False), (4, True)):
            team = _native.Team(threads, runtime=runtime)
            monkeypatch.setattr(native, "_team", lambda team=team: team)
            trace = call(native, kind, p, **form)
            found.append([*trace, *gradients(trace, p, cotangents(trace)).values()])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_two_windows_are_one_sequence(dtype, kind, form):
    p = inputs(kind, 8, 3, 20, 70, dtype)
    whole = call(native, kind, p, **form)
    half = len(whole) // 2
    first = call(native, kind, {**p, "x": p["x"][:4]}, **form)
    carried = dict(zip(("h0", "c0"), first[half:], strict=False))
    second = call(native, kind, {**p, "x": p["x"][4:], **carried}, **form)
    parts = [torch.cat([a, b]) for a, b in zip(first[:half], second[:half], strict=True)] + list(second[half:])
    bound = gradient_f32(8, 3, 70, 1.0) if dtype == torch.float32 else CELL_F64  # of the input product, over other rows
    for a, b in zip(parts, whole, strict=True):
        close(a, b, bound)
    weights = cotangents(whole)
    mine, theirs = gradients(parts, p, weights), gradients(whole, p, weights)
    for name, g in theirs.items():
        largest = float(g.abs().max())
        close(mine[name], g, gradient_f32(8, 3, 70, largest) if dtype == torch.float32 else 64 * GRADIENT_F64)


NOT_NUMBERS = [float("nan"), float("inf"), float("-inf")]


def spoiled(t: Tensor, bad: float) -> None:
    with torch.no_grad():
        t.view(-1)[t.numel() // 2] = bad


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_what_is_no_number_arrives_where_the_reference_puts_it(bad, kind, form):
    for name, (density, batch) in itertools.product(inputs(kind), ((1.0, 3), (0.1, 3), (0.1, MANY))):
        p = in_blocks(kind, inputs(kind, 5, batch, 20, 40), density)
        spoiled(p[name], bad)
        wanted, got = call(reference, kind, p, **form), call(native, kind, p, **form)
        for a, b in zip(wanted, got, strict=True):
            close(b, a, 16 * CELL_F64)
        weights = cotangents(wanted)
        mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
        for n, g in theirs.items():
            close(mine[n], g, 64 * GRADIENT_F64)


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_so_does_what_comes_from_above(bad, kind, form):
    for density, batch in ((1.0, 3), (0.1, 3), (0.1, MANY)):
        p = in_blocks(kind, inputs(kind, 5, batch, 20, 40), density)
        wanted, got = call(reference, kind, p, **form), call(native, kind, p, **form)
        for at in range(len(wanted)):
            weights = cotangents(wanted)
            spoiled(weights[at], bad)
            mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
            for n, g in theirs.items():
                close(mine[n], g, 64 * GRADIENT_F64)


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_nothing_at_all_and_absent_biases(kind, form):
    for T, B in ((0, 3), (5, 0), (0, 0)):
        p = inputs(kind, T, B)
        trace = call(native, kind, p, **form)
        assert [t.shape for t in trace] == [t.shape for t in call(reference, kind, p, **form)]
        assert not any(g.any() for g in gradients(trace, p, [torch.zeros_like(t) for t in trace]).values())
    p = inputs(kind)
    for names in (("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")):
        compare_f64(kind, p | dict.fromkeys(names), **form)


def test_only_what_is_asked_for_is_made():
    p = inputs("gru", 3, 2, 4, 20)
    frozen = {k: v.detach() if k in ("x", "weight_ih", "weight_hh") else v for k, v in p.items()}
    compare_f64("gru", frozen)
    plain = {k: v.detach() for k, v in p.items()}
    assert not call(native, "gru", plain)[0].requires_grad


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
def test_torch_s_own_check_of_the_operators(kind, form):
    p = inputs(kind, 3, 2, 3, 5)
    name = "gru_before" if form else kind
    args = (p["x"], p["h0"], p.get("c0"), *(p[n] for n in WEIGHTS), *[None] * 5, name, 0.25, 0.0)
    torch.library.opcheck(torch.ops.sparsefold.gated.default, args)
    h, c, _, _, tape = (t.detach() for t in torch.ops.sparsefold.gated(*args))
    plain = [None if t is None else t.detach() for t in args[:5]]
    grads = [torch.ones_like(h), None, None, None]
    torch.library.opcheck(
        torch.ops.sparsefold.gated_backward.default,
        (grads, *plain, *[None] * 5, tape, h, c, *args[12:], [True, True, kind == "lstm", True, True, True, True]),
    )


def test_errors_of_a_cell_say_what_came():
    p = inputs("lstm")
    with pytest.raises(ValueError, match=r"float32 and float64 on the processor, got torch\.float16 on cpu"):
        native.lstm(**{k: v.half() for k, v in p.items()})
    with pytest.raises(ValueError, match=r"x is torch\.float64 on cpu, another input torch\.float32"):
        native.lstm(**{**p, "weight_hh": p["weight_hh"].float()})
    with pytest.raises(ValueError, match=r"weight_hh is \(24, 6\) for 6 units and x of 4 features, got \(24, 5\)"):
        native.lstm(**{**p, "weight_hh": p["weight_hh"][:, :5]})
    with pytest.raises(ValueError, match=r"c0 is \(3, 6\)"):
        native.lstm(**{**p, "c0": p["c0"][:2]})
    with pytest.raises(ValueError, match=r"x has 3 axes \(time, batch, feature\)"):
        native.gru(p["x"][0], *(p[n] for n in ("h0", *WEIGHTS)))
    for lengths in ([1, 2, 3], [3, 2]):
        with pytest.raises(ValueError, match=r"lengths are one for each of 3 samples, longest first"):
            native.lstm(**p, lengths=torch.tensor(lengths))


def test_what_was_saved_may_not_be_changed():
    p = inputs("gru")
    output, _ = call(native, "gru", p)
    with torch.no_grad():
        p["weight_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_one_module_twice_in_one_graph_and_a_graph_twice():
    grads = []
    for layer in pair((LSTM, torch.nn.LSTM, {}), backend="native"):
        x = torch.randn(5, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        first, state = layer(x)
        second, _ = layer(x.flip(0), state)
        loss = (first.square() + second).sum()
        loss.backward(retain_graph=True)
        once = layer.weight_hh_l0.grad.clone()
        loss.backward()
        close(layer.weight_hh_l0.grad, 2 * once)
        grads.append([p.grad for p in layer.parameters()] + [x.grad])
    for a, b in zip(*grads, strict=True):
        close(b, a, GRADIENT_F64)


def test_a_second_derivative_is_refused():
    p = inputs("gru")
    (g,) = torch.autograd.grad(native.gru(**p)[0].sum(), [p["h0"]], create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


# --- the modules -----------------------------------------------------------------------------------------------------

BACKENDS = ["reference", "native"]
LAYERS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
]


def pair(kind: tuple[Any, Any, dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """Ours and torch's with the same weights, in float64."""
    ours, theirs, form = kind
    torchs = {k: v for k, v in options.items() if k not in ("backend", "zoneout", "zoneout_cell", "recurrent_dropout")}
    layer, other = ours(7, 20, **form, **options).double(), theirs(7, 20, **form, **torchs).double()
    layer.load_state_dict(other.state_dict())
    return layer, other


def flat(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def found(layer: Any, x: list[Tensor], ragged: bool, state: Any) -> list[Tensor]:
    """Output, state, and gradients of all that has one."""
    leaves = [v.clone().requires_grad_() for v in x]
    start = None if state is None else [s.clone().requires_grad_() for s in state]
    torch.manual_seed(5)
    batch = pack_sequence(leaves, enforce_sorted=False) if ragged else torch.stack(leaves, int(not layer.batch_first))
    hx = start if start is None else tuple(start) if isinstance(layer, torch.nn.LSTM) else start[0]
    layer.zero_grad()
    output, end = layer(batch, hx)
    if ragged:
        assert isinstance(output, PackedSequence)
    data = output.data if ragged else output
    total = (data * torch.linspace(-1, 1, data.numel(), dtype=data.dtype).view_as(data)).sum()
    (total + sum(s.square().sum() for s in flat(end))).backward()
    grads = [v.grad for v in (*layer.parameters(), *leaves, *(start or []))]
    assert all(g is not None for g in grads)
    return [t.clone() for t in (data, *flat(end), *grads)]


@pytest.mark.parametrize("kind", MODULES, ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_is_torch_s(kind, options, ragged, backend):
    layer, other = pair(kind, backend=backend, **options)
    assert isinstance(layer, type(other))
    x = [torch.randn(n, 7, dtype=torch.float64) for n in ((3, 6, 5) if ragged else (6, 6, 6))]
    directions = layer.num_layers * (1 + layer.bidirectional)
    state = [torch.randn(directions, 3, 20, dtype=torch.float64) for _ in range(1 + (kind[0] is LSTM))]
    for start in (None, state):
        for a, b in zip(found(layer, x, ragged, start), found(other, x, ragged, start), strict=True):
            close(a, b, GRADIENT_F64)


@pytest.mark.parametrize("kind", MODULES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_batch(kind, backend):
    layer, other = pair(kind, backend=backend, num_layers=2)
    x = torch.randn(5, 7, dtype=torch.float64)
    (a, end), (b, wanted) = layer(x), other(x)
    for got, want in zip((a, *flat(end)), (b, *flat(wanted)), strict=True):
        assert got.shape == want.shape
        close(got, want)
    again, expected = layer(x, end), other(x, wanted)
    for got, want in zip((again[0], *flat(again[1])), (expected[0], *flat(expected[1])), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", MODULES, ids=str)
def test_auto_is_torch_s_where_the_kernels_cannot(kind, monkeypatch):
    called = []
    for cells, name in itertools.product((native, reference), ("gru", "lstm", "rnn")):
        monkeypatch.setattr(cells, name, lambda *a, cells=cells, **k: called.append(cells) or 1 / 0)

    def takes(layer: Any, x: Tensor) -> Any:
        called.clear()
        try:
            layer(x)
        except ZeroDivisionError:
            return called[0]
        return torch

    ours, _, form = kind
    x = torch.zeros(12, 2, 3)
    assert takes(ours(3, 5, **form), x) is native
    assert takes(ours(3, 5, **form).double(), x.double()) is torch
    assert takes(ours(3, 5, **form, backend="native").double(), x.double()) is native
    assert takes(ours(3, 5, **form), x[:11]) is torch
    assert takes(ours(3, 5, **form, zoneout=0.1), x[:1]) is reference
    assert takes(ours(3, 5, **form, backend="native"), x[:1]) is native
    assert takes(ours(3, 5, **form, backend="reference"), x) is reference
    assert takes(ours(3, 5, **form).bfloat16(), x.bfloat16()) is torch
    assert takes(ours(3, 5, **form, recurrent_dropout=0.5).bfloat16(), x.bfloat16()) is reference
    monkeypatch.setattr(native, "_native", None)
    assert takes(ours(3, 5, **form), x) is torch


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_are_torch_s():
    layer = LSTM(3, 6, proj_size=2)
    other = torch.nn.LSTM(3, 6, proj_size=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(layer(x)[0], other(x)[0])
    for options in ({"zoneout": 0.1}, {"zoneout_cell": 0.1}, {"recurrent_dropout": 0.1}, {"backend": "native"}):
        with pytest.raises(ValueError, match=r"an LSTM with projections \(proj_size=2\) is torch's own"):
            LSTM(3, 6, proj_size=2, **options)


OPTIONS: list[dict[str, Any]] = [
    {"recurrent_dropout": 0.4},
    {"zoneout": 0.3},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "zoneout": 0.2, "recurrent_dropout": 0.1},
]


@pytest.mark.parametrize("kind", MODULES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_an_option_gives_the_same_on_either_backend(kind, options, ragged, training):
    if kind[0] is LSTM and "zoneout" in options:
        options = options | {"zoneout_cell": 0.5}
    layer, _ = pair(kind, backend="reference", **options)
    other, _ = pair(kind, backend="native", **options)
    other.load_state_dict(layer.state_dict())
    x = [torch.randn(n, 7, dtype=torch.float64) for n in ((3, 6, 5) if ragged else (6, 6, 6))]
    one, two = (found(each.train(training), x, ragged, None) for each in (layer, other))
    for a, b in zip(one, two, strict=True):
        close(b, a, GRADIENT_F64)
    torchs = {k: v for k, v in options.items() if "zoneout" not in k and k != "recurrent_dropout"}
    plain, _ = pair(kind, backend="reference", **torchs)
    plain.load_state_dict(layer.state_dict())
    differs = not torch.equal(found(plain.eval(), x, ragged, None)[0], one[0])
    assert differs == (training or "zoneout" in options)


@pytest.mark.parametrize("ours", [GRU, LSTM, RNN])
def test_errors_of_a_module_say_what_came(ours):
    layer = ours(3, 5, backend="native")
    x, one = torch.zeros(6, 2, 3), torch.zeros(1, 2, 5)
    state = (one, one) if ours is LSTM else one
    with pytest.raises(ValueError, match=r"input has 4 features, this .* reads 3"):
        layer(torch.zeros(6, 2, 4))
    with pytest.raises(ValueError, match=r"input has 3 axes \(time, batch, feature\), or 2 without a batch"):
        layer(torch.zeros(6, 2, 4, 1))
    with pytest.raises(ValueError, match=r"input is torch\.float64, this .* is torch\.float32"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 5\).*got \(1, 2, 5\)"):
        layer(torch.zeros(6, 3, 3), state)
    with pytest.raises(ValueError, match=r"state is torch\.float64"):
        layer(x, (one.double(),) * 2 if ours is LSTM else one.double())
    with pytest.raises(ValueError, match=r"the state of .* is .*, got"):
        layer(x, one if ours is LSTM else (one, one))
    with pytest.raises(ValueError, match="backend is one of 'auto', 'native', 'triton', 'reference', got 'fast'"):
        ours(3, 5, backend="fast")
    with pytest.raises(ValueError, match="zoneout is a probability"):
        ours(3, 5, zoneout=1.5)
    with pytest.raises(ValueError, match="recurrent_dropout is a probability"):
        ours(3, 5, recurrent_dropout=-1)


@pytest.mark.parametrize("kind", MODULES, ids=str)
def test_copies_print_and_no_grad(kind):
    ours, _, form = kind
    options = {"zoneout_cell": 0.25} if ours is LSTM else {}
    layer = ours(7, 20, 2, **form, backend="native", zoneout=0.125, **options).eval()
    x = torch.randn(6, 2, 7)
    wanted = layer(x)[0].detach()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.backend, other.zoneout) == ("native", 0.125)
        assert torch.equal(other(x)[0], wanted)
    assert "7, 20, num_layers=2" in repr(layer)
    assert "zoneout=0.125" in repr(layer)
    assert "backend='native'" in repr(layer)
    assert "recurrent_dropout" not in repr(layer)
    with torch.no_grad():
        output, _ = layer(x)
        assert not output.requires_grad
        assert torch.equal(output, wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], wanted)


@pytest.mark.parametrize("kind", MODULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_it_compiles_to_what_torch_s_compiles_to(kind, options):
    ours, theirs, form = kind
    layer, other = ours(7, 20, **form, **options), theirs(7, 20, **form, **options)
    layer.load_state_dict(other.state_dict())
    width = 20 * (1 + layer.bidirectional)
    read = torch.nn.Linear(width, 3)
    x = torch.randn(9, 7).numpy()
    one, two = (sf.Engine(sf.compile_model(Stack(m, read))).stream().run(x) for m in (layer, other))
    assert (one == two).all()
    with torch.no_grad():
        wanted = read(layer(torch.from_numpy(x))[0])
    torch.testing.assert_close(torch.from_numpy(one), wanted, rtol=0, atol=FREE_RUNNING_F32)


def test_zoneout_compiles_where_the_engine_has_it():
    x = torch.randn(9, 7)
    for options in ({}, {"num_layers": 2}, {"bidirectional": True}):
        layer = GRU(7, 20, zoneout=0.25, **options).eval()
        got = sf.Engine(sf.compile_model(layer)).stream().run(x.numpy())
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), layer(x)[0], rtol=0, atol=FREE_RUNNING_F32)
    for layer in (LSTM(7, 20, zoneout=0.1), LSTM(7, 20, zoneout_cell=0.1), RNN(7, 20, zoneout=0.1)):
        with pytest.raises(
            ValueError, match=r"keeps a part of its state by zoneout, which the engine has for GRU and EGRU"
        ):
            sf.compile_model(layer)
    with pytest.raises(ValueError, match=r"Supported: .*GRU, LSTM, RNN") as error:
        sf.compile_model(torch.nn.Softmax())
    assert str(error.value).count(" GRU,") == 1


# Torch's compiler breaks its graph at every RNNBase, and looks at what comes from before the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("ours", [GRU, LSTM, RNN])
def test_a_model_around_it_can_be_compiled_and_carries_its_state(ours):
    model = Stack(torch.nn.Embedding(9, 7), ours(7, 20, backend="native"), torch.nn.Linear(20, 9))
    x = torch.randint(9, (6, 2))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits, state, _ = run(x)
        more, _, _ = run(x, state.detach())
        (logits.square().mean() + more.sum()).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()  # what it remembers of Stack
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=64 * EPS32, atol=64 * EPS32)
