"""Learning-rate search for the recipe ``text``: each network at its own best rate, chosen on the validation split.

    python bench/lr_search.py [--only NAME,...] [--steps N] [--seeds N] [--jobs N] --out results/text/lr-search.json

Every (network, rate, seed) is one training run in a process and a folder of its own, so a search that was stopped goes on where
it left off; the file keeps all that ever ran, also those of an earlier call: each run has its commit, the file the last call.
Networks take turns: the first rate of each, then the second, then another seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsefold.bench import provenance
from sparsefold.program import write_atomically

_EGRU = {"cell": "egru", "rate_weight": 500, "rate_until": 0.2}
_SPARSE = {**_EGRU, "hidden": 1024, "target_rate": 0.05, "density": 0.1, "prune_begin": 0.2, "prune_until": 0.7}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "gru": ({"cell": "gru"}, (3.5e-3, 5e-3, 7e-3)),
    "egru": ({"cell": "egru"}, (1e-2, 1.4e-2, 2e-2)),
    "egru_blocks": ({"cell": "egru", "density": 0.25}, (1.4e-2, 2e-2, 2.8e-2)),
    "egru_1024_blocks": (_SPARSE, (1.6e-2, 1.2e-2)),
    "gru_512": ({"cell": "gru", "hidden": 512}, (2.5e-3, 4e-3)),
    "egru_512": ({**_EGRU, "hidden": 512}, (1e-2, 1.4e-2, 6e-3)),
    "gru_256": ({"cell": "gru", "hidden": 256}, (5e-3,)),
    "gru_320": ({"cell": "gru", "hidden": 320}, (4e-3,)),
    "gru_384": ({"cell": "gru", "hidden": 384}, (5e-3, 3.5e-3)),
    "gru_448": ({"cell": "gru", "hidden": 448}, (4.5e-3, 3e-3)),
    "gru_480": ({"cell": "gru", "hidden": 480}, (3.5e-3,)),
}


def one(name: str, lr: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains one network once, on one core."""
    settings = {**NETWORKS[name][0], "lr": lr, "seed": seed, "steps": steps}
    command = [sys.executable, "-m", "sparsefold.cli", "train", "text", *(f"{k}={v}" for k, v in settings.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(folder)], env=environment, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    names = ("valid_bits_per_char", "train_bits_per_char", "seconds", "config", "corpus")
    kept = {key: summary[key] for key in names}
    rates = {key: last[key] for key in ("event_rate", "density") if key in last}
    return {"network": name, "lr": lr, "seed": seed, "commit": provenance("")["commit"], **rates, **kept}


def main() -> None:
    """Runs the search and writes the file after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="names of networks, with commas between")
    parser.add_argument("--work", type=Path, default=Path("runs/search"), help="folder of the runs' checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    only = args.only.split(",") if args.only else list(NETWORKS)
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    ran = {(r["network"], r["lr"], r["seed"], r["config"]["steps"]) for r in runs}
    jobs = [
        (name, NETWORKS[name][1][turn], seed, args.steps)
        for seed in range(args.seeds)
        for turn in range(max(len(NETWORKS[name][1]) for name in only))
        for name in only
        if turn < len(NETWORKS[name][1])
    ]
    command = (
        f"python bench/lr_search.py --steps {args.steps} --seeds {args.seeds} --only {','.join(only)} --out {args.out}"
    )
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folders = {job: args.work / "-".join(map(str, job)) for job in jobs if job not in ran}
        for future in concurrent.futures.as_completed([pool.submit(one, *job, f) for job, f in folders.items()]):
            runs.append(future.result())
            runs.sort(key=lambda r: (r["network"], r["lr"], r["seed"]))
            write_atomically(args.out, json.dumps({"provenance": provenance(command), "runs": runs}, indent=1).encode())
            r = future.result()
            print(
                f"{r['network']:<16} lr {r['lr']:<7} seed {r['seed']}  valid {r['valid_bits_per_char']:.4f}"
                f"  events {r['event_rate']:.3f}  {r['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
