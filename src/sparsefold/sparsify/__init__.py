"""Pruning: exact masks, rules that name them, a schedule, and the pruner that holds them."""

from .masks import block_mask, magnitude_mask
from .pruner import Pruner
from .rules import Block, Magnitude
from .schedule import Cubic

__all__ = ["Block", "Cubic", "Magnitude", "Pruner", "block_mask", "magnitude_mask"]
