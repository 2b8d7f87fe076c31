"""What a stream says of one output alone: the bits of a step, a cluster computed only where it is asked for, and its refusals."""

import threading
import tracemalloc
from functools import cache

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold.program import Cluster, LogSoftmax, Program, TopK

network = cache(cases.network)
KINDS = {name: network(name).ops[-1].kind for name in cases.NETWORKS}
LOGPROBS = [name for name, kind in KINDS.items() if kind in ("log_softmax", "cluster")]
LOGITS = [name for name, kind in KINDS.items() if kind == "linear"]
F = np.float32


def three_clusters(**options):
    """Of 5 first words and 17, 3 and 1 more, behind events; the clusters stand at 5, 22 and 25."""
    r = cases.rng(9)
    decoder = cases.adaptive(r, 20, 5, (7, 17), (3, 3), (2, 1))
    return Program((cases.embedding(r, 11, 8), cases.egru(r, 8, 20, **options), *decoder))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", LOGPROBS)
def test_a_score_of_every_output_has_the_bits_of_a_run(name, fold, isa):
    program = network(name)
    fold = fold if program.takes_tokens else "auto"
    engine, x = sf.Engine(program, fold=fold, isa=isa), cases.sequence(program, 7)
    played = engine.stream().run(x)
    for target in range(program.outputs):
        found = engine.stream().score(x, np.full(7, target))
        assert found.dtype == np.float32 and found.tobytes() == played[:, target].tobytes()
        stream = engine.stream()
        assert [stream.score(v, target) for v in x] == played[:, target].tolist()


@pytest.mark.parametrize("name", LOGITS)
def test_a_score_of_logits_is_their_log_softmax(name, isa):
    program = network(name)
    engine, x = sf.Engine(program, isa=isa), cases.sequence(program, 5)
    logits = engine.stream().run(x).astype(np.float64)
    for target in range(program.outputs):
        found = engine.stream().score(x, np.full(5, target))
        for score, row in zip(found, logits, strict=True):
            value, bound = tolerances.log_softmax(row, np.zeros(len(row)))
            assert abs(score - value[target]) <= bound[target]


def test_a_score_is_what_the_oracle_says(isa):
    program = three_clusters(output="state")
    x, targets = cases.sequence(program, 60), cases.rng(2).integers(0, program.outputs, 60)
    expected = sf.interpret(program, x).outputs[np.arange(60), targets]
    found = sf.Engine(program, isa=isa).stream().score(x, targets)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.FREE_RUNNING_F32)


def test_steps_runs_and_scores_go_on_from_one_another(isa):
    program, steps = three_clusters(), 30
    engine, x = sf.Engine(program, isa=isa), cases.sequence(three_clusters(), 30)
    targets, played = cases.rng(4).integers(0, program.outputs, steps), engine.stream().run(x)
    stream, at = engine.stream(), 0
    for turn in range(10):
        now = slice(at, at + 3)
        if turn % 3 == 0:
            assert stream.run(x[now]).tobytes() == played[now].tobytes()
        elif turn % 3 == 1:
            assert stream.score(x[now], targets[now]).tobytes() == played[now][np.arange(3), targets[now]].tobytes()
        else:
            singles = [stream.score(int(v), int(t)) for v, t in zip(x[now], targets[now], strict=True)]
            assert singles == played[now][np.arange(3), targets[now]].tolist()
        at += 3
    assert stream.counters.steps == steps
    assert {k: v.tobytes() for k, v in stream.save_state().items()} == _state_after(engine, x)


def _state_after(engine, x):
    stream = engine.stream()
    stream.run(x)
    return {k: v.tobytes() for k, v in stream.save_state().items()}


@pytest.mark.parametrize(
    ("target", "asked"),
    [(0, None), (4, None), (5, 4), (21, 4), (22, 5), (24, 5), (25, 6)],
    ids=["first", "last-of-the-head", "first-of-one", "last-of-one", "first-of-two", "last-of-two", "the-last-word"],
)
def test_only_the_cluster_that_holds_the_target_is_computed(target, asked):
    program = three_clusters()
    assert [op.at for op in program.ops if isinstance(op, Cluster)] == [5, 22, 25] and program.outputs == 26
    stream = sf.Engine(program).stream()
    stream.score(cases.sequence(program, 9), np.full(9, target))
    assert stream.counters.asked == {i: 9 * (i == asked) for i in (4, 5, 6)}
    emitted = stream.counters.events[1].sum()
    assert {i: stream.counters.input_reads[i].sum() for i in (2, 4, 5, 6)} == {
        2: emitted, **{i: emitted * (i == asked) for i in (4, 5, 6)}
    }  # fmt: skip
    macs = {part.op: part.macs_effective for part in stream.cost.parts}
    assert {i for i in (4, 5, 6) if macs[i]} == ({asked} if asked else set())
    if asked:
        op = program.ops[asked]
        assert macs[asked] == emitted * op.projection.shape[0] + 9 * op.weight.elements


def test_every_step_and_every_run_computes_all_clusters():
    program = three_clusters()
    engine = sf.Engine(program)
    streams = [engine.stream() for _ in range(3)]
    engine.step_batch(streams, [1, 2, 3])
    streams[0].step(4)
    streams[0].run([5, 6])
    assert [set(s.counters.asked.values()) for s in streams] == [{4}, {1}, {1}]


def test_a_second_thread_changes_no_bit_of_a_score():
    large = cases.large_layers()
    program = Program((*large.ops, *cases.adaptive(cases.rng(6), large.outputs, 5, (7, 17))))
    x, targets = cases.sequence(program, 60), cases.rng(2).integers(0, program.outputs, 60)
    one, two = (sf.Engine(program, threads=n).stream().score(x, targets) for n in (1, 2))
    assert one.tobytes() == two.tobytes()


def test_the_projection_reads_what_the_linear_reads():
    """Of three programs: events, a dense state, and the input of the program itself."""
    events, state, alone = (network(n) for n in ("tokens-cluster", "cluster-of-state", "cluster-alone"))
    for program, reads in ((events, True), (state, False), (alone, False)):
        clusters = [i for i, op in enumerate(program.ops) if isinstance(op, Cluster)]
        assert clusters and {program.first_step(i) for i in clusters} == {clusters[0] - 2}
        assert {program.by_events(i, "projection") for i in clusters} == {reads}
        assert not any(program.by_events(i, "weight") for i in clusters)
    rounded = events.rounded("w8a8").ops[4]
    assert rounded.projection.precision == "i8" and rounded.weight.precision == "w8a8"
    assert {m.precision for m in (state.rounded("w8a8").ops[3].projection, rounded.weight)} == {"w8a8"}


def test_a_cluster_behind_a_layer_that_reads_both_ways(isa):
    r = cases.rng(12)
    layer = cases.two_ways(cases.egru, r, 6, 9)
    program = Program((*layer, *cases.adaptive(r, 18, 4, (3, 5), (2, 7)), *cases.two_ways(cases.rnn, r, 16, 3)))
    x = cases.sequence(program, 9)
    stream = sf.Engine(program, isa=isa).stream()
    np.testing.assert_allclose(
        stream.run(x), sf.interpret(program, x).outputs, rtol=0, atol=tolerances.FREE_RUNNING_F32
    )
    assert stream.counters.asked == {4: 9, 5: 9}
    with pytest.raises(ValueError, match=r"plays whole sequences, not one step. Pass the sequence to Stream.run"):
        stream.score(x, [0] * 9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["cluster-alone", "linear"])
def test_what_is_not_finite_in_an_input_is_seen_in_a_score(name, bad, isa):
    program = network(name)
    x = np.zeros(program.inputs, F)
    x[-1] = bad
    for target in range(program.outputs):
        assert not np.isfinite(sf.Engine(program, isa=isa).stream().score(x, target))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_any_whole_number_is_a_target():
    program = network("tokens-cluster")
    x, expected = cases.sequence(program, 4), sf.Engine(program).stream().run(cases.sequence(program, 4))
    for kind in (int, np.int64, np.uint8, np.int32):
        found = sf.Engine(program).stream().score(int(x[0]), kind(6))
        assert type(found) is float and found == expected[0, 6]
    for targets in ([6, 0, 5, 7], (6, 0, 5, 7), np.array([6, 0, 5, 7], np.uint16)):
        assert sf.Engine(program).stream().score(x, targets).tolist() == expected[range(4), [6, 0, 5, 7]].tolist()
    nothing = sf.Engine(program).stream().score([], [])
    assert nothing.shape == (0,) and nothing.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "target", "sentence"),
    [
        (1, 22, r"target 22 is outside the outputs: this program gives values 0 to 21"),
        (1, -1, r"target -1 is outside the outputs"),
        (1, 2**63, r"target does not fit 64 bits"),
        (1, 1.0, r"a target is a whole number, an int; got float"),
        (1, "a", r"a target is a whole number, an int; got str"),
        (1, None, r"a target is a whole number, an int; got NoneType"),
        (7, 1, r"token 7 is outside the vocabulary"),
        ([1, 2], 1, r"step\(\) takes one token id, an int; got list"),
        (1, [1], r"a sequence is \(T,\) token ids; got int64 \(\)"),
        ([1, 2], [1], r"a sequence of 2 steps is scored at \(2,\) whole numbers, a target for each; got int64 \(1,\)"),
        ([1, 2], [1.0, 2.0], r"got float64 \(2,\)"),
        ([1, 2], [[1, 2]], r"got int64 \(1, 2\)"),
        ([1, 2], [1, 22], r"target 22 is outside the outputs"),
        ([1, 2], [-1, 2], r"target -1 is outside the outputs"),
        ([1, 7], [1, 2], r"token 7 is outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_nothing_is_played(x, target, sentence):
    stream = sf.Engine(network("tokens-cluster")).stream()
    with pytest.raises(ValueError, match=sentence):
        stream.score(x, target)
    assert stream.counters.steps == 0 and not any(v.any() for v in stream.save_state().values())


@pytest.mark.parametrize(
    "x", [np.zeros(8, F), np.zeros(9), np.zeros((1, 9), F), 3, [0.0] * 9], ids=["size", "type", "axes", "token", "list"]
)
def test_values_of_another_shape_or_type_are_refused(x):
    stream = sf.Engine(network("cluster-alone")).stream()
    with pytest.raises(ValueError, match="x must be float32 of shape"):
        stream.score(x, 0)
    with pytest.raises(ValueError, match=r"a sequence for this program has shape \(T, 9\)"):
        stream.score(np.zeros((2, 8), F), [0, 0])
    assert stream.counters.steps == 0


@pytest.mark.parametrize("name", ["top-k", "gru", "kwta", "layer-norm", "embedding", "tokens-argmax", "conv"])
def test_a_program_that_ends_in_another_op_is_refused(name):
    program = network(name)
    stream, x = sf.Engine(program).stream(), cases.sequence(program, 2)
    for of, target in ((x[0], 0), (x, [0, 0])):
        with pytest.raises(
            ValueError, match="a score needs a program whose last op is a linear, a log_softmax or a cluster"
        ):
            stream.score(of, target)
    assert stream.counters.steps == 0


def test_a_stream_in_use_is_refused_to_another_thread():
    program = Program(
        (cases.egru(cases.rng(1), 600, 600, output="state"), *cases.adaptive(cases.rng(2), 600, 5, (9, 17)))
    )
    stream, x, seen = sf.Engine(program).stream(), np.ones((300, 600), F), []

    def work():
        try:
            stream.score(x, np.zeros(300, int))
            seen.append("played")
        except RuntimeError as error:
            seen.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert "played" in seen
    assert set(seen) <= {"played", "this stream is in use by another thread. Give each thread its own engine.stream()."}


def test_scores_of_a_long_sequence_take_no_room_for_all_outputs():
    program = Program((cases.embedding(cases.rng(1), 5, 4), *cases.adaptive(cases.rng(2), 4, 5, (2, 3000))))
    stream, x = sf.Engine(program).stream(), cases.sequence(program, 2000)
    tracemalloc.start()
    try:
        stream.score(x, np.full(2000, 7))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


# --- the op ------------------------------------------------------------------------------------------------------------


def test_interpret_is_the_equation_written_out():
    rows = lambda *v: sf.Dense(np.array(v, F))  # noqa: E731
    head = sf.program.Linear(rows([1, 0], [0, 1], [1, 1]), np.array([0.5, 0, -0.5], F))
    cluster = Cluster(rows([2, -1]), rows([1], [3]), np.array([0, 0.25], F), 3, 1)
    x = np.array([0.5, -1.5])
    seen = sf.interpret(Program((head, LogSoftmax(3), cluster)), [x]).outputs[0]
    e = np.exp([0.5 + 0.5, -1.5, -1 - 0.5])
    narrow = 2 * 0.5 + 1.5
    words = np.exp([narrow, 3 * narrow + 0.25])
    expected = [e[0] / e.sum(), *(e[1] / e.sum() * words / words.sum()), e[2] / e.sum()]
    np.testing.assert_allclose(np.exp(seen), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "cluster"])
def test_the_probabilities_of_all_words_sum_to_one(name, isa):
    program = network(name)
    out = sf.Engine(program, isa=isa).stream().run(cases.sequence(program, 6)).astype(np.float64)
    np.testing.assert_allclose(np.exp(out).sum(1), 1, rtol=0, atol=1e-5)


def test_a_cluster_may_be_followed_by_whatever_reads_all_words(isa):
    program = three_clusters()
    best = Program((*program.ops, TopK(program.outputs, 4)))
    x = cases.sequence(program, 5)
    out, found = (sf.Engine(p, isa=isa).stream().run(x) for p in (program, best))
    order = np.argsort(-out, 1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found, np.concatenate([order, np.take_along_axis(out, order, 1)], 1))
