"""Every kernel of kernels.def, on every instruction set, against float64."""

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold import _native
from sparsefold.engine import native_matrix
from sparsefold.program import Linear

ISAS = _native.available_isas()
# What is packed in which way: single elements and groups of several rows are blocks to the kernels.
FORMATS = {
    "dense": [None],
    "block": [*cases.BLOCKS, "csc", *cases.GROUPED_OVERLAYS],
    "complementary": list(cases.OVERLAYS),
}


@cache
def made(case, precision="f32"):
    matrix = case.make().rounded(precision)
    return matrix, np.abs(matrix.to_dense().astype(np.float64)), native_matrix(matrix)


def padded(matrix, values, fill):
    """Values of (rows,) with every gate padded to whole vectors of sixteen, and which of them are real rows."""
    units = matrix.shape[0] // matrix.gates
    out = np.full((matrix.gates, -(-units // 16) * 16), fill, np.float32)
    real = np.zeros(out.shape, bool)
    out[:, :units], real[:, :units] = values.reshape(matrix.gates, units), True
    return out.reshape(-1), real.reshape(-1)


def play(packed, out, x, events):
    """``out += W x``, with ``x`` dense or as the list of its events."""
    if events is None:
        packed.matvec(x, out)
    else:
        packed.matvec_events(events.astype(np.uint32), x[events], out)


def check_product(case, matrix, size, packed, rate, by_events):
    """One product, of events where ``by_events``, against float64."""
    r = cases.rng(case.units, case.cols, int(10 * rate))
    x = cases.vector(r, case.cols) * (r.random(case.cols) < 0.9)  # a unit may speak a zero
    events = np.flatnonzero(r.random(case.cols) < rate) if by_events else None
    before = cases.vector(r, matrix.shape[0])
    out, real = padded(matrix, before, 7.5)
    play(packed, out, x, events)
    if by_events:
        silent = np.ones(case.cols, bool)
        silent[events] = False
        x = np.where(silent, np.float32(0), x)
    expected = before + matrix.matvec(x.astype(np.float64))
    magnitude = np.abs(before) + size @ np.abs(x.astype(np.float64))
    error = np.abs(out[real] - expected)
    assert (error <= tolerances.product_f32(case.cols + 1, magnitude)).all(), (case, rate, error.max())
    assert (out[~real] == 7.5).all(), (case, rate, "padding was written")


def check_matvec(isa, format, precision, by_events):
    for storage in FORMATS[format]:
        for case in cases.matrix_cases(storage):
            matrix, size, borrowed = made(case, precision)
            packed = _native.Packed(borrowed, isa)
            for rate in cases.EVENT_RATES if by_events else (1.0,):
                check_product(case, matrix, size, packed, rate, by_events)


def codes_of(x):
    """(codes, scale) of x in float32, operation by operation as the engine makes them."""
    largest = np.abs(x).max(initial=0)
    if largest <= 1e-30:
        return np.zeros(len(x), np.int64), np.float32(0)
    return np.rint(x * (np.float32(127) / largest)).astype(np.int64), largest / np.float32(127)


def check_product_of_codes(case, matrix, packed):
    """Against sums of integers, bit by bit: only the last multiplication by both scales rounds."""
    r = cases.rng(case.units, case.cols)
    for x in (cases.vector(r, case.cols), np.zeros(case.cols, np.float32), np.ones(case.cols, np.float32)):
        codes, scale = codes_of(x)
        weight_codes = np.rint(matrix.to_dense() / matrix.scale[:, None]).astype(np.int64)
        sums = (weight_codes @ codes).astype(np.float32)
        out, real = padded(matrix, np.zeros(matrix.shape[0], np.float32), 0)
        packed.matvec(x, out)
        np.testing.assert_array_equal(out[real], sums * (matrix.scale * scale), str(case))
        assert not out[~real].any(), (case, "padding was written")


def check_matvec_of_codes(isa):
    for storage in cases.STORAGES:
        for case in cases.matrix_cases(storage):
            matrix, _, borrowed = made(case, "w8a8")
            check_product_of_codes(case, matrix, _native.Packed(borrowed, isa))


def check_cell(isa, kind, *options):
    """One layer on its own, at sizes around the vector; test_engine.py goes through the options."""
    for units in (*cases.SMALL_SIZES, 100):
        for option in options:
            r = cases.rng(units)
            program = sf.Program((getattr(cases, kind)(r, 5, units, **option),))
            stream = sf.Engine(program, isa=isa).stream()
            state, x = cases.state(program, units), cases.sequence(program, 1, units)
            stream.load_state(state)
            out = stream.step(x[0])
            value, bound = tolerances.program_step(program, x[0], state)["out"]
            theta = getattr(program.ops[0], "threshold", None)
            assert out.shape == (units,)
            assert (np.abs(out - value) <= bound).all()
            if theta is not None:
                assert ((out != 0) == (value > theta))[np.abs(value - theta) > bound].all()


def check_relu(isa):
    """Against numpy, bit by bit: it rounds nothing."""
    for units in (*cases.SMALL_SIZES, 100):
        r = cases.rng(units)
        table = cases.vector(r, 4 * units).reshape(4, units) * (r.random((4, units)) < 0.8)
        program = sf.Program((sf.program.Embedding(table.astype(np.float32)), sf.program.ReLU(units)))
        out, emitted = sf.Engine(program, isa=isa).stream().run_traced(range(4))
        np.testing.assert_array_equal(out, np.maximum(table, 0))
        np.testing.assert_array_equal(emitted[1], table > 0)


def check_events(isa):
    for units in (*cases.SMALL_SIZES, 100):
        r = cases.rng(units)
        x = (cases.vector(r, 4 * units).reshape(4, units) * (r.random((4, units)) < 0.5)).astype(np.float32)
        x[1, -1], x[2, 0] = np.nan, -0.0
        eye = sf.program.Linear(sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32))
        out, emitted = sf.Engine(sf.Program((sf.program.Events(units), eye)), isa=isa).stream().run_traced(x)
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(emitted[0], x != 0)


def check_delta(isa):
    """Against numpy, bit by bit: the memory of an identity matrix is the change itself, and what is no number is one."""
    for units in (*cases.SMALL_SIZES, 100):
        r, threshold = cases.rng(units), np.float32(0.3)
        eye, zero = sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32)
        op = sf.program.RNN(eye, sf.CSC.from_dense(0 * np.eye(units)), zero, zero, delta_input=float(threshold))
        sent, x = cases.vector(r, units), cases.vector(r, units)
        x[::3] = sent[::3]
        x[::5] = sent[::5] + np.where(r.random(len(x[::5])) < 0.5, threshold, -threshold)  # no more than the threshold
        x[::7] = r.choice([np.nan, np.inf, -np.inf, -0.0], len(x[::7]))
        stream = sf.Engine(sf.Program((op,)), isa=isa).stream()
        stream.load_state(stream.save_state() | {"0.sent_x": sent})
        stream.step(x)
        change = x - sent
        changed = ~(np.abs(change) <= threshold)
        after = stream.save_state()
        assert units < 17 or 0 < changed.sum() < units
        np.testing.assert_array_equal(stream.counters.input_reads[0], changed)
        np.testing.assert_array_equal(after["0.sent_x"], np.where(changed, x, sent))
        np.testing.assert_array_equal(after["0.memory_x"], np.where(changed, change, 0))


def hard_values(r, units):
    """Ties, both zeros, infinities and what is no number among ordinary values."""
    x = np.round(cases.vector(r, units), 1)
    x[r.random(units) < 0.2] = -0.0
    x[r.random(units) < 0.1] = np.inf
    x[r.random(units) < 0.1] = np.nan
    return x.astype(np.float32)


def largest(x, k):
    """Indices of the k largest by the definition, one after the other."""
    left, found = list(range(len(x))), []
    for _ in range(k):
        best = left[0]
        for j in left[1:]:
            if not np.isnan(x[best]) and (np.isnan(x[j]) or x[j] > x[best]):
                best = j
        left.remove(best)
        found.append(best)
    return found


def check_kwta(isa):
    for units, k, groups in ((1, 1, 1), (15, 4, 3), (16, 16, 1), (17, 3, 1), (33, 2, 11), (100, 10, 5)):
        r = cases.rng(units)
        x = np.array([hard_values(r, units) for _ in range(6)])
        eye = sf.program.Linear(sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32))
        program = sf.Program((sf.program.Events(units), sf.program.KWTA(units, k, groups), eye))
        out, emitted = sf.Engine(program, isa=isa).stream().run_traced(x)
        for row, spoke, y in zip(x, emitted[1], out, strict=True):
            width = units // groups
            expected = np.zeros(units, bool)
            for g in range(groups):
                expected[[g * width + j for j in largest(row[g * width : (g + 1) * width], k)]] = True
            np.testing.assert_array_equal(spoke, expected)
            np.testing.assert_array_equal(y, np.where(expected, row, 0))


def check_top_k(isa):
    for units, k in ((1, 1), (15, 4), (33, 33), (100, 7)):
        r = cases.rng(units)
        x = np.array([hard_values(r, units) for _ in range(6)])
        eye = sf.program.Linear(sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32))
        program = sf.Program((sf.program.Events(units), eye, sf.program.TopK(units, k)))
        for row, y in zip(x, sf.Engine(program, isa=isa).stream().run(x), strict=True):
            assert y[:k].astype(int).tolist() == largest(row, k)
            np.testing.assert_array_equal(y[k:], row[largest(row, k)])


def check_log_softmax(isa):
    for units in (*cases.SMALL_SIZES, 257):
        x = cases.vector(cases.rng(units), units, 30.0)
        eye = sf.program.Linear(sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32))
        out = sf.Engine(sf.Program((eye, sf.program.LogSoftmax(units))), isa=isa).stream().step(x)
        value, bound = tolerances.log_softmax(x.astype(np.float64), np.zeros(units))
        assert (np.abs(out - value) <= bound).all()
        assert abs(np.exp(out.astype(np.float64)).sum() - 1) <= bound.max() * 1.01


def check_log_sum(isa):
    """What a log-softmax takes from each value: of the largest, wherever it lies, and of all that is far below it."""
    for units in (*cases.SMALL_SIZES, 257):
        eye = sf.program.Linear(sf.CSC.from_dense(np.eye(units)), np.zeros(units, np.float32))
        both = (sf.Program((eye,)), sf.Program((eye, sf.program.LogSoftmax(units))))
        logits, normed = (sf.Engine(p, isa=isa).stream() for p in both)
        for largest in range(0, units, 7):
            x = cases.vector(cases.rng(units), units, 30.0)
            x[largest] = 150
            y = normed.step(x)
            assert [logits.score(x, t) for t in range(units)] == y.tolist()
            assert abs(y[largest]) < 1e-6
            value, bound = tolerances.log_softmax(x.astype(np.float64), np.zeros(units))
            assert (np.abs(y - value) <= bound).all()


def check_layer_norm(isa):
    for units in (*cases.SMALL_SIZES, 100, 257):
        r = cases.rng(units)
        op, x = cases.layer_norm(r, units), cases.vector(r, units, 3.0) + np.float32(2)
        value, bound = tolerances.layer_norm(op, x.astype(np.float64), np.zeros(units))
        out = sf.Engine(sf.Program((op,)), isa=isa).stream().step(x)
        assert (np.abs(out - value) <= bound).all()


CHECKS = (
    {
        f"matvec_{'events_' if by_events else ''}{format}_{precision}": partial(
            check_matvec, format=format, precision=precision, by_events=by_events
        )
        for format in FORMATS
        for precision in ("f32", "bf16", "i8")
        for by_events in (False, True)
    }
    | {
        # Blocks whose height divides a vector are packed by rows for dense x; the others keep matvec_block.
        f"matvec_rows_{precision}": partial(check_matvec, format="block", precision=precision, by_events=False)
        for precision in ("f32", "bf16", "i8")
    }
    | {
        "matvec_rows_w8a8": check_matvec_of_codes,
        "cell_gru": lambda isa: check_cell(isa, "gru", {"reset_after": True}, {"reset_after": False}),
        "cell_egru": lambda isa: check_cell(isa, "egru", {"reset_after": True}, {"reset_after": False}),
        "cell_lstm": lambda isa: check_cell(isa, "lstm", {}),
        "cell_relu": check_relu,
        "cell_events": check_events,
        "cell_kwta": check_kwta,
        "cell_delta": check_delta,
        "cell_log_sum": check_log_sum,
        "cell_log_softmax": check_log_softmax,
        "cell_top_k": check_top_k,
        "cell_layer_norm": check_layer_norm,
        "cell_rnn": lambda isa: check_cell(isa, "rnn", {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}),
    }
)


@pytest.mark.parametrize("kernel", _native.kernels())
def test_kernel_against_float64(kernel, isa):
    assert kernel in CHECKS, f"{kernel} is in kernels.def and has no test: add it to CHECKS"
    CHECKS[kernel](isa)


def test_every_check_is_of_a_kernel():
    assert set(CHECKS) == set(_native.kernels())


def test_every_storage_is_checked():
    assert sorted(map(str, cases.STORAGES)) == sorted(str(s) for storages in FORMATS.values() for s in storages)


@pytest.mark.parametrize("by_events", [False, True])
@pytest.mark.parametrize("storage", [(1, 1), (4, 1), (8, 1), (16, 1), (5, 3), "csc", cases.Overlay(2, 16)], ids=str)
@pytest.mark.parametrize(("units", "gates"), [(65536, 1), (65535, 1), (21845, 3)])
def test_rows_around_the_largest_that_16_bits_hold(units, gates, storage, by_events, isa):
    """65536 padded rows are the last that fit; three gates of 21845 rows are fewer, and more once they are padded."""
    case = cases.MatrixCase(units, 3, gates, storage, 0.5)
    matrix, size, borrowed = made(case)
    check_product(case, matrix, size, _native.Packed(borrowed, isa), 0.7, by_events)


@pytest.mark.parametrize("by_events", [False, True])
@pytest.mark.parametrize("storage", [(1, 1), (4, 1), (8, 1), (16, 1), (5, 3), None, cases.Overlay(4)], ids=str)
def test_more_rows_than_16_bits_hold(storage, by_events, isa):
    case = cases.MatrixCase(65537, 3, 1, storage, 0.5)
    matrix, size, borrowed = made(case)
    check_product(case, matrix, size, _native.Packed(borrowed, isa), 0.7, by_events)


@pytest.mark.parametrize("by_events", [False, True])
@pytest.mark.parametrize(
    "storage", [None, (16, 1), (8, 4), "csc", cases.Overlay(4), cases.Overlay(17), cases.Overlay(2, 16)], ids=str
)
def test_the_bound_notices_one_wrong_weight(storage, by_events, isa):
    case = cases.MatrixCase(100, 31, 3, storage, 1.0)
    matrix, size, _ = made(case)
    column = 4
    row = size[:, column].argmax()
    wrong = matrix.to_dense().copy()
    wrong[row, column] *= 1.001
    x = np.ones(31, np.float32)
    other = cases.store(wrong, 3, storage)
    out, real = padded(matrix, np.zeros(300, np.float32), 0)
    play(_native.Packed(native_matrix(other), isa), out, x, np.arange(31) if by_events else None)
    error = np.abs(out[real] - matrix.matvec(x.astype(np.float64)))
    assert np.flatnonzero(error > tolerances.product_f32(32, size @ x)).tolist() == [row]


def one_listener(units, cols, row, spoken, storage):
    """(matrix of three gates, which of its rows column ``spoken`` stores): as few as the format can, mostly zeros.

    A format that can leave rows out stores only what holds ``row`` of the middle gate.
    """
    listen = np.ones((3, units), bool)
    if isinstance(storage, cases.Overlay):
        full = cases.matrix(cases.rng(units), units, cols, 3, storage)
        return replace(full, values=np.zeros_like(full.values)), full.to_dense()[:, spoken] != 0
    weight = np.ones((3, units, cols), np.float32)
    if storage is not None:
        height, width = (1, 1) if storage == "csc" else storage
        first, top = spoken // width * width, row // height * height
        weight[:, :, first : first + width] = 0
        weight[1, row, spoken] = 1
        listen[:] = False
        listen[1, top : top + height] = True
    return cases.store(weight.reshape(-1, cols), 3, storage), listen.reshape(-1)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("by_events", [False, True])
@pytest.mark.parametrize("units", [16, 31, 37])
@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
def test_what_is_not_finite_reaches_the_rows_that_listen_and_no_others(storage, units, by_events, bad, isa):
    cols, spoken = 21, 6
    # The last row of the middle gate: its block may be short, and stop before the next gate.
    matrix, listen = one_listener(units, cols, units - 1, spoken, storage)
    x = np.zeros(cols, np.float32)
    x[spoken] = bad
    out, real = padded(matrix, np.full(3 * units, 2.0, np.float32), 0)
    play(_native.Packed(native_matrix(matrix), isa), out, x, np.array([2, spoken]) if by_events else None)
    np.testing.assert_array_equal(~np.isfinite(out[real]), listen)
    assert (out[real][~listen] == 2.0).all()
    if storage in cases.OVERLAYS:
        assert (out[~real] == 0).all()  # rows that stand alone leave even the padding of their gate as it was


@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
def test_a_kernel_writes_nothing_behind_its_rows(storage, isa):
    for units in cases.SMALL_SIZES:
        matrix = cases.matrix(cases.rng(units), units, 9, 3, storage)
        packed = _native.Packed(native_matrix(matrix), isa)
        room = np.full(packed.padded_rows + 128, 3.25, np.float32)
        for events in (None, np.arange(9)):
            play(packed, room[64:-64], np.full(9, np.nan, np.float32), events)
        assert (room[:64] == 3.25).all() and (room[-64:] == 3.25).all()


@pytest.mark.parametrize("storage", [None, (4, 1), "csc", cases.Overlay(4), cases.Overlay(4, 16)], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_products(shape, storage, isa):
    packed = _native.Packed(native_matrix(cases.store(np.zeros(shape), 1, storage)), isa)
    out = np.ones(packed.padded_rows, np.float32)
    packed.matvec(np.ones(shape[1], np.float32), out)
    packed.matvec_events(np.zeros(0, np.uint32), np.zeros(0, np.float32), out)
    assert (out == 1).all() and packed.padded_rows == (16 if shape[0] else 0)


def test_gates_of_a_complementary_matrix_lie_apart(isa):
    """Also where the last live group of a gate lies beyond its end: the next gate begins there, in the unpacked matrix."""
    live = np.array([[[0, 0], [1, 1], [0, 1]]], np.uint8)  # one column, three gates of three rows in two sets
    matrix = sf.Complementary(9, 1, 3, 2, 1, np.array([[[1, 2], [3, 0], [5, 0]]], np.float32)[..., None], live)
    out, real = padded(matrix, np.zeros(9, np.float32), 0)
    play(_native.Packed(native_matrix(matrix), isa), out, np.array([np.inf], np.float32), None)
    np.testing.assert_array_equal(np.isinf(out[real]), [1, 1, 0, 0, 0, 1, 1, 0, 0])
    assert not out[~real].any()


def test_a_packed_matrix_owns_its_weights(isa):
    weight = np.arange(12, dtype=np.float64).reshape(3, 4)  # converted on the way: nobody else holds the copy
    borrowed = _native.Matrix.dense(weight)
    del weight
    np.full(200, np.nan)
    packed = _native.Packed(borrowed, isa)
    del borrowed
    out = np.zeros(16, np.float32)
    packed.matvec(np.ones(4, np.float32), out)
    assert out[:3].tolist() == [6, 22, 38]


@pytest.mark.parametrize("precision", ["f32", "bf16", "i8"])
@pytest.mark.parametrize(("units", "density"), [(1100, 1.0), (330, 0.4), (16, 0.9)])
def test_more_segments_than_are_listed_at_once(units, density, precision, isa):
    """A column may hold more segments than a list has room for, and all events together hold more than any."""
    case = cases.MatrixCase(units, 700, 3, (16, 1), density)
    matrix, size, borrowed = made(case, precision)
    check_product(case, matrix, size, _native.Packed(borrowed, isa), 0.9, by_events=True)


@pytest.mark.parametrize("cols", [63, 64, 65, 4095, 4096, 4097])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_codes_picked_by_bits_and_by_number(cols, density, isa):
    """Strips of sixteen rows mark up to 4096 columns by bits, and number more."""
    case = cases.MatrixCase(40, cols, 2, (16, 1), density)
    matrix, _, borrowed = made(case, "w8a8")
    check_product_of_codes(case, matrix, _native.Packed(borrowed, isa))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_w8a8_product_of_what_is_not_finite_is_no_number(bad, isa):
    for storage in cases.STORAGES:
        matrix = cases.matrix(cases.rng(3), 37, 21, 3, storage).rounded("w8a8")
        x = np.ones(21, np.float32)
        x[20] = bad
        out, real = padded(matrix, np.zeros(111, np.float32), 0)
        _native.Packed(native_matrix(matrix), isa).matvec(x, out)
        stored = (matrix.to_dense() != 0).any(1)
        assert np.isnan(out[real][stored]).all()
        assert np.isnan(matrix.matvec(x)[stored]).all()


@pytest.mark.parametrize("storage", [None, (16, 1), (4, 1), "csc"], ids=str)
def test_the_largest_codes_do_not_overflow(storage, isa):
    """All codes at 127, both signs: the sums of two products would overflow 16 bits if one more could be added."""
    for sign in (1, -1):
        weight = np.full((32, 2000), sign, np.float32)
        matrix = cases.store(weight, 1, storage).rounded("w8a8")
        x, out = np.ones(2000, np.float32), np.zeros(32, np.float32)
        for turn in (1, -1):
            out[:] = 0
            _native.Packed(native_matrix(matrix), isa).matvec(np.float32(turn) * x, out)
            expected = np.float32(127 * 127 * 2000 * sign * turn) * (matrix.scale * (np.float32(1) / np.float32(127)))
            np.testing.assert_array_equal(out, expected)


def test_packed_refuses_what_does_not_fit():
    packed = _native.Packed(_native.Matrix.dense(np.ones((3, 4), np.float32)))
    x, out = np.ones(4, np.float32), np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="reads 4 values and adds to 16 padded rows"):
        packed.matvec(x[:3].copy(), out)
    with pytest.raises(ValueError, match="it was given 4 and 3"):
        packed.matvec(x, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="event of input 4 in a matrix of 4 columns"):
        packed.matvec_events(np.array([4], np.uint32), np.ones(1, np.float32), out)
    with pytest.raises(ValueError):
        packed.matvec_events(np.array([1, 2], np.uint32), np.ones(1, np.float32), out)
    coded = _native.Packed(native_matrix(sf.Dense(np.ones((3, 4))).rounded("w8a8")))
    with pytest.raises(ValueError, match="a w8a8 product reads dense x"):
        coded.matvec_events(np.zeros(1, np.uint32), np.ones(1, np.float32), out)
    with pytest.raises(ValueError, match="instruction set 'sse9' is not available"):
        _native.Packed(_native.Matrix.dense(np.ones((3, 4), np.float32)), "sse9")
    assert not out.any()


def test_many_lists_are_one_list_after_the_other(isa):
    matrix = cases.matrix(cases.rng(1), 33, 20, 3, cases.Overlay(4))
    packed, r = _native.Packed(native_matrix(matrix), isa), cases.rng(2)
    index, value = r.integers(0, 20, 30).astype(np.uint32), cases.vector(r, 30)
    start = np.array([0, 0, 7, 7, 29], np.uint32)  # the last event belongs to no list
    together, apart = np.zeros((2, packed.padded_rows), np.float32)
    packed.matvec_lists(index, value, start, together)
    for first, last in pairwise(start):
        packed.matvec_events(index[first:last], value[first:last], apart)
    np.testing.assert_array_equal(together, apart)
    assert together.any()
    packed.matvec_lists(index, value, np.zeros(0, np.uint32), together)
    np.testing.assert_array_equal(together, apart)
    for wrong in ([0, 31], [5, 3], [0, 2**32 - 1, 30]):
        with pytest.raises(ValueError, match="starts must rise and stay within the events"):
            packed.matvec_lists(index, value, np.array(wrong, np.uint32), together)
    with pytest.raises(ValueError, match="event of input 2"):
        packed.matvec_lists(index + np.uint32(20), value, start, together)


def activations(x, isa):
    x = np.ascontiguousarray(np.pad(x, (0, -len(x) % 16)), np.float32)
    sigmoid, tanh = np.empty_like(x), np.empty_like(x)
    _native.activations(x, sigmoid, tanh, isa)
    return x.astype(np.float64), sigmoid, tanh


def test_activations_are_as_exact_as_stated(isa):
    steps = np.arange(0, 0x42C80000, 4099, dtype=np.uint32).view(np.float32)  # every 4099th float32 up to 100
    for grid in (np.linspace(-100, 100, 2**19), np.linspace(-9, 9, 2**19), steps, -steps):
        x, sigmoid, tanh = activations(grid, isa)
        assert np.abs(sigmoid - (0.5 + 0.5 * np.tanh(x / 2))).max() <= tolerances.SIGMOID_F32
        assert np.abs(tanh - np.tanh(x)).max() <= tolerances.TANH_F32
        assert sigmoid.min() >= 0 and sigmoid.max() <= 1
        assert tanh.min() >= -1 and tanh.max() <= 1


def test_the_statement_in_the_source_is_the_tested_one():
    source = Path(__file__).parents[2] / "native" / "simd.hpp"
    stated = re.findall(r"absolute error at most ([0-9.e-]+\d)", source.read_text())
    assert [float(s) for s in stated] == [tolerances.SIGMOID_F32, tolerances.TANH_F32]


def test_activations_at_the_edges(isa):
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e38, 1e-40, 87.5, -87.5]
    _, sigmoid, tanh = activations(np.array(edges, np.float32), isa)
    np.testing.assert_allclose(sigmoid[:10], [0.5, 0.5, 1, 0, np.nan, 1, 0, 0.5, 1, 0], atol=2e-38, rtol=0)
    np.testing.assert_array_equal(tanh[:10], [0, 0, 1, -1, np.nan, 1, -1, 0, 1, -1])


def test_activations_want_whole_vectors():
    x = np.zeros(17, np.float32)
    with pytest.raises(ValueError, match="a multiple of 16"):
        _native.activations(x, x.copy(), x.copy())


# --- what the compiler made of it -------------------------------------------------------------------------------------


WIDE = ["isa_avx2", "isa_avx512", "isa_avx512vnni", "train_avx2", "train_avx512"]


def objects(chosen):
    """Object files of the extension of which this is true, by name."""
    built = sorted((Path(__file__).parents[2] / "build").glob("*/CMakeFiles/*/native/*.cpp.o"))
    found = [o for o in built if chosen(o.name.removesuffix(".cpp.o"))]
    if not found:
        pytest.skip("the object files of the extension are not here: it was installed from a wheel.")
    return found


def tool(name, *words):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed, so the machine code cannot be read.")
    return subprocess.run([name, *words], capture_output=True, text=True, check=True).stdout


def test_what_every_processor_runs_holds_no_wide_registers():
    chosen = objects(lambda name: name not in WIDE)
    assert {"isa_generic.cpp.o", "train_generic.cpp.o"} <= {o.name for o in chosen}
    for file in chosen:
        wide = re.findall(r"%[yz]mm\d+|\bvfn?m(?:add|sub)\w*", tool("objdump", "-d", "--no-show-raw-insn", str(file)))
        assert not wide, (file.name, wide[:3])


@pytest.mark.parametrize("name", WIDE)
def test_wide_objects_hold_wide_registers_and_offer_the_linker_nothing_but_their_table(name):
    kind, isa = name.split("_")
    for file in objects(lambda found: found == name):
        wide = "%ymm" if isa == "avx2" else "%zmm"
        assert wide in tool("objdump", "-d", "--no-show-raw-insn", str(file))
        offered = [line.split()[1:] for line in tool("nm", "-C", "--defined-only", str(file)).splitlines()]
        assert [" ".join(rest) for kind, *rest in offered if kind in "TWVDuB"] == [
            f"sparsefold::{'kernels' if kind == 'isa' else 'sequences'}_{isa}"
        ]


def test_the_library_is_small():
    assert Path(_native.__file__).stat().st_size <= 3 * 2**20


def test_sums_of_codes_fit_32_bits_or_are_refused(isa):
    """The most columns that w8a8 takes, all codes at their largest; one more is refused, and a program gives it i8."""
    most = sf.formats.MOST_CODES
    assert most * 127**2 < 2**31 <= (most + 1) * 127**2
    for make in (sf.formats.Dense.from_dense, lambda w: sf.formats.Block.from_dense(w, (16, 1))):
        matrix, x = make(np.ones((16, most), np.float32)), np.ones(most, np.float32)
        program = sf.Program((Linear(matrix.rounded("w8a8"), np.zeros(16, np.float32)),))
        np.testing.assert_allclose(sf.Engine(program, isa=isa).stream().step(x), most, rtol=tolerances.TRAINED_F32)
        wide = make(np.ones((16, most + 1), np.float32))
        with pytest.raises(
            ValueError, match=f"at most {most} columns, not of {most + 1}; its weights are i8, not w8a8"
        ):
            wide.rounded("w8a8")
        program = sf.Program((Linear(wide, np.zeros(16, np.float32)),)).rounded("w8a8")
        assert program.ops[0].weight.precision == "i8"
