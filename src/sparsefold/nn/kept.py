"""Weights that a sparsifier holds at zero: what it tells the layers that train on them.

A parameter may carry an attribute `kept`, a function that gives a mask of its shape (True: this weight may be anything) or
None. As long as it gives one, nobody asks for the gradient of a weight outside: whatever the optimiser does to it is undone.
`sparsify.Pruner` sets it while its schedule lets no weight return. Without it every gradient is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16  # of a block, all of one gate and of one column


def kept(weight: Tensor) -> Tensor | None:
    """The mask that `weight` carries, if there is one and it fits."""
    mark = getattr(weight, "kept", None)
    mask: Tensor | None = mark() if callable(mark) else None
    return mask if mask is not None and mask.shape == weight.shape and mask.dtype == torch.bool else None


def live(weight: Tensor, mask: Tensor, gates: int) -> Tensor:
    """Of the shape of weight (gates · H, I): True in blocks of 16 × 1 that hold a kept weight, or one that is not zero."""
    each = (mask.to(weight.device) | (weight.detach() != 0)).view(gates, -1, weight.shape[1])
    short = -each.shape[1] % ROWS
    blocks = F.pad(each, (0, 0, 0, short)).view(gates, -1, ROWS, each.shape[2]).any(2)
    return blocks.repeat_interleave(ROWS, 1)[:, : each.shape[1]].reshape(weight.shape)


def without_gradient(weight: Tensor, gates: int) -> Tensor:
    """The same weight; the gradient of blocks that are held at zero is 0, as the kernels leave it."""
    mask = kept(weight)
    return weight if mask is None else torch.where(live(weight, mask, gates), weight, weight.detach())
