"""The event, a step function, and the surrogate that stands in for its derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Triangle:
    """Triangular surrogate ψ(v) = height · max(0, 1 − |v| / half_width), of area height · half_width.

    Source: Subramoney et al., "Efficient recurrent architectures through activity sparsity and sparse
    back-propagation through time" (2023), with γ = height and ε = 1 / half_width.
    """

    height: float = 0.5
    half_width: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a surrogate that has no width or is not finite."""
        if not (0 <= self.height < float("inf") and 0 < self.half_width < float("inf")):
            raise ValueError(
                f"a triangle needs a finite height >= 0 and half_width > 0, got height={self.height}, "
                f"half_width={self.half_width}. Height 0 switches the surrogate off."
            )

    def __call__(self, v: Tensor) -> Tensor:
        """ψ(v), any shape."""
        return (1 - v.abs() / self.half_width).clamp(min=0) * self.height

    def primitive(self, v: Tensor) -> Tensor:
        """Ψ(v) = ∫ ψ from −∞ to v, between 0 and the area: the smooth event that ψ is the exact derivative of."""
        c = v.clamp(-self.half_width, self.half_width)
        return self.height * (c + self.half_width / 2 - c * c.abs() / (2 * self.half_width))


class _Event(torch.autograd.Function):
    """Forward H(v) or Ψ(v), backward ψ(v) · grad: one backward, so a check of the smooth form covers the step."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, surrogate: Triangle, smooth: bool) -> Tensor:
        ctx.save_for_backward(v)
        ctx.surrogate = surrogate
        return surrogate.primitive(v) if smooth else (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors
        return ctx.surrogate(v) * grad, None, None


def event(v: Tensor, surrogate: Triangle, *, smooth: bool = False) -> Tensor:
    """Event o = H(v) with H(0) = 0, in the dtype of v; backward do/dv = ψ(v).

    `smooth=True` returns Ψ(v) in place of H(v): a differentiable cell, for which finite differences are legitimate.
    """
    out: Tensor = _Event.apply(v, surrogate, smooth)  # type: ignore[no-untyped-call]
    return out
