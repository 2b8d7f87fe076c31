"""The engine against interpret(), step by step from the same state, and what a stream promises besides numbers."""

import ctypes
import gc
import os
import platform
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold import _native
from sparsefold.program import EGRU, GRU, LSTM, RNN, Picks, Program, Recurrent, ReLU, Speaking

network = cache(cases.network)
TOKENS = [name for name in cases.NETWORKS if network(name).takes_tokens]
F = np.float32
Z = np.zeros


def same_bits(a, b):
    """Equal to the last bit; a NaN equals itself."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same_bits(a[key], b[key])
    else:
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def foldable(program):
    """A product of changes is not one of the token alone."""
    return len(program.ops) > 1 and isinstance(program.ops[1], Recurrent) and program.ops[1].delta_input is None


def follow(program, engine, steps, salt=0):
    """Teacher-forces every step from the oracle's state and checks outputs, u, events and the state that is carried.

    Returns how many events there were, how many could have fallen either way, and the largest error by its bound.
    """
    stream, worst, spoken, close = engine.stream(), 0.0, 0, 0
    state = cases.state(program, salt)
    for x in cases.sequence(program, steps, salt):
        stream.load_state(state)
        out, emitted = stream.run_traced(np.array([x]))
        oracle = sf.interpret(program, [x], state)
        bounds = tolerances.program_step(program, x, state)
        after = stream.save_state()

        def near(mine, theirs, key, bounds=bounds):
            nonlocal worst
            value, bound = bounds[key]
            error = np.abs(mine - theirs)
            assert (error <= bound).all(), (key, (error - bound).max())
            worst = max(worst, error[bound > 0].max(initial=0) / bound.max(initial=1e-300))
            return value

        value = near(out[0], oracle.outputs[0], "out")
        np.testing.assert_allclose(
            value, oracle.outputs[0], rtol=1e-9, atol=1e-12
        )  # the bound follows the same network
        for i, op in enumerate(program.ops):
            if isinstance(op, EGRU):
                u, exact, bound = stream.internal(i), oracle.u[i][0], bounds[f"{i}.u"][1]
                near(u, exact, f"{i}.u")
                decided = np.abs(exact - op.threshold) > bound if op.event == "threshold" else np.ones(len(u), bool)
                event = emitted[i][0]
                np.testing.assert_array_equal(event[decided], oracle.events[i][0][decided])
                same_bits(after[f"{i}.y"], np.where(event, u, F(0)))
                carried = u - np.where(event, op.threshold, F(0)) if op.reset == "threshold" else u
                same_bits(after[f"{i}.h"], carried)
                spoken, close = spoken + event.sum(), close + (~decided).sum()
            elif isinstance(op, Picks):
                x, bound = bounds[f"{i}.u"]
                decided = np.abs(x) > bound
                np.testing.assert_array_equal(emitted[i][0][decided], oracle.events[i][0][decided])
                spoken, close = spoken + emitted[i].sum(), close + (~decided).sum()
            elif isinstance(op, Recurrent):
                for name in op.carried():
                    near(after[f"{i}.{name}"], oracle.state[f"{i}.{name}"], f"{i}.{name}")
        state = {key: array.astype(F) for key, array in oracle.state.items()}
    return spoken, close, worst


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", cases.NETWORKS)
def test_every_network_follows_the_oracle(name, fold, isa):
    program = network(name)
    if fold and not program.takes_tokens:
        fold = "auto"
    engine = sf.Engine(program, fold=fold, isa=isa)
    assert engine.isa == isa
    assert engine.folded == (fold is True and foldable(program))
    _, _, worst = follow(program, engine, 12)
    assert (worst > 0) == (name != "embedding")  # float32 is not float64: the comparison sees the difference


ROUNDED = ["tokens-2", "mixed-3", "csc", "gru-overlay", "egru-overlay-16", "lstm-block-2"]


@pytest.mark.parametrize("precision", ["bf16", "i8", "w8a8"])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_network_follows_the_oracle(name, precision, isa):
    program = network(name).rounded(precision)
    spoken, close, _ = follow(program, sf.Engine(program, isa=isa), 12)
    assert close <= spoken // 10 + 1
    folded, unfolded = (
        sf.Engine(program, isa=isa, fold=f).stream().run(cases.sequence(program, 5)) for f in (True, False)
    )
    same_bits(folded, unfolded)


@pytest.mark.parametrize("storage", [None, (8, 1), (16, 1), "csc", cases.Overlay(4), cases.Overlay(2, 16)], ids=str)
@pytest.mark.parametrize("options", cases.EGRU_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_follows_the_oracle(options, storage, isa):
    r = cases.rng(7)
    program = Program((cases.egru(r, 19, 37, storage, 0.5, **options), cases.linear(r, 37, 3)))
    spoken, close, _ = follow(program, sf.Engine(program, isa=isa), 8)
    units = 8 * 37
    assert spoken == units if options["event"] == "always" else units / 10 < spoken < units * 0.9
    assert close <= 2


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("storage", [None, (8, 4), (16, 1), "csc", cases.Overlay(4)], ids=str)
@pytest.mark.parametrize("units", [1, 16, 37])
def test_gru_follows_the_oracle(units, storage, reset_after, isa):
    program = Program((cases.gru(cases.rng(units), 5, units, storage, 0.6, reset_after),))
    follow(program, sf.Engine(program, isa=isa), 12)


@pytest.mark.parametrize("block", [None, (8, 4), (16, 1)])
@pytest.mark.parametrize("units", [1, 16, 37])
@pytest.mark.parametrize("kind", ["lstm", "rnn", "rnn-relu"])
def test_lstm_and_rnn_follow_the_oracle(kind, units, block, isa):
    make = {"lstm": cases.lstm, "rnn": cases.rnn, "rnn-relu": partial(cases.rnn, nonlinearity="relu")}[kind]
    program = Program((make(cases.rng(units), 5, units, block, 0.6),))
    follow(program, sf.Engine(program, isa=isa), 12)


@pytest.mark.parametrize("precision", ["f32", "bf16", "i8", "w8a8"])
@pytest.mark.parametrize(
    "storage", [None, (16, 1), (8, 4), (5, 3), "csc", cases.Overlay(4), cases.Overlay(2, 16)], ids=str
)
def test_a_convolution_follows_the_oracle_in_every_format(storage, precision, isa):
    r = cases.rng(6)
    ops = cases.conv1d(r, 9, 37, 3, 2, 1, storage, 0.6), ReLU(37), cases.conv1d(r, 37, 17, 2, 3, 1, storage, 0.6)
    program = Program(ops).rounded(precision)
    follow(program, sf.Engine(program, isa=isa), 12)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 3), (2, 1), (3, 4), (7, 2)])
@pytest.mark.parametrize("emits", [True, False])
def test_a_convolution_is_the_sum_over_a_sequence_with_zeros_in_front(kernel, dilation, emits, isa):
    r = cases.rng(kernel, dilation)
    op = cases.conv1d(r, 5, 19, kernel, dilation)
    program = Program((cases.Events(5), op) if emits else (op,))
    x, steps = cases.sequence(program, 40), 40
    taps = op.weight.to_dense().astype(np.float64).reshape(19, kernel, 5)
    expected = np.tile(op.bias.astype(np.float64), (steps, 1))
    for t in range(steps):
        for k in range(kernel):
            if (then := t - (kernel - 1 - k) * dilation) >= 0:
                expected[t] += taps[:, k] @ x[then]
    size = np.abs(taps).sum((1, 2)) * np.abs(x).max() + np.abs(op.bias)
    stream = sf.Engine(program, isa=isa).stream()
    played = stream.run(x)
    assert (np.abs(played - expected) <= tolerances.product_f32(5 * kernel + 1, size)).all()
    np.testing.assert_allclose(sf.interpret(program, x).outputs, expected, rtol=1e-12, atol=1e-12)
    stream.reset()
    same_bits(stream.run(x), played)
    if kernel > 1:
        np.testing.assert_array_equal(stream.save_state()[f"{int(emits)}.x"], x[steps - op.history :])


def test_silent_inputs_of_a_convolution_cost_nothing():
    op = cases.conv1d(cases.rng(1), 6, 8, 3, 2)
    stream = sf.Engine(Program((cases.Events(6), op))).stream()
    x = Z((9, 6), F)
    x[0, 2] = x[5, 4] = 1  # the second is read by two taps until the end, the first by all three
    stream.run(x)
    assert stream.counters.input_reads[1].reshape(3, 6)[:, [2, 4]].tolist() == [[1, 0], [1, 1], [1, 1]]
    assert stream.cost.macs_effective == 8 * 5
    assert stream.cost.bytes_state == 8 * (2 + 5 + 2)  # emitted, read by a tap, remembered


@pytest.mark.parametrize("emits", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_every_tap_of_a_convolution_and_leaves(bad, emits, isa):
    op = cases.conv1d(cases.rng(1), 6, 8, 3, 2)
    stream = sf.Engine(Program((cases.Events(6), op) if emits else (op,)), isa=isa).stream()
    x = Z((7, 6), F)
    x[0, 3] = bad
    first = stream.run(x[:2])
    stream.load_state(stream.save_state())
    seen = ~np.isfinite(np.concatenate([first, stream.run(x[2:])]))
    assert seen.all(1).tolist() == seen.any(1).tolist() == [True, False, True, False, True, False, False]


@pytest.mark.parametrize("field", ["weight", "bias", "dilation"])
def test_the_bound_notices_one_wrong_number_of_a_convolution(field):
    right = cases.conv1d(cases.rng(3), 9, 17, 3, 2)
    if field == "dilation":
        wrong = replace(right, dilation=1)
        x = cases.sequence(Program((right,)), 6)
        a, b = (sf.Engine(Program((op,))).stream().run(x) for op in (right, wrong))
        assert np.abs(a - b).max() > 0.1
        return
    array = (right.weight.values if field == "weight" else right.bias).copy()
    array.flat[5] += 0.01
    wrong = replace(right, **{field: sf.Dense(array) if field == "weight" else array})
    follow(Program((right,)), sf.Engine(Program((right,))), 6)
    with pytest.raises(AssertionError):
        follow(Program((right,)), sf.Engine(Program((wrong,))), 6)


@pytest.mark.parametrize("shape", [(4, 8), (3, 9), (36,), (5, 9)])
def test_a_history_of_another_shape_is_refused(shape):
    stream = sf.Engine(Program((cases.conv1d(cases.rng(3), 9, 17, 3, 2),))).stream()
    with pytest.raises(ValueError, match=r"this program has 4 inputs of 9 values there. Pass what save_state"):
        stream.load_state({"0.x": Z(shape, F)})
    for name, values in (("x", Z(35, F)), ("x", Z(0, F)), ("h", Z(0, F)), ("h", Z(17, F))):
        with pytest.raises(ValueError, match=r"cannot write|no state"):
            stream._core.write(0, name, values)


@pytest.mark.parametrize("change", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("make", [cases.lstm, cases.rnn])
def test_the_bound_notices_one_wrong_number_of_each_gate(make, change):
    program = Program((make(cases.rng(3), 19, 37),))
    op = program.ops[0]
    before = getattr(op, change)
    for gate in range(op.gates):
        array = (before.values if isinstance(before, sf.Dense) else before).copy()
        array[gate * 37 + 5] += 0.01
        wrong = replace(op, **{change: sf.Dense(array, op.gates) if isinstance(before, sf.Dense) else array})
        with pytest.raises(AssertionError):
            follow(program, sf.Engine(Program((wrong,))), 6)


@pytest.mark.parametrize("change", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "threshold"])
def test_the_bound_notices_one_wrong_number(change):
    r = cases.rng(3)
    program = Program((cases.egru(r, 19, 37, output="state"),))
    right, op = sf.Engine(program), program.ops[0]
    follow(program, right, 6)
    before = getattr(op, change)
    array = (before.values if isinstance(before, sf.Dense) else before).copy()
    array.flat[5] += 0.01
    wrong = {f: getattr(op, f) for f in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "threshold")}
    wrong[change] = sf.Dense(array, 3) if isinstance(before, sf.Dense) else array
    with pytest.raises(AssertionError):
        follow(program, sf.Engine(Program((EGRU(**wrong, output="state"),))), 6)


@pytest.mark.parametrize(
    "changed", [{"reset": "none"}, {"event": "always"}, {"zoneout": 0.01}, {"reset_after": False}, {"output": "events"}]
)
def test_the_bound_notices_another_option(changed):
    def make(**options):
        return Program((cases.egru(cases.rng(3), 19, 37, **{"output": "state", **options}),))

    with pytest.raises(AssertionError):
        follow(make(), sf.Engine(make(**changed)), 6)


def test_a_cell_that_always_speaks_with_no_threshold_is_a_gru(isa):
    egru = cases.egru(cases.rng(2), 9, 33, event="always", reset="none")
    gru = GRU(egru.weight_ih, egru.weight_hh, egru.bias_ih, egru.bias_hh)
    x = cases.sequence(Program((gru,)), 30)
    ours, theirs = (sf.Engine(Program((op,)), isa=isa).stream().run(x) for op in (egru, gru))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_interpret_is_the_equations_written_out():
    """The oracle itself against one unit, by hand, with numbers that differ in every place."""
    w = lambda *v: np.array(v, F).reshape(3, 1)  # noqa: E731
    op = EGRU(
        sf.Dense(w(0.5, -0.25, 2), 3), sf.Dense(w(1, 0.75, -1.5), 3), np.array([0.25, 0.5, -0.125], F),
        np.array([-0.5, 0.125, 1], F), threshold=np.array([0.25], F), reset="output", zoneout=0.25,
    )  # fmt: skip
    x, y, h = 1.5, 0.5, 0.75
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    r, z = sigmoid(0.5 * x + 0.25 + y - 0.5), sigmoid(-0.25 * x + 0.5 + 0.75 * y + 0.125)
    n = np.tanh(2 * x - 0.125 + r * (-1.5 * y + 1))
    u = 0.25 * h + 0.75 * ((1 - z) * n + z * h - y)
    state = {"0.y": np.array([y]), "0.h": np.array([h])}
    seen = sf.interpret(Program((op,)), [[x]], state)
    np.testing.assert_allclose(seen.u[0], [[u]], rtol=1e-12)
    assert (
        seen.events[0].tolist() == [[u > 0.25]]
        and seen.outputs[0, 0] == seen.state["0.y"][0] == (u > 0.25) * seen.u[0][0, 0]
    )
    assert state["0.y"][0] == y  # what came in was not written to
    before = GRU(op.weight_ih, op.weight_hh, op.bias_ih, op.bias_hh, reset_after=False)
    r, z = sigmoid(0.5 * x + 0.25 + h - 0.5), sigmoid(-0.25 * x + 0.5 + 0.75 * h + 0.125)
    n = np.tanh(2 * x - 0.125 - 1.5 * (r * h) + 1)
    seen = sf.interpret(Program((before,)), [[x]], {"0.h": np.array([h])})
    np.testing.assert_allclose(seen.outputs, [[(1 - z) * n + z * h]], rtol=1e-12)


def test_interpret_is_the_equations_of_lstm_and_rnn_written_out():
    w = lambda *v: np.array(v, F).reshape(-1, 1)  # noqa: E731
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    x, h, c = 1.5, -0.5, 0.75
    op = LSTM(
        sf.Dense(w(0.5, -0.25, 2, 0.75), 4), sf.Dense(w(1, 0.75, -1.5, -0.5), 4),
        np.array([0.25, 0.5, -0.125, 0.375], F), np.array([-0.5, 0.125, 1, -0.25], F),
    )  # fmt: skip
    i, f = sigmoid(0.5 * x + 0.25 + h - 0.5), sigmoid(-0.25 * x + 0.5 + 0.75 * h + 0.125)
    g, o = np.tanh(2 * x - 0.125 - 1.5 * h + 1), sigmoid(0.75 * x + 0.375 - 0.5 * h - 0.25)
    seen = sf.interpret(Program((op,)), [[x]], {"0.h": np.array([h]), "0.c": np.array([c])})
    np.testing.assert_allclose(seen.state["0.c"], [f * c + i * g], rtol=1e-12)
    np.testing.assert_allclose(seen.outputs, [[o * np.tanh(f * c + i * g)]], rtol=1e-12)
    np.testing.assert_array_equal(seen.state["0.h"], seen.outputs[0])
    for form, expected in (("tanh", np.tanh), ("relu", lambda a: max(a, 0))):
        for sign in (1, -1):
            op = RNN(sf.Dense(w(sign * 2.0)), sf.Dense(w(0.5)), np.array([0.25], F), np.array([-0.125], F), form)
            seen = sf.interpret(Program((op,)), [[x]], {"0.h": np.array([h])})
            np.testing.assert_allclose(seen.outputs, [[expected(sign * 2 * x + 0.125 + 0.5 * h)]], rtol=1e-12)


def test_interpret_plays_nothing_and_carries_on():
    program = network("three")
    x = cases.sequence(program, 9)
    whole = sf.interpret(program, x)
    first = sf.interpret(program, x[:4])
    rest = sf.interpret(program, x[4:], first.state)
    np.testing.assert_array_equal(whole.outputs, np.concatenate([first.outputs, rest.outputs]))
    nothing = sf.interpret(program, x[:0])
    assert nothing.outputs.shape == (0, 11) and nothing.events[1].shape == (0, 33)


# --- one way of playing equals another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_step_run_and_run_traced_give_the_same_bits(name, isa):
    program = network(name)
    engine, x = sf.Engine(program, isa=isa), cases.sequence(program, 20)
    a, b, c = engine.stream(), engine.stream(), engine.stream()
    stepped = np.stack([a.step(int(v) if program.takes_tokens else v) for v in x])
    ran, (traced, emitted) = b.run(x), c.run_traced(x)
    same_bits(stepped, ran)
    same_bits(stepped, traced)
    same_bits(a.save_state(), b.save_state())
    same_bits(a.save_state(), c.save_state())
    halves = engine.stream()
    same_bits(ran, np.concatenate([halves.run(x[:7]), halves.run(x[7:7]), halves.run(x[7:])]))
    assert emitted.keys() == {i for i, op in enumerate(program.ops) if isinstance(op, Speaking)}
    for i, flags in emitted.items():
        assert flags.shape == (20, program.ops[i].outputs) and flags.dtype == bool
        assert (flags.sum(0) == c.counters.events[i]).all()
    assert a.counters.steps == b.counters.steps == c.counters.steps == 20


@pytest.mark.parametrize("name", TOKENS)
def test_folding_changes_no_bit(name, isa):
    program = network(name)
    x = cases.sequence(program, 40)
    engines = [sf.Engine(program, fold=fold, isa=isa) for fold in (True, False, "auto")]
    streams = [engine.stream() for engine in engines]
    ran = [stream.run_traced(x) for stream in streams]
    for (outputs, emitted), stream in zip(ran[1:], streams[1:], strict=True):
        same_bits(ran[0][0], outputs)
        same_bits(ran[0][1], emitted)
        same_bits(streams[0].save_state(), stream.save_state())
    assert engines[2].folded == engines[0].folded and not engines[1].folded


def test_folding_changes_no_bit_where_weights_are_denormal(isa):
    tiny = np.full((3, 1), 1e-39, F)
    gru = GRU(sf.Dense(tiny, 3), sf.Dense(Z((3, 1)), 3), Z(3, F), Z(3, F))
    program = Program((cases.Embedding(np.full((1, 1), 1e38, F)), gru))
    folded, unfolded = (sf.Engine(program, fold=fold, isa=isa).stream().step(0) for fold in (True, False))
    same_bits(folded, unfolded)


def test_auto_folds_up_to_its_limit(monkeypatch):
    program = network("tokens")
    size = 7 * 3 * 48 * 4  # tokens, gates, 33 units in whole vectors, float32
    for limit, folded in ((size, True), (size - 1, False)):
        monkeypatch.setattr("sparsefold.engine.FOLD_LIMIT", limit)
        assert sf.Engine(program).folded == folded
    assert sf.Engine(program, fold=True).folded


def test_isas_agree():
    for name in ("three", "mixed-3", "csc", "tokens-overlay", "lstm-of-events", "rnn-of-events"):
        program = network(name)
        x, engines = cases.sequence(program, 1), [sf.Engine(program, isa=isa) for isa in _native.available_isas()]
        outputs = [engine.stream().run(x) for engine in engines]
        for other in outputs[1:]:
            np.testing.assert_allclose(outputs[0], other, atol=2e-5)


@pytest.mark.parametrize("name", ["tokens-2", "mixed-3", "gru-before", "lstm-of-events"])
def test_many_streams_equal_many_engines(name):
    program = network(name)
    shared = sf.Engine(program)
    inputs = [cases.sequence(program, 15, salt) for salt in range(5)]
    streams = [shared.stream() for _ in inputs]
    together = [[] for _ in inputs]
    for t in range(15):  # interleaved
        for stream, x, out in zip(streams, inputs, together, strict=True):
            out.append(stream.run(x[t : t + 1])[0])
    for x, out, stream in zip(inputs, together, streams, strict=True):
        alone = sf.Engine(program).stream()
        same_bits(alone.run(x), np.stack(out))
        same_bits(alone.save_state(), stream.save_state())
        same_bits(dict(alone.counters.events), dict(stream.counters.events))


# --- one step of many streams ---------------------------------------------------------------------------------------------


def counted(stream):
    """Every counter, for comparison."""
    c = stream.counters
    arrays = {f"{n}.{i}": a for n in ("events", "input_reads", "hidden_reads") for i, a in getattr(c, n).items()}
    return {"steps": np.array(c.steps), **arrays}


def compare_batch(program, sizes, isa, threads=1, steps=4):
    """Batches of several sizes over the same streams, in changing order, against each stream stepped by itself."""
    engine, most = sf.Engine(program, isa=isa, threads=threads), max(sizes)
    inputs = [cases.sequence(program, steps * len(sizes), salt) for salt in range(most)]
    alone, together = ([engine.stream() for _ in inputs] for _ in range(2))
    order, t = np.arange(most), 0
    for size in sizes:
        for _ in range(steps):
            chosen = order[:size]
            x = np.array([inputs[s][t] for s in chosen])
            out = engine.step_batch([together[s] for s in chosen], x)
            expected = [alone[s].step(int(v) if program.takes_tokens else v) for s, v in zip(chosen, x, strict=True)]
            same_bits(out, np.stack(expected))
            order, t = np.roll(order, 3), t + 1
    for a, b in zip(alone, together, strict=True):
        same_bits(a.save_state(), b.save_state())
        same_bits(counted(a), counted(b))


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_a_batch_gives_the_bits_of_each_stream_alone(name, isa):
    compare_batch(network(name), (1, 2, 5, 17), isa)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["three", "mixed-3", "mixed-w8a8", "layer-norm-of-events", "gru-overlay"])
def test_threads_change_no_bit_of_a_batch(name, threads, isa):
    compare_batch(network(name), (1, 2, 5, 33), isa, threads, steps=8)


# Matrices of several pieces of the first-level cache each, in rows, in columns and in panels, the last one narrower.
@pytest.mark.parametrize("precision", ["f32", "bf16", "i8", "w8a8"])
@pytest.mark.parametrize(
    "storage", [None, (16, 1), (8, 4), (5, 3), "csc", cases.Overlay(4), cases.Overlay(2, 16)], ids=str
)
def test_a_batch_over_matrices_of_many_pieces_keeps_every_sum_in_order(storage, precision, isa):
    r = cases.rng(12)
    program = Program((cases.gru(r, 200, 190, storage, 0.5), cases.linear(r, 190, 301, storage, 0.5)))
    compare_batch(program.rounded(precision), (3, 16), isa, steps=2)


def test_a_batch_of_none_and_an_out_of_ones_own():
    for name in ("tokens", "gru"):
        program = network(name)
        engine = sf.Engine(program)
        assert engine.step_batch([], cases.sequence(program, 0)).shape == (0, program.outputs)
        streams, x = [engine.stream() for _ in range(3)], cases.sequence(program, 3)
        out = np.full((5, program.outputs), np.nan, F)
        assert engine.step_batch(tuple(streams), x, out[1:4]).base is out
        same_bits(out[1:4], np.stack([engine.stream().run(v[None])[0] for v in x]))
        assert np.isnan(out[[0, 4]]).all()


def test_a_wrong_batch_is_refused_and_nothing_is_played():
    program = network("tokens")
    engine, values = sf.Engine(program), sf.Engine(network("gru"))
    a, b, other, v = engine.stream(), engine.stream(), sf.Engine(program).stream(), values.stream()
    for streams, x, out, sentence in [
        ([a, b, a], [1, 2, 3], None, "streams 0 and 2 of the batch are the same one"),
        ([a, other], [1, 2], None, "stream 1 of the batch is of another engine"),
        ([a, None], [1, 2], None, "a batch is a sequence of streams"),
        (None, [1, 2], None, "a batch is a sequence of streams"),
        ([a, b], [1, 7], None, "token 7 is outside the vocabulary"),
        ([a, b], [1, -1], None, "token -1 is outside"),
        ([a, b], [1], None, r"a batch of 2 is \(2,\) token ids"),
        ([a, b], [1.0, 2.0], None, "token ids; got float64"),
        ([a, b], [[1], [2]], None, r"token ids; got int64 \(2, 1\)"),
        ([a, b], [1, 2], Z((2, 6), F), r"out must be a writable contiguous float32 array of shape \(2, 7\)"),
        ([a, b], [1, 2], Z((2, 7)), "got float64 of shape"),
        ([a, b], [1, 2], Z((7, 2), F).T, "out must be"),
        ([a, b], [1, 2], [[0.0] * 7] * 2, "got list"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            engine.step_batch(streams, x, out)
    fixed = Z((2, 7), F)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out must be a writable"):
        engine.step_batch([a, b], [1, 2], fixed)
    for x in (Z((1, 4), F), Z(3, F), Z((2, 3), F)):
        with pytest.raises(ValueError, match=r"a batch of 1 for this program has shape \(1, 3\)"):
            values.step_batch([v], x)
    assert [s.counters.steps for s in (a, b, other, v)] == [0, 0, 0, 0]
    engine.step_batch([a, b], [1, 2])  # no claim was left behind
    assert a.counters.steps == b.counters.steps == 1


def test_a_second_thread_changes_no_bit_of_a_step():
    """Large recurrent products are made by it: after a pause it sleeps, and steps are played alone until they are close."""
    program = cases.large_layers()
    x = cases.sequence(program, 400)
    alone, shared = (sf.Engine(program, threads=n).stream() for n in (1, 2))
    expected = alone.run(x)
    np.testing.assert_array_equal(shared.run(x[:200]), expected[:200])
    time.sleep(0.01)
    np.testing.assert_array_equal([shared.step(v) for v in x[200:]], expected[200:])
    assert shared.counters.steps == alone.counters.steps == 400
    for op, reads in alone.counters.hidden_reads.items():
        np.testing.assert_array_equal(shared.counters.hidden_reads[op], reads)


def test_a_child_of_fork_plays_without_the_second_thread():
    done = in_a_process(
        f"import sys; sys.path.insert(0, {str(Path(cases.__file__).parent)!r})"
        """
import os, cases, sparsefold as sf
program = cases.large_layers()
x = cases.sequence(program, 60)
stream = sf.Engine(program, threads=2).stream()
expected = stream.run(x).tobytes()
stream.reset()
child = os.fork()
if child == 0:
    os._exit(0 if stream.run(x).tobytes() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
print("ok")
"""
    )
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("threads", [0, -1, 257, 1.0, True, "2"])
def test_a_number_of_threads_that_is_none_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to 256"):
        sf.Engine(network("gru"), threads=threads)


def test_a_batch_with_a_stream_in_use_is_refused_whole():
    program = Program((cases.gru(cases.rng(4), 8, 256),))
    engine = sf.Engine(program, threads=2)
    streams, x = [engine.stream() for _ in range(4)], cases.sequence(program, 8000)
    thread = threading.Thread(target=streams[2].run, args=(x,))
    thread.start()
    while not streams[2]._core.steps:
        time.sleep(0.0005)
    with pytest.raises(RuntimeError, match="stream 2 of the batch is in use by another thread"):
        engine.step_batch(streams, x[:4])
    assert thread.is_alive()
    thread.join()
    assert [s.counters.steps for s in streams] == [0, 0, 8000, 0]
    engine.step_batch(streams, x[:4])


def test_batches_of_one_engine_in_two_threads_equal_batches_in_turn():
    program = network("three")
    engine = sf.Engine(program, threads=2)
    inputs = np.stack([cases.sequence(program, 300, salt) for salt in range(10)], 1)
    found = {}

    def play(first):
        streams = [engine.stream() for _ in range(5)]
        found[first] = np.stack([engine.step_batch(streams, x) for x in inputs[:, first : first + 5]])

    threads = [threading.Thread(target=play, args=(first,)) for first in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s in range(10):
        same_bits(np.ascontiguousarray(found[s // 5 * 5][:, s % 5]), engine.stream().run(inputs[:, s]))


def test_a_child_of_fork_plays_its_batches_alone_and_ends():
    done = in_a_process(
        f"import sys; sys.path.insert(0, {str(Path(cases.__file__).parent)!r})"
        """
import os, cases, sparsefold as sf
program = cases.network("three")
engine = sf.Engine(program, threads=3)
def play():
    streams = [engine.stream() for _ in range(6)]
    return b"".join(engine.step_batch(streams, [t] * 6).tobytes() for t in range(5))
before = play()
child = os.fork()
if child == 0:
    same = play() == before
    del engine
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert play() == before
print("ok")
"""
    )
    assert done.stdout == "ok\n", done.stderr


# --- state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_a_saved_state_continues_with_the_same_bits(name, isa):
    program = network(name)
    engine, x = sf.Engine(program, isa=isa), cases.sequence(program, 24)
    whole = engine.stream().run_traced(x)
    first, second = engine.stream(), engine.stream()
    first.run(x[:10])
    saved = first.save_state()
    kept = {key: array.copy() for key, array in saved.items()}
    second.run(x[5:9])  # whatever was there is gone
    second.load_state(saved)
    outputs, emitted = second.run_traced(x[10:])
    same_bits(outputs, whole[0][10:])
    same_bits(emitted, {i: flags[10:] for i, flags in whole[1].items()})
    same_bits(saved, kept)  # a copy, not a window into the stream
    same_bits(first.save_state(), saved)


def test_reset_is_a_new_start_and_counters_go_on():
    program = network("three")
    engine, x = sf.Engine(program), cases.sequence(program, 12)
    stream = engine.stream()
    before = stream.run(x)
    one = stream.counters
    stream.reset()
    assert not any(array.any() for array in stream.save_state().values())
    assert stream.counters.steps == 12
    same_bits(stream.run(x), before)
    two = stream.counters
    assert two.steps == 24
    for mine, other in (
        (one.events, two.events),
        (one.input_reads, two.input_reads),
        (one.hidden_reads, two.hidden_reads),
    ):
        assert mine.keys() == other.keys()
        assert all((2 * mine[i] == other[i]).all() for i in mine)
    state = stream.save_state()
    stream.reset_counters()
    assert stream.counters.steps == 0 and not any(e.any() for e in stream.counters.events.values())
    same_bits(stream.save_state(), state)
    engine.stream().load_state(engine.stream().save_state())


def test_state_keys_and_types():
    state = sf.Engine(network("mixed-3")).stream().save_state()
    assert {key: (a.shape, a.dtype) for key, a in state.items()} == {
        "0.h": ((33,), F), "0.y": ((33,), F), "1.h": ((20,), F), "2.h": ((18,), F), "2.y": ((18,), F)
    }  # fmt: skip
    assert set(sf.Engine(network("lstm-of-events")).stream().save_state()) == {"0.h", "0.y", "1.h", "1.c", "2.h", "2.y"}
    assert sf.Engine(network("linear")).stream().save_state() == {}


def test_a_state_of_another_type_is_converted_and_a_list_too():
    program = network("gru")
    stream = sf.Engine(program).stream()
    for value in (np.arange(31), list(range(31)), np.arange(31, dtype=np.float64), np.arange(62, dtype=F)[::2] / 2):
        stream.load_state({"0.h": value})
        same_bits(stream.save_state()["0.h"], np.arange(31, dtype=F))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {}, r"the state holds \[\], this program needs \['0.h', '0.y'\]"),
        (lambda s: {"0.h": s["0.h"]}, r"the state holds \['0.h'\]"),
        (lambda s: {**s, "1.h": s["0.h"]}, "the state holds"),
        (lambda s: {"0.h": s["0.h"], 0: s["0.y"]}, "the state holds"),
        (
            lambda s: {**s, "0.h": Z(30, F)},
            r"state '0.h' .*shape \(30,\), this program has 31 values there. Pass what save_state",
        ),
        (lambda s: {**s, "0.y": Z((31, 1), F)}, r"shape \(31, 1\)"),
        (lambda s: {**s, "0.y": 0.0}, r"shape \(\)"),
        (lambda s: {**s, "0.y": None}, "state '0.y'"),
        (lambda s: {**s, "0.y": ["a"] * 31}, "state '0.y'"),
        (lambda s: {**s, "0.y": Z(31, complex)}, "state '0.y' .*complex"),
        (lambda s: None, "the state holds"),
        (lambda s: list(s), "the state holds"),
    ],
)
def test_a_state_of_another_network_is_refused_and_nothing_is_written(change, sentence):
    stream = sf.Engine(network("egru-events")).stream()
    stream.run(cases.sequence(network("egru-events"), 5))
    before = stream.save_state()
    with pytest.raises(ValueError, match=sentence):
        stream.load_state(change({key: array + 1 for key, array in before.items()}))
    same_bits(stream.save_state(), before)


def test_internal_is_u_of_an_egru_only():
    program = network("egru-state-linear")
    stream = sf.Engine(program).stream()
    with pytest.raises(ValueError, match="op 1 is a linear, only an egru has u"):
        stream.internal(1)
    stream.run(cases.sequence(program, 3))
    state = stream.save_state()
    np.testing.assert_array_equal(state["0.y"][state["0.y"] != 0], stream.internal(0)[state["0.y"] != 0])


# --- what comes in and goes out -----------------------------------------------------------------------------------------


def test_out_is_filled_and_returned():
    for name in ("tokens", "egru-block", "embedding"):
        program = network(name)
        a, b = sf.Engine(program).stream(), sf.Engine(program).stream()
        out = np.full(program.outputs, np.nan, F)
        for x in cases.sequence(program, 4):
            fresh = b.step(x)
            assert a.step(x, out) is out
            same_bits(out, fresh)
        first, second = b.step(x), b.step(x)
        assert not np.shares_memory(first, second)


def test_out_may_be_a_piece_of_something_and_even_the_input():
    program = network("gru-before")
    engine, x = sf.Engine(program), cases.sequence(program, 1)[0]
    expected = engine.stream().step(x)
    room = np.full((3, 16), 9, F)
    engine.stream().step(x, room[1])
    same_bits(room[1], expected)
    assert (room[[0, 2]] == 9).all()
    same_bits(engine.stream().step(x, x), expected)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, np.int16, np.uint64, np.array])
def test_any_whole_number_is_a_token(kind):
    program = network("tokens")
    a, b = sf.Engine(program).stream(), sf.Engine(program).stream()
    for token in (0, 6, 3):
        same_bits(a.step(kind(token)), b.step(token))


def test_true_is_token_one_as_everywhere_in_python():
    a, b = sf.Engine(network("tokens")).stream(), sf.Engine(network("tokens")).stream()
    same_bits(a.step(True), b.step(1))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64, list, tuple])
def test_any_sequence_of_whole_numbers_is_run(kind):
    program = network("tokens")
    tokens = [3, 0, 6, 6, 1]
    given = kind(tokens) if kind in (list, tuple) else np.array(tokens, kind)
    same_bits(sf.Engine(program).stream().run(given), sf.Engine(program).stream().run(np.array(tokens)))
    assert sf.Engine(program).stream().run([]).shape == (0, 7)
    every_second = np.array(tokens).repeat(2)[::2]
    same_bits(sf.Engine(program).stream().run(every_second), sf.Engine(program).stream().run(tokens))


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (-1, "token -1 is outside the vocabulary: this program knows tokens 0 to 6"),
        (7, "token 7 is outside the vocabulary"),
        (np.int64(7), "token 7 is outside"),
        (np.uint64(2**64 - 1), "does not fit 64 bits"),
        (2**70, "does not fit 64 bits"),
        (-(2**70), "does not fit 64 bits"),
        (3.0, "takes one token id, an int; got float"),
        (np.float32(3), "an int; got float32"),
        (None, "an int; got NoneType"),
        ("3", "an int; got str"),
        (b"3", "an int; got bytes"),
        ([3], "an int; got list"),
        (np.array([1, 2]), "an int; got ndarray"),
        (np.array(3.0), "an int; got ndarray"),
    ],
)
def test_what_is_no_token_is_refused_and_nothing_moves(token, sentence):
    stream = sf.Engine(network("tokens")).stream()
    stream.step(2)
    before = stream.save_state()
    with pytest.raises(ValueError, match=sentence):
        stream.step(token)
    same_bits(stream.save_state(), before)
    assert stream.counters.steps == 1


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([0, 1, 7], "token 7 is outside the vocabulary"),
        ([-1], "token -1 is outside"),
        (np.array([2**63], np.uint64), "is outside the vocabulary"),
        ([2**70], r"\(T,\) token ids; got object"),
        ([0.0, 1.0], r"\(T,\) token ids; got float64 \(2,\)"),
        ([True], r"\(T,\) token ids; got bool"),
        ("abc", r"\(T,\) token ids"),
        ([[0, 1]], r"\(T,\) token ids; got int64 \(1, 2\)"),
        (3, r"\(T,\) token ids"),
        (None, r"\(T,\) token ids"),
        ([None], r"\(T,\) token ids"),
    ],
)
def test_a_sequence_that_holds_no_tokens_is_refused_before_the_first_step(tokens, sentence):
    stream = sf.Engine(network("tokens")).stream()
    for run in (stream.run, stream.run_traced):
        with pytest.raises(ValueError, match=sentence):
            run(tokens)
    assert stream.counters.steps == 0 and not any(a.any() for a in stream.save_state().values())


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (Z(14, F), r"x must be float32 of shape \(15,\); got float32 of shape \(14\)"),
        (Z((1, 15), F), r"got float32 of shape \(1, 15\)"),
        (Z(15), r"got another type of shape \(15\)"),
        (Z(15, np.int32), "got another type"),
        (Z(15, ">f4"), "got another type"),
        (Z(15, complex), "got another type"),
        (Z(15, object), "x must be float32"),
        (Z(30, F)[::2], "got not a contiguous array. Convert it with numpy.ascontiguousarray"),
        (F(1), "x must be float32"),
        ([0.0] * 15, "x must be float32"),
        (3, "x must be float32"),
        (None, "x must be float32"),
        ("x", "x must be float32"),
        (b"x" * 60, "got another type of shape"),
    ],
)
def test_an_input_of_another_shape_or_type_is_refused(x, sentence):
    stream = sf.Engine(network("egru-events")).stream()
    with pytest.raises(ValueError, match=sentence):
        stream.step(x)
    assert stream.counters.steps == 0


@pytest.mark.parametrize(
    "x",
    [Z((3, 14)), Z(15), Z((1, 1, 15)), 3.0, [["a"] * 15], [[0.0] * 15, [0.0] * 14], None],
    ids=["narrow", "vector", "cube", "number", "words", "ragged", "none"],
)
def test_a_sequence_of_another_shape_is_refused(x):
    stream = sf.Engine(network("egru-events")).stream()
    for run in (stream.run, stream.run_traced):
        with pytest.raises(ValueError):
            run(x)
    assert stream.run(Z((0, 15))).shape == (0, 31)


def test_a_read_only_input_is_fine_and_values_are_converted_for_run():
    program = network("egru-events")
    x = cases.sequence(program, 4)
    x.flags.writeable = False
    stepped = sf.Engine(program).stream()
    outputs = np.stack([stepped.step(row) for row in x])
    same_bits(outputs, sf.Engine(program).stream().run(x))
    same_bits(outputs, sf.Engine(program).stream().run(x.astype(np.float64).tolist()))
    same_bits(outputs, sf.Engine(program).stream().run(np.asfortranarray(x)))


def read_only(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    "out", [Z(30, F), Z((31, 1), F), Z(31), Z(62, F)[::2], read_only(Z(31, F)), [0.0] * 31, b"\0" * 124, 1, Z(0, F)], ids=str
)  # fmt: skip
def test_an_out_that_cannot_be_filled_is_refused(out):
    stream = sf.Engine(network("egru-events")).stream()
    with pytest.raises(ValueError, match=r"out must be float32 of shape \(31,\)"):
        stream.step(Z(15, F), out)
    assert stream.counters.steps == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "egru-events",
        "egru-state-linear",
        "gru",
        "mixed-3",
        "linear",
        "lstm",
        "lstm-of-events",
        "rnn",
        "rnn-of-events",
        "relu",
        "relu-recurrent",
        "layer-norm-of-events",
    ],
)
def test_what_is_not_finite_in_an_input_is_seen_at_the_end(name, bad, isa):
    program = network(name)
    stream = sf.Engine(program, isa=isa).stream()
    x = cases.sequence(program, 3)
    assert np.isfinite(stream.run(x)).all()
    x = x[:1].copy()
    x[0, 1] = bad
    out = stream.run(x)
    with np.errstate(all="ignore"):
        oracle = sf.interpret(program, x).outputs
    if np.isnan(bad):
        assert np.isnan(oracle).all() == np.isnan(out).all() is np.True_
        assert np.isnan(stream.run(np.zeros_like(x))).all() or name in (
            "linear",
            "relu",
        )  # and stays: it is in the state
    else:
        assert (np.isnan(oracle) == np.isnan(out)).all()  # an infinite input saturates the gates


def test_a_relu_speaks_where_it_is_above_zero_and_where_it_is_no_number(isa):
    """The last op sums what the units said; a silent one costs nothing, a NaN must be heard of."""
    x = np.array([1.5, -1, 0, -0.0, 1e-30, -1e-30, -3, -3] * 2 + [2], F)  # one unit in the second vector
    units = len(x)
    eye = cases.Linear(sf.Block.from_dense(np.eye(units), (1, 1)), Z(units, F))
    linear = cases.Linear(sf.Dense(np.ones((1, units))), Z(1, F))
    program = Program((eye, ReLU(units), linear))
    stream = sf.Engine(program, isa=isa).stream()
    out, emitted = stream.run_traced(x[None])
    assert emitted[1][0].tolist() == (x > 0).tolist() and out[0, 0] == 2 * 1.5 + 2
    assert stream.counters.events[1].tolist() == stream.counters.input_reads[2].tolist() == (x > 0).tolist()
    assert stream.cost.parts[-1].macs_effective == (x > 0).sum()
    assert stream.cost.bytes_state == 2 * 8 * (x > 0).sum() and stream.cost.unit_updates == units
    for bad in (np.nan, np.inf):
        x[16] = bad
        out, emitted = stream.run_traced(x[None])
        assert emitted[1][0, 16]
        np.testing.assert_array_equal(out[0, 0], F(bad))
        with np.errstate(all="ignore"):
            oracle = sf.interpret(program, x[None])
        assert oracle.events[1][0].tolist() == emitted[1][0].tolist()


@pytest.mark.parametrize("field", ["weight", "bias", "epsilon"])
def test_the_bound_notices_one_wrong_number_of_a_layer_norm(field):
    right = cases.layer_norm(cases.rng(3), 37)
    wrong = getattr(right, field) + F(1e-4) * (np.arange(37) == 5 if field != "epsilon" else 1)
    wrong = replace(right, **{field: wrong if field == "epsilon" else wrong.astype(F)})
    follow(Program((right,)), sf.Engine(Program((right,))), 6)
    with pytest.raises(AssertionError):
        follow(Program((right,)), sf.Engine(Program((replace(wrong, epsilon=float(wrong.epsilon)),))), 6)


@pytest.mark.parametrize("units", [1, 15, 16, 17, 100])
def test_layer_norm_of_values_far_from_zero_or_all_alike(units, isa):
    op = cases.layer_norm(cases.rng(units), units)
    stream = sf.Engine(Program((op,)), isa=isa).stream()
    same_bits(stream.step(np.full(units, 3.0, F)), op.bias)  # nothing lies apart from the mean
    x = cases.vector(cases.rng(units), units) + F(1e3)
    value, bound = tolerances.layer_norm(op, x.astype(np.float64), Z(units))
    assert (np.abs(stream.step(x) - value) <= bound).all()
    for bad in (np.nan, np.inf):
        x[-1] = bad
        assert np.isnan(stream.step(x)).all()
    same_bits(stream.step(np.full(units, 3.0, F)), op.bias)  # and is gone at the next step


def test_a_relu_has_no_state_and_its_rate_is_in_the_report():
    stream = sf.Engine(network("relu")).stream()
    stream.run(cases.sequence(network("relu"), 5))
    assert stream.save_state() == {}
    assert f"\n1 relu{stream.counters.event_rate(1):>28.3f}\n" in stream.report()
    with pytest.raises(ValueError, match="an op has no state 'y'"):
        stream._core.write(1, "y", Z(33, F))


@pytest.mark.parametrize("key", ["h", "y"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_a_state_is_seen_at_the_end(bad, key, isa):
    program = network("egru-events")
    stream = sf.Engine(program, isa=isa).stream()
    state = cases.state(program)
    state[f"0.{key}"][30] = bad
    stream.load_state(state)
    same_bits(stream.save_state(), state)
    out, emitted = stream.run_traced(Z((1, 15), F))
    if key == "h":
        assert not np.isfinite(out[0, 30]) and np.isfinite(out[0, :30]).all()
        assert emitted[0][0, 30]  # others must hear of it
        assert np.isnan(stream.run(Z((1, 15), F))).all()
    elif np.isnan(bad):
        assert np.isnan(out).all()
    else:  # an infinite y saturates every gate that listens: each unit keeps its state or takes a whole step
        u = stream.internal(0)
        assert (np.abs(u) <= np.maximum(1, np.abs(state["0.h"]))).all() and not np.isnan(u).any()


def test_padding_never_leaks(isa):
    """17 units fill one lane of their second vector: whatever the other 15 compute must stay there."""
    r = cases.rng(9)
    program = Program((
        cases.egru(r, 17, 17, (16, 1)), cases.gru(r, 17, 17, (32, 32)), cases.lstm(r, 17, 17), cases.rnn(r, 17, 17),
        cases.layer_norm(r, 17), ReLU(17), cases.egru(r, 17, 17),
    ))  # fmt: skip
    x = cases.sequence(program, 6)
    clean = sf.Engine(program, isa=isa).stream().run(x)
    stream = sf.Engine(program, isa=isa).stream()
    stream.run(np.full((1, 17), np.nan))  # fills every lane, padding too, with NaN
    stream.load_state({key: np.zeros_like(a) for key, a in stream.save_state().items()})
    same_bits(stream.run(x), clean)
    assert all(len(e) == 17 for e in stream.counters.events.values())


# --- denormals ----------------------------------------------------------------------------------------------------------

flushes = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"),
    reason="denormals are flushed on x86-64 and 64-bit Arm only.",
)


@flushes
def test_a_decaying_state_ends_in_zero_and_never_in_denormals(isa):
    silent = GRU(sf.Dense(Z((48, 1)), 3), sf.Dense(Z((48, 16)), 3), Z(48, F), Z(48, F))  # z = 1/2: h halves
    stream = sf.Engine(Program((silent,)), isa=isa).stream()
    stream.load_state({"0.h": np.ones(16, F)})
    assert (stream.run(Z((126, 1)))[-1] == F(2.0**-126)).all()
    assert (stream.step(Z(1, F)) == 0).all()


@flushes
def test_a_denormal_input_counts_as_zero_and_the_processor_is_as_before(isa):
    linear = cases.Linear(sf.Dense(np.ones((16, 1))), Z(16, F))
    stream = sf.Engine(Program((linear,)), isa=isa).stream()
    tiny = np.full(1, 1e-40, F)
    assert tiny[0] > 0
    assert (stream.step(tiny) == 0).all() and (stream.run(tiny[None]) == 0).all()
    sf.Engine(network("tokens"), fold=True, isa=isa)  # folding plays with the same mode
    for bad in (Z(3, F), "x"):
        with pytest.raises(ValueError):
            stream.step(bad)
    half = tiny * F(0.5)
    assert half[0] == F(5e-41) and half[0] > 0


# --- memory and threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens-2", "mixed-3"])
def test_a_step_with_out_allocates_nothing_in_python(name):
    program = network(name)
    stream, out = sf.Engine(program).stream(), np.empty(program.outputs, F)
    x = cases.sequence(program, 100)
    inputs = [int(v) if program.takes_tokens else v for v in x] * 100
    for v in inputs[:200]:
        stream.step(v, out)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for v in inputs[:10]:
            stream.step(v, out)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for v in inputs:
            stream.step(v, out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before <= 64, "10,000 steps kept something"  # the reading of the counter itself is an int
    assert peak - before <= 512, "a step made an array"


def test_steps_do_not_move_the_heap():
    class Info(ctypes.Structure):
        _fields_ = [
            (n, ctypes.c_size_t)
            for n in [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        ]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much memory is in use.")
    libc.mallinfo2.restype = Info
    program = network("three")
    stream, out = sf.Engine(program).stream(), np.empty(program.outputs, F)
    inputs = [int(v) for v in cases.sequence(program, 5000)]
    for v in inputs:
        stream.step(v, out)
    before = libc.mallinfo2().uordblks
    for v in inputs:
        stream.step(v, out)
    assert libc.mallinfo2().uordblks - before < 4096  # less than a byte a step


def test_one_stream_in_two_threads_works_in_turn_or_says_so():
    r = cases.rng(4)
    stream = sf.Engine(Program((cases.gru(r, 8, 256), cases.linear(r, 256, 8)))).stream()
    x, played, refused, other = cases.sequence(stream.engine.program, 30), [], [], []
    barrier = threading.Barrier(2)

    def play():
        barrier.wait()
        for _ in range(40):
            try:
                stream.run(x)
                played.append(1)
            except RuntimeError as error:
                refused.append(str(error))
            except BaseException as error:
                other.append(error)

    threads = [threading.Thread(target=play) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not other and len(played) + len(refused) == 80
    assert stream.counters.steps == 30 * len(played)
    assert all("in use by another thread. Give each thread its own engine.stream()" in text for text in refused)


def test_a_stream_in_use_is_refused_to_another_thread():
    r = cases.rng(4)
    program = Program((cases.gru(r, 8, 256),))
    stream = sf.Engine(program).stream()
    x = cases.sequence(program, 8000)
    thread = threading.Thread(target=stream.run, args=(x,))
    state, said = {"0.h": Z(256, F)}, []
    thread.start()
    while not stream._core.steps:  # the one thing that may be asked meanwhile
        time.sleep(0.0005)
    for call in (
        lambda: stream.step(x[0]), lambda: stream.run(x[:1]), stream.reset, stream.reset_counters, stream.save_state,
        lambda: stream.load_state(state),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="in use by another thread"):
            call()
        said.append(thread.is_alive())
    thread.join()
    assert all(said) and stream.counters.steps == 8000
    stream.step(x[0])  # and afterwards it is free


def test_streams_of_one_engine_in_threads_equal_streams_in_turn():
    program = network("three")
    engine, inputs = sf.Engine(program), [cases.sequence(program, 400, salt) for salt in range(4)]
    expected = [engine.stream().run(x) for x in inputs]
    found = [None] * 4

    def play(i):
        stream = engine.stream()
        half = stream.run(inputs[i][:200])
        found[i] = np.concatenate([half, [stream.step(int(v)) for v in inputs[i][200:]]])

    threads = [threading.Thread(target=play, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, found, strict=True):
        same_bits(a, b)


# --- choice of kernels ------------------------------------------------------------------------------------------------------


def in_a_process(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=300
    )


ASK = (
    "import numpy as np, sparsefold as sf\n"
    "from sparsefold.program import Linear\n"
    "p = sf.Program((Linear(sf.Dense(np.ones((1, 1))), np.zeros(1, np.float32)),))\n"
)


@pytest.mark.parametrize("wanted", [*_native.available_isas(), ""])
def test_the_environment_chooses_the_instruction_set(wanted):
    done = in_a_process(ASK + "print(sf.Engine(p).isa, sf.Engine(p, isa='generic').isa)", SPARSEFOLD_ISA=wanted)
    assert done.stdout.split() == [wanted or _native.available_isas()[0], "generic"], done.stderr


def test_an_instruction_set_that_is_not_there_is_refused():
    done = in_a_process(ASK + "sf.Engine(p)", SPARSEFOLD_ISA="avx9000")
    assert done.returncode == 1
    assert "ValueError: instruction set 'avx9000' is not available on this processor, which has: " in done.stderr
    assert ", ".join(_native.available_isas()) in done.stderr
    with pytest.raises(ValueError, match="'AVX2' is not available"):
        sf.Engine(network("linear"), isa="AVX2")


def test_generic_is_always_there_and_last():
    assert _native.available_isas()[-1] == "generic"


@pytest.mark.parametrize("fold", ["never", None, 8])
def test_an_unknown_fold_is_refused(fold):
    with pytest.raises(ValueError, match="fold must be 'auto', True or False"):
        sf.Engine(network("tokens"), fold=fold)


def test_load_plays_the_file(tmp_path):
    program = network("tokens-block")
    program.save(tmp_path / "a.sfold")
    x = cases.sequence(program, 9)
    for fold in (True, False):
        engine = sf.Engine.load(tmp_path / "a.sfold", fold=fold, isa="generic")
        assert engine.isa == "generic" and engine.folded == fold
        same_bits(engine.stream().run(x), sf.Engine(program, isa="generic").stream().run(x))


def test_the_engine_says_how_much_memory_its_weights_take():
    assert sf.Engine(network("linear")).nbytes == 4 * (48 * 17 + 48)  # 33 rows in three vectors, and a bias
    tokens = network("tokens")
    assert sf.Engine(tokens, fold=True).nbytes != sf.Engine(tokens, fold=False).nbytes


def test_the_report_names_every_part():
    program = network("three")
    stream = sf.Engine(program).stream()
    assert "0 steps" in stream.report()
    stream.run(cases.sequence(program, 10))
    said = stream.report()
    assert "10 steps" in said and f"{stream.engine.isa} kernels" in said
    for part in ("1 input", "1 recurrent", "3 recurrent", "4 decoder", "all"):
        assert f"\n{part}" in said
    assert f"{stream.cost.per_step('macs_effective'):,.0f}" in said
