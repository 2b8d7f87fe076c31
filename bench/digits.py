"""Spoken digits by networks of several sizes, dense and sparse twice: ``python bench/digits.py``.

Trains each network once a seed with the recipe ``digits``, at the learning rate that ``--search`` found by the validation split
(results/digits/search.json); each in a folder of its own in ``--runs``, which resumes. Hears the test split with every compiled
program, among noise of several loudnesses, and races the first seed's networks with engines that play the dense ones, frame by
frame, one pinned thread, all in turns. Exported C is played on an emulated Cortex-M4 too (bench/device.py), and its bytes and
instructions are counted. Writes results/digits/<date>-<commit>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import device
import numpy as np
import torch
from numpy.typing import NDArray
from steps import FromC
from threadpoolctl import threadpool_limits

from sparsefold import program as ops
from sparsefold.bench import pinned, provenance, race
from sparsefold.data.digits import Digits, load_digits
from sparsefold.engine import Engine
from sparsefold.lowering import compile_model
from sparsefold.nn import EGRU
from sparsefold.program import Program, write_atomically
from sparsefold.recipes import digits, rivals
from sparsefold.recipes._config import override
from sparsefold.sound import LogMel

DENSE = ["density=1", "input_density=1"]
# By name: settings, and the peak learning rates that are searched.
NETWORKS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "GRU 32": (["cell=gru", "hidden=32", *DENSE], (4e-3, 8e-3, 1.6e-2)),
    "GRU 48": (["cell=gru", "hidden=48", *DENSE], (4e-3, 8e-3, 1.6e-2)),
    "GRU 64": (["cell=gru", "hidden=64", *DENSE], (4e-3, 8e-3, 1.6e-2)),
    "GRU 128": (["cell=gru", "hidden=128", *DENSE], (2e-3, 4e-3, 8e-3)),
    "GRU 256": (["cell=gru", "hidden=256", *DENSE], (2e-3, 4e-3, 8e-3)),
    "event GRU 128": (["hidden=128", *DENSE], (5e-3, 1e-2, 2e-2)),
    "event GRU 256, sparse": ([], (5e-3, 1e-2, 2e-2)),
}
OUT = Path(__file__).parents[1] / "results" / "digits"
SEARCH = OUT / "search.json"
PRECISIONS = ("f32", "w8a8")
TIMED, PARITY_STEPS, DEVICE_STEPS = 4000, 20, 60


def trained(name: str, rate: float, seed: int, runs: Path) -> tuple[Path, float]:
    """(the folder of a network's run, its bits on the validation split), trained where that was not done."""
    folder = runs / f"{name.replace(' ', '-').replace(',', '')}-{rate:g}-{seed}"
    if not (folder / "done").exists():
        config = override(digits.Config(), [*NETWORKS[name][0], f"lr={rate}", f"seed={seed}"])
        summary = digits.run(config, folder, f"{name}, {rate:g}, seed {seed}")
        (folder / "done").write_text(json.dumps(summary["valid_bits"]))
    return folder, float(json.loads((folder / "done").read_text()))


def search(names: list[str], runs: Path) -> None:
    """Trains the first seed of networks with every learning rate; once all are done, writes what the validation split says."""
    for name in names:
        for rate in NETWORKS[name][1]:
            trained(name, rate, 0, runs)
    if names == list(NETWORKS):
        found = {name: {f"{rate:g}": trained(name, rate, 0, runs)[1] for rate in NETWORKS[name][1]} for name in names}
        about = provenance("python bench/digits.py --search")
        OUT.mkdir(parents=True, exist_ok=True)
        write_atomically(SEARCH, json.dumps({"provenance": about, "valid_bits": found}, indent=1).encode())


def best_rate(name: str) -> float:
    """The learning rate of the committed search that has the fewest bits."""
    found = json.loads(SEARCH.read_text())["valid_bits"][name]
    return float(min(found, key=lambda rate: found[rate]))


def quality(program: Program, hears: LogMel, data: Digits) -> dict[str, Any]:
    """Accuracies of a program, and what it counted on the test split without noise."""
    stream = Engine(program).stream()
    found = {"inf dB": digits.accuracy(stream, hears, data.test, math.inf)}
    cost, rate = stream.cost, stream.counters.event_rate() if isinstance(program.ops[0], ops.EGRU) else None
    for decibels in digits.DECIBELS[1:]:
        found[f"{decibels:g} dB"] = digits.accuracy(stream, hears, data.test, decibels)
    macs = {name: cost.per_step(name) for name in ("macs_effective", "macs_dense")}
    return {"accuracy": found, "event_rate": rate, **macs}


def on_a_device(program: Program, frames: NDArray[np.float32]) -> dict[str, float]:
    """What a microcontroller needs for it, and instructions of a frame: of exported C on a Cortex-M4, in emulation."""
    played = device.play(program, frames[:DEVICE_STEPS])
    worst = float(np.abs(played.outputs - Engine(program).stream().run(frames[:DEVICE_STEPS])).max())
    if not worst <= 1e-3:
        raise RuntimeError(f"a Cortex-M4 is {worst:.1e} off: nothing is counted.")
    return {"flash": played.flash, "ram": played.ram, "instructions": played.instructions}


def measure(runs: Path, seeds: int) -> list[dict[str, Any]]:
    """All rows: quality of every seed, then the race of the first one's networks."""
    data = load_digits()
    rows: list[dict[str, Any]] = []
    players: dict[str, Any] = {}
    clocks: dict[str, FromC] = {}
    folder = tempfile.TemporaryDirectory()
    frames: NDArray[np.float32] | None = None
    for name in NETWORKS:
        loaded = [digits.load(trained(name, best_rate(name), seed, runs)[0]) for seed in range(seeds)]
        made = [(model, LogMel.from_metadata(facts["about"])) for model, facts in loaded]
        sample = made[0][1](data.valid[0].samples)
        if frames is None:
            frames = np.concatenate([made[0][1](r.samples) for r in data.test])[:TIMED]
        for precision in PRECISIONS:
            programs = [compile_model(model, weights=precision, sample=sample) for model, _ in made]
            each = [quality(p, hears, data) for p, (_, hears) in zip(programs, made, strict=True)]
            row: dict[str, Any] = {
                "network": name,
                "engine": f"ours, {precision}",
                "seeds": each,
                "lr": best_rate(name),
            }
            rows.append(row | {"file_bytes": len(programs[0].to_bytes()), "device": on_a_device(programs[0], frames)})
            players[f"{name}/ours, {precision}"] = Engine(programs[0]).stream().step
            if precision == "f32" or name.endswith("sparse"):
                clock = FromC(programs[0], frames, Path(folder.name) / f"{name}-{precision}", None)
                clocks[f"{name}/exported C, {precision}"] = clock
                rows.append({"network": name, "engine": f"exported C, {precision}", "settings": clock.settings})
        model = made[0][0]
        if isinstance(model[0], EGRU):
            continue
        expected = model(torch.from_numpy(frames[:PARITY_STEPS])[:, None])[0][:, 0].detach().numpy()
        for make in (rivals.onnx_runtime, rivals.openvino, rivals.torch_eager, rivals.torch_int8):
            rival = make(model)
            error = float(np.abs(np.array([rival.call(x).copy() for x in frames[:PARITY_STEPS]]) - expected).max())
            if error > 1e-3 and "int8" not in rival.name:
                raise RuntimeError(f"{rival.name} is {error:.1e} off on {name}: nothing is timed.")
            rows.append({"network": name, "engine": rival.name, "settings": f"{rival.settings}, {error:.1e} off"})
            players[f"{name}/{rival.name}"] = rival.call
    assert frames is not None
    with pinned():
        for clock in clocks.values():
            clock.turn()
        times = race(players, list(frames), rounds=10)
        for clock in clocks.values():
            clock.turn()
    folder.cleanup()
    times |= {key: clock.latency for key, clock in clocks.items()}
    for row in rows:
        row["latency_us"] = times[f"{row['network']}/{row['engine']}"].to_dict()
    return rows


def main() -> None:
    """Trains, hears, races and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits-compared"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="search learning rates, and stop")
    parser.add_argument("--train", type=int, default=None, metavar="SEED", help="train this seed's networks, and stop")
    parser.add_argument(
        "--only", type=int, nargs="+", default=None, metavar="NUMBER", help="of the networks, where two train at once"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(NETWORKS) if args.only is None else [list(NETWORKS)[k] for k in args.only]
    if args.search:
        search(names, args.runs)
        return
    if args.train is not None:
        for name in names:
            trained(name, best_rate(name), args.train, args.runs)
        return
    with torch.no_grad(), threadpool_limits(1):
        about = provenance("python bench/digits.py")
        rows = measure(args.runs, args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{about['date'][:10]}-{about['commit'][:12]}.json"
    write_atomically(path, json.dumps({"provenance": about, "rows": rows}, indent=1).encode())
    for row in rows:
        quality = [s["accuracy"] for s in row.get("seeds", [])]
        print(f"{row['network']:<24}{row['engine']:<20}{row['latency_us']['p50']:8.2f} us  {quality}")
    print(path)


if __name__ == "__main__":
    main()
