"""A whole byte of text, from token to logits: an event GRU with few weights, decoder included, against a dense GRU of equal size.

Train both, then measure them in one race, Python call included, one pinned thread, state moving:

    sparsefold train text cell=gru hidden=512 lr=0.0035 --out runs/gru512
    sparsefold train text hidden=512 density=0.1 decoder_density=0.25 --out runs/egru512
    python bench/whole_byte.py runs/gru512 runs/egru512

Quality is that of each compiled file on the test split. What a Python call costs is named apart: the same bytes played by one
``Stream.run``, which crosses into the library once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import check
from threadpoolctl import threadpool_limits

from sparsefold.bench import pinned, provenance, race, write_lines
from sparsefold.cli import evaluate
from sparsefold.data import load_text
from sparsefold.engine import Engine, Stream
from sparsefold.formats import VALUE_TYPES
from sparsefold.lowering import compile_model
from sparsefold.recipes import rivals, text

BYTES = 20_000
PARITY = 300


def inside(stream: Stream, tokens: np.ndarray, rounds: int = 20) -> float:
    """Microseconds of a byte without Python between the bytes, median over shares of the text."""
    times = []
    for share in np.array_split(tokens, rounds):
        start = time.perf_counter_ns()
        stream.run(share)
        times.append((time.perf_counter_ns() - start) / len(share) / 1e3)
    return float(np.median(times))


def main() -> None:
    """Measures and writes bench/results/<machine>/byte-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="folder of the trained dense GRU")
    parser.add_argument("sparse", type=Path, help="folder of the trained event GRU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, corpus = provenance("python bench/whole_byte.py"), load_text(None)
    tokens = corpus.test[:BYTES]
    lines: list[dict[str, Any]] = []
    streams: dict[str, Stream] = {}
    with threadpool_limits(1):
        dense, _ = text.load(args.dense)
        for folder in (args.dense, args.sparse):
            model, facts = text.load(folder)
            config = facts["about"]["config"]
            for precision in VALUE_TYPES if folder == args.sparse else ("f32", "w8a8"):
                program = compile_model(model, weights=precision)  # type: ignore[arg-type]
                engine = Engine(program)
                worst = check(program, tokens[:PARITY].tolist())
                name = f"ours, {config['cell']}, {precision}"
                streams[name] = engine.stream()
                counted = engine.stream()
                lines.append(
                    {
                        "engine": name,
                        "network": {
                            k: config[k] for k in ("cell", "hidden", "density", "decoder_density", "lr", "steps")
                        },
                        "bits_per_char": evaluate(counted, corpus.test),
                        "event_rate": counted.counters.event_rate(),
                        "cost": counted.cost.to_dict(),
                        "file_bytes": len(program.to_bytes()),
                        "settings": f"{engine.isa}, 1 thread, largest error of a step {worst:.1e}",
                    }
                )
        opponents = [
            rivals.onnx_runtime(dense),
            rivals.openvino(dense),
            rivals.torch_eager(dense),
            rivals.torch_int8(dense),
        ]
        bits = next(e["bits_per_char"] for e in lines if e["network"]["cell"] == "gru")
        for rival in opponents:
            lines.append({"engine": f"dense GRU, {rival.name}", "bits_per_char": bits, "settings": rival.settings})
        players = {n: s.step for n, s in streams.items()} | {f"dense GRU, {r.name}": r.call for r in opponents}
        with pinned():
            latencies = race(players, tokens.tolist(), rounds=20, warmup=500)
            without_python = {name: inside(stream, tokens) for name, stream in streams.items()}
    fastest = min(latencies[f"dense GRU, {r.name}"].p50 for r in opponents)
    for line in lines:
        latency = latencies[line["engine"]]
        line |= {"latency_us": latency.to_dict(), "ratio_to_fastest_rival": fastest / latency.p50}
        if line["engine"] in without_python:
            line["inside_us"] = without_python[line["engine"]]
            line["call_share"] = 1 - line["inside_us"] / latency.p50
        print(
            f"{line['engine']:<28}{latency.p50:>8.2f} us{line['ratio_to_fastest_rival']:>7.1f}x {line.get('inside_us', 0):.2f}"
        )
    print(write_lines(args.out, "byte-", about, lines))


if __name__ == "__main__":
    main()
