"""LSTM over a window: the operator, its gradients, and the function in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kept import without_gradient
from ..reference import LSTMTrace
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

_GATES = [0, 1, 2, 3]


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
    """`reference.lstm`, in the dtypes of `egru`."""
    check(x, c0, h0, weight_ih, weight_hh, bias_ih, bias_hh, None, gates=4, lengths=lengths)
    weight_ih, weight_hh = without_gradient(weight_ih, 4), without_gradient(weight_hh, 4)
    if not len(x):
        empty = h0.new_empty(0, *h0.shape)
        return LSTMTrace(empty, empty, h0, c0)
    mask, mask_c = draw(x, h0, [zoneout, zoneout_cell] if training else [0.0, 0.0])
    keep, keep_c = (0.0, 0.0) if training else (zoneout, zoneout_cell)
    h, c, h_n, c_n, _, _ = _lstm(
        x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, mask, mask_c, lengths, keep, keep_c, product_dtype(x)
    )
    return LSTMTrace(h, c, h_n, c_n)


def _form(
    place: Room, mask: Tensor | None, mask_c: Tensor | None, lengths: Tensor | None, keep: float, keep_c: float
) -> dict[str, Any]:
    ends = lengths is not None
    return {
        "ZONED": mask is not None or keep > 0 or ends, "MASKED": mask is not None, "KEEP": keep,
        "ZONED_C": mask_c is not None or keep_c > 0 or ends, "MASKED_C": mask_c is not None, "KEEP_C": keep_c,
        "ENDS": ends, "IO": triton_dtype(place.size.io),
    } | place.dtypes()  # fmt: skip


@torch.library.custom_op("sparsefold::lstm_gpu", mutates_args=())
def _lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mask: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep: float,
    keep_c: float,
    matmul: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, c, h_n, c_n, gates, said): the tape is gates (T·B, 4HP), i, f, g, o, and said (T·B, HP), h⁻."""
    (T, B, _), H = x.shape, h0.shape[1]
    x, h0, c0 = (t.detach().contiguous() for t in (x, h0, c0))
    bias_ih, bias_hh = (None if b is None else b.detach().contiguous() for b in (bias_ih, bias_hh))
    place = room(B, H, (4,), x, matmul)
    form = _form(place, mask, mask_c, lengths, keep, keep_c)
    form |= {"HAS_IH": bias_ih is not None, "HAS_HH": bias_hh is not None}
    h, c = (x.new_empty(T, B, H) for _ in range(2))
    gates, said = (blank(x, T * B, n, H, matmul) for n in (4, 1))

    def loop() -> None:
        k, (product,) = kernels(), place.products
        for t in range(T):
            torch.mm(place.said, place.weight.t(), out=product)
            k.lstm_forward[place.grid](place.table, product, place.said, place.first, place.second, t, B, **form)

    with place.held():
        torch.mm(rows(x, matmul), gate_rows(weight_ih.detach(), _GATES, 4, matmul).t(), out=gates)
        place.take(weight_hh.detach())
        place.said[:, :H].copy_(h0)
        place.first.copy_(h0)
        place.second.copy_(c0)
        addresses = {
            "GATES": gates, "SAID": said, "MASK": mask, "MASK_C": mask_c, "LENGTHS": lengths, "BIAS_IH": bias_ih,
            "BIAS_HH": bias_hh, "U": c, "Y": h,
        }  # fmt: skip
        place.play(("forward", T, precision(), *form.values()), addresses, loop)
        h_n, c_n = (s.to(x.dtype, copy=True) for s in (place.first, place.second))
    return h, c, h_n, c_n, gates, said


@_lstm.register_fake
def _(x: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (T, B, _), H, HP = x.shape, h0.shape[1], padded(h0.shape[1])
    tape = (x.new_empty(T * B, n * HP, dtype=rest[-1]) for n in (4, 1))
    return x.new_empty(T, B, H), x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H), *tape


@torch.library.custom_op("sparsefold::lstm_gpu_backward", mutates_args=())
def _lstm_backward(
    grads: list[Tensor | None],
    x: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    mask: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    said: Tensor,
    c: Tensor,
    keep: float,
    keep_c: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih and bias_hh, empty where `wants` has none."""
    (T, B, I), H, HP = x.shape, c0.shape[1], padded(c0.shape[1])  # noqa: E741
    x, c0, gates, said, c = (t.detach().contiguous() for t in (x, c0, gates, said, c))
    matmul = gates.dtype
    place = room(B, H, (4,), x, matmul)
    form = _form(place, mask, mask_c, lengths, keep, keep_c)
    above = [from_above(g, x.dtype) for g in grads[:2]]
    form |= {"HAS_H": above[0] is not None, "HAS_C": above[1] is not None}
    tape = blank(x, T * B, 4, H, matmul)

    def loop() -> None:
        k, (q,) = kernels(), place.q
        for t in range(T - 1, -1, -1):
            k.lstm_backward[place.grid](place.table, place.said, q, place.first, place.second, t, B, **form)
            torch.mm(q, place.weight, out=place.said)

    with place.held():
        place.take(weight_hh.detach())
        place.said.zero_()
        for carried, grad in ((place.first, grads[2]), (place.second, grads[3])):
            carried.zero_() if grad is None else carried.copy_(grad.detach())
        addresses = {
            "GATES": gates, "MASK": mask, "MASK_C": mask_c, "LENGTHS": lengths, "U": c, "START": c0, "D_GATES": tape,
            "D_Y": above[0], "D_U": above[1],
        }  # fmt: skip
        place.play(("backward", T, precision(), *form.values()), addresses, loop)
        dh = (place.first + place.said[:, :H]).to(x.dtype)
        dc = place.second.to(x.dtype, copy=True)
        dx, dw_i, dw_h, outside, inside = (x.new_empty(0) for _ in range(5))
        if wants[0]:
            dx = torch.mm(tape, gate_rows(weight_ih.detach(), _GATES, 4, matmul))
            dx = dx[:, :I].to(x.dtype).reshape(T, B, I)
        if wants[3]:
            dw_i = gathered(torch.mm(tape.t(), rows(x, matmul)), _GATES, H, I, x.dtype)
        if wants[4]:
            dw_h = gathered(torch.mm(tape.t(), said), _GATES, H, H, x.dtype)
        if wants[5] or wants[6]:
            outside = tape.sum(0, dtype=place.size.state).view(4, HP)[:, :H].to(x.dtype).reshape(-1)
            inside = outside.clone()
    return dx, dh, dc, dw_i, dw_h, outside, inside


@_lstm_backward.register_fake
def _(grads: Any, x: Tensor, c0: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    H, wants, none = c0.shape[1], rest[-1], x.new_empty(0)
    made = [
        torch.empty_like(t) if w else none for t, w in ((x, wants[0]), (weight_ih, wants[3]), (weight_hh, wants[4]))
    ]
    biases = (x.new_empty(4 * H if wants[5] or wants[6] else 0) for _ in range(2))
    return made[0], torch.empty_like(c0), torch.empty_like(c0), made[1], made[2], *biases


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, c0, weight_ih, weight_hh, _, _, mask, mask_c, lengths, *options = inputs
    _, c, _, _, gates, said = output
    ctx.save_for_backward(x, c0, weight_ih, weight_hh, mask, mask_c, lengths, gates, said, c)
    ctx.mark_non_differentiable(gates, said)
    ctx.set_materialize_grads(False)
    ctx.options = options[:-1]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = [bool(w) for w in ctx.needs_input_grad[:7]]
    g = _lstm_backward(list(grads[:4]), *ctx.saved_tensors, *ctx.options, wants)
    return (*(each if wanted else None for each, wanted in zip(g, wants, strict=True)), *[None] * 6)


_lstm.register_autograd(_backward, setup_context=_setup)
