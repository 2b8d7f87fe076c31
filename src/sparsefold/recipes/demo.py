"""The demonstration: train, compile, play, measure. ``make demo``; everything it finds goes to ``runs/demo``."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sparsefold import report
from sparsefold.bench import provenance
from sparsefold.data import ByteCorpus, load_text
from sparsefold.data.text import decode
from sparsefold.engine import Engine
from sparsefold.formats import Precision
from sparsefold.language import evaluate, generate
from sparsefold.lowering import compile_model
from sparsefold.nn import Stack
from sparsefold.program import Program, write_atomically
from sparsefold.recipes import rivals, text
from sparsefold.recipes._checkpoint import make_folder

_EGRU = {"cell": "egru", "rate_weight": 500, "rate_until": 0.2}
_LARGE = {**_EGRU, "hidden": 1024, "target_rate": 0.05, "prune_begin": 0.2, "prune_until": 0.7, "lr": 1.6e-2}
# In the order of the tables. Learning rates, and the size of the last, which is worth what the sparse network is worth:
# results/text/demo-search.json.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("dense GRU 512", {"cell": "gru", "hidden": 512, "lr": 4e-3}),
    "egru": ("event GRU 512", {**_EGRU, "hidden": 512, "lr": 1e-2}),
    "egru_blocks": ("event GRU 1024, 10 % of blocks", {**_LARGE, "density": 0.10}),
    "gru_equal": ("dense GRU 480, of equal quality", {"cell": "gru", "hidden": 480, "lr": 3.5e-3}),
}
# Of the full demonstration, between these.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "egru_blocks_25": ("event GRU 1024, 25 % of blocks", {**_LARGE, "density": 0.25}),
    "egru_blocks_5": ("event GRU 1024, 5 % of blocks", {**_LARGE, "density": 0.05}),
    "egru_decoder": (
        "event GRU 1024, 10 %, decoder 25 %",
        {**_LARGE, "density": 0.10, "decoder_density": 0.25},
    ),
}
SEEDS = (1, 2)  # of the full demonstration, beside 0, for each of NETWORKS
ROUNDED: dict[str, Precision] = {
    "sparsefold i8": "i8",
    "sparsefold w8a8": "w8a8",
}  # rows of the sparse network with int8 weights
STEPS = 1000
RATE_BLOCK = 256  # bytes per point of the event rate over time
SAMPLE = 300


class DemoError(RuntimeError):
    """A training that failed."""


def demo(folder: Path, fresh: bool = False, steps: int | None = None, full: bool = False) -> dict[str, Any]:
    """Runs all of it, prints one table, writes ``summary.json`` (docs/results.md) and ``report.html``; returns the summary.

    ``full``: more networks (``MORE``) and seeds, in minutes where the other takes one; it goes on from what the other trained.

    Raises:
        ValueError: the folder cannot be used.
        ImportError: a rival or the plots cannot be made; said before any training.
        DemoError: a training failed.
        rivals.ParityError: an engine disagrees with its reference; nothing is timed then.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is at least 1, got {steps}.")
    _need_extras()
    make_folder(folder)
    if fresh:
        _clear(folder)
    began = time.monotonic()
    corpus = load_text(None)
    steps = steps or STEPS
    chosen, trainings = _chosen(full)
    print(f"Text: {corpus.source}, {sum(map(len, (corpus.train, corpus.valid, corpus.test))):,} bytes.")
    print(
        f"{len(trainings)} trainings of {steps} steps, two at a time, one core each; "
        + (
            "about a quarter of an hour on most machines."
            if full
            else "two and a half to eight minutes on most machines."
        ),
        flush=True,
    )
    resumed = any((folder / key / "last.safetensors").exists() for key in trainings)
    torch.set_num_threads(1)
    models: dict[str, Stack] = {}
    compiled: dict[str, Program] = {}
    described: dict[str, dict[str, Any]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    with closing(_train_all(folder, trainings, steps)) as done:
        for key in done:  # each is compiled and read through while others still train
            model, facts = text.load(folder / key)
            if key not in chosen:
                others.setdefault(key.rpartition("_seed")[0], []).append(_another(model, facts, corpus))
                continue
            models[key] = model
            compile_model(model, facts["about"]).save(folder / f"{key}.sfold")
            compiled[key] = Program.load(folder / f"{key}.sfold")
            described[key] = _describe(folder / key, model, compiled[key], corpus)
            print(
                f"  {key}: {described[key]['bits_per_char']:.4f} bits per character on the test split, compiled.",
                flush=True,
            )
    trained = time.monotonic()
    dense = described["gru"]["bits_per_char"]
    networks: dict[str, dict[str, Any]] = {
        key: {
            "label": label,
            **described[key],
            "bits_per_char_vs_dense": described[key]["bits_per_char"] / dense,
            "seeds": sorted(others[key], key=lambda other: other["seed"]) if key in others else None,
        }
        for key, (label, _) in chosen.items()
    }
    programs, played = {(key, rivals.OWN): compiled[key] for key in chosen}, {}
    for name, precision in ROUNDED.items():
        programs["egru_blocks", name] = compile_model(models["egru_blocks"], weights=precision)
        played[name] = _count(programs["egru_blocks", name], corpus)

    print("Checking every engine against its reference, then timing them in turns ...", flush=True)
    bits = {(key, name): (played[name] if name in played else networks[key])["bits_per_char"] for key, name in programs}
    rows = rivals.measure({key: models[key] for key in chosen}, programs, bits, corpus.test)
    fastest, equal = (_fastest(rows, key) for key in ("gru", "gru_equal"))
    for row in rows:
        row |= {name: value for name, value in played.get(row["engine"], {}).items() if name != "bits_per_char"}
        row["ratio_to_fastest_rival"] = fastest["p50"] / row["latency_us"]["p50"]
        row["ratio_to_equal_rival"] = equal["p50"] / row["latency_us"]["p50"]
    sample = _play(compiled["egru_blocks"], corpus)

    command = "sparsefold demo" + " --full" * full + (f" --steps {steps}" if steps != STEPS else "")
    summary = {
        "schema": "sparsefold-demo/1",
        "provenance": {**provenance(command), **_versions()},
        "corpus": corpus.to_dict(),
        "seconds": {
            "training": round(sum(_trained(folder / key)["seconds"] for key in trainings), 1),
            "measuring": round(time.monotonic() - trained, 1),
            "total": round(time.monotonic() - began, 1),
        },
        "networks": networks,
        "rows": rows,
        "fastest_rival": fastest,
        "equal_rival": equal,
        "sample": sample,
    }
    summary["targets"] = _targets(summary, timed=not resumed and not full)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    report.write_report(summary, folder / "report.html")
    print(report.table(summary))
    print(f"\n{folder / 'summary.json'} and {folder / 'report.html'} hold all of it.")
    return summary


def _chosen(full: bool) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, dict[str, Any]]]:
    """The networks in the order of the tables, and the settings of every training, the longest first so that two cores finish
    together.
    """
    networks = dict(NETWORKS)
    if full:
        equal = networks.pop("gru_equal")
        networks |= {**MORE, "gru_equal": equal}
    trainings = {key: settings for key, (_, settings) in networks.items()}
    if full:
        trainings |= {
            f"{key}_seed{n}": {**settings, "seed": n} for key, (_, settings) in NETWORKS.items() for n in SEEDS
        }
    cost = {
        key: s["hidden"] * (2 if s["cell"] == "gru" else 1) for key, s in trainings.items()
    }  # dense units cost about twice
    return networks, dict(sorted(trainings.items(), key=lambda item: -cost[item[0]]))


def _need_extras() -> None:
    missing = [
        name for name in ("onnx", "onnxruntime", "openvino", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'sparsefold[train,bench,report]'.")


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, and nothing else that may lie there."""
    networks, trainings = _chosen(full=True)
    for name in ("summary.json", "report.html", *(f"{key}.sfold" for key in networks)):
        (folder / name).unlink(missing_ok=True)
    for key in trainings:
        if (folder / key / "log.jsonl").exists() or (folder / key / "last.safetensors").exists():
            shutil.rmtree(folder / key)


def _train_all(folder: Path, trainings: Mapping[str, Mapping[str, Any]], steps: int) -> Generator[str, None, None]:
    """Trains every network in a process of its own, two at a time, and shows their progress; yields each that is done."""
    waiting, width = deque(trainings), max(map(len, trainings))
    running: dict[str, subprocess.Popen[str]] = {}
    relays: dict[str, threading.Thread] = {}
    ended: deque[str] = deque()
    try:
        while waiting or running or ended:
            while waiting and len(running) < 2:
                key = waiting.popleft()
                words = [f"{k}={v}" for k, v in {"steps": steps, **trainings[key]}.items()]
                command = [sys.executable, "-m", "sparsefold.cli", "train", "text", *words, "--out", str(folder / key)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
                )
                assert process.stdout is not None  # it is a pipe
                relays[key] = threading.Thread(target=_relay, args=(key.ljust(width), process.stdout), daemon=True)
                relays[key].start()
                running[key] = process
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    if process.returncode == 130:
                        raise KeyboardInterrupt("interrupted; what was trained is saved.")
                    if process.returncode:
                        raise DemoError(f"training {key} failed with status {process.returncode}; see the lines above.")
                    ended.append(key)
            if ended and not (waiting and len(running) < 2):  # the next one first: what is yielded takes its time
                yield ended.popleft()
            time.sleep(0.1)
    finally:
        for process in running.values():  # where Ctrl-C reached them too, they are saving already and go on with it
            process.terminate()
        for process in running.values():
            process.wait()
        for relay in relays.values():  # their last lines come before what is said about them
            relay.join()


def _relay(name: str, lines: IO[str]) -> None:
    with lines:
        for line in lines:
            # In one write, with its end: another training's line may come at any moment.
            print(f"  {name}  {line.rstrip().removeprefix('text ')}\n", end="", flush=True)


def _trained(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _count(program: Program, corpus: ByteCorpus) -> dict[str, Any]:
    """Quality, event rate, size and counted cost of a compiled network, from one pass over the test split."""
    stream = Engine(program).stream()
    bits = evaluate(stream, corpus.test)
    events = bool(stream.counters.events)
    return {
        "bits_per_char": bits,
        "event_rate": stream.counters.event_rate() if events else 1.0,
        "file_bytes": len(program.to_bytes()),
        "cost": stream.cost.to_dict(),
    }


def _describe(folder: Path, model: Stack, program: Program, corpus: ByteCorpus) -> dict[str, Any]:
    """What was trained and what one pass of the compiled file over the test split counts."""
    summary, counted = _trained(folder), _count(program, corpus)
    described: dict[str, Any] = {
        **counted,
        "config": summary["config"],
        "seconds": summary["seconds"],
        "valid_bits_per_char": summary["valid_bits_per_char"],
        "train_bits_per_char": summary["train_bits_per_char"],
        "density": next(p["density"] for p in counted["cost"]["parts"] if p["role"] == "recurrent"),
        "log": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()],
        "event_rate_per_unit": None,
        "event_rate_over_time": None,
        "event_rate_block": RATE_BLOCK,
        "raster": None,
        "mask": _mask(model, tuple(summary["config"]["block"])) if summary["config"]["density"] < 1 else None,
    }
    if counted["event_rate"] < 1:
        emitted = next(iter(Engine(program).stream().run_traced(corpus.test)[1].values()))
        blocks = emitted[: len(emitted) // RATE_BLOCK * RATE_BLOCK].reshape(-1, RATE_BLOCK * emitted.shape[1])
        described["event_rate_per_unit"] = emitted.mean(0).round(4).tolist()
        described["event_rate_over_time"] = blocks.mean(1).round(4).tolist()
        stretch = slice(1000, 1096)
        described["raster"] = {
            "text": decode(corpus.test[stretch], corpus.vocabulary).decode("latin-1"),
            "events": [np.flatnonzero(step).tolist() for step in emitted[stretch]],
        }
    return described


def _mask(model: Stack, block: tuple[int, int]) -> dict[str, Any]:
    """Which blocks of the recurrent matrix hold a weight, as hexadecimal rows."""
    weight = model.get_parameter("1.weight_hh_l0").detach()
    kept = weight.unfold(0, block[0], block[0]).unfold(1, block[1], block[1]).ne(0).flatten(2).any(2).numpy()
    return {
        "block": list(block),
        "gates": 3,
        "columns": kept.shape[1],
        "rows": [row.tobytes().hex() for row in np.packbits(kept, 1)],
    }


def _another(model: Stack, facts: Mapping[str, Any], corpus: ByteCorpus) -> dict[str, Any]:
    """What the same network is worth that started from another seed."""
    counted = _count(compile_model(model), corpus)
    return {"seed": facts["about"]["config"]["seed"], **{k: counted[k] for k in ("bits_per_char", "event_rate")}}


def _fastest(rows: Sequence[Mapping[str, Any]], network: str) -> dict[str, Any]:
    """The rival that plays a network fastest."""
    row = min((r for r in rows if r["rival"] and r["network"] == network), key=lambda r: r["latency_us"]["p50"])
    return {"network": network, "engine": row["engine"], "p50": row["latency_us"]["p50"]}


def _play(program: Program, corpus: ByteCorpus) -> dict[str, Any]:
    """Plays generated text as a stream, byte by byte, on the terminal."""
    prompt, temperature = corpus.test[:64], 0.6
    start, out = decode(prompt, corpus.vocabulary), bytearray()
    print(f"\nGenerated, byte by byte, after {start.decode('latin-1')!r}:\n")
    for token in generate(Engine(program).stream(), prompt.tolist(), SAMPLE, temperature, np.random.default_rng(0)):
        out += decode([token], corpus.vocabulary)
        print(out[-1:].decode("latin-1"), end="", flush=True)
    print("\n")
    texts = {"prompt": start.decode("latin-1"), "text": out.decode("latin-1")}
    return {"network": "egru_blocks", **texts, "temperature": temperature}


def _targets(summary: dict[str, Any], timed: bool) -> list[dict[str, Any]]:
    """What was promised; of the whole time only where it was ``timed`` from the start, for four networks."""
    networks = summary["networks"]
    ratio = {(r["network"], r["engine"]): r["ratio_to_fastest_rival"] for r in summary["rows"]}

    def at_most(name: str, measured: float, limit: float, unit: str) -> dict[str, Any]:
        held = bool(measured <= limit)
        return {"name": name, "target": f"at most {unit}", "measured": float(measured), "limit": limit, "held": held}

    def at_least(name: str, measured: float, limit: float) -> dict[str, Any]:
        held = bool(measured >= limit)
        return {
            "name": name,
            "target": f"at least {limit:g}x",
            "measured": float(measured),
            "limit": limit,
            "held": held,
        }

    names = {key: network["label"] for key, network in networks.items()}
    large, rounded = names["egru_blocks"], max(ROUNDED, key=lambda name: ratio["egru_blocks", name])
    whole = [at_most("whole demonstration, seconds", summary["seconds"]["total"], 300.0, "300 s")] if timed else []
    return [
        *(
            at_most(
                f"{names[k]}: bits per character against {names['gru']}",
                networks[k]["bits_per_char_vs_dense"],
                1.02,
                "1.02 times",
            )
            for k in ("egru", "egru_blocks")
        ),
        at_most(f"{names['egru']}: event rate", networks["egru"]["event_rate"], 0.11, "0.11"),
        at_most(f"{large}: event rate", networks["egru_blocks"]["event_rate"], 0.06, "0.06"),
        at_least(f"{names['egru']}: whole byte against the fastest rival", ratio["egru", rivals.OWN], 3.0),
        at_least(f"{large}: whole byte against the fastest rival", ratio["egru_blocks", rivals.OWN], 6.0),
        at_least(f"{large}, {rounded}: whole byte against the fastest rival", ratio["egru_blocks", rounded], 10.0),
        *whole,
    ]


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}
