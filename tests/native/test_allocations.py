"""No step allocates: every malloc of the process is counted while every kind of op is stepped, run and stepped in batches."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import cases
from native.conftest import ROOT, shell, tool
from sparsefold.program import OPS

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="allocations are counted through glibc's names."
)
SOURCE = ROOT / "tests/native/allocations.c"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Every network of the suite as a file."""
    folder = tmp_path_factory.mktemp("networks")
    for name in cases.NETWORKS:
        cases.network(name).save(folder / f"{name}.sfold")
    return sorted(folder.glob("*.sfold"))


def test_the_networks_hold_every_op_and_both_kinds_of_input() -> None:
    programs = [cases.network(name) for name in cases.NETWORKS]
    assert {op.kind for program in programs for op in program.ops} == set(OPS)
    assert {program.takes_tokens for program in programs} == {True, False}


@pytest.mark.parametrize("threads", [1, 2])
def test_no_step_and_no_batch_allocates(threads, files, c_build, tmp_path, isa) -> None:
    program = tmp_path / "allocations"
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-DPLAY", "-I", ROOT / "include"]
    shell(tool("cc"), *strict, SOURCE, "-o", program, c_build / "libsparsefold.a", "-lstdc++", "-lm", "-pthread")
    done = subprocess.run([program, isa, str(threads), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(zip([f.stem for f in files], map(int, done.stdout.split()), strict=True))
    assert not {name: n for name, n in found.items() if n}


# `run` goes through Python, which allocates for the call itself: a call of 2000 steps must take as much as one of 10.
RUN = """
import ctypes, gc, sys
import numpy as np, cases, sparsefold as sf
count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_uint64
nothing, found = np.empty((0, 0), np.uint8), {}
for name in cases.NETWORKS:
    program = cases.network(name)
    core = sf.Engine(program).stream()._core
    play = core.run_tokens if program.takes_tokens else core.run_values
    counts = []
    for steps in (10, 10, 2000):  # the first warms up
        x = cases.sequence(program, steps).astype(np.int64 if program.takes_tokens else np.float32)
        out = np.empty((steps, program.outputs), np.float32)
        trace = np.empty((steps, core.trace_width), np.uint8)
        gc.collect()
        gc.disable()
        before = count()
        play(x, out, nothing)
        play(x, out, trace)
        counts.append(count() - before)
        gc.enable()
    if counts[1] != counts[2]:
        found[name] = counts
print(count() > 1000, found)
"""


def test_a_run_allocates_nothing_for_its_steps(tmp_path) -> None:
    library = tmp_path / "allocations.so"
    shell(tool("cc"), "-std=c99", "-O1", "-shared", "-fPIC", SOURCE, "-o", library)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "True {}\n", done.stdout + done.stderr
