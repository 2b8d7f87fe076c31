"""Exported C on a microcontroller: compiled for a Cortex-M4 and played in emulation, it gives what the oracle gives."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from native.conftest import ROOT


@pytest.fixture(scope="module")
def device():
    spec = importlib.util.spec_from_file_location("device", ROOT / "bench/device.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["device"] = module  # a dataclass looks itself up
    spec.loader.exec_module(module)
    if missing := [name for name in module.TOOLS if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} are not installed: programs for a Cortex-M4 cannot be built or run here.")
    return module


@pytest.mark.parametrize(
    "name",
    [
        "three",
        "mixed-i8",
        "mixed-w8a8",
        "tokens",
        "tokens-overlay-i8",
        "csc-bf16",
        "delta-i8",
        "conv-w8a8",
        "cluster-i8",
    ],
)
def test_a_microcontroller_plays_what_the_oracle_plays(name, device):
    program = cases.network(name)
    inputs = np.asarray(cases.sequence(program, 6))
    played = device.play(program, inputs)
    assert played.outputs.shape == (6, program.outputs)
    expected = np.array(sf.interpret(program, list(inputs)).outputs)
    np.testing.assert_allclose(played.outputs, expected, rtol=0, atol=tolerances.FREE_RUNNING_F32)


def test_bytes_and_instructions_are_counted(device):
    r = cases.rng(1)
    dense = sf.Program((cases.gru(r, 16, 32), cases.linear(r, 32, 8)))
    x = cases.vector(r, 160).reshape(10, 16)
    wide, narrow = device.play(dense, x), device.play(dense.rounded("i8"), x)
    weights = sum(m.elements for op in dense.ops for m in op_matrices(op))
    assert 4 * weights < wide.flash < 4 * weights + 8000 and narrow.flash < wide.flash - 2.5 * weights
    assert wide.ram == narrow.ram >= 4 * (32 + 2 * 96)  # h, and the sums of the gates
    assert 2 * weights < wide.instructions < 20 * weights, "a multiplication, its loads and its store"
    twice = device.play(dense, np.concatenate([x, x]))
    assert twice.instructions == pytest.approx(wide.instructions, rel=0.1)


def op_matrices(op):
    return [getattr(op, name) for name in ("weight", "weight_ih", "weight_hh") if hasattr(op, name)]


def test_a_program_that_stops_early_is_no_result(device, monkeypatch):
    program = cases.network("tokens")
    with pytest.raises(RuntimeError, match="the program stopped before its end"):
        device.play(program, np.array([1, program.inputs, 2]))  # there is no such token
    monkeypatch.setattr(device, "TARGET", ["-mcpu=unknown"])
    with pytest.raises(RuntimeError, match="arm-none-eabi-gcc ended with status"):
        device.play(program, np.array([1]))
