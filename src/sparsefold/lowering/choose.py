"""Which storage format a matrix gets, from its zeros alone."""

from __future__ import annotations

from sparsefold.formats import Block, Dense, Float, Format

# Tall blocks first: an event wakes one column, and 16 rows are one vector.
CANDIDATES = ((32, 1), (16, 1), (8, 1), (4, 1), (16, 16), (8, 4), (4, 4))


def choose(weight: Float, gates: int = 1) -> Format:
    """The cheapest format for ``weight`` (outputs, inputs) with ``gates`` gates: fewest bytes moved per use of the matrix.

    Blocks are taken only where they save a quarter of the dense bytes; below that, whole columns stream better.
    """
    dense = Dense.from_dense(weight, gates)
    if weight.size == 0 or (weight != 0).mean() > 0.75:
        return dense
    blocks = (Block.from_dense(weight, block, gates) for block in CANDIDATES)
    best = min(blocks, key=lambda b: _price(b))
    return best if _price(best) < 0.75 * dense.nbytes else dense


def _price(matrix: Block) -> float:
    """Bytes moved when every column is used once. A segment shorter than a vector costs a vector's work all the same."""
    height = matrix.block[0]
    vectors = -(-height // 16) * 16
    return matrix.nbytes * vectors / height
