"""The cells as equations: plain loops over time that every faster implementation is compared with.

Gate order and names are torch's: r, z, n stacked in `weight_ih` (3H, I) and `weight_hh` (3H, H).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import events
from .events import Triangle
from .kept import without_gradient

Reset = Literal["threshold", "output", "none"]
Event = Literal["threshold", "always", "smooth"]
Nonlinearity = Literal["tanh", "relu"]
Tape = Literal["full", "recompute"]


class EGRUTrace(NamedTuple):
    """What a sequence leaves behind: y, u, o (T, B, H), and the state (B, H) to carry on with."""

    y: Tensor
    u: Tensor
    o: Tensor
    y_n: Tensor
    h_n: Tensor


class LSTMTrace(NamedTuple):
    """What a sequence leaves behind: h, c (T, B, H), and the state (B, H) to carry on with."""

    h: Tensor
    c: Tensor
    h_n: Tensor
    c_n: Tensor


class _Weights(NamedTuple):
    """The recurrent side of the gates, cut once per sequence: w_rz (H, 2H) and w_n (H, H) transposed, b_n (H,)."""

    w_rz: Tensor
    w_n: Tensor
    b_n: Tensor


def egru_step(
    x_rz: Tensor,
    x_n: Tensor,
    y: Tensor,
    h: Tensor,
    weights: _Weights,
    theta: Tensor,
    *,
    reset: Reset,
    reset_after: bool,
    surrogate: Triangle,
    event: Event,
    zoneout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step: input products x_rz (B, 2H), x_n (B, H) and state y, h (B, H) -> u, o, y, h, each (B, H)."""
    z, n = _gates(x_rz, x_n, y, weights, reset_after)
    u = torch.lerp(n, h, z)  # (1 - z) n + z h
    if reset == "output":
        u = u - y
    u = _zoned(u, h, zoneout, training)
    always = event == "always"
    o = torch.ones_like(u) if always else events.event(u - theta, surrogate, smooth=event == "smooth")
    # The sum with +0 keeps a silent unit's message at +0.0 where u is negative; a NaN in u stays a NaN.
    y = torch.addcmul(u.new_zeros(()), o, u)
    return u, o, y, carried(u, o, theta, reset)


def carried(u: Tensor, o: Tensor, theta: Tensor, reset: Reset) -> Tensor:
    """The private state h that the next step reads: u − o θ for the threshold reset, u otherwise."""
    return torch.addcmul(u, o, theta, value=-1) if reset == "threshold" else u


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
    """Event-based gated recurrent unit over a sequence x (T, B, I), from the state y0, h0 (B, H).

        r = σ(W_ir x + b_ir + W_hr y⁻ + b_hr)
        z = σ(W_iz x + b_iz + W_hz y⁻ + b_hz)
        n = tanh(W_in x + b_in + r ⊙ (W_hn y⁻ + b_hn))     reset_after=True
        n = tanh(W_in x + b_in + W_hn (r ⊙ y⁻) + b_hn)     reset_after=False
        u = (1 − z) ⊙ n + z ⊙ h⁻                           reset="output": − y⁻
        o = H(u − θ)                                       θ = max(threshold, 0), H(0) = 0
        y = o ⊙ u
        h = u − o ⊙ θ                                      reset="threshold"; h = u otherwise

    `event="always"` sets o = 1 (with θ = 0 or reset="none" the cell is torch.nn.GRU); `event="smooth"` takes the
    surrogate's primitive for H, so that the backward below is the exact derivative of the forward. Backward
    do/d(u − θ) = surrogate(u − θ). Zoneout acts on u: in training each unit keeps h⁻ with probability `zoneout`, in
    evaluation u is the mean of that. weight_ih (3H, I), weight_hh (3H, H), bias_ih and bias_hh (3H,) or None,
    threshold (H,). T = 0 returns the state unchanged. A sequence run in parts with its state carried takes
    the same steps, up to the rounding of W x, which is one product over all rows that come. Blocks of a weight that a
    sparsifier holds at zero (`kept.py`) get the gradient 0. `tape` says what the kernels keep for the backward
    (`native.egru`), and nothing here.

    Source: Subramoney et al. (2023), arXiv 2206.06178 (reset="output", reset_after=False); the other form is that of
    the authors' code. Krueger et al. (2017) for zoneout.
    """
    theta = threshold.clamp(min=0)
    weight_ih, weight_hh = without_gradient(weight_ih, 3), without_gradient(weight_hh, 3)
    x_rz, x_n, weights = _prepare(x, weight_ih, weight_hh, bias_ih, bias_hh, reset_after)
    y, h = y0, h0
    us, os, ys = [], [], []
    for x_rz_t, x_n_t in zip(x_rz, x_n, strict=True):
        u, o, y, h = egru_step(
            x_rz_t,
            x_n_t,
            y,
            h,
            weights,
            theta,
            reset=reset,
            reset_after=reset_after,
            surrogate=surrogate,
            event=event,
            zoneout=zoneout,
            training=training,
        )
        us.append(u)
        os.append(o)
        ys.append(y)
    if not ys:
        empty = y0.new_empty(0, *y0.shape)
        return EGRUTrace(empty, empty, empty, y0, h0)
    return EGRUTrace(torch.stack(ys), torch.stack(us), torch.stack(os), y, h)


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
    """Gated recurrent unit: gates as in `egru` with y⁻ = h⁻, then h = (1 − z) ⊙ n + z ⊙ h⁻.

    x (T, B, I), h0 (B, H) -> output (T, B, H), h (B, H). reset_after=True is torch.nn.GRU. Zoneout as in `egru`, on h. With
    `lengths` (B,), sample b takes lengths[b] steps and keeps its state from there on. Blocks that a
    sparsifier holds at zero get the gradient 0, as in `egru`.

    Source: Cho et al. (2014), arXiv 1406.1078 (reset_after=False). Krueger et al. (2017), arXiv 1606.01305, for zoneout.
    """
    weight_ih, weight_hh = without_gradient(weight_ih, 3), without_gradient(weight_hh, 3)
    x_rz, x_n, weights = _prepare(x, weight_ih, weight_hh, bias_ih, bias_hh, reset_after)
    h, outputs = h0, []
    for t, (x_rz_t, x_n_t) in enumerate(zip(x_rz, x_n, strict=True)):
        z, n = _gates(x_rz_t, x_n_t, h, weights, reset_after)
        h = _lasting(t, lengths, _zoned(torch.lerp(n, h, z), h, zoneout, training), h)
        outputs.append(h)
    return _stacked(outputs, h0), h


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
    """Long short-term memory over a sequence x (T, B, I), from the state h0, c0 (B, H): torch.nn.LSTM without projection.

        i = σ(W_ii x + b_ii + W_hi h⁻ + b_hi)              f and o alike
        g = tanh(W_ig x + b_ig + W_hg h⁻ + b_hg)
        c = f ⊙ c⁻ + i ⊙ g
        h = o ⊙ tanh(c)

    Gates i, f, g, o are stacked in weight_ih (4H, I), weight_hh (4H, H), bias_ih and bias_hh (4H,) or None. Zoneout: h is
    made from c first, then each unit keeps its h⁻ with probability `zoneout` and its c⁻ with `zoneout_cell`; in evaluation
    both are the means of that. `lengths` as in `gru`. T = 0 returns the state unchanged.

    Source: Hochreiter and Schmidhuber (1997); Krueger et al. (2017), arXiv 1606.01305, for zoneout.
    """
    weight_ih, weight_hh = without_gradient(weight_ih, 4), without_gradient(weight_hh, 4)
    w_hh, h, c = weight_hh.t(), h0, c0
    hs, cs = [], []
    for t, x_t in enumerate(F.linear(x, weight_ih, _sum(bias_ih, bias_hh)).unbind(0)):
        i, f, g, o = torch.addmm(x_t, h, w_hh).chunk(4, dim=1)
        new = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        h = _lasting(t, lengths, _zoned(torch.sigmoid(o) * torch.tanh(new), h, zoneout, training), h)
        c = _lasting(t, lengths, _zoned(new, c, zoneout_cell, training), c)
        hs.append(h)
        cs.append(c)
    return LSTMTrace(_stacked(hs, h0), _stacked(cs, c0), h, c)


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
    """Plain recurrent unit: h = tanh(W_ih x + b_ih + W_hh h⁻ + b_hh), or relu of the same sum. torch.nn.RNN.

    x (T, B, I), h0 (B, H), weight_ih (H, I), weight_hh (H, H), biases (H,) or None -> output (T, B, H), h (B, H). Zoneout
    as in `egru`, on h; `lengths` as in `gru`.

    Source: Elman (1990); Krueger et al. (2017), arXiv 1606.01305, for zoneout.
    """
    weight_ih, weight_hh = without_gradient(weight_ih, 1), without_gradient(weight_hh, 1)
    act = torch.relu if nonlinearity == "relu" else torch.tanh
    w_hh, h, outputs = weight_hh.t(), h0, []
    for t, x_t in enumerate(F.linear(x, weight_ih, _sum(bias_ih, bias_hh)).unbind(0)):
        h = _lasting(t, lengths, _zoned(act(torch.addmm(x_t, h, w_hh)), h, zoneout, training), h)
        outputs.append(h)
    return _stacked(outputs, h0), h


def _stacked(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps) if steps else like.new_empty(0, *like.shape)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _zoned(new: Tensor, old: Tensor, zoneout: float, training: bool) -> Tensor:
    """In training `old` where a draw of probability `zoneout` says so, a draw for each unit; in evaluation the mean of that."""
    if zoneout and training:
        return torch.lerp(old, new, torch.empty_like(new).bernoulli_(1 - zoneout))
    return torch.lerp(new, old, zoneout) if zoneout else new


def _lasting(t: int, lengths: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The state after step t: `old` of samples that are at their end."""
    return new if lengths is None else torch.where((t < lengths)[:, None], new, old)


def _gates(x_rz: Tensor, x_n: Tensor, y: Tensor, weights: _Weights, reset_after: bool) -> tuple[Tensor, Tensor]:
    """Keep gate z and candidate n, each (B, H)."""
    r, z = torch.sigmoid(torch.addmm(x_rz, y, weights.w_rz)).chunk(2, dim=1)
    if reset_after:
        return z, torch.tanh(torch.addcmul(x_n, r, torch.addmm(weights.b_n, y, weights.w_n)))
    return z, torch.tanh(torch.addmm(x_n, r * y, weights.w_n))


def _prepare(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, reset_after: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], _Weights]:
    """Input products of every step, with all biases but the b_hn that sits behind r, and the recurrent weights.

    Two products and one `unbind` each: the backward of x[t] would write a whole (T, B, 3H) per step, and that of a
    column split would copy it once more.
    """
    H = weight_hh.shape[1]
    bias_ih = weight_ih.new_zeros(3 * H) if bias_ih is None else bias_ih
    bias_hh = weight_hh.new_zeros(3 * H) if bias_hh is None else bias_hh
    w_rz, w_n = torch.split(weight_hh, [2 * H, H])
    b_rz, b_n = torch.split(bias_hh, [2 * H, H])
    w_i, b_i = torch.split(weight_ih, [2 * H, H]), torch.split(bias_ih, [2 * H, H])
    x_rz = F.linear(x, w_i[0], b_i[0] + b_rz)
    x_n = F.linear(x, w_i[1], b_i[1] if reset_after else b_i[1] + b_n)
    return x_rz.unbind(0), x_n.unbind(0), _Weights(w_rz.t(), w_n.t(), b_n)
