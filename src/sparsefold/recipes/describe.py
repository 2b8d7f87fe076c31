"""A trained language model described: quality, what it multiplies, and one race with dense networks: ``sparsefold describe RUN``.

The best network of a run of the recipe ``lm``, or of ``ptb-paper``, is compiled in float32 and with int8 weights, read on whole
splits, counted by the engine on a sample, embedding and decoder included, and timed with dense networks of as many weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsefold.bench import pinned, provenance, race
from sparsefold.data import Corpus, load_corpus
from sparsefold.engine import Engine
from sparsefold.language import evaluate
from sparsefold.lowering import compile_model
from sparsefold.nn import EGRU, GRU, LSTM, Stack, StackState
from sparsefold.program import Cluster, Program, write_atomically
from sparsefold.recipes import lm, rivals
from sparsefold.recipes._checkpoint import read_checkpoint
from sparsefold.recipes._config import from_dict
from sparsefold.recipes._lm_config import Config
from sparsefold.recipes._windows import stream_bits

SCHEMA = "sparsefold-described/1"
SAMPLE = 5000  # tokens of a split on which events and multiplications are counted
PARITY = 256  # tokens on which an engine is compared with torch before it is timed
TIE = 1e-5  # so near to its threshold a unit may speak in the one and not in the other: rounding decides


def run(folder: Path, data_dir: str = "", with_rivals: bool = True, calls: int = 1000) -> dict[str, Any]:
    """Describe the run of the recipe ``lm`` in ``folder``; returns what ``described.json`` there holds.

    Raises:
        ValueError: the folder holds no such run, or its corpus is another.
        rivals.ParityError: an engine differs from torch; nothing is timed then.
    """
    if calls < 200:
        raise ValueError(f"calls is at least 200, got {calls}: fewer make no median of a race.")
    facts, last = read_checkpoint(_best(folder))[1], folder / "last.safetensors"
    about, recipe = facts["about"], facts["about"].get("recipe")
    if recipe != "lm":
        raise ValueError(
            f"{folder} holds a run of the recipe {recipe}; this describes those of lm, ptb, wikitext2 and ptb-paper."
        )
    if not isinstance(about.get("config"), dict):
        raise ValueError(f"{folder} does not say the settings of its run: it is damaged.")
    done = (read_checkpoint(last)[1] if last.exists() else facts)["progress"]
    made = asdict(from_dict(Config, about["config"]))
    corpus = load_corpus(made["corpus"], made["level"], data_dir or made["data_dir"] or None)
    if any(about.get(key) != value for key, value in corpus.metadata().items()):
        raise ValueError(f"{folder} was trained on another text than {corpus.source} is now. Restore the text.")
    result = {
        "recipe": recipe,
        "schema": SCHEMA,
        "lm": made,
        "corpus": corpus.to_dict(),
        "training": {"steps": made["steps"], "step": done.get("step"), "seconds": done.get("seconds")},
        **describe(folder, corpus, torch.device("cpu"), with_rivals, calls),
        "provenance": provenance(f"sparsefold describe {folder}"),
    }
    write_atomically(folder / "described.json", json.dumps(result, indent=1).encode())
    return result


def told(result: Mapping[str, Any]) -> str:
    """What the command says in the end: the network, then a line for each engine."""
    if result["lm"]["level"] == "word":
        quality = f"perplexity {result['test_perplexity']:.2f} on the test split and {result['valid_perplexity']:.2f}"
    else:
        quality = f"{result['test_bits']:.4f} bits per character on the test split and {result['valid_bits']:.4f}"
    events = "" if result["event_rate"] is None else f"events {result['event_rate']:.1%}, "
    lines = [
        f"{quality} on the validation split; density {result['density_of_all']:.1%}, {events}"
        f"{result['macs']['macs_effective']:,.0f} MACs per token, {result['fewer_macs']:.1f} times fewer than dense"
    ]
    for row in result["race"]:
        which = "mean" if row["scores"] else "p50"
        lines.append(f"{row['network']:<24} {row['engine']:<18} us {which:<4} {row['latency_us'][which]:10.2f}")
    return "\n".join([*lines, *([result["rivals"]] if not any(row["rival"] for row in result["race"]) else [])])


def _best(folder: Path) -> Path:
    best = folder / "best.safetensors"  # a transfer checkpoint of a run that was done brings none
    return best if best.exists() else folder / "last.safetensors"


def describe(
    folder: Path, corpus: Corpus, device: torch.device, with_rivals: bool, calls: int, name: str = "described"
) -> dict[str, Any]:
    """Quality on whole splits, the network compiled with what the engine counts on a sample, and the race.

    The compiled files are ``NAME.sfold`` and, with int8 weights, ``NAME-i8.sfold``.
    """
    model, facts = lm.load(_best(folder))
    program, narrow = (
        compile_model(model, facts["about"], sample=corpus.valid[:SAMPLE], weights=w) for w in ("f32", "i8")
    )
    program.save(folder / f"{name}.sfold")
    narrow.save(folder / f"{name}-i8.sfold")
    found: dict[str, Any] = {}
    model.to(device)
    for split in ("valid", "test"):
        bits, rates = stream_bits(model, getattr(corpus, split))
        found |= {f"{split}_perplexity": 2.0**bits, f"{split}_bits": bits, f"{split}_event_rates": rates}
    model.cpu()
    stream, rounded = (Engine(p).stream() for p in (program, narrow))
    sampled = {
        f"{kind}_sample_bits": evaluate(s, corpus.test[: SAMPLE + 1]) for kind, s in (("f32", stream), ("i8", rounded))
    }
    macs = stream.cost.to_dict()
    made = facts["about"]["config"]
    hidden, gates = made["hidden"], 4 if made["cell"] == "lstm" else 3
    whole = sum(gates * h * (i + h) for i, h in pairwise((made["embedding"], *hidden))) + hidden[-1] * corpus.tokens
    # A matrix that embedding and decoder share stands in both of them here, and is counted once.
    twice = "0.weight" if made["tied"] else ""
    weights = {name: p for name, p in model.named_parameters() if "weight" in name and name != twice}
    transfer = folder / "transfer.safetensors"
    networks: dict[str, tuple[Stack, dict[str, Program]]] = {
        f"{made['cell']}-{_sizes(hidden)}": (model, {rivals.OWN: program, f"{rivals.OWN} i8": narrow})
    }
    rest = "not timed: they were not asked for"
    missing = [name for name in ("onnx", "onnxruntime", "openvino") if find_spec(name) is None]
    if with_rivals and missing:
        rest = f"not timed: {', '.join(missing)} is missing here: pip install 'sparsefold[bench]'"
    elif with_rivals and made["cell"] != "egru":
        rest = "this one itself, where other engines can play it: equal layers, and a decoder of all words"
    elif with_rivals:
        rest = "untrained, for time does not depend on weights; about as many weights as this one before pruning, in equal layers"
        for kind, gates in (("lstm", 4), ("gru", 3)):
            units = _as_many(whole, gates, len(hidden), corpus.tokens)
            dense = _dense(kind, units, len(hidden), corpus.tokens)
            networks[f"{kind}-{_sizes([units] * len(hidden))}"] = dense, {rivals.OWN: compile_model(dense)}
    return {
        **found,
        **sampled,
        "step": facts["progress"]["step"],
        "event_rate": stream.counters.event_rate() if made["cell"] == "egru" else None,
        "density": {name: float((p != 0).float().mean()) for name, p in weights.items()},
        "density_of_all": sum(int((p != 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values()),
        "macs": macs,
        "fewer_macs": whole / macs["macs_effective"],  # than the dense network whose decoder reads all words
        "file_bytes": (folder / f"{name}.sfold").stat().st_size,
        "i8_file_bytes": (folder / f"{name}-i8.sfold").stat().st_size,
        "transfer_bytes": transfer.stat().st_size if transfer.exists() else None,
        "rivals": f"dense networks: {rest}.",
        "race": _race(networks, corpus.test, calls, with_rivals and not missing),
    }


def _sizes(hidden: Any) -> str:
    return "x".join(map(str, hidden))


def _as_many(weights: float, gates: int, layers: int, words: int) -> int:
    """Units of each of ``layers`` equal layers, with an embedding and a decoder as wide, that make ``weights`` in products."""
    a = 2 * gates * layers
    units = (math.sqrt(words**2 + 4 * a * weights) - words) / (2 * a)
    return max(1, 8 * round(units / 8) if units > 64 else round(units))  # a multiple of 8 suits whoever plays them


def _dense(kind: str, units: int, layers: int, words: int) -> Stack:
    torch.manual_seed(0)
    make: Any = LSTM if kind == "lstm" else GRU
    inner = [make(units, units) for _ in range(layers)]
    return Stack(torch.nn.Embedding(words, units), *inner, torch.nn.Linear(units, words)).eval()


def _race(
    networks: Mapping[str, tuple[Stack, Mapping[str, Program]]],
    tokens: NDArray[np.int64],
    calls: int,
    with_rivals: bool,
) -> list[dict[str, Any]]:
    """Parity with torch first, then one race over the same tokens, one thread, pinned: ours on all, others on the dense ones.

    A player gives the logits of all words after a token; of a decoder in clusters log p of the word that follows.
    """
    rows: list[dict[str, Any]] = []
    players: dict[str, Any] = {}

    def add(network: str, engine: str, call: Any, worst: float, ties: int, about: str, scores: bool = False) -> None:
        bound = None if engine.endswith(("int8", "i8")) else rivals.PARITY_BOUND
        if bound is not None and not worst <= bound:
            raise rivals.ParityError(
                f"{engine} on {network} differs from torch by {worst:.2e} in a logit, the bound is {bound:.0e}: nothing is timed."
            )
        parity = {"max_abs_error": worst, "bound": bound, "tokens": len(check) - ties, "near_ties": ties}
        rival = not engine.startswith(rivals.OWN)
        row = {"network": network, "engine": engine, "rival": rival, "settings": about, "parity": parity}
        rows.append({**row, "scores": scores})
        players[f"{network}/{engine}"] = (lambda both: call(*both)) if scores else (lambda both: call(both[0]))

    check = tokens[:PARITY].tolist()
    for name, (model, programs) in networks.items():
        for own, program in programs.items():
            engine, scores = Engine(program), isinstance(program.ops[-1], Cluster)
            stream, weights = engine.stream(), own.removeprefix(rivals.OWN).strip() or "float32"
            about = f"{weights}, {engine.isa}, 1 thread"
            add(name, own, stream.score if scores else stream.step, *_parity(model, engine, check), about, scores)
    for name, (model, _) in networks.items():
        if with_rivals and _for_others(model):
            with torch.no_grad():
                expected = model(torch.tensor(check)[:, None])[0][:, 0].numpy()
            makers: list[Any] = [rivals.onnx_runtime, rivals.openvino, rivals.torch_eager, rivals.torch_int8]
            if isinstance(model[1], torch.nn.LSTM):
                makers.append(lambda m: rivals.onnx_runtime(m, int8=True))
            for rival in (make(model) for make in makers):
                logits = np.array([rival.call(token).copy() for token in check])
                add(name, rival.name, rival.call, float(np.abs(logits - expected).max()), 0, rival.settings)
    with pinned():
        latencies = race(players, list(pairwise(tokens[: calls + 1].tolist())), rounds=20, warmup=100)
    for row in rows:
        row["latency_us"] = latencies[f"{row['network']}/{row['engine']}"].to_dict()
    return rows


def _for_others(model: Stack) -> bool:
    """Whether other engines can play it."""
    dense = all(isinstance(layer, torch.nn.GRU | torch.nn.LSTM) for layer in list(model)[1:-1])
    return (
        dense
        and isinstance(model[-1], torch.nn.Linear)
        and len({layer.hidden_size for layer in list(model)[1:-1]}) == 1
    )


@torch.no_grad()
def _parity(model: Stack, engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Largest difference of a logit from torch's, the engine's state set to torch's before each token, and the tokens left out.

    They are those at which rounding may decide an event: of a lower layer, it is heard by those above in the same step.
    """
    stream, worst, ties = engine.stream(), 0.0, 0
    state: StackState | None = None
    for token in tokens:
        if state is not None:
            stream.load_state(rivals._engine_state(state))
        logits, state, _ = model(torch.tensor([[token]]), state)
        error = float(np.abs(logits[0, 0].numpy() - stream.step(token)).max())
        if _near_tie(model, state):
            ties += 1
        else:
            worst = max(worst, error)
    return worst, ties


def _near_tie(model: Stack, state: StackState) -> bool:
    for module, layer in zip(model, state, strict=True):
        if isinstance(module, EGRU):
            found: Any = layer
            u = torch.where(found.y > 0, found.y, found.h)  # before the reset
            if float((u - module.get_parameter("threshold_l0")).abs().min()) < TIE:
                return True
    return False
