"""Corpora: splits, a vocabulary that has seen the training split alone, the unknown token, folders, downloads, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import json
import threading
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from sparsefold.data import PUBLISHED, _fetch, load_corpus, load_text
from sparsefold.data.text import build, decode, encode
from sparsefold.vocabulary import EOS, UNK, Vocabulary


def test_default_corpus_is_pythons_reference_text_split_in_order():
    raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    corpus = load_text()
    joined = b"".join(decode(split, corpus.vocabulary) for split in (corpus.train, corpus.valid, corpus.test))
    seen = set(raw[: len(corpus.train)])
    assert joined == bytes(b if b in seen else ord("?") for b in raw)
    sizes = [len(split) for split in (corpus.train, corpus.valid, corpus.test)]
    np.testing.assert_allclose(np.array(sizes) / len(raw), (0.8, 0.1, 0.1), atol=2 / len(raw))
    assert {split.dtype for split in (corpus.train, corpus.valid, corpus.test)} == {np.dtype(np.int64)}
    assert corpus.source == "pydoc_data.topics"


def test_what_results_record_is_the_hash_and_sizes_and_no_text():
    raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    corpus = load_text(None)
    assert corpus.to_dict() == {
        "source": "pydoc_data.topics",
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": {"train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)},
        "tokens": len(set(raw[: len(corpus.train)])) + 1,
    }


def test_vocabulary_comes_from_the_training_split_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ba" * 400 + b"c" * 100 + b"ad" * 50)
    corpus = load_text(str(tmp_path / "a.txt"))
    assert corpus.vocabulary == (ord("a"), ord("b"))
    assert corpus.tokens == 3
    assert set(corpus.train) == {0, 1}
    assert set(corpus.valid) == {2}, "a byte that training has not seen is the unknown token"
    assert set(corpus.test) == {0, 2}
    assert decode(corpus.test[:4], corpus.vocabulary) == b"a?a?"
    assert corpus.source == "a.txt", "results name the file, not where it lies"


@pytest.mark.parametrize("vocabulary", [(0,), (10, 65, 255), tuple(range(256)), tuple(range(255))], ids=len)
def test_encode_and_decode_are_inverse_on_known_bytes(vocabulary):
    every = bytes(range(256))
    tokens = encode(every, vocabulary)
    assert decode(tokens, vocabulary) == bytes(b if b in vocabulary else ord("?") for b in every)
    known = bytes(vocabulary) * 2
    assert encode(known, vocabulary).tolist() == list(range(len(vocabulary))) * 2
    assert (tokens < len(vocabulary)).sum() == len(vocabulary)
    assert tokens.max() <= len(vocabulary)


def test_nothing_is_encoded_as_nothing():
    assert encode(b"", (1, 2)).shape == (0,)
    assert decode([], (1, 2)) == b""


def test_any_bytes_are_a_text(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    (tmp_path / "binary").write_bytes(raw)
    corpus = load_text(str(tmp_path / "binary"))
    assert corpus.vocabulary == tuple(range(256))
    assert decode(np.concatenate([corpus.train, corpus.valid, corpus.test]), corpus.vocabulary) == raw


def test_a_thousand_bytes_are_enough_and_one_less_is_not(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 1000)
    corpus = load_text(str(path))
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [800, 100, 100]
    for size in (999, 0):
        path.write_bytes(b"x" * size)
        with pytest.raises(ValueError, match=rf"^short\.txt has {size} bytes; .* at least 1000 .*\.$"):
            load_text(str(path))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the text file .*nothing\.txt: No such file"):
        load_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match=r"the folder .* holds no text file \(\.txt"):
        load_text(str(tmp_path))


def test_tiny_shakespeare(data_folder):
    corpus = load_text(str(data_folder("tinyshakespeare") / "input.txt"))
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert corpus.tokens == 66
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [892315, 111540, 111539]
    assert decode(corpus.train[:13], corpus.vocabulary) == b"First Citizen"


# --- words -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_words_are_numbered_by_how_often_training_has_them(tmp_path):
    text = "once\n" + "b a c\n" * 90 + "a rare\n" * 70 + "b new\n" * 40
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    assert corpus.level == "word"
    assert corpus.vocabulary == (EOS, "a", "b", "c", "rare", UNK)
    again = corpus.decode(np.concatenate([corpus.train, corpus.valid, corpus.test]))
    assert again == text.replace("once", UNK).replace("new", UNK)
    counts = np.bincount(corpus.train, minlength=corpus.tokens)
    assert (np.diff(counts) <= 0).all() and counts[corpus.known.unknown] == 1
    assert {s.dtype for s in (corpus.train, corpus.valid, corpus.test)} == {np.dtype(np.int64)}
    assert corpus.to_dict() == {
        "source": "a.txt",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "words": {"train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)},
        "tokens": 6,
    }


@pytest.mark.parametrize("seed", range(30))
def test_a_vocabulary_against_counting(seed):
    """By the definition: the most frequent, at least min_count times, and two that are always there."""
    random = np.random.default_rng(seed)
    words = random.choice(["a", "b", "c", "dd", "e", UNK, EOS, "\n"], random.integers(1, 40)).tolist()
    min_count, max_words = int(random.integers(1, 6)), int(random.integers(3, 9))
    train = [EOS if w == "\n" else w for w in words] + [EOS] * (words[-1] != "\n")
    corpus = build([" ".join(words).encode()] + [b"a b"] * 2, "word", "x", min_count, max_words)
    often = Counter(w for w in train if w not in (UNK, EOS))
    kept = [w for w, n in often.most_common(max_words - 2) if n >= min_count]
    assert sorted(corpus.vocabulary) == sorted([*kept, UNK, EOS])
    mapped = [w if w in corpus.vocabulary else UNK for w in train]
    assert [corpus.vocabulary[i] for i in corpus.train] == mapped
    counts = Counter(mapped)
    order = [counts[w] for w in corpus.vocabulary]
    assert order == sorted(order, reverse=True)
    assert corpus.decode(corpus.valid).split() == [w if w in kept else UNK for w in "ab"]


def test_what_is_learned_may_be_read_from_a_file(tmp_path):
    """A word that is too long for a file is unknown from the beginning."""
    words = ["é" * 500, "é" * 500 + "x", "a\x0bb", "\u2028", "\x1b[0m", "\ufeff"]
    corpus = load_corpus(write(tmp_path / "a.txt", " ".join(words * 20)))
    assert words[0] in corpus.vocabulary and words[1] not in corpus.vocabulary
    assert {"a", "b", "\u2028", "\x1b[0m", "\ufeff"} < set(corpus.vocabulary), "ASCII white space divides, no other"
    again = Vocabulary.from_metadata(json.loads(json.dumps(corpus.metadata())), corpus.tokens)
    assert again.values == corpus.vocabulary


def test_the_test_split_teaches_no_word(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.txt", "a b c\n" * 400 + "z z z\n" * 100))
    assert "z" not in corpus.vocabulary and set(corpus.test) == {corpus.known.unknown, corpus.vocabulary.index(EOS)}


def test_a_split_ends_with_a_word_and_then_with_its_line(tmp_path):
    text = " ".join(f"word{i % 7}" for i in range(1000))  # one line, and no newline
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    joined = [corpus.decode(split) for split in (corpus.train, corpus.valid, corpus.test)]
    assert all(part.endswith("\n") and part.count("\n") == 1 for part in joined)
    assert " ".join(part.strip() for part in joined) == text
    np.testing.assert_allclose([len(part.split()) for part in joined], [800, 100, 100], atol=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"a\.txt has 0 bytes; a corpus needs at least 1000"),
        ("\n" * 999, r"a\.txt has 999 bytes"),
        ("x" * 2000, r"a\.txt: the valid split has 0 words; at least 2 are needed"),
        ("a b\n" * 300 + "\xe9", r"a\.txt: .*byte .* in line .* is not"),
    ],
    ids=["empty", "short", "one word", "latin-1"],
)
def test_texts_that_are_no_corpus_of_words(text, sentence, tmp_path):
    path = write(tmp_path / "a.txt", text.encode("latin-1"))
    with pytest.raises(ValueError, match=sentence):
        load_corpus(path)


def test_numbers_and_levels_that_make_no_sense(tmp_path):
    path = write(tmp_path / "a.txt", "a b c\n" * 400)
    for wrong in ({"min_count": 0}, {"max_words": 2}):
        with pytest.raises(ValueError, match="min_count is at least 1 and max_words at least 3, got"):
            load_corpus(path, **wrong)
    with pytest.raises(ValueError, match=r"level is byte or word, got 'letter'\."):
        load_corpus(path, "letter")


def test_the_text_of_python_is_read_either_way():
    assert load_corpus("", "byte").to_dict() == load_text().to_dict()
    corpus = load_corpus("")
    assert corpus.level == "word" and corpus.source == "pydoc_data.topics"
    raw = "\n".join(topics[name] for name in sorted(topics))
    assert sum(map(len, (corpus.train, corpus.valid, corpus.test))) == pytest.approx(
        len(raw.split()) + raw.count("\n"), abs=3
    )


def test_a_name_that_is_neither_a_corpus_nor_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot read the text file pbt: No such file .* have a name: ptb, wikitext2\.$"
    ):
        load_corpus("pbt")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("Train.tokens", "dev.tokens", "Test.tokens"),
        ("my-training-set.md", "my-validation-set.md", "my-test-set.md"),
    ],
)
@pytest.mark.parametrize("level", ["byte", "word"])
def test_files_named_for_splits_are_these(names, level, tmp_path):
    texts = ("a b c\n" * 3, "a a\n", "b c\n")
    for name, text in zip(names, texts, strict=True):
        write(tmp_path / name, text)
    for other in ("README.md", "latest.txt", "a.bin"):
        write(tmp_path / other, "not of the corpus")
    corpus = load_corpus(str(tmp_path), level)
    found = [corpus.decode(split) for split in (corpus.train, corpus.valid, corpus.test)]
    assert found == [text.encode() if level == "byte" else text for text in texts]
    assert corpus.source == tmp_path.name
    assert corpus.sha256 == hashlib.sha256("".join(texts).encode()).hexdigest()


def test_other_files_of_a_folder_are_one_text_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "2.txt", "second " * 100)
    write(tmp_path / "1.txt", "first " * 100)
    write(tmp_path / "3.bin", "no text")
    corpus = load_corpus(str(tmp_path), "byte")
    whole = b"".join(corpus.decode(split) for split in (corpus.train, corpus.valid, corpus.test))
    assert whole.startswith(b"first first") and b"first \n?econd ?econd".replace(b"?", b"s") in whole


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], r"holds no text file \(\.txt, \.text, \.tokens, \.md, \.rst\)"),
        (["a.bin"], "holds no text file"),
        (["train.txt"], r"one file for each of .* it has train: train\.txt; valid: none; test: none"),
        (["train.txt", "train.md", "valid.txt", "test.txt"], r"it has train: train\.md, train\.txt; valid: valid\.txt"),
    ],
)
def test_folders_that_say_too_little_or_too_much(names, sentence, tmp_path):
    for name in names:
        write(tmp_path / name, "a b c")
    with pytest.raises(ValueError, match=sentence):
        load_corpus(str(tmp_path))


def test_a_split_that_is_too_short_is_named(tmp_path):
    for name, text in (("train.txt", "a b"), ("valid.txt", ""), ("test.txt", "a b")):
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=r"the valid split has 0 words; at least 2 are needed"):
        load_corpus(str(tmp_path))


# --- published corpora -----------------------------------------------------------------------------------------------

PARTS = {
    "train": " the cat sat on <unk> mat \n the N cats \n" * 40,
    "valid": " the cat \n",
    "test": " on the mat the cat sat \n N \n",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A corpus in the form of Penn Treebank behind HTTP on this machine, and no folder of data: (spec, where it would lie)."""
    source = tmp_path / "server"
    source.mkdir()
    for name, text in PARTS.items():
        write(source / f"small.{name}.txt", text)
    handler = functools.partial(QuietHandler, directory=str(source))
    with QuietServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/"
        files = tuple(
            _fetch.File(f"small.{n}.txt", f"{url}small.{n}.txt", len(t), hashlib.sha256(t.encode()).hexdigest())
            for n, t in PARTS.items()
        )
        spec = _fetch.Published("small", "small", files, (440, 3, 9), 9, "Licence: none, it is a test.")
        monkeypatch.setitem(PUBLISHED, "small", spec)
        monkeypatch.delenv("SPARSEFOLD_DATA", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield spec, tmp_path / "cache" / "sparsefold" / "small"
        running.shutdown()
        thread.join()


class QuietServer(http.server.HTTPServer):
    """One request after another; a client that has read enough is no error."""

    def handle_error(self, *_: object) -> None:
        """Nothing."""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Says nothing on the standard error."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_published_corpus_is_downloaded_once_with_its_licence(server, capsys):
    _, folder = server
    corpus = load_corpus("small")
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"small is not in {folder.parent}; downloading it. Licence: none, it is a test.\n"
    )
    assert sorted(file.name for file in folder.iterdir()) == [f"small.{n}.txt" for n in ("test", "train", "valid")]
    assert corpus.vocabulary[:2] == (EOS, "the") and corpus.decode(corpus.valid) == "the cat\n"
    assert corpus.source == "small"
    assert load_corpus("small").to_dict() == corpus.to_dict()
    assert capsys.readouterr().err == "", "the second time nothing is downloaded"


def test_a_folder_that_is_named_is_used(server, tmp_path, monkeypatch, capsys):
    _, cache = server
    (tmp_path / "mine").mkdir()
    load_corpus("small", data_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "small" / "small.test.txt").read_text() == PARTS["test"]
    assert "downloading" in capsys.readouterr().err and not cache.exists()
    monkeypatch.setenv("SPARSEFOLD_DATA", str(tmp_path / "mine"))
    load_corpus("small")
    load_corpus("small", data_dir=tmp_path / "mine" / "small")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"the data folder .*nowhere does not exist\. Make it"):
        load_corpus("small", data_dir=tmp_path / "nowhere")


def changed(spec, **how):
    return dataclasses.replace(spec, files=tuple(dataclasses.replace(file, **how) for file in spec.files))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            {"sha256": "0" * 64},
            r"gave [\d,]+ bytes that are not small\.train\.txt of small \(SHA-256 differs\); nothing was kept",
        ),
        (
            {"url": "http://127.0.0.1:9/x"},
            r"cannot download http://127\.0\.0\.1:9/x: .* Where there is no network, put",
        ),
        ({"url": "http://nowhere.invalid/x"}, r"cannot download http://nowhere\.invalid/x: "),
    ],
    ids=["another file", "refused", "no network"],
)
def test_downloads_that_fail_leave_nothing(how, sentence, server, monkeypatch):
    spec, folder = server
    monkeypatch.setitem(PUBLISHED, "small", changed(spec, **how))
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with pytest.raises(ValueError, match=sentence) as raised:
        load_corpus("small")
    assert "small.train.txt, small.valid.txt and small.test.txt" in str(raised.value)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_not_there_is_said_to_be(server, monkeypatch):
    spec, _ = server
    monkeypatch.setitem(PUBLISHED, "small", changed(spec, url=spec.files[0].url + "x"))
    with pytest.raises(ValueError, match=r"cannot download .*txtx: HTTP Error 404: File not found\."):
        load_corpus("small")


def test_no_more_is_read_than_the_file_can_hold(server, tmp_path):
    write(tmp_path / "server" / "small.train.txt", b"x" * 2**20)
    with pytest.raises(ValueError, match=r"gave 65,536 bytes that are not small\.train\.txt"):
        load_corpus("small")


def test_an_interrupted_download_leaves_what_is_whole(server, monkeypatch, capsys):
    spec, folder = server
    real, done = spec._download, []

    def interrupt(self, file, where):
        if done:
            raise KeyboardInterrupt
        done.append(file.name)
        return real(file, where)

    with monkeypatch.context() as patch:
        patch.setattr(_fetch.Published, "_download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_corpus("small")
    assert [file.name for file in folder.iterdir()] == ["small.train.txt"]
    before = (folder / "small.train.txt").stat().st_mtime_ns
    load_corpus("small")
    assert (folder / "small.train.txt").stat().st_mtime_ns == before, "what is there is not downloaded again"


@pytest.mark.parametrize("change", [{"words": (441, 3, 9)}, {"types": 10}])
def test_another_version_is_not_taken_for_the_published_one(change, server, monkeypatch):
    spec, _ = server
    monkeypatch.setitem(PUBLISHED, "small", dataclasses.replace(spec, **change))
    with pytest.raises(
        ValueError, match=r"small has .* but these files have 440, 3, 9 words in train, valid and test, and 9 "
    ):
        load_corpus("small")
    assert load_corpus("small", "byte").tokens > 10, "bytes have no published counts"


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    write(tmp_path / "cache", "a file")
    with pytest.raises(ValueError, match=r"cannot make the folder .*small: "):
        load_corpus("small")


@pytest.mark.parametrize(
    ("name", "folder", "words", "types", "start"),
    [
        ("ptb", "ptb", (929_589, 73_760, 82_430), 10_000, "no it was n't black monday\nbut while"),
        ("wikitext2", "wikitext-2", (2_088_628, 217_646, 245_569), 33_278, "\n= Robert <unk> =\n\nRobert"),
    ],
)
def test_published_counts(name, folder, words, types, start, data_folder):
    root = data_folder(folder).parent
    corpus = load_corpus(name, data_dir=root)
    assert tuple(map(len, (corpus.train, corpus.valid, corpus.test))) == words
    assert corpus.tokens == len(set(corpus.vocabulary)) == types
    assert corpus.decode(corpus.test[:40]).startswith(start)
    counts = np.bincount(corpus.train)
    assert (np.diff(counts) <= 0).all()
    for file in PUBLISHED[name].files:
        raw = (root / folder / file.name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (file.size, file.sha256), "what a download must be"
    lines = (root / folder / PUBLISHED[name].files[2].name).read_text().split("\n")[:-1]
    assert corpus.decode(corpus.test) == "".join(" ".join(line.split()) + "\n" for line in lines)
