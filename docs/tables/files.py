"""Where the committed results lie, and what every table is made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELLS = {"gru": "#6b747c", "lstm": "#a03c86", "egru": "#0067a8"}  # the colour of each in plots


def newest(folder: str, pattern: str) -> Path:
    """The committed result that was made last, by the date in its name."""
    found = sorted((ROOT / folder).glob(pattern), key=lambda path: path.name)
    if not found:
        raise ValueError(f"there is no {pattern} in {folder}; run what makes it first (docs/benchmarks.md).")
    return found[-1]


def results(recipe: str) -> list[tuple[Path, dict[str, Any]]]:
    """The committed results of a recipe, by name."""
    return [(path, json.loads(path.read_text())) for path in sorted((ROOT / "results" / recipe).glob("*.json"))]


def table(columns: tuple[str, ...], rows: list[str], about: str) -> str:
    """A table and what is to be said of it."""
    if not rows:
        return "Not measured yet."
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + f"\n\n{about}"
