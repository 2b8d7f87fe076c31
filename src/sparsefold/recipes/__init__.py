"""Experiments, one file each, by the name that ``sparsefold train NAME`` takes."""

from __future__ import annotations

from sparsefold.recipes import prune_lm, text

RECIPES = {"text": text, "prune_lm": prune_lm}
