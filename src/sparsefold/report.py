"""A demo's ``summary.json`` as a terminal table, a markdown table and one self-contained HTML page.

The schema is in ``docs/results.md``. Nothing is measured or counted here; what the summary lacks is shown as a dash.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sparsefold._figures import PALETTE, figures
from sparsefold._summary import SCHEMA, Summary, check, clean, label_of, macs_by_role, microseconds, number
from sparsefold.program import write_atomically

__all__ = ["SCHEMA", "WIDTH", "html", "markdown", "table", "write_report"]

WIDTH = 118  # columns of the terminal table
EQUAL = 1.02  # up to so many times the dense network's bits per character is called equal quality

# Of each column of the table: heading, its second line, and its width in a terminal.
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("", "engine", 18), ("bits per", "char", 9), ("event", "rate", 8), ("", "density", 9), ("MACs", "dense", 8),
    ("MACs", "weight", 8), ("MACs", "effective", 10), ("of it", "decoder", 8), ("", "file", 8), ("µs", "p50", 7),
    ("µs", "p99", 7), ("ratio to", "rival", 9), ("ratio to", "equal", 9),
)  # fmt: skip


def table(summary: Summary) -> str:
    """The result as text for a terminal, at most 118 columns: headline, one row per network and engine, targets.

    Raises ``ValueError`` where ``summary`` has another schema.
    """
    check(summary)
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
    check(summary)
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
    check(summary)
    title, notes = _headline(summary), "<br>".join(_prose(note) for note in _notes(summary))
    targets = "".join(
        f"<li class='{'held' if held == 'held' else 'missed'}'><b>{held}</b> {_prose(target)}</li>"
        for held, target in _targets(summary)
    )
    sections = [
        f"<header><p class='kicker'>{_kicker(summary)}</p><h1>{_prose(title)}</h1>{_lede(summary)}</header>",
        f"<section>{_html_results(summary)}<p class='note'>{notes}</p></section>",
        f"<section><h2>Targets</h2><ul class='targets'>{targets}</ul></section>" if targets else "",
        f"<section class='plots'>{figures(summary)}</section>",
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


def _literal(text: str) -> str:
    """Text as markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(text, quote=False))


def _rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """(network's label, cells of ``_COLUMNS``) of each row, rows of a network together."""
    order = list(summary["networks"])
    rows = []
    for row in sorted(summary["rows"], key=lambda r: order.index(r["network"])):
        network = summary["networks"][row["network"]]
        own = not row.get("rival")
        network = {**network, **{name: row[name] for name in ("event_rate", "file_bytes", "cost") if row.get(name)}}
        dense, weight = (macs_by_role(network, name) for name in ("macs_dense", "macs_weight"))
        executed = macs_by_role(network, "macs_effective") if own else dense  # other engines skip nothing
        totals = [sum(part.values()) if part else None for part in (dense, weight, executed)]
        cells = [
            clean(row["engine"]) + "*" * bool(row.get("rival")),
            number(row.get("bits_per_char"), "bits"),
            number(network.get("event_rate"), "share"),
            number(network.get("density"), "share"),
            *(number(total, "macs") for total in (*totals, executed.get("decoder"))),
            number(network.get("file_bytes") if own else None, "bytes"),
            microseconds(row, "p50"),
            microseconds(row, "p99"),
            number(row.get("ratio_to_fastest_rival"), "ratio"),
            number(row.get("ratio_to_equal_rival"), "ratio"),
        ]
        rows.append((label_of(summary, row["network"]), cells))
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
    percent = number(abs(ratio - 1), "share")
    return f"{percent} {'more' if ratio > 1 else 'fewer'} bits per character"


def _headline(summary: Summary) -> str:
    """The result in a sentence: sparsefold's row with the best ratio to the fastest rival, of equal quality if any is."""
    own = [r for r in summary["rows"] if r["engine"] == "sparsefold" and r.get("ratio_to_fastest_rival")]
    quality = {key: n.get("bits_per_char_vs_dense") or 1.0 for key, n in summary["networks"].items()}
    own = [r for r in own if quality[r["network"]] <= EQUAL] or own
    if not own:
        return "What was trained, counted and timed"
    best = max(own, key=lambda r: r["ratio_to_fastest_rival"])
    ratio, rival = best["ratio_to_fastest_rival"], summary.get("fastest_rival") or {}
    text = f"{label_of(summary, best['network'])}: a byte in {microseconds(best, 'p50')} µs, "
    text += f"{max(ratio, 1 / ratio):.1f} times {'faster' if ratio >= 1 else 'slower'} than "
    text += f"{clean(rival['engine'])} playing {label_of(summary, rival['network'])}" if rival else "the fastest rival"
    if words := _quality(summary["networks"][best["network"]].get("bits_per_char_vs_dense")):
        text += f", with {words}"
    return text[0].upper() + text[1:]


def _notes(summary: Summary) -> list[str]:
    rival, notes = summary.get("fastest_rival"), []
    if rival:
        notes.append(
            f"* rival. The fastest is {clean(rival['engine'])} playing {label_of(summary, rival['network'])}, p50 "
            f"{number(rival['p50'], 'us')} µs; ratio to rival: that p50 ÷ this p50."
        )
    if equal := summary.get("equal_rival"):
        notes.append(
            f"Ratio to equal: the same to the fastest playing {label_of(summary, equal['network'])}, "
            f"{clean(equal['engine'])}, p50 {number(equal['p50'], 'us')} µs."
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
            f"{clean(t['name'])}: {clean(t['target'])}. Measured {number(t.get('measured'), '')}, "
            f"limit {number(t.get('limit'), '')}.",
        )
        for t in summary.get("targets") or ()
    ]


# --- the page --------------------------------------------------------------------------------------------------------

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
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    scheme = ":root{color-scheme:light dark;" + light + "}"
    return scheme + "@media screen and (prefers-color-scheme:dark){:root{" + dark + "}}" + _CSS


def _kicker(summary: Summary) -> str:
    origin = summary.get("provenance") or {}
    words = ("sparsefold demo", str(origin.get("date") or "")[:10], origin.get("processor"))
    return " · ".join(escape(clean(word)) for word in words if word)


def _lede(summary: Summary) -> str:
    lines = []
    if rival := summary.get("fastest_rival"):
        text = f"{clean(rival['engine'])} playing {label_of(summary, rival['network'])}, "
        lines.append(("fastest rival", text + f"{number(rival['p50'], 'us')} µs a byte."))
    if equal := summary.get("equal_rival"):
        text = f"{clean(equal['engine'])} playing {label_of(summary, equal['network'])}, "
        lines.append(("fastest rival at equal quality", text + f"{number(equal['p50'], 'us')} µs a byte."))
    for row in summary["rows"]:
        network = summary["networks"][row["network"]]
        if row["engine"] == "sparsefold" and network.get("bits_per_char_vs_dense") not in (None, 1.0):
            text = f"{microseconds(row, 'p50')} µs a byte, {_quality(network['bits_per_char_vs_dense'])}"
            if row.get("ratio_to_equal_rival"):
                text += f", {row['ratio_to_equal_rival']:.1f} times as fast as the fastest rival at equal quality"
            if network.get("event_rate") != 1.0:
                text += f"; {number(network.get('event_rate'), 'share')} of the units emit per step"
            lines.append((label_of(summary, row["network"]), f"{text}."))
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
        body += f"<tr class='{'other' if cells[0].endswith('*') else 'own'}'>{row}</tr>"
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
    return " ".join(f"{clean(k)}={clean(v)}" for k, v in words) or "–"


def _html_training(summary: Summary) -> str:
    rows, shared = [], _shared_config(summary)
    for key, network in summary["networks"].items():
        log, config = network.get("log") or [{}], network.get("config") or {}
        bits = (network.get(f"{split}bits_per_char") for split in ("train_", "valid_", ""))
        rows.append([
            label_of(summary, key), *(number(b, "bits") for b in bits),
            ", ".join(number(other["bits_per_char"], "bits") for other in network.get("seeds") or ()) or "–",
            number(network.get("bits_per_char_vs_dense"), "ratio"), number(log[-1].get("step"), ""),
            number(log[-1].get("seconds"), "seconds"), _settings({k: v for k, v in config.items() if k not in shared}),
        ])  # fmt: skip
    names = ("network", "train bits", "valid bits", "test bits", "other seeds", "test ÷ dense", "steps", "time")
    return _html_table([*((name, False) for name in names), ("config, where they differ", True)], rows)


def _html_parity(summary: Summary) -> str:
    rows = []
    for row in summary["rows"]:
        parity, who = row.get("parity") or {}, f"{clean(row['engine'])}, {label_of(summary, row['network'])}"
        rows.append([
            who, number(parity.get("max_abs_error"), "g"), number(parity.get("bound"), "g"),
            number(parity.get("bytes"), "g"), clean(parity.get("against") or "–"),
            clean(row.get("settings") or "–"),
        ])  # fmt: skip
    columns = [("row", False), ("largest error", False), ("bound", False), ("bytes compared", False)]
    return _html_table([*columns, ("against", True), ("settings", True)], rows)


def _html_sample(summary: Summary) -> str:
    sample = summary.get("sample")
    if not sample:
        return ""
    prompt, text = (escape(clean(sample.get(name) or "", keep="\n\t")) for name in ("prompt", "text"))
    note = f"By {label_of(summary, sample['network'])}, as a stream, at temperature "
    note += number(sample.get("temperature"), "") + (". The prompt is muted." if prompt else ".")
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
        "time": ", ".join(f"{k} {number(v, 'seconds')}" for k, v in (summary.get("seconds") or {}).items()),
        "schema": SCHEMA,
    }
    found = ((k, v) for k, v in pairs.items() if v not in (None, ""))
    return "<dl>" + "".join(f"<dt>{escape(clean(k))}</dt><dd>{escape(clean(v))}</dd>" for k, v in found) + "</dl>"
