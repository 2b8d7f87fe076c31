"""A decoder of many words that computes the rare ones only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class AdaptiveDecoder(torch.nn.Module):
    """Decoder of words sorted by frequency, whose rare words are met in two steps: first their cluster, then the word in it.

    ::

        q = log_softmax(W x + b)                              cutoffs[0] words, then a value for each cluster
        log p(word) = q_word                                  of the first cutoffs[0] words
        log p(word) = q_k + log_softmax(W_k P_k x + b_k)      of the words of cluster k, from cutoffs[k] to the next cutoff

    P_k gives inputs / divide^(k + 1) numbers, at least one. The probabilities of all words sum to one, and most words need the
    first step alone. Log-probabilities are float32 at least, whatever x is.

    Args:
        inputs: features that it reads.
        words: outputs.
        cutoffs: rising, each in [1, words).
        divide: how much narrower each cluster's projection is than that before.
        share: (words,) how often each word is met in the text: the biases' start.

    Raises:
        ValueError: cutoffs that do not rise within [1, words), ``divide`` below 1, or ``share`` of another shape.

    Source: Grave, Joulin, Cissé, Grangier and Jégou (2017), arXiv 1609.04309.
    """

    def __init__(
        self, inputs: int, words: int, cutoffs: Sequence[int], divide: float = 2.0, share: Tensor | None = None
    ) -> None:
        super().__init__()
        edges = [*cutoffs, words]
        if len(edges) < 2 or edges[0] < 1 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"cutoffs rise, each at least 1 and less than the number of words, {words}; got {list(cutoffs)}. "
                "Without a cluster, take a Linear."
            )
        if not divide >= 1:
            raise ValueError(f"divide says how much narrower each cluster is, a number of at least 1; got {divide}.")
        if share is not None and share.shape != (words,):
            raise ValueError(f"share holds how often each of {words} words is met; got shape {tuple(share.shape)}.")
        self.in_features, self.out_features, self.cutoffs = inputs, words, tuple(cutoffs)
        self.head = torch.nn.Linear(inputs, edges[0] + len(cutoffs))
        self.tails = torch.nn.ModuleList()
        for k in range(len(cutoffs)):
            narrow = max(1, round(inputs / divide ** (k + 1)))
            wide = torch.nn.Linear(narrow, edges[k + 1] - edges[k])
            self.tails.append(torch.nn.Sequential(torch.nn.Linear(inputs, narrow, bias=False), wide))
        self._wanted: tuple[Tensor, Tensor, list[Tensor]] | None = None
        if share is not None:
            mass = share.clamp(min=1e-8)
            parts = [mass[a:b] for a, b in pairwise(edges)]
            with torch.no_grad():
                self.head.bias.copy_(torch.cat([mass[: edges[0]], torch.stack([p.sum() for p in parts])]).log())
                for tail, part in zip(self.tails, parts, strict=True):
                    tail.get_parameter("1.bias").copy_((part / part.sum()).log())

    def vectors(self) -> Tensor:
        """(words, inputs), a vector for each word: the rows of W, and of W_k P_k. An embedding may share them.

        Source: Baevski and Auli (2019), arXiv 1809.10853, tied weights.
        """
        tails = [tail.get_parameter("1.weight") @ tail.get_parameter("0.weight") for tail in self.tails]
        return torch.cat([self.head.weight[: self.cutoffs[0]], *tails])

    def targets(self, y: Tensor) -> Tensor:
        """Keep a window's targets (T, B) for the ``forward`` that follows, and return them where the weights are.

        How many of each cluster there are is asked where y is: on the processor, that waits for no GPU.
        """
        self._wanted = None
        if not self.training:
            return self._here(y)
        flat = y.flatten()
        cluster = torch.bucketize(
            flat, torch.tensor(self.cutoffs, device=y.device), right=True
        )  # 0: the head's own words
        first = torch.where(cluster == 0, flat, self.cutoffs[0] + cluster - 1)
        members = [self._here((cluster == k + 1).nonzero()[:, 0]) for k in range(len(self.tails))]
        y = self._here(y)
        self._wanted = y, self._here(first), members
        return y

    def _here(self, tokens: Tensor) -> Tensor:
        device = self.head.weight.device
        if device.type == "cuda" and not tokens.is_cuda:
            return tokens.pin_memory().to(device, non_blocking=True)  # waits for nothing
        return tokens.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Input (T, B, inputs) -> log p (T, B, words), or of the targets alone, (T, B), in training."""
        head = _log_softmax(self.head(x))
        first = self.cutoffs[0]
        if not self.training or self._wanted is None:
            parts = [head[..., :first]]
            for k, tail in enumerate(self.tails):
                parts.append(_log_softmax(tail(x)) + head[..., first + k, None])
            return torch.cat(parts, -1)
        wanted, at, clusters = self._wanted
        found = head.flatten(0, 1).gather(1, at[:, None])[:, 0]
        flat, y = x.flatten(0, 1), wanted.flatten()
        for cutoff, tail, here in zip(self.cutoffs, self.tails, clusters, strict=True):
            logp = _log_softmax(tail(flat[here]))
            found = found.index_add(0, here, logp.gather(1, (y[here] - cutoff)[:, None])[:, 0])
        return found.view(wanted.shape)

    @staticmethod
    def loss(logp: Tensor, y: Tensor) -> Tensor:
        """Mean nats of the targets y (T, B) by what ``forward`` gave in training."""
        return -logp.mean()

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.in_features}, {self.out_features}, cutoffs={self.cutoffs}"


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
