"""Delta networks without training: which thresholds a trained dense network bears, found on a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsefold.cost import Cost, cost
from sparsefold.engine import Engine
from sparsefold.formats import Float
from sparsefold.program import EGRU, Embedding, Op, Program, Recurrent, Weightless
from sparsefold.progress import Progress

Side = Literal["input", "hidden"]
Site = tuple[int, Side]  # a product that may read changes: its op, and whether of x or of h
Loss = Callable[[list[Float]], float]

STEP = 2**0.5  # factor between two thresholds that are tried,
FINE = 2**0.125  # and at last, where a whole one is too much
LOWEST, HIGHEST = -16, 8  # powers of STEP: what is tried first, in units of the values' root mean square
BACK = 4  # powers of STEP below the best common threshold where the single ones begin
TOO_BUSY = 0.8  # share of columns from which on a list of them is no faster than all


@dataclass(frozen=True)
class Sent:
    """One product that reads changes: its threshold, the share of columns read, and MACs per step, of all columns and now."""

    op: int
    side: Side
    threshold: float
    rate: float
    macs_before: float
    macs: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`calibrate_delta` found. ``str()`` is a table; losses and MACs per step are of the sample, all ops counted.

    ``program``: with its thresholds, and this report in ``metadata["delta"]``. ``loss_before``, ``macs_before``: of the
    program as it was. ``plays``: how often the sample was played.
    """

    program: Program
    sent: tuple[Sent, ...]
    loss_before: float
    loss: float
    macs_before: float
    macs: float
    steps: int
    plays: int

    def __str__(self) -> str:
        lines = [f"{'product':<14}{'threshold':>10}{'columns read':>14}{'MACs before':>13}{'MACs':>11}"]
        for s in self.sent:
            where = f"{s.op} {s.side}"
            lines.append(f"{where:<14}{s.threshold:>10.4g}{s.rate:>14.3f}{s.macs_before:>13,.0f}{s.macs:>11,.0f}")
        lines.append(f"{'whole program':<38}{self.macs_before:>13,.0f}{self.macs:>11,.0f}")
        lines.append(f"loss {self.loss_before:.6g} before, {self.loss:.6g} now, on {self.steps} steps")
        return "\n".join(lines)


def delta_sites(program: Program) -> list[Site]:
    """The products that may read changes, and save by it: not the input of an Embedding's rows or of events."""
    sites: list[Site] = []
    for i, op in enumerate(program.ops):
        if not isinstance(op, Recurrent) or isinstance(op, EGRU):
            continue
        rows = i > 0 and isinstance(program.ops[i - 1], Embedding)
        if not rows and not program.reads_events(i):
            sites.append((i, "input"))
        if getattr(op, "reset_after", True):
            sites.append((i, "hidden"))
    return sites


def with_deltas(program: Program, thresholds: Mapping[Site, float | None]) -> Program:
    """The same program with these thresholds; a product of codes (w8a8) that is to read changes keeps int8 weights."""
    ops: list[Op] = list(program.ops)
    for (i, side), threshold in thresholds.items():
        op: Any = ops[i]
        field = "weight_ih" if side == "input" else "weight_hh"
        changed = {f"delta_{side}": None if threshold is None else float(threshold)}
        matrix = getattr(op, field)
        if threshold is not None and matrix.precision == "w8a8":
            changed[field] = replace(matrix, precision="i8")
        ops[i] = replace(op, **changed)
    return Program(tuple(ops), program.metadata)


def calibrate_delta(program: Program, sample: Any, loss: Loss | None = None, max_loss: float = 0.01) -> Calibration:
    """Finds thresholds with which a trained program executes few MACs and is hardly worse.

    Args:
        program: GRU, LSTM or RNN layers among its ops; thresholds that it has already are forgotten.
        sample: what it will meet: a sequence, (T,) token ids or (T, I) values, or several of them, each played from the
            beginning. Quality is measured here alone: keep another part to check it on.
        loss: of the list of outputs (T, O), one for each sequence; smaller is better. Default: the relative error
            ``|y - y0| / |y0|`` (Frobenius) against the outputs y0 of the program as it is.
        max_loss: by how much the loss may rise.

    The search raises all thresholds together, in proportion to the root mean square of what they are compared with, until the
    loss is spent; goes back some way; and raises single ones, the one next that saves most MACs for what it costs in loss. A
    product of which more than 80 % of the columns are still read goes back to reading all. More than two seconds show their
    progress.

    Raises:
        ValueError: no product may read changes, the sample does not fit, or even thresholds of 0 lose more than ``max_loss``.
    """
    sites = delta_sites(program)
    if not sites:
        raise ValueError("no product of this program may read changes: it has no GRU, LSTM or RNN layer that could.")
    if not max_loss > 0:
        raise ValueError(f"max_loss must be above 0, got {max_loss}: rounding alone moves every output.")
    search = _Search(with_deltas(program, dict.fromkeys(sites)), sites, _sequences(program, sample), loss, max_loss)
    with search.progress:
        return search.run()


@dataclass(frozen=True)
class _Point:
    thresholds: Mapping[Site, float | None]
    loss: float
    cost: Cost
    rates: dict[Site, float]

    @property
    def macs(self) -> int:
        return self.cost.macs_effective


class _Search:
    def __init__(
        self, dense: Program, sites: Sequence[Site], sequences: list[NDArray[Any]], loss: Loss | None, max_loss: float
    ) -> None:
        self.dense, self.sites, self.sequences = dense, sites, sequences
        self.plays = 0
        self.progress = Progress(10 + 16 * len(sites), "calibrating")
        stream = Engine(dense).stream()
        outputs = self._run(stream)
        self.loss = loss or _relative_error(outputs)
        self.before = _Point({}, self._checked(self.loss(outputs)), stream.cost, {})
        self.limit = self.before.loss + max_loss
        self.scales = {site: self._scale(*site) for site in sites}

    def run(self) -> Calibration:
        best = self._common()
        below = {site: float(np.float32((t or 0) / STEP**BACK)) for site, t in best.thresholds.items()}
        single = self._raised(self._raised(self._measure(below), STEP), FINE)
        best = min((p for p in (best, single) if p.loss <= self.limit), key=lambda p: p.macs)
        busy: dict[Site, float | None] = {site: None for site, rate in best.rates.items() if rate > TOO_BUSY}
        if busy and (calmer := self._measure({**best.thresholds, **busy})).loss <= self.limit:
            best = calmer
        return self._report(best)

    def _common(self) -> _Point:
        """The largest common factor of all scales whose loss is within the limit, found by halving."""
        low, high = LOWEST - 1, HIGHEST + 1
        best = self._measure(dict.fromkeys(self.sites, 0.0))
        if best.loss > self.limit:
            raise ValueError(
                f"thresholds of 0, which send every change, lose {best.loss - self.before.loss:.3g} by rounding alone; "
                "max_loss must be larger."
            )
        while high - low > 1:
            middle = (low + high) // 2
            point = self._measure({site: self._nearby(STEP**middle, site) for site in self.sites})
            if point.loss <= self.limit:
                low, best = middle, min(point, best, key=lambda p: p.macs)
            else:
                high = middle
        return best

    def _nearby(self, factor: float, site: Site) -> float:
        return float(np.float32(factor * self.scales[site]))

    def _raised(self, now: _Point, step: float) -> _Point:
        """One threshold after the other raised by the factor ``step``, while the loss is within the limit."""
        # By what a move was worth when it was last tried: it rarely gets better, so that most need not be tried again.
        queue: list[tuple[float, Site]] = []
        for site in self.sites:
            heappush(queue, (-np.inf, site))
        while queue:
            _, site = heappop(queue)
            raised = max((now.thresholds[site] or 0) * step, self.scales[site] * STEP**LOWEST)
            point = self._measure({**now.thresholds, site: float(np.float32(raised))})
            if point.loss > self.limit or point.macs >= now.macs:
                continue  # and never again: the others only take what is left
            worth = (now.macs - point.macs) / max(point.loss - now.loss, 1e-6 * (self.limit - self.before.loss))
            if queue and worth < -queue[0][0]:
                heappush(queue, (-worth, site))
                continue
            now = point
            heappush(queue, (-worth, site))
        return now

    def _measure(self, thresholds: Mapping[Site, float | None]) -> _Point:
        program = with_deltas(self.dense, thresholds)
        engine = Engine(program)
        stream = engine.stream()
        loss = self._checked(self.loss(self._run(stream)))
        counts = stream.counters
        found = {site: counts.read_rate(site[0], _role(site)) for site, t in thresholds.items() if t is not None}
        self.progress.update(min(self.plays, self.progress.total - 1), f"loss {loss:.4g}")
        rates = {site: rate for site, rate in found.items() if rate is not None}
        return _Point(thresholds, loss, cost(program, counts, engine.folded), rates)

    def _run(self, stream: Any) -> list[Float]:
        self.plays += 1
        outputs = []
        for sequence in self.sequences:
            stream.reset()
            outputs.append(stream.run(sequence))
        return outputs

    @staticmethod
    def _checked(loss: Any) -> float:
        if not np.isfinite(loss):
            raise ValueError(f"the loss must be a finite number, got {loss!r}.")
        return float(loss)

    def _scale(self, i: int, side: Side) -> float:
        """Root mean square of what the threshold is compared with."""
        ops = self.dense.ops[: i if side == "input" else i + 1]
        played: Sequence[NDArray[Any]] = self.sequences
        if not all(isinstance(op, Weightless) for op in ops):
            played = self._run(Engine(Program(ops)).stream())
        squares = np.mean([np.mean(np.square(values, dtype=np.float64)) for values in played])
        return max(float(np.sqrt(squares)), 1e-12)

    def _report(self, best: _Point) -> Calibration:
        steps = self.before.cost.steps

        def macs(point: _Point, site: Site) -> float:
            return sum(p.macs_effective for p in point.cost.parts if (p.op, p.role) == (site[0], _role(site))) / steps

        sent = tuple(
            Sent(*site, threshold, best.rates[site], macs(self.before, site), macs(best, site))
            for site, threshold in best.thresholds.items()
            if threshold is not None
        )
        numbers = (self.before.loss, best.loss, self.before.macs / steps, best.macs / steps, steps, self.plays)
        about = Calibration(self.dense, sent, *numbers)
        told = {f.name: getattr(about, f.name) for f in fields(about) if f.name not in ("program", "sent")}
        told["max_loss"] = self.limit - self.before.loss
        rows = [{f.name: getattr(s, f.name) for f in fields(s)} for s in sent]
        program = with_deltas(self.dense, best.thresholds)
        metadata = {**program.metadata, "delta": {**told, "sent": rows}}
        self.progress.update(self.progress.total, f"{best.macs / max(self.before.macs, 1):.0%} of the MACs left")
        return replace(about, program=Program(program.ops, metadata))


def _role(site: Site) -> str:
    return "recurrent" if site[1] == "hidden" else "input"


def _relative_error(reference: list[Float]) -> Loss:
    whole = float(np.sqrt(sum(np.square(y, dtype=np.float64).sum() for y in reference)))

    def loss(outputs: list[Float]) -> float:
        pairs = zip(outputs, reference, strict=True)
        return float(np.sqrt(sum(np.square(y - y0, dtype=np.float64).sum() for y, y0 in pairs))) / max(whole, 1e-30)

    return loss


def _sequences(program: Program, sample: Any) -> list[NDArray[Any]]:
    """The sample as a list of (T,) tokens or (T, I) values."""
    axes = 1 if program.takes_tokens else 2
    try:
        if isinstance(sample, np.ndarray) and sample.ndim == axes:
            sample = [sample]
        found = [np.asarray(sequence) for sequence in sample]
        if found and all(sequence.ndim == axes - 1 for sequence in found):
            found = [np.stack(found)]
    except (TypeError, ValueError):
        found = []
    fits = all(s.ndim == axes and (axes == 1 or s.shape[1] == program.inputs) for s in found)
    if not found or not fits or not sum(map(len, found)):
        wanted = "(T,) token ids" if axes == 1 else f"(T, {program.inputs}) values"
        raise ValueError(f"sample must be one sequence of {wanted}, or a list of them, and hold at least one step.")
    return found


__all__ = ["Calibration", "Sent", "calibrate_delta", "delta_sites", "with_deltas"]
