"""A compiled language model reads a text and writes one: figures against plain arithmetic, and every kind of prompt and file."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_imports import BLOCK, in_a_process

import cases
import sparsefold as sf
from sparsefold import language
from sparsefold.cli import main
from sparsefold.data import _fetch
from sparsefold.data import text as data_text
from sparsefold.engine import Engine
from sparsefold.progress import Progress
from sparsefold.vocabulary import EOS, UNK, Vocabulary

WORDS = (UNK, "the", EOS, "cat", "sat", "on", "世界", "mat")
BYTES = tuple(sorted(b"\n acehinost"))


def network(tokens: int, *salt: int) -> list:
    """Two layers of which about a third of the units speak, and a decoder that reads events."""
    r = cases.rng(tokens, *salt)
    return [
        cases.embedding(r, tokens, 12), cases.egru(r, 12, 40, (8, 1), 0.5), cases.egru(r, 40, 24), cases.linear(r, 24, tokens)
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Folder with words.sfold and bytes.sfold."""
    for name, known in (("words", Vocabulary("word", WORDS)), ("bytes", Vocabulary("byte", BYTES))):
        sf.Program(network(known.tokens), known.metadata()).save(tmp_path / f"{name}.sfold")
    return tmp_path


@pytest.fixture
def call(capfdbinary, monkeypatch):
    """A function: arguments -> (exit status, stdout, stderr) of the command line. No clock is waited for."""
    monkeypatch.setattr(language, "TIMED_CALLS", 20)

    def run(*words: object) -> tuple[int, str, str]:
        capfdbinary.readouterr()
        status = main([str(word) for word in words])
        out, err = capfdbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def command(*words: object) -> list[str]:
    """The same in a process of its own."""
    code = "import sys; from sparsefold import cli, language; language.TIMED_CALLS = 20; sys.exit(cli.main())"
    return [sys.executable, "-c", code, *map(str, words)]


def told(program: sf.Program, tokens: np.ndarray) -> np.ndarray:
    """Bits of every token but the first, by the definition, from the engine's outputs."""
    logits = Engine(program).stream().run(tokens[:-1]).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log2(p[np.arange(len(p)), tokens[1:]])


# --- eval ------------------------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat\n\n世界 sat on a dog , <unk> on the mat\nthe mat"


def test_eval_of_words_gives_perplexity_rates_and_macs(call, files):
    (files / "a.txt").write_text(TEXT)
    status, out, err = call("eval", files / "words.sfold", "--text", files / "a.txt", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    program = sf.Program.load(files / "words.sfold")
    known = Vocabulary("word", WORDS)
    tokens = known.encode(TEXT + "\n")
    bits = told(program, tokens)
    assert found["words"] == len(tokens) == 22 and found["told"] == 21
    assert found["unknown"] == 3, "a, dog and the comma; <unk> itself is a word"
    assert found["bits_per_word"] == pytest.approx(bits.mean(), rel=1e-12)
    assert found["perplexity"] == pytest.approx(2 ** bits.mean(), rel=1e-12)
    assert found["complete"] is True
    stream = Engine(program).stream()
    emitted = stream.run_traced(tokens[:-1])[1]
    assert [(e["op"], e["kind"]) for e in found["event_rates"]] == [(1, "egru"), (2, "egru")]
    for rate in found["event_rates"]:
        assert 0 < rate["event_rate"] == pytest.approx(emitted[rate["op"]].mean(), rel=1e-12)
    assert found["cost"] == stream.cost.to_dict()
    assert {"embedding", "input", "recurrent", "decoder"} == {part["role"] for part in found["cost"]["parts"]}
    assert set(found["latency_us"]) == {"p50", "p90", "p99", "mean", "calls"}
    assert 0 < found["latency_us"]["p50"] <= found["latency_us"]["p90"] <= found["latency_us"]["p99"]


def test_eval_of_a_decoder_in_clusters_computes_those_that_hold_the_words(call, tmp_path):
    known, r = Vocabulary("word", WORDS), cases.rng(5)
    program = sf.Program((*network(8)[:-1], *cases.adaptive(r, 24, 3, (5, 3), (2, 2))), known.metadata())
    program.save(tmp_path / "a.sfold")
    (tmp_path / "a.txt").write_text(TEXT)
    status, out, err = call("eval", tmp_path / "a.sfold", "--text", tmp_path / "a.txt", "--json")
    assert (status, err) == (0, "")
    found, tokens = json.loads(out), known.encode(TEXT + "\n")
    assert found["bits_per_word"] == pytest.approx(told(program, tokens).mean(), rel=1e-6)
    stream = Engine(program).stream()
    stream.score(tokens[:-1], tokens[1:])
    assert stream.counters.asked == {5: ((tokens[1:] >= 3) & (tokens[1:] < 6)).sum(), 6: (tokens[1:] >= 6).sum()}
    assert found["cost"] == stream.cost.to_dict() and found["latency_us"]["calls"] > 0
    status, out, _ = call("run", tmp_path / "a.sfold", "--prompt", "the cat", "--tokens", "3", "--seed", "1")
    assert status == 0 and out.startswith("the cat")


def test_eval_prints_the_same_in_words(call, files):
    (files / "a.txt").write_text(TEXT)
    figures = json.loads(call("eval", files / "words.sfold", "--text", files / "a.txt", "--json")[1])
    status, out, err = call("eval", files / "words.sfold", "--text", files / "a.txt")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        f"perplexity {figures['perplexity']:.2f} ({figures['bits_per_word']:.4f} bits per word) on {files / 'a.txt'}, "
        "22 words, 3 of them unknown"
    )
    assert re.fullmatch(
        r"\S+ us per word p50, \S+ p90, \S+ p99, \S+ mean \(measured over 20: one thread, .*\)", lines[1]
    )
    dense, executed = figures["cost"]["macs_dense"], figures["cost"]["macs_effective"]
    assert lines[2] == (
        f"{executed:,.0f} MACs per word, embedding and decoder included; a dense network of the same shape makes "
        f"{dense:,.0f}, {dense / executed:,.1f} times as many (counted)"
    )
    assert "21 steps" in lines[3]


def test_what_is_folded_is_as_asked(call, files):
    (files / "a.txt").write_text(TEXT)
    found = {}
    for flag in ("--fold", "--no-fold"):
        found[flag] = json.loads(call("eval", files / "words.sfold", "--text", files / "a.txt", "--json", flag)[1])
        written = call("run", files / "words.sfold", "--tokens", "5", flag)
        assert written[0] == 0 and written[1] == call("run", files / "words.sfold", "--tokens", "5")[1]
    made = {
        flag: next(p for p in f["cost"]["parts"] if p["role"] == "input")["macs_effective"] for flag, f in found.items()
    }
    assert made["--fold"] == 0 < made["--no-fold"]
    assert found["--fold"]["bits_per_word"] == found["--no-fold"]["bits_per_word"]
    status, out, _ = call("bench", files / "words.sfold", "--steps", "1000", "--isa", "generic", "--fold")
    assert status == 0 and "generic" in out


def test_eval_in_pieces_of_any_size_is_eval_at_once(files, monkeypatch):
    program = sf.Program.load(files / "words.sfold")
    tokens = cases.rng(5).integers(0, len(WORDS), 100)
    whole = told(program, tokens)
    for values in (1, 8 * 33, 2**20):
        monkeypatch.setattr(language, "CHUNK_VALUES", values)
        seen = list(language.scores(Engine(program).stream(), tokens))
        assert seen[-1] == (pytest.approx(whole.sum(), rel=1e-12), 99)
        assert len(seen) == -(-99 // max(16, values // len(WORDS)))
        for total, done in seen:
            assert total == pytest.approx(whole[:done].sum(), rel=1e-12)
    assert language.evaluate(Engine(program).stream(), tokens) == pytest.approx(whole.mean(), rel=1e-12)


def test_bits_of_far_outputs_are_exact():
    logits = np.array([[3e4, 0, -3e4], [0, 0, 0], [-1e30, -1e30, 5]], np.float32)
    assert language.bits(logits, np.array([0, 1, 2])) == pytest.approx(np.log2(3), rel=1e-15)
    assert language.bits(logits[:1], np.array([2])) == pytest.approx(6e4 / np.log(2), rel=1e-15)


def test_outputs_that_are_no_numbers_are_said_to_be(call, files):
    ops = network(len(WORDS))
    ops[-1] = sf.program.Linear(sf.Dense(np.full((8, 24), 3e38, np.float32)), np.full(8, 3e38, np.float32))
    sf.Program(ops, Vocabulary("word", WORDS).metadata()).save(files / "far.sfold")
    (files / "a.txt").write_text(TEXT)
    status, out, err = call("eval", files / "far.sfold", "--text", files / "a.txt")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"sparsefold: the model's outputs overflow within the first \d+ tokens\.\n", err)


def test_ctrl_c_gives_what_was_found_and_says_that_it_is_partial(call, files, monkeypatch):
    (files / "a.txt").write_text("the cat sat on the mat\n" * 100)
    monkeypatch.setattr(language, "CHUNK_VALUES", 1)
    calls = []

    def update(self, done, note=""):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", update)
    status, out, err = call("eval", files / "words.sfold", "--text", files / "a.txt", "--json")
    found = json.loads(out)
    assert status == 130
    assert err == "\nsparsefold: stopped after 48 of 699 words: a partial result.\n"
    assert (found["complete"], found["words"], found["told"]) == (False, 700, 48)
    bits = told(
        sf.Program.load(files / "words.sfold"), Vocabulary("word", WORDS).encode("the cat sat on the mat\n" * 100)
    )
    assert found["bits_per_word"] == pytest.approx(bits[:48].mean(), rel=1e-12)
    calls.clear()
    assert "700 words, the first 48 of them\n" in call("eval", files / "words.sfold", "--text", files / "a.txt")[1]


def test_ctrl_c_before_anything_was_read_gives_nothing(call, files, monkeypatch):
    (files / "a.txt").write_text(TEXT)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "bits", interrupt)
    assert call("eval", files / "words.sfold", "--text", files / "a.txt") == (130, "", "\nsparsefold: interrupted.\n")


def test_a_signal_stops_a_long_eval_within_a_moment(files):
    r = cases.rng(3)
    slow = (cases.embedding(r, 8, 512), cases.lstm(r, 512, 512), cases.lstm(r, 512, 512), cases.linear(r, 512, 8))
    sf.Program(slow, Vocabulary("word", WORDS).metadata()).save(files / "slow.sfold")
    (files / "long.txt").write_text("the cat sat on the mat\n" * 100_000)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("eval", files / "slow.sfold", "--text", files / "long.txt", "--json"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever started the tests may ignore it
    )
    os.close(theirs)
    try:
        line = os.read(ours, 1000).decode()  # shown after two seconds
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
        end = os.read(ours, 1000).decode()
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert re.match(r"\reval \d+/699999 \(\d+ %\), 0:0\d spent, \d+:\d\d left, perplexity \d+\.\d\d \(", line)
    assert process.returncode == 130 and "a partial result." in end
    found = json.loads(out)
    assert found["complete"] is False and 0 < found["told"] < 699_999


@pytest.mark.parametrize(
    ("text", "status", "sentence"),
    [
        (b"", 2, r"a\.txt has 0 words; at least 2 are needed"),
        (b" \n", 2, r"a\.txt has 1 words; at least 2 are needed"),
        (b"the", 0, ""),
        (b"the cat sat", 0, ""),
        (b"nothing known here", 0, ""),
        (b"the cat\nsat \xe9\n", 2, r"a\.txt: words are read from UTF-8, but byte 12 \(0xe9, in line 2\) is not"),
    ],
)
def test_short_and_odd_texts(text, status, sentence, call, files):
    (files / "a.txt").write_bytes(text)
    found, out, err = call("eval", files / "words.sfold", "--text", files / "a.txt")
    assert found == status and bool(out) == (status == 0)
    assert re.search(sentence, err) if sentence else err == ""


def test_eval_of_bytes_takes_every_byte(call, files):
    (files / "a").write_bytes(b"the cat \xff\x00 sat\n")
    found = json.loads(call("eval", files / "bytes.sfold", "--text", files / "a", "--json")[1])
    tokens = Vocabulary("byte", BYTES).encode(b"the cat \xff\x00 sat\n")
    assert (found["bytes"], found["unknown"]) == (15, 2)
    assert found["bits_per_char"] == pytest.approx(
        told(sf.Program.load(files / "bytes.sfold"), tokens).mean(), rel=1e-12
    )
    assert "bits per character on" in call("eval", files / "bytes.sfold", "--text", files / "a")[1]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small corpus in the form of Penn Treebank, in a folder of its own."""
    (tmp_path / "data" / "small").mkdir(parents=True)
    parts = [" the cat sat on <unk> mat \n" * 40, " the cat \n the mat \n" * 3, " on the mat the cat sat \n" * 5]
    files = tuple(_fetch.File(f"small.{name}.txt", "http://127.0.0.1:9/", 1, "") for name in ("train", "valid", "test"))
    for file, part in zip(files, parts, strict=True):
        (tmp_path / "data" / "small" / file.name).write_text(part)
    spec = _fetch.Published("small", "small", files, (280, 18, 35), 7, "No licence.")
    monkeypatch.setattr("sparsefold.data.PUBLISHED", {"small": spec})
    monkeypatch.delenv("SPARSEFOLD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return spec


def test_without_a_text_the_test_split_is_read_where_it_is_at_hand(call, published, tmp_path):
    corpus = published.load("word", tmp_path / "data")
    sf.Program(network(7), corpus.metadata()).save(tmp_path / "small.sfold")
    status, out, _ = call("eval", tmp_path / "small.sfold", "--data-dir", tmp_path / "data", "--json")
    assert status == 0 and json.loads(out)["words"] == 35
    status, out, err = call("eval", tmp_path / "small.sfold")
    assert (status, out) == (2, "")
    assert re.search(
        r"small is not in .*cache.*sparsefold\. Put small\.train\.txt, small\.valid\.txt and small\.test\.txt", err
    )
    assert not (tmp_path / "cache").exists(), "a compiled file alone makes nobody download"
    other = {**corpus.metadata(), "corpus": {**corpus.to_dict(), "sha256": "0" * 64}}
    sf.Program(network(7), other).save(tmp_path / "other.sfold")
    assert "is not at hand" in call("eval", tmp_path / "other.sfold", "--data-dir", tmp_path / "data")[2]


@pytest.mark.parametrize(
    "corpus", [None, [], {}, {"source": ["small"]}, {"source": "small.txt"}, "pydoc_data.topics"], ids=str
)
def test_where_a_model_comes_from_may_be_anything(corpus, call, published, tmp_path):
    metadata = {**Vocabulary("word", WORDS).metadata(), "corpus": corpus}
    sf.Program(network(len(WORDS)), metadata).save(tmp_path / "a.sfold")
    status, out, err = call("eval", tmp_path / "a.sfold")
    assert (status, out) == (2, "") and "is not at hand. Pass a text with --text." in err


def test_words_of_pythons_own_text(call, tmp_path):
    corpus = data_text.load_text(None, "word", max_words=500)
    sf.Program(network(500), corpus.metadata()).save(tmp_path / "a.sfold")
    assert "is not at hand" in call("eval", tmp_path / "a.sfold")[2], "another vocabulary"
    corpus = data_text.load_text(None, "word")
    sf.Program(network(corpus.tokens), corpus.metadata()).save(tmp_path / "a.sfold")
    assert json.loads(call("eval", tmp_path / "a.sfold", "--json")[1])["words"] == len(corpus.test)


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_writes_words_after_the_prompt(call, files):
    status, out, err = call("run", files / "words.sfold", "--prompt", "the cat", "--tokens", 200)
    assert status == 0 and "201" not in out
    assert out.startswith("the cat ") or out.startswith("the cat\n")
    assert err.startswith("\n\n203 steps"), "<eos>, two words, 200 drawn"
    words = Vocabulary("word", WORDS)
    drawn = words.encode(out).tolist()[2:]
    assert len(drawn) == 200 and words.unknown not in drawn and set(drawn) == set(range(1, 8))
    assert out == "the cat" + (" " if out[7] != "\n" else "") + words.decode(drawn), (
        "as a text is written, no space at the ends"
    )
    assert call("run", files / "words.sfold", "--prompt", "the cat", "--tokens", 200)[1] == out
    assert call("run", files / "words.sfold", "--prompt", "the cat", "--tokens", 200, "--seed", 1)[1] != out


def test_what_run_draws_is_what_the_model_says(call, files):
    """Greedy, word by word, against the definition."""
    program, words = sf.Program.load(files / "words.sfold"), Vocabulary("word", WORDS)
    tokens = [words.values.index(EOS), *words.encode("on the\nmat").tolist()]
    for _ in range(30):
        logits = Engine(program).stream().run(tokens)[-1]
        logits[words.unknown] = -np.inf
        tokens.append(int(logits.argmax()))
    expected = words.decode(tokens[1:])
    for cold in (["--temperature", 0], ["--top-k", 1, "--temperature", 5], ["--temperature", "1e-320"]):
        out = call("run", files / "words.sfold", "--prompt", "on the\nmat", "--tokens", 30, "--seed", 3, *cold)[1]
        assert out == expected


@pytest.mark.parametrize("k", [1, 2, 3, 7, 100])
def test_top_k_draws_among_the_likeliest(k):
    logits = np.array([0.5, 2.0, -1.0, 1.0, 3.0, 0.0, 9.0], np.float32)
    random = np.random.default_rng(0)
    drawn = np.bincount([language.sample(logits, 1.0, random, k) for _ in range(4000)], minlength=7) / 4000
    likeliest = np.argsort(-logits[:6])[:k]
    p = np.zeros(7)
    p[likeliest] = np.exp(logits[likeliest])
    np.testing.assert_allclose(drawn, p / p.sum(), atol=0.032)  # 4 standard deviations of a mean of 4000


def test_the_unknown_is_never_drawn_wherever_it_is():
    logits = np.array([50.0, 1.0, 2.0], np.float32)
    random = np.random.default_rng(0)
    assert {language.sample(logits, 1.0, random, unknown=0) for _ in range(50)} == {1, 2}
    assert language.sample(logits, 0, random, unknown=0) == language.sample(logits, 1.0, random, 1, unknown=0) == 2
    assert logits[0] == 50, "what the stream returned is left alone"


@pytest.mark.parametrize("prompt", ["", " ", "the ", "the\n", "\n\n"], ids=repr)
def test_prompts_that_end_a_word_or_hold_none(prompt, call, files):
    status, out, _ = call("run", files / "words.sfold", "--prompt", prompt, "--tokens", 5)
    assert status == 0 and out.startswith(prompt)
    rest = out.removeprefix(prompt)
    assert rest and not rest.startswith(" ")
    assert call("run", files / "words.sfold", "--prompt", prompt, "--tokens", 0)[1] == prompt


def test_words_of_a_prompt_that_are_unknown_are_named_once(call, files):
    prompt = "a dog sat on a b c d e f the mat"
    status, out, err = call("run", files / "words.sfold", "--prompt", prompt, "--tokens", 1)
    assert status == 0 and out.startswith(prompt)
    assert err.startswith("sparsefold: the model does not know 'a', 'dog', 'b', 'c', 'd' and 2 more of the prompt.\n")
    err = call("run", files / "bytes.sfold", "--prompt", "the x", "--tokens", 1)[2]
    assert err.startswith("sparsefold: the model does not know byte 0x78 of the prompt.\n")


def test_a_prompt_that_is_not_utf8(call, files):
    prompt = os.fsdecode(b"the \xff")
    status, out, err = call("run", files / "words.sfold", "--prompt", prompt)
    assert (status, out) == (2, "")
    assert "the prompt: words are read from UTF-8, but byte 4 (0xff, in line 1) is not" in err
    assert call("run", files / "bytes.sfold", "--prompt", "t", "--tokens", 3)[0] == 0


@pytest.mark.parametrize("option", ["--tokens", "--temperature", "--top-k", "--seed"])
def test_numbers_below_zero_are_refused(option, call, files):
    status, out, err = call("run", files / "words.sfold", option, "-1")
    assert (status, out) == (2, "") and "must not be negative" in err


def test_a_reader_that_has_seen_enough_ends_a_run_quietly(files):
    run = subprocess.Popen(
        command("run", files / "words.sfold", "--tokens", 10_000_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert len(run.stdout.read(100)) == 100, "text comes while it is made"
    run.stdout.close()
    assert (run.stderr.read(), run.wait(timeout=60)) == (b"", 0)
    run.stderr.close()


def test_a_terminal_is_shown_no_control_characters(files):
    nasty = (UNK, EOS, "\x1b[2J", "\x9b31m", "a\x07b", "\x7f", "c\x00d", "世界")
    sf.Program(network(len(nasty)), Vocabulary("word", nasty).metadata()).save(files / "nasty.sfold")
    words = ("run", files / "nasty.sfold", "--tokens", 300, "--temperature", 3)
    ours, theirs = pty.openpty()
    run = subprocess.Popen(command(*words), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # how a terminal says that the other side is gone
        pass
    finally:
        os.close(ours)
    assert run.wait(timeout=60) == 0
    text = seen.decode().replace("\r\n", "\n")
    assert set("?[2Jabcd世界\n ") <= set(text) and not [
        c for c in text if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160
    ]
    plain = subprocess.run(command(*words), capture_output=True, check=True).stdout.decode()
    assert "\x1b[2J" in plain and "\x9b" in plain, "a file gets what the model says"


# --- files that are no language models -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["eval", "run"])
@pytest.mark.parametrize(
    ("name", "metadata", "sentence"),
    [
        ("gru", {}, "it does not read a token"),
        ("embedding-linear", Vocabulary("byte", (1, 2, 3, 4)).metadata(), "it does not read a token"),
        ("tokens", {}, "its metadata names no vocabulary that fits its sizes"),
        ("tokens", Vocabulary("byte", (1, 2, 3, 4, 5, 6, 7)).metadata(), "names no vocabulary that fits its sizes"),
        ("tokens", {"level": "word", "vocabulary": list("abcdefg")}, "no list of different words, <eos> and <unk> among them"),
    ],
)  # fmt: skip
def test_other_programs_are_refused(verb, name, metadata, sentence, call, files):
    sf.Program(cases.network(name).ops, metadata).save(files / "other.sfold")
    (files / "a.txt").write_text(TEXT)
    text = ["--text", files / "a.txt"] if verb == "eval" else []
    status, out, err = call(verb, files / "other.sfold", *text)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"sparsefold: \S+other\.sfold is not a language model: [^\n]*{sentence}[^\n]*\.\n", err)


def test_a_program_of_33_278_words_is_read_like_one_without(tmp_path):
    """The file holds them as JSON inside JSON: well below its limit, in Python and in C."""
    from sparsefold.program import MAX_HEADER

    words = (UNK, EOS, *(f"wörter-{i}-\"'" for i in range(33_276)))
    r = cases.rng(1)
    program = sf.Program(
        (cases.embedding(r, len(words), 2), cases.linear(r, 2, len(words))), Vocabulary("word", words).metadata()
    )
    raw = program.to_bytes()
    assert len(raw) < MAX_HEADER / 8 + program.nbytes
    again = sf.Program.from_bytes(raw)
    assert Vocabulary.from_metadata(again.metadata, again.inputs).values == words


def test_both_commands_work_without_torch(files):
    (files / "a.txt").write_text(TEXT)
    done = in_a_process(
        BLOCK
        + """
from sparsefold.cli import main
assert main(["eval", sys.argv[1], "--text", sys.argv[2]]) == 0
assert main(["run", sys.argv[1], "--prompt", "the", "--tokens", "5"]) == 0
assert not {"torch", "safetensors", "onnx", "matplotlib"} & set(sys.modules)
""",
        files / "words.sfold",
        files / "a.txt",
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "\nthe " in done.stdout
