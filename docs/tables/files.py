"""Where the committed results lie, and what every table is made with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELLS = {"gru": "#6b747c", "lstm": "#a03c86", "egru": "#0067a8"}  # the colour of each in plots


def newest(folder: str, pattern: str) -> Path:
    """The committed result that was made last, by the moment that its provenance says."""
    found = sorted((ROOT / folder).glob(pattern), key=_made)
    if not found:
        raise ValueError(f"there is no {pattern} in {folder}; run what makes it first (docs/benchmarks.md).")
    return found[-1]


def _made(path: Path) -> str:
    said = re.search(r'"date": "(\d{4}-\d\d-\d\dT[^"]+)"', path.read_text())
    if said is None:
        raise ValueError(f"{path} does not say when it was made; its provenance has a date.")
    return said[1]


def results(recipe: str) -> list[tuple[Path, dict[str, Any]]]:
    """The committed results of a recipe, by name."""
    return [(path, json.loads(path.read_text())) for path in sorted((ROOT / "results" / recipe).glob("*.json"))]


def table(columns: tuple[str, ...], rows: list[str], about: str) -> str:
    """A table and what is to be said of it."""
    if not rows:
        return "Not measured yet."
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + f"\n\n{about}"
