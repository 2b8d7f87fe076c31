"""The native core under the address, undefined-behaviour and thread sanitizers, as a program of its own, without Python."""

from __future__ import annotations

import subprocess

import pytest

import cases


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_runs_clean(sanitizer: str, sanitized) -> None:
    stress = sanitized(sanitizer, ["tests/native/stress.cpp"], "stress")
    done = subprocess.run([str(stress)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_training_runs_clean(sanitizer: str, sanitized) -> None:
    program = sanitized(sanitizer, ["tests/native/train_stress.cpp", "native/train.cpp"], "train_stress")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_threads_share_an_engine_cleanly(sanitized, tmp_path) -> None:
    names = ["three", "mixed-3", "mixed-w8a8", "layer-norm-of-events", "tokens-overlay"]
    for name in names:
        cases.network(name).save(tmp_path / name)
    names.append("large")
    cases.large_layers().save(tmp_path / "large")
    program = sanitized("thread", ["tests/native/threads.c"], "threads")
    command = [str(program), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
