"""A line that says how far a long job is and how long it will still take. Standard library only, written to stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SILENT_FOR = 2.0  # seconds: what is done by then needs no progress
PLAIN_EVERY = 10.0  # seconds between lines where the output is no terminal


class Progress:
    """Progress over ``total`` steps. Silent for the first two seconds; one rewritten line on a terminal, else rare lines.

    >>> with Progress(100, "eval") as progress:
    ...     for step in range(100):
    ...         progress.update(step + 1, "loss 1.2")
    """

    def __init__(self, total: int, label: str, start: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.label, self.start = total, label, start
        self.stream = stream or sys.stderr
        self._began = time.monotonic()
        self._shown = self._began + SILENT_FOR - 0.2
        self._length = 0

    def update(self, done: int, note: str = "") -> None:
        """``done`` steps of ``total`` are finished; ``note`` is shown behind them."""
        now = time.monotonic()
        terminal = self.stream.isatty()
        last = done >= self.total and self._length > 0  # a line that was shown must not stop short of its end
        if now - self._began < SILENT_FOR or (not last and now - self._shown < (0.2 if terminal else PLAIN_EVERY)):
            return
        self._shown = now
        spent, fresh = now - self._began, done - self.start
        left = spent / fresh * (self.total - done) if fresh > 0 else float("nan")
        line = f"{self.label} {done}/{self.total} ({100 * done / max(self.total, 1):.0f} %)"
        line += f", {_duration(spent)} spent, {_duration(left)} left" + (f", {note}" if note else "")
        if terminal:
            self.stream.write("\r" + line.ljust(self._length))
            self._length = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._length:
            self.stream.write("\n")
            self.stream.flush()


def _duration(seconds: float) -> str:
    if not seconds < 360_000:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
