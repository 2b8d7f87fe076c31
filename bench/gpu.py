"""Time on a GPU of training and of single steps, ours and rivals: ``python bench/gpu.py --budget MINUTES``.

What matters most comes first, and results are written after every part, so that a budget that runs out leaves what was
measured. Times are medians of device events over turns that all players take; weights and inputs are random, so nothing is
said of quality. Our kernels are compared with the reference first. Without a GPU nothing is measured and nothing written.

Training: forward and backward of one layer, the gradient of x included, on random dense x. ``unrolled loop`` is the reference
cell. float32 is without TF32 where a line does not say otherwise; the lines ``rounding`` say how far outputs are from those in
float64. A step: batch 1, three layers of 1350 units; ours keeps 10 % of its 16x1 blocks and about 10 % of its units speak, the
rivals are dense. An epoch: as many windows as PTB has, of random tokens, with optimiser.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefold.bench import provenance, write_lines
from sparsefold.nn import EGRU, Stack, gpu
from sparsefold.progress import Progress

STEPS, SEED, TURNS = 70, 0, 11
UNITS, LAYERS = 1350, 3
SIZES = [(1350, 64), (1350, 20), (1350, 128), (512, 64), (2048, 64), (512, 20), (2048, 20), (512, 128), (2048, 128)]
STEPS_TIMED = 200
SWEEP = [(d, r) for d in (1.0, 0.25, 0.1) for r in (1.0, 0.2, 0.1, 0.05)]  # density, share of units that speak
PTB_TOKENS, PTB_WORDS, EMBEDDING = 929_589, 10_000, 400

Line = dict[str, Any]


def gate(device: torch.device) -> None:
    """Kernels, captured and replayed, against the reference, or nothing is timed."""
    torch.manual_seed(SEED)
    x = torch.randn(12, 3, 40, dtype=torch.float64, device=device)
    made = EGRU(40, 50, 2, learn_threshold=True).double().to(device)
    gradients = []
    for backend in ("reference", "triton", "triton", "triton"):
        made.backend = backend  # type: ignore[assignment]
        made.zero_grad()
        (made(x)[0] * torch.linspace(-1, 1, 50, dtype=torch.float64, device=device)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    stream = gpu.Stream(made.eval())
    wanted = made(x[:, :1])[0][:, 0]
    steps = torch.stack([stream.step(row).clone() for row in x[:, 0]])
    off = [g - gradients[0] for g in gradients[1:]] + [steps - wanted]
    if not all(d.abs().max() <= 1e-9 * gradients[0].abs().max() for d in off):
        raise RuntimeError("the kernels differ from the reference: nothing is timed.")


def elapsed(call: Callable[[], Any]) -> float:
    """Milliseconds on the device of what `call` launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def race(calls: dict[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, tuple[float, float, float]]:
    """Median, fastest and slowest of each in milliseconds, all in turns after three calls of each."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(elapsed(call))
    return {name: (float(np.median(t)), min(t), max(t)) for name, t in times.items()}


def tf32(on: bool) -> None:
    """For products and for cuDNN's recurrent layers alike."""
    backends = torch.backends
    for where in (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.rnn):
        where.fp32_precision = "tf32" if on else "ieee"


def training(device: torch.device, units: int, batch: int, dtype: torch.dtype, fast: bool, loop: bool) -> list[Line]:
    """Forward and backward of one layer; the unrolled loop only where asked, for it is slow."""
    tf32(fast)
    torch.manual_seed(SEED)
    x = torch.randn(STEPS, batch, units, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(STEPS, batch, units, device=device, dtype=dtype)
    ours = EGRU(units, units, backend="triton").to(device, dtype)
    unrolled = EGRU(units, units, backend="reference").to(device, dtype)
    dense, lstm = (kind(units, units).to(device, dtype) for kind in (nn.GRU, nn.LSTM))
    masters = EGRU(units, units, backend="triton").to(device)
    weights = [getattr(dense, n + "_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    four = [getattr(lstm, n + "_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    zero = x.new_zeros(batch, units)
    wide = x.detach().float().requires_grad_()

    def module(m: nn.Module, x: Tensor = x) -> Callable[[], None]:
        def call() -> None:
            m.zero_grad()
            x.grad = None
            with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype != dtype):
                out = m(x)[0]
            out.backward(cotangent.to(out.dtype))

        return call

    def cell(f: Callable[[], Any], parameters: list[Tensor]) -> Callable[[], None]:
        def call() -> None:
            x.grad = None
            for p in parameters:
                p.grad = None
            f()[0].backward(cotangent)

        return call

    players = {
        "ours, EGRU": module(ours),
        "nn.GRU (cuDNN)": module(dense),
        "ours, GRU": cell(lambda: gpu.gru(x, zero, *weights), weights),
        "nn.LSTM (cuDNN)": module(lstm),
        "ours, LSTM": cell(lambda: gpu.lstm(x, zero, zero, *four), four),
    }
    if dtype == torch.bfloat16:
        players["ours, EGRU, float32 under autocast"] = module(masters, wide)
        # torch joins a bfloat16 layer's weights anew at every call; under autocast it casts them into place.
        for rival, kind in (("nn.GRU (cuDNN)", nn.GRU), ("nn.LSTM (cuDNN)", nn.LSTM)):
            players[f"{rival}, float32 under autocast"] = module(kind(units, units).to(device), wide)
    if loop:
        players["unrolled loop"] = module(unrolled)
    times = race(players)
    with torch.no_grad():
        rate = float((ours(x)[0] != 0).float().mean())
    lines: list[Line] = []
    for name, (ms, fastest, slowest) in times.items():
        line = {
            "figure": "training", "engine": name, "units": units, "batch": batch, "steps": STEPS, "dtype": str(dtype)[6:],
            "tf32": fast, "ms": ms, "ms_min": fastest, "ms_max": slowest,
        }  # fmt: skip
        if "EGRU" in name:
            line["event_rate"] = rate
        for rival in ("nn.GRU (cuDNN)", "nn.LSTM (cuDNN)", "unrolled loop"):
            ways = [times[way][0] for way in times if way.startswith(rival)]
            if ways:
                line[f"against {rival}"] = min(ways) / ms  # at its best
        lines.append(line)
    return lines


@torch.no_grad()
def rounding(device: torch.device, fast: bool) -> list[Line]:
    """How far a float32 layer's outputs are from those in float64: whether TF32 was used, whatever was asked for."""
    tf32(fast)
    torch.manual_seed(SEED)
    batch = SIZES[0][1]
    lines: list[Line] = []
    for units in (1344, UNITS, 2048):  # rows of 1350 float32 do not begin at whole multiples of 16 bytes
        x = torch.randn(STEPS, batch, units, device=device)
        layer = nn.GRU(units, units).to(device)
        weights = [getattr(layer, n + "_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        found = {"nn.GRU (cuDNN)": layer(x)[0], "ours, GRU": gpu.gru(x, x.new_zeros(batch, units), *weights)[0]}
        exact = layer.double()(x.double())[0]
        lines += [
            {"figure": "rounding", "engine": name, "units": units, "batch": batch, "steps": STEPS, "tf32": fast,
             "max_abs_error": float((y - exact).abs().max())} for name, y in found.items()
        ]  # fmt: skip
    return lines


def sparse(device: torch.device, density: float, rate: float, x: Tensor) -> tuple[EGRU, gpu.Stream]:
    """An EGRU of which a share of the 16x1 blocks is left, and its stream, of whose units a share speaks on x (steps, I)."""
    torch.manual_seed(SEED)
    made = EGRU(UNITS, UNITS, LAYERS, event="always" if rate == 1 else "threshold", reset="none").to(device).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("weight"):
                lives = torch.rand(3, -(-UNITS // 16), UNITS, device=device) < density
                p.normal_(std=3 / (UNITS * density) ** 0.5)
                p.mul_(lives.repeat_interleave(16, 1)[:, :UNITS].reshape(3 * UNITS, UNITS))
    return made, tuned(gpu.Stream(made), rate, x)


def tuned(stream: gpu.Stream, rate: float, x: Tensor) -> gpu.Stream:
    """The stream with each layer's thresholds set, one layer after the other, so that about this share of its units speaks."""
    for k, layer in enumerate(stream._layers if rate < 1 else ()):
        low, high = 0.0, 1.0
        for _ in range(10):
            layer.theta.fill_((low + high) / 2)
            stream.reset()
            for row in x:
                stream.step(row)
            spoke = float(stream.counts[k, 0]) / (len(x) * stream.units)
            low, high = ((low + high) / 2, high) if spoke > rate else (low, (low + high) / 2)
    return stream


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    """One replay for what `step` launches."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def dense_steps(device: torch.device, dtype: torch.dtype, x: Tensor) -> dict[str, Callable[[int], None]]:
    """Single steps of dense rivals, each with its own state."""
    name = str(dtype)[6:]
    layer = nn.GRU(UNITS, UNITS, LAYERS).to(device, dtype).eval()
    cells = [nn.GRUCell(UNITS, UNITS).to(device, dtype).eval() for _ in range(LAYERS)]
    here = x[:1, None].to(dtype).clone()
    states = {n: torch.zeros(LAYERS, 1, UNITS, device=device, dtype=dtype) for n in ("eager", "graph", "cells")}

    def of_layer(state: Tensor) -> None:
        state.copy_(layer(here, state)[1])

    def of_cells() -> None:
        v = here[0]
        for cell, h in zip(cells, states["cells"], strict=True):
            h.copy_(cell(v, h))
            v = h

    replays = {
        f"nn.GRU (cuDNN), {name}": lambda: of_layer(states["eager"]),
        f"nn.GRU (cuDNN) in a graph, {name}": graphed(lambda: of_layer(states["graph"])),
        f"dense GRU cells in a graph, {name}": graphed(of_cells),
    }

    def player(replay: Callable[[], None]) -> Callable[[int], None]:
        def step(i: int) -> None:
            here.copy_(x[i][None, None])
            replay()

        return step

    return {n: player(r) for n, r in replays.items()}


@torch.no_grad()
def steps(device: torch.device) -> list[Line]:
    """Single steps: microseconds on the device, one after the other, and on the host's clock where each is waited for."""
    tf32(False)
    x = torch.randn(STEPS_TIMED, UNITS, device=device)
    made, stream = sparse(device, 0.1, 0.1, x[:64])
    low = gpu.Stream(made, weights=torch.bfloat16)
    for mine, theirs in zip(low._layers, stream._layers, strict=True):
        mine.theta.copy_(theirs.theta)
    players: dict[str, Callable[[int], Any]] = {
        "ours, float32": lambda i: stream.step(x[i]),
        "ours, bfloat16 weights": lambda i: low.step(x[i]),
    }
    for dtype in (torch.float32, torch.bfloat16):
        players |= dense_steps(device, dtype, x)
    for each in (stream, low):
        each.reset()
    times = race({name: _all(step) for name, step in players.items()})
    waited = {}
    for name, step in players.items():
        clock = []
        for i in range(STEPS_TIMED):
            start = time.perf_counter()
            step(i)
            torch.cuda.synchronize()
            clock.append(time.perf_counter() - start)
        waited[name] = float(np.median(clock) * 1e6)
    lines = []
    for name, (ms, *_) in times.items():
        line: Line = {
            "figure": "step", "engine": name, "units": UNITS, "layers": LAYERS, "us": ms * 1e3 / STEPS_TIMED,
            "us_waited_for": waited[name],
        }  # fmt: skip
        if name.startswith("ours"):
            line |= read_by(stream if "float32" in name else low) | {"density": 0.1}
        for rival in players:
            if not rival.startswith("ours"):
                line[f"against {rival}"] = times[rival][0] / ms
        lines.append(line)
    return lines


def _all(step: Callable[[int], Any]) -> Callable[[], None]:
    def call() -> None:
        for i in range(STEPS_TIMED):
            step(i)

    return call


def read_by(stream: gpu.Stream) -> Line:
    """Counted: the share of units that spoke, and multiply-accumulates of a step."""
    events, blocks = (int(v) for v in stream.counts.sum(0))
    return {
        "event_rate": events / (stream.steps * LAYERS * stream.units),
        "macs_effective": blocks * 16 // stream.steps,
    }


@torch.no_grad()
def skipping(device: torch.device) -> Iterator[Line]:
    """Where skipping begins to pay: the stream over density and event rate, beside the graphed dense cells."""
    x = torch.randn(STEPS_TIMED, UNITS, device=device)
    rival = next(s for n, s in dense_steps(device, torch.float32, x).items() if "cells" in n)
    for density, rate in SWEEP:
        _, stream = sparse(device, density, rate, x[:32])
        stream.reset()
        times = race({"ours": _all(lambda i, s=stream: s.step(x[i])), "dense": _all(rival)}, 5)
        us = times["ours"][0] * 1e3 / STEPS_TIMED
        yield {
            "figure": "skipping", "engine": "ours, float32", "units": UNITS, "layers": LAYERS, "density": density, "us": us,
            "against dense GRU cells in a graph": times["dense"][0] / times["ours"][0],
        } | read_by(stream)  # fmt: skip


def epoch(device: torch.device, batch: int, low: bool) -> Line:
    """One epoch of PTB's size through a word model of three layers, all that training does but reading the file."""
    tf32(False)
    torch.manual_seed(SEED)
    model = Stack(
        nn.Embedding(PTB_WORDS, EMBEDDING), EGRU(EMBEDDING, UNITS, LAYERS, dropout=0.3), nn.Linear(UNITS, PTB_WORDS)
    ).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    windows = PTB_TOKENS // (batch * STEPS)
    tokens = torch.randint(PTB_WORDS, (STEPS + 1, batch), device=device)
    state = None

    def window() -> None:
        nonlocal state
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            logits, state, activity = model(tokens[:-1], state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
        (loss + activity.penalty(target_rate=0.1, weight=500.0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()
        optimiser.zero_grad()
        state = state.detach()

    for _ in range(3):
        window()
    torch.cuda.synchronize()
    seconds = elapsed(lambda: [window() for _ in range(windows)]) / 1e3
    return {
        "figure": "epoch", "engine": "ours, EGRU", "units": UNITS, "layers": LAYERS, "batch": batch, "steps": STEPS,
        "dtype": "float32 under autocast to bfloat16" if low else "float32", "windows": windows, "seconds": seconds,
    }  # fmt: skip


def parts(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Line]]]]:
    """Everything there is to measure, the most valuable first."""

    def train(
        units: int, batch: int, dtype: torch.dtype, fast: bool, loop: bool
    ) -> tuple[str, Callable[[], list[Line]]]:
        name = f"H = {units}, batch {batch}, {str(dtype)[6:]}{', TF32' if fast else ''}"
        return name, lambda: training(device, units, batch, dtype, fast, loop)

    yield train(*SIZES[0], torch.float32, False, True)
    yield "rounding of float32", lambda: rounding(device, False) + rounding(device, True)
    yield train(*SIZES[0], torch.bfloat16, False, True)
    yield "single steps", lambda: steps(device)
    yield "an epoch, autocast", lambda: [epoch(device, 64, True)]
    for size in SIZES[1:5]:
        for dtype in (torch.float32, torch.bfloat16):
            yield train(*size, dtype, False, True)
    yield "where skipping pays", lambda: list(skipping(device))
    yield train(*SIZES[0], torch.float32, True, True)
    yield "an epoch, float32", lambda: [epoch(device, 64, False)]
    for size in SIZES[5:]:
        for dtype in (torch.float32, torch.bfloat16):
            yield train(*size, dtype, False, False)


def main() -> None:
    """Measures and writes bench/results/<GPU>/gpu-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=20.0, help="minutes after which no further part begins")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="parts whose name holds one of these")
    parser.add_argument("--commit", help="of the files, where they are no checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing was measured and nothing written.")
    end = time.monotonic() + 60 * args.budget
    device = torch.device("cuda", torch.cuda.current_device())
    import triton

    about = provenance(f"python bench/gpu.py --budget {args.budget:g}")
    about |= {
        "host": about["processor"], "processor": torch.cuda.get_device_name(device), "commit": args.commit or about["commit"],
        "isa": "sm {}{}".format(*torch.cuda.get_device_capability(device)), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "seed": SEED,
    }  # fmt: skip
    gate(device)
    lines: list[Line] = []
    all_parts, skipped = list(parts(device)), []
    if args.only:
        named = [part for part in all_parts if any(words in part[0] for words in args.only)]
        if not named:
            raise SystemExit(f"--only names no part. They are: {'; '.join(name for name, _ in all_parts)}.")
        all_parts = named
    with Progress(len(all_parts), "gpu") as progress:
        for done, (name, measure) in enumerate(all_parts, 1):
            if time.monotonic() > end:
                skipped.append(name)
                continue
            lines += measure()
            path = write_lines(args.out, "gpu-", about, lines)
            progress.update(done, name)
    for e in lines:
        where = ", ".join(f"{k} {e[k]}" for k in ("max_abs_error", "units", "batch", "dtype", "density") if k in e)
        took = " ".join(f"{e[k]:.3f} {k}" for k in ("ms", "us", "us_waited_for", "seconds") if k in e)
        print(f"{e['figure']:<9} {e['engine']:<38} {where:<46} {took}", end="  ")
        print(", ".join(f"{v:.2f}x {k}" for k, v in e.items() if k.startswith("against")))
    print(path)
    if skipped:
        print("Not measured, the budget was over: " + "; ".join(skipped))


if __name__ == "__main__":
    main()
