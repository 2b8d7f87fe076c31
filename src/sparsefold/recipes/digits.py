"""Spoken digits, heard frame by frame: ``sparsefold train digits [key=value ...]``.

A log-mel spectrum of 100 frames a second, one recurrent layer, a linear readout of its state: every frame has an answer,
and that of a recording is the likeliest over its last two thirds. The defaults are an event GRU with a tenth of its recurrent
blocks and a quarter of its input blocks, pruned while it learns; ``bench/digits.py`` compares it with dense GRUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsefold.data.digits import Digits, Recording, load_digits
from sparsefold.engine import Engine, Stream
from sparsefold.formats import Float
from sparsefold.hearing import UNSCORED, heard
from sparsefold.lowering import compile_model
from sparsefold.nn import EGRU, GRU, Stack, anneal, param_groups
from sparsefold.recipes._checkpoint import holding, made_with, part, read_checkpoint
from sparsefold.recipes._config import check_ranges, from_dict
from sparsefold.recipes._loop import Trainer, train
from sparsefold.recipes.text import initialise_like_egru, one_cycle
from sparsefold.sound import LogMel
from sparsefold.sparsify import Block, Cubic, Pruner

LABELS = tuple("0123456789")
DECIBELS = (math.inf, 10.0, 0.0)  # of noise among which the test split is heard
IGNORED = -100  # the target of a frame that is not scored
RECURRENT, INPUT = "0.weight_hh_l0", "0.weight_ih_l0"


@dataclass(frozen=True)
class Config:
    """Settings of the recipe ``digits``. Fractions are shares of ``steps``; spectra are in units of a band's deviation."""

    cell: Literal["egru", "gru"] = "egru"
    hidden: int = 256
    bands: int = 32
    # training
    steps: int = 1500
    batch: int = 32  # recordings
    lr: float | None = None  # peak of one cycle; none: 1e-2 for egru, 4e-3 for gru
    warmup: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    threads: int = 1
    eval_every: int = 100
    patience: int = 0  # evaluations without a new best before stopping; 0: never
    checkpoint_every: int = 250
    # what recordings are turned into before they are learned
    noise: tuple[float, float] = (-5.0, 30.0)  # decibels by which speech is louder than noise; equal ones are no range
    gain: float = 0.3  # deviation of the logarithm of a recording's loudness
    stretch: float = 0.17  # a recording is played so much faster or slower, at most
    mask_bands: int = 5  # neighbours that are silenced, fewer than so many
    # events
    threshold: float = 0.05
    target_rate: float | None = 0.10  # none: no penalty
    rate_weight: float = 1000.0
    rate_start: float = 0.45
    rate_until: float = 0.15  # the target has fallen from rate_start to target_rate by then
    # weights
    density: float = 0.1  # of the recurrent matrix
    input_density: float = 0.25
    block: tuple[int, int] = (16, 1)
    prune_begin: float = 0.1
    prune_until: float = 0.6
    prune_every: int = 10

    def __post_init__(self) -> None:
        whole = ("steps", "batch", "eval_every", "checkpoint_every", "prune_every", "mask_bands")
        ranges: dict[str, tuple[float, float]] = {
            **dict.fromkeys(whole, (1, math.inf)),
            **dict.fromkeys(("patience", "weight_decay", "clip", "threshold", "rate_weight", "gain"), (0, math.inf)),
            **dict.fromkeys(("density", "input_density", "warmup", "target_rate", "rate_start", "rate_until"), (0, 1)),
            **{
                "hidden": (1, 2**14),
                "bands": (1, 128),
                "threads": (1, 256),
                "seed": (0, 2**63 - 1),
                "stretch": (0, 0.9),
            },
        }
        check_ranges(self, ranges)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is positive and finite, got {self.lr}.")
        if not -60 <= self.noise[0] <= self.noise[1] <= 120:
            raise ValueError(f"noise is a range of decibels within -60 and 120, the lower first; got {self.noise}.")
        if not 0 <= self.prune_begin <= self.prune_until <= 1 or not self.density * self.input_density:
            raise ValueError("0 <= prune_begin <= prune_until <= 1, density > 0 and input_density > 0 must hold.")


Heard = tuple[Float, int]  # frames (T, bands) of a recording, and its label


class Utterances:
    """Recordings in batches, changed a little each time. Batch ``i`` is a pure function of ``i``: a run resumes exactly."""

    def __init__(self, config: Config, hears: LogMel, recordings: Sequence[Recording]) -> None:
        self.config, self.hears, self.recordings, self.batch = config, hears, recordings, config.batch
        self.length = round(float(np.mean([len(r.samples) for r in recordings])) / hears.hop)
        self.per_pass = max(1, len(recordings) // config.batch)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool]:
        """Frames (time, batch, bands), targets (time, batch), and that the state begins anew."""
        number, place = divmod(i, self.per_pass)
        order = np.random.default_rng([self.config.seed, 0, number]).permutation(len(self.recordings))
        random = np.random.default_rng([self.config.seed, 1, i])
        chosen = order[place * self.batch : (place + 1) * self.batch]
        x, y = padded([self._changed(self.recordings[k], random) for k in chosen.tolist()])
        return x, y, True

    def _changed(self, recording: Recording, random: np.random.Generator) -> Heard:
        c, samples = self.config, recording.samples
        louder = math.exp(random.normal(0, c.gain))
        frames = self.hears(louder * noisy(samples, random.uniform(*c.noise), random))
        pace = math.exp(random.uniform(-1, 1) * math.log1p(c.stretch))
        frames = frames[np.arange(0, len(frames) - 1e-6, pace).astype(np.int64)]
        size = random.integers(0, min(c.mask_bands, c.bands))
        first = random.integers(0, c.bands - size)
        frames[:, first : first + size] = 0
        return frames, LABELS.index(recording.label)


def noisy(samples: Float, decibels: float, random: np.random.Generator) -> Float:
    """Speech and noise whose power is so many decibels below it, falling with frequency f as f^-2c, c drawn from [0, 1)."""
    parts = np.fft.rfft(random.standard_normal(len(samples)))
    noise = np.fft.irfft(parts / np.maximum(np.arange(len(parts)), 1) ** random.random(), len(samples))
    power = np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-decibels / 20)
    found: Float = (samples + power * noise).astype(np.float32)
    return found


def padded(recordings: Sequence[Heard]) -> tuple[Tensor, Tensor]:
    """Frames (time, batch, bands) and targets (time, batch); what begins a recording and what follows it is not asked for."""
    longest, bands = max(len(frames) for frames, _ in recordings), recordings[0][0].shape[1]
    x = torch.zeros(longest, len(recordings), bands)
    y = torch.full((longest, len(recordings)), IGNORED)
    for b, (frames, label) in enumerate(recordings):
        x[: len(frames), b] = torch.from_numpy(frames)
        y[int(len(frames) * UNSCORED) : len(frames), b] = label
    return x, y


@torch.no_grad()
def bits(model: Stack, recordings: Sequence[Heard], batch: int = 100) -> float:
    """Bits per scored frame, of a recording's frames the mean, of the recordings too."""
    was_training, total = model.training, 0.0
    model.eval()
    for k in range(0, len(recordings), batch):
        x, y = padded(recordings[k : k + batch])
        logits, _, _ = model(x)
        loss = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none").view_as(y)
        total += float((loss.sum(0) / (y != IGNORED).sum(0)).sum())
    model.train(was_training)
    return total / len(recordings) / math.log(2)


def build(config: Config) -> Stack:
    """The untrained model, seeded by ``config.seed``."""
    torch.manual_seed(config.seed)
    layer: torch.nn.Module
    if config.cell == "egru":
        layer = EGRU(config.bands, config.hidden, threshold=config.threshold, reset="none", output="state")
    else:
        layer = GRU(config.bands, config.hidden)
        initialise_like_egru(layer)
    return Stack(layer, torch.nn.Linear(config.hidden, len(LABELS)))


def among_noise(recordings: Sequence[Recording], decibels: float) -> list[Recording]:
    """Recordings in noise, the same every time; none at infinitely many decibels."""
    random = np.random.default_rng(0)
    loud = math.isfinite(decibels)
    return [replace(r, samples=noisy(r.samples, decibels, random)) if loud else r for r in recordings]


def run(config: Config, folder: Path, label: str = "digits") -> dict[str, Any]:
    """Train in ``folder``, or resume there; then compile the best model and hear the test split with it, counting."""
    peak = {"egru": 1e-2, "gru": 4e-3}[config.cell] if config.lr is None else config.lr
    config = replace(config, lr=peak)
    torch.set_num_threads(config.threads)
    digits = load_digits()
    middle = sum(config.noise) / 2
    hears = LogMel(bands=config.bands).measured([r.samples for r in among_noise(digits.train, middle)])
    valid = [(hears(r.samples), LABELS.index(r.label)) for r in among_noise(digits.valid, middle)]
    model, target = build(config), None
    if config.target_rate is not None:
        target = anneal(config.rate_start, config.target_rate, 0, round(config.rate_until * config.steps))
    densities = {RECURRENT: config.density, INPUT: config.input_density}
    rules = {name: Block(share, config.block, scope="matrix") for name, share in densities.items() if share < 1}
    begin, until = (round(share * config.steps) for share in (config.prune_begin, config.prune_until))

    def penalty(activity: Any, step: int) -> Any:
        return activity.penalty(target(step), config.rate_weight) if target and activity.rates else 0.0

    about = {"recipe": "digits", "config": asdict(config), "corpus": digits.to_dict()}
    about |= {"hears": hears.to_dict(), "labels": list(LABELS)}
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.AdamW(param_groups(model, config.weight_decay), lr=peak),
        windows=Utterances(config, hears, digits.train),
        steps=config.steps,
        lr=lambda step: peak * one_cycle(step / config.steps, config.warmup),
        penalty=penalty,
        evaluate=lambda: bits(model, valid),
        clip=config.clip,
        pruner=Pruner(model, rules, Cubic(begin, until, config.prune_every)) if rules else None,
        eval_every=config.eval_every,
        patience=config.patience,
        checkpoint_every=config.checkpoint_every,
        best_from=until if rules else 0,
        about=about,
        unit="bits",
    )
    summary = train(trainer, folder, label)
    return {**about, **summary, **tested(load(folder)[0], hears, digits)}


def tested(model: Stack, hears: LogMel, digits: Digits) -> dict[str, Any]:
    """Shares of recordings that the compiled model names rightly, frame by frame, by decibels of noise, and what that takes."""
    stream = Engine(compile_model(model, sample=hears(digits.valid[0].samples))).stream()
    found = {f"{decibels:g} dB": accuracy(stream, hears, digits.test, decibels) for decibels in DECIBELS}
    densities = {name: float((model.get_parameter(name) != 0).float().mean()) for name in (RECURRENT, INPUT)}
    rate = stream.counters.event_rate() if isinstance(model[0], EGRU) else None
    return {"test_accuracy": found, "density": densities, "event_rate": rate, "macs": stream.cost.to_dict()}


def accuracy(stream: Stream, hears: LogMel, recordings: Sequence[Recording], decibels: float) -> float:
    """Share of recordings in noise that a stream names rightly."""
    played = among_noise(recordings, decibels)
    return sum(LABELS[heard(stream, hears, r.samples)[0]] == r.label for r in played) / len(played)


def told(summary: dict[str, Any]) -> str:
    """What a run says at its end."""
    events = "" if summary["event_rate"] is None else f"{summary['event_rate']:.1%} events, "
    macs = summary["macs"]["macs_effective"], summary["macs"]["macs_dense"]
    right = ", ".join(
        f"{share:.1%}{f' at {noise}' * (noise != 'inf dB')}" for noise, share in summary["test_accuracy"].items()
    )
    return (
        f"named rightly of the test split: {right}; {events}{macs[0]:,.0f} of {macs[1]:,.0f} MACs a frame "
        f"({summary['seconds']:.0f} s). Compile its folder: sparsefold compile"
    )


def load(path: Path) -> tuple[Stack, dict[str, Any]]:
    """The trained model of a checkpoint (a run's folder means its best), and the facts kept with it."""
    tensors, facts = read_checkpoint(path / "best.safetensors" if path.is_dir() else path)
    settings, _ = made_with(path, facts, "labels")
    model = holding(lambda: build(from_dict(Config, settings)), part(tensors, "model."), path)
    return model.eval(), facts
