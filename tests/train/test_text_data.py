"""Text as bytes: the splits, a vocabulary that has seen the training split alone, the unknown token, and refusals."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

import numpy as np
import pytest

from sparsefold.data import load_text
from sparsefold.data.text import decode, encode


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
