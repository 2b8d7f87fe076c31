"""Speed-up of one recurrent product 3H x H over density x event rate, format by format: ``python bench/heatmap.py``.

The yardstick, our own dense float32 product of dense x, is timed before every few cases again, so that a slow minute does not
tilt the map. Every case is compared with float64 before it is timed; no Python runs between the calls.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kernels import microseconds, stored
from threadpoolctl import threadpool_limits

from sparsefold import _native
from sparsefold.bench import pinned, provenance, write_lines
from sparsefold.engine import native_matrix
from sparsefold.progress import Progress

UNITS = 1350
DENSITIES = (0.02, 0.05, 0.1, 0.2, 1 / 3, 0.5, 1.0)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
# name, rows of a block or group, precision
FORMATS = [
    ("block", 16, "f32"), ("block", 16, "i8"), ("block", 8, "f32"), ("block", 4, "f32"), ("csc", 1, "f32"),
    ("complementary", 16, "f32"), ("complementary", 1, "f32"), ("dense", 16, "f32"),
]  # fmt: skip
LISTS = 32


def row(name: str, height: int, precision: str, density: float, random: np.random.Generator) -> list[dict[str, Any]]:
    """All event rates of one matrix, without the yardstick."""
    matrix = stored(name, height, density, UNITS, random).rounded(precision)  # type: ignore[arg-type]
    packed, exact = _native.Packed(native_matrix(matrix)), matrix.to_dense().astype(np.float64)
    lines = []
    for rate in RATES:
        events = max(round(rate * UNITS), 1)
        sets = [np.sort(random.choice(UNITS, events, replace=False)).astype(np.uint32) for _ in range(LISTS)]
        values, out = random.random(events).astype(np.float32), np.zeros(packed.padded_rows, np.float32)
        packed.matvec_events(sets[0], values, out)
        x = np.zeros(UNITS)
        x[sets[0]] = values
        if not np.allclose(out.reshape(3, -1)[:, :UNITS].reshape(-1), exact @ x, rtol=0, atol=1e-4):
            raise RuntimeError(f"wrong product of {name} {height} at density {density}, rate {rate}: nothing is timed.")
        starts = (np.arange(LISTS + 1) * events).astype(np.uint32)
        call = partial(packed.matvec_lists, np.concatenate(sets), np.tile(values, LISTS), starts, out)
        us = microseconds(call, LISTS, rounds=7)
        lines.append(
            {"format": name, "height": height, "precision": precision, "density": density, "event_rate": rate, "us": us}
        )
    return lines


def main() -> None:
    """Sweeps and writes bench/results/<machine>/heatmap-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    about = provenance("python bench/heatmap.py")
    dense = _native.Packed(native_matrix(stored("dense", 16, 1.0, UNITS, random)))
    x, y = random.standard_normal(UNITS).astype(np.float32), np.zeros(dense.padded_rows, np.float32)
    cases = [(*f, d) for f in FORMATS for d in DENSITIES if f[0] != "dense" or d == 1]
    cases = [c for c in cases if c[0] != "complementary" or c[3] < 1]
    lines: list[dict[str, Any]] = []
    with pinned(), threadpool_limits(1), Progress(len(cases), "heat map") as progress:
        for i, case in enumerate(cases):
            if i % 3 == 0:
                yardstick = microseconds(partial(dense.matvec, x, y, 4), 4)
            found = row(*case, random)
            lines += [{"units": UNITS, **e, "dense_us": yardstick, "speedup": yardstick / e["us"]} for e in found]
            progress.update(i + 1, case[0])
    print(write_lines(args.out, "heatmap-", about, lines))


if __name__ == "__main__":
    main()
