"""Every shape, density, rate and seed of the suite, and the small networks that are made of them. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

import sparsefold as sf
from sparsefold.formats import Format
from sparsefold.program import (
    DELTA_REFRESH,
    EGRU,
    GRU,
    KWTA,
    LSTM,
    RNN,
    Cluster,
    Conv1d,
    Embedding,
    Events,
    LayerNorm,
    Linear,
    LogSoftmax,
    Recurrent,
    ReLU,
    TopK,
)  # fmt: skip

SEED = 20_250_101

# Below, at and above one vector (16 lanes) and one panel of a packed dense matrix (128 rows).
SIZES = (1, 3, 15, 16, 17, 31, 100, 127, 128, 129, 257)
SMALL_SIZES = (1, 15, 16, 17, 33)
GATES = (1, 3, 4)
# Blocks (outputs, inputs): columns, whole vectors, multiples of vectors, squares, and shapes that divide nothing.
BLOCKS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (8, 4), (4, 4), (5, 3), (16, 16), (32, 32), (20, 2))
DENSITIES = (0.0, 0.1, 0.5, 1.0)
EVENT_RATES = (0.0, 0.1, 1.0)


@dataclass(frozen=True)
class Overlay:
    """Stored complementary: ``overlay`` sparse groups of ``group`` rows packed as one."""

    overlay: int
    group: int = 1

    def __str__(self) -> str:
        return f"overlay{self.overlay}x{self.group}"


# Fewer, as many and more groups than one tile of any instruction set holds; groups of one row have a kernel of their own.
OVERLAYS = tuple(Overlay(k) for k in (1, 2, 4, 10, 17, 33))
GROUPED_OVERLAYS = tuple(Overlay(k, g) for k, g in ((2, 4), (10, 4), (4, 5), (33, 5), (1, 16), (4, 16), (17, 16)))

# How a matrix is stored: None dense, (rows, cols) in blocks, "csc" by single elements, an Overlay complementary.
Storage = tuple[int, int] | str | Overlay | None
STORAGES = (None, *BLOCKS, "csc", *OVERLAYS, *GROUPED_OVERLAYS)


@dataclass(frozen=True)
class MatrixCase:
    """A matrix of ``gates`` gates of ``units`` rows."""

    units: int
    cols: int
    gates: int
    storage: Storage
    density: float

    def make(self) -> Format:
        """The same matrix every time."""
        return matrix(
            rng(self.units, self.cols, self.gates), self.units, self.cols, self.gates, self.storage, self.density
        )


def rng(*salt: int) -> np.random.Generator:
    """A generator of its own for every place that asks."""
    return np.random.default_rng([SEED, *salt])


def matrix_cases(storage: Storage) -> list[MatrixCase]:
    """Every row size against three column sizes, in one gate and in three; the densities take turns."""
    cases = []
    for i, units in enumerate(SIZES):
        for turn, gates in product((0, 4, 7), GATES):
            density = 1.0 if storage is None else DENSITIES[(i + turn + gates) % len(DENSITIES)]
            cases.append(MatrixCase(units, SIZES[(i + turn) % len(SIZES)], gates, storage, density))
    return cases


def store(weight: np.ndarray, gates: int, storage: Storage) -> Format:
    """``weight`` (outputs, inputs) in the format that ``storage`` names."""
    if storage is None:
        return sf.Dense.from_dense(weight, gates)
    if storage == "csc":
        return sf.CSC.from_dense(weight, gates)
    if isinstance(storage, Overlay):
        return sf.Complementary.from_dense(weight, storage.overlay, storage.group, gates)
    return sf.Block.from_dense(weight, storage, gates)


def matrix(
    r: np.random.Generator, units: int, cols: int, gates: int = 1, storage: Storage = None, density: float = 1.0
) -> Format:
    """Normal weights, in random blocks, elements or groups where ``storage`` leaves any out."""
    if isinstance(storage, Overlay):
        return complementary(r, units, cols, gates, storage, density)
    weight = r.standard_normal((gates, units, cols)) / np.sqrt(max(cols * density, 1))
    if storage is not None:
        block = (1, 1) if storage == "csc" else storage
        rows, columns = -(-units // block[0]), -(-cols // block[1])
        kept = r.random((gates, rows, columns)) < density
        weight *= np.repeat(np.repeat(kept, block[0], 1), block[1], 2)[:, :units, :cols]
    return store(weight.reshape(gates * units, cols), gates, storage)


def complementary(
    r: np.random.Generator, units: int, cols: int, gates: int, storage: Overlay, density: float
) -> sf.Complementary:
    """Any group of a set lives, also one beyond the end of its gate; a share ``density`` of the groups holds weights."""
    k, g = storage.overlay, storage.group
    sets = -(-units // (k * g))
    live = r.integers(0, k, (cols, gates, sets), np.uint8)
    row = (live.astype(int) * sets + np.arange(sets))[..., None] * g + np.arange(g)
    values = r.standard_normal(row.shape) / np.sqrt(max(cols * density / k, 1))
    values *= (row < units) & (r.random(live.shape) < density)[..., None]
    return sf.Complementary(gates * units, cols, gates, k, g, values.astype(np.float32), live)


def vector(r: np.random.Generator, size: int, scale: float = 1.0) -> np.ndarray:
    """Float32 values."""
    return (scale * r.standard_normal(size)).astype(np.float32)


def embedding(r: np.random.Generator, tokens: int, width: int) -> Embedding:
    """A table of normal rows."""
    return Embedding(r.standard_normal((tokens, width)).astype(np.float32))


def linear(r: np.random.Generator, inputs: int, outputs: int, storage: Storage = None, density: float = 1.0) -> Linear:
    """A layer with a bias."""
    return Linear(matrix(r, outputs, inputs, 1, storage, density), vector(r, outputs))


def conv1d(
    r: np.random.Generator,
    inputs: int,
    outputs: int,
    kernel: int = 3,
    dilation: int = 1,
    groups: int = 1,
    storage: Storage = None,
    density: float = 1.0,
) -> Conv1d:
    """A convolution; weights between groups are zero."""
    weight = matrix(r, outputs, kernel * inputs, 1, storage, density)
    if groups > 1:
        out, of = np.arange(outputs) // (outputs // groups), np.arange(inputs) // (inputs // groups)
        dense = weight.to_dense() * (out[:, None] == np.tile(of, kernel))
        weight = store(dense.astype(np.float32), 1, storage)
    return Conv1d(weight, vector(r, outputs), kernel, dilation, groups)


def gru(
    r: np.random.Generator,
    inputs: int,
    units: int,
    storage: Storage = None,
    density: float = 1.0,
    reset_after: bool = True,
) -> GRU:
    """A layer whose gates move over their whole range."""
    return GRU(
        matrix(r, units, inputs, 3, storage, density), matrix(r, units, units, 3, storage, density),
        vector(r, 3 * units), vector(r, 3 * units), reset_after,
    )  # fmt: skip


def egru(
    r: np.random.Generator, inputs: int, units: int, storage: Storage = None, density: float = 1.0, **options: Any
) -> EGRU:
    """A layer in which about a third of the units speak."""
    return EGRU(
        matrix(r, units, inputs, 3, storage, density), matrix(r, units, units, 3, storage, density),
        vector(r, 3 * units), vector(r, 3 * units), options.pop("reset_after", True),
        threshold=np.abs(vector(r, units, 0.3)), **options,
    )  # fmt: skip


def large_layers() -> sf.Program:
    """Layers whose recurrent products are large enough to be made by a second thread, in both forms of reset."""
    r = rng(7)
    ops = (egru(r, 40, 320), egru(r, 320, 320, (16, 1), 0.8, reset_after=False), gru(r, 320, 96), lstm(r, 96, 90))
    return sf.Program(ops)


def lstm(r: np.random.Generator, inputs: int, units: int, storage: Storage = None, density: float = 1.0) -> LSTM:
    """A layer whose gates move over their whole range."""
    return LSTM(
        matrix(r, units, inputs, 4, storage, density), matrix(r, units, units, 4, storage, density),
        vector(r, 4 * units), vector(r, 4 * units),
    )  # fmt: skip


def rnn(
    r: np.random.Generator,
    inputs: int,
    units: int,
    storage: Storage = None,
    density: float = 1.0,
    nonlinearity: str = "tanh",
) -> RNN:
    """A plain layer."""
    return RNN(
        matrix(r, units, inputs, 1, storage, density), matrix(r, units, units, 1, storage, density),
        vector(r, units), vector(r, units), nonlinearity,
    )  # fmt: skip


def changes(op: Any, delta_input: float | None = None, delta_hidden: float | None = None) -> Any:
    """The same layer as one that sends changes."""
    return replace(op, delta_input=delta_input, delta_hidden=delta_hidden)


def layer_norm(r: np.random.Generator, units: int) -> LayerNorm:
    """Scales of both signs."""
    return LayerNorm(vector(r, units), vector(r, units))


def adaptive(
    r: np.random.Generator, inputs: int, first: int, *clusters: tuple[int, int], storages: Any = ((None, None),)
) -> list[Any]:
    """A decoder of ``first`` words and (numbers of the projection, words) of each cluster; its matrices' storages take turns."""
    units = first + len(clusters)
    ops: list[Any] = [linear(r, inputs, units), LogSoftmax(units)]
    for k, (narrow, words) in enumerate(clusters):
        projection, weight = storages[k % len(storages)]
        density = lambda storage: 1.0 if storage is None else 0.6  # noqa: E731
        ops.append(
            Cluster(
                matrix(r, narrow, inputs, 1, projection, density(projection)),
                matrix(r, words, narrow, 1, weight, density(weight)), vector(r, words), units, first,
            )
        )  # fmt: skip
        first, units = first + words, units - 1 + words
    return ops


EGRU_OPTIONS = [
    {"reset": reset, "reset_after": after, "output": output, "event": event, "zoneout": zoneout}
    for reset, after, output, event, zoneout in product(
        ("threshold", "output", "none"), (True, False), ("events", "state"), ("threshold", "always"), (0.0, 0.3)
    )
]


def rounded(ops: list[Any], precision: Any) -> tuple[Any, ...]:
    """The same ops with rounded matrices."""
    return sf.Program(tuple(ops)).rounded(precision).ops


def two_ways(make: Any, r: np.random.Generator, *args: Any, **options: Any) -> list[Recurrent]:
    """A layer that reads forwards and one of other weights that reads backwards."""
    return [make(r, *args, **options), replace(make(r, *args, **options), reverse=True)]


def network(name: str) -> sf.Program:
    """One of :data:`NETWORKS` or :data:`WHOLE_SEQUENCES`, the same every time."""
    r = rng(*name.encode())
    return sf.Program(tuple((NETWORKS | WHOLE_SEQUENCES)[name](r)), {"name": name})


# Of projection and weight, every format once each.
CLUSTERED = (((4, 4), "csc"), (Overlay(4), (16, 1)), ("csc", Overlay(2)), (None, None))

# One to three layers, with and without an embedding, every kind of last op, every format, sizes around a vector.
NETWORKS = {
    "linear": lambda r: [linear(r, 17, 33)],
    "embedding": lambda r: [embedding(r, 5, 17)],
    "embedding-linear": lambda r: [embedding(r, 5, 17), linear(r, 17, 3)],
    "gru": lambda r: [gru(r, 3, 31)],
    "gru-before": lambda r: [gru(r, 16, 16, reset_after=False)],
    "gru-block-2": lambda r: [gru(r, 20, 33, (16, 1), 0.5), gru(r, 33, 17, (4, 4), 0.5), linear(r, 17, 2)],
    "egru-one-unit": lambda r: [egru(r, 1, 1)],
    "egru-events": lambda r: [egru(r, 15, 31)],
    "egru-state-linear": lambda r: [egru(r, 16, 100, output="state"), linear(r, 100, 17)],
    "egru-block": lambda r: [egru(r, 40, 129, (16, 1), 0.25), linear(r, 129, 9, (8, 1), 0.5)],
    "tokens": lambda r: [embedding(r, 7, 17), egru(r, 17, 33), linear(r, 33, 7)],
    "tokens-block": lambda r: [embedding(r, 7, 16), egru(r, 16, 48, (16, 1), 0.5), linear(r, 48, 7, (4, 4), 0.5)],
    "tokens-gru": lambda r: [embedding(r, 7, 8), gru(r, 8, 20, reset_after=False), linear(r, 20, 7)],
    "tokens-2": lambda r: [
        embedding(r, 7, 12), egru(r, 12, 40, (8, 1), 0.5, reset_after=False), egru(r, 40, 24, output="state"), linear(r, 24, 7)
    ],
    "linear-first": lambda r: [linear(r, 9, 20), egru(r, 20, 17, reset="output"), linear(r, 17, 4), linear(r, 4, 3)],
    "mixed-3": lambda r: [
        egru(r, 10, 33, (5, 3), 0.5, reset="none"), gru(r, 33, 20), egru(r, 20, 18, (20, 2), 0.5, zoneout=0.2)
    ],
    "lstm": lambda r: [lstm(r, 3, 31)],
    "lstm-block-2": lambda r: [lstm(r, 20, 33, (16, 1), 0.5), lstm(r, 33, 17, (4, 4), 0.5), linear(r, 17, 2)],
    "lstm-of-events": lambda r: [egru(r, 9, 33), lstm(r, 33, 20), egru(r, 20, 18)],
    "tokens-lstm": lambda r: [embedding(r, 7, 8), lstm(r, 8, 20), linear(r, 20, 7)],
    "rnn": lambda r: [rnn(r, 3, 31)],
    "rnn-relu-2": lambda r: [rnn(r, 16, 33, (8, 1), 0.5, "relu"), rnn(r, 33, 17, nonlinearity="relu"), linear(r, 17, 2)],
    "rnn-of-events": lambda r: [egru(r, 9, 33), rnn(r, 33, 20), rnn(r, 20, 16, nonlinearity="relu")],
    "tokens-rnn": lambda r: [embedding(r, 7, 8), rnn(r, 8, 20, nonlinearity="relu"), linear(r, 20, 7)],
    "relu": lambda r: [linear(r, 9, 33), ReLU(33), linear(r, 33, 17, (16, 1), 0.5), ReLU(17)],
    "relu-recurrent": lambda r: [
        gru(r, 9, 20), ReLU(20), lstm(r, 20, 17), ReLU(17), egru(r, 17, 16), ReLU(16), gru(r, 16, 15)
    ],
    "tokens-relu": lambda r: [embedding(r, 7, 17), ReLU(17), egru(r, 17, 33, output="state"), ReLU(33), linear(r, 33, 7)],
    "events": lambda r: [Events(20), egru(r, 20, 33, (16, 1), 0.5), linear(r, 33, 17), Events(17), gru(r, 17, 18)],
    "kwta": lambda r: [
        linear(r, 9, 36), KWTA(36, 5), linear(r, 36, 20, (16, 1), 0.5), KWTA(20, 2, 4), gru(r, 20, 17), KWTA(17, 17)
    ],
    "relu-kwta": lambda r: [Events(9), KWTA(9, 3), linear(r, 9, 33), ReLU(33), KWTA(33, 6), lstm(r, 33, 16), KWTA(16, 1, 4)],
    "tokens-log-softmax": lambda r: [embedding(r, 7, 8), egru(r, 8, 20), linear(r, 20, 37), LogSoftmax(37)],
    "top-k": lambda r: [gru(r, 9, 20), linear(r, 20, 33), TopK(33, 3)],
    "tokens-argmax": lambda r: [embedding(r, 7, 8), egru(r, 8, 20), linear(r, 20, 7), LogSoftmax(7), TopK(7, 1)],
    "tokens-cluster": lambda r: [embedding(r, 7, 8), egru(r, 8, 20), *adaptive(r, 20, 5, (3, 17))],
    "tokens-cluster-2": lambda r: [
        embedding(r, 7, 8), egru(r, 8, 33, (16, 1), 0.5), *adaptive(r, 33, 10, (17, 16), (5, 1), storages=CLUSTERED)
    ],
    "cluster-of-state": lambda r: [
        egru(r, 9, 20, output="state"), *adaptive(r, 20, 3, (16, 33), (4, 20), storages=CLUSTERED[2:])
    ],
    "cluster-alone": lambda r: adaptive(r, 9, 1, (1, 1), (3, 16), (2, 2)),
    "cluster-of-winners": lambda r: [linear(r, 9, 33), KWTA(33, 5), *adaptive(r, 33, 18, (8, 7)), TopK(25, 3)],
    "cluster-then-relu": lambda r: [
        embedding(r, 7, 12), *adaptive(r, 12, 7, (3, 5)), layer_norm(r, 12), ReLU(12),
        *adaptive(r, 12, 2, (9, 15), storages=CLUSTERED),
    ],
    "cluster-i8": lambda r: rounded([egru(r, 9, 20), *adaptive(r, 20, 5, (7, 17), (3, 4), storages=CLUSTERED)], "i8"),
    "cluster-bf16": lambda r: rounded([gru(r, 9, 20), *adaptive(r, 20, 5, (7, 17), (3, 4), storages=CLUSTERED[1:])], "bf16"),
    "cluster-w8a8": lambda r: rounded(
        [gru(r, 9, 20), *adaptive(r, 20, 5, (7, 17), (3, 40)), layer_norm(r, 62), ReLU(62), *adaptive(r, 62, 5, (17, 20))], "w8a8"
    ),
    "layer-norm": lambda r: [layer_norm(r, 17)],
    "layer-norm-relu": lambda r: [
        layer_norm(r, 9), linear(r, 9, 33), layer_norm(r, 33), ReLU(33), linear(r, 33, 17), layer_norm(r, 17)
    ],
    "layer-norm-of-events": lambda r: [egru(r, 9, 33), layer_norm(r, 33), lstm(r, 33, 20), layer_norm(r, 20), egru(r, 20, 18)],
    "tokens-layer-norm": lambda r: [embedding(r, 7, 17), layer_norm(r, 17), gru(r, 17, 16), linear(r, 16, 7)],
    "three": lambda r: [
        embedding(r, 11, 8), egru(r, 8, 33), egru(r, 33, 32, (32, 1), 0.7, reset="output"), egru(r, 32, 17, (1, 1), 0.3),
        linear(r, 17, 11),
    ],
    "conv": lambda r: [conv1d(r, 9, 33, 3, 2)],
    "conv-one-tap": lambda r: [conv1d(r, 16, 8, 1, 5, 4), conv1d(r, 8, 17, 2, 3)],
    "conv-depthwise": lambda r: [
        conv1d(r, 20, 20, 4, 2, 20, "csc"), linear(r, 20, 33, (16, 1), 0.5), ReLU(33), conv1d(r, 33, 17)
    ],
    "conv-of-events": lambda r: [
        egru(r, 9, 33), conv1d(r, 33, 20, 3, 2, 1, (4, 4), 0.5), ReLU(20), conv1d(r, 20, 16, 2, 4, 2, (8, 1), 0.7),
        egru(r, 16, 17), conv1d(r, 17, 3, 5),
    ],
    "tokens-conv": lambda r: [
        embedding(r, 7, 12), conv1d(r, 12, 32, 2, 1, 1, Overlay(4)), KWTA(32, 5), conv1d(r, 32, 9, 3, 3), gru(r, 9, 7)
    ],
    "conv-i8": lambda r: rounded([conv1d(r, 9, 33, 3, 2), ReLU(33), conv1d(r, 33, 17, 2, 1, 1, (16, 1), 0.5)], "i8"),
    "conv-w8a8": lambda r: rounded(
        [conv1d(r, 9, 33, 3, 2, 3, (4, 1), 0.7), conv1d(r, 33, 20, 2), ReLU(20), conv1d(r, 20, 17, 2, 1, 1, (16, 1), 0.5)], "w8a8"
    ),
    "csc": lambda r: [gru(r, 20, 33, "csc", 0.5), egru(r, 33, 17, "csc", 0.3, reset_after=False), linear(r, 17, 5, "csc", 0.5)],
    "mixed-i8": lambda r: rounded([egru(r, 20, 33, (16, 1), 0.5), lstm(r, 33, 17, (4, 4), 0.5), linear(r, 17, 3)], "i8"),
    "mixed-w8a8": lambda r: rounded(
        [lstm(r, 20, 33, (4, 4), 0.5), gru(r, 33, 17, (16, 1), 0.5), gru(r, 17, 19, (5, 3), 0.5, reset_after=False),
         egru(r, 19, 20), linear(r, 20, 16), rnn(r, 16, 17, "csc", 0.5), linear(r, 17, 3)], "w8a8"
    ),
    "tokens-overlay-w8a8": lambda r: rounded(
        [embedding(r, 9, 12), gru(r, 12, 37, Overlay(4)), linear(r, 37, 9, Overlay(2, 4), 0.8)], "w8a8"
    ),
    "csc-bf16": lambda r: rounded([gru(r, 12, 19, "csc", 0.4), linear(r, 19, 5)], "bf16"),
    "tokens-overlay-i8": lambda r: rounded(
        [embedding(r, 9, 12), egru(r, 12, 37, Overlay(4)), linear(r, 37, 9, Overlay(2, 4), 0.8)], "i8"
    ),
    "delta-gru": lambda r: [changes(gru(r, 9, 31), 0.3, 0.1), linear(r, 31, 3)],
    "delta-gru-0": lambda r: [changes(gru(r, 20, 33, (16, 1), 0.5), 0, 0), changes(gru(r, 33, 17, (4, 4), 0.5), None, 0.05)],
    "delta-gru-before": lambda r: [changes(gru(r, 9, 20, reset_after=False), 0.4), changes(lstm(r, 20, 17), 0.1, 0.05)],
    "delta-lstm": lambda r: [changes(lstm(r, 20, 33, "csc", 0.5), 0.5, 0.1), changes(lstm(r, 33, 16, Overlay(4)), 0.05, 0.02)],
    "delta-rnn": lambda r: [changes(rnn(r, 3, 31), 0.2, 0.2), changes(rnn(r, 31, 17, nonlinearity="relu"), 0.1)],
    "delta-of-events": lambda r: [
        egru(r, 9, 33), changes(gru(r, 33, 20), 0.1, 0.1), ReLU(20), changes(lstm(r, 20, 17), None, 0.1), ReLU(17),
        changes(gru(r, 17, 16), 0.05), linear(r, 16, 4),
    ],
    "tokens-delta": lambda r: [embedding(r, 7, 17), changes(gru(r, 17, 20), None, 0.1), linear(r, 20, 7)],
    "tokens-delta-input": lambda r: [embedding(r, 7, 17), changes(lstm(r, 17, 20), 0.5, 0.1), linear(r, 20, 7)],
    "delta-i8": lambda r: rounded(
        [changes(gru(r, 12, 37, Overlay(4)), 0.3, 0.1), changes(lstm(r, 37, 19, (5, 3), 0.5), 0.1, 0.1), linear(r, 19, 5)], "w8a8"
    ),
    "delta-bf16": lambda r: rounded([changes(gru(r, 12, 19, (8, 1), 0.4), 0.3, 0.1)], "bf16"),
    "lstm-csc": lambda r: [lstm(r, 12, 19, "csc", 0.4), rnn(r, 19, 17, "csc", 0.4)],
    "lstm-overlay": lambda r: [lstm(r, 12, 37, Overlay(4)), rnn(r, 37, 33, Overlay(2, 4))],
    "gru-overlay": lambda r: [gru(r, 9, 37, Overlay(4), reset_after=False), linear(r, 37, 9, Overlay(2, 4), 0.8)],
    "egru-overlay-16": lambda r: [egru(r, 12, 70, Overlay(4, 16)), linear(r, 70, 21, Overlay(10))],
    "tokens-overlay": lambda r: [
        embedding(r, 7, 16), egru(r, 16, 150, Overlay(4), zoneout=0.2), egru(r, 150, 31, Overlay(17), 0.9, reset_after=False),
        linear(r, 31, 7, Overlay(2)),
    ],
}  # fmt: skip


# With layers that read both ways: at the start, at the end, one after the other, and with every kind of op around them.
WHOLE_SEQUENCES = {
    "two-ways-gru": lambda r: two_ways(gru, r, 3, 17),
    "two-ways-lstm-2": lambda r: [*two_ways(lstm, r, 9, 16, (16, 1), 0.5), *two_ways(lstm, r, 32, 5), linear(r, 10, 3)],
    "two-ways-rnn": lambda r: [
        linear(r, 4, 7), *two_ways(rnn, r, 7, 9, "csc", 0.5), layer_norm(r, 18), ReLU(18), linear(r, 18, 5)
    ],
    "two-ways-egru-3": lambda r: [
        *two_ways(egru, r, 6, 20, (4, 1), 0.5), *two_ways(egru, r, 40, 17, reset_after=False), conv1d(r, 34, 12, 2),
        *two_ways(egru, r, 12, 9, output="state"),
    ],
    "two-ways-events": lambda r: [
        Events(9), *two_ways(gru, r, 9, 10, (5, 3), 0.5, reset_after=False), KWTA(20, 4), gru(r, 20, 6)
    ],
    "two-ways-tokens": lambda r: [
        embedding(r, 7, 12), *two_ways(egru, r, 12, 15), layer_norm(r, 30), linear(r, 30, 7), LogSoftmax(7)
    ],
    "two-ways-later": lambda r: [embedding(r, 7, 12), gru(r, 12, 15), *two_ways(rnn, r, 15, 8, nonlinearity="relu"), TopK(16, 2)],
    "two-ways-w8a8": lambda r: rounded(
        [*two_ways(gru, r, 9, 20, (16, 1), 0.5), *two_ways(egru, r, 40, 12, Overlay(4)), linear(r, 24, 3)], "w8a8"
    ),
}  # fmt: skip


def sequence(program: sf.Program, steps: int, *salt: int) -> np.ndarray:
    """Inputs that the program takes: token ids, or float32 values of which some are exactly zero."""
    r = rng(*salt, steps)
    if program.takes_tokens:
        return r.integers(0, program.inputs, steps)
    return (r.standard_normal((steps, program.inputs)) * (r.random((steps, program.inputs)) < 0.8)).astype(np.float32)


def state(program: sf.Program, *salt: int) -> dict[str, np.ndarray]:
    """A state in the middle of a run: about a third of the units have spoken."""
    r, out = rng(*salt), {}
    for i, op in enumerate(program.ops):
        if isinstance(op, Conv1d) and op.history:
            past = vector(r, op.history * op.inputs) * (r.random(op.history * op.inputs) < 0.3)
            out[f"{i}.x"] = past.astype(np.float32).reshape(op.history, op.inputs)
        if isinstance(op, Recurrent):
            out[f"{i}.h"] = vector(r, op.outputs, 0.5)
        if isinstance(op, LSTM):
            out[f"{i}.c"] = vector(r, op.outputs)
        if isinstance(op, EGRU):
            out[f"{i}.y"] = (vector(r, op.outputs) * (r.random(op.outputs) < 0.3)).astype(np.float32)
        if isinstance(op, Recurrent) and "age" in op.carried():
            out[f"{i}.age"] = np.array([DELTA_REFRESH - 5], np.float32)  # a few steps on, the memories are summed anew
            for at, weight, bias in (("x", op.weight_ih, op.bias_ih), ("h", op.weight_hh, op.bias_hh)):
                if f"sent_{at}" in op.carried():
                    sent = out[f"{i}.sent_{at}"] = vector(r, weight.shape[1], 0.5)
                    out[f"{i}.memory_{at}"] = (weight.matvec(sent.astype(np.float64)) + bias).astype(np.float32)
    return out
