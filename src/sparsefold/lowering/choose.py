"""Which storage format a matrix gets, from its zeros and what its product reads: what is expected, or timed, to be fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sparsefold import _native
from sparsefold.engine import Engine, native_matrix
from sparsefold.formats import CSC, Block, Complementary, Dense, Float, Format, Precision
from sparsefold.program import Program, matrices
from sparsefold.progress import Progress

# Tall blocks first: an event wakes one column, and 16 rows are one vector.
BLOCKS = ((32, 1), (16, 1), (8, 1), (4, 1), (16, 16), (8, 4), (4, 4))
GROUPS = (16, 1)

# Nanoseconds on one AVX-512 core, weights in the second-level cache (bench/results): (event lists, dense x). Only their ratios
# matter. For dense x blocks are packed by rows, and sums stay in registers.
DENSE_ELEMENT = 0.1, 0.08
SEGMENT = {16: (1.45, 0.8), 8: (1.15, 0.5), 4: (0.85, 0.38), 1: (0.5, 0.3)}  # one run of rows, by its height
COMPLEMENTARY_ELEMENT = 0.32, 0.32  # groups of one row

RATE = 0.10  # share of the units that speak where nobody counted
LISTS, ROUNDS = 24, 7  # event lists of a timing, and how often they are played
NEAR = 1.03  # timed prices closer than this are alike


@dataclass(frozen=True)
class Reads:
    """What a product reads: ``rate`` of its inputs as an event list, or all of a dense x."""

    events: bool = True
    rate: float = RATE
    counted: bool = False

    @property
    def known(self) -> str:
        """How the rate is known."""
        return "dense x" if not self.events else "counted" if self.counted else "assumed"


def choose(weight: Float, gates: int = 1, reads: Reads | None = None) -> Format:
    """The format for ``weight`` (outputs, inputs) with ``gates`` gates that is expected to be fastest.

    Anything but dense must promise a tenth less time than dense; below that, whole columns are the safer choice.
    """
    reads = reads or Reads()
    return _cheapest([(m, price(m, reads)) for m in candidates(weight, gates)], 0.9, 1.0)


def choose_all(program: Program, sample: Any = None, tune: bool = False, precision: Precision = "f32") -> Program:
    """The same program with every matrix in the format chosen for it, and ``metadata["choices"]`` that says why.

    Args:
        program: what to store.
        sample: a sequence of inputs, (T,) or (T, I), or a batch of them, (B, T) or (B, T, I); played once to count how many units
            speak. None: 10 % is assumed.
        tune: time every candidate on this processor; else the prices above decide.
        precision: of the weights when they are timed.
    """
    rates = _count(program, sample) if sample is not None else {}
    found = [(i, name) for i, op in enumerate(program.ops) for name in matrices(op)]
    ops, choices = list(program.ops), []
    with Progress(len(found), "timing formats") as progress:
        for done, (i, name) in enumerate(found):
            matrix, events = matrices(ops[i])[name], program.by_events(i, name)
            reads = Reads(events, rates.get((i, name), RATE) if events else 1.0, (i, name) in rates)
            own: Precision = "i8" if precision == "w8a8" and events else precision
            possible = candidates(matrix.to_dense(), matrix.gates)
            priced = [(m, timed(m.rounded(own), reads) if tune else price(m, reads)) for m in possible]
            chosen = _cheapest(priced, 1.0 if tune else 0.9, NEAR if tune else 1.0)
            ops[i] = replace(cast(Any, ops[i]), **{name: chosen})
            best = sorted(priced, key=lambda p: p[1])[:5]
            choices.append(
                {
                    "op": i, "matrix": name, "chosen": chosen.description,
                    "ns": next(round(ns, 1) for m, ns in priced if m is chosen),
                    "by": "timed" if tune else "estimated", "event_rate": round(reads.rate, 4), "rate": reads.known,
                    "candidates": [[m.description, round(ns, 1)] for m, ns in best],
                }
            )  # fmt: skip
            if tune:
                choices[-1] |= {"isa": _native.available_isas()[0]}
                progress.update(done + 1, chosen.description)
    return Program(tuple(ops), {**program.metadata, "choices": choices})


def _cheapest(priced: list[tuple[Format, float]], against_dense: float, near: float) -> Format:
    """Dense comes first in ``priced``; others must stay below ``against_dense`` of its price. Among near ones the smallest."""
    (dense, dense_ns), *others = priced
    better = [(m, ns) for m, ns in others if ns < against_dense * dense_ns]
    if not better:
        return dense
    lowest = min(ns for _, ns in better)
    return min((m for m, ns in better if ns <= near * lowest), key=lambda m: m.nbytes)


def _count(program: Program, sample: Any) -> dict[tuple[int, str], float]:
    """Share of its columns that each matrix that reads events was asked for, by (op, name)."""
    batch = np.asarray(sample)
    values = 1 if program.takes_tokens else 2
    if batch.ndim not in (values, values + 1):
        wanted = "(T,) or (B, T) token ids" if program.takes_tokens else "(T, I) or (B, T, I) values"
        raise ValueError(f"sample must be {wanted} for this model, got shape {batch.shape}.")
    stream = Engine(program).stream()
    for sequence in batch if batch.ndim > values else [batch]:
        stream.reset()
        stream.run(sequence)
    counts = stream.counters
    if not counts.steps:
        raise ValueError("sample holds no step. Pass at least one sequence.")
    read = {(i, "weight_hh"): n for i, n in counts.hidden_reads.items()}
    for i, n in counts.input_reads.items():
        read[i, next(name for name in matrices(program.ops[i]) if name != "weight_hh")] = n
    return {key: float(n.sum()) / (counts.steps * len(n)) for key, n in read.items()}


def price(matrix: Format, reads: Reads | None = None) -> float:
    """Expected nanoseconds of one product."""
    reads = reads or Reads()
    which = 0 if reads.events else 1
    if isinstance(matrix, Dense):
        whole = DENSE_ELEMENT[which] * matrix.elements
    elif isinstance(matrix, CSC):
        whole = SEGMENT[1][which] * matrix.elements
    elif isinstance(matrix, Complementary) and matrix.group == 1:
        whole = COMPLEMENTARY_ELEMENT[which] * matrix.live.size
    elif isinstance(matrix, Complementary):
        whole = _segments(matrix.group, which) * matrix.live.size
    else:
        whole = _segments(matrix.block[0], which) * len(matrix.block_row) * matrix.block[1]
    return whole * reads.rate if reads.events else whole


def _segments(height: int, which: int) -> float:
    if height % 16 == 0:
        return SEGMENT[16][which] * height / 16
    return SEGMENT[height][which] if height in SEGMENT else SEGMENT[1][which] * height


def timed(matrix: Format, reads: Reads) -> float:
    """Nanoseconds of one product on this processor: the median over rounds, no Python between the calls of a round."""
    packed = _native.Packed(native_matrix(matrix))
    random, cols = np.random.default_rng(0), matrix.shape[1]
    out = np.zeros(packed.padded_rows, np.float32)
    call: Callable[[], None]
    if reads.events:
        count = max(round(reads.rate * cols), 1)
        index = np.concatenate([np.sort(random.choice(cols, count, replace=False)) for _ in range(LISTS)]).astype(
            np.uint32
        )
        value = random.standard_normal(len(index)).astype(np.float32)
        start = (np.arange(LISTS + 1) * count).astype(np.uint32)
        call, repeat = lambda: packed.matvec_lists(index, value, start, out), LISTS
    else:
        x, repeat = random.standard_normal(cols).astype(np.float32), 8
        call = lambda: packed.matvec(x, out, repeat)  # noqa: E731
    call()
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        call()
        rounds.append((time.perf_counter_ns() - began) / repeat)
    return float(np.median(rounds))


def candidates(weight: Float, gates: int) -> Iterator[Format]:
    """Every format that may hold the matrix, dense first, and alone where there are too few zeros for any other."""
    yield Dense.from_dense(weight, gates)
    if weight.size == 0 or (weight != 0).mean() > 0.75:
        return
    for block in BLOCKS:
        yield Block.from_dense(weight, block, gates)
    if weight.shape[0] <= 2**16:
        yield CSC.from_dense(weight, gates)
    for group in GROUPS:
        density = Block.from_dense(weight, (group, 1), gates).density if group > 1 else float(np.mean(weight != 0))
        overlay = round(1 / density) if density else 0
        if 2 <= overlay <= 64:
            try:
                yield Complementary.from_dense(weight, overlay, group, gates)
            except ValueError:  # its zeros do not have that pattern
                continue


__all__ = ["Reads", "candidates", "choose", "choose_all", "price", "timed"]
