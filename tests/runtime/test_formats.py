"""Formats against loops over single elements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsefold.formats import FORMATS, Block, Dense


@st.composite
def matrices(draw):
    """(weight, gates, block): small integers, many zeros, blocks that rarely divide."""
    gates, units, cols = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    block = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    r = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = r.random((gates * units, cols)) < draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    return (r.integers(1, 9, kept.shape) * kept).astype(np.float32), gates, block


def stored_blocks(weight, gates, block):
    """{(gate, block row in the gate, block column): elements of the block that exist}, of the blocks that hold something."""
    units, cols = weight.shape[0] // gates, weight.shape[1]
    kept = {}
    for row in range(weight.shape[0]):
        for col in range(cols):
            if weight[row, col]:
                g, i, c = row // units, row % units // block[0], col // block[1]
                rows = [g * units + k for k in range(i * block[0], min(i * block[0] + block[0], units))]
                kept[g, i, c] = [(k, j) for k in rows for j in range(c * block[1], min((c + 1) * block[1], cols))]
    return kept


@given(matrices())
def test_block_from_dense_and_back(case):
    weight, gates, block = case
    stored = Block.from_dense(weight, block, gates)
    np.testing.assert_array_equal(stored.to_dense(), weight)
    assert stored.to_dense().dtype == np.float32 and stored.to_dense().shape == weight.shape == stored.shape
    again = Block.from_dense(stored.to_dense(), block, gates)
    for name, array in stored.tensors().items():
        np.testing.assert_array_equal(array, again.tensors()[name])


@given(matrices())
def test_block_stores_the_blocks_that_hold_something_and_no_others(case):
    weight, gates, block = case
    stored, kept = Block.from_dense(weight, block, gates), stored_blocks(*case)
    per_gate = -(-weight.shape[0] // gates // block[0])
    order = sorted((c, g * per_gate + i) for g, i, c in kept)
    assert stored.block_row.tolist() == [row for _, row in order]
    assert stored.start.tolist() == [
        sum(c < column for c, _ in order) for column in range(-(-weight.shape[1] // block[1]) + 1)
    ]
    assert stored.values.shape == (len(kept), block[1], block[0])
    assert np.count_nonzero(stored.values) == np.count_nonzero(weight)
    assert stored.nbytes == 4 * (len(kept) * (block[0] * block[1] + 1) + len(stored.start))
    assert stored.blocks_per_gate == per_gate


@given(matrices())
def test_block_counts_every_element_that_exists_once(case):
    weight, gates, block = case
    stored, kept = Block.from_dense(weight, block, gates), stored_blocks(*case)
    elements = [place for places in kept.values() for place in places]
    assert len(set(elements)) == len(elements) == stored.elements
    by_column = [sum(col == c for _, col in elements) for c in range(weight.shape[1])]
    assert stored.column_elements.tolist() == by_column
    blocks_of = [sum(column == c // block[1] for _, _, column in kept) for c in range(weight.shape[1])]
    assert stored.column_index_bytes.tolist() == [4 * n + 8 for n in blocks_of]


@given(matrices(), st.sampled_from([np.float32, np.float64]))
def test_matvec_is_the_product(case, dtype):
    weight, gates, block = case
    x = np.arange(1, weight.shape[1] + 1, dtype=dtype)
    for stored in (Block.from_dense(weight, block, gates), Dense.from_dense(weight, gates)):
        product = stored.matvec(x)
        np.testing.assert_array_equal(product, weight.astype(np.float64) @ x)  # small integers: exact in both
        assert product.dtype == dtype


@given(matrices())
def test_dense_stores_and_counts_everything(case):
    weight, gates, _ = case
    stored = Dense.from_dense(weight.astype(np.float64), gates)
    np.testing.assert_array_equal(stored.to_dense(), weight)
    assert stored.values.dtype == np.float32 and stored.shape == weight.shape
    assert stored.elements == weight.size and stored.nbytes == 4 * weight.size
    assert stored.column_elements.tolist() == [weight.shape[0]] * weight.shape[1]
    assert stored.column_index_bytes.tolist() == [0] * weight.shape[1]


def test_a_block_never_reaches_over_the_edge_of_a_gate():
    weight = np.zeros((6, 4), np.float32)
    weight[2, 0] = 5  # the last row of gate 0, alone in a short block
    stored = Block.from_dense(weight, (2, 3), gates=2)
    assert stored.block_row.tolist() == [1] and stored.blocks_per_gate == 2
    assert stored.column_elements.tolist() == [1, 1, 1, 0]
    assert Block.from_dense(weight, (2, 3), gates=1).column_elements.tolist() == [2, 2, 2, 0]


def test_both_corners_of_a_matrix_may_be_short():
    stored = Block.from_dense(np.ones((5, 7)), (3, 4))
    assert stored.elements == 35 and stored.column_elements.tolist() == [5] * 7
    assert stored.values.size == 4 * 12


def test_layout_and_description():
    dense, block = Dense(np.ones((6, 4)), 3), Block.from_dense(np.eye(6, 4), (2, 1), 3)
    assert dense.layout() == {"format": "dense", "rows": 6, "cols": 4, "gates": 3}
    assert block.layout() == {"format": "block", "rows": 6, "cols": 4, "gates": 3, "block": [2, 1]}
    assert dense.description == "dense"
    assert block.description == "blocks 2x1, density 0.333"
    assert Block.from_dense(np.zeros((0, 4)), (2, 1)).description == "blocks 2x1, density 0.000"
    assert {"dense": Dense, "block": Block} == FORMATS


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Dense(np.ones(3)), r"two axes, \(outputs, inputs\); got shape \(3,\)"),
        (lambda: Dense(np.ones((4, 3)), 3), "a matrix of 4 rows cannot hold 3 gates"),
        (lambda: Dense(np.ones((4, 3)), 0), "cannot hold 0 gates"),
        (lambda: Dense([["a"]]), "could not convert"),
        (lambda: Block.from_dense(np.ones((4, 3)), (2, 1), 3), "Pass gates=3 for a GRU"),
        (lambda: Block.from_dense(np.ones((4, 3, 1)), (2, 1)), "two axes"),
        (lambda: Block.from_dense(np.ones((4, 3)), (0, 1)), "at least"),
        (lambda: Block.from_dense(np.ones((4, 3)), (2, -1)), "at least"),
        (lambda: Block.from_dense(np.ones((1, 1)), (4097, 1)), "between"),
    ],
)
def test_what_is_no_matrix_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def parts(**changed):
    """Arguments of a sound Block of 6x4 in two gates, three blocks of 2x2, with some of them changed."""
    sound = {
        "rows": 6, "cols": 4, "gates": 2, "block": (2, 2), "values": np.ones((3, 2, 2), np.float32),
        "block_row": np.array([0, 3, 1], np.uint32), "start": np.array([0, 2, 3], np.uint32),
    }  # fmt: skip
    return sound | changed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rows": 7}, "cannot hold 2 gates"),
        ({"gates": 0}, "cannot hold 0 gates"),
        ({"block": (0, 2)}, "must lie between"),
        ({"block": (2, 5000)}, "must lie between"),
        ({"cols": 5}, r"start \(4,\)"),
        ({"values": np.ones((2, 2, 2), np.float32)}, "stores values"),
        ({"values": np.ones((3, 2, 1), np.float32)}, "stores values"),
        ({"start": np.array([0, 3], np.uint32)}, "stores values"),
        ({"start": np.array([0, 2, 4], np.uint32)}, "start must rise from 0 to the number of blocks, 3"),
        ({"start": np.array([1, 2, 3], np.uint32)}, "start must rise"),
        ({"start": np.array([0, 9, 3], np.uint32)}, "start must rise"),
        ({"start": np.array([0, 2, 2], np.uint32)}, "start must rise"),
        ({"block_row": np.array([0, 4, 1], np.uint32)}, "block row 4 is out of range; the matrix has 4"),
        ({"block_row": np.array([3, 0, 1], np.uint32)}, "must ascend"),
        ({"block_row": np.array([3, 3, 1], np.uint32)}, "must ascend"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(changed, sentence):
    assert Block(**parts()).elements == 4 + 2 + 2
    with pytest.raises(ValueError, match=sentence):
        Block(**parts(**changed))


def test_rows_may_fall_from_one_block_column_to_the_next_across_an_empty_one():
    stored = Block(**parts(cols=6, block_row=np.array([0, 3, 1], np.uint32), start=np.array([0, 2, 2, 3], np.uint32)))
    assert stored.column_elements.tolist() == [3, 3, 0, 0, 1, 1]
