"""A compiled network: a list of ops, each a dataclass whose docstring is its equation, and the file that holds it.

The file is a valid safetensors file (``docs/file-format.md``). It is untrusted input: whatever is wrong with it ends in a
:class:`ProgramError` that says what, and at which byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsefold.formats import FORMATS, MOST_CODES, VALUE_TYPES, Float, Format, Precision, is_format

FORMAT_VERSION = 1
MAX_HEADER = 16 * 2**20
MAX_OPS = 1024
MAX_DEPTH = 64  # of lists and objects inside one another
MAX_OUTPUTS = 2**28  # of an op, fewer than that
MAX_HISTORY = 2**22  # values that all convolutions of a program remember: dilation is memory that no array pays for
RESETS = ("threshold", "output", "none")
DELTA_REFRESH = 1024  # steps after which the sums of changes are made anew, so that rounding cannot gather for ever


class ProgramError(ValueError):
    """A file that is not a program this version can play. ``offset`` is the byte at which that was seen."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(f"{message} (at byte {offset})")
        self.offset = offset


@dataclass(frozen=True, eq=False)
class Embedding:
    """``x = weight[token]``."""

    weight: Float  # (tokens, outputs)
    kind: ClassVar[str] = "embedding"

    @property
    def inputs(self) -> int:
        """Number of tokens it knows."""
        return int(self.weight.shape[0])

    @property
    def outputs(self) -> int:
        """Width of a row."""
        return int(self.weight.shape[1])


@dataclass(frozen=True, eq=False)
class Linear:
    """``y = W x + b``."""

    weight: Format  # (outputs, inputs)
    bias: Float  # (outputs,)
    kind: ClassVar[str] = "linear"

    @property
    def inputs(self) -> int:
        """Values read."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class Conv1d:
    """One step of a causal convolution over time; what lies before the first step is zero.

    ::

        y_t = sum over taps k of W_k x_(t - (kernel - 1 - k) dilation) + b

    Columns k I to (k + 1) I of ``weight`` are W_k, so that the last ones read the newest x. With ``groups`` output o reads the
    inputs of its own of as many equal parts only; all other weights are zero.
    """

    weight: Format  # (outputs, kernel I)
    bias: Float  # (outputs,)
    kernel: int
    dilation: int = 1
    groups: int = 1
    kind: ClassVar[str] = "conv1d"

    @property
    def inputs(self) -> int:
        """Values read."""
        return self.weight.shape[1] // self.kernel

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.weight.shape[0]

    @property
    def history(self) -> int:
        """Inputs that are carried from step to step."""
        return (self.kernel - 1) * self.dilation


@dataclass(frozen=True, eq=False)
class Recurrent:
    """What every recurrent op holds: a product of x and one of its own output, gates stacked in the rows as torch does.

    A GRU, an LSTM or an RNN may send changes (a delta network): with ``delta_input`` a feature of x is sent only when it
    differs from what it sent last by more than that threshold, and the product reads the columns of what was sent alone;
    with ``delta_hidden`` the units of h' alike. The sums are memories, one for each product. At first both x^ are 0::

        d = x - x^  where |x - x^| > delta_input, else 0        x^ = x there
        M = M + W_ih d, at first b_ih                            in place of W_ih x + b_ih

    Every 1024 steps M is summed anew as W_ih x^ + b_ih, which changes nothing but what rounding had left in it.

    ``reverse``: this op reads what the op before it reads, one of its kind that plays forwards, from the last step to the first,
    and both outputs go on side by side, the forward ones first. A program that holds such an op plays whole sequences.
    """

    weight_ih: Format  # (gates H, I)
    weight_hh: Format  # (gates H, H)
    bias_ih: Float  # (gates H,)
    bias_hh: Float  # (gates H,)
    delta_input: float | None = field(default=None, kw_only=True)  # threshold >= 0; None: all of x is read
    delta_hidden: float | None = field(default=None, kw_only=True)
    reverse: bool = field(default=False, kw_only=True)
    kind: ClassVar[str]
    gates: ClassVar[int]
    state: ClassVar[tuple[str, ...]] = ("h",)  # what is carried from step to step, (H,) each

    @property
    def inputs(self) -> int:
        """Values read."""
        return self.weight_ih.shape[1]

    @property
    def outputs(self) -> int:
        """Units."""
        return self.weight_hh.shape[1]

    def carried(self) -> dict[str, int]:
        """What is carried from step to step, name: size; of a delta network what was sent, the memories and their age too."""
        sizes = {name: self.outputs for name in self.state}
        rows = self.gates * self.outputs
        if self.delta_input is not None:
            sizes |= {"sent_x": self.inputs, "memory_x": rows}
        if self.delta_hidden is not None:
            sizes |= {"sent_h": self.outputs, "memory_h": rows}
        if self.delta_input is not None or self.delta_hidden is not None:
            sizes["age"] = 1  # steps since the memories were summed anew
        return sizes


@dataclass(frozen=True, eq=False)
class GRU(Recurrent):
    """One step of ``torch.nn.GRU``; gates stacked r, z, n; z keeps the old state.

    ::

        r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)        z alike
        n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))     reset_after; otherwise W_hn (r * h') + b_hn
        h = (1 - z) * n + z * h'
    """

    reset_after: bool = True
    kind: ClassVar[str] = "gru"
    gates: ClassVar[int] = 3


@dataclass(frozen=True, eq=False)
class EGRU(GRU):
    """One step of the event-based GRU; y' and h' are last step's, y' is what other units see of it.

    ::

        r = sigmoid(W_ir x + b_ir + W_hr y' + b_hr)        z alike
        n = tanh(W_in x + b_in + r * (W_hn y' + b_hn))     reset_after; otherwise W_hn (r * y') + b_hn
        u = (1 - z) * n + z * h'                           reset "output": - y'; then zoneout q: u = q h' + (1 - q) u
        o = u > threshold                                  event "always": o = 1
        y = o * u
        h = u - o * threshold                              reset "threshold"; otherwise h = u

    ``output``: "events" hands on y, "state" hands on u.
    """

    threshold: Float = field(default_factory=lambda: np.zeros(0, np.float32))  # (H,), >= 0
    reset: Literal["threshold", "output", "none"] = "threshold"
    event: Literal["threshold", "always"] = "threshold"
    output: Literal["events", "state"] = "events"
    zoneout: float = 0.0
    kind: ClassVar[str] = "egru"
    state: ClassVar[tuple[str, ...]] = ("h", "y")


@dataclass(frozen=True, eq=False)
class LSTM(Recurrent):
    """One step of ``torch.nn.LSTM``; gates stacked i, f, g, o; h' and c' are last step's.

    ::

        i = sigmoid(W_ii x + b_ii + W_hi h' + b_hi)        f and o alike
        g = tanh(W_ig x + b_ig + W_hg h' + b_hg)
        c = f * c' + i * g
        h = o * tanh(c)
    """

    kind: ClassVar[str] = "lstm"
    gates: ClassVar[int] = 4
    state: ClassVar[tuple[str, ...]] = ("h", "c")


@dataclass(frozen=True, eq=False)
class RNN(Recurrent):
    """One step of ``torch.nn.RNN``: ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or relu of the same sum."""

    nonlinearity: Literal["tanh", "relu"] = "tanh"
    kind: ClassVar[str] = "rnn"
    gates: ClassVar[int] = 1


@dataclass(frozen=True, eq=False)
class Weightless:
    """What ops without weights share: they read as many values as they have units."""

    units: int
    kind: ClassVar[str]

    @property
    def inputs(self) -> int:
        """Values read."""
        return self.units

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.units


class Picks(Weightless):
    """Says which values speak, and hands them on as events: whoever reads them pays for those alone."""


@dataclass(frozen=True, eq=False)
class ReLU(Picks):
    """``y = o * x`` with ``o = x > 0``, handed on as events."""

    kind: ClassVar[str] = "relu"


@dataclass(frozen=True, eq=False)
class Events(Picks):
    """``y = x``, whose values that are not zero are handed on as events. May be the first op, for x that is mostly zeros."""

    kind: ClassVar[str] = "events"


@dataclass(frozen=True, eq=False)
class KWTA(Picks):
    """``y = o * x`` with o = 1 for the k largest values of each of ``groups`` equal parts; k * groups events every step.

    Ties go to the lower index; what is no number is larger than any number.
    """

    k: int
    groups: int = 1
    kind: ClassVar[str] = "kwta"


@dataclass(frozen=True, eq=False)
class LogSoftmax(Weightless):
    """``y = x - max(x) - log(sum(exp(x - max(x))))``."""

    kind: ClassVar[str] = "log_softmax"


@dataclass(frozen=True, eq=False)
class TopK(Weightless):
    """The indices of the k largest values, largest first, and then those values: 2 k outputs. ``k=1`` is the argmax.

    Ties go to the lower index; what is no number is larger than any number.
    """

    k: int
    kind: ClassVar[str] = "top_k"

    @property
    def outputs(self) -> int:
        """Values given."""
        return 2 * self.k


@dataclass(frozen=True, eq=False)
class Cluster:
    """The words of a cluster in the cluster's place: the second step of an adaptive softmax.

    ::

        y = [q_0 ... q_(at - 1), q_at + log_softmax(W P x + b), q_(at + 1) ...]

    q are the log-probabilities that the op before gives, a LogSoftmax or another Cluster, of a lower place; x is what the Linear
    in front of that LogSoftmax reads. ``Stream.score`` computes a cluster only where the word that is asked for lies in it.

    Source: Grave, Joulin, Cissé, Grangier and Jégou (2017), arXiv 1609.04309.
    """

    projection: Format  # (d, I)
    weight: Format  # (words, d)
    bias: Float  # (words,)
    units: int  # values of q
    at: int  # which of them is the cluster, >= 1
    kind: ClassVar[str] = "cluster"

    @property
    def inputs(self) -> int:
        """Values of q."""
        return self.units

    @property
    def words(self) -> int:
        """Values that stand in the cluster's place."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.units - 1 + self.words


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """``y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * weight + bias``, over all values of a step."""

    weight: Float  # (H,)
    bias: Float  # (H,)
    epsilon: float = 1e-5
    kind: ClassVar[str] = "layer_norm"

    @property
    def inputs(self) -> int:
        """Values read."""
        return self.weight.size

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.weight.size


Op = Embedding | Linear | Conv1d | Recurrent | LayerNorm | ReLU | Events | KWTA | LogSoftmax | Cluster | TopK
Speaking = EGRU | Picks  # at every step each of their units emits an event or not
OPS: dict[str, type[Op]] = {
    op.kind: op
    for op in (
        Embedding, Linear, Conv1d, GRU, EGRU, LSTM, RNN, ReLU, Events, KWTA, LayerNorm, LogSoftmax, Cluster, TopK,
    )
}  # fmt: skip


def reads_backwards(op: Op) -> bool:
    """Whether ``op`` reads what the op before it reads, from the last step to the first."""
    return isinstance(op, Recurrent) and op.reverse


def _sources(ops: tuple[Op, ...], i: int) -> tuple[int, ...]:
    if i < len(ops) and reads_backwards(ops[i]):
        return _sources(ops, i - 1)
    return tuple(range(i - 1 - reads_backwards(ops[i - 1]), i)) if i else ()


def _first_step(ops: tuple[Op, ...], i: int) -> int:
    """The Linear that gives logits of first words and clusters, of which the Cluster ``i`` is one; -1 where there is none."""
    while i > 0 and isinstance(ops[i], Cluster):
        i -= 1
    return i - 1 if i and isinstance(ops[i], LogSoftmax) and isinstance(ops[i - 1], Linear) else -1


def matrices(op: Op) -> dict[str, Format]:
    """The weight matrices of an op that are stored in a format, by field name."""
    return {f.name: v for f in fields(op) if is_format(v := getattr(op, f.name))}


@dataclass(frozen=True, eq=False)
class Program:
    """Ops in the order they are played, and free metadata (JSON) about where they come from.

    Raises ``ValueError`` when the ops do not fit one another or a weight is not finite.
    """

    ops: tuple[Op, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(self.ops))
        _validate(self.ops)
        for i, op in enumerate(self.ops):
            for name, matrix in matrices(op).items():
                _check(
                    matrix.precision != "w8a8" or not self.by_events(i, name),
                    f"op {i} ({op.kind}): {name} reads events or changes, which are taken as they are; round it to i8, not w8a8.",
                )

    @property
    def takes_tokens(self) -> bool:
        """True when a step reads one token id, false when it reads ``inputs`` float32 values."""
        return isinstance(self.ops[0], Embedding)

    @property
    def inputs(self) -> int:
        """Tokens known, or values read per step."""
        return self.ops[0].inputs

    @property
    def outputs(self) -> int:
        """Values given per step."""
        return sum(self.ops[j].outputs for j in self.sources(len(self.ops)))

    @property
    def whole_sequences(self) -> bool:
        """True when an op reads backwards: then only ``Stream.run`` plays the program, and each run starts from zero."""
        return any(map(reads_backwards, self.ops))

    def sources(self, i: int) -> tuple[int, ...]:
        """The ops whose outputs, side by side, op ``i`` reads; none where it reads the input. ``len(ops)``: those handed out."""
        return _sources(self.ops, i)

    def first_step(self, i: int) -> int:
        """The Linear whose x the Cluster ``i`` reads; of any other op ``i`` itself."""
        return _first_step(self.ops, i) if isinstance(self.ops[i], Cluster) else i

    def reads_events(self, i: int) -> bool:
        """Whether op ``i`` reads the event list of the op before it, so that silent units cost it nothing.

        A Cluster reads what :meth:`first_step` reads.
        """
        i = self.first_step(i)
        sources = self.sources(i)
        before = self.ops[sources[-1]] if sources else None  # both directions of a layer emit, or none
        emits = isinstance(before, Picks) or (isinstance(before, EGRU) and before.output == "events")
        op = self.ops[i]
        return emits and isinstance(op, Linear | Conv1d | Recurrent) and getattr(op, "delta_input", None) is None

    def by_events(self, i: int, name: str) -> bool:
        """Whether the product of matrix ``name`` of op ``i`` reads a list: events of the op before, its own, or changes."""
        op = self.ops[i]
        if name == "weight_hh":
            return isinstance(op, EGRU) or (isinstance(op, Recurrent) and op.delta_hidden is not None)
        if isinstance(op, Cluster) and name == "weight":  # of what the projection gives
            return False
        return self.reads_events(i) or (isinstance(op, Recurrent) and op.delta_input is not None)

    @property
    def nbytes(self) -> int:
        """Stored size of all arrays in bytes; the file adds a header."""
        return sum(array.nbytes for array in _tensors(self.ops).values())

    def rounded(self, precision: Precision) -> Program:
        """The same program with every weight matrix rounded to "bf16" or "i8" (one scale a row); biases and tables stay.

        "w8a8" rounds dense inputs of a product to int8 too; a matrix that reads events, which it takes as they are, gets "i8",
        and so does one of more columns than 32 bits hold the sums of.
        ``metadata["rounding_errors"]`` holds, by op and matrix, the root mean square of what rounding changed over that of the
        weights.
        """
        errors: dict[str, float] = {}

        def of(i: int, op: Any) -> Op:
            own: dict[str, Precision] = {
                name: "i8"
                if precision == "w8a8" and (self.by_events(i, name) or m.shape[1] > MOST_CODES)
                else precision
                for name, m in matrices(op).items()
            }
            new = {name: matrix.rounded(own[name]) for name, matrix in matrices(op).items()}
            for name, matrix in matrices(op).items():
                if matrix.precision == "f32" and own[name] != "f32" and matrix.values.any():
                    off = np.linalg.norm((new[name].values - matrix.values).astype(np.float64))
                    errors[f"{i}.{name}"] = round(float(off / np.linalg.norm(matrix.values.astype(np.float64))), 6)
            changed: Op = replace(op, **new)
            return changed

        ops = tuple(of(i, op) for i, op in enumerate(self.ops))
        return Program(ops, {**self.metadata, "rounding_errors": errors} if errors else self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to ``path``, all of it or nothing."""
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file as bytes."""
        tensors, types = _tensors(self.ops), _file_types(self.ops)
        data = b"".join(a.tobytes() for a in tensors.values())
        header: dict[str, Any] = {
            "__metadata__": {
                "sparsefold": str(FORMAT_VERSION),
                "crc32": f"{zlib.crc32(data):08x}",
                "ops": _dump([_describe(op) for op in self.ops], "the ops' options"),
                "metadata": _dump(dict(self.metadata), "the metadata"),
            }
        }
        end = 0
        for name, array in tensors.items():
            start, end = end, end + array.nbytes
            header[name] = {
                "dtype": types.get(name, "F32"),
                "shape": list(array.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        if len(text) > MAX_HEADER:
            raise ValueError(
                f"the header would take {len(text)} bytes, the limit is {MAX_HEADER}. Shorten the metadata."
            )
        return struct.pack("<Q", len(text)) + text + data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read and check a file. Raises :class:`ProgramError` for anything that is not a sound program."""
        return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Program:
        """Read and check the bytes of a file. Raises :class:`ProgramError`."""
        tensors, meta, data_start = _read_container(raw)
        version = meta.get("sparsefold")
        if version is None:
            raise ProgramError("this is a safetensors file, but not a sparsefold program: compile the model first", 8)
        if version != str(FORMAT_VERSION):
            raise ProgramError(
                f"the file has format version {version!r}; this sparsefold reads version {FORMAT_VERSION}. "
                "Update sparsefold, or compile the model again",
                8,
            )
        if meta.get("crc32") != f"{zlib.crc32(memoryview(raw)[data_start:]):08x}":
            raise ProgramError("the data does not match its checksum: the file is damaged. Copy it again", data_start)
        described = _json(meta.get("ops", ""), "the op list", 8)
        metadata = _json(meta.get("metadata", "{}"), "the metadata", 8)
        if not isinstance(described, list) or not 1 <= len(described) <= MAX_OPS:
            raise ProgramError(f"the op list must hold 1 to {MAX_OPS} ops", 8)
        if not isinstance(metadata, dict):
            raise ProgramError("the metadata must be an object", 8)
        left = dict(tensors)
        try:
            program = cls(tuple(_build(i, d, left) for i, d in enumerate(described)), metadata)
        except ProgramError:
            raise
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise ProgramError(str(error).rstrip("."), data_start) from error
        if left:
            raise ProgramError(f"tensor {next(iter(left))!r} belongs to no op", 8)
        return program


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write to a temporary name beside ``path``, then rename: a reader sees the old file or the new one."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder. Name a file.")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: the folder {target.parent} does not exist. Make it first.")
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}. Choose a folder you may write to.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("|u1"),
    "BF16": np.dtype("<u2"),  # as raw bits
    "I8": np.dtype("|i1"),
}


def _tensors(ops: Iterable[Op]) -> dict[str, NDArray[Any]]:
    out: dict[str, NDArray[Any]] = {}
    for i, op in enumerate(ops):
        for f in fields(op):
            value = getattr(op, f.name)
            if is_format(value):
                out.update({f"{i}.{f.name}.{name}": array for name, array in value.tensors().items()})
            elif isinstance(value, np.ndarray):
                out[f"{i}.{f.name}"] = value
    return out


def _file_types(ops: Iterable[Op]) -> dict[str, str]:
    """Type of every array of a matrix in the file; all others are F32."""
    return {
        f"{i}.{field}.{name}": dtype
        for i, op in enumerate(ops)
        for field, matrix in matrices(op).items()
        for name, dtype in matrix.types().items()
    }


def _describe(op: Op) -> dict[str, Any]:
    described: dict[str, Any] = {"op": op.kind}
    for f in fields(op):
        value = getattr(op, f.name)
        if is_format(value):
            described[f.name] = value.layout()
        elif f.kw_only and value == f.default:  # younger than the format
            continue
        elif not isinstance(value, np.ndarray):
            described[f.name] = value
    return described


def _build(i: int, described: Any, tensors: dict[str, NDArray[Any]]) -> Op:
    """Makes op ``i`` from its description, taking its arrays out of ``tensors``."""
    cls = OPS.get(str(described.get("op"))) if isinstance(described, dict) else None
    if cls is None:
        raise ProgramError(f"op {i} is not one of {', '.join(OPS)}", 8)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {k: v for k, v in described.items() if k != "op"}
    if unknown := set(values) - {name for name, f in known.items() if f.type != "Float"}:  # arrays are not described
        raise ProgramError(f"op {i} ({cls.kind}) has an unknown field {sorted(unknown)[0]!r}", 8)

    def take(name: str, dtype: str) -> NDArray[Any]:
        array = tensors.pop(f"{i}.{name}", None)
        if array is None or array.dtype != _DTYPES[dtype]:
            raise ProgramError(f"op {i} ({cls.kind}) needs a {dtype} tensor {i}.{name}", 8)
        return array

    for name, f in known.items():
        if f.kw_only:
            values.setdefault(name, f.default)
        if f.type == "Format":
            values[name] = _build_matrix(i, name, values.get(name), take)
        elif f.type == "Float":
            values[name] = take(name, "F32")
        elif f.type == "bool" and not isinstance(values.get(name), bool):
            raise ProgramError(f"op {i} ({cls.kind}): {name} must be true or false", 8)
        elif f.type == "float" and type(values.get(name)) not in (int, float):
            raise ProgramError(f"op {i} ({cls.kind}): {name} must be a number", 8)
        elif f.type == "float | None":
            if type(values.setdefault(name, None)) not in (int, float) and name in described:
                raise ProgramError(f"op {i} ({cls.kind}): {name} must be a number", 8)
        elif f.type == "int" and (type(values.get(name)) is not int or not 0 < values[name] < 2**28):
            raise ProgramError(f"op {i} ({cls.kind}): {name} must be a whole number between 1 and 2^28", 8)
        elif name not in values:
            raise ProgramError(f"op {i} ({cls.kind}) lacks {name}", 8)
    return cls(**values)


def _build_matrix(i: int, name: str, layout: Any, take: Any) -> Format:
    where = f"op {i}: matrix {name}"
    cls = FORMATS.get(str(layout.get("format"))) if isinstance(layout, dict) else None
    if cls is None:
        raise ProgramError(f"{where} is not stored as one of {', '.join(FORMATS)}", 8)
    numbers = {f.name: layout.get(f.name) for f in fields(cls) if f.name not in (*cls.arrays, "precision", "scale")}
    if "block" in numbers:
        if not isinstance(numbers["block"], list) or len(numbers["block"]) != 2:
            raise ProgramError(f"{where} needs block = [rows, cols]", 8)
        numbers["block"] = tuple(numbers["block"])
    sizes = [layout.get("rows"), layout.get("cols"), *numbers.values(), *numbers.get("block", ())]
    if not all(type(n) is int and 0 < n < 2**28 for n in sizes if not isinstance(n, tuple)):
        raise ProgramError(f"{where} needs whole numbers between 1 and 2^28 for its sizes", 8)
    precision = layout.get("precision", "f32")
    if not isinstance(precision, str) or precision not in VALUE_TYPES:
        raise ProgramError(f"{where}: precision must be one of {', '.join(VALUE_TYPES)}", 8)
    types = cls.arrays | {"values": VALUE_TYPES[precision][0]}
    arrays = {array: take(f"{name}.{array}", dtype) for array, dtype in types.items()}
    if precision == "bf16":
        arrays["values"] = (arrays["values"].astype(np.uint32) << 16).view(np.float32)
    arrays["values"] = arrays["values"].astype(np.float32, copy=False)
    matrix: Format = cls(**numbers, **arrays)
    if precision != "f32":
        matrix = matrix.restored(precision, take(f"{name}.scale", "F32") if precision in ("i8", "w8a8") else None)
    if matrix.shape != (layout["rows"], layout["cols"]):
        raise ProgramError(f"{where} says {layout['rows']}x{layout['cols']} but stores {matrix.shape}", 8)
    return matrix


def _validate(ops: tuple[Op, ...]) -> None:
    if not 1 <= len(ops) <= MAX_OPS:
        raise ValueError(f"a program has 1 to {MAX_OPS} ops; got {len(ops)}.")
    for i, op in enumerate(ops):
        where = f"op {i} ({op.kind})"
        if isinstance(op, Embedding):
            _check(op.weight.ndim == 2, f"{where}: weight has two axes, (tokens, width); got {op.weight.shape}.")
            _check(i == 0, f"{where}: an embedding can only be the first op.")
        elif isinstance(op, Linear):
            _check(op.weight.gates == 1, f"{where}: a linear op has one gate, got {op.weight.gates}.")
            _check(op.bias.shape == (op.outputs,), f"{where}: bias must be ({op.outputs},), got {op.bias.shape}.")
        elif isinstance(op, Conv1d):
            _validate_conv1d(where, op)
        elif isinstance(op, Weightless):
            _validate_weightless(where, op, ops[:i])
        elif isinstance(op, Cluster):
            _validate_cluster(where, op, ops, i)
        elif isinstance(op, LayerNorm):
            _check(op.weight.ndim == 1, f"{where}: weight has one axis; got {op.weight.shape}.")
            _check(op.bias.shape == op.weight.shape, f"{where}: bias must be {op.weight.shape}, got {op.bias.shape}.")
            # Smaller ones are lost beside the variance of float32 values, and values that are all alike would give NaN.
            _check(1e-12 <= op.epsilon <= 1, f"{where}: epsilon must be in [1e-12, 1], got {op.epsilon}.")
        else:
            h, rows = op.outputs, op.gates * op.outputs
            _check(
                op.weight_ih.shape[0] == op.weight_hh.shape[0] == rows
                and op.weight_ih.gates == op.weight_hh.gates == op.gates,
                f"{where}: {h} units need matrices of {rows} rows in {op.gates} gate{'s' * (op.gates > 1)}; "
                f"got {op.weight_ih.shape} in {op.weight_ih.gates} and {op.weight_hh.shape} in {op.weight_hh.gates}.",
            )
            for name in ("bias_ih", "bias_hh"):
                shape = getattr(op, name).shape
                _check(shape == (rows,), f"{where}: {name} must be ({rows},), got {shape}.")
            _validate_delta(where, op)
            if isinstance(op, RNN):
                _check(op.nonlinearity in ("tanh", "relu"), f"{where}: nonlinearity must be tanh or relu.")
            if isinstance(op, EGRU):
                _check(op.threshold.shape == (h,), f"{where}: threshold must be ({h},), got {op.threshold.shape}.")
                _check(bool((op.threshold >= 0).all()), f"{where}: every threshold must be a number >= 0.")
                _check(op.reset in RESETS, f"{where}: reset must be one of {', '.join(RESETS)}, got {op.reset!r}.")
                _check(op.event in ("threshold", "always"), f"{where}: event must be threshold or always.")
                _check(op.output in ("events", "state"), f"{where}: output must be events or state.")
                _check(0 <= op.zoneout < 1, f"{where}: zoneout must be in [0, 1), got {op.zoneout}.")
        if reads_backwards(op):
            _check(
                _both_ways(op, ops[i - 1] if i else None),
                f"{where}: an op that reads backwards follows one of its kind and sizes that reads forwards, and both hand on "
                "events or both their state.",
            )
        if sources := _sources(ops, i):
            j, given = sources[-1], sum(ops[s].outputs for s in sources)
            _check(given == op.inputs, f"{where} reads {op.inputs} values, but op {j} ({ops[j].kind}) gives {given}.")
        _check(op.inputs > 0 and op.outputs > 0, f"{where} needs at least one input and one output.")
    _check(not all(isinstance(op, Weightless) for op in ops), "a program needs an op with weights.")
    remembered = sum(op.history * op.inputs for op in ops if isinstance(op, Conv1d))
    _check(remembered <= MAX_HISTORY, f"convolutions remember at most {MAX_HISTORY} values, these {remembered}.")
    for name, array, wanted in _arrays(ops):
        _check(array.dtype == wanted, f"tensor {name} must be {wanted.name}, got {array.dtype}. Convert it.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(
                f"every weight must be finite, but tensor {name} holds {array[tuple(where)]} at {where}. "
                "Training probably diverged: lower the learning rate, or load an earlier checkpoint."
            )


def _validate_delta(where: str, op: Recurrent) -> None:
    for name in ("delta_input", "delta_hidden"):
        threshold = getattr(op, name)
        if threshold is None:
            continue
        _check(
            not isinstance(op, EGRU), f"{where}: {name} is of a gru, an lstm or an rnn; an egru sends events already."
        )
        sound = isinstance(threshold, int | float) and not isinstance(threshold, bool) and 0 <= threshold <= 1e30
        _check(sound, f"{where}: {name} must be a number in [0, 1e30], got {threshold}.")
    _check(
        op.delta_hidden is None or getattr(op, "reset_after", True),
        f"{where}: delta_hidden needs reset_after=True, torch's form; otherwise n reads r * h', which changes with r "
        "while no unit does.",
    )


def _both_ways(op: Op, before: Op | None) -> bool:
    if before is None or type(before) is not type(op) or reads_backwards(before):
        return False
    sizes = (before.inputs, before.outputs) == (op.inputs, op.outputs)
    return sizes and bool(getattr(before, "output", None) == getattr(op, "output", None))


def _validate_conv1d(where: str, op: Conv1d) -> None:
    rows, cols = op.weight.shape
    _check(op.weight.gates == 1, f"{where}: a convolution has one gate, got {op.weight.gates}.")
    _check(op.bias.shape == (rows,), f"{where}: bias must be ({rows},), got {op.bias.shape}.")
    _check(min(op.kernel, op.dilation, op.groups) > 0, f"{where}: kernel, dilation and groups are at least 1.")
    _check(cols % op.kernel == 0, f"{where}: {cols} columns cannot hold {op.kernel} taps of equal width.")
    parts = op.groups
    _check(
        op.inputs % parts == 0 and rows % parts == 0,
        f"{where}: {op.inputs} inputs and {rows} outputs cannot form {parts} groups of equal size.",
    )
    if parts > 1:
        row, column, values = op.weight.coordinates()
        outside = (row // (rows // parts) != column % op.inputs // (op.inputs // parts)) & (values != 0)
        _check(not outside.any(), f"{where}: a weight joins an input and an output of two of its {parts} groups.")


def _validate_cluster(where: str, op: Cluster, ops: tuple[Op, ...], i: int) -> None:
    first = ops[_first_step(ops, i)] if _first_step(ops, i) >= 0 else None
    _check(
        isinstance(first, Linear),
        f"{where}: a cluster stands behind a linear and a log_softmax, or behind another cluster of theirs.",
    )
    assert isinstance(first, Linear)
    _check(
        op.projection.gates == op.weight.gates == 1,
        f"{where}: its matrices have one gate each, got {op.projection.gates} and {op.weight.gates}.",
    )
    _check(
        op.projection.shape[1] == first.inputs,
        f"{where}: projection reads what the linear op reads, {first.inputs} values; it has {op.projection.shape[1]} columns.",
    )
    _check(
        op.words > 0 and op.projection.shape[0] > 0,
        f"{where}: a cluster holds at least one word, and its projection gives at least one number.",
    )
    _check(
        op.weight.shape[1] == op.projection.shape[0],
        f"{where}: weight has a column for each of the {op.projection.shape[0]} rows of projection; it has {op.weight.shape[1]}.",
    )
    _check(op.bias.shape == (op.words,), f"{where}: bias must be ({op.words},), got {op.bias.shape}.")
    _check(1 <= op.at < op.units, f"{where}: at is one of the values 1 to {op.units - 1}, got {op.at}.")
    before = ops[i - 1]
    if isinstance(before, Cluster):
        end = before.at + before.words
        _check(
            op.at >= end,
            f"{where}: clusters stand in rising order: the one before ends at {end}, this one is at {op.at}.",
        )
    _check(op.outputs < MAX_OUTPUTS, f"{where}: a cluster gives fewer than 2^28 values, this one {op.outputs}.")


def _validate_weightless(where: str, op: Weightless, before: tuple[Op, ...]) -> None:
    last = before[-1] if before else None
    _check(
        bool(before) or isinstance(op, Events),
        f"{where}: a {op.kind} cannot be the first op. Apply it to the input before it is played.",
    )
    if isinstance(op, ReLU):
        _check(not isinstance(last, ReLU), f"{where}: a relu after a relu changes nothing; leave it out.")
    if isinstance(op, Events):
        emits = isinstance(last, Picks) or (isinstance(last, EGRU) and last.output == "events")
        _check(not emits, f"{where}: events of what already is an event list change nothing; leave it out.")
    if isinstance(op, KWTA | TopK):
        groups = op.groups if isinstance(op, KWTA) else 1
        _check(
            groups > 0 and op.units % groups == 0 and 0 < op.k <= op.units // groups,
            f"{where}: of {op.units} values in {groups} equal parts, {op.k} of each cannot be kept.",
        )
    if isinstance(op, TopK):
        _check(
            op.units <= 2**24, f"{where}: the index of one of {op.units} values is not exact as a float32; 2^24 are."
        )
    _check(
        not (len(before) > 1 and all(isinstance(o, Weightless) for o in before[-2:])),
        f"{where}: at most two ops without weights follow one another.",
    )


def _arrays(ops: Iterable[Op]) -> Iterator[tuple[str, NDArray[Any], np.dtype[Any]]]:
    """Every array as it is in memory, by the name it gets in the file, and the type it must have."""
    for i, op in enumerate(ops):
        for f in fields(op):
            value = getattr(op, f.name)
            if is_format(value):
                for name, dtype in value.arrays.items():
                    yield f"{i}.{f.name}.{name}", getattr(value, name), _DTYPES[dtype]
            elif isinstance(value, np.ndarray):
                yield f"{i}.{f.name}", value, _DTYPES["F32"]


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _dump(value: Any, what: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} must be plain JSON: {error}. Convert it to Python numbers, strings and lists."
        ) from error


def _json(text: str, what: str, offset: int) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    try:
        value = json.loads(text, object_pairs_hook=unique)
        if depth(value) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        return value
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"{what} is not valid JSON: {error}", offset) from error


def _read_container(raw: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str], int]:
    """The safetensors container: tensors without holes or overlaps, string metadata, and where the data begins."""
    if len(raw) < 8:
        raise ProgramError(f"the file has {len(raw)} bytes; a program has at least 8. It is empty or cut off", len(raw))
    (size,) = struct.unpack_from("<Q", raw)
    if size > MAX_HEADER or 8 + size > len(raw):
        raise ProgramError(
            f"the first 8 bytes announce a header of {size} bytes in a file of {len(raw)}: "
            "this is not a .sfold file, or it is cut off",
            0,
        )
    data_start = 8 + size
    try:
        text = raw[8:data_start].decode()
    except UnicodeDecodeError as error:
        raise ProgramError("the header is not UTF-8: this is not a .sfold file", 8 + error.start) from error
    header = _json(text, "the header", 8)
    if not isinstance(header, dict):
        raise ProgramError("the header is not an object", 8)
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise ProgramError("__metadata__ must map names to strings", 8)
    tensors: dict[str, NDArray[Any]] = {}
    end = 0
    entries = []
    for name, entry in header.items():
        if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
            raise ProgramError(f"tensor name {name[:40]!r} is not made of letters, digits, '_' and '.'", 8)
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 4
            sound = sound and all(type(n) is int and 0 <= n < 2**48 for n in [*shape, first, last])
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise ProgramError(f"tensor {name} needs dtype, shape and data_offsets", 8)
        if dtype not in _DTYPES:
            raise ProgramError(f"tensor {name} has dtype {dtype!r}; a program holds {', '.join(_DTYPES)}", 8)
        entries.append((first, last, name, _DTYPES[dtype], shape))
    for first, last, name, dtype, shape in sorted(entries, key=lambda e: (e[0], e[1])):
        count = 1
        for n in shape:
            count *= n
        if first != end or last - first != count * dtype.itemsize:
            raise ProgramError(
                f"tensor {name} does not follow the one before it, or its size is wrong", data_start + end
            )
        if data_start + last > len(raw):
            raise ProgramError(f"tensor {name} ends after the end of the file: it is cut off", len(raw))
        try:
            array = np.frombuffer(raw, dtype, count, data_start + first).reshape(shape)
        except ValueError as error:  # no elements, but axes that no array can have
            raise ProgramError(f"tensor {name} has a shape that is too large", 8) from error
        tensors[name] = array if array.flags.aligned else array.copy()
        end = last
    if data_start + end != len(raw):
        raise ProgramError("bytes follow the last tensor", data_start + end)
    return tensors, meta, data_start
