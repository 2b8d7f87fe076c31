"""Learning-rate search for the recipe ``text``: each network at its own best rate, chosen on the validation split.

    python bench/lr_search.py [--steps N] [--seeds N] [--jobs N] --out results/text/lr-search.json

Every (network, rate, seed) is one training run; the file keeps them all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from sparsefold.bench import provenance
from sparsefold.program import write_atomically

NETWORKS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "gru": ({"cell": "gru"}, (3.5e-3, 5e-3, 7e-3)),
    "egru": ({"cell": "egru"}, (1e-2, 1.4e-2, 2e-2)),
    "egru_blocks": ({"cell": "egru", "density": 0.25}, (1.4e-2, 2e-2, 2.8e-2)),
}


def one(job: tuple[str, float, int, int]) -> dict[str, Any]:
    """Trains one network once, on one core."""
    from sparsefold.recipes.text import Config, run

    name, lr, seed, steps = job
    config = Config(**NETWORKS[name][0], lr=lr, seed=seed, steps=steps, eval_every=100)
    with tempfile.TemporaryDirectory() as folder:
        summary = run(config, Path(folder), name)
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    last = log[-1]
    return {
        "network": name,
        "lr": lr,
        "seed": seed,
        "valid_bits_per_char": summary["valid_bits_per_char"],
        "train_bits_per_char": summary["train_bits_per_char"],
        "event_rate": last["event_rate"],
        "seconds": summary["seconds"],
        "config": summary["config"],
        "corpus": summary["corpus"],
    }


def main() -> None:
    """Runs the search and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="one network")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jobs = [
        (name, lr, seed, args.steps)
        for name, (_, rates) in NETWORKS.items()
        for lr in rates
        for seed in range(args.seeds)
        if args.only in ("", name)
    ]
    runs = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, job) for job in jobs]):
            runs.append(future.result())
            r = runs[-1]
            print(
                f"{r['network']:<12} lr {r['lr']:<7} seed {r['seed']}  valid {r['valid_bits_per_char']:.4f}", flush=True
            )
    runs.sort(key=lambda r: (r["network"], r["lr"], r["seed"]))
    command = f"python bench/lr_search.py --steps {args.steps} --seeds {args.seeds} --out {args.out}"
    text = json.dumps({"provenance": provenance(command), "runs": runs}, indent=1)
    write_atomically(args.out, text.encode())


if __name__ == "__main__":
    main()
