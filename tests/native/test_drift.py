"""A million steps: the float32 engine follows the equations in float64, which run freely beside it.

The reference is the exported C with ``double`` for ``float``; its first steps are compared with ``interpret``.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from native.conftest import shell, tool
from sparsefold.export_c import _HELPERS, write_c
from sparsefold.program import EGRU, Program, Recurrent

STEPS, CHUNK = 1_000_000, 20_000
DOUBLE = """#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#define float double
#define sqrtf sqrt
#include "net.c"
static net_state state;
void start(void) { net_reset(&state); }
"""

IN_DOUBLE = {
    "exp_minus": "",
    "sigmoid": "\nstatic double sigmoid(double x) { return 1 / (1 + exp(-x)); }\n",
}


class Float64:
    """A program that takes values and has no op but recurrent ones and a linear, in float64; it keeps its state."""

    def __init__(self, program: Program, folder) -> None:
        self.program = program
        source = write_c(program, folder, "net")[1]
        text = source.read_text()
        for name in ("exp_minus", "sigmoid"):  # they know the bits of a float
            assert _HELPERS[name] in text
            text = text.replace(_HELPERS[name], IN_DOUBLE[name])
        source.write_text(text)
        code, record, arguments = [DOUBLE], "", ""
        for i, op in enumerate(program.ops):
            if isinstance(op, EGRU):
                arguments += f", double *u{i}"
                either = f"state.y_{i}[j] != 0 ? state.y_{i}[j] : state.h_{i}[j]"  # y is u where it spoke, h elsewhere
                record += f"\n        for (j = 0; j < {op.outputs}; ++j) u{i}[t * {op.outputs} + j] = {either};"
                spoke = f"if (v[j] != 0) state.event_{i}[state.count_{i}++] = j;"
                code.append(
                    f"void write_{i}_y(const double *v) {{ uint32_t j; memcpy(state.y_{i}, v, sizeof state.y_{i}); "
                    f"state.count_{i} = 0; for (j = 0; j < {op.outputs}; ++j) {spoke} }}"
                )
            if isinstance(op, Recurrent):
                code += [
                    f"void write_{i}_{n}(const double *v) {{ memcpy(state.{n}_{i}, v, sizeof state.{n}_{i}); }}"
                    for n in op.state
                    if n != "y"
                ]
        code.append(
            f"void play(const double *x, size_t steps, double *y{arguments})\n{{\n    size_t t, j;\n    (void)j;\n"
            f"    for (t = 0; t < steps; ++t) {{\n"
            f"        net_step(&state, x + t * {program.inputs}, y + t * {program.outputs});{record}\n    }}\n}}\n"
        )
        (folder / "double.c").write_text("\n".join(code))
        shell(tool("cc"), "-std=c99", "-O2", "-shared", "-fPIC", folder / "double.c", "-o", folder / "double.so", "-lm")
        self.lib = ctypes.CDLL(str(folder / "double.so"))
        self.lib.start()

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        for key, values in state.items():
            array = np.asarray(values, np.float64)
            getattr(self.lib, f"write_{key.replace('.', '_')}")(ctypes.c_void_p(array.ctypes.data))

    def run(self, x: np.ndarray):
        """(outputs, {op: u of every EGRU}), float64, from the state in which the last call ended."""
        x = np.ascontiguousarray(x, np.float64)
        out = np.empty((len(x), self.program.outputs))
        u = {i: np.empty((len(x), op.outputs)) for i, op in enumerate(self.program.ops) if isinstance(op, EGRU)}
        where = [ctypes.c_void_p(a.ctypes.data) for a in (out, *u.values())]
        self.lib.play(ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(len(x)), *where)
        return out, u


def compare_with_interpret(program: Program, reference: Float64) -> None:
    """The reference is the equations: both from one state, to float64's rounding carried over some steps."""
    x, state = cases.sequence(program, 50, 9), cases.state(program, 9)
    reference.load_state(state)
    out, u = reference.run(x)
    oracle = sf.interpret(program, x, state)
    np.testing.assert_allclose(out, oracle.outputs, rtol=0, atol=1e-11)
    for i in u:
        np.testing.assert_allclose(u[i], oracle.u[i], rtol=0, atol=1e-11)
    reference.lib.start()


def test_a_million_steps_without_events_never_leave_the_reference(tmp_path, record_property) -> None:
    r = cases.rng(31)
    program = Program((
        cases.gru(r, 4, 24, (8, 1), 0.5), cases.lstm(r, 24, 17), cases.rnn(r, 17, 16), cases.linear(r, 16, 3),
    ))  # fmt: skip
    never_leaves(program, program, tmp_path, record_property)


def test_a_million_steps_of_changes_never_leave_the_dense_network(tmp_path, record_property) -> None:
    """Threshold 0 sends every change, so that the float64 network that sends none is the reference."""
    r = cases.rng(41)
    dense = Program((cases.gru(r, 4, 24, (8, 1), 0.5), cases.lstm(r, 24, 17), cases.linear(r, 17, 3)))
    sends = Program((*(cases.changes(op, 0, 0) for op in dense.ops[:2]), dense.ops[2]))
    never_leaves(sends, dense, tmp_path, record_property)


def never_leaves(played: Program, program: Program, tmp_path, record_property) -> None:
    reference, stream, worst = Float64(program, tmp_path), sf.Engine(played).stream(), []
    compare_with_interpret(program, reference)
    for chunk in range(STEPS // CHUNK):
        x = cases.sequence(program, CHUNK, chunk)
        worst.append(np.abs(stream.run(x) - reference.run(x)[0]).max())
    record_property("worst", max(worst))
    assert stream.counters.steps == STEPS
    assert 0 < max(worst) <= tolerances.FREE_RUNNING_F32
    early, late = (max(part) for part in (worst[: len(worst) // 2], worst[len(worst) // 2 :]))
    assert late <= 4 * early  # what is wrong does not grow with time: neither half is the worse


def events_network() -> Program:
    r = cases.rng(37)
    return Program((
        cases.egru(r, 4, 24, (8, 1), 0.5), cases.egru(r, 24, 17, reset="none", output="state"), cases.linear(r, 17, 3),
    ))  # fmt: skip


def follow(played: Program, program: Program, reference: Float64, steps: int):
    """(how often they parted, the largest error of an output, events) of the engine playing ``played`` beside the reference.

    The rule for events: as long as all units spoke alike the outputs agree; the first that do not stood within the tolerance
    of their thresholds, where either is right, and the reference goes on from the engine's state.
    """
    engine = sf.Engine(played)
    stream, again = engine.stream(), engine.stream()
    threshold = {i: op.threshold for i, op in enumerate(program.ops) if isinstance(op, EGRU)}
    parted, worst, spoken = 0, 0.0, 0
    for chunk in range(steps // CHUNK):
        x, before = cases.sequence(program, CHUNK, chunk), stream.save_state()
        out, events = stream.run_traced(x)
        spoken += sum(int(e.sum()) for e in events.values())
        start = 0
        while start < CHUNK:
            expected, u = reference.run(x[start:])
            other = {i: (u[i] > threshold[i]) != events[i][start:] for i in threshold}
            apart = np.flatnonzero(np.any([o.any(1) for o in other.values()], 0))
            alike = int(apart[0]) if len(apart) else CHUNK - start
            worst = max(worst, np.abs(out[start : start + alike] - expected[:alike]).max(initial=0))
            if not len(apart):
                break
            first = next(i for i in threshold if other[i][alike].any())  # later ops heard something else
            distance = np.abs(u[first][alike] - threshold[first])[other[first][alike]]
            assert (distance <= tolerances.FREE_RUNNING_F32).all(), (chunk, start + alike, distance)
            parted, start = parted + 1, start + alike + 1
            again.load_state(before)
            again.run(x[:start])
            reference.load_state(again.save_state())
    assert stream.counters.steps == steps
    assert 0 < worst <= tolerances.FREE_RUNNING_F32, worst
    return parted, worst, spoken


def test_a_million_steps_of_events_part_only_where_a_unit_stands_at_its_threshold(tmp_path, record_property) -> None:
    program = events_network()
    reference = Float64(program, tmp_path)
    compare_with_interpret(program, reference)
    parted, worst, spoken = follow(program, program, reference, STEPS)
    record_property("parted", parted)
    record_property("worst", worst)
    assert spoken > STEPS  # they do speak
    # A unit speaks otherwise where u is wrong by more than it lacks: with an error of some 1e-7 and u spread over about 1,
    # once in some 1e7 updates of a unit, and there are 4.1e7 of them. A hundred times as often is a fault.
    assert parted <= 400


def other_bias(program: Program, by: float) -> Program:
    first = program.ops[0]
    return Program((replace(first, bias_ih=first.bias_ih + np.float32(by)), *program.ops[1:]))


def test_the_rule_sees_units_part_and_refuses_a_wrong_network(tmp_path) -> None:
    program = events_network()
    parted, worst, _ = follow(other_bias(program, 1e-5), program, Float64(program, tmp_path), 3 * CHUNK)
    assert parted > 3 and worst > 1e-6  # it parts, goes on from the engine's state, and holds
    with pytest.raises(AssertionError):
        follow(other_bias(program, 3e-3), program, Float64(program, tmp_path), CHUNK)
