"""A program as one self-contained C99 file: weights as constants, static memory, nothing of libc but ``math.h``.

Read the C as :func:`sparsefold.interpret` with the products of silent units left out. An op is one method of ``_Writer``;
a format is one line there that adds a column, and the helper in ``_HELPERS`` that it calls.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.c_products import AddColumn, Products
from sparsefold.formats import CSC, Block, Complementary, Dense, Float, Format
from sparsefold.program import (
    DELTA_REFRESH,
    EGRU,
    GRU,
    KWTA,
    LSTM,
    RNN,
    Cluster,
    Conv1d,
    Embedding,
    LayerNorm,
    Linear,
    LogSoftmax,
    Picks,
    Program,
    Recurrent,
    ReLU,
    TopK,
    write_atomically,
)

_HELPERS = {
    "exp_minus": """
/* e^-a of a >= 0, from 87 on that of 87: a power of two times a Taylor polynomial. Without a branch and without a call, so that
 * a compiler can play many units at once. */
static inline float exp_minus(float a)
{
    union {
        float value;
        uint32_t bits;
    } size, bounded, power;
    int32_t n;
    float r;
    size.value = a;
    bounded.bits = size.bits > 0x42ae0000u ? 0x42ae0000u : size.bits;
    n = (int32_t)(bounded.value * 1.44269504f + 0.5f);
    size.bits = size.bits > 0x7f800000u ? size.bits : bounded.bits; /* what is no number stays none */
    r = ((float)n * 0.693359375f - size.value) - (float)n * 2.12194440e-4f;
    power.bits = (uint32_t)(127 - n) << 23;
    r = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    return power.value * r;
}
""",
    "sigmoid": """
static inline float sigmoid(float x)
{
    union {
        float value;
        uint32_t bits;
    } size;
    uint32_t negative;
    float e;
    size.value = x;
    negative = size.bits >> 31;
    size.bits &= 0x7fffffffu;
    e = exp_minus(size.value);
    return (negative ? e : 1.0f) / (1.0f + e);
}
""",
    "tanh_of": """
static inline float tanh_of(float x)
{
    return 2.0f * sigmoid(2.0f * x) - 1.0f;
}
""",
    "order_of": """
/* Floats as integers of the same order, both zeros alike, what is no number above all. */
static uint32_t order_of(float x)
{
    union {
        float value;
        uint32_t bits;
    } u;
    u.value = x + 0.0f;
    if (x != x) return 0xffffffffu;
    return u.bits & 0x80000000u ? ~u.bits : u.bits | 0x80000000u;
}
""",
    "kwta": """
/* y = the k largest of x, zero elsewhere; ties to the lower index. The smallest of them is found bit by bit. */
static void kwta(const float *x, uint32_t n, uint32_t k, float *y)
{
    uint32_t limit = 0, bit, j, reach, ties = k;
    for (bit = 0x80000000u; bit; bit >>= 1) {
        for (j = 0, reach = 0; j < n; ++j) reach += order_of(x[j]) >= (limit | bit);
        if (reach >= k) limit |= bit;
    }
    for (j = 0; j < n; ++j) ties -= order_of(x[j]) > limit;
    for (j = 0; j < n; ++j) {
        const uint32_t key = order_of(x[j]);
        y[j] = key > limit || (key == limit && ties) ? x[j] : 0.0f;
        if (key == limit && ties) --ties;
    }
}
""",
    "log_softmax": """
static void log_softmax(const float *x, uint32_t n, float *y)
{
    float largest = x[0], sum = 0.0f;
    uint32_t j;
    for (j = 1; j < n; ++j) largest = x[j] > largest ? x[j] : largest;
    for (j = 0; j < n; ++j) sum += exp_minus(largest - x[j]);
    sum = logf(sum);
    for (j = 0; j < n; ++j) y[j] = x[j] - largest - sum;
}
""",
    "top_k": """
/* The indices of the k largest, largest first, ties to the lower index; then their values. */
static void top_k(const float *x, uint32_t n, uint32_t k, float *y)
{
    uint32_t found = 0, j, at;
    for (j = 0; j < n; ++j) {
        const uint32_t key = order_of(x[j]);
        if (found == k && key <= order_of(y[k + found - 1])) continue;
        at = found < k ? found++ : found - 1;
        for (; at && key > order_of(y[k + at - 1]); --at) {
            y[k + at] = y[k + at - 1];
            y[at] = y[at - 1];
        }
        y[k + at] = x[j];
        y[at] = (float)j;
    }
}
""",
    "layer_norm": """
static void layer_norm(const float *x, uint32_t n, float epsilon, const float *weight, const float *bias, float *y)
{
    float mean = 0.0f, variance = 0.0f, scale;
    uint32_t j;
    for (j = 0; j < n; ++j) mean += x[j];
    mean /= (float)n;
    for (j = 0; j < n; ++j) variance += (x[j] - mean) * (x[j] - mean);
    scale = 1.0f / sqrtf(variance / (float)n + epsilon);
    for (j = 0; j < n; ++j) y[j] = (x[j] - mean) * scale * weight[j] + bias[j];
}
""",
}


_BYTES = {"float": 4, "uint32_t": 4, "uint16_t": 2, "int8_t": 1, "uint8_t": 1}
_ACTIVATIONS = {"exp_minus", "sigmoid", "tanh_of"}


def export_c(program: Program, name: str, fold: bool | None = None) -> tuple[str, str]:
    """The text of ``name.h`` and ``name.c``.

    Args:
        program: what to write.
        name: what the functions' names begin with; other characters than letters and digits become ``_``.
        fold: whether one table replaces the embedding and the input product behind it; default: where the table is smaller.

    Raises:
        ValueError: no C name can be made of ``name``, there is nothing to fold, or a layer reads backwards.
    """
    if program.whole_sequences:
        raise ValueError(
            "the exported C plays one step after the other in memory of a fixed size, but a layer of this program reads the "
            "sequence backwards. Play it with the library: sparsefold_run_values or sparsefold_run_tokens."
        )
    return _Writer(program, c_name(name), fold).text()


def write_c(program: Program, folder: str | os.PathLike[str], name: str, fold: bool | None = None) -> list[Path]:
    """Write ``name.h`` and ``name.c`` into ``folder``, which is made when it is missing; returns their paths."""
    header, source = export_c(program, name, fold)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot write into {target}: it is a file. Name a folder.")
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{c_name(name)}.h", target / f"{c_name(name)}.c"]
    for path, text in zip(paths, (header, source), strict=True):
        write_atomically(path, text.encode())
    return paths


def c_name(name: str) -> str:
    """A C identifier as near to ``name`` as can be."""
    found = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    if not found:
        raise ValueError(f"no C name can be made of {name!r}: it has no letter or digit of ASCII. Pass another name.")
    return f"net_{found}" if found[0].isdigit() else found


class _Writer:
    def __init__(self, program: Program, name: str, fold: bool | None) -> None:
        self.program, self.name = program, name
        self.data: list[str] = []  # constants
        self.data_bytes = 0
        self.functions: list[str] = []
        self.calls: list[str] = []  # of step
        self.state: list[str] = []  # members
        self.clear: list[str] = []  # of reset
        self.used: set[str] = set()  # helpers
        self.products = Products(self._array, self._struct)
        self.table = self._table(fold)
        self.scratch = 0
        self.codes = 0  # of the longest x that is read in codes
        ops, value = program.ops, "x"  # what the next op reads: a C expression, or the op whose events it reads
        of_linear: tuple[str, int | None] = "x", None  # what the last linear read, and the op whose events that was
        for i, op in enumerate(ops):
            events_of = i - 1 if program.reads_events(i) else None
            if isinstance(op, Embedding):
                value = self._embedding(i, op)
            elif isinstance(op, Linear):
                of_linear = value, events_of
                value = self._linear(i, op, value, events_of)
            elif isinstance(op, Cluster):
                value = self._cluster(i, op, value, *of_linear)
            elif isinstance(op, Conv1d):
                value = self._conv1d(i, op, value, events_of)
            elif isinstance(op, Picks):
                value = self._picks(i, op, value)
            elif isinstance(op, LogSoftmax | TopK):
                value = self._head(i, op, value)
            elif isinstance(op, LayerNorm):
                value = self._layer_norm(i, op, value)
            else:
                value = self._recurrent(i, op, value, events_of)
        if value != "y":
            self.calls.append(f"    for (j = 0; j < {program.outputs}; ++j) y[j] = {value}[j];")

    # --- constants ----------------------------------------------------------------------------------------------------

    def _table(self, fold: bool | None) -> Float | None:
        """(tokens, gates H): W_ih x + b_ih of every token; None where the embedding is played as it is."""
        ops = self.program.ops
        if (
            len(ops) < 2
            or not isinstance(ops[0], Embedding)
            or not isinstance(ops[1], Recurrent)
            or ops[1].delta_input is not None
        ):
            if fold:
                raise ValueError(
                    "only an embedding in front of a recurrent layer can be folded; this program has none."
                )
            return None
        embedding, layer = ops[0].weight, ops[1]
        if fold is None:
            fold = 4 * len(embedding) * layer.gates * layer.outputs <= embedding.nbytes + layer.weight_ih.nbytes
        if not fold:
            return None
        product = np.array([layer.weight_ih.matvec(row) for row in embedding.astype(np.float64)])
        table = (product + layer.bias_ih).astype(np.float32)
        if not np.isfinite(table).all():
            raise ValueError("the folded table would not be finite. Export without folding.")
        return table

    def _array(self, name: str, values: NDArray[Any], kind: str = "float", comment: str = "") -> str:
        flat = values.reshape(-1)
        self.data_bytes += flat.size * _BYTES[kind]
        words = [_hex(v) for v in flat.tolist()] if kind == "float" else [str(v) for v in flat.tolist()]
        words = words or ["0"]  # C has no empty arrays
        width = max(1, 116 // (max(map(len, words)) + 2))
        lines = [f"    {', '.join(words[k : k + width])}," for k in range(0, len(words), width)]
        note = f" /* {comment} */" if comment else ""
        self.data += [f"static const {kind} {name}[{len(words)}] = {{{note}", *lines, "};", ""]
        return name

    def _struct(self, kind: str, name: str, members: list[str]) -> None:
        self.data += [f"static const {kind} {name} = {{{', '.join(members)}}};", ""]

    # --- ops ----------------------------------------------------------------------------------------------------------

    def _member(self, kind: str, name: str, size: int, comment: str) -> str:
        self.state.append(f"    {kind} {name}[{size}]; /* {comment} */")
        return f"s->{name}"

    def _output(self, i: int, op: Any) -> str:
        """Where an op without a state of its own writes: the caller's y where it is the last."""
        return "y" if i == len(self.program.ops) - 1 else self._member("float", f"out_{i}", op.outputs, f"op {i}")

    def _event_list(self, i: int, units: int) -> str:
        """The statement that enters unit j into the event list of op ``i``, which it makes."""
        index = "uint16_t" if units < 2**16 else "uint32_t"
        self._member(index, f"event_{i}", units, f"op {i}: units that spoke, ascending")
        self.state.append(f"    uint32_t count_{i}; /* how many of them */")
        self.clear.append(f"    s->count_{i} = 0;")
        return f"s->event_{i}[s->count_{i}++] = ({index})j;"

    def _product(self, name: str, matrix: Format, x: str, events_of: int | None, target: str) -> list[str]:
        """C that adds W x to ``target``: all columns of a dense x, or those of the units of an op that spoke.

        What an event sends is ``x[i]``, of any expression ``x``.
        """
        if events_of is None:
            if matrix.precision == "w8a8":
                self.codes = max(self.codes, matrix.shape[1])
            return self.products.whole(name, matrix, x, target, "s->codes")
        return [
            f"    for (k = 0; k < s->count_{events_of}; ++k) {{",
            f"        i = s->event_{events_of}[k];",
            f"        {self.products.columns(name, matrix)('i', f'{x}[i]', target)}",
            "    }",
        ]

    def _changes(
        self, i: int, side: str, add: AddColumn, x: str, cols: int, rows: int, bias: str, delta: float
    ) -> tuple[str, list[str]]:
        """The memory of a product that reads changes, and C that moves it by what of x changed by more than ``delta``."""
        sent = self._member("float", f"sent_{side}_{i}", cols, f"op {i}: what was sent of {side}")
        memory = self._member("float", f"memory_{side}_{i}", rows, f"op {i}: its sums")
        self.clear += [
            f"    for (j = 0; j < {cols}; ++j) {sent}[j] = 0.0f;",
            f"    for (j = 0; j < {rows}; ++j) {memory}[j] = {bias}[j];",
        ]
        return memory, [
            f"    for (i = 0; i < {cols}; ++i) {{",
            f"        const float change = {x}[i] - {sent}[i];",
            f"        if (fabsf(change) <= {_hex(float(np.float32(delta)))}) continue;",
            f"        {sent}[i] = {x}[i];",
            f"        {add('i', 'change', memory)}",
            "    }",
            f"    if (s->age_{i} == 0) {{ /* the rounding of many changes is forgotten */",
            f"        for (j = 0; j < {rows}; ++j) {memory}[j] = {bias}[j];",
            f"        for (i = 0; i < {cols}; ++i)",
            f"            if ({sent}[i] != 0.0f) {add('i', f'{sent}[i]', memory)}",
            "    }",
        ]

    def _function(self, i: int, op: Any, parameters: str, body: list[str]) -> str:
        text = "\n".join(body)
        counters = [c for c in "ijk" if re.search(rf"\b{c} = ", text)]
        self.functions += [
            f"/* op {i}: {op.kind}, {op.inputs} -> {op.outputs} */",
            f"static void op_{i}({parameters})",
            "{",
            f"    uint32_t {', '.join(counters)};",
            *body,
            "}",
            "",
        ]
        return f"op_{i}"

    def _embedding(self, i: int, op: Embedding) -> str:
        if self.table is not None:
            return ""
        weight = self._array(f"weight_{i}", op.weight, comment=f"{op.inputs} tokens x {op.outputs}")
        return f"({weight} + (size_t)token * {op.outputs})"

    def _linear(self, i: int, op: Linear, x: str, events_of: int | None) -> str:
        bias = self._array(f"bias_{i}", op.bias)
        out = self._output(i, op)
        body = [
            f"    for (j = 0; j < {op.outputs}; ++j) y[j] = {bias}[j];",
            *self._product(f"weight_{i}", op.weight, "x" if events_of is None else x, events_of, "y"),
        ]
        state = f"{self.name}_state *s, " if any("s->" in line for line in body) else ""
        dense = "const float *x, " if events_of is None else ""
        call = self._function(i, op, f"{state}{dense}float *y", body)
        arguments = [*(["s"] if state else []), *([x] if dense else []), out]
        self.calls.append(f"    {call}({', '.join(arguments)});")
        return out

    def _conv1d(self, i: int, op: Conv1d, x: str, events_of: int | None) -> str:
        width = op.inputs
        bias = self._array(f"bias_{i}", op.bias)
        out, seen = self._output(i, op), self._member("float", f"seen_{i}", op.kernel * width, f"op {i}: all taps")
        body = [f"    const float *seen = {seen};"]
        if op.history:
            past = self._member(
                "float", f"x_{i}", op.history * width, f"op {i}: a ring of its last {op.history} inputs"
            )
            self.state.append(f"    uint32_t at_{i}; /* the oldest of them */")
            self.clear.append(f"    for (j = 0; j < {op.history * width}; ++j) {past}[j] = 0.0f;")
            self.clear.append(f"    s->at_{i} = 0;")
            body += [
                f"    for (k = 0; k < {op.kernel - 1}; ++k) {{",
                f"        i = (s->at_{i} + k * {op.dilation}) % {op.history};",
                f"        for (j = 0; j < {width}; ++j) {seen}[k * {width} + j] = {past}[i * {width} + j];",
                "    }",
                f"    for (j = 0; j < {width}; ++j) {past}[s->at_{i} * {width} + j] = x[j];",
                f"    s->at_{i} = (s->at_{i} + 1) % {op.history};",
            ]
        body += [
            f"    for (j = 0; j < {width}; ++j) {seen}[{(op.kernel - 1) * width} + j] = x[j];",
            f"    for (j = 0; j < {op.outputs}; ++j) y[j] = {bias}[j];",
        ]
        if events_of is None:
            body += self._product(f"weight_{i}", op.weight, "seen", None, "y")
        else:
            add = self.products.columns(f"weight_{i}", op.weight)
            body += [
                f"    for (i = 0; i < {op.kernel * width}; ++i)",
                f"        if (seen[i] != 0.0f) {add('i', 'seen[i]', 'y')}",
            ]
        call = self._function(i, op, f"{self.name}_state *s, const float *x, float *y", body)
        self.calls.append(f"    {call}(s, {x}, {out});")
        return out

    def _picks(self, i: int, op: Picks, x: str) -> str:
        out, state, argument = self._output(i, op), "", ""
        if isinstance(op, KWTA):
            self.used |= {"order_of", "kwta"}
            width = op.units // op.groups
            body = [f"    for (j = 0; j < {op.units}; j += {width}) kwta(x + j, {width}, {op.k}, y + j);"]
        else:
            chosen = "x[j] <= 0.0f ? 0.0f : x[j]" if isinstance(op, ReLU) else "x[j]"
            body = [f"    for (j = 0; j < {op.units}; ++j) y[j] = {chosen};"]
        if i + 1 < len(self.program.ops) and self.program.reads_events(i + 1):
            speak, state, argument = self._event_list(i, op.units), f"{self.name}_state *s, ", "s, "
            body += [
                f"    s->count_{i} = 0;",
                f"    for (j = 0; j < {op.units}; ++j)",
                f"        if (y[j] != 0.0f) {speak} /* a NaN must reach whoever listens */",
            ]
        call = self._function(i, op, f"{state}const float *x, float *y", body)
        self.calls.append(f"    {call}({argument}{x}, {out});")
        return out

    def _head(self, i: int, op: LogSoftmax | TopK, x: str) -> str:
        self.used |= {"exp_minus", "log_softmax"} if isinstance(op, LogSoftmax) else {"order_of", "top_k"}
        out, k = self._output(i, op), f"{op.k}, " if isinstance(op, TopK) else ""
        self.calls.append(f"    {op.kind}({x}, {op.units}, {k}{out}); /* op {i} */")
        return out

    def _cluster(self, i: int, op: Cluster, q: str, x: str, events_of: int | None) -> str:
        self.used |= {"exp_minus", "log_softmax"}
        bias = self._array(f"bias_{i}", op.bias)
        narrow = op.projection.shape[0]
        out, projected = self._output(i, op), self._member("float", f"projected_{i}", narrow, f"op {i}: of one step")
        words = f"y + {op.at}"
        body = [
            f"    for (j = 0; j < {narrow}; ++j) {projected}[j] = 0.0f;",
            *self._product(f"projection_{i}", op.projection, "x" if events_of is None else x, events_of, projected),
            f"    for (j = 0; j < {op.words}; ++j) y[{op.at} + j] = {bias}[j];",
            *self._product(f"weight_{i}", op.weight, projected, None, words),
            f"    log_softmax({words}, {op.words}, {words});",
            f"    for (j = 0; j < {op.words}; ++j) y[{op.at} + j] += q[{op.at}];",
            f"    for (j = 0; j < {op.at}; ++j) y[j] = q[j];",
            f"    for (j = {op.at + 1}; j < {op.units}; ++j) y[j + {op.words - 1}] = q[j];",
        ]
        dense = "const float *x, " if events_of is None else ""
        call = self._function(i, op, f"{self.name}_state *s, {dense}const float *q, float *y", body)
        self.calls.append(f"    {call}(s, {x + ', ' if dense else ''}{q}, {out});")
        return out

    def _layer_norm(self, i: int, op: LayerNorm, x: str) -> str:
        self.used.add("layer_norm")
        out, epsilon = self._output(i, op), _hex(float(np.float32(op.epsilon)))
        arrays = f"{self._array(f'weight_{i}', op.weight)}, {self._array(f'bias_{i}', op.bias)}"
        self.calls.append(f"    layer_norm({x}, {op.outputs}, {epsilon}, {arrays}, {out}); /* op {i} */")
        return out

    def _recurrent(self, i: int, op: Recurrent, x: str, events_of: int | None) -> str:
        H, rows, folded = op.outputs, op.gates * op.outputs, i == 1 and self.table is not None
        if op.delta_input is None or op.delta_hidden is None:
            self.scratch = max(self.scratch, rows)
        h = self._member("float", f"h_{i}", H, f"op {i}: carried state")
        seen, own, speak = h, None, ""  # seen: what the recurrent products read
        carried = [h]
        if isinstance(op, EGRU):
            seen, own = self._member("float", f"y_{i}", H, f"op {i}: what other units see, 0 where silent"), i
            speak = self._event_list(i, H)
            carried.append(seen)
        if isinstance(op, LSTM):
            carried.append(self._member("float", f"c_{i}", H, f"op {i}: carried cell"))
        self.clear.append(f"    for (j = 0; j < {H}; ++j) {' = '.join(f'{c}[j]' for c in carried)} = 0.0f;")

        gates = {RNN: "", LSTM: ", gates i, f, g, o"}.get(type(op), ", gates r, z, n")
        gi, gh, start_gh, ageing = "s->gi", "s->gh", "", []
        if op.delta_input is not None or op.delta_hidden is not None:
            self.state.append(f"    uint32_t age_{i}; /* op {i}: steps since what it sums was summed anew */")
            self.clear.append(f"    s->age_{i} = 0;")
            ageing = [f"    s->age_{i} = (s->age_{i} + 1) % {DELTA_REFRESH};"]
        bias_hh = self._array(f"bias_hh_{i}", op.bias_hh)
        if op.delta_hidden is None:
            start_gh = f"gh[j] = {bias_hh}[j];"
            recurrent: list[str] | None = None
        else:
            add = self.products.columns(f"weight_hh_{i}", op.weight_hh)
            gh, recurrent = self._changes(i, "h", add, h, H, rows, bias_hh, op.delta_hidden)
        product: list[str]
        if folded:
            assert self.table is not None
            table = self._array("table", self.table, comment="W_ih x + b_ih of every token")
            start = f"gi[j] = {table}[(size_t)token * {rows} + j];"
            parameter, argument, product = ", uint32_t token", ", token", []
        elif op.delta_input is not None:
            bias, add = self._array(f"bias_ih_{i}", op.bias_ih), self.products.columns(f"weight_ih_{i}", op.weight_ih)
            start, parameter, argument = "", ", const float *x", f", {x}"
            gi, product = self._changes(i, "x", add, "x", op.inputs, rows, bias, op.delta_input)
        else:
            start = f"gi[j] = {self._array(f'bias_ih_{i}', op.bias_ih)}[j];"
            parameter, argument = (", const float *x", f", {x}") if events_of is None else ("", "")
            read = "x" if events_of is None else x
            product = self._product(f"weight_ih_{i}", op.weight_ih, read, events_of, "gi")
        body = [
            f"    float *gi = {gi}, *gh = {gh}; /* W_ih x + b_ih and W_hh {'y' if speak else 'h'} + b_hh{gates} */",
            *ageing,
        ]
        if starts := [line for line in (start, start_gh) if line]:
            body += [f"    for (j = 0; j < {rows}; ++j) {{", *(f"        {line}" for line in starts), "    }"]
        body += product
        out = h
        if isinstance(op, GRU):
            lines, out = self._gru(i, op, h, seen, own, speak, recurrent)
            body += lines
        else:
            if recurrent is None:
                recurrent = self._product(f"weight_hh_{i}", op.weight_hh, seen, own, "gh")
            body += recurrent
            body += [f"    for (j = 0; j < {H}; ++j) {{", *(self._lstm(i, H) if isinstance(op, LSTM) else [])]
            if isinstance(op, RNN) and op.nonlinearity == "relu":
                body += ["        const float sum = gi[j] + gh[j];", f"        {h}[j] = sum <= 0.0f ? 0.0f : sum;"]
            elif isinstance(op, RNN):
                self.used |= _ACTIVATIONS
                body.append(f"        {h}[j] = tanh_of(gi[j] + gh[j]);")
            body.append("    }")
        call = self._function(i, op, f"{self.name}_state *s{parameter}", body)
        self.calls.append(f"    {call}(s{argument});")
        return out

    def _lstm(self, i: int, H: int) -> list[str]:
        """The loop over units, from the sums to h."""
        self.used |= _ACTIVATIONS
        gate = [f"gi[{at}j] + gh[{at}j]" for at in ("", f"{H} + ", f"{2 * H} + ", f"{3 * H} + ")]
        return [
            f"        const float kept = sigmoid({gate[1]}) * s->c_{i}[j];",
            f"        s->c_{i}[j] = kept + sigmoid({gate[0]}) * tanh_of({gate[2]});",
            f"        s->h_{i}[j] = sigmoid({gate[3]}) * tanh_of(s->c_{i}[j]);",
        ]

    def _gru(
        self, i: int, op: GRU, h: str, seen: str, own: int | None, speak: str, recurrent: list[str] | None
    ) -> tuple[list[str], str]:
        """The recurrent products, where they are not made yet, and the loop over units; and what the layer hands on."""
        self.used |= _ACTIVATIONS
        H, out = op.outputs, h
        r = f"sigmoid(gi[j] + gh[j]) * gh[{2 * H} + j]"
        if recurrent is not None:
            body = list(recurrent)
        elif op.reset_after:
            body = self._product(f"weight_hh_{i}", op.weight_hh, seen, own, "gh")
        else:  # n reads W (r * y), so that its product waits for r
            rz, n = _gates(op.weight_hh, 0, 2), _gates(op.weight_hh, 2, 3)
            body = self._product(f"weight_hh_rz_{i}", rz, seen, own, "gh")
            gate, reads = ("", f"gh[i] * {seen}") if speak else (f" * {h}[j]", "gh")
            body += [
                f"    for (j = 0; j < {H}; ++j) gh[j] = sigmoid(gi[j] + gh[j]){gate}; /* r{' * h' * (not speak)} */"
            ]
            body += self._product(f"weight_hh_n_{i}", n, reads, own, f"gh + {2 * H}")
            r = f"gh[{2 * H} + j]"
        body += [
            f"    for (j = 0; j < {H}; ++j) {{",
            f"        const float z = sigmoid(gi[{H} + j] + gh[{H} + j]);",
            f"        const float n = tanh_of(gi[{2 * H} + j] + {r});",
            f"        {'gi[j]' if speak else f'{h}[j]'} = z * ({h}[j] - n) + n;",
        ]
        if isinstance(op, EGRU):  # who speaks is a branch: a loop of its own leaves the other without one
            body += ["    }", f"    s->count_{i} = 0;", f"    for (j = 0; j < {H}; ++j) {{", "        float u = gi[j];"]
            lines, out = self._egru_end(i, op, h, seen, speak)
            body += lines
        return [*body, "    }"], out

    def _egru_end(self, i: int, op: EGRU, h: str, y: str, speak: str) -> tuple[list[str], str]:
        """From the state before the reset to the event, within the loop over units; and what the layer hands on."""
        lines = []
        if op.reset == "output":
            lines.append(f"u -= {y}[j];")
        if op.zoneout:
            lines.append(f"u += {_hex(float(np.float32(op.zoneout)))} * ({h}[j] - u);")
        out = y if op.output == "events" else h
        if op.output == "state" and op.reset == "threshold":
            out = self._member("float", f"u_{i}", op.outputs, f"op {i}: state before the reset")
            lines.append(f"{out}[j] = u;")
        silent = [f"{h}[j] = u;", f"{y}[j] = 0.0f;"]
        if op.event == "always" and op.reset != "threshold":
            lines += [f"{h}[j] = {y}[j] = u;", speak]
        else:
            threshold = self._array(f"threshold_{i}", op.threshold)
            spoken = [f"{y}[j] = u;", f"{h}[j] = u{f' - {threshold}[j]' if op.reset == 'threshold' else ''};", speak]
            if op.event == "always":
                lines += spoken
            else:  # not "u > threshold": a NaN must reach the units that listen
                lines += [f"if (!(u <= {threshold}[j])) {{", *(f"    {line}" for line in spoken), "} else {"]
                lines += [*(f"    {line}" for line in silent), "}"]
        return [f"        {line}" for line in lines], out

    # --- the two files ------------------------------------------------------------------------------------------------

    def text(self) -> tuple[str, str]:
        """(header, source)."""
        name, upper, program = self.name, self.name.upper(), self.program
        tokens = program.takes_tokens
        if self.scratch:
            self.state += [f"    float gi[{self.scratch}], gh[{self.scratch}]; /* of one step */"]
        if self.codes:
            self.state += [f"    int8_t codes[{self.codes}]; /* of one product */"]
        state = self.state or ["    char nothing;"]
        step = f"int {name}_step({name}_state *s, {'uint32_t token' if tokens else 'const float *x'}, float *y)"
        refusal = ", or -1 when there is no such token; nothing was done then" if tokens else ""
        about = "; ".join(f"{i} {op.kind} {op.inputs} -> {op.outputs}" for i, op in enumerate(program.ops))
        header = f"""/* {name}: {about}.
 * Written by sparsefold; do not edit. Constants take {self.data_bytes} bytes. No memory is allocated, and nothing is shared
 * between two states.
 */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_INPUTS {program.inputs} /* {"tokens known" if tokens else "values read per step"} */
#define {upper}_OUTPUTS {program.outputs} /* values given per step */

typedef struct {{
{chr(10).join(state)}
}} {name}_state;

/* Before the first step. */
void {name}_reset({name}_state *s);

/* One step; y receives {upper}_OUTPUTS values. Returns 0{refusal}. */
{step};

#ifdef __cplusplus
}}
#endif
#endif
"""
        helpers = [_HELPERS[h] for h in _HELPERS if h in self.used]
        helpers += self.products.text()
        check = [f"    if (token >= {upper}_INPUTS) return -1;"] if tokens else []
        declared = ["    uint32_t j;"] if any("j = 0" in line for line in self.calls) else []
        needs_state = any(re.search(r"\bs\b", line) for line in self.calls)
        source = "\n".join(
            [
                f"/* Written by sparsefold; do not edit. See {name}.h. */",
                f'#include "{name}.h"',
                "",
                "#include <math.h>",
                "#include <stddef.h>",
                *[h.rstrip("\n") for h in helpers],
                "",
                *self.data,
                *self.functions,
                f"void {name}_reset({name}_state *s)",
                "{",
                *(["    uint32_t j;"] if any("j = 0" in line for line in self.clear) else []),
                *(self.clear or ["    (void)s;"]),
                "}",
                "",
                step,
                "{",
                *declared,
                *([] if needs_state else ["    (void)s;"]),
                *check,
                *self.calls,
                "    return 0;",
                "}",
                "",
            ]
        )
        return header, source


def _hex(value: float) -> str:
    """A float constant of C99, exact."""
    if value == 0:
        return "0.0f"
    mantissa, exponent = value.hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}p{exponent}f"


def _gates(matrix: Format, first: int, last: int) -> Format:
    """Gates ``first`` to ``last`` of a matrix, in its own format."""
    units = matrix.shape[0] // matrix.gates
    rows = matrix.to_dense()[first * units : last * units]
    if isinstance(matrix, Block):
        part: Format = Block.from_dense(rows, matrix.block, last - first)
    elif isinstance(matrix, CSC):
        part = CSC.from_dense(rows, last - first)
    elif isinstance(matrix, Complementary):
        part = Complementary.from_dense(rows, matrix.overlay, matrix.group, last - first)
    else:
        part = Dense(rows, last - first)
    scale = None if matrix.scale is None else matrix.scale[first * units : last * units]
    return replace(part, precision=matrix.precision, scale=scale)
