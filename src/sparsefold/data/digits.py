"""Free Spoken Digit Dataset: ten English digits, spoken by six people fifty times each, 8 kHz, one channel."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefold.data._fetch import data_root, downloaded, made_folder
from sparsefold.formats import Float
from sparsefold.program import write_atomically
from sparsefold.sound import read_wav

NAME, RATE = "fsdd", 8000
COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/{COMMIT}"
LICENCE = "Free Spoken Digit Dataset, by Zohar Jackson and others; CC BY-SA 4.0."
RECORDINGS = 3000
FINGERPRINT = "dbd573d7cafe79c4b49f65718115e1304e24e067fa39eff18a660dc6cb9c360f"
LARGEST = 2**26  # bytes of the archive; it has about a quarter
TEST, VALID = 5, 10  # of each digit and speaker: recordings 0 to 4 are the published test split, we validate on 5 to 9
_FILE = re.compile(r"(\d)_([a-z]+)_(\d{1,2})\.wav")


@dataclass(frozen=True, eq=False)
class Recording:
    """A digit as somebody said it; samples (T,) in [-1, 1]."""

    label: str
    speaker: str
    number: int
    samples: Float


@dataclass(frozen=True)
class Digits:
    """The three splits."""

    train: tuple[Recording, ...]
    valid: tuple[Recording, ...]
    test: tuple[Recording, ...]

    def to_dict(self) -> dict[str, Any]:
        """For results and checkpoints."""
        counts = {split: len(getattr(self, split)) for split in ("train", "valid", "test")}
        return {"source": NAME, "commit": COMMIT, "sha256": FINGERPRINT, "licence": LICENCE, "recordings": counts}


def load_digits(data_dir: str | os.PathLike[str] | None = None, download: bool = True) -> Digits:
    """Read it from ``data_dir``, else ``SPARSEFOLD_DATA``, else the user's cache; where it is missing, download it there.

    Raises:
        ValueError: it is neither there nor to be had, or other recordings lie there than were published at ``COMMIT``.
    """
    files = _files(_folder(data_dir, download))
    if _fingerprint({path.name: path.read_bytes() for path in files}) != FINGERPRINT:
        raise ValueError(
            f"{files[0].parent if files else 'the folder'} has {len(files)} recordings, which are not the {RECORDINGS} of the "
            f"Free Spoken Digit Dataset at commit {COMMIT[:7]}. Remove them to download those."
        )
    splits: tuple[list[Recording], ...] = ([], [], [])
    for path in files:
        found = _FILE.fullmatch(path.name)
        assert found is not None
        label, speaker, number = found[1], found[2], int(found[3])
        split = 2 if number < TEST else 1 if number < VALID else 0
        splits[split].append(Recording(label, speaker, number, read_wav(path, RATE)))
    return Digits(*map(tuple, splits))


def _folder(data_dir: str | os.PathLike[str] | None, download: bool) -> Path:
    root = data_root(data_dir)
    places = root / NAME / "recordings", root / "free-spoken-digit-dataset" / "recordings", root / "recordings", root
    for folder in places:
        if _files(folder):
            return folder
    instead = f"the folder 'recordings' of github.com/Jakobovski/free-spoken-digit-dataset into {root / NAME}"
    if not download:
        raise ValueError(
            f"{NAME} is not in {root}. Put {instead}, or name its folder with --data-dir or SPARSEFOLD_DATA."
        )
    print(f"{NAME} is not in {root}; downloading it. {LICENCE}", file=sys.stderr)
    raw = downloaded(URL, NAME, LARGEST, instead)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:  # nothing but files of such names is kept, wherever the archive would have them
                name = Path(member.name).name
                if member.isfile() and _FILE.fullmatch(name) and member.size < 2**17 and len(found) < RECORDINGS:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{URL} gave {len(raw):,} bytes that are not an archive ({error}). Put {instead}.") from error
    if _fingerprint(found) != FINGERPRINT:
        raise ValueError(
            f"{URL} gave {len(found)} recordings, not those that are known; nothing was kept. Put {instead}."
        )
    made_folder(places[0])
    for name, content in found.items():
        write_atomically(places[0] / name, content)
    return places[0]


def _fingerprint(contents: Mapping[str, bytes]) -> str:
    """Of the recordings by name, whatever packed them."""
    whole = hashlib.sha256()
    for name in sorted(contents):
        whole.update(f"{name} {hashlib.sha256(contents[name]).hexdigest()}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.wav") if _FILE.fullmatch(path.name)) if folder.is_dir() else []
