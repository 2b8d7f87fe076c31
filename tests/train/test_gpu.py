"""The GPU's cells against the definition: on a GPU where there is one, else in Triton's interpreter on the processor.

On a GPU each case runs three times: launch by launch, captured, and replayed.
"""

import functools
import inspect
import itertools
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from sparsefold.data import load_corpus
from sparsefold.nn import EGRU, GRU, LSTM, RNN, EGRUCell, Stack, Triangle, gpu, reference
from sparsefold.nn.gpu import window
from sparsefold.nn.reference import Event, Reset
from sparsefold.recipes import _loop, lm
from sparsefold.recipes._lm_config import Config as LMConfig
from sparsefold.recipes._lm_config import resolved
from tolerances import BF16_CELL, BF16_GRADIENT, CELL_F64, GRADIENT_F64, STREAM_F32, gradient_f32

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")

with pytest.MonkeyPatch.context() as _patch:  # read until the first kernel has run, and by nothing after that
    if not ON_GPU:
        _patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton to test the GPU's kernels.")
    _table = torch.zeros(window.kernels().TABLE, dtype=torch.int64, device=DEVICE)
    window.kernels().fill[(1,)](_table, *range(len(_table)))

FORMS = list(itertools.product(get_args(Reset), (True, False)))
ZONEOUTS = [{}, {"zoneout": 0.3, "training": True}, {"zoneout": 0.3}]
EGRU_NAMES = ("x", "y0", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "threshold")
GRU_NAMES = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
LSTM_NAMES = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
NAMES = {"egru": EGRU_NAMES, "gru": GRU_NAMES, "lstm": LSTM_NAMES, "rnn": GRU_NAMES}
GATES = {"egru": 3, "gru": 3, "lstm": 4, "rnn": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(cell: str, T=3, B=3, I=4, H=6, dtype=torch.float64, seed=0) -> dict[str, Tensor]:  # noqa: E741
    """Leaves on the device; about a third of the units speak."""
    g, G = torch.Generator().manual_seed(seed), GATES[cell]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    p = {
        "x": draw(T, B, I),
        "y0": draw(B, H).clamp(min=0),
        "h0": draw(B, H) / 2,
        "c0": draw(B, H) / 2,
        "weight_ih": draw(G * H, I) / I**0.5,
        "weight_hh": draw(G * H, H) / H**0.5,
        "bias_ih": draw(G * H) / 4,
        "bias_hh": draw(G * H) / 4,
        "threshold": draw(H).abs() / 8 + 0.02,
    }
    return {k: p[k].to(DEVICE, dtype).requires_grad_() for k in NAMES[cell]}


def gradients(outputs: Any, leaves: dict[str, Any], cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Of every leaf, zeros where nothing reaches it."""
    leaves = {k: v for k, v in leaves.items() if v is not None}
    used = [(t, c) for t, c in zip(outputs, cotangents, strict=True) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in used], list(leaves.values()), [c for _, c in used], allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found, strict=True)}


def cotangents(outputs: Any, seed: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in outputs]


def close(a: Tensor, b: Tensor, atol: float = CELL_F64) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def compare(cell: str, p: dict[str, Any], **form: Any) -> None:
    """Outputs and every gradient in float64, thrice on a GPU."""
    torch.manual_seed(3)
    wanted = getattr(reference, cell)(**p, **form)
    weights = cotangents(wanted)
    theirs = gradients(wanted, p, weights)
    for _ in range(3 if ON_GPU else 1):
        torch.manual_seed(3)
        got = getattr(gpu, cell)(**p, **form)
        assert [t.requires_grad for t in got] == [t.requires_grad for t in wanted]
        for a, b in zip(got, wanted, strict=True):
            close(a, b)
        for name, g in gradients(got, p, weights).items():
            close(g, theirs[name], GRADIENT_F64)


@pytest.fixture
def draws(monkeypatch):
    """On a GPU a window's mask is one draw: there the kernels are given the reference's, which are one a step."""
    if ON_GPU:

        def by_steps(x: Tensor, like: Tensor, probabilities: list[float]) -> list[Tensor | None]:
            kept = [
                torch.empty(len(x), *like.shape, dtype=torch.bool, device=x.device) if p else None
                for p in probabilities
            ]
            for t in range(len(x)):
                for mask, p in zip(kept, probabilities, strict=True):
                    if mask is not None:
                        mask[t] = torch.empty_like(like).bernoulli_(1 - p)
            return kept

        for module in ("gru", "lstm"):
            monkeypatch.setattr(sys.modules[f"sparsefold.nn.gpu.{module}"], "draw", by_steps)


@pytest.mark.parametrize("cell", sorted(NAMES))
def test_signatures_are_the_reference_s(cell):
    assert inspect.signature(getattr(gpu, cell)) == inspect.signature(getattr(reference, cell))


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("event", get_args(Event))
def test_every_form_of_egru(draws, reset, reset_after, event):
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "event": event, "surrogate": Triangle(0.7, 0.3)}
    for zoneout in ZONEOUTS:
        compare("egru", inputs("egru"), **form, **zoneout)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("ends", [None, [2, 3, 0]])
def test_every_form_of_gru(draws, reset_after, ends):
    lengths = None if ends is None else torch.tensor(ends, device=DEVICE)
    for zoneout in ZONEOUTS:
        compare("gru", inputs("gru"), reset_after=reset_after, lengths=lengths, **zoneout)


@pytest.mark.parametrize("ends", [None, [2, 3, 0]])
def test_every_form_of_lstm(draws, ends):
    lengths = None if ends is None else torch.tensor(ends, device=DEVICE)
    for training, (zoneout, cell) in itertools.product((True, False), ((0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2))):
        compare("lstm", inputs("lstm"), lengths=lengths, zoneout=zoneout, zoneout_cell=cell, training=training)


# steps, batch, inputs, units: one of everything, whole rows without padding, rows that are padded by one
SHAPES = [(1, 1, 1, 1), (2, 2, 16, 32), (2, 5, 15, 47)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ["egru", "gru", "lstm"])
def test_sizes(cell, shape):
    compare(cell, inputs(cell, *shape))
    if cell != "lstm":
        compare(cell, inputs(cell, *shape), reset_after=False)


@pytest.mark.parametrize("cell", ["egru", "gru", "lstm"])
def test_absent_biases_and_an_empty_sequence(cell):
    for absent in ("bias_ih", "bias_hh"):
        compare(cell, inputs(cell) | {absent: None})
    p = inputs(cell, T=0)
    *sequences, last = getattr(gpu, cell)(**p)
    assert sequences[0].shape == (0, 3, 6)
    assert torch.equal(last, p["c0" if cell == "lstm" else "h0"])


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_gradients_in_float32(reset, reset_after):
    p = inputs("egru", 4, 3, 17, 33, torch.float32)
    q = {k: v.detach().double().requires_grad_() for k, v in p.items()}
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after}
    wanted = reference.egru(**q, **form)
    weights = [w.float() for w in cotangents(wanted)]
    theirs = gradients(wanted, q, [w.double() for w in weights])
    for _ in range(3 if ON_GPU else 1):
        got = gpu.egru(**p, **form)
        assert torch.equal(got.o != 0, wanted.o != 0)  # the seed keeps away from ties
        mine = gradients(got, p, weights)
        for name, g in theirs.items():
            close(mine[name].double(), g, gradient_f32(4, 3, 33, float(g.abs().max())))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("cell", "form"), [("egru", {"event": "smooth"}), ("gru", {"reset_after": False}), ("lstm", {})]
)
def test_bfloat16(cell, form, autocast):
    """Whole tensors in bfloat16, and float32 ones whose products autocast asks to be so."""
    p = inputs(cell, 3, 3, 17, 33, torch.bfloat16)
    q = {k: v.detach().double().requires_grad_() for k, v in p.items()}
    if autocast:
        p = {k: v.detach().float().requires_grad_() for k, v in p.items()}
    wanted = getattr(reference, cell)(**q, **form)
    weights = [w.bfloat16().double() for w in cotangents(wanted)]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        got = getattr(gpu, cell)(**p, **form)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {t.dtype for t in got} == {dtype}
    for a, b in zip(got, wanted, strict=True):
        close(a.double(), b, BF16_CELL)
    mine, theirs = gradients(got, p, [w.to(dtype) for w in weights]), gradients(wanted, q, weights)
    for name, g in theirs.items():
        assert mine[name].dtype == dtype
        close(mine[name].double(), g, BF16_GRADIENT * max(float(g.abs().max()), 1.0))


def test_the_state_is_float32_within_a_window_of_bfloat16():
    """Sixteen steps that each add 2^-10 to a state near 1, where bfloat16's next number is 2^-7 away."""
    p = {k: torch.zeros_like(v) for k, v in inputs("egru", 16, 1, 1, 1, torch.bfloat16).items()}
    p["h0"] += 1
    p["bias_ih"] += torch.tensor([0, 6.9375, 8], device=DEVICE)  # z = 1 - 0.00097, n = 1
    p["weight_ih"][2] = 0
    trace = gpu.egru(**p, reset="none")
    (z,) = torch.sigmoid(p["bias_ih"][1:2].double())
    n = torch.tanh(p["bias_ih"][2].double())
    assert trace.h_n.item() == 1  # between 1 and n: nothing to add yet
    p["h0"] *= 0.5
    wanted = n - (n - 0.5) * z**16
    assert abs(gpu.egru(**p, reset="none").h_n.double() - wanted) <= 2.0**-9 + 2.0**-10  # rounds once, to 8 bits
    assert abs(wanted - 0.5) > 2.0**-8


def test_what_was_first_needed_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(window, "_rooms", OrderedDict())
    layer, x = EGRU(7, 5, backend="triton").to(DEVICE), torch.randn(2, 3, 7, device=DEVICE)
    with torch.inference_mode():
        wanted, _ = layer(x)
        stream = gpu.Stream(layer)
    output, _ = layer(x)
    output.sum().backward()
    assert torch.equal(output, wanted)
    close(stream.step(x[0, 0]), wanted[0, 0], STREAM_F32)


def test_layers_of_one_size_share_a_room_and_not_their_tapes():
    for options in ({}, {"reset_after": False}):
        layer = EGRU(6, 6, 3, backend="reference", learn_threshold=True, **options).double().to(DEVICE)
        other = EGRU(6, 6, 3, backend="triton", learn_threshold=True, **options).double().to(DEVICE)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(4, 2, 6, dtype=torch.float64, device=DEVICE)
        found = []
        for module in (layer, other):
            for _ in range(3 if ON_GPU and module is other else 1):
                module.zero_grad()
                first, state = module(x)
                second, _ = module(x.flip(0), state)
                (first.square() + second).sum().backward()
            found.append([first, second, *(p.grad for p in module.parameters())])
        for a, b in zip(*found, strict=True):
            close(b, a, 64 * GRADIENT_F64)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU, and the graphs are its own.")
@pytest.mark.parametrize("cell", ["egru", "lstm"])
def test_what_is_replayed_finds_the_tensors_of_its_own_call(monkeypatch, cell):
    """With a graph replaced by the loop it would hold: run, captured, and then always the loop of that second call."""
    captured = []

    def capture(self: window.Room, loop: Any) -> SimpleNamespace:
        captured.append(loop)
        return SimpleNamespace(replay=loop)

    made = window.Room.__init__
    monkeypatch.setattr(
        window.Room, "__init__", lambda self, size: (made(self, size), setattr(self, "captures", True))[0]
    )
    monkeypatch.setattr(window.Room, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(window, "_rooms", OrderedDict())
    for seed in range(4):
        compare(cell, inputs(cell, seed=seed))
        assert len(captured) == (2 if seed else 0)  # forward and backward
    compare(cell, inputs(cell, T=2))
    assert len(captured) == 2
    monkeypatch.setattr(window, "_GRAPHS", 1)
    compare(cell, inputs(cell))
    assert [len(room.graphs) for room in window._rooms.values()] == [1]


OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2, "batch_first": True, "learn_threshold": True},
    {"bidirectional": True, "output": "state"},
    {"bias": False, "event": "always", "reset": "none", "reset_after": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_layer_gives_the_same_on_either_backend(options, ragged):
    """With activity, whose gradient is one row for all steps and samples."""
    layer = EGRU(7, 6, **options, backend="reference").double().to(DEVICE)
    other = EGRU(7, 6, **options, backend="triton").double().to(DEVICE)
    other.load_state_dict(layer.state_dict())
    x = [torch.randn(n, 7, dtype=torch.float64) for n in ((2, 4, 3) if ragged else (4, 4, 4))]
    found = []
    for module in (layer, other):
        leaves = [v.to(DEVICE).requires_grad_() for v in x]
        batch = pack_sequence(leaves, enforce_sorted=False) if ragged else torch.stack(leaves)
        output, state, rates = module(batch, with_activity=True)
        flat = output.data if ragged else output
        total = (flat * torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype, device=DEVICE).view_as(flat)).sum()
        (total + state.h.sum() + sum(r.square().sum() for r in rates)).backward()
        wanted = [p.grad for p in module.parameters() if p.requires_grad]
        found.append([flat, *state, *rates, *wanted, *(v.grad for v in leaves)])
    for a, b in zip(*found, strict=True):
        close(b, a, 64 * GRADIENT_F64)


def test_a_module_under_autocast_multiplies_in_bfloat16_and_carries_float32():
    layer = EGRU(7, 6, output="state", backend="triton").to(DEVICE)
    x = torch.randn(3, 2, 7, device=DEVICE)
    wanted, _ = layer(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output, state = layer(x)
    assert output.dtype == state.h.dtype == torch.float32
    assert not torch.equal(output, wanted)
    close(output, wanted, BF16_CELL)
    output.sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("cell", [GRU, LSTM, RNN])
@pytest.mark.parametrize("ragged", [False, True])
def test_so_do_torch_s_layers_with_zoneout(draws, cell, ragged):
    layer = cell(7, 6, zoneout=0.2, bidirectional=True, backend="reference").double().to(DEVICE)
    other = cell(7, 6, zoneout=0.2, bidirectional=True, backend="triton").double().to(DEVICE)
    other.load_state_dict(layer.state_dict())
    x = [torch.randn(n, 7, dtype=torch.float64, device=DEVICE) for n in ((2, 4, 3) if ragged else (4, 4, 4))]
    found = []
    for module in (layer, other):
        torch.manual_seed(5)
        output, _ = module(pack_sequence(x, enforce_sorted=False) if ragged else torch.stack(x))
        flat = output.data if ragged else output
        flat.square().sum().backward()
        found.append([flat, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        close(b, a, 64 * GRADIENT_F64)


def test_auto_takes_a_gpu_s_kernels_on_a_gpu_alone(monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "egru", lambda x, *a, **k: (called.append(x.device.type), reference.egru(x, *a, **k))[1])
    EGRU(3, 5)(torch.zeros(6, 2, 3))
    EGRUCell(3, 5)(torch.zeros(2, 3))
    assert not called
    EGRUCell(3, 5, backend="triton")(torch.zeros(2, 3))
    assert called == ["cpu"]
    if ON_GPU:
        EGRU(3, 5).to(DEVICE)(torch.zeros(6, 2, 3, device=DEVICE))
        assert called == ["cpu", "cuda"]


def test_what_is_missing_is_said_once(monkeypatch):
    x = torch.zeros(2, 1, 3)
    monkeypatch.setattr(window, "_warn", functools.cache(window._warn.__wrapped__))
    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"plain loop runs: Triton is not installed \(pip install triton"):
        assert not gpu.available(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.available(x)
    with pytest.raises(ValueError, match=r"cannot take torch\.float64 on cpu: Triton is not installed"):
        gpu.egru(**{k: v.cpu() for k, v in inputs("egru").items()})
    monkeypatch.undo()
    monkeypatch.setattr(window, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"they run on a GPU, and torch\.cuda\.is_available\(\) is"):
        EGRU(3, 5, backend="triton")(x)


def test_errors_say_what_came():
    p = inputs("egru")
    with pytest.raises(ValueError, match=r"torch\.float16 on .*: they take float32, bfloat16 and float64"):
        gpu.egru(**{k: v.half() for k, v in p.items()})
    with pytest.raises(ValueError, match=r"another input torch\.float32 on .*: weight_hh"):
        gpu.egru(**{**p, "weight_hh": p["weight_hh"].float()})
    with pytest.raises(ValueError, match=r"weight_hh is \(18, 6\) for 6 units and x of 4 features, got \(18, 5\)"):
        gpu.egru(**{**p, "weight_hh": p["weight_hh"][:, :5]})
    with pytest.raises(ValueError, match=r"a state 2 \(batch, unit\), got \(3, 3, 4\), \(6,\)"):
        gpu.egru(**{**p, "h0": p["h0"][0]})
    with pytest.raises(ValueError, match=r"lengths is an int64 tensor \(3,\)"):
        gpu.gru(**inputs("gru"), lengths=torch.tensor([1, 2], device=DEVICE))


def test_torch_s_own_check_of_the_operators():
    p = inputs("egru", 2, 2, 3, 5)
    args = (*p.values(), None, None, "threshold", True, "threshold", False, 0.5, 0.5, 0.0, torch.float64)
    torch.library.opcheck(torch.ops.sparsefold.egru_gpu.default, args)
    args = (*inputs("lstm", 2, 2, 3, 5).values(), None, None, None, 0.0, 0.0, torch.float64)
    torch.library.opcheck(torch.ops.sparsefold.lstm_gpu.default, args)


def test_a_second_derivative_and_a_changed_weight_are_refused():
    p = inputs("egru")
    (g,) = torch.autograd.grad(gpu.egru(**p).y.sum(), [p["h0"]], create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()
    trace = gpu.egru(**p)
    with torch.no_grad():
        p["weight_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trace.y.sum().backward()


def test_a_model_around_it_can_be_compiled():
    model = Stack(torch.nn.Embedding(9, 7), EGRU(7, 6, output="state", backend="triton"), torch.nn.Linear(6, 9))
    model = model.double().to(DEVICE)
    x = torch.randint(9, (3, 2), device=DEVICE)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits, _, activity = run(x)
        (logits.square().mean() + activity.penalty(0.1, 1.0)).backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        close(b, a, GRADIENT_F64)


def in_blocks(layer: EGRU, density: float) -> EGRU:
    """A layer of whose 16x1 blocks, counted within each gate, a share is left."""
    H = layer.hidden_size
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("bias"):
                p.normal_()
            if name.startswith("weight"):
                lives = torch.rand(3, -(-H // 16), p.shape[1], device=p.device) < density
                p *= lives.repeat_interleave(16, 1)[:, :H].reshape(3 * H, -1)
    return layer


def blocks_read(weight: Tensor, read: Tensor) -> int:
    """Of a weight (3H, I): its blocks that exist and whose column of `read` (I,) is not zero."""
    H = len(weight) // 3
    parts = [weight[g * H + r : min(g * H + r + 16, (g + 1) * H)] for g in range(3) for r in range(0, H, 16)]
    return sum(int(((part != 0).any(0) & (read != 0)).sum()) for part in parts)


STREAMS: list[dict[str, Any]] = [
    {},
    {"reset_after": False, "reset": "output", "zoneout": 0.2},
    {"output": "state", "reset": "none", "bias": False},
    {"event": "always", "num_layers": 1},
]


@pytest.mark.parametrize("options", STREAMS, ids=str)
def test_a_stream_reads_what_spoke_of_what_exists(options):
    layer = in_blocks(EGRU(7, 21, **{"num_layers": 2} | options).double().to(DEVICE).eval(), 0.5)
    layer.backend = "reference"
    stream = gpu.Stream(layer)
    for steps in (1, 4):
        stream.reset()
        x = torch.randn(steps, 7, dtype=torch.float64, device=DEVICE) * (torch.rand(steps, 7, device=DEVICE) < 0.7)
        wanted, _ = layer(x[:, None])
        for t, row in enumerate(x):
            close(stream.step(row), wanted[t, 0])
        seen, events, blocks = x, [], []
        zero = x.new_zeros(1, 21)
        for k in range(layer.num_layers):
            trace = layer._run(f"_l{k}", seen[:, None], zero, zero)
            y = torch.cat([zero, trace.y[:, 0]])
            w_i, w_h = getattr(layer, f"weight_ih_l{k}"), getattr(layer, f"weight_hh_l{k}")
            blocks.append(sum(blocks_read(w_i, seen[t]) + blocks_read(w_h, y[t]) for t in range(steps)))
            events.append(int(trace.o.sum()))
            seen = trace.y[:, 0]
        assert stream.counts.tolist() == [list(pair) for pair in zip(events, blocks, strict=True)]


def test_a_stream_of_bfloat16_weights_computes_in_float32():
    layer = in_blocks(EGRU(7, 21, 2, output="state").to(DEVICE).eval(), 0.5)
    rounded = EGRU(7, 21, 2, output="state", backend="reference").double().to(DEVICE).eval()
    rounded.load_state_dict({k: v.bfloat16() if "weight" in k else v for k, v in layer.state_dict().items()})
    stream = gpu.Stream(layer, weights=torch.bfloat16)
    x = torch.randn(5, 7, device=DEVICE)
    wanted, _ = rounded(x[:, None].double())
    for t, row in enumerate(x):
        assert stream.step(row).dtype == torch.float32
        close(stream.output.double(), wanted[t, 0], STREAM_F32)


def test_a_stream_says_what_it_does_not_take(monkeypatch):
    layer = EGRU(7, 21).to(DEVICE)
    with pytest.raises(ValueError, match=r"x has shape \(7,\), got \(1, 7\)"):
        gpu.Stream(layer).step(torch.zeros(1, 7, device=DEVICE))
    with pytest.raises(ValueError, match="this EGRU is bidirectional"):
        gpu.Stream(EGRU(7, 21, bidirectional=True).to(DEVICE))
    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a Stream runs on a GPU, the EGRU is .* Triton is not installed"):
        gpu.Stream(layer)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to wait for.")
def test_a_step_of_training_waits_for_nothing_that_the_gpu_does(tmp_path):
    """Once all is compiled and captured: the host is to be ahead of the GPU from one evaluation to the next."""
    file = tmp_path / "words.txt"
    file.write_text("one two three four five six seven eight nine ten\n" * 600)
    settings = {"corpus": str(file), "hidden": (32, 32), "embedding": 32, "cutoffs": (4, 7), "tied": True, "batch": 4}
    config = resolved(LMConfig(**settings, precision="bfloat16", device="cuda", random_bptt=False, bptt=32, steps=100))
    trainer = lm.trainer_of(config, load_corpus(str(file), "word"), DEVICE)
    trainer.model.train()
    state, told = None, []
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            _, figures, state = _loop._advance(trainer, trainer.model, step, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        told.append(figures)
    assert all(0 < bits < 10 and norm > 0 and 0 < rate < 1 for bits, norm, rate in (figures.read() for figures in told))


def script(text: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_triton_is_not_imported_before_a_kernel_is_needed():
    script("import sys, sparsefold.nn, sparsefold.nn.gpu\nassert 'triton' not in sys.modules")


COMPILE = """
import inspect
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsefold.nn.gpu import kernels

common = dict(
    H=21, HP=32, D=7, ROWS=16, RESET="threshold", EVENT="threshold", LEAN=False, HEIGHT=0.5, WIDTH=0.5, ZONED=True, MASKED=True,
    KEEP=0.1, ZONED_C=True, MASKED_C=True, KEEP_C=0.0, ENDS=True, HAS_IH=True, HAS_HH=False, HAS_Y=True, HAS_U=True, HAS_O=False,
    HAS_H=True, HAS_C=True, LEARNS=True, HANDS_ON_STATE=True, STATE=tl.float32, IO=tl.float32, MATMUL=tl.bfloat16, BLOCK=256,
    CHUNK=64, CHUNKS=3,
)
whole = {"table": "*i64", "counts": "*i64", "columns": "*i32", "starts": "*i32", "t": "i32", "B": "i32"}
low = ("product", "product_rz", "product_n", "said", "scaled", "q", "q_rz", "q_n", "values")
made = 0
for name, kernel in vars(kernels).items():
    if not isinstance(kernel, triton.JITFunction) or name.startswith("_"):
        continue
    forms = ({"AFTER": True, "PART": "all"}, {"AFTER": False, "PART": "rest"})
    for form in forms if "AFTER" in kernel.arg_names else forms[:1]:
        constants = {k: v for k, v in (common | form).items() if k in kernel.arg_names}
        pointer = {n: "*bf16" if n in low and name != "stream_step" or n == "values" else "*fp32" for n in kernel.arg_names}
        if name == "fill":
            pointer |= {n: "i64" for n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else whole.get(n, pointer[n]) for n in kernel.arg_names}
        values = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
        assert triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        made += 1
print(made)
"""


@pytest.mark.skipif(ON_GPU, reason="the other tests compile every kernel, for this GPU.")
def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path):
    assert int(script(COMPILE, TRITON_CACHE_DIR=str(tmp_path))) == 10
