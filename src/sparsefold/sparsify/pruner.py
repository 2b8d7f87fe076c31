"""Pruning during training: masks by parameter name, re-applied after every optimiser step."""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import masks as ranking
from .masks import Density
from .rules import Rule, Threshold
from .schedule import OneShot, Schedule, TwoSlopes


class _Target(NamedTuple):
    weight: Tensor
    rule: Rule
    gates: int

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs): of a convolution with the taps of each input side by side."""
        return self.weight.flatten(1)

    def candidates(self) -> Tensor:
        """Where the weights of the candidates lie in the matrix."""
        rows, columns = self.matrix.shape
        return self.rule.candidates(rows, columns, self.gates).to(self.weight.device)

    def of(self, mask: Tensor) -> Tensor:
        """A mask or gradient as the matrix is, on its device."""
        return mask.to(self.weight.device).flatten(1)


class _Kept:
    """What a parameter carries as `kept`: gives the mask outside of which it is held at zero, as long as someone holds it.

    Layers may then leave out the gradient of the rest. A copy of the model, held by nobody, carries none.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = weakref.ref(mask)

    def __call__(self) -> Tensor | None:
        return self._mask()

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # nothing, of a type that torch.load takes from anybody


class Pruner:
    """Holds the parameters that `rules` name at a density, on the way and in the end.

    `rules` maps patterns of `model.named_parameters()` (with `*`) to rules; the first that matches a name wins. Without
    a schedule the final density is reached at the first `step()`. Masks only ever lose weights, but for schedules that let them
    grow. `weight_ih*` and `weight_hh*` of a recurrent layer have as many gates as their rows are multiples of its units, any
    other matrix one. Weights of more axes are (outputs, everything else). In place of a model, its state dict will do.

    Call `step()` after `optimizer.step()`: pruned weights are then exactly 0, whatever momentum or decay did to them. Masks are
    functions of weights, gradients and `seed` alone, so processes that train in parallel with the same weights draw the same.

    Args:
        model: whose parameters are pruned in place; compiled, or wrapped in DistributedDataParallel, it keeps its names.
        rules: what to prune, and to which structure.
        schedule: how fast.
        group_lasso: λ of `penalty` and `proximal`.
        seed: of everything random: first masks and regrowth of `SET`.

    Errors: ValueError for a pattern that matches nothing, names a vector or a matrix that its rule does not fit, and for a
    threshold without its schedule. A warning where a block does not divide a gate.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        schedule: Schedule | None = None,
        *,
        group_lasso: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= group_lasso < float("inf"):
            raise ValueError(f"group_lasso is a weight, finite and >= 0, got {group_lasso}.")
        for rule in rules.values():
            if isinstance(rule, Threshold) != isinstance(schedule, TwoSlopes):
                raise ValueError(
                    f"the rule {type(rule).__name__} and the schedule {type(schedule).__name__ if schedule else None} do not "
                    "belong together: a Threshold rises along TwoSlopes, densities fall along any other schedule."
                )
        self._parameters = _parameters(model)
        self._targets = dict(_match(self._parameters, _transposed(model), rules))
        self._schedule = schedule or OneShot()
        self._lasso, self._lasso_until = group_lasso, schedule.end if schedule else float("inf")
        self._lasso_at: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)
        self._step = 0
        self._start: dict[str, Tensor] = {}  # what the weights left are rewound to
        self._remember()
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(t.weight, dtype=torch.bool, requires_grad=False) for name, t in self._targets.items()
        }

    @torch.no_grad()
    def step(self) -> bool:
        """Advance one step: draw new masks where due, then zero what they drop, in place. Returns whether masks were drawn."""
        self._step += 1
        due = self._schedule.due(self._step)
        if due:
            self._draw()
        self._remember()
        if due and self._start:
            for name, value in self._start.items():
                self._parameters[name].copy_(value)
        self._apply()
        return due

    def density(self) -> dict[str, float]:
        """Share of weights that each mask keeps."""
        return {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in self.masks.items()}

    @property
    def gates(self) -> dict[str, int]:
        """How many gates each mask's rows are stacked from."""
        return {name: t.gates for name, t in self._targets.items()}

    def penalty(self) -> Tensor:
        """Scalar λ Σ ‖w_g‖₂ over the candidates (blocks, weights, …) of all rules: group lasso, to be added to the loss.

        0 from the schedule's last pruning on; without a schedule it never ends.
        """
        total = next(iter(self._targets.values())).weight.new_zeros(()) if self._targets else torch.zeros(())
        if self._lasso and self._step < self._lasso_until:
            for name, target in self._targets.items():
                total = total + ranking.lasso(target.matrix, self._at(name)).to(total.device)
        return self._lasso * total

    @torch.no_grad()
    def proximal(self, lr: float) -> None:
        """Group lasso as a step of its own, after `optimizer.step()`: w_g ← w_g · max(0, 1 − lr λ / ‖w_g‖).

        Decoupled from Adam's scaling, and blocks become exactly 0. Ends as `penalty` does.
        """
        if self._lasso and self._step < self._lasso_until:
            for name, t in self._targets.items():
                t.weight.copy_(ranking.proximal(t.matrix, self._at(name), lr * self._lasso).view_as(t.weight))

    def summary(self) -> str:
        """A table of every matrix and gate: weights kept, density, candidates kept, and how evenly over rows and columns."""
        head = (
            f"{'matrix':<28}{'gate':>5}{'kept':>20}{'density':>9}{'candidates':>24}{'in a row':>14}{'in a column':>14}"
        )
        lines = [head]
        for name, t in self._targets.items():
            mask = t.of(self.masks[name])
            at = t.candidates()
            alive, exists = ranking.gather(mask, at).any(-1).view(-1), (at >= 0).any(-1).view(-1)
            for g, part in enumerate(mask.view(t.gates, -1, mask.shape[1])):
                rows, columns, of = part.sum(1).tolist(), part.sum(0).tolist(), exists & (_gate(at, part.numel()) == g)
                kept = f"{int(part.sum())}/{part.numel()}"
                found = f"{int((alive & of).sum())}/{int(of.sum())} {t.rule.unit}"
                lines.append(
                    f"{name if g == 0 else '':<28}{g:>5}{kept:>20}{float(part.float().mean()):>9.2%}{found:>24}"
                    f"{_range(rows):>14}{_range(columns):>14}"
                )
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Step, masks, random state and what is rewound to: with model and optimiser, all that an exact resume needs."""
        return {
            "step": self._step,
            "random": self._random.get_state(),
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "start": {name: value.clone() for name, value in self._start.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()` and zero what its masks drop. ValueError for other names or shapes."""
        saved: Mapping[str, Tensor] = state["masks"]
        if saved.keys() != self.masks.keys():
            odd = ", ".join(sorted(saved.keys() ^ self.masks.keys()))
            raise ValueError(f"the saved pruner and this one prune different parameters: {odd}. Use the same rules.")
        for name, mask in saved.items():
            if mask.shape != self.masks[name].shape:
                raise ValueError(
                    f"the saved mask of {name} has shape {tuple(mask.shape)}, the parameter "
                    f"{tuple(self.masks[name].shape)}. Build the model that was saved."
                )
        self._step = int(state["step"])
        if "random" in state:
            self._random.set_state(state["random"].cpu())
        self._start = {name: value.clone() for name, value in state.get("start", {}).items()}
        self.masks = {name: mask.to(self.masks[name].device, torch.bool, copy=True) for name, mask in saved.items()}
        self._apply()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, made together with its model, holds the copied parameters."""
        self.__dict__.update(state)
        self._mark()

    def _mark(self) -> None:
        """Say to the parameters what is held at zero for good: nobody asks for its gradient."""
        for name, t in self._targets.items():
            final = t.rule.monotone and not self._schedule.grows
            if isinstance(t.weight, nn.Parameter):  # a state dict's tensors belong to no layer
                t.weight.kept = _Kept(self.masks[name]) if final else None  # type: ignore[attr-defined]

    def _draw(self) -> None:
        alone = [(t.rule, [name]) for name, t in self._targets.items() if not t.rule.together]
        together: dict[Rule, list[str]] = {}
        for name, t in self._targets.items():
            if t.rule.together:
                together.setdefault(t.rule, []).append(name)
        for rule, names in [*alone, *together.items()]:
            targets = [self._targets[name] for name in names]
            ats = [t.candidates() for t in targets]
            if self._schedule.grows and self._step > 1:
                chosen = [self._regrown(name, at) for name, at in zip(names, ats, strict=True)]
            else:
                scores = [self._scores(name, at) for name, at in zip(names, ats, strict=True)]
                chosen = rule.choose(scores, ats, [t.matrix.shape[1] for t in targets], self._value(rule.final))
            for name, t, at, kept in zip(names, targets, ats, chosen, strict=True):
                mask = rule.spread(kept, at, t.matrix.shape, t.gates)
                if rule.monotone and not self._schedule.grows:
                    mask &= t.of(self.masks[name])
                self.masks[name] = mask.view(t.weight.shape)

    def _value(self, final: Density) -> Density:
        if isinstance(final, tuple):
            return tuple(self._schedule.density(self._step, d) for d in final)
        return self._schedule.density(self._step, final)

    def _scores(self, name: str, at: Tensor) -> Tensor:
        t = self._targets[name]
        if not self._schedule.grows:
            return t.rule.scores(t.matrix, at, t.of(self.masks[name]) if t.rule.monotone else None)
        return self._chance(t.rule.scores(t.matrix, at))

    def _chance(self, scores: Tensor) -> Tensor:
        """Random scores in [0, 1) for whatever has one."""
        drawn = torch.rand(scores.shape, generator=self._random, dtype=torch.float64).to(scores.device)
        return torch.where(scores >= 0, drawn, scores)

    def _regrown(self, name: str, at: Tensor) -> Tensor:
        t, schedule = self._targets[name], self._schedule
        scores = t.rule.scores(t.matrix, at)
        if schedule.grows == "random":
            growth = self._chance(scores)
        elif t.weight.grad is None:
            raise ValueError(
                f"{name} has no gradient, by which weights return. Call pruner.step() after optimizer.step() and before "
                "optimizer.zero_grad()."
            )
        else:
            growth = t.rule.scores(t.of(t.weight.grad), at)
        kept = ranking.gather(t.of(self.masks[name]), at).any(-1)
        return ranking.regrown(kept, scores, growth, schedule.exchanged(self._step))  # type: ignore[attr-defined]

    def _remember(self) -> None:
        if self._schedule.rewind_to == self._step:
            self._start = {name: p.detach().clone() for name, p in self._parameters.items()}

    def _at(self, name: str) -> Tensor:
        if name not in self._lasso_at or self._lasso_at[name].device != self._targets[name].weight.device:
            self._lasso_at[name] = self._targets[name].candidates()
        return self._lasso_at[name]

    @torch.no_grad()
    def _apply(self) -> None:
        for name, target in self._targets.items():
            # Filled, not multiplied: the product of 0 and an infinite weight is NaN.
            target.weight.masked_fill_(~self.masks[name].to(target.weight.device), 0)
        self._mark()


def _unwrapped(model: Any) -> Any:
    while True:  # torch.compile and DistributedDataParallel put their own names before the model's
        inner = getattr(model, "_orig_mod", None)
        inner = getattr(model, "module", None) if isinstance(model, nn.parallel.DistributedDataParallel) else inner
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, Mapping):
        return {name: p for name, p in model.items() if p.is_floating_point()}
    return dict(_unwrapped(model).named_parameters())


def _transposed(model: Any) -> set[str]:
    """Names of weights that are stored (inputs, outputs, …), which no rule here reads."""
    if isinstance(model, Mapping):
        return set()
    return {f"{n}.weight".lstrip(".") for n, m in _unwrapped(model).named_modules() if getattr(m, "transposed", False)}


def _match(
    parameters: Mapping[str, Tensor], transposed: set[str], rules: Mapping[str, Rule]
) -> Iterator[tuple[str, _Target]]:
    taken: set[str] = set()
    for pattern, rule in rules.items():
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.4) or list(parameters)[:3]
            raise ValueError(f"no parameter is named {pattern!r}. Close names: {', '.join(close)}.")
        for name in names:
            if name in taken:
                continue
            taken.add(name)
            weight = parameters[name]
            if weight.dim() < 2 or name in transposed:
                what = "; rules prune matrices" if weight.dim() < 2 else ", a transposed convolution's, inputs first"
                raise ValueError(
                    f"{pattern!r} matches {name} of shape {tuple(weight.shape)}{what}. "
                    "Narrow the pattern, for example to '*weight_hh*'."
                )
            target = _Target(weight, rule, _gates(parameters, name))
            rows, columns = target.matrix.shape
            try:
                rule.candidates(rows, columns, target.gates)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if note := rule.advice(rows // target.gates, columns):
                warnings.warn(f"{name}: {note}", stacklevel=3)
            yield name, target


def _gates(parameters: Mapping[str, Tensor], name: str) -> int:
    """Rows by units, where the names are those of a recurrent layer; the units are the columns that its state is read by."""
    owner, dot, leaf = name.rpartition(".")
    for kind in ("weight_ih", "weight_hh"):
        if leaf.startswith(kind):
            suffix = leaf.removeprefix(kind)
            projected, recurrent = (parameters.get(f"{owner}{dot}{k}{suffix}") for k in ("weight_hr", "weight_hh"))
            reader = recurrent if projected is None else projected
            rows = parameters[name].shape[0]
            if reader is not None and reader.dim() == 2 and rows % reader.shape[1] == 0:
                return rows // reader.shape[1]
    return 1


def _gate(at: Tensor, size: int) -> Tensor:
    """The gate, of so many weights, that each candidate lies in (-1: in none), flattened."""
    return torch.div(at.amax(-1), size, rounding_mode="floor").flatten()


def _range(counts: list[int]) -> str:
    return f"{min(counts, default=0)}–{max(counts, default=0)}"
