"""Weight matrices and their products as C99, for :mod:`sparsefold.export_c`.

A product that reads events takes a matrix by columns, one that reads every value of x by rows, whose sums can stay in
registers: ``columns`` and ``whole`` write the order that is wanted. Values keep the type they have in the file. What is written
once for each format, precision and size of blocks is a *kind*: a type and a function, made by the functions at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsefold.formats import CSC, Block, Complementary, Dense, Format

WriteArray = Callable[..., str]  # (name, values, C type, comment) -> the name
AddColumn = Callable[
    [str, str, str], str
]  # (column, value, target) in C -> the statement target += W[:, column] * value

PREAMBLE = """
/* GCC unrolls a loop of few steps before it could make vectors of it, unless it is told not to. */
#if defined(__GNUC__) && !defined(__clang__)
#define ROLLED _Pragma("GCC unroll 1")
#else
#define ROLLED
#endif
"""

FROM_BF16 = """
/* A bfloat16 is the upper half of a float. */
static inline float from_bf16(uint16_t upper)
{
    union {
        uint32_t bits;
        float value;
    } u;
    u.bits = (uint32_t)upper << 16;
    return u.value;
}
"""

CODES_OF = """
/* x in codes from -127 to 127, in units of what is returned: of the largest value / 127. No number where one of x is none. */
static float codes_of(const float *x, uint32_t n, int8_t *codes)
{
    float largest = 0.0f, nothing = 0.0f, inverse;
    uint32_t j;
    for (j = 0; j < n; ++j) {
        const float size = fabsf(x[j]);
        largest = size > largest ? size : largest;
        nothing += 0.0f * x[j]; /* of infinity and of what is no number it is no number */
    }
    inverse = nothing == 0.0f && largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (j = 0; j < n; ++j) codes[j] = inverse > 0.0f ? (int8_t)rintf(x[j] * inverse) : 0;
    return nothing + (inverse > 0.0f ? largest / 127.0f : 0.0f);
}
"""


@dataclass(frozen=True)
class _Precision:
    """How values of a matrix are stored in C, and what a product makes of them."""

    suffix: str
    type: str
    x: str = "float"  # what a product over all of x reads
    sum: str = "float"
    scaled: bool = False

    def value(self, at: str) -> str:
        """A stored value that is multiplied."""
        if self.suffix == "_bf16":
            return f"from_bf16({at})"
        return f"(float){at}" if self.suffix == "_i8" else at

    def weight(self, at: str, row: str) -> str:
        """The weight it stands for."""
        return f"{self.value(at)} * {row}" if self.scaled else self.value(at)

    def product(self, total: str, row: str) -> str:
        """What is added to y for a sum over x of stored values."""
        if self.suffix == "_w8a8":
            return f"(float){total} * ({row} * step)"
        return f"{total} * {row}" if self.scaled else total

    @property
    def member(self) -> str:
        """The scales in the type of a matrix."""
        return "    const float *scale; /* of each row */\n" if self.scaled else ""

    @property
    def step(self) -> str:
        """The parameter of x's unit."""
        return "float step, " if self.suffix == "_w8a8" else ""


_PRECISIONS = {
    "f32": _Precision("", "float"),
    "bf16": _Precision("_bf16", "uint16_t"),
    "i8": _Precision("_i8", "int8_t", scaled=True),
    "w8a8": _Precision("_w8a8", "int8_t", "int8_t", "int32_t", scaled=True),
}


class Products:
    """Writes matrices, and remembers which kinds they are of."""

    def __init__(self, array: WriteArray, struct: Callable[[str, str, list[str]], None]) -> None:
        self.array, self.struct = array, struct
        self.kinds: dict[str, str] = {}  # name -> type and function
        self.used: set[str] = set()  # precisions

    def columns(self, name: str, matrix: Format) -> AddColumn:
        """The matrix, read by column."""
        p = self._precision("i8" if matrix.precision == "w8a8" else matrix.precision)
        stored, members = matrix.tensors(), []
        if isinstance(matrix, Dense):
            kind, text = _dense_columns(p)
            members = [self._values(name, stored["values"].T, p, matrix), *self._scale(name, stored)]
            members.append(str(matrix.shape[0]))
        elif isinstance(matrix, Complementary):
            kind, text = _complementary(p)
            members = [self._values(name, stored["values"], p, matrix), *self._scale(name, stored)]
            members.append(self.array(f"{name}_live", matrix.live, "uint8_t"))
            members += map(str, (matrix.gates, matrix.rows // matrix.gates, matrix.sets, matrix.group))
        else:
            layout = _Blocks.of(matrix)
            kind, text = _block_columns(p, layout)
            members = [self._values(name, stored["values"], p, matrix), *self._scale(name, stored)]
            members.append(self.array(f"{name}_start", matrix.start, "uint32_t"))
            members.append(self.array(f"{name}_row", layout.first_rows(matrix), layout.index))
            if layout.short_rows:
                members.append(self.array(f"{name}_height", layout.heights(matrix), "uint8_t"))
        self.kinds[kind] = text
        self.struct(kind, name, members)
        return lambda column, value, to: f"add_{kind}(&{name}, {column}, {value}, {to});"

    def whole(self, name: str, matrix: Format, x: str, y: str, codes: str) -> list[str]:
        """The matrix, and C that adds W x to ``y``; ``codes`` has room for x in codes, where the product reads those."""
        cols, by_codes = matrix.shape[1], matrix.precision == "w8a8"
        if isinstance(matrix, Complementary):  # every column has as many values, wherever they belong
            value = f"step * (float){codes}[i]" if by_codes else f"{x}[i]"
            lines = [f"for (i = 0; i < {cols}; ++i) {self.columns(name, matrix)('i', value, y)}"]
        else:
            p, stored = self._precision(matrix.precision), matrix.tensors()
            if isinstance(matrix, Dense):
                kind, text = _dense_whole(p)
                members = [self._values(name, stored["values"].T, p, matrix), *self._scale(name, stored)]
                members += map(str, matrix.shape)
            else:
                layout = _Blocks.of(matrix)
                kind, text = _block_rows(p, layout)
                order, start, column = layout.by_rows(matrix)
                members = [self._values(name, stored["values"][order], p, matrix), *self._scale(name, stored)]
                members.append(self.array(f"{name}_start", start, "uint32_t"))
                members.append(self.array(f"{name}_column", column, layout.index))
                members += map(str, (matrix.gates, matrix.rows // matrix.gates, *([cols] if layout.short_cols else [])))
            self.kinds[kind] = text
            self.struct(kind, name, members)
            lines = [f"multiply_{kind}(&{name}, {codes + ', step' if by_codes else x}, {y});"]
        if not by_codes:
            return [f"    {line}" for line in lines]
        self.used.add("w8a8")
        return [
            "    {",
            f"        const float step = codes_of({x}, {cols}, {codes});",
            *(f"        {line}" for line in lines),
            "    }",
        ]

    def text(self) -> list[str]:
        """Types and functions of all kinds that were asked for."""
        needed = [PREAMBLE] if any("ROLLED" in text for text in self.kinds.values()) else []
        needed += [FROM_BF16] if "bf16" in self.used else []
        needed += [CODES_OF] if "w8a8" in self.used else []
        return needed + [self.kinds[kind] for kind in sorted(self.kinds)]

    def _precision(self, precision: str) -> _Precision:
        self.used.add(precision)
        return _PRECISIONS[precision]

    def _values(self, name: str, values: NDArray[np.generic], p: _Precision, matrix: Format) -> str:
        rows, cols = matrix.shape
        return self.array(f"{name}_values", values, p.type, f"{rows} x {cols}, {matrix.description}")

    def _scale(self, name: str, stored: dict[str, NDArray[np.generic]]) -> list[str]:
        return [self.array(f"{name}_scale", stored["scale"])] if "scale" in stored else []


@dataclass(frozen=True)
class _Blocks:
    """Size of the blocks of a matrix, single elements being blocks of 1x1, and what makes its loops longer."""

    rows: int
    cols: int
    short_rows: bool  # the last blocks of a gate are lower,
    short_cols: bool  # those of the last columns are narrower
    index: str

    @classmethod
    def of(cls, matrix: Block | CSC) -> _Blocks:
        """Of a matrix."""
        br, bc = matrix.block if isinstance(matrix, Block) else (1, 1)
        index = "uint16_t" if max(matrix.shape) <= 2**16 else "uint32_t"
        return cls(br, bc, bool(matrix.rows // matrix.gates % br), bool(matrix.cols % bc), index)

    def name(self, order: str, p: _Precision) -> str:
        """Of the kind."""
        low, wide = "_low" * self.short_rows, "_wide" * (self.index == "uint32_t")
        narrow = "_narrow" * (self.short_cols and order == "rows")  # by column a block is never read beyond the last
        return f"{order}_{self.rows}x{self.cols}{p.suffix}{low}{narrow}{wide}"

    def block_rows(self, matrix: Block | CSC) -> NDArray[np.int64]:
        """Block row of each block, over all gates."""
        return (matrix.block_row if isinstance(matrix, Block) else matrix.row).astype(np.int64)

    def first_rows(self, matrix: Block | CSC) -> NDArray[np.int64]:
        """First row of each block."""
        units = matrix.rows // matrix.gates
        gate, inside = np.divmod(self.block_rows(matrix), -(-units // self.rows))
        first: NDArray[np.int64] = gate * units + inside * self.rows
        return first

    def heights(self, matrix: Block | CSC) -> NDArray[np.int64]:
        """Rows of each block that exist."""
        units = matrix.rows // matrix.gates
        return np.minimum(self.rows, units - self.first_rows(matrix) % units)

    def by_rows(self, matrix: Block | CSC) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(the blocks in the order of their rows, where each block row starts among them, first column of each)."""
        row, start = self.block_rows(matrix), matrix.start.astype(np.int64)
        order = np.argsort(row, kind="stable")
        block_rows = matrix.gates * -(-matrix.rows // matrix.gates // self.rows)
        column = np.repeat(np.arange(len(start) - 1), np.diff(start)) * self.cols
        return order, np.searchsorted(row[order], np.arange(block_rows + 1)), column[order]


def _dense_columns(p: _Precision) -> tuple[str, str]:
    kind = f"columns{p.suffix}"
    text = f"""
/* Every element, column after column. */
typedef struct {{
    const {p.type} *values;
{p.member}    uint32_t rows;
}} {kind};

/* y += column of W * x. */
static void add_{kind}(const {kind} *w, uint32_t column, float x, float *restrict y)
{{
    const {p.type} *restrict values = w->values + (size_t)column * w->rows;
    uint32_t j;
    for (j = 0; j < w->rows; ++j) y[j] += {p.weight("values[j]", "w->scale[j]")} * x;
}}
"""
    return kind, text


def _dense_whole(p: _Precision) -> tuple[str, str]:
    kind = f"dense{p.suffix}"
    four = " + ".join(f"{p.value(f'{c}[j]')} * x[i{f' + {k}' * (k > 0)}]" for k, c in enumerate("abcd"))
    one = f"{p.value('a[j]')} * x[i]"
    text = f"""
/* Every element, column after column. */
typedef struct {{
    const {p.type} *values;
{p.member}    uint32_t rows, cols;
}} {kind};

/* y += W x, four columns at a time, for y goes to memory and back each time. */
static void multiply_{kind}(const {kind} *w, const {p.x} *restrict x, {p.step}float *restrict y)
{{
    const uint32_t rows = w->rows;
    const {p.type} *restrict a = w->values;
    uint32_t i, j;
    for (i = 0; i + 4 <= w->cols; i += 4, a += 4 * (size_t)rows) {{
        const {p.type} *restrict b = a + rows, *restrict c = b + rows, *restrict d = c + rows;
        for (j = 0; j < rows; ++j) y[j] += {p.product(f"({four})", "w->scale[j]")};
    }}
    for (; i < w->cols; ++i, a += rows)
        for (j = 0; j < rows; ++j) y[j] += {p.product(f"({one})", "w->scale[j]")};
}}
"""
    return kind, text


def _complementary(p: _Precision) -> tuple[str, str]:
    kind = f"complementary{p.suffix}"
    text = f"""
/* Of each set of groups of rows one lives in every column; group q of set s is rows (q sets + s) group and on of its gate. */
typedef struct {{
    const {p.type} *values; /* (columns, gates, sets, group) */
{p.member}    const uint8_t *live; /* (columns, gates, sets) */
    uint32_t gates, units, sets, group;
}} {kind};

/* y += column of W * x. */
static void add_{kind}(const {kind} *w, uint32_t column, float x, float *y)
{{
    size_t at = (size_t)column * w->gates * w->sets;
    uint32_t gate, set, j;
    for (gate = 0; gate < w->gates; ++gate)
        for (set = 0; set < w->sets; ++set, ++at) {{
            const uint32_t within = (w->live[at] * w->sets + set) * w->group, row = gate * w->units + within;
            const {p.type} *restrict values = w->values + at * w->group;
            float *restrict rows = y + row;
            for (j = 0; j < w->group && within + j < w->units; ++j) rows[j] += {p.weight("values[j]", "w->scale[row + j]")} * x;
        }}
}}
"""
    return kind, text


def _block_columns(p: _Precision, b: _Blocks) -> tuple[str, str]:
    kind = b.name("columns", p)
    height = "    const uint8_t *height; /* rows of a block that exist */\n" if b.short_rows else ""
    one = f"rows[j] += {p.weight('values[j]', 'scale[j]')} * x"
    scale = "        const float *restrict scale = w->scale + w->row[k];\n" if p.scaled else ""
    short = f"""        if (w->height[k] < {b.rows}) {{
            for (j = 0; j < w->height[k]; ++j) {one};
            continue;
        }}
"""
    where = "c = column, inner = 0" if b.cols == 1 else f"c = column / {b.cols}, inner = column % {b.cols}"
    text = f"""
/* Only blocks that hold something: those of block column c are start[c] to start[c + 1]. */
typedef struct {{
    const {p.type} *values; /* (blocks, {b.cols}, {b.rows}): the outputs of one input lie together */
{p.member}    const uint32_t *start;
    const {b.index} *row; /* the first of each block */
{height}}} {kind};

/* y += column of W * x. */
static void add_{kind}(const {kind} *w, uint32_t column, float x, float *restrict y)
{{
    const uint32_t {where};
    uint32_t k, j;
    for (k = w->start[c]; k < w->start[c + 1]; ++k) {{
        const {p.type} *restrict values = w->values + ((size_t)k * {b.cols} + inner) * {b.rows};
        float *restrict rows = y + w->row[k];
{scale}{short if b.short_rows else ""}        ROLLED
        for (j = 0; j < {b.rows}; ++j) {one};
    }}
}}
"""
    return kind, text


def _block_rows(p: _Precision, b: _Blocks) -> tuple[str, str]:
    kind = b.name("rows", p)
    exists = " && first + j < w->units" if b.short_rows else ""
    end = f"w->cols - w->column[k] < {b.cols} ? w->cols - w->column[k] : {b.cols}" if b.short_cols else str(b.cols)
    each = f"sum[j] += {p.value('values[j]')} * one"
    inner = f"""            const {p.x} one = x[w->column[k]];
                ROLLED
                for (j = 0; j < {b.rows}; ++j) {each};
"""
    if b.cols > 1:
        inner = f"""            const uint32_t end = {end};
                for (i = 0; i < end; ++i, values += {b.rows}) {{
                    const {p.x} one = x[w->column[k] + i];
                    ROLLED
                    for (j = 0; j < {b.rows}; ++j) {each};
                }}
"""
    row = "        const float *scale = w->scale + gate * w->units + first;\n    " if p.scaled else ""
    text = f"""
/* Only blocks that hold something: those of block row b are start[b] to start[b + 1]. */
typedef struct {{
    const {p.type} *values; /* (blocks, {b.cols}, {b.rows}): the outputs of one input lie together */
{p.member}    const uint32_t *start;
    const {b.index} *column; /* the first of each block */
    uint32_t gates, units{", cols" if b.short_cols else ""};
}} {kind};

/* y += W x; sums of a block row can stay in registers. */
static void multiply_{kind}(const {kind} *w, const {p.x} *restrict x, {p.step}float *restrict y)
{{
    const uint32_t *start = w->start;
    uint32_t gate, first, k, j{", i" if b.cols > 1 else ""};
    for (gate = 0; gate < w->gates; ++gate)
        for (first = 0; first < w->units; first += {b.rows}, ++start) {{
    {row}        float *rows = y + gate * w->units + first;
            {p.sum} sum[{b.rows}] = {{0}};
            for (k = start[0]; k < start[1]; ++k) {{
                const {p.type} *restrict values = w->values + (size_t)k * {b.rows * b.cols};
    {inner}            }}
            for (j = 0; j < {b.rows}{exists}; ++j) rows[j] += {p.product("sum[j]", "scale[j]")};
        }}
}}
"""
    return kind, text
