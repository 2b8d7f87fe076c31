"""Published corpora: found in a folder, or downloaded once with their checksums; counted when they are read."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from sparsefold.data.text import Corpus, build
from sparsefold.program import write_atomically
from sparsefold.progress import Progress
from sparsefold.vocabulary import Level

TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class File:
    """One split: where it lies, and what it must be."""

    name: str
    url: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Published:
    """A corpus as its papers use it: three files, words in them, and different words, with one ``<eos>`` a line."""

    name: str
    folder: str
    files: tuple[File, ...]  # train, valid, test
    words: tuple[int, int, int]
    types: int
    licence: str

    def load(
        self, level: Level = "word", data_dir: str | os.PathLike[str] | None = None, download: bool = True
    ) -> Corpus:
        """Read it from ``data_dir``, else ``SPARSEFOLD_DATA``, else the user's cache; where it is missing, download it there.

        Raises:
            ValueError: it is neither there nor to be had, or it is not this corpus: words or types were counted differently.
        """
        raws = [path.read_bytes() for path in self._paths(data_dir, download)]
        corpus = build(raws, level, self.name)
        if level == "word":
            found = tuple(len(split) for split in (corpus.train, corpus.valid, corpus.test))
            if (*found, corpus.tokens) != (*self.words, self.types):
                raise ValueError(
                    f"{self.name} has {_counted(self.words, self.types)}, but these files have "
                    f"{_counted(found, corpus.tokens)}. They are another version of it: read them as a text of your own, "
                    "by their path, or remove them to download the right ones."
                )
        return corpus

    def _paths(self, data_dir: str | os.PathLike[str] | None, download: bool) -> list[Path]:
        root = data_root(data_dir)
        for folder in (root / self.folder, root):
            paths = [folder / file.name for file in self.files]
            if all(path.is_file() for path in paths):
                return paths
        folder = root / self.folder
        if not download:
            raise ValueError(
                f"{self.name} is not in {root}. Put {_names(self.files)} there, or name their folder with --data-dir or "
                "SPARSEFOLD_DATA."
            )
        print(f"{self.name} is not in {root}; downloading it. {self.licence}", file=sys.stderr)
        made_folder(folder)
        for file in self.files:
            if not (folder / file.name).is_file():
                write_atomically(folder / file.name, self._download(file, folder))
        return [folder / file.name for file in self.files]

    def _download(self, file: File, folder: Path) -> bytes:
        raw = downloaded(file.url, file.name, file.size, f"{_names(self.files)} into {folder}")
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise ValueError(
                f"{file.url} gave {len(raw):,} bytes that are not {file.name} of {self.name} (SHA-256 differs); nothing was "
                f"kept. Put the right files ({_names(self.files)}) into {folder}."
            )
        return raw


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """Where published corpora lie: the folder that is named, else ``SPARSEFOLD_DATA``, else the user's cache."""
    named = data_dir or os.environ.get("SPARSEFOLD_DATA")
    root = Path(named) if named else _cache()
    if named and not root.is_dir():
        raise ValueError(
            f"the data folder {root} does not exist. Make it, or name another (--data-dir, SPARSEFOLD_DATA)."
        )
    return root


def made_folder(folder: Path) -> None:
    """Make a folder that downloads go to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}. Name another with --data-dir.") from error


def downloaded(url: str, name: str, size: int, instead: str) -> bytes:
    """What lies at ``url``, no more than one piece above ``size`` bytes of it; ``instead``: what to put where by hand."""
    raw = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as reply, Progress(size, name) as progress:
            while len(raw) <= size and (piece := reply.read(2**16)):
                raw += piece
                progress.update(min(len(raw), size), "bytes")
    except (OSError, HTTPException) as error:  # of urllib and of the socket
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise ValueError(
            f"cannot download {url}: {reason}. Where there is no network, put {instead}, "
            f"or into a folder that --data-dir or SPARSEFOLD_DATA names."
        ) from error
    return bytes(raw)


def _counted(words: Sequence[int], types: int) -> str:
    return f"{', '.join(f'{n:,}' for n in words)} words in train, valid and test, and {types:,} different ones"


def _names(files: Sequence[File]) -> str:
    return ", ".join(file.name for file in files[:-1]) + f" and {files[-1].name}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsefold"
