"""Broken files, kept and made up: each is a ProgramError in a moment, or a sound program. Nothing else ever happens."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import sparsefold as sf
from attacks import make
from sparsefold import _native
from sparsefold.engine import native_matrix
from sparsefold.program import Program, ProgramError, matrices

FOLDER = Path(make.__file__).parent


def refusal(raw):
    """What the refusal says, after a look at how long the processor worked on it and at how much memory it took."""
    began = time.process_time()
    with pytest.raises(ProgramError):
        Program.from_bytes(raw)
    assert time.process_time() - began < 1
    tracemalloc.start()
    try:
        with pytest.raises(ProgramError) as error:
            Program.from_bytes(raw)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 40 * len(raw)
    finally:
        tracemalloc.stop()
    assert 0 <= error.value.offset <= len(raw)
    return str(error.value)


@pytest.mark.parametrize("name", make.ATTACKS)
def test_a_broken_file_is_refused_for_its_reason(name):
    raw = (FOLDER / f"{name}.sfold").read_bytes()
    said = refusal(raw)
    assert any(words in said for words in make.ATTACKS[name][1].split("|")), said
    assert said.isprintable() or "\\" in said
    with pytest.raises(ProgramError):
        sf.Engine.load(FOLDER / f"{name}.sfold")


def test_the_folder_is_what_its_script_makes():
    kept = {path.stem: path.read_bytes() for path in FOLDER.glob("*.sfold")}
    assert kept == {name: raw for name, (raw, _) in make.ATTACKS.items()}
    assert max(map(len, kept.values())) <= 9216


PACKED = make.packed().bytes()


@pytest.mark.parametrize(
    ("raw", "kinds"), [(make.SOUND, {"dense", "block"}), (PACKED, {"dense", "csc", "complementary"})]
)
def test_the_files_that_the_attacks_start_from_are_sound(raw, kinds):
    program = Program.from_bytes(raw)
    assert [op.kind for op in program.ops] == ["embedding", "egru", "linear"]
    assert {matrix.kind for op in program.ops for matrix in matrices(op).values()} == kinds
    assert np.isfinite(sf.Engine(program).stream().run([0, 1, 2])).all()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (make._file(lambda f: f.meta.update(ops=json.dumps([{}] * 10**5))), "the op list must hold 1 to 1024 ops"),
        (make._file(lambda f: f.meta.update(ops="[" * 10**6)), "the op list is not valid JSON"),
        (make._text(lambda t: b"[" * 10**6), "the header is not valid JSON"),
        (make._text(lambda t: b"9" * 10**6), "the header is not valid JSON"),
        (make._text(lambda t: b" " * (16 * 2**20 + 1)), "announce a header"),
        (b"\0" * 10**6, "not valid JSON"),
        (bytes(range(256)) * 4000, "announce a header"),
    ],
    ids=["ops", "deep-ops", "deep-header", "digits", "long-header", "zeros", "noise"],
)
def test_a_large_broken_file_is_refused_in_a_moment(raw, words):
    assert words in refusal(raw)


def test_many_tensors_of_nothing_are_refused_in_a_moment():
    def change(header):
        end = header["2.bias"]["data_offsets"][1]
        header.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(10_000)})

    assert "belongs to no op" in refusal(make._header(change))


# --- made up ----------------------------------------------------------------------------------------------------------


def header_end(raw):
    return 8 + struct.unpack_from("<Q", raw)[0]


def test_damage_of_every_other_op_is_refused_or_plays():
    """As above, for ops that the attacks do not start from."""
    for name in (
        "lstm-of-events", "rnn-of-events", "relu", "layer-norm-relu", "delta-gru-before", "conv-depthwise", "conv-of-events",
        "tokens-cluster-2",
    ):  # fmt: skip
        sound = cases.network(name).to_bytes()
        r, data = cases.rng(*name.encode()), 8 + struct.unpack_from("<Q", sound)[0]
        for _ in range(150):
            raw = bytearray(sound)
            for place in r.integers(0, data, 2):
                raw[place] = r.choice(list(b"0123456789") if chr(raw[place]).isdigit() else [raw[place], 34, 125])
            try:
                program = Program.from_bytes(bytes(raw))
            except ProgramError:
                continue
            assert sf.Engine(program).stream().run(cases.sequence(program, 3)).shape == (3, program.outputs)


@st.composite
def damage(draw):
    """One of the sound files with up to four bytes changed, cut, doubled or grown, and perhaps a checksum that agrees."""
    sound = draw(st.sampled_from([make.SOUND, PACKED]))
    digits = [i for i in range(8, header_end(sound)) if sound[i : i + 1].isdigit()]
    positions = st.one_of(
        st.integers(0, len(sound) - 1), st.integers(header_end(sound), len(sound) - 1), st.sampled_from(digits)
    )
    raw = bytearray(sound)
    bytes_ = st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789"))
    for place, value in draw(st.lists(st.tuples(positions, bytes_), max_size=4)):
        raw[place] = value
    raw, at = bytes(raw), draw(positions)
    also = draw(st.sampled_from([None, None, None, "cut", "cut", "double", "insert"]))
    raw = {None: raw, "cut": raw[:at], "double": raw[:at] + raw, "insert": raw[:at] + b"0" + raw[at:]}[also]
    return make.resealed(raw, sound) if draw(st.booleans()) else raw


@settings(max_examples=1000)
@given(damage())
def test_a_damaged_file_is_refused_or_plays(raw):
    try:
        program = Program.from_bytes(raw)
    except ProgramError:
        return
    assert Program.from_bytes(program.to_bytes()).to_bytes() == program.to_bytes()
    for fold in (True, False):
        stream = sf.Engine(program, fold=fold).stream()
        outputs = stream.run(cases.sequence(program, 3))
        assert outputs.shape == (3, program.outputs)
        assert stream.counters.steps == 3 and stream.report()


def test_damage_that_keeps_the_file_sound_is_played():
    raw = bytearray(make.SOUND)
    raw[-4:] = struct.pack("<f", 5.0)  # the last bias
    program = Program.from_bytes(make.resealed(bytes(raw), make.SOUND))
    assert program.ops[2].bias[2] == 5.0
    with pytest.raises(ProgramError, match="checksum"):
        Program.from_bytes(bytes(raw))


# --- past the file: the extension itself, misused -----------------------------------------------------------------------

Refused = (ValueError, TypeError)
F, U = np.float32, np.uint32


def block(**changed):
    """A sound native block matrix of 6x4 in two gates, with some arguments changed."""
    sound = {
        "rows": 6, "cols": 4, "gates": 2, "values": np.ones((3, 2, 2), F),
        "block_row": np.array([0, 3, 1], U), "start": np.array([0, 2, 3], U),
    }  # fmt: skip
    return _native.Matrix.block(**(sound | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 7}, {"rows": 2**28 + 2}, {"rows": -6}, {"rows": 2**32}, {"rows": 0}, {"rows": 4}, {"rows": 2.5},
        {"cols": 5}, {"cols": 0}, {"cols": 2**32 - 1}, {"cols": None}, {"gates": 0}, {"gates": 5}, {"gates": 2**32 - 1},
        {"values": np.ones((3, 0, 2), F)}, {"values": np.ones((3, 2, 0), F)}, {"values": np.ones((2, 2, 2), F)},
        {"values": np.ones((3, 2), F)}, {"values": None}, {"values": np.ones((3, 2, 5000), F)},
        {"block_row": np.array([0, 4, 1], U)}, {"block_row": np.array([0, 2**32 - 1, 1], U)},
        {"block_row": np.array([3, 0, 1], U)}, {"block_row": np.array([3, 3, 1], U)}, {"block_row": np.zeros(2, U)},
        {"start": np.array([0, 2], U)}, {"start": np.array([0, 2, 4], U)}, {"start": np.array([1, 2, 3], U)},
        {"start": np.array([0, 9, 3], U)}, {"start": np.array([0, 2, 2], U)}, {"start": np.array([0, 2**32 - 1, 3], U)},
        {"start": np.zeros(0, U)}, {"start": np.zeros((3, 1), U)},
    ],
    ids=str,
)  # fmt: skip
def test_a_native_block_matrix_that_contradicts_itself_is_refused(changed):
    _native.Packed(block())
    with pytest.raises(Refused):
        _native.Packed(block(**changed))


def complementary(**changed):
    """A sound native complementary matrix of 6x2 in two gates, two rows packed as one, with some arguments changed."""
    sound = {
        "rows": 6, "gates": 2, "overlay": 2, "values": np.ones((2, 2, 2), F),
        "live": np.array([[[0, 0], [1, 0]], [[1, 1], [0, 1]]], np.uint8),
    }  # fmt: skip
    return _native.Matrix.complementary(**(sound | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 7}, {"rows": 8, "gates": 1}, {"rows": 10}, {"rows": 0}, {"rows": -6}, {"rows": 2**28 + 2}, {"rows": 2**32 - 2},
        {"rows": 2**32}, {"rows": 2.5}, {"rows": None}, {"gates": 0}, {"gates": 1}, {"gates": 3}, {"gates": 2**32 - 1},
        {"overlay": 0}, {"overlay": 1}, {"overlay": 3}, {"overlay": 65}, {"overlay": 2**32 - 1}, {"overlay": -2},
        {"rows": 260, "overlay": 65},
        {"rows": 0, "overlay": 0, "values": np.ones((2, 2, 0), F), "live": np.ones((2, 2, 0), np.uint8)},
        {"gates": 0, "values": np.ones((2, 0, 0), F), "live": np.ones((2, 0, 0), np.uint8)},
        {"values": np.ones((2, 2, 1), F)}, {"values": np.ones((1, 2, 2), F)}, {"values": np.ones((2, 1, 2), F)},
        {"values": np.ones((2, 2, 2, 1), F)}, {"values": np.ones(8, F)}, {"values": None}, {"values": np.ones((0, 2, 2), F)},
        {"live": np.full((2, 2, 2), 2, np.uint8)}, {"live": np.full((2, 2, 2), 255, np.uint8)}, {"live": np.full((2, 2, 2), -1)},
        {"live": np.zeros((2, 2, 3), np.uint8)}, {"live": np.zeros((3, 2, 2), np.uint8)}, {"live": np.zeros((2, 2), np.uint8)},
        {"live": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_native_complementary_matrix_that_contradicts_itself_is_refused(changed):
    packed = _native.Packed(complementary())
    assert packed.padded_rows == 32
    with pytest.raises(Refused):
        _native.Packed(complementary(**changed))


def test_what_a_complementary_matrix_holds_beyond_its_gates_is_added_to_nobody():
    out = np.zeros(32, F)
    _native.Packed(complementary()).matvec(ones(2), out)
    assert out[[0, 1, 2, 16, 17, 18]].tolist() == [1, 1, 1, 1, 1, 1] and out.sum() == 6  # two of eight lie beyond


def test_a_native_matrix_whose_padding_is_enormous_is_refused():
    n = 2**28
    row = np.array([n - 1], U)
    with pytest.raises(ValueError, match="too large once every gate is padded"):
        _native.Packed(_native.Matrix.block(n, 1, n, np.ones((1, 1, 1), F), row, np.array([0, 1], U)))


def dense(rows, cols, gates=1):
    return _native.Matrix.dense(np.ones((rows, cols), F), gates)


def ones(n):
    return np.ones(n, F)


MISUSE = {
    "linear, short bias": lambda e: e.add_linear(dense(3, 2), ones(2)),
    "linear, three gates": lambda e: e.add_linear(dense(3, 2, 3), ones(3)),
    "linear, gates that do not divide": lambda e: e.add_linear(dense(3, 2, 2), ones(3)),
    "linear, no gates": lambda e: e.add_linear(dense(3, 2, 0), ones(3)),
    "linear, no rows": lambda e: e.add_linear(dense(0, 2), ones(0)),
    "linear, no matrix": lambda e: e.add_linear(None, ones(2)),
    "linear, a numpy matrix": lambda e: e.add_linear(np.ones((3, 2), F), ones(3)),
    "linear, a bad block": lambda e: e.add_linear(block(gates=1, block_row=np.array([0, 9, 1], U)), ones(6)),
    "embedding, a vector": lambda e: e.add_embedding(ones(3)),
    "embedding, nothing": lambda e: e.add_embedding(np.ones((0, 3), F)),
    "gru, one gate": lambda e: e.add_gru(dense(6, 2), dense(6, 2), ones(6), ones(6), True),
    "gru, not square": lambda e: e.add_gru(dense(6, 2, 3), dense(6, 3, 3), ones(6), ones(6), True),
    "gru, other rows": lambda e: e.add_gru(dense(9, 2, 3), dense(6, 2, 3), ones(9), ones(6), True),
    "gru, short bias": lambda e: e.add_gru(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(5), True),
    "egru, short threshold": lambda e: e.add_egru(
        dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), ones(1), True, "none", False, True, 0.0
    ),
    "egru, unknown reset": lambda e: e.add_egru(
        dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), ones(2), True, "soft", False, True, 0.0
    ),
    "egru, too few": lambda e: e.add_egru(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6)),
    "lstm, three gates": lambda e: e.add_lstm(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6)),
    "lstm, not square": lambda e: e.add_lstm(dense(8, 2, 4), dense(8, 3, 4), ones(8), ones(8)),
    "lstm, short bias": lambda e: e.add_lstm(dense(8, 2, 4), dense(8, 2, 4), ones(8), ones(7)),
    "rnn, three gates": lambda e: e.add_rnn(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), True),
    "rnn, other rows": lambda e: e.add_rnn(dense(3, 2), dense(2, 2), ones(3), ones(2), False),
    "gru, a negative change": lambda e: e.add_gru(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), True, -0.5),
    "gru, a change that is none": lambda e: e.add_gru(
        dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), True, delta_hidden=float("nan")
    ),
    "gru, changes before the reset": lambda e: e.add_gru(
        dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), False, delta_hidden=0.1
    ),
    "lstm, an infinite change": lambda e: e.add_lstm(
        dense(8, 2, 4), dense(8, 2, 4), ones(8), ones(8), delta_input=float("inf")
    ),
    "relu, first": lambda e: e.add_relu(),
    "layer norm, short bias": lambda e: e.add_layer_norm(ones(3), ones(2), 1e-5),
    "layer norm, nothing": lambda e: e.add_layer_norm(ones(0), ones(0), 1e-5),
    "layer norm, a matrix": lambda e: e.add_layer_norm(np.ones((2, 2), F), ones(2), 1e-5),
    "cluster, first": lambda e: e.add_cluster(dense(1, 2), dense(2, 1), ones(2), 3, 2),
    "cluster, short bias": lambda e: e.add_cluster(dense(1, 2), dense(2, 1), ones(1), 3, 2),
    "cluster, no matrix": lambda e: e.add_cluster(None, dense(2, 1), ones(2), 3, 2),
    "unknown instruction set": lambda e: e.finish("sse9", 0),
    "nothing added": lambda e: e.finish("", 0),
    "negative limit": lambda e: e.finish("", -1),
}


@pytest.mark.parametrize("name", MISUSE)
def test_a_misused_native_engine_refuses_and_keeps_no_half_of_an_op(name):
    engine = _native.Engine()
    with pytest.raises(Refused):
        MISUSE[name](engine)
    with pytest.raises(ValueError, match="not finished"):
        _native.Stream(engine)
    with pytest.raises(ValueError, match="at least one op"):  # what was refused left nothing behind
        engine.finish("", 0)


def test_ops_that_do_not_follow_are_refused_and_the_engine_goes_on():
    engine = _native.Engine()
    engine.add_linear(dense(3, 2), ones(3))
    for misuse in (
        lambda: engine.add_linear(dense(1, 2), ones(1)),
        lambda: engine.add_embedding(np.ones((5, 3), F)),
        lambda: engine.add_gru(dense(6, 2, 3), dense(6, 2, 3), ones(6), ones(6), True),
    ):
        with pytest.raises(ValueError, match=r"the op before it gives 3|first op"):
            misuse()
    engine.add_linear(dense(1, 3), ones(1))
    engine.finish("", 0)
    for misuse in (lambda: engine.add_linear(dense(1, 1), ones(1)), lambda: engine.finish("", 0)):
        with pytest.raises(ValueError, match="this engine is finished"):
            misuse()
    out = np.zeros(1, F)
    _native.Stream(engine).step(ones(2), out)
    assert out[0] == 10


def test_a_cluster_that_contradicts_its_decoder_is_refused_and_the_engine_goes_on():
    engine = _native.Engine()
    engine.add_linear(dense(3, 2), ones(3))
    for refused in (False, True):
        for projection, weight, bias, units, at in [
            (dense(1, 3), dense(2, 1), ones(2), 3, 2), (dense(1, 2), dense(2, 2), ones(2), 3, 2),
            (dense(1, 2), dense(2, 1), ones(2), 3, 3), (dense(1, 2), dense(2, 1), ones(2), 3, 0),
            (dense(1, 2), dense(2, 1), ones(2), 4, 2), (dense(1, 2), dense(2, 1, 2), ones(2), 3, 2),
            (dense(2, 2, 2), dense(2, 2), ones(2), 3, 2), (dense(1, 2), dense(2, 1), ones(2), 2**32 - 1, 2),
            (dense(1, 2), dense(2, 1), ones(2), 3, 2**32 - 1), (dense(1, 2), dense(0, 1), ones(0), 3, 2),
        ]:  # fmt: skip
            with pytest.raises(Refused):
                engine.add_cluster(projection, weight, bias, units, at)
        if not refused:
            engine.add_log_softmax(3)
    engine.add_cluster(dense(1, 2), dense(2, 1), ones(2), 3, 1)
    for at in (1, 2):
        with pytest.raises(ValueError, match="clusters stand in rising order: the one before ends at 3"):
            engine.add_cluster(dense(1, 2), dense(2, 1), ones(2), 4, at)
    engine.add_cluster(dense(1, 2), dense(2, 1), ones(2), 4, 3)
    engine.finish("", 0)
    out = np.zeros(5, F)
    _native.Stream(engine).step(ones(2), out)
    np.testing.assert_allclose(np.exp(out), [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6], rtol=1e-5)


def test_a_misused_native_stream_refuses():
    program = cases.network("tokens")
    tokens, values = sf.Engine(program).stream()._core, sf.Engine(cases.network("egru-block")).stream()._core
    none = np.zeros((0, 0), np.uint8)
    for misuse in (
        lambda: values.run_tokens(np.zeros(2, np.int64), np.zeros((2, 9), F), none),
        lambda: tokens.run_values(np.zeros((2, 7), F), np.zeros((2, 7), F), none),
        lambda: tokens.run_tokens(np.array([0, 7]), np.zeros((2, 7), F), none),
        lambda: tokens.run_tokens(np.array([0, -1]), np.zeros((2, 7), F), none),
        lambda: tokens.run_tokens(np.array([0, 1]), np.zeros((1, 7), F), none),
        lambda: tokens.run_tokens(np.array([0, 1]), np.zeros((2, 6), F), none),
        lambda: tokens.run_tokens(np.array([0, 1]), np.zeros((2, 7), F), np.zeros((2, 32), np.uint8)),
        lambda: tokens.run_tokens(np.array([0, 1]), np.zeros((2, 7), F), np.zeros((1, 33), np.uint8)),
        lambda: values.run_values(np.zeros((2, 39), F), np.zeros((2, 9), F), none),
        lambda: tokens.read(1, "h", np.zeros(32, F)),
        lambda: tokens.read(1, "h", np.zeros(33, np.float64)),
        lambda: tokens.read(1, "events", np.zeros(33, F)),
        lambda: tokens.read(1, "weights", np.zeros(33, F)),
        lambda: tokens.read(0, "h", np.zeros(0, F)),
        lambda: tokens.read(2, "events", np.zeros(0, np.uint64)),
        lambda: tokens.read(3, "h", np.zeros(33, F)),
        lambda: tokens.read(-1, "h", np.zeros(33, F)),
        lambda: tokens.write(1, "h", np.zeros(32, F)),
        lambda: tokens.write(1, "u", np.zeros(33, F)),
        lambda: tokens.read(1, "c", np.zeros(33, F)),
        lambda: tokens.write(1, "c", np.zeros(33, F)),
        lambda: tokens.write(0, "h", np.zeros(0, F)),
        lambda: tokens.write(9, "h", np.zeros(33, F)),
        lambda: _native.Stream(None),
    ):
        with pytest.raises(Refused):
            misuse()
    assert tokens.steps == values.steps == 0


def test_a_stream_outlives_its_engine_and_the_weights_of_both():
    stream = sf.Engine(Program.from_bytes(make.SOUND)).stream()
    core = stream._core
    del stream
    out = np.zeros(3, F)
    core.step(1, out)
    np.testing.assert_array_equal(out, sf.Engine(Program.from_bytes(make.SOUND)).stream().step(1))


def test_the_native_matrix_keeps_the_arrays_it_borrows():
    matrix = sf.Block.from_dense(cases.rng(5).standard_normal((48, 40)), (16, 1), 3)
    expected = matrix.matvec(np.ones(40))
    borrowed = native_matrix(
        sf.Block(48, 40, 3, (16, 1), matrix.values + 0, matrix.block_row + U(0), matrix.start + U(0))
    )
    trash = [np.full(n, 0xFFFFFFFF, U) for n in (len(matrix.start), len(matrix.block_row), matrix.values.size)]
    out = np.zeros(48, F)
    _native.Packed(borrowed).matvec(ones(40), out)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert len(trash) == 3
