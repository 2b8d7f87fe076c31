"""The native cells against the definition: every form, both precisions, every instruction set; and as torch sees them."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import cases
from sparsefold import _native
from sparsefold.nn import EGRU, EGRUCell, EGRUState, Stack, Triangle, native, reference
from sparsefold.nn.reference import Event, Reset, Tape
from sparsefold.sparsify import Block, Pruner
from tolerances import CELL_F64, EPS32, GRADCHECK, GRADIENT_F64, egru_step, gradient_f32, product_f32

torch.set_num_threads(2)

FORMS = list(itertools.product(get_args(Reset), (True, False)))
# steps, batch, inputs, units: one of everything, below and above a vector, a tile and a part of a list, one sample
SHAPES = [(1, 1, 1, 1), (5, 3, 4, 6), (3, 2, 17, 33), (4, 1, 16, 64), (3, 19, 33, 130)]
# Of every unit the gradient of the message is needed: with blocks and this many samples they lie in the lanes.
WIDE, MANY = Triangle(0.5, 8.0), 20
NAMES = ("x", "y0", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "threshold")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(T=5, B=3, I=4, H=6, dtype=torch.float64, rate=1.0, seed=0) -> dict[str, Tensor]:  # noqa: E741
    """Leaves; a share `rate` of x is not zero, and about a third of the units speak."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    p = {
        "x": draw(T, B, I) * (torch.rand(T, B, I, generator=g) < rate),
        "y0": draw(B, H).clamp(min=0),
        "h0": draw(B, H) / 2,
        "weight_ih": draw(3 * H, I) / I**0.5,
        "weight_hh": draw(3 * H, H) / H**0.5,
        "bias_ih": draw(3 * H) / 4,
        "bias_hh": draw(3 * H) / 4,
        "threshold": draw(H).abs() / 8 + 0.02,
    }
    return {k: v.to(dtype).requires_grad_() for k, v in p.items()}


def gradients(trace: Any, leaves: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Of every leaf, zeros where nothing reaches it."""
    used = [(t, c) for t, c in zip(trace, cotangents, strict=True) if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in used], list(leaves.values()), [c for _, c in used], allow_unused=True, retain_graph=True
    )
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found, strict=True)}


def cotangents(trace: Any, seed: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in trace]


def close(a: Tensor, b: Tensor, atol: float = CELL_F64) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def both(p: dict[str, Tensor], **form: Any) -> tuple[Any, Any]:
    """The traces of reference and native, their zoneout drawn alike."""
    torch.manual_seed(3)
    wanted = reference.egru(**p, **form)
    torch.manual_seed(3)
    return wanted, native.egru(**p, **form)


def compare_f64(p: dict[str, Tensor], **form: Any) -> None:
    wanted, got = both(p, **form)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in wanted]
    for a, b in zip(wanted, got, strict=True):
        close(b, a)
    weights = cotangents(wanted)
    mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
    size = sum(p[n].numel() for n in ("x", "y0")) / 16 + 8  # more than the 64 pairs of GRADIENT_F64
    for name, g in theirs.items():
        close(mine[name], g, GRADIENT_F64 * size)


def test_signatures_are_the_reference_s():
    for name in ("egru",):
        assert inspect.signature(getattr(native, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("event", get_args(Event))
def test_every_form_in_float64(shape, reset, reset_after, event):
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "event": event, "surrogate": Triangle(0.7, 0.3)}
    for rate, (zoneout, training) in itertools.product((1.0, 0.2), ((0.0, False), (0.3, True), (0.3, False))):
        compare_f64(inputs(*shape, rate=rate), **form, zoneout=zoneout, training=training)


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(isa, monkeypatch, reset, reset_after, dtype):
    team = _native.Team(2, isa)
    monkeypatch.setattr(native, "_team", lambda: team)
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "surrogate": Triangle(0.7, 0.3)}
    compare = compare_f64 if dtype == torch.float64 else compare_f32
    for density in (1.0, 0.1):
        compare(in_blocks(inputs(4, 5, 20, 150, dtype, rate=0.3), density), **form)
    p = in_blocks(inputs(4, MANY, 40, 150, dtype), 0.1)
    compare(p, **form | {"surrogate": WIDE})
    mark(p)  # and the gradients of blocks alone, by all of x and by events
    trace = native.egru(**p, **form)
    mine, (weight, hidden) = gradients(trace, p, cotangents(trace)), (p["weight_ih"], p["weight_hh"])
    del weight.kept, hidden.kept
    full = gradients(native.egru(**p, **form), p, cotangents(trace))
    for name in ("weight_ih", "weight_hh"):
        held = p[name].detach() == 0
        assert not mine[name][held].any()
        largest = float(full[name].abs().max())
        bound = gradient_f32(4, MANY, 150, largest) if dtype == torch.float32 else 64 * GRADIENT_F64
        close(mine[name], full[name] * ~held, bound)


def compare_f32(p: dict[str, Tensor], **form: Any) -> None:
    """Gradients of a float32 run against float64 on the same numbers, whose events are the same."""
    got = native.egru(**p, **form)
    q = {k: v.detach().double().requires_grad_() for k, v in p.items()}
    wanted = reference.egru(**q, **form)
    assert torch.equal(got.o != 0, wanted.o != 0)  # the seed keeps away from ties
    weights = cotangents(got)
    mine, theirs = gradients(got, p, weights), gradients(wanted, q, [w.double() for w in weights])
    T, B, _ = p["x"].shape
    for name, g in theirs.items():
        close(mine[name].double(), g, gradient_f32(T, B, p["h0"].shape[1], float(g.abs().max())))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_gradients_in_float32(shape, reset, reset_after):
    for rate in (1.0, 0.2):
        compare_f32(inputs(*shape, torch.float32, rate), reset=reset, reset_after=reset_after)


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("units", [15, 33, 129])
def test_every_step_in_float32_from_its_own_state(reset, reset_after, zoneout, units):
    """Teacher-forced: each u against float64 within its bound, events equal but within that bound of the threshold."""
    r = cases.rng(units, 41)
    op = cases.egru(r, 17, units, reset=reset, reset_after=reset_after, zoneout=zoneout)
    x = (r.standard_normal((6, 2, 17)) * (r.random((6, 2, 17)) < 0.3)).astype(np.float32)
    y, h = np.zeros((2, units), np.float32), np.zeros((2, units), np.float32)
    arrays = [x, y, h, op.weight_ih.to_dense(), op.weight_hh.to_dense(), op.bias_ih, op.bias_hh, op.threshold]
    trace = native.egru(
        *(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays),
        reset=reset,
        reset_after=reset_after,
        zoneout=zoneout,
    )
    theta = torch.from_numpy(op.threshold)
    for t, b in itertools.product(range(6), range(2)):
        u, error = egru_step(op, x[t, b].astype(np.float64), np.zeros(17), y[b].astype(float), h[b].astype(float))
        got = trace.u[t, b].numpy()
        assert (np.abs(got - u) <= error).all()
        differs = (u > op.threshold) != (trace.o[t, b].numpy() > 0)
        assert not (differs & (np.abs(u - op.threshold) > error)).any()
        y[b] = trace.y[t, b].numpy()
        h[b] = reference.carried(trace.u[t, b], trace.o[t, b], theta, reset).numpy()
        np.testing.assert_array_equal(y[b], got * (trace.o[t, b].numpy() > 0))


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_the_smooth_tape_passes_finite_differences(reset, reset_after):
    p = inputs(3, 2, 2, 3)

    def run(*values):
        form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "event": "smooth", "zoneout": 0.2}
        return tuple(native.egru(**dict(zip(p, values, strict=True)), **form, surrogate=Triangle(0.8, 0.8)))

    assert torch.autograd.gradcheck(run, tuple(p.values()), **GRADCHECK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset_after", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch, dtype, reset_after):
    for density, batch, marked in ((1.0, 7, False), (0.1, 7, False), (0.1, MANY, False), (0.1, MANY, True)):
        # x as events: a dense product would be torch's, and so is the gradient of x of a dense weight
        p = in_blocks(inputs(6, batch, 20, 200, dtype, rate=0.3), density)
        if marked:
            mark(p)
        found = []
        for threads, runtime in ((1, True), (2, True), (2, False), (3, False), (7, True)):
            team = _native.Team(threads, runtime=runtime)
            monkeypatch.setattr(native, "_team", lambda team=team: team)
            trace = native.egru(**p, reset_after=reset_after, surrogate=Triangle() if batch == 7 else WIDE)
            leaves = {k: v for k, v in p.items() if k != "x" or density < 1}
            found.append([*trace, *gradients(trace, leaves, cotangents(trace)).values()])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_two_windows_are_one_sequence(reset, reset_after):
    p = inputs(8, 3, 20, 70, torch.float32, rate=0.3)
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after}
    whole = native.egru(**p, **form)
    first = native.egru(**{**p, "x": p["x"][:4]}, **form)
    second = native.egru(**{**p, "x": p["x"][4:], "y0": first.y_n, "h0": first.h_n}, **form)
    for name in ("y", "u", "o"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
    assert torch.equal(second.h_n, whole.h_n)
    assert torch.equal(second.y_n, whole.y_n)
    # Through the carried state the gradient is that of the whole, in float64 within the bound of another order of sums.
    q = {k: v.detach().double().requires_grad_() for k, v in p.items()}
    whole = native.egru(**q, **form)
    first = native.egru(**{**q, "x": q["x"][:4]}, **form)
    second = native.egru(**{**q, "x": q["x"][4:], "y0": first.y_n, "h0": first.h_n}, **form)
    weights = cotangents(whole)
    parts = [torch.cat([getattr(first, n), getattr(second, n)]) for n in ("y", "u", "o")] + [second.y_n, second.h_n]
    for a, b in zip(gradients(parts, q, weights).values(), gradients(whole, q, weights).values(), strict=True):
        close(a, b, 64 * GRADIENT_F64)
    # Cut between the windows: each window's own gradient, as the reference cuts it.
    for cell in (native, reference):
        first = cell.egru(**{**q, "x": q["x"][:4]}, **form)
        second = cell.egru(**{**q, "x": q["x"][4:], "y0": first.y_n.detach(), "h0": first.h_n.detach()}, **form)
        (first.y.sum() + second.y.square().sum()).backward()
    for leaf in q.values():
        assert leaf.grad is not None
    native_then_reference = {k: v.grad.clone() for k, v in q.items()}
    for v in q.values():
        v.grad = None
    first = reference.egru(**{**q, "x": q["x"][:4]}, **form)
    second = reference.egru(**{**q, "x": q["x"][4:], "y0": first.y_n.detach(), "h0": first.h_n.detach()}, **form)
    (first.y.sum() + second.y.square().sum()).backward()
    for k, v in q.items():
        close(native_then_reference[k], 2 * v.grad, 64 * GRADIENT_F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("event", get_args(Event))
def test_what_is_computed_again_has_the_same_bits(dtype, reset, reset_after, event):
    """A tape without gates; blocks, zoneout, windows one after the other."""
    for density, zoneout in ((1.0, 0.3), (0.2, 0.0)):
        p = in_blocks(inputs(6, 3, 20, 70, dtype, rate=0.3), density)
        form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "event": event, "zoneout": zoneout}
        found = []
        for tape in get_args(Tape):
            torch.manual_seed(3)
            first = native.egru(**p, **form, training=True, tape=tape)
            second = native.egru(**{**p, "y0": first.y_n, "h0": first.h_n}, **form, tape=tape)
            weights = cotangents([*first, *second])
            found.append([*first, *second, *gradients([*first, *second], p, weights).values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("tape", "per"), [("full", 28), ("recompute", 12)])
def test_the_tape_is_as_large_as_it_says(tape, per):
    """Bytes kept for each step, unit and sample: r, z, n, what r multiplies, u; y; and here x of as many features."""
    T, B, H = 6, 3, 64
    p = inputs(T, B, H, H, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        native.egru(**p, tape=tape)
    sequences = {t.data_ptr(): t.nbytes for t in saved if t.numel() >= T * B * H and t.shape != (3 * H, H)}
    assert sum(sequences.values()) == per * T * B * H


def in_blocks(p: dict[str, Tensor], density: float, seed: int = 11) -> dict[str, Tensor]:
    """The same with that share of the blocks of both weights left, drawn one by one."""
    q, g = {k: v.detach().clone() for k, v in p.items()}, torch.Generator().manual_seed(seed)
    for name in ("weight_ih", "weight_hh"):
        H, cols = len(q[name]) // 3, q[name].shape[1]
        alive = torch.rand(3, -(-H // 16), 1, cols, generator=g) < density
        q[name] *= alive.expand(-1, -1, 16, -1).flatten(1, 2)[:, :H].flatten(0, 1)
    return {k: v.requires_grad_() for k, v in q.items()}


def mark(p: dict[str, Tensor]) -> None:
    """Says of both weights that what is zero is held there."""
    for name in ("weight_ih", "weight_hh"):
        mask = p[name].detach() != 0
        p[name].kept = lambda mask=mask: mask  # type: ignore[attr-defined]


def packed(weight: Tensor) -> bool:
    return native._packs[weight].sparse


DENSITIES = [0.0, 0.05, 0.1, 0.5, 1.0]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_weights_in_blocks(density, reset, reset_after):
    """Dense and sparse x, sizes that a block does not divide; gradients of all weights, the missing ones too."""
    for T, B, I, H in ((5, 3, 4, 6), (3, 2, 17, 33), (4, 1, 70, 64), (3, 19, 33, 150)):  # noqa: E741
        for rate in (1.0, 0.2):
            p = in_blocks(inputs(T, B, I, H, rate=rate), density)
            compare_f64(p, reset=reset, reset_after=reset_after, surrogate=Triangle(0.7, 0.3))
            if H > 16 and density in (0.0, 0.05, 0.1, 1.0):
                assert packed(p["weight_hh"]) == (density < 1)
            single = {k: v.detach().float().requires_grad_() for k, v in p.items()}
            compare_f32(single, reset=reset, reset_after=reset_after)


def test_blocks_are_looked_for_at_every_call():
    """Written past autograd's count of versions, pruned, grown again, taken by more threads."""
    p = in_blocks(inputs(4, 3, 20, 70), 0.1)
    compare_f64(p)
    for change in (lambda w: w.data.mul_(2), lambda w: w.data[:, :9].zero_(), lambda w: w.data.normal_()):
        for name in ("weight_ih", "weight_hh"):
            change(p[name])
        compare_f64(p)
    assert not packed(p["weight_hh"])
    p = in_blocks(p, 0.2)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        trace = native.egru(**p)
        torch.set_num_threads(2)
        mine, theirs = (gradients(t, p, cotangents(trace)) for t in (trace, reference.egru(**p)))
        for name, g in theirs.items():
            close(mine[name], g, 64 * GRADIENT_F64)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_a_mark_leaves_out_the_gradient_of_what_is_held_at_zero(reset_after, density, rate):
    p = in_blocks(inputs(4, 3, 36, 90, rate=rate), density)
    full = gradients(native.egru(**p, reset_after=reset_after), p, cotangents(native.egru(**p)))
    masks = {}
    for name in ("weight_ih", "weight_hh"):
        masks[name] = p[name].detach() != 0
        masks[name][:, 3] = True  # may grow: nobody holds it
        p[name].kept = lambda mask=masks[name]: mask
    compare_f64(p, reset_after=reset_after)
    trace = native.egru(**p, reset_after=reset_after)
    mine = gradients(trace, p, cotangents(trace))
    for name, mask in masks.items():
        assert not mine[name][~mask].any()
        assert mine[name][:, 3].any()
        assert full[name][~mask].any()
        close(mine[name][mask], full[name][mask], GRADIENT_F64 * 64)
    assert full.keys() == mine.keys()


@pytest.mark.filterwarnings("ignore:.*no multiple of 16")
def test_a_layer_under_a_pruner_gives_the_same_on_either_backend():
    for options in ({}, {"recurrent_dropout": 0.4}, {"reset_after": False, "zoneout": 0.2}):
        found = []
        for layer in pair(**options):
            pruner = Pruner(layer, {"weight*": Block(density=0.2, block=(16, 1))})
            pruner.step()
            x = torch.randn(6, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            torch.manual_seed(5)
            layer(x)[0].square().sum().backward()
            found.append([p.grad for p in layer.parameters() if p.requires_grad])
            assert not layer.weight_hh_l0.grad[~pruner.masks["weight_hh_l0"]].any()
        for a, b in zip(*found, strict=True):
            close(b, a, 64 * GRADIENT_F64)


@pytest.mark.filterwarnings("ignore:.*no multiple of 16")
def test_threads_share_a_weight_in_blocks():
    layer = EGRU(40, 130, backend="native")
    Pruner(layer, {"weight*": Block(density=0.1, block=(16, 1))}).step()
    x = torch.randn(6, 3, 40)
    wanted = layer(x)[0].detach()

    def run(_: int) -> bool:
        same = True
        for _ in range(20):
            out = layer(x)[0]
            same &= torch.equal(out, wanted)
            torch.autograd.grad(out.sum(), [layer.weight_hh_l0])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


NOT_NUMBERS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reset_after", [True, False])
def test_what_is_no_number_arrives_where_the_reference_puts_it(bad, name, reset_after):
    for rate, density, batch in (
        (1.0, 1.0, 3), (0.2, 1.0, 3), (1.0, 0.1, 3), (0.2, 0.1, 3), (1.0, 0.1, MANY), (0.2, 0.1, MANY)
    ):  # fmt: skip
        p = in_blocks(inputs(5, batch, 20, 40, rate=rate), density)
        with torch.no_grad():
            at = p[name].reshape(-1)
            at[at.numel() // 2] = bad
        wanted, got = both(p, reset_after=reset_after, surrogate=Triangle() if batch == 3 else WIDE)
        for a, b in zip(wanted, got, strict=True):
            close(b, a, 16 * CELL_F64)
        weights = cotangents(wanted)
        mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
        for n in NAMES:
            close(mine[n], theirs[n], 64 * GRADIENT_F64)


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize("at", range(5))
def test_so_does_what_comes_from_above(bad, at):
    for density, reset_after, batch in itertools.product((1.0, 0.1), (True, False), (3, MANY)):
        p = in_blocks(inputs(5, batch, 20, 40, rate=0.2), density)
        if density < 1:
            mark(p)
        wanted, got = both(p, reset_after=reset_after, surrogate=Triangle() if batch == 3 else WIDE)
        weights = cotangents(wanted)
        weights[at].view(-1)[weights[at].numel() // 2] = bad
        mine, theirs = gradients(got, p, weights), gradients(wanted, p, weights)
        for n in NAMES:
            close(mine[n], theirs[n], 64 * GRADIENT_F64)


def test_a_tie_is_no_event():
    p = {k: torch.zeros_like(v) for k, v in inputs(1, 1, 4, 3).items()}
    p["h0"] = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64)
    p["threshold"] = torch.tensor([0.25, 0.25 - 2**-54, 0.25 + 2**-54], dtype=torch.float64)
    assert native.egru(**p).o.tolist() == [[[0.0, 1.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silence_is_plus_zero_and_costs_no_gradient(dtype):
    p = inputs(8, dtype=dtype)
    with torch.no_grad():
        p["h0"].clamp_(-1, 1)
        p["y0"].zero_()
        p["threshold"].fill_(1.6)  # beyond the surrogate's reach
    trace = native.egru(**p)
    assert (trace.u < 0).any()
    assert not trace.y.any()
    assert not trace.y.signbit().any()
    trace.y.sum().backward()
    assert not p["weight_hh"].grad.any()
    assert not p["weight_ih"].grad.any()


def test_a_gradient_is_needed_at_an_event_and_near_the_threshold_only():
    """With |v| exactly half_width the surrogate is zero; an event far above keeps its gradient."""
    surrogate = Triangle(0.5, 0.25)
    p = {k: torch.zeros_like(v).requires_grad_() for k, v in inputs(2, 1, 1, 4).items()}
    with torch.no_grad():
        p["h0"][:] = torch.tensor([[1.0, 0.5, 1.5, 0.25]])  # u = h / 2 in the first step
        p["threshold"][:] = 0.25
        p["weight_hh"].normal_()
    compare_f64(p, surrogate=surrogate)
    trace = native.egru(**p, surrogate=surrogate)
    assert trace.o[0].tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_an_empty_sequence_and_absent_biases():
    p = inputs(0)
    trace = native.egru(**p)
    assert trace.y.shape == (0, 3, 6)
    assert torch.equal(trace.h_n, p["h0"])
    q = inputs(3)
    for name in ("bias_ih", "bias_hh"):
        compare_with_none = {k: v for k, v in q.items() if k != name} | {name: None}
        wanted, got = both(compare_with_none)
        for a, b in zip(wanted, got, strict=True):
            close(b, a)
        leaves = {k: v for k, v in q.items() if k != name}
        mine, theirs = (gradients(t, leaves, cotangents(wanted)) for t in (got, wanted))
        for k in leaves:
            close(mine[k], theirs[k], GRADIENT_F64)


def test_torch_s_own_check_of_the_operators():
    p = inputs(3, 2, 3, 5)
    kept = torch.rand(15, 3) < 0.5, torch.rand(15, 5) < 0.5
    args = (*(p[n] for n in NAMES), None, *kept, "threshold", True, "threshold", 0.5, 0.5, 0.0, True)
    torch.library.opcheck(torch.ops.sparsefold.egru.default, (*args[:-1], False))
    torch.library.opcheck(torch.ops.sparsefold.egru.default, args)
    y, u, _, _, _, tape = (t.detach() for t in torch.ops.sparsefold.egru(*args))
    plain = [p[n].detach() for n in ("x", "y0", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "threshold")]
    torch.library.opcheck(
        torch.ops.sparsefold.egru_backward.default,
        ([torch.ones_like(y), None, None, None, None], *plain, None, *kept, tape, y, u, *args[11:], [True] * 8),
    )


def test_errors_say_what_came():
    p = inputs()
    with pytest.raises(ValueError, match=r"float32 and float64 on the processor, got torch\.float16 on cpu"):
        native.egru(**{k: v.half() for k, v in p.items()})
    with pytest.raises(ValueError, match=r"x is torch\.float64 on cpu, another input torch\.float32"):
        native.egru(**{**p, "weight_hh": p["weight_hh"].float()})
    with pytest.raises(ValueError, match=r"weight_hh is \(18, 6\) for 6 units and x of 4 features, got \(18, 5\)"):
        native.egru(**{**p, "weight_hh": p["weight_hh"][:, :5]})
    with pytest.raises(ValueError, match=r"h0 is \(3, 6\)"):
        native.egru(**{**p, "h0": p["h0"][:2]})
    with pytest.raises(ValueError, match="float32 and float64"):
        EGRU(3, 5, backend="native").half()(torch.zeros(5, 2, 3).half())
    with pytest.raises(ValueError, match="between 1 and 256 threads, got 0"):
        _native.Team(0)


OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    {"recurrent_dropout": 0.4, "learn_threshold": True, "reset": "output"},
    {"zoneout": 0.3, "reset_after": False, "output": "state"},
    {"bias": False, "event": "always", "reset": "none"},
    {"num_layers": 2, "tape": "recompute", "recurrent_dropout": 0.2},
]


def pair(**options: Any) -> tuple[EGRU, EGRU]:
    """The same layer on the reference and native."""
    layer = EGRU(7, 20, **options, backend="reference").double()
    other = EGRU(7, 20, **options, backend="native").double()
    other.load_state_dict(layer.state_dict())
    return layer, other


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_gives_the_same_on_either_backend(options, ragged, training):
    found = []
    x = [torch.randn(n, 7, dtype=torch.float64) for n in ((3, 6, 5) if ragged else (6, 6, 6))]
    for layer in pair(**options):
        layer.train(training)
        leaves = [v.clone().requires_grad_() for v in x]
        torch.manual_seed(5)
        batch = pack_sequence(leaves, enforce_sorted=False) if ragged else torch.stack(leaves)
        output, state, rates = layer(batch, with_activity=True)
        flat = output.data if ragged else output
        total = (flat * torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype).view_as(flat)).sum()
        (total + state.h.sum() + state.y.square().sum() + sum(r.square().sum() for r in rates)).backward()
        wanted = [p.grad for p in layer.parameters() if p.requires_grad]
        found.append([flat, *state, *rates, *wanted, *(v.grad for v in leaves)])
    for a, b in zip(*found, strict=True):
        close(b, a, 64 * GRADIENT_F64)


def test_auto_takes_the_kernels_for_sequences_of_real_numbers(monkeypatch):
    called = []
    monkeypatch.setattr(native, "egru", lambda x, *a, **k: (called.append(x.dtype), reference.egru(x, *a, **k))[1])
    EGRU(3, 5)(torch.zeros(6, 2, 3))
    EGRU(3, 5).double()(torch.zeros(6, 2, 3).double())
    EGRU(3, 5).bfloat16()(torch.zeros(6, 2, 3).bfloat16())
    EGRUCell(3, 5)(torch.zeros(2, 3))
    EGRU(3, 5, backend="reference")(torch.zeros(6, 2, 3))
    assert called == [torch.float32, torch.float64]
    EGRUCell(3, 5, backend="native")(torch.zeros(2, 3))
    assert len(called) == 3


def test_one_module_twice_in_one_graph_and_a_graph_twice():
    grads = []
    for layer in pair():
        x = torch.randn(5, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        first, state = layer(x)
        second, _ = layer(x.flip(0), state)
        loss = (first.square() + second).sum()
        loss.backward(retain_graph=True)
        once = layer.weight_hh_l0.grad.clone()
        loss.backward()
        close(layer.weight_hh_l0.grad, 2 * once)
        grads.append([p.grad for p in layer.parameters() if p.requires_grad] + [x.grad])
    for a, b in zip(*grads, strict=True):
        close(b, a, GRADIENT_F64)


def test_a_second_derivative_is_refused():
    p = inputs()
    (g,) = torch.autograd.grad(native.egru(**p).y.sum(), [p["h0"]], create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_what_was_saved_may_not_be_changed():
    p = inputs()
    trace = native.egru(**p)
    with torch.no_grad():
        p["weight_ih"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trace.y.sum().backward()


def test_copies_and_no_grad():
    layer = EGRU(7, 20, 2, backend="native")
    x = torch.randn(6, 2, 7)
    wanted = layer(x)[0].detach()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.backend == "native"
        assert torch.equal(other(x)[0], wanted)
    assert "backend='native'" in repr(layer)
    with torch.no_grad():
        output, state = layer(x)
        assert not output.requires_grad
        assert torch.equal(output, wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], wanted)
    assert isinstance(state, EGRUState)


def test_a_model_around_it_can_be_compiled():
    model = Stack(torch.nn.Embedding(9, 7), EGRU(7, 20, output="state"), torch.nn.Linear(20, 9))
    x = torch.randint(9, (6, 2))
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits, _, activity = run(x)
        (logits.square().mean() + activity.penalty(0.1, 1.0)).backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=64 * EPS32, atol=64 * EPS32)


def script(text: str) -> str:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_without_the_extension_the_modules_take_the_reference(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    assert EGRU(3, 5)(torch.zeros(6, 2, 3))[0].shape == (6, 2, 5)
    with pytest.raises(ValueError, match="the extension is not built"):
        EGRU(3, 5, backend="native")(torch.zeros(6, 2, 3))


def test_a_child_of_fork_works_alone():
    script(
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "from sparsefold.nn import EGRU, native\n"
        "layer, x = EGRU(70, 200), (torch.rand(6, 3, 70) < 0.2).float()\n"
        "team = native._team()\n"
        "with torch.no_grad():\n"
        "    wanted = layer(x)[0]\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        torch.set_num_threads(1)\n"
        "        native._team = lambda: team\n"
        "        os._exit(0 if torch.equal(layer(x)[0], wanted) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


def test_threads_are_those_that_torch_has_but_in_a_child_of_fork():
    """Torch's spin for milliseconds after each of its products: others would share their processors."""
    script(
        "import os, torch\n"
        "from sparsefold import _native\n"
        "from sparsefold.nn import EGRU, native\n"
        "gnu = any('libgomp.so.1' in line for line in open('/proc/self/maps'))\n"
        "assert _native.Team(2).borrows == gnu and not _native.Team(2, runtime=False).borrows\n"
        "torch.set_num_threads(2)\n"
        "layer, x = EGRU(70, 200), (torch.rand(6, 3, 70) < 0.2).float()\n"
        "torch.ones(1 << 20).add(1)\n"  # torch's threads are there
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert before > 1\n"
        "with torch.no_grad():\n"
        "    wanted = layer(x)[0]\n"
        "    assert len(os.listdir('/proc/self/task')) == before + (not gnu)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        team = _native.Team(2)\n"
        "        native._team = lambda: team\n"
        "        os._exit(0 if not team.borrows and torch.equal(layer(x)[0], wanted) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


def test_a_module_of_the_main_script_leaves_no_word_at_the_end():
    said = script(
        "import torch\n"
        "from sparsefold.nn import LSTM\n"
        "layer = LSTM(64, 64)\n"
        "y = layer(torch.randn(70, 2, 64))[0]\n"  # what lives at the end
        "y.sum().backward()\n"
    )
    assert said == ""


@pytest.mark.parametrize("columns", [40, 45])  # a vector of eight divides rows of the first alone
@pytest.mark.parametrize("depth", [0, 20, 200])
def test_a_product_is_the_same_by_way_of_padded_rows(columns, depth):
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    pairs = [(drawn(7, n), drawn(n, columns)) for n in (depth, 3)]
    bias = drawn(columns)
    for out in (torch.full((7, columns), torch.nan, dtype=torch.float64), drawn(7, columns + 6)[:, :columns]):
        assert native._product(out, *pairs) is out
        close(out, pairs[0][0] @ pairs[0][1] + pairs[1][0] @ pairs[1][1], GRADIENT_F64)
        native._product(out, pairs[0], bias=bias)
        close(out, pairs[0][0] @ pairs[0][1] + bias, GRADIENT_F64)


@pytest.mark.parametrize("factor", ["plain", "turned", "part", "part turned"])
def test_a_product_is_the_same_by_one_dnn(factor, monkeypatch):
    asked = []

    def one_dnn(a, b, *rest):
        assert b.is_contiguous() or b.t().is_contiguous()  # else it is a thousand times slower
        asked.append(len(b) if "turned" in factor else len(a))
        return torch.ops.mkldnn._linear_pointwise(a, b, *rest)

    monkeypatch.setattr(native, "_one_dnn", lambda: one_dnn)
    monkeypatch.setattr(native, "_SMALL_PRODUCT", 0)
    monkeypatch.setattr(native, "_PART", 70 * 45)
    monkeypatch.setattr(native, "_PART_ROWS", 100)
    a, b, few = torch.randn(190, 80), torch.randn(80, 45), (torch.randn(190, 3), torch.randn(3, 45))
    exact = a.double() @ b.double()
    if "part" in factor:
        a, b = torch.cat([a, a], 1)[:, :80], torch.cat([b, b], 1)[:, :45]
    if "turned" in factor:
        a = (torch.cat([a, a]) if "part" in factor else a).t().contiguous().t()[:190]
    bound = product_f32(85, (a.abs() @ b.abs() + 10).max().item())
    for out in (torch.full((190, 45), torch.nan), torch.randn(190, 60)[:, :45]):
        assert native._product(out, (a, b), few) is out
        close(out.double(), exact + few[0].double() @ few[1].double(), bound)
    parts = {"turned": [190], "part turned": [100, 90]}
    assert asked == parts.get(factor, [70, 70, 50]) * 2
    native._product(out, (a, b), bias=(bias := torch.randn(45)))
    close(out.double(), exact + bias, bound)
    known = len(asked)
    native._product(torch.empty(190, 45), (a[:, :20], b[:20]))  # short sums
    native._product(torch.empty(190, 45, dtype=torch.float64), (a.double(), b.double()))
    assert len(asked) == known


@pytest.mark.parametrize(
    ("isas", "intel", "asked"), [(["avx512"], False, True), (["avx512"], True, False), (["avx2"], False, False)]
)
def test_one_dnn_is_asked_where_mkl_leaves_avx512_alone(isas, intel, asked, monkeypatch):
    monkeypatch.setattr(_native, "available_isas", lambda: isas)
    monkeypatch.setattr(_native, "intel", lambda: intel)
    assert (native._one_dnn.__wrapped__() is not None) == asked
