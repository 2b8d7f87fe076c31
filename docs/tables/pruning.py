"""Every way to prune at every density: the table and its plot."""

from __future__ import annotations

import json
import math
from typing import Any

from .files import ROOT

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
