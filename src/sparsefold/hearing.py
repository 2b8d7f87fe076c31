"""Naming what is said in recordings with a compiled network: ``sparsefold run`` and ``sparsefold eval`` of one that hears."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.bench import Latency, pinned, time_calls
from sparsefold.engine import Engine, Stream
from sparsefold.formats import Float
from sparsefold.program import Program
from sparsefold.progress import Progress
from sparsefold.sound import LogMel, read_wav

UNSCORED = 1 / 3  # of a recording: by then nobody knows what is said
TIMED = 5000  # frames that are timed


def heard(stream: Stream, hears: LogMel, samples: NDArray[Any]) -> tuple[int, Float]:
    """(the likeliest output, log-probabilities of all) of a recording that a stream plays from the beginning.

    ``log p = Σ_t log softmax(y_t)``, normalised, over the frames t of the last two thirds.

    Raises:
        ValueError: the recording is shorter than a frame.
    """
    frames = hears(samples)
    if not len(frames):
        raise ValueError(f"{len(samples)} samples are less than a frame of {hears.frame}: nothing was heard.")
    stream.reset()
    scored = _log_softmax(stream.run(frames)[int(len(frames) * UNSCORED) :]).sum(axis=0)
    return int(scored.argmax()), _log_softmax(scored)


def labels_of(program: Program, file: Path) -> tuple[LogMel, list[str]]:
    """(what a program hears, the names of its outputs). Raises ``ValueError`` where ``file`` holds none that hears."""
    labels = program.metadata.get("labels")
    try:
        hears = LogMel.from_metadata(program.metadata)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if program.takes_tokens or program.inputs != hears.bands or program.whole_sequences:
        raise ValueError(f"{file} hears {hears.bands} bands and reads something else: it is damaged.")
    # Names are shown on a terminal, which more than letters could move, or worse.
    if not isinstance(labels, list) or not all(isinstance(n, str) and n.isprintable() for n in labels):
        raise ValueError(f"the names of {file}'s outputs are no words of printable characters: it is damaged.")
    if len(labels) != program.outputs:
        raise ValueError(f"{file} has {len(labels)} names for {program.outputs} outputs: it is damaged.")
    return hears, labels


def tell(program: Program, file: Path, recordings: Sequence[Path]) -> None:
    """Print what is said in each recording, how sure that is, and how long hearing it took."""
    hears, labels = labels_of(program, file)
    stream = Engine(program).stream()
    for path in recordings:
        samples = read_wav(path, hears.rate)
        began = time.perf_counter()
        try:
            _, sure = heard(stream, hears, samples)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        spent = time.perf_counter() - began
        order = np.argsort(-sure)[:2]
        said = ", else ".join(f"{labels[k]} ({np.exp(sure[k]):.1%})" for k in order.tolist())
        print(f"{path.name}: {said}; {len(samples) / hears.rate:.2f} s of sound heard in {1000 * spent:.2f} ms")


def score(program: Program, file: Path, folder: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Print how many recordings are named rightly, and what a frame costs and takes.

    Args:
        program: what hears.
        file: where it comes from.
        folder: WAV files whose names begin with a label and ``_``; None: the test split of the digits that are published.
        data_dir: where those lie, or are downloaded to.
        as_json: print JSON.
    """
    hears, labels = labels_of(program, file)
    if folder is None:
        from sparsefold.data.digits import load_digits

        what = "the test split of the Free Spoken Digit Dataset"
        wanted = [
            (f"{r.label}_{r.speaker}_{r.number}.wav", r.label, r.samples)
            for r in load_digits(data_dir, download=False).test
        ]
    else:
        what, paths = str(folder), sorted(folder.glob("*.wav")) if folder.is_dir() else []
        named = [p for p in paths if p.name.partition("_")[0] in labels]
        wanted = [(p.name, p.name.partition("_")[0], read_wav(p, hears.rate)) for p in named]
        if not named:
            raise ValueError(
                f"{folder} has no WAV file whose name begins with a label and _, like {labels[0]}_anna_1.wav."
            )
    engine = Engine(program)
    counted, wrong = engine.stream(), []
    with Progress(len(wanted), "hearing") as progress:
        for k, (name, label, samples) in enumerate(wanted):
            answer = labels[heard(counted, hears, samples)[0]]
            wrong += [{"recording": name, "heard": answer}] * (answer != label)
            progress.update(k + 1)
    frames = np.concatenate([hears(samples) for _, _, samples in wanted])[:TIMED]
    with pinned():
        latency = Latency.of(time_calls(engine.stream().step, list(frames)))
    cost, steps = counted.cost, counted.counters.steps
    found: dict[str, Any] = {"accuracy": 1 - len(wrong) / len(wanted), "recordings": len(wanted), "wrong": wrong}
    found |= {"frames": steps, "event_rate": counted.counters.event_rate(), "cost": cost.to_dict()}
    found |= {"latency_us": latency.to_dict()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['accuracy']:.1%} of {len(wanted)} recordings named rightly, {what}")
    print(f"{cost.per_step('macs_effective'):,.0f} of {cost.per_step('macs_dense'):,.0f} MACs a frame (counted)")
    print(
        f"{latency.p50:.2f} µs a frame, p99 {latency.p99:.2f} (timed, one core); {hears.rate // hears.hop} frames a second"
    )


def _log_softmax(y: Float) -> Float:
    shifted: Float = y - y.max(axis=-1, keepdims=True)
    found: Float = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
