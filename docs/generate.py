"""Writes the tables and figures of README.md and docs from committed results: ``make docs``. Nothing there is typed by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from sparsefold.report import markdown

ROOT = Path(__file__).resolve().parent.parent


def newest(folder: str, pattern: str) -> Path:
    """The committed result that was made last, by the date in its name."""
    found = sorted((ROOT / folder).glob(pattern), key=lambda path: path.name)
    if not found:
        raise ValueError(f"there is no {pattern} in {folder}; run what makes it first (docs/benchmarks.md).")
    return found[-1]


def demo_table() -> str:
    """The demonstration's table, its targets and where they come from."""
    path = newest("results/demo", "*.json")
    return f"{markdown(json.loads(path.read_text()))}\n\nFrom [{path.name}]({path.relative_to(ROOT)})."


def learning_rates() -> str:
    """The rates searched for networks of 256 units."""
    return _searched(ROOT / "results/text/lr-search.json")[0]


def demo_search() -> str:
    """The rates searched for the demonstration, and the size of the dense GRU worth what the sparse network is worth."""
    text, best = _searched(ROOT / "results/text/demo-search.json")
    for steps in sorted({steps for _, steps in best}):
        found = {name: bits for (name, length), bits in best.items() if length == steps}
        sizes = sorted(
            (bits, int(name.removeprefix("gru_"))) for name, bits in found.items() if name.startswith("gru_")
        )
        if "egru_1024_blocks" in found and len(sizes) > 1:
            equal = np.interp(found["egru_1024_blocks"], *np.array(sizes).T)
            text += (
                f"\n\nAfter {steps} steps `egru_1024_blocks` is worth what a dense GRU of {equal:.0f} units would be."
            )
    return text


def _searched(path: Path) -> tuple[str, dict[tuple[str, int], float]]:
    """Validation bits per character of all that was searched, the best of each network and length in bold; and these."""
    runs = json.loads(path.read_text())["runs"]
    means: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for run in runs:
        means.setdefault((run["network"], run["config"]["steps"], run["lr"]), []).append(run)
    average = {key: sum(r["valid_bits_per_char"] for r in group) / len(group) for key, group in means.items()}
    best = {
        length: min(v for key, v in average.items() if key[:2] == length) for length in {key[:2] for key in average}
    }
    lines = [
        "| network | steps | peak learning rate | bits per character, each seed | mean | event rate |",
        "|---|---|---|---|---|---|",
    ]
    for (name, steps, lr), group in sorted(means.items()):
        each = ", ".join(f"{r['valid_bits_per_char']:.4f}" for r in sorted(group, key=lambda r: r["seed"]))
        rate = sum(r["event_rate"] for r in group) / len(group)
        mean = average[name, steps, lr]
        mark = "**" if mean == best[name, steps] else ""
        events = "" if name.startswith("gru") else f"{rate:.3f}"
        lines.append(f"| {name} | {steps} | {lr:g} | {each} | {mark}{mean:.4f}{mark} | {events} |")
    return "\n".join(lines) + f"\n\nValidation split. From [{path.name}](../{path.relative_to(ROOT)}).", best


def kernels() -> str:
    """Time of the recurrent product at 10 % of the units speaking, by size, format and density."""
    path = newest("bench/results", "*/2*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| H | format | density | x | µs | MAC/ns | against our dense product | saving realised |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        events = r["x"] == "events"
        if r["density"] not in (1.0, 0.1) or (events and r["event_rate"] != 0.1):
            continue
        shape = f" {r['height']}x1" if r["format"] == "block" else f", group {r['height']}"
        name = r["format"] + (shape if r["format"] in ("block", "complementary") else "")
        name += "" if r["precision"] == "f32" else f", {r['precision']}"
        figures = f"{r['us']:.2f} | {r['macs_per_ns']:.1f} | {r['speedup']:.1f}x | {r['realised']:.2f}"
        x = "10 % events" if events else "dense"
        lines.append(f"| {r['units']} | {name} | {r['density']:g} | {x} | {figures} |")
    about = rows[0]
    where = f"{about['processor']}, {about['isa']}, one thread, pinned."
    return (
        "\n".join(lines)
        + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)}), which has all densities and rates."
    )


def steps() -> str:
    """Time of a whole step of networks of several sizes, ours in three precisions and from C, and every rival."""
    path = newest("bench/results", "*/steps-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| units x layers | engine | µs p50 | µs p99 | against the fastest float32 rival | against the fastest int8 rival |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ours = "ours" in r["engine"]
        name = f"**{r['engine']}**, {r['density']:.0%} of blocks, {r['event_rate']:.1%} events" if ours else r["engine"]
        times = f"{r['latency_us']['p50']:.2f} | {r['latency_us']['p99']:.2f}"
        ratios = f"{r['ratio_to_fastest_f32']:.1f}x | {r['ratio_to_fastest_int8']:.1f}x"
        size = f"{r['units']} x {r['layers']}"
        size += "" if r.get("input_rate", 1) == 1 else f", {r['input_rate']:.0%} of x"
        lines.append(f"| {size} | {name} | {times} | {ratios} |")
    about = rows[0]
    apart = " except in the rows from C" if any(r["engine"].endswith(" C") for r in rows) else ""
    where = f"{about['processor']}, {about['isa']}, one thread, pinned, Python call included{apart}."
    return "\n".join(lines) + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)})."


def throughput() -> str:
    """Streams in real time of one core and of two, by precision and batch size, and what a step reads."""
    found = sorted((ROOT / "bench/results").glob("*/throughput-*.jsonl"), key=lambda path: path.name)
    if not found:
        return "Not measured yet."
    path = found[-1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for r in rows:
        cases.setdefault((r["precision"], r["batch"]), {})[r["how"]] = r
    lines = [
        "| weights | batch | µs of one step | streams, one core | two cores, a batch each | "
        "`threads=2` | kB read by one step alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for (precision, batch), ways in cases.items():
        one, others = ways["one core"], [ways.get(how) for how in ("two cores, a batch each", "threads=2")]
        figures = " | ".join(f"{r['streams']} ({r['streams'] / one['streams']:.2f}x)" if r else "" for r in others)
        read = sum(one["cost"][name] for name in ("bytes_weights", "bytes_index", "bytes_state")) / 1e3
        lines.append(
            f"| {precision} | {batch} | {one['us_per_step']:.1f} | **{one['streams']}** | {figures} | {read:,.0f} |"
        )
    about = rows[0]
    where = (
        f"{about['units']} x {about['layers']} units, {about['density']:.0%} of blocks, {about['event_rate']:.1%} events, "
        f"{about['steps_per_second']} steps a second. {about['processor']}, {about['isa']}, Python call included."
    )
    return "\n".join(lines) + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)})."


def delta() -> str:
    """Trained networks of others as they are and sending changes: quality, columns read, MACs and time."""
    found = sorted((ROOT / "bench/results").glob("*/delta-*.jsonl"), key=lambda path: path.name)
    if not found:
        return "Not measured yet."
    path = found[-1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| network | engine | error, calibrated on | error, not heard before | columns read, x and h of each layer | MACs | "
        "µs p50 | µs p99 | against our dense step | against the fastest float32 rival |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ours = r["engine"].startswith("ours")
        name = f"**{r['engine']}**" if ours else r["engine"]
        errors = f"{r['loss']:.1%} | {r['loss_checked']:.1%}" if "loss" in r else " | "
        rates = ", ".join("all" if rate is None else f"{rate:.0%}" for rate in r.get("event_rates", ()))
        macs = f"{r['cost']['macs_effective']:,.0f}" if ours else ""
        times = f"{r['latency_us']['p50']:.2f} | {r['latency_us']['p99']:.2f}"
        ratios = f"{r['ratio_to_dense']:.2f}x | {r['ratio_to_fastest_f32']:.2f}x"
        size = f"{r['model']}: {r['cell'].upper()} {r['units']} x {r['layers']}"
        lines.append(f"| {size} | {name} | {errors} | {rates} | {macs} | {times} | {ratios} |")
    about = rows[0]
    where = f"{about['processor']}, {about['isa']}, one thread, pinned, Python call included."
    return "\n".join(lines) + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)})."


def training() -> str:
    """Time of forward and backward of one layer, ours and rivals."""
    try:
        path = newest("bench/results", "*/training-*.jsonl")
    except ValueError:
        return "Not measured yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| units, batch | layer | ms | forward | backward | events | β "
        "| against nn.GRU | nn.LSTM | unrolled loop | every unit speaks | events in x alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rivals = ["nn.GRU", "nn.LSTM", "unrolled loop", "every unit speaks, events in x", "ours, events in x"]
    measured = [r for r in rows if r.get("memory")]
    rows = [r for r in rows if not r.get("memory")]
    for r in (r for r in rows if not r.get("sweep")):
        events = f"{r['event_rate']:.1%} | {r['beta']:.2f}" if "beta" in r else " | "
        ratios = " | ".join(f"{r[f'against {rival}']:.1f}x" for rival in rivals)
        times = f"{r['ms']:.1f} | {r['forward_ms']:.1f} | {r['backward_ms']:.1f}"
        lines.append(f"| {r['units']}, {r['batch']} | {r['layer']} | {times} | {events} | {ratios} |")
    swept = [r for r in rows if r.get("sweep")]
    rate, ms = np.array([r["event_rate"] for r in swept]), np.array([r["ms"] for r in swept])
    slope, intercept = np.polyfit(rate, ms, 1)
    determined = 1 - np.square(ms - slope * rate - intercept).sum() / np.square(ms - ms.mean()).sum()
    lines += [
        "",
        "| event rate, 1350 units, batch 20, events in x | ms | forward | backward | β |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['event_rate']:.1%} | {r['ms']:.1f} | {r['forward_ms']:.1f} | {r['backward_ms']:.1f} | {r['beta']:.2f} |"
        for r in swept
    ]
    if measured:
        lines += [
            "",
            "| 1350 units, batch 20, 70 steps, events in x | MB at the peak | bytes kept for each step, unit and sample |",
            "|---|---|---|",
        ]
        for r in measured:
            kept = r["kept_bytes_per_step_unit_sample"]
            lines.append(f"| {r['layer']} | {r['peak_mb']:.0f} | {'' if kept is None else f'{kept:.1f}'} |")
        lines += [
            "",
            "Memory above what was resident before one forward and backward in a process of its own (VmHWM); bytes kept for the "
            "backward beside x and the weights.",
        ]
    lines += ["", "![Time of forward and backward against the event rate, ours and rivals](training.svg)"]
    about = rows[0]
    return "\n".join(lines) + (
        f"\n\nA straight line through these: {intercept:.1f} ms + {slope / 100:.2f} ms for each percent of events, "
        f"R² = {determined:.3f}. {about['processor']}, {about['isa']}, {about['threads']} threads, seed {about['seed']}. "
        f"From [{path.name}](../{path.relative_to(ROOT)})."
    )


def dense_cells() -> str:
    """The same of GRU, LSTM and RNN, ours and torch's."""
    try:
        path = newest("bench/results", "*/dense-cells-*.jsonl")
    except ValueError:
        return "Not measured yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| threads | units, batch | layer | ms | forward | backward | against torch's |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['threads']} | {r['units']}, {r['batch']} | {r['layer']} | {r['ms']:.1f} | {r['forward_ms']:.1f} "
        f"| {r['backward_ms']:.1f} | {r['ratio']:.2f}x |"
        for r in rows
    ]
    about = rows[0]
    return "\n".join(lines) + (
        f"\n\n{about['processor']}, {about['isa']}, seed {about['seed']}. From [{path.name}](../{path.relative_to(ROOT)})."
    )


def on_a_gpu() -> str:
    """Training, single steps, where skipping pays and an epoch on a GPU, ours and rivals."""
    found = sorted((ROOT / "bench/results").glob("*/gpu-*.jsonl"), key=lambda path: path.name)
    cards = {path.parent: path for path in found}  # of each the last
    return "\n\n".join(_on_one_gpu(path) for path in cards.values()) or "Not measured yet."


def _on_one_gpu(path: Path) -> str:
    """The tables of one file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    figures = {f: [r for r in rows if r["figure"] == f] for f in ("training", "step", "skipping", "epoch")}

    def ratio(r: dict[str, Any], rival: str) -> str:
        value = r.get(f"against {rival}")
        return f"{value:.2f}x" if value else ""

    lines: list[str] = []
    if figures["training"]:
        rivals = ["nn.GRU (cuDNN)", "nn.LSTM (cuDNN)", "unrolled loop"]
        lines += [
            f"| units, batch | products | layer | ms | against {' | '.join(rivals)} |",
            "|---|---|---|---|---|---|---|",
        ]
    for r in figures["training"]:
        name = f"**{r['engine']}**" if r["engine"].startswith("ours") else r["engine"]
        kind = f"{r['dtype']}{', TF32' if r['tf32'] else ''}"
        against = " | ".join(ratio(r, rival) for rival in rivals)
        lines.append(f"| {r['units']}, {r['batch']} | {kind} | {name} | {r['ms']:.2f} | {against} |")
    if figures["step"]:
        rivals = [r["engine"] for r in figures["step"] if not r["engine"].startswith("ours")]
        first = figures["step"][0]
        lines += [
            "",
            f"| one step, {first['units']} x {first['layers']} | events | MACs | µs | µs, each waited for "
            f"| against {' | '.join(rivals)} |",
            "|---|---|---|---|---|" + "---|" * len(rivals),
        ]
    for r in figures["step"]:
        ours = r["engine"].startswith("ours")
        counted = f"{r['event_rate']:.1%} | {r['macs_effective']:,}" if ours else " | "
        against = " | ".join(ratio(r, rival) for rival in rivals)
        name = f"**{r['engine']}**" if ours else r["engine"]
        lines.append(f"| {name} | {counted} | {r['us']:.1f} | {r['us_waited_for']:.1f} | {against} |")
    if figures["skipping"]:
        lines += ["", "| density | events | MACs | µs | against dense GRU cells in a graph |", "|---|---|---|---|---|"]
    for r in figures["skipping"]:
        against = ratio(r, "dense GRU cells in a graph")
        counted = f"{r['density']:.0%} | {r['event_rate']:.1%} | {r['macs_effective']:,}"
        lines.append(f"| {counted} | {r['us']:.1f} | {against} |")
    for r in figures["epoch"]:
        lines += [
            "",
            f"An epoch of {r['windows']} windows of {r['steps']} x {r['batch']} words, {r['layers']} layers of "
            f"{r['units']} units, {r['dtype']}: **{r['seconds']:.1f} s**.",
        ]
    about = rows[0]
    versions = f"torch {about['torch']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}, Triton {about['triton']}"
    where = f"{about['processor']}, {versions}, seed {about['seed']}."
    return (
        f"**{about['processor']}**\n\n"
        + "\n".join(lines).strip()
        + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)})."
    )


def _results(recipe: str) -> list[tuple[Path, dict[str, Any]]]:
    """The committed results of a recipe, by name."""
    return [(path, json.loads(path.read_text())) for path in sorted((ROOT / "results" / recipe).glob("*.json"))]


def _table(columns: tuple[str, ...], rows: list[str], about: str) -> str:
    """A table and what is to be said of it."""
    if not rows:
        return "Not measured yet."
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + f"\n\n{about}"


def paper() -> str:
    """Runs of the recipe ptb-paper: what they took, and what came of them."""
    lines = []
    for path, r in _results("paper"):
        took, c, start = r["training"], r["lm"], r["start"]
        ours = {row["engine"]: row for row in r["race"] if row["network"].startswith("egru") and not row["rival"]}
        kind = "mean" if ours["sparsefold"].get("scores") else "p50"
        wide, narrow = (ours.get(e, ours["sparsefold"])["latency_us"][kind] for e in ("sparsefold", "sparsefold i8"))
        seconds = (
            f"{start['seconds']:.0f} + {took['seconds'] - start['seconds']:.0f}" if start else f"{took['seconds']:.0f}"
        )
        decoder = f"{'x'.join(map(str, c['cutoffs']))} by {c['divide']:g}" if c.get("cutoffs") else "all words"
        times = f"{wide:.0f}, {narrow:.0f}" if "sparsefold i8" in ours else f"{wide:.0f}"
        rivals = f"{_fastest(r['race'], wide, False, kind)} | {_fastest(r['race'], narrow, True, kind)}"
        drops = ", ".join(f"{c[f'drop_{name}']:g}" for name in ("input", "hidden", "output", "connect"))
        macs, fewer = r["macs"]["macs_effective"], f"{r['fewer_macs']:.1f}x"
        if c.get("cutoffs"):
            layers = sum(p["macs_dense"] for p in r["macs"]["parts"] if p["role"] in ("input", "recurrent"))
            read = sum(p["macs_effective"] for p in r["macs"]["parts"] if p["role"] == "decoder")
            fewer += f", {(layers + read) / macs:.1f}x"
        sizes = ", ".join(
            f"{r[key] / 1e6:.1f}" for key in ("file_bytes", "i8_file_bytes", "transfer_bytes") if r.get(key)
        )
        lines.append(
            f"| {took['steps']:,}, {seconds} | {decoder} | {drops} | {r['valid_perplexity']:.1f} | {r['test_perplexity']:.1f} "
            f"| {r['density_of_all']:.1%} | {r['event_rate']:.1%} | {macs:,.0f} | {fewer} "
            f"| {times} | {rivals} | {sizes} | [{path.name}](../{path.relative_to(ROOT)}) |"
        )
    about = (
        "Perplexity of Penn Treebank's words, each split read as one stream. Seconds of training: on a GPU; or there, and then "
        "on the processor that a transfer checkpoint came to. MACs are counted on a sample, decoder included, and compared with "
        "the dense network whose decoder reads all words, and where there are clusters with dense layers under the same decoder "
        "too. A word takes so long on one core, pinned, in float32 and with int8 weights: of the GPU's host, no rival beside it; "
        "or, where rivals stand beside it, of the processor it came to. With clusters it is the mean of a text that is scored, "
        "else the median. Dense rivals are untrained and have about as many weights, embedding and decoder counted, in equal "
        "layers, and a decoder of all words."
    )
    columns = (
        "steps, seconds", "decoder", "dropout of input, between layers, output, weights", "valid", "test", "density", "events",
        "MACs", "fewer than dense", "µs of a word", "fastest dense rival: float32", "int8", "MB: compiled, int8, transfer",
        "from",
    )  # fmt: skip
    return _table(columns, lines, about)


def _fastest(race: list[dict[str, Any]], us: float, narrow: bool, kind: str = "p50") -> str:
    """The fastest rival of a race, with int8 weights or without: its time, how many times ours that is, and its network."""
    played = [row for row in race if row["rival"] and (row["engine"] in _INT8) == narrow]
    first = min(played, key=lambda row: row["latency_us"][kind], default=None)
    if first is None:
        return ""
    return f"{first['latency_us'][kind]:.0f} = {first['latency_us'][kind] / us:.1f}x ({first['network']})"


def described() -> str:
    """Runs of the recipe lm that ``sparsefold describe`` has described."""
    lines, about = [], ""
    for path, r in _results("lm"):
        c, steps, minutes = r["lm"], r["training"]["steps"], r["training"]["seconds"] / 60
        passes = steps * c["batch"] * c["bptt"] / r["corpus"]["words"]["train"]
        ours = {
            row["engine"]: row["latency_us"]["p50"]
            for row in r["race"]
            if not row["rival"] and row["network"].startswith("egru")
        }
        us, narrow = ours["sparsefold"], ours["sparsefold i8"]
        rates = ", ".join(f"{rate:.1%}" for rate in r["test_event_rates"])
        macs, fewer = r["macs"]["macs_effective"], r["fewer_macs"]
        wide, rounded = (f"{2 ** r[f'{kind}_sample_bits']:.1f}" for kind in ("f32", "i8"))
        lines.append(
            f"| egru {'+'.join(map(str, c['hidden']))} | {steps:,}, {passes:.0f}, {minutes:.0f} | {r['valid_perplexity']:.1f} "
            f"| {r['test_perplexity']:.1f} | {wide}, {rounded} | {rates} | {macs:,.0f} | {fewer:.1f}x "
            f"| {us:.0f} | {narrow:.0f} | {_fastest(r['race'], us, False)} | {_fastest(r['race'], narrow, True)} "
            f"| {r['file_bytes'] / 1e6:.1f} MB, {r['i8_file_bytes'] / 1e6:.1f} MB | [{path.name}](../{path.relative_to(ROOT)}) |"
        )
        where, rivals = r["provenance"], r["rivals"].partition(": ")[2]
        about = (
            "Events layer by layer; MACs counted on the sample, the first words of the test split, decoder included; rivals in "
            f"float32 are compared with ours in float32, in int8 with ours in int8. {where['processor']}, {where['isa']}, one "
            f"thread, pinned, one race after parity with torch; dense networks {rivals}"
        )
    columns = (
        "network", "steps, passes, minutes", "valid", "test", "sample: float32, int8", "events", "MACs of a word",
        "fewer than dense", "µs of a word", "with int8 weights", "fastest dense rival: float32", "int8", "compiled, with int8",
        "from",
    )  # fmt: skip
    return _table(columns, lines, about)


def whole_byte() -> str:
    """Time and quality of a whole byte, ours in every precision against the dense GRU of every rival."""
    path = newest("bench/results", "*/byte-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| engine | bits per character | MACs | file | µs p50 | µs p99 | against the fastest rival | share of the Python call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        counted, size, share = "", "", ""
        if "cost" in r:
            counted, size = f"{r['cost']['macs_effective']:,.0f}", f"{r['file_bytes'] / 1e6:.2f} MB"
            share = f"{max(r['call_share'], 0):.0%}"
        name = f"**{r['engine']}**" if "cost" in r else r["engine"]
        times = f"{r['latency_us']['p50']:.2f} | {r['latency_us']['p99']:.2f} | {r['ratio_to_fastest_rival']:.1f}x"
        lines.append(f"| {name} | {r['bits_per_char']:.3f} | {counted} | {size} | {times} | {share} |")
    event = next(r for r in rows if r["engine"].startswith("ours, egru"))
    about = (
        f"Event GRU of {event['network']['hidden']} units, {event['network']['density']:.0%} of the recurrent blocks, "
        f"{event['network']['decoder_density']:.0%} of the decoder's, {event['event_rate']:.1%} events. "
        f"{event['processor']}, {event['isa']}, one thread, pinned, Python call included."
    )
    return "\n".join(lines) + f"\n\n{about} From [{path.name}](../{path.relative_to(ROOT)})."


# Viridis, seven stops of it: lightness rises evenly, and every kind of colour blindness sees the order.
_STOPS = ((68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (110, 206, 88), (253, 231, 37))
_LOWEST, _HIGHEST = 0.25, 512.0  # speed-ups at the ends of the scale


def _colour(speedup: float) -> tuple[str, str]:
    """(fill, ink) of one cell."""
    share = math.log(min(max(speedup, _LOWEST), _HIGHEST) / _LOWEST) / math.log(_HIGHEST / _LOWEST) * (len(_STOPS) - 1)
    k = min(int(share), len(_STOPS) - 2)
    fill = [round(a + (b - a) * (share - k)) for a, b in zip(_STOPS[k], _STOPS[k + 1], strict=True)]
    light = 0.3 * fill[0] + 0.6 * fill[1] + 0.1 * fill[2] > 120
    return "#" + "".join(f"{c:02x}" for c in fill), "#111111" if light else "#ffffff"


def _title(r: dict[str, Any]) -> str:
    names = {"block": f"blocks {r['height']}x1", "csc": "single weights (CSC)", "dense": "dense"}
    name = names.get(r["format"], f"complementary, groups of {r['height']}")
    return name + ("" if r["precision"] == "f32" else ", int8")


def heatmap_svg() -> str:
    """One small map for each format: event rate to the right, density upwards, speed-up by colour and number."""
    rows = [json.loads(line) for line in newest("bench/results", "*/heatmap-*.jsonl").read_text().splitlines()]
    maps: dict[str, dict[tuple[float, float], float]] = {}
    for r in rows:
        maps.setdefault(_title(r), {})[r["density"], r["event_rate"]] = r["speedup"]
    rates = sorted({rate for cells in maps.values() for _, rate in cells})
    w, h, left, top, gap, across = 40, 24, 62, 66, 34, 2
    everything = sorted({d for cells in maps.values() for d, _ in cells}, reverse=True)
    width, height = len(rates) * w + left + gap, len(everything) * h + 84
    total = across * width + 12, top + math.ceil(len(maps) / across) * height + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" '
        f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11" fill="#1b1f23">',
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
        '<text x="16" y="24" font-size="15" font-weight="bold">Speed-up against our own dense product, '
        f"{rows[0]['units'] * 3} x {rows[0]['units']}, one core</text>",
        '<line x1="16" y1="42" x2="46" y2="42" stroke="#d4004f" stroke-width="3"/>'
        '<text x="54" y="46">break-even: on its right and above it, the dense product is faster</text>',
    ]
    for n, (name, cells) in enumerate(maps.items()):
        x0, y0 = n % across * width + left, top + n // across * height + 24
        densities = [d for d in everything if any((d, rate) in cells for rate in rates)]
        out.append(f'<text x="{x0}" y="{y0 - 8}" font-size="13" font-weight="bold">{name}</text>')
        faster = [[cells[d, rate] >= 1 for rate in rates] for d in densities]
        for i, d in enumerate(densities):
            y = y0 + i * h
            out.append(f'<text x="{x0 - 6}" y="{y + 16}" text-anchor="end">{100 * d:.0f} %</text>')
            for j, rate in enumerate(rates):
                speedup = cells[d, rate]
                fill, ink = _colour(speedup)
                shown = f"{speedup:.0f}" if speedup >= 9.95 else f"{speedup:.1f}"
                out.append(f'<rect x="{x0 + j * w}" y="{y}" width="{w}" height="{h}" fill="{fill}"/>')
                out.append(
                    f'<text x="{x0 + j * w + w / 2:g}" y="{y + 16}" text-anchor="middle" fill="{ink}">{shown}</text>'
                )
        line = []
        for i in range(len(densities)):
            for j in range(len(rates)):
                x, y = x0 + j * w, y0 + i * h
                if j + 1 < len(rates) and faster[i][j] != faster[i][j + 1]:
                    line.append(f"M{x + w} {y}v{h}")
                if i + 1 < len(densities) and faster[i][j] != faster[i + 1][j]:
                    line.append(f"M{x} {y + h}h{w}")
        if line:
            path = "".join(line)
            out.append(f'<path d="{path}" stroke="#ffffff" stroke-width="6" stroke-linecap="square" fill="none"/>')
            out.append(f'<path d="{path}" stroke="#d4004f" stroke-width="3" stroke-linecap="square" fill="none"/>')
        bottom = y0 + len(densities) * h
        for j, rate in enumerate(rates):
            out.append(
                f'<text x="{x0 + j * w + w / 2:g}" y="{bottom + 14}" text-anchor="middle">{100 * rate:.0f}</text>'
            )
        out.append(
            f'<text x="{x0 + len(rates) * w / 2:g}" y="{bottom + 30}" text-anchor="middle">units that speak, %</text>'
        )
        middle = y0 + len(densities) * h / 2
        if len(densities) > 2:
            out.append(
                f'<text transform="translate({x0 - 48} {middle:g}) rotate(-90)" text-anchor="middle">weights stored</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def heatmap() -> str:
    """The picture, and the result it is drawn from."""
    path = newest("bench/results", "*/heatmap-*.jsonl")
    about = json.loads(path.read_text().splitlines()[0])
    where = f"{about['processor']}, {about['isa']}, one thread, pinned."
    return (
        "![Speed-up of the recurrent product over density and event rate, one map for each format](heatmap.svg)\n\n"
        f"{where} From [{path.name}](../{path.relative_to(ROOT)})."
    )


MULTIPLY = ROOT / "results/multiply/ptb.json"
WIKITEXT2 = ROOT / "results/multiply/wikitext2.json"
_INT8 = ("torch int8", "ONNX Runtime int8")


def _multiplied(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each network: its quality, counts and time, and what it is compared with."""
    times: dict[str, dict[str, float]] = {}
    for row in found["race"]:
        # Not every word needs a cluster: what one costs on average is not the time of the usual word.
        which = "mean" if row.get("scores") else "p50"
        times.setdefault(row["network"], {})[row["engine"]] = row["latency_us"][which]
    rows = []
    for name, point in found["points"].items():
        played = {engine: us for engine, us in times[name].items() if engine != "sparsefold"}
        rows.append(
            {
                "name": name, "cell": point["cell"], "valid": point["valid_perplexity"], "test": point["test_perplexity"],
                "events": point["event_rate"], "units": point["hidden"], "layers": point["layers"], "rate": point["rate"],
                "density": point["density"]["1.weight_hh_l0"], "adaptive": name.partition("cutoffs")[2],
                "decoder": point["density"].get("2.head.weight", list(point["density"].values())[-1]),
                "memory": point.get("memory_bytes", math.nan),
                "macs": point["macs"]["macs_effective" if point["cell"] == "egru" else "macs_dense"],
                "macs_decoder": sum(
                    part["macs_effective"] for part in point["macs"]["parts"] if part["role"] == "decoder"
                ),
                "us": times[name]["sparsefold"],
                "float": min((us for e, us in played.items() if e not in _INT8), default=math.inf),
                "int8": min((us for e, us in played.items() if e in _INT8), default=math.inf),
            }
        )  # fmt: skip
    return rows


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['layers']} x {row['units']}" if row["layers"] > 1 else str(row["units"])


def _adaptive(row: dict[str, Any]) -> str:
    return f", adaptive {row['adaptive']}" if row["adaptive"] else ""


def _alike(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The dense network with the fewest units, of those at least as good on the test split."""
    good = [r for r in rows if r["float"] < math.inf and r["test"] <= row["test"]]
    return min(good, key=lambda r: (r["units"], r["test"]), default=None)


def multiplied() -> str:
    """Density × event rate on Penn Treebank, with its picture."""
    picture = "![Test perplexity of every network against its time](multiply.svg)"
    return f"{_multiplication(MULTIPLY)}\n\n{picture}" if MULTIPLY.exists() else "Not measured yet."


def words() -> str:
    """The sparsest event network that is at most a twentieth worse than the best dense network, that, and what lies between."""
    if not MULTIPLY.exists():
        return "Not measured yet."
    rows = _multiplied(json.loads(MULTIPLY.read_text()))
    best = min((r for r in rows if r["float"] < math.inf), key=lambda r: r["test"])
    good = [r for r in rows if r["cell"] == "egru" and r["test"] <= 1.05 * best["test"]]
    chosen = min(good, key=lambda r: r["macs"])
    alike = _alike(chosen, rows)
    between = [
        r
        for r in rows
        if r["cell"] != "egru" and (r["adaptive"] or (alike and r["name"] == alike["name"] != best["name"]))
    ]
    lines = [
        "| network | test perplexity | events | recurrent blocks | MACs of a word | µs of a word | fastest rival: float32 "
        "| int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in (best, *between, chosen):
        events = f"{r['events']:.1%} | {r['density']:.0%}" if r["cell"] == "egru" else " | "
        own = f"{r['float']:.0f} | {r['int8']:.0f}" if r["float"] < math.inf else " | "
        lines.append(
            f"| {r['cell'].upper()} {_sizes(r)}{_adaptive(r)} | {r['test']:.1f} | {events} | {r['macs']:,.0f} | {r['us']:.0f} "
            f"| {own} |"
        )
    times = f"{best['macs'] / chosen['macs']:.1f} times fewer multiplications, {best['float'] / chosen['us']:.1f} times"
    return "\n".join(lines) + (
        f"\n\nThe last row against the first: {times} less time than the fastest float32 engine, "
        f"{best['int8'] / chosen['us']:.1f} times less than the fastest int8 one, {chosen['test'] / best['test'] - 1:.1%} more "
        "perplexity."
    )


def wikitext2() -> str:
    """The same table of WikiText-2."""
    return _multiplication(WIKITEXT2) if WIKITEXT2.exists() else "Not measured yet."


def _multiplication(path: Path) -> str:
    """Quality, counts, time, and how many times less that is than the best dense network's."""
    found = json.loads(path.read_text())
    rows = _multiplied(found)
    best = min((r for r in rows if r["float"] < math.inf), key=lambda r: r["test"])
    lines = [
        "| network | weights | decoder's | events | valid | test | MACs | of the decoder | fewer MACs | MB | µs "
        "| fastest rival: float32 | int8 | faster than float32 | than int8 | than the smallest dense network as good |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        alike = _alike(r, rows)
        smallest = f"{min(alike['float'], alike['int8']) / r['us']:.1f}x ({alike['name']})" if alike else ""
        smallest = smallest if r["cell"] == "egru" else ""
        own = f"{r['float']:.0f} | {r['int8']:.0f}" if r["float"] < math.inf else " | "
        events = f"{r['events']:.1%}" if r["cell"] == "egru" else ""
        lines.append(
            f"| {r['cell']} {_sizes(r)}{_adaptive(r)} | {r['density']:.0%} | {r['decoder']:.0%} | {events} "
            f"| {r['valid']:.1f} | {r['test']:.1f} "
            f"| {r['macs']:,.0f} | {r['macs_decoder']:,.0f} | {best['macs'] / r['macs']:.1f}x | {r['memory'] / 1e6:.0f} "
            f"| {r['us']:.1f} | {own} "
            f"| {best['float'] / r['us']:.1f}x | {best['int8'] / r['us']:.1f}x | {smallest} |"
        )
    about = (
        f"Perplexity of words of {found['corpus']['source']}. MACs are counted by the engine on a sample of the test split, "
        f"embedding and decoder included; ratios are to {best['name']}, the dense network with the lowest test perplexity of "
        "those that other engines play, and in the last column to the fastest of them, int8 or not. MB are what the engine's "
        "packed weights take, the first layer's input products of all words in a table; of an adaptive softmax microseconds are "
        "the mean time to say log p of the word that follows, else the median time to give the logits of all words. "
        f"{found['provenance']['processor']}, {found['provenance']['isa']}, one thread, pinned, Python call included."
    )
    return "\n".join(lines) + f"\n\n{about} From [{path.name}](../{path.relative_to(ROOT)})."


def multiply_svg() -> str:
    """Test perplexity against microseconds of a word, ours on every network and the fastest rival on the dense ones."""
    points = []
    for r in _multiplied(json.loads(MULTIPLY.read_text())):
        name = f"{r['cell']} {_sizes(r)}{_adaptive(r)}"
        name += f", {r['events']:.0%} events, {r['density']:.0%}" if r["cell"] == "egru" else ""
        points.append((r["us"], r["test"], _CELLS[r["cell"]], name))
        if r["float"] < math.inf:
            points.append((r["float"], r["test"], _CELLS[r["cell"]], f"{name}, fastest rival"))
    return _scatter("test perplexity (up) against µs of a word, logarithmic", points, "{:.0f}")


GRID = ROOT / "results/prune_lm/grid.json"
LATENCY = ROOT / "results/prune_lm/latency.json"


def _points() -> list[dict[str, Any]]:
    """One row for each cell, size, method and density: means over seeds."""
    if not (GRID.exists() and LATENCY.exists()):
        return []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    latency = json.loads(LATENCY.read_text())["latency_us"]
    for name, point in json.loads(GRID.read_text()).items():
        c = point["config"]
        rival = latency.get(f"{name}/ONNX Runtime", {"p50": math.nan})
        point |= {"us": latency[name]["p50"], "onnx_us": rival["p50"]}
        method = c["method"] if c["decoder"] == 1 else f"{c['method']}, decoder {c['decoder']:.0%}"
        groups.setdefault((c["cell"], c["hidden"], method, c["density"]), []).append(point)

    def mean(of: list[dict[str, Any]], *keys: str) -> float:
        values = []
        for value in of:
            for key in keys:
                value = value[key]
            values.append(value)
        return float(sum(values) / len(values))

    rows: list[dict[str, Any]] = [
        {
            "cell": cell, "hidden": hidden, "method": method, "seeds": len(of),
            "density": mean(of, "density", "1.weight_hh_l0"), "bits": mean(of, "test_bits_per_char"),
            "us": mean(of, "us"), "onnx_us": mean(of, "onnx_us"), "macs": mean(of, "macs", "macs_effective"),
            "rate": mean(of, "event_rate"),
        }
        for (cell, hidden, method, _), of in groups.items()
    ]  # fmt: skip
    for r in rows:
        rivals = [o for o in rows if o["cell"] == r["cell"]]
        r["best"] = not any(
            o["us"] <= r["us"] and o["bits"] <= r["bits"] and (o["us"], o["bits"]) != (r["us"], r["bits"])
            for o in rivals
        )
    return sorted(rows, key=lambda r: (r["cell"], r["us"]))


def pruned() -> str:
    """Quality, density and time of every way of pruning; in bold what no other point of its cell beats in both."""
    rows = _points()
    if not rows:
        return "Not measured yet."
    lines = [
        "| cell, units | method | density | bits per character | seeds | event rate | MACs | µs p50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        bits = f"**{r['bits']:.3f}**" if r["best"] else f"{r['bits']:.3f}"
        rate = f"{r['rate']:.1%}" if r["cell"] == "egru" else ""
        onnx = "" if math.isnan(r["onnx_us"]) else f" (ONNX Runtime {r['onnx_us']:.1f})"
        lines.append(
            f"| {r['cell']} {r['hidden']} | {r['method']} | {r['density']:.1%} | {bits} | {r['seeds']} | {rate} "
            f"| {r['macs']:,.0f} | {r['us']:.2f}{onnx} |"
        )
    lines += [
        "",
        "Larger and sparser against smaller and dense, at no more MACs:",
        "",
        "| dense | MACs | bits per character | larger and sparser | MACs | bits per character | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in rows if r["method"] == "dense"):
        larger = [o for o in rows if o["cell"] == r["cell"] and o["hidden"] > r["hidden"] and o["density"] < 1]
        best = min((o for o in larger if o["macs"] <= r["macs"]), key=lambda o: o["bits"], default=None)
        if best:
            lines.append(
                f"| {r['cell']} {r['hidden']} | {r['macs']:,.0f} | {r['bits']:.3f} | {best['cell']} {best['hidden']}, "
                f"{best['method']}, {best['density']:.1%} | {best['macs']:,.0f} | {best['bits']:.3f} | {best['seeds']} |"
            )
    point, timed = next(iter(json.loads(GRID.read_text()).values())), json.loads(LATENCY.read_text())["provenance"]
    where = f"Test split, {point['config']['steps']} steps. {timed['processor']}, one thread, pinned, one race of all."
    files = " and ".join(f"[{path.name}](../{path.relative_to(ROOT)})" for path in (GRID, LATENCY))
    picture = "![Quality of every pruned network against its density and against its time](pruning.svg)"
    return "\n".join(lines) + f"\n\n{where} From {files}.\n\n{picture}"


_CELLS = {"gru": "#6b747c", "lstm": "#a03c86", "egru": "#0067a8"}
_METHODS = {
    "dense": "#1b1f23", "unstructured": "#0067a8", "16x1": "#0a7d55", "glp": "#d4004f", "8x1": "#7cb518", "4x4": "#e08e0b",
    "16x16": "#9a5b13", "32x32": "#6d4c9f", "complementary": "#00a5b5", "rigl": "#e36bb0", "narang": "#8a949d",
    "16x1, decoder 30%": "#93d3bb",
}  # fmt: skip


def pruned_svg() -> str:
    """For each cell, bits per character against density and against the time of a byte; lower and further left is better."""
    rows = _points()
    cells = [cell for cell in ("gru", "lstm", "egru") if any(r["cell"] == cell for r in rows)]
    w, h, left, top, legend = 300, 240, 56, 58, 130
    y0, y1 = (f(r["bits"] for r in rows) for f in (min, max))
    y0, y1 = y0 - 0.02, max(y1 + 0.02, y0 + 0.04)
    width, height = left + len(cells) * (w + 24) + legend, top + 2 * (h + 62)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11" fill="#1b1f23">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="22" font-size="14" font-weight="bold">Bits per character of pruned networks: against density (above), '
        "against the time of a byte (below)</text>",
    ]
    for k, (key, unit) in enumerate((("density", "of the recurrent weights are kept, %"), ("us", "µs a byte"))):
        scale = 100 if key == "density" else 1
        for n, cell in enumerate(cells):
            own = [{**r, "x": math.log10(r[key] * scale)} for r in rows if r["cell"] == cell]
            x0, x1 = min(r["x"] for r in own) - 0.06, max(r["x"] for r in own) + 0.06
            px, py = left + n * (w + 24), top + k * (h + 62)

            def at(x: float, bits: float, px: int = px, py: int = py, x0: float = x0, x1: float = x1) -> str:
                return f"{px + (x - x0) / (x1 - x0) * w:.1f} {py + (y1 - bits) / (y1 - y0) * h:.1f}"

            out.append(f'<path d="M{px} {py}V{py + h}H{px + w}" stroke="#5d666f" fill="none"/>')
            out.append(f'<text x="{px + 8}" y="{py + 4}" font-weight="bold">{cell}</text>')
            out.append(f'<text x="{px + w / 2:g}" y="{py + h + 36}" text-anchor="middle">{unit}</text>')
            for tick in (t * 10**e for e in range(-1, 4) for t in (1, 2, 5)):
                if x0 <= math.log10(tick) <= x1:
                    x = at(math.log10(tick), y0).split()[0]
                    out.append(f'<path d="M{x} {py + h}v4" stroke="#5d666f"/>')
                    out.append(f'<text x="{x}" y="{py + h + 17}" text-anchor="middle">{tick:g}</text>')
            for i in range(5 if n == 0 else 0):
                bits = y0 + (y1 - y0) * i / 4
                out.append(f'<text x="{px - 6}" y="{at(x0, bits).split()[1]}" text-anchor="end">{bits:.2f}</text>')
            if key == "us":
                front = "L".join(at(r["x"], r["bits"]) for r in own if r["best"])
                out.append(f'<path d="M{front}" stroke="#5d666f" stroke-dasharray="4 3" fill="none"/>')
            for method, colour in _METHODS.items():
                for size in sorted({r["hidden"] for r in own}):
                    line = sorted(
                        (r for r in own if r["method"] == method and r["hidden"] == size), key=lambda r: float(r["x"])
                    )
                    if len(line) > 1:
                        path = "L".join(at(r["x"], r["bits"]) for r in line)
                        out.append(f'<path d="M{path}" stroke="{colour}" fill="none"/>')
                    for r in line:
                        x, y = at(r["x"], r["bits"]).split()
                        said = f"{cell} {size}, {method}, {r['density']:.1%}: {r['bits']:.3f} bits, {r['us']:.2f} µs"
                        hollow = (
                            f'fill="{colour}"'
                            if size == 512
                            else f'fill="#ffffff" stroke="{colour}" stroke-width="1.5"'
                        )
                        out.append(f'<circle cx="{x}" cy="{y}" r="4" {hollow}><title>{said}</title></circle>')
                        if size != 512:
                            below = 4 if "," not in method else 14
                            out.append(
                                f'<text x="{float(x) + 7:.1f}" y="{float(y) + below:.1f}" fill="{colour}">{size}</text>'
                            )
    x = width - legend
    for i, (method, colour) in enumerate((m, c) for m, c in _METHODS.items() if any(r["method"] == m for r in rows)):
        out.append(f'<circle cx="{x}" cy="{top + 18 * i}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{x + 10}" y="{top + 18 * i + 4}">{method}</text>')
    notes = ("full: 512 units", "open: the size beside it", "dashed: what no other", "point of the cell beats")
    out += [f'<text x="{x - 6}" y="{top + 240 + 16 * i}" fill="#5d666f">{note}</text>' for i, note in enumerate(notes)]
    return "\n".join([*out, "</svg>", ""])


def _scatter(title: str, points: list[tuple[float, float, str, str]], figure: str) -> str:
    """Points (µs, quality, colour, name) over a logarithmic axis of time."""
    xs, ys = ([math.log10(p[0]) for p in points], [p[1] for p in points])
    (x0, x1), (y0, y1) = (min(xs) - 0.05, max(xs) + 0.05), (min(ys), max(ys))
    y0, y1 = y0 - 0.2 * (y1 - y0) - 0.01, y1 + 0.05 * (y1 - y0) + 0.01  # labels below a point stay above the axis
    width, height, left, bottom = 900, 600, 60, 50

    def at(us: float, quality: float) -> tuple[float, float]:
        x = left + (math.log10(us) - x0) / (x1 - x0) * (width - left - 150)
        return x, 40 + (y1 - quality) / (y1 - y0) * (height - 40 - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11" fill="#1b1f23">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="22" font-size="13" font-weight="bold">{title}</text>',
        f'<path d="M{left} 40V{height - bottom}H{width - 150}" stroke="#5d666f" fill="none"/>',
    ]
    for k in range(5):
        quality, us = y0 + (y1 - y0) * k / 4, 10 ** (x0 + (x1 - x0) * k / 4)
        (x, _), (_, y) = at(us, y0), at(10**x0, quality)
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{figure.format(quality)}</text>')
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{us:.3g}</text>')
    taken: list[tuple[float, float]] = []
    for us, quality, colour, name in sorted(points, key=lambda p: -p[1]):
        x, y = at(us, quality)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        while any(abs(y - b) < 12 and abs(x - a) < 170 for a, b in taken):
            y += 3
        taken.append((x, y))
        out.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


def training_svg() -> str:
    """Milliseconds of a window against the event rate: ours forward and with backward, and each rival, whose time stays."""
    rows = [json.loads(line) for line in newest("bench/results", "*/training-*.jsonl").read_text().splitlines()]
    rows = [r for r in rows if not r.get("memory")]
    swept = [r for r in rows if r.get("sweep")]
    size = swept[0]["units"], swept[0]["batch"]
    rivals = [r for r in rows if "beta" not in r and (r["units"], r["batch"]) == size]
    rivals += [r for r in rows if r["layer"] == "unrolled loop" and (r["units"], r["batch"]) == size]
    width, height, left, right, top, bottom = 760, 420, 60, 190, 50, 50
    most = max(r["ms"] for r in (*swept, *rivals)) * 1.05

    def at(rate: float, ms: float) -> tuple[float, float]:
        return left + rate * (width - left - right), top + (1 - ms / most) * (height - top - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11" fill="#1b1f23">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="22" font-size="13" font-weight="bold">ms of 70 steps, {size[0]} units, batch {size[1]}, against the '
        "share of units that speak</text>",
        f'<path d="M{left} {top}V{height - bottom}H{width - right}" stroke="#5d666f" fill="none"/>',
    ]
    for k in range(6):
        (x, _), (_, y) = at(k / 5, 0), at(0, most * k / 5)
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{k * 20} %</text>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * k / 5:.0f}</text>')
    for what, colour, name in (
        ("ms", "#0a7d55", "ours, forward and backward"),
        ("forward_ms", "#6fbf9f", "ours, forward"),
    ):
        points = [at(r["event_rate"], r[what]) for r in swept]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        out.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    for r in rivals:
        (x0, y), (x1, _) = at(0, r["ms"]), at(1, 0)
        out.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="#b4375b" stroke-dasharray="5 4" fill="none"/>')
        out.append(f'<text x="{x1 + 8}" y="{y + 4:.1f}" fill="#b4375b">{r["layer"]}</text>')
    return "\n".join([*out, "</svg>", ""])


SECTIONS = {
    "README.md": {"demo": demo_table, "words": words},
    "docs/benchmarks.md": {
        "learning-rates": learning_rates,
        "demo-search": demo_search,
        "steps": steps,
        "throughput": throughput,
        "delta": delta,
        "training": training,
        "dense-cells": dense_cells,
        "gpu": on_a_gpu,
        "paper": paper,
        "whole-byte": whole_byte,
        "multiply": multiplied,
        "wikitext2": wikitext2,
        "medium": described,
        "kernels": kernels,
        "heatmap": heatmap,
    },
    "docs/pruning.md": {"pruned": pruned},
}
FIGURES = {"docs/heatmap.svg": heatmap_svg, "docs/training.svg": training_svg}
FIGURES |= {"docs/pruning.svg": pruned_svg} if LATENCY.exists() else {}
FIGURES |= {"docs/multiply.svg": multiply_svg} if MULTIPLY.exists() else {}


def render(text: str, sections: dict[str, Any]) -> str:
    """``text`` with what stands between the markers of each section replaced."""
    for name, make in sections.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"no markers for section {name!r}.")
        made = make()
        text = pattern.sub(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
    return text


def main() -> None:
    """Rewrites every page."""
    for page, sections in SECTIONS.items():
        path = ROOT / page
        path.write_text(render(path.read_text(), sections))
        print(page)
    for page, make in FIGURES.items():
        (ROOT / page).write_text(make())
        print(page)


if __name__ == "__main__":
    main()
