"""Time of one recurrent product, 3H x H at batch 1, by density and event rate: ``make bench`` or ``python bench/kernels.py``.

Correctness first: every case is compared with float64 numpy before it is timed. Each line committed holds the machine, the
instruction set, the shape and the median over many calls; the library's own dense product with dense x is the yardstick of
its own run, and those of numpy and torch are timed beside it.
"""

from __future__ import annotations

import argparse
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sparsefold import _native
from sparsefold.bench import pinned, provenance, write_lines
from sparsefold.engine import native_matrix
from sparsefold.formats import CSC, Block, Complementary, Dense, Format
from sparsefold.progress import Progress

SHAPES = Path(__file__).parent / "shapes.toml"
TURNS = 9


def microseconds(call: Callable[[], Any], repeat: int, rounds: int = 15) -> float:
    """Median over ``rounds`` of one call's time, ``repeat`` calls a round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / repeat / 1e3)
    return float(np.median(times))


def stored(name: str, height: int, density: float, units: int, random: np.random.Generator) -> Format:
    """A random matrix 3H x H of a format, at a density."""
    weight = (random.standard_normal((3, units, units)) / np.sqrt(units)).astype(np.float32)
    if name == "dense":
        return Dense.from_dense(weight.reshape(3 * units, units), 3)
    groups = -(-units // height)
    if name == "complementary":
        overlay = round(1 / density)
        sets = -(-groups // overlay)
        live = random.integers(0, overlay, (3, sets, units))
        kept = (live[:, None] == np.arange(overlay)[None, :, None, None]).reshape(3, overlay * sets, units)[:, :groups]
    else:
        kept = random.random((3, groups, units)) < density
    weight *= np.repeat(kept, height, 1)[:, :units]
    flat = weight.reshape(3 * units, units)
    if name == "complementary":
        return Complementary.from_dense(flat, overlay, height, 3)
    return CSC.from_dense(flat, 3) if name == "csc" else Block.from_dense(flat, (height, 1), 3)


def scipy_csr(matrix: Format, x: np.ndarray, exact: np.ndarray) -> Callable[[], Any]:
    """Sixteen of SciPy's products of the same sparse matrix. It has no form for events: zeros of x are read too."""
    from scipy.sparse import csr_array

    rows = csr_array(matrix.to_dense())
    if not np.allclose(rows @ x, exact @ x, rtol=0, atol=1e-4):
        raise RuntimeError("SciPy's product is wrong: nothing is timed.")
    return lambda: [rows @ x for _ in range(16)]


def cases(units: int, shapes: dict[str, Any], random: np.random.Generator) -> list[dict[str, Any]]:
    """Every format, density and event rate of one size, as timed lines."""
    lines: list[dict[str, Any]] = []
    calls: list[tuple[Callable[[], Any], int]] = []  # of each line, and how many products it makes
    x32 = random.standard_normal(units).astype(np.float32)
    for density in shapes["density"]:
        for name, height, precision in shapes["dense" if density == 1 else "formats"]:
            matrix = stored(name, height, density, units, random).rounded(precision)
            packed = _native.Packed(native_matrix(matrix))
            exact = matrix.to_dense().astype(np.float64)
            about = {"format": name, "height": height, "precision": precision, "density": density}
            for rate in shapes["event_rate"] if precision != "w8a8" else ():  # which reads dense x alone
                events = max(round(rate * units), 1)
                sets = [np.sort(random.choice(units, events, replace=False)).astype(np.uint32) for _ in range(64)]
                values = random.random(events).astype(np.float32)
                out = np.zeros(packed.padded_rows, np.float32)
                for index in sets:  # correctness, and warm-up
                    out[:] = 0
                    packed.matvec_events(index, values, out)
                    x = np.zeros(units)
                    x[index] = values
                    got = out.reshape(3, -1)[:, :units].reshape(-1)
                    if not np.allclose(got, exact @ x, rtol=0, atol=1e-4):
                        raise RuntimeError(f"wrong product at H={units}, {about}, rate={rate}: nothing is timed.")
                # Every call reads another event set, as a moving state does.
                starts = (np.arange(len(sets) + 1) * events).astype(np.uint32)
                lists = np.concatenate(sets), np.tile(values, len(sets)), starts
                out = np.zeros(packed.padded_rows, np.float32)
                macs = int(matrix.column_elements[np.concatenate(sets)].sum()) / len(sets)
                lines.append({"x": "events", **about, "event_rate": rate, "macs": macs})
                calls.append((partial(packed.matvec_lists, *lists, out), len(sets)))
            out = np.zeros(packed.padded_rows, np.float32)
            packed.matvec(x32, out)
            got = out.reshape(3, -1)[:, :units].reshape(-1)
            # w8a8: a code of x may fall either way where float32 rounds it; one step of it reaches every row.
            step = np.abs(x32).max() / 127 * np.abs(exact).max() if precision == "w8a8" else 0
            if not np.allclose(got, matrix.matvec(x32.astype(np.float64)), rtol=0, atol=1e-4 + 3 * step):
                raise RuntimeError(f"wrong product of dense x at H={units}, {about}: nothing is timed.")
            lines.append({"x": "dense", **about, "event_rate": 1.0, "macs": matrix.elements})
            calls.append((partial(packed.matvec, x32, out, 16), 16))
            if name == "csc":
                lines.append({**lines[-1], "format": "scipy csr"})
                calls.append((scipy_csr(matrix, x32, exact), 16))
            if name == "dense" and precision == "f32":
                lines.append({**lines[-1], "format": "numpy"})
                calls.append((lambda w=matrix.values: [w @ x32 for _ in range(16)], 16))
                lines.append({**lines[-1], "format": "torch"})
                weight, x_torch = torch.from_numpy(matrix.values), torch.from_numpy(x32)
                calls.append((lambda w=weight, x=x_torch: [torch.mv(w, x) for _ in range(16)], 16))
    # In turns, so that a slow moment of the machine meets every case, and in few of its turns.
    turns = [[microseconds(call, repeat, rounds=3) for call, repeat in calls] for _ in range(TURNS)]
    for e, us in zip(lines, np.median(turns, 0).tolist(), strict=True):
        e["us"] = us
    yardstick = next(e["us"] for e in lines if e["x"] == "dense" and e["format"] == "dense" and e["precision"] == "f32")
    for e in lines:
        e["macs_per_ns"], e["speedup"] = e["macs"] / e["us"] / 1e3, yardstick / e["us"]
        e["realised"] = e["speedup"] * e["density"] * (e["event_rate"] if e["x"] == "events" else 1.0)
    return [{"units": units, **e} for e in lines]


def main() -> None:
    """Times all shapes and writes bench/results/<machine>/<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    shapes = tomllib.loads(SHAPES.read_text())
    random = np.random.default_rng(0)
    about = provenance("python bench/kernels.py")
    lines: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    # Pinning moves this thread only: a BLAS with threads of its own would use the other processors.
    with pinned(), threadpool_limits(1), Progress(len(shapes["units"]), "kernels") as progress:
        for i, units in enumerate(shapes["units"]):
            lines += cases(units, shapes, random)
            progress.update(i + 1, f"H = {units}")
    for e in lines:
        print(
            f"H {e['units']:>5} {e['format']:>13} {e['height']:>2} {e['precision']:<4} x {e['x']:<7} density {e['density']:<5} "
            f"rate {e['event_rate']:<5}{e['us']:>9.2f} us {e['macs_per_ns']:>6.1f} MAC/ns {e['speedup']:>6.1f}x "
            f"realised {e['realised']:.2f}"
        )
    print(write_lines(args.out, "", about, lines))


if __name__ == "__main__":
    main()
