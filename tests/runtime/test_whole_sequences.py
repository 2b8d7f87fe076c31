"""Programs with a layer that reads both ways: bit for bit the parts of them played by themselves, each in its direction."""

import threading
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold.program import EGRU, Embedding, Events, Linear, Program, Speaking, matrices

network = cache(cases.network)
F = np.float32


def alone(op, source, events, isa):
    """(T, O) of one op over (T, I): what programs without a layer that reads backwards give."""
    if isinstance(op, Embedding):
        return op.weight[source]
    ops = (replace(op, reverse=False),) if hasattr(op, "reverse") else (op,)
    if events:
        ops = (Events(op.inputs), *ops)
    elif not matrices(op):  # x, exactly: an op without weights is no program
        ops = (Linear(sf.Dense(np.eye(op.inputs)), np.zeros(op.inputs, F)), *ops)
    return sf.Engine(Program(ops), isa=isa).stream().run(source)


def by_parts(program, x, isa):
    """The program's outputs, op by op over all steps."""
    given = []
    for i, op in enumerate(program.ops):
        sources = program.sources(i)
        source = np.concatenate([given[j] for j in sources], axis=1) if sources else x
        reverse = getattr(op, "reverse", False)
        out = alone(op, source[::-1] if reverse else source, program.reads_events(i), isa)
        given.append(out[::-1] if reverse else out)
    return np.concatenate([given[j] for j in program.sources(len(given))], axis=1)


@pytest.mark.parametrize("steps", [0, 1, 2, 23])
@pytest.mark.parametrize("name", cases.WHOLE_SEQUENCES)
def test_both_directions_are_two_layers_played_alone(name, steps, isa):
    program = network(name)
    x = cases.sequence(program, steps)
    played = sf.Engine(program, isa=isa).stream().run(x)
    assert played.shape == (steps, program.outputs) and played.dtype == F
    np.testing.assert_array_equal(played.view(np.uint32), by_parts(program, x, isa).astype(F).view(np.uint32))


@pytest.mark.parametrize("name", [n for n in cases.WHOLE_SEQUENCES if "w8a8" not in n])
def test_the_oracle_says_the_same(name, isa):
    """Free-running: with events, as many steps as keep every u away from its threshold by more than that."""
    program = network(name)
    oracle = sf.interpret(program, x := cases.sequence(program, 12))
    played, emitted = sf.Engine(program, isa=isa).stream().run_traced(x)
    for i, flags in emitted.items():
        np.testing.assert_array_equal(flags, oracle.events[i])
    np.testing.assert_allclose(played, oracle.outputs, rtol=0, atol=tolerances.FREE_RUNNING_F32)
    assert oracle.state == {}


@pytest.mark.parametrize("name", cases.WHOLE_SEQUENCES)
def test_every_run_starts_from_zero_and_nothing_is_carried(name):
    program = network(name)
    assert program.whole_sequences
    engine = sf.Engine(program)
    stream, other, x = engine.stream(), engine.stream(), cases.sequence(program, 15)
    first = stream.run(x)
    other.run(x[4:])
    for again in (stream.run(x), other.run_traced(x)[0]):
        np.testing.assert_array_equal(first, again)
    assert stream.save_state() == {} and sf.interpret(program, x, {}).state == {}
    stream.load_state({})
    stream.reset()
    np.testing.assert_array_equal(first, stream.run(x))
    assert stream.counters.steps == 45
    with pytest.raises(ValueError, match=r"this program needs \[\]"):
        stream.load_state({"0.h": np.zeros(3, F)})


def test_a_step_and_a_batch_are_refused_and_nothing_is_played():
    for name in ("two-ways-gru", "two-ways-tokens"):
        program = network(name)
        engine = sf.Engine(program)
        stream, x = engine.stream(), cases.sequence(program, 2)
        for call in (
            lambda stream=stream, x=x: stream.step(int(x[0]) if x.ndim == 1 else x[0]),
            lambda engine=engine, stream=stream, x=x: engine.step_batch([stream], x[:1]),
        ):
            with pytest.raises(
                ValueError, match=r"plays whole sequences, not one step\. Pass the sequence to Stream\.run"
            ):
                call()
        assert stream.counters.steps == 0
        stream.run(x)


@pytest.mark.parametrize("name", cases.WHOLE_SEQUENCES)
def test_counters_cost_what_the_recorded_trace_costs(name, isa):
    program = network(name)
    engine = sf.Engine(program, isa=isa)
    stream, x = engine.stream(), cases.sequence(program, 25)
    _, trace = stream.run_traced(x)
    assert trace.keys() == {i for i, op in enumerate(program.ops) if isinstance(op, Speaking)}
    counted = sf.Counts.from_trace(program, trace, steps=25)
    for mine, other in (
        (stream.counters.events, counted.events),
        (stream.counters.input_reads, counted.input_reads),
        (stream.counters.hidden_reads, counted.hidden_reads),
    ):
        assert {i: n.tolist() for i, n in mine.items()} == {i: n.tolist() for i, n in other.items()}
    assert engine.folded == (name == "two-ways-later")  # where the embedding has one reader
    assert stream.cost == sf.cost(program, counted, engine.folded)
    per_step = sum(rows * cols for op in program.ops for rows, cols in (m.shape for m in matrices(op).values()))
    assert stream.cost.macs_dense == 25 * per_step


def test_silent_units_of_both_directions_cost_their_readers_nothing():
    """Four steps by hand: every unit of a direction speaks at the steps at which its input does, and at no other."""
    z, eye = np.zeros, np.eye(2, dtype=F)
    gates = np.concatenate([z((4, 2)), 9 * eye])  # z = 1/2, n = tanh(9 x): u = n / 2 + h / 2
    op = EGRU(sf.Dense(gates, 3), sf.Dense(z((6, 2)), 3), z(6, F), z(6, F), threshold=np.full(2, 0.45, F), reset="none")
    program = Program((op, replace(op, reverse=True), Linear(sf.Dense(np.ones((3, 4))), z(3, F))))
    stream = sf.Engine(program).stream()
    x = np.array([[1, 0], [0, 0], [0, 0], [0, 1]], F)
    out, trace = stream.run_traced(x)
    assert trace[0].tolist() == trace[1].tolist() == [[True, False], [False, False], [False, False], [False, True]]
    np.testing.assert_allclose(out[:, 0], [1, 0, 0, 1], atol=1e-6)
    counts = stream.counters
    assert counts.input_reads[2].tolist() == [1, 1, 1, 1]
    # What is said at the last step played is read by nobody: forwards by unit 1, backwards by unit 0.
    assert counts.hidden_reads[0].tolist() == [1, 0] and counts.hidden_reads[1].tolist() == [0, 1]
    assert stream.cost.parts[-1].macs_effective == 4 * 3


def test_what_is_not_finite_is_seen_where_it_can_be(isa):
    program = network("two-ways-gru")
    x, at = cases.sequence(program, 9), 4
    x[at, 1] = np.nan
    out, units = sf.Engine(program, isa=isa).stream().run(x), program.ops[0].outputs
    assert np.isnan(out[at:, :units]).all() and np.isfinite(out[:at, :units]).all()
    assert np.isnan(out[: at + 1, units:]).all() and np.isfinite(out[at + 1 :, units:]).all()


def test_streams_in_threads_equal_streams_in_turn():
    program = network("two-ways-egru-3")
    engine, inputs = sf.Engine(program), [cases.sequence(program, 150, salt) for salt in range(4)]
    expected, found = [engine.stream().run(x) for x in inputs], [None] * 4

    def play(i):
        found[i] = engine.stream().run(inputs[i])

    threads = [threading.Thread(target=play, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", cases.WHOLE_SEQUENCES)
def test_the_file_gives_the_same_back_and_says_reverse_only_where_it_is(name):
    program = network(name)
    raw = program.to_bytes()
    back = Program.from_bytes(raw)
    assert back.to_bytes() == raw and (back.inputs, back.outputs) == (program.inputs, program.outputs)
    assert [getattr(op, "reverse", False) for op in back.ops] == [getattr(op, "reverse", False) for op in program.ops]
    assert raw.count(b'reverse\\": true') == sum(getattr(op, "reverse", False) for op in program.ops)
    assert b'reverse\\": false' not in raw


def test_what_cannot_be_a_direction_is_refused():
    r = cases.rng(2)
    gru, egru = cases.gru(r, 5, 8), cases.egru(r, 5, 8)
    for ops in (
        (replace(gru, reverse=True),),
        (cases.linear(r, 5, 5), replace(gru, reverse=True)),
        (gru, replace(gru, reverse=True), replace(gru, reverse=True)),
        (gru, replace(cases.gru(r, 5, 9), reverse=True)),
        (gru, replace(cases.gru(r, 8, 8), reverse=True)),
        (gru, replace(egru, reverse=True)),
        (egru, replace(cases.egru(r, 5, 8, output="state"), reverse=True)),
    ):
        with pytest.raises(
            ValueError, match="an op that reads backwards follows one of its kind and sizes that reads forwards"
        ):
            Program(ops)
    with pytest.raises(ValueError, match=r"reads 8 values, but op 1 \(gru\) gives 16"):
        Program((gru, replace(gru, reverse=True), cases.linear(r, 8, 3)))
