"""Formats against loops over single elements."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
import tolerances
from sparsefold.formats import CSC, FORMATS, Block, Complementary, Dense


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


def check_matvec(stored, weight, dtype):
    x = np.arange(1, weight.shape[1] + 1, dtype=dtype)
    product = stored.matvec(x)
    np.testing.assert_array_equal(product, weight.astype(np.float64) @ x)  # small integers: exact in both
    assert product.dtype == dtype


@given(matrices(), st.sampled_from([np.float32, np.float64]))
def test_matvec_is_the_product(case, dtype):
    weight, gates, block = case
    for stored in (
        Block.from_dense(weight, block, gates), Dense.from_dense(weight, gates), CSC.from_dense(weight, gates)
    ):  # fmt: skip
        check_matvec(stored, weight, dtype)


@given(matrices())
def test_dense_stores_and_counts_everything(case):
    weight, gates, _ = case
    stored = Dense.from_dense(weight.astype(np.float64), gates)
    np.testing.assert_array_equal(stored.to_dense(), weight)
    assert stored.values.dtype == np.float32 and stored.shape == weight.shape
    assert stored.elements == weight.size and stored.nbytes == 4 * weight.size
    assert stored.column_elements.tolist() == [weight.shape[0]] * weight.shape[1]
    assert stored.column_index_bytes.tolist() == [0] * weight.shape[1]


@given(matrices())
def test_csc_stores_the_elements_that_are_not_zero_by_column(case):
    weight, gates, _ = case
    stored = CSC.from_dense(weight.astype(np.float64), gates)
    places = [(c, row) for c in range(weight.shape[1]) for row in range(weight.shape[0]) if weight[row, c]]
    in_column = [sum(column == c for column, _ in places) for c in range(weight.shape[1])]
    assert stored.row.tolist() == [row for _, row in places] and stored.row.dtype == np.uint16
    assert stored.values.tolist() == [weight[row, c] for c, row in places] and stored.values.dtype == np.float32
    assert stored.start.tolist() == [sum(in_column[:c]) for c in range(weight.shape[1] + 1)]
    assert stored.column_elements.tolist() == in_column and stored.elements == len(places)
    assert stored.column_index_bytes.tolist() == [2 * n + 8 for n in in_column]
    assert stored.nbytes == 6 * len(places) + 4 * (weight.shape[1] + 1)
    assert stored.shape == weight.shape and stored.density == len(places) / weight.size
    np.testing.assert_array_equal(stored.to_dense(), weight)
    assert stored.to_dense().dtype == np.float32


@st.composite
def packings(draw):
    """(Complementary of small integers with any live groups, the same unpacked, rows that live in each column)."""
    gates, units, cols = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    overlay, group = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    r = np.random.default_rng(draw(st.integers(0, 2**32)))
    sets = -(-units // (overlay * group))
    live = r.integers(0, overlay, (cols, gates, sets), np.uint8)
    values = np.zeros((cols, gates, sets, group), np.float32)
    weight, living = np.zeros((gates * units, cols), np.float32), [[] for _ in range(cols)]
    for c, g, s, i in np.ndindex(values.shape):
        row = (int(live[c, g, s]) * sets + s) * group + i
        if row < units:
            values[c, g, s, i] = weight[g * units + row, c] = r.integers(0, 4)
            living[c].append(g * units + row)
    return Complementary(gates * units, cols, gates, overlay, group, values, live), weight, living


@given(packings(), st.sampled_from([np.float32, np.float64]))
def test_complementary_is_its_matrix(case, dtype):
    stored, weight, _ = case
    np.testing.assert_array_equal(stored.to_dense(), weight)
    assert stored.to_dense().dtype == np.float32 and stored.shape == weight.shape
    check_matvec(stored, weight, dtype)


@given(packings())
def test_complementary_from_dense_and_back(case):
    stored, weight, _ = case
    again = Complementary.from_dense(weight.astype(np.float64), stored.overlay, stored.group, stored.gates)
    assert again.layout() == stored.layout()
    np.testing.assert_array_equal(again.to_dense(), weight)
    np.testing.assert_array_equal(again.values, stored.values)
    holds = stored.values.any(axis=3)  # which group lives is free where it holds nothing
    np.testing.assert_array_equal(again.live[holds], stored.live[holds])
    assert not again.live[~holds].any()
    assert {name: array.dtype for name, array in again.tensors().items()} == {"values": np.float32, "live": np.uint8}


@given(packings())
def test_complementary_counts_every_row_that_lives_once(case):
    stored, weight, living = case
    assert all(len(set(rows)) == len(rows) for rows in living)
    assert stored.column_elements.tolist() == [len(rows) for rows in living]
    assert stored.elements == sum(map(len, living)) and stored.density == stored.elements / weight.size
    assert stored.column_index_bytes.tolist() == [stored.gates * stored.sets] * stored.cols
    assert stored.nbytes == 4 * stored.values.size + stored.live.size == stored.live.size * (4 * stored.group + 1)


@given(packings())
def test_complementary_in_blocks_stores_the_same_rows(case):
    stored, weight, living = case
    block = stored.to_block()
    assert block.block == (stored.group, 1) and block.gates == stored.gates
    np.testing.assert_array_equal(block.to_dense(), weight)
    assert block.column_elements.tolist() == [len(rows) for rows in living]


@given(matrices(), st.integers(1, 4), st.integers(1, 4))
def test_complementary_refuses_two_groups_in_one_place_and_nothing_else(case, overlay, group):
    weight, gates, _ = case
    units = weight.shape[0] // gates
    sets = -(-units // (overlay * group))
    holders = {}
    for row, c in np.argwhere(weight):
        g, place = row // units, row % units // group
        holders.setdefault((c, g, place % sets), set()).add(place // sets)
    if all(len(groups) == 1 for groups in holders.values()):
        np.testing.assert_array_equal(Complementary.from_dense(weight, overlay, group, gates).to_dense(), weight)
        return
    c, g, s = min(place for place, groups in holders.items() if len(groups) > 1)
    with pytest.raises(
        ValueError, match=f"in column {c}, gate {g}, set {s} has more than one live group of {group} row"
    ):
        Complementary.from_dense(weight, overlay, group, gates)


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
    csc, packed = CSC.from_dense(np.eye(6, 4), 3), Complementary.from_dense(np.eye(6, 4), 2, 1, 3)
    assert csc.layout() == {"format": "csc", "rows": 6, "cols": 4, "gates": 3}
    assert csc.description == "csc, density 0.167"
    assert packed.layout() == {"format": "complementary", "rows": 6, "cols": 4, "gates": 3, "overlay": 2, "group": 1}
    assert packed.description == "complementary, overlay 2, group 1"
    assert {"dense": Dense, "csc": CSC, "block": Block, "complementary": Complementary} == FORMATS


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
        (lambda: CSC.from_dense(np.ones((4, 3)), 3), "Pass gates=3 for a GRU"),
        (lambda: CSC.from_dense(np.ones(3)), "two axes"),
        (lambda: CSC.from_dense(np.zeros((2**16 + 1, 1))), "at most 65536 rows, got 65537"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 2, 1, 3), "Pass gates=3 for a GRU"),
        (lambda: Complementary.from_dense(np.ones(3), 2), "two axes"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 0), "overlay must lie between 1 and 64, got 0"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 65), "overlay must lie between 1 and 64, got 65"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 2, 0), "group must lie between 1 and 64, got 0"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 2, -1), "group must lie between"),
        (lambda: Complementary.from_dense(np.ones((4, 3)), 2, 65), "group must lie between"),
        (
            lambda: Complementary.from_dense(np.ones((4, 1)), 2),
            "in column 0, gate 0, set 0 has more than one live group",
        ),
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


def csc_parts(**changed):
    """Arguments of a sound CSC of 6x4 in two gates with three elements, with some of them changed."""
    sound = {
        "rows": 6, "cols": 4, "gates": 2, "values": np.ones(3, np.float32),
        "row": np.array([0, 5, 1], np.uint16), "start": np.array([0, 2, 2, 3, 3], np.uint32),
    }  # fmt: skip
    return sound | changed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rows": 7}, "cannot hold 2 gates"),
        ({"gates": 0}, "cannot hold 0 gates"),
        ({"rows": 2**16 + 2}, r"at most 65536 rows, got 65538\. Store it as Block with block=\(1, 1\)"),
        ({"cols": 5}, r"of 5 columns stores start \(6,\)"),
        ({"values": np.ones(2, np.float32)}, "as many rows as values"),
        ({"values": np.ones((3, 1), np.float32)}, "as many rows as values"),
        ({"row": np.zeros((3, 1), np.uint16)}, "as many rows as values"),
        ({"start": np.array([0, 2, 2, 3], np.uint32)}, "stores start"),
        ({"start": np.array([0, 2, 2, 3, 4], np.uint32)}, "start must rise from 0 to the number of elements, 3"),
        ({"start": np.array([1, 2, 2, 3, 3], np.uint32)}, "start must rise"),
        ({"start": np.array([0, 2, 1, 3, 3], np.uint32)}, "start must rise"),
        ({"row": np.array([0, 6, 1], np.uint16)}, "row 6 is out of range; the matrix has 6 rows"),
        ({"row": np.array([5, 0, 1], np.uint16)}, "the rows of a column must ascend"),
        ({"row": np.array([5, 5, 1], np.uint16)}, "must ascend"),
    ],
)
def test_a_csc_that_contradicts_itself_is_refused(changed, sentence):
    assert CSC(**csc_parts()).column_elements.tolist() == [2, 0, 1, 0]
    with pytest.raises(ValueError, match=sentence):
        CSC(**csc_parts(**changed))


def test_a_csc_may_have_as_many_rows_as_16_bits_count():
    weight = np.zeros((2**16, 2), np.float32)
    weight[-1, 1] = 3
    stored = CSC.from_dense(weight)
    assert stored.row.tolist() == [65535]
    np.testing.assert_array_equal(stored.to_dense(), weight)


def packing(**changed):
    """Arguments of a sound Complementary: two gates of five rows, two groups of two rows in two sets, one column."""
    sound = {
        "rows": 10, "cols": 1, "gates": 2, "overlay": 2, "group": 2,
        "values": np.array([[[[1, 2], [3, 4]], [[5, 0], [0, 0]]]], np.float32),
        "live": np.array([[[0, 0], [1, 1]]], np.uint8),
    }  # fmt: skip
    return sound | changed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rows": 11}, "cannot hold 2 gates"),
        ({"gates": 0}, "cannot hold 0 gates"),
        ({"overlay": 0}, "overlay must lie between 1 and 64, got 0"),
        ({"overlay": 65}, "overlay must lie between 1 and 64, got 65"),
        ({"overlay": 1}, r"and 3 sets stores live \(1, 2, 3\)"),
        ({"group": 0}, "group must lie between"),
        ({"group": 65}, "group must lie between"),
        ({"group": 3}, "and 1 sets stores live"),
        ({"cols": 2}, r"of 2 columns, 2 gates and 2 sets stores live \(2, 2, 2\) and values \(2, 2, 2, 2\)"),
        ({"values": np.zeros((1, 2, 2), np.float32)}, r"got \(1, 2, 2\) and \(1, 2, 2\)"),
        ({"values": np.zeros((1, 2, 2, 1), np.float32)}, "stores live"),
        ({"live": np.zeros((1, 4), np.uint8)}, "stores live"),
        ({"live": np.array([[[0, 2], [1, 1]]], np.uint8)}, "group 2 is out of range; a set has 2 groups"),
        ({"live": np.array([[[0, 255], [1, 1]]], np.uint8)}, "group 255 is out of range"),
        ({"live": np.array([[[0, 1], [1, 1]]], np.uint8)}, "rows beyond the end of a gate must be zero"),
        ({"values": np.full((1, 2, 2, 2), [5, 0], np.float32)}, "rows beyond the end of a gate"),
        ({"values": np.full((1, 2, 2, 2), [0, np.nan], np.float32)}, "rows beyond the end of a gate"),
    ],
)
def test_a_complementary_that_contradicts_itself_is_refused(changed, sentence):
    sound = Complementary(**packing())
    assert sound.to_dense()[:, 0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 5]
    assert sound.elements == 2 + 2 + 1 + 0
    with pytest.raises(ValueError, match=sentence):
        Complementary(**packing(**changed))


# --- rounded values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "i8", "w8a8"])
def test_rounded_values_are_the_nearest_that_can_be_stored(storage, precision):
    matrix = cases.matrix(cases.rng(3), 37, 21, 3, storage, 0.6)
    rounded, exact = matrix.rounded(precision), matrix.to_dense().astype(np.float64)
    error = np.abs(rounded.to_dense() - exact)
    if precision == "bf16":
        assert (error <= np.abs(exact) * 2.0**-8).all()  # half a unit in the last of eight bits
        assert not (rounded.to_dense().view(np.uint32) & 0xFFFF).any()
        assert rounded.scale is None
    else:
        largest = np.abs(exact).max(axis=1, initial=0)
        unclipped = np.where(largest > 0, largest / 127, 1)
        assert (rounded.scale <= unclipped * 1.000001).all() and (rounded.scale >= 0.69 * unclipped).all()
        clipped = np.abs(exact) > 127.5 * rounded.scale[:, None]
        assert (error <= rounded.scale[:, None] * 0.5001)[~clipped].all()
        plain = np.rint(exact / unclipped[:, None]) * unclipped[:, None]
        size = partial(np.linalg.norm, axis=1)
        assert (size(error) <= size(plain - exact) + tolerances.ROUNDED_I8 * size(exact)).all()
        codes = rounded.tensors()["values"]
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max(initial=0) == (127 if exact.any() else 0)
    assert rounded.precision == precision
    assert rounded.elements == matrix.elements
    again = rounded.rounded(precision)
    np.testing.assert_allclose(again.to_dense(), rounded.to_dense(), rtol=1e-6)
    assert rounded.value_bytes * matrix.values.size == rounded.tensors()["values"].nbytes
    assert rounded.description.endswith(f", {precision}")


def test_rounding_half_goes_to_even():
    halves = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8]], np.float32)
    assert Dense(halves).rounded("bf16").values.tolist() == [[1.0, 1 + 2.0**-6]]


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of f32, bf16, i8, w8a8"):
        Dense(np.ones((2, 2))).rounded("int4")
