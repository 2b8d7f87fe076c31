"""Spoken digits: what networks of several sizes name rightly, and what a frame costs and takes."""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from .files import ROOT, newest, table

NOISES = ("inf dB", "10 dB", "0 dB")


def digits() -> str:
    """One row a network; accuracies are means over the seeds."""
    path = newest("results/digits", "2*.json")
    found = json.loads(path.read_text())
    networks: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        networks.setdefault(row["network"], {})[row["engine"]] = row
    rows = []
    for name, engines in networks.items():
        wide, narrow = engines["ours, f32"], engines["ours, w8a8"]
        seeds = wide["seeds"]
        right = " | ".join(f"{mean(s['accuracy'][noise] for s in seeds):.1%}" for noise in NOISES)
        spoke = "" if seeds[0]["event_rate"] is None else f"{mean(s['event_rate'] for s in seeds):.1%}"
        macs = f"{mean(s['macs_effective'] for s in seeds):,.0f} of {seeds[0]['macs_dense']:,.0f}"
        flash, ram = (f"{narrow['device'][part] / 1024:.0f}" for part in ("flash", "ram"))
        device = f"{flash} + {ram} | {narrow['device']['instructions'] / 1000:,.0f}, {wide['device']['instructions'] / 1000:,.0f}"
        us = [f"{engines[e]['latency_us']['p50']:.2f}" for e in ("ours, f32", "ours, w8a8", "exported C, f32")]
        others = {e: row["latency_us"]["p50"] for e, row in engines.items() if not e.startswith(("ours", "exported"))}
        fastest = min(others, key=lambda e: others[e]) if others else ""
        rival = f"{others[fastest]:.2f} {fastest}" if fastest else ""
        ours = f"**{name}**" if name.startswith("event") else name
        rows.append(f"| {ours} | {right} | {spoke} | {macs} | {device} | {' | '.join(us)} | {rival} |")
    columns = (
        "network", "named rightly: no noise", "10 dB", "0 dB", "events", "MACs of a frame", "KiB of flash and RAM, w8a8",
        "thousand instructions: w8a8, float32",
        "µs of a frame: float32", "w8a8", "float32 as C", "fastest rival",
    )  # fmt: skip
    about, count = found["provenance"], len(found["rows"][0]["seeds"])
    where = f"{about['processor']}, {about['isa']}, one thread, pinned, Python call included except as C."
    made = f"From [{path.name}](../{path.relative_to(ROOT)})."
    rates = "learning rates of [search.json](../results/digits/search.json)"
    return table(columns, rows, f"Means of {count} seeds, {rates}; times of the first. {where} {made}")
