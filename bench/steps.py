"""Time of one whole step of recurrent networks, ours sparse twice, the rivals dense: ``python bench/steps.py``.

Weights are random, in blocks of 16x1; thresholds are set so that about the wanted share of units speaks; nothing is trained, so
that nothing is said of quality here. Every engine is compared with its reference first; then all take turns on the same inputs,
one pinned thread, state moving, Python call included.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sparsefold.bench import pinned, provenance, race, write_lines
from sparsefold.cost import cost
from sparsefold.engine import Engine, interpret
from sparsefold.formats import Block, Dense, Format, Precision
from sparsefold.nn import Stack
from sparsefold.program import EGRU, Program
from sparsefold.recipes import rivals

# units, layers, density, event rate wanted, steps timed
NETWORKS = [(128, 1, 0.1, 0.1, 5000), (256, 1, 0.1, 0.1, 5000), (512, 1, 0.1, 0.1, 3000), (1350, 3, 0.1, 0.1, 1000)]
PARITY_STEPS = 20
PRECISIONS: tuple[Precision, ...] = ("f32", "bf16", "i8")


def matrix(units: int, density: float, random: np.random.Generator) -> Format:
    """Random weights 3H x H in blocks of 16x1, scaled so that the state moves."""
    kept = random.random((3, -(-units // 16), units)) < density
    weight = random.standard_normal((3, units, units)) * 3 / np.sqrt(units * density)
    weight *= np.repeat(kept, 16, 1)[:, :units]
    flat = weight.astype(np.float32).reshape(3 * units, units)
    return Dense.from_dense(flat, 3) if density == 1 else Block.from_dense(flat, (16, 1), 3)


def network(units: int, layers: int, density: float, rate: float, random: np.random.Generator) -> Program:
    """EGRU layers whose units speak at about ``rate``: thresholds are quantiles of u, found layer by layer."""
    ops: list[Any] = []
    x = random.standard_normal((300, units)).astype(np.float32)
    for k in range(layers):
        weights = matrix(units, density, random), matrix(units, density, random)
        biases = np.zeros(3 * units, np.float32), np.zeros(3 * units, np.float32)
        output = "state" if k == layers - 1 else "events"
        theta = np.zeros(units, np.float32)
        for _ in range(6):
            program = Program((*ops, EGRU(*weights, *biases, threshold=theta, reset="none", output=output)))
            stream = Engine(program).stream()
            stream.run(x[:100])
            u = np.array([stream.step(v) * 0 + stream.internal(k) for v in x[100:]])
            theta = np.maximum(np.quantile(u, 1 - rate, axis=0), 1e-3).astype(np.float32)
        ops.append(EGRU(*weights, *biases, threshold=theta, reset="none", output=output))
    return Program(tuple(ops))


def check(program: Program, inputs: list[Any]) -> float:
    """Largest error of a step of the engine against the float64 oracle, from the oracle's own state."""
    stream, state, worst = Engine(program).stream(), None, 0.0
    for x in inputs[:PARITY_STEPS]:
        if state:
            stream.load_state(state)
        seen = interpret(program, [x], state)
        worst = max(worst, float(np.abs(stream.step(x) - seen.outputs[0]).max()))
        state = {k: v.astype(np.float32) for k, v in seen.state.items()}
    if worst > 1e-3:
        raise RuntimeError(f"the engine is {worst:.1e} off: nothing is timed.")
    return worst


def opponents(units: int, layers: int) -> dict[str, Any]:
    """Every rival on the dense GRU and LSTM of that size."""
    players = {}
    for kind in (torch.nn.GRU, torch.nn.LSTM):
        model = Stack(kind(units, units, layers)).eval()
        made = [rivals.onnx_runtime(model), rivals.openvino(model), rivals.torch_eager(model), rivals.torch_int8(model)]
        if kind is torch.nn.LSTM:
            made.append(rivals.onnx_runtime(model, int8=True))
        x = np.random.default_rng(0).standard_normal((PARITY_STEPS, units)).astype(np.float32)
        expected = model(torch.from_numpy(x)[:, None])[0][:, 0].detach().numpy()
        for rival in made:
            error = float(np.abs(np.array([rival.call(v).copy() for v in x]) - expected).max())
            if error > (0.1 if "int8" in rival.name else 1e-4):
                raise RuntimeError(f"{rival.name} is {error:.1e} off: nothing is timed.")
            players[f"{kind.__name__}, {rival.name}"] = rival
    return players


def measure(units: int, layers: int, density: float, rate: float, steps: int) -> list[dict[str, Any]]:
    """One race, as lines."""
    random = np.random.default_rng(units)
    program = network(units, layers, density, rate, random)
    inputs = list(random.standard_normal((steps, units)).astype(np.float32))
    ours = {f"ours, {p}": program.rounded(p) for p in PRECISIONS}
    errors = {name: check(rounded, inputs) for name, rounded in ours.items()}
    streams = {name: Engine(rounded).stream() for name, rounded in ours.items()}
    against = opponents(units, layers)
    players = {n: s.step for n, s in streams.items()} | {n: r.call for n, r in against.items()}
    with pinned():
        times = race(players, inputs, rounds=10, warmup=50)
    yardsticks = {
        "ratio_to_fastest_f32": min(t.p50 for n, t in times.items() if n in against and "int8" not in n),
        "ratio_to_fastest_int8": min(t.p50 for n, t in times.items() if n in against and "int8" in n),
    }
    lines = []
    for name, latency in times.items():
        line: dict[str, Any] = {"units": units, "layers": layers, "engine": name, "latency_us": latency.to_dict()}
        line |= {key: fastest / latency.p50 for key, fastest in yardsticks.items()}
        if name in ours:
            stream = streams[name]
            total = cost(ours[name], stream.counters)
            line |= {"density": density, "event_rate": stream.counters.event_rate(), "cost": total.to_dict()}
            line["settings"] = f"{stream.engine.isa}, 1 thread, largest error of a step {errors[name]:.1e}"
        else:
            line["settings"] = against[name].settings
        lines.append(line)
    return lines


def main() -> None:
    """Runs every network and writes bench/results/<machine>/steps-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--units", type=int, default=None, help="only this size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = provenance("python bench/steps.py")
    lines = []
    with threadpool_limits(1):
        for shape in NETWORKS:
            if args.units in (None, shape[0]):
                lines += measure(*shape)
                for e in lines:
                    if e["units"] == shape[0]:
                        latency, float32, int8 = e["latency_us"], e["ratio_to_fastest_f32"], e["ratio_to_fastest_int8"]
                        print(
                            f"H {e['units']} x{e['layers']}  {e['engine']:<26}{latency['p50']:>10.2f} us "
                            f"p99 {latency['p99']:>10.2f}  {float32:>7.1f}x of float32, {int8:>6.1f}x of int8",
                            flush=True,
                        )
    print(write_lines(args.out, "steps-", about, lines))


if __name__ == "__main__":
    main()
