"""sparsefold export-c: the C compiles without a warning and follows interpret() from every state, within the derived bounds."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from native.conftest import shell, tool
from sparsefold.cli import main
from sparsefold.export_c import _hex, c_name, export_c, write_c
from sparsefold.program import EGRU, Conv1d, Linear, Program, Recurrent, ReLU

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
F = np.float32
network = cache(cases.network)


class Exported:
    """A program as C: compiled together with functions that reach into its state."""

    def __init__(self, program: Program, folder, fold=None) -> None:
        self.program = program
        write_c(program, folder, "net", fold)
        code = ['#include "net.c"', "net_state state;"]
        for i, op in enumerate(program.ops):
            if isinstance(op, Recurrent):
                code += [f"float *{n}_{i}(void) {{ return state.{n}_{i}; }}" for n in op.carried() if n != "age"]
                code += [f"uint32_t *age_{i}(void) {{ return &state.age_{i}; }}"] * ("age" in op.carried())
            if isinstance(op, Conv1d) and op.history:
                code += [f"float *x_{i}(void) {{ state.at_{i} = 0; return state.x_{i}; }}"]
            if isinstance(op, EGRU):
                code += [
                    f"void spoke_{i}(void) {{ uint32_t j; state.count_{i} = 0; for (j = 0; j < {op.outputs}; ++j)",
                    f"    if (state.y_{i}[j] != 0) state.event_{i}[state.count_{i}++] = j; }}",
                ]
        (folder / "harness.c").write_text("\n".join(code) + "\n")
        shell(tool("cc"), *STRICT, "-shared", "-fPIC", folder / "harness.c", "-o", folder / "net.so", "-lm")
        self.lib = ctypes.CDLL(str(folder / "net.so"))
        self.state = ctypes.addressof(ctypes.c_char.in_dll(self.lib, "state"))
        self.lib.net_reset(ctypes.c_void_p(self.state))

    def array(self, key: str) -> np.ndarray:
        op, name = key.split(".")
        function = getattr(self.lib, f"{name}_{op}")
        function.restype = ctypes.POINTER(ctypes.c_uint32 if name == "age" else ctypes.c_float)
        found = self.program.ops[int(op)]
        shape = (found.history, found.inputs) if isinstance(found, Conv1d) else (found.carried()[name],)
        return np.ctypeslib.as_array(function(), shape)

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        for key, values in state.items():
            self.array(key)[:] = values
            if key.endswith(".y"):
                getattr(self.lib, f"spoke_{key[:-2]}")()

    def step(self, x) -> np.ndarray:
        y = np.full(self.program.outputs, np.nan, F)
        x = (
            ctypes.c_uint32(int(x))
            if self.program.takes_tokens
            else np.ascontiguousarray(x, F).ctypes.data_as(ctypes.c_void_p)
        )
        assert self.lib.net_step(ctypes.c_void_p(self.state), x, y.ctypes.data_as(ctypes.c_void_p)) == 0
        return y


def follow(program: Program, exported: Exported, steps: int) -> None:
    """Teacher-forces every step from the oracle's state and compares outputs, events and the state that is carried."""
    state = cases.state(program)
    for x in cases.sequence(program, steps):
        exported.load_state(state)
        out = exported.step(x)
        oracle = sf.interpret(program, [x], state)
        bounds = tolerances.program_step(program, x, state)
        value, bound = bounds["out"]
        assert (np.abs(out - value) <= bound).all()
        for i, op in enumerate(program.ops):
            if isinstance(op, EGRU):
                u, bound = bounds[f"{i}.u"]
                y, h = exported.array(f"{i}.y"), exported.array(f"{i}.h")
                spoke = y != 0
                decided = np.abs(u - op.threshold) > bound if op.event == "threshold" else np.ones(len(u), bool)
                np.testing.assert_array_equal(spoke[decided], oracle.events[i][0][decided])
                assert (np.abs(y - u)[spoke] <= bound[spoke]).all()
                carried = u - spoke * op.threshold if op.reset == "threshold" else u
                assert (np.abs(h - carried) <= bound + tolerances.EPS32 * (np.abs(u) + op.threshold)).all()
            elif isinstance(op, Recurrent):
                for name in op.carried():
                    value, bound = bounds[f"{i}.{name}"]
                    assert (np.abs(exported.array(f"{i}.{name}") - value) <= bound).all()
        state = {key: array.astype(F) for key, array in oracle.state.items()}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", cases.NETWORKS)
def test_every_network_follows_the_oracle(name, fold, tmp_path):
    program = network(name)
    second = program.ops[1] if program.takes_tokens and len(program.ops) > 1 else None
    foldable = isinstance(second, Recurrent) and second.delta_input is None
    if fold and not foldable:
        with pytest.raises(ValueError, match="only an embedding in front of a recurrent layer can be folded"):
            export_c(program, "net", fold=True)
        return
    exported = Exported(program, tmp_path, fold)
    assert ("table[" in (tmp_path / "net.c").read_text()) == fold
    follow(program, exported, 8)


@pytest.mark.parametrize("options", cases.EGRU_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_follows_the_oracle(options, tmp_path):
    r, block = cases.rng(7), (5, 3) if options["reset"] == "output" else None
    program = Program((cases.egru(r, 9, 19, block, 0.5, **options), cases.linear(r, 19, 3)))
    follow(program, Exported(program, tmp_path), 6)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("storage", [None, (8, 4), (16, 1), "csc", *cases.OVERLAYS, *cases.GROUPED_OVERLAYS], ids=str)
def test_gru_follows_the_oracle(storage, reset_after, tmp_path):
    program = Program((cases.gru(cases.rng(4), 5, 37, storage, 0.6, reset_after),))
    follow(program, Exported(program, tmp_path), 8)


@pytest.mark.parametrize("storage", [(4, 1), "csc", cases.Overlay(4, 2)], ids=str)
def test_a_matrix_of_zeros_is_written(storage, tmp_path):
    program = Program((cases.egru(cases.rng(4), 5, 17, storage, 0.0), cases.linear(cases.rng(5), 17, 3, storage, 0.0)))
    follow(program, Exported(program, tmp_path), 4)


@pytest.mark.parametrize("precision", ["f32", "bf16", "i8", "w8a8"])
@pytest.mark.parametrize(
    "storage", [None, (8, 4), (16, 1), (5, 3), (1, 8), "csc", cases.Overlay(4), cases.Overlay(2, 4)], ids=str
)
def test_every_precision_of_every_format_follows_the_oracle(storage, precision, tmp_path):
    r, density = cases.rng(6), None if isinstance(storage, cases.Overlay) else 0.4
    share = {} if density is None or storage is None else {"density": density}
    ops = cases.linear(r, 13, 37, storage, **share), ReLU(37), cases.linear(r, 37, 22, storage, **share)
    program = Program(ops).rounded(precision)  # the first reads all of x by rows, the second events by columns
    follow(program, Exported(program, tmp_path), 6)
    source = (tmp_path / "net.c").read_text()
    stored = {"f32": "float", "bf16": "uint16_t"}.get(precision, "int8_t")
    for i in (0, 2):
        assert f"static const {stored} weight_{i}_values[" in source and ("scale" in source) == (stored == "int8_t")


def test_constants_take_no_more_than_the_file_says(tmp_path):
    r = cases.rng(2)
    ops = cases.egru(r, 64, 160, (16, 1), 0.1), cases.egru(r, 160, 64, (4, 4), 0.2), cases.linear(r, 64, 40)
    for precision in ("f32", "bf16", "i8"):
        program = Program(ops).rounded(precision)
        header, _ = export_c(program, "net")
        written = int(header.split("Constants take ")[1].split()[0])
        assert written <= program.nbytes


def test_indices_beyond_16_bits(tmp_path):
    weight = np.zeros((3, 70_000), F)
    weight[[0, 1, 2, 2], [0, 65_536, 69_999, 40]] = 1, 2, 3, 4
    csc, block = sf.formats.CSC.from_dense(weight), sf.formats.Block.from_dense(weight, (2, 4))
    for k, matrix in enumerate((csc, block)):
        folder = tmp_path / str(k)
        folder.mkdir()
        exported = Exported(Program((Linear(matrix, np.zeros(3, F)),)), folder)
        assert (exported.step(np.arange(70_000)) == [0, 2 * 65_536, 3 * 69_999 + 160]).all()


def test_it_plays_along_with_the_engine_from_the_start(tmp_path):
    program = network("gru-block-2")
    exported, x = Exported(program, tmp_path), cases.sequence(program, 20)
    expected = sf.Engine(program).stream().run(x)
    for _ in range(2):
        played = np.array([exported.step(v) for v in x])
        np.testing.assert_allclose(played, expected, rtol=0, atol=tolerances.FREE_RUNNING_F32)
        exported.lib.net_reset(ctypes.c_void_p(exported.state))


def test_an_unknown_token_changes_nothing(tmp_path):
    exported = Exported(network("tokens"), tmp_path)
    y = np.full(7, 5, F)
    for token in (7, 2**32 - 1):
        arguments = ctypes.c_void_p(exported.state), ctypes.c_uint32(token), y.ctypes.data_as(ctypes.c_void_p)
        assert exported.lib.net_step(*arguments) == -1
    assert (y == 5).all() and (exported.array("1.h") == 0).all()


def test_weights_are_written_exactly(tmp_path):
    values = [*cases.vector(cases.rng(1), 50), 0.0, 1e-45, -1.1754944e-38, 3.4028235e38, 1.0, -0.5, 16777216.0]
    values = np.array(values, F)
    (tmp_path / "a.c").write_text(
        f"#include <stdio.h>\nstatic const float a[] = {{{', '.join(_hex(v) for v in values.tolist())}}};\n"
        "int main(void) { fwrite(a, sizeof a, 1, stdout); return 0; }\n"
    )
    shell(tool("cc"), *STRICT, tmp_path / "a.c", "-o", tmp_path / "a")
    assert subprocess.run([tmp_path / "a"], capture_output=True, check=True).stdout == values.tobytes()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_not_a_number_reaches_whoever_listens(nonlinearity, tmp_path):
    r = cases.rng(8)
    layers = cases.rnn(r, 3, 17, nonlinearity=nonlinearity), ReLU(17), cases.linear(r, 17, 2)
    exported = Exported(Program(layers), tmp_path)
    assert np.isfinite(exported.step(np.zeros(3))).all()
    assert np.isnan(exported.step([0, np.nan, 0])).all()
    exported.lib.net_reset(ctypes.c_void_p(exported.state))
    assert np.isfinite(exported.step(np.zeros(3))).all()


@pytest.mark.parametrize("precision", ["f32", "w8a8"])
@pytest.mark.parametrize("make", [cases.gru, cases.lstm, cases.egru], ids=lambda make: make.__name__)
def test_not_a_number_is_kept_by_gates(make, precision, tmp_path):
    r = cases.rng(8)
    program = Program((make(r, 3, 17), cases.linear(r, 17, 2))).rounded(precision)
    exported = Exported(program, tmp_path)
    for wrong in (np.nan, np.inf) if precision == "w8a8" else (np.nan,):  # a gate of an infinite sum is open or shut
        assert np.isfinite(exported.step(np.ones(3))).all()
        assert np.isnan(exported.step([0, wrong, 0])).all()
        assert np.isnan(exported.step(np.zeros(3))).all()
        exported.lib.net_reset(ctypes.c_void_p(exported.state))


@pytest.mark.parametrize("name", ["three", "layer-norm-of-events", "relu-recurrent", "lstm-overlay", "csc"])
def test_the_file_needs_math_and_nothing_else(name, tmp_path):
    write_c(network(name), tmp_path, "net")
    shell(tool("cc"), *STRICT, "-ffreestanding", "-fno-pie", "-c", tmp_path / "net.c", "-o", tmp_path / "net.o")
    named = subprocess.run([tool("nm"), tmp_path / "net.o"], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in named.splitlines()]
    assert {s[-1] for s in symbols if s[-2] == "U"} <= {"sqrtf", "_GLOBAL_OFFSET_TABLE_"}
    assert not [s for s in symbols if s[-2] in "bBdDC"]  # nothing that can be written to
    assert {s[-1] for s in symbols if s[-2] == "T"} == {"net_reset", "net_step"}


def test_folding_is_chosen_where_it_saves_memory():
    r = cases.rng(3)
    few = Program((cases.embedding(r, 4, 64), cases.egru(r, 64, 16)))
    many = Program((cases.embedding(r, 400, 4), cases.egru(r, 4, 16)))
    assert "table[" in export_c(few, "a")[1] and "table[" not in export_c(many, "a")[1]


def test_a_program_that_plays_whole_sequences_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"reads the sequence backwards\. Play it with the library: sparsefold_run_values"
    ):
        write_c(network("two-ways-gru"), tmp_path, "net")
    assert not list(tmp_path.iterdir())


def test_names():
    assert [c_name(n) for n in ("net", "my net-2", "2fast", "_x_", "größe", "a.b")] == [
        "net", "my_net_2", "net_2fast", "x", "gr_e", "a_b"
    ]  # fmt: skip
    for wrong in ("", "__", "é"):
        with pytest.raises(ValueError, match="no C name can be made of"):
            c_name(wrong)


def test_the_command(tmp_path, capsys):
    file, folder = tmp_path / "my net.sfold", tmp_path / "a/b"
    network("tokens").save(file)
    assert main(["export-c", str(file), "-o", str(folder)]) == 0
    assert {p.name for p in folder.iterdir()} == {"my_net.c", "my_net.h"}
    assert "my_net.c" in capsys.readouterr().out
    shell(tool("cc"), *STRICT, "-c", folder / "my_net.c", "-o", tmp_path / "a.o")
    assert main(["export-c", str(file), "-o", str(folder), "--name", "other", "--fold"]) == 0
    assert "other_step" in (folder / "other.h").read_text() and "table[" in (folder / "other.c").read_text()
    for words, said in [
        ([str(file), "-o", str(file)], "it is a file. Name a folder."),
        ([str(tmp_path / "none.sfold"), "-o", str(folder)], "No such file or directory."),
        ([str(file), "-o", str(folder), "--name", "é"], "no C name can be made of 'é'"),
    ]:
        assert main(["export-c", *words]) == 2
        assert said in capsys.readouterr().err
