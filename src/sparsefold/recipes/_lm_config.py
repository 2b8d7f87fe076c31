"""Settings of the recipe ``lm``, with the defaults of each size, cell and corpus."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from sparsefold.recipes._config import check_ranges


@dataclass(frozen=True)
class Config:
    """Settings of the recipe ``lm``. What is none takes the default of the size; fractions are shares of the steps."""

    corpus: str = "ptb"  # ptb, wikitext2, or a text file or folder
    level: Literal["word", "byte"] = "word"
    data_dir: str = ""  # where corpora lie; empty: SPARSEFOLD_DATA
    cell: Literal["egru", "gru", "lstm"] = "egru"
    size: Literal["small", "medium", "paper"] = "small"
    hidden: tuple[int, ...] | None = None  # units of each layer, 1350x1350x750
    embedding: int | None = None
    tied: bool | None = None  # decoder and embedding share their weights; none: unless there are cutoffs
    cutoffs: tuple[
        int, ...
    ] = ()  # adaptive softmax, 300x1000x3000: rarer words are met by cluster, one from each on; none: no
    divide: float = 2.0  # each cluster reads so many times fewer numbers than the one before it
    embedding_scale: float | None = None  # what layers read is the embedding times this
    initial: str = ""  # run, or checkpoint of one, on this text, whose weights training begins with; all else is new
    # training
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None  # parallel streams, of all processes together
    bptt: int = 70  # steps of truncated back-propagation
    random_bptt: bool = True
    optimizer: Literal["adamw", "sgd"] | None = None
    lr: float | None = None  # peak
    beta1: float | None = None  # of AdamW
    schedule: Literal["one_cycle", "cosine", "constant"] | None = None  # cosine: constant, then a cosine down to 0
    warmup: float = 0.1  # of one_cycle
    constant_until: float | None = None  # of cosine
    weight_decay: float | None = None
    recurrent_decay: float | None = None  # of EGRU's matrices; none: the same
    average_patience: int = (
        5  # of sgd: averaging begins when validation has not improved for so long (NT-ASGD); 0: never
    )
    average_from: float | None = None  # whatever validation says, averaging begins after this share of the steps
    clip: float | None = None
    samples: int = 0  # words that the softmax of a window is estimated from in training; 0, or with cutoffs: all
    # of products in training, but for those of our own kernels; auto: bfloat16 where the device has instructions for it
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: int = 1
    eval_every: int | None = None  # none: a tenth of the steps, at most a pass
    patience: int = 0  # evaluations without a new best before stopping; 0: never
    checkpoint_every: int = 500
    checkpoint_minutes: float = 5.0
    tensorboard: bool = False
    # dropout
    drop_word: float | None = None  # whole words of the embedding
    drop_input: float | None = None
    drop_hidden: float | None = None  # between layers
    drop_output: float | None = None
    drop_connect: float | None = None  # recurrent weights
    alpha: float | None = None  # price of the last layer's outputs (AR)
    beta: float | None = None  # and of their change from step to step (TAR)
    # events
    threshold: float | None = None
    spread_thresholds: bool | None = None  # drawn from Beta(3 m / (1 - m), 3) of mean m = threshold
    surrogate: float | None = None  # height of the triangle
    surrogate_width: float | None = None  # half of its base
    reset: Literal["threshold", "output", "none"] | None = None
    output: Literal["events", "state"] | None = None  # what the decoder reads
    target_rate: float | None = 0.10  # none: no penalty
    rate_weight: float | None = None  # 0: no penalty
    rate_per: Literal["unit", "mean"] | None = None  # whose rate is to be the target: every unit's, or the layer's mean
    rate_start: float = 0.45
    rate_until: float | None = None  # the target has fallen from rate_start to target_rate by then
    # weights
    density: float = 1.0  # of recurrent and input matrices
    input_density: float | None = None  # of the first layer's input matrix; none: density
    embedding_density: float = 1.0  # single weights; not where it is tied
    decoder_density: float = 1.0  # of an adaptive softmax that of what every word needs
    decoder_frequency: float = 0.0  # a word's w² counts in pruning times its frequency to this power; 1: as in the loss
    block: tuple[int, int] = (16, 1)  # 1x1: unstructured
    scope: Literal["gate", "matrix"] = "matrix"
    prune_begin: float = 0.1
    prune_until: float = 0.6
    prune_every: int = 10
    snapshots: tuple[float, ...] = ()  # densities 1,0.25,0.1 reached one after the other, each held and kept in a file
    snapshot_first: float = 0.4  # share of the steps until the first; the others have equal shares of the rest
    restart: float = 0.5  # peak of the learning rate after a snapshot, as a share of the first

    def __post_init__(self) -> None:
        drops = ("drop_word", "drop_input", "drop_hidden", "drop_output", "drop_connect")
        shares = ("density", "input_density", "embedding_density", "decoder_density", "decoder_frequency", "warmup",
                  "target_rate", "rate_start", "rate_until", "constant_until", "snapshot_first", "restart",
                  "average_from")  # fmt: skip
        counts = ("steps", "batch", "bptt", "eval_every", "checkpoint_every", "prune_every")
        amounts = ("weight_decay", "recurrent_decay", "clip", "alpha", "beta", "threshold", "rate_weight", "surrogate",
                   "patience", "average_patience", "samples", "checkpoint_minutes")  # fmt: skip
        check_ranges(
            self,
            {
                **dict.fromkeys(counts, (1, math.inf)),
                **dict.fromkeys(amounts, (0, math.inf)),
                **dict.fromkeys(shares, (0, 1)),
                **dict.fromkeys(drops, (0, 0.99)),
                **{
                    "embedding": (1, 2**14),
                    "threads": (1, 256),
                    "seed": (0, 2**63 - 1),
                    "beta1": (0, 0.9999),
                    "divide": (1, 2**14),
                },
            },
        )
        if not all(a < b for a, b in zip((0, *self.cutoffs), self.cutoffs, strict=False)):
            raise ValueError(f"cutoffs are numbers of words that rise, got {self.cutoffs}.")
        for key in ("lr", "minutes", "epochs", "surrogate_width", "embedding_scale"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key} is positive and finite, got {value}.")
        if self.hidden is not None and not (self.hidden and all(1 <= n <= 2**14 for n in self.hidden)):
            raise ValueError(f"hidden is the units of each layer, in [1, {2**14}], got {self.hidden}.")
        if not 0 <= self.prune_begin <= self.prune_until <= 1:
            raise ValueError("0 <= prune_begin <= prune_until <= 1 must hold.")
        falling = all(a > b for a, b in zip((1.1, *self.snapshots), (*self.snapshots, 0), strict=True))
        if not falling or (self.snapshots and max(self.snapshots) > 1):
            raise ValueError(f"snapshots are densities in (0, 1] that fall, got {self.snapshots}.")
        if self.snapshots and self.density != 1:
            raise ValueError("snapshots name the densities; leave density out.")
        if self.epochs is not None and (self.steps is not None or self.minutes is not None):
            raise ValueError("epochs, steps and minutes each say how long: give one of them.")


_AWD = {
    "optimizer": "sgd", "lr": 30.0, "schedule": "constant", "batch": 20, "clip": 0.25, "weight_decay": 1.2e-6,
    "drop_word": 0.1, "drop_input": 0.4, "drop_hidden": 0.25, "drop_output": 0.4, "drop_connect": 0.5,
    "alpha": 2.0, "beta": 1.0, "embedding_scale": 1.0,
}  # fmt: skip
_EGRU = {
    "lr": 1.2e-3, "beta1": 0.0, "schedule": "cosine", "constant_until": 0.7, "batch": 64, "clip": 0.1, "weight_decay": 0.1,
    "drop_word": 0.1, "drop_input": 0.6, "drop_hidden": 0.25, "drop_output": 0.5, "drop_connect": 0.7,
    "threshold": 0.01, "spread_thresholds": True, "surrogate": 3.6, "surrogate_width": 1 / 3.6, "reset": "threshold",
    "output": "events", "embedding_scale": 1.0, "rate_weight": 0.0,
}  # fmt: skip
_PAPER = {
    # AWD-LSTM: Merity, Keskar and Socher (2017), arXiv 1708.02182. EGRU: Mukherji et al. (2023), arXiv 2311.07625.
    ("lstm", "ptb"): {**_AWD, "hidden": (1150, 1150, 400), "epochs": 500.0},
    ("lstm", "wikitext2"): {
        **_AWD, "hidden": (1150, 1150, 400), "epochs": 750.0, "batch": 80, "drop_input": 0.65, "drop_hidden": 0.2,
    },
    ("egru", "ptb"): {**_EGRU, "hidden": (1350, 1350, 750), "epochs": 1000.0},
    ("egru", "wikitext2"): {
        **_EGRU, "hidden": (1350, 1350, 750), "epochs": 800.0, "batch": 128, "lr": 1e-3, "weight_decay": 0.12,
        "drop_input": 0.7, "constant_until": 0.5,
    },
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw", "beta1": 0.9, "schedule": "one_cycle", "constant_until": 0.7, "clip": 0.5, "weight_decay": 0.01,
    "drop_word": 0.0, "drop_input": 0.2, "drop_hidden": 0.2, "drop_output": 0.3, "drop_connect": 0.0,
    "alpha": 0.0, "beta": 0.0, "threshold": 0.05, "spread_thresholds": False, "surrogate": 0.5, "surrogate_width": 0.5,
    "reset": "none", "output": "state", "rate_weight": 200.0, "batch": 20,
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": (512,), "epochs": 8.0},
    "medium": {"hidden": (650, 650), "epochs": 20.0, "drop_word": 0.1, "drop_input": 0.4, "drop_output": 0.4},
}
_CELLS: dict[str, dict[str, Any]] = {
    "lstm": {"lr": 4e-3, "embedding_scale": 8.0, "rate_until": 0.4, "rate_per": "unit"},
    "gru": {"lr": 3e-3, "embedding_scale": 8.0, "rate_until": 0.4, "rate_per": "unit"},
    "egru": {
        "lr": 3e-3,
        "embedding_scale": 8.0,
        "rate_until": 0.1,
        "rate_per": "mean",
    },  # of PTB, one layer of 512 units
}


def resolved(config: Config) -> Config:
    """Every setting said: those that are none take the default of size, cell and corpus."""
    found = {**_DEFAULTS, **_CELLS[config.cell], **_SIZES.get(config.size, {})}
    if config.size == "paper":
        corpus = config.corpus if config.corpus == "wikitext2" else "ptb"
        found |= _PAPER["lstm" if config.cell == "lstm" else "egru", corpus]
    hidden = config.hidden or found["hidden"]
    found |= {"embedding": hidden[-1], "tied": not config.cutoffs}
    if config.steps is not None or config.minutes is not None:
        del found["epochs"]
    said = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) is not None}
    config = replace(config, **{k: v for k, v in found.items() if k not in said})
    if config.tied and config.embedding != hidden[-1]:
        raise ValueError(
            f"a tied decoder reads the last layer, so an embedding has as many numbers as that has units; got {config.embedding} "
            f"and {hidden[-1]}. Give embedding the size of the last layer, or tied=false."
        )
    if config.tied and config.embedding_density != 1:
        raise ValueError("embedding and decoder are tied and pruned together, by decoder_density. Or give tied=false.")
    return config
