"""The native core under the address, undefined-behaviour and thread sanitizers, as a program of its own, without Python."""

from __future__ import annotations

import subprocess

import pytest


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_runs_clean(sanitizer: str, sanitized) -> None:
    stress = sanitized(sanitizer, ["tests/native/stress.cpp"], "stress")
    done = subprocess.run([str(stress)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
