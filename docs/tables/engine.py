"""What the engine takes: products, steps, many streams, delta networks, a whole byte, density times event rate."""

from __future__ import annotations

import json
import math
from typing import Any

from .files import ROOT, newest


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
    """Time of a whole step of networks of several sizes, ours in four precisions and from C, and every rival."""
    return _steps("intel*avx512*", every=True)


def steps_amd() -> str:
    """The same on an AMD EPYC with AVX-512, of the rivals the fastest of each kind."""
    return _steps("amd*avx512*", every=False)


def steps_avx2() -> str:
    """The same without AVX-512, of the rivals the fastest of each kind."""
    return _steps("*avx2", every=False)


def _steps(machine: str, every: bool) -> str:
    path = newest("bench/results", f"{machine}/steps-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not every:
        fastest = ("ratio_to_fastest_f32", "ratio_to_fastest_int8")
        rows = [r for r in rows if "ours" in r["engine"] or any(r[name] == 1 for name in fastest)]
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
        "µs p50 | µs p99 | against our dense step | against the fastest float32 rival | int8 rival |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ours = r["engine"].startswith("ours")
        name = f"**{r['engine']}**" if ours else r["engine"]
        errors = f"{r['loss']:.1%} | {r['loss_checked']:.1%}" if "loss" in r else " | "
        rates = ", ".join("all" if rate is None else f"{rate:.0%}" for rate in r.get("event_rates", ()))
        macs = f"{r['cost']['macs_effective']:,.0f}" if ours else ""
        times = f"{r['latency_us']['p50']:.2f} | {r['latency_us']['p99']:.2f}"
        ratios = " | ".join(f"{r[f'ratio_to_{to}']:.2f}x" for to in ("dense", "fastest_f32", "fastest_int8"))
        size = f"{r['model']}: {r['cell'].upper()} {r['units']} x {r['layers']}"
        lines.append(f"| {size} | {name} | {errors} | {rates} | {macs} | {times} | {ratios} |")
    about = rows[0]
    where = f"{about['processor']}, {about['isa']}, one thread, pinned, Python call included."
    return "\n".join(lines) + f"\n\n{where} From [{path.name}](../{path.relative_to(ROOT)})."


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
