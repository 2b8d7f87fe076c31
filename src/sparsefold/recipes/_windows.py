"""A token sequence as parallel streams, read window after window, and the loss of a model on a whole split."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsefold.nn import Stack

GRAIN, SHORTEST, LONGEST = 8, 32, 104  # steps of a window of random length: multiples of the first, between the others


class Batches(Protocol):
    """What a training reads: batch ``i`` is a pure function of ``i``."""

    batch: int
    length: int  # steps of time, in the mean

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs (time, batch, …) and targets (time, batch), and whether the state begins anew."""


class Windows:
    """A token sequence as ``batch`` parallel streams, read in windows of ``length`` steps, over and over.

    Window ``i`` is a pure function of ``i``, so a resumed run reads what the interrupted one would have read. The state is
    zero at the start of every pass and carried from window to window inside it.
    """

    def __init__(self, tokens: NDArray[np.int64], batch: int, length: int) -> None:
        per_stream = (len(tokens) - 1) // batch
        if per_stream < length:
            raise ValueError(
                f"{len(tokens)} tokens are too few for {batch} streams of at least one window of {length} steps. "
                "Use a longer text, or a smaller batch or window."
            )
        used = torch.from_numpy(tokens[: per_stream * batch + 1].copy())
        self._x = used[:-1].view(batch, per_stream).T.contiguous()  # (time, batch)
        self._y = used[1:].view(batch, per_stream).T.contiguous()
        self.length, self.per_pass, self.batch = length, per_stream // length, batch

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs and targets (time, batch) of window ``i``, and whether a pass starts with it."""
        first, last = self.span(i)
        return self._x[first:last], self._y[first:last], first == 0

    def span(self, i: int) -> tuple[int, int]:
        """Steps of the streams that window ``i`` reads: the first, and the one after the last."""
        first = i % self.per_pass * self.length
        return first, first + self.length

    def count(self, passes: float) -> int:
        """Windows in so many passes as long as the first, at least one."""
        return max(1, round(passes * self.per_pass))


class RandomWindows(Windows):
    """The same in windows of random length, so that the borders, over which no gradient goes, lie elsewhere in every pass.

    Lengths are drawn from N(``length``, 5²), one in twenty from N(``length`` / 2, 5²), and rounded to multiples of 8 in
    [32, 104]; the last of a pass is what is left of it, to multiples of 8. They are a pure function of ``seed`` and the pass.

    Source: Merity, Keskar and Socher (2017), arXiv 1708.02182; the rounding is ours.
    """

    def __init__(self, tokens: NDArray[np.int64], batch: int, length: int = 70, seed: int = 0) -> None:
        super().__init__(tokens, batch, SHORTEST)
        self.length, self.seed = length, seed
        self._edges: list[NDArray[np.int64]] = []  # of the windows of each pass met so far
        self._before = [0]  # windows before each of these passes, and before the next
        self.per_pass = len(self._edges_of(0)) - 1

    def span(self, i: int) -> tuple[int, int]:
        """Steps of the streams that window ``i`` reads: the first, and the one after the last."""
        while self._before[-1] <= i:
            self._edges_of(len(self._edges))
        found = int(np.searchsorted(self._before, i, side="right")) - 1
        first, last = self._edges[found][i - self._before[found] :][:2]
        return int(first), int(last)

    def _edges_of(self, number: int) -> NDArray[np.int64]:
        random, steps = np.random.default_rng([self.seed, number]), len(self._x)
        most = steps // SHORTEST + 1
        mean = np.where(random.random(most) < 0.05, self.length / 2, self.length)
        lengths = np.clip(np.rint(random.normal(mean, 5) / GRAIN) * GRAIN, SHORTEST, LONGEST).astype(np.int64)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        edges = edges[edges < steps // GRAIN * GRAIN]
        self._edges.append(np.append(edges, steps // GRAIN * GRAIN))
        self._before.append(self._before[-1] + len(edges))
        return self._edges[-1]


def bits_per_char(model: Stack, tokens: NDArray[np.int64], streams: int = 16, window: int = 256) -> float:
    """Bits per token of ``model`` on a text cut into ``streams`` parallel pieces, state carried within each piece."""
    streams = max(1, min(streams, (len(tokens) - 1) // 8))
    windows = Windows(tokens, streams, 1)
    was_training = model.training
    model.eval()
    total, state = 0.0, None
    with torch.no_grad():
        for at in range(0, windows.per_pass, window):
            x, y = windows._x[at : at + window], windows._y[at : at + window]
            logits, state, _ = model(x, state)
            total += float(cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    model.train(was_training)
    return total / (windows.per_pass * streams) / math.log(2)


@torch.no_grad()
def stream_bits(
    model: Stack, tokens: NDArray[np.int64], streams: int = 1, warm: int = 64, window: int = 2048
) -> tuple[float, list[float]]:
    """Bits per token of ``model`` on a whole split, every token but the first predicted once, and each layer's event rate.

    With one stream the state is carried from the first token to the last, as a player does. More are faster: pieces are then
    read side by side, and all but the first begin ``warm`` tokens early, uncounted, with a zero state.

    Raises:
        ValueError: fewer than two tokens.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise ValueError(f"a split of {len(tokens)} tokens predicts nothing; at least 2 are needed.")
    streams = max(1, min(streams, targets // (2 * warm + 1)))
    steps = -(-(targets + (streams - 1) * warm) // streams)
    first = np.arange(streams) * (steps - warm)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, state, events, seen = 0.0, None, [0.0], 0
    for at in range(0, steps, max(1, window // streams)):
        time = np.arange(at, min(at + max(1, window // streams), steps))[:, None]
        place = first + time
        counted = ((time >= warm) | (first == 0)) & (place < targets)
        place = np.minimum(place, targets - 1)
        x, y = (torch.from_numpy(tokens[p]).to(device) for p in (place, place + 1))
        logits, state, activity = model(x, state)
        loss = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        total += float(loss[torch.from_numpy(counted.flatten()).to(device)].sum(dtype=torch.float64))
        rates = [float(r.mean()) * len(time) for r in activity.rates]
        events = [a + b for a, b in zip(events, rates, strict=True)] if seen else rates
        seen += len(time)
    model.train(was_training)
    return total / targets / math.log(2), [e / seen for e in events]
