"""Time of one whole step of recurrent networks, ours sparse twice, the rivals dense: ``python bench/steps.py``.

Weights are random, in blocks of 16x1; thresholds are set so that about the wanted share of units speaks; nothing is trained, so
that nothing is said of quality here. Every engine is compared with its reference first; then all take turns on the same inputs,
one pinned thread, state moving, Python call included. The small networks, where that call weighs most, are played from C too,
through the C library and as exported C.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sparsefold.bench import Latency, pinned, provenance, race, write_lines
from sparsefold.cost import cost
from sparsefold.engine import Engine, interpret
from sparsefold.export_c import write_c
from sparsefold.formats import Block, Dense, Format, Precision
from sparsefold.nn import Stack
from sparsefold.program import EGRU, Events, Program
from sparsefold.recipes import rivals

ROOT = Path(__file__).resolve().parent.parent
# units, layers, density, event rate wanted, share of x that is not zero, steps timed
NETWORKS = [
    (128, 1, 0.1, 0.1, 1.0, 5000), (256, 1, 0.1, 0.1, 1.0, 5000), (512, 1, 0.1, 0.1, 1.0, 3000),
    (1350, 3, 0.1, 0.1, 1.0, 1000), (1350, 3, 0.1, 0.1, 0.1, 1000),
]  # fmt: skip
LARGEST_FROM_C = 512  # units of one layer
PARITY_STEPS = 20
WARMUP = 50
PRECISIONS: tuple[Precision, ...] = ("f32", "bf16", "i8", "w8a8")
FROM_C: tuple[Precision, ...] = ("f32", "i8")


def matrix(units: int, density: float, random: np.random.Generator) -> Format:
    """Random weights 3H x H in blocks of 16x1, scaled so that the state moves."""
    kept = random.random((3, -(-units // 16), units)) < density
    weight = random.standard_normal((3, units, units)) * 3 / np.sqrt(units * density)
    weight *= np.repeat(kept, 16, 1)[:, :units]
    flat = weight.astype(np.float32).reshape(3 * units, units)
    return Dense.from_dense(flat, 3) if density == 1 else Block.from_dense(flat, (16, 1), 3)


def sequence(steps: int, units: int, input_rate: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Normal values (steps, units) of which a share ``input_rate`` is not zero."""
    x = random.standard_normal((steps, units)).astype(np.float32)
    return x if input_rate == 1 else x * (random.random(x.shape) < input_rate)


def network(
    units: int, layers: int, density: float, rate: float, input_rate: float, random: np.random.Generator
) -> Program:
    """EGRU layers whose units speak at about ``rate``: thresholds are quantiles of u, found layer by layer."""
    ops: list[Any] = [Events(units)] if input_rate < 1 else []
    x = sequence(300, units, input_rate, random)
    for k in range(layers):
        weights = matrix(units, density, random), matrix(units, density, random)
        biases = np.zeros(3 * units, np.float32), np.zeros(3 * units, np.float32)
        output = "state" if k == layers - 1 else "events"
        theta = np.zeros(units, np.float32)
        for _ in range(6):
            program = Program((*ops, EGRU(*weights, *biases, threshold=theta, reset="none", output=output)))
            stream = Engine(program).stream()
            stream.run(x[:100])
            u = np.array([stream.step(v) * 0 + stream.internal(len(ops)) for v in x[100:]])
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


def tool(name: str) -> str:
    """A program beside this Python, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is not installed: the timer in C is built with it.")
    return found


def shell(*words: object) -> str:
    """What a command prints; what it complains of is the error."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def c_library(folder: Path) -> Path:
    """The static C library, built in ``folder`` as docs/c-api.md says."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    shell(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", ninja, "-DSPARSEFOLD_PYTHON=OFF")
    shell(tool("cmake"), "--build", folder, "--target", "sparsefold_static")
    return folder / "libsparsefold.a"


class FromC:
    """A program played by bench/steps.c, whose first outputs are compared with those of the engine when it is made.

    Args:
        program: what to play; it takes values.
        inputs: all that is played, (T, inputs).
        folder: where its files go.
        library: the C library; None plays what ``sparsefold export-c`` writes instead.
    """

    def __init__(self, program: Program, inputs: NDArray[np.float32], folder: Path, library: Path | None) -> None:
        folder.mkdir()
        self.words = [folder / "steps", folder / "net.sfold", folder / "inputs", PARITY_STEPS, WARMUP]
        self.times: list[NDArray[np.int64]] = []
        program.save(self.words[1])
        inputs.tofile(self.words[2])
        timer = [ROOT / "bench/steps.c", "-o", self.words[0]]
        if library:
            shell(tool("cc"), "-std=c99", "-O2", "-I", ROOT / "include", *timer, library, "-lstdc++", "-lm", "-pthread")
        else:
            _, source = write_c(program, folder, "net")
            flags = ["-O3", "-march=native"]
            shell(tool("cc"), *flags, "-DEXPORTED", "-I", folder, *timer, source, "-lm")
        outputs = np.array(self.play()["outputs"], np.float32).reshape(PARITY_STEPS, -1)
        worst = float(np.abs(outputs - Engine(program).stream().run(inputs[:PARITY_STEPS])).max())
        if not worst <= (1e-3 if library is None else 0):  # the library gives the engine's own bits
            raise RuntimeError(f"the program in C is {worst:.1e} off: nothing is timed.")
        compiler = shell(tool("cc"), "--version").splitlines()[0]
        how = f"{compiler}, {' '.join(flags)}" if library is None else "through include/sparsefold.h"
        self.settings = f"1 thread, {how}, largest difference from the engine {worst:.1e}"

    def play(self) -> dict[str, Any]:
        """What one run of the timer prints."""
        return dict(json.loads(shell(*self.words)))

    def turn(self) -> None:
        """All inputs once."""
        self.times.append(np.array(self.play()["ns"], np.int64))

    @property
    def latency(self) -> Latency:
        """Of all turns."""
        return Latency.of(np.concatenate(self.times))


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


def measure(
    units: int, layers: int, density: float, rate: float, input_rate: float, steps: int
) -> list[dict[str, Any]]:
    """One race, as lines."""
    random = np.random.default_rng(units)
    program = network(units, layers, density, rate, input_rate, random)
    values = sequence(steps, units, input_rate, random)
    inputs = list(values)
    ours = {f"ours, {p}": program.rounded(p) for p in PRECISIONS}
    errors = {name: check(rounded, inputs) for name, rounded in ours.items()}
    streams = {name: Engine(rounded).stream() for name, rounded in ours.items()}
    against = opponents(units, layers)
    players = {n: s.step for n, s in streams.items()} | {n: r.call for n, r in against.items()}
    with tempfile.TemporaryDirectory() as name:
        c: dict[str, FromC] = {}
        if layers == 1 and units <= LARGEST_FROM_C:
            folder, library = Path(name), c_library(Path(name) / "library")
            for p in FROM_C:
                c[f"ours, {p}, from C"] = FromC(program.rounded(p), values, folder / f"c-{p}", library)
            for p in FROM_C:
                c[f"ours, {p}, exported C"] = FromC(program.rounded(p), values, folder / f"exported-{p}", None)
        # A process of their own cannot take part in the race: they play on the same processor, before it and after it.
        with pinned():
            for timer in c.values():
                timer.turn()
            times = race(players, inputs, rounds=10, warmup=WARMUP)
            for timer in c.values():
                timer.turn()
    times |= {n: timer.latency for n, timer in c.items()}
    yardsticks = {
        "ratio_to_fastest_f32": min(t.p50 for n, t in times.items() if n in against and "int8" not in n),
        "ratio_to_fastest_int8": min(t.p50 for n, t in times.items() if n in against and "int8" in n),
    }
    lines = []
    for name in [*ours, *c, *against]:
        latency = times[name]
        line: dict[str, Any] = {"units": units, "layers": layers, "input_rate": input_rate, "engine": name}
        line["latency_us"] = latency.to_dict()
        line |= {key: fastest / latency.p50 for key, fastest in yardsticks.items()}
        if name not in against:
            played = ", ".join(name.split(", ")[:2])  # counted by the engine, which played the same inputs
            stream = streams[played]
            total = cost(ours[played], stream.counters)
            line |= {"density": density, "event_rate": stream.counters.event_rate(), "cost": total.to_dict()}
        if name in ours:
            line["settings"] = f"{stream.engine.isa}, 1 thread, largest error of a step {errors[name]:.1e}"
        elif name in c:
            line["settings"] = c[name].settings
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
                measured = measure(*shape)
                lines += measured
                for e in measured:
                    latency, float32, int8 = e["latency_us"], e["ratio_to_fastest_f32"], e["ratio_to_fastest_int8"]
                    print(
                        f"H {e['units']} x{e['layers']}  {e['engine']:<26}{latency['p50']:>10.2f} us "
                        f"p99 {latency['p99']:>10.2f}  {float32:>7.1f}x of float32, {int8:>6.1f}x of int8",
                        flush=True,
                    )
    print(write_lines(args.out, "steps-", about, lines))


if __name__ == "__main__":
    main()
