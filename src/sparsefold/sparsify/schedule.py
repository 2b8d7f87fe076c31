"""How the density falls to its final value, and whether weights may come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal


class Schedule:
    """Density over steps; steps count from 1, the first call of `Pruner.step`."""

    end: Any  # the step after which no mask changes
    grows: ClassVar[Literal["random", "gradient"] | None] = None  # how dropped weights return, None: never
    rewind_to: Any = None  # the step whose values the weights left take up again after each pruning, None: they go on

    def density(self, step: int, final: float) -> float:
        """The density that a rule with this final density has at a step."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Whether masks are drawn anew at this step."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneShot(Schedule):
    """The final density at once, at step `at`."""

    at: int = 1

    def __post_init__(self) -> None:
        """Refuse a step that never comes."""
        _at_least_one("at", self.at)

    @property
    def end(self) -> int:
        """The step `at`."""
        return self.at

    def density(self, step: int, final: float) -> float:
        """Exactly 1 before `at`, `final` from then on."""
        return final if step >= self.at else 1.0

    def due(self, step: int) -> bool:
        """Once."""
        return step == self.at


@dataclass(frozen=True)
class Cubic(Schedule):
    """density = final + (1 − final)(1 − p)³, p = (step − begin) / (end − begin) clipped to [0, 1].

    New masks at steps begin, begin + every, … and at `end`, where the final density is exact; held afterwards.

    Source: Zhu and Gupta (2017), arXiv 1710.01878.
    """

    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse a ramp that runs backwards or never moves."""
        if not (0 <= self.begin <= self.end and self.end >= 1 and self.every >= 1):
            raise ValueError(
                "a cubic schedule needs 0 <= begin <= end, end >= 1 and every >= 1, got "
                f"begin={self.begin}, end={self.end}, every={self.every}."
            )

    def density(self, step: int, final: float) -> float:
        """As in the class; exactly 1 up to `begin` and exactly `final` from `end` on."""
        if step >= self.end:
            return final
        if step <= self.begin:
            return 1.0
        left = (self.end - step) / (self.end - self.begin)
        return min(1.0, final + (1 - final) * left**3)

    def due(self, step: int) -> bool:
        """At begin, every `every` steps of the ramp, and at its end."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)


@dataclass(frozen=True)
class Staircase(Schedule):
    """Densities reached one after the other: `stairs[i]` falls from what was held before it to `densities[i]`, then held.

    The fall of a stair is that of `Cubic`, with its begin, end and every. A rule whose final density is higher stops there.
    A model kept before each next stair begins gives one network for each density, from one training.
    """

    densities: tuple[float, ...]
    stairs: tuple[Cubic, ...]

    def __post_init__(self) -> None:
        """Refuse stairs that rise or overlap."""
        falls = all(a > b for a, b in pairwise((1.0 + 1e-9, *self.densities, -1.0)))
        if not falls or len(self.densities) != len(self.stairs) or not self.stairs:
            raise ValueError(
                f"a staircase has densities in [0, 1] that fall, and a stair for each, got {self.densities} and "
                f"{len(self.stairs)} stairs."
            )
        if any(a.end > b.begin for a, b in pairwise(self.stairs)):
            raise ValueError("a stair begins at or after the end of the one before it.")

    @property
    def end(self) -> int:
        """Where the last stair ends."""
        return self.stairs[-1].end

    def density(self, step: int, final: float) -> float:
        """As in the class."""
        held = 1.0
        for stair, density in zip(self.stairs, self.densities, strict=True):
            if step < stair.end:
                return max(final, density + (held - density) * stair.density(step, 0.0))
            held = density
        return max(final, held)

    def due(self, step: int) -> bool:
        """Where one of the stairs is."""
        return any(stair.due(step) for stair in self.stairs)


@dataclass(frozen=True)
class Iterative(Schedule):
    """Prune, fine-tune, repeat: at steps begin, begin + every, … density final^(i / rounds), i = 1 … rounds.

    Each round drops the same share of what is left. With `rewind_to`, all parameters of the model go back after each round to
    their values at that step (0: when the `Pruner` was made), dropped weights to 0: the lottery ticket, trained anew. Clear
    the optimiser's state then: `Pruner.step` returns True.

    Source: Han et al. (2015), arXiv 1506.02626; Frankle and Carbin (2019), arXiv 1803.03635, for rewinding.
    """

    begin: int
    every: int
    rounds: int
    rewind_to: int | None = None

    def __post_init__(self) -> None:
        """Refuse rounds that never come, and a rewind to what is yet to come."""
        for name in ("begin", "every", "rounds"):
            _at_least_one(name, getattr(self, name))
        if self.rewind_to is not None and not 0 <= self.rewind_to < self.begin:
            raise ValueError(f"rewind_to is a step before the first pruning, {self.begin}, got {self.rewind_to}.")

    @property
    def end(self) -> int:
        """The step of the last round."""
        return self.begin + (self.rounds - 1) * self.every

    def density(self, step: int, final: float) -> float:
        """As in the class."""
        done = min((step - self.begin) // self.every + 1, self.rounds) if step >= self.begin else 0
        return final if done == self.rounds else float(final ** (done / self.rounds))

    def due(self, step: int) -> bool:
        """At the rounds."""
        return self.begin <= step <= self.end and (step - self.begin) % self.every == 0


@dataclass(frozen=True)
class TwoSlopes(Schedule):
    """The threshold ε of rules `Threshold`, rising in two slopes θ and φ = `ratio` · θ; updated at multiples of `every`.

        start <= t < ramp    ε = θ (t − start + 1) / every
        ramp  <= t < end     ε = (θ (ramp − start + 1) + φ (t − ramp + 1)) / every
        θ = 2 q every / (2 (ramp − start) + 3 (end − ramp))

    Outside [start, end) nothing is pruned. With the ratio 1.5 that this θ supposes, ε comes to q at the end.

    Source: Narang et al. (2017), arXiv 1704.05119. Patented: see docs/pruning.md.
    """

    start: int
    ramp: int
    end: int
    every: int = 100
    ratio: float = 1.5

    def __post_init__(self) -> None:
        """Refuse slopes that run backwards or never rise."""
        if not (0 <= self.start <= self.ramp <= self.end and self.start < self.end and self.every >= 1):
            raise ValueError(
                "a threshold needs 0 <= start <= ramp <= end, start < end and every >= 1, got "
                f"start={self.start}, ramp={self.ramp}, end={self.end}, every={self.every}."
            )
        if not (math.isfinite(self.ratio) and self.ratio >= 0):
            raise ValueError(f"ratio = φ / θ is finite and >= 0, got {self.ratio}.")

    def density(self, step: int, final: float) -> float:
        """In place of a density the threshold ε at a step of [start, end), `final` taken for q."""
        theta = 2 * final * self.every / (2 * (self.ramp - self.start) + 3 * (self.end - self.ramp))
        if step < self.ramp:
            return theta * (step - self.start + 1) / self.every
        return (theta * (self.ramp - self.start + 1) + self.ratio * theta * (step - self.ramp + 1)) / self.every

    def due(self, step: int) -> bool:
        """At multiples of `every` inside [start, end)."""
        return self.start <= step < self.end and step % self.every == 0


@dataclass(frozen=True)
class _Regrowth(Schedule):
    every: int
    end: int
    share: float = 0.3

    def __post_init__(self) -> None:
        """Refuse what never changes a mask or changes more than all."""
        _at_least_one("every", self.every)
        _at_least_one("end", self.end)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is the part of the kept weights exchanged, in [0, 1], got {self.share}.")

    def density(self, step: int, final: float) -> float:
        """`final` from the first step on."""
        return final

    def due(self, step: int) -> bool:
        """At the first step, and at multiples of `every` before `end`."""
        return step == 1 or (step < self.end and step % self.every == 0)

    def exchanged(self, step: int) -> float:
        """Share of the kept weights (blocks, groups) that make room for others at a step."""
        return self.share


@dataclass(frozen=True)
class SET(_Regrowth):
    """Sparse from the start: a random mask at the first step; then at multiples of `every`, until `end`, the `share` of smallest
    score makes room for as many others, drawn at random, which start from 0.

    Source: Mocanu et al. (2018), arXiv 1707.04780.
    """

    grows: ClassVar[Literal["random", "gradient"] | None] = "random"


@dataclass(frozen=True)
class RigL(_Regrowth):
    """As `SET`, but those return whose gradient is largest, and the share falls as share / 2 · (1 + cos(π step / end)).

    `Pruner.step` reads the gradients: call it before `optimizer.zero_grad()`.

    Source: Evci et al. (2020), arXiv 1911.11134.
    """

    grows: ClassVar[Literal["random", "gradient"] | None] = "gradient"

    def exchanged(self, step: int) -> float:
        """Falls along a cosine to 0 at `end`."""
        return self.share / 2 * (1 + math.cos(math.pi * min(step / self.end, 1)))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}.")
