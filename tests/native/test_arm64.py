"""The NEON kernels, from a machine without them: compiled by the cross compiler, read as machine code, run under emulation.

On a 64-bit Arm machine the same programs run as they are, and the suites of kernels and engine have NEON among their
instruction sets.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from native.conftest import ROOT, shell, tool
from native.test_export_c import follow
from runtime.test_kernels import FORMATS, check_product, check_product_of_codes, one_listener, padded, play
from sparsefold.formats import Format
from sparsefold.program import GRU, LSTM, Linear, Program, ReLU

CROSS = "aarch64-linux-gnu-"
F = np.float32
network = cache(cases.network)


def runner() -> list[str]:
    """What a program for 64-bit Arm is started with here."""
    if platform.machine() in ("aarch64", "arm64"):
        return []
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not found:
        pytest.skip("qemu-aarch64 is not installed: programs for 64-bit Arm cannot be run here.")
    return [found]


@pytest.fixture(scope="session")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C library's build folder, made for 64-bit Arm: libsparsefold.a, ``embed``, ``play`` and ``train_stress``."""
    if sys.byteorder != "little" or platform.system() != "Linux":
        pytest.skip("the cross compiler and its programs are those of Linux.")
    compiler, folder = tool(f"{CROSS}g++"), tmp_path_factory.mktemp("arm64")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    target += [f"-DCMAKE_C_COMPILER={tool(f'{CROSS}gcc')}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    target += ["-DCMAKE_EXE_LINKER_FLAGS=-static"]
    shell(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", "-DSPARSEFOLD_PYTHON=OFF", *target)
    shell(tool("cmake"), "--build", folder, "--target", "sparsefold_static", "train_stress")
    shell(
        tool(f"{CROSS}gcc"),
        "-c",
        "-std=c99",
        f"-I{ROOT / 'include'}",
        ROOT / "examples/embed.c",
        "-o",
        folder / "embed.o",
    )
    for source, name in [(ROOT / "tests/native/play.cpp", "play"), (folder / "embed.o", "embed")]:
        flags = [
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-static",
        ]  # static: emulation needs no system root
        shell(compiler, *flags, source, folder / "libsparsefold.a", "-o", folder / name)
    return folder


class Player:
    """``play`` as a process: what :func:`check_product` asks of a packed matrix and :func:`follow` of a player."""

    def __init__(self, arm64: Path) -> None:
        self.process = subprocess.Popen([*runner(), arm64 / "play"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, *words: bytes | np.ndarray, answer: int = 0) -> np.ndarray:
        for word in words:
            self.process.stdin.write(word if isinstance(word, bytes) else np.ascontiguousarray(word).tobytes())
        self.process.stdin.flush()
        given = self.process.stdout.read(4 * answer)
        assert len(given) == 4 * answer, f"play ended with status {self.process.wait()}."
        return np.frombuffer(given, F)

    def load(self, program: Program, isa: str) -> Player:
        raw = program.to_bytes()
        self.program = program
        self.ask(b"L", np.uint32(len(isa)), isa.encode(), np.uint32(len(raw)), raw)
        return self

    def load_matrix(self, matrix: Format, isa: str) -> Player:
        """``matrix`` as the input matrix of a layer of as many gates, whose recurrent matrix is empty."""
        rows, cols = matrix.shape
        bias, gates = np.zeros(rows, F), matrix.gates
        if gates == 1:
            layer = Linear(matrix, bias)
        else:
            hidden = sf.CSC.from_dense(np.zeros((rows, rows // gates)), gates)
            layer = {3: GRU, 4: LSTM}[gates](matrix, hidden, bias, bias)
        speaks = Linear(sf.Dense(np.zeros((cols, 1), F)), np.zeros(cols, F)), ReLU(cols)
        self.isa, self.packed = isa, None
        self.ops = {"dense": (layer,), "events": (*speaks, layer)}
        return self

    def pack(self, read: str) -> None:
        """The matrix for dense x or for events: what a layer reads says how it is packed."""
        if self.packed != read:
            self.load(Program(self.ops[read]), self.isa)
            self.packed = read

    def matvec(self, x: np.ndarray, out: np.ndarray) -> None:
        self.pack("dense")
        out[:] = self.ask(b"P", np.int32(-1), x.astype(F), out, answer=len(out))

    def matvec_events(self, index: np.ndarray, value: np.ndarray, out: np.ndarray) -> None:
        self.pack("events")
        out[:] = self.ask(b"P", np.int32(len(index)), index, value.astype(F), out, answer=len(out))

    def array(self, key: str) -> np.ndarray:
        op, name = key.split(".")
        size = self.program.ops[int(op)].carried()[name]
        return self.ask(b"R", np.uint32(op), np.uint32(len(name)), name.encode(), answer=size)

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        for key, values in state.items():
            op, name = key.split(".")
            self.ask(b"W", np.uint32(op), np.uint32(len(name)), name.encode(), values.astype(F))

    def step(self, x: np.ndarray) -> np.ndarray:
        x = np.int64(x) if self.program.takes_tokens else np.asarray(x, F)
        return self.ask(b"S", x, answer=self.program.outputs)

    def activations(self, x: np.ndarray) -> np.ndarray:
        return self.ask(b"A", np.uint32(len(x)), x.astype(F), answer=2 * len(x)).reshape(2, -1)


@pytest.fixture(scope="module")
def player(arm64: Path):
    made = Player(arm64)
    yield made
    made.process.communicate()
    assert made.process.returncode == 0


# --- what the compiler made of it ----------------------------------------------------------------------------------------


def innermost_loops(arm64: Path, function: str) -> list[str]:
    """The text of every loop of a NEON kernel that holds no other loop."""
    file = arm64 / "CMakeFiles/isa_neon.dir/native/isa_neon.cpp.o"
    command = [tool(f"{CROSS}objdump"), "-d", "-C", "-r", "--no-show-raw-insn", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = re.search(rf"^[0-9a-f]+ <sparsefold::neon::{function}\(.*?>:\n(.*?)(?:\n\n|\Z)", text, re.S | re.M)[1]
    lines = [(int(at, 16), line) for at, line in re.findall(r"^\s*([0-9a-f]+):\t(.*)", body, re.M)]
    jumps = [(at, re.match(r"(?:b|b\.\w+|t?cbn?z|tbn?z)\s+(?:.*, )?([0-9a-f]+) <", line)) for at, line in lines]
    loops = {(int(m[1], 16), at) for at, m in jumps if m and int(m[1], 16) <= at}
    inner = {a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)}
    return ["\n".join(line for at, line in lines if first <= at <= last) for first, last in inner]


@pytest.mark.parametrize("kernel", ["dense_f32", "events_dense_f32", "rows_f32", "events_block_f32"])
def test_hot_loops_multiply_and_add_whole_vectors(kernel, arm64):
    """Sixteen rows are four registers, and four such sums are under way. None of them lies in memory meanwhile."""
    loops = innermost_loops(arm64, f"matvec_{kernel}")
    hot = [loop for loop in loops if len(re.findall(r"^fmla\s+v\d+\.4s", loop, re.M)) == 16]
    assert hot, loops
    for loop in hot:
        assert not re.search(r"^(bl|blr)\s", loop, re.M), loop
        assert not re.search(r"\[sp\b", loop), loop
        assert not re.search(r"^(fmadd|fmul|fadd)\s", loop, re.M), loop


@pytest.mark.parametrize(("name", "table"), [("isa_neon", "kernels_neon"), ("train_neon", "sequences_neon")])
def test_an_object_offers_the_linker_nothing_but_its_table(name, table, arm64):
    file = arm64 / f"CMakeFiles/{name}.dir/native/{name}.cpp.o"
    command = [tool(f"{CROSS}nm"), "-C", "--defined-only", file]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    offered = [line.split()[1:] for line in listed.splitlines()]
    assert [" ".join(rest) for kind, *rest in offered if kind in "TWVDuB"] == [f"sparsefold::{table}"]


# --- what it computes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["f32", "bf16", "i8"])
@pytest.mark.parametrize("format", FORMATS)
def test_products_against_float64(format, precision, player):
    """Every storage, a share of its shapes; on an Arm machine tests/runtime/test_kernels.py goes through all."""
    for turn, storage in enumerate(FORMATS[format]):
        for case in cases.matrix_cases(storage)[turn % 9 :: 9]:
            matrix = case.make().rounded(precision)
            size = np.abs(matrix.to_dense().astype(np.float64))
            packed = player.load_matrix(matrix, "neon")
            check_product(case, matrix, size, packed, 1.0, False)
            for rate in cases.EVENT_RATES:
                check_product(case, matrix, size, packed, rate, True)


def test_products_of_codes_are_exact(player):
    for turn, storage in enumerate(cases.STORAGES):
        for case in cases.matrix_cases(storage)[turn % 9 :: 9]:
            matrix = case.make().rounded("w8a8")
            check_product_of_codes(case, matrix, player.load_matrix(matrix, "neon"))


def test_training_finds_what_plain_loops_find(arm64):
    done = subprocess.run([*runner(), arm64 / "train_stress"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("isa", ["neon", "generic"])
@pytest.mark.parametrize("name", cases.NETWORKS)
def test_every_network_follows_the_oracle(name, isa, player):
    follow(network(name), player.load(network(name), isa), 3)


@pytest.mark.parametrize("isa", ["neon", "generic"])
def test_activations_are_as_exact_as_stated(isa, player):
    player.load(network("linear"), isa)
    x = np.linspace(-100, 100, 2**14, dtype=F)
    sigmoid, tanh = player.activations(x)
    assert np.abs(sigmoid - (0.5 + 0.5 * np.tanh(x.astype(np.float64) / 2))).max() <= tolerances.SIGMOID_F32
    assert np.abs(tanh - np.tanh(x.astype(np.float64))).max() <= tolerances.TANH_F32
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e38, -1e38, 1e-40, *[1.0] * 8], F)
    sigmoid, tanh = player.activations(edges)
    np.testing.assert_allclose(sigmoid[:8], [0.5, 0.5, 1, 0, np.nan, 1, 0, 0.5], atol=2e-38, rtol=0)
    np.testing.assert_array_equal(tanh[:7], [0, 0, 1, -1, np.nan, 1, -1])


@pytest.mark.parametrize("isa", ["neon", "generic"])
@pytest.mark.parametrize(
    "storage", [None, (16, 1), (4, 1), (5, 3), "csc", cases.Overlay(4), cases.Overlay(4, 16)], ids=str
)
def test_what_is_not_finite_reaches_the_rows_that_listen_and_no_others(storage, isa, player):
    matrix, listen = one_listener(37, 21, 36, 6, storage)
    packed, x = player.load_matrix(matrix, isa), np.where(np.arange(21) == 6, np.nan, 0).astype(F)
    for events in (None, np.array([2, 6])):
        out, real = padded(matrix, np.full(111, 2.0, F), 0)
        play(packed, out, x, events)
        np.testing.assert_array_equal(np.isnan(out[real]), listen)
        assert (out[real][~listen] == 2.0).all()


@pytest.mark.parametrize("isa", ["neon", "generic"])
def test_a_decaying_state_ends_in_zero_and_never_in_denormals(isa, player):
    zeros = np.zeros((48, 16), F)
    silent = GRU(sf.Dense(zeros[:, :1], 3), sf.Dense(zeros, 3), zeros[:, 0], zeros[:, 0])  # z = 1/2: h halves
    player.load(Program((silent,)), isa).load_state({"0.h": np.ones(16, F)})
    for _ in range(126):
        out = player.step([0])
    assert (out == F(2.0**-126)).all()
    assert (player.step([0]) == 0).all()


@pytest.mark.parametrize("name", ["tokens-block", "mixed-3", "egru-overlay-16", "mixed-i8"])
def test_the_c_library_plays_as_this_processor_does(name, arm64, tmp_path):
    program = network(name)
    program.save(tmp_path / "a.sfold")
    x = cases.sequence(program, 25)
    given = "\n".join(" ".join(map(str, np.atleast_1d(v))) for v in x)
    done = subprocess.run(
        [*runner(), arm64 / "embed", tmp_path / "a.sfold"], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr.endswith(" neon kernels\n"), done.stderr
    out = np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()], F)
    expected = sf.Engine(program).stream().run(x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.FREE_RUNNING_F32)
