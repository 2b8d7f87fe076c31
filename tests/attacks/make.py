"""Makes the broken files of this folder: ``python tests/attacks/make.py``. Each breaks one thing of one sound program.

``ATTACKS`` maps a file's name to (bytes, words that the refusal must hold). The writer here is its own, so that it can write
what ``Program.to_bytes`` never would.
"""

from __future__ import annotations

import json
import struct
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class File:
    """A program taken apart: tensors as (name, dtype, shape, data), ops and metadata as JSON values."""

    def __init__(self) -> None:
        f32 = lambda *v: struct.pack(f"<{len(v)}f", *v)  # noqa: E731
        u32 = lambda *v: struct.pack(f"<{len(v)}I", *v)  # noqa: E731
        ramp = lambda n: f32(*(((7 * i) % 11 - 5) / 8 for i in range(n)))  # noqa: E731
        self.tensors = {
            "0.weight": ["F32", [3, 2], ramp(6)],
            "1.weight_ih.values": ["F32", [6, 2], ramp(12)],
            "1.weight_hh.values": ["F32", [3, 1, 2], ramp(6)],
            "1.weight_hh.block_row": ["U32", [3], u32(0, 2, 1)],
            "1.weight_hh.start": ["U32", [3], u32(0, 2, 3)],
            "1.bias_ih": ["F32", [6], ramp(6)],
            "1.bias_hh": ["F32", [6], ramp(6)],
            "1.threshold": ["F32", [2], f32(0.1, 0.0)],
            "2.weight.values": ["F32", [3, 2], ramp(6)],
            "2.bias": ["F32", [3], ramp(3)],
        }
        self.ops: Any = [
            {"op": "embedding"},
            {
                "op": "egru",
                "weight_ih": {"format": "dense", "rows": 6, "cols": 2, "gates": 3},
                "weight_hh": {"format": "block", "rows": 6, "cols": 2, "gates": 3, "block": [2, 1]},
                "reset_after": True, "reset": "threshold", "event": "threshold", "output": "events", "zoneout": 0.0,
            },
            {"op": "linear", "weight": {"format": "dense", "rows": 3, "cols": 2, "gates": 1}},
        ]  # fmt: skip
        self.meta: dict[str, Any] = {"sparsefold": "1", "metadata": "{}"}
        self.trailing = b""

    def header(self) -> dict[str, Any]:
        """What stands in front of the data, checksum included."""
        header: dict[str, Any] = {"__metadata__": {"crc32": f"{zlib.crc32(self.data()):08x}", **self.meta}}
        header["__metadata__"].setdefault("ops", json.dumps(self.ops))
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        return header

    def data(self) -> bytes:
        """Everything behind the header."""
        return b"".join(t[2] for t in self.tensors.values()) + self.trailing

    def bytes(self, header: Any = None) -> bytes:
        """The file; ``header`` instead of its own where given (text is taken as it is)."""
        header = self.header() if header is None else header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + self.data()


SOUND = File().bytes()


def checksum(raw: bytes) -> bytes:
    """What the header of these bytes should say of the data."""
    return f"{zlib.crc32(raw[8 + struct.unpack_from('<Q', raw)[0] :]):08x}".encode()


def resealed(raw: bytes, sound: bytes = SOUND) -> bytes:
    """The file with the checksum of what its data is now, where the place of that of ``sound`` was not touched."""
    at = raw.find(checksum(sound))
    return raw if len(raw) < 8 or at < 0 else raw[:at] + checksum(raw) + raw[at + 8 :]


def packed() -> File:
    """The same network with its recurrent matrix stored as csc and its decoder complementary."""
    file = File()
    file.ops[1]["weight_hh"] = {"format": "csc", "rows": 6, "cols": 2, "gates": 3}
    file.ops[2]["weight"] = {"format": "complementary", "rows": 3, "cols": 2, "gates": 1, "overlay": 2, "group": 1}
    for name in ("block_row", "start", "values"):
        del file.tensors[f"1.weight_hh.{name}"]
    f32 = _f32(0.5, -0.25, 1.0, 0.75)
    file.tensors |= {
        "1.weight_hh.values": ["F32", [4], f32], "1.weight_hh.row": ["U16", [4], _u16(0, 3, 5, 1)],
        "1.weight_hh.start": ["U32", [3], _u32(0, 3, 4)],
        "2.weight.values": ["F32", [2, 1, 2, 1], f32], "2.weight.live": ["U8", [2, 1, 2], bytes([0, 0, 1, 0])],
    }  # fmt: skip
    return file


def _file(change: Any, sound: Any = File) -> bytes:
    """The sound file with ``change(file)`` applied."""
    file = sound()
    change(file)
    return file.bytes()


def _packed(change: Any) -> bytes:
    """The same of :func:`packed`."""
    return _file(change, packed)


def _header(change: Any) -> bytes:
    """The sound file whose header was changed after its offsets were made."""
    file = File()
    header = deepcopy(file.header())
    change(header)
    return file.bytes(header)


def _text(change: Any) -> bytes:
    """The sound file with the header's JSON text changed."""
    file = File()
    return file.bytes(change(json.dumps(file.header()).encode()))


def _set(*path: Any) -> Any:
    """A change that sets ops[path[0]][...][path[-2]] = path[-1]."""

    def change(file: File) -> None:
        target = file.ops
        for key in path[:-2]:
            target = target[key]
        target[path[-2]] = path[-1]

    return change


def _tensor(name: str, dtype: str | None = None, shape: list[int] | None = None, data: bytes | None = None) -> Any:
    """A change of one tensor, checksum and offsets adjusted."""

    def change(file: File) -> None:
        old = file.tensors.get(name, ["F32", [0], b""])
        new = [dtype, shape, data]
        file.tensors[name] = [o if n is None else n for o, n in zip(old, new, strict=True)]

    return change


def _entry(name: str, **changed: Any) -> Any:
    return lambda header: header[name].update(changed)


def _u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _u16(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def _f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _weight(at: int, value: float) -> Any:
    def change(file: File) -> None:
        data = bytearray(file.tensors["1.weight_ih.values"][2])
        struct.pack_into("<f", data, 4 * at, value)
        file.tensors["1.weight_ih.values"][2] = bytes(data)

    return change


def _foreign() -> bytes:
    """What another program would write: safetensors, no word of ours."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 1.0)


def _empty_tensor(header: dict[str, Any], shape: Any) -> None:
    end = max(e["data_offsets"][1] for name, e in header.items() if name != "__metadata__")
    header["3.more"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}


def _swap(header: dict[str, Any]) -> None:
    """Two tensors of one size read the same bytes, and nobody reads the other's."""
    header["1.bias_hh"]["data_offsets"] = header["1.bias_ih"]["data_offsets"]


def _outside(header: dict[str, Any]) -> None:
    """The last tensor announces four terabytes."""
    first = header["2.bias"]["data_offsets"][0]
    header["2.bias"].update(shape=[2**40], data_offsets=[first, first + 2**42])


def _huge_block(file: File) -> None:
    """2^26 units announced by three small tensors."""
    n = 2**26
    file.ops[1]["weight_hh"].update(rows=3 * n, cols=n, block=[64, 64])
    file.ops[1]["weight_ih"].update(rows=3 * n)


def _cell(kind: str, **options: Any) -> Any:
    """Op 1, of three gates, under another name."""

    def change(file: File) -> None:
        keep = {k: file.ops[1][k] for k in ("weight_ih", "weight_hh")}
        file.ops[1] = {"op": kind, **keep, **options}
        del file.tensors["1.threshold"]

    return change


def _gates(file: File, gates: int, kind: str, **options: Any) -> None:
    """Op 1 as a cell of two units with dense matrices of ``gates`` gates; the biases stay as long as they were."""
    _cell(kind, **options)(file)
    for name in ("weight_ih", "weight_hh"):
        file.ops[1][name] = {"format": "dense", "rows": 2 * gates, "cols": 2, "gates": gates}
        file.tensors[f"1.{name}.values"] = ["F32", [2 * gates, 2], b"\0" * 16 * gates]
    for name in ("block_row", "start"):
        del file.tensors[f"1.weight_hh.{name}"]


def _delta_w8a8(file: File) -> None:
    """Changes that the recurrent matrix, of codes, would round."""
    _gates(file, 3, "gru", reset_after=True, delta_hidden=0.1)
    file.ops[1]["weight_hh"]["precision"] = "w8a8"
    file.tensors["1.weight_hh.values"] = ["I8", [6, 2], bytes(12)]
    file.tensors["1.weight_hh.scale"] = ["F32", [6], _f32(*[1] * 6)]


def _lstm(file: File) -> None:
    _gates(file, 4, "lstm")
    file.tensors["1.bias_ih"] = ["F32", [8], b"\0" * 32]


def _rnn(**options: Any) -> Any:
    def change(file: File) -> None:
        _gates(file, 1, "rnn", **options)
        for name in ("bias_ih", "bias_hh"):
            file.tensors[f"1.{name}"] = ["F32", [2], b"\0" * 8]

    return change


def _relu(at: int, **options: Any) -> Any:
    """A relu as op ``at``: the last one, or the only one."""

    def change(file: File) -> None:
        file.ops[at:] = [{"op": "relu", **options}]
        if not at:
            file.tensors.clear()

    return change


def _weightless(kind: str, *more: dict[str, Any], at: int = 3, **options: Any) -> Any:
    """An op without weights as op ``at``, the last one but for ``more``."""

    def change(file: File) -> None:
        file.ops[at:] = [{"op": kind, **options}, *more]
        if not at:
            file.tensors.clear()

    return change


def _norm(*changes: Any, **options: Any) -> Any:
    """A layer_norm as op 3, the last one, with further changes of its tensors."""

    def change(file: File) -> None:
        file.ops.append({"op": "layer_norm", **options})
        for name in ("3.weight", "3.bias"):
            file.tensors[name] = ["F32", [3], b"\0" * 12]
        for more in changes:
            more(file)

    return change


def _reverse(said: Any = True, **options: Any) -> Any:
    """Op 1 as a gru, and once more behind it, reading backwards; the decoder is left out."""

    def change(file: File) -> None:
        _cell("gru", reset_after=True)(file)
        file.ops[2:] = [{**deepcopy(file.ops[1]), "reverse": said, **options}]
        kept = {name: t for name, t in file.tensors.items() if not name.startswith("2.")}
        file.tensors = kept | {f"2{name[1:]}": list(t) for name, t in kept.items() if name.startswith("1.")}

    return change


def _reverse_alone(file: File) -> None:
    """Op 1 reads backwards what an embedding reads."""
    _reverse()(file)
    file.ops[1]["reverse"] = True
    del file.ops[2]
    file.tensors = {name: t for name, t in file.tensors.items() if not name.startswith("2.")}


def _reverse_of_an_egru(file: File) -> None:
    """A gru that reads backwards what an egru reads."""
    _reverse()(file)
    file.ops[1] = File().ops[1]
    file.tensors["1.threshold"] = File().tensors["1.threshold"]


def _reverse_of_one_unit(file: File) -> None:
    """The direction that reads backwards has one unit, the other two."""
    _reverse()(file)
    for name, cols in (("weight_ih", 2), ("weight_hh", 1)):
        file.ops[2][name] = {"format": "dense", "rows": 3, "cols": cols, "gates": 3}
        file.tensors[f"2.{name}.values"] = ["F32", [3, cols], bytes(12 * cols)]
        file.tensors[f"2.bias_{name[-2:]}"] = ["F32", [3], bytes(12)]
    for name in ("block_row", "start"):
        del file.tensors[f"2.weight_hh.{name}"]


def _reverse_too_wide(file: File) -> None:
    """A linear op of two inputs behind two directions of two units each."""
    _reverse()(file)
    sound = File()
    file.ops.append(sound.ops[2])
    file.tensors |= {f"3{name[1:]}": t for name, t in sound.tensors.items() if name.startswith("2.")}


def _conv(*changes: Any, groups: int = 1, **options: Any) -> Any:
    """A conv1d of two taps as op 3, the last one; every output reads the input of its own number. Then further changes."""

    def change(file: File) -> None:
        layout = {"format": "dense", "rows": 3, "cols": 6, "gates": 1}
        file.ops.append({"op": "conv1d", "weight": layout, "kernel": 2, "dilation": 2, "groups": groups, **options})
        eye = [float(row == column % 3) for row in range(3) for column in range(6)]
        file.tensors |= {"3.weight.values": ["F32", [3, 6], _f32(*eye)], "3.bias": ["F32", [3], _f32(1, 2, 3)]}
        for more in changes:
            more(file)

    return change


def _conv_in_blocks(file: File) -> None:
    """One block of 2 x 2 that joins what three groups part."""
    file.ops[3]["weight"] = {"format": "block", "rows": 3, "cols": 6, "gates": 1, "block": [2, 2]}
    file.tensors |= {
        "3.weight.values": ["F32", [1, 2, 2], _f32(1, 1, 0, 1)], "3.weight.block_row": ["U32", [1], _u32(0)],
        "3.weight.start": ["U32", [4], _u32(0, 1, 1, 1)],
    }  # fmt: skip


def _conv_complementary(file: File) -> None:
    """One row of three in every column, and not the one of its group in the last."""
    file.ops[3]["weight"] = {"format": "complementary", "rows": 3, "cols": 6, "gates": 1, "overlay": 3, "group": 1}
    file.tensors |= {
        "3.weight.values": ["F32", [6, 1, 1, 1], _f32(1, 1, 1, 1, 1, 1)],
        "3.weight.live": ["U8", [6, 1, 1], bytes([0, 1, 2, 0, 1, 1])],
    }  # fmt: skip


def _cluster(*changes: Any, **options: Any) -> Any:
    """A log_softmax of the three outputs, and the last of them as a cluster of two words by way of one number."""

    def change(file: File) -> None:
        layout = {"format": "dense", "gates": 1}
        file.ops.append({"op": "log_softmax", "units": 3})
        projection, weight = {**layout, "rows": 1, "cols": 2}, {**layout, "rows": 2, "cols": 1}
        file.ops.append({"op": "cluster", "projection": projection, "weight": weight, "units": 3, "at": 2, **options})
        file.tensors |= {
            "4.projection.values": ["F32", [1, 2], _f32(1, -1)], "4.weight.values": ["F32", [2, 1], _f32(1, 2)],
            "4.bias": ["F32", [2], _f32(0, 1)],
        }  # fmt: skip
        for more in changes:
            more(file)

    return change


def _two_clusters(at: int) -> Any:
    """The same, and behind the first cluster, at 1, another."""

    def change(file: File) -> None:
        _cluster(at=1)(file)
        file.ops.append({**deepcopy(file.ops[4]), "units": 4, "at": at})
        file.tensors |= {f"5{name[1:]}": list(t) for name, t in file.tensors.items() if name.startswith("4.")}

    return change


def _cluster_behind(*ops: dict[str, Any], after: int) -> Any:
    """The cluster behind ``ops`` that follow op ``after``, the last one that is left."""

    def change(file: File) -> None:
        _cluster()(file)
        at = after + 1 + len(ops)
        file.ops = [*file.ops[: after + 1], *ops, file.ops[4]]
        moved = {f"{at}{name[1:]}": t for name, t in file.tensors.items() if name.startswith("4.")}
        file.tensors = {name: t for name, t in file.tensors.items() if int(name[0]) <= after} | moved

    return change


def _cluster_of_two_gates(name: str) -> Any:
    """One matrix of the cluster in two gates of a row each."""

    def change(file: File) -> None:
        rows, cols = 2, 2 if name == "projection" else 1
        file.ops[4][name].update(rows=rows, gates=2)
        file.tensors[f"4.{name}.values"] = ["F32", [rows, cols], bytes(4 * rows * cols)]
        if name == "projection":
            file.ops[4]["weight"]["cols"] = 2
            file.tensors["4.weight.values"] = ["F32", [2, 2], bytes(16)]

    return change


def _cluster_of_three_inputs(file: File) -> None:
    """A projection of three columns, where the linear op reads two."""
    file.ops[4]["projection"]["cols"] = 3
    file.tensors["4.projection.values"] = ["F32", [1, 3], bytes(12)]


def _cluster_of_two_numbers(file: File) -> None:
    """A weight of two columns behind a projection of one row."""
    file.ops[4]["weight"]["cols"] = 2
    file.tensors["4.weight.values"] = ["F32", [2, 2], bytes(16)]


def _cluster_w8a8(file: File) -> None:
    """A projection of codes, which would round the events that it reads."""
    file.ops[4]["projection"]["precision"] = "w8a8"
    file.tensors["4.projection.values"] = ["I8", [1, 2], bytes(2)]
    file.tensors["4.projection.scale"] = ["F32", [1], _f32(1)]


def _wide_block(file: File) -> None:
    """A linear of 2^28 - 1 inputs with no block at all."""
    file.ops = [
        {"op": "linear", "weight": {"format": "block", "rows": 3, "cols": 2**28 - 1, "gates": 1, "block": [64, 64]}}
    ]
    file.tensors = {
        "0.weight.values": ["F32", [0, 64, 64], b""], "0.weight.block_row": ["U32", [0], b""],
        "0.weight.start": ["U32", [3], _u32(0, 0, 0)], "0.bias": ["F32", [3], b"\0" * 12],
    }  # fmt: skip


def _wide_codes(file: File) -> None:
    """A linear of more inputs than 32 bits hold the sums of codes of, with no block at all."""
    layout = {"format": "block", "rows": 3, "cols": 133_145, "gates": 1, "block": [64, 64], "precision": "w8a8"}
    file.ops = [{"op": "linear", "weight": layout}]
    file.tensors = {
        "0.weight.values": ["I8", [0, 64, 64], b""], "0.weight.block_row": ["U32", [0], b""],
        "0.weight.start": ["U32", [2082], bytes(4 * 2082)], "0.weight.scale": ["F32", [3], _f32(1, 1, 1)],
        "0.bias": ["F32", [3], b"\0" * 12],
    }  # fmt: skip


def _three_gates(file: File) -> None:
    """The decoder as three gates of one row."""
    file.ops[2]["weight"]["gates"] = 3
    file.tensors |= {"2.weight.values": ["F32", [2, 3, 1, 1], bytes(24)], "2.weight.live": ["U8", [2, 3, 1], bytes(6)]}


HH, DECODER = "1.weight_hh", "2.weight"
ATTACKS: dict[str, tuple[bytes, str]] = {
    # the container
    "empty": (b"", "0 bytes; a program has at least 8"),
    "seven_bytes": (SOUND[:7], "7 bytes"),
    "only_a_length": (SOUND[:8], "announce a header"),
    "length_zero": (struct.pack("<Q", 0) + SOUND[8:], "not valid JSON"),
    "length_huge": (struct.pack("<Q", 2**62) + SOUND[8:], "announce a header of 4611686018427387904 bytes"),
    "length_like_minus_one": (b"\xff" * 8 + SOUND[8:], "announce a header of 18446744073709551615 bytes"),
    "length_one_more_than_the_file": (struct.pack("<Q", len(SOUND) - 7) + SOUND[8:], "announce a header"),
    "length_one_less": (struct.pack("<Q", struct.unpack_from("<Q", SOUND)[0] - 1) + SOUND[8:], "not valid JSON"),
    "length_one_more": (struct.pack("<Q", struct.unpack_from("<Q", SOUND)[0] + 1) + SOUND[8:], "not valid JSON"),
    "cut_in_the_header": (SOUND[:200], "cut off"),
    "cut_in_the_data": (SOUND[:-5], "cut off"),
    "header_not_utf8": (_text(lambda t: t.replace(b"embedding", b"\xff\xfe\xfdedding")), "not UTF-8"),
    "header_not_json": (_text(lambda t: b"<?xml" + t), "not valid JSON"),
    "header_utf16": (_text(lambda t: t.decode().encode("utf-16")[:1500]), "not"),
    "header_a_list": (_text(lambda t: b"[" + t + b"]"), "header is not an object"),
    "header_a_number": (_text(lambda t: b"17"), "header is not an object"),
    "header_key_twice": (_text(lambda t: t[:-1] + b', "2.bias": {}}'), "a key occurs twice"),
    "header_metadata_twice": (_text(lambda t: t[:-1] + b', "__metadata__": {}}'), "a key occurs twice"),
    "header_nested": (_text(lambda t: b'{"a":' * 700), "not valid JSON"),
    "header_lists_nested": (_text(lambda t: b"[" * 3000), "not valid JSON"),
    "header_long_number": (_text(lambda t: t.replace(b"[3, 2]", b"[" + b"9" * 1200 + b", 2]", 1)), "needs dtype"),
    # the metadata
    "no_metadata": (_header(lambda h: h.pop("__metadata__")), "not a sparsefold program"),
    "foreign_safetensors": (_foreign(), "not a sparsefold program: compile the model first"),
    "metadata_a_list": (_header(lambda h: h.update(__metadata__=[])), "map names to strings"),
    "metadata_a_number": (_header(lambda h: h["__metadata__"].update(sparsefold=1)), "map names to strings"),
    "version_2": (_file(lambda f: f.meta.update(sparsefold="2")), "format version '2'"),
    "crc_wrong": (_file(lambda f: f.meta.update(crc32="00000000")), "does not match its checksum"),
    "crc_missing": (_header(lambda h: h["__metadata__"].pop("crc32")), "does not match its checksum"),
    "data_flipped": (SOUND[:-1] + bytes([SOUND[-1] ^ 1]), "does not match its checksum"),
    "ops_missing": (_header(lambda h: h["__metadata__"].pop("ops")), "the op list is not valid JSON"),
    "ops_not_json": (_file(lambda f: f.meta.update(ops="[{")), "the op list is not valid JSON"),
    "ops_an_object": (_file(lambda f: f.meta.update(ops='{"op": "linear"}')), "must hold 1 to 1024 ops"),
    "ops_empty": (_file(lambda f: f.meta.update(ops="[]")), "must hold 1 to 1024 ops"),
    "ops_nested": (_file(lambda f: f.meta.update(ops="[" * 2000)), "the op list is not valid JSON"),
    "ops_too_many": (_file(lambda f: f.meta.update(ops="[" + "1," * 1024 + "1]")), "must hold 1 to 1024 ops"),
    "free_metadata_nested": (_file(lambda f: f.meta.update(metadata='{"a":' + "[" * 64 + "]" * 64 + "}")), "nested too deeply"),
    "free_metadata_a_list": (_file(lambda f: f.meta.update(metadata="[]")), "metadata must be an object"),
    "free_metadata_not_json": (_file(lambda f: f.meta.update(metadata="{")), "the metadata is not valid JSON"),
    # the tensors
    "tensors_overlap": (_header(_swap), "does not follow the one before it"),
    "tensors_overlap_partly": (_header(_entry("2.bias", data_offsets=[0, 12])), "does not follow"),
    "hole": (_header(lambda h: h.pop("1.bias_ih")), "does not follow the one before it"),
    "tensor_backwards": (_header(_entry("2.bias", data_offsets=[240, 228])), "does not follow"),
    "trailing_bytes": (_file(lambda f: setattr(f, "trailing", b"more")), "bytes follow the last tensor"),
    "tensor_outside_the_file": (_header(_outside), "cut off"),
    "offset_negative": (_header(_entry("0.weight", data_offsets=[-24, 0])), "needs dtype, shape and data_offsets"),
    "offset_a_float": (_header(_entry("0.weight", data_offsets=[0.0, 24.0])), "needs dtype"),
    "offset_true": (_header(_entry("0.weight", data_offsets=[False, 24])), "needs dtype"),
    "offsets_three": (_header(_entry("0.weight", data_offsets=[0, 24, 24])), "needs dtype"),
    "offsets_missing": (_header(lambda h: h["0.weight"].pop("data_offsets")), "needs dtype"),
    "entry_a_string": (_header(lambda h: h.update({"0.weight": "F32"})), "needs dtype"),
    "entry_null": (_header(lambda h: h.update({"0.weight": None})), "needs dtype"),
    "dtype_f64": (_header(_entry("0.weight", dtype="F64", shape=[3, 1])), "has dtype 'F64'; a program holds F32, U32, U16, U8"),
    "dtype_a_list": (_header(_entry("0.weight", dtype=["F32"])), "needs dtype"),
    "dtype_u32_for_weights": (_file(_tensor("2.bias", "U32")), "needs a F32 tensor 2.bias"),
    "dtype_f32_for_indices": (_file(_tensor(HH + ".start", "F32")), "needs a U32 tensor 1.weight_hh.start"),
    "shape_too_large_for_its_bytes": (_header(_entry("0.weight", shape=[3, 3])), "its size is wrong"),
    "shape_negative": (_header(_entry("0.weight", shape=[-3, -2])), "needs dtype"),
    "shape_product_overflows": (_header(_entry("0.weight", shape=[2**33, 2**31, 6])), "size is wrong"),
    "shape_number_too_large": (_header(_entry("0.weight", shape=[2**64, 1])), "needs dtype"),
    "shape_five_axes": (_header(_entry("0.weight", shape=[3, 2, 1, 1, 1])), "needs dtype"),
    "shape_an_object": (_header(lambda h: _empty_tensor(h, {})), "needs dtype"),
    "shape_a_string": (_header(_entry("0.weight", shape="")), "needs dtype"),
    "shape_empty_but_enormous": (_header(lambda h: _empty_tensor(h, [2**47, 2**47, 0])), "too large"),
    "name_of_a_path": (_file(_tensor("../../etc/passwd")), "not made of letters"),
    "name_empty": (_file(_tensor("")), "not made of letters"),
    "name_with_zero": (_file(_tensor("0.weight\0")), "not made of letters"),
    "name_with_newline": (_file(_tensor("0.weight\n")), "not made of letters"),
    "name_surrogate": (_file(_tensor("\ud800")), "not made of letters"),
    "name_long": (_file(_tensor("a" * 201)), "not made of letters"),
    "tensor_extra": (_file(_tensor("9.bias")), "'9.bias' belongs to no op"),
    "tensor_missing": (_file(lambda f: f.tensors.pop("2.bias")), "needs a F32 tensor 2.bias"),
    # the ops
    "op_unknown": (_file(_set(2, "op", "conv")), "op 2 is not one of embedding, linear, conv1d, gru, "),
    "op_a_list": (_file(_set(2, "op", ["linear"])), "op 2 is not one of"),
    "op_a_number": (_file(lambda f: f.ops.__setitem__(2, 7)), "op 2 is not one of"),
    "op_null": (_file(_set(2, "op", None)), "op 2 is not one of"),
    "field_unknown": (_file(_set(1, "bias", True)), "op 1 (egru) has an unknown field 'bias'"),
    "field_of_an_array": (_file(_set(2, "bias", 0)), "op 2 (linear) has an unknown field 'bias'"),
    "field_missing": (_file(lambda f: f.ops[1].pop("reset")), "op 1 (egru) lacks reset"),
    "field_twice": (_file(lambda f: f.meta.update(ops='[{"op": "linear", "op": "gru"}]')), "a key occurs twice"),
    "lstm_of_three_gates": (_file(_cell("lstm")), "2 units need matrices of 8 rows in 4 gates"),
    "rnn_of_three_gates": (_file(_cell("rnn", nonlinearity="tanh")), "2 units need matrices of 2 rows in 1 gate"),
    "lstm_with_a_reset": (_file(_cell("lstm", reset_after=True)), "op 1 (lstm) has an unknown field 'reset_after'"),
    "rnn_without_nonlinearity": (_file(_cell("rnn")), "op 1 (rnn) lacks nonlinearity"),
    "rnn_nonlinearity_a_list": (_file(_rnn(nonlinearity=["tanh"])), "nonlinearity must be tanh or relu"),
    "rnn_nonlinearity_unknown": (_file(_rnn(nonlinearity="gelu")), "nonlinearity must be tanh or relu"),
    "lstm_short_bias": (_file(_lstm), "op 1 (lstm): bias_hh must be (8,), got (6,)"),
    "relu_of_nothing": (_file(_relu(3, units=0)), "units must be a whole number between 1 and 2^28"),
    "relu_of_a_float": (_file(_relu(3, units=3.0)), "units must be a whole number"),
    "relu_of_true": (_file(_relu(3, units=True)), "units must be a whole number"),
    "relu_without_units": (_file(_relu(3)), "units must be a whole number"),
    "relu_of_other_units": (_file(_relu(3, units=2**28 - 1)), "op 3 (relu) reads 268435455 values, but op 2 (linear) gives 3"),
    "relu_first": (_file(_relu(0, units=2**28 - 1)), "a relu cannot be the first op"),
    "events_alone": (_file(_weightless("events", at=0, units=2**28 - 1)), "a program needs an op with weights"),
    "events_then_kwta_alone": (
        _file(_weightless("events", {"op": "kwta", "units": 2**28 - 1, "k": 2**27, "groups": 1}, at=0, units=2**28 - 1)),
        "a program needs an op with weights",
    ),
    "events_twice": (_file(_weightless("events", {"op": "events", "units": 3}, units=3)), "change nothing; leave it out"),
    "three_without_weights": (
        _file(_weightless("events", {"op": "kwta", "units": 3, "k": 1, "groups": 1}, {"op": "log_softmax", "units": 3}, units=3)),
        "at most two ops without weights follow one another",
    ),
    "kwta_first": (_file(_weightless("kwta", at=0, units=3, k=1, groups=1)), "a kwta cannot be the first op"),
    "kwta_of_none": (_file(_weightless("kwta", units=3, k=0, groups=1)), "k must be a whole number between 1 and 2^28"),
    "kwta_of_four": (_file(_weightless("kwta", units=3, k=4, groups=1)), "in 1 equal parts, 4 of each cannot be kept"),
    "kwta_unequal_parts": (_file(_weightless("kwta", units=3, k=1, groups=2)), "of 3 values in 2 equal parts"),
    "kwta_without_groups": (_file(_weightless("kwta", units=3, k=1)), "groups must be a whole number between 1 and 2^28"),
    "top_k_of_four": (_file(_weightless("top_k", units=3, k=4)), "of 3 values in 1 equal parts, 4 of each cannot be kept"),
    "top_k_of_true": (_file(_weightless("top_k", units=3, k=True)), "k must be a whole number"),
    "log_softmax_of_other_units": (_file(_weightless("log_softmax", units=4)), "op 3 (log_softmax) reads 4 values"),
    "epsilon_zero": (_file(_norm(epsilon=0.0)), "epsilon must be in [1e-12, 1], got 0.0"),
    "epsilon_nan": (_file(_norm(epsilon=float("nan"))), "epsilon must be in [1e-12, 1], got nan"),
    "epsilon_long": (_file(_norm(epsilon=10**300)), "epsilon must be in [1e-12, 1]"),
    "epsilon_missing": (_file(_norm()), "epsilon must be a number"),
    "norm_of_a_matrix": (_file(_norm(_tensor("3.weight", "F32", [3, 1]), epsilon=1e-5)), "weight has one axis; got (3, 1)"),
    "norm_of_a_number": (_file(_norm(_tensor("3.weight", "F32", [], b"\0" * 4), epsilon=1e-5)), "weight has one axis; got ()"),
    "norm_short_bias": (_file(_norm(_tensor("3.bias", "F32", [2], b"\0" * 8), epsilon=1e-5)), "bias must be (3,), got (2,)"),
    "reverse_a_number": (_file(_reverse(1)), "reverse must be true or false"),
    "reverse_null": (_file(_reverse(None)), "reverse must be true or false"),
    "reverse_alone": (_file(_reverse_alone), "an op that reads backwards follows one of its kind"),
    "reverse_twice": (_file(lambda f: (_reverse()(f), f.ops[1].update(reverse=True))), "an op that reads backwards follows"),
    "reverse_of_another_kind": (_file(_reverse_of_an_egru), "an op that reads backwards follows one of its kind"),
    "reverse_of_one_unit": (_file(_reverse_of_one_unit), "an op that reads backwards follows one of its kind and sizes"),
    "reverse_of_a_linear": (_file(_set(2, "reverse", True)), "unknown field 'reverse'"),
    "reverse_then_one_width": (_file(_reverse_too_wide), "reads 2 values, but op 2 (gru) gives 4"),
    "conv_kernel_zero": (_file(_conv(kernel=0)), "kernel must be a whole number between 1 and 2^28"),
    "conv_kernel_does_not_divide": (_file(_conv(kernel=4)), "6 columns cannot hold 4 taps"),
    "conv_kernel_huge": (_file(_conv(kernel=2**28 - 1)), "6 columns cannot hold 268435455 taps"),
    "conv_without_dilation": (_file(_conv(lambda f: f.ops[3].pop("dilation"))), "dilation must be a whole number"),
    "conv_dilation_a_float": (_file(_conv(dilation=1.0)), "dilation must be a whole number"),
    "conv_dilation_huge": (_file(_conv(dilation=2**28 - 1)), "at most 4194304 values, these 805306365"),
    "conv_of_two": (_file(_conv(kernel=3)), "reads 2 values, but op 2 (linear) gives 3"),
    "conv_groups_zero": (_file(_conv(groups=0)), "groups must be a whole number"),
    "conv_groups_do_not_divide": (_file(_conv(groups=2)), "3 inputs and 3 outputs cannot form 2 groups"),
    "conv_between_groups": (
        _file(_conv(_tensor("3.weight.values", data=_f32(*[0.5] * 18)), groups=3)), "two of its 3 groups"
    ),
    "conv_block_between_groups": (_file(_conv(_conv_in_blocks, groups=3)), "two of its 3 groups"),
    "conv_live_between_groups": (_file(_conv(_conv_complementary, groups=3)), "two of its 3 groups"),
    "conv_of_three_gates": (_file(_conv(_set(3, "weight", "gates", 3))), "a convolution has one gate"),
    "conv_short_bias": (_file(_conv(_tensor("3.bias", shape=[2], data=_f32(1, 2)))), "bias must be (3,), got (2,)"),
    "cluster_first": (_file(lambda f: (_cluster()(f), setattr(f, "ops", f.ops[4:]), setattr(f, "tensors", {
        f"0{name[1:]}": t for name, t in f.tensors.items() if name.startswith("4.")
    }))), "a cluster stands behind a linear and a log_softmax"),
    "cluster_behind_a_linear": (_file(_cluster_behind(after=2)), "a cluster stands behind a linear and a log_softmax"),
    "cluster_behind_a_relu": (
        _file(_cluster_behind({"op": "log_softmax", "units": 3}, {"op": "relu", "units": 3}, after=2)),
        "a cluster stands behind a linear and a log_softmax",
    ),
    "cluster_of_a_softmax_of_a_relu": (
        _file(_cluster_behind({"op": "relu", "units": 3}, {"op": "log_softmax", "units": 3}, after=2)),
        "a cluster stands behind a linear and a log_softmax",
    ),
    "cluster_of_a_softmax_of_an_egru": (
        _file(_cluster_behind({"op": "log_softmax", "units": 2}, after=1)), "a cluster stands behind a linear and a log_softmax"
    ),
    "cluster_at_zero": (_file(_cluster(at=0)), "at must be a whole number between 1 and 2^28"),
    "cluster_at_a_float": (_file(_cluster(at=1.0)), "at must be a whole number between 1 and 2^28"),
    "cluster_at_true": (_file(_cluster(at=True)), "at must be a whole number between 1 and 2^28"),
    "cluster_at_its_units": (_file(_cluster(at=3)), "at is one of the values 1 to 2, got 3"),
    "cluster_at_enormous": (_file(_cluster(at=2**28 - 1)), "at is one of the values 1 to 2, got 268435455"),
    "cluster_without_at": (_file(_cluster(lambda f: f.ops[4].pop("at"))), "at must be a whole number"),
    "cluster_without_units": (_file(_cluster(lambda f: f.ops[4].pop("units"))), "units must be a whole number"),
    "cluster_of_other_units": (_file(_cluster(units=4)), "op 4 (cluster) reads 4 values, but op 3 (log_softmax) gives 3"),
    "cluster_of_enormous_units": (_file(_cluster(units=2**28 - 1)), "gives fewer than 2^28 values, this one 268435456"),
    "cluster_of_three_inputs": (
        _file(_cluster(_cluster_of_three_inputs)), "projection reads what the linear op reads, 2 values; it has 3 columns"
    ),
    "cluster_of_two_numbers": (
        _file(_cluster(_cluster_of_two_numbers)), "weight has a column for each of the 1 rows of projection; it has 2"
    ),
    "cluster_projection_of_two_gates": (
        _file(_cluster(_cluster_of_two_gates("projection"))), "its matrices have one gate each, got 2 and 1"
    ),
    "cluster_weight_of_two_gates": (_file(_cluster(_cluster_of_two_gates("weight"))), "one gate each, got 1 and 2"),
    "cluster_short_bias": (_file(_cluster(_tensor("4.bias", shape=[1], data=_f32(1)))), "bias must be (2,), got (1,)"),
    "cluster_w8a8": (_file(_cluster(_cluster_w8a8)), "projection reads events or changes"),
    "cluster_within_another": (_file(_two_clusters(2)), "the one before ends at 3, this one is at 2"),
    "cluster_before_another": (_file(_two_clusters(1)), "the one before ends at 3, this one is at 1"),
    "cluster_without_a_projection": (_file(_cluster(lambda f: f.ops[4].pop("projection"))), "matrix projection is not stored"),
    "cluster_nan": (_file(_cluster(_tensor("4.bias", data=_f32(0, float("nan"))))), "holds nan at [1]"),
    "bool_a_string": (_file(_set(1, "reset_after", "true")), "reset_after must be true or false"),
    "bool_a_number": (_file(_set(1, "reset_after", 1)), "reset_after must be true or false"),
    "zoneout_nan": (_file(_set(1, "zoneout", float("nan"))), "zoneout must be in [0, 1), got nan"),
    "zoneout_infinite": (_file(_set(1, "zoneout", float("inf"))), "zoneout must be in [0, 1)"),
    "zoneout_long": (_file(_set(1, "zoneout", 10**300)), "zoneout must be in [0, 1)"),
    "zoneout_true": (_file(_set(1, "zoneout", False)), "zoneout must be a number"),
    "zoneout_a_string": (_file(_set(1, "zoneout", "0")), "zoneout must be a number"),
    "zoneout_null": (_file(_set(1, "zoneout", None)), "zoneout must be a number"),
    "reset_a_list": (_file(_set(1, "reset", ["threshold"])), "reset must be one of"),
    "reset_unknown": (_file(_set(1, "reset", "soft")), "reset must be one of threshold, output, none, got 'soft'"),
    "event_a_number": (_file(_set(1, "event", 1)), "event must be threshold or always"),
    "output_an_object": (_file(_set(1, "output", {})), "output must be events or state"),
    "chain_does_not_fit": (_file(lambda f: f.ops.pop(1)), "belongs to no op|needs a F32|reads"),
    **{
        f"delta_{what}": (_file(_cell("gru", reset_after=True, delta_hidden=value)), words)
        for what, value, words in (
            ("negative", -0.1, "delta_hidden must be a number in [0, 1e30], got -0.1"),
            ("nan", float("nan"), "delta_hidden must be a number in [0, 1e30], got nan"),
            ("infinite", float("inf"), "delta_hidden must be a number in [0, 1e30]"),
            ("long", 10**300, "delta_hidden must be a number in [0, 1e30]"),
            ("true", True, "delta_hidden must be a number"),
            ("null", None, "delta_hidden must be a number"),
            ("a_list", [0.1], "delta_hidden must be a number"),
        )
    },
    "delta_before_the_reset": (_file(_cell("gru", reset_after=False, delta_hidden=0.1)), "delta_hidden needs reset_after=True"),
    "delta_of_an_egru": (_file(_set(1, "delta_input", 0.1)), "an egru sends events already"),
    "delta_of_a_linear": (_file(_set(2, "delta_input", 0.1)), "unknown field 'delta_input'"),
    "delta_w8a8": (_file(_delta_w8a8), "reads events or changes, which are taken as they are"),
    "embedding_twice": (_file(lambda f: f.ops.__setitem__(2, {"op": "embedding"})), "tensor 2.weight"),
    # the weights
    "weight_nan": (_file(_weight(5, float("nan"))), "holds nan at [2, 1]"),
    "weight_infinite": (_file(_weight(0, float("inf"))), "holds inf at [0, 0]"),
    "threshold_negative": (_file(_tensor("1.threshold", data=struct.pack("<2f", 0.1, -0.1))), "threshold must be a number >= 0"),
    "threshold_nan": (_file(_tensor("1.threshold", data=struct.pack("<2f", 0.1, float("nan")))), "must be a number >= 0"),
    "bias_short": (_file(_tensor("2.bias", shape=[2], data=b"\0" * 8)), "bias must be (3,), got (2,)"),
    "bias_a_matrix": (_file(_tensor("2.bias", shape=[3, 1])), "bias must be (3,)"),
    "embedding_a_vector": (_file(_tensor("0.weight", shape=[6])), "weight has two axes"),
    "embedding_of_nothing": (_file(_tensor("0.weight", shape=[0, 2], data=b"")), "at least one input"),
    # the formats
    "format_unknown": (_file(_set(1, "weight_hh", "format", "csr")), "not stored as one of dense, csc, block, complementary"),
    "format_a_list": (_file(_set(1, "weight_hh", "format", ["dense"])), "not stored as one of"),
    "layout_a_string": (_file(_set(1, "weight_hh", "dense")), "not stored as one of"),
    "layout_missing": (_file(lambda f: f.ops[1].pop("weight_hh")), "not stored as one of"),
    "dense_other_shape": (_file(_set(1, "weight_ih", "cols", 3)), "says 6x3 but stores (6, 2)"),
    "rows_zero": (_file(_set(1, "weight_hh", "rows", 0)), "whole numbers between 1 and 2^28"),
    "rows_negative": (_file(_set(1, "weight_hh", "rows", -6)), "whole numbers between"),
    "rows_a_float": (_file(_set(1, "weight_hh", "rows", 6.0)), "whole numbers between"),
    "rows_true": (_file(_set(1, "weight_hh", "cols", True)), "whole numbers between"),
    "rows_huge": (_file(_set(1, "weight_hh", "rows", 2**28)), "whole numbers between"),
    "gates_do_not_divide": (_file(_set(1, "weight_hh", "gates", 4)), "cannot hold 4 gates"),
    "gates_two": (_file(_set(1, "weight_ih", "gates", 2)), "matrices of 6 rows in 3 gates"),
    "gates_of_a_linear": (_file(_set(2, "weight", "gates", 3)), "a linear op has one gate"),
    "block_zero": (_file(_set(1, "weight_hh", "block", [0, 1])), "whole numbers between"),
    "block_too_tall": (_file(_set(1, "weight_hh", "block", [65, 1])), "must lie between (1, 1) and (64, 64)"),
    "block_one_number": (_file(_set(1, "weight_hh", "block", [2])), "needs block = [rows, cols]"),
    "block_an_object": (_file(_set(1, "weight_hh", "block", {"rows": 2, "cols": 1})), "needs block"),
    "block_other_size": (_file(_set(1, "weight_hh", "block", [1, 2])), "stores values"),
    "block_row_out_of_range": (_file(_tensor(HH + ".block_row", data=_u32(0, 3, 1))), "block row 3 is out of range"),
    "block_row_like_minus_one": (_file(_tensor(HH + ".block_row", data=_u32(0, 2**32 - 1, 1))), "is out of range"),
    "block_row_falls": (_file(_tensor(HH + ".block_row", data=_u32(2, 0, 1))), "must ascend"),
    "block_row_twice": (_file(_tensor(HH + ".block_row", data=_u32(2, 2, 1))), "must ascend"),
    "block_row_a_matrix": (_file(_tensor(HH + ".block_row", shape=[3, 1])), "block_row has one axis"),
    "block_row_a_number": (_file(_tensor(HH + ".block_row", shape=[], data=_u32(0))), "block_row has one axis"),
    "block_row_short": (_file(_tensor(HH + ".block_row", shape=[2], data=_u32(0, 2))), "stores values"),
    "start_falls": (_file(_tensor(HH + ".start", data=_u32(0, 4, 3))), "start must rise"),
    "start_not_from_zero": (_file(_tensor(HH + ".start", data=_u32(1, 2, 3))), "start must rise"),
    "start_too_far": (_file(_tensor(HH + ".start", data=_u32(0, 2, 2**31))), "start must rise"),
    "start_not_to_the_end": (_file(_tensor(HH + ".start", data=_u32(0, 1, 2))), "start must rise"),
    "start_long": (_file(_tensor(HH + ".start", shape=[4], data=_u32(0, 2, 3, 3))), "stores values"),
    "start_a_matrix": (_file(_tensor(HH + ".start", shape=[3, 1])), "stores values"),
    "start_empty": (_file(_tensor(HH + ".start", shape=[0], data=b"")), "stores values"),
    # single elements
    "csc_row_out_of_range": (_packed(_tensor(HH + ".row", data=_u16(0, 3, 6, 1))), "row 6 is out of range; the matrix has 6"),
    "csc_row_like_minus_one": (_packed(_tensor(HH + ".row", data=_u16(0, 3, 2**16 - 1, 1))), "row 65535 is out of range"),
    "csc_row_falls": (_packed(_tensor(HH + ".row", data=_u16(3, 0, 5, 1))), "must ascend"),
    "csc_row_twice": (_packed(_tensor(HH + ".row", data=_u16(0, 3, 3, 1))), "must ascend"),
    "csc_row_short": (_packed(_tensor(HH + ".row", shape=[3], data=_u16(0, 3, 5))), "as many rows as values"),
    "csc_row_a_matrix": (_packed(_tensor(HH + ".row", shape=[4, 1])), "as many rows as values"),
    "csc_row_u32": (_packed(_tensor(HH + ".row", "U32", data=_u32(0, 3, 5, 1))), "needs a U16 tensor 1.weight_hh.row"),
    "csc_row_missing": (_packed(lambda f: f.tensors.pop(HH + ".row")), "needs a U16 tensor 1.weight_hh.row"),
    "csc_values_a_matrix": (_packed(_tensor(HH + ".values", shape=[4, 1])), "as many rows as values"),
    "csc_value_nan": (_packed(_tensor(HH + ".values", data=_f32(1, float("nan"), 1, 1))), "holds nan at [1]"),
    "csc_start_falls": (_packed(_tensor(HH + ".start", data=_u32(0, 5, 4))), "start must rise"),
    "csc_start_not_from_zero": (_packed(_tensor(HH + ".start", data=_u32(1, 3, 4))), "start must rise"),
    "csc_start_too_far": (_packed(_tensor(HH + ".start", data=_u32(0, 3, 2**31))), "start must rise"),
    "csc_start_short": (_packed(_tensor(HH + ".start", shape=[2], data=_u32(0, 4))), "stores start (3,)"),
    "csc_start_u16": (_packed(_tensor(HH + ".start", "U16", data=_u16(0, 3, 4))), "needs a U32 tensor 1.weight_hh.start"),
    "csc_rows_too_many": (_packed(_set(1, "weight_hh", "rows", 3 * 2**16)), "at most 65536 rows, got 196608"),
    "csc_cols_huge": (_packed(_set(1, "weight_hh", "cols", 2**28 - 1)), "stores start (268435456,)"),
    "csc_gates_do_not_divide": (_packed(_set(1, "weight_hh", "gates", 4)), "cannot hold 4 gates"),
    # complementary
    "live_out_of_range": (_packed(_tensor(DECODER + ".live", data=bytes([0, 0, 2, 0]))), "group 2 is out of range; a set has 2"),
    "live_like_minus_one": (_packed(_tensor(DECODER + ".live", data=bytes([0, 0, 255, 0]))), "group 255 is out of range"),
    "live_beyond_the_gate": (_packed(_tensor(DECODER + ".live", data=bytes([0, 1, 1, 0]))), "beyond the end of a gate"),
    "live_short": (_packed(_tensor(DECODER + ".live", shape=[1, 1, 2], data=bytes(2))), "stores live (2, 1, 2)"),
    "live_a_vector": (_packed(_tensor(DECODER + ".live", shape=[4])), "stores live (2, 1, 2)"),
    "live_u16": (_packed(_tensor(DECODER + ".live", "U16", data=_u16(0, 0, 1, 0))), "needs a U8 tensor 2.weight.live"),
    "live_missing": (_packed(lambda f: f.tensors.pop(DECODER + ".live")), "needs a U8 tensor 2.weight.live"),
    "live_of_nothing": (_packed(_tensor(DECODER + ".live", shape=[2, 1, 0], data=b"")), "stores live (2, 1, 2)"),
    "packed_values_of_three_axes": (_packed(_tensor(DECODER + ".values", shape=[2, 1, 2])), "stores live (2, 1, 2)"),
    "packed_value_infinite": (
        _packed(_tensor(DECODER + ".values", data=_f32(1, 1, 1, float("inf")))), "holds inf at [1, 0, 1, 0]"
    ),
    "overlay_zero": (_packed(_set(2, "weight", "overlay", 0)), "whole numbers between"),
    "overlay_too_large": (_packed(_set(2, "weight", "overlay", 65)), "overlay must lie between 1 and 64, got 65"),
    "overlay_another": (_packed(_set(2, "weight", "overlay", 3)), "1 sets stores live (2, 1, 1)"),
    "overlay_missing": (_packed(lambda f: f.ops[2]["weight"].pop("overlay")), "whole numbers between"),
    "overlay_a_list": (_packed(_set(2, "weight", "overlay", [2])), "whole numbers between"),
    "group_zero": (_packed(_set(2, "weight", "group", 0)), "whole numbers between"),
    "group_huge": (_packed(_set(2, "weight", "group", 2**28 - 1)), "group must lie between 1 and 64"),
    "group_another": (_packed(_set(2, "weight", "group", 2)), "1 sets stores live (2, 1, 1)"),
    "group_missing": (_packed(lambda f: f.ops[2]["weight"].pop("group")), "whole numbers between"),
    "group_a_string": (_packed(_set(2, "weight", "group", "1")), "whole numbers between"),
    "packed_cols_huge": (_packed(_set(2, "weight", "cols", 2**28 - 1)), "stores live (268435455, 1, 2)"),
    "packed_rows_huge": (_packed(_set(2, "weight", "rows", 2**28 - 1)), "stores live (2, 1, 134217728)"),
    "packed_gates_huge": (_packed(_set(2, "weight", "gates", 2**28 - 1)), "cannot hold 268435455 gates"),
    "packed_gates_of_a_linear": (_packed(_three_gates), "a linear op has one gate"),
    # what is small and announces much
    "huge_units_in_small_tensors": (_file(_huge_block), "6442450944|but stores|whole numbers|stores values"),
    "w8a8_of_too_many_columns": (_file(_wide_codes), "32 bits hold the sums of codes of at most 133144 columns, not of 133145"),
    "huge_inputs_in_small_tensors": (_file(_wide_block), "stores values"),
}  # fmt: skip


def main() -> None:
    """Write every file, and take away what no attack makes."""
    for name, (raw, _) in ATTACKS.items():
        (FOLDER / f"{name}.sfold").write_bytes(raw)
    for path in FOLDER.glob("*.sfold"):
        if path.stem not in ATTACKS:
            path.unlink()


if __name__ == "__main__":
    main()
