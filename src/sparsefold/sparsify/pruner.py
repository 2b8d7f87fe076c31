"""Pruning during training: masks by parameter name, re-applied after every optimiser step."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .rules import Rule
from .schedule import Schedule


class _Target(NamedTuple):
    weight: nn.Parameter
    rule: Rule
    gates: int


class Pruner:
    """Holds the parameters that `rules` name at a density, on the way and in the end.

    `rules` maps patterns of `model.named_parameters()` (with `*`) to rules; the first that matches a name wins. Without
    a schedule the final density is reached at the first `step()`. Masks only ever lose weights. `weight_ih*` and
    `weight_hh*` of a module with `hidden_size` have rows // hidden_size gates, any other matrix one.

    Call `step()` after `optimizer.step()`: pruned weights are then exactly 0, whatever momentum or decay did to them.

    Errors: ValueError for a pattern that matches nothing or names a vector. A warning where a block does not divide
    a gate.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule], schedule: Schedule | None = None) -> None:
        parameters = dict(model.named_parameters())
        self._targets: dict[str, _Target] = {}
        for pattern, rule in rules.items():
            names = [name for name in parameters if fnmatchcase(name, pattern)]
            if not names:
                close = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.4) or list(parameters)[:3]
                raise ValueError(f"no parameter is named {pattern!r}. Close names: {', '.join(close)}.")
            for name in names:
                if name in self._targets:
                    continue
                weight = parameters[name]
                if weight.dim() != 2:
                    raise ValueError(
                        f"{pattern!r} matches {name} of shape {tuple(weight.shape)}; rules prune matrices. "
                        "Narrow the pattern, for example to '*weight_hh*'."
                    )
                gates = _gates(model, name)
                if note := rule.advice(weight.shape[0] // gates, weight.shape[1]):
                    warnings.warn(f"{name}: {note}", stacklevel=2)
                self._targets[name] = _Target(weight, rule, gates)
        self._schedule = schedule
        self._step = 0
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(t.weight, dtype=torch.bool, requires_grad=False) for name, t in self._targets.items()
        }

    def step(self) -> None:
        """Advance one step: draw new masks where due, then zero what they drop, in place."""
        self._step += 1
        schedule = self._schedule
        if schedule.due(self._step) if schedule else self._step == 1:
            for name, (weight, rule, gates) in self._targets.items():
                density = schedule.density(self._step, rule.density) if schedule else rule.density
                self.masks[name] = rule.mask(weight, gates, density, self.masks[name].to(weight.device))
        self._apply()

    def density(self) -> dict[str, float]:
        """Share of weights that each mask keeps."""
        return {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Step and masks: with the model and the optimiser, all that an exact resume needs."""
        return {"step": self._step, "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()` and zero what its masks drop. ValueError for other names or shapes."""
        masks: Mapping[str, Tensor] = state["masks"]
        if masks.keys() != self.masks.keys():
            odd = ", ".join(sorted(masks.keys() ^ self.masks.keys()))
            raise ValueError(f"the saved pruner and this one prune different parameters: {odd}. Use the same rules.")
        for name, mask in masks.items():
            if mask.shape != self.masks[name].shape:
                raise ValueError(
                    f"the saved mask of {name} has shape {tuple(mask.shape)}, the parameter "
                    f"{tuple(self.masks[name].shape)}. Build the model that was saved."
                )
        self._step = int(state["step"])
        self.masks = {name: mask.to(self.masks[name].device, torch.bool, copy=True) for name, mask in masks.items()}
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for name, target in self._targets.items():
            # Filled, not multiplied: the product of 0 and an infinite weight is NaN.
            target.weight.masked_fill_(~self.masks[name].to(target.weight.device), 0)


def _gates(model: nn.Module, name: str) -> int:
    owner, _, leaf = name.rpartition(".")
    hidden = getattr(model.get_submodule(owner), "hidden_size", None)
    if not isinstance(hidden, int) or not leaf.startswith(("weight_ih", "weight_hh")):
        return 1
    rows: int = model.get_parameter(name).shape[0]
    return rows // hidden
