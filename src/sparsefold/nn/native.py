"""The cells of `reference.py` on the library's own kernels, on the processor in float32 and float64: same names and signatures.

A sequence costs what its events cost, forward and backward (native/sequence.inl.hpp), and the gradient is the
reference's: what is left out would be multiplied by zero. Work is divided between `torch.get_num_threads()` threads; the
kernels' bits do not depend on how many there are. A product of dense x is torch's own, whose bits may.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .events import Triangle
from .kept import kept, live
from .reference import EGRUTrace, Event, LSTMTrace, Nonlinearity, Reset, Tape

try:
    from sparsefold import _native
except ImportError:  # the extension was not built: `nn` imports all the same, and the modules take the reference
    _native = None  # type: ignore[assignment]

# A product of x that is zero elsewhere beats a dense one up to this share.
_SPARSE_INPUT = 0.4
_SMALL_PRODUCT, _SHALLOW = 1 << 22, 64  # multiplications, and of each sum, from which oneDNN's preparations pay
_PART, _PART_ROWS = 1 << 20, 1024  # elements that it fills at a time, and rows of a transposed factor
_SPARSE_BLOCKS = 0.5  # blocks of 16 rows and a column beat whole tiles, and dense products, up to this share of them

_teams: dict[tuple[int, int], Any] = {}
atexit.register(_teams.clear)  # threads end before the interpreter does


def available(x: Tensor) -> bool:
    """Whether these kernels can run on tensors like x."""
    return _native is not None and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _team() -> Any:
    """The threads of this process: as many as torch has."""
    key = os.getpid(), torch.get_num_threads()
    if key not in _teams:
        _teams.clear()
        _teams[key] = _native.Team(key[1])
    return _teams[key]


def egru(
    x: Tensor,
    y0: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    threshold: Tensor,
    *,
    reset: Reset = "threshold",
    reset_after: bool = True,
    surrogate: Triangle = Triangle(),  # noqa: B008 - frozen
    event: Event = "threshold",
    zoneout: float = 0.0,
    training: bool = False,
    tape: Tape = "full",
) -> EGRUTrace:
    """`reference.egru`, whose equations hold here: per step only rows of weight_hh whose unit spoke are read.

    Backward: the gradient of a message is made only where o = 1 or surrogate(u − θ) ≠ 0 (elsewhere it would be multiplied
    by zero), that of a weight only from units that spoke; x counts as events where at most 40 % of it is not zero.
    Beside x and y, backward needs u, and with tape="full" r, z, n and W_hn y + b_hn: 20 bytes for each step, unit and sample in
    float32, 40 in float64. With tape="recompute" it keeps u alone, 4 or 8 bytes, and the forward's work is done once more, with
    the same bits. While backward runs, the gates' gradients take 16 or 32 bytes more (with reset_after=True and "recompute" in
    place of what is computed again). Events follow from u, and are kept by nobody.
    Tensors are float32 or float64, on the processor, all of one dtype; ValueError otherwise. Not twice differentiable.
    """
    B, H, I = x.shape[-2] if x.dim() > 1 else 0, threshold.numel(), x.shape[-1]  # noqa: E741
    state, bias = (B, H), (3 * H,)
    _check(
        x,
        h0,
        {
            "y0": (y0, state),
            "h0": (h0, state),
            "weight_ih": (weight_ih, (3 * H, I)),
            "weight_hh": (weight_hh, (3 * H, H)),
            "bias_ih": (bias_ih, bias),
            "bias_hh": (bias_hh, bias),
            "threshold": (threshold, (H,)),
        },
    )
    if not len(x):
        empty = y0.new_empty(0, *y0.shape)
        return EGRUTrace(empty, empty, empty, y0, h0)
    mask = None
    if zoneout and training:
        mask = torch.empty(len(x), *y0.shape, dtype=x.dtype)
        for step in mask:  # one draw a step, as the reference draws
            step.bernoulli_(1 - zoneout)
    keep = 0.0 if training else zoneout
    y, u, o, y_n, h_n, _ = _egru(
        x,
        y0,
        h0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        threshold.clamp(min=0),
        mask,
        kept(weight_ih),
        kept(weight_hh),
        reset,
        reset_after,
        event,
        surrogate.height,
        surrogate.half_width,
        keep,
        tape == "full",
    )
    return EGRUTrace(y, u, o, y_n, h_n)


def _empty(team: Any, like: Tensor, *shape: int) -> Tensor:
    """A fresh tensor to be written whole, on large pages where it is large."""
    out = like.new_empty(shape)
    if out.nbytes > 1 << 22:
        team.advise(out)
    return out


@functools.cache
def _one_dnn() -> Any:
    """Torch's product by oneDNN where it beats MKL's, which leaves AVX-512 alone on what Intel did not make; else None."""
    asked = "avx512" in _native.available_isas() and not _native.intel() and torch._C._has_mkldnn
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if asked else None


def _product(out: Tensor, *factors: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
    """Fills `out` with the sum of the matrix products of `factors`, + bias, and returns it, as is fastest (docs/benchmarks.md,
    "Choices").

    Where there is no AVX-512 MKL is slow to fill rows that no vector of eight divides, and a copy of them costs less.
    """
    (a, b), *more = factors
    depth, small = a.shape[1], len(a) * b.shape[1] * a.shape[1] < _SMALL_PRODUCT
    linear = None if small or depth < _SHALLOW or out.dtype != torch.float32 else _one_dnn()
    if linear is not None:
        _product_by_one_dnn(linear, out, a, b, bias)
        to = out
    else:
        to = (
            out
            if out.stride(0) % 8 == 0 or depth < 128
            else out.new_empty(len(a), -(-b.shape[1] // 8) * 8)[:, : b.shape[1]]
        )
        if bias is None:
            torch.mm(a, b, out=to)
        else:
            torch.addmm(bias, a, b, out=to)
    for a, b in more:
        to.addmm_(a, b)
    return out if to is out else out.copy_(to)


def _product_by_one_dnn(linear: Any, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Fills `out` with a b + bias; of a transposed `a` the transposed product.

    It comes as a tensor of its own: a part at a time, which stays in the cache until it is copied. The second factor has to be
    dense, in either order of its axes: oneDNN has nothing fast for others.
    """

    def dense(w: Tensor) -> Tensor:
        return w if w.is_contiguous() or w.t().is_contiguous() else w.t().contiguous().t()

    if bias is None and a.stride(1) != 1:
        other, part = b.t().contiguous(), len(a) if dense(a) is a else _PART_ROWS
        for rows, into in zip(torch.split(a, part), torch.split(out, part), strict=True):
            into.copy_(linear(other, dense(rows), None, "none", [], "").t())
    else:
        other, part = dense(b.t()), max(_PART // b.shape[1], 64)
        for rows, into in zip(torch.split(a, part), torch.split(out, part), strict=True):
            into.copy_(linear(rows, other, bias, "none", [], ""))


def _options(
    reset: str, reset_after: bool, event: str, height: float, half_width: float, keep: float
) -> dict[str, Any]:
    return {
        "reset": reset,
        "reset_after": reset_after,
        "event": event,
        "height": height,
        "half_width": half_width,
        "keep": keep,
    }


def _plain(t: Tensor | None) -> Tensor | None:
    """What crosses to the kernels: without gradient, contiguous."""
    return None if t is None else t.detach().contiguous()


def _padded(units: int) -> int:
    return -(-units // 16) * 16


@torch.library.custom_op("sparsefold::egru", mutates_args=())
def _egru(
    x: Tensor,
    y0: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    theta: Tensor,
    mask: Tensor | None,
    kept_ih: Tensor | None,
    kept_hh: Tensor | None,
    reset: str,
    reset_after: bool,
    event: str,
    height: float,
    half_width: float,
    keep: float,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, u, o, y_n, h_n, tape); the tape holds r, z, n and what r multiplies, (T·B, 4H), or nothing unless it is `full`."""
    team = _team()
    (T, B, _), H = x.shape, y0.shape[1]
    x, y0, h0, theta = (t.detach().contiguous() for t in (x, y0, h0, theta))
    mask = _plain(mask)
    y, u, o = (_empty(team, x, T, B, H) for _ in range(3))
    h_n = torch.empty_like(h0)
    options = _options(reset, reset_after, event, height, half_width, keep)
    w = _packed(team, weight_hh, kept_hh, _parts(reset_after), fresh=True)
    w_i = _input_weight(team, x, weight_ih, kept_ih, fresh=True)
    gates = _forward(team, options, x, w_i, w, bias_ih, bias_hh, theta, mask, y0, h0, u, o, y, h_n)
    return y, u, o, y[-1].clone(), h_n, gates if full else x.new_empty(0)


def _forward(
    team: Any,
    options: dict[str, Any],
    x: Tensor,
    weight_ih: tuple[Tensor, _Packed, bool],
    w: _Packed,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    theta: Tensor,
    mask: Tensor | None,
    y0: Tensor,
    h0: Tensor,
    u: Tensor,
    o: Tensor | None,
    y: Tensor,
    h_n: Tensor,
) -> Tensor:
    """r, z, n and what r multiplies, (T·B, 4H); fills u, o, y and h_n, or reads u and y of a forward that was, without o."""
    (T, B, I), H, reset_after = x.shape, y0.shape[1], options["reset_after"]  # noqa: E741
    gates = _empty(team, x, T * B, 4 * H)
    bias = x.new_zeros(3 * H) if bias_ih is None else bias_ih.detach().clone()
    bias_n = None
    if bias_hh is not None:
        inside = 2 * H if reset_after else 3 * H
        bias[:inside] += bias_hh.detach()[:inside]
        bias_n = bias_hh.detach()[2 * H :].contiguous() if reset_after else None
    _input_product(team, x.view(T * B, I), *weight_ih, bias, gates)
    team.egru_forward(options, w.turned, *w.product, w.wild, bias_n, theta, mask, y0, h0, gates, u, o, y, h_n)
    return gates


class _Packed(NamedTuple):
    """A weight as the kernels read it: by its live blocks if there are few, else transposed if anyone asked for that."""

    key: tuple[Any, ...] | None  # what it was made from; None: nobody can tell
    blocks: list[Any]  # of each part
    turned: Tensor | None
    wild: bool  # a weight is not finite; known where `turned` is given

    @property
    def sparse(self) -> bool:
        return all(b.packed for b in self.blocks)

    @property
    def product(self) -> list[Any]:
        """Blocks of the two parts that the loops take, None for a part that is read transposed or is not there."""
        return [*self.blocks, None][:2] if self.sparse else [None, None]


_packs: MutableMapping[Tensor, _Packed] = WeakTensorKeyDictionary()
atexit.register(_packs.clear)  # what a module of the main script still holds there, the binding takes for a leak
_lock = threading.Lock()


def _parts(reset_after: bool) -> tuple[int, ...]:
    """Gates of weight_hh that are multiplied by the same y."""
    return (3,) if reset_after else (2, 1)


def _packed(
    team: Any, weight: Tensor, mask: Tensor | None, parts: tuple[int, ...], *, fresh: bool = False, turn: bool = True
) -> _Packed:
    """`weight` (3H, I) packed; one that the forward left is taken unless it shall be `fresh`.

    The forward always looks anew: a write through `weight.data` does not move the version. What backward finds then
    is what the forward read.
    """
    with _lock:
        old = _packs.get(weight)
    key = None
    if not weight.is_inference():
        key = (weight._version, weight.data_ptr(), tuple(weight.shape), parts, None if mask is None else id(mask))
    if old is not None and not fresh and key is not None and old.key == key and not (turn and _unread(old)):
        return old
    w = weight.detach().contiguous()
    H = len(w) // sum(parts)
    blocks, first = [], 0
    for i, gates in enumerate(parts):
        rows = w[first * H : (first + gates) * H]
        held = None if mask is None else _kept_blocks(mask, first, gates, H)
        previous = old.blocks[i] if old is not None and len(old.blocks) == len(parts) else None
        if previous is not None and type(previous) is not _blocks_type(w):
            previous = None
        blocks.append(team.pack(rows, gates, _SPARSE_BLOCKS, previous, held))
        first += gates
    made = _Packed(key, blocks, None, False)
    if turn and not made.sparse:
        turned = _empty(team, w, 3 * _padded(H) * w.shape[1])
        made = made._replace(turned=turned, wild=_transpose(team, w, parts, turned))
    with _lock:
        _packs[weight] = made
    return made


def _unread(old: _Packed) -> bool:
    return old.turned is None and not old.sparse


def _blocks_type(w: Tensor) -> Any:
    return _native.BlocksF32 if w.dtype == torch.float32 else _native.BlocksF64


_masks: MutableMapping[Tensor, tuple[int, dict[tuple[int, int], Any]]] = WeakTensorKeyDictionary()


def _kept_blocks(mask: Tensor, first: int, gates: int, H: int) -> Any:
    """The blocks of those gates of a mask that hold a kept weight."""
    with _lock:
        key, found = _masks.get(mask, (-1, {}))
    if key != mask._version:
        key, found = mask._version, {}
    if (first, gates) not in found:
        rows: Any = mask.detach()[first * H : (first + gates) * H].contiguous().cpu().view(torch.uint8)
        found = found | {(first, gates): _native.KeptBlocks(rows, gates)}
        with _lock:
            _masks[mask] = key, found
    return found[first, gates]


def _transpose(team: Any, weight: Tensor, parts: tuple[int, ...], out: Tensor) -> bool:
    """Fills `out` with weight (3H, I) as the loops read it; whether a weight is not finite."""
    H = len(weight) // sum(parts)
    size, first, wild = _padded(H) * weight.shape[1], 0, False
    for gates in parts:
        last = first + gates
        wild |= team.transpose(weight[first * H : last * H], gates, out[first * size : last * size])
        first = last
    return wild


def _is_events(team: Any, x: Tensor) -> bool:
    return bool(team.count(x) <= _SPARSE_INPUT * x.numel())


def _input_weight(
    team: Any, x: Tensor, weight: Tensor, mask: Tensor | None, *, fresh: bool, gates: int = 3
) -> tuple[Tensor, _Packed, bool]:
    """The weight, the same packed, and whether x counts as events."""
    events = gates == 3 and _is_events(team, x)
    return weight.detach(), _packed(team, weight, mask, (gates,), fresh=fresh, turn=events), events


def _input_product(team: Any, x: Tensor, weight: Tensor, w: _Packed, events: bool, bias: Tensor, gates: Tensor) -> None:
    """W_i x + b into the first columns of each row of `gates`."""
    if w.sparse:
        team.input_product(None, w.blocks[0], bias, x, events, gates)
    elif events and not w.wild:
        team.input_product(w.turned, None, bias, x, events, gates)
    else:
        _product(gates[:, : len(weight)], (x, weight.t()), bias=bias)


@_egru.register_fake
def _(x: Tensor, y0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (T, B, _), H, full = x.shape, y0.shape[1], rest[-1]
    sequence = [x.new_empty(T, B, H) for _ in range(3)]
    return *sequence, x.new_empty(B, H), x.new_empty(B, H), x.new_empty((T * B, 4 * H) if full else 0)


@torch.library.custom_op("sparsefold::egru_backward", mutates_args=())
def _egru_backward(
    grads: list[Tensor | None],
    x: Tensor,
    y0: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    theta: Tensor,
    mask: Tensor | None,
    kept_ih: Tensor | None,
    kept_hh: Tensor | None,
    tape: Tensor,
    y: Tensor,
    u: Tensor,
    reset: str,
    reset_after: bool,
    event: str,
    height: float,
    half_width: float,
    keep: float,
    full: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y0, h0, weight_ih, weight_hh, bias_ih, bias_hh and theta, empty where `wants` has none."""
    team = _team()
    (T, B, I), H = x.shape, y0.shape[1]  # noqa: E741
    x, y0, h0, theta = (t.detach().contiguous() for t in (x, y0, h0, theta))
    y, u, mask = y.detach(), u.detach(), _plain(mask)
    wants_x, wants_y0, _, wants_w_i, wants_w_h = wants[:5]
    options = _options(reset, reset_after, event, height, half_width, keep)
    w = _packed(team, weight_hh, kept_hh, _parts(reset_after))
    w_i = _input_weight(team, x, weight_ih, kept_ih, fresh=False)
    rows = tape.detach()
    if not full:
        rows = _forward(
            team, options, x, w_i, w, bias_ih, bias_hh, theta, mask, y0, h0, u, None, y, torch.empty_like(h0)
        )  # fmt: skip
    # What was computed again is read by nobody else; where r scales y, the outer product below reads it.
    gates = _empty(team, x, T * B, 4 * H) if full or not reset_after else rows
    dy, dh, dtheta, dbias = (x.new_empty(n) for n in ((B, H), (B, H), (H,), (4 * H,)))
    wild = torch.zeros(T * B, dtype=torch.uint8)
    grads = [_plain(g) for g in grads]
    team.egru_backward(
        options, w.turned, *w.product, w.wild, theta, mask, y0, h0, rows, u, y,
        grads[0], grads[1], grads[2], grads[3], grads[4], wants_y0, gates, dy, dh, dtheta, dbias, wild,
    )  # fmt: skip
    none = x.new_empty(0)
    flat = x.view(T * B, I)
    dx = dw_i = dw_h = none
    weight, packed, events = w_i
    if wants_x:
        dx = torch.empty_like(flat)
        if packed.sparse:
            team.input_gradient(packed.blocks[0], gates, dx)
        else:
            _product(dx, (gates[:, : 3 * H], weight))
        dx = dx.view(T, B, I)
    if wants_w_i and kept_ih is not None and packed.sparse:
        dw_i = _empty(team, x, 3 * H, I).zero_()
        team.outer_blocks(gates, [0, H, 2 * H], None, flat, wild, packed.blocks[0], dw_i)
    elif wants_w_i and events:
        dw_i = _empty(team, x, 3 * H, I)
        held = packed.blocks[0] if kept_ih is not None else None
        team.outer(gates, [0, H, 2 * H], None, flat, None, wild, held, dw_i)
    elif wants_w_i:
        dw_i = _product(_empty(team, x, 3 * H, I), (gates[:, : 3 * H].t(), flat))
        if kept_ih is not None:
            dw_i.masked_fill_(~live(weight, kept_ih, 3), 0)
    if wants_w_h and kept_hh is not None and w.sparse:
        dw_h = _empty(team, x, 3 * H, H).zero_()
        if reset_after:
            team.outer_blocks(gates, [0, H, 3 * H], y0, y, wild, w.blocks[0], dw_h)
        else:
            r = rows[:, :H].view(T, B, H)
            team.outer_blocks(gates, [0, H], y0, y, wild, w.blocks[0], dw_h[: 2 * H])
            team.outer_blocks(gates, [2 * H], r[0] * y0, r[1:] * y[:-1], wild, w.blocks[1], dw_h[2 * H :])
    elif wants_w_h:
        dw_h = _empty(team, x, 3 * H, H)
        of = w.blocks if kept_hh is not None else [None, None]
        if reset_after:
            team.outer(gates, [0, H, 3 * H], y0, y, None, wild, of[0], dw_h)
        else:
            team.outer(gates, [0, H], y0, y, None, wild, of[0], dw_h[: 2 * H])
            team.outer(gates, [2 * H], y0, y, rows, wild, of[1], dw_h[2 * H :])
    outside = dbias[: 3 * H].clone()
    inside = torch.cat([dbias[: 2 * H], dbias[3 * H :]]) if reset_after else outside.clone()
    return dx, dy, dh, dw_i, dw_h, outside, inside, dtheta


@_egru_backward.register_fake
def _(grads: Any, x: Tensor, y0: Tensor, h0: Tensor, weight_ih: Tensor, *rest: Any) -> Any:
    H, wants = y0.shape[1], rest[-1]
    dx = torch.empty_like(x) if wants[0] else x.new_empty(0)
    dw_i = torch.empty_like(weight_ih) if wants[3] else x.new_empty(0)
    dw_h = x.new_empty(3 * H, H) if wants[4] else x.new_empty(0)
    return (
        dx, torch.empty_like(y0), torch.empty_like(h0), dw_i, dw_h, x.new_empty(3 * H), x.new_empty(3 * H), x.new_empty(H)
    )  # fmt: skip


_TENSORS = 11  # of the operator's inputs


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, full = inputs
    y, u, o, _, _, tape = output
    ctx.save_for_backward(*saved[:_TENSORS], tape, y, u)
    options = [*saved[_TENSORS:], full]
    # Where every unit always speaks there is no step to differentiate, as in the reference.
    ctx.mark_non_differentiable(*((tape, o) if options[2] == "always" else (tape,)))
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:8]]
    g = _egru_backward(list(grads[:5]), *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 10)


_egru.register_autograd(_backward, setup_context=_setup)


def _check(x: Tensor, h0: Tensor, shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """ValueError unless all tensors are of one kind and fit."""
    if not available(x):
        raise ValueError(
            f"the native kernels take float32 and float64 on the processor, got {x.dtype} on {x.device}"
            f"{'' if _native else ', and the extension is not built'}. Use sparsefold.nn.reference for it."
        )
    if x.dim() != 3 or h0.dim() != 2:
        raise ValueError(
            f"x has 3 axes (time, batch, feature) and a state 2 (batch, unit), got {tuple(x.shape)}, {tuple(h0.shape)}."
        )
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"x is {x.dtype} on {x.device}, another input {t.dtype} on {t.device}: {name}. Convert one of them."
            )
        if t.shape != shape:
            raise ValueError(
                f"{name} is {shape} for {h0.shape[1]} units and x of {x.shape[2]} features, got {tuple(t.shape)}."
            )


# --- cells whose state is dense (native/gated.inl.hpp): the products over all steps are torch's, the loop is ours ---------------


def gru(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    reset_after: bool = True,
    zoneout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.gru`, whose equations hold here. `lengths` descend. Not twice differentiable.

    Tensors are float32 or float64, on the processor, all of one dtype; ValueError otherwise.
    """
    kind = "gru" if reset_after else "gru_before"
    h, _, h_n, _ = _sequence(kind, x, h0, None, weight_ih, weight_hh, bias_ih, bias_hh, zoneout, 0.0, training, lengths)
    return h, h_n


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
) -> LSTMTrace:
    """`reference.lstm`, whose equations hold here; what `gru` asks of its inputs holds here too."""
    return LSTMTrace(
        *_sequence("lstm", x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, zoneout, zoneout_cell, training, lengths)
    )


def rnn(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    nonlinearity: Nonlinearity = "tanh",
    zoneout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.rnn`, whose equation holds here; what `gru` asks of its inputs holds here too."""
    h, _, h_n, _ = _sequence(
        nonlinearity, x, h0, None, weight_ih, weight_hh, bias_ih, bias_hh, zoneout, 0.0, training, lengths
    )
    return h, h_n


_GATES = {"gru": 3, "gru_before": 3, "lstm": 4, "tanh": 1, "relu": 1}
_TAPE = _GATES | {"gru": 4}  # values a step leaves for each unit and sample: a gru's fourth is what r multiplies


def _sequence(
    kind: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    zoneout: float,
    zoneout_cell: float,
    training: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, c (T, B, H) and both after the last step; those of c are empty but for an LSTM."""
    B, I = x.shape[-2] if x.dim() > 1 else 0, x.shape[-1] if x.dim() else 0  # noqa: E741
    H = h0.shape[-1] if h0.dim() else 0
    rows, state = _GATES[kind] * H, (B, H)
    _check(
        x,
        h0,
        {
            "h0": (h0, state),
            "c0": (c0, state),
            "weight_ih": (weight_ih, (rows, I)),
            "weight_hh": (weight_hh, (rows, H)),
            "bias_ih": (bias_ih, (rows,)),
            "bias_hh": (bias_hh, (rows,)),
        },
    )
    until = None
    if lengths is not None:
        if lengths.shape != (B,) or (lengths.diff() > 0).any():
            raise ValueError(
                f"lengths are one for each of {B} samples, longest first, got {lengths.tolist()}. Sort the samples by length."
            )
        until = (lengths > torch.arange(len(x))[:, None]).sum(1, dtype=torch.int32)
    if not len(x):
        empty = h0.new_empty(0, *h0.shape)
        return empty, empty, h0, h0 if c0 is None else c0
    shares = (zoneout, zoneout_cell)
    masks: list[Tensor | None] = [
        torch.empty(len(x), *state, dtype=x.dtype) if q and training else None for q in shares
    ]
    for t in range(len(x)):  # the draws of a step together, as the reference draws
        for mask, q in zip(masks, shares, strict=True):
            if mask is not None:
                mask[t].bernoulli_(1 - q)
    keep = (0.0, 0.0) if training else shares
    held = kept(weight_ih), kept(weight_hh)
    h, c, h_n, c_n, _ = _gated(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, *masks, *held, until, kind, *keep)
    return h, c, h_n, c_n


@torch.library.custom_op("sparsefold::gated", mutates_args=())
def _gated(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    kept_ih: Tensor | None,
    kept_hh: Tensor | None,
    until: Tensor | None,
    kind: str,
    keep_h: float,
    keep_c: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, c, h_n, c_n, tape); the tape is (T·B, values · H), and c empty but for an LSTM."""
    team = _team()
    (T, B, _), H, rows = x.shape, h0.shape[1], weight_ih.shape[0]
    x, h0, w_h = (t.detach().contiguous() for t in (x, h0, weight_hh))
    tape, out = _empty(team, x, T * B, _TAPE[kind] * H), _empty(team, x, T, B, H)
    cells = None if c0 is None else _empty(team, x, T, B, H)
    bias, bias_n = x.new_zeros(rows) if bias_ih is None else bias_ih.detach().clone(), None
    if bias_hh is not None:
        outside = 2 * H if kind == "gru" else rows
        bias[:outside] += bias_hh.detach()[:outside]
        bias_n = bias_hh.detach()[2 * H :].contiguous() if kind == "gru" else None
    flat = x.view(T * B, x.shape[2])
    w_i = _input_weight(team, flat, weight_ih, kept_ih, fresh=True, gates=_GATES[kind])
    _input_product(team, flat, *w_i, bias, tape)
    w = _packed(team, weight_hh, kept_hh, _products(kind), fresh=True, turn=False)
    masks = _plain(mask_h), _plain(mask_c)
    team.gated_forward(
        kind, keep_h, keep_c, w_h, *w.product, bias_n, *masks, h0, _plain(c0), until, tape, out, cells
    )  # fmt: skip
    if cells is None:
        return out, x.new_empty(0), out[-1].clone(), x.new_empty(0), tape
    return out, cells, out[-1].clone(), cells[-1].clone(), tape


@_gated.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    (T, B, _), H, kind = x.shape, h0.shape[1], rest[-3]
    tape = x.new_empty(T * B, _TAPE[kind] * H)
    if c0 is None:
        return x.new_empty(T, B, H), x.new_empty(0), x.new_empty(B, H), x.new_empty(0), tape
    return x.new_empty(T, B, H), x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H), tape


@torch.library.custom_op("sparsefold::gated_backward", mutates_args=())
def _gated_backward(
    grads: list[Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    kept_ih: Tensor | None,
    kept_hh: Tensor | None,
    until: Tensor | None,
    tape: Tensor,
    h: Tensor,
    c: Tensor,
    kind: str,
    keep_h: float,
    keep_c: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih and bias_hh, empty where `wants` has none."""
    team = _team()
    (T, B, I), H, rows = x.shape, h0.shape[1], weight_ih.shape[0]  # noqa: E741
    x, h0, w_h = (t.detach().contiguous() for t in (x, h0, weight_hh))
    tape, h = tape.detach(), h.detach()
    gates = _empty(team, x, T * B, _TAPE[kind] * H)
    dx, dc, dw_i, dw_h = (x.new_empty(0) for _ in range(4))
    dh, dbias = torch.empty_like(h0), x.new_empty(_TAPE[kind] * H)
    if c0 is not None:
        dc = torch.empty_like(h0)
    above = [_plain(g) for g in grads]
    masks, cells = (_plain(mask_h), _plain(mask_c)), None if c0 is None else c.detach()
    w = _packed(team, weight_hh, kept_hh, _products(kind), turn=False)
    team.gated_backward(
        kind, keep_h, keep_c, w_h, *w.product, *masks, h0, _plain(c0), until, tape, h, cells,
        *above, gates, dh, None if c0 is None else dc, dbias,
    )  # fmt: skip
    outer, number = gates[:, :rows], _GATES[kind]
    flat, first = x.view(T * B, I), [H * i for i in range(number)]
    if wants[0] or wants[3]:
        w_i = _packed(team, weight_ih, kept_ih, (number,), turn=False)
    if wants[0]:
        if w_i.sparse:
            dx = torch.empty_like(x)
            team.input_gradient(w_i.blocks[0], gates, dx.view(T * B, I))
        else:
            dx = _product(_empty(team, x, T * B, I), (outer, weight_ih.detach())).view(T, B, I)
    if wants[3]:
        if kept_ih is not None and w_i.sparse:
            dw_i = _empty(team, x, rows, I).zero_()
            team.outer_blocks(gates, first, None, flat, None, w_i.blocks[0], dw_i)
        else:
            dw_i = _product(_empty(team, x, rows, I), (outer.t(), flat))
            _held(dw_i, weight_ih, kept_ih, number)
    if wants[4] and kept_hh is not None and w.sparse:
        dw_h = _empty(team, x, rows, H).zero_()
        if kind == "gru_before":
            r = tape[:, :H].view(T, B, H)
            team.outer_blocks(gates, first[:2], h0, h, None, w.blocks[0], dw_h[: 2 * H])
            team.outer_blocks(gates, first[2:], r[0] * h0, r[1:] * h[:-1], None, w.blocks[1], dw_h[2 * H :])
        else:
            team.outer_blocks(gates, [0, H, 3 * H] if kind == "gru" else first, h0, h, None, w.blocks[0], dw_h)
    elif wants[4]:
        dw_h = _empty(team, x, rows, H)
        cut = rows if kind in ("lstm", "tanh", "relu") else 2 * H
        _weight_gradient(gates[:, :cut], h0, h, dw_h[:cut])
        if kind == "gru":
            _weight_gradient(gates[:, 3 * H :], h0, h, dw_h[cut:])
        elif kind == "gru_before":
            r = tape[:, :H].view(T, B, H)
            _weight_gradient(gates[:, cut:], r[0] * h0, r[1:] * h[:-1], dw_h[cut:])
        _held(dw_h, weight_hh, kept_hh, number)
    outside = dbias[:rows].clone()
    inside = torch.cat([dbias[: 2 * H], dbias[3 * H :]]) if kind == "gru" else outside.clone()
    return dx, dh, dc, dw_i, dw_h, outside, inside


def _products(kind: str) -> tuple[int, ...]:
    """Gates of weight_hh that are multiplied by the same values."""
    return (2, 1) if kind == "gru_before" else (_GATES[kind],)


def _held(gradient: Tensor, weight: Tensor, mask: Tensor | None, gates: int) -> Tensor:
    """The same, 0 in blocks that are held at zero."""
    return gradient if mask is None else gradient.masked_fill_(~live(weight, mask, gates), 0)


def _weight_gradient(g: Tensor, first: Tensor, rest: Tensor, out: Tensor) -> None:
    """Fills out with gᵀ times what its first B rows read, `first` (B, H), and the others, the steps of `rest` but the last."""
    B, steps = len(first), rest[: len(g) // max(len(first), 1) - 1]
    _product(out, (g[B:].t(), steps.reshape(-1, first.shape[1])), (g[:B].t(), first))


@_gated_backward.register_fake
def _(grads: Any, x: Tensor, h0: Tensor, c0: Any, weight_ih: Tensor, weight_hh: Tensor, *rest: Any) -> Any:
    wants, none = rest[-1], x.new_empty(0)
    wanted = ((x, wants[0]), (h0, True), (h0, c0 is not None), (weight_ih, wants[3]), (weight_hh, wants[4]))
    bias = [x.new_empty(len(weight_ih)) for _ in range(2)]
    return *(torch.empty_like(t) if w else none.clone() for t, w in wanted), *bias


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, weight_ih, weight_hh, _, _, *others, kind, keep_h, keep_c = inputs
    h, c, _, c_n, tape = output
    ctx.save_for_backward(x, h0, c0, weight_ih, weight_hh, *others, tape, h, c)
    ctx.mark_non_differentiable(*((tape,) if c0 is not None else (tape, c, c_n)))
    ctx.set_materialize_grads(False)
    ctx.options = kind, keep_h, keep_c


def _backward_gated(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:7]]
    h, c, h_n, c_n, _ = grads
    g = _gated_backward([h, c, h_n, c_n], *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 8)


_gated.register_autograd(_backward_gated, setup_context=_setup_gated)
