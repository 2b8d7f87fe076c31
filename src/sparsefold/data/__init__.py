"""Corpora. Each loads from a path, or brings what it needs; nothing is downloaded without being asked for."""

from sparsefold.data.text import ByteCorpus, load_text

__all__ = ["ByteCorpus", "load_text"]
