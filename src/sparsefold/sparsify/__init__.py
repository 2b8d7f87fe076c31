"""Pruning: rules that name exact masks, schedules, and the pruner that holds them."""

from .pruner import Pruner
from .rules import (
    NM,
    Block,
    ColumnBalanced,
    Complementary,
    Magnitude,
    Rule,
    Threshold,
    Weighted,
    block_mask,
    magnitude_mask,
    read_rules,
    thresholds,
)
from .schedule import SET, Cubic, Iterative, OneShot, RigL, Schedule, Staircase, TwoSlopes

__all__ = [
    "NM",
    "SET",
    "Block",
    "ColumnBalanced",
    "Complementary",
    "Cubic",
    "Iterative",
    "Magnitude",
    "OneShot",
    "Pruner",
    "RigL",
    "Rule",
    "Schedule",
    "Staircase",
    "Threshold",
    "TwoSlopes",
    "Weighted",
    "block_mask",
    "magnitude_mask",
    "read_rules",
    "thresholds",
]
