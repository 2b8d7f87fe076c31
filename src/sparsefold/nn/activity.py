"""How often units speak, and the price of speaking too often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


class Activity:
    """Event rates of a forward pass, layer by layer.

    `rates` holds one (H,) tensor per layer and direction: the mean of o over time and batch, with the surrogate's
    gradient. In a training forward under `torch.distributed` they are means over all processes, and the gradient is
    the one whose average over processes, which DistributedDataParallel takes, is that of the mean. Without gradient
    (evaluation, maybe on one process alone) nothing is communicated. `emitted` computes, layer by layer likewise, the mean of
    |y| of each unit, (H,); a loss made of it is averaged by DistributedDataParallel as any other.
    """

    def __init__(self, rates: Sequence[Tensor], emitted: Sequence[Callable[[], Tensor]] = ()) -> None:
        self.rates: list[Tensor] = list(rates)
        self.emitted: list[Callable[[], Tensor]] = list(emitted)
        if self.rates and dist.is_available() and dist.is_initialized() and torch.is_grad_enabled():
            own = torch.cat(self.rates)
            mean = own.detach().clone()
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            self.rates = list(torch.split(own + (mean - own).detach(), [r.numel() for r in self.rates]))

    @property
    def event_rate(self) -> float:
        """Events per unit and step over all units of all layers; 1.0 where no layer has events (a dense network)."""
        return float(torch.cat([r.detach() for r in self.rates]).mean()) if self.rates else 1.0

    def penalty(
        self, target_rate: float | Sequence[float], weight: float, per: Literal["unit", "mean"] = "unit"
    ) -> Tensor:
        """Scalar weight · Σ_layers mean_j max(0, rate_j − target)²; per="mean" puts the layer's mean for rate_j.

        `target_rate` is one for all, or one for each layer and direction, in the order of `rates`; `nn.anneal` moves it.
        0 where no layer has events. ValueError unless targets lie in [0, 1], weight >= 0 and `per` is known.
        """
        given = list(target_rate) if isinstance(target_rate, Sequence) else [target_rate]
        targets = given if isinstance(target_rate, Sequence) else given * len(self.rates)
        if not (all(0 <= t <= 1 for t in given) and weight >= 0):
            raise ValueError(
                f"an event-rate penalty needs a target in [0, 1] and a weight >= 0, got target_rate={target_rate}, "
                f"weight={weight}."
            )
        if len(targets) != len(self.rates):
            raise ValueError(
                f"{len(targets)} target rates are given, this network has {len(self.rates)} layers and directions with events. "
                "Give one for each, or one for all."
            )
        if per not in ("unit", "mean"):
            raise ValueError(f"per is 'unit' or 'mean', got {per!r}.")
        total = torch.zeros(())
        for rate, target in zip(self.rates, targets, strict=True):
            rate = rate if per == "unit" else rate.mean()
            total = total + (rate - target).clamp(min=0).square().mean()
        return weight * total

    def l1(self, weight: float) -> Tensor:
        """Scalar weight · Σ_layers mean |y| over time, batch and units: what is spoken costs by its size. Its gradient reaches u
        through y = o ⊙ u, by the events that are and, by the surrogate, those that nearly are.

        0 where no layer has events. ValueError unless weight >= 0.
        """
        if not weight >= 0:
            raise ValueError(f"an L1 penalty needs a weight >= 0, got {weight}.")
        total = torch.zeros(())
        for mean in self.emitted:
            total = total + mean().mean()
        return weight * total

    def __repr__(self) -> str:
        """Rate of each layer and of all."""
        layers = ", ".join(f"{float(r.detach().mean()):.3f}" for r in self.rates)
        return f"Activity(event_rate={self.event_rate:.3f}, layers=[{layers}])"
