"""Corpora by name or by path. Nothing is downloaded but a published corpus that was asked for by its name."""

from __future__ import annotations

import os

from sparsefold.data.ptb import PTB
from sparsefold.data.text import MAX_WORDS, MIN_COUNT, ByteCorpus, Corpus, load_text
from sparsefold.data.wikitext2 import WIKITEXT2
from sparsefold.vocabulary import Level

__all__ = ["PUBLISHED", "ByteCorpus", "Corpus", "load_corpus", "load_text"]

PUBLISHED = {corpus.name: corpus for corpus in (PTB, WIKITEXT2)}


def load_corpus(
    name_or_path: str,
    level: Level = "word",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    min_count: int = MIN_COUNT,
    max_words: int = MAX_WORDS,
) -> Corpus:
    """A corpus as token ids.

    Args:
        name_or_path: ``"ptb"``, ``"wikitext2"``; a text file or a folder of them; ``""`` is the text that every Python carries.
        level: ``"word"`` or ``"byte"``.
        data_dir: where published corpora lie, or are downloaded to. None: ``SPARSEFOLD_DATA``, else the user's cache.
        min_count: words that occur less often become ``<unk>``, in texts of your own; published ones keep all.
        max_words: the largest vocabulary of words, in texts of your own.

    Raises:
        ValueError: what cannot be read or downloaded, is too short, or differs from what was published.
    """
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path].load(level, data_dir)
    try:
        return load_text(name_or_path, level, min_count, max_words)
    except ValueError as error:
        if name_or_path and not os.path.lexists(name_or_path):
            raise ValueError(f"{error} Corpora that have a name: {', '.join(PUBLISHED)}.") from error
        raise
