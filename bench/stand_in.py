"""Depth, width and dropout of ``ptb-paper`` tried on a stand-in that a processor trains: few words, 300 to 500 units, 16 streams.

    python bench/stand_in.py [--only NAME,...] [--out results/stand_in/ptb.json]

Every run has a folder of its own, so one that was stopped goes on; the file keeps all that ever ran, each with its commit. A run
is the recipe's default but for ``BASE`` and for what ``RUNS`` says of it. One thread, one seed each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsefold.bench import provenance
from sparsefold.data import load_corpus
from sparsefold.program import write_atomically
from sparsefold.recipes import lm, paper
from sparsefold.recipes._config import override
from sparsefold.recipes._loop import train

BASE = {"hidden": "320x320x192", "density": "0.1", "lr": "0.002", "precision": "float32"}
DENSE = {"density": "1"}
WIDE = {"hidden": "480x192"}
HEAVY = "drop_input=0.5 drop_hidden=0.35 drop_output=0.5 drop_connect=0.5"
# By name: words of the training split, steps, settings of ptb-paper, and cell.
RUNS: dict[str, tuple[int, int, dict[str, str]]] = {
    "dense-3": (186_000, 2_400, DENSE),
    "dense-3-lr": (186_000, 2_400, {**DENSE, "lr": "0.004"}),
    "dense-3-free": (186_000, 2_400, {**DENSE, "more": "rate_weight=0"}),
    "dense-2": (186_000, 2_400, {**DENSE, "hidden": "320x192"}),
    "dense-2-wide": (186_000, 2_400, {**DENSE, **WIDE}),
    "dense-1": (186_000, 2_400, {**DENSE, "hidden": "320"}),
    "dense-lstm": (186_000, 2_400, {**DENSE, "lr": "0.003", "cell": "lstm"}),
    "dense-lstm-2-wide": (186_000, 2_400, {**DENSE, **WIDE, "lr": "0.003", "cell": "lstm"}),
    "long-3": (93_000, 4_000, DENSE),
    "long-2-wide": (93_000, 4_000, {**DENSE, **WIDE}),
    "long-3-heavy": (93_000, 4_000, {**DENSE, "more": HEAVY}),
    "long-2-wide-heavy": (93_000, 4_000, {**DENSE, **WIDE, "more": HEAVY}),
    "sparse-3": (186_000, 6_000, {}),
    "sparse-2": (186_000, 6_000, {"hidden": "320x192"}),
    "sparse-1": (186_000, 6_000, {"hidden": "320"}),
    "sparse-2-wide": (186_000, 3_000, WIDE),
    "wide-heavy": (186_000, 3_000, {**WIDE, "more": HEAVY}),
    "wide-smooth": (186_000, 3_000, {**WIDE, "more": "alpha=2 beta=1"}),
    "wide-late": (186_000, 3_000, {**WIDE, "more": "prune_begin=0.2 prune_until=0.7"}),
}


def one(name: str, folder: Path) -> dict[str, Any]:
    """Trains one network, or goes on with it."""
    words, steps, said = RUNS[name]
    own = {**BASE, **said, "steps": str(steps)}
    cell = own.pop("cell", "egru")
    own["more"] = f"batch=16 {own.get('more', '')}".strip()
    settings = replace(paper.settings(override(paper.Config(), [f"{k}={v}" for k, v in own.items()])), cell=cell)
    corpus = load_corpus("ptb", "word")
    corpus = replace(corpus, train=corpus.train[:words])
    device = torch.device("cpu")
    found = paper.scheduled(settings, corpus, folder, device)
    trainer = lm.trainer_of(found, corpus, device)
    summary = train(trainer, folder, name)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    matrices = [p.numel() for key, p in trainer.model.named_parameters() if "weight_ih" in key or "weight_hh" in key]
    return {
        "name": name, "words": words, "passes": steps * 16 * found.bptt / words, "cell": cell, "said": said,
        "weights": sum(matrices), "event_rate": log[-1]["event_rate"], **summary,
        "log": [{key: line[key] for key in ("step", "train_perplexity", "valid_perplexity")} for line in log],
        "lm": asdict(found), "commit": provenance("")["commit"],
    }  # fmt: skip


def main() -> None:
    """Runs what is wanted and writes the file after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of runs, with commas between")
    parser.add_argument("--work", type=Path, default=Path("runs/stand-in"), help="folder of the runs' checkpoints")
    parser.add_argument("--out", type=Path, default=Path("results/stand_in/ptb.json"))
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(RUNS)
    if unknown := set(wanted) - set(RUNS):
        parser.error(f"--only names runs of this script: {', '.join(RUNS)}; got {', '.join(sorted(unknown))}.")
    torch.set_num_threads(1)
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for name in wanted:
        if all(r["name"] != name for r in runs):
            runs.append(one(name, args.work / name))
            runs.sort(key=lambda r: list(RUNS).index(r["name"]))
            made = {
                "schema": "sparsefold-stand-in/1",
                "runs": runs,
                "provenance": provenance("python bench/stand_in.py"),
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(made, indent=1).encode())


if __name__ == "__main__":
    main()
