"""The experiment on both sparsities, in miniature: its points, its file, its resume, and that nothing wrong is timed."""

from __future__ import annotations

import gc
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsefold.cli import main
from sparsefold.data import load_corpus, load_text
from sparsefold.lowering import compile_model
from sparsefold.nn import EGRU, GRU, LSTM, Stack
from sparsefold.recipes import lm, multiply, rivals
from sparsefold.recipes._windows import stream_bits
from tolerances import RIVAL_INT8

pytest.importorskip("onnxruntime", reason="rivals need ONNX Runtime: pip install 'sparsefold[bench]'.")
pytestmark = pytest.mark.filterwarnings("ignore:.*rows per gate")


ALSO = "cell=egru hidden=24 target_rate=0.3 density=0.5 decoder_density=0.5 prune_every=1; cell=lstm hidden=8 cutoffs=20x60"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Config, folder and result of an experiment of 16 units on a page of text."""
    folder = tmp_path_factory.mktemp("multiply")
    corpus = load_text()
    (folder / "a.txt").write_bytes(bytes(corpus.vocabulary[t] for t in corpus.train[5000:25_000]))
    config = multiply.Config(
        corpus=str(folder / "a.txt"), minutes=None, steps=6, hidden=16, lstm=(16, 8), gru=(16,), rates=(0.2, 0.1),
        densities=(1.0, 0.5), decoder_density=0.5, calls=200, all="batch=4 eval_every=3", egru="lr=0.01",
        also=ALSO,
    )  # fmt: skip
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiply, "SAMPLE", 200)
        patch.setattr(multiply, "PARITY", 40)
        yield config, folder / "run", multiply.run(config, folder / "run")
    torch.set_num_threads(before)


NAMES = [
    "lstm-16", "lstm-8", "gru-16", "egru-16-rate0.2-density1", "egru-16-rate0.2-density0.5", "egru-16-rate0.1-density1",
    "egru-16-rate0.1-density0.5", "egru-24-rate0.3-density0.5-decoder0.5", "lstm-8-density1-decoder1-cutoffs20x60",
]  # fmt: skip


def test_every_point_has_quality_counts_and_time(small):
    config, folder, found = small
    assert list(found["points"]) == NAMES
    assert json.loads((folder / "multiply.json").read_text()) == json.loads(json.dumps(found))
    corpus = load_corpus(config.corpus, "word")
    for name, point in found["points"].items():
        model, _ = lm.load(multiply._file(config, folder, name))
        assert point["test_perplexity"] == pytest.approx(2 ** stream_bits(model, corpus.test)[0])
        roles = {part["role"] for part in point["macs"]["parts"]}
        assert {"recurrent", "decoder"} <= roles, "embedding and decoder are counted"
        assert point["macs"]["steps"] == 200
        assert point["file_bytes"] == (folder / f"{name}.sfold").stat().st_size
        density = 0.5 if "density0.5" in name else 1
        assert point["density"]["1.weight_hh_l0"] == pytest.approx(density, abs=0.03)  # 24 units are no whole blocks
        decoder = "2.head.weight" if "cutoffs" in name else "2.weight"
        assert point["density"][decoder] == pytest.approx(density, abs=0.03)
        assert point["memory_bytes"] > 4 * len(corpus.vocabulary) * (48 if "egru-16" in name else 16), "one table"
        assert (point["event_rate"] < 1) == name.startswith("egru")
    ours = [row["network"] for row in found["race"] if row["engine"] == "sparsefold"]
    assert ours == NAMES
    played = {(row["network"], row["engine"]) for row in found["race"] if row["rival"]}
    floats, int8 = {"ONNX Runtime", "OpenVINO", "torch eager"}, {"torch int8"}
    assert played == {
        (n, e) for n in NAMES[:3] for e in floats | int8 | ({"ONNX Runtime int8"} if "lstm" in n else set())
    }
    assert all(row["latency_us"]["calls"] == 200 for row in found["race"])
    scored = [row for row in found["race"] if row["scores"]]
    assert [(row["network"], row["engine"]) for row in scored] == [(NAMES[-1], "sparsefold")]
    asked = sum(
        part["macs_effective"] for part in found["points"][NAMES[-1]]["macs"]["parts"] if part["role"] == "decoder"
    )
    assert asked < found["points"]["lstm-8"]["macs"]["parts"][-1]["macs_effective"], "clusters are asked for seldom"
    assert multiply.told(found).count("\n") == len(NAMES) - 1


def test_what_is_known_is_not_made_again(small, monkeypatch, capsys):
    config, folder, found = small
    monkeypatch.setattr(lm, "run", lambda *_: pytest.fail("trained anew"))
    assert multiply.run(config, folder) == json.loads(json.dumps(found))
    with pytest.raises(ValueError, match=r"holds an experiment with another hidden, calls\. Give the same settings"):
        multiply.run(replace(config, hidden=8, calls=300), folder)
    with pytest.raises(
        ValueError, match=r"each network of also is one of its own, kept at its end; 'snapshots=1,0\.5' is not"
    ):
        multiply.run(replace(config, also="snapshots=1,0.5"), folder)
    known = json.loads((folder / "multiply.json").read_text())
    part = {**known, "points": {k: v for k, v in known["points"].items() if "rate0.1" not in k}}
    del part["race"]
    (folder / "multiply.json").write_text(json.dumps(part))
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiply, "SAMPLE", 200)
        patch.setattr(multiply, "PARITY", 40)
        again = multiply.run(config, folder)
    assert list(again["points"]) == NAMES
    for name in NAMES:
        assert again["points"][name]["test_perplexity"] == found["points"][name]["test_perplexity"]
    words = [
        f"{k}={v}"
        for k, v in {"corpus": config.corpus, "minutes": "none", "steps": 6, "hidden": 16, "calls": 200}.items()
    ]
    words += ["lstm=16x8", "gru=16", "rates=0.2,0.1", "densities=1,0.5", "decoder_density=0.5"]
    words += ["all=batch=4 eval_every=3", "egru=lr=0.01", f"also={ALSO}"]
    assert main(["train", "ptb-multiply", *words, "--out", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("lstm-16 ")


def test_nothing_that_disagrees_with_torch_is_timed(small, monkeypatch):
    config, folder, _ = small
    name = "gru-16"
    models = {name: lm.load(multiply._file(config, folder, name))[0]}
    programs = {name: multiply.Program.load(folder / f"{name}.sfold")}
    monkeypatch.setattr(rivals, "PARITY_BOUND", 0.0)
    monkeypatch.setattr(multiply, "race", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(rivals.ParityError, match=r"on gru-16 differs from torch by \S+ in a logit"):
        multiply.measure(models, programs, load_corpus(config.corpus, "word").test, 200)


def test_networks_of_several_layers_are_played_by_all():
    torch.manual_seed(0)
    tokens = torch.randint(9, (300,)).numpy()
    models = {}
    for name, kind in (("lstm", LSTM), ("gru", GRU), ("egru", EGRU)):
        layers = kind(5, 6), kind(6, 6)
        models[name] = Stack(torch.nn.Embedding(9, 5), *layers, torch.nn.Linear(6, 9)).eval()
    rows = multiply.measure(models, {n: compile_model(m) for n, m in models.items()}, tokens, 200)
    played = {(row["network"], row["engine"]) for row in rows if row["rival"]}
    assert len(played) == 9, "parity is asked of each before it is timed"
    del rows
    gc.collect()
    met: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: met.append(number))
    signal.raise_signal(signal.SIGINT)  # ends the process where OpenVINO left a stack for signals that is no more
    signal.signal(signal.SIGINT, before)
    assert met == [signal.SIGINT]
    with pytest.raises(ValueError, match=r"one layer of as many units as the others"):
        rivals.torch_eager(Stack(torch.nn.Embedding(9, 5), LSTM(5, 6), LSTM(6, 7), torch.nn.Linear(7, 9)))
    with pytest.raises(ValueError, match=r"GRUs or LSTMs"):
        rivals.torch_eager(Stack(torch.nn.Embedding(9, 5), LSTM(5, 6), GRU(6, 6), torch.nn.Linear(6, 9)))


def test_the_int8_rival_is_at_its_best_on_this_processor():
    torch.manual_seed(0)
    model = Stack(LSTM(128, 128)).eval()
    x = torch.randn(20, 128)
    rival = rivals.onnx_runtime(model, int8=True)
    played = torch.from_numpy(np.array([rival.call(value.numpy()).copy() for value in x]))
    with torch.no_grad():
        expected = model(x[:, None])[0][:, 0]
    assert (played - expected).abs().max() < RIVAL_INT8, "sums of its codes overflow: 0.2 off without VNNI"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"densities": ()}, "rates and densities"), ({"densities": (0.0,)}, "rates and densities"), ({"calls": 3}, "calls"),
        ({"lstm": (), "gru": ()}, "dense"), ({"all": "lrr=3"}, "unknown key 'lrr'"),
        ({"densities": (0.1, 0.5)}, "snapshots"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_any_training(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        multiply.Config(**changes)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^ptb-multiply trains and times in one process, torchrun started 2"):
        multiply.run(multiply.Config(), tmp_path)


def test_networks_may_be_added(small, tmp_path):
    config, folder, found = small
    fewer = {**found, "config": {**found["config"], "also": ""}}
    fewer["points"] = {name: p for name, p in found["points"].items() if not name.startswith("egru-24")}
    fewer["race"] = [row for row in found["race"] if not row["network"].startswith("egru-24")]
    (folder / "multiply.json").write_text(json.dumps(fewer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiply, "SAMPLE", 200)
        patch.setattr(multiply, "PARITY", 40)
        again = multiply.run(config, folder)
    assert again["points"] == json.loads(json.dumps(found["points"]))
    assert {row["network"] for row in again["race"]} == set(NAMES)
