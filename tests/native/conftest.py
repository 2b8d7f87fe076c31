"""What the native tests share: the C library as a user builds it, and the core compiled once under each sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from sparsefold import _native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-w"],
}
FLAGS["avx512vnni"] = [*FLAGS["avx512"], "-mavx512vnni", "-mavx512vbmi2"]
CORE = [f"native/{name}.cpp" for name in ("dispatch", "program", "engine", "load", "c_api")]


def tool(name: str) -> str:
    """The path of a program, beside this Python or on the path; the test is skipped where it is missing."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: this test builds with it.")
    return found


def shell(*words: object) -> None:
    """Runs a command; what it said is the failure."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def c_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of ``cmake -DSPARSEFOLD_PYTHON=OFF``: libsparsefold.so, libsparsefold.a, embed."""
    folder = tmp_path_factory.mktemp("c")
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    shell(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", ninja, "-DSPARSEFOLD_PYTHON=OFF")
    shell(tool("cmake"), "--build", folder)
    return folder


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[str], str], Path]:
    """A function (sanitizer, sources, name) -> a program of these sources and the core, compiled with that sanitizer.

    How threads meet is one text for all instruction sets: under the thread sanitizer there is plain C++ alone.
    """
    compiler = tool("g++")

    def flags(sanitizer: str) -> list[str]:
        sets = [] if sanitizer == "thread" else ["-DSPARSEFOLD_X86=1"]
        checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        return ["-O1", "-g1", "-Wall", "-Wextra", *checks, *sets, f"-I{ROOT / 'include'}"]

    def kernels(family: str, sanitizer: str) -> list[str]:
        sets = ["generic"] if sanitizer == "thread" else list(FLAGS)
        return [source for name in sets if (ROOT / (source := f"native/{family}_{name}.cpp")).exists()]

    @cache
    def core(sanitizer: str) -> list[str]:
        folder = tmp_path_factory.mktemp("sanitized")
        probe = folder / "probe.cpp"
        probe.write_text("#if !defined(__x86_64__)\n#error\n#endif\nint main() {}\n")
        command = [compiler, *flags(sanitizer), str(probe), "-o", str(folder / "probe")]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"this machine's g++ cannot link -fsanitize={sanitizer} for x86-64.")
        return compiled(sanitizer, [*kernels("isa", sanitizer), *CORE], folder)

    def compiled(sanitizer: str, sources: list[str], folder: Path) -> list[str]:
        def command(source: str) -> list[str]:
            stem = Path(source).stem
            isa = stem.partition("_")[2]
            more = [*FLAGS.get(isa, [])]
            if isa in FLAGS and sanitizer != "thread":  # compiling the kernels takes minutes otherwise
                more += ["-O0"] if isa in _native.available_isas() else ["-O0", "-fno-sanitize=all"]
            kind = ["-std=c99", "-pedantic"] if source.endswith(".c") else ["-std=c++17"]
            program = tool("gcc") if source.endswith(".c") else compiler
            return [program, *flags(sanitizer), *kind, *more, "-c", str(ROOT / source), "-o", str(folder / f"{stem}.o")]

        commands = [command(source) for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda words: shell(*words), commands))
        return [words[-1] for words in commands]

    def build(sanitizer: str, sources: list[str], name: str) -> Path:
        objects = core(sanitizer)
        folder = tmp_path_factory.mktemp(name)
        trains = kernels("train", sanitizer) if "native/train.cpp" in sources else []
        objects = [*compiled(sanitizer, [*trains, *sources], folder), *objects]
        shell(compiler, *flags(sanitizer), *objects, "-o", folder / name)
        return folder / name

    return build


@pytest.fixture(scope="session", params=["shared", "static", "address,undefined"])
def embed(request, c_build, sanitized, tmp_path_factory) -> Path:
    """examples/embed.c, built with plain cc against either library, and under the sanitizers."""
    if request.param == "address,undefined":
        return sanitized(request.param, ["examples/embed.c"], "embed")
    folder = tmp_path_factory.mktemp("embed")
    how = ["-L", c_build, "-lsparsefold", f"-Wl,-rpath,{c_build}"]
    if request.param == "static":
        how = [c_build / "libsparsefold.a", "-lstdc++", "-lm", "-pthread"]
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    shell(tool("cc"), *strict, "-I", ROOT / "include", ROOT / "examples/embed.c", "-o", folder / "embed", *how)
    return folder / "embed"
