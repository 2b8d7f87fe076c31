"""Time of forward and backward of one recurrent layer in training, ours by events, rivals dense: ``python bench/training.py``.

Weights, inputs and states are random. Per-unit biases of the candidate are drawn wide (standard deviation 2.3) and shifted until
the wanted share of units speaks, so that most silent units lie far below their threshold, as in a trained network: β is the share
of (unit, step, sample) whose ∂L/∂y is needed, those that spoke or whose surrogate is not zero. β = 1 takes a surrogate
as wide as all of u. A row in blocks has both weights pruned to 10 % of their 16 x 1 blocks and marked by the pruner; its biases
are found after. Float64 gradients of the kernels are compared with the reference's first. Every layer takes turns, all threads of
torch in use; medians over the turns; the gradient of x is not asked for, as of a first layer, unless a line says so.

Memory is that of a fresh process each: the kernel's high-water mark of resident memory (VmHWM, reset before) over one forward and
backward after a short warm-up, less what was resident before; torch's allocations are seen by it, as all others.

``--choices``: what choices of the kernels are worth, each beside what it was chosen over: threads of our own or those that
torch has (one layer, all threads), and torch's product as it comes or by oneDNN where MKL leaves AVX-512 alone, else
in padded rows (one thread, the two products of gradients).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from sparsefold import _native, nn
from sparsefold.bench import provenance, write_lines
from sparsefold.nn import EGRU, Triangle
from sparsefold.progress import Progress
from sparsefold.sparsify import Block, Pruner

STEPS, SEED, TURNS = 70, 0, 5
WIDE = Triangle(height=0.5, half_width=8.0)  # of every u
RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
RIVALS = ("nn.GRU", "nn.LSTM", "unrolled loop", "every unit speaks, events in x", "ours, events in x")
OTHERS = ((1350, 64), (256, 1), (256, 8), (256, 64), (512, 1), (512, 8), (512, 64))  # units, batch


def layer(
    units: int, batch: int, rate: float, x: Tensor, surrogate: Triangle, density: float = 1.0, **options: Any
) -> EGRU:
    """An EGRU whose units speak at about ``rate`` on x: the mean of the candidates' biases is found by halving."""
    torch.manual_seed(SEED)
    made = EGRU(units, units, surrogate=surrogate, **options)
    if density < 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a block does not divide 1350: the last ones are short
            made.pruner = Pruner(made, {"weight*": Block(density=density, block=(16, 1))})  # type: ignore[assignment]
        made.pruner.step()  # type: ignore[operator]
    drawn = 2.3 * torch.randn(units)
    low, high = -12.0, 12.0
    with torch.no_grad():
        for _ in range(12 if rate < 1 else 0):
            middle = (low + high) / 2
            made.bias_ih_l0[2 * units :] = drawn + middle
            spoke = (made(x[:20], None)[0] != 0).float().mean().item()
            low, high = (middle, high) if spoke < rate else (low, middle)
    return made


def needed(made: EGRU, x: Tensor) -> tuple[float, float]:
    """(event rate, β) on x."""
    with torch.no_grad():
        trace = made._run("_l0", x, *(torch.zeros(x.shape[1], made.hidden_size),) * 2)
        o, v = trace.o != 0, trace.u - made.threshold_l0
        return o.float().mean().item(), (o | (made.surrogate(v) != 0)).float().mean().item()


def gate() -> None:
    """Every gradient of the kernels in float64 against the reference's, or nothing is timed."""
    torch.manual_seed(SEED)
    x = torch.randn(12, 3, 40, dtype=torch.float64) * (torch.rand(12, 3, 40) < 0.3)
    made = EGRU(40, 50, learn_threshold=True).double()
    gradients = []
    for backend in ("native", "reference"):
        made.backend = backend  # type: ignore[assignment]
        made.zero_grad()
        (made(x)[0] * torch.linspace(-1, 1, 50, dtype=torch.float64)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    if not torch.allclose(*gradients, rtol=0, atol=1e-10 * gradients[1].abs().max().item()):
        raise RuntimeError("the kernels' gradients differ from the reference's: nothing is timed.")


def once(module: torch.nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], tuple[float, float]]:
    """A call that gives seconds of one forward and of its backward."""

    def call() -> tuple[float, float]:
        module.zero_grad()
        start = time.perf_counter()
        out = module(x)[0]
        middle = time.perf_counter()
        out.backward(cotangent)
        return middle - start, time.perf_counter() - middle

    return call


def race(units: int, batch: int, wanted: dict[str, tuple[Any, Tensor]], progress: Progress, done: int) -> list[Any]:
    """Lines of layers that take turns; the fastest rival is the yardstick of each."""
    cotangent = torch.randn(STEPS, batch, units)
    calls = {name: once(module, x, cotangent) for name, (module, x) in wanted.items()}
    for call in calls.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(TURNS):
        for name, call in calls.items():
            times[name].append(call())
        progress.update(done * TURNS + turn + 1, f"H = {units}, batch {batch}")
    lines = []
    for name, (module, x) in wanted.items():
        forward, backward = np.median(times[name], 0) * 1e3
        total = float(np.median(np.sum(times[name], 1)) * 1e3)
        line = {
            "layer": name,
            "units": units,
            "batch": batch,
            "steps": STEPS,
            "x_density": (x != 0).float().mean().item(),
        }
        line |= {
            "ms": total,
            "forward_ms": float(forward),
            "backward_ms": float(backward),
            "x_gradient": x.requires_grad,
        }
        if isinstance(module, EGRU):
            rate, beta = needed(module, x.detach())
            line |= {"event_rate": rate, "beta": beta, "backend": module.backend}
        lines.append(line)
    for line in lines:
        for rival in RIVALS:
            if rival in wanted:
                line[f"against {rival}"] = next(e["ms"] for e in lines if e["layer"] == rival) / line["ms"]
    return lines


MEMORY: dict[str, Callable[[Tensor], torch.nn.Module]] = {
    "ours, tape full": lambda x: EGRU(1350, 1350),
    "ours, tape recompute": lambda x: EGRU(1350, 1350, tape="recompute"),
    "ours, tape full, 10 % of the blocks": lambda x: layer(1350, 20, 0.1, x, Triangle(), 0.1),
    "unrolled loop": lambda x: EGRU(1350, 1350, backend="reference"),
    "nn.GRU": lambda x: torch.nn.GRU(1350, 1350),
    "nn.LSTM": lambda x: torch.nn.LSTM(1350, 1350),
}


def resident(what: str) -> int:
    """Bytes of this process, VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def memory(name: str) -> dict[str, Any]:
    """One forward and backward of a layer in this process: the peak, and what is kept in between, less x, weights and masks."""
    torch.manual_seed(SEED)
    x = torch.randn(STEPS, 20, 1350).abs() * (torch.rand(STEPS, 20, 1350) < 0.1)
    module = MEMORY[name](x)
    module(x[:4])[0].sum().backward()
    module.zero_grad()
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    given = [x, *module.parameters(), *getattr(getattr(module, "pruner", None), "masks", {}).values()]
    before_it = {t.untyped_storage().data_ptr() for t in given}
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = module(x)[0]
    out.backward(torch.ones_like(out))
    kept = sum(n for p, n in saved.items() if p not in before_it) if isinstance(module, EGRU) else None
    return {
        "layer": name, "memory": True, "units": 1350, "batch": 20, "steps": STEPS, "peak_mb": (resident("VmHWM") - before) / 1e6,
        "kept_bytes_per_step_unit_sample": None if kept is None else kept / (STEPS * 20 * 1350),
    }  # fmt: skip


def main() -> None:
    """Measures and writes bench/results/<machine>/training-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--dense-cells", action="store_true", help="GRU, LSTM and RNN in place of the EGRU")
    parser.add_argument("--choices", action="store_true", help="whose threads, and rows of products")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # what a child measures
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return
    about = provenance("python bench/training.py") | {"threads": torch.get_num_threads(), "seed": SEED}
    if args.dense_cells:
        return dense_cells(args.out, about | {"command": "python bench/training.py --dense-cells"})
    if args.choices:
        return choices(args.out, about | {"command": "python bench/training.py --choices"})
    gate()
    lines: list[dict[str, Any]] = []
    with Progress((2 + len(OTHERS)) * TURNS, "training") as progress:

        def inputs(units: int, batch: int) -> tuple[Tensor, Tensor]:
            torch.manual_seed(SEED)
            x = torch.randn(STEPS, batch, units)
            return x, x.abs() * (torch.rand(x.shape) < 0.1)

        def race_of(units: int, batch: int) -> dict[str, tuple[Any, Tensor]]:
            x, events = inputs(units, batch)
            learned = events.clone().requires_grad_()
            return {
                "ours, dense x": (layer(units, batch, 0.1, x, Triangle()), x),
                "ours, events in x": (layer(units, batch, 0.1, events, Triangle()), events),
                "ours, events in x, with its gradient": (layer(units, batch, 0.1, events, Triangle()), learned),
                "ours, dense x, β = 1": (layer(units, batch, 0.1, x, WIDE), x),
                "ours, events in x, β = 1": (layer(units, batch, 0.1, events, WIDE), events),
                "ours, dense x, 10 % of the blocks": (layer(units, batch, 0.1, x, Triangle(), 0.1), x),
                "ours, events in x, 10 % of the blocks": (layer(units, batch, 0.1, events, Triangle(), 0.1), events),
                "ours, events in x, with its gradient, 10 % of the blocks": (
                    layer(units, batch, 0.1, events, Triangle(), 0.1), learned,
                ),
                "ours, events in x, with its gradient, β = 1, 10 % of the blocks": (
                    layer(units, batch, 0.1, events, WIDE, 0.1), learned,
                ),
                "ours, events in x, tape recompute": (
                    layer(units, batch, 0.1, events, Triangle(), tape="recompute"), events,
                ),
                "every unit speaks, events in x": (layer(units, batch, 1.0, events, WIDE, event="always"), events),
                "unrolled loop": (layer(units, batch, 0.1, events, Triangle(), backend="reference"), events),
                "nn.GRU": (torch.nn.GRU(units, units), x),
                "nn.LSTM": (torch.nn.LSTM(units, units), x),
            }  # fmt: skip

        lines += race(1350, 20, race_of(1350, 20), progress, 0)
        _, events = inputs(1350, 20)
        sweep = {
            f"ours at {rate:.0%}": (
                layer(1350, 20, rate, events, Triangle(), **({"event": "always"} if rate == 1 else {})), events,
            )
            for rate in RATES
        }  # fmt: skip
        lines += [line | {"sweep": True} for line in race(1350, 20, sweep, progress, 1)]
        for done, (units, batch) in enumerate(OTHERS, 2):
            lines += race(units, batch, race_of(units, batch), progress, done)
    for name in MEMORY:
        command = [sys.executable, __file__, "--memory", name]
        lines.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(write_lines(args.out, "training-", about, lines))
    for e in (e for e in lines if e.get("memory")):
        kept = e["kept_bytes_per_step_unit_sample"]
        print(f"{e['layer']:<38}{e['peak_mb']:>9.0f} MB at the peak{f', {kept:.1f} bytes kept' if kept else ''}")
    for e in (e for e in lines if not e.get("memory")):
        rates = f"events {e['event_rate']:.1%} β {e['beta']:.2f}" if "beta" in e else ""
        ratios = ", ".join(f"{v:.1f}x {k}" for k, v in e.items() if k.startswith("against"))
        print(f"H {e['units']:>5} B {e['batch']:>3} {e['layer']:<38}{e['ms']:>9.1f} ms {rates}  {ratios}")


def agree(name: str) -> None:
    """Every gradient of our cell against torch's, in float64 and, large enough for oneDNN, in float32; else nothing is timed."""
    for dtype, batch, units, tolerance in ((torch.float64, 3, 50, 1e-10), (torch.float32, 8, 256, 1e-4)):
        torch.manual_seed(SEED)
        x, gradients = torch.randn(12, batch, 200, dtype=dtype), []
        layers = [made(200, units).to(dtype) for made in (getattr(nn, name), getattr(torch.nn, name))]
        layers[0].load_state_dict(layers[1].state_dict())
        for made in layers:
            (made(x)[0] * torch.linspace(-1, 1, units, dtype=dtype)).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
        if not torch.allclose(*gradients, rtol=0, atol=tolerance * gradients[1].abs().max().item()):
            raise RuntimeError(f"our {name} differs from torch's in {dtype}: nothing is timed.")


def dense_cells(out: Path, about: dict[str, Any]) -> None:
    """Ours and torch's of the same name, with all weights and with a tenth of their blocks, all threads and one."""
    for name in ("GRU", "LSTM", "RNN"):
        agree(name)
    lines: list[dict[str, Any]] = []
    sizes = ((1350, 20), *OTHERS)
    threads = (torch.get_num_threads(), 1)
    with Progress(len(threads) * len(sizes) * TURNS, "dense cells") as progress:
        for done, (number, (units, batch)) in enumerate(itertools.product(threads, sizes)):
            torch.set_num_threads(number)
            torch.manual_seed(SEED)
            x = torch.randn(STEPS, batch, units)
            wanted = {}
            for name in ("GRU", "LSTM", "RNN"):
                own, rival = getattr(nn, name)(units, units), getattr(torch.nn, name)(units, units)
                few = getattr(nn, name)(units, units)
                Pruner(few, {"weight*": Block(density=0.1, block=(16, 1))}).step()
                wanted |= {f"nn.{name}": (rival, x), f"our {name}": (own, x), f"our {name}, 10 % of blocks": (few, x)}
            found = race(units, batch, wanted, progress, done)
            for line in found:
                own = line["layer"].removeprefix("nn.").removeprefix("our ").split(",")[0]
                rival_ms = next(e["ms"] for e in found if e["layer"] == f"nn.{own}")
                lines.append(line | {"threads": number, "ratio": rival_ms / line["ms"]})
    print(write_lines(out, "dense-cells-", about, lines))
    for e in lines:
        print(
            f"{e['threads']} threads, H {e['units']:>5} B {e['batch']:>3} {e['layer']:<25}{e['ms']:>9.1f} ms {e['ratio']:.2f}x"
        )


def choices(out: Path, about: dict[str, Any]) -> None:
    """Lines with the milliseconds of what is done and of what it was chosen over, forward and backward or the product alone."""
    lines: list[dict[str, Any]] = []
    teams = {"other": _native.Team(about["threads"], runtime=False), "chosen": _native.Team(about["threads"])}
    if not teams["chosen"].borrows:
        raise RuntimeError("torch brings no threads that could be borrowed: nothing is timed.")
    sizes = ((256, 1), (256, 8), (512, 1), (512, 8), (512, 64), (1350, 20))
    cells = ("GRU", "LSTM", "RNN", "EGRU")
    rows = ((1350, 1400), (700, 1400), (1344, 1400))  # units, steps times samples
    with Progress(len(sizes) + len(rows), "choices") as progress:
        for done, ((units, batch), cell) in enumerate(itertools.product(sizes, cells), 1):
            torch.manual_seed(SEED)
            x = torch.randn(STEPS, batch, units)
            if cell == "EGRU":
                x = x * (torch.rand(x.shape) < 0.1)
            call = once(getattr(nn, cell)(units, units, backend="native"), x, torch.randn(STEPS, batch, units))
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in teams}
            for turn in range(4 * TURNS + 1):
                for name, team in teams.items():
                    with patch.object(nn.native, "_team", lambda team=team: team):
                        found = call()
                    if turn:
                        times[name].append(found)
            middle = {name: (np.median(t, 0) * 1e3).tolist() for name, t in times.items()}
            line = {"choice": "threads", "layer": cell, "units": units, "batch": batch, "threads": about["threads"]}
            for part, way in enumerate(("forward", "backward")):
                lines.append(line | {"way": way} | {f"{name}_ms": ms[part] for name, ms in middle.items()})
            progress.update(done // len(cells), f"threads, H = {units}, batch {batch}")
        torch.set_num_threads(1)
        for done, (units, depth) in enumerate(rows, 1 + len(sizes)):
            g, x, w = (torch.randn(n, m) for n, m in ((depth, 4 * units), (depth, units), (4 * units, units)))
            for way, a, b in (("weight's gradient", g.t(), x), ("x's gradient", g, w)):
                into = torch.empty(len(a), units)
                products = {
                    "other": lambda a=a, b=b, into=into: torch.mm(a, b, out=into),
                    "chosen": lambda a=a, b=b, into=into: nn.native._product(into, (a, b)),
                }
                if not torch.allclose(products["other"]().clone(), products["chosen"](), rtol=1e-4, atol=1e-2):
                    raise RuntimeError("the chosen way gives another product: nothing is timed.")
                spent: dict[str, list[float]] = {name: [] for name in products}
                for _, (name, product) in itertools.product(range(2 * TURNS), products.items()):
                    start = time.perf_counter()
                    product()
                    spent[name].append(time.perf_counter() - start)
                line = {
                    "choice": "oneDNN" if nn.native._one_dnn() else "rows",
                    "layer": "LSTM",
                    "units": units,
                    "batch": depth // STEPS,
                    "threads": 1,
                    "way": way,
                }
                lines.append(line | {f"{name}_ms": float(np.median(t) * 1e3) for name, t in spent.items()})
            progress.update(done, f"rows, H = {units}")
    lines = [line | {"ratio": line["other_ms"] / line["chosen_ms"]} for line in lines]
    print(write_lines(out, "choices-", about, lines))


if __name__ == "__main__":
    main()
