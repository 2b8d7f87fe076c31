"""EGRU and GRU over a window: the operators, their gradients, and the functions in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..events import Triangle
from ..kept import without_gradient
from ..reference import EGRUTrace, Event, Reset, Tape
from .window import (
    Room,
    blank,
    check,
    draw,
    from_above,
    gate_rows,
    gathered,
    kernels,
    padded,
    precision,
    product_dtype,
    room,
    rows,
    triton_dtype,
)

_TAPE = [
    2,
    0,
    1,
]  # gates in the tape of gradients: n, r, z, and with reset_after r ⊙ n, so that each product's lie together


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
    """`reference.egru`, whose equations hold here; products are dense, and the tape is full whatever `tape` says.

    Tensors are float32, bfloat16 or float64, of one dtype, on one GPU; ValueError otherwise. State is carried and all but
    products is computed in float32 (float64 for float64). Products are in the tensors' dtype (float32 as torch's own switch for
    TF32 says), under autocast to bfloat16 in that, which is then the tape's too. Not twice differentiable.
    """
    check(x, y0, h0, weight_ih, weight_hh, bias_ih, bias_hh, threshold, gates=3)
    weight_ih, weight_hh = without_gradient(weight_ih, 3), without_gradient(weight_hh, 3)
    if not len(x):
        empty = y0.new_empty(0, *y0.shape)
        return EGRUTrace(empty, empty, empty, y0, h0)
    (mask,) = draw(x, h0, [zoneout if training else 0.0])
    keep = 0.0 if training else zoneout
    y, u, o, y_n, h_n, _, _ = _egru(
        x, y0, h0, weight_ih, weight_hh, bias_ih, bias_hh, threshold.clamp(min=0), mask, None,
        reset, reset_after, event, False, surrogate.height, surrogate.half_width, keep, product_dtype(x),
    )  # fmt: skip
    return EGRUTrace(y, u, o, y_n, h_n)


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
    """`reference.gru`, on the kernels of `egru`, in the same dtypes: a unit that always speaks, θ = 0, no reset."""
    check(x, h0, h0, weight_ih, weight_hh, bias_ih, bias_hh, None, gates=3, lengths=lengths)
    weight_ih, weight_hh = without_gradient(weight_ih, 3), without_gradient(weight_hh, 3)
    if not len(x):
        return h0.new_empty(0, *h0.shape), h0
    (mask,) = draw(x, h0, [zoneout if training else 0.0])
    _, u, _, _, h_n, _, _ = _egru(
        x, h0, h0, weight_ih, weight_hh, bias_ih, bias_hh, h0.new_zeros(h0.shape[1]), mask, lengths,
        "none", reset_after, "always", True, 0.0, 1.0, 0.0 if training else zoneout, product_dtype(x),
    )  # fmt: skip
    return u, h_n


def _form(place: Room, mask: Tensor | None, lengths: Tensor | None, options: tuple[Any, ...]) -> dict[str, Any]:
    reset, after, event, lean, height, half_width, keep = options
    return {
        "RESET": reset, "AFTER": after, "EVENT": event, "LEAN": lean, "HEIGHT": height, "WIDTH": half_width,
        "ZONED": mask is not None or keep > 0 or lengths is not None, "MASKED": mask is not None, "KEEP": keep,
        "ENDS": lengths is not None, "IO": triton_dtype(place.size.io),
    } | place.dtypes()  # fmt: skip


@torch.library.custom_op("sparsefold::egru_gpu", mutates_args=())
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
    lengths: Tensor | None,
    reset: str,
    reset_after: bool,
    event: str,
    lean: bool,
    height: float,
    half_width: float,
    keep: float,
    matmul: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, u, o, y_n, h_n, gates, said): the tape is gates (T·B, 4HP or 3HP), r, z, n and W_hn y⁻ + b_hn, and said (T·B, HP), y⁻.

    A `lean` one is a GRU: of the outputs only u and h_n are made.
    """
    (T, B, _), H, HP = x.shape, y0.shape[1], padded(y0.shape[1])
    x, y0, h0, theta = (t.detach().contiguous() for t in (x, y0, h0, theta))
    weight_ih, weight_hh = weight_ih.detach(), weight_hh.detach()
    bias_ih, bias_hh = (None if b is None else b.detach().contiguous() for b in (bias_ih, bias_hh))
    place = room(B, H, (3,) if reset_after else (2, 1), x, matmul)
    options = (reset, reset_after, event, lean, height, half_width, keep)
    form = _form(place, mask, lengths, options)
    bare = {k: v for k, v in form.items() if k in ("H", "HP", "STATE", "IO", "MATMUL", "BLOCK")}
    biases = {"HAS_IH": bias_ih is not None, "HAS_HH": bias_hh is not None}
    u = x.new_empty(T, B, H)
    y, o = (x.new_empty((0,) if lean else (T, B, H)) for _ in range(2))
    gates, said = (blank(x, T * B, n, H, matmul) for n in (4 if reset_after else 3, 1))

    def loop() -> None:
        k = kernels()
        rz, n = place.products[0], place.products[-1]
        if reset_after:
            n = n[:, 2 * HP :]
        for t in range(T):
            if reset_after:
                torch.mm(place.said, place.weight.t(), out=rz)
            else:
                torch.mm(place.said, place.weight[: 2 * HP].t(), out=rz)
                k.gru_before[place.grid](place.table, rz, place.said, place.scaled, t, B, **bare, **biases)
                torch.mm(place.scaled, place.weight[2 * HP :].t(), out=n)
            k.gru_forward[place.grid](place.table, rz, n, place.said, place.first, place.second, t, B, **form, **biases)

    with place.held():
        torch.mm(rows(x, matmul), gate_rows(weight_ih, [0, 1, 2], 3, matmul).t(), out=gates[:, : 3 * HP])
        place.take(weight_hh)
        place.said[:, :H].copy_(y0)
        place.first.copy_(h0)
        place.second.copy_(y0)
        addresses = {
            "GATES": gates, "SAID": said, "MASK": mask, "LENGTHS": lengths, "THETA": theta, "BIAS_IH": bias_ih,
            "BIAS_HH": bias_hh, "U": u, "O": o, "Y": y,
        }  # fmt: skip
        place.play(("forward", T, precision(), *form.values(), *biases.values()), addresses, loop)
        h_n = place.first.to(x.dtype, copy=True)
    return y, u, o, y[-1].clone() if len(y) else y.new_empty(0), h_n, gates, said


@_egru.register_fake
def _(x: Tensor, y0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (T, B, _), H, HP = x.shape, y0.shape[1], padded(y0.shape[1])
    after, lean, matmul = rest[9], rest[11], rest[15]
    y, o = (x.new_empty((0,) if lean else (T, B, H)) for _ in range(2))
    tape = (x.new_empty(T * B, n * HP, dtype=matmul) for n in (4 if after else 3, 1))
    return y, x.new_empty(T, B, H), o, x.new_empty((0,) if lean else (B, H)), x.new_empty(B, H), *tape


@torch.library.custom_op("sparsefold::egru_gpu_backward", mutates_args=())
def _egru_backward(
    grads: list[Tensor | None],
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    theta: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    said: Tensor,
    u: Tensor,
    o: Tensor,
    reset: str,
    reset_after: bool,
    event: str,
    lean: bool,
    height: float,
    half_width: float,
    keep: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y0, h0, weight_ih, weight_hh, bias_ih, bias_hh and theta, empty where `wants` has none."""
    (T, B, I), H, HP = x.shape, h0.shape[1], padded(h0.shape[1])  # noqa: E741
    x, h0, theta, gates, said, u, o = (t.detach().contiguous() for t in (x, h0, theta, gates, said, u, o))
    weight_ih, weight_hh = weight_ih.detach(), weight_hh.detach()
    matmul, G = gates.dtype, 4 if reset_after else 3
    place = room(B, H, (3,) if reset_after else (2, 1), x, matmul)
    options = (reset, reset_after, event, lean, height, half_width, keep)
    form = _form(place, mask, lengths, options)
    bare = {k: v for k, v in form.items() if k in ("H", "HP", "STATE", "MATMUL", "BLOCK")}
    above = [from_above(g, x.dtype) for g in grads[:3]]
    has = dict(zip(("HAS_Y", "HAS_U", "HAS_O"), (g is not None for g in above), strict=True)) | {"LEARNS": wants[7]}
    tape = blank(x, T * B, G, H, matmul)

    def loop() -> None:
        k = kernels()
        rz, n = place.q[0], place.q[-1]
        if reset_after:
            n = n[:, 2 * HP :]
        for t in range(T - 1, -1, -1):
            k.gru_backward[place.grid](
                place.table, place.said, rz, n, place.second, place.first, place.third, t, B, **form, **has
            )
            if reset_after:
                torch.mm(rz, place.weight, out=place.said)
            else:
                torch.mm(n, place.weight[2 * HP :], out=place.scaled)
                k.gru_backward_before[place.grid](place.table, place.scaled, rz, place.second, t, B, **bare)
                torch.mm(rz, place.weight[: 2 * HP], out=place.said)

    with place.held():
        place.take(weight_hh)
        place.said.zero_()
        place.third.zero_()
        for carried, grad in ((place.second, grads[3]), (place.first, grads[4])):
            carried.zero_() if grad is None else carried.copy_(grad.detach())
        addresses = {
            "GATES": gates, "SAID": said, "MASK": mask, "LENGTHS": lengths, "THETA": theta, "U": u, "O": o, "START": h0,
            "D_GATES": tape, "D_Y": above[0], "D_U": above[1], "D_O": above[2],
        }  # fmt: skip
        place.play(("backward", T, precision(), *form.values(), *has.values()), addresses, loop)
        dy = (place.second + place.said[:, :H]).to(x.dtype)
        dh = place.first.to(x.dtype, copy=True)
        dtheta = place.third.sum(0).to(x.dtype)

        dx, dw_i, dw_h, outside, inside = (x.new_empty(0) for _ in range(5))
        if wants[0]:
            dx = torch.mm(tape[:, : 3 * HP], gate_rows(weight_ih, _TAPE, 3, matmul))
            dx = dx[:, :I].to(x.dtype).reshape(T, B, I)
        if wants[3]:
            dw_i = gathered(torch.mm(tape[:, : 3 * HP].t(), rows(x, matmul)), _TAPE, H, I, x.dtype)
        if wants[4] and reset_after:
            dw_h = gathered(torch.mm(tape[:, HP:].t(), said), [0, 1, 2], H, H, x.dtype)
        elif wants[4]:
            scaled = gates[:, :HP] * said
            parts = torch.mm(tape[:, HP:].t(), said), torch.mm(tape[:, :HP].t(), scaled)
            dw_h = gathered(torch.cat(parts), [0, 1, 2], H, H, x.dtype)
        if wants[5] or wants[6]:
            sums = tape.sum(0, dtype=place.size.state).view(G, HP)[:, :H].to(x.dtype)
            outside, inside = (sums[at].flatten() for at in ([1, 2, 0], [1, 2, 3 if reset_after else 0]))
    return dx, dy, dh, dw_i, dw_h, outside, inside, dtheta


@_egru_backward.register_fake
def _(grads: Any, x: Tensor, h0: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    H, wants, none = h0.shape[1], rest[-1], x.new_empty(0)
    made = [
        torch.empty_like(t) if w else none for t, w in ((x, wants[0]), (weight_ih, wants[3]), (weight_hh, wants[4]))
    ]
    biases = (x.new_empty(3 * H if wants[5] or wants[6] else 0) for _ in range(2))
    return made[0], torch.empty_like(h0), torch.empty_like(h0), made[1], made[2], *biases, x.new_empty(H)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, h0, weight_ih, weight_hh, _, _, theta, mask, lengths, *options = inputs
    y, u, o, y_n, _, gates, said = output
    ctx.save_for_backward(x, h0, weight_ih, weight_hh, theta, mask, lengths, gates, said, u, o)
    # Where every unit always speaks there is no step to differentiate, as in the reference.
    still = [gates, said, *([y, o, y_n] if options[3] else [o] if options[2] == "always" else [])]
    ctx.mark_non_differentiable(*still)
    ctx.set_materialize_grads(False)
    ctx.options = options[:-1]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:8]]
    g = _egru_backward(list(grads[:5]), *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 10)


_egru.register_autograd(_backward, setup_context=_setup)
