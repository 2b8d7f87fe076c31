"""Experiments, one file each, by the name that ``sparsefold train NAME`` takes."""

from __future__ import annotations

from sparsefold.recipes import text

RECIPES = {"text": text}
