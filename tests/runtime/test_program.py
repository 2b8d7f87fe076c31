"""The file: what is written comes back, what is unsound is refused by a sentence, nothing is half-written."""

import json
import os
import stat
import struct
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import cases
import sparsefold as sf
from sparsefold import _native
from sparsefold import program as program_module
from sparsefold.formats import FORMATS, is_format
from sparsefold.program import (
    EGRU,
    GRU,
    LSTM,
    OPS,
    RNN,
    Cluster,
    Conv1d,
    Embedding,
    LayerNorm,
    Linear,
    Program,
    ProgramError,
    ReLU,
    matrices,
)

Z = np.zeros


def same(a, b):
    """Two ops hold the same, in every field."""
    assert type(a) is type(b)
    for f in fields(a):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        elif is_format(left):
            assert left.layout() == right.layout()
            assert left.tensors().keys() == right.tensors().keys()
            for name, array in left.tensors().items():
                np.testing.assert_array_equal(array, right.tensors()[name])
        else:
            assert left == right and type(left) is type(right)


def every_program():
    """Every network of the suite, and an EGRU with each combination of options."""
    yield from ((name, lambda name=name: cases.network(name)) for name in cases.NETWORKS)
    for options in cases.EGRU_OPTIONS:
        name = "-".join(map(str, options.values()))
        yield name, lambda options=options: Program((cases.egru(cases.rng(1), 3, 5, (2, 2), 0.5, **options),))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in every_program()])
def test_a_program_comes_back_from_its_file_and_is_written_the_same_again(make, tmp_path):
    program, path = make(), tmp_path / "a.sfold"
    program.save(path)
    back = Program.load(path)
    assert len(back.ops) == len(program.ops) and back.metadata == program.metadata
    for a, b in zip(program.ops, back.ops, strict=True):
        same(a, b)
    assert back.to_bytes() == path.read_bytes() == program.to_bytes()
    assert back.nbytes == program.nbytes < path.stat().st_size
    assert (back.takes_tokens, back.inputs, back.outputs) == (program.takes_tokens, program.inputs, program.outputs)


def test_the_networks_hold_every_op_in_every_format():
    seen = {
        (type(op), name, type(m))
        for n in cases.NETWORKS
        for op in cases.network(n).ops
        for name, m in matrices(op).items()
    }
    assert {type(op) for n in cases.NETWORKS for op in cases.network(n).ops} == set(OPS.values())
    assert seen == {
        (op, name, form)
        for op in (Linear, Conv1d, GRU, EGRU, LSTM, RNN)
        for name in (["weight"] if op in (Linear, Conv1d) else ["weight_ih", "weight_hh"])
        for form in FORMATS.values()
    } | {(Cluster, name, form) for name in ("projection", "weight") for form in FORMATS.values()}


def test_metadata_is_kept():
    metadata = {"recipe": "text", "größe": [1, 2.5, None, True, {"a": "b"}], "": "\u2028\ud800"}
    program = replace(cases.network("linear"), metadata=metadata)
    assert Program.from_bytes(program.to_bytes()).metadata == metadata


@pytest.mark.parametrize("value", [np.float32(1), {1, 2}, b"x"])
def test_metadata_that_is_no_json_is_refused(value):
    with pytest.raises(ValueError, match="the metadata must be plain JSON"):
        replace(cases.network("linear"), metadata={"a": value}).to_bytes()


def test_a_header_longer_than_its_limit_is_refused(monkeypatch):
    monkeypatch.setattr(program_module, "MAX_HEADER", 2000)
    with pytest.raises(ValueError, match=r"the limit is 2000\. Shorten the metadata"):
        replace(cases.network("linear"), metadata={"a": "x" * 2000}).to_bytes()


@pytest.mark.parametrize("name", ["three", "mixed-3", "tokens-block", "gru-block-2", "csc", "tokens-overlay"])
def test_the_safetensors_library_opens_the_file(name, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="the library safetensors is not installed to compare with.")
    from safetensors.numpy import load_file

    program, path = cases.network(name), tmp_path / "a.sfold"
    program.save(path)
    tensors = load_file(path)
    ours = program_module._tensors(program.ops)
    assert tensors.keys() == ours.keys()
    for key, array in ours.items():
        assert tensors[key].dtype == array.dtype
        np.testing.assert_array_equal(tensors[key], array)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["sparsefold"] == "1" and json.loads(metadata["metadata"]) == program.metadata
    assert [op["op"] for op in json.loads(metadata["ops"])] == [op.kind for op in program.ops]


def test_the_data_begins_at_a_multiple_of_64():
    for name in cases.NETWORKS:
        raw = cases.network(name).to_bytes()
        assert (8 + struct.unpack_from("<Q", raw)[0]) % 64 == 0


@pytest.mark.parametrize("name", ["tokens-block", "tokens-overlay"])
def test_an_unaligned_file_of_another_writer_is_read(name):
    raw = cases.network(name).to_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    text = raw[8 : 8 + size].rstrip()
    text += b" " * (3 - len(text) % 4)
    shifted = struct.pack("<Q", len(text)) + text + raw[8 + size :]
    assert (8 + len(text)) % 4 == 3
    program = Program.from_bytes(shifted)
    assert program.to_bytes() == raw
    np.testing.assert_array_equal(
        sf.Engine(program).stream().run([1, 2]), sf.Engine(Program.from_bytes(raw)).stream().run([1, 2])
    )


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", "one"])
def test_another_version_is_refused(version):
    raw = cases.network("linear").to_bytes()
    before, after = b'"sparsefold": "1"', f'"sparsefold": "{version}"'.encode()
    with pytest.raises(ProgramError, match=r"reads version 1\. Update sparsefold"):
        Program.from_bytes(edited(raw, before, after))


def edited(raw, before, after):
    """The file with one piece of its header changed."""
    (size,) = struct.unpack_from("<Q", raw)
    text = raw[8 : 8 + size]
    assert text.count(before) == 1
    text = text.replace(before, after)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def test_an_error_says_at_which_byte():
    raw = cases.network("linear").to_bytes()
    with pytest.raises(ProgramError, match=rf"\(at byte {len(raw) - 4}\)") as error:
        Program.from_bytes(raw[:-4])
    assert error.value.offset == len(raw) - 4
    assert isinstance(error.value, ValueError)


# --- what does not make a program -------------------------------------------------------------------------------------

D = sf.Dense
LINEAR = Linear(D(np.ones((2, 3))), Z(2, np.float32))
GRU_1 = GRU(D(np.ones((3, 2)), 3), D(np.ones((3, 1)), 3), Z(3, np.float32), Z(3, np.float32))
EGRU_1 = EGRU(
    D(np.ones((3, 2)), 3), D(np.ones((3, 1)), 3), Z(3, np.float32), Z(3, np.float32), threshold=Z(1, np.float32)
)
LSTM_1 = LSTM(D(np.ones((4, 2)), 4), D(np.ones((4, 1)), 4), Z(4, np.float32), Z(4, np.float32))
RNN_1 = RNN(D(np.ones((1, 2))), D(np.ones((1, 1))), Z(1, np.float32), Z(1, np.float32))
NORM = LayerNorm(Z(3, np.float32), Z(3, np.float32))
TABLE = Embedding(np.ones((4, 3), np.float32))


def holding(value):
    array = np.ones((2, 3), np.float32)
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("ops", "sentence"),
    [
        ((), "1 to 1024 ops; got 0"),
        ((Linear(D(np.ones((1, 1))), Z(1, np.float32)),) * 1025, "1 to 1024 ops; got 1025"),
        ((LINEAR, LINEAR), r"op 1 \(linear\) reads 3 values, but op 0 \(linear\) gives 2"),
        ((TABLE, GRU_1), r"op 1 \(gru\) reads 2 values, but op 0 \(embedding\) gives 3"),
        ((TABLE, LINEAR, TABLE), "can only be the first op"),
        ((Embedding(np.ones(3, np.float32)),), r"weight has two axes, \(tokens, width\); got \(3,\)"),
        ((Embedding(np.ones((0, 3), np.float32)),), "at least one input and one output"),
        ((Linear(D(np.ones((0, 3))), Z(0, np.float32)),), "at least one input and one output"),
        ((replace(LINEAR, bias=Z(3, np.float32)),), r"bias must be \(2,\), got \(3,\)"),
        ((replace(LINEAR, bias=Z(2)),), "tensor 0.bias must be float32, got float64"),
        ((replace(LINEAR, bias=np.zeros(2, np.uint32)),), "tensor 0.bias must be float32, got uint32"),
        ((Linear(D(np.ones((3, 3)), 3), Z(3, np.float32)),), "a linear op has one gate, got 3"),
        ((replace(LINEAR, weight=D(holding(np.nan))),), r"0.weight.values holds nan at \[1, 2\]. Training probably diverged"),
        ((replace(LINEAR, weight=D(holding(np.inf))),), "holds inf"),
        ((replace(LINEAR, weight=sf.Block.from_dense(holding(-np.inf), (2, 1))),), "holds -inf"),
        ((replace(LINEAR, weight=sf.CSC.from_dense(holding(np.nan))),), r"0.weight.values holds nan at \[5\]"),
        ((replace(LINEAR, weight=sf.Complementary.from_dense(holding(np.inf), 1)),), r"holds inf at \[2, 0, 1, 0\]"),
        ((Embedding(holding(np.nan)),), "every weight must be finite, but tensor 0.weight"),
        ((replace(LINEAR, bias=np.array([1, np.nan], np.float32)),), "tensor 0.bias holds nan at"),
        ((replace(GRU_1, weight_ih=D(np.ones((3, 2)))),), "1 units need matrices of 3 rows in 3 gates"),
        ((replace(GRU_1, weight_hh=D(np.ones((6, 1)), 3)),), "1 units need matrices of 3 rows in 3 gates"),
        ((replace(GRU_1, weight_ih=D(np.ones((6, 2)), 3)),), "1 units need matrices"),
        ((replace(GRU_1, bias_ih=Z(2, np.float32)),), r"bias_ih must be \(3,\), got \(2,\)"),
        ((replace(GRU_1, bias_hh=Z((3, 1), np.float32)),), r"bias_hh must be \(3,\), got \(3, 1\)"),
        ((replace(EGRU_1, threshold=Z(2, np.float32)),), r"threshold must be \(1,\), got \(2,\)"),
        ((replace(EGRU_1, threshold=np.array([-0.1], np.float32)),), "every threshold must be a number >= 0"),
        ((replace(EGRU_1, threshold=np.array([np.nan], np.float32)),), "every threshold must be a number >= 0"),
        ((replace(EGRU_1, threshold=np.array([np.inf], np.float32)),), "tensor 0.threshold holds inf"),
        ((replace(EGRU_1, reset="soft"),), "reset must be one of threshold, output, none, got 'soft'"),
        ((replace(EGRU_1, event="never"),), "event must be threshold or always"),
        ((replace(EGRU_1, output="y"),), "output must be events or state"),
        ((replace(LSTM_1, weight_ih=D(np.ones((4, 2)))),), "1 units need matrices of 4 rows in 4 gates; got"),
        ((replace(LSTM_1, weight_hh=D(np.ones((3, 1)), 3)),), "1 units need matrices of 4 rows in 4 gates"),
        ((replace(LSTM_1, bias_hh=Z(3, np.float32)),), r"op 0 \(lstm\): bias_hh must be \(4,\), got \(3,\)"),
        ((replace(RNN_1, weight_hh=D(np.ones((4, 1)), 4)),), "1 units need matrices of 1 rows in 1 gate; got"),
        ((replace(RNN_1, nonlinearity="gelu"),), "nonlinearity must be tanh or relu"),
        ((LayerNorm(Z((2, 2), np.float32), Z((2, 2), np.float32)),), r"weight has one axis; got \(2, 2\)"),
        ((replace(NORM, bias=Z(2, np.float32)),), r"bias must be \(3,\), got \(2,\)"),
        ((LayerNorm(Z(0, np.float32), Z(0, np.float32)),), "at least one input and one output"),
        ((LayerNorm(np.array([np.nan], np.float32), Z(1, np.float32)),), "tensor 0.weight holds nan"),
        *(((replace(NORM, epsilon=e),), r"epsilon must be in \[1e-12, 1\], got") for e in (0, -1, 1e-13, 2, np.nan)),
        ((LINEAR, NORM), r"op 1 \(layer_norm\) reads 3 values"),
        ((ReLU(3),), r"op 0 \(relu\): a relu cannot be the first op. Apply it to the input"),
        ((LINEAR, ReLU(3)), r"op 1 \(relu\) reads 3 values, but op 0 \(linear\) gives 2"),
        ((replace(EGRU_1, zoneout=1.0),), r"zoneout must be in \[0, 1\), got 1.0"),
        ((replace(EGRU_1, zoneout=-0.1),), r"zoneout must be in \[0, 1\)"),
        ((replace(EGRU_1, zoneout=float("nan")),), r"zoneout must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_ops_that_do_not_fit_are_refused(ops, sentence):
    with pytest.raises(ValueError, match=sentence):
        Program(ops)


@pytest.mark.parametrize(
    ("stored", "name", "dtype"),
    [
        (sf.Block.from_dense(np.ones((2, 3)), (2, 1)), "block_row", "uint32"),
        (sf.Block.from_dense(np.ones((2, 3)), (2, 1)), "start", "uint32"),
        (sf.CSC.from_dense(np.ones((2, 3))), "row", "uint16"),
        (sf.CSC.from_dense(np.ones((2, 3))), "start", "uint32"),
        (sf.Complementary.from_dense(np.ones((2, 3)), 1), "live", "uint8"),
        (sf.Complementary.from_dense(np.ones((2, 3)), 1), "values", "float32"),
    ],
)
def test_arrays_of_another_type_are_refused(stored, name, dtype):
    wide = replace(stored, **{name: getattr(stored, name).astype(np.int64)})
    with pytest.raises(ValueError, match=f"tensor 0.weight.{name} must be {dtype}, got int64"):
        Program((replace(LINEAR, weight=wide),))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.sfold"
    cases.network("linear").save(path)
    old = path.read_bytes()
    for place, error in (("fsync", OSError("disk full")), ("fsync", KeyboardInterrupt()), ("fdopen", MemoryError())):
        with monkeypatch.context() as patch:

            def fail(*_, error=error, **__):
                raise error

            patch.setattr(os, place, fail)
            with pytest.raises(type(error)):
                cases.network("gru").save(path)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["a.sfold"]
    cases.network("gru").save(path)
    assert path.read_bytes() == cases.network("gru").to_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.sfold"]


def test_a_program_that_cannot_be_written_down_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.sfold"
    cases.network("linear").save(path)
    old = path.read_bytes()
    with pytest.raises(ValueError):
        replace(cases.network("linear"), metadata={"a": object()}).save(path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_missing_or_no_folder_is_named(tmp_path):
    program = cases.network("linear")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(ValueError, match=r"does not exist\. Make it first") as error:
            program.save(folder / "a.sfold")
        assert str(folder) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(program_module.tempfile, "mkstemp", refuse)
    with pytest.raises(ValueError, match=r"Permission denied\. Choose a folder you may write to"):
        cases.network("linear").save(tmp_path / "a.sfold")


def test_a_folder_in_the_place_of_the_file_is_left_alone(tmp_path):
    (tmp_path / "a.sfold").mkdir()
    with pytest.raises((ValueError, OSError)):
        cases.network("linear").save(tmp_path / "a.sfold")
    assert [p.name for p in tmp_path.iterdir()] == ["a.sfold"]


def test_the_file_gets_the_usual_rights(tmp_path):
    before = os.umask(0o027)
    try:
        cases.network("linear").save(tmp_path / "a.sfold")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.sfold").stat().st_mode) == 0o640


def test_a_path_may_be_a_string_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.network("linear").save("a.sfold")
    assert sf.Engine.load("a.sfold").program.metadata == {"name": "linear"}
    assert Path("a.sfold").is_file()


def test_a_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Program.load(tmp_path / "none.sfold")


@pytest.mark.parametrize("precision", ["bf16", "i8", "w8a8"])
@pytest.mark.parametrize("name", ["mixed-3", "csc", "gru-overlay", "egru-overlay-16", "lstm-block-2"])
def test_a_rounded_program_goes_through_the_file(name, precision):
    exact = cases.network(name)
    program = exact.rounded(precision)
    raw = program.to_bytes()
    again = Program.from_bytes(raw)
    assert again.to_bytes() == raw
    assert len(raw) < len(exact.to_bytes())
    for i, (mine, theirs) in enumerate(zip(program.ops, again.ops, strict=True)):
        for field, matrix in matrices(mine).items():
            np.testing.assert_array_equal(matrix.to_dense(), matrices(theirs)[field].to_dense())
            read_as_they_are = precision == "w8a8" and program.by_events(i, field)
            assert matrices(theirs)[field].precision == ("i8" if read_as_they_are else precision)


def test_a_matrix_that_reads_events_is_not_w8a8():
    op = cases.egru(cases.rng(1), 5, 7)
    assert Program((op,)).rounded("w8a8").ops[0].weight_ih.precision == "w8a8"
    with pytest.raises(
        ValueError, match=r"op 0 \(egru\): weight_hh reads events or changes, .*round it to i8, not w8a8"
    ):
        Program((replace(op, weight_hh=op.weight_hh.rounded("w8a8")),))


def remade(raw, change):
    """The file after ``change(ops, tensors)``: described ops, and {name: [dtype, shape, bytes]}; with a checksum that agrees."""
    (size,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    meta = header.pop("__metadata__")
    ops = json.loads(meta["ops"])
    tensors = {name: [e["dtype"], e["shape"], data[slice(*e["data_offsets"])]] for name, e in header.items()}
    change(ops, tensors)
    joined, out = b"".join(t[2] for t in tensors.values()), {}
    for name, (dtype, shape, content) in tensors.items():
        start = sum(len(tensors[n][2]) for n in out)
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
    meta |= {"ops": json.dumps(ops), "crc32": f"{zlib.crc32(joined):08x}"}
    text = json.dumps({"__metadata__": meta, **out}).encode()
    return struct.pack("<Q", len(text)) + text + joined


def _scale(value):
    def change(ops, tensors):
        tensors["1.weight.scale"][2] = struct.pack("<f", value) + tensors["1.weight.scale"][2][4:]

    return change


def _code(ops, tensors):
    tensors["1.weight.values"][2] = b"\x80" + tensors["1.weight.values"][2][1:]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda ops, t: ops[1]["weight"].update(precision="i4"), "precision must be one of"),
        (lambda ops, t: ops[1]["weight"].update(precision=8), "precision must be one of"),
        (lambda ops, t: ops[1]["weight"].pop("precision"), "needs a F32 tensor 1.weight.values"),
        (lambda ops, t: ops[1]["weight"].update(precision="bf16"), "needs a BF16 tensor 1.weight.values"),
        (lambda ops, t: t.pop("1.weight.scale"), "needs a F32 tensor 1.weight.scale"),
        (
            lambda ops, t: t["1.weight.scale"].__setitem__(1, [1, len(t["1.weight.scale"][2]) // 4]),
            "positive scale for each of",
        ),
        (_scale(0.0), "positive scale"),
        (_scale(-1.0), "positive scale"),
        (_scale(float("nan")), "positive scale"),
        (_scale(float("inf")), "positive scale"),
        (_code, "between -127 and 127"),
    ],
)
def test_broken_int8_weights_are_refused(change, sentence):
    raw = cases.network("gru-overlay").rounded("i8").to_bytes()
    assert Program.from_bytes(remade(raw, lambda *_: None)).ops[1].weight.precision == "i8"
    with pytest.raises(ProgramError, match=sentence):
        Program.from_bytes(remade(raw, change))


def test_a_chain_of_relus_is_refused_by_both_sides():
    ops = [*cases.network("relu").ops]
    at = next(i for i, op in enumerate(ops) if isinstance(op, ReLU))
    with pytest.raises(ValueError, match="a relu after a relu changes nothing"):
        Program((*ops[: at + 1], *ops[at:]))
    native = _native.Engine()
    native.add_embedding(np.ones((2, 3), np.float32))
    native.add_relu()
    with pytest.raises(ValueError, match="a relu after a relu changes nothing"):
        native.add_relu()
