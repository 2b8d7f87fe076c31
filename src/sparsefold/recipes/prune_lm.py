"""Every way of pruning on one byte-level language model: ``sparsefold train prune_lm cell=gru method=16x1 density=0.1``.

A grid of such points, each in a folder of its own that resumes, all results in one JSON, is what commas make:

    python -m sparsefold.recipes.prune_lm cell=gru,lstm method=16x1,glp density=0.5,0.1 --results results/prune_lm/grid.json
    python -m sparsefold.recipes.prune_lm --results results/prune_lm/grid.json --clock results/prune_lm/latency.json

The second line times all of them in one race, beside ONNX Runtime on the dense ones: on a quiet machine. Text and loop are
those of the recipe ``text``, learning rates those of results/prune_lm/search.json. The recurrent matrix is pruned, the input
matrix is not, the decoder's where ``decoder`` says so. ``method=narang`` takes its threshold from the dense point of the same
cell, size and seed, which a grid trains first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sparsefold.bench import pinned, provenance, race
from sparsefold.data import load_text
from sparsefold.engine import Engine
from sparsefold.lowering import compile_model
from sparsefold.nn import Stack, anneal, param_groups
from sparsefold.program import write_atomically
from sparsefold.recipes import rivals, text
from sparsefold.recipes._checkpoint import holding, made_with, make_folder, part, read_checkpoint
from sparsefold.recipes._config import check_ranges, from_dict, override
from sparsefold.recipes._loop import Trainer, train
from sparsefold.recipes._windows import Windows, bits_per_char
from sparsefold.sparsify import Block, Complementary, Cubic, Magnitude, Pruner, RigL, Schedule, TwoSlopes, thresholds

BLOCKS = {"4x4": (4, 4), "8x1": (8, 1), "16x1": (16, 1), "16x16": (16, 16), "32x32": (32, 32)}
RECURRENT, DECODER = "1.weight_hh_l0", "2.weight"
# The best of those searched: peak learning rate up to a density, and group lasso of glp.
LR: dict[str, dict[float, float]] = {
    "gru": {0.15: 8e-3, 0.5: 4e-3, 1: 2.5e-3},
    "lstm": {1: 1e-2},
    "egru": {0.5: 1.2e-2, 1: 6e-3},
}
LASSO = {"gru": 1e-4, "lstm": 1e-5, "egru": 1e-5}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe ``prune_lm``. Fractions are shares of ``steps``."""

    file: str = ""  # text file; empty: CPython's reference text
    cell: Literal["gru", "lstm", "egru"] = "gru"
    method: Literal[
        "dense", "unstructured", "4x4", "8x1", "16x1", "16x16", "32x32", "complementary", "glp", "narang", "rigl"
    ] = "16x1"
    density: float = 0.1  # complementary: 1 / density groups of 16 rows are laid over each other; narang finds its own
    decoder: float = 1.0  # density of the decoder, in blocks of 16x1
    hidden: int = 512
    embedding: int = 64
    steps: int = 1200
    batch: int = 32
    window: int = 32
    lr: float | None = None
    seed: int = 0
    threads: int = 1
    rate_weight: float = 500.0  # of the penalty that holds an EGRU at 10 % events
    group_lasso: float | None = None  # of glp, while it prunes
    dense: str = ""  # folder of the trained dense point, for narang
    prune_begin: float = 0.1
    prune_until: float = 0.6
    prune_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        whole = ("steps", "batch", "window", "prune_every", "eval_every", "checkpoint_every", "hidden", "embedding")
        check_ranges(
            self,
            {
                **dict.fromkeys(whole, (1, math.inf)),
                **dict.fromkeys(("density", "decoder"), (0, 1)),
                "group_lasso": (0, math.inf),
            },
        )
        if not 0 <= self.prune_begin <= self.prune_until <= 1 or not self.density * self.decoder:
            raise ValueError("0 <= prune_begin <= prune_until <= 1, density > 0 and decoder > 0 must hold.")
        if self.method == "narang" and not self.dense:
            raise ValueError("method=narang needs dense=FOLDER, a trained point with method=dense; a grid has its own.")


def build(config: Config, tokens: int) -> Stack:
    """The untrained model of the recipe ``text``; for the LSTM that of torch, its forget gates open at the start."""
    if config.cell != "lstm":
        alike = text.Config(cell=config.cell, hidden=config.hidden, embedding=config.embedding, seed=config.seed)
        return text.build(alike, tokens)
    torch.manual_seed(config.seed)
    layer = torch.nn.LSTM(config.embedding, config.hidden)
    layer.get_parameter("bias_ih_l0").data[config.hidden : 2 * config.hidden] = 1
    return Stack(torch.nn.Embedding(tokens, config.embedding), layer, torch.nn.Linear(config.hidden, tokens))


def pruner_of(config: Config, model: Stack) -> Pruner | None:
    """Rules and schedule of the method."""
    if config.method == "dense":
        return None
    begin, until = (max(1, round(share * config.steps)) for share in (config.prune_begin, config.prune_until))
    schedule: Schedule = Cubic(begin, until, config.prune_every)
    if config.method == "narang":
        rules = thresholds(load(Path(config.dense))[0], [RECURRENT], (4, 4))
        schedule = TwoSlopes(begin, (begin + until) // 2, max(until, begin + 1), config.prune_every)
    elif config.method == "complementary":
        rules = {RECURRENT: Complementary(round(1 / config.density), 16)}
    elif config.method in ("unstructured", "rigl"):
        rules = {RECURRENT: Magnitude(config.density, scope="matrix")}
        schedule = RigL(config.prune_every, until) if config.method == "rigl" else schedule
    else:
        rules = {RECURRENT: Block(config.density, BLOCKS.get(config.method, (16, 1)), scope="matrix")}
    if config.decoder < 1:
        rules[DECODER] = Block(config.decoder, (16, 1))
    lasso = config.group_lasso if config.method == "glp" else None
    return Pruner(model, rules, schedule, seed=config.seed, group_lasso=lasso or 0.0)


def run(config: Config, folder: Path, label: str = "prune_lm") -> dict[str, Any]:
    """Train in ``folder``, or resume there; then compile the last model and count what a byte of it costs."""
    final = 1 if config.method in ("dense", "narang") else config.density
    peak = next(lr for until, lr in LR[config.cell].items() if final <= until) if config.lr is None else config.lr
    lasso = LASSO[config.cell] if config.group_lasso is None else config.group_lasso
    config = replace(config, lr=peak, group_lasso=lasso)
    torch.set_num_threads(config.threads)
    corpus, recipe = load_text(config.file or None), text.Config()
    model = build(config, corpus.tokens)
    pruner = pruner_of(config, model)
    target = anneal(recipe.rate_start, 0.1, 0, round(recipe.rate_until * config.steps))

    def penalty(activity: Any, step: int) -> Any:
        events = activity.penalty(target(step), config.rate_weight) if activity.rates else 0.0
        return events + pruner.penalty() if pruner and config.method == "glp" else events

    about = {"recipe": "prune_lm", "config": asdict(config), "corpus": corpus.to_dict()}
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.AdamW(param_groups(model, recipe.weight_decay), lr=peak),
        windows=Windows(corpus.train, config.batch, config.window),
        steps=config.steps,
        lr=lambda step: peak * text.one_cycle(step / config.steps, recipe.warmup),
        penalty=penalty,
        evaluate=lambda: bits_per_char(model, corpus.valid),
        clip=recipe.clip,
        pruner=pruner,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        about={**about, "vocabulary": list(corpus.vocabulary)},
    )
    summary = train(trainer, folder, label)
    # The last model, not the best: that may be one of the steps before it was sparse.
    stream = Engine(compile_model(model.eval(), sample=corpus.test[:2000])).stream()
    stream.run(corpus.test[:5000])
    return {
        **about,
        **summary,
        "test_bits_per_char": bits_per_char(model, corpus.test),
        "density": {name: float((model.get_parameter(name) != 0).float().mean()) for name in (RECURRENT, DECODER)},
        "event_rate": stream.counters.event_rate(),
        "macs": stream.cost.to_dict(),
        "provenance": provenance("sparsefold train prune_lm"),
    }


def load(path: Path) -> tuple[Stack, dict[str, Any]]:
    """The trained model of a point (its folder means its last step, when it is as sparse as it gets), and its facts."""
    tensors, facts = read_checkpoint(path / "last.safetensors" if path.is_dir() else path)
    settings, words = made_with(path, facts)
    config = from_dict(Config, settings)
    model = holding(lambda: build(config, len(words) + 1), part(tensors, "model."), path)
    return model.eval(), facts


def points(words: Sequence[str], out: Path) -> Iterator[tuple[str, Config]]:
    """Names and configs of a grid: ``key=value`` words, in which commas give a key several values; dense points first."""
    axes = [[f"{key}={v}" for v in values.split(",")] for key, _, values in (word.partition("=") for word in words)]
    found: dict[str, Config] = {}
    for choice in itertools.product(*axes):
        method = next((w.removeprefix("method=") for w in choice if w.startswith("method=")), "")
        wanted = [override(Config(dense="?"), choice)]
        if method == "narang":
            wanted.insert(0, replace(wanted[0], method="dense"))
        for c in wanted:
            density = "1" if c.method in ("dense", "narang") else f"{c.density:g}"
            decoder = "" if c.decoder == 1 else f"-decoder{c.decoder:g}"
            name = f"{c.cell}-{c.hidden}-{c.method}-{density}{decoder}-seed{c.seed}"
            dense = str(out / f"{c.cell}-{c.hidden}-dense-1-seed{c.seed}") if c.method == "narang" else ""
            found.setdefault(name, replace(c, dense=dense, density=float(density)))
    yield from sorted(found.items(), key=lambda item: item[1].method != "dense")


def grid(words: Sequence[str], out: Path, results: Path) -> None:
    """Run every point that ``results`` does not hold yet; the file is written whole after each."""
    make_folder(out)
    known = json.loads(results.read_text()) if results.exists() else {}
    todo = [(name, config) for name, config in points(words, out) if name not in known]
    for n, (name, config) in enumerate(todo):
        known[name] = run(config, out / name, f"{n + 1} of {len(todo)}, {name}")
        write_atomically(results, json.dumps(known, indent=1).encode())
        print(f"{name}: {known[name]['test_bits_per_char']:.4f} bits")


def clock(names: Sequence[str], out: Path, tokens: int = 4000) -> dict[str, Any]:
    """Time of one byte of every point in ``out``, and of ONNX Runtime on the dense GRUs and LSTMs, all in one race."""
    torch.set_num_threads(1)
    players: dict[str, Any] = {}
    for name in names:
        model, facts = load(out / name)
        about = facts["about"]["config"]
        text_read = load_text(about["file"] or None).test[:tokens]
        players[name] = Engine(compile_model(model, sample=text_read[:2000])).stream().step
        if about["method"] == "dense" and about["cell"] != "egru":
            players[f"{name}/ONNX Runtime"] = rivals.onnx_runtime(model).call
    with pinned():
        latencies = race(players, text_read.tolist())
    made = provenance("python -m sparsefold.recipes.prune_lm --clock")
    return {"provenance": made, "latency_us": {name: latency.to_dict() for name, latency in latencies.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A grid of pruned language models, resumable.")
    parser.add_argument("words", nargs="*", metavar="key=value,value")
    parser.add_argument("--out", type=Path, default=Path("runs/prune_lm"))
    parser.add_argument("--results", type=Path, required=True, help="one JSON of all points")
    parser.add_argument("--clock", type=Path, help="time the points of --results, into this JSON, instead of training")
    args = parser.parse_intermixed_args()
    if args.clock:
        timed = clock(list(json.loads(args.results.read_text())), args.out)
        write_atomically(args.clock, json.dumps(timed, indent=1).encode())
    else:
        grid(args.words, args.out, args.results)
