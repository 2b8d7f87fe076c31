"""A language model while it is trained, and what it is made of beside its recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefold.nn import EGRU, GRU, LSTM, AdaptiveDecoder, Stack, Triangle
from sparsefold.recipes._lm_config import Config
from sparsefold.recipes.text import initialise_like_egru


class WordEmbedding(torch.nn.Embedding):
    """torch.nn.Embedding times ``scale``, that in training drops whole words, with probability ``drop``.

    A decoder that shares the weights wants them small, and layers that are to speak from the start want inputs that are not.

    Source: Gal and Ghahramani (2016), arXiv 1512.05287.
    """

    def __init__(self, words: int, size: int, drop: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(words, size)
        self.drop, self.scale = drop, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (T, B) -> (T, B, size)."""
        vectors = super().forward(tokens)
        return _words_dropped(vectors if self.scale == 1 else vectors * self.scale, tokens, self)


def _words_dropped(vectors: Tensor, tokens: Tensor, embedding: WordEmbedding | SharedEmbedding) -> Tensor:
    """The vectors of tokens (T, B), in training without those of the words that this window does without."""
    drop = embedding.drop
    if not (embedding.training and drop):
        return vectors
    kept = torch.full((embedding.num_embeddings,), 1 - drop, device=tokens.device).bernoulli() / (1 - drop)
    return vectors * kept[tokens][..., None].to(vectors.dtype)


class SharedEmbedding(torch.nn.Module):
    """As `WordEmbedding`, of the vectors that an adaptive softmax has for the words; has no weights of its own."""

    def __init__(self, decoder: AdaptiveDecoder, drop: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list it is no member, and its weights have one name
        self.drop, self.scale = drop, scale

    @property
    def num_embeddings(self) -> int:
        """Words."""
        return self._decoder[0].out_features

    def table(self) -> Tensor:
        """What is read for each word: (words, size)."""
        return self._decoder[0].vectors() * self.scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (T, B) -> (T, B, size)."""
        return _words_dropped(F.embedding(tokens, self.table()), tokens, self)


class LockedDropout(torch.nn.Module):
    """Dropout of (T, B, F) whose mask is the same at every step of time.

    Source: Gal and Ghahramani (2016), arXiv 1512.05287.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Input (T, B, F) -> the same shape."""
        if not (self.training and self.p):
            return x
        return x * F.dropout(x.new_ones(1, *x.shape[1:]), self.p)

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.p}"


class SampledLinear(torch.nn.Linear):
    """A decoder that in training may compare each target with a sample of the words in place of all.

    Words stand in the sample that are a target of the window, and each other with probability ``samples`` / words. The sum over
    words in the softmax becomes that over the sample, each term divided by the probability that its word stands there: for a
    word of frequency p in the text and n targets 1 − (1 − p)ⁿ (1 − samples / words). The sum is then right on average
    (Horvitz and Thompson, 1952), and the loss nearly so. In evaluation all words are read.

    Args:
        inputs: features that it reads.
        words: outputs.
        samples: words drawn for each window on average; 0: all stand there.
        share: (words,) how often each word is met in the text.
    """

    share: Tensor
    _drawn: tuple[Tensor, Tensor, Tensor] | None

    def __init__(self, inputs: int, words: int, samples: int = 0, share: Tensor | None = None) -> None:
        super().__init__(inputs, words)
        self.samples = samples
        self.register_buffer("share", share, persistent=False)
        self._drawn = None

    def targets(self, y: Tensor) -> Tensor:
        """Draw the sample for a window's targets (T, B); returns their places among what ``forward`` then gives."""
        y = y.to(self.weight.device)
        if not (self.training and self.samples):
            return y
        rate = self.samples / self.out_features
        drawn = torch.rand(self.out_features, device=y.device) < rate
        drawn[y.flatten()] = True
        words = drawn.nonzero()[:, 0]
        chance = 1 - (1 - self.share[words]) ** y.numel() * (1 - rate)
        wanted = (drawn.cumsum(0) - 1)[y]
        self._drawn = words, chance.log().to(self.bias.dtype), wanted
        return wanted

    @staticmethod
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        """Mean nats of targets (T, B), or their places, by logits (T, B, words)."""
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Input (T, B, inputs) -> (T, B, words), or (T, B, drawn words)."""
        if not (self.training and self.samples and self._drawn):
            return super().forward(x)
        words, chance, wanted = self._drawn
        logits = F.linear(x, self.weight[words]).to(self.bias.dtype) + (self.bias[words] - chance)
        return logits.scatter_add(-1, wanted[..., None], chance[wanted][..., None])  # a target stands there for sure


class Smoothness:
    """Scalar α · mean(h²) + β · mean((u_t − u_(t−1))²) of the last layer's outputs u (T, B, H), h what dropout left of them.

    Source: Merity, McCann and Socher (2017), arXiv 1708.01009.
    """

    def __init__(self, model: Stack, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self._raw: Tensor | None = None
        self._dropped: Tensor | None = None
        if alpha or beta:
            layer, dropout = model[-3], model[-2]
            layer.register_forward_hook(self._saw_raw)
            dropout.register_forward_hook(self._saw_dropped)

    def _saw_raw(self, module: Any, inputs: Any, output: Any) -> None:
        self._raw = output[0]

    def _saw_dropped(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._dropped = output

    def __call__(self) -> Tensor | float:
        """Of the forward pass before."""
        if self._raw is None or self._dropped is None:
            return 0.0
        raw, dropped = self._raw.float(), self._dropped.float()
        slow = (raw[1:] - raw[:-1]).square().mean() if len(raw) > 1 else 0.0
        return self.alpha * dropped.square().mean() + self.beta * slow


def plain(model: Stack) -> Stack:
    """The same network without what only training needs: Embedding, recurrent layers and Linear, which compile and play.

    Weights but the embedding's are shared with ``model``.
    """
    members: list[torch.nn.Module] = []
    for module in model:
        if isinstance(module, WordEmbedding):
            weight = module.weight.detach() * module.scale
            members.append(torch.nn.Embedding(module.num_embeddings, module.embedding_dim, _weight=weight))
        elif isinstance(module, SharedEmbedding):
            weight = module.table().detach()
            members.append(torch.nn.Embedding(len(weight), weight.shape[1], _weight=weight))
        elif isinstance(module, SampledLinear):
            decoder = torch.nn.Linear(module.in_features, module.out_features, device="meta")
            decoder.weight, decoder.bias = torch.nn.Parameter(module.weight.detach()), module.bias
            members.append(decoder)
        elif not isinstance(module, LockedDropout):
            members.append(module)
    return Stack(*members).train(model.training)


def build(config: Config, words: int, share: torch.Tensor | None = None) -> Stack:
    """The untrained model of a resolved config: embedding, layers, decoder, a dropout before each layer and the decoder. Seeded.

    Member 2 k + 2 is layer k. ``share`` is how often each word is met: the decoder's start.
    """
    c: Any = config  # what may be none is said by now
    torch.manual_seed(c.seed)
    widths = (c.embedding, *c.hidden)
    embedding = WordEmbedding(words, widths[0], c.drop_word, c.embedding_scale)
    members: list[torch.nn.Module] = [LockedDropout(c.drop_input)]
    for k in range(len(c.hidden)):
        last = k == len(c.hidden) - 1
        members.append(_layer(c, widths[k], widths[k + 1], c.output if last else "events"))
        members.append(LockedDropout(c.drop_output if last else c.drop_hidden))
    if c.cutoffs:
        adaptive = AdaptiveDecoder(widths[-1], words, c.cutoffs, c.divide, share)
        if c.tied:
            _vectors_alike(adaptive)
            return Stack(SharedEmbedding(adaptive, c.drop_word, c.embedding_scale), *members, adaptive)
        torch.nn.init.uniform_(embedding.weight, -0.1, 0.1)
        return Stack(embedding, *members, adaptive)
    decoder = SampledLinear(widths[-1], words, c.samples, share)
    with torch.no_grad():
        for weight in (embedding.weight, decoder.weight):
            weight.uniform_(-0.1, 0.1)
        if share is None:
            decoder.bias.zero_()
        else:  # how often words are met need not be learned
            decoder.bias.copy_(share.clamp(min=1e-8).log())
    if c.tied:
        decoder.weight = embedding.weight
    return Stack(embedding, *members, decoder)


@torch.no_grad()
def _vectors_alike(decoder: AdaptiveDecoder) -> None:
    """Starts at which the vectors of all words are as long as those of an embedding drawn from [-0.1, 0.1)."""
    decoder.head.weight.uniform_(-0.1, 0.1)
    for tail in decoder.tails:
        tail.get_parameter("1.weight").uniform_(-0.1, 0.1)
        torch.nn.init.normal_(projection := tail.get_parameter("0.weight"), std=len(projection) ** -0.5)


def _layer(c: Any, inputs: int, units: int, output: Any) -> torch.nn.Module:
    options: Any = {"recurrent_dropout": c.drop_connect}
    with torch.no_grad():
        if c.cell == "egru":
            options |= {"threshold": c.threshold, "reset": c.reset, "output": output}
            egru = EGRU(inputs, units, surrogate=Triangle(c.surrogate, c.surrogate_width), **options)
            if c.spread_thresholds and c.threshold:
                a, b = (torch.tensor(v, device="cpu") for v in (3 * c.threshold / (1 - c.threshold), 3.0))
                spread = torch.distributions.Beta(a, b)
                egru.get_parameter("threshold_l0").copy_(spread.sample((units,)))
            return egru
        if c.cell == "gru":
            gru = GRU(inputs, units, **options)
            initialise_like_egru(gru)
            return gru
        lstm = LSTM(inputs, units, **options)
        lstm.get_parameter("bias_ih_l0")[units : 2 * units] = 1  # forget gates open at the start
        return lstm
