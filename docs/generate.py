"""Writes the tables of README.md and docs/benchmarks.md from committed results: ``make docs``. Nothing there is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sparsefold.report import markdown

ROOT = Path(__file__).resolve().parent.parent


def newest(folder: str, pattern: str) -> Path:
    """The committed result that was made last, by the date in its name."""
    found = sorted((ROOT / folder).glob(pattern))
    if not found:
        raise ValueError(f"there is no {pattern} in {folder}; run what makes it first (docs/benchmarks.md).")
    return found[-1]


def demo_table() -> str:
    """The demonstration's table, its targets and where they come from."""
    path = newest("results/demo", "*.json")
    return f"{markdown(json.loads(path.read_text()))}\n\nFrom [{path.name}]({path.relative_to(ROOT)})."


def learning_rates() -> str:
    """Validation bits per character of every rate searched, the chosen one of each network in bold."""
    path = ROOT / "results/text/lr-search.json"
    runs = json.loads(path.read_text())["runs"]
    means: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        means.setdefault((run["network"], run["lr"]), []).append(run)
    average = {key: sum(r["valid_bits_per_char"] for r in group) / len(group) for key, group in means.items()}
    best = {name: min(v for (n, _), v in average.items() if n == name) for name, _ in average}
    lines = [
        "| network | peak learning rate | bits per character, each seed | mean | event rate |",
        "|---|---|---|---|---|",
    ]
    for (name, lr), group in sorted(means.items()):
        each = ", ".join(f"{r['valid_bits_per_char']:.4f}" for r in sorted(group, key=lambda r: r["seed"]))
        rate = sum(r["event_rate"] for r in group) / len(group)
        mark = "**" if average[name, lr] == best[name] else ""
        events = "" if name == "gru" else f"{rate:.3f}"
        lines.append(f"| {name} | {lr:g} | {each} | {mark}{average[name, lr]:.4f}{mark} | {events} |")
    steps = runs[0]["config"]["steps"]
    return "\n".join(lines) + f"\n\nValidation split, {steps} steps. From [{path.name}](../{path.relative_to(ROOT)})."


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
        if r["density"] not in (1.0, 0.1) or (events and r["event_rate"] != 0.1) or (not events and r["density"] < 1):
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


SECTIONS = {
    "README.md": {"demo": demo_table},
    "docs/benchmarks.md": {"learning-rates": learning_rates, "steps": steps, "kernels": kernels},
}


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


if __name__ == "__main__":
    main()
