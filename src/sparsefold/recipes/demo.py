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
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sparsefold import report
from sparsefold.bench import provenance
from sparsefold.data import ByteCorpus, load_text
from sparsefold.data.text import decode
from sparsefold.engine import Engine
from sparsefold.language import evaluate, generate
from sparsefold.lowering import compile_model
from sparsefold.nn import Stack
from sparsefold.program import Program, write_atomically
from sparsefold.recipes import rivals, text
from sparsefold.recipes._checkpoint import make_folder

# The longest training first, so that two cores finish together. Learning rates: results/text/lr-search.json.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "egru_blocks": ("event GRU 256, 25 % of blocks", {"cell": "egru", "density": 0.25, "lr": 2e-2}),
    "egru": ("event GRU 256", {"cell": "egru"}),
    "gru": ("dense GRU 256", {"cell": "gru"}),
}
OWN_FILES = ("summary.json", "report.html", *(f"{key}.sfold" for key in NETWORKS))  # and a folder for each network
STEPS = text.Config().steps
RATE_BLOCK = 256  # bytes per point of the event rate over time
SAMPLE = 300


class DemoError(RuntimeError):
    """A training that failed."""


def demo(folder: Path, fresh: bool = False, steps: int | None = None) -> dict[str, Any]:
    """Runs all of it, prints one table, writes ``summary.json`` (docs/results.md) and ``report.html``; returns the summary.

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
    print(
        f"Text: {corpus.source}, {sum(map(len, (corpus.train, corpus.valid, corpus.test))):,} bytes. Training {len(NETWORKS)}"
    )
    print(
        f"networks for {steps} steps each, two at a time, one core each; two to four minutes on most machines.",
        flush=True,
    )
    resumed = any((folder / key / "last.safetensors").exists() for key in NETWORKS)
    _train_all(folder, steps)
    trained = time.monotonic()

    torch.set_num_threads(1)
    models: dict[str, Stack] = {}
    programs: dict[str, Program] = {}
    networks: dict[str, dict[str, Any]] = {}
    print("Compiling, and reading the test split with each compiled file ...", flush=True)
    for key in ("gru", "egru", "egru_blocks"):
        models[key], facts = text.load(folder / key)
        compile_model(models[key], facts["about"]).save(folder / f"{key}.sfold")
        programs[key] = Program.load(folder / f"{key}.sfold")
        networks[key] = _describe(folder, key, programs[key], corpus)
    for network in networks.values():
        network["bits_per_char_vs_dense"] = network["bits_per_char"] / networks["gru"]["bits_per_char"]

    print("Checking every engine against torch, then timing them in turns ...", flush=True)
    bits = {key: network["bits_per_char"] for key, network in networks.items()}
    rows = rivals.measure(models, programs, bits, corpus.test)
    fastest = min((r for r in rows if r["rival"]), key=lambda r: r["latency_us"]["p50"])
    for row in rows:
        row["ratio_to_fastest_rival"] = fastest["latency_us"]["p50"] / row["latency_us"]["p50"]
    sample = _play(programs["egru_blocks"], corpus)

    summary = {
        "schema": "sparsefold-demo/1",
        "provenance": {
            **provenance("sparsefold demo" + (f" --steps {steps}" if steps != STEPS else "")),
            **_versions(),
        },
        "corpus": corpus.to_dict(),
        "seconds": {
            "training": round(sum(n["seconds"] for n in networks.values()), 1),
            "measuring": round(time.monotonic() - trained, 1),
            "total": round(time.monotonic() - began, 1),
        },
        "networks": networks,
        "rows": rows,
        "fastest_rival": {
            "network": fastest["network"],
            "engine": fastest["engine"],
            "p50": fastest["latency_us"]["p50"],
        },
        "sample": sample,
    }
    summary["targets"] = _targets(summary, resumed)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    report.write_report(summary, folder / "report.html")
    print(report.table(summary))
    print(f"\n{folder / 'summary.json'} and {folder / 'report.html'} hold all of it.")
    return summary


def _need_extras() -> None:
    missing = [
        name for name in ("onnx", "onnxruntime", "openvino", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'sparsefold[train,bench,report]'.")


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, and nothing else that may lie there."""
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for key in NETWORKS:
        if (folder / key / "log.jsonl").exists() or (folder / key / "last.safetensors").exists():
            shutil.rmtree(folder / key)


def _train_all(folder: Path, steps: int) -> None:
    """Trains every network in a process of its own, two at a time, and shows their progress."""
    waiting = deque(NETWORKS)
    running: dict[str, subprocess.Popen[str]] = {}
    relays: dict[str, threading.Thread] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                key = waiting.popleft()
                words = [f"{k}={v}" for k, v in {"steps": steps, **NETWORKS[key][1]}.items()]
                command = [sys.executable, "-m", "sparsefold.cli", "train", "text", *words, "--out", str(folder / key)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
                )
                assert process.stdout is not None  # it is a pipe
                relays[key] = threading.Thread(target=_relay, args=(key, process.stdout), daemon=True)
                relays[key].start()
                running[key] = process
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    if process.returncode == 130:
                        raise KeyboardInterrupt("interrupted; what was trained is saved.")
                    if process.returncode:
                        raise DemoError(f"training {key} failed with status {process.returncode}; see the lines above.")
            time.sleep(0.1)
    finally:
        for process in running.values():  # where Ctrl-C reached them too, they are saving already and go on with it
            process.terminate()
        for process in running.values():
            process.wait()
        for relay in relays.values():  # their last lines come before what is said about them
            relay.join()


def _relay(key: str, lines: IO[str]) -> None:
    with lines:
        for line in lines:
            print(f"  {key:<12} {line.rstrip().removeprefix('text ')}", flush=True)


def _describe(folder: Path, key: str, program: Program, corpus: ByteCorpus) -> dict[str, Any]:
    """Quality, rates and counted cost of a network, from one pass of its compiled file over the test split."""
    stream = Engine(program).stream()
    bits = evaluate(stream, corpus.test)
    counters, total = stream.counters, stream.cost
    summary = json.loads((folder / key / "summary.json").read_text())
    egru = next(iter(counters.events), None)
    described: dict[str, Any] = {
        "label": NETWORKS[key][0],
        "config": summary["config"],
        "seconds": summary["seconds"],
        "bits_per_char": bits,
        "valid_bits_per_char": summary["valid_bits_per_char"],
        "train_bits_per_char": summary["train_bits_per_char"],
        "event_rate": 1.0 if egru is None else counters.event_rate(),
        "density": next(p.density for p in total.parts if p.role == "recurrent"),
        "file_bytes": (folder / f"{key}.sfold").stat().st_size,
        "cost": total.to_dict(),
        "log": [json.loads(line) for line in (folder / key / "log.jsonl").read_text().splitlines()],
        "event_rate_per_unit": None,
        "event_rate_over_time": None,
        "event_rate_block": RATE_BLOCK,
        "raster": None,
    }
    if egru is not None:
        emitted = Engine(program).stream().run_traced(corpus.test)[1][egru]
        blocks = emitted[: len(emitted) // RATE_BLOCK * RATE_BLOCK].reshape(-1, RATE_BLOCK * emitted.shape[1])
        described["event_rate_per_unit"] = (counters.events[egru] / counters.steps).round(4).tolist()
        described["event_rate_over_time"] = blocks.mean(1).round(4).tolist()
        stretch = slice(1000, 1096)
        described["raster"] = {
            "text": decode(corpus.test[stretch], corpus.vocabulary).decode("latin-1"),
            "events": [np.flatnonzero(step).tolist() for step in emitted[stretch]],
        }
    return described


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


def _targets(summary: dict[str, Any], resumed: bool) -> list[dict[str, Any]]:
    """What was promised. A resumed demonstration says nothing of its whole time."""
    networks = summary["networks"]
    ratio = {r["network"]: r["ratio_to_fastest_rival"] for r in summary["rows"] if r["engine"] == "sparsefold"}

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

    quality = networks["egru"]["bits_per_char_vs_dense"]
    whole = [] if resumed else [at_most("whole demonstration, seconds", summary["seconds"]["total"], 300.0, "300 s")]
    return [
        at_most("event GRU: bits per character against the dense GRU", quality, 1.03, "1.03 times"),
        at_most("event GRU: event rate", networks["egru"]["event_rate"], 0.11, "0.11"),
        at_least("event GRU: whole byte against the fastest rival", ratio["egru"], 3.5),
        at_least("event GRU, 25 % of blocks: whole byte against the fastest rival", ratio["egru_blocks"], 5.0),
        *whole,
    ]


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}
