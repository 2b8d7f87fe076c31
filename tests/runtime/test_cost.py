"""The one cost model against loops that count every multiply, and against the engine's own record of what it did."""

import json
from functools import cache

import numpy as np
import pytest

import cases
import sparsefold as sf
from sparsefold.cost import Part
from sparsefold.program import EGRU, GRU, Cluster, Conv1d, Embedding, LayerNorm, Linear, Picks, Weightless

network = cache(cases.network)
DELTAS = [name for name in cases.NETWORKS if sf.interpret(network(name), cases.sequence(network(name), 1)).changes]
SPEAKING = [
    name for name in cases.NETWORKS if any(isinstance(op, EGRU) for op in network(name).ops) and name not in DELTAS
]


def start(stream, salt):
    """Puts a stream into the middle of a run; returns which units had spoken."""
    state = cases.state(stream.engine.program, salt)
    stream.load_state(state)
    return {int(key.split(".")[0]): y != 0 for key, y in state.items() if key.endswith((".y", ".x"))}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", SPEAKING)
def test_counters_cost_what_the_recorded_trace_costs(name, fold, isa):
    program = network(name)
    engine = sf.Engine(program, fold=fold, isa=isa)
    stream = engine.stream()
    before = start(stream, 3)
    _, trace = stream.run_traced(cases.sequence(program, 25))
    counted = sf.Counts.from_trace(program, trace, before)
    for ours, recorded in (
        (stream.counters.events, counted.events),
        (stream.counters.input_reads, counted.input_reads),
        (stream.counters.hidden_reads, counted.hidden_reads),
    ):
        assert {i: e.tolist() for i, e in ours.items()} == {i: e.tolist() for i, e in recorded.items()}
    assert stream.cost == sf.cost(program, counted, engine.folded)
    assert sum(e.sum() for e in counted.events.values()) > 0
    missed = sf.Counts.from_trace(program, trace)  # what was spoken before the first step is part of the cost
    assert sf.cost(program, missed, engine.folded).macs_effective < stream.cost.macs_effective


@pytest.mark.parametrize("name", ["tokens-cluster", "tokens-cluster-2", "cluster-of-state", "cluster-i8"])
def test_clusters_cost_what_they_cost_at_the_steps_that_asked_for_them(name, isa):
    program, steps = network(name), 40
    stream, x = sf.Engine(program, isa=isa).stream(), cases.sequence(program, steps)
    _, trace = stream.run_traced(x)
    assert stream.counters.asked == {i: steps for i, op in enumerate(program.ops) if isinstance(op, Cluster)}
    stream.reset()
    stream.reset_counters()
    targets = cases.rng(5).integers(0, program.outputs, steps)
    stream.score(x, targets)
    asked = {
        i: (targets >= op.at) & (targets < op.at + op.words)
        for i, op in enumerate(program.ops)
        if isinstance(op, Cluster)
    }
    assert all(0 < flags.sum() < steps for flags in asked.values())
    counted = sf.Counts.from_trace(program, trace, asked=asked)
    assert stream.counters.asked == counted.asked == {i: flags.sum() for i, flags in asked.items()}
    for ours, recorded in (
        (stream.counters.events, counted.events),
        (stream.counters.input_reads, counted.input_reads),
    ):
        assert {i: e.tolist() for i, e in ours.items()} == {i: e.tolist() for i, e in recorded.items()}
    assert stream.cost == sf.cost(program, counted, stream.engine.folded)
    assert stream.cost != sf.cost(program, sf.Counts.from_trace(program, trace), stream.engine.folded)
    stream.reset_counters()
    assert set(stream.counters.asked.values()) == {0} and stream.cost.macs_dense == 0


def test_a_hand_counted_decoder_in_clusters():
    """Three steps of 4 inputs -> 2 words and a cluster of 5 by way of 3 numbers, of which one step asks for it."""
    ones = lambda rows, cols: sf.Dense(np.ones((rows, cols), np.float32))  # noqa: E731
    cluster = Cluster(ones(3, 4), ones(5, 3), np.zeros(5, np.float32), 3, 2)
    program = sf.Program(
        (sf.program.Events(4), Linear(ones(3, 4), np.zeros(3, np.float32)), sf.program.LogSoftmax(3), cluster)
    )
    trace = {0: np.array([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)}
    counts = sf.Counts.from_trace(program, trace, asked={3: np.array([0, 0, 1])})
    assert counts.times(3) == 1 and counts.read_rate(3, "decoder") == 1 / 4 and counts.read_rate(1, "decoder") == 7 / 12
    found = sf.cost(program, counts)
    assert found.parts == (
        Part(1, "decoder", 36, 36, 21, 84, 0, 1.0),
        Part(3, "decoder", 12 + 15, 12 + 15, 3 + 15, 4 * 18, 0, 1.0),
    )
    assert found.unit_updates == 3 * (4 + 3) + 5
    assert found.bytes_state == 8 * (7 + 7 + 1)  # events written, read by the linear, and once by the projection
    assert found.per_step("macs_effective", "decoder") == (21 + 18) / 3
    every = sf.cost(program, sf.Counts.from_trace(program, trace))
    assert every.parts[1] == Part(3, "decoder", 81, 81, 3 * 7 + 45, 4 * 66, 0, 1.0)


def test_counts_go_on_over_several_calls():
    program = network("three")
    stream = sf.Engine(program).stream()
    x, pieces = cases.sequence(program, 30), []
    for part in (x[:11], x[11:11], x[11:]):
        pieces.append(stream.run_traced(part)[1])
    whole = {i: np.concatenate([p[i] for p in pieces]) for i in pieces[0]}
    assert stream.cost == sf.cost(program, sf.Counts.from_trace(program, whole), stream.engine.folded)


# --- counting one multiply at a time --------------------------------------------------------------------------------------


def stored(matrix):
    """{column: rows of the elements that are stored}, found without the format's own arithmetic."""
    if isinstance(matrix, sf.Dense):
        return {c: range(matrix.shape[0]) for c in range(matrix.shape[1])}
    units = matrix.rows // matrix.gates
    found = {c: [] for c in range(matrix.cols)}
    if isinstance(matrix, sf.CSC):
        return {c: matrix.row[int(matrix.start[c]) : int(matrix.start[c + 1])] for c in found}
    if isinstance(matrix, sf.Complementary):
        for c, gate, s, i in np.ndindex(matrix.values.shape):
            row = (int(matrix.live[c, gate, s]) * matrix.live.shape[2] + s) * matrix.group + i
            if row < units:
                found[c].append(gate * units + row)
        return found
    br, bc = matrix.block
    for column in range(len(matrix.start) - 1):
        for k in range(int(matrix.start[column]), int(matrix.start[column + 1])):
            gate, block = divmod(int(matrix.block_row[k]), -(-units // br))
            for row in range(block * br, block * br + br):
                for c in range(column * bc, column * bc + bc):
                    if row < units and c < matrix.cols:
                        found[c].append(gate * units + row)
    return found


def multiplies(matrix, read):
    """Multiply-accumulates of one product that reads the columns where ``read``, one at a time."""
    count = 0
    for column, rows in stored(matrix).items():
        if read[column]:
            for _ in rows:
                count += 1
    return count


def brute(program, trace, before, changes, steps, folded):
    """{(op, role): [dense, weight, effective]} of a run, every step and every element by itself."""
    parts, past = {}, {}
    for t in range(steps):
        speaking = of_linear = (
            None  # which of the values that the next op, or the last linear, reads are events; None: all are read
        )
        for i, op in enumerate(program.ops):
            if isinstance(op, Embedding):
                parts.setdefault((i, "embedding"), [0, 0, 0])
                continue
            if isinstance(op, Weightless | LayerNorm):
                speaking = trace[i][t] if isinstance(op, Picks) else None
                continue
            if isinstance(op, Cluster):
                total = parts.setdefault((i, "decoder"), [0, 0, 0])
                for matrix, read in ((op.projection, of_linear), (op.weight, None)):
                    everything = np.ones(matrix.shape[1], bool)
                    total[0] += matrix.shape[0] * matrix.shape[1]
                    total[1] += multiplies(matrix, everything)
                    total[2] += multiplies(matrix, everything if read is None else read)
                continue
            if isinstance(op, Conv1d):
                now = np.ones((1, op.inputs), bool) if speaking is None else speaking[None]
                past[i] = np.concatenate([past.get(i, before.get(i, np.zeros((0, op.inputs), bool))), now])
                read = past[i][-op.history - 1 :: op.dilation].reshape(-1)
                total = parts.setdefault((i, "convolution"), [0, 0, 0])
                for row in range(op.outputs):  # one multiply for each input of its group and each tap
                    group = row // (op.outputs // op.groups)
                    for column in range(op.kernel * op.inputs):
                        total[0] += column % op.inputs // (op.inputs // op.groups) == group
                total[1] += multiplies(op.weight, np.ones(len(read), bool))
                total[2] += multiplies(op.weight, np.ones(len(read), bool) if speaking is None else read)
                speaking = None
                continue
            spoken_before = None
            if isinstance(op, EGRU):
                spoken_before = trace[i][t - 1] if t else before[i]
            if (i, "h") in changes:
                spoken_before = changes[i, "h"][t]
            if (i, "x") in changes:
                speaking = changes[i, "x"][t]
            of_linear = speaking
            refined = isinstance(program.ops[min(i + 2, len(program.ops) - 1)], Cluster)
            role = "decoder" if i == len(program.ops) - 1 or refined else "linear"
            products = [(role, op.weight, speaking)] if isinstance(op, Linear) else [
                ("input", op.weight_ih, speaking), ("recurrent", op.weight_hh, spoken_before)
            ]  # fmt: skip
            for role, matrix, read in products:
                everything = np.ones(matrix.shape[1], bool)
                total = parts.setdefault((i, role), [0, 0, 0])
                for _ in range(matrix.shape[0]):
                    for _ in range(matrix.shape[1]):
                        total[0] += 1
                total[1] += multiplies(matrix, everything)
                if not (folded and i == 1 and role == "input"):
                    total[2] += multiplies(matrix, everything if read is None else read)
            speaking = trace[i][t] if isinstance(op, EGRU) and op.output == "events" else None
    return parts


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", cases.NETWORKS)
def test_a_loop_that_counts_every_multiply_agrees(name, fold):
    program, steps = network(name), 3
    engine = sf.Engine(program, fold=fold)
    stream = engine.stream()
    before = start(stream, 5)
    x = cases.sequence(program, steps)
    changes = sf.interpret(program, x, stream.save_state()).changes
    _, trace = stream.run_traced(x)
    counted = {(p.op, p.role): [p.macs_dense, p.macs_weight, p.macs_effective] for p in stream.cost.parts}
    assert counted == brute(program, trace, before, changes, steps, engine.folded)


@pytest.mark.parametrize("name", DELTAS)
def test_changes_are_counted_where_the_oracle_sends_them_and_once_more_when_memories_are_summed_anew(name, isa):
    program = network(name)
    stream, x = sf.Engine(program, isa=isa).stream(), cases.sequence(program, 12)
    stream.load_state(cases.state(program, 4))
    seen = sf.interpret(program, x, stream.save_state())
    for t, value in enumerate(x):  # from the oracle's own state, so that no unit parts at its threshold
        stream.load_state(sf.interpret(program, x[:t], cases.state(program, 4)).state)
        stream.reset_counters()
        stream.run(np.array([value]))
        anew = stream.save_state()
        for (i, side), changed in seen.changes.items():
            counted = stream.counters.input_reads[i] if side == "x" else stream.counters.hidden_reads[i]
            expected = anew[f"{i}.sent_{side}"] != 0 if anew[f"{i}.age"][0] == 0 else changed[t]
            np.testing.assert_array_equal(counted, expected)
            reads = stream.counters.read_rate(i, "input" if side == "x" else "recurrent")
            assert reads == expected.mean()
    assert sum(len(c) * c.shape[1] - c.sum() for c in seen.changes.values()) > 0


def test_a_trace_says_nothing_of_changes():
    with pytest.raises(ValueError, match=r"changes this program sends. Take Stream.counters"):
        sf.Counts.from_trace(network("delta-gru"), {})


def test_a_hand_counted_network_of_changes():
    """Two steps of 3 -> 4 units that send changes of x and of h, then 2 outputs, every figure by hand."""
    z = np.zeros
    ones = (sf.Dense(np.ones((n, 12), np.float32).T, 3) for n in (3, 4))
    op = GRU(*ones, z(12, np.float32), z(12, np.float32), delta_input=0.1, delta_hidden=0.2)
    program = sf.Program((op, Linear(sf.Dense(np.ones((2, 4))), z(2, np.float32))))
    counts = sf.Counts(2, input_reads={0: np.array([2, 0, 1])}, hidden_reads={0: np.array([1, 0, 0, 0])})
    assert counts.read_rate(0, "input") == 3 / 6 and counts.read_rate(0, "recurrent") == 1 / 8
    assert counts.read_rate(1, "decoder") is None
    found = sf.cost(program, counts)
    assert found.parts == (
        Part(0, "input", 72, 72, 3 * 12, 4 * 36, 0, 1.0),
        Part(0, "recurrent", 96, 96, 12, 48, 0, 1.0),
        Part(1, "decoder", 16, 16, 16, 64, 0, 1.0),
    )
    assert found.unit_updates == 2 * (4 + 3 + 4)  # the units; what is looked at for changes
    # h, what was sent of x and h and both memories, in and out; four changes listed, written and read
    assert found.bytes_state == 2 * (4 + 4) * (4 + 3 + 4 + 12 + 12) + (8 + 8) * 4


def test_a_dense_network_executes_all_of_its_weights():
    program = network("gru-before")
    stream = sf.Engine(program).stream()
    stream.run(cases.sequence(program, 4))
    assert stream.cost.macs_dense == stream.cost.macs_weight == stream.cost.macs_effective == 4 * (48 * 16 + 48 * 16)


def test_silent_units_cost_nothing_and_speaking_ones_their_columns():
    r = cases.rng(1)
    op = cases.egru(r, 4, 8, (4, 1), 0.5)
    decoder = cases.linear(r, 8, 3)
    program = sf.Program((op, decoder))
    trace = {0: np.zeros((2, 8), bool)}
    silent = sf.cost(program, sf.Counts.from_trace(program, trace))
    assert {p.role: p.macs_effective for p in silent.parts} == {
        "input": 2 * op.weight_ih.elements,
        "recurrent": 0,
        "decoder": 0,
    }
    trace[0][0, 5] = True
    spoken = sf.cost(program, sf.Counts.from_trace(program, trace))
    assert spoken.macs_effective - silent.macs_effective == op.weight_hh.column_elements[5] + 3
    last = sf.cost(
        program, sf.Counts.from_trace(program, {0: trace[0][::-1]})
    )  # nobody has read the last step's event yet
    assert last.macs_effective - silent.macs_effective == 3


def test_a_hand_counted_network():
    """Two steps of 2 tokens -> 3 -> 4 units (blocks of 2x1) -> 2, every figure by hand."""
    weight = np.zeros((12, 4), np.float32)
    weight[0, 0] = weight[2, 0] = weight[11, 3] = 1  # two blocks in column 0, one in column 3
    z = np.zeros
    op = EGRU(
        sf.Dense(np.ones((12, 3)), 3), sf.Block.from_dense(weight, (2, 1), 3), z(12, np.float32), z(12, np.float32),
        threshold=z(4, np.float32),
    )  # fmt: skip
    program = sf.Program(
        (Embedding(np.ones((2, 3), np.float32)), op, Linear(sf.Dense(np.ones((2, 4))), z(2, np.float32)))
    )
    trace = {1: np.array([[1, 0, 0, 1], [0, 1, 0, 0]], bool)}
    counts = sf.Counts.from_trace(program, trace, {1: np.array([0, 0, 0, 1])})
    assert (counts.steps, counts.event_rate(), counts.event_rate(1)) == (2, 3 / 8, 3 / 8)
    assert counts.hidden_reads[1].tolist() == [1, 0, 0, 2] and counts.input_reads[2].tolist() == [1, 1, 0, 1]
    found = sf.cost(program, counts)
    recurrent = 4 + 2 * 2  # column 0 once (two blocks), column 3 twice (one block)
    assert found.parts == (
        Part(0, "embedding", 0, 0, 0, 2 * 12, 0, 1.0),
        Part(1, "input", 72, 72, 72, 288, 0, 1.0),
        Part(1, "recurrent", 96, 12, recurrent, 4 * recurrent, (8 + 8) + 2 * (4 + 8), 6 / 48),
        Part(2, "decoder", 16, 16, 6, 24, 0, 1.0),
    )
    assert found.unit_updates == 8
    assert found.bytes_state == 2 * (4 + 4) * 4 + 8 * (3 + 3 + 3)  # h in and out; index and value of each event listed
    folded = sf.cost(program, counts, folded=True)
    assert folded.parts[0] == Part(0, "embedding", 0, 0, 0, 0, 0, 1.0)
    assert folded.parts[1] == Part(1, "input", 72, 72, 0, 2 * 12 * 4, 0, 1.0)
    assert folded.parts[2:] == found.parts[2:]


@pytest.mark.parametrize(("name", "bytes_a_step"), [("gru", 31 * 8), ("lstm", 31 * 16), ("rnn", 31 * 8)])
def test_what_a_dense_cell_carries_is_read_and_written(name, bytes_a_step):
    program = network(name)
    assert sf.cost(program, sf.Counts(5)).bytes_state == 5 * bytes_a_step


@pytest.mark.parametrize(
    "name",
    [
        "three",
        "mixed-3",
        "gru-block-2",
        "linear",
        "tokens-lstm",
        "rnn-of-events",
        "relu",
        "kwta",
        "events",
        "tokens-layer-norm",
        "conv-of-events",
    ],
)
def test_to_dict_sums_and_is_json(name):
    program = network(name)
    stream = sf.Engine(program).stream()
    stream.run(cases.sequence(program, 8))
    found, shown = stream.cost, stream.cost.to_dict()
    assert json.loads(json.dumps(shown)) == shown and shown["steps"] == 8
    for field in ("macs_dense", "macs_weight", "macs_effective", "bytes_weights", "bytes_index"):
        assert (
            shown[field]
            == sum(part[field] for part in shown["parts"])
            == getattr(found, field) / 8
            == found.per_step(field)
        )
        roles = {p.role for p in found.parts}
        assert sum(found.per_step(field, role) for role in roles) == shown[field]
        assert isinstance(getattr(found, field), int)
    assert shown["unit_updates"] == sum(
        op.outputs for op in program.ops if not isinstance(op, Embedding | Linear | Conv1d)
    )
    assert shown["bytes_state"] == found.bytes_state / 8
    assert found.macs_dense >= found.macs_weight >= found.macs_effective
    assert {part["op"] for part in shown["parts"]} == {
        i for i, op in enumerate(program.ops) if not isinstance(op, Weightless | LayerNorm)
    }


def test_nothing_played_costs_nothing():
    program = network("three")
    found = sf.Engine(program).stream().cost
    assert (found.steps, found.macs_dense, found.macs_effective, found.bytes_state) == (0, 0, 0, 0)
    assert found.per_step("macs_dense") == 0.0 and found.to_dict()["macs_dense"] == 0.0
    assert sf.Counts(0).event_rate() == 0.0
    empty = sf.Counts.from_trace(program, {i: np.zeros((0, program.ops[i].outputs), bool) for i in (1, 2, 3)})
    assert sf.cost(program, empty).macs_dense == 0


def test_event_rate_is_over_units_and_steps():
    counts = sf.Counts(4, {0: np.array([4, 0]), 1: np.array([1, 1, 1, 1, 1, 1])})
    assert counts.event_rate(0) == 0.5 and counts.event_rate(1) == 0.25
    assert counts.event_rate() == 10 / 32
    assert counts.event_rate(7) == 0.0
