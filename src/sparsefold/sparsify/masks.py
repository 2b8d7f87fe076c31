"""Which weights to keep: exact, deterministic choices among the candidates of one matrix.

A matrix is (rows, columns) = (outputs, inputs), its rows stacked from `gates` gates of equal height. What lives or dies as
one is a *candidate*: a weight, a block, a group of rows in one column. Candidates compete in groups; of the n of a group those
with the largest score are kept, ties going to the lowest index. Everything here speaks of candidates through one tensor,

    at (groups, n, size) int64    places of the weights of each candidate in the flattened matrix, -1 where it has fewer

so that scores, masks, penalties and regrowth are the same few lines for every structure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scope = Literal["gate", "matrix", "global"]
Score = Literal["max", "l1", "l2"]
Density = float | tuple[float, ...]  # the share kept, in [0, 1]; one for each gate, in order, where there are several

_DEAD = -math.inf  # the score of what cannot be kept


# --- candidates ------------------------------------------------------------------------------------------------------


def blocks(rows: int, columns: int, gates: int, block: tuple[int, int], keep_diagonal: bool = False) -> Tensor:
    """Blocks (outputs, inputs), counted from the first row of each gate, row by row; (1, 1) are single weights.

    One group for each gate. Those at an edge may be short. With `keep_diagonal` the diagonal of each gate belongs to none.
    """
    down, across = block
    grid = _grid(rows, columns, gates)
    if keep_diagonal:
        grid.diagonal(dim1=1, dim2=2).fill_(-1)
    grid = F.pad(grid, (0, -columns % across, 0, -grid.shape[1] % down), value=-1)
    tiles = grid.view(gates, grid.shape[1] // down, down, grid.shape[2] // across, across)
    return tiles.transpose(2, 3).reshape(gates, -1, down * across)


def inputs_of_a_row(rows: int, columns: int, m: int) -> Tensor:
    """Single weights; a group is m neighbouring inputs of one row, the last of a row maybe fewer."""
    return F.pad(_grid(rows, columns, 1), (0, -columns % m), value=-1).reshape(-1, m, 1)


def groups_of_a_column(rows: int, columns: int, gates: int, group: int) -> Tensor:
    """`group` neighbouring rows in one column; a group of candidates is all of one gate's column."""
    grid = F.pad(_grid(rows, columns, gates), (0, 0, 0, -(rows // gates) % group), value=-1)
    return grid.view(gates, -1, group, columns).permute(0, 3, 1, 2).reshape(gates * columns, -1, group)


def complementary(rows: int, columns: int, gates: int, overlay: int, group: int) -> Tensor:
    """The `overlay` = k groups of `group` = g rows of each set, column by column: (gates · S · columns, k, g).

    A gate of R rows is padded to R' = S k g; group q of set s is rows (q S + s) g … + g. What lies beyond R has no weights.
    """
    grid = F.pad(_grid(rows, columns, gates), (0, 0, 0, -(rows // gates) % (overlay * group)), value=-1)
    sets = grid.view(gates, overlay, -1, group, columns)
    return sets.permute(0, 2, 4, 1, 3).reshape(-1, overlay, group)


def _grid(rows: int, columns: int, gates: int) -> Tensor:
    if gates < 1 or rows % gates:
        raise ValueError(f"{gates} gates do not divide {rows} rows.")
    return torch.arange(rows * columns).view(gates, rows // gates, columns)


# --- scores and choices ----------------------------------------------------------------------------------------------


def scores(weight: Tensor, at: Tensor, score: Score | Literal["sum"], within: Tensor | None = None) -> Tensor:
    """Scores (groups, n) float64 of a matrix: largest |w|, mean |w| ("l1"), mean w² ("l2") or sum of |w| of each candidate.

    Means, so that short blocks at an edge compete fairly. In float64 the squares of float32 weights are exact, so that equal
    blocks tie. What is empty, or has died in the mask `within`, has −inf. ValueError for a NaN weight.
    """
    if weight.isnan().any():
        raise ValueError("weight holds NaN, which has no rank. Find the step at which training diverged.")
    size = (at >= 0).sum(-1)
    values = gather(weight.detach().abs(), at).double()
    if score == "max":
        result = values.amax(-1)
    else:
        result = (values.square() if score == "l2" else values).sum(-1)
        result = result if score == "sum" else result / size.clamp(min=1)
    dead = size == 0 if within is None else (size == 0) | ~gather(within, at).any(-1)
    return result.masked_fill(dead, _DEAD)


def gather(matrix: Tensor, at: Tensor) -> Tensor:
    """Values of a matrix at `at`, 0 where that is -1; differentiable."""
    flat = matrix.flatten()
    return torch.cat([flat, flat.new_zeros(1)])[at]


def spread(kept: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """The mask of a matrix that holds the kept candidates (groups, n)."""
    flat = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=kept.device)
    flat[at[kept]] = True
    return flat[:-1].view(shape)


def count(density: float, n: int) -> int:
    """⌈density · n⌉; a product one rounding above an integer (0.1 · 30) does not keep one more."""
    return min(n, math.ceil(density * n * (1 - 1e-12)))


def best(scores: Tensor, keep: int | Sequence[int]) -> Tensor:
    """Scores (groups, n) -> bool (groups, n): the `keep` largest of each group (one number, or one for each) that are alive."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    limit = torch.as_tensor(keep, device=scores.device).reshape(-1, 1)
    first = torch.arange(scores.shape[1], device=scores.device) < limit
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first.expand_as(scores))
    return kept & (scores > _DEAD)


def densest(scores: Sequence[Tensor], existing: Sequence[Tensor], density: Density, scope: Scope) -> list[Tensor]:
    """Keep the share `density` of the candidates that exist, counted within each gate, each matrix, or all matrices together."""
    if scope == "gate":
        result = []
        for s, e in zip(scores, existing, strict=True):
            shares = density if isinstance(density, tuple) else (density,) * len(s)
            result.append(best(s, [count(d, n) for d, n in zip(shares, e.sum(1).tolist(), strict=True)]))
        return result
    if scope == "matrix" and len(scores) > 1:
        return [densest([s], [e], density, scope)[0] for s, e in zip(scores, existing, strict=True)]
    total = sum(int(e.sum()) for e in existing)
    share = density[0] if isinstance(density, tuple) else density
    kept = best(torch.cat([s.flatten() for s in scores])[None], count(share, total))[0]
    parts = torch.split(kept, [s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]


def balanced(scores: Tensor) -> Tensor:
    """Scores (sets, columns, k) -> bool alike: one group in each column, so that the sum of the scores kept is the largest
    possible while in every set each group that exists owns ⌊columns / k⌋ or ⌈columns / k⌉ columns.

    A transport problem, solved exactly by shortest paths: from every column's best group on, columns are handed from group to
    group along the cheapest chain, the worst imbalance first, until no chain gains. A group that has died in a column gets it
    under no condition: where that forbids balance, imbalance is the least possible.
    """
    alive = scores > _DEAD
    value = scores.clamp(-1e300, 1e300)
    columns, k = scores.shape[1:]
    existing = alive.any(1).sum(1).clamp(min=1)  # groups of each set
    low, high = columns // existing, -(-columns // existing)
    finite = value[alive]
    reach = float(finite.max() - finite.min()) if len(finite) else 0.0
    fault = (k + 1) * reach + 1  # dearer than any chain
    owner = scores.argmax(2)  # the first of equals
    active = torch.arange(len(scores), device=scores.device)
    while len(active):
        own, v = owner[active], value[active]
        loss = v.gather(2, own[..., None]) - v  # of handing each column to each group
        loss = loss.masked_fill(~alive[active], math.inf).scatter(2, own[..., None], math.inf)
        arcs = torch.full((len(active), k, k), math.inf, dtype=loss.dtype, device=loss.device)
        arcs.scatter_reduce_(1, own[..., None].expand_as(loss), loss, "amin")
        cost, step = _shortest_paths(arcs)
        load = F.one_hot(own, k).sum(1)
        lo, hi = low[active, None], high[active, None]
        gives = (load <= lo).int() - (load > hi).int()  # change of the faults when a group gives one column away
        takes = (load >= hi).int() - (load < lo).int()
        total = cost + fault * (gives[:, :, None] + takes[:, None, :])
        gain, pair = total.flatten(1).min(1)
        open_ = gain < -1e-12 * fault
        active, own, loss, step, pair = active[open_], own[open_], loss[open_], step[open_], pair[open_]
        at, end = pair // k, pair % k
        sets, moved = torch.arange(len(active), device=scores.device), own.clone()
        while (at != end).any():
            following = torch.where(at == end, end, step[sets, at, end])
            price = loss[sets, :, following].masked_fill(own != at[:, None], math.inf)
            column = price.argmin(1)
            moved[sets, column] = torch.where(at == end, moved[sets, column], following)
            at = following
        owner[active] = moved
    return torch.zeros_like(alive).scatter_(2, owner[..., None], True) & alive


def _shortest_paths(arcs: Tensor) -> tuple[Tensor, Tensor]:
    """Arcs (sets, k, k) without negative cycles -> cost of the cheapest path and its first stop, alike (Floyd, Warshall)."""
    k = arcs.shape[1]
    cost, step = arcs, torch.arange(k, device=arcs.device).expand_as(arcs)
    for via in range(k):
        through = cost[:, :, via, None] + cost[:, None, via]
        # Rounding must not make a detour of cost 0 look like a gain: its stops could then lead round in a circle.
        shorter = through < cost - 1e-14 * cost.abs().nan_to_num(posinf=0)
        cost = torch.where(shorter, through, cost)
        step = torch.where(shorter, step[:, :, via, None].expand_as(step), step)
    return cost, step


def regrown(kept: Tensor, scores: Tensor, growth: Tensor, share: float) -> Tensor:
    """Of the kept candidates (groups, n) drop the `share` of lowest score in the matrix, and in every group let as many of the
    others return, those of largest `growth` >= 0; what was just dropped returns only where there is nothing else.
    """
    drop = int(share * int(kept.sum()))
    order = torch.where(kept, scores, math.inf).flatten().argsort(stable=True)[:drop]
    dropped = torch.zeros_like(kept.flatten()).index_fill_(0, order, True).view_as(kept)
    rank = torch.where(dropped, torch.full_like(growth, -1.0), growth.masked_fill(kept, _DEAD))
    return (kept & ~dropped) | best(rank, dropped.sum(1).tolist())


# --- group lasso -----------------------------------------------------------------------------------------------------


def lasso(weight: Tensor, at: Tensor) -> Tensor:
    """Scalar Σ ‖w_g‖₂ over the candidates g; its gradient is w_g / ‖w_g‖, and 0 where w_g = 0."""
    norms: Tensor = torch.linalg.vector_norm(gather(weight, at), dim=-1)
    return norms.sum()


def proximal(weight: Tensor, at: Tensor, amount: float) -> Tensor:
    """The minimiser of ½ ‖v − w‖² + amount · Σ ‖v_g‖₂: each candidate shrunk by max(0, 1 − amount / ‖w_g‖), many to exactly 0."""
    norm = torch.linalg.vector_norm(gather(weight.detach(), at), dim=-1, keepdim=True)
    factor = (1 - amount / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)
    flat = torch.ones(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
    flat[at] = factor.expand_as(at).to(weight.dtype)
    return weight.detach() * flat[:-1].view_as(weight)
