"""From torch to a file that reads and writes words: the perplexity is torch's, samples are words, data folders are handed on."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

import sparsefold as sf
from sparsefold import language, nn
from sparsefold.cli import main
from sparsefold.data import load_corpus
from sparsefold.engine import Engine
from sparsefold.vocabulary import Vocabulary

LINES = ["the cat sat on the mat", "a dog saw the cat", "le chat était là", "the mat saw <unk> sat", ""]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    random = np.random.default_rng(0)
    file.write_text("".join(f"{LINES[i]}\n" for i in random.integers(0, len(LINES), 400)))
    return load_corpus(str(file)), file


def network(tokens: int, layer: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = nn.EGRU(16, 32) if layer == "egru" else torch.nn.GRU(16, 32)
    model = nn.Stack(torch.nn.Embedding(tokens, 16), made, torch.nn.Linear(32, tokens))
    with torch.no_grad():
        model[2].weight.mul_(10)  # far from uniform
    return model


@pytest.mark.parametrize("layer", ["egru", "gru"])
def test_perplexity_of_the_decoder_is_that_of_torchs_log_softmax(layer, corpus, tmp_path, capsys):
    known, file = corpus
    sf.compile_model(network(known.tokens, layer), known.metadata()).save(tmp_path / "a.sfold")
    assert main(["eval", str(tmp_path / "a.sfold"), "--text", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = known.encode(file.read_bytes())
    logits = torch.from_numpy(Engine.load(tmp_path / "a.sfold").stream().run(tokens[:-1])).double()
    loss = torch.nn.functional.nll_loss(logits.log_softmax(1), torch.from_numpy(tokens[1:]))
    # Sums of 2 000 float64 terms in another order.
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-11)
    assert found["unknown"] == 0 and found["told"] == len(tokens) - 1


def test_perplexity_of_a_compiled_model_is_the_models(corpus, tmp_path):
    known, _ = corpus
    model = network(known.tokens, "gru")
    sf.compile_model(model, known.metadata()).save(tmp_path / "a.sfold")
    with torch.no_grad():
        exact = model.double()(torch.from_numpy(known.test[:-1])[:, None])[0][:, 0]
    loss = float(torch.nn.functional.cross_entropy(exact, torch.from_numpy(known.test[1:])))
    stream = Engine.load(tmp_path / "a.sfold").stream()
    off = np.abs(stream.run(known.test[:-1]) - exact.numpy()).max()
    assert off < 1e-4  # float32, logits of a few tens
    stream.reset()
    # Logits that are off by at most that change a log-softmax by at most twice as much.
    assert language.evaluate(stream, known.test) * np.log(2) == pytest.approx(loss, abs=2 * off + 1e-12)


def test_thresholds_are_calibrated_on_words(corpus, tmp_path, capsys):
    known, file = corpus
    model = network(known.tokens, "gru")
    sf.compile_model(model, known.metadata()).save(tmp_path / "a.sfold")
    words = ["calibrate", str(tmp_path / "a.sfold"), "-o", str(tmp_path / "b.sfold"), "--sample", str(file)]
    assert main([*words, "--max-loss", "0.5"]) == 0
    assert "bytes" in capsys.readouterr().out
    program = sf.Program.load(tmp_path / "b.sfold")
    assert Vocabulary.from_metadata(program.metadata, program.inputs).values == known.vocabulary
    sf.Program(program.ops).save(tmp_path / "c.sfold")
    assert main(["calibrate", str(tmp_path / "c.sfold"), *words[2:]]) == 2
    assert "c.sfold is not a language model" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [11, 12, 13, 200, 1000])
def test_a_sample_ends_with_a_word(limit, corpus, tmp_path, monkeypatch):
    known, _ = corpus
    text = "le chat était là\n" * 20
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(language, "SAMPLE_BYTES", limit)
    sample = language.sample_of(tmp_path / "a.txt", known.known)
    assert len(sample) >= 2 and text.startswith(known.decode(sample))
    assert known.known.unknown not in sample, "no half of a word"
    program = sf.compile_model(network(known.tokens, "egru"), known.metadata(), sample=sample)
    assert any(choice["rate"] == "counted" for choice in program.metadata["choices"])


@pytest.mark.parametrize("text", ["", " ", "word"])
def test_a_sample_of_one_word_is_none(text, corpus, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.txt has {len(text.split())} words; at least 2 are needed"):
        language.sample_of(tmp_path / "a.txt", corpus[0].known)


def test_a_data_folder_is_handed_to_the_recipe_and_named_again(tmp_path, monkeypatch, capsys):
    from sparsefold.recipes import text

    def stop(*_: object) -> None:
        assert os.environ["SPARSEFOLD_DATA"] == str(tmp_path)
        raise KeyboardInterrupt("stopped.")

    monkeypatch.setenv("SPARSEFOLD_DATA", "elsewhere")
    monkeypatch.setattr(text, "run", stop)
    assert main(["train", "text", "steps=3", "--data-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"sparsefold train text steps=3 --out runs/text --data-dir {tmp_path}\n")
