"""Language models of words: the full size, medium, and both sparsities of one network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .files import CELLS, ROOT, results, table


def paper() -> str:
    """Runs of the recipe ptb-paper: what they took, and what came of them."""
    lines = []
    for path, r in results("paper"):
        took, c, start = r["training"], r["lm"], r["start"]
        ours = {row["engine"]: row for row in r["race"] if row["network"].startswith("egru") and not row["rival"]}
        kind = "mean" if ours["sparsefold"].get("scores") else "p50"
        wide, narrow = (ours.get(e, ours["sparsefold"])["latency_us"][kind] for e in ("sparsefold", "sparsefold i8"))
        seconds = (
            f"{start['seconds']:.0f} + {took['seconds'] - start['seconds']:.0f}" if start else f"{took['seconds']:.0f}"
        )
        seconds += " more" if c.get("initial") else ""
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
        'on the processor that a transfer checkpoint came to; "more": on a processor, begun with the network of the line before. '
        "MACs are counted on a sample, decoder included, and compared with "
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
    return table(columns, lines, about)


def stand_in() -> str:
    """Networks of a few hundred units under the settings of ptb-paper: depth, width, dropout."""
    lines = []
    for r in (run for _, made in results("stand_in") for run in made["runs"]):
        c, said = r["lm"], r["said"]
        other = f"{'lr=' + said['lr'] if 'lr' in said else ''} {said.get('more', '')}".strip()
        layers = f"{'' if r['cell'] == 'egru' else r['cell'].upper() + ' '}{' + '.join(map(str, c['hidden']))}"
        events = f"{r['event_rate']:.0%}" if r["cell"] == "egru" else ""
        lines.append(
            f"| {r['words']:,} | {r['steps']:,}, {r['passes']:.0f} | {layers} | {r['weights'] / 1e6:.2f} M | {c['density']:.0%} "
            f"| {other} | {events} | {r['train_perplexity']:.0f} | **{r['valid_perplexity']:.0f}** "
            f"| {r['best_step']:,} |"
        )
    columns = (
        "words", "steps, passes", "layers", "their weights", "live", "else", "events", "train, under dropout", "valid",
        "best step",
    )  # fmt: skip
    about = (
        "The first words of Penn Treebank's training split, its whole validation split; batch 16, one seed, the recipe's "
        "schedules; valid is the best that was found once the weights had gone."
    )
    return table(columns, lines, about)


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
    for path, r in results("lm"):
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
    return table(columns, lines, about)


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
        points.append((r["us"], r["test"], CELLS[r["cell"]], name))
        if r["float"] < math.inf:
            points.append((r["float"], r["test"], CELLS[r["cell"]], f"{name}, fastest rival"))
    return _scatter("test perplexity (up) against µs of a word, logarithmic", points, "{:.0f}")


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
