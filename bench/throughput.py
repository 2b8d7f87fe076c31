"""Streams that one processor core plays in real time, and two cores: ``python bench/throughput.py``.

Event GRUs of 3 x 1350 units of which 10 % of the 16x1 blocks exist and about 10 % of the units speak (random weights, as in
bench/steps.py), played by ``Engine.step_batch`` in batches of several sizes at 100 steps a second for each stream. One core: a
pinned thread. Two cores: two threads, each pinned to a core of its own, each with batches of its own, at the same time; and one
caller with ``Engine(threads=2)``. The Python call is included.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from steps import PRECISIONS, check, network, sequence

from sparsefold.bench import Latency, pinned, provenance, time_calls, write_lines
from sparsefold.cost import cost
from sparsefold.engine import Engine, Stream
from sparsefold.program import Program

UNITS, LAYERS, DENSITY, EVENT_RATE = 1350, 3, 0.1, 0.1
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS_PER_SECOND = 100
ROUNDS = 5  # turns of every way of playing, so that a slower moment of the machine meets all of them


def batches(engine: Engine, values: NDArray[np.float32], size: int) -> tuple[list[Stream], Any, list[NDArray[Any]]]:
    """(streams, a call that plays one batch of them, inputs of the calls); warmed up."""
    streams, out = [engine.stream() for _ in range(size)], np.empty((size, engine.program.outputs), np.float32)
    calls = max(10, 400 // (ROUNDS * size))
    inputs = [np.ascontiguousarray(values[np.arange(k, k + size) % len(values)]) for k in range(calls)]

    def call(x: NDArray[np.float32]) -> None:
        engine.step_batch(streams, x, out)

    time_calls(call, inputs[: max(3, 30 // size)])
    return streams, call, inputs


def at_once(players: list[tuple[Any, list[Any]]], cpus: list[int]) -> list[NDArray[np.int64]]:
    """Nanoseconds of every call of each player, all at the same time, each thread on its own core."""
    barrier, found = threading.Barrier(len(players)), [np.empty(0, np.int64)] * len(players)

    def play(i: int) -> None:
        os.sched_setaffinity(0, {cpus[i]})  # of this thread alone
        barrier.wait()
        found[i] = time_calls(*players[i])

    threads = [threading.Thread(target=play, args=(i,)) for i in range(len(players))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def measure(program: Program, values: NDArray[np.float32], size: int, cpus: list[int]) -> list[dict[str, Any]]:
    """One batch size in every way of playing, as lines."""
    alone, shared = Engine(program), Engine(program, threads=2)
    streams, one, inputs = batches(alone, values, size)
    others = [batches(alone, values, size)[1:] for _ in range(2)]
    _, pair, _ = batches(shared, values, size)
    times: dict[str, list[NDArray[np.int64]]] = {"one core": [], "two cores, a batch each": [], "threads=2": []}
    for _ in range(ROUNDS):
        with pinned(cpus[-1]):
            times["one core"].append(time_calls(one, inputs))
        if len(cpus) > 1:
            times["two cores, a batch each"] += at_once(others, cpus[-2:])
            times["threads=2"].append(time_calls(pair, inputs))
    total = cost(program, streams[0].counters)
    lines = []
    for how, taken in times.items():
        if not taken:
            continue
        latency = Latency.of(np.concatenate(taken))  # throughput is by the mean: a median hides what waited
        playing = size * (2 if how.startswith("two") else 1)
        lines.append({
            "units": UNITS, "layers": LAYERS, "density": DENSITY, "batch": size, "how": how,
            "latency_us": latency.to_dict(), "us_per_step": latency.mean / playing,
            "streams": int(1e6 / STEPS_PER_SECOND * playing / latency.mean), "steps_per_second": STEPS_PER_SECOND,
            "event_rate": streams[0].counters.event_rate(), "cost": total.to_dict(),
        })  # fmt: skip
    return lines


def main() -> None:
    """Runs every precision and batch size and writes bench/results/<machine>/throughput-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--batch", type=int, default=None, help="only this batch size")
    args = parser.parse_args()
    about, cpus = provenance("python bench/throughput.py"), sorted(os.sched_getaffinity(0))
    random = np.random.default_rng(UNITS)
    program = network(UNITS, LAYERS, DENSITY, EVENT_RATE, 1.0, random)
    values = sequence(200, UNITS, 1.0, random)
    lines = []
    for precision in PRECISIONS:
        rounded = program.rounded(precision)
        worst = check(rounded, list(values))
        for size in BATCHES if args.batch is None else (args.batch,):
            for line in measure(rounded, values, size, cpus):
                line |= {"precision": precision, "settings": f"largest error of a step {worst:.1e}"}
                lines.append(line)
                print(
                    f"{precision:<5} batch {size:>3}  {line['how']:<24}{line['us_per_step']:>8.1f} us a step  "
                    f"{line['streams']:>5} streams",
                    flush=True,
                )
    print(write_lines(args.out, "throughput-", about, lines))


if __name__ == "__main__":
    main()
