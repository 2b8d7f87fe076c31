"""Texts as token ids, byte by byte or word by word: any file, a folder of files, and a text that every Python carries."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.vocabulary import EOS, LONGEST, UNK, Level, Vocabulary, split_words

SPLIT = (0.8, 0.1, 0.1)
NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}
NAMES |= {"test": "test"}
SUFFIXES = (".txt", ".text", ".tokens", ".md", ".rst")
MIN_BYTES = 1000
MIN_COUNT, MAX_WORDS = 2, 2**16


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as token ids, divided into train, valid and test (int64), and what the ids stand for.

    The vocabulary has seen the training split alone; whatever that lacks is one token, ``known.unknown``. Words are numbered by
    how often they occur in it, the most frequent first; bytes by their value.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    known: Vocabulary
    source: str
    sha256: str

    @property
    def level(self) -> Level:
        """``"byte"`` or ``"word"``."""
        return self.known.level

    @property
    def vocabulary(self) -> tuple[Any, ...]:
        """The byte values, or the words, of the tokens."""
        return self.known.values

    @property
    def tokens(self) -> int:
        """Number of token ids, the one for what is unknown included."""
        return self.known.tokens

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids (T,) of another text."""
        return self.known.encode(text)

    def decode(self, ids: Any) -> Any:
        """The text of token ids: bytes, or a string of words."""
        return self.known.decode(ids)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint and a compiled file need to read text: words are kept as they are, so a file holds them."""
        return {"corpus": self.to_dict(), **self.known.metadata()}

    def to_dict(self) -> dict[str, Any]:
        """What results record of a corpus; nothing of its text."""
        sizes = {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)}
        return {"source": self.source, "sha256": self.sha256, f"{self.level}s": sizes, "tokens": self.tokens}


ByteCorpus = Corpus


def load_text(
    path: str | None = None, level: Level = "byte", min_count: int = MIN_COUNT, max_words: int = MAX_WORDS
) -> Corpus:
    """Read a text; without a path, CPython's own reference text (``pydoc_data.topics``, English), which differs between versions.

    Args:
        path: a file, which is divided 80/10/10 in order; or a folder. Files in it that are named for train, valid and test are
            these splits; where none is, all its text files are one text, in the order of their names.
        level: ``"byte"``, which takes any file, or ``"word"``: what ASCII white space divides, and ``<eos>`` for each newline.
        min_count: words that occur less often in the training split become ``<unk>``.
        max_words: size of the vocabulary of words, ``<unk>`` and ``<eos>`` included; the most frequent stay.

    Raises:
        ValueError: what cannot be read, is too short to be divided, or is not UTF-8 where words are wanted.
    """
    if path:
        source, parts = Path(path).name or str(path), _read(Path(path))
    else:
        from pydoc_data.topics import topics

        source, parts = "pydoc_data.topics", ["\n".join(topics[name] for name in sorted(topics)).encode()]
    if len(parts) == 1:
        raw = parts[0]
        if len(raw) < MIN_BYTES:
            raise ValueError(
                f"{source} has {len(raw)} bytes; a corpus needs at least {MIN_BYTES} to be split 80/10/10."
            )
        edges = [0, *(_edge(raw, share, level) for share in (SPLIT[0], SPLIT[0] + SPLIT[1])), len(raw)]
        parts = [raw[edges[i] : edges[i + 1]] for i in range(3)]
    return build(parts, level, source, min_count, max_words)


def _edge(raw: bytes, share: float, level: Level) -> int:
    """Where a split begins: at that share of the text, of words at the end of one."""
    at = round(len(raw) * share)
    if level == "byte":
        return at
    found = re.compile(rb"\s").search(raw, at)
    return found.end() if found else len(raw)


def build(parts: Sequence[bytes], level: Level, source: str, min_count: int = 1, max_words: int = MAX_WORDS) -> Corpus:
    """The corpus of three texts: train, valid and test."""
    if level not in ("byte", "word"):
        raise ValueError(f"level is byte or word, got {level!r}.")
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    try:
        if level == "byte":
            values = np.unique(np.frombuffer(parts[0], np.uint8))
            known = Vocabulary("byte", tuple(values.tolist()))
            splits = [known.encode(part) for part in parts]
        else:
            if min_count < 1 or max_words < 3:
                raise ValueError(f"min_count is at least 1 and max_words at least 3, got {min_count} and {max_words}.")
            lines = [part if part.endswith(b"\n") or not part.strip() else part + b"\n" for part in parts]
            learned, known = _learn(lines[0], min_count, max_words)
            splits = [learned, *(known.encode(part) for part in lines[1:])]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, ids in zip(("train", "valid", "test"), splits, strict=True):
        if len(ids) < 2:
            raise ValueError(f"{source}: the {name} split has {len(ids)} {level}s; at least 2 are needed.")
    train, valid, test = splits
    return Corpus(train, valid, test, known, source, digest.hexdigest())


def _learn(raw: bytes, min_count: int, max_words: int) -> tuple[NDArray[np.int64], Vocabulary]:
    """Token ids of a training split, and its vocabulary."""
    index: defaultdict[bytes, int] = defaultdict(count().__next__)
    special = [index[word.encode()] for word in (UNK, EOS)]
    ids = np.concatenate(
        [np.fromiter(map(index.__getitem__, words), np.int64, len(words)) for words in split_words(raw)]
    )
    counts = np.bincount(ids, minlength=len(index))
    kept = (counts >= min_count) & np.fromiter((len(word) <= LONGEST for word in index), bool, len(index))
    kept[special] = False
    often = np.argsort(np.where(kept, -counts, 1), kind="stable")[: min(int(kept.sum()), max_words - 2)]
    chosen = np.array([*special, *often])
    counts[special[0]] += len(ids) - counts[chosen].sum()
    chosen = chosen[np.argsort(-counts[chosen], kind="stable")]
    number = np.full(len(index), -1, np.int64)
    number[chosen] = np.arange(len(chosen))
    number[number < 0] = number[special[0]]
    words = list(index)
    return number[ids], Vocabulary("word", tuple(words[i].decode() for i in chosen))


def _read(path: Path) -> list[bytes]:
    """One text, or three that are train, valid and test."""
    try:
        if not path.is_dir():
            return [path.read_bytes()]
        splits: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        for file in files:
            for name in {NAMES[word] for word in re.split(r"[^a-z]+", file.name.lower()) if word in NAMES}:
                splits[name].append(file)
        if any(splits.values()):
            if any(len(found) != 1 for found in splits.values()):
                has = "; ".join(
                    f"{name}: {', '.join(f.name for f in found) or 'none'}" for name, found in splits.items()
                )
                raise ValueError(
                    f"{path} must hold one file for each of train, valid and test, or none so named; it has {has}."
                )
            return [found[0].read_bytes() for found in splits.values()]
        if not files:
            raise ValueError(f"the folder {path} holds no text file ({', '.join(SUFFIXES)}).")
        texts = [file.read_bytes() for file in files]
        return [b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts)]
    except OSError as error:
        raise ValueError(f"cannot read the text file {error.filename or path}: {error.strerror}.") from error


def encode(text: bytes, vocabulary: Sequence[int]) -> NDArray[np.int64]:
    """Token ids (T,) of a text; bytes outside the vocabulary become ``len(vocabulary)``."""
    return Vocabulary("byte", tuple(vocabulary)).encode(text)


def decode(tokens: Any, vocabulary: Sequence[int]) -> bytes:
    """The bytes of token ids; ``?`` for the unknown one."""
    text: bytes = Vocabulary("byte", tuple(vocabulary)).decode(tokens)
    return text
