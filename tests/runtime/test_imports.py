"""The runtime needs numpy and its own library, nothing else; each test asks a fresh process."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import cases
import sparsefold

HEAVY = ["torch", "safetensors", "onnx", "onnxruntime", "matplotlib"]
TRAINING = [f"sparsefold.{name}" for name in ("nn", "sparsify", "lowering", "recipes", "data")]
RUNTIME = [
    name
    for name in (
        "formats",
        "program",
        "engine",
        "cost",
        "export_c",
        "bench",
        "report",
        "_figures",
        "_summary",
        "progress",
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
        "CSC", "Block", "Complementary", "Cost", "Counts", "Dense", "Engine", "Program", "ProgramError", "Stream",
        "compile_model", "cost", "interpret"
    ]  # fmt: skip
    for name in set(sparsefold.__all__) - {"compile_model"}:
        assert getattr(sparsefold, name).__module__.startswith("sparsefold.")
    assert callable(sparsefold.cost)  # the function, not the module of that name
    with pytest.raises(AttributeError, match="module 'sparsefold' has no attribute 'Layer'"):
        sparsefold.Layer  # noqa: B018


def test_the_import_is_quick(record_property):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert in_a_process("import sparsefold").returncode == 0
        seconds.append(time.perf_counter() - began)
    record_property("import_seconds", sorted(seconds)[1])
    assert (
        min(seconds) < 2
    )  # a process, numpy and the extension: about 0.2 s; torch alone would take longer than the limit
