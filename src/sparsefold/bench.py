"""Timing that can be trusted: pinned, warmed up, interleaved, with percentiles and the machine's fingerprint."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsefold
from sparsefold import _native
from sparsefold.program import write_atomically


@dataclass(frozen=True)
class Latency:
    """Time of one call in microseconds, over ``calls`` calls."""

    p50: float
    p99: float
    mean: float
    calls: int

    @classmethod
    def of(cls, nanoseconds: NDArray[np.int64]) -> Latency:
        """Percentiles of single calls."""
        us = nanoseconds / 1e3
        return cls(float(np.percentile(us, 50)), float(np.percentile(us, 99)), float(us.mean()), len(us))

    def to_dict(self) -> dict[str, float | int]:
        """For JSON: ``latency_us`` p50, p99, mean and the number of calls."""
        return {"p50": self.p50, "p99": self.p99, "mean": self.mean, "calls": self.calls}


@contextmanager
def pinned(cpu: int | None = None) -> Iterator[None]:
    """Keep this process on one processor (the last it may use, when left out); does nothing where that is unknown."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before) if cpu is None else cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def time_calls(call: Callable[[Any], Any], inputs: Sequence[Any]) -> NDArray[np.int64]:
    """Nanoseconds of ``call(x)`` for each x, one clock reading before and one after each call."""
    clock = time.perf_counter_ns
    out = np.empty(len(inputs), np.int64)
    for i, x in enumerate(inputs):
        start = clock()
        call(x)
        out[i] = clock() - start
    return out


def race(
    players: Mapping[str, Callable[[Any], Any]], inputs: Sequence[Any], rounds: int = 8, warmup: int = 200
) -> dict[str, Latency]:
    """Time several players on the same inputs, in turns, so that a slower moment of the machine meets all of them.

    Args:
        players: name -> a call that plays one input; each keeps its own state moving.
        inputs: at least ``rounds`` of them; every player sees all, in order, a share of them each turn.
        rounds: turns.
        warmup: inputs played before, not counted.

    Returns:
        Latency of each player over all its calls.
    """
    for call in players.values():
        time_calls(call, inputs[:warmup])
    times: dict[str, list[NDArray[np.int64]]] = {name: [] for name in players}
    edges = [len(inputs) * turn // rounds for turn in range(rounds + 1)]
    for first, last in pairwise(edges):
        for name, call in players.items():
            times[name].append(time_calls(call, inputs[first:last]))
    return {name: Latency.of(np.concatenate(t)) for name, t in times.items()}


def provenance(command: str) -> dict[str, Any]:
    """Where and when a result was made: machine, versions, commit, command."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "isa": _native.available_isas()[0],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": getattr(sys.modules.get("torch"), "__version__", None),
        "sparsefold": sparsefold.__version__,
    }


def write_lines(folder: Path, prefix: str, about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write results to ``folder/<machine>/<prefix><date>-<commit>.jsonl``, each line with its provenance; returns the path."""
    machine = "".join(c if c.isalnum() else "-" for c in f"{about['processor']} {about['isa']}".lower())
    commit = (about["commit"] or "none").rstrip("+")
    path = folder / machine / f"{prefix}{about['date'][:10]}-{commit}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({**about, **line}) + "\n" for line in lines).encode())
    return path


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+`` where tracked files differ; None elsewhere."""
    where = Path(sparsefold.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit or None
    except OSError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
