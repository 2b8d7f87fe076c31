"""How a weight matrix is stored. A format knows its layout, its zeros and its size; it knows no torch.

All matrices have shape ``(rows, cols) = (outputs, inputs)``. ``gates`` says how many gates of equal height are stacked
in the rows (3 for a GRU, 1 for a decoder); a block never reaches over the edge of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Index = NDArray[np.uint32]

# Rows and columns of a block. It also bounds what the engine's index of every column can take beside the file's index of
# every block column.
MAX_BLOCK = 64


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


@dataclass(frozen=True, eq=False)
class Dense:
    """Every element stored, row after row.

    ::

        values  (rows, cols) float32
    """

    values: Float
    gates: int = 1
    kind: ClassVar[str] = "dense"

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
        product: NDArray[Any] = self.values.astype(x.dtype) @ x
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
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.values.nbytes

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays of the file, by the name they get there."""
        return {"values": self.values}

    def layout(self) -> dict[str, Any]:
        """What the file's op list says of this matrix."""
        return {"format": self.kind, "rows": self.shape[0], "cols": self.shape[1], "gates": self.gates}

    @property
    def description(self) -> str:
        """One phrase for tables."""
        return "dense"


@dataclass(frozen=True, eq=False)
class Block:
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

    rows: int
    cols: int
    gates: int
    block: tuple[int, int]
    values: Float
    block_row: Index
    start: Index
    kind: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        br, bc = self.block
        if br < 1 or bc < 1 or br > MAX_BLOCK or bc > MAX_BLOCK:
            raise ValueError(f"block=({br}, {bc}) must lie between (1, 1) and ({MAX_BLOCK}, {MAX_BLOCK}).")
        if self.gates < 1 or self.rows % self.gates:
            raise ValueError(f"a matrix of {self.rows} rows cannot hold {self.gates} gates of equal height.")
        columns, block_rows = _ceil_div(self.cols, bc), self.gates * self.blocks_per_gate
        if self.values.shape != (len(self.block_row), bc, br) or self.start.shape != (columns + 1,):
            raise ValueError(
                f"a block matrix of {len(self.block_row)} blocks of {br}x{bc} in {columns} block columns stores values "
                f"({len(self.block_row)}, {bc}, {br}) and start ({columns + 1},); got {self.values.shape}, {self.start.shape}."
            )
        start, row = self.start.astype(np.int64), self.block_row.astype(np.int64)
        if start[0] != 0 or start[-1] != len(row) or (np.diff(start) < 0).any():
            raise ValueError(f"start must rise from 0 to the number of blocks, {len(row)}.")
        if len(row) and row.max() >= block_rows:
            raise ValueError(f"block row {row.max()} is out of range; the matrix has {block_rows} block rows.")
        falls = np.flatnonzero(np.diff(row) <= 0) + 1
        if not np.isin(falls, start).all():
            raise ValueError("the block rows of a block column must ascend.")

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
        padded[: self.cols] = x
        products = np.einsum("kcr,kc->kr", self.values.astype(x.dtype), padded.reshape(-1, bc)[self._block_column])
        out = np.zeros((self.gates * self.blocks_per_gate, br), x.dtype)
        np.add.at(out, self.block_row, products)
        units = self.rows // self.gates
        return out.reshape(self.gates, -1)[:, :units].reshape(-1)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.rows, self.cols

    @cached_property
    def _block_heights(self) -> NDArray[np.int64]:
        """(blocks,) rows of each block that exist."""
        units = self.rows // self.gates
        first = self.block_row.astype(np.int64) % self.blocks_per_gate * self.block[0]
        return np.minimum(self.block[0], units - first)

    @property
    def elements(self) -> int:
        """Elements in stored blocks, padding not counted, zeros inside a kept block counted."""
        return int(self.column_elements.sum())

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
    def nbytes(self) -> int:
        """Stored size in bytes, indices included."""
        return self.values.nbytes + self.block_row.nbytes + self.start.nbytes

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays of the file, by the name they get there."""
        return {"values": self.values, "block_row": self.block_row, "start": self.start}

    def layout(self) -> dict[str, Any]:
        """What the file's op list says of this matrix."""
        return {
            "format": self.kind,
            "rows": self.rows,
            "cols": self.cols,
            "gates": self.gates,
            "block": list(self.block),
        }

    @property
    def description(self) -> str:
        """One phrase for tables."""
        density = self.elements / (self.rows * self.cols) if self.rows * self.cols else 0.0
        return f"blocks {self.block[0]}x{self.block[1]}, density {density:.3f}"


Format = Dense | Block
FORMATS: dict[str, type[Dense] | type[Block]] = {f.kind: f for f in (Dense, Block)}
