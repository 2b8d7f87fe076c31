"""What was trained and how long it took: the demonstration, its search, training on a processor and on a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sparsefold.report import markdown

from .files import ROOT, newest, table


def demo_table() -> str:
    """The demonstration's table, its targets and where they come from."""
    path = newest("results/demo", "*.json")
    shown = json.loads(path.read_text())
    others = [newest(f"bench/results/{machine}", "demo-*.json") for machine in ("amd-epyc-avx2", "amd-epyc-avx512vnni")]
    return f"{markdown(shown)}\n\n{_machine(shown)}, from [{path.name}]({path.relative_to(ROOT)}). " + " ".join(
        map(_elsewhere, others)
    )


def _elsewhere(path: Path) -> str:
    other = json.loads(path.read_text())
    missed = "; ".join(
        f"{t['name']}: {t['target']}, measured {t['measured']:.4g}" for t in other["targets"] if not t["held"]
    )
    ratios = " and ".join(
        f"{t['measured']:.3g}x ({t['target']})" for t in other["targets"] if t["target"].startswith("at least")
    )
    return f"On {_machine(other)}, {ratios}; not held: {missed or 'nothing'} ([{path.name}]({path.relative_to(ROOT)}))."


def _machine(result: dict[str, Any]) -> str:
    return f"{result['provenance']['processor']}, {result['provenance']['isa']}"


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
    return _dense_cells("intel*avx512*", every=True)


def dense_cells_amd() -> str:
    """The same on an AMD EPYC with AVX-512, ours alone."""
    return _dense_cells("amd*avx512*", every=False)


def dense_cells_avx2() -> str:
    """The same without AVX-512, ours alone."""
    return _dense_cells("*avx2", every=False)


def _dense_cells(machine: str, every: bool) -> str:
    path = newest("bench/results", f"{machine}/dense-cells-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ("threads", "units, batch", "layer", "ms", "forward", "backward", "against torch's")
    return table(
        columns,
        [
            f"| {r['threads']} | {r['units']}, {r['batch']} | {r['layer']} | {r['ms']:.1f} | {r['forward_ms']:.1f} "
            f"| {r['backward_ms']:.1f} | {r['ratio']:.2f}x |"
            for r in rows
            if every or r["layer"].startswith("our")
        ],
        _from(path, rows[0]),
    )


def _from(path: Path, about: dict[str, Any]) -> str:
    where = f"[{path.name}](../{path.relative_to(ROOT)})"
    return f"{about['processor']}, {about['isa']}, seed {about['seed']}. From {where}."


def choices() -> str:
    """What choices of the training kernels are worth, beside what they were chosen over."""
    return _choices("*avx2")


def choices_amd() -> str:
    """The same on an AMD EPYC with AVX-512."""
    return _choices("amd*avx512*")


def _choices(machine: str) -> str:
    path = newest("bench/results", f"{machine}/choices-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ("choice", "layer", "units, batch", "threads", "of what", "ms without", "ms with", "faster")
    return table(
        columns,
        [
            f"| {r['choice']} | {r['layer']} | {r['units']}, {r['batch']} | {r['threads']} | {r['way']} | {r['other_ms']:.1f} "
            f"| {r['chosen_ms']:.1f} | {r['ratio']:.2f}x |"
            for r in rows
        ],
        _from(path, rows[0]),
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
        x, _ = at(k / 5, 0)
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{k * 20} %</text>')
    ten = 10 ** math.floor(math.log10(most))
    tick = next(ten * part for part in (0.1, 0.2, 0.5, 1.0) if most / (ten * part) <= 10)
    for k in range(int(most / tick) + 1):
        _, y = at(0, k * tick)
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{k * tick:g}</text>')
    names: list[tuple[float, str, str]] = []  # where they would stand, what they say, their colour
    for what, colour, name in (
        ("ms", "#0a7d55", "ours, forward and backward"),
        ("forward_ms", "#6fbf9f", "ours, forward"),
    ):
        points = [at(r["event_rate"], r[what]) for r in swept]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        names.append((points[-1][1], name, colour))
    for r in rows:
        if r["layer"] == "ours, events in x, 10 % of the blocks" and (r["units"], r["batch"]) == size:
            x, y = at(r["event_rate"], r["ms"])
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0067a8"/>')
            out.append(f'<path d="M{x:.1f} {y:.1f}v-66" stroke="#0067a8" stroke-width="0.8"/>')
            out.append(f'<text x="{x - 4:.1f}" y="{y - 72:.1f}" fill="#0067a8">both ways, 10 % of the blocks</text>')
    for r in rivals:
        (x0, y), (x1, _) = at(0, r["ms"]), at(1, 0)
        out.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="#b4375b" stroke-dasharray="5 4" fill="none"/>')
        names.append((y, r["layer"], "#b4375b"))
    free = 0.0
    for wanted, name, colour in sorted(names):
        y = max(wanted, free)
        out.append(f'<text x="{width - right + 8}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
        free = y + 14
    return "\n".join([*out, "</svg>", ""])
