"""How a weight matrix is stored. A format knows its layout, its zeros and its size; it knows no torch.

All matrices have shape ``(rows, cols) = (outputs, inputs)``. ``gates`` says how many gates of equal height are stacked
in the rows (3 for a GRU, 1 for a decoder); a block never reaches over the edge of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Index = NDArray[np.uint32]

# Rows and columns of a block. It also bounds what the engine's index of every column can take beside the file's index of
# every block column.
MAX_BLOCK = 64


Precision = Literal["f32", "bf16", "i8", "w8a8"]
# By precision, type in the file and bytes of a value.
VALUE_TYPES: dict[str, tuple[str, int]] = {"f32": ("F32", 4), "bf16": ("BF16", 2), "i8": ("I8", 1), "w8a8": ("I8", 1)}
MOST_CODES = (2**31 - 1) // 127**2  # columns of a "w8a8" matrix
CLIPPED_SCALES = 1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75, 0.7  # of the scale at which nothing is clipped


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _finite_matrix(weight: Any, gates: int) -> Float:
    matrix = np.ascontiguousarray(weight, np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"a weight matrix has two axes, (outputs, inputs); got shape {matrix.shape}.")
    if gates < 1 or matrix.shape[0] % gates:
        raise ValueError(
            f"a matrix of {matrix.shape[0]} rows cannot hold {gates} gates of equal height. "
            "Pass gates=3 for a GRU's weights and gates=1 for a linear layer's."
        )
    return matrix


class _Values:
    """What every format shares: values that may be rounded.

    ``values`` are float32 always, and exactly what the file's codes stand for: ``precision`` "bf16" keeps the upper half of each,
    "i8" a code in [-127, 127] times the ``scale`` (rows,) of its row. "w8a8" is "i8" whose product rounds x as well: to codes
    in [-127, 127] times one scale, the largest value of this x / 127, so that nothing is clipped.
    """

    values: Float
    precision: Precision
    scale: Float | None
    kind: ClassVar[str]
    arrays: ClassVar[dict[str, str]]

    @property
    def _value_rows(self) -> NDArray[np.int64]:
        """Row of each value, broadcastable to ``values``; where a value is padding, any row."""
        raise NotImplementedError

    @property
    def _value_columns(self) -> NDArray[np.int64]:
        """Column of each value, broadcastable likewise."""
        raise NotImplementedError

    def coordinates(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Float]:
        """(row, column, value) of everything stored, of any shape that broadcasts; padding is among it, with value 0."""
        return self._value_rows, self._value_columns, self.values

    def rounded(self, precision: Precision) -> Self:
        """The same matrix with values rounded to nearest: bfloat16, or int8 with one scale a row.

        A row's scale is its largest value / 127 or somewhat less, whichever leaves the smallest sum of squared errors: what a
        smaller step gains everywhere may outweigh a few values that are clipped. "w8a8" also rounds what the product reads.
        """
        if precision not in VALUE_TYPES:
            raise ValueError(f"precision must be one of {', '.join(VALUE_TYPES)}, got {precision!r}.")
        if precision == "f32":
            return self
        if precision == "bf16":
            bits = np.ascontiguousarray(self.values).view(np.uint32)
            even = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
            return self._with((even & np.uint32(0xFFFF0000)).view(np.float32), "bf16", None)
        rows = np.broadcast_to(self._value_rows, self.values.shape)
        scale = np.zeros(self.shape[0], np.float32)
        np.maximum.at(scale, rows, np.abs(self.values))
        largest = np.where(scale > 0, scale / np.float32(127), np.float32(1)).astype(np.float32)
        scale, least = largest, np.full(self.shape[0], np.inf)
        for share in CLIPPED_SCALES:
            tried = (largest * np.float32(share)).astype(np.float32)
            codes = np.rint(self.values / tried[rows]).clip(-127, 127)
            error = np.zeros(self.shape[0])
            np.add.at(error, rows, np.square(codes * tried[rows] - self.values, dtype=np.float64))
            scale, least = np.where(error < least, tried, scale), np.minimum(error, least)
        codes = np.rint(self.values / scale[rows]).clip(-127, 127).astype(np.float32)
        return self._with(codes * scale[rows], precision, scale)

    def restored(self, precision: Any, scale: Float | None) -> Self:
        """The matrix that is meant where ``values`` are a file's codes as floats."""
        if scale is None:
            return self._with(self.values, precision, None)
        if scale.shape != self.shape[:1] or not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"int8 weights need a positive scale for each of {self.shape[0]} rows.")
        if (np.abs(self.values) > 127).any():
            raise ValueError("the code of an int8 weight lies between -127 and 127.")
        return self._with(self.values * scale[self._value_rows], precision, scale)

    def _seen(self, x: NDArray[Any]) -> NDArray[Any]:
        """``x`` as the product reads it; a value that is not finite leaves no number of it."""
        if self.precision != "w8a8":
            return x
        largest = np.abs(x).max(initial=0)
        if not np.isfinite(largest):
            return np.full_like(x, np.nan)
        tiny = largest <= 1e-30  # 127 / largest would not be finite in float32
        return np.zeros_like(x) if tiny else np.rint(x * (127 / largest)) * (largest / 127)

    def _with(self, values: Float, precision: Precision, scale: Float | None) -> Self:
        if precision == "w8a8" and self.shape[1] > MOST_CODES:
            raise ValueError(
                f"32 bits hold the sums of codes of at most {MOST_CODES} columns, not of {self.shape[1]}; "
                "its weights are i8, not w8a8."
            )
        return cast(Self, replace(cast(Any, self), values=values, precision=precision, scale=scale))

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        raise NotImplementedError

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored value."""
        return VALUE_TYPES[self.precision][1]

    @property
    def nbytes(self) -> int:
        """Stored size in bytes, indices and scales included."""
        return sum(array.nbytes for array in self.tensors().values())

    def types(self) -> dict[str, str]:
        """Type of each array in the file, by its name there."""
        own = self.arrays | {"values": VALUE_TYPES[self.precision][0]}
        return own if self.scale is None else own | {"scale": "F32"}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays of the file, by the name they get there."""
        found: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in self.arrays}
        if self.precision == "bf16":
            found["values"] = (np.ascontiguousarray(self.values).view(np.uint32) >> 16).astype(np.uint16)
        elif self.scale is not None:
            found["values"] = np.rint(self.values / self.scale[self._value_rows]).astype(np.int8)
            found["scale"] = self.scale
        return found

    def _described(self, words: str) -> str:
        return words if self.precision == "f32" else f"{words}, {self.precision}"


@dataclass(frozen=True, eq=False)
class Dense(_Values):
    """Every element stored, row after row.

    ::

        values  (rows, cols) float32
    """

    values: Float
    gates: int = 1
    precision: Precision = field(default="f32", kw_only=True)
    scale: Float | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "dense"
    arrays: ClassVar[dict[str, str]] = {"values": "F32"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _finite_matrix(self.values, self.gates))

    @classmethod
    def from_dense(cls, weight: Any, gates: int = 1) -> Dense:
        """Store ``weight`` (outputs, inputs) as it is."""
        return cls(weight, gates)

    def to_dense(self) -> Float:
        """The matrix, (rows, cols)."""
        return self.values

    def matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        """``W x`` in the precision of ``x``: the readable definition of the kernel."""
        product: NDArray[Any] = self.values.astype(x.dtype) @ self._seen(x)
        return product

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def elements(self) -> int:
        """Elements stored, padding not counted: one multiply-accumulate each when the whole matrix is used."""
        return self.values.size

    @cached_property
    def column_elements(self) -> NDArray[np.int64]:
        """(cols,) elements stored in each input column: the multiply-accumulates that one event there costs."""
        return np.full(self.shape[1], self.shape[0], np.int64)

    @cached_property
    def column_index_bytes(self) -> NDArray[np.int64]:
        """(cols,) bytes of index read when one event visits a column."""
        return np.zeros(self.shape[1], np.int64)

    @property
    def _value_rows(self) -> NDArray[np.int64]:
        return np.arange(self.shape[0])[:, None]

    @property
    def _value_columns(self) -> NDArray[np.int64]:
        return np.arange(self.shape[1])

    def layout(self) -> dict[str, Any]:
        """What the file's op list says of this matrix."""
        rounded = {} if self.precision == "f32" else {"precision": self.precision}
        return {"format": self.kind, "rows": self.shape[0], "cols": self.shape[1], "gates": self.gates} | rounded

    @property
    def description(self) -> str:
        """One phrase for tables."""
        return self._described("dense")


@dataclass(frozen=True, eq=False)
class _Sparse(_Values):
    """What the formats that leave zeros out have in common; ``arrays`` names what the file stores, and its types."""

    rows: int
    cols: int
    gates: int
    precision: Precision = field(default="f32", kw_only=True)
    scale: Float | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.rows, self.cols

    @cached_property
    def column_elements(self) -> NDArray[np.int64]:
        """(cols,) elements stored in each input column: the multiply-accumulates that one event there costs."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Elements stored, padding not counted, zeros inside a kept block or group counted."""
        return int(self.column_elements.sum())

    @property
    def density(self) -> float:
        """Share of elements stored."""
        return self.elements / max(self.rows * self.cols, 1)

    def layout(self) -> dict[str, Any]:
        """What the file's op list says of this matrix."""
        left_out = {*self.arrays, "scale", *(["precision"] if self.precision == "f32" else [])}
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {"format": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}

    def _check_gates(self) -> None:
        if self.gates < 1 or self.rows % self.gates:
            raise ValueError(f"a matrix of {self.rows} rows cannot hold {self.gates} gates of equal height.")


@dataclass(frozen=True, eq=False)
class Block(_Sparse):
    """Only the blocks that hold something, by input column, so that an event reads one stretch of memory.

    ::

                 input columns, b_c at a time
                 |  0  |  1  |  2  | ...            start      (block columns + 1)  first block of each block column
        gate 0   [#####]     [#####]                block_row  (blocks)             which block row, ascending
                       [#####]                      values     (blocks, b_c, b_r)   one input's b_r outputs lie together
        gate 1   [#####]     [#####]

    Block rows are counted over all gates, ``ceil(rows / gates / b_r)`` in each, from the first row of every gate. Blocks
    at an edge are short; they are stored whole, padded with zeros that are never added to anything.
    """

    block: tuple[int, int]
    values: Float
    block_row: Index
    start: Index
    kind: ClassVar[str] = "block"
    arrays: ClassVar[dict[str, str]] = {"values": "F32", "block_row": "U32", "start": "U32"}

    def __post_init__(self) -> None:
        br, bc = self.block
        if br < 1 or bc < 1 or br > MAX_BLOCK or bc > MAX_BLOCK:
            raise ValueError(f"block=({br}, {bc}) must lie between (1, 1) and ({MAX_BLOCK}, {MAX_BLOCK}).")
        self._check_gates()
        if self.block_row.ndim != 1:
            raise ValueError(f"block_row has one axis, got shape {self.block_row.shape}.")
        columns, block_rows = _ceil_div(self.cols, bc), self.gates * self.blocks_per_gate
        if self.values.shape != (len(self.block_row), bc, br) or self.start.shape != (columns + 1,):
            raise ValueError(
                f"a block matrix of {len(self.block_row)} blocks of {br}x{bc} in {columns} block columns stores values "
                f"({len(self.block_row)}, {bc}, {br}) and start ({columns + 1},); got {self.values.shape}, {self.start.shape}."
            )
        _check_index(self.block_row, self.start, block_rows, "block row", "block")

    @property
    def blocks_per_gate(self) -> int:
        """Block rows of one gate."""
        return _ceil_div(self.rows // self.gates, self.block[0])

    @classmethod
    def from_dense(cls, weight: Any, block: tuple[int, int], gates: int = 1) -> Block:
        """Keep the blocks (outputs, inputs) of ``weight`` that hold any non-zero."""
        if min(block) < 1:
            raise ValueError(f"block={tuple(block)} must be at least (1, 1).")
        tiles = cls._tiles(_finite_matrix(weight, gates), block, gates)
        column, row = np.nonzero(tiles.any(axis=(2, 3)).T)
        start = np.searchsorted(column, np.arange(tiles.shape[1] + 1)).astype(np.uint32)
        values = np.ascontiguousarray(tiles[row, column].transpose(0, 2, 1))
        shape = np.shape(weight)
        return cls(shape[0], shape[1], gates, block, values, row.astype(np.uint32), start)

    @staticmethod
    def _tiles(matrix: Float, block: tuple[int, int], gates: int) -> Float:
        """(block rows over all gates, block columns, b_r, b_c), edges padded with zeros."""
        br, bc = block
        rows, cols = matrix.shape
        units = rows // gates
        r, c = _ceil_div(units, br), _ceil_div(cols, bc)
        padded = np.zeros((gates, r * br, c * bc), np.float32)
        padded[:, :units, :cols] = matrix.reshape(gates, units, cols)
        return padded.reshape(gates * r, br, c, bc).transpose(0, 2, 1, 3)

    @property
    def _value_rows(self) -> NDArray[np.int64]:
        gate, within = np.divmod(self.block_row.astype(np.int64), self.blocks_per_gate)
        first: NDArray[np.int64] = gate * (self.rows // self.gates) + within * self.block[0]
        rows: NDArray[np.int64] = first[:, None, None] + np.arange(self.block[0])
        return rows.clip(max=self.rows - 1)

    @property
    def _value_columns(self) -> NDArray[np.int64]:
        columns: NDArray[np.int64] = self._block_column[:, None] * self.block[1] + np.arange(self.block[1])
        return columns.clip(max=self.cols - 1)[..., None]

    @cached_property
    def _blocks_per_column(self) -> NDArray[np.int64]:
        start = self.start.astype(np.int64)
        return start[1:] - start[:-1]

    @cached_property
    def _block_column(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.start) - 1), self._blocks_per_column)

    def to_dense(self) -> Float:
        """The matrix, (rows, cols)."""
        br, bc = self.block
        per_gate, columns, units = self.blocks_per_gate, len(self.start) - 1, self.rows // self.gates
        tiles = np.zeros((self.gates * per_gate, columns, br, bc), np.float32)
        tiles[self.block_row, self._block_column] = self.values.transpose(0, 2, 1)
        padded = tiles.transpose(0, 2, 1, 3).reshape(self.gates, per_gate * br, columns * bc)
        return np.ascontiguousarray(padded[:, :units, : self.cols]).reshape(self.rows, self.cols)

    def matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        """``W x`` in the precision of ``x``: the readable definition of the kernel."""
        br, bc = self.block
        padded = np.zeros((len(self.start) - 1) * bc, x.dtype)
        padded[: self.cols] = self._seen(x)
        products = np.einsum("kcr,kc->kr", self.values.astype(x.dtype), padded.reshape(-1, bc)[self._block_column])
        out = np.zeros((self.gates * self.blocks_per_gate, br), x.dtype)
        np.add.at(out, self.block_row, products)
        units = self.rows // self.gates
        return out.reshape(self.gates, -1)[:, :units].reshape(-1)

    @cached_property
    def _block_heights(self) -> NDArray[np.int64]:
        """(blocks,) rows of each block that exist."""
        units = self.rows // self.gates
        first = self.block_row.astype(np.int64) % self.blocks_per_gate * self.block[0]
        return np.minimum(self.block[0], units - first)

    @cached_property
    def column_elements(self) -> NDArray[np.int64]:
        """(cols,) elements stored in each input column: the multiply-accumulates that one event there costs."""
        per_block_column = np.zeros(len(self.start) - 1, np.int64)
        np.add.at(per_block_column, self._block_column, self._block_heights)
        return np.repeat(per_block_column, self.block[1])[: self.cols]

    @cached_property
    def column_index_bytes(self) -> NDArray[np.int64]:
        """(cols,) bytes of index read when one event visits a column: one entry a block, and two of ``start``."""
        return np.repeat(4 * self._blocks_per_column + 8, self.block[1])[: self.cols]

    @property
    def description(self) -> str:
        """One phrase for tables."""
        return self._described(f"blocks {self.block[0]}x{self.block[1]}, density {self.density:.3f}")


@dataclass(frozen=True, eq=False)
class CSC(_Sparse):
    """Compressed sparse columns: single elements, by input column. What is left when zeros follow no pattern.

    ::

        start   (cols + 1) uint32   column c owns elements start[c] to start[c + 1]
        row     (elements) uint16   output, ascending within a column
        values  (elements) float32
    """

    values: Float
    row: NDArray[np.uint16]
    start: Index
    kind: ClassVar[str] = "csc"
    arrays: ClassVar[dict[str, str]] = {"values": "F32", "row": "U16", "start": "U32"}

    def __post_init__(self) -> None:
        self._check_gates()
        if self.rows > 2**16:
            raise ValueError(
                f"a CSC matrix has at most 65536 rows, got {self.rows}. Store it as Block with block=(1, 1)."
            )
        if self.values.ndim != 1 or self.row.shape != self.values.shape or self.start.shape != (self.cols + 1,):
            raise ValueError(
                f"a CSC matrix of {self.cols} columns stores start ({self.cols + 1},) and as many rows as values; "
                f"got {self.start.shape}, {self.row.shape}, {self.values.shape}."
            )
        _check_index(self.row, self.start, self.rows, "row", "element")

    @classmethod
    def from_dense(cls, weight: Any, gates: int = 1) -> CSC:
        """Keep the non-zero elements of ``weight`` (outputs, inputs)."""
        matrix = _finite_matrix(weight, gates)
        column, row = np.nonzero(matrix.T)
        start = np.searchsorted(column, np.arange(matrix.shape[1] + 1)).astype(np.uint32)
        values = np.ascontiguousarray(matrix[row, column])
        if matrix.shape[0] > 2**16:
            raise ValueError(f"a CSC matrix has at most 65536 rows, got {matrix.shape[0]}.")
        return cls(matrix.shape[0], matrix.shape[1], gates, values, row.astype(np.uint16), start)

    @property
    def _value_rows(self) -> NDArray[np.int64]:
        return self.row.astype(np.int64)

    @property
    def _value_columns(self) -> NDArray[np.int64]:
        return self._column

    @cached_property
    def _column(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.cols), self.column_elements)

    def to_dense(self) -> Float:
        """The matrix, (rows, cols)."""
        out = np.zeros((self.rows, self.cols), np.float32)
        out[self.row, self._column] = self.values
        return out

    def matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        """``W x`` in the precision of ``x``: the readable definition of the kernel."""
        out = np.zeros(self.rows, x.dtype)
        np.add.at(out, self.row, self.values.astype(x.dtype) * self._seen(x)[self._column])
        return out

    @cached_property
    def column_elements(self) -> NDArray[np.int64]:
        """(cols,) elements stored in each input column: the multiply-accumulates that one event there costs."""
        start = self.start.astype(np.int64)
        return start[1:] - start[:-1]

    @cached_property
    def column_index_bytes(self) -> NDArray[np.int64]:
        """(cols,) bytes of index read when one event visits a column: two bytes an element, and two of ``start``."""
        return 2 * self.column_elements + 8

    @property
    def description(self) -> str:
        """One phrase for tables."""
        return self._described(f"csc, density {self.density:.3f}")


@dataclass(frozen=True, eq=False)
class Complementary(_Sparse):
    """``overlay`` = k sparse groups of rows packed as one: of each set exactly one group lives in every column.

    ::

        a gate of R rows, padded to R' = ceil(R / (k g)) k g, has S = R' / (k g) sets
        group q of set s = rows (q S + s) g ... + g of the gate

        values  (cols, gates, S, g) float32   one packed row of values for every column
        live    (cols, gates, S) uint8        which group q of each set they belong to

    No pointers, and the same work for every column. With group=1 this is the form of complementary sparsity (K. Hunter
    et al., *Two sparsities are better than one*, 2022); with group=16 a group is one vector.
    """

    overlay: int
    group: int
    values: Float
    live: NDArray[np.uint8]
    kind: ClassVar[str] = "complementary"
    arrays: ClassVar[dict[str, str]] = {"values": "F32", "live": "U8"}

    def __post_init__(self) -> None:
        self._check_gates()
        self._check_packing(self.overlay, self.group)
        shape = (self.cols, self.gates, self.sets)
        if self.live.shape != shape or self.values.shape != (*shape, self.group):
            raise ValueError(
                f"a complementary matrix of {self.cols} columns, {self.gates} gates and {self.sets} sets stores live {shape} "
                f"and values {(*shape, self.group)}; got {self.live.shape} and {self.values.shape}."
            )
        if self.live.size and self.live.max() >= self.overlay:
            raise ValueError(f"group {self.live.max()} is out of range; a set has {self.overlay} groups.")
        if self.values[np.arange(self.group) >= self._heights[..., None]].any():
            raise ValueError("rows beyond the end of a gate must be zero.")

    @staticmethod
    def _check_packing(overlay: int, group: int) -> None:
        for name, n in (("overlay", overlay), ("group", group)):
            if not 1 <= n <= MAX_BLOCK:
                raise ValueError(f"{name} must lie between 1 and {MAX_BLOCK}, got {n}.")

    @property
    def sets(self) -> int:
        """Sets of a gate, S."""
        return _ceil_div(self.rows // self.gates, self.overlay * self.group)

    @classmethod
    def from_dense(cls, weight: Any, overlay: int, group: int = 1, gates: int = 1) -> Complementary:
        """Pack ``weight`` (outputs, inputs). Raises ``ValueError`` where two groups of a set live in one column."""
        cls._check_packing(overlay, group)
        matrix = _finite_matrix(weight, gates)
        rows, cols = matrix.shape
        units, sets = rows // gates, _ceil_div(rows // gates, overlay * group)
        padded = np.zeros((gates, overlay * sets * group, cols), np.float32)
        padded[:, :units] = matrix.reshape(gates, units, cols)
        grouped = padded.transpose(2, 0, 1).reshape(cols, gates, overlay, sets, group)
        alive = grouped.any(axis=4)
        if (alive.sum(axis=2) > 1).any():
            column, gate, s = np.argwhere(alive.sum(axis=2) > 1)[0]
            raise ValueError(
                f"in column {column}, gate {gate}, set {s} has more than one live group of {group} rows: this matrix is not "
                f"complementary with overlay={overlay}. Prune it so, or choose another format."
            )
        live = alive.argmax(axis=2)
        values = np.take_along_axis(grouped, live[:, :, None, :, None], axis=2)[:, :, 0]
        return cls(rows, cols, gates, overlay, group, np.ascontiguousarray(values), live.astype(np.uint8))

    @property
    def _value_rows(self) -> NDArray[np.int64]:
        group = self.live.astype(np.int64) * self.sets + np.arange(self.sets)
        first = group * self.group + (self.rows // self.gates) * np.arange(self.gates)[None, :, None]
        rows: NDArray[np.int64] = first[..., None] + np.arange(self.group)
        return rows.clip(max=self.rows - 1)

    @property
    def _value_columns(self) -> NDArray[np.int64]:
        return np.arange(self.cols)[:, None, None, None]

    @cached_property
    def _heights(self) -> NDArray[np.int64]:
        """(cols, gates, S) rows of each live group that exist."""
        first = (self.live.astype(np.int64) * self.sets + np.arange(self.sets)) * self.group
        left: NDArray[np.int64] = self.rows // self.gates - first
        return left.clip(0, self.group)

    def to_dense(self) -> Float:
        """The matrix, (rows, cols)."""
        units = self.rows // self.gates
        grouped = np.zeros((self.cols, self.gates, self.overlay, self.sets, self.group), np.float32)
        np.put_along_axis(grouped, self.live[:, :, None, :, None].astype(np.int64), self.values[:, :, None], axis=2)
        stacked = grouped.reshape(self.cols, self.gates, -1)[:, :, :units]
        return np.ascontiguousarray(stacked.transpose(1, 2, 0)).reshape(self.rows, self.cols)

    def to_block(self) -> Block:
        """The same matrix in blocks (group, 1), by column; groups beyond the end of a gate left out."""
        per_gate = _ceil_div(self.rows // self.gates, self.group)
        within = self.live.astype(np.int64) * self.sets + np.arange(self.sets)
        row = within + per_gate * np.arange(self.gates)[None, :, None]
        column = np.broadcast_to(np.arange(self.cols)[:, None, None], row.shape)
        exists = within < per_gate
        order = np.lexsort((row[exists], column[exists]))
        start = np.searchsorted(column[exists][order], np.arange(self.cols + 1)).astype(np.uint32)
        values = np.ascontiguousarray(self.values[exists][order][:, None])
        return Block(
            self.rows, self.cols, self.gates, (self.group, 1), values, row[exists][order].astype(np.uint32), start,
            precision=self.precision, scale=self.scale,
        )  # fmt: skip

    def matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        """``W x`` in the precision of ``x``: the readable definition of the kernel."""
        products = self.values.astype(x.dtype) * self._seen(x)[:, None, None, None]
        out = np.zeros((self.gates, self.overlay, self.sets, self.group), x.dtype)
        for q in range(self.overlay):
            out[:, q] = np.where((self.live == q)[..., None], products, 0).sum(axis=0)
        return out.reshape(self.gates, -1)[:, : self.rows // self.gates].reshape(-1)

    @cached_property
    def column_elements(self) -> NDArray[np.int64]:
        """(cols,) elements stored in each input column: the multiply-accumulates that one event there costs."""
        total: NDArray[np.int64] = self._heights.sum(axis=(1, 2))
        return total

    @cached_property
    def column_index_bytes(self) -> NDArray[np.int64]:
        """(cols,) bytes of index read when one event visits a column: one byte a set."""
        return np.full(self.cols, self.gates * self.sets, np.int64)

    @property
    def description(self) -> str:
        """One phrase for tables."""
        return self._described(f"complementary, overlay {self.overlay}, group {self.group}")


Format = Dense | CSC | Block | Complementary
FORMATS: dict[str, type[Dense] | type[CSC] | type[Block] | type[Complementary]] = {
    f.kind: f for f in (Dense, CSC, Block, Complementary)
}


def is_format(value: Any) -> TypeGuard[Format]:
    """Whether ``value`` is a stored matrix."""
    return isinstance(value, Dense | _Sparse)


def _check_index(index: NDArray[Any], start: Index, limit: int, what: str, entry: str) -> None:
    """``start`` rises from 0 to the number of entries; within each stretch ``index`` ascends below ``limit``."""
    begins, found = start.astype(np.int64), index.astype(np.int64)
    if begins[0] != 0 or begins[-1] != len(found) or (begins[1:] < begins[:-1]).any():
        raise ValueError(f"start must rise from 0 to the number of {entry}s, {len(found)}.")
    if len(found) and found.max() >= limit:
        raise ValueError(f"{what} {found.max()} is out of range; the matrix has {limit} {what}s.")
    falls = np.flatnonzero(found[1:] <= found[:-1]) + 1
    if not np.isin(falls, begins).all():
        raise ValueError(f"the {what}s of a column must ascend.")
