"""What a network hears: the log-mel spectrum of sound, for a whole recording at once or as the samples come."""

from __future__ import annotations

import os
import struct
import wave
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

CHUNK = 4096  # frames that are turned into a spectrum at a time
FLOOR = 1e-6  # is added to every energy, so that silence has a logarithm


@dataclass(frozen=True)
class LogMel:
    """``y_b = (log(FLOOR + Σ_k m_bk |FFT(w ⊙ x)_k|²) - mean_b) / deviation_b`` of each frame x.

    m: triangles of equal width and overlap on the mel scale, 2595 log10(1 + f / 700), from 0 to half the rate; w: Hann's window.
    Frame t reads the ``frame`` samples from t ``hop`` on and none later, so that nothing waits for the end.

    Attributes:
        rate: samples a second.
        frame: samples of a frame.
        hop: samples from one frame to the next.
        bands: triangles; the values of a frame.
        mean: of each band, subtracted; empty: 0.
        deviation: of each band, divided by; empty: 1.
    """

    rate: int = 8000
    frame: int = 200
    hop: int = 80
    bands: int = 40
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (("rate", 2**20), ("frame", 2**16), ("hop", 2**16), ("bands", 2**10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} of a LogMel is a whole number from 1 to {most}, got {value!r}.")
        if self.hop > self.frame:
            raise ValueError(f"a hop of {self.hop} samples would leave out some between frames of {self.frame}.")
        if self.bands > self.frame:
            raise ValueError(f"a frame of {self.frame} samples has no {self.bands} bands. Use fewer, or longer frames.")
        for name in ("mean", "deviation"):
            found = getattr(self, name)
            if found and (len(found) != self.bands or not np.isfinite(found).all()):
                raise ValueError(f"{name} has a finite value for each of {self.bands} bands, or none at all.")
        if self.deviation and min(self.deviation) <= 0:
            raise ValueError("deviation is above 0 in every band.")

    def __call__(self, samples: NDArray[Any]) -> Float:
        """(frames, bands) of samples (T,) in [-1, 1]; what is shorter than a frame gives none."""
        x = np.asarray(samples)
        if x.ndim != 1:
            raise ValueError(f"sound has one axis, of one channel; got shape {x.shape}.")
        if len(x) < self.frame:
            return np.zeros((0, self.bands), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(x.astype(np.float32), self.frame)[:: self.hop]
        found = np.empty((len(frames), self.bands), np.float32)
        for k in range(0, len(frames), CHUNK):  # an hour of sound is no more memory than a minute
            found[k : k + CHUNK] = self._heard(frames[k : k + CHUNK])
        return found

    def _heard(self, frames: Float) -> NDArray[Any]:
        power = np.abs(np.fft.rfft(frames * self._window, self._size, axis=1)) ** 2
        # Not a product of BLAS, whose sums depend on how many frames there are: as it comes, sound gives the same bits.
        loudness = np.log(FLOOR + np.einsum("tf,bf->tb", power, self._triangles))
        if self.mean:
            loudness = loudness - np.array(self.mean)
        found: NDArray[Any] = loudness / np.array(self.deviation) if self.deviation else loudness
        return found

    def stream(self) -> Listener:
        """The same for samples as they come."""
        return Listener(self)

    def measured(self, recordings: list[NDArray[Any]]) -> LogMel:
        """The same with the mean and the deviation of these recordings."""
        plain = LogMel(self.rate, self.frame, self.hop, self.bands)
        seen = np.concatenate([plain(r) for r in recordings]).astype(np.float64)
        mean, deviation = seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-3)
        return LogMel(
            self.rate, self.frame, self.hop, self.bands,
            tuple(round(float(v), 6) for v in mean), tuple(round(float(v), 6) for v in deviation),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a program."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> LogMel:
        """What a program hears. Raises ``ValueError`` where its metadata say nothing of it, or nonsense."""
        found = metadata.get("hears")
        if not isinstance(found, Mapping):
            raise ValueError("this program does not say what it hears: it is not of a recipe that reads sound.")
        known = {f.name for f in fields(cls)}
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"what this program says that it hears is not to be read: {error}") from error

    @property
    def _size(self) -> int:
        return 1 << (self.frame - 1).bit_length()

    @cached_property
    def _window(self) -> Float:
        return np.hanning(self.frame).astype(np.float32)

    @cached_property
    def _triangles(self) -> Float:
        """(bands, frequencies)."""
        frequencies = np.fft.rfftfreq(self._size, 1 / self.rate)
        mel = 2595 * np.log10(1 + frequencies / 700)
        width = 2595 * np.log10(1 + self.rate / 2 / 700) / (self.bands + 1)  # of half a triangle
        tops = width * np.arange(1, self.bands + 1)
        found: Float = np.maximum(1 - np.abs(mel - tops[:, None]) / width, 0).astype(np.float32)
        return found


class Listener:
    """A :class:`LogMel` that is told samples as they come, and keeps what the next frame needs."""

    def __init__(self, hears: LogMel) -> None:
        self.hears = hears
        self._kept = np.zeros(0, np.float32)

    def push(self, samples: NDArray[Any]) -> Float:
        """(frames, bands) of all frames that are whole now."""
        self._kept = np.concatenate([self._kept, np.asarray(samples, np.float32)])
        found = self.hears(self._kept)
        self._kept = self._kept[len(found) * self.hears.hop :]
        return found

    def reset(self) -> None:
        """Before the next recording."""
        self._kept = np.zeros(0, np.float32)


def read_wav(path: str | os.PathLike[str], rate: int) -> Float:
    """Samples in [-1, 1] of a WAV file of one channel with 16 bits.

    Raises:
        ValueError: it is no such file, or of another rate.
    """
    try:
        with wave.open(os.fspath(path), "rb") as file:
            found = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, struct.error) as error:  # as damage may have it
        raise ValueError(f"{path} is not a WAV file that is read here: {error or 'it is damaged'}.") from error
    if found != (rate, 1, 16):
        raise ValueError(
            f"{path} has {found[0]} samples a second in {found[1]} channels of {found[2]} bits; wanted are {rate} in one of 16. "
            "Convert it first."
        )
    return np.frombuffer(raw[: len(raw) // 2 * 2], "<i2").astype(np.float32) / np.float32(2**15)
