"""The runtime needs numpy and its own library, nothing else; each test asks a fresh process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import cases
import sparsefold
from sparsefold import _native

HEAVY = ["torch", "safetensors", "onnx", "onnxruntime", "matplotlib"]
TRAINING = [f"sparsefold.{name}" for name in ("nn", "sparsify", "lowering", "recipes", "data")]
RUNTIME = [
    name
    for name in (
        "formats",
        "program",
        "engine",
        "cost",
        "calibrate",
        "export_c",
        "c_products",
        "bench",
        "report",
        "_figures",
        "_summary",
        "progress",
        "vocabulary",
        "language",
        "sound",
        "hearing",
        "cli",
    )
    if find_spec(f"sparsefold.{name}")
]

# Behaves as an environment where these were never installed.
BLOCK = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Missing())
"""


def in_a_process(code, *words):
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["sparsefold", *(f"sparsefold.{name}" for name in RUNTIME)])
def test_importing_the_runtime_brings_nothing_heavy(module):
    done = in_a_process(f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert module in loaded and "numpy" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]
    assert not [name for name in loaded if name.startswith(tuple(TRAINING))]


def test_the_runtime_modules_are_the_files_of_the_package_root():
    files = {path.stem for path in Path(sparsefold.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(RUNTIME)


def test_without_torch_a_program_is_loaded_played_and_reported(tmp_path):
    cases.network("three").save(tmp_path / "a.sfold")
    done = in_a_process(
        BLOCK
        + """
import numpy as np, sparsefold as sf
engine = sf.Engine.load(sys.argv[1])
stream = engine.stream()
ran = stream.run([1, 2, 3, 10])
assert stream.step(4).shape == (11,) and np.isfinite(ran).all()
assert np.abs(ran - sf.interpret(engine.program, [1, 2, 3, 10]).outputs).max() < 1e-3
sf.Program(engine.program.ops, {"again": True}).save(sys.argv[1])
print(stream.report())
from sparsefold.bench import race
assert race({"engine": stream.step}, [1, 2, 3], rounds=2)["engine"].calls == 3
assert not {"torch", "safetensors", "onnx", "matplotlib"} & set(sys.modules)
""",
        tmp_path / "a.sfold",
    )
    assert done.returncode == 0, done.stderr
    assert "5 steps" in done.stdout and "4 decoder" in done.stdout
    assert sparsefold.Program.load(tmp_path / "a.sfold").metadata == {"again": True}


@pytest.mark.parametrize("use", ["sf.compile_model", "from sparsefold import compile_model"])
def test_without_torch_compile_model_names_the_extra(use):
    done = in_a_process(BLOCK + f"import sparsefold as sf\n{use}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: compile_model needs torch: pip install 'sparsefold[train]'."


def test_a_fault_of_another_import_is_not_blamed_on_torch():
    done = in_a_process(
        BLOCK.replace(repr(HEAVY), "['sparsefold.lowering', 'nothing']").replace('name.partition(".")[0] in', "name in")
        + "import sparsefold as sf\nsf.compile_model"
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'sparsefold.lowering'" in done.stderr
    assert "needs torch" not in done.stderr


def test_the_exports_are_these():
    assert sparsefold.__all__ == [
        "CSC", "Block", "Calibration", "Complementary", "Cost", "Counts", "Dense", "Engine", "Program", "ProgramError",
        "Stream", "calibrate_delta", "compile_model", "cost", "interpret"
    ]  # fmt: skip
    for name in set(sparsefold.__all__) - {"compile_model"}:
        assert getattr(sparsefold, name).__module__.startswith("sparsefold.")
    assert callable(sparsefold.cost)  # the function, not the module of that name
    with pytest.raises(AttributeError, match="module 'sparsefold' has no attribute 'Layer'"):
        sparsefold.Layer  # noqa: B018


PLAYS = """
import numpy as np, sparsefold as sf
from sparsefold.program import EGRU
zeros = lambda *shape: np.zeros(shape, np.float32)
op = EGRU(sf.Dense(zeros(3, 1), 3), sf.Dense(zeros(3, 1), 3), zeros(3), zeros(3), threshold=zeros(1))
sf.Engine(sf.Program((op,))).stream().step(zeros(1))
"""


def spent(code, environment):
    """(processor seconds, peak MB) of a fresh interpreter that runs ``code``; a busy machine takes longer, not more of these."""
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", code], environment)
    _, status, used = os.wait4(child, 0)
    assert status == 0
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def test_import_and_engine_take_little_more_than_numpy(tmp_path, record_property):
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}  # compiled once, as where it is installed
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for code in ("import numpy", PLAYS):
        spent(code, environment)
    turns = [(spent("import numpy", environment), spent(PLAYS, environment)) for _ in range(12)]
    (bare, bare_memory), (ours, ours_memory) = (
        tuple(min(turn[who][what] for turn in turns) for what in range(2)) for who in range(2)
    )
    record_property("import_ms", 1e3 * (ours - bare))
    record_property("import_mb", ours_memory - bare_memory)
    # 60 ms are those of a processor that imports numpy in 100: a slow moment of a shared one stretches both alike.
    limit = 0.060 * max(1, bare / 0.100)
    assert ours - bare <= limit, f"{1e3 * (ours - bare):.0f} ms more than numpy's {1e3 * bare:.0f} ms"
    assert ours_memory - bare_memory <= 40


def test_the_native_library_is_small():
    assert Path(_native.__file__).stat().st_size <= 3 * 2**20
