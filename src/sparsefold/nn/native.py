"""The cells of `reference.py` on the library's own kernels, on the processor in float32 and float64: same names and signatures.

A sequence costs what its events cost, forward and backward (native/sequence.inl.hpp), and the gradient is the
reference's: what is left out would be multiplied by zero. Work is divided between `torch.get_num_threads()` threads; the
kernels' bits do not depend on how many there are. A product of dense x is torch's own, whose bits may.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
from torch import Tensor

from .events import Triangle
from .reference import EGRUTrace, Event, LSTMTrace, Nonlinearity, Reset

try:
    from sparsefold import _native
except ImportError:  # the extension was not built: `nn` imports all the same, and the modules take the reference
    _native = None  # type: ignore[assignment]

# A product of x that is zero elsewhere beats a dense one up to this share.
_SPARSE_INPUT = 0.4

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
) -> EGRUTrace:
    """`reference.egru`, whose equations hold here: per step only rows of weight_hh whose unit spoke are read.

    Backward: the gradient of a message is made only where o = 1 or surrogate(u − θ) ≠ 0 (elsewhere it would be multiplied
    by zero), that of a weight only from units that spoke; x counts as events where at most 40 % of it is not zero.
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
        reset,
        reset_after,
        event,
        surrogate.height,
        surrogate.half_width,
        keep,
    )
    return EGRUTrace(y, u, o, y_n, h_n)


def _empty(team: Any, like: Tensor, *shape: int) -> Tensor:
    """A fresh tensor to be written whole, on large pages where it is large."""
    out = like.new_empty(shape)
    if out.nbytes > 1 << 22:
        team.advise(out)
    return out


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
    reset: str,
    reset_after: bool,
    event: str,
    height: float,
    half_width: float,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, u, o, y_n, h_n, tape); the tape holds (T·B, 4H) gates, weight_hh transposed, and whether a weight is not finite."""
    team = _team()
    (T, B, _), H = x.shape, y0.shape[1]
    x, y0, h0, theta = (t.detach().contiguous() for t in (x, y0, h0, theta))
    w_i, w_h, mask = weight_ih.detach().contiguous(), weight_hh.detach().contiguous(), _plain(mask)
    y, u, o = (_empty(team, x, T, B, H) for _ in range(3))
    h_n = torch.empty_like(h0)
    tape = _empty(team, x, _tape_size(T * B, H))
    gates, hidden = _tape(tape, T * B, H)
    bias = w_i.new_zeros(3 * H) if bias_ih is None else bias_ih.detach().clone()
    bias_n = None
    if bias_hh is not None:
        inside = 2 * H if reset_after else 3 * H
        bias[:inside] += bias_hh.detach()[:inside]
        bias_n = bias_hh.detach()[2 * H :].contiguous() if reset_after else None
    _input_product(team, x.view(T * B, -1), w_i, bias, gates)
    every = _transpose(team, w_h, H, reset_after, hidden)
    tape[-1] = every
    options = _options(reset, reset_after, event, height, half_width, keep)
    team.egru_forward(options, hidden, every, bias_n, theta, mask, y0, h0, gates, u, o, y, h_n)
    return y, u, o, y[-1].clone(), h_n, tape


def _tape_size(rows: int, H: int) -> int:
    return 3 * _padded(H) * H + rows * 4 * H + 1


def _tape(tape: Tensor, rows: int, H: int) -> tuple[Tensor, Tensor]:
    """Its gates (rows, 4H) and its transposed weight, which comes first: its rows begin at cache lines."""
    cut = 3 * _padded(H) * H
    return tape[cut:-1].view(rows, 4 * H), tape[:cut]


def _transpose(team: Any, weight: Tensor, H: int, reset_after: bool, out: Tensor) -> bool:
    """Fills `out` with weight (3H, H) as the loops read it; whether a weight is not finite."""
    if reset_after:
        return bool(team.transpose(weight, 3, out))
    cut = 2 * _padded(H) * H
    wild = [team.transpose(weight[: 2 * H], 2, out[:cut]), team.transpose(weight[2 * H :], 1, out[cut:])]
    return any(wild)


def _is_events(team: Any, x: Tensor) -> bool:
    return bool(team.count(x) <= _SPARSE_INPUT * x.numel())


def _input_product(team: Any, x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor) -> None:
    """W_i x + b into the first 3H of each row of `gates`."""
    H3 = len(weight)
    if _is_events(team, x):
        turned = _empty(team, weight, 3 * _padded(H3 // 3) * x.shape[1])
        if not team.transpose(weight, 3, turned):
            team.input_product(turned, bias, x, gates)
            return
    torch.addmm(bias, x, weight.t(), out=gates[:, :H3])


@_egru.register_fake
def _(x: Tensor, y0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (T, B, _), H = x.shape, y0.shape[1]
    sequence = [x.new_empty(T, B, H) for _ in range(3)]
    return *sequence, x.new_empty(B, H), x.new_empty(B, H), x.new_empty(_tape_size(T * B, H))


@torch.library.custom_op("sparsefold::egru_backward", mutates_args=())
def _egru_backward(
    grads: list[Tensor | None],
    x: Tensor,
    y0: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    theta: Tensor,
    mask: Tensor | None,
    tape: Tensor,
    y: Tensor,
    u: Tensor,
    o: Tensor,
    reset: str,
    reset_after: bool,
    event: str,
    height: float,
    half_width: float,
    keep: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y0, h0, weight_ih, weight_hh, bias_ih, bias_hh and theta, empty where `wants` has none."""
    team = _team()
    (T, B, I), H = x.shape, y0.shape[1]  # noqa: E741
    x, y0, h0, theta = (t.detach().contiguous() for t in (x, y0, h0, theta))
    rows, hidden = _tape(tape.detach(), T * B, H)
    y, u, o = y.detach(), u.detach(), o.detach()
    gates = _empty(team, x, T * B, 4 * H)
    dy, dh, dtheta, dbias = (x.new_empty(n) for n in ((B, H), (B, H), (H,), (4 * H,)))
    wild = torch.zeros(T * B, dtype=torch.uint8)
    every = bool(tape[-1])
    options = _options(reset, reset_after, event, height, half_width, keep)
    grads = [_plain(g) for g in grads]
    wants_x, wants_y0, _, wants_w_i, wants_w_h = wants[:5]
    team.egru_backward(
        options, hidden, every, theta, _plain(mask), y0, h0, rows, u, o, y,
        grads[0], grads[1], grads[2], grads[3], grads[4], wants_y0, gates, dy, dh, dtheta, dbias, wild,
    )  # fmt: skip
    none = x.new_empty(0)
    flat = x.view(T * B, I)
    dx = (gates[:, : 3 * H] @ weight_ih.detach()).view(T, B, I) if wants_x else none
    dw_i = dw_h = none
    if wants_w_i:
        if _is_events(team, flat):
            dw_i = _empty(team, x, 3 * H, I)
            team.outer(gates, [0, H, 2 * H], None, flat, None, wild, dw_i)
        else:
            dw_i = gates[:, : 3 * H].t() @ flat
    if wants_w_h:
        dw_h = _empty(team, x, 3 * H, H)
        if reset_after:
            team.outer(gates, [0, H, 3 * H], y0, y, None, wild, dw_h)
        else:
            team.outer(gates, [0, H], y0, y, None, wild, dw_h[: 2 * H])
            team.outer(gates, [2 * H], y0, y, rows, wild, dw_h[2 * H :])
    outside = dbias[: 3 * H].clone()
    inside = torch.cat([dbias[: 2 * H], dbias[3 * H :]]) if reset_after else outside.clone()
    return dx, dy, dh, dw_i, dw_h, outside, inside, dtheta


@_egru_backward.register_fake
def _(grads: Any, x: Tensor, y0: Tensor, h0: Tensor, weight_ih: Tensor, theta: Tensor, *rest: Any) -> Any:
    H, wants = y0.shape[1], rest[-1]
    dx = torch.empty_like(x) if wants[0] else x.new_empty(0)
    dw_i = torch.empty_like(weight_ih) if wants[3] else x.new_empty(0)
    dw_h = x.new_empty(3 * H, H) if wants[4] else x.new_empty(0)
    return (
        dx, torch.empty_like(y0), torch.empty_like(h0), dw_i, dw_h, x.new_empty(3 * H), x.new_empty(3 * H), x.new_empty(H)
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y0, h0, weight_ih, _, _, _, theta, mask, *options = inputs
    y, u, o, _, _, tape = output
    ctx.save_for_backward(x, y0, h0, weight_ih, theta, mask, tape, y, u, o)
    # Where every unit always speaks there is no step to differentiate, as in the reference.
    ctx.mark_non_differentiable(*((tape, o) if options[2] == "always" else (tape,)))
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:8]]
    g = _egru_backward(list(grads[:5]), *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 7)


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
    live = None
    if lengths is not None:
        if lengths.shape != (B,) or (lengths.diff() > 0).any():
            raise ValueError(
                f"lengths are one for each of {B} samples, longest first, got {lengths.tolist()}. Sort the samples by length."
            )
        live = (lengths > torch.arange(len(x))[:, None]).sum(1, dtype=torch.int32)
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
    h, c, h_n, c_n, _ = _gated(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, *masks, live, kind, *keep)
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
    live: Tensor | None,
    kind: str,
    keep_h: float,
    keep_c: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, c, h_n, c_n, tape); the tape is (T·B, values · H), and c empty but for an LSTM."""
    team = _team()
    (T, B, _), H, rows = x.shape, h0.shape[1], weight_ih.shape[0]
    x, h0, w_i, w_h = (t.detach().contiguous() for t in (x, h0, weight_ih, weight_hh))
    tape, out = _empty(team, x, T * B, _TAPE[kind] * H), _empty(team, x, T, B, H)
    cells = None if c0 is None else _empty(team, x, T, B, H)
    bias, bias_n = w_i.new_zeros(rows) if bias_ih is None else bias_ih.detach().clone(), None
    if bias_hh is not None:
        outside = 2 * H if kind == "gru" else rows
        bias[:outside] += bias_hh.detach()[:outside]
        bias_n = bias_hh.detach()[2 * H :].contiguous() if kind == "gru" else None
    torch.addmm(bias, x.view(T * B, x.shape[2]), w_i.t(), out=tape[:, :rows])
    masks = _plain(mask_h), _plain(mask_c)
    team.gated_forward(kind, keep_h, keep_c, w_h, bias_n, *masks, h0, _plain(c0), live, tape, out, cells)
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
    live: Tensor | None,
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
    x, h0, w_i, w_h = (t.detach().contiguous() for t in (x, h0, weight_ih, weight_hh))
    tape, h = tape.detach(), h.detach()
    gates = _empty(team, x, T * B, _TAPE[kind] * H)
    dx, dc, dw_i, dw_h = (x.new_empty(0) for _ in range(4))
    dh, dbias = torch.empty_like(h0), x.new_empty(_TAPE[kind] * H)
    if c0 is not None:
        dc = torch.empty_like(h0)
    above = [_plain(g) for g in grads]
    masks, cells = (_plain(mask_h), _plain(mask_c)), None if c0 is None else c.detach()
    team.gated_backward(
        kind, keep_h, keep_c, w_h, *masks, h0, _plain(c0), live, tape, h, cells,
        *above, gates, dh, None if c0 is None else dc, dbias,
    )  # fmt: skip
    outer = gates[:, :rows]
    if wants[0]:
        dx = (outer @ w_i).view(T, B, I)
    if wants[3]:
        dw_i = outer.t() @ x.view(T * B, I)
    if wants[4]:
        dw_h = _empty(team, x, rows, H)
        cut = rows if kind in ("lstm", "tanh", "relu") else 2 * H
        _weight_gradient(gates[:, :cut], h0, h, dw_h[:cut])
        if kind == "gru":
            _weight_gradient(gates[:, 3 * H :], h0, h, dw_h[cut:])
        elif kind == "gru_before":
            r = tape[:, :H].view(T, B, H)
            _weight_gradient(gates[:, cut:], r[0] * h0, r[1:] * h[:-1], dw_h[cut:])
    outside = dbias[:rows].clone()
    inside = torch.cat([dbias[: 2 * H], dbias[3 * H :]]) if kind == "gru" else outside.clone()
    return dx, dh, dc, dw_i, dw_h, outside, inside


def _weight_gradient(g: Tensor, first: Tensor, rest: Tensor, out: Tensor) -> None:
    """Fills out with gᵀ times what its first B rows read, `first` (B, H), and the others, the steps of `rest` but the last."""
    B, steps = len(first), rest[: len(g) // max(len(first), 1) - 1]
    torch.mm(g[B:].t(), steps.reshape(-1, first.shape[1]), out=out)
    out.addmm_(g[:B].t(), first)


@_gated_backward.register_fake
def _(grads: Any, x: Tensor, h0: Tensor, c0: Any, weight_ih: Tensor, weight_hh: Tensor, *rest: Any) -> Any:
    wants, none = rest[-1], x.new_empty(0)
    wanted = ((x, wants[0]), (h0, True), (h0, c0 is not None), (weight_ih, wants[3]), (weight_hh, wants[4]))
    bias = [x.new_empty(len(weight_ih)) for _ in range(2)]
    return *(torch.empty_like(t) if w else none.clone() for t, w in wanted), *bias


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, weight_ih, weight_hh, _, _, mask_h, mask_c, live, *options = inputs
    h, c, _, c_n, tape = output
    ctx.save_for_backward(x, h0, c0, weight_ih, weight_hh, mask_h, mask_c, live, tape, h, c)
    ctx.mark_non_differentiable(*((tape,) if c0 is not None else (tape, c, c_n)))
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward_gated(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:7]]
    h, c, h_n, c_n, _ = grads
    g = _gated_backward([h, c, h_n, c_n], *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 6)


_gated.register_autograd(_backward_gated, setup_context=_setup_gated)
