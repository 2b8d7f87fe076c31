"""Weights that a sparsifier holds at zero: what it tells the layers that train on them.

A parameter may carry an attribute `kept`, a function that gives a mask of its shape (True: this weight may be anything) or
None. As long as it gives one, a weight outside is 0: nobody asks for its gradient, whatever the optimiser does to it is undone,
and dropout draws nothing for it. `sparsify.Pruner` sets it while its schedule lets no weight return. Without it every gradient
is made.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 16  # of a block, all of one gate and of one column


def kept(weight: Tensor) -> Tensor | None:
    """The mask that `weight` carries, if there is one and it fits."""
    mark = getattr(weight, "kept", None)
    mask: Tensor | None = mark() if callable(mark) else None
    return mask if mask is not None and mask.shape == weight.shape and mask.dtype == torch.bool else None


def dropped(weight: Tensor, p: float) -> Tensor:
    """The weight with dropout, under the same mark. On a processor draws are made for what the mark lets be, and for no other."""
    mask, places = kept(weight), None
    if mask is not None and mask.device == weight.device == torch.device("cpu") and p < 1:
        places = _places(mask)
    if places is None:
        out = F.dropout(weight, p)
    else:
        drawn = torch.empty(len(places), dtype=weight.dtype).bernoulli_(1 - p).div_(1 - p)
        out = weight * torch.zeros(weight.numel(), dtype=weight.dtype).scatter_(0, places, drawn).view(weight.shape)
    out.kept = getattr(weight, "kept", None)  # type: ignore[attr-defined]
    return out


_FEW = 0.5  # of the weights, up to which single draws are faster than one of all
_found: MutableMapping[Tensor, tuple[int, Tensor | None]] = WeakTensorKeyDictionary()


def _places(mask: Tensor) -> Tensor | None:
    """Where a mask is True, or None where that is at too many places; looked for once for each mask."""
    version, places = _found.get(mask, (-1, None))
    if version != mask._version:
        places = mask.flatten().nonzero()[:, 0] if mask.sum() <= _FEW * mask.numel() else None
        _found[mask] = mask._version, places
    return places


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
