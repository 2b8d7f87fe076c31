"""Counts x shapes -> cost. The only arithmetic of cost in the package (``docs/cost-model.md``).

Kernels and hooks count integers (events, columns read); this file multiplies. Nothing here is timed: a figure made here is
called *counted*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.formats import Format
from sparsefold.program import EGRU, Cluster, Conv1d, Embedding, Linear, Op, Program, Recurrent, Weightless

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Counts:
    """What happened in ``steps`` steps, as integers, by the index of the op.

    ``events[i]``: (H,) how often each unit of op ``i`` emitted, an EGRU or one that picks. ``input_reads[i]``: (I,) how often
    each input column of op ``i`` was read, where its input is an event list (of a convolution (kernel I,), tap after tap) or
    changes; absent where the input is dense. ``hidden_reads[i]``: (H,) the same for the recurrent matrix of an EGRU, or of an
    op that sends the changes of its units. ``asked[i]``: in how many of the steps Cluster ``i`` was computed; absent: in all.
    """

    steps: int
    events: Mapping[int, Integers] = field(default_factory=dict)
    input_reads: Mapping[int, Integers] = field(default_factory=dict)
    hidden_reads: Mapping[int, Integers] = field(default_factory=dict)
    asked: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_trace(
        cls,
        program: Program,
        trace: Mapping[int, NDArray[Any]],
        emitted_before: Mapping[int, NDArray[Any]] | None = None,
        steps: int = 0,
        asked: Mapping[int, NDArray[Any]] | None = None,
    ) -> Counts:
        """Counts of a recorded run: ``trace[i]`` (T, H) says which units of op ``i`` emitted at each step.

        ``emitted_before[i]`` (H,) says which of EGRU ``i`` had emitted at the step before the first, or (history, I) which of
        the inputs that convolution ``i`` remembers were events; none, when left out.
        ``steps`` is read only where the program has neither, so that no trace tells the number. ``asked[i]`` (T,) says at which
        steps Cluster ``i`` was computed; at all of those it does not speak of.

        Raises:
            ValueError: the program sends changes, which no trace records. Take ``Stream.counters``.
        """
        if any(isinstance(op, Recurrent) and "age" in op.carried() for op in program.ops):
            raise ValueError("a trace says nothing of the changes this program sends. Take Stream.counters.")
        events, input_reads, hidden_reads = {}, {}, {}
        steps = len(next(iter(trace.values()))) if trace else steps
        emitted = {i: np.asarray(flags) != 0 for i, flags in trace.items()}
        for i, flags in emitted.items():
            events[i] = flags.sum(0)
            if isinstance(op := program.ops[i], EGRU):
                before = (
                    np.zeros(flags.shape[1], bool) if emitted_before is None else np.asarray(emitted_before[i]) != 0
                )
                read = flags[1:] if op.reverse else flags[:-1]
                hidden_reads[i] = read.sum(0) + before if len(flags) else np.zeros(flags.shape[1], np.int64)
        for i, reader in enumerate(program.ops):
            if not program.reads_events(i):
                continue
            flags = np.concatenate([emitted[j] for j in program.sources(program.first_step(i))], axis=1)
            if isinstance(reader, Cluster) and asked is not None and i in asked:
                flags = flags[np.asarray(asked[i]) != 0]
            input_reads[i] = flags.sum(0)
            if isinstance(reader, Conv1d):
                remembered = (emitted_before or {}).get(i, np.zeros((reader.history, reader.inputs)))
                seen = np.concatenate([np.asarray(remembered) != 0, flags])
                taps = range(0, reader.history + 1, reader.dilation)
                input_reads[i] = np.concatenate([seen[first : first + len(flags)].sum(0) for first in taps])
        times = {
            i: steps if asked is None or i not in asked else int((np.asarray(asked[i]) != 0).sum())
            for i, op in enumerate(program.ops)
            if isinstance(op, Cluster)
        }
        return cls(steps, events, input_reads, hidden_reads, times)

    def times(self, op: int) -> int:
        """In how many steps ``op`` was played: all of them, or of a Cluster those that asked for it."""
        return self.asked.get(op, self.steps)

    def read_rate(self, op: int, role: str) -> float | None:
        """Share of the columns of the "recurrent" or any other product of ``op`` that a step read; None where it reads all.

        Of a Cluster its projection's, over the steps that asked for it.
        """
        reads = (self.hidden_reads if role == "recurrent" else self.input_reads).get(op)
        return None if reads is None else float(np.sum(reads)) / (max(self.times(op), 1) * len(reads))

    def event_rate(self, op: int | None = None) -> float:
        """Events per unit and step, of one op or over all that speak."""
        chosen = [np.asarray(e) for i, e in self.events.items() if op in (None, i)]
        units = sum(e.size for e in chosen)
        return float(sum(int(e.sum()) for e in chosen) / (units * self.steps)) if units * self.steps else 0.0


@dataclass(frozen=True)
class Part:
    """One product of the network, or both of a cluster; totals over all steps.

    ``role`` is embedding, input, recurrent, convolution, linear or decoder (a linear that is the last op, or a cluster and the
    linear it refines). ``macs_dense``: of the unfolded dense network played the same way, of a cluster where it was asked for;
    within its groups where a convolution has any. ``macs_weight``: zero weights skipped (elements in
    stored blocks). ``macs_effective``: executed, silent units skipped too. ``bytes_*``: read from memory.
    """

    op: int
    role: str
    macs_dense: int
    macs_weight: int
    macs_effective: int
    bytes_weights: int
    bytes_index: int
    density: float


@dataclass(frozen=True)
class Cost:
    """Exact integer totals of a run. Divide by ``steps`` with :meth:`per_step` for tables.

    ``unit_updates``: pointwise updates of a unit (all its gates and its state), which no sparsity saves. ``bytes_state``: state
    and event lists read and written.
    """

    steps: int
    parts: tuple[Part, ...]
    unit_updates: int
    bytes_state: int

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of the dense network."""
        return sum(p.macs_dense for p in self.parts)

    @property
    def macs_weight(self) -> int:
        """Multiply-accumulates with zero weights skipped."""
        return sum(p.macs_weight for p in self.parts)

    @property
    def macs_effective(self) -> int:
        """Multiply-accumulates executed."""
        return sum(p.macs_effective for p in self.parts)

    @property
    def bytes_weights(self) -> int:
        """Bytes of weight values read."""
        return sum(p.bytes_weights for p in self.parts)

    @property
    def bytes_index(self) -> int:
        """Bytes of indices read."""
        return sum(p.bytes_index for p in self.parts)

    def per_step(self, name: str, role: str | None = None) -> float:
        """A field (``"macs_effective"``, ...) per step, of all parts or of those with ``role``."""
        if not self.steps:
            return 0.0
        if role is None:
            return float(getattr(self, name)) / self.steps
        return sum(float(getattr(p, name)) for p in self.parts if p.role == role) / self.steps

    def to_dict(self) -> dict[str, Any]:
        """Per-step figures for JSON, with every part named."""
        names = ("macs_dense", "macs_weight", "macs_effective", "bytes_weights", "bytes_index")
        steps = max(self.steps, 1)
        return {
            "steps": self.steps,
            **{n: self.per_step(n) for n in names},
            "bytes_state": self.bytes_state / steps,
            "unit_updates": self.unit_updates / steps,
            "parts": [
                {"op": p.op, "role": p.role, "density": p.density, **{n: getattr(p, n) / steps for n in names}}
                for p in self.parts
            ],
        }


def cost(program: Program, counts: Counts, folded: bool = False) -> Cost:
    """Cost of the run that ``counts`` describes.

    ``folded``: the engine replaced embedding and first input product by one table (``Engine.folded``); the product then
    costs no multiplication and one value read for each of its rows.
    """
    parts: list[Part] = []
    unit_updates = bytes_state = 0
    for i, op in enumerate(program.ops):
        if isinstance(op, Embedding):
            read = 0 if folded else 4 * op.outputs * counts.steps
            parts.append(Part(i, "embedding", 0, 0, 0, read, 0, 1.0))
        elif isinstance(op, Linear):
            decodes = i == len(program.ops) - 1 or any(
                isinstance(behind, Cluster) for behind in program.ops[i + 2 : i + 3]
            )
            role = "decoder" if decodes else "linear"
            parts.append(_product(i, role, op.weight, counts.steps, counts.input_reads.get(i)))
        elif isinstance(op, Cluster):
            times = counts.times(i)
            parts.append(_cluster(i, op, times, counts.input_reads.get(i)))
            unit_updates += op.words * times
        elif isinstance(op, Conv1d):
            parts.append(_product(i, "convolution", op.weight, counts.steps, counts.input_reads.get(i), op.groups))
        elif isinstance(op, Recurrent):
            product = _product(i, "input", op.weight_ih, counts.steps, counts.input_reads.get(i))
            if folded and i == 1:
                read = 4 * op.weight_ih.shape[0] * counts.steps
                product = Part(i, "input", product.macs_dense, product.macs_weight, 0, read, 0, product.density)
            parts.append(product)
            parts.append(_product(i, "recurrent", op.weight_hh, counts.steps, counts.hidden_reads.get(i)))
        if not isinstance(op, Embedding | Linear | Conv1d | Cluster):
            unit_updates += (op.units if isinstance(op, Weightless) else op.outputs) * counts.steps
        if isinstance(op, Recurrent):  # whoever sends changes looks at every value
            unit_updates += sum(n for name, n in op.carried().items() if name.startswith("sent")) * counts.steps
        bytes_state += _state_bytes(i, op, counts)
    return Cost(counts.steps, tuple(parts), unit_updates, bytes_state)


def _product(i: int, role: str, matrix: Format, steps: int, reads: Integers | None, groups: int = 1) -> Part:
    dense = matrix.shape[0] * matrix.shape[1] // groups
    elements, index = matrix.elements, matrix.column_index_bytes
    if reads is None:
        executed, index_bytes = elements * steps, int(index.sum()) * steps
    else:
        counted = np.asarray(reads).astype(np.int64)
        executed, index_bytes = int(counted @ matrix.column_elements), int(counted @ index)
    return Part(
        i, role, dense * steps, elements * steps, executed, matrix.value_bytes * executed, index_bytes, elements / dense
    )


def _cluster(i: int, op: Cluster, times: int, reads: Integers | None) -> Part:
    """Both products of a cluster as one part."""
    projection = _product(i, "decoder", op.projection, times, reads)
    weight = _product(i, "decoder", op.weight, times, None)
    elements, dense = op.projection.elements + op.weight.elements, prod(op.projection.shape) + prod(op.weight.shape)
    names = ("macs_dense", "macs_weight", "macs_effective", "bytes_weights", "bytes_index")
    sums = {name: getattr(projection, name) + getattr(weight, name) for name in names}
    return replace(projection, density=elements / dense, **sums)


def _state_bytes(i: int, op: Op, counts: Counts) -> int:
    """Dense state in and out, 4 bytes a value; events (which carry an EGRU's y) and changes written and read, index and value.

    A convolution writes its newest input and reads all taps.
    """
    if isinstance(op, Conv1d):
        reads = counts.input_reads.get(i)
        if reads is not None:
            return 8 * int(reads[-op.inputs :].sum() + reads.sum())
        return 4 * (op.kernel + 1) * op.inputs * counts.steps
    dense = sum(n for name, n in op.carried().items() if name not in ("y", "age")) if isinstance(op, Recurrent) else 0
    written = [counts.events.get(i)]
    if isinstance(op, Recurrent):  # changes: written by the op that reads them
        written += [counts.input_reads.get(i)] if op.delta_input is not None else []
        written += [counts.hidden_reads.get(i)] if op.delta_hidden is not None else []
    listed = [*written, counts.hidden_reads.get(i), counts.input_reads.get(i)]
    return 2 * 4 * dense * counts.steps + 8 * sum(int(np.sum(n)) for n in listed if n is not None)
