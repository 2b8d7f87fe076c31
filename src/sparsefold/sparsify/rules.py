"""What structure a matrix is pruned to, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .masks import Scope, block_mask, magnitude_mask


class Rule(Protocol):
    """A final density, and masks on the way to it."""

    @property
    def density(self) -> float:
        """The share of weights (or blocks) that is left in the end."""

    def mask(self, weight: Tensor, gates: int, density: float, within: Tensor | None) -> Tensor:
        """The mask of a weight (R, C) at a density on the way, inside an earlier mask."""

    def advice(self, rows: int, columns: int) -> str | None:
        """What to tell the user about a gate of this size, or None."""


@dataclass(frozen=True)
class Magnitude:
    """Single weights of largest magnitude, ranked within each gate or over the matrix."""

    density: float
    scope: Scope = "gate"

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        _check(self.density, self.scope)

    def mask(self, weight: Tensor, gates: int, density: float, within: Tensor | None) -> Tensor:
        """`magnitude_mask` in this rule's scope."""
        return magnitude_mask(weight, density, gates, self.scope, within)

    def advice(self, rows: int, columns: int) -> str | None:
        """Every size fits."""
        return None


@dataclass(frozen=True)
class Block:
    """Blocks (rows, cols) = (outputs, inputs) of largest mean square, ranked within each gate or over the matrix."""

    density: float
    block: tuple[int, int] = (16, 1)
    scope: Scope = "gate"

    def __post_init__(self) -> None:
        """Refuse what no mask could be drawn for."""
        _check(self.density, self.scope)
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"a block is (rows, cols), each at least 1, got {self.block}.")

    def mask(self, weight: Tensor, gates: int, density: float, within: Tensor | None) -> Tensor:
        """`block_mask` in this rule's scope."""
        return block_mask(weight, density, self.block, gates, self.scope, within)

    def advice(self, rows: int, columns: int) -> str | None:
        """A sentence where the block does not divide the gate, naming the next size that it divides."""
        notes = [
            f"{size} {axis} are no multiple of {step}, so the last blocks are short; {-(-size // step) * step} would be"
            for axis, size, step in (("rows per gate", rows, self.block[0]), ("columns", columns, self.block[1]))
            if size % step
        ]
        return "; ".join(notes) + "." if notes else None


def _check(density: float, scope: str) -> None:
    if not 0 <= density <= 1:
        raise ValueError(f"density is the share of weights kept, in [0, 1], got {density}.")
    if scope not in ("gate", "matrix"):
        raise ValueError(f"scope is 'gate' or 'matrix', got {scope!r}.")
