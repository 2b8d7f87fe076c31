"""Any text file as bytes, and a default corpus that every Python carries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLIT = (0.8, 0.1, 0.1)


@dataclass(frozen=True, eq=False)
class ByteCorpus:
    """A text as token ids, split in order into train, valid and test (int64).

    ``vocabulary[i]`` is the byte of token ``i``; the token after the last stands for every byte the training split lacks.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    vocabulary: tuple[int, ...]
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Number of tokens, the one for unknown bytes included."""
        return len(self.vocabulary) + 1

    def to_dict(self) -> dict[str, Any]:
        """What results record of a corpus; nothing of its text."""
        sizes = {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)}
        return {"source": self.source, "sha256": self.sha256, "bytes": sizes, "tokens": self.tokens}


def load_text(path: str | None = None) -> ByteCorpus:
    """Read a text file, byte by byte; without a path, CPython's own reference text (``pydoc_data.topics``, English).

    The default differs between Python versions, so results record its hash. Splits are 80/10/10 in order.

    Raises:
        ValueError: no such file, or one too short to split.
    """
    if path:
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the text file {path}: {error.strerror}.") from error
        source = Path(path).name
    else:
        from pydoc_data.topics import topics

        raw = "\n".join(topics[name] for name in sorted(topics)).encode()
        source = "pydoc_data.topics"
    if len(raw) < 1000:
        raise ValueError(f"{source} has {len(raw)} bytes; a corpus needs at least 1000 to be split 80/10/10.")
    first, second = round(len(raw) * SPLIT[0]), round(len(raw) * (SPLIT[0] + SPLIT[1]))
    splits = np.split(np.frombuffer(raw, np.uint8), [first, second])
    vocabulary = np.unique(splits[0])
    train, valid, test = (encode(s.tobytes(), vocabulary.tolist()) for s in splits)
    return ByteCorpus(train, valid, test, tuple(vocabulary.tolist()), source, hashlib.sha256(raw).hexdigest())


def encode(text: bytes, vocabulary: list[int] | tuple[int, ...]) -> NDArray[np.int64]:
    """Token ids (T,) of a text; bytes outside the vocabulary become ``len(vocabulary)``."""
    table = np.full(256, len(vocabulary), np.int64)
    table[list(vocabulary)] = np.arange(len(vocabulary))
    return table[np.frombuffer(text, np.uint8)]


def decode(tokens: Any, vocabulary: list[int] | tuple[int, ...]) -> bytes:
    """The bytes of token ids; ``?`` for the unknown one."""
    table = bytes([*vocabulary, ord("?")])
    return bytes(table[int(t)] for t in tokens)
