"""The C library: examples/embed.c built as a user would, its outputs bit for bit those of Python, and every refusal."""

from __future__ import annotations

import ctypes
import json
import subprocess
import threading
import zlib
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from attacks import make
from sparsefold.program import EGRU, Program, ProgramError

ROOT = Path(__file__).resolve().parents[2]
OK, READ, PROGRAM, ARGUMENT, TOKEN, BUSY, MEMORY, SEQUENCE, TARGET = range(9)
STEPS, EVENTS, INPUT_READS, HIDDEN_READS, ASKED = range(5)
network = cache(cases.network)


class Info(ctypes.Structure):
    """``sparsefold_info``."""

    _fields_ = (
        ("inputs", c_size_t), ("outputs", c_size_t), ("ops", c_size_t), ("takes_tokens", c_int), ("isa", c_char_p),
        ("whole_sequences", c_int),
    )  # fmt: skip


@pytest.fixture(scope="session")
def lib(c_build):
    """The shared library through ctypes."""
    library = ctypes.CDLL(str(c_build / "libsparsefold.so"))
    handle, message = [POINTER(c_void_p)], [c_char_p, c_size_t]
    for name, result, arguments in [
        ("abi_version", c_uint32, []),
        ("status_text", c_char_p, [c_int]),
        ("load", c_int, [c_char_p, c_size_t, c_char_p, *handle, *message]),
        ("load_file", c_int, [c_char_p, c_char_p, *handle, *message]),
        ("free", None, [c_void_p]),
        ("describe", POINTER(Info), [c_void_p]),
        ("stream_new", c_void_p, [c_void_p]),
        ("stream_free", None, [c_void_p]),
        ("stream_reset", c_int, [c_void_p]),
        ("step_token", c_int, [c_void_p, c_int64, POINTER(c_float)]),
        ("step_values", c_int, [c_void_p, POINTER(c_float), POINTER(c_float)]),
        ("run_tokens", c_int, [c_void_p, c_size_t, POINTER(c_int64), POINTER(c_float)]),
        ("run_values", c_int, [c_void_p, c_size_t, POINTER(c_float), POINTER(c_float)]),
        ("step_batch_tokens", c_int, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_int64), POINTER(c_float)]),
        ("step_batch_values", c_int, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float), POINTER(c_float)]),
        ("score_token", c_int, [c_void_p, c_int64, c_int64, POINTER(c_float)]),
        ("score_values", c_int, [c_void_p, POINTER(c_float), c_int64, POINTER(c_float)]),
        ("score_tokens", c_int, [c_void_p, c_size_t, POINTER(c_int64), POINTER(c_int64), POINTER(c_float)]),
        ("score_rows", c_int, [c_void_p, c_size_t, POINTER(c_float), POINTER(c_int64), POINTER(c_float)]),
        ("set_threads", c_int, [c_void_p, c_size_t]),
        ("counters", c_int, [c_void_p, c_size_t, c_int, POINTER(c_uint64), POINTER(c_size_t)]),
    ]:
        function = getattr(library, f"sparsefold_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def load(lib, raw: bytes, isa: bytes | None = None):
    """(status, engine or None, message)."""
    engine, message = c_void_p(), ctypes.create_string_buffer(400)
    status = lib.sparsefold_load(raw, len(raw), isa, byref(engine), message, 400)
    assert (engine.value is not None) == (status == OK) == (message.value == b"")
    return status, engine, message.value.decode()


def floats(array):
    return np.ascontiguousarray(array, np.float32).ctypes.data_as(POINTER(c_float))


def play(lib, raw: bytes, sequence, isa: bytes | None = None):
    """(outputs, {(op, counter): values}) of a new stream, whose engine is freed before the first step."""
    status, engine, message = load(lib, raw, isa)
    assert status == OK, message
    info = Info.from_buffer_copy(lib.sparsefold_describe(engine).contents)
    stream = lib.sparsefold_stream_new(engine)
    lib.sparsefold_free(engine)
    out = np.empty((len(sequence), info.outputs), np.float32)
    for x, y in zip(sequence, out, strict=True):
        if info.takes_tokens:
            assert lib.sparsefold_step_token(stream, int(x), floats(y)) == OK
        else:
            assert lib.sparsefold_step_values(stream, floats(x), floats(y)) == OK
    counted = {}
    for op in range(info.ops):
        for counter in (STEPS, EVENTS, INPUT_READS, HIDDEN_READS, ASKED):
            count = c_size_t(0)
            assert lib.sparsefold_counters(stream, op, counter, None, byref(count)) == OK
            values = np.zeros(count.value, np.uint64)
            pointer = values.ctypes.data_as(POINTER(c_uint64))
            assert lib.sparsefold_counters(stream, op, counter, pointer, byref(count)) == OK
            counted[op, counter] = values
    lib.sparsefold_stream_free(stream)
    return out, counted


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_every_network_gives_the_bits_and_counts_of_python(name, lib, isa):
    program = network(name)
    x = cases.sequence(program, 20)
    stream = sf.Engine(program, isa=isa).stream()
    expected = stream.run(x)
    out, counted = play(lib, program.to_bytes(), x, isa.encode())
    assert out.tobytes() == expected.tobytes()
    counts, nothing = stream.counters, np.zeros(0)
    for op in range(len(program.ops)):
        assert counted[op, STEPS].tolist() == [20]
        np.testing.assert_array_equal(counted[op, EVENTS], counts.events.get(op, nothing))
        np.testing.assert_array_equal(counted[op, INPUT_READS], counts.input_reads.get(op, nothing))
        np.testing.assert_array_equal(counted[op, HIDDEN_READS], counts.hidden_reads.get(op, nothing))
        assert counted[op, ASKED].tolist() == ([20] if op in counts.asked else [])


@pytest.mark.parametrize("options", cases.EGRU_OPTIONS[::3], ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_of_an_egru_is_read(options, lib):
    r = cases.rng(7)
    program = Program((cases.egru(r, 19, 37, (8, 1), 0.5, **options), cases.linear(r, 37, 3)))
    x = cases.sequence(program, 8)
    assert play(lib, program.to_bytes(), x)[0].tobytes() == sf.Engine(program).stream().run(x).tobytes()


def run_sequence(lib, stream, x, out):
    """The status of one call over a sequence."""
    if x.ndim == 1:
        tokens = np.array(x, np.int64)
        return lib.sparsefold_run_tokens(stream, len(x), tokens.ctypes.data_as(POINTER(c_int64)), floats(out))
    return lib.sparsefold_run_values(stream, len(x), floats(x), floats(out))


@pytest.mark.parametrize("name", [*cases.WHOLE_SEQUENCES, "three", "conv-of-events", "mixed-3"])
def test_a_run_gives_the_bits_and_counts_of_python(name, lib, isa):
    program = network(name)
    x, stream = cases.sequence(program, 20), sf.Engine(program, isa=isa).stream()
    _, engine, _ = load(lib, program.to_bytes(), isa.encode())
    assert lib.sparsefold_describe(engine).contents.whole_sequences == program.whole_sequences
    handle, out = lib.sparsefold_stream_new(engine), np.empty((20, program.outputs), np.float32)
    for piece in (slice(0, 13), slice(13, 13), slice(13, 20)):
        assert run_sequence(lib, handle, x[piece], out[piece]) == OK
        assert out[piece].tobytes() == stream.run(x[piece]).tobytes()
    for op, expected in stream.counters.events.items():
        values, count = np.zeros(len(expected), np.uint64), c_size_t(len(expected))
        pointer = values.ctypes.data_as(POINTER(c_uint64))
        assert lib.sparsefold_counters(handle, op, EVENTS, pointer, byref(count)) == OK
        np.testing.assert_array_equal(values, expected)
    lib.sparsefold_stream_free(handle)
    lib.sparsefold_free(engine)


def test_a_wrong_run_and_a_step_of_whole_sequences_do_nothing(lib):
    for name, x in (("two-ways-gru", np.zeros((3, 3), np.float32)), ("two-ways-tokens", np.array([1, 2, 3]))):
        program = network(name)
        _, engine, _ = load(lib, program.to_bytes())
        handle, out = lib.sparsefold_stream_new(engine), np.full((3, program.outputs), 5, np.float32)
        if program.takes_tokens:
            assert lib.sparsefold_step_token(handle, 1, floats(out)) == SEQUENCE
            for wrong in ([1, 7, 1], [-1, 2, 3]):
                assert run_sequence(lib, handle, np.array(wrong), out) == TOKEN
            assert run_sequence(lib, handle, np.zeros((3, 3)), out) == ARGUMENT
            assert lib.sparsefold_run_tokens(handle, 1, None, floats(out)) == ARGUMENT
        else:
            assert lib.sparsefold_step_values(handle, floats(x), floats(out)) == SEQUENCE
            assert run_sequence(lib, handle, np.array([1, 2, 3]), out) == ARGUMENT
            assert lib.sparsefold_run_values(handle, 1, None, floats(out)) == ARGUMENT
            assert lib.sparsefold_run_values(handle, 2**60, floats(x), floats(out)) == MEMORY
        assert batch(lib, engine, [handle], x[:1], program.takes_tokens, out) == SEQUENCE
        assert (out == 5).all()
        count, steps = c_size_t(1), c_uint64(9)
        assert lib.sparsefold_counters(handle, 0, STEPS, byref(steps), byref(count)) == OK and steps.value == 0
        assert run_sequence(lib, handle, x, out) == OK
        assert out.tobytes() == sf.Engine(program).stream().run(x).tobytes()
        lib.sparsefold_stream_free(handle)
        lib.sparsefold_free(engine)
    assert b"Call sparsefold_run_" in lib.sparsefold_status_text(SEQUENCE)
    assert lib.sparsefold_run_values(None, 0, None, None) == ARGUMENT


def integers(values):
    return np.array(values, np.int64).ctypes.data_as(POINTER(c_int64))


SCORED = [name for name in cases.NETWORKS if network(name).ops[-1].kind in ("linear", "log_softmax", "cluster")]


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_the_bits_and_counts_of_python(name, lib, isa):
    program, steps = network(name), 12
    x, targets = cases.sequence(program, steps), cases.rng(3).integers(0, program.outputs, steps)
    stream = sf.Engine(program, isa=isa).stream()
    expected = stream.score(x, targets)
    _, engine, _ = load(lib, program.to_bytes(), isa.encode())
    for single in (True, False):
        handle, found = lib.sparsefold_stream_new(engine), np.full(steps, np.nan, np.float32)
        for t in range(steps) if single else ():
            one = floats(found[t : t + 1])
            if program.takes_tokens:
                assert lib.sparsefold_score_token(handle, int(x[t]), int(targets[t]), one) == OK
            else:
                assert lib.sparsefold_score_values(handle, floats(x[t]), int(targets[t]), one) == OK
        if not single and program.takes_tokens:
            assert lib.sparsefold_score_tokens(handle, steps, integers(x), integers(targets), floats(found)) == OK
        elif not single:
            assert lib.sparsefold_score_rows(handle, steps, floats(x), integers(targets), floats(found)) == OK
        assert found.tobytes() == expected.tobytes()
        for op, asked in stream.counters.asked.items():
            value, count = c_uint64(99), c_size_t(1)
            assert lib.sparsefold_counters(handle, op, ASKED, byref(value), byref(count)) == OK
            assert value.value == asked
        lib.sparsefold_stream_free(handle)
    lib.sparsefold_free(engine)


def test_a_refused_score_changes_nothing(lib):
    for name, last in (
        ("tokens-cluster", OK),
        ("cluster-of-state", OK),
        ("top-k", ARGUMENT),
        ("two-ways-gru", SEQUENCE),
    ):
        program = network(name)
        _, engine, _ = load(lib, program.to_bytes())
        handle, found = lib.sparsefold_stream_new(engine), np.full(3, 5, np.float32)
        x, y, rows = integers([1, 2, 3]), floats(found), floats(np.ones((3, program.inputs)))
        wrong = [-1, program.outputs, 2**62]
        if program.takes_tokens:
            assert lib.sparsefold_score_values(handle, rows, 0, y) == ARGUMENT
            assert lib.sparsefold_score_token(handle, 7, 0, y) == TOKEN
            assert lib.sparsefold_score_tokens(handle, 3, integers([0, 1, -1]), x, y) == TOKEN
            for target in wrong:
                assert lib.sparsefold_score_token(handle, 1, target, y) == TARGET
                assert lib.sparsefold_score_tokens(handle, 3, x, integers([0, 1, target]), y) == TARGET
            assert lib.sparsefold_score_token(handle, 1, 0, None) == ARGUMENT
            assert lib.sparsefold_score_tokens(handle, 3, None, x, y) == ARGUMENT
            assert lib.sparsefold_score_tokens(handle, 3, x, None, y) == ARGUMENT
            assert lib.sparsefold_score_tokens(handle, 0, None, None, None) == OK
        else:
            assert lib.sparsefold_score_token(handle, 0, 0, y) == ARGUMENT
            assert lib.sparsefold_score_values(handle, None, 0, y) == ARGUMENT
            assert lib.sparsefold_score_rows(handle, 3, rows, None, y) == ARGUMENT
            for target in wrong:
                assert lib.sparsefold_score_values(handle, rows, target, y) == (last or TARGET)
                assert lib.sparsefold_score_rows(handle, 3, rows, integers([0, 1, target]), y) == (last or TARGET)
        assert (found == 5).all()
        count, steps = c_size_t(1), c_uint64(9)
        assert lib.sparsefold_counters(handle, 0, STEPS, byref(steps), byref(count)) == OK and steps.value == 0
        lib.sparsefold_stream_free(handle)
        lib.sparsefold_free(engine)
    assert lib.sparsefold_score_token(None, 0, 0, floats(np.zeros(1))) == ARGUMENT


# --- the reader against Python's -----------------------------------------------------------------------------------------


def verdicts(lib, raw: bytes):
    """(accepted by Python, accepted by C, what C said)."""
    status, engine, message = load(lib, raw)
    assert status in (OK, PROGRAM)
    lib.sparsefold_free(engine)
    try:
        Program.from_bytes(raw)
    except ProgramError:
        return False, status == OK, message
    return True, status == OK, message


@pytest.mark.parametrize("name", make.ATTACKS)
def test_an_attack_is_refused_with_a_sentence(name, lib):
    raw = (ROOT / f"tests/attacks/{name}.sfold").read_bytes()
    python, c, message = verdicts(lib, raw)
    assert not python and not c
    assert message.isprintable() and message.endswith(").") and len(message) > 30
    assert 0 <= int(message.rpartition("at byte ")[2].rstrip(").")) <= len(raw)


def _meta(text: str) -> bytes:
    return make._file(lambda f: f.meta.update(metadata=text))


def _header(change) -> bytes:
    return make._header(change)


def _moved(file: make.File) -> None:
    """The bytes of ``live`` first, two of them: all that follows lies between two words."""
    live = {"2.weight.live": file.tensors.pop("2.weight.live")}
    file.tensors = live | file.tensors
    file.ops[2]["weight"]["rows"] = 1
    file.tensors["2.bias"] = ["F32", [1], b"\0" * 4]
    file.tensors["2.weight.values"] = ["F32", [2, 1, 1, 1], b"\0" * 8]
    file.tensors["2.weight.live"] = ["U8", [2, 1, 1], bytes([0, 1])]


CORNERS = {
    "sound": make.SOUND,
    "metadata, none": make._header(lambda h: h["__metadata__"].pop("metadata")),
    "metadata, numbers of Python": _meta('{"a": [NaN, -Infinity, Infinity, -0, 1e999, 1E-999, -1.5e+3]}'),
    "metadata, other numbers": _meta('{"a": 01}'),
    "metadata, plus": _meta('{"a": +1}'),
    "metadata, point": _meta('{"a": 1.}'),
    "metadata, no digit": _meta('{"a": .5}'),
    "metadata, exponent": _meta('{"a": 1e}'),
    "metadata, minus": _meta('{"a": -}'),
    "metadata, word": _meta('{"a": nul}'),
    "metadata, long whole number": _meta('{"a": ' + "9" * 4300 + "}"),
    "metadata, longer whole number": _meta('{"a": ' + "9" * 4301 + "}"),
    "metadata, long fraction": _meta('{"a": ' + "9" * 5000 + ".0}"),
    "metadata, 64 deep": _meta('{"a":' + "[" * 63 + "]" * 63 + "}"),
    "metadata, 65 deep": _meta('{"a":' + "[" * 64 + "]" * 64 + "}"),
    "metadata, escapes": _meta(r'{"\ud83d\ude00": "\"\\\/\b\f\n\r\t\u00e9", "\ud83d": "\ud83dx\ud83d\u0041"}'),
    "metadata, unknown escape": _meta(r'{"a": "\x41"}'),
    "metadata, short escape": _meta(r'{"a": "\u00g0"}'),
    "metadata, half an escape": _meta('{"a": "\\u00'),
    "metadata, pair with half an escape": _meta('{"a": "\\ud83d\\u00"}'),
    "metadata, one key written twice": _meta(r'{"a": 1, "\u0061": 2}'),
    "metadata, pair written twice": _meta('{"\U0001f600": 1, "\\ud83d\\ude00": 2}'),
    "metadata, a key twice inside": _meta('{"a": [{"b": 1, "b": 2}]}'),
    "metadata, control character": _meta('{"a": "\n"}'),
    "metadata, spaces": _meta(' \t\r\n{ "a" : [ ] , "b" : { } } \n'),
    "metadata, other space": _meta('\u00a0{"a": 1}'),
    "metadata, byte order mark": _meta("\ufeff{}"),
    "metadata, comma": _meta('{"a": 1,}'),
    "metadata, comma in a list": _meta('{"a": [1,]}'),
    "metadata, no colon": _meta('{"a" 1}'),
    "metadata, a key that is none": _meta("{1: 2}"),
    "metadata, two values": _meta("{} {}"),
    "metadata, words of a corpus": _meta(
        json.dumps({"level": "word", "vocabulary": [f"w\u00f6rter-{i}'" for i in range(33_278)]})
    ),
    "metadata, comment": _meta("{} // yes"),
    "header, utf-8": make._text(lambda t: t.replace(b'"metadata": "{}"', '"metadata": "{}", "x": "é😀"'.encode())),
    "header, overlong": make._text(lambda t: t.replace(b'"metadata": "{}"', b'"metadata": "{}", "x": "\xc0\xaf"')),
    "header, surrogate": make._text(lambda t: t.replace(b'"metadata": "{}"', b'"metadata": "{}", "x": "\xed\xa0\x80"')),
    "header, beyond": make._text(
        lambda t: t.replace(b'"metadata": "{}"', b'"metadata": "{}", "x": "\xf4\x90\x80\x80"')
    ),
    "header, spaces": make._text(lambda t: b"  " + t + b" \n\t "),
    "header, zero behind": make._text(lambda t: t + b"\0"),
    "header, one byte more": make._text(lambda t: t + b" "),
    "header, two bytes more": make._text(lambda t: t + b"  "),
    "entry, unknown field": _header(lambda h: h["0.weight"].update(more=float("nan"))),
    "entry, minus zero": make._text(lambda t: t.replace(b'"data_offsets": [0, ', b'"data_offsets": [-0, ', 1)),
    "entry, exponent": make._text(lambda t: t.replace(b'"data_offsets": [0, ', b'"data_offsets": [0e0, ', 1)),
    "entry, offsets a string": _header(lambda h: h["0.weight"].update(data_offsets="ab")),
    "entry, offsets an object": _header(lambda h: h["0.weight"].update(data_offsets={"0": 0, "24": 24})),
    "layout, unknown field": make._file(make._set(1, "weight_ih", "block", "none")),
    "zoneout, a whole number": make._file(make._set(1, "zoneout", 0)),
    "zoneout, minus zero": make._file(make._set(1, "zoneout", -0.0)),
    "zoneout, one": make._file(make._set(1, "zoneout", 1)),
    "zoneout, nearly one": make._file(make._set(1, "zoneout", 1 - 2.0**-53)),
    "zoneout, small": make._file(make._set(1, "zoneout", 1e-300)),
    "op, a key with an escape": make._file(
        lambda f: f.meta.update(ops=json.dumps(f.ops).replace('"op"', r'"\u006fp"'))
    ),
    "version, a number like": make._file(lambda f: f.meta.update(sparsefold="1 ")),
    "checksum, capital": make._file(lambda f: f.meta.update(crc32=f"{zlib.crc32(f.data()):08X}")),
    "packed": make.packed().bytes(),
    "packed, at odd places": make._packed(_moved),
    "packed, minus zero beyond the gate": make._packed(
        lambda f: f.tensors.update(
            {
                "2.weight.live": ["U8", [2, 1, 2], bytes([0, 1, 1, 0])],
                "2.weight.values": ["F32", [2, 1, 2, 1], make._f32(0.5, -0.0, 1.0, 0.75)],
            }
        )
    ),
    "cluster": make._file(make._cluster()),
    "two clusters": make._file(make._two_clusters(3)),
    "norm, epsilon one": make._file(make._norm(epsilon=1)),
    "norm, least epsilon": make._file(make._norm(epsilon=1e-12)),
    "norm, less epsilon": make._file(make._norm(epsilon=9.999999999999999e-13)),
    "norm, epsilon true": make._file(make._norm(epsilon=True)),
    "relu, minus zero": make._file(
        lambda f: f.meta.update(ops=json.dumps([*f.ops, {"op": "relu", "units": -1}]).replace("-1", "-0"))
    ),
    "relu": make._file(make._relu(3, units=3)),
    "lstm": make._file(lambda f: (make._lstm(f), f.tensors.update({"1.bias_hh": ["F32", [8], b"\0" * 32]}))),
    "rnn": make._file(make._rnn(nonlinearity="relu")),
    "rnn, another field": make._file(make._rnn(nonlinearity="relu", units=2)),
    "no ops at all": make._file(lambda f: f.tensors.clear()),
}


@pytest.mark.parametrize("name", CORNERS)
def test_both_readers_give_one_verdict_in_the_corners(name, lib):
    python, c, message = verdicts(lib, CORNERS[name])
    assert python == c, message


def test_both_verdicts_occur_in_the_corners(lib):
    accepted = [name for name, raw in CORNERS.items() if verdicts(lib, raw)[0]]
    assert len(CORNERS) / 4 < len(accepted) < len(CORNERS) * 3 / 4


@pytest.mark.parametrize("sound", [make.SOUND, make.packed().bytes()], ids=["sound", "packed"])
def test_every_changed_byte_gets_one_verdict(sound, lib):
    """Each byte of a sound file in turn is another one, and the checksum is right again."""
    r = cases.rng(11)
    accepted = 0
    for place in range(8, len(sound)):
        raw = bytearray(sound)
        raw[place] = int(r.choice(np.frombuffer(b'0123456789"[]{},:.-eE\\untrueflas \xff', np.uint8)))
        python, c, message = verdicts(lib, make.resealed(bytes(raw), sound))
        assert python == c, (place, bytes(raw[place - 10 : place + 10]), message)
        accepted += python
    assert 100 < accepted < len(sound) / 2


@pytest.mark.parametrize(
    "storage", ["csc", cases.Overlay(4), cases.Overlay(4, 5), cases.Overlay(33, 5), cases.Overlay(2, 64)], ids=str
)
def test_a_packed_matrix_at_an_odd_address_gives_the_bits_of_python(storage, lib):
    """Three bytes of ``live`` before it shift its arrays, and the file itself lies at every remainder of four."""
    r = cases.rng(23)
    program = Program(
        (cases.linear(r, 3, 1, cases.Overlay(1)), cases.linear(r, 1, 1), cases.gru(r, 1, 147, storage, 0.6))
    )
    x, raw = cases.sequence(program, 5), program.to_bytes()
    expected = sf.Engine(program).stream().run(x)
    buffer = ctypes.create_string_buffer(len(raw) + 4)
    for shift in range(4):
        ctypes.memmove(ctypes.addressof(buffer) + shift, raw, len(raw))
        engine, out = c_void_p(), np.empty(147, np.float32)
        at = ctypes.cast(ctypes.addressof(buffer) + shift, c_char_p)
        assert lib.sparsefold_load(at, len(raw), None, byref(engine), None, 0) == OK
        stream = lib.sparsefold_stream_new(engine)
        for values, wanted in zip(x, expected, strict=True):
            assert lib.sparsefold_step_values(stream, floats(values), floats(out)) == OK
            assert out.tobytes() == wanted.tobytes()
        lib.sparsefold_stream_free(stream)
        lib.sparsefold_free(engine)


def test_every_cut_is_refused_by_both(lib):
    for size in range(len(make.SOUND)):
        assert verdicts(lib, make.SOUND[:size])[:2] == (False, False)


# --- many streams at once ------------------------------------------------------------------------------------------------


def batch(lib, engine, streams, x, takes_tokens, y):
    """The status of one step of ``streams``."""
    handles = (c_void_p * len(streams))(*streams)
    if takes_tokens:
        x = np.array(x, np.int64).ctypes.data_as(POINTER(c_int64))
        return lib.sparsefold_step_batch_tokens(engine, handles, len(streams), x, floats(y))
    return lib.sparsefold_step_batch_values(engine, handles, len(streams), floats(x), floats(y))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", cases.NETWORKS)
def test_a_batch_gives_the_bits_of_python(name, threads, lib):
    program = network(name)
    inputs = np.stack([cases.sequence(program, 6, salt) for salt in range(19)], 1)
    _, engine, _ = load(lib, program.to_bytes())
    assert lib.sparsefold_set_threads(engine, threads) == OK
    streams = [lib.sparsefold_stream_new(engine) for _ in range(19)]
    expected, y = [sf.Engine(program).stream() for _ in streams], np.empty((19, program.outputs), np.float32)
    for x in inputs:
        assert batch(lib, engine, streams, x, program.takes_tokens, y) == OK
        steps = [s.step(int(v) if program.takes_tokens else v) for s, v in zip(expected, x, strict=True)]
        assert y.tobytes() == np.stack(steps).tobytes()
    count, value = c_size_t(1), (c_uint64 * 1)()
    for stream in streams:
        assert lib.sparsefold_counters(stream, 0, STEPS, value, byref(count)) == OK and value[0] == 6
        lib.sparsefold_stream_free(stream)
    lib.sparsefold_free(engine)


def test_a_refused_batch_changes_nothing(lib):
    (_, engine, _), (_, other, _) = load(lib, make.SOUND), load(lib, make.SOUND)
    a, b, foreign = (lib.sparsefold_stream_new(e) for e in (engine, engine, other))
    y = np.full((3, 3), 7, np.float32)
    for streams, tokens, status in [
        ([a, b, a], [0, 1, 2], ARGUMENT), ([a, foreign], [0, 1], ARGUMENT), ([a, None], [0, 1], ARGUMENT),
        ([a, b], [0, 3], TOKEN), ([a, b], [-1, 0], TOKEN),
    ]:  # fmt: skip
        assert batch(lib, engine, streams, tokens, True, y) == status
    assert batch(lib, engine, [a], np.zeros((1, 3)), False, y) == ARGUMENT
    assert batch(lib, None, [a], [0], True, y) == ARGUMENT
    one, token = (c_void_p * 1)(a), (c_int64 * 1)(0)
    assert lib.sparsefold_step_batch_tokens(engine, None, 1, token, floats(y)) == ARGUMENT
    assert lib.sparsefold_step_batch_tokens(engine, one, 1, None, floats(y)) == ARGUMENT
    assert lib.sparsefold_step_batch_tokens(engine, one, 1, token, None) == ARGUMENT
    assert lib.sparsefold_step_batch_tokens(engine, None, 0, None, None) == OK
    for threads in (0, 257, 2**64 - 1):
        assert lib.sparsefold_set_threads(engine, threads) == ARGUMENT
    assert lib.sparsefold_set_threads(None, 1) == ARGUMENT
    assert (y == 7).all()
    count, value = c_size_t(1), (c_uint64 * 1)()
    for stream in (a, b, foreign):
        assert lib.sparsefold_counters(stream, 0, STEPS, value, byref(count)) == OK and value[0] == 0
    assert batch(lib, engine, [a, b], [0, 1], True, y) == OK  # no claim was left behind
    for stream in (a, b, foreign):
        lib.sparsefold_stream_free(stream)
    lib.sparsefold_free(engine)
    lib.sparsefold_free(other)


# --- what a caller can do wrong ------------------------------------------------------------------------------------------


def test_wrong_arguments_are_statuses(lib):
    assert lib.sparsefold_abi_version() == 1
    texts = [lib.sparsefold_status_text(status).decode() for status in range(9)]
    assert len(set(texts)) == 9 and all(t.endswith(".") for t in texts)
    engine, message = c_void_p(), ctypes.create_string_buffer(400)
    status, _, said = load(lib, make.SOUND, b"sse9")
    assert status == ARGUMENT and "'sse9' is not available" in said
    assert lib.sparsefold_load(None, 5, None, byref(engine), message, 400) == ARGUMENT
    assert lib.sparsefold_load(None, 0, None, byref(engine), message, 400) == PROGRAM
    assert lib.sparsefold_load(make.SOUND, len(make.SOUND), None, None, message, 400) == ARGUMENT
    assert lib.sparsefold_load(b"", 0, None, byref(engine), None, 0) == PROGRAM
    assert lib.sparsefold_load(b"", 0, None, byref(engine), message, 10) == PROGRAM and message.value == b"the file "
    assert lib.sparsefold_load_file(None, None, byref(engine), message, 400) == ARGUMENT
    assert lib.sparsefold_load_file(b"/nowhere/a.sfold", None, byref(engine), message, 400) == READ
    assert message.value == b"cannot read /nowhere/a.sfold: No such file or directory."
    assert lib.sparsefold_load_file(b"/", None, byref(engine), message, 400) == READ
    assert message.value == b"cannot read /: Is a directory."
    assert not lib.sparsefold_describe(None) and not lib.sparsefold_stream_new(None)
    lib.sparsefold_free(None)
    lib.sparsefold_stream_free(None)
    assert lib.sparsefold_stream_reset(None) == ARGUMENT


def test_a_refused_step_changes_nothing(lib):
    _, engine, _ = load(lib, make.SOUND)
    stream, y = lib.sparsefold_stream_new(engine), np.full(3, 7, np.float32)
    for token in (-1, 3, 2**62, -(2**63)):
        assert lib.sparsefold_step_token(stream, token, floats(y)) == TOKEN
    assert lib.sparsefold_step_token(None, 0, floats(y)) == ARGUMENT
    assert lib.sparsefold_step_token(stream, 0, None) == ARGUMENT
    assert lib.sparsefold_step_values(stream, floats(np.zeros(3)), floats(y)) == ARGUMENT
    assert (y == 7).all()
    count, values = c_size_t(1), (c_uint64 * 1)()
    assert lib.sparsefold_counters(stream, 1, EVENTS, values, byref(count)) == ARGUMENT and count.value == 2
    assert lib.sparsefold_counters(stream, 3, EVENTS, values, byref(count)) == ARGUMENT
    assert lib.sparsefold_counters(stream, 0, 5, values, byref(count)) == ARGUMENT
    assert lib.sparsefold_counters(stream, 0, STEPS, values, None) == ARGUMENT
    count.value = 1
    assert lib.sparsefold_counters(stream, 0, STEPS, values, byref(count)) == OK and values[0] == 0
    first = np.empty(3, np.float32)
    for _ in range(2):  # a reset is a new beginning
        assert lib.sparsefold_step_token(stream, 1, floats(first)) == OK
        assert first.tobytes() == sf.Engine(Program.from_bytes(make.SOUND)).stream().step(1).tobytes()
        assert lib.sparsefold_stream_reset(stream) == OK
    lib.sparsefold_stream_free(stream)
    lib.sparsefold_free(engine)


def test_two_threads_on_one_stream_are_told(lib):
    program = Program((cases.egru(cases.rng(1), 600, 600, output="state"),))
    _, engine, _ = load(lib, program.to_bytes())
    stream = lib.sparsefold_stream_new(engine)
    seen = set()

    def work():
        x, y = np.ones(600, np.float32), np.empty(600, np.float32)
        for _ in range(200):
            seen.add(lib.sparsefold_step_values(stream, floats(x), floats(y)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen <= {OK, BUSY} and OK in seen
    lib.sparsefold_stream_free(stream)
    lib.sparsefold_free(engine)


# --- the example ---------------------------------------------------------------------------------------------------------


def run(embed, *words, given=""):
    return subprocess.run([embed, *map(str, words)], input=given, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["tokens-block", "mixed-3", "three"])
def test_the_example_prints_what_python_computes(name, embed, tmp_path, request):
    program = network(name)
    program.save(tmp_path / "a.sfold")
    x = cases.sequence(program, 25)
    done = run(embed, tmp_path / "a.sfold", given="\n".join(" ".join(map(str, np.atleast_1d(v))) for v in x))
    assert done.returncode == 0, done.stderr
    out = np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()], np.float32)
    expected = sf.Engine(program).stream().run(x)
    if (
        request.node.callspec.params["embed"] == "address,undefined"
    ):  # other flags contract other products to one rounding
        np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.FREE_RUNNING_F32)
    else:
        assert out.tobytes() == expected.tobytes()
    assert done.stderr.startswith("25 steps, ") and "us each" in done.stderr
    assert any(isinstance(op, EGRU) for op in program.ops)


def test_the_example_generates(embed, tmp_path):
    program = network("tokens")
    program.save(tmp_path / "a.sfold")
    lines = run(embed, tmp_path / "a.sfold", 5).stdout.splitlines()
    stream, token = sf.Engine(program).stream(), 0
    for line in lines:
        out = stream.step(token)
        np.testing.assert_allclose([float(v) for v in line.split()], out, rtol=0, atol=tolerances.FREE_RUNNING_F32)
        token = int(out.argmax())
    assert len(lines) == 5


def test_the_example_says_what_is_wrong(embed, tmp_path):
    sound, damaged = tmp_path / "a.sfold", tmp_path / "b.sfold"
    sound.write_bytes(make.SOUND)
    damaged.write_bytes(make.ATTACKS["data_flipped"][0])
    for words, given, said in [
        ((), "", "usage: embed FILE [STEPS]"),
        ((sound, "-3"), "", "usage"),
        ((sound, "x"), "", "usage"),
        ((tmp_path / "none.sfold",), "", "No such file"),
        ((tmp_path,), "", "Is a directory"),
        ((damaged,), "", "does not match its checksum: the file is damaged. Copy it again (at byte "),
        ((sound,), "1 3", "outside the vocabulary"),
        ((sound,), "1 b", "not a list of numbers"),
    ]:
        done = run(embed, *words, given=given)
        assert done.returncode == 2 and said in done.stderr and "Sanitizer" not in done.stderr, done.stderr
    assert run(embed, sound, given="").returncode == 0


def test_the_reader_under_the_sanitizers(embed):
    for path in sorted((ROOT / "tests/attacks").glob("*.sfold")):
        done = run(embed, path, 3)
        assert done.returncode == 2 and done.stderr.startswith("embed: "), (path, done.stderr)
