"""How fast the density falls to its final value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Density over steps; steps count from 1, the first call of `Pruner.step`."""

    def density(self, step: int, final: float) -> float:
        """The density that a rule with this final density has at a step."""

    def due(self, step: int) -> bool:
        """Whether masks are drawn anew at this step."""


@dataclass(frozen=True)
class Cubic:
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
