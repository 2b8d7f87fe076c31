"""What the tables, the page and its plots all say of a summary: its check, its figures and its names."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

SCHEMA = "sparsefold-demo/1"

Summary = Mapping[str, Any]


def check(summary: Any) -> None:
    """``ValueError`` where the summary is of another kind, or speaks of a network that it does not hold."""
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


def number(value: float | None, kind: str) -> str:
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


def clean(text: object, keep: str = "") -> str:
    """Text that can do nothing to a terminal or a page: control characters become a visible sign."""
    return "".join(c if c in keep or unicodedata.category(c)[0] != "C" else "\ufffd" for c in str(text))


def label_of(summary: Summary, key: str) -> str:
    """A network as it is called everywhere."""
    return clean(summary["networks"][key].get("label") or key)


def microseconds(row: Mapping[str, Any], percentile: str) -> str:
    """The latency of a row, or a dash."""
    return number((row.get("latency_us") or {}).get(percentile), "us")


def macs_by_role(network: Mapping[str, Any], name: str) -> dict[str, float]:
    """MACs per byte by role, in the order of the network, without the parts that never multiply."""
    roles: dict[str, float] = {}
    for part in (network.get("cost") or {}).get("parts", ()):
        if part["macs_dense"]:
            roles[part["role"]] = roles.get(part["role"], 0.0) + part[name]
    return roles
