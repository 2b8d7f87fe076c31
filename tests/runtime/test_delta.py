"""Delta networks: what they promise of a dense one, and the routine that finds their thresholds."""

from dataclasses import replace

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold.calibrate import delta_sites, with_deltas
from sparsefold.program import DELTA_REFRESH, GRU, Program

F = np.float32
Z = np.zeros
DENSE = [
    "gru",
    "gru-block-2",
    "lstm-block-2",
    "lstm-csc",
    "lstm-overlay",
    "rnn",
    "rnn-relu-2",
    "csc-bf16",
    "mixed-w8a8",
]
SENDING = [
    "delta-gru",
    "delta-gru-0",
    "delta-gru-before",
    "delta-lstm",
    "delta-rnn",
    "delta-of-events",
    "delta-i8",
    "delta-bf16",
]


def same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def at_zero(program):
    """The same network with every threshold 0."""
    return with_deltas(program, dict.fromkeys(delta_sites(program), 0.0))


def smooth(steps, width, *salt):
    """A slow walk: most values hardly move from step to step."""
    return np.cumsum(0.03 * cases.rng(*salt).standard_normal((steps, width)), axis=0).astype(F)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_threshold_0_is_the_dense_layer(name, isa):
    dense = cases.network(name)
    if name == "mixed-w8a8":  # changes are taken as they are, a dense x would be rounded
        dense = dense.rounded("i8")
    sends = at_zero(dense)
    x = cases.sequence(dense, DELTA_REFRESH + 30)  # past the step at which memories are summed anew
    exact = (sf.interpret(p, x[:60]).outputs for p in (dense, sends))
    np.testing.assert_allclose(*exact, rtol=0, atol=1e-12)
    ours, theirs = (sf.Engine(p, isa=isa).stream().run(x) for p in (sends, dense))
    assert 0 < np.abs(ours - theirs).max() <= tolerances.FREE_RUNNING_F32


def test_interpret_is_the_equations_of_a_delta_gru_written_out():
    w = lambda *v: np.array(v, F).reshape(3, 1)  # noqa: E731
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    op = GRU(
        sf.Dense(w(0.5, -0.25, 2), 3), sf.Dense(w(1, 0.75, -1.5), 3), np.array([0.25, 0.5, -0.125], F),
        np.array([-0.5, 0.125, 1], F), delta_input=0.5, delta_hidden=0.25,
    )  # fmt: skip
    sent_x = sent_h = h = 0.0
    seen = sf.interpret(Program((op,)), [[0.25], [1.0], [1.5], [-1.0]])
    for t, (x, heard) in enumerate(((0.25, 0.0), (1.0, 1.0), (1.5, 1.0), (-1.0, -1.0))):  # 0.5 is not more than 0.5
        changed = abs(h - sent_h) > 0.25
        sent_x, sent_h = heard, h if changed else sent_h
        r = sigmoid(0.5 * sent_x + 0.25 + sent_h - 0.5)
        z = sigmoid(-0.25 * sent_x + 0.5 + 0.75 * sent_h + 0.125)
        n = np.tanh(2 * sent_x - 0.125 + r * (-1.5 * sent_h + 1))
        h = (1 - z) * n + z * h  # the state itself, not what was sent of it
        np.testing.assert_allclose(seen.outputs[t], [h], rtol=1e-12)
        assert seen.changes[0, "x"][t] == (x == heard) and seen.changes[0, "h"][t] == changed
    assert 0 < seen.changes[0, "h"].sum() < 4
    assert seen.state["0.sent_x"] == [-1] and seen.state["0.age"] == [4]
    np.testing.assert_allclose(seen.state["0.sent_h"], [sent_h], rtol=1e-12)


def test_who_does_not_change_costs_nothing_and_loses_no_bit(isa):
    """Weights in int8 too: a memory is not scaled back and forth."""
    for precision in ("f32", "bf16", "i8"):
        r = cases.rng(3)
        ops = cases.changes(cases.gru(r, 9, 20), 0.1, 10.0), cases.changes(cases.lstm(r, 20, 17), 10.0, 10.0)
        program = Program(ops).rounded(precision)
        stream = sf.Engine(program, isa=isa).stream()
        stream.run(np.ones((5, 9), F))
        before = stream.save_state()
        stream.reset_counters()
        stream.run(np.ones((500, 9), F) + F(0.05) * (r.random((500, 9)) < 0.5))
        assert stream.cost.macs_effective == 0 and stream.cost.macs_dense > 0
        after = stream.save_state()
        for key in ("0.memory_x", "0.memory_h", "1.memory_x", "1.memory_h"):
            same_bits(before[key], after[key])


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_memories_do_not_drift_away_from_what_was_sent(precision, isa):
    """After 10^5 steps a memory is b + W x^ to the rounding of the changes since it was summed anew, and no more."""
    r = cases.rng(8)
    program = Program(
        (cases.changes(cases.gru(r, 9, 20), 0.05, 0.02), cases.changes(cases.lstm(r, 20, 17, (8, 1), 0.5), 0, 0))
    )
    program = program.rounded(precision)
    stream = sf.Engine(program, isa=isa).stream()
    stream.run(cases.sequence(program, 100_000 // DELTA_REFRESH * DELTA_REFRESH, 1))
    path = [stream.save_state()]
    assert path[0]["0.age"] == path[0]["1.age"] == [0]
    for x in cases.sequence(program, DELTA_REFRESH - 1, 2):
        stream.step(x)
        path.append(stream.save_state())
    for i, op in enumerate(program.ops):
        for side, weight, bias in (("x", op.weight_ih, op.bias_ih), ("h", op.weight_hh, op.bias_hh)):
            key = f"{i}.memory_{side}"
            sent = np.array([state[f"{i}.sent_{side}"] for state in path])
            error = np.abs(path[-1][key] - (weight.to_dense().astype(np.float64) @ sent[-1] + bias))
            assert (error <= tolerances.memory_f32(weight, bias, sent)).all()
            assert error.max() > 0
            assert error.max() <= tolerances.FREE_RUNNING_F32
    stream.run(cases.sequence(program, 1, 3))
    assert stream.save_state()["0.age"] == [0]


def test_what_is_not_finite_is_sent_and_stays(isa):
    """As in a dense layer a NaN reaches the units; a memory keeps it until the state is reset."""
    program = cases.network("delta-gru")
    stream = sf.Engine(program, isa=isa).stream()
    stream.step(np.full(program.inputs, np.nan, F))
    assert np.isnan(stream.step(Z(program.inputs, F))).all()
    stream.reset()
    assert np.isfinite(stream.step(Z(program.inputs, F))).all()


# --- the state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SENDING)
def test_the_state_goes_on_to_the_bit_past_a_new_sum_and_a_batch_of_all_ages(name, isa):
    program = cases.network(name)
    engine, x = sf.Engine(program, isa=isa, threads=2), cases.sequence(program, DELTA_REFRESH + 20)
    whole = engine.stream()
    expected = whole.run(x)
    first, second = engine.stream(), engine.stream()
    first.run(x[: DELTA_REFRESH - 5])
    saved = first.save_state()
    second.run(x[:3])  # something else
    second.load_state(saved)
    same_bits(second.run(x[DELTA_REFRESH - 5 :]), expected[DELTA_REFRESH - 5 :])
    for key, array in second.save_state().items():
        same_bits(array, whole.save_state()[key])
    second.reset()
    same_bits(second.run(x[:50]), expected[:50])
    streams, starts = [engine.stream() for _ in range(3)], (0, 7, DELTA_REFRESH - 4)
    for stream, start in zip(streams, starts, strict=True):
        stream.run(x[:start])
    for t in range(10):
        batch = engine.step_batch(streams, np.array([x[start + t] for start in starts]))
        same_bits(batch, np.array([expected[start + t] for start in starts]))


def test_a_fresh_state_is_the_biases_and_the_age_is_checked():
    program = cases.network("delta-gru")
    op = program.ops[0]
    stream = sf.Engine(program).stream()
    state = stream.save_state()
    assert {key: array.shape for key, array in state.items()} == {
        "0.h": (31,), "0.sent_x": (9,), "0.memory_x": (93,), "0.sent_h": (31,), "0.memory_h": (93,), "0.age": (1,)
    }  # fmt: skip
    same_bits(state["0.memory_x"], op.bias_ih)
    same_bits(state["0.memory_h"], op.bias_hh)
    assert not any(state[key].any() for key in ("0.h", "0.sent_x", "0.sent_h", "0.age"))
    for age in (-1, DELTA_REFRESH, 0.5, np.nan):
        with pytest.raises(ValueError, match=r"state '0.age' must be a whole number from 0 to 1023"):
            stream.load_state({**state, "0.age": np.array([age])})
    with pytest.raises(ValueError, match=r"'0.memory_x' .*this program has 93 values"):
        stream.load_state({**state, "0.memory_x": Z(90, F)})
    with pytest.raises(ValueError, match="the state holds"):
        stream.load_state({"0.h": state["0.h"]})


def test_the_report_says_what_was_read():
    program = cases.network("delta-gru")
    stream = sf.Engine(program).stream()
    stream.run(cases.sequence(program, 40))
    rate = stream.counters.read_rate(0, "input")
    assert f"0 input              1.000   {rate:.3f}" in stream.report()


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "sentence"),
    [
        (
            lambda r: cases.changes(cases.gru(r, 3, 4), -0.1),
            r"op 0 \(gru\): delta_input must be a number in \[0, 1e30\], got -0.1",
        ),
        (lambda r: cases.changes(cases.lstm(r, 3, 4), None, np.nan), r"delta_hidden must be a number in .*, got nan"),
        (lambda r: cases.changes(cases.rnn(r, 3, 4), 1e31), "delta_input must be a number in"),
        (lambda r: cases.changes(cases.rnn(r, 3, 4), "0.1"), "delta_input must be a number in"),
        (lambda r: cases.changes(cases.rnn(r, 3, 4), True), "delta_input must be a number in"),
        (
            lambda r: cases.changes(cases.gru(r, 3, 4, reset_after=False), 0, 0),
            "delta_hidden needs reset_after=True, torch's form",
        ),
        (lambda r: cases.changes(cases.egru(r, 3, 4), 0), "an egru sends events already"),
    ],
)
def test_what_cannot_send_changes_is_refused(op, sentence):
    with pytest.raises(ValueError, match=sentence):
        Program((op(cases.rng(1)),))


def test_a_matrix_that_reads_changes_is_not_w8a8():
    op = cases.changes(cases.gru(cases.rng(1), 5, 7), 0.1, 0.1)
    found = Program((op,)).rounded("w8a8").ops[0]
    assert (found.weight_ih.precision, found.weight_hh.precision) == ("i8", "i8")
    with pytest.raises(ValueError, match=r"weight_ih reads events or changes, .*round it to i8, not w8a8"):
        Program((replace(found, weight_ih=replace(found.weight_ih, precision="w8a8")),))


# --- calibration --------------------------------------------------------------------------------------------------------


def slow_network():
    """Two layers and a decoder whose units hardly move on a slow walk."""
    r = cases.rng(12)
    return Program((cases.gru(r, 12, 40), cases.lstm(r, 40, 24), cases.linear(r, 24, 5)), {"name": "slow"})


def test_calibration_finds_thresholds_within_the_loss_that_save_most():
    program = slow_network()
    sample = [smooth(150, 12, k) for k in range(3)]
    found = sf.calibrate_delta(program, sample, max_loss=0.02)
    again = sf.Engine(found.program).stream()
    dense = [sf.Engine(program).stream().run(x) for x in sample]
    outputs = []
    for x in sample:
        again.reset()
        outputs.append(again.run(x))
    loss = np.linalg.norm(np.concatenate(outputs) - np.concatenate(dense)) / np.linalg.norm(np.concatenate(dense))
    assert found.loss_before == 0 and 0 < found.loss <= 0.02
    assert loss == pytest.approx(found.loss, rel=1e-6)
    assert found.macs == again.cost.per_step("macs_effective") < 0.5 * found.macs_before
    assert found.macs_before == again.cost.per_step("macs_dense") and found.steps == 450
    assert found.loss > 0.01  # what may be lost is spent
    for s in found.sent:
        role = "recurrent" if s.side == "hidden" else "input"
        assert getattr(found.program.ops[s.op], f"delta_{s.side}") == s.threshold > 0
        assert again.counters.read_rate(s.op, role) == s.rate <= 0.8
        assert s.macs == sum(p.macs_effective for p in again.cost.parts if (p.op, p.role) == (s.op, role)) / 450
    text = str(found)
    assert f"{found.loss:.6g} now" in text and "0 hidden" in text
    said = Program.from_bytes(found.program.to_bytes()).metadata
    assert (
        said["name"] == "slow" and said["delta"]["loss"] == found.loss and len(said["delta"]["sent"]) == len(found.sent)
    )


def test_more_loss_saves_more_and_the_search_beats_common_thresholds():
    program, sample = slow_network(), smooth(300, 12, 5)
    little, much = (sf.calibrate_delta(program, sample, max_loss=m) for m in (0.01, 0.1))
    assert much.macs < little.macs < little.macs_before
    scale = np.sqrt(np.mean(np.square(sample)))
    dense = sf.Engine(program).stream().run(sample)
    for factor in 2.0 ** np.arange(-10, 3, 0.5):  # one threshold for all, relative to nothing
        stream = sf.Engine(with_deltas(program, dict.fromkeys(delta_sites(program), factor * scale))).stream()
        loss = np.linalg.norm(stream.run(sample) - dense) / np.linalg.norm(dense)
        if loss <= 0.1:
            assert stream.cost.per_step("macs_effective") >= much.macs


def test_a_loss_of_the_users_own_is_held():
    program, sample = slow_network(), smooth(200, 12, 6)
    target = sf.Engine(program).stream().run(sample)[:, 0] + 0.5
    seen = []

    def loss(outputs):
        assert len(outputs) == 1 and outputs[0].shape == (200, 5)
        seen.append(float(np.mean((outputs[0][:, 0] - target) ** 2)))
        return seen[-1]

    found = sf.calibrate_delta(program, sample, loss, max_loss=0.05)
    assert found.loss_before == seen[0] == pytest.approx(0.25, abs=1e-4)
    assert found.loss in seen and found.loss <= seen[0] + 0.05
    assert len(seen) <= found.plays


def test_calibration_forgets_old_thresholds_and_takes_codes_and_tokens():
    r, sample = cases.rng(2), smooth(100, 12, 7)
    program = slow_network()
    assert (
        sf.calibrate_delta(at_zero(program), sample, max_loss=0.05).sent
        == sf.calibrate_delta(program, sample, max_loss=0.05).sent
    )
    found = sf.calibrate_delta(program.rounded("w8a8"), sample, max_loss=0.05)
    assert {op.weight_hh.precision for op in found.program.ops[:2]} <= {"i8", "w8a8"} and found.loss <= 0.05
    tokens = Program((cases.embedding(r, 7, 12), *program.ops))
    assert delta_sites(tokens) == [(1, "hidden"), (2, "input"), (2, "hidden")]
    assert sf.calibrate_delta(tokens, cases.sequence(tokens, 80), max_loss=0.1).program.ops[1].delta_input is None


def test_noise_saves_nothing_and_all_columns_are_read_again():
    program = Program((cases.rnn(cases.rng(9), 12, 20),))
    found = sf.calibrate_delta(program, cases.sequence(program, 100), max_loss=1e-4)
    assert not any(s.rate > 0.8 for s in found.sent) and found.macs <= found.macs_before


def test_calibration_refuses_what_it_cannot_do():
    program, sample = slow_network(), smooth(30, 12, 8)
    for misuse, sentence in (
        (
            lambda: sf.calibrate_delta(cases.network("egru-block"), sample),
            "no product of this program may read changes",
        ),
        (lambda: sf.calibrate_delta(program, sample, max_loss=0), "max_loss must be above 0, got 0"),
        (lambda: sf.calibrate_delta(program, sample, max_loss=float("nan")), "max_loss must be above 0, got nan"),
        (lambda: sf.calibrate_delta(program, sample, max_loss=1e-12), "thresholds of 0, which send every change, lose"),
        (lambda: sf.calibrate_delta(program, sample[:, :5]), r"sample must be one sequence of \(T, 12\) values"),
        (lambda: sf.calibrate_delta(program, sample[:0]), "hold at least one step"),
        (lambda: sf.calibrate_delta(program, []), "sample must be"),
        (lambda: sf.calibrate_delta(program, None), "sample must be"),
        (
            lambda: sf.calibrate_delta(program, sample, lambda outputs: np.nan),
            "the loss must be a finite number, got nan",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            misuse()
