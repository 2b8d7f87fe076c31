"""Byte-level language model of any text file: ``sparsefold train text [key=value ...]``.

The default settings are the best recipe known for an event-based GRU on CPython's reference text: ask for few events from
the start, penalise each unit by itself, read the decoder from the dense state, prune blocks ranked over all gates while the
learning rate is high (results/text/lr-search.json).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sparsefold.data import ByteCorpus, load_text
from sparsefold.nn import EGRU, GRU, Stack, anneal, param_groups
from sparsefold.recipes._checkpoint import holding, made_with, part, read_checkpoint
from sparsefold.recipes._config import check_ranges, from_dict
from sparsefold.recipes._loop import Trainer, train
from sparsefold.recipes._windows import Windows, bits_per_char
from sparsefold.sparsify import Block, Cubic, Magnitude, Pruner


@dataclass(frozen=True)
class Config:
    """Settings of the recipe ``text``. Fractions are shares of ``steps``."""

    file: str = ""  # text file; empty: CPython's reference text
    cell: Literal["egru", "gru"] = "egru"
    hidden: int = 256
    layers: int = 1
    embedding: int = 64
    dropout: float = 0.0  # between layers
    # training
    steps: int = 1800
    batch: int = 32  # parallel streams
    window: int = 32  # steps of truncated back-propagation
    lr: float | None = None  # peak of one cycle; none: the best of the committed search for this cell
    warmup: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    threads: int = 1
    eval_every: int = 100
    patience: int = 0  # evaluations without a new best before stopping; 0: never
    checkpoint_every: int = 200
    # events
    threshold: float = 0.05
    learn_threshold: bool = False
    reset: Literal["threshold", "output", "none"] = "none"
    output: Literal["events", "state"] = "state"  # what the decoder reads
    target_rate: float | None = 0.10  # none: no penalty
    rate_weight: float = 1000.0
    rate_start: float = 0.45
    rate_until: float = 0.15  # the target has fallen from rate_start to target_rate by then
    # weights
    density: float = 1.0  # of the recurrent matrices, and of input matrices above the first layer
    decoder_density: float = 1.0
    block: tuple[int, int] = (16, 1)  # 1x1: unstructured
    scope: Literal["gate", "matrix"] = "matrix"
    prune_begin: float = 0.1
    prune_until: float = 0.6
    prune_every: int = 10

    def __post_init__(self) -> None:
        ranges = {
            **dict.fromkeys(
                ("steps", "batch", "window", "eval_every", "checkpoint_every", "prune_every"), (1, math.inf)
            ),
            **dict.fromkeys(("patience", "weight_decay", "clip", "threshold", "rate_weight"), (0, math.inf)),
            **dict.fromkeys(
                ("density", "decoder_density", "dropout", "warmup", "target_rate", "rate_start", "rate_until"), (0, 1)
            ),
            **dict.fromkeys(("hidden", "embedding"), (1, 2**14)),
            **{"layers": (1, 64), "threads": (1, 256), "seed": (0, 2**63 - 1)},
        }
        check_ranges(self, ranges)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is positive and finite, got {self.lr}.")
        if not 0 <= self.prune_begin <= self.prune_until <= 1:
            raise ValueError("0 <= prune_begin <= prune_until <= 1 must hold.")


BEST_LR = {"gru": 5e-3, "egru": 1.4e-2}


def build(config: Config, tokens: int) -> Stack:
    """The untrained model: embedding, recurrent layers, linear decoder. Seeded by ``config.seed``."""
    torch.manual_seed(config.seed)
    sizes = (config.embedding, config.hidden, config.layers)
    dropout = config.dropout if config.layers > 1 else 0.0
    layer: torch.nn.Module
    if config.cell == "egru":
        layer = EGRU(
            *sizes, dropout=dropout, threshold=config.threshold, learn_threshold=config.learn_threshold,
            reset=config.reset, output=config.output,
        )  # fmt: skip
    else:
        layer = GRU(*sizes, dropout=dropout)
        initialise_like_egru(layer)
    return Stack(torch.nn.Embedding(tokens, config.embedding), layer, torch.nn.Linear(config.hidden, tokens))


@torch.no_grad()
def initialise_like_egru(layer: torch.nn.GRU) -> None:
    """EGRU's start, for the dense GRU too, so that all networks of a comparison start alike."""
    for name, p in layer.named_parameters():
        if name.startswith("weight"):
            p.normal_(std=p.shape[1] ** -0.5)
        else:
            p.zero_()
            if name.startswith("bias_ih"):
                p[layer.hidden_size : 2 * layer.hidden_size] = 1


def run(config: Config, folder: Path, label: str = "text") -> dict[str, Any]:
    """Train in ``folder``, or resume there, and return a summary with the resolved config and the corpus."""
    peak = BEST_LR[config.cell] if config.lr is None else config.lr
    config = replace(config, lr=peak)
    torch.set_num_threads(config.threads)
    corpus = load_text(config.file or None)
    model = build(config, corpus.tokens)
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=peak)
    summary = train(_trainer(config, peak, corpus, model, optimizer), folder, label)
    return {"recipe": "text", "config": asdict(config), "corpus": corpus.to_dict(), **summary}


def _trainer(
    config: Config, peak: float, corpus: ByteCorpus, model: Stack, optimizer: torch.optim.Optimizer
) -> Trainer:
    target = None
    if config.target_rate is not None:
        target = anneal(config.rate_start, config.target_rate, 0, round(config.rate_until * config.steps))

    def penalty(activity: Any, step: int) -> Any:
        return activity.penalty(target(step), config.rate_weight) if target and activity.rates else 0.0

    return Trainer(
        model=model,
        optimizer=optimizer,
        windows=Windows(corpus.train, config.batch, config.window),
        steps=config.steps,
        lr=lambda step: peak * one_cycle(step / config.steps, config.warmup),
        penalty=penalty,
        evaluate=lambda: bits_per_char(model, corpus.valid),
        clip=config.clip,
        pruner=_pruner(config, model),
        eval_every=config.eval_every,
        patience=config.patience,
        checkpoint_every=config.checkpoint_every,
        about={
            "recipe": "text",
            "config": asdict(config),
            "corpus": corpus.to_dict(),
            "vocabulary": list(corpus.vocabulary),
        },
    )


def _pruner(config: Config, model: Stack) -> Pruner | None:
    def rule(density: float) -> Magnitude | Block:
        if config.block == (1, 1):
            return Magnitude(density, scope=config.scope)
        return Block(density, config.block, scope=config.scope)

    recurrent = ("1.weight_hh_l*", *(f"1.weight_ih_l{k}" for k in range(1, config.layers)))
    densities = {**dict.fromkeys(recurrent, config.density), "2.weight": config.decoder_density}
    rules = {name: rule(density) for name, density in densities.items() if density < 1}
    if not rules:
        return None
    begin, until = round(config.prune_begin * config.steps), round(config.prune_until * config.steps)
    return Pruner(model, rules, Cubic(begin, until, config.prune_every))


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1): cosine up from 1/25, then cosine down to almost 0."""
    if progress < warmup:
        low, high, p = 1 / 25, 1.0, progress / warmup
    else:
        low, high, p = 1e-5, 1.0, (1 - progress) / (1 - warmup)
    return low + (high - low) * 0.5 * (1 - math.cos(math.pi * p))


def load(path: Path) -> tuple[Stack, dict[str, Any]]:
    """The trained model of a checkpoint (a run's folder means its best), and the facts kept with it."""
    tensors, facts = read_checkpoint(path / "best.safetensors" if path.is_dir() else path)
    settings, words = made_with(path, facts)
    config = from_dict(Config, settings)
    model = holding(lambda: build(config, len(words) + 1), part(tensors, "model."), path)
    return model.eval(), facts
