"""How often units speak, and the price of speaking too often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


class Activity:
    """Event rates of a forward pass, layer by layer.

    `rates` holds one (H,) tensor per layer and direction: the mean of o over time and batch, with the surrogate's
    gradient. In a training forward under `torch.distributed` they are means over all processes, and the gradient is
    the one whose average over processes, which DistributedDataParallel takes, is that of the mean. Without gradient
    (evaluation, maybe on one process alone) nothing is communicated.
    """

    def __init__(self, rates: Sequence[Tensor]) -> None:
        self.rates: list[Tensor] = list(rates)
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

    def penalty(self, target_rate: float, weight: float, per: Literal["unit", "mean"] = "unit") -> Tensor:
        """Scalar weight · Σ_layers mean_j max(0, rate_j − target)²; per="mean" puts the layer's mean for rate_j.

        0 where no layer has events. ValueError unless 0 <= target_rate <= 1, weight >= 0 and `per` is known.
        """
        if not (0 <= target_rate <= 1 and weight >= 0):
            raise ValueError(
                f"an event-rate penalty needs a target in [0, 1] and a weight >= 0, got target_rate={target_rate}, "
                f"weight={weight}."
            )
        if per not in ("unit", "mean"):
            raise ValueError(f"per is 'unit' or 'mean', got {per!r}.")
        total = torch.zeros(())
        for rate in self.rates:
            rate = rate if per == "unit" else rate.mean()
            total = total + (rate - target_rate).clamp(min=0).square().mean()
        return weight * total

    def __repr__(self) -> str:
        """Rate of each layer and of all."""
        layers = ", ".join(f"{float(r.detach().mean()):.3f}" for r in self.rates)
        return f"Activity(event_rate={self.event_rate:.3f}, layers=[{layers}])"
