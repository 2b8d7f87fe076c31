"""Token ids and what they stand for: bytes and words, round trips, the unknown, and vocabularies of files that lie."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsefold import vocabulary as module
from sparsefold.vocabulary import EOS, UNK, Vocabulary

WORDS = Vocabulary("word", ("the", UNK, EOS, "cat", "世界"))
BYTES = Vocabulary("byte", (10, 32, 97, 255))


def test_words_are_what_white_space_divides_and_a_newline_is_one():
    assert WORDS.encode("the cat \t 世界\r\n\n the dog").tolist() == [0, 3, 4, 2, 2, 0, 1]
    assert WORDS.look_up(b"the dog <unk> <eos>").tolist() == [0, -1, 1, 2], (
        "a word that is unknown is not the word <unk>"
    )
    assert WORDS.strangers(b"a dog, a cat") == ["'a'", "'dog,'"]
    assert WORDS.tokens == 5 and WORDS.unknown == 1
    for nothing in ("", " ", b"\t\r"):
        assert WORDS.encode(nothing).shape == (0,) and WORDS.encode(nothing).dtype == np.int64


def test_words_are_written_with_a_space_between_them_and_lines_end():
    text = "the cat\n\n世界 the\nthe"
    assert WORDS.decode(WORDS.encode(text)) == text
    assert WORDS.decode([2, 2, 0]) == "\n\nthe"
    assert WORDS.decode([]) == ""


def test_bytes_are_all_taken():
    assert BYTES.encode(b"a \xff\x00\n").tolist() == [2, 1, 3, 4, 0]
    assert BYTES.encode("a€").tolist() == [2, 4, 4, 4]
    assert BYTES.encode("\udcff").tolist() == [3], "as Python takes such a byte from a command line"
    assert BYTES.decode([2, 4, 3]) == b"a?\xff"
    assert BYTES.tokens == 5 and BYTES.unknown == 4
    assert BYTES.strangers(b"xyx\xff") == ["byte 0x78", "byte 0x79"]


@given(st.lists(st.sampled_from(["the", "cat", "世界", UNK, "\n", " ", "dog", "\t"])))
def test_pieces_of_any_size_give_the_same_words(parts):
    text = "".join(f" {part} " if part.strip() else part for part in parts)
    expected = [word for line in text.split("\n") for word in [*line.split(), EOS]][:-1]
    found = WORDS.encode(text)
    assert [WORDS.values[i] for i in found] == [word if word in WORDS.values else UNK for word in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 3)
        assert WORDS.encode(text).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("raw", "place"),
    [(b"\xff", r"byte 0 \(0xff, in line 1\)"), ("ok\né\nx".encode("latin-1"), r"byte 3 \(0xe9, in line 2\)")],
)
def test_what_is_not_utf8_is_named_with_its_place(raw, place):
    with pytest.raises(ValueError, match=rf"words are read from UTF-8, but {place} is not\. Convert .*byte by byte"):
        WORDS.encode(raw)


def test_a_byte_order_mark_is_no_part_of_the_first_word():
    assert WORDS.encode(b"\xef\xbb\xbfthe cat").tolist() == [0, 3]


@pytest.mark.parametrize("known", [WORDS, BYTES], ids=["words", "bytes"])
def test_a_program_carries_its_vocabulary_as_json(known):
    again = Vocabulary.from_metadata(json.loads(json.dumps(known.metadata())), known.tokens)
    assert (again.level, again.values) == (known.level, known.values)
    assert Vocabulary.from_metadata(known.metadata()).values == known.values


def test_without_a_level_a_vocabulary_is_of_bytes():
    assert BYTES.metadata() == {"vocabulary": [10, 32, 97, 255]}, "as files had it before there were words"


WORD = {"level": "word"}


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "names no vocabulary that fits its sizes"),
        ({"vocabulary": "abcd"}, "names no vocabulary"),
        ({"vocabulary": {"a": 1}}, "names no vocabulary"),
        ({"vocabulary": [1, 2, 3]}, "names no vocabulary that fits"),
        ({"level": "letter", "vocabulary": [1, 2, 3, 4]}, "a level that is neither byte nor word"),
        ({"level": ["word"], "vocabulary": [1, 2, 3, 4]}, "a level that is neither"),
        ({"vocabulary": [1, 2, 3, 256]}, "no list of different bytes"),
        ({"vocabulary": [1, 2, 3, -1]}, "no list of different bytes"),
        ({"vocabulary": [1, 2, 3, 1]}, "no list of different bytes"),
        ({"vocabulary": [1, 2, 3, 4.0]}, "no list of different bytes"),
        ({"vocabulary": [0, 2, 3, True]}, "no list of different bytes"),
        ({"vocabulary": [1, 2, 3, None]}, "no list of different bytes"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b"]}, "names no vocabulary that fits"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", "b"]}, "no list of different words, <eos> and <unk> among them"),
        ({**WORD, "vocabulary": ["x", EOS, "a", "b", "c"]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, "x", "a", "b", "c"]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", 7]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", ["c"]]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", ""]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", "c d"]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", "c\n"]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", "\ud800"]}, "no list of different words"),
        ({**WORD, "vocabulary": [UNK, EOS, "a", "b", "c" * 1001]}, "no list of different words"),
    ],
    ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "",
)
def test_a_vocabulary_that_does_not_fit_is_refused(metadata, sentence):
    with pytest.raises(ValueError, match=sentence):
        Vocabulary.from_metadata(metadata, 5)
