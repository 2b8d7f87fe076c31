"""The models of the zoo: each loads, writes, reads as well as its card says, and its card is the file's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsefold.cli import main
from sparsefold.data import load_text
from sparsefold.engine import Engine
from sparsefold.language import evaluate, vocabulary_of
from sparsefold.program import Program

ZOO = Path(__file__).resolve().parents[2] / "zoo"
FILES = sorted(ZOO.glob("*.sfold"))
SAMPLE = 4000
pytestmark = pytest.mark.skipif(not ZOO.exists(), reason="the zoo is part of a checkout, not of the package.")


def test_there_are_models_and_each_has_its_card():
    pytest.importorskip(
        "torch", reason="what makes a model trains it: pip install 'sparsefold[train]' to compare its card."
    )
    spec = importlib.util.spec_from_file_location("make", ZOO / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert FILES
    for suffix in (".json", ".md"):
        assert [f.stem for f in FILES] == sorted(f.stem for f in ZOO.glob(f"*{suffix}"))
    for file in FILES:
        text = file.with_suffix(".md").read_text()
        assert make.card(file.with_suffix(".json")) == text, f"python zoo/make.py {file.stem} --card"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_card_is_the_files(file):
    raw, facts = file.read_bytes(), json.loads(file.with_suffix(".json").read_text())
    assert facts["file"] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    program = Program.load(file)
    assert program.metadata["corpus"] == facts["corpus"]
    assert facts["corpus"]["source"] == "pydoc_data.topics", "text that may be given away"
    assert facts["density_of_all"] <= 0.15
    assert facts["read"]["complete"] and facts["read"]["event_rate"] < 0.2


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_reads_as_well_as_its_card_says(file):
    facts, program = json.loads(file.with_suffix(".json").read_text()), Program.load(file)
    text = b"The for statement is used to iterate over the elements of a sequence (such as a string, tuple or list)."
    assert evaluate(Engine(program).stream(), vocabulary_of(program, file).encode(text)) < 2.5, "bits per character"
    corpus = load_text()
    if corpus.sha256 != facts["corpus"]["sha256"]:
        pytest.skip(f"Python {sys.version_info[:2]} carries another text than Python {facts['python']}.")
    found = evaluate(Engine(program).stream(), corpus.test[:SAMPLE])
    assert found == pytest.approx(facts["read"]["bits_per_char"], abs=0.3), "the start of the test split alone"
    stream = Engine(program).stream()
    stream.run(corpus.test[:SAMPLE])
    cost, whole = stream.cost, facts["read"]["cost"]
    assert cost.per_step("macs_effective") == pytest.approx(whole["macs_effective"], rel=0.1)
    assert cost.per_step("macs_dense") == pytest.approx(whole["macs_dense"])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_writes(file, capfdbinary):
    assert main(["run", str(file), "--prompt", "The with statement", "--tokens", "200", "--seed", "1"]) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(b"The with statement") and len(out) >= 200
    words = [w for w in out.split() if w.isalpha()]
    assert np.mean([len(w) for w in words]) > 2
