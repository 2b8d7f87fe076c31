"""Writes the tables and figures of README.md and docs from committed results: ``make docs``. Nothing there is typed by hand."""

from __future__ import annotations

import re
from typing import Any

from tables import engine, language, pruning, sound, training
from tables.files import ROOT

SECTIONS = {
    "README.md": {"demo": training.demo_table, "words": language.words},
    "docs/benchmarks.md": {
        "learning-rates": training.learning_rates,
        "demo-search": training.demo_search,
        "steps": engine.steps,
        "steps-avx2": engine.steps_avx2,
        "steps-amd": engine.steps_amd,
        "throughput": engine.throughput,
        "delta": engine.delta,
        "training": training.training,
        "dense-cells": training.dense_cells,
        "dense-cells-avx2": training.dense_cells_avx2,
        "dense-cells-amd": training.dense_cells_amd,
        "choices": training.choices,
        "choices-amd": training.choices_amd,
        "gpu": training.on_a_gpu,
        "paper": language.paper,
        "stand-in": language.stand_in,
        "whole-byte": engine.whole_byte,
        "multiply": language.multiplied,
        "wikitext2": language.wikitext2,
        "medium": language.described,
        "kernels": engine.kernels,
        "heatmap": engine.heatmap,
    },
    "docs/pruning.md": {"pruned": pruning.pruned},
    "docs/sound.md": {"digits": sound.digits},
}
FIGURES = {"docs/heatmap.svg": engine.heatmap_svg, "docs/training.svg": training.training_svg}
FIGURES |= {"docs/pruning.svg": pruning.pruned_svg} if pruning.LATENCY.exists() else {}
FIGURES |= {"docs/multiply.svg": language.multiply_svg} if language.MULTIPLY.exists() else {}


def render(text: str, sections: dict[str, Any]) -> str:
    """``text`` with what stands between the markers of each section replaced."""
    for name, make in sections.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"no markers for section {name!r}.")
        made = make()
        text = pattern.sub(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
    return text


def main() -> None:
    """Rewrites every page."""
    for page, sections in SECTIONS.items():
        path = ROOT / page
        path.write_text(render(path.read_text(), sections))
        print(page)
    for page, make in FIGURES.items():
        (ROOT / page).write_text(make())
        print(page)


if __name__ == "__main__":
    main()
