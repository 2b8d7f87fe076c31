"""Delta networks from torch, from the command line, and on what others trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsefold as sf
from sparsefold.calibrate import delta_sites, with_deltas
from sparsefold.cli import main
from sparsefold.nn import EGRU, Stack
from tolerances import FREE_RUNNING_F32

ROOT = Path(__file__).resolve().parents[2]


def thresholds(program: sf.Program) -> list[tuple[float | None, float | None]]:
    return [(op.delta_input, op.delta_hidden) for op in program.ops if op.kind in ("gru", "lstm", "rnn")]


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_threshold_0_plays_what_torch_plays(kind) -> None:
    torch.manual_seed(3)
    layer = kind(9, 20, num_layers=2)
    x = np.random.default_rng(0).standard_normal((60, 9)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)[:, None])[0][:, 0].numpy()
    program = sf.compile_model(layer, delta=0)
    assert thresholds(program) == [(0, 0), (0, 0)]
    np.testing.assert_allclose(sf.Engine(program).stream().run(x), expected, rtol=0, atol=FREE_RUNNING_F32)


def test_thresholds_go_to_the_layers_that_may_send() -> None:
    model = Stack(
        torch.nn.Embedding(7, 12), torch.nn.GRU(12, 20), torch.nn.ReLU(), torch.nn.LSTM(20, 17), torch.nn.RNN(17, 16),
        EGRU(16, 15), torch.nn.Linear(15, 3),
    )  # fmt: skip
    # rows of an Embedding and events are read as they are
    assert thresholds(sf.compile_model(model, delta=0.1)) == [(None, 0.1), (None, 0.1), (0.1, 0.1)]
    assert thresholds(sf.compile_model(model, delta=(0.2, None))) == [(None, None), (None, None), (0.2, None)]
    each = [0.1, None, (0.3, 0.4)]
    assert thresholds(sf.compile_model(model, delta=each)) == [(None, 0.1), (None, None), (0.3, 0.4)]
    assert thresholds(sf.compile_model(model)) == [(None, None)] * 3
    rounded = sf.compile_model(model, delta=0.1, weights="w8a8")
    assert [op.weight_hh.precision for op in rounded.ops[1:6:2]] == ["i8", "i8", "i8"]
    choices = {(c["op"], c["matrix"]): c["rate"] for c in sf.compile_model(model, delta=0.1).metadata["choices"]}
    assert choices[1, "weight_ih"] == "dense x" and choices[1, "weight_hh"] == choices[4, "weight_ih"] == "assumed"
    counted = sf.compile_model(model, delta=0.1, sample=[1, 2, 3, 4]).metadata["choices"]
    assert {c["rate"] for c in counted if c["matrix"] == "weight_hh"} == {"counted"}


@pytest.mark.parametrize(
    ("delta", "sentence"),
    [
        ([0.1, 0.2], "delta is for 2 layers, the model has 1 of GRU, LSTM or RNN"),
        ("0.1", "delta is a threshold, a pair"),
        ((0.1, 0.2, 0.3), r"delta is a threshold, .* got \(0.1, 0.2, 0.3\)"),
        ([True], "delta is a threshold, a pair"),
        (-0.1, r"delta_input must be a number in \[0, 1e30\], got -0.1"),
    ],
)
def test_wrong_thresholds_get_a_sentence(delta, sentence) -> None:
    with pytest.raises(ValueError, match=f"the model cannot be compiled: .*{sentence}"):
        sf.compile_model(torch.nn.GRU(3, 4), delta=delta)
    with pytest.raises(ValueError, match="the model has 0 of GRU, LSTM or RNN"):
        sf.compile_model(torch.nn.Linear(3, 4), delta=0.1)


def test_the_command_line_calibrates_arrays_and_texts(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    sf.compile_model(Stack(torch.nn.LSTM(5, 16), torch.nn.Linear(16, 2))).save(tmp_path / "values.sfold")
    walk = np.cumsum(0.05 * np.random.default_rng(1).standard_normal((2, 80, 5)), 1).astype(np.float32)
    np.save(tmp_path / "walk.npy", walk)
    words = ["--sample", str(tmp_path / "walk.npy"), "--max-loss", "0.05", "-o", str(tmp_path / "delta.sfold")]
    assert main(["calibrate", str(tmp_path / "values.sfold"), *words]) == 0
    said, program = capsys.readouterr().out, sf.Program.load(tmp_path / "delta.sfold")
    assert program.metadata["delta"]["steps"] == 160 and program.metadata["delta"]["loss"] <= 0.05
    assert "0 hidden" in said and f"{program.metadata['delta']['loss']:.6g} now" in said
    assert main(["inspect", str(tmp_path / "delta.sfold")]) == 0
    assert f"changes above {program.ops[0].delta_input:.4g} of x" in capsys.readouterr().out

    vocabulary = sorted(set(b"a text, a test"))
    gru = Stack(
        torch.nn.Embedding(len(vocabulary) + 1, 8), torch.nn.GRU(8, 16), torch.nn.Linear(16, len(vocabulary) + 1)
    )
    sf.compile_model(gru, {"vocabulary": vocabulary}).save(tmp_path / "text.sfold")
    (tmp_path / "a.txt").write_bytes(b"a text, a test" * 9)
    words = ["--sample", str(tmp_path / "a.txt"), "--max-loss", "0.01", "-o", str(tmp_path / "b.sfold")]
    assert main(["calibrate", str(tmp_path / "text.sfold"), *words]) == 0
    found = sf.Program.load(tmp_path / "b.sfold").metadata["delta"]
    assert found["loss"] <= found["loss_before"] + 0.01 and 2 < found["loss_before"] < 5  # bits: untrained


@pytest.fixture
def bench(data_folder, monkeypatch):
    """bench/delta.py, which reads what others trained."""
    pytest.importorskip("onnx", reason="DTLN is read from an ONNX file")
    for name in ("models/dtln", "models/nsnet2", "models/silero_vad"):
        data_folder(name)
    spec = importlib.util.spec_from_file_location("bench_delta", ROOT / "bench/delta.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_delta", module)  # a dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_most_of_a_third_party_lstm_need_not_be_multiplied(bench) -> None:
    """DTLN's first half on real speech: within 3 % (30 dB) of what the dense network leaves, most MACs of its layers go."""
    model = bench.dtln()
    found, checked, stream = bench.calibrated(model, 0.03)
    assert 0 < found.loss <= 0.03
    assert checked <= 0.06  # on pieces it was not calibrated on
    _, dense = bench.layers_alone(model.program)
    layers = [p for p in stream.cost.parts if p.role in ("input", "recurrent")]
    assert sum(p.macs_dense for p in layers) == stream.counters.steps * sum(
        op.weight_ih.elements + op.weight_hh.elements for op in dense.ops
    )
    assert sum(p.macs_effective for p in layers) < 0.3 * sum(p.macs_dense for p in layers)
    assert len(found.sent) == 4 and all(s.rate < 0.4 for s in found.sent)


def test_a_third_party_gru_sends_changes_and_plays_as_it_did(bench) -> None:
    """NSNet2's two layers of 400 units: threshold 0 plays the dense network, and a threshold saves within its loss."""
    model = bench.nsnet2()
    features = model.features(bench.pieces(model)[0][2])
    first, dense = bench.layers_alone(model.program)
    x = sf.Engine(sf.Program(model.program.ops[:first])).stream().run(features)
    sends = with_deltas(dense, dict.fromkeys(delta_sites(dense), 0.0))
    ours, theirs = (sf.Engine(p).stream().run(x) for p in (sends, dense))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FREE_RUNNING_F32)
    found = sf.calibrate_delta(model.program, features[:120], max_loss=0.05)
    layers = [s for s in found.sent if s.op in (1, 2)]
    assert found.loss <= 0.05 and found.macs < 0.8 * found.macs_before and len(layers) >= 3
