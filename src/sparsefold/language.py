"""Reading and writing text with a compiled language model: ``sparsefold eval`` and ``sparsefold run``."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.bench import Latency, pinned, time_calls
from sparsefold.cost import Cost
from sparsefold.engine import Engine, Stream
from sparsefold.program import Cluster, Program
from sparsefold.progress import Progress
from sparsefold.vocabulary import EOS, Vocabulary

SAMPLE_BYTES = 20_000  # of a text, played to count events before formats or thresholds are chosen
SAMPLE_VALUES = 2**24  # of all outputs while that is played
CHUNK_VALUES = 2**18  # of the outputs that are held at a time: they stay in the cache
BLOCK_VALUES = 2**15  # of these, in float64
CHUNK_BYTES = 2**31  # of weights that are read at a time, at most: so soon an interrupt is heard
TIMED_SECONDS, TIMED_CALLS, WARMUP_CALLS = 3.0, 5000, 200
SHOWN = 5  # unknown words of a prompt that are named
# On a terminal: whatever could move its cursor, or worse, is shown as a question mark.
_HARMLESS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "?")


def vocabulary_of(program: Program, file: Path) -> Vocabulary:
    """What the tokens of a compiled language model stand for. Raises ``ValueError`` where ``file`` holds none."""
    if not program.takes_tokens or program.inputs != program.outputs or program.whole_sequences:
        raise ValueError(
            f"{file} is not a language model: it does not read a token and give a value for each, step by step."
        )
    try:
        return Vocabulary.from_metadata(program.metadata, program.inputs)
    except ValueError as error:
        raise ValueError(f"{file} is not a language model: {error}") from error


def sample_of(file: Path, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """The first token ids of a text, as many as formats and thresholds need to see."""
    raw = file.read_bytes()
    if len(raw) > SAMPLE_BYTES:
        raw = raw[:SAMPLE_BYTES]
        raw = (raw.rsplit(None, 1) or [raw])[0] if vocabulary.level == "word" else raw
    tokens = _encoded(raw, vocabulary, str(file))[0][: max(64, SAMPLE_VALUES // vocabulary.tokens)]
    if len(tokens) < 2:
        raise ValueError(f"{file} has {len(tokens)} {vocabulary.level}s; at least 2 are needed.")
    return tokens


def _encoded(raw: bytes, vocabulary: Vocabulary, what: str) -> tuple[NDArray[np.int64], int]:
    """Token ids of a text, and how many of them are not in the vocabulary."""
    try:
        tokens = vocabulary.look_up(raw)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    strange = tokens < 0
    tokens[strange] = vocabulary.unknown
    return tokens, int(strange.sum())


# --- write -----------------------------------------------------------------------------------------------------------


def sample(
    logits: NDArray[np.float32], temperature: float, random: np.random.Generator, top_k: int = 0, unknown: int = -1
) -> int:
    """A token drawn from softmax(logits / temperature), never ``unknown``; the likeliest at temperature 0.

    ``top_k``: only one of that many likeliest; 0: any.
    """
    known = logits.astype(np.float64)
    known[unknown] = -np.inf
    if 0 < top_k < len(known):
        known[known < np.partition(known, -top_k)[-top_k]] = -np.inf
    if temperature == 0:
        return int(known.argmax())
    with np.errstate(over="ignore"):  # a very low temperature: exp(-inf) is the 0 that is meant
        p = np.exp((known - known.max()) / temperature)
    return int(random.choice(len(p), p=p / p.sum()))


def generate(
    stream: Stream,
    prompt: Sequence[int],
    length: int,
    temperature: float,
    random: np.random.Generator,
    top_k: int = 0,
    unknown: int = -1,
) -> Iterator[int]:
    """Plays ``prompt`` and then yields ``length`` drawn tokens, each fed back: a stream of text as it is made."""
    logits = np.empty(0, np.float32)
    for token in prompt:  # step by step: of a long prompt only the last outputs are wanted
        logits = stream.step(int(token))
    for _ in range(length):
        token = sample(logits, temperature, random, top_k, unknown)
        yield token
        logits = stream.step(token)


def write(
    program: Program,
    file: Path,
    prompt: bytes,
    length: int,
    temperature: float = 0.7,
    top_k: int = 0,
    seed: int = 0,
    fold: bool | None = None,
) -> None:
    """Write ``prompt`` and ``length`` tokens more to the standard output, each as soon as it is drawn.

    Words begin a line: the model reads ``<eos>`` before the prompt. What the model does not know it reads as unknown, and a line
    on the standard error says so. ``fold``: as of :class:`Engine`; None: "auto".
    """
    vocabulary = vocabulary_of(program, file)
    if length < 0 or not temperature >= 0 or top_k < 0 or seed < 0:
        raise ValueError("--tokens, --temperature, --top-k and --seed must not be negative.")
    words = vocabulary.level == "word"
    try:
        tokens = vocabulary.encode(prompt).tolist()
        strange = vocabulary.strangers(prompt)
    except ValueError as error:
        raise ValueError(f"the prompt: {error}") from error
    if words:
        tokens = [vocabulary.values.index(EOS), *tokens]
    elif not prompt:
        prompt, tokens = b"\n", vocabulary.encode(b"\n").tolist()
    if strange:
        more = f" and {len(strange) - SHOWN} more" * (len(strange) > SHOWN)
        print(f"sparsefold: the model does not know {', '.join(strange[:SHOWN])}{more} of the prompt.", file=sys.stderr)
    out, terminal = sys.stdout.buffer, sys.stdout.isatty()
    shown = codecs.getincrementaldecoder("utf-8")("replace")

    def show(text: bytes) -> None:
        out.write(shown.decode(text).translate(_HARMLESS).encode() if terminal else text)
        out.flush()

    stream = Engine(program, "auto" if fold is None else fold).stream()
    show(prompt)
    space = words and bool(prompt) and not prompt[-1:].isspace()
    for token in generate(stream, tokens, length, temperature, np.random.default_rng(seed), top_k, vocabulary.unknown):
        text = vocabulary.decode([token])
        if words:
            text = (" " * (space and text != "\n") + text).encode()
            space = not text.endswith(b"\n")
        show(text)
    print(f"\n\n{stream.report()}", file=sys.stderr)


# --- read ------------------------------------------------------------------------------------------------------------


def bits(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Bits in which (T,) targets are told by (T, O) logits, all together: their log-softmax in float64."""
    rows, total = max(1, BLOCK_VALUES // logits.shape[1]), 0.0
    for at in range(0, len(targets), rows):
        part, told = logits[at : at + rows], targets[at : at + rows]
        below = np.subtract(part, part.max(1, keepdims=True), dtype=np.float64)
        total -= below[np.arange(len(told)), told].sum()
        np.exp(below, out=below)
        total += np.log(below.sum(1)).sum()
    return float(total) / float(np.log(2))


def scores(stream: Stream, tokens: NDArray[np.int64]) -> Iterator[tuple[float, int]]:
    """Plays a text from the stream's state, once; yields bits and tokens told so far, some tokens at a time.

    Every token but the first is told by those before it; of a decoder in clusters no cluster is computed but its own. Raises
    ``FloatingPointError`` where outputs are no numbers.
    """
    program = stream.engine.program
    clusters = isinstance(program.ops[-1], Cluster)
    held = 1 if clusters else program.outputs
    chunk = max(16, min(4096, CHUNK_VALUES // held, CHUNK_BYTES // program.nbytes))
    total = 0.0
    for at in range(0, len(tokens) - 1, chunk):
        x, y = tokens[at : at + chunk], tokens[at + 1 : at + chunk + 1]
        with np.errstate(invalid="ignore"):  # told below
            if clusters:
                total -= float(stream.score(x[: len(y)], y).sum(dtype=np.float64)) / float(np.log(2))
            else:
                total += bits(stream.run(x[: len(y)]), y)
        if not np.isfinite(total):
            raise FloatingPointError(f"the model's outputs overflow within the first {at + len(y):,} tokens.")
        yield total, at + len(y)


def evaluate(stream: Stream, tokens: NDArray[np.int64]) -> float:
    """Bits per token of a stream on a text, played once from the stream's state."""
    total, told = 0.0, 1
    with Progress(len(tokens) - 1, "eval") as progress:
        for total, told in scores(stream, tokens):  # noqa: B007 - the last are wanted
            progress.update(told)
    return total / told


def read(
    program: Program,
    file: Path,
    text: Path | None = None,
    data_dir: Path | None = None,
    as_json: bool = False,
    fold: bool | None = None,
) -> None:
    """Print quality, event rates, cost and time of a compiled model on a text, else on its own test split.

    ``fold``: as of :class:`Engine`; None: "auto".

    Raises:
        KeyboardInterrupt: after printing what was found by then, and that it is partial.
    """
    vocabulary = vocabulary_of(program, file)
    if text:
        what = str(text)
        raw = text.read_bytes()
        if vocabulary.level == "word" and raw.strip() and not raw.endswith(b"\n"):
            raw += b"\n"  # the last line ends, too
        tokens, strange = _encoded(raw, vocabulary, what)
    else:
        what, strange = "test split", 0
        tokens = _own_test(program, vocabulary, data_dir)
    if len(tokens) < 2:
        raise ValueError(f"{what} has {len(tokens)} {vocabulary.level}s; at least 2 are needed.")
    engine = Engine(program, "auto" if fold is None else fold)
    times = _times(engine, tokens[:TIMED_CALLS].tolist())  # first, so that an interrupted text has them too
    stream, total, told, stopped = engine.stream(), 0.0, 0, False
    try:
        with Progress(len(tokens) - 1, "eval") as progress:
            for total, told in scores(stream, tokens):
                progress.update(told, _quality(vocabulary, total / told))
    except KeyboardInterrupt:
        if not told:
            raise
        stopped = True
    size = {f"{vocabulary.level}s": len(tokens), "told": told, "unknown": strange, "complete": not stopped}
    latency = Latency.of(times).to_dict() | {"p90": float(np.percentile(times, 90) / 1e3)}
    if as_json:
        speaking = {i: (program.ops[i].kind, stream.counters.event_rate(i)) for i in stream.counters.events}
        figures: dict[str, Any] = (
            {"bits_per_char": total / told}
            if vocabulary.level == "byte"
            else {"perplexity": _perplexity(total / told), "bits_per_word": total / told}
        )
        figures |= {**size, "event_rate": stream.counters.event_rate()}
        figures["event_rates"] = [{"op": i, "kind": kind, "event_rate": rate} for i, (kind, rate) in speaking.items()]
        print(json.dumps({**figures, "cost": stream.cost.to_dict(), "latency_us": latency}, indent=1))
    else:
        part = f", the first {told:,} of them" if stopped else ""
        unknown = f", {strange:,} of them unknown" if strange else ""
        print(f"{_quality(vocabulary, total / told)} on {what}, {len(tokens):,} {vocabulary.level}s{unknown}{part}")
        print(
            f"{latency['p50']:.2f} us per {vocabulary.level} p50, {latency['p90']:.2f} p90, {latency['p99']:.2f} p99, "
            f"{latency['mean']:.2f} mean (measured over {latency['calls']:,}: one thread, decoder and Python call included)"
        )
        print(_macs(stream.cost, vocabulary.level))
        print(stream.report())
    if stopped:
        raise KeyboardInterrupt(f"stopped after {told:,} of {len(tokens) - 1:,} {vocabulary.level}s: a partial result.")


def _own_test(program: Program, vocabulary: Vocabulary, data_dir: Path | None) -> NDArray[np.int64]:
    """Tokens of the test split beside which a model was trained. Raises ``ValueError`` where that text is not at hand."""
    from sparsefold.data import PUBLISHED, load_text

    corpus, known = None, program.metadata.get("corpus")
    known = known if isinstance(known, dict) else {}
    name = str(known.get("source"))
    if name in PUBLISHED:
        corpus = PUBLISHED[name].load(vocabulary.level, data_dir, download=False)
    elif name == "pydoc_data.topics":
        corpus = load_text(None, vocabulary.level)
    if corpus is None or known.get("sha256") != corpus.sha256 or corpus.vocabulary != vocabulary.values:
        raise ValueError("the text this model was trained beside is not at hand. Pass a text with --text.")
    return corpus.test


def _times(engine: Engine, tokens: list[int]) -> NDArray[np.int64]:
    """Nanoseconds of single steps, as many as some seconds hold; with a decoder in clusters, of scores of the next token."""
    stream = engine.stream()
    play: Callable[[Any], Any] = stream.step
    inputs: list[Any] = tokens
    if isinstance(engine.program.ops[-1], Cluster):
        play, inputs = lambda both: stream.score(*both), list(pairwise(tokens))
    with pinned():
        usual = float(np.median(time_calls(play, inputs[:WARMUP_CALLS])))
        return time_calls(play, inputs[: max(WARMUP_CALLS, int(TIMED_SECONDS * 1e9 / max(usual, 1)))])


def _quality(vocabulary: Vocabulary, bits_per_token: float) -> str:
    if vocabulary.level == "byte":
        return f"{bits_per_token:.4f} bits per character"
    return f"perplexity {_perplexity(bits_per_token):.2f} ({bits_per_token:.4f} bits per word)"


def _perplexity(bits_per_token: float) -> float:
    return float(np.exp2(min(bits_per_token, 1000.0)))  # what is left of a float's range is no perplexity


def _macs(total: Cost, level: str) -> str:
    dense, executed = total.per_step("macs_dense"), total.per_step("macs_effective")
    fewer = f", {dense / executed:,.1f} times as many" if executed else ""
    return (
        f"{executed:,.0f} MACs per {level}, embedding and decoder included; "
        f"a dense network of the same shape makes {dense:,.0f}{fewer} (counted)"
    )
