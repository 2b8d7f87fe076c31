"""The plots of a demo's page as SVG: loss, latency, event rates, MACs by part, who speaks when; and masks as a PNG.

Units of all figures are CSS pixels (72 dots an inch, so a point is a pixel). Each paint is drawn in a stand-in colour
that the SVG then names as a CSS variable; so one drawing serves light and dark.
"""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO, StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold._summary import Summary, clean, label_of, macs_by_role, number

# name: (light, dark). Networks take net0, net1, … in their order; the first is the dense one. Blue against orange and
# purple is told apart with every kind of colour blindness, and all keep 3:1 against the page.
PALETTE = {
    "page": ("#ffffff", "#14171a"),
    "ink": ("#1b1f23", "#e4e7ea"),
    "muted": ("#5d666f", "#9aa4ad"),
    "line": ("#dde1e5", "#30363c"),
    "net0": ("#6b747c", "#a4adb5"),
    "net1": ("#0067a8", "#5cb3ee"),
    "net2": ("#c25400", "#f0954a"),
    "net3": ("#00795a", "#3fc19a"),
    "net4": ("#6a45c4", "#ab93f0"),
    "net5": ("#7d6608", "#c4a83a"),
    "net6": ("#b3263c", "#f08090"),
    "input": ("#aab3bb", "#626c75"),
    "recurrent": ("#6b747c", "#a4adb5"),
    "linear": ("#00795a", "#3fc19a"),
    "decoder": ("#a03c86", "#dd8fc8"),
}

_PAINT = {name: f"#0a0b{i:02x}" for i, name in enumerate(PALETTE)}
_RC: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "sparsefold", "path.simplify": False, "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "text.color": _PAINT["ink"], "axes.labelcolor": _PAINT["muted"], "axes.edgecolor": _PAINT["line"],
    "xtick.color": _PAINT["line"], "ytick.color": _PAINT["line"], "xtick.labelcolor": _PAINT["muted"],
    "ytick.labelcolor": _PAINT["muted"], "grid.color": _PAINT["line"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "figure.dpi": 72, "lines.solid_capstyle": "round",
}  # fmt: skip


def figures(summary: Summary) -> str:
    """Every plot that the summary has the figures for, each an element of the page.

    Raises ``ImportError`` without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the HTML report draws with matplotlib: pip install 'sparsefold[report]'.") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever style the caller set
        matplotlib.rcParams.update(_RC)
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the browser's fonts draw the text, not matplotlib's
        plots = [_loss(summary), _latency(summary), _event_rates(summary), _macs_by_part(summary)]
        plots += [*_rasters(summary), *_masks(summary)]
    return "".join(filter(None, plots))


def _axes(height: float, margins: tuple[float, float, float, float], width: float = 480) -> Any:
    """A figure with one pair of axes; margins left, right, top, bottom."""
    from matplotlib.figure import Figure

    fig, (left, right, top, bottom) = Figure(figsize=(width / 72, height / 72)), margins
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return fig, fig.add_axes(box)


def _figure(fig: Any, name: str, title: str, caption: str, wide: bool = False) -> str:
    """The figure as an element of the page, its paints as CSS variables and its ids its own."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    fig.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for paint, colour in _PAINT.items():
        svg = svg.replace(colour, f"var(--{paint})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    size = r'width="([\d.]+)pt" height="([\d.]+)pt"'
    svg = re.sub(size, r'width="\1" height="\2"' + f' role="img" aria-label="{escape(title)}"', svg, count=1)
    body = f"<div class='scroll'>{svg}</div>" if wide else svg
    heading = f"<h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>"
    return f"<figure{' class=wide' if wide else ''}>{heading}{body}</figure>"


def _write(axes: Any, text: str, x: float, y: float, dx: float, dy: float, **style: Any) -> None:
    """Text at x (a fraction of the width) and y (data), moved by pixels."""
    axes.annotate(text, (x, y), (dx, dy), ("axes fraction", "data"), "offset pixels", **({"size": 12} | style))


def _heading(axes: Any, text: str) -> None:
    """What the vertical axis shows, above it and readable without turning one's head."""
    _write(axes, text, 0, axes.get_ylim()[1], -40, 8, color=_PAINT["muted"])


def _paint(summary: Summary, key: str) -> str:
    return _PAINT[f"net{list(summary['networks']).index(key) % 7}"]


def _folded(summary: Summary, key: str) -> str:
    return textwrap.fill(label_of(summary, key).replace(" %", "\N{NO-BREAK SPACE}%"), 16)


def _room(summary: Summary, keys: Iterable[str]) -> float:
    """Pixels that the names of networks, each with a figure beneath, need one above the other."""
    return sum(15 * (_folded(summary, key).count("\n") + 2) + 5 for key in keys)


def _end_labels(axes: Any, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines (x, y, text, colour) beside their ends, moved apart where they would touch."""
    box, (low, high) = axes.get_window_extent(), axes.get_ylim()
    lines = sorted(lines, key=lambda line: line[1])
    half = [7.5 * (text.count("\n") + 1) for _, _, text, _ in lines]
    at = [(y - low) / (high - low) * box.height for _, y, _, _ in lines]  # pixels above the axis
    for _ in range(100):  # each pass about halves what still overlaps
        for i in range(len(at) - 1):
            overlap = max(half[i] + half[i + 1] + 5 - (at[i + 1] - at[i]), 0)
            at[i], at[i + 1] = at[i] - overlap / 2, at[i + 1] + overlap / 2
        at[:1] = [max(at[0], half[0] - 36)] if at else []
    for (x, y, text, colour), height in zip(lines, at, strict=True):
        axes.annotate(
            text, (x, y), (box.width + 20, height), textcoords="axes pixels", color=colour, va="center", size=12,
            annotation_clip=False, linespacing=1.2,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 3},
        )  # fmt: skip


def _loss(summary: Summary) -> str:
    curves = {}
    for key, network in summary["networks"].items():
        points = [(p["step"], p.get("valid_bits_per_char")) for p in network.get("log") or ()]
        if points := [p for p in points if p[1] is not None and math.isfinite(p[1])]:
            curves[key] = np.array(points, float).T
    if not curves:
        return ""
    fig, ax = _axes(64 + max(236, _room(summary, curves)), (44, 126, 24, 40))
    ends = []
    for key, (steps, bits) in curves.items():
        ax.plot(steps, bits, color=_paint(summary, key))
        name = f"{_folded(summary, key)}\n{number(bits[-1], 'bits')}"
        ends.append((steps[-1], bits[-1], name, _paint(summary, key)))
    # The fall of the first steps would press the ends together, so the frame begins where a sixth of training is done.
    shown = np.concatenate([bits[steps >= steps[-1] / 6] for steps, bits in curves.values()])
    room = 0.06 * max(float(np.ptp(shown)), 0.1)
    ax.set_ylim(shown.min() - room, shown.max() + room)
    ax.grid(axis="y")
    ax.set_xlabel("training step")
    _heading(ax, "bits per character, validation")
    _end_labels(ax, ends)
    caption = "Lower is better; where the lines end is what the networks are worth on text held back from training."
    if any(bits.max() > shown.max() for _, bits in curves.values()):
        caption += " The first steps lie above the frame."
    return _figure(fig, "loss", "Validation loss", caption)


def _event_rates(summary: Summary) -> str:
    """Per unit and over time, one above the other on one scale."""
    fields = ("event_rate_per_unit", "event_rate_over_time")
    networks = [(k, n) for k, n in summary["networks"].items() if any(n.get(field) for field in fields)]
    if not networks:
        return ""
    targets = sorted({t for _, n in networks if (t := (n.get("config") or {}).get("target_rate")) is not None})
    high = max(max(n.get(field) or [0.0]) for _, n in networks for field in fields)
    panel = max(166, _room(summary, dict(networks)))
    fig, upper = _axes(158 + 2 * panel, (44, 126, 24, 134 + panel))
    lower = fig.add_axes(upper.get_position().translated(0, -(84 + panel) / (158 + 2 * panel)))
    for ax, field in zip((upper, lower), fields, strict=True):
        ends = []
        for key, network in networks:
            rates = 100 * np.asarray(network.get(field) or [], float)
            if not len(rates):
                continue
            if ax is upper:
                x, rates = np.arange(1.0, len(rates) + 1), np.sort(rates)[::-1]
            else:
                x = (np.arange(len(rates)) + 0.5) * (network.get("event_rate_block") or 1)
            ax.plot(x, rates, color=_paint(summary, key), linewidth=1.8 if ax is upper else 1.2)
            mean = number(float(rates.mean()) / 100, "share")
            ends.append((x[-1], rates[-1], f"{_folded(summary, key)}\nmean {mean}", _paint(summary, key)))
        for target in targets:
            ax.axhline(100 * target, color=_PAINT["ink"], linewidth=1, linestyle=(0, (4, 3)))
        ax.set_ylim(0, 115 * max(high, *targets, 0.01))
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
        ax.xaxis.set_major_formatter(lambda v, _: f"{v / 1e3:g} k" if v >= 1e3 else f"{v:g}")
        ax.grid(axis="y")
        ax.set_xlabel("units, busiest first" if ax is upper else "bytes of test text")
        _heading(ax, "event rate of each unit" if ax is upper else "event rate of all units, over time")
        _end_labels(ax, ends)
    dashed = " Dashed: the target, " + ", ".join(number(t, "share") for t in targets) + "." if targets else ""
    caption = f"Flat lines are work shared evenly, whatever text comes; a unit at zero is never used.{dashed}"
    return _figure(fig, "events", "Event rate", caption)


def _latency(summary: Summary) -> str:
    rows = sorted((r for r in summary["rows"] if r.get("latency_us")), key=lambda r: r["latency_us"]["p50"])
    if not rows:
        return ""
    p50, p99 = (np.array([r["latency_us"][p] for r in rows]) for p in ("p50", "p99"))
    fig, ax = _axes(64 + 40 * len(rows), (4, 12, 8, 40))
    wide_spread = p50.max() > 20 * p50.min()
    if wide_spread:
        ax.set_xscale("log")
        ax.set_xlim(10 ** math.floor(math.log10(p50.min())), 1.1 * p99.max())
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.xaxis.set_minor_formatter(lambda v, _: "")
    else:
        ax.set_xlim(0, 1.03 * p99.max())
    for y, row in enumerate(rows):
        colour, rival = _paint(summary, row["network"]), bool(row.get("rival"))
        fill = "none" if rival else colour
        ax.barh(y, p50[y], 0.26, color=fill, edgecolor=colour, linewidth=1.2)
        ax.plot([p50[y], p99[y]], [y, y], color=colour, linewidth=1.2)
        ax.plot([p99[y]] * 2, [y - 0.11, y + 0.11], color=colour, linewidth=1.2)
        name = f"{clean(row['engine'])}, {label_of(summary, row['network'])}"
        value = f"{number(p50[y], 'us')} µs, p99 {number(p99[y], 'us')}"
        for x, text, align in ((0, name, "left"), (1, value, "right")):
            _write(ax, text, x, y, 0, 11, ha=align)
    ax.set_ylim(len(rows) - 0.6, -0.7)
    ax.set_yticks([])
    ax.set_xlabel("µs per byte" + (", logarithmic" if wide_spread else ""))
    caption = "Bar: p50, whisker: p99. Filled: sparsefold; hollow: other engines. Shorter is better."
    return _figure(fig, "latency", "Latency of one byte", caption)


def _macs_by_part(summary: Summary) -> str:
    networks = [(k, n) for k, n in summary["networks"].items() if macs_by_role(n, "macs_dense")]
    if not networks:
        return ""
    fig, ax = _axes(46 + 132 * len(networks), (68, 52, 24, 4))
    names, y = ("macs_dense", "macs_weight", "macs_effective"), 0.0
    totals = {key: sum(macs_by_role(n, names[0]).values()) for key, n in networks}
    named = max(totals, key=totals.__getitem__)
    widest = totals[named]
    for key, network in networks:
        _write(ax, label_of(summary, key), 0, y, -64, 0, size=13, va="center")
        y += 0.6 * (key == named)  # the names of the parts stand over the widest bar
        for name in names:
            y, start = y + 1, 0.0
            for role, value in macs_by_role(network, name).items():
                ax.barh(
                    y,
                    value,
                    0.62,
                    left=start,
                    color=_PAINT.get(role, _PAINT["linear"]),
                    edgecolor=_PAINT["page"],
                    linewidth=0.6,
                )
                if key == named and name == names[0]:
                    roles = list(macs_by_role(network, name))
                    place = 0.0 if role == roles[0] else 1.0 if role == roles[-1] else 0.5
                    ink = _PAINT["decoder" if role == "decoder" else "muted"]
                    side = {0.0: "left", 0.5: "center", 1.0: "right"}[place]
                    ax.text(start + place * value, y - 0.48, role, size=12, color=ink, ha=side)
                start += value
            _write(ax, name.removeprefix("macs_"), 0, y, -64, 0, va="center", color=_PAINT["muted"])
            total, decoder = number(start, "macs"), macs_by_role(network, name).get("decoder")
            if decoder and name == "macs_effective" and start < widest / 2:
                total += f", decoder {number(decoder, 'macs')} of it"
            ax.annotate(total, (start, y), (5, 0), textcoords="offset pixels", va="center", size=12)
        y += 1.5
    ax.set_ylim(y - 0.8, -0.6)
    ax.set_xlim(0, widest)
    ax.axis("off")
    executed = [macs_by_role(n, "macs_effective") for _, n in networks]
    caption = "Multiply-accumulates per byte: dense, zero weights skipped (weight), executed (effective)."
    if len(executed) > 1 and all(e.get("decoder", 0.0) > 0.5 * sum(e.values()) for e in executed[1:]):
        caption += " What is left is mostly the decoder."
    return _figure(fig, "macs", "Where the multiplications go", caption)


def _rasters(summary: Summary) -> list[str]:
    figures: list[str] = []
    for key, network in summary["networks"].items():
        raster = network.get("raster")
        if not raster or not any(raster["events"]):
            continue
        events, text = raster["events"], raster["text"]
        known = len(network.get("event_rate_per_unit") or ())
        rates = np.bincount([unit for emitted in events for unit in emitted], minlength=known)
        units = len(rates)
        row = np.empty(units, int)  # where each unit is drawn: the busiest at the bottom
        row[np.argsort(-rates, kind="stable")] = np.arange(units)
        pitch = min(max(1028 / len(events), 8.5), 11)  # fills the page where that keeps the text together
        fig, ax = _axes(max(380, min(units, 1024) * 0.6), (44, 8, 64, 40), width=52 + pitch * len(events))
        at = [(x, row[unit]) for x, emitted in enumerate(events) for unit in emitted]
        xs, ys = np.array(at, float).T
        dashes = np.stack([xs - 0.42, xs + 0.42, np.full(len(xs), np.nan)], 1).ravel()
        room = 0.95 * ax.get_window_extent().height / (units + 1)
        thin = {"linewidth": max(room, 1.0), "solid_capstyle": "butt"}  # thinner lines are too faint to be seen
        ax.plot(dashes, np.repeat(ys, 3), color=_paint(summary, key), **thin)
        ax.set(xlim=(-0.5, len(events) - 0.5), ylim=(-1, units), xticks=[], yticks=[0, units - 1])
        ax.set_yticklabels(["1", str(units)])
        ax.set_ylabel("units, busiest first", labelpad=-12)
        height = ax.get_window_extent().height
        strip = ax.inset_axes((0, 1 + 6 / height, 1, 47 / height))
        share = [100 * len(emitted) / units for emitted in events]
        strip.bar(range(len(events)), share, 0.84, color=_PAINT["net0"])
        strip.set(xlim=ax.get_xlim(), xticks=[], yticks=[max(share)])
        strip.set_yticklabels([f"{max(share):.0f} %"])
        strip.tick_params(axis="x", length=0)
        for x, c in enumerate(text[: len(events)]):
            shown = "↵" if c == "\n" else clean(c)
            below = ax.get_xaxis_transform()
            ax.text(x, -0.03, shown, transform=below, size=12, ha="center", va="top", family="DejaVu Sans Mono")
        caption = f"{label_of(summary, key)}. Each dash is a unit that emits at that byte of the text beneath; "
        caption += "above, the share of units that emit."
        figures.append(_figure(fig, f"raster-{len(figures)}", "Who speaks when", caption, wide=True))
    return figures


def _masks(summary: Summary) -> list[str]:
    """Blocks that are left, a square for each gate; drawn by hand, for matplotlib spends five times the bytes on a dash."""
    found: list[str] = []
    side, gap = 330, 22
    for key, network in summary["networks"].items():
        if not (mask := network.get("mask")):
            continue
        columns, gates, (high, wide) = mask["columns"], mask["gates"], mask["block"]
        bits = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in mask["rows"]]
        kept = np.unpackbits(np.array(bits), axis=1, count=columns).astype(np.int8)
        squares = ""
        for gate, part in enumerate(np.split(kept, gates)):
            edges = np.diff(part, axis=1, prepend=0, append=0)  # where a run of neighbours begins, and where it is over
            runs = zip(*np.nonzero(edges > 0), np.nonzero(edges < 0)[1], strict=True)
            path = "".join(f"M{first} {y}h{last - first}" for y, first, last in runs)
            moved = f"translate({gate * (side + gap) + 0.5} 20.5) scale({side / columns:.5f} {side / len(part):.5f})"
            squares += (
                f"<text x='{gate * (side + gap)}' y='12' font-size='12' fill='var(--muted)'>{'rzn'[gate % 3]}</text>"
            )
            squares += f"<path transform='{moved} translate(0 .5)' d='{path}' fill='none' stroke='var(--net{{}})'/>"
            squares += f"<rect x='{gate * (side + gap) + 0.5}' y='20.5' width='{side}' height='{side}' "
            squares += "fill='none' stroke='var(--line)'/>"
        width, height = gates * (side + gap) - gap + 1, side + 21
        colour = list(summary["networks"]).index(key) % 7
        svg = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        )
        svg += f"id='mask-{len(found)}' role='img' aria-label='Which blocks are left'>{squares.format(*[colour] * gates)}</svg>"
        caption = f"{label_of(summary, key)}. Each dash is a block of {high} x {wide} weights that is left, "
        caption += f"{number(float(kept.mean()), 'share')} of the recurrent matrix, a square for each gate: "
        caption += "from left to right the units that are read, from top to bottom those that read them."
        heading = f"<h2>Which blocks are left</h2><figcaption>{escape(caption)}</figcaption>"
        found.append(f"<figure class=wide>{heading}<div class='scroll'>{svg}</div></figure>")
    return found


MOST_PIXELS = 480  # of a side of a matrix: larger ones are drawn as the share of weights in each cell


def patterns(matrices: Mapping[str, tuple[NDArray[np.bool_], int]]) -> bytes:
    """A PNG of which weights each matrix (rows, cols) holds, named, with its number of gates: dark where there are some.

    All to one scale, so that sizes compare; thin lines part the gates. Raises ``ImportError`` without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'sparsefold[report]'.") from error
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    # Cells of one size for all matrices: at most MOST_PIXELS along the longest side, at least two pixels for a weight.
    longest = max(max(mask.shape) for mask, _ in matrices.values())
    cell = -(-longest // MOST_PIXELS)
    pixels = max(min(MOST_PIXELS // longest, 12), 1)
    shares = {name: _shares(mask, cell) for name, (mask, _) in matrices.items()}
    margin, head = 18, 52
    width = [max(share.shape[1] * pixels, 250) + margin for share in shares.values()]
    total, rows, row = MOST_PIXELS * 2 + 3 * margin, [], []  # type: ignore[var-annotated]
    for name, w in zip(shares, width, strict=True):  # as text flows: what does not fit starts a new row
        if row and sum(x for _, x in row) + w > total - margin:
            rows.append(row)
            row = []
        row.append((name, w))
    rows.append(row)
    heights = [max(shares[name].shape[0] * pixels for name, _ in row) + head + margin for row in rows]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.parse_math": False}):
        fig = Figure(figsize=(total / 100, sum(heights) / 100), dpi=100, facecolor="white")
        ink = LinearSegmentedColormap.from_list("ink", ["#f2f4f6", "#123a5c"])
        top = float(sum(heights))
        for row, height in zip(rows, heights, strict=True):
            left = float(margin)
            for name, w in row:
                mask, gates = matrices[name]
                share = shares[name]
                h, wide = share.shape[0] * pixels, share.shape[1] * pixels
                bottom = top - head - h
                ax = fig.add_axes((left / total, bottom / sum(heights), wide / total, h / sum(heights)))
                ax.imshow(share, cmap=ink, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
                ax.set(xticks=[], yticks=[])
                for gate in range(1, gates):
                    ax.axhline(gate * len(share) / gates - 0.5, color="#d4004f", linewidth=0.8)
                kept = mask.mean() if mask.size else 0.0
                title = f"{clean(name)}\n{mask.shape[0]} x {mask.shape[1]}, {kept:.1%} kept"
                fig.text(left / total, (top - 10) / sum(heights), title, va="top", color="#1b1f23", linespacing=1.4)
                left += w
            top -= height
        buffer = BytesIO()
        fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _shares(mask: NDArray[np.bool_], cell: int) -> NDArray[np.float64]:
    """Share of weights in each cell x cell part, of fewer at an edge."""
    rows, cols = (np.arange(0, n, cell) for n in mask.shape)
    kept = np.add.reduceat(np.add.reduceat(mask.astype(np.int64), rows, 0), cols, 1)
    height, width = (np.diff(np.append(at, n)) for at, n in ((rows, mask.shape[0]), (cols, mask.shape[1])))
    shares: NDArray[np.float64] = kept / np.outer(height, width)
    return shares
