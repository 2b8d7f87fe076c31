"""A demo's ``summary.json`` as a terminal table, a markdown table and one self-contained HTML page.

The schema is in ``docs/results.md``. Nothing is measured or counted here; what the summary lacks is shown as a dash.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from sparsefold.program import write_atomically

SCHEMA = "sparsefold-demo/1"
WIDTH = 118  # columns of the terminal table

Summary = Mapping[str, Any]

# Of each column of the table: heading, its second line, and its width in a terminal.
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("", "engine", 16), ("bits per", "char", 10), ("event", "rate", 9), ("", "density", 9), ("MACs", "dense", 8),
    ("MACs", "weight", 8), ("MACs", "effective", 11), ("of it", "decoder", 9), ("", "file", 9), ("µs", "p50", 8),
    ("µs", "p99", 8), ("ratio to", "rival", 10),
)  # fmt: skip


def table(summary: Summary) -> str:
    """The result as text for a terminal, at most 118 columns: headline, one row per network and engine, targets.

    Raises ``ValueError`` where ``summary`` has another schema.
    """
    _check(summary)
    rule = "─" * sum(width for *_, width in _COLUMNS)
    lines = [*textwrap.wrap(_headline(summary), WIDTH), ""]
    lines += [_aligned([c[0] for c in _COLUMNS]), _aligned([c[1] for c in _COLUMNS])]
    label = ""
    for network, cells in _rows(summary):
        if network != label:
            label = network
            lines += [rule, textwrap.shorten(label, WIDTH, placeholder="…")]
        lines.append(_aligned(["  " + cells[0], *cells[1:]]))
    lines += [rule, *(line for note in _notes(summary) for line in textwrap.wrap(note, WIDTH))]
    if summary.get("targets"):
        lines += ["", "Targets"]
    for held, target in _targets(summary):
        lines += textwrap.wrap(target, WIDTH, initial_indent=f"  {held:<10}", subsequent_indent=" " * 12)
    return "\n".join(lines) + "\n"


def markdown(summary: Summary) -> str:
    """The same rows as a markdown table, with the notes and the targets beneath.

    Raises ``ValueError`` where ``summary`` has another schema.
    """
    _check(summary)
    headings = ["network", "engine", *(" ".join(filter(None, column[:2])) for column in _COLUMNS[1:])]
    del headings[8]  # the decoder's share is named beside the effective MACs
    body = []
    for network, cells in _rows(summary):
        effective = cells[6] if cells[7] == "–" else f"{cells[6]}, decoder {cells[7]} of it"
        body.append([network, *cells[:6], effective, *cells[8:]])
    rows = [headings, [":--", ":--", *["--:"] * (len(headings) - 2)], *([_literal(c) for c in row] for row in body)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    text += "\n" + "\n".join(_literal(note) for note in _notes(summary)) + "\n"
    if summary.get("targets"):
        text += "\n" + "\n".join(f"- **{held}**: {_literal(target)}" for held, target in _targets(summary)) + "\n"
    return text


def html(summary: Summary) -> str:
    """One page with table, targets, plots, generated text and provenance, that needs nothing from outside itself.

    Raises ``ValueError`` where ``summary`` has another schema, ``ImportError`` without matplotlib.
    """
    _check(summary)
    title, notes = _headline(summary), "<br>".join(_prose(note) for note in _notes(summary))
    targets = "".join(
        f"<li class='{'held' if held == 'held' else 'missed'}'><b>{held}</b> {_prose(target)}</li>"
        for held, target in _targets(summary)
    )
    sections = [
        f"<header><p class='kicker'>{_kicker(summary)}</p><h1>{_prose(title)}</h1>{_lede(summary)}</header>",
        f"<section>{_html_results(summary)}<p class='note'>{notes}</p></section>",
        f"<section><h2>Targets</h2><ul class='targets'>{targets}</ul></section>" if targets else "",
        f"<section class='plots'>{_figures(summary)}</section>",
        _html_sample(summary),
        f"<section><h2>How each network was trained</h2>{_html_training(summary)}</section>",
        f"<section><h2>How each row was played</h2>{_html_parity(summary)}</section>",
        f"<section><h2>Provenance</h2>{_html_provenance(summary)}</section>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>sparsefold demo: {escape(title)}</title><style>{_style()}</style></head>\n"
        "<body><main>\n" + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"
    )


def write_report(summary: Summary, path: str | os.PathLike[str]) -> None:
    """Write :func:`html` of ``summary`` to ``path``, whole or not at all."""
    write_atomically(path, html(summary).encode())


# --- what all three say ----------------------------------------------------------------------------------------------


def _check(summary: Any) -> None:
    schema = summary.get("schema") if isinstance(summary, Mapping) else None
    if schema != SCHEMA:
        raise ValueError(f"the summary has schema {schema!r}, this report reads {SCHEMA!r}. Pass what the demo wrote.")
    if missing := [name for name in ("networks", "rows") if name not in summary]:
        raise ValueError(f"the summary holds no {' and no '.join(missing)}. Pass what the demo wrote, whole.")
    for part in (*summary["rows"], summary.get("fastest_rival"), summary.get("sample")):
        if part and part["network"] not in summary["networks"]:
            raise ValueError(
                f"the summary speaks of the network {part['network']!r}, it holds {', '.join(summary['networks'])}. "
                "Name one of these."
            )


def _number(value: float | None, kind: str) -> str:
    """A figure as it is printed everywhere; a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    match kind:
        case "bits":
            return f"{value:.3f}"
        case "share":
            text = f"{100 * value:.1f}"
            return (text.removesuffix(".0") if len(text) > 3 or value == 0 else text) + " %"
        case "macs":
            if value < 9_950:
                return f"{value:.0f}" if value < 1_000 else f"{value / 1e3:.1f} k"
            return f"{value / 1e3:.0f} k" if value < 999_500 else f"{value / 1e6:.2f} M"
        case "bytes":
            return f"{value / 1e3:.0f} kB" if value < 999_500 else f"{value / 1e6:.2f} MB"
        case "us":
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
        case "ratio":
            return f"{value:.{2 if value < 9.995 else 1}f}×"
        case "seconds":
            return f"{value:.0f} s"
        case _:
            return f"{value:.4g}"


def _clean(text: object, keep: str = "") -> str:
    """Text that can do nothing to a terminal or a page: control characters become a visible sign."""
    return "".join(c if c in keep or unicodedata.category(c)[0] != "C" else "\ufffd" for c in str(text))


def _literal(text: str) -> str:
    """Text as markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(text, quote=False))


def _label(summary: Summary, key: str) -> str:
    return _clean(summary["networks"][key].get("label") or key)


def _us(row: Mapping[str, Any], percentile: str) -> str:
    return _number((row.get("latency_us") or {}).get(percentile), "us")


def _macs(network: Mapping[str, Any], name: str) -> dict[str, float]:
    """MACs per byte by role, in the order of the network, without the parts that never multiply."""
    roles: dict[str, float] = {}
    for part in (network.get("cost") or {}).get("parts", ()):
        if part["macs_dense"]:
            roles[part["role"]] = roles.get(part["role"], 0.0) + part[name]
    return roles


def _rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """(network's label, cells of ``_COLUMNS``) of each row, rows of a network together."""
    order = list(summary["networks"])
    rows = []
    for row in sorted(summary["rows"], key=lambda r: order.index(r["network"])):
        network = summary["networks"][row["network"]]
        own = row["engine"] == "sparsefold"
        dense, weight = (_macs(network, name) for name in ("macs_dense", "macs_weight"))
        executed = _macs(network, "macs_effective") if own else dense  # other engines skip nothing
        totals = [sum(part.values()) if part else None for part in (dense, weight, executed)]
        cells = [
            _clean(row["engine"]) + "*" * bool(row.get("rival")),
            _number(row.get("bits_per_char"), "bits"),
            _number(network.get("event_rate"), "share"),
            _number(network.get("density"), "share"),
            *(_number(total, "macs") for total in (*totals, executed.get("decoder"))),
            _number(network.get("file_bytes") if own else None, "bytes"),
            _us(row, "p50"),
            _us(row, "p99"),
            _number(row.get("ratio_to_fastest_rival"), "ratio"),
        ]
        rows.append((_label(summary, row["network"]), cells))
    return rows


def _aligned(cells: Sequence[str]) -> str:
    first, *others = (
        (cell if len(cell) < width else cell[: width - 2] + "…", width)
        for cell, (*_, width) in zip(cells, _COLUMNS, strict=True)
    )
    return (first[0].ljust(first[1]) + "".join(cell.rjust(width) for cell, width in others)).rstrip()


def _quality(ratio: float | None) -> str:
    """Bits per character against the dense network's, in words."""
    if ratio is None:
        return ""
    percent = _number(abs(ratio - 1), "share")
    return f"{percent} {'more' if ratio > 1 else 'fewer'} bits per character"


def _headline(summary: Summary) -> str:
    """The result in a sentence: sparsefold's row with the best ratio to the fastest rival."""
    own = [r for r in summary["rows"] if r["engine"] == "sparsefold" and r.get("ratio_to_fastest_rival")]
    if not own:
        return "What was trained, counted and timed"
    best = max(own, key=lambda r: r["ratio_to_fastest_rival"])
    ratio, rival = best["ratio_to_fastest_rival"], summary.get("fastest_rival") or {}
    text = f"{_label(summary, best['network'])}: a byte in {_us(best, 'p50')} µs, "
    text += f"{max(ratio, 1 / ratio):.1f} times {'faster' if ratio >= 1 else 'slower'} than "
    text += f"{_clean(rival['engine'])} playing {_label(summary, rival['network'])}" if rival else "the fastest rival"
    if quality := _quality(summary["networks"][best["network"]].get("bits_per_char_vs_dense")):
        text += f", with {quality}"
    return text[0].upper() + text[1:]


def _notes(summary: Summary) -> list[str]:
    rival, notes = summary.get("fastest_rival"), []
    if rival:
        notes.append(
            f"* rival. The fastest is {_clean(rival['engine'])} playing {_label(summary, rival['network'])}, p50 "
            f"{_number(rival['p50'], 'us')} µs; ratio to rival: that p50 ÷ this p50."
        )
    calls = {r["latency_us"]["calls"] for r in summary["rows"] if (r.get("latency_us") or {}).get("calls")}
    over = f", over {min(calls):,} calls a row" if calls else ""
    return [
        *notes,
        f"Timed: µs of a whole byte, decoder and Python call included, one thread, pinned, state moving{over}.",
        "Counted: events and MACs per byte (weight: zero weights skipped; effective: executed). Other engines skip "
        "nothing, so theirs are the dense ones.",
    ]


def _targets(summary: Summary) -> list[tuple[str, str]]:
    return [
        (
            "held" if t["held"] else "not held",
            f"{_clean(t['name'])}: {_clean(t['target'])}. Measured {_number(t.get('measured'), '')}, "
            f"limit {_number(t.get('limit'), '')}.",
        )
        for t in summary.get("targets") or ()
    ]


# --- the page --------------------------------------------------------------------------------------------------------

# name: (light, dark). Networks take net0, net1, … in their order; the first is the dense one. Blue against orange and
# purple is told apart with every kind of colour blindness, and all keep 3:1 against the page.
_PALETTE = {
    "page": ("#ffffff", "#14171a"),
    "ink": ("#1b1f23", "#e4e7ea"),
    "muted": ("#5d666f", "#9aa4ad"),
    "line": ("#dde1e5", "#30363c"),
    "net0": ("#6b747c", "#a4adb5"),
    "net1": ("#0067a8", "#5cb3ee"),
    "net2": ("#c25400", "#f0954a"),
    "net3": ("#00795a", "#3fc19a"),
    "input": ("#aab3bb", "#626c75"),
    "recurrent": ("#6b747c", "#a4adb5"),
    "linear": ("#00795a", "#3fc19a"),
    "decoder": ("#a03c86", "#dd8fc8"),
}

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1112px;margin:0 auto;padding:48px 16px 64px}
h1{font-size:clamp(1.375rem,1.1rem + 1.4vw,2rem);line-height:1.25;margin:0 0 16px;letter-spacing:-.015em;
max-width:34em;text-wrap:balance;font-weight:650}
h2{font-size:1.125rem;margin:0 0 12px;font-weight:650}
section{margin-top:48px}p{margin:0;max-width:54em}
.kicker,.note,figcaption,dt,thead{color:var(--muted)}
.kicker{font-size:.875rem;margin-bottom:8px}.note{font-size:.875rem;margin-top:12px;max-width:64em}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.35}
th,td{padding:6px 0 6px 14px;text-align:right;vertical-align:baseline;font-weight:400}
th:first-child,td:first-child,.words td,.words th{text-align:left}th:first-child,td:first-child{padding-left:0}
thead th{vertical-align:bottom;white-space:pre-line}
tbody{border-top:1px solid var(--line)}tbody:last-child{border-bottom:1px solid var(--line)}
tbody th.group{padding-top:10px;font-weight:650}
.results td,.words td:not(.text,:first-child){white-space:nowrap}.own td{font-weight:650}
.targets{list-style:none;margin:0;padding:0}
.targets li{padding:6px 0 6px 112px;border-top:1px solid var(--line);max-width:62em}
.targets li:last-child{border-bottom:1px solid var(--line)}
.targets b{float:left;margin-left:-112px;font-weight:650}.held b{color:var(--net1)}.missed b{color:var(--net2)}
.held b::before{content:"\\2713\\a0"}.missed b::before{content:"\\2717\\a0"}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:48px 40px}
figure{margin:0;min-width:0;break-inside:avoid}figure.wide{grid-column:1/-1}
figure h2{margin:0 0 2px}figcaption{font-size:.875rem;margin-bottom:10px}
svg{display:block;width:100%;height:auto;max-width:620px;overflow:visible}
.wide .scroll{overflow-x:auto}.wide svg{width:auto;max-width:none}
svg text{font-family:inherit!important;white-space:pre}
svg text[style*=Mono]{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace!important}
pre{margin:0;padding:16px 20px;border-left:3px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere;
font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;max-width:62em;unicode-bidi:isolate}
pre b{color:var(--muted);font-weight:400}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0;font-size:.875rem}
dd{margin:0;overflow-wrap:anywhere}
@media screen and (max-width:820px){main{padding-top:28px}section{margin-top:36px}
thead{position:absolute;clip-path:inset(50%)}table,tbody{display:block}
tr{display:grid;grid-template-columns:repeat(4,1fr);gap:6px 10px;padding:10px 0}tr:has(.group){padding:14px 0 0}
th,td,.words td{padding:0!important;text-align:left}
td::before{content:attr(data-label);display:block;color:var(--muted);font-size:.75rem;font-weight:400;white-space:normal}
td:first-child,th.group{grid-column:1/-1}td:first-child::before{content:none}.words td.text{grid-column:1/-1}
.words td:first-child{font-weight:650}.targets li{padding-left:0}.targets b{float:none;margin:0;display:block}}
@media print{body{font-size:12px}main{padding:0;max-width:none}section{margin-top:24px}.wide svg{width:100%;height:auto}
tr,li,dl,pre{break-inside:avoid}h2{break-after:avoid}table{font-size:9px}th,td{padding-left:6px}.plots{gap:24px}
.plots{grid-template-columns:1fr 1fr}}
"""


def _style() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _PALETTE.items()) for i in (0, 1))
    scheme = ":root{color-scheme:light dark;" + light + "}"
    return scheme + "@media screen and (prefers-color-scheme:dark){:root{" + dark + "}}" + _CSS


def _kicker(summary: Summary) -> str:
    origin = summary.get("provenance") or {}
    words = ("sparsefold demo", str(origin.get("date") or "")[:10], origin.get("processor"))
    return " · ".join(escape(_clean(word)) for word in words if word)


def _lede(summary: Summary) -> str:
    lines = []
    if rival := summary.get("fastest_rival"):
        text = f"{_clean(rival['engine'])} playing {_label(summary, rival['network'])}, "
        lines.append(("fastest rival", text + f"{_number(rival['p50'], 'us')} µs a byte."))
    for row in summary["rows"]:
        network = summary["networks"][row["network"]]
        if row["engine"] == "sparsefold" and network.get("bits_per_char_vs_dense") not in (None, 1.0):
            text = f"{_us(row, 'p50')} µs a byte, {_quality(network['bits_per_char_vs_dense'])}, "
            text += f"{_number(network.get('event_rate'), 'share')} of the units emit per step."
            lines.append((_label(summary, row["network"]), text))
    if targets := summary.get("targets"):
        lines.append(("targets", f"{sum(bool(t['held']) for t in targets)} of {len(targets)} held."))
    return "".join(f"<p><b>{_prose(name)}:</b> {_prose(text)}</p>" for name, text in lines)


def _prose(text: str) -> str:
    """Escaped, with figures kept beside their units."""
    return re.sub(r"(?<=\d) (?=[%µ])", "\N{NO-BREAK SPACE}", escape(text))


def _cell(label: str, value: str, text: bool = False) -> str:
    return f"<td data-label='{escape(label)}'{' class=text' if text else ''}>{_prose(value)}</td>"


def _html_results(summary: Summary) -> str:
    names = ["\n".join(filter(None, column[:2])) for column in _COLUMNS]
    body, label = "", None
    for network, cells in _rows(summary):
        if network != label:
            label = network
            body += "</tbody><tbody>" if body else "<tbody>"
            body += f"<tr><th class='group' scope='rowgroup' colspan='{len(names)}'>{escape(network)}</th></tr>"
        row = "".join(_cell(name.replace("\n", " "), cell) for name, cell in zip(names, cells, strict=True))
        body += f"<tr class='{'own' if cells[0] == 'sparsefold' else 'other'}'>{row}</tr>"
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    return f"<table class='results'><thead><tr>{head}</tr></thead>{body}</tbody></table>"


def _html_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are (heading, long text?)."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name, _ in columns)
    body = ""
    for row in rows:
        cells = (_cell(name, value, text) for (name, text), value in zip(columns, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table class='words'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shared_config(summary: Summary) -> dict[str, Any]:
    """The settings that all networks have in common."""
    first, *others = [n.get("config") or {} for n in summary["networks"].values()] or [{}]
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _settings(config: Mapping[str, Any]) -> str:
    """A config as the command line takes it."""
    words = ((k, "x".join(map(str, v)) if isinstance(v, list | tuple) else v) for k, v in config.items())
    return " ".join(f"{_clean(k)}={_clean(v)}" for k, v in words) or "–"


def _html_training(summary: Summary) -> str:
    rows, shared = [], _shared_config(summary)
    for key, network in summary["networks"].items():
        log, config = network.get("log") or [{}], network.get("config") or {}
        bits = (network.get(f"{split}bits_per_char") for split in ("train_", "valid_", ""))
        rows.append([
            _label(summary, key), *(_number(b, "bits") for b in bits),
            _number(network.get("bits_per_char_vs_dense"), "ratio"), _number(log[-1].get("step"), ""),
            _number(log[-1].get("seconds"), "seconds"), _settings({k: v for k, v in config.items() if k not in shared}),
        ])  # fmt: skip
    names = ("network", "train bits", "valid bits", "test bits", "test ÷ dense", "steps", "time")
    return _html_table([*((name, False) for name in names), ("config, where they differ", True)], rows)


def _html_parity(summary: Summary) -> str:
    rows = []
    for row in summary["rows"]:
        parity, who = row.get("parity") or {}, f"{_clean(row['engine'])}, {_label(summary, row['network'])}"
        rows.append([
            who, _number(parity.get("max_abs_error"), "g"), _number(parity.get("bound"), "g"),
            _number(parity.get("bytes"), "g"), _clean(parity.get("against") or "–"),
            _clean(row.get("settings") or "–"),
        ])  # fmt: skip
    columns = [("row", False), ("largest error", False), ("bound", False), ("bytes compared", False)]
    return _html_table([*columns, ("against", True), ("settings", True)], rows)


def _html_sample(summary: Summary) -> str:
    sample = summary.get("sample")
    if not sample:
        return ""
    prompt, text = (escape(_clean(sample.get(name) or "", keep="\n\t")) for name in ("prompt", "text"))
    note = f"By {_label(summary, sample['network'])}, as a stream, at temperature "
    note += _number(sample.get("temperature"), "") + (". The prompt is muted." if prompt else ".")
    shown = f"<pre><b>{prompt}</b>{text}</pre><p class='note'>{_prose(note)}</p>"
    return f"<section><h2>Generated text</h2>{shown}</section>"


def _html_provenance(summary: Summary) -> str:
    corpus, pairs = summary.get("corpus") or {}, dict(summary.get("provenance") or {})
    sizes = ", ".join(f"{split} {size:,}" for split, size in (corpus.get("bytes") or {}).items())
    pairs |= {
        "corpus": corpus.get("source"),
        "corpus bytes": sizes,
        "corpus sha256": corpus.get("sha256"),
        "tokens": corpus.get("tokens"),
        "config of all networks": _settings(_shared_config(summary)),
        "time": ", ".join(f"{k} {_number(v, 'seconds')}" for k, v in (summary.get("seconds") or {}).items()),
        "schema": SCHEMA,
    }
    found = ((k, v) for k, v in pairs.items() if v not in (None, ""))
    return "<dl>" + "".join(f"<dt>{escape(_clean(k))}</dt><dd>{escape(_clean(v))}</dd>" for k, v in found) + "</dl>"


# --- plots -----------------------------------------------------------------------------------------------------------
# Units of all figures are CSS pixels (72 dots an inch, so a point is a pixel). Each paint is drawn in a stand-in colour
# that the SVG then names as a CSS variable; so one drawing serves light and dark.

_PAINT = {name: f"#0a0b{i:02x}" for i, name in enumerate(_PALETTE)}
_RC: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "sparsefold", "path.simplify": False, "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "text.color": _PAINT["ink"], "axes.labelcolor": _PAINT["muted"], "axes.edgecolor": _PAINT["line"],
    "xtick.color": _PAINT["line"], "ytick.color": _PAINT["line"], "xtick.labelcolor": _PAINT["muted"],
    "ytick.labelcolor": _PAINT["muted"], "grid.color": _PAINT["line"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "figure.dpi": 72, "lines.solid_capstyle": "round",
}  # fmt: skip


def _figures(summary: Summary) -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the HTML report draws with matplotlib: pip install 'sparsefold[report]'.") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever style the caller set
        matplotlib.rcParams.update(_RC)
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the browser's fonts draw the text, not matplotlib's
        plots = [_loss(summary), _latency(summary), _event_rates(summary), _macs_by_part(summary), *_rasters(summary)]
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
    return _PAINT[f"net{list(summary['networks']).index(key) % 4}"]


def _folded(summary: Summary, key: str) -> str:
    return textwrap.fill(_label(summary, key), 16)


def _end_labels(axes: Any, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines (x, y, text, colour) beside their ends, from the lowest up, moved up where they would touch."""
    box, (low, high) = axes.get_window_extent(), axes.get_ylim()
    free = -12.0  # pixels above the axis
    for x, y, text, colour in sorted(lines, key=lambda line: line[1]):
        half = 7.5 * (text.count("\n") + 1)
        at = max((y - low) / (high - low) * box.height, free + half)
        free = at + half + 5
        axes.annotate(
            text, (x, y), (box.width + 20, at), textcoords="axes pixels", color=colour, va="center", size=12,
            annotation_clip=False, linespacing=1.2,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 3},
        )  # fmt: skip


def _loss(summary: Summary) -> str:
    curves = {}
    for key, network in summary["networks"].items():
        points = [(p["step"], p.get("valid_bits_per_char")) for p in network.get("log") or ()]
        if points := [p for p in points if p[1] is not None]:
            curves[key] = np.array(points, float).T
    if not curves:
        return ""
    fig, ax = _axes(300, (44, 126, 24, 40))
    ends = []
    for key, (steps, bits) in curves.items():
        ax.plot(steps, bits, color=_paint(summary, key))
        name = f"{_folded(summary, key)}\n{_number(bits[-1], 'bits')}"
        ends.append((steps[-1], bits[-1], name, _paint(summary, key)))
    ax.grid(axis="y")
    ax.set_xlabel("training step")
    _heading(ax, "bits per character, validation")
    _end_labels(ax, ends)
    caption = "Lower is better; where the lines end is what the networks are worth on text held back from training."
    return _figure(fig, "loss", "Validation loss", caption)


def _event_rates(summary: Summary) -> str:
    """Per unit and over time, one above the other on one scale."""
    fields = ("event_rate_per_unit", "event_rate_over_time")
    networks = [(k, n) for k, n in summary["networks"].items() if any(n.get(field) for field in fields)]
    if not networks:
        return ""
    targets = sorted({t for _, n in networks if (t := (n.get("config") or {}).get("target_rate")) is not None})
    high = max(max(n.get(field) or [0.0]) for _, n in networks for field in fields)
    fig, upper = _axes(490, (44, 126, 24, 300))
    lower = fig.add_axes(upper.get_position().translated(0, -250 / 490))
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
            mean = _number(float(rates.mean()) / 100, "share")
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
    dashed = " Dashed: the target, " + ", ".join(_number(t, "share") for t in targets) + "." if targets else ""
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
        colour, rival = _paint(summary, row["network"]), row["engine"] != "sparsefold"
        fill = "none" if rival else colour
        ax.barh(y, p50[y], 0.26, color=fill, edgecolor=colour, linewidth=1.2)
        ax.plot([p50[y], p99[y]], [y, y], color=colour, linewidth=1.2)
        ax.plot([p99[y]] * 2, [y - 0.11, y + 0.11], color=colour, linewidth=1.2)
        name = f"{_clean(row['engine'])}, {_label(summary, row['network'])}"
        value = f"{_number(p50[y], 'us')} µs, p99 {_number(p99[y], 'us')}"
        for x, text, align in ((0, name, "left"), (1, value, "right")):
            _write(ax, text, x, y, 0, 11, ha=align)
    ax.set_ylim(len(rows) - 0.6, -0.7)
    ax.set_yticks([])
    ax.set_xlabel("µs per byte" + (", logarithmic" if wide_spread else ""))
    caption = "Bar: p50, whisker: p99. Filled: sparsefold; hollow: other engines. Shorter is better."
    return _figure(fig, "latency", "Latency of one byte", caption)


def _macs_by_part(summary: Summary) -> str:
    networks = [(k, n) for k, n in summary["networks"].items() if _macs(n, "macs_dense")]
    if not networks:
        return ""
    fig, ax = _axes(28 + 132 * len(networks), (68, 52, 24, 4))
    names, y = ("macs_dense", "macs_weight", "macs_effective"), 0.0
    widest = max(sum(_macs(n, names[0]).values()) for _, n in networks)
    for i, (key, network) in enumerate(networks):
        _write(ax, _label(summary, key), 0, y, -64, 0, size=13, va="center")
        for name in names:
            y, start = y + 1, 0.0
            for role, value in _macs(network, name).items():
                ax.barh(
                    y,
                    value,
                    0.62,
                    left=start,
                    color=_PAINT.get(role, _PAINT["linear"]),
                    edgecolor=_PAINT["page"],
                    linewidth=0.6,
                )
                if i == 0 and name == names[0]:
                    last = role == list(_macs(network, name))[-1]
                    ink = _PAINT["decoder" if role == "decoder" else "muted"]
                    ax.text(start + last * value, y - 0.5, role, size=12, color=ink, ha="right" if last else "left")
                start += value
            _write(ax, name.removeprefix("macs_"), 0, y, -64, 0, va="center", color=_PAINT["muted"])
            total, decoder = _number(start, "macs"), _macs(network, name).get("decoder")
            if decoder and name == "macs_effective" and start < widest / 2:
                total += f", decoder {_number(decoder, 'macs')} of it"
            ax.annotate(total, (start, y), (5, 0), textcoords="offset pixels", va="center", size=12)
        y += 1.5
    ax.set_ylim(y - 0.8, -0.6)
    ax.set_xlim(0, widest)
    ax.axis("off")
    executed = [_macs(n, "macs_effective") for _, n in networks]
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
        fig, ax = _axes(380, (44, 8, 64, 40), width=52 + 8.5 * len(events))
        at = [(x, row[unit]) for x, emitted in enumerate(events) for unit in emitted]
        xs, ys = np.array(at, float).T
        dashes = np.stack([xs - 0.42, xs + 0.42, np.full(len(xs), np.nan)], 1).ravel()
        thin = {"linewidth": 0.95 * ax.get_window_extent().height / (units + 1), "solid_capstyle": "butt"}
        ax.plot(dashes, np.repeat(ys, 3), color=_paint(summary, key), **thin)
        ax.set(xlim=(-0.5, len(events) - 0.5), ylim=(-1, units), xticks=[], yticks=[0, units - 1])
        ax.set_yticklabels(["1", str(units)])
        ax.set_ylabel("units, busiest first", labelpad=-12)
        strip = ax.inset_axes((0, 1.02, 1, 0.17))
        share = [100 * len(emitted) / units for emitted in events]
        strip.bar(range(len(events)), share, 0.84, color=_PAINT["net0"])
        strip.set(xlim=ax.get_xlim(), xticks=[], yticks=[max(share)])
        strip.set_yticklabels([f"{max(share):.0f} %"])
        strip.tick_params(axis="x", length=0)
        for x, c in enumerate(text[: len(events)]):
            shown = "↵" if c == "\n" else _clean(c)
            below = ax.get_xaxis_transform()
            ax.text(x, -0.03, shown, transform=below, size=12, ha="center", va="top", family="DejaVu Sans Mono")
        caption = f"{_label(summary, key)}. Each dash is a unit that emits at that byte of the text beneath; "
        caption += "above, the share of units that emit."
        figures.append(_figure(fig, f"raster-{len(figures)}", "Who speaks when", caption, wide=True))
    return figures
