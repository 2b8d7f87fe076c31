"""Which weights to keep: exact, deterministic masks of one matrix.

A matrix is (rows, columns) = (outputs, inputs), its rows stacked from `gates` gates of equal height. Ranking is within
each gate (scope="gate") or over all gates of the matrix together (scope="matrix"); of n candidates ⌈density · n⌉ with
the largest score are kept, ties going to the lowest index (row by row).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scope = Literal["gate", "matrix"]


def magnitude_mask(
    weight: Tensor, density: float, gates: int = 1, scope: Scope = "gate", within: Tensor | None = None
) -> Tensor:
    """Keep the weights of largest |w|: weight (R, C) -> bool (R, C).

    `within` is an earlier mask: what it dropped stays dropped. Errors: ValueError for a density outside [0, 1], a NaN
    weight, an axis too many, or rows that the gates do not divide.
    """
    _check(weight, density, gates, scope, within)
    scores = weight.detach().abs()
    if within is not None:
        scores = scores.masked_fill(~within, -1)
    mask = _largest(scores.reshape(gates, -1), density, scope).view(weight.shape)
    return mask if within is None else mask & within


def block_mask(
    weight: Tensor,
    density: float,
    block: tuple[int, int],
    gates: int = 1,
    scope: Scope = "gate",
    within: Tensor | None = None,
) -> Tensor:
    """Keep the blocks of largest mean square: weight (R, C), block (rows, cols) -> bool (R, C).

    Blocks count from the first row of each gate; those at an edge may be short, and their score is the mean over the
    elements they have. `within` and errors as in `magnitude_mask`; a block survives while any of its elements does.
    """
    _check(weight, density, gates, scope, within)
    rows, cols = block
    R, C = weight.shape[0] // gates, weight.shape[1]
    down, across = -(-R // rows), -(-C // cols)

    def per_block(x: Tensor) -> Tensor:
        padded = F.pad(x.double().view(-1, R, C), (0, across * cols - C, 0, down * rows - R))
        return padded.view(-1, down, rows, across, cols).sum((2, 4)).flatten(1)

    # In float64 the squares of float32 weights are exact, so equal blocks tie and ties are broken as promised.
    scores = per_block(weight.detach().double().square()) / per_block(torch.ones_like(weight[:R]))
    if within is not None:
        scores = scores.masked_fill(per_block(within) == 0, -1)
    kept = _largest(scores, density, scope).view(gates, down, 1, across, 1)
    mask = kept.expand(-1, -1, rows, -1, cols).reshape(gates, down * rows, across * cols)[:, :R, :C]
    mask = mask.reshape(weight.shape)
    return mask if within is None else mask & within


def _largest(scores: Tensor, density: float, scope: Scope) -> Tensor:
    """Scores (gates, n) -> bool (gates, n), the ⌈density · n⌉ largest of each row, or of all for scope="matrix"."""
    groups = scores.reshape(1, -1) if scope == "matrix" else scores
    n = groups.shape[1]
    # A product one rounding above an integer (0.1 · 30) must not keep one more.
    keep = min(n, math.ceil(density * n * (1 - 1e-12)))
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)


def _check(weight: Tensor, density: float, gates: int, scope: str, within: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"a mask is drawn for a matrix, got shape {tuple(weight.shape)}.")
    if not 0 <= density <= 1:
        raise ValueError(f"density is the share of weights kept, in [0, 1], got {density}.")
    if scope not in ("gate", "matrix"):
        raise ValueError(f"scope is 'gate' or 'matrix', got {scope!r}.")
    if gates < 1 or weight.shape[0] % gates:
        raise ValueError(f"{gates} gates do not divide {weight.shape[0]} rows.")
    if within is not None and within.shape != weight.shape:
        raise ValueError(f"the earlier mask has shape {tuple(within.shape)}, the weight {tuple(weight.shape)}.")
    if weight.isnan().any():
        raise ValueError("weight holds NaN, which has no rank. Find the step at which training diverged.")
