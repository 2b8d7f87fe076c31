"""The timer in C of bench/steps.py: what it times is what the engine computes."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import replace

import numpy as np
import pytest

import cases
import sparsefold as sf
from native.conftest import ROOT, tool

pytest.importorskip("torch", reason="bench/steps.py races against torch")
PROGRAM = sf.Program((cases.egru(cases.rng(5), 15, 31, (16, 1), 0.5, output="state"),))
INPUTS = cases.sequence(PROGRAM, 60)


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("steps", ROOT / "bench/steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["library", "exported"])
def library(request, c_build):
    tool("cc")
    return c_build / "libsparsefold.a" if request.param == "library" else None


def test_every_step_of_every_turn_is_timed(steps, library, tmp_path):
    timer = steps.FromC(PROGRAM, INPUTS, tmp_path / "c", library)
    for _ in range(2):
        timer.turn()
    assert timer.latency.calls == 2 * len(INPUTS) and timer.latency.p50 > 0
    printed = timer.play()
    assert len(printed["ns"]) == len(INPUTS) and min(printed["ns"]) > 0
    assert printed["isa"] == ("exported" if library is None else sf.Engine(PROGRAM).isa)
    assert ("-O3 -march=native" if library is None else "sparsefold.h") in timer.settings


def test_what_computes_something_else_is_not_timed(steps, library, tmp_path, monkeypatch):
    op = PROGRAM.ops[0]
    wrong = op.bias_ih.copy()
    wrong[40] += np.float32(0.1)
    other = sf.Engine(sf.Program((replace(op, bias_ih=wrong),)))
    monkeypatch.setattr(steps, "Engine", lambda _: other)
    with pytest.raises(RuntimeError, match="off: nothing is timed"):
        steps.FromC(PROGRAM, INPUTS, tmp_path / "c", library)


def test_what_cannot_be_played_is_refused(steps, c_build, tmp_path):
    timer = steps.FromC(PROGRAM, INPUTS, tmp_path / "c", c_build / "libsparsefold.a")
    cases.network("tokens").save(tmp_path / "tokens.sfold")
    for model, inputs, parity in [
        (tmp_path / "none.sfold", timer.words[2], 1),
        (tmp_path / "tokens.sfold", timer.words[2], 1),
        (timer.words[1], tmp_path / "none", 1),
        (timer.words[1], timer.words[2], len(INPUTS) + 1),
    ]:
        assert subprocess.run([timer.words[0], model, inputs, str(parity), "0"], check=False).returncode == 2
    with pytest.raises(RuntimeError, match=r"ended with status 2: steps: cannot read .*none\.sfold"):
        steps.shell(timer.words[0], tmp_path / "none.sfold", timer.words[2], 1, 0)


def test_inputs_are_as_sparse_as_wanted(steps):
    x = steps.sequence(200, 100, 0.1, np.random.default_rng(0))
    assert x.shape == (200, 100) and x.dtype == np.float32
    assert 0.09 < (x != 0).mean() < 0.11
    assert (steps.sequence(20, 100, 1.0, np.random.default_rng(0)) != 0).all()
