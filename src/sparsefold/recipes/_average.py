"""The mean of weights over steps, and when to begin with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def non_monotonic(earlier: Sequence[float], value: float, patience: int) -> bool:
    """Whether a loss is worse than the best of those that lie more than ``patience`` evaluations back.

    Source: Merity, Keskar and Socher (2017), arXiv 1708.02182, algorithm 1.
    """
    return len(earlier) > patience and value > min(earlier[: len(earlier) - patience])


class Average:
    """Mean of a model's parameters over steps: with a constant rate and the trigger above, NT-ASGD.

    ``update`` goes after every step once ``active``. ``restart`` begins anew, which is due where a mask has changed: the mean of
    weights that were pruned since is not zero.
    """

    def __init__(self, model: torch.nn.Module, patience: int = 5, begin: float = math.inf) -> None:
        self.patience, self.begin = patience, begin
        self.active, self.steps = False, 0
        self._model = model
        self._mean: dict[str, Tensor] = {}

    def consider(self, step: int, earlier: Sequence[float], value: float) -> None:
        """Begin after an evaluation that the trigger answers to, or the first at or after the step ``begin``."""
        self.active = self.active or step >= self.begin or non_monotonic(earlier, value, self.patience)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this step in."""
        if not self.active:
            return
        self.steps += 1
        for name, p in self._model.named_parameters():
            if self.steps == 1:
                self._mean[name] = p.detach().clone()
            else:
                self._mean[name] += (p - self._mean[name]) / self.steps

    def restart(self) -> None:
        """Forget the steps so far."""
        self.steps, self._mean = 0, {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the mean inside of this, where there is one."""
        kept = {name: p.detach().clone() for name, p in self._model.named_parameters()} if self.steps else {}
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        own = dict(self._model.named_parameters())
        for name, value in values.items():
            own[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resume needs; nothing before it is active."""
        return (
            {"steps": torch.tensor(self.steps), **{f"mean.{k}": v for k, v in self._mean.items()}}
            if self.active
            else {}
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        self.active = "steps" in tensors
        self.steps = int(tensors["steps"]) if self.active else 0
        own = dict(self._model.named_parameters())
        self._mean = {
            k[len("mean.") :]: v.to(own[k[len("mean.") :]].device) for k, v in tensors.items() if k.startswith("mean.")
        }
