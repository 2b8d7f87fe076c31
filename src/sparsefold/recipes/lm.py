"""Language model of words or bytes: ``sparsefold train ptb cell=egru minutes=15``, also ``wikitext2``, ``lm corpus=FILE``.

An embedding, layers of event-based GRU, GRU or LSTM, and a decoder that may share the embedding's weights, regularised as
AWD-LSTM is. ``cell=lstm size=paper`` is AWD-LSTM itself, ``cell=egru size=paper`` the network of the papers on activity and
weight sparsity. Of ``epochs``, ``steps`` and ``minutes`` one says how long. Minutes become a number of steps when training
starts, by the time that some of them take: schedules are functions of the step alone, so that a resumed run has the same bits.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsefold.data import Corpus, load_corpus
from sparsefold.nn import Stack, anneal, param_groups
from sparsefold.recipes import _distributed as processes
from sparsefold.recipes._average import Average
from sparsefold.recipes._checkpoint import holding, made_with, part, read_checkpoint, whole
from sparsefold.recipes._config import from_dict
from sparsefold.recipes._language import Smoothness, build, plain
from sparsefold.recipes._lm_config import Config, resolved
from sparsefold.recipes._loop import Trainer, pace, train
from sparsefold.recipes._windows import RandomWindows, Windows, stream_bits
from sparsefold.recipes.text import one_cycle
from sparsefold.sparsify import Block, Cubic, Magnitude, Pruner, Staircase, Weighted

_EVALUATIONS = 10


def run(config: Config, folder: Path, label: str = "lm") -> dict[str, Any]:
    """Train in ``folder``, or resume there; then read valid and test with the best model, each as one stream."""
    config = resolved(config)
    device = processes.own_device(config.device)
    torch.set_num_threads(config.threads)
    corpus = load_corpus(config.corpus, config.level, config.data_dir or None)
    processes.join(device)
    config = planned(config, corpus, folder, device)
    summary = train(trainer_of(config, corpus, device), folder, label)
    found: dict[str, Any] = {}
    if processes.rank() == 0:
        model = load(folder)[0].to(device)
        for split in ("valid", "test"):
            bits, rates = stream_bits(model, getattr(corpus, split))
            found |= {f"{split}_perplexity": 2.0**bits, f"{split}_bits": bits, f"{split}_event_rates": rates}
    return {"recipe": "lm", "config": asdict(config), "corpus": corpus.to_dict(), **summary, **found}


def planned(config: Config, corpus: Corpus, folder: Path, device: torch.device) -> Config:
    """The config with a precision and a number of steps and of steps between evaluations: those of the run that ``folder`` holds,
    if any.
    """
    if config.precision == "bfloat16" and not multiplies_bfloat16(device):
        warnings.warn(
            "this processor has no instructions for bfloat16, so that training takes longer than with precision=float32.",
            stacklevel=2,
        )
    config = replace(config, precision=_precision(config, device))
    last = folder / "last.safetensors"
    if config.steps is None and config.minutes is not None:
        if last.exists():
            steps = read_checkpoint(last)[1]["about"].get("config", {}).get("steps")
        else:
            # Untrained units speak more often than later, and evaluations are counted in: seldom is more time needed.
            window, evaluation = pace(trainer_of(replace(config, steps=10**9), corpus, device))
            left = 60 * config.minutes - _EVALUATIONS * evaluation
            steps = max(1, round(processes.from_first(device, max(left, 12 * config.minutes) / window)))
        config = replace(config, steps=steps)
    windows = _windows(config, corpus)
    if config.steps is None:
        config = replace(config, steps=windows.count(config.epochs or 1))
    if config.eval_every is None:
        config = replace(config, eval_every=max(1, min(windows.per_pass, -(-(config.steps or 1) // _EVALUATIONS))))
    return config


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16, without which they take longer than float32's."""
    if device.type != "cpu":
        return True
    told: Any = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not say it
    return any(there for name, there in told.items() if "bf16" in name)


def _precision(config: Config, device: torch.device) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def _windows(config: Config, corpus: Corpus) -> Windows:
    batch: Any = config.batch
    if config.random_bptt:
        return RandomWindows(corpus.train, batch, config.bptt, config.seed)
    return Windows(corpus.train, batch, config.bptt)


def segments(config: Config) -> list[tuple[int, int]]:
    """First and last + 1 of the steps until each snapshot; without snapshots all steps."""
    steps: Any = config.steps
    rest = len(config.snapshots) - 1
    if rest < 1:
        return [(0, steps)]
    edges = [
        0,
        *(round(steps * (config.snapshot_first + (1 - config.snapshot_first) * i / rest)) for i in range(rest + 1)),
    ]
    return list(pairwise(edges))


def trainer_of(config: Config, corpus: Corpus, device: torch.device) -> Trainer:
    """Model, optimiser and schedules of a resolved config that says its steps."""
    steps: Any = config.steps
    peak: Any = config.lr
    share = torch.from_numpy(np.bincount(corpus.train, minlength=corpus.tokens) / len(corpus.train)).float()
    model = build(config, corpus.tokens, share)
    if config.initial:
        _begin_with(model, Path(config.initial), corpus)
    model.to(device)
    decoder: Any = model[-1]
    groups = param_groups(model, config.weight_decay or 0.0, config.recurrent_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=peak)
    else:
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(config.beta1 or 0.0, 0.999), fused=True)
    pruner, pruned_at = pruner_of(config, model, share)
    parts, windows = segments(config), _windows(config, corpus)
    rate_until = round((config.rate_until or 0.0) * parts[0][1])
    weight, target = config.rate_weight or 0.0, None
    if config.target_rate is not None and weight:
        target = anneal(config.rate_start, config.target_rate, 0, rate_until)
    smoothness = Smoothness(model, config.alpha or 0.0, config.beta or 0.0)

    def penalty(activity: Any, step: int) -> Any:
        events = activity.penalty(target(step), weight, config.rate_per) if target and activity.rates else 0.0
        return events + smoothness()

    def lr(step: int) -> float:
        first, last = next(part for part in parts if step < part[1])
        progress = (step - first) / (last - first)
        rate = peak * (config.restart if first else 1.0) * shape(config, progress)
        begin, end = windows.span(step)  # a longer window moves the weights further (AWD-LSTM)
        return float(rate * (end - begin) / windows.length)

    return Trainer(
        model=model,
        optimizer=optimizer,
        windows=windows,
        steps=steps,
        lr=lr,
        penalty=penalty,
        evaluate=lambda: stream_bits(model, corpus.valid, streams=32)[0],
        clip=config.clip or math.inf,
        pruner=pruner,
        eval_every=config.eval_every or steps,
        patience=config.patience,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        about={"recipe": "lm", "config": asdict(config), **corpus.metadata()},
        defaults=asdict(Config()),
        unit="perplexity" if config.level == "word" else "bits_per_char",
        targets=decoder.targets,
        loss=decoder.loss,
        average=_average(config, model),
        snapshots={last: f"snapshot-{d:g}" for (_, last), d in zip(parts, config.snapshots, strict=False)},
        best_from=max(pruned_at, rate_until if target and config.cell == "egru" else 0),
        autocast=torch.bfloat16 if _precision(config, device) == "bfloat16" else None,
        tensorboard=config.tensorboard,
    )


def _average(config: Config, model: Stack) -> Average | None:
    triggered = config.optimizer == "sgd" and config.average_patience > 0
    if config.average_from is None and not triggered:
        return None
    begin = math.inf if config.average_from is None else config.average_from * (config.steps or 1)
    return Average(model, config.average_patience if triggered else sys.maxsize, begin)


def shape(config: Config, progress: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1) of a schedule."""
    until: Any = config.constant_until
    if config.schedule == "one_cycle":
        return one_cycle(progress, config.warmup)
    if config.schedule == "constant" or progress <= until:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - until) / (1 - until)))


def pruner_of(config: Config, model: Stack, share: torch.Tensor) -> tuple[Pruner | None, int]:
    """Rules and schedule, and the step from which the network is as sparse as it is to be."""

    def rule(density: float) -> Magnitude | Block:
        if config.block == (1, 1):
            return Magnitude(density, scope=config.scope)
        return Block(density, config.block, scope=config.scope)

    parts, hidden = segments(config), config.hidden or ()
    density = config.snapshots[-1] if config.snapshots else config.density
    densities: dict[str, float] = {}
    for k in range(len(hidden)):
        first = density if config.input_density is None or k else config.input_density
        densities |= {f"{2 * k + 2}.weight_hh_l0": density, f"{2 * k + 2}.weight_ih_l0": first}
    last = len(model) - 1
    decoder = f"{last}.head.weight" if config.cutoffs else "0.weight" if config.tied else f"{last}.weight"
    rules: dict[str, Any] = {name: rule(d) for name, d in densities.items() if d < 1}
    if config.decoder_density < 1:
        rules[decoder] = rule(config.decoder_density)
        if config.decoder_frequency:
            edges = (*config.cutoffs, len(share)) if config.cutoffs else (len(share),)
            rows = [share[: edges[0]], *(share[a:b].sum(0, keepdim=True) for a, b in pairwise(edges))]
            rules[decoder] = Weighted(rules[decoder], torch.cat(rows) ** (config.decoder_frequency / 2))
    if config.embedding_density < 1:
        rules["0.weight"] = Magnitude(config.embedding_density, scope="matrix")
    if not rules:
        return None, 0
    if not config.snapshots:
        steps = parts[0][1]
        cubic = Cubic(round(config.prune_begin * steps), max(1, round(config.prune_until * steps)), config.prune_every)
        return Pruner(model, rules, cubic), cubic.end
    stairs = []
    for (first_step, last_step), d in zip(parts, config.snapshots, strict=True):
        begin = first_step + round((config.prune_begin if first_step == 0 else 0) * (last_step - first_step))
        until = max(1, first_step + round(config.prune_until * (last_step - first_step)))
        if d < 1:
            stairs.append((d, Cubic(begin, until, config.prune_every)))
    schedule = Staircase(*zip(*stairs, strict=True))
    return Pruner(model, rules, schedule), schedule.end


def _begin_with(model: Stack, path: Path, corpus: Corpus) -> None:
    """Put the weights of a checkpoint of the same text's words into a model of the same shape."""
    tensors, facts = _read(path)
    if facts["about"].get("vocabulary") != json.loads(json.dumps(corpus.metadata()["vocabulary"])):
        raise ValueError(f"{path} has learned other words than those of this text. Begin with a run on the same text.")
    try:
        model.load_state_dict(whole(tensors, model))
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} is of another network than these settings make. Give the settings that it had. {error}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and facts of a checkpoint; a run's folder means its best."""
    tensors, facts = read_checkpoint(path / "best.safetensors" if path.is_dir() else path)
    return {**part(tensors, "model."), **part(tensors, "average.mean.")}, facts


def load(path: Path) -> tuple[Stack, dict[str, Any]]:
    """The trained model of a checkpoint (a run's folder means its best), ready to compile, and the facts kept with it.

    Of a run that averages, the last checkpoint means the average.
    """
    tensors, facts = _read(path)
    settings, words = made_with(path, facts)
    config = from_dict(Config, settings)
    count = len(words) + (config.level == "byte")
    model = holding(lambda: build(replace(config, samples=0), count), tensors, path)
    return plain(model.eval()), facts


class _WikiText2:
    """Language model of WikiText-2: the recipe ``lm`` with its other corpus."""

    run, load = staticmethod(run), staticmethod(load)

    @staticmethod
    def Config() -> Config:  # noqa: N802 - as a recipe's config is named
        """Settings, of which the corpus is another."""
        return Config(corpus="wikitext2")


WIKITEXT2 = _WikiText2
