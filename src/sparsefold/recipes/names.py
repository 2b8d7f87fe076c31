"""The recipes, by the names that ``sparsefold train NAME`` takes."""

from __future__ import annotations

from typing import Any

from sparsefold.recipes import digits, lm, multiply, paper, prune_lm, text

RECIPES: dict[str, Any] = {
    "text": text,
    "digits": digits,
    "prune_lm": prune_lm,
    "lm": lm,
    "ptb": lm,
    "wikitext2": lm.WIKITEXT2,
    "ptb-multiply": multiply,
    "ptb-paper": paper,
}
