"""Do the two sparsities multiply? ``sparsefold train ptb-multiply``: quality, counts and time over density × event rate.

One event-based GRU is trained for each event rate, and kept at each density on the way (recipe ``lm``, snapshots). Dense LSTMs
and GRUs are trained alike and as long, and so are further networks (``also``), with no stops on the way. Then every network is
compiled, its multiplications are counted by the engine on a sample, embedding and decoder included, and a step is timed in one
race with other engines that play the dense networks. One with an adaptive softmax is asked for the word that follows. All of it
goes to ``multiply.json``, written whole after each point, and is resumed from there; networks may be added to it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsefold.bench import pinned, provenance, race
from sparsefold.data import Corpus, load_corpus
from sparsefold.engine import Engine
from sparsefold.lowering import compile_model
from sparsefold.nn import Stack
from sparsefold.program import Cluster, Program, write_atomically
from sparsefold.recipes import lm, rivals
from sparsefold.recipes._checkpoint import make_folder
from sparsefold.recipes._config import check_ranges, override
from sparsefold.recipes._lm_config import Config as LMConfig
from sparsefold.recipes._lm_config import resolved
from sparsefold.recipes._windows import stream_bits

SCHEMA = "sparsefold-multiply/1"
PARITY = 256  # tokens on which an engine is compared with torch before it is timed
_NETWORKS = ("rates", "lstm", "gru", "also")  # settings that only say which networks there are
BEST = "best.safetensors"  # in the folder of a training
SAMPLE = 5000  # tokens of the test split on which events and multiplications are counted


@dataclass(frozen=True)
class Config:
    """Settings of the recipe ``ptb-multiply``."""

    corpus: str = "ptb"
    data_dir: str = ""
    minutes: float | None = 15.0  # of each training
    steps: int | None = None  # in place of minutes
    rates: tuple[float, ...] = (0.2, 0.1, 0.05)  # events per unit and step
    densities: tuple[float, ...] = (1.0, 0.25, 0.1)
    decoder_density: float = 0.25  # on the way with the others, not below this
    layers: int = 1  # of every network
    hidden: int = 512  # units of a layer of the event networks
    lstm: tuple[int, ...] = (512, 256, 128)  # units of a layer of each dense network
    gru: tuple[int, ...] = (512,)
    also: str = ""  # further networks by their settings of the recipe lm, with ; between them: "cell=egru density=0.1; cell=egru"
    all: str = ""  # settings of the recipe lm for all networks: "precision=bfloat16 samples=1024"
    egru: str = ""  # and for the event networks alone
    dense: str = ""  # and for the dense ones
    calls: int = 2000  # timed steps of each engine
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        check_ranges(
            self, {"calls": (200, math.inf), "layers": (1, 64), "decoder_density": (0, 1), "threads": (1, 256)}
        )
        if not all(0 < v <= 1 for v in (*self.rates, *self.densities)) or (self.rates and not self.densities):
            raise ValueError(
                f"rates and densities lie in (0, 1], at least one density where there is a rate; got {self.rates}, "
                f"{self.densities}."
            )
        if not (*self.lstm, *self.gru):
            raise ValueError("a dense LSTM or GRU to compare with is needed: give lstm or gru a size.")
        trainings(self)


def trainings(config: Config) -> dict[str, LMConfig]:
    """Every training by its name, dense ones first."""
    common = [
        f"corpus={config.corpus}",
        f"data_dir={config.data_dir}",
        f"seed={config.seed}",
        f"threads={config.threads}",
    ]
    common += [f"steps={config.steps}"] if config.steps is not None else [f"minutes={config.minutes}"]
    common += config.all.split()
    found = {}
    for cell, sizes in (("lstm", config.lstm), ("gru", config.gru)):
        for units in sizes:
            words = [*common, f"cell={cell}", f"hidden={_sizes(config, units)}", *config.dense.split()]
            found[f"{cell}-{units}"] = override(LMConfig(), words)
    for rate in config.rates:
        words = [*common, "cell=egru", f"hidden={_sizes(config, config.hidden)}", f"target_rate={rate}"]
        words += config.egru.split()
        words += [f"snapshots={','.join(map(str, config.densities))}", f"decoder_density={config.decoder_density}"]
        found[f"egru-{config.hidden}-rate{rate:g}"] = override(LMConfig(), words)
    for one in filter(str.strip, config.also.split(";")):
        also = resolved(override(LMConfig(), [*common, *one.split()]))
        name = f"{also.cell}-{'x'.join(map(str, also.hidden or ()))}"
        name += f"-rate{also.target_rate:g}" if also.cell == "egru" and also.target_rate else ""
        name += f"-density{also.density:g}-decoder{also.decoder_density:g}"
        if also.cutoffs:
            name += f"-cutoffs{'x'.join(map(str, also.cutoffs))}" + (f"by{also.divide:g}" if also.divide != 2 else "")
        if also.snapshots or name in found:
            raise ValueError(f"each network of also is one of its own, kept at its end; {one.strip()!r} is not.")
        found[name] = also
    return found


def _sizes(config: Config, units: int) -> str:
    return "x".join([str(units)] * config.layers)


def points(config: Config, training: str) -> dict[str, str]:
    """Names of the networks that a training gives, and the file of each in its folder."""
    snapshots = trainings(config)[training].snapshots
    if snapshots:
        return {f"{training}-density{d:g}": f"snapshot-{d:g}.safetensors" for d in snapshots}
    return {training: BEST}


def run(config: Config, folder: Path, label: str = "ptb-multiply") -> dict[str, Any]:
    """Train, describe and time what ``multiply.json`` in ``folder`` does not hold yet; returns its content.

    Raises:
        ValueError: the folder holds another experiment, or ``torchrun`` started several processes.
        rivals.ParityError: an engine differs from torch; nothing is timed then.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"ptb-multiply trains and times in one process, torchrun started {count}. Run it without torchrun."
        )
    make_folder(folder)
    results = folder / "multiply.json"
    settings = json.loads(json.dumps(asdict(config)))
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"config": settings, "points": {}}
    changed = [k for k in settings if k not in _NETWORKS and found["config"].get(k) != settings[k]]
    if changed:
        raise ValueError(
            f"{results} holds an experiment with another {', '.join(changed)}. Give the same settings, or another --out."
        )
    torch.set_num_threads(config.threads)
    corpus = load_corpus(config.corpus, "word", config.data_dir or None)
    todo = trainings(config)
    wanted = [name for training in todo for name in points(config, training)]
    known = {name: found["points"][name] for name in wanted if name in found["points"]}
    found |= {"config": settings, "schema": SCHEMA, "corpus": corpus.to_dict(), "points": known}
    if not set(wanted) == set(known) == {row["network"] for row in found.get("race", ())}:
        found.pop("race", None)  # it is one of all networks
    for number, (training, settings_of) in enumerate(todo.items()):
        missing = {name: file for name, file in points(config, training).items() if name not in known}
        if not missing:
            continue
        trained = lm.run(settings_of, folder / training, f"{label} {number + 1}/{len(todo)} {training}")
        for name, file in missing.items():
            known[name] = _describe(folder / training / file, folder / f"{name}.sfold", corpus, trained)
            found["provenance"] = provenance("sparsefold train ptb-multiply")
            write_atomically(results, json.dumps(found, indent=1).encode())
    if "race" not in found:
        found["points"] = {name: known[name] for name in wanted}
        models = {name: lm.load(_file(config, folder, name))[0] for name in wanted}
        found["race"] = measure(
            models, {n: Program.load(folder / f"{n}.sfold") for n in models}, corpus.test, config.calls
        )
        write_atomically(results, json.dumps(found, indent=1).encode())
    return found


def told(found: Mapping[str, Any]) -> str:
    """One line for each network: what the command says in the end."""
    own = {row["network"]: row["latency_us"]["mean"] for row in found["race"] if row["engine"] == "sparsefold"}
    return "\n".join(
        f"{name:<32} perplexity {p['test_perplexity']:7.2f}  events {p['event_rate']:6.1%}  "
        f"MACs {p['macs']['macs_effective']:>11,.0f}  us {own[name]:8.2f}"
        for name, p in found["points"].items()
    )


def _file(config: Config, folder: Path, name: str) -> Path:
    training = next(t for t in trainings(config) if name in points(config, t))
    return folder / training / points(config, training)[name]


def _describe(checkpoint: Path, file: Path, corpus: Corpus, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Quality on whole splits, and the compiled network with what the engine counts on a sample."""
    model, facts = lm.load(checkpoint)
    config = facts["about"]["config"]
    program = compile_model(model, facts["about"], sample=corpus.valid[:SAMPLE])
    program.save(file)
    quality: dict[str, Any] = {}
    for split in ("valid", "test"):
        said = f"{split}_perplexity", f"{split}_event_rates"
        if checkpoint.name == BEST:  # of which the training says it
            quality |= {key: trained[key] for key in said}
        else:
            bits, rates = stream_bits(model, getattr(corpus, split))
            quality |= dict(zip(said, (2.0**bits, rates), strict=True))
    return {
        "cell": config["cell"],
        "hidden": config["hidden"][0],
        "layers": len(config["hidden"]),
        "rate": config["target_rate"] if config["cell"] == "egru" else None,
        "density": {name: float((p != 0).float().mean()) for name, p in model.named_parameters() if "weight" in name},
        **quality,
        **_counted(program, corpus),
        "file_bytes": file.stat().st_size,
        "training": {"step": facts["progress"]["step"], "seconds": trained["seconds"], "steps": trained["steps"]},
        "config": config,
    }


def _counted(program: Program, corpus: Corpus) -> dict[str, Any]:
    """What the engine counts on a sample of the test split, and the memory that its weights take."""
    engine = _engine(program)
    stream = engine.stream()
    if _in_clusters(program):
        stream.score(corpus.test[:SAMPLE], corpus.test[1 : SAMPLE + 1])
    else:
        stream.run(corpus.test[:SAMPLE])
    rate = stream.counters.event_rate() if stream.counters.events else 1.0
    return {"event_rate": rate, "macs": stream.cost.to_dict(), "memory_bytes": engine.nbytes}


def _engine(program: Program) -> Engine:
    """With the first layer's input products of all words in one table, whatever memory that takes."""
    return Engine(program, fold=True)


def _in_clusters(program: Program) -> bool:
    return isinstance(program.ops[-1], Cluster)


def measure(
    models: Mapping[str, Stack], programs: Mapping[str, Program], tokens: NDArray[np.int64], calls: int
) -> list[dict[str, Any]]:
    """Parity with torch first, then one race over the same tokens, one thread, pinned: ours on all, others on the dense ones.

    A player gives the logits of all words after a token; of a decoder in clusters log p of the word that follows.
    """
    rows: list[dict[str, Any]] = []
    players: dict[str, Any] = {}

    def add(network: str, engine: str, call: Any, worst: float, settings: str, scores: bool = False) -> None:
        bound = None if "int8" in engine else rivals.PARITY_BOUND
        if bound is not None and not worst <= bound:
            raise rivals.ParityError(
                f"{engine} on {network} differs from torch by {worst:.2e} in a logit, the bound is {bound:.0e}: nothing is timed."
            )
        row = {"network": network, "engine": engine, "rival": engine != "sparsefold", "settings": settings}
        rows.append({**row, "max_abs_error": worst, "scores": scores})
        players[f"{network}/{engine}"] = (lambda both: call(*both)) if scores else (lambda both: call(both[0]))

    for name, program in programs.items():
        engine, scores = _engine(program), _in_clusters(program)
        worst = rivals.teacher_forced(models[name], engine, tokens[:PARITY].tolist())
        stream = engine.stream()
        settings = f"float32, {engine.isa}, 1 thread"
        add(name, "sparsefold", stream.score if scores else stream.step, worst, settings, scores)
    for name, model in models.items():
        if isinstance(model[1], torch.nn.GRU | torch.nn.LSTM) and isinstance(model[-1], torch.nn.Linear):
            with torch.no_grad():
                expected = model(torch.from_numpy(tokens[:PARITY])[:, None])[0][:, 0].numpy()
            makers: list[Any] = [rivals.onnx_runtime, rivals.openvino, rivals.torch_eager, rivals.torch_int8]
            if isinstance(model[1], torch.nn.LSTM):
                makers.append(lambda m: rivals.onnx_runtime(m, int8=True))
            for rival in (make(model) for make in makers):
                logits = np.array([rival.call(token).copy() for token in tokens[:PARITY].tolist()])
                add(name, rival.name, rival.call, float(np.abs(logits - expected).max()), rival.settings)
    with pinned():
        words = tokens[: calls + 1].tolist()
        latencies = race(players, list(pairwise(words)), rounds=20, warmup=100)
    for row in rows:
        row["latency_us"] = latencies[f"{row['network']}/{row['engine']}"].to_dict()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quality, counts and time over density x event rate, resumable.")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/ptb-multiply"))
    parser.add_argument("--results", type=Path, default=None, help="the JSON is copied there")
    args = parser.parse_intermixed_args()
    summary = run(override(Config(), args.words), args.out)
    if args.results:
        write_atomically(args.results, json.dumps(summary, indent=1).encode())
    print(told(summary))
