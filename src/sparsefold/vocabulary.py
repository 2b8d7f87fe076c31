"""What the token ids of a language model stand for: bytes, or words between white space."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

EOS, UNK = "<eos>", "<unk>"  # the end of a line; a word outside the vocabulary
PIECE = 2**20  # bytes of text that are words at a time
LONGEST = 1000  # bytes of a word

Level = Literal["byte", "word"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """``values[i]`` is the byte, or the word, of token ``i``.

    Of bytes the token after the last stands for every other byte. Of words ``<unk>`` stands for every other word and ``<eos>``
    for the end of a line; both are among the values. Words are what ASCII white space divides, in UTF-8.
    """

    level: Level
    values: tuple[Any, ...]

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return len(self.values) + (self.level == "byte")

    @cached_property
    def unknown(self) -> int:
        """The token of all that is not in the vocabulary."""
        return len(self.values) if self.level == "byte" else self.values.index(UNK)

    @cached_property
    def _index(self) -> Any:
        if self.level == "word":
            return {word.encode(): i for i, word in enumerate(self.values)}
        table = np.full(256, -1, np.int64)
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def look_up(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids (T,) of a text, -1 for what is not in the vocabulary.

        Raises:
            ValueError: the text is to be read as words and is not UTF-8; the place is named.
        """
        raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        if self.level == "byte":
            ids: NDArray[np.int64] = self._index[np.frombuffer(raw, np.uint8)]
            return ids
        known = self._index.get
        parts = [np.fromiter(map(known, words, repeat(-1)), np.int64, len(words)) for words in split_words(raw)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def encode(self, text: bytes | str) -> NDArray[np.int64]:
        """Token ids (T,) of a text; what is not in the vocabulary becomes ``unknown``. A newline is a token of its own."""
        ids = self.look_up(text)
        ids[ids < 0] = self.unknown
        return ids

    def strangers(self, text: bytes) -> list[str]:
        """The different words, or bytes, of a text that are not in the vocabulary, in the order of the text."""
        if self.level == "byte":
            return [f"byte 0x{b:02x}" for b in dict.fromkeys(text) if self._index[b] < 0]
        words = dict.fromkeys(word for words in split_words(text) for word in words)
        return [repr(word.decode()) for word in words if word not in self._index]

    def decode(self, ids: Iterable[int]) -> Any:
        """The text of token ids: bytes, with ``?`` for the unknown one, or a string of words with a space between them."""
        if self.level == "byte":
            table = bytes([*self.values, ord("?")])
            return bytes(table[int(t)] for t in ids)
        words = (self.values[int(t)] for t in ids)
        return " ".join("\n" if word == EOS else word for word in words).replace("\n ", "\n").replace(" \n", "\n")

    def metadata(self) -> dict[str, Any]:
        """The facts with which a program carries its vocabulary (``docs/file-format.md``)."""
        return {**({"level": "word"} if self.level == "word" else {}), "vocabulary": list(self.values)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokens: int | None = None) -> Vocabulary:
        """The vocabulary that a program of ``tokens`` token ids (any number, when left out) carries. It is untrusted input.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        level, values = metadata.get("level", "byte"), metadata.get("vocabulary")
        if level not in ("byte", "word"):
            raise ValueError("its metadata names a level that is neither byte nor word.")
        if not isinstance(values, list) or tokens not in (None, len(values) + (level == "byte")):
            raise ValueError("its metadata names no vocabulary that fits its sizes.")
        if level == "byte":
            sound = all(type(b) is int and 0 <= b < 256 for b in values)
        else:
            sound = all(map(_is_word, values)) and EOS in values and UNK in values
        if not sound or len(set(values)) != len(values):
            raise ValueError(
                f"its vocabulary is no list of different {level}s{f', {EOS} and {UNK} among them' * (level == 'word')}."
            )
        return cls(level, tuple(values))


def _is_word(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value.encode()) <= LONGEST and value.encode().split() == [value.encode()]
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def split_words(raw: bytes) -> Iterator[list[bytes]]:
    """The words of a text, ``<eos>`` for each newline, some lines at a time. ``ValueError`` says where it is not UTF-8."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.isascii() or raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"words are read from UTF-8, but byte {error.start} (0x{raw[error.start]:02x}, in line {line}) is not. "
            "Convert the text, or read it byte by byte (level byte)."
        ) from None
    at = 0
    while at < len(raw):
        end = raw.find(b"\n", at + PIECE) + 1 or len(raw)
        yield raw[at:end].replace(b"\n", b" <eos> ").split()
        at = end
