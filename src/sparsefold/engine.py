"""Playing a program: :class:`Engine` holds packed weights, :class:`Stream` one state; :func:`interpret` is the oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sparsefold import _native
from sparsefold.cost import Cost, Counts, Part, cost
from sparsefold.formats import CSC, Complementary, Dense, Float, Format
from sparsefold.program import (
    DELTA_REFRESH,
    EGRU,
    GRU,
    KWTA,
    RNN,
    Cluster,
    Conv1d,
    Embedding,
    Events,
    LayerNorm,
    Linear,
    LogSoftmax,
    Picks,
    Program,
    Recurrent,
    ReLU,
    Speaking,
    TopK,
    matrices,
    reads_backwards,
)

FOLD_LIMIT = 8 * 2**20
State = dict[str, Float]


class Engine:
    """A program packed for this processor. It holds weights only and is shared by any number of streams and threads.

    Args:
        program: what to play.
        fold: ``"auto"`` replaces an embedding and the input product after it by one table in memory where that takes at most
            8 MB; ``True`` always, ``False`` never. The outputs are the same bits either way. A layer that reads both ways leaves
            the embedding as it is.
        isa: ``"avx512vnni"``, ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"generic"``; default: ``SPARSEFOLD_ISA`` if set, else
            the best of this processor.
        threads: between how many threads :meth:`step_batch` divides its streams, the caller's among them; at most 256. They
            spin for 0.3 ms after a batch and sleep then. With 2 or more, steps of a single stream that follow one another
            closely share a second thread, where recurrent products are large enough to be worth it; it spins and sleeps alike.
            Outputs are the same bits with any number.

    Raises:
        ValueError: the processor lacks ``isa``, or ``threads`` is out of range.
    """

    def __init__(
        self, program: Program, fold: Literal["auto"] | bool = "auto", isa: str | None = None, threads: int = 1
    ) -> None:
        if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 256:
            raise ValueError(f"threads must be a whole number from 1 to 256, got {threads!r}.")
        if fold not in ("auto", True, False):
            raise ValueError(f"fold must be 'auto', True or False, got {fold!r}.")
        self.program = program
        self._core = _native.Engine()
        for op in program.ops:
            if isinstance(op, Embedding):
                self._core.add_embedding(op.weight)
            elif isinstance(op, Linear):
                self._core.add_linear(native_matrix(op.weight), op.bias)
            elif isinstance(op, Conv1d):
                self._core.add_conv1d(native_matrix(op.weight), op.bias, op.kernel, op.dilation, op.groups)
            elif isinstance(op, ReLU):
                self._core.add_relu()
            elif isinstance(op, Events):
                self._core.add_events(op.units)
            elif isinstance(op, KWTA):
                self._core.add_kwta(op.units, op.k, op.groups)
            elif isinstance(op, LogSoftmax):
                self._core.add_log_softmax(op.units)
            elif isinstance(op, Cluster):
                matrices_of = native_matrix(op.projection), native_matrix(op.weight)
                self._core.add_cluster(*matrices_of, op.bias, op.units, op.at)
            elif isinstance(op, TopK):
                self._core.add_top_k(op.units, op.k)
            elif isinstance(op, LayerNorm):
                self._core.add_layer_norm(op.weight, op.bias, op.epsilon)
            else:
                self._add_recurrent(op)
        limit = {"auto": FOLD_LIMIT, True: 2**63, False: 0}[fold]
        self._core.finish(isa or "", limit, threads)

    def _add_recurrent(self, op: Recurrent) -> None:
        weights = native_matrix(op.weight_ih), native_matrix(op.weight_hh), op.bias_ih, op.bias_hh
        delta_input, delta_hidden = (
            -1.0 if d is None else d for d in (op.delta_input, op.delta_hidden)
        )  # below 0: none
        deltas = delta_input, delta_hidden
        if isinstance(op, EGRU):
            self._core.add_egru(
                *weights,
                op.threshold,
                op.reset_after,
                op.reset,
                op.event == "always",
                op.output == "events",
                op.zoneout,
                op.reverse,
            )
        elif isinstance(op, GRU):
            self._core.add_gru(*weights, op.reset_after, *deltas, op.reverse)
        elif isinstance(op, RNN):
            self._core.add_rnn(*weights, op.nonlinearity == "relu", *deltas, op.reverse)
        else:
            self._core.add_lstm(*weights, *deltas, op.reverse)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        fold: Literal["auto"] | bool = "auto",
        isa: str | None = None,
        threads: int = 1,
    ) -> Engine:
        """Read a ``.sfold`` file. Raises :class:`sparsefold.ProgramError` when it is damaged or foreign."""
        return cls(Program.load(path), fold, isa, threads)

    @property
    def isa(self) -> str:
        """The instruction set its kernels use."""
        return self._core.isa

    @property
    def folded(self) -> bool:
        """Whether embedding and first input product were replaced by one table."""
        return self._core.folded

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights in bytes."""
        return self._core.nbytes

    def stream(self) -> Stream:
        """A new stream: its own state, all zero, and its own counters."""
        return Stream(self)

    def step_batch(self, streams: Sequence[Stream], x: Any, out: Float | None = None) -> Float:
        """One step of each of B different streams, bit for bit what ``Stream.step`` of each gives; faster than one by one.

        Args:
            streams: B streams of this engine, each at most once.
            x: (B,) token ids in front of an embedding, otherwise (B, I) values.
            out: float32 (B, O) to fill and return; a fresh array when left out.

        Raises:
            ValueError: a stream of another engine or named twice, a token outside the vocabulary, an array of another shape, a
                program that plays whole sequences.
            RuntimeError: a stream is in use by another thread. Nothing was played then.
        """
        try:
            cores = [stream._core for stream in streams]
        except (TypeError, AttributeError):
            raise ValueError("a batch is a sequence of streams, each made by stream() of this engine.") from None
        program = self.program
        shape = (len(cores), program.outputs)
        if out is None:
            out = np.empty(shape, np.float32)
        elif not (
            isinstance(out, np.ndarray)
            and out.dtype == np.float32
            and out.shape == shape
            and out.flags.c_contiguous
            and out.flags.writeable
        ):
            got = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise ValueError(f"out must be a writable contiguous float32 array of shape {shape}; got {got}.")
        if program.takes_tokens:
            tokens = np.asarray(x)
            if tokens.shape != shape[:1] or (tokens.size and tokens.dtype.kind not in "iu"):
                raise ValueError(
                    f"this program starts with an embedding, so a batch of {shape[0]} is ({shape[0]},) token ids; "
                    f"got {tokens.dtype} {tokens.shape}."
                )
            # A copy: tokens are checked first and played without the interpreter's lock, when another thread may write.
            self._core.step_batch_tokens(cores, np.array(tokens, np.int64), out)
            return out
        values = np.ascontiguousarray(x, np.float32)
        if values.shape != (shape[0], program.inputs):
            raise ValueError(
                f"a batch of {shape[0]} for this program has shape ({shape[0]}, {program.inputs}); got {values.shape}."
            )
        self._core.step_batch_values(cores, values, out)
        return out


class Stream:
    """One sequence being played, step after step. Use it from one thread at a time; make one for each sequence."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._core = _native.Stream(engine._core)
        self._step = self._core.step
        self._score = self._core.score
        self._outputs = engine.program.outputs

    def step(self, x: int | Float, out: Float | None = None) -> Float:
        """One step.

        Args:
            x: a token id in front of an embedding, otherwise float32 (I,).
            out: float32 (O,) to fill and return; a fresh array when left out.

        Raises:
            ValueError: a token outside the vocabulary, an array of another shape or type, or a program that plays whole
                sequences.
        """
        if out is None:
            out = np.empty(self._outputs, np.float32)
        self._step(x, out)
        return out

    def run(self, sequence: Any) -> Float:
        """All steps of ``sequence`` (T,) token ids or (T, I) values, without Python in between; returns (T, O).

        A program with a layer that reads backwards plays each sequence from zero and carries nothing on. It takes memory for
        what two of its layers hand on: 4 bytes a value, or 8 where events are read, at each of T steps.
        """
        return self._run(sequence, np.empty((0, 0), np.uint8))

    @overload
    def score(self, x: int | Float, target: int) -> float: ...
    @overload
    def score(self, x: Any, target: Sequence[int] | NDArray[np.integer[Any]]) -> Float: ...
    def score(self, x: Any, target: Any) -> Any:
        """The natural logarithm of the probability of output ``target``, after one step or after each of a sequence.

        A step as :meth:`step` plays it, of a program whose last op is a LogSoftmax or a Cluster, or a Linear, whose outputs are
        taken for logits. Of clusters at the end only the one that holds the target is computed, if any does: of the others
        nothing is read, and counters say so. What it gives is, of log-probabilities, bit for bit what ``step(x)[target]`` is.

        Args:
            x: a token id or float32 (I,) for one step; (T,) token ids or (T, I) values for a sequence, without Python in between.
            target: a whole number; of a sequence (T,).

        Returns:
            A float, or float32 (T,) of a sequence.

        Raises:
            ValueError: the last op is another one, a program that plays whole sequences, a target outside the outputs, or what
                :meth:`step` and :meth:`run` refuse. Nothing was played then.
        """
        if type(target) is int or np.ndim(target) == 0:
            return self._score(x, target)
        targets = np.asarray(target)
        values = self._sequence(x)
        if targets.shape != values.shape[:1] or (targets.size and targets.dtype.kind not in "iu"):
            raise ValueError(
                f"a sequence of {len(values)} steps is scored at ({len(values)},) whole numbers, a target for each; "
                f"got {targets.dtype} {targets.shape}."
            )
        out = np.empty(len(values), np.float32)
        play = self._core.score_tokens if self.engine.program.takes_tokens else self._core.score_values
        play(values, np.array(targets, np.int64), out)
        return out

    def run_traced(self, sequence: Any) -> tuple[Float, dict[int, NDArray[np.bool_]]]:
        """Like :meth:`run`; also which units emitted, by op index: {op: (T, H) bool} for every EGRU and ReLU."""
        sequence = np.asarray(sequence)
        steps = len(sequence) if sequence.ndim else 0
        trace = np.zeros((steps, self._core.trace_width), np.uint8)
        outputs = self._run(sequence, trace if steps else np.empty((0, 0), np.uint8))
        emitted, at = {}, 0
        for i, op in enumerate(self.engine.program.ops):
            if isinstance(op, Speaking):
                emitted[i] = trace[:, at : at + op.outputs].astype(bool)
                at += op.outputs
        return outputs, emitted

    def _sequence(self, sequence: Any) -> NDArray[Any]:
        """(T,) token ids, a copy, or (T, I) values as the extension takes them."""
        program = self.engine.program
        if program.takes_tokens:
            tokens = np.asarray(sequence)
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                raise ValueError(
                    f"this program starts with an embedding, so a sequence is (T,) token ids; got {tokens.dtype} {tokens.shape}."
                )
            # A copy: tokens are checked first and played without the interpreter's lock, when another thread may write.
            return np.array(tokens, np.int64)
        values = np.ascontiguousarray(sequence, np.float32)
        if values.ndim != 2 or values.shape[1] != program.inputs:
            raise ValueError(f"a sequence for this program has shape (T, {program.inputs}); got {values.shape}.")
        return values

    def _run(self, sequence: Any, trace: NDArray[np.uint8]) -> Float:
        values = self._sequence(sequence)
        out = np.empty((len(values), self.engine.program.outputs), np.float32)
        play = self._core.run_tokens if self.engine.program.takes_tokens else self._core.run_values
        play(values, out, trace)
        return out

    def reset(self) -> None:
        """State as at the beginning: zero, and a delta network's memories its biases; counters go on."""
        self._core.reset()

    def reset_counters(self) -> None:
        """Counters to zero; the state stays."""
        self._core.reset_counters()

    def save_state(self) -> State:
        """A copy of the state: ``"{op}.h"``, for an EGRU ``"{op}.y"`` and for an LSTM ``"{op}.c"`` too, each float32 (H,); for a
        convolution ``"{op}.x"``, its last inputs, the oldest first, float32 (history, I). Empty where each run starts from zero.

        Of an op that sends changes also ``sent_x`` (I,) and ``memory_x`` (gates H,), ``sent_h`` (H,) and ``memory_h``, and
        ``age`` (1,), the steps since the memories were summed anew.
        """
        return {
            key: self._read(i, name, np.float32, *shape) for key, i, name, shape in _state_keys(self.engine.program)
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`save_state` returned. Raises ``ValueError`` when it is not of this program."""
        keys = _state_keys(self.engine.program)
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        if found != sorted(k for k, *_ in keys):
            raise ValueError(
                f"the state holds {found}, this program needs {sorted(k for k, *_ in keys)}. "
                "Pass what save_state() of the same program returned."
            )
        arrays = []
        for key, i, name, shape in keys:
            array = np.asarray(state[key])
            if array.shape != shape or array.dtype.kind not in "fiu":
                has = f"{shape[0]} values" if len(shape) == 1 else f"{shape[0]} inputs of {shape[1]} values"
                raise ValueError(
                    f"state {key!r} is {array.dtype} of shape {array.shape}, this program has {has} there. "
                    "Pass what save_state() of the same program returned."
                )
            if name == "age" and not (0 <= array[0] < DELTA_REFRESH and array[0] == int(array[0])):
                raise ValueError(f"state {key!r} must be a whole number from 0 to {DELTA_REFRESH - 1}, got {array[0]}.")
            arrays.append((i, name, np.ascontiguousarray(array, np.float32).reshape(-1)))
        for i, name, array in arrays:
            self._core.write(i, name, array)

    def internal(self, op: int) -> Float:
        """State before the reset, u, of the last step of EGRU ``op``: float32 (H,)."""
        found = self.engine.program.ops[op]
        if not isinstance(found, EGRU):
            raise ValueError(f"op {op} is a {found.kind}, only an egru has u.")
        return self._read(op, "u", np.float32, found.outputs)

    def _read(self, op: int, name: str, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
        out = np.empty(shape, dtype)
        self._core.read(op, name, out.reshape(-1))
        return out

    @property
    def counters(self) -> Counts:
        """Integers counted since the start or :meth:`reset_counters`."""
        events, input_reads, hidden_reads, asked = {}, {}, {}, {}
        for i, op in enumerate(self.engine.program.ops):
            if isinstance(op, Cluster):
                asked[i] = int(self._read(i, "asked", np.uint64, 1)[0])
            if isinstance(op, Speaking):
                events[i] = self._read(i, "events", np.uint64, op.outputs).astype(np.int64)
            if self.engine.program.by_events(i, "weight_hh"):
                hidden_reads[i] = self._read(i, "hidden_reads", np.uint64, op.outputs).astype(np.int64)
            if self.engine.program.by_events(i, next(iter(matrices(op)), "")):
                columns = next(iter(matrices(op).values())).shape[1]
                input_reads[i] = self._read(i, "input_reads", np.uint64, columns).astype(np.int64)
        return Counts(self._core.steps, events, input_reads, hidden_reads, asked)

    @property
    def cost(self) -> Cost:
        """Cost of everything counted so far."""
        return cost(self.engine.program, self.counters, self.engine.folded)

    def report(self) -> str:
        """Density, event rates, MACs and bytes per step of everything played so far, as a short table. All counted."""
        total, counts = self.cost, self.counters
        lines = [
            f"{counts.steps} steps, {self.engine.isa} kernels, counted per step",
            f"{'part':<18}{'density':>8}{'events':>8}{'MACs dense':>12}{'weight':>10}{'effective':>11}{'bytes':>10}",
        ]
        for i, op in enumerate(self.engine.program.ops):
            if isinstance(op, Picks):
                lines.append(f"{f'{i} {op.kind}':<26}{counts.event_rate(i):>8.3f}")
            lines += [self._report_line(part, counts) for part in total.parts if part.op == i]
        all_read = total.per_step("bytes_weights") + total.per_step("bytes_index")
        lines.append(
            f"{'all':<18}{'':>8}{'':>8}{total.per_step('macs_dense'):>12,.0f}{total.per_step('macs_weight'):>10,.0f}"
            f"{total.per_step('macs_effective'):>11,.0f}{all_read:>10,.0f}"
        )
        return "\n".join(lines)

    @staticmethod
    def _report_line(part: Part, counts: Counts) -> str:
        read = None if part.op in counts.events else counts.read_rate(part.op, part.role)  # of what changed
        if part.role == "recurrent" and part.op in counts.events:
            read = counts.event_rate(part.op)
        rate = "" if read is None else f"{read:.3f}"
        figures = [getattr(part, n) / max(counts.steps, 1) for n in ("macs_dense", "macs_weight", "macs_effective")]
        moved = (part.bytes_weights + part.bytes_index) / max(counts.steps, 1)
        return (
            f"{f'{part.op} {part.role}':<18}{part.density:>8.3f}{rate:>8}"
            f"{figures[0]:>12,.0f}{figures[1]:>10,.0f}{figures[2]:>11,.0f}{moved:>10,.0f}"
        )


def native_matrix(matrix: Format) -> _native.Matrix:
    """The matrix as the extension reads it: the arrays are borrowed; where a format is packed like another, converted."""
    if isinstance(matrix, Complementary) and matrix.group > 1:
        return native_matrix(matrix.to_block())  # a live group of several rows is a block of one column
    if isinstance(matrix, Dense):
        native = _native.Matrix.dense(matrix.values, matrix.gates)
    elif isinstance(matrix, Complementary):
        values = matrix.values[..., 0]
        native = _native.Matrix.complementary(matrix.rows, matrix.gates, matrix.overlay, values, matrix.live)
    else:
        shape = matrix.rows, matrix.cols, matrix.gates
        if isinstance(matrix, CSC):
            values, row = matrix.values.reshape(-1, 1, 1), matrix.row.astype(np.uint32)
        else:
            values, row = matrix.values, matrix.block_row
        native = _native.Matrix.block(*shape, values, row, matrix.start)
    if matrix.precision != "f32":
        native.set_precision(matrix.precision, np.zeros(0, np.float32) if matrix.scale is None else matrix.scale)
    return native


def _state_keys(program: Program) -> list[tuple[str, int, str, tuple[int, ...]]]:
    """(key, op, name, shape) of every state array that is carried from call to call."""
    return [] if program.whole_sequences else _state_arrays(program)


def _state_arrays(program: Program) -> list[tuple[str, int, str, tuple[int, ...]]]:
    """The same from step to step."""
    found: list[tuple[str, int, str, tuple[int, ...]]] = []
    for i, op in enumerate(program.ops):
        if isinstance(op, Recurrent):
            found += [(f"{i}.{name}", i, name, (size,)) for name, size in op.carried().items()]
        elif isinstance(op, Conv1d) and op.history:
            found.append((f"{i}.x", i, "x", (op.history, op.inputs)))
    return found


def _fresh(program: Program) -> State:
    """The state before the first step: zero, and a memory of changes its bias."""
    state = {key: np.zeros(shape, np.float32) for key, _, _, shape in _state_arrays(program)}
    for i, op in enumerate(program.ops):
        if isinstance(op, Recurrent):
            biases = {f"{i}.memory_x": op.bias_ih, f"{i}.memory_h": op.bias_hh}
            state |= {key: bias for key, bias in biases.items() if key in state}
    return state


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What :func:`interpret` saw. ``outputs`` (T, O); ``events[i]``, ``u[i]`` (T, H) of every EGRU ``i``, events of
    every op that picks too; last ``state``; ``changes[i, "x"]`` (T, I) and ``changes[i, "h"]`` (T, H), what op ``i`` of a
    delta network sent.
    """

    outputs: NDArray[Any]
    events: dict[int, NDArray[np.bool_]]
    u: dict[int, NDArray[Any]]
    state: dict[str, NDArray[Any]]
    changes: dict[tuple[int, str], NDArray[np.bool_]]


def interpret(
    program: Program, sequence: Any, state: Mapping[str, Any] | None = None, dtype: DTypeLike = np.float64
) -> Interpretation:
    """Plays a program with plain numpy, dense, one equation after another: the oracle of :class:`Engine`.

    Args:
        program: what to play.
        sequence: (T,) token ids or (T, I) values.
        state: as from ``Stream.save_state``; zero when left out, and where the program plays whole sequences.
        dtype: precision of all arithmetic.
    """
    carried = {key for key, *_ in _state_keys(program)}
    now = {
        key: np.array(state[key] if state and key in carried else array, dtype)
        for key, array in _fresh(program).items()
    }
    changes: dict[tuple[int, str], list[NDArray[Any]]] = {}
    events: dict[int, list[NDArray[Any]]] = {i: [] for i, op in enumerate(program.ops) if isinstance(op, Speaking)}
    us: dict[int, list[NDArray[Any]]] = {i: [] for i in events if isinstance(program.ops[i], EGRU)}
    read: list[Any] = []  # by op i - 1, at every step
    values: list[Any] = [x if program.takes_tokens else np.asarray(x, dtype) for x in sequence]
    of_linear: list[Any] = []  # what the last Linear read, at every step
    for i, op in enumerate(program.ops):
        backwards, given = reads_backwards(op), []
        read = read if backwards else values
        of_linear = read if isinstance(op, Linear) else of_linear
        for t, value in enumerate(read[::-1] if backwards else read):
            if isinstance(op, Embedding):
                value = op.weight[value].astype(dtype)
            elif isinstance(op, Linear):
                value = op.weight.matvec(value) + op.bias.astype(dtype)
            elif isinstance(op, Conv1d):
                seen = np.concatenate([now.get(f"{i}.x", np.zeros((0, op.inputs), dtype)), value[None]])
                value = op.weight.matvec(seen[:: op.dilation].reshape(-1)) + op.bias.astype(dtype)
                if op.history:
                    now[f"{i}.x"] = seen[1:]
            elif isinstance(op, EGRU):
                y = now[f"{i}.y"]
                u = _gru_state(op, *_products(op, value, y, dtype), y, now[f"{i}.h"], dtype)
                if op.reset == "output":
                    u = u - now[f"{i}.y"]
                u = op.zoneout * now[f"{i}.h"] + (1 - op.zoneout) * u
                threshold = op.threshold.astype(dtype)
                o = np.ones(op.outputs, bool) if op.event == "always" else u > threshold
                now[f"{i}.y"] = o * u
                now[f"{i}.h"] = u - o * threshold if op.reset == "threshold" else u
                value = now[f"{i}.y"] if op.output == "events" else u
                events[i].append(o)
                us[i].append(u)
            elif isinstance(op, ReLU):
                events[i].append(~(value <= 0))
                value = np.maximum(value, 0)
            elif isinstance(op, Events):
                events[i].append(value != 0)
            elif isinstance(op, KWTA):
                kept = np.zeros(op.units, bool)
                for part in np.split(np.arange(op.units), op.groups):
                    kept[part[_largest(value[part], op.k)]] = True
                events[i].append(kept)
                value = np.where(kept, value, 0)
            elif isinstance(op, LogSoftmax):
                value = _log_softmax(value)
            elif isinstance(op, Cluster):
                logits = op.weight.matvec(op.projection.matvec(of_linear[t])) + op.bias.astype(dtype)
                value = np.concatenate([value[: op.at], value[op.at] + _log_softmax(logits), value[op.at + 1 :]])
            elif isinstance(op, TopK):
                best = _largest(value, op.k)
                value = np.concatenate([best.astype(dtype), value[best]])
            elif isinstance(op, LayerNorm):
                apart = value - value.mean()
                value = apart / np.sqrt((apart**2).mean() + op.epsilon) * op.weight + op.bias
            elif isinstance(op, GRU):
                products = _recurrent_products(i, op, value, now, changes, dtype)
                value = now[f"{i}.h"] = _gru_state(op, *products, now[f"{i}.h"], now[f"{i}.h"], dtype)
            else:
                total = sum(_recurrent_products(i, op, value, now, changes, dtype))
                if isinstance(op, RNN):
                    value = np.tanh(total) if op.nonlinearity == "tanh" else np.maximum(total, 0)
                else:
                    i_, f_, g_, o_ = np.split(total, 4)
                    now[f"{i}.c"] = _sigmoid(f_) * now[f"{i}.c"] + _sigmoid(i_) * np.tanh(g_)
                    value = _sigmoid(o_) * np.tanh(now[f"{i}.c"])
                now[f"{i}.h"] = value
            given.append(value)
        if backwards:
            for rows in (events.get(i, []), us.get(i, [])):
                rows.reverse()
        values = [np.concatenate(both) for both in zip(values, given[::-1], strict=True)] if backwards else given

    def stacked(rows: list[NDArray[Any]], width: int, of: DTypeLike) -> NDArray[Any]:
        return np.array(rows, of).reshape(len(rows), width)

    return Interpretation(
        stacked(values, program.outputs, dtype),
        {i: stacked(rows, program.ops[i].outputs, np.bool_) for i, rows in events.items()},
        {i: stacked(rows, program.ops[i].outputs, dtype) for i, rows in us.items()},
        {key: now[key] for key in now if key in carried},
        {key: np.array(rows) for key, rows in changes.items()},
    )


def _log_softmax(x: NDArray[Any]) -> NDArray[Any]:
    below = x - x.max()
    found: NDArray[Any] = below - np.log(np.exp(below).sum())
    return found


def _largest(values: NDArray[Any], k: int) -> NDArray[np.intp]:
    """Indices of the k largest, largest first; NaN above all, ties to the lower index."""
    unknown = np.isnan(values)
    return np.lexsort((np.arange(len(values)), -np.where(unknown, np.inf, values), ~unknown))[:k]


def _products(
    op: Recurrent, x: NDArray[Any], seen: NDArray[Any], dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both products of a recurrent op with their biases, (gates H,) each."""
    return op.weight_ih.matvec(x) + op.bias_ih.astype(dtype), op.weight_hh.matvec(seen) + op.bias_hh.astype(dtype)


def _recurrent_products(
    i: int,
    op: Recurrent,
    x: NDArray[Any],
    now: dict[str, NDArray[Any]],
    changes: dict[tuple[int, str], list[NDArray[Any]]],
    dtype: DTypeLike,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both products of op ``i`` that reads x and its own h; where it sends changes, from the memories that they move."""
    found = list(_products(op, x, now[f"{i}.h"], dtype))
    sides = (
        ("x", x, op.weight_ih, op.bias_ih, op.delta_input),
        ("h", now[f"{i}.h"], op.weight_hh, op.bias_hh, op.delta_hidden),
    )
    if f"{i}.age" in now:
        now[f"{i}.age"] = (now[f"{i}.age"] + 1) % DELTA_REFRESH
    for at, (name, value, weight, bias, threshold) in enumerate(sides):
        if threshold is None:
            continue
        sent, memory = now[f"{i}.sent_{name}"], now[f"{i}.memory_{name}"]
        changed = ~(np.abs(value - sent) <= np.float32(threshold))
        memory = memory + weight.matvec(np.where(changed, value - sent, 0))
        sent = np.where(changed, value, sent)
        if now[f"{i}.age"][0] == 0:
            memory = weight.matvec(sent) + bias.astype(dtype)
        now[f"{i}.sent_{name}"], now[f"{i}.memory_{name}"], found[at] = sent, memory, memory
        changes.setdefault((i, name), []).append(changed)
    return found[0], found[1]


def _gru_state(
    op: GRU, gi: NDArray[Any], gh: NDArray[Any], seen: NDArray[Any], h: NDArray[Any], dtype: DTypeLike
) -> NDArray[Any]:
    """(1 - z) n + z h, where ``seen`` is what the recurrent products read: h of a GRU, y of an EGRU."""
    (gi_r, gi_z, gi_n), (gh_r, gh_z, gh_n) = np.split(gi, 3), np.split(gh, 3)
    r, z = _sigmoid(gi_r + gh_r), _sigmoid(gi_z + gh_z)
    if op.reset_after:
        n = np.tanh(gi_n + r * gh_n)
    else:
        n = np.tanh(gi_n + np.split(op.weight_hh.matvec(r * seen) + op.bias_hh.astype(dtype), 3)[2])
    new: NDArray[Any] = (1 - z) * n + z * h
    return new


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    half: NDArray[Any] = np.tanh(0.5 * x)
    return 0.5 * (1 + half)


__all__ = ["FOLD_LIMIT", "Engine", "Interpretation", "State", "Stream", "interpret", "native_matrix"]
