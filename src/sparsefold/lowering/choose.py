"""Which storage format a matrix gets, from its zeros alone: the one whose use is expected to take the least time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsefold.formats import CSC, Block, Complementary, Dense, Float, Format

# Tall blocks first: an event wakes one column, and 16 rows are one vector.
BLOCKS = ((32, 1), (16, 1), (8, 1), (4, 1), (16, 16), (8, 4), (4, 4))
GROUPS = (16, 1)

# Nanoseconds on one AVX-512 core, events, weights in the second-level cache (bench/results). Only their ratios matter.
DENSE_ELEMENT = 0.1
SEGMENT = {16: 1.45, 8: 1.15, 4: 0.85, 1: 0.5}  # one run of rows, by its height
COMPLEMENTARY_ELEMENT = 0.32  # groups of one row


def choose(weight: Float, gates: int = 1) -> Format:
    """The format for ``weight`` (outputs, inputs) with ``gates`` gates that is expected to be fastest.

    Anything but dense must promise a tenth less time than dense; below that, whole columns are the safer choice.
    """
    dense = Dense.from_dense(weight, gates)
    if weight.size == 0 or (weight != 0).mean() > 0.75:
        return dense
    best = min(_candidates(weight, gates), key=lambda m: (price(m), m.nbytes))
    return best if price(best) < 0.9 * price(dense) else dense


def price(matrix: Format) -> float:
    """Expected nanoseconds when every column is used once."""
    if isinstance(matrix, Dense):
        return DENSE_ELEMENT * matrix.elements
    if isinstance(matrix, CSC):
        return SEGMENT[1] * matrix.elements
    if isinstance(matrix, Complementary):
        if matrix.group == 1:
            return COMPLEMENTARY_ELEMENT * matrix.live.size
        return _segments(matrix.group) * matrix.live.size
    return _segments(matrix.block[0]) * len(matrix.block_row) * matrix.block[1]


def _segments(height: int) -> float:
    if height % 16 == 0:
        return SEGMENT[16] * height / 16
    return SEGMENT.get(height, SEGMENT[1] * height)


def _candidates(weight: Float, gates: int) -> Iterator[Format]:
    for block in BLOCKS:
        yield Block.from_dense(weight, block, gates)
    if weight.shape[0] <= 2**16:
        yield CSC.from_dense(weight, gates)
    for group in GROUPS:
        density = Block.from_dense(weight, (group, 1), gates).density if group > 1 else float(np.mean(weight != 0))
        overlay = round(1 / density) if density else 0
        if 2 <= overlay <= 64:
            try:
                yield Complementary.from_dense(weight, overlay, group, gates)
            except ValueError:  # its zeros do not have that pattern
                continue
