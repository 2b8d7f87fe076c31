"""k winners take all: of every step only the k largest values speak."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class KWTA(torch.nn.Module):
    """y = o ⊙ x, with o = 1 for the k largest values of the last axis, (..., H) to (..., H); ties go to the lower index.

    The gradient passes where o = 1. In training, units that win too rarely are helped: the contest is decided by
    x · exp(boost · (k / H - duty)) for positive x, where duty is each unit's share of recent steps that it won; what is handed on
    is x itself (S. Ahmad and L. Scheinkman, arXiv 1903.11257). In evaluation nothing is boosted. In a training forward with
    gradient under `torch.distributed` duty is that of all processes together.

    Args:
        units: H.
        k: winners of each part in training.
        k_eval: winners in evaluation; None: k.
        groups: equal contiguous parts of the H values, each with k winners of its own; 1: the contest is global, else local.
        boost: strength, 0 for none; a plain attribute that may be lowered while training (`layer.boost = nn.anneal(…)(step)`),
            and should be small in the end, since what is compiled is not boosted.
        duty_period: steps over which the duty cycle is averaged.

    Raises:
        ValueError: more winners than values, or parts that are not equal.
    """

    duty: Tensor  # (H,) share of recent steps that each unit won

    def __init__(
        self,
        units: int,
        k: int,
        k_eval: int | None = None,
        groups: int = 1,
        boost: float = 0.0,
        duty_period: int = 1000,
    ) -> None:
        super().__init__()
        self.units, self.k, self.k_eval, self.groups = units, k, k if k_eval is None else k_eval, groups
        self.boost, self.duty_period = boost, duty_period
        if groups < 1 or units % groups or not all(0 < n <= units // groups for n in (self.k, self.k_eval)):
            raise ValueError(
                f"of {units} values in {groups} equal parts, {self.k} (training) and {self.k_eval} (evaluation) of each "
                "cannot be kept. Choose groups that divides units, and 0 < k <= units / groups."
            )
        if boost < 0 or duty_period < 1:
            raise ValueError(f"boost is at least 0 and duty_period at least 1, got {boost} and {duty_period}.")
        self.register_buffer("duty", torch.full((units,), self.k * groups / units))

    def forward(self, x: Tensor) -> Tensor:
        """The winners of x (..., H), zero elsewhere."""
        if x.shape[-1] != self.units:
            raise ValueError(
                f"this KWTA has {self.units} units, but its input has {x.shape[-1]} values in the last axis."
            )
        k, contest = self.k if self.training else self.k_eval, x.detach()
        if self.training and self.boost:
            share = self.k * self.groups / self.units
            factor = torch.exp(self.boost * (share - self.duty.to(x.dtype)))
            contest = torch.where(contest > 0, contest * factor, contest / factor)
        parts = contest.reshape(*contest.shape[:-1], self.groups, -1)
        order = parts.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        won = torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)
        if self.training:
            steps = won.reshape(-1, self.units)
            won_share, processes = steps.float().mean(0).to(self.duty.dtype), 1
            if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled():
                processes = dist.get_world_size()
                dist.all_reduce(won_share)
            kept = (1 - 1 / self.duty_period) ** (len(steps) * processes)
            self.duty.mul_(kept).add_((1 - kept) * won_share / processes)
        return torch.where(won, x, torch.zeros_like(x))

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"{self.units}, k={self.k}, k_eval={self.k_eval}, groups={self.groups}, boost={self.boost}"
