"""compile_model: the compiled program plays what torch plays, formats are chosen by zeros, the rest is refused by name."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch

import sparsefold as sf
from sparsefold.formats import CSC, Block, Complementary, Dense
from sparsefold.lowering import choose
from sparsefold.nn import EGRU, KWTA, AdaptiveDecoder, CausalConv1d, EGRUState, Stack
from sparsefold.sparsify import Block as BlockRule
from sparsefold.sparsify import Magnitude, Pruner
from tolerances import CELL_F64, FREE_RUNNING_F32, program_step

FORMS = [
    {"reset": reset, "reset_after": reset_after, "output": output}
    for reset in ("threshold", "output", "none")
    for reset_after in (True, False)
    for output in ("events", "state")
]


def engine_state(model: Stack, state, program: sf.Program) -> dict[str, np.ndarray]:
    """The state of a torch stack under the names the engine uses."""
    out, op = {}, 0
    for module, s in zip(model, state, strict=True):
        layers = getattr(module, "num_layers", 1) if not isinstance(module, torch.nn.Dropout) else 0
        for k in range(layers):
            if isinstance(s, EGRUState):
                out |= {f"{op + k}.h": s.h[k, 0].numpy(), f"{op + k}.y": s.y[k, 0].numpy()}
            elif isinstance(s, tuple):
                out |= {f"{op + k}.h": s[0][k, 0].numpy(), f"{op + k}.c": s[1][k, 0].numpy()}
            elif s is not None:
                out[f"{op + k}.h"] = s[k, 0].numpy()
        op += layers
    return out


def assert_plays_alike(model: Stack, tokens: list[int]) -> None:
    """Teacher-forced: from torch's state, one step of torch and one of the engine both lie within the step's own bound."""
    program = sf.compile_model(model)
    stream, state = sf.Engine(program).stream(), None
    before = stream.save_state()
    model.eval()
    with torch.no_grad():
        for token in tokens:
            stream.load_state(before)
            logits, state, _ = model(torch.tensor([[token]]), state)
            out, emitted = stream.run_traced([token])
            after = engine_state(model, state, program)
            exact = program_step(program, token, before)
            value, bound = exact["out"]
            assert (np.abs(out[0] - value) <= bound).all()
            assert (np.abs(logits[0, 0].numpy() - value) <= bound).all()
            for i in emitted:
                differs = emitted[i][0] != (after[f"{i}.y"] != 0)
                u, error = exact[f"{i}.u"]
                assert (np.abs(u - program.ops[i].threshold) <= error)[differs].all()
            before = after


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_egru_forms_play_as_in_torch(form) -> None:
    torch.manual_seed(0)
    model = Stack(
        torch.nn.Embedding(11, 7), EGRU(7, 19, 2, zoneout=0.1, threshold=0.1, **form), torch.nn.Linear(19, 11)
    )
    assert_plays_alike(model, np.random.default_rng(1).integers(0, 11, 40).tolist())


def test_gru_dropout_and_always_play_as_in_torch() -> None:
    torch.manual_seed(0)
    dense = torch.nn.GRU(9, 21, 2, dropout=0.3, bias=False)
    always = EGRU(21, 17, event="always", threshold=0.0, reset="none")
    model = Stack(torch.nn.Embedding(5, 9), dense, torch.nn.Dropout(0.5), always, torch.nn.Linear(17, 5, bias=False))
    assert_plays_alike(model, np.random.default_rng(2).integers(0, 5, 40).tolist())


@pytest.mark.parametrize("bias", [True, False])
def test_lstm_and_rnn_play_as_in_torch(bias) -> None:
    torch.manual_seed(0)
    model = Stack(
        torch.nn.Embedding(5, 9), torch.nn.LSTM(9, 21, 2, dropout=0.3, bias=bias), EGRU(21, 17, threshold=0.05),
        torch.nn.LSTM(17, 19, bias=bias), torch.nn.RNN(19, 18, 2, bias=bias), EGRU(18, 16, threshold=0.05),
        torch.nn.RNN(16, 33, nonlinearity="relu", bias=bias), torch.nn.Linear(33, 5),
    )  # fmt: skip
    assert_plays_alike(model, np.random.default_rng(2).integers(0, 5, 40).tolist())


def test_relu_plays_as_in_torch_and_hands_on_events() -> None:
    torch.manual_seed(0)
    model = Stack(
        torch.nn.Embedding(5, 40), torch.nn.ReLU(), torch.nn.GRU(40, 21), torch.nn.ReLU(inplace=True),
        torch.nn.Linear(21, 17), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(17, 5),
    )  # fmt: skip
    program = sf.compile_model(model)
    assert [i for i in range(len(program.ops)) if program.reads_events(i)] == [2, 4, 6]
    x = np.random.default_rng(2).integers(0, 5, 40)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)[:, None])[0][:, 0].numpy()
    stream = sf.Engine(program).stream()
    np.testing.assert_allclose(stream.run(x), expected, rtol=0, atol=FREE_RUNNING_F32)
    assert 0.2 < stream.counters.event_rate() < 0.8
    assert stream.cost.macs_effective < 0.8 * stream.cost.macs_weight


def plays_as_in_torch(model: torch.nn.Module, x: torch.Tensor) -> sf.Program:
    """Compiles a model without state and compares what it makes of (T, I) values or (T,) tokens."""
    program = sf.compile_model(model.eval())
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(sf.Engine(program).stream().run(x.numpy()), expected, rtol=0, atol=FREE_RUNNING_F32)
    return program


def test_kwta_and_log_softmax_play_as_in_torch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(9, 36), KWTA(36, 9, k_eval=6, boost=1.0), torch.nn.Linear(36, 40), KWTA(40, 2, groups=5),
        torch.nn.Linear(40, 17), torch.nn.LogSoftmax(-1),
    )  # fmt: skip
    model(torch.randn(50, 9))  # in training: the duty cycles move
    program = plays_as_in_torch(model, torch.randn(40, 9))
    assert [op.kind for op in program.ops] == ["linear", "kwta", "linear", "kwta", "linear", "log_softmax"]
    assert (program.ops[1].k, program.ops[3].groups) == (6, 5)
    with pytest.raises(ValueError, match="a LogSoftmax over axis 1 cannot be compiled"):
        sf.compile_model(torch.nn.Sequential(torch.nn.Linear(9, 3), torch.nn.LogSoftmax(1)))


def test_a_head_is_made_of_the_last_outputs() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(9, 17), torch.randn(20, 9)
    with torch.no_grad():
        logits = model(x)
    played = {
        head: sf.Engine(sf.compile_model(model, head=head)).stream().run(x.numpy())
        for head in ("log_softmax", "argmax", 4)
    }
    np.testing.assert_allclose(played["log_softmax"], logits.log_softmax(-1), rtol=0, atol=FREE_RUNNING_F32)
    best = logits.topk(4)
    np.testing.assert_array_equal(played[4][:, :4], best.indices)
    np.testing.assert_allclose(played[4][:, 4:], best.values, rtol=0, atol=FREE_RUNNING_F32)
    np.testing.assert_array_equal(played["argmax"], played[4][:, [0, 4]])
    for wrong in ("softmax", 2.0, True):
        with pytest.raises(ValueError, match="head is 'log_softmax', 'argmax', a number of largest values, or None"):
            sf.compile_model(model, head=wrong)
    with pytest.raises(ValueError, match="of 17 values in 1 equal parts, 18 of each cannot be kept"):
        sf.compile_model(model, head=18)


@pytest.mark.parametrize("cutoffs", [(1,), (5,), (5, 22), (1, 2, 29)], ids=str)
def test_an_adaptive_decoder_plays_as_in_torch(cutoffs) -> None:
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(12, 30, cutoffs, divide=2.0, share=torch.rand(30))
    program = plays_as_in_torch(decoder, torch.randn(40, 12))
    assert [op.kind for op in program.ops] == ["linear", "log_softmax"] + ["cluster"] * len(cutoffs)
    assert [op.at for op in program.ops[2:]] == [*cutoffs] and program.outputs == 30
    assert [op.projection.shape for op in program.ops[2:]] == [((6, 3, 2)[k], 12) for k in range(len(cutoffs))]
    again = sf.Program.from_bytes(program.to_bytes())
    assert again.to_bytes() == program.to_bytes()


@pytest.mark.parametrize("output", ["events", "state"])
def test_an_adaptive_decoder_behind_events_scores_what_torch_says(output) -> None:
    torch.manual_seed(0)
    model = Stack(
        torch.nn.Embedding(30, 16), EGRU(16, 40, threshold=0.1, output=output), torch.nn.Dropout(0.3),
        AdaptiveDecoder(40, 30, (5, 22)),
    )  # fmt: skip
    words = np.random.default_rng(1).integers(0, 30, 61)
    program = sf.compile_model(model, sample=words)
    choices = {(c["op"], c["matrix"]): c["rate"] for c in program.metadata["choices"]}
    reads = "counted" if output == "events" else "dense x"
    assert choices == {
        (1, "weight_ih"): "dense x", (1, "weight_hh"): "counted", (2, "weight"): reads,
        (4, "projection"): reads, (4, "weight"): "dense x", (5, "projection"): reads, (5, "weight"): "dense x",
    }  # fmt: skip
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(words[:-1, None]))[0][:, 0].numpy()
    stream = sf.Engine(program).stream()
    found = stream.score(words[:-1], words[1:])
    np.testing.assert_allclose(found, expected[np.arange(60), words[1:]], rtol=0, atol=FREE_RUNNING_F32)
    assert stream.counters.asked == {
        4: ((words[1:] >= 5) & (words[1:] < 22)).sum(), 5: (words[1:] >= 22).sum()
    }  # fmt: skip


def test_clusters_are_stored_by_their_zeros() -> None:
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(64, 600, (40,), divide=1.0)
    pruner = Pruner(decoder, {name: BlockRule(0.1, (16, 1)) for name in ("tails.0.0.weight", "tails.0.1.weight")})
    pruner.step()
    cluster = plays_as_in_torch(decoder, torch.randn(20, 64)).ops[2]
    assert isinstance(cluster.projection, Block) and isinstance(cluster.weight, Block)
    assert cluster.weight.elements < 0.11 * 560 * 64


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_folded_into_a_decoder_and_all_of_its_clusters(affine) -> None:
    torch.manual_seed(0)
    norm = trained_norm(12) if affine else torch.nn.BatchNorm1d(12, affine=False)
    decoder = AdaptiveDecoder(12, 30, (5, 22))
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.ReLU(), norm, decoder)
    model(torch.randn(64, 9))
    program = plays_as_in_torch(model, torch.randn(40, 9))
    assert [op.kind for op in program.ops] == ["linear", "relu", "linear", "log_softmax", "cluster", "cluster"]
    with pytest.raises(ValueError, match="a BatchNorm1d is folded into"):
        sf.compile_model(torch.nn.Sequential(decoder, torch.nn.BatchNorm1d(30)))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_layer_norm_plays_as_in_torch(options) -> None:
    torch.manual_seed(0)
    norms = torch.nn.LayerNorm(9, **options), torch.nn.LayerNorm([17], **options)
    with torch.no_grad():
        for p in (p for norm in norms for p in norm.parameters()):
            p.normal_()
    model = torch.nn.Sequential(norms[0], torch.nn.Linear(9, 17), norms[1], torch.nn.ReLU(), torch.nn.Linear(17, 5))
    plays_as_in_torch(model, torch.randn(40, 9))


def trained_norm(units: int, affine: bool = True) -> torch.nn.BatchNorm1d:
    norm = torch.nn.BatchNorm1d(units, affine=affine, eps=0.01)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_folded_and_plays_as_in_torch(affine) -> None:
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(9, 17),
        trained_norm(17, affine),
        torch.nn.ReLU(),
        trained_norm(17, affine),
        torch.nn.Linear(17, 5),
    ]
    for model, kinds in (
        (torch.nn.Sequential(*layers), ["linear", "relu", "linear"]),
        (torch.nn.Sequential(trained_norm(9), *layers, trained_norm(5), trained_norm(5)), ["linear", "relu", "linear"]),
        (torch.nn.Sequential(torch.nn.Embedding(6, 9), trained_norm(9), *layers[2:3], trained_norm(9)), None),
        (torch.nn.Sequential(torch.nn.Embedding(6, 9), trained_norm(9), *layers[:2]), ["embedding", "linear"]),
    ):
        if kinds is None:  # nothing after it
            with pytest.raises(
                ValueError, match="3: a BatchNorm1d is folded into a Linear, Embedding or convolution before it"
            ):
                sf.compile_model(model)
            continue
        x = torch.randint(0, 6, (40,)) if kinds[0] == "embedding" else torch.randn(40, 9)
        assert [op.kind for op in plays_as_in_torch(model, x).ops] == kinds


def test_batch_norm_is_folded_into_every_recurrent_layer_after_it_and_keeps_its_zeros() -> None:
    torch.manual_seed(0)
    for layer in (torch.nn.GRU(32, 16), torch.nn.LSTM(32, 16), torch.nn.RNN(32, 16), EGRU(32, 16, threshold=0.05)):
        Pruner(Stack(layer), {"0.weight_ih_l0": BlockRule(0.2, (16, 1))}).step()
        norm, x = trained_norm(32).eval(), torch.randn(20, 32)
        program = sf.compile_model(torch.nn.Sequential(norm, layer))
        assert program.ops[0].weight_ih.elements == sf.compile_model(layer).ops[0].weight_ih.elements
        with torch.no_grad():
            normed = norm(x).numpy()
        expected = sf.Engine(sf.compile_model(layer)).stream().run(normed)
        np.testing.assert_allclose(sf.Engine(program).stream().run(x.numpy()), expected, rtol=0, atol=FREE_RUNNING_F32)


@pytest.mark.parametrize(
    ("kernel", "dilation", "groups"), [(1, 1, 1), (3, 1, 1), (2, 5, 1), (4, 3, 2), (3, 2, 12), (1, 1, 3)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_causal_convolution_plays_as_in_torch(kernel, dilation, groups, bias) -> None:
    torch.manual_seed(0)
    model = Stack(
        CausalConv1d(12, 24, kernel, dilation, groups, bias), torch.nn.ReLU(), CausalConv1d(24, 18, kernel, 1, groups // 2 or 1),
        EGRU(18, 16, threshold=0.05), CausalConv1d(16, 5, kernel, dilation),
    ).eval()  # fmt: skip
    program = sf.compile_model(model)
    assert program.ops[0].kind == ("linear" if kernel == groups == 1 else "conv1d")
    x = torch.randn(40, 12)
    with torch.no_grad():
        expected, state, _ = model(x[:, None])
    stream = sf.Engine(program).stream()
    np.testing.assert_allclose(stream.run(x.numpy()), expected[:, 0], rtol=0, atol=FREE_RUNNING_F32)
    for op in (i for i in (0, 2, 4) if f"{i}.x" in stream.save_state()):
        np.testing.assert_allclose(stream.save_state()[f"{op}.x"], state[op][:, 0], rtol=0, atol=FREE_RUNNING_F32)


def test_a_pruned_or_depthwise_convolution_skips_its_zeros() -> None:
    torch.manual_seed(0)
    model = Stack(CausalConv1d(64, 64, 3, 2), CausalConv1d(64, 64, 4, groups=64), CausalConv1d(64, 64, 3, groups=4))
    with torch.no_grad():  # whole columns of 16 rows
        model[0].weight *= (torch.rand(4, 64, 3) < 0.2).repeat_interleave(16, 0)
    program, x = plays_as_in_torch_over_time(model, torch.randn(30, 64))
    pruned, depthwise, grouped = program.ops
    assert isinstance(pruned.weight, Block)
    assert pruned.weight.elements == int((model[0].weight != 0).sum())
    assert depthwise.weight.elements == 64 * 4 and grouped.weight.elements == 64 * 16 * 3
    stream = sf.Engine(program).stream()
    stream.run(x.numpy())
    parts = stream.cost.parts
    assert [p.macs_dense for p in parts] == [30 * 64 * 64 * 3, 30 * 64 * 4, 30 * 64 * 16 * 3]
    assert [p.density for p in parts[1:]] == [1, 1] and parts[0].macs_effective == 30 * pruned.weight.elements


def plays_as_in_torch_over_time(model: Stack, x: torch.Tensor) -> tuple[sf.Program, torch.Tensor]:
    """Compiles a stack of layers over (T, B, C) and compares what it makes of x (T, C)."""
    program = sf.compile_model(model.eval())
    with torch.no_grad():
        expected = model(x[:, None])[0][:, 0]
    np.testing.assert_allclose(sf.Engine(program).stream().run(x.numpy()), expected, rtol=0, atol=FREE_RUNNING_F32)
    return program, x


def two_way_layers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    two = {"bidirectional": True}
    return [
        torch.nn.GRU(9, 21, 2, **two), torch.nn.GRU(9, 21, bias=False, **two), torch.nn.LSTM(9, 21, 3, dropout=0.1, **two),
        torch.nn.RNN(9, 21, 2, **two), torch.nn.RNN(9, 21, nonlinearity="relu", **two),
        *(EGRU(9, 21, 2, threshold=0.1, zoneout=0.1, **form, **two) for form in FORMS),
    ]  # fmt: skip


@pytest.mark.parametrize("at", range(5 + len(FORMS)))
def test_layers_of_two_directions_play_as_in_torch_over_a_whole_sequence(at) -> None:
    """In float64 the compiled program is torch's network; in float32 the engine is it as far as no event falls otherwise."""
    layer = two_way_layers()[at].double()
    model = Stack(
        torch.nn.Linear(5, 9).double(), layer, torch.nn.LayerNorm(42).double(), torch.nn.Linear(42, 4).double()
    ).eval()
    with torch.no_grad():
        for p in model.parameters():  # as the program stores them
            p.copy_(p.float())
    program, x = sf.compile_model(model), torch.randn(30, 5).double()
    with torch.no_grad():
        expected = model(x[:, None])[0][:, 0].numpy()
    oracle = sf.interpret(program, x.numpy())
    np.testing.assert_allclose(oracle.outputs, expected, rtol=0, atol=CELL_F64)
    played, emitted = sf.Engine(program).stream().run_traced(x.numpy())
    assert all((flags == oracle.events[i]).all() for i, flags in emitted.items())
    np.testing.assert_allclose(played, sf.interpret(program, x.float().numpy()).outputs, rtol=0, atol=FREE_RUNNING_F32)
    events = isinstance(layer, EGRU)
    assert [i for i in range(len(program.ops)) if program.reads_events(i)] == ([3, 4] if events else [])


def test_what_stands_beside_two_directions_reads_both() -> None:
    torch.manual_seed(0)
    layer, norms = torch.nn.GRU(8, 6, bidirectional=True), (trained_norm(8), trained_norm(12))
    model = torch.nn.Sequential(norms[0], layer).eval()
    x = torch.randn(20, 8)
    with torch.no_grad():
        expected = layer(norms[0].eval()(x)[:, None])[0][:, 0]
    program = sf.compile_model(model, head=3)
    assert [op.kind for op in program.ops] == ["gru", "gru", "top_k"] and program.outputs == 6
    np.testing.assert_allclose(
        sf.Engine(program).stream().run(x.numpy())[:, 3:], expected.topk(3).values, rtol=0, atol=FREE_RUNNING_F32
    )
    behind = Stack(layer, torch.nn.ReLU(), torch.nn.Linear(12, 5)).eval()
    plays_as_in_torch_over_time(behind, x)
    between = sf.compile_model(torch.nn.Sequential(norms[0], torch.nn.GRU(8, 8), layer))  # the norm is taken once
    np.testing.assert_array_equal(between.ops[2].weight_ih.to_dense(), layer.weight_ih_l0_reverse.detach())
    after = sf.compile_model(torch.nn.Sequential(layer, norms[1], torch.nn.Linear(12, 5)))
    assert [op.kind for op in after.ops] == ["gru", "gru", "linear"]


def test_a_sample_of_two_directions_is_counted() -> None:
    torch.manual_seed(0)
    model = Stack(EGRU(8, 16, threshold=0.1, bidirectional=True), torch.nn.Linear(32, 4))
    program = sf.compile_model(model, sample=np.random.default_rng(0).standard_normal((3, 20, 8)))
    rates = {(c["op"], c["matrix"]): c["rate"] for c in program.metadata["choices"]}
    assert rates[1, "weight_hh"] == rates[2, "weight"] == "counted" and rates[1, "weight_ih"] == "dense x"


@pytest.mark.parametrize("padding", [0, "causal", "valid"])
def test_torch_convolutions_among_themselves_play_as_the_causal_ones(padding) -> None:
    """(B, C, T): from the step on at which all taps have an input, or with zeros in front from the first."""
    torch.manual_seed(0)

    def conv(inputs: int, outputs: int, kernel: int, dilation: int, groups: int) -> torch.nn.Conv1d:
        padded = (kernel - 1) * dilation if padding == "causal" else padding
        return torch.nn.Conv1d(inputs, outputs, kernel, padding=padded, dilation=dilation, groups=groups)

    model = torch.nn.Sequential(
        conv(8, 12, 3, 2, 1), trained_norm(12), torch.nn.ReLU(), torch.nn.Dropout(0.5), conv(12, 6, 2, 4, 3), trained_norm(6)
    ).eval()  # fmt: skip
    program, x = sf.compile_model(model), torch.randn(40, 8)
    assert [op.kind for op in program.ops] == ["conv1d", "relu", "conv1d"]
    with torch.no_grad():
        expected = model(x.T[None])[0].T.numpy()
    warm_up = 0 if padding == "causal" else 2 * 2 + 4
    played = sf.Engine(program).stream().run(x.numpy())[warm_up:]
    np.testing.assert_allclose(played, expected[: len(played)], rtol=0, atol=FREE_RUNNING_F32)


C = torch.nn.Conv1d


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Sequential(C(3, 4, 2), torch.nn.Linear(4, 2)), "0: a torch.nn.Conv1d convolves the last axis, in which 1"),
        (torch.nn.Sequential(torch.nn.GRU(3, 4), C(4, 2, 2)), "1: a torch.nn.Conv1d convolves the last axis, in which 0 (GRU)"),
        (Stack(C(3, 4, 2)), "in which a Stack sees features. Use sparsefold.nn.CausalConv1d, which convolves over time"),
        (C(3, 4, 2, stride=2), "a Conv1d of stride 2 gives no output at some steps. A stream needs stride=1"),
        (C(3, 4, 3, padding=1), "sees what is to come or what never was. Use padding=0, padding=2 of zeros"),
        (C(3, 4, 3, padding="same"), "a Conv1d with padding='same' of zeros sees what is to come"),
        (C(3, 4, 3, padding=2, padding_mode="circular"), "of circular sees"),
        (Stack(torch.nn.BatchNorm1d(3), CausalConv1d(3, 4, 2)), "here is none. Put it beside one."),
    ],
)  # fmt: skip
def test_a_convolution_that_no_stream_plays_is_refused(model, words) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        sf.compile_model(model)
    assert words in str(error.value)


def test_pruned_lstm_is_stored_in_blocks_of_four_gates() -> None:
    torch.manual_seed(0)
    model = Stack(torch.nn.Embedding(13, 8), torch.nn.LSTM(8, 40), torch.nn.Linear(40, 13))
    Pruner(model, {"1.weight_hh_l0": BlockRule(0.25, (8, 1))}).step()
    stored = sf.compile_model(model).ops[1].weight_hh
    assert isinstance(stored, Block)
    assert stored.gates == 4
    np.testing.assert_array_equal(stored.to_dense(), model[1].weight_hh_l0.detach().numpy())
    assert_plays_alike(model, np.random.default_rng(3).integers(0, 13, 30).tolist())


def test_pruned_model_compiles_to_its_blocks_and_plays_alike() -> None:
    torch.manual_seed(0)
    model = Stack(torch.nn.Embedding(13, 8), EGRU(8, 64, threshold=0.05), torch.nn.Linear(64, 13))
    pruner = Pruner(model, {"1.weight_hh_l0": BlockRule(0.25, (16, 1), scope="matrix"), "2.weight": Magnitude(0.1)})
    pruner.step()
    program = sf.compile_model(model)
    stored = program.ops[1].weight_hh
    assert isinstance(stored, Block)
    assert stored.block == (16, 1)
    assert stored.elements == round(0.25 * 3 * 64 * 64)
    np.testing.assert_array_equal(stored.to_dense(), model[1].weight_hh_l0.detach().numpy())
    assert isinstance(program.ops[1].weight_ih, Dense)
    assert_plays_alike(model, np.random.default_rng(3).integers(0, 13, 60).tolist())


def test_choice_follows_the_zeros() -> None:
    random = np.random.default_rng(0)
    dense = random.standard_normal((96, 32)).astype(np.float32)
    assert isinstance(choose(dense, 3), Dense)
    for block in ((8, 1), (16, 1), (16, 16), (32, 1)):
        live = random.random((3, -(-32 // block[0]), 32 // block[1])) < 0.1
        mask = np.repeat(np.repeat(live, block[0], 1), block[1], 2).reshape(96, 32)
        stored = choose(np.where(mask, dense, 0).astype(np.float32), 3)
        assert isinstance(stored, Block)
        np.testing.assert_array_equal(stored.to_dense() != 0, mask)
        assert stored.elements == mask.sum(), "a coarser block than needed stores zeros"
    assert choose(np.zeros((96, 32), np.float32), 3).elements == 0


def test_single_elements_become_csc_and_one_of_each_set_complementary() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((3, 160, 64)).astype(np.float32)
    scattered = choose(np.where(random.random(weight.shape) < 0.08, weight, 0).reshape(480, 64), 3)
    assert isinstance(scattered, CSC)
    for group in (1, 16):
        sets = 160 // (10 * group)
        live = random.integers(0, 10, (3, 1, sets, 64)) == np.arange(10)[None, :, None, None]
        kept = np.repeat(live.reshape(3, 10 * sets, 64), group, 1)
        packed = choose(np.where(kept, weight, 0).reshape(480, 64), 3)
        assert isinstance(packed, Complementary)
        assert (packed.overlay, packed.group) == (10, group)
        np.testing.assert_array_equal(packed.to_dense() != 0, kept.reshape(480, 64))


def test_metadata_reaches_the_file(tmp_path) -> None:
    program = sf.compile_model(torch.nn.Linear(3, 2), {"vocabulary": [1, 2]})
    program.save(tmp_path / "m.sfold")
    metadata = sf.Program.load(tmp_path / "m.sfold").metadata
    assert metadata["vocabulary"] == [1, 2] and set(metadata) == {"vocabulary", "choices"}


def pruned_model() -> Stack:
    """Event layers in blocks of 16x1 and an output layer that reads a dense state."""
    torch.manual_seed(0)
    model = Stack(
        torch.nn.Embedding(16, 32), EGRU(32, 64, threshold=0.05), EGRU(64, 64, threshold=0.05, output="state"),
        torch.nn.Linear(64, 16),
    )  # fmt: skip
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and n != "0.weight"]
    pruner = Pruner(model, {name: BlockRule(0.2, (16, 1)) for name in names})
    pruner.step()
    return model.eval()


def test_the_program_says_what_was_chosen_and_why() -> None:
    program = sf.compile_model(pruned_model())
    choices = {(c["op"], c["matrix"]): c for c in program.metadata["choices"]}
    assert {key: c["rate"] for key, c in choices.items()} == {
        (1, "weight_ih"): "dense x", (1, "weight_hh"): "assumed", (2, "weight_ih"): "assumed", (2, "weight_hh"): "assumed",
        (3, "weight"): "dense x",
    }  # fmt: skip
    for (i, name), c in choices.items():
        assert c["chosen"] == sf.program.matrices(program.ops[i])[name].description
        assert c["by"] == "estimated" and c["ns"] >= c["candidates"][0][1] > 0
        assert c["candidates"] == sorted(c["candidates"], key=lambda p: p[1])


def test_a_sample_is_played_and_its_events_are_counted() -> None:
    model = pruned_model()
    tokens = np.random.default_rng(0).integers(0, 13, (3, 50))
    program = sf.compile_model(model, sample=tokens)
    stream = sf.Engine(program).stream()
    for sequence in tokens:
        stream.reset()
        stream.run(sequence)
    counts, choices = stream.counters, {(c["op"], c["matrix"]): c for c in program.metadata["choices"]}
    for i in (1, 2):
        assert choices[i, "weight_hh"]["event_rate"] == pytest.approx(
            counts.hidden_reads[i].sum() / (150 * 64), abs=1e-4
        )
        assert choices[i, "weight_hh"]["rate"] == "counted"
    assert choices[2, "weight_ih"]["event_rate"] == pytest.approx(counts.input_reads[2].sum() / (150 * 64), abs=1e-4)
    with pytest.raises(ValueError, match=r"sample must be \(T,\) or \(B, T\) token ids"):
        sf.compile_model(model, sample=tokens[None])
    with pytest.raises(ValueError, match="sample holds no step"):
        sf.compile_model(model, sample=tokens[:, :0])


def test_a_tuned_program_plays_the_same_in_the_formats_that_were_fastest(monkeypatch) -> None:
    model, x = pruned_model(), np.random.default_rng(0).integers(0, 13, 60)
    expected = sf.Engine(sf.compile_model(model)).stream().run(x)
    tuned = sf.compile_model(model, tune=True, sample=x)
    assert all(c["by"] == "timed" and c["isa"] for c in tuned.metadata["choices"])
    np.testing.assert_allclose(sf.Engine(tuned).stream().run(x), expected, rtol=0, atol=FREE_RUNNING_F32)
    asked = []

    def slow_blocks(matrix, reads):
        asked.append((type(matrix).__name__, reads.events))
        return 100.0 if isinstance(matrix, Block) else 1.0 if isinstance(matrix, CSC) else 50.0

    monkeypatch.setattr(sys.modules["sparsefold.lowering.choose"], "timed", slow_blocks)
    other = sf.compile_model(model, tune=True)
    assert isinstance(other.ops[1].weight_hh, CSC) and not isinstance(tuned.ops[1].weight_hh, CSC)
    assert {("CSC", True), ("CSC", False), ("Dense", True)} <= set(asked)
    np.testing.assert_allclose(sf.Engine(other).stream().run(x), expected, rtol=0, atol=FREE_RUNNING_F32)


def test_prices_that_are_timed_alike_go_to_the_smaller_file(monkeypatch) -> None:
    monkeypatch.setattr(
        sys.modules["sparsefold.lowering.choose"], "timed", lambda m, _: 1.0 if isinstance(m, Dense) else 0.5
    )
    chosen = sf.compile_model(pruned_model(), tune=True).ops[1].weight_hh
    found = list(sys.modules["sparsefold.lowering.choose"].candidates(chosen.to_dense(), 3))
    assert chosen.nbytes == min(m.nbytes for m in found)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Stack(torch.nn.Embedding(3, 4), torch.nn.GELU()), ["1 is a GELU", "Supported", "EGRU", "LSTM"]),
        (torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()), ["1: a ReLU cannot be the first layer"]),
        (torch.nn.LayerNorm((2, 3)), ["a LayerNorm over 2 axes"]),
        (
            torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, track_running_stats=False)),
            ["1: a BatchNorm1d without"],
        ),
        (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(4)), ["1 normalises 4 values", "has 3"]),
        (torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.GRU(3, 4)), ["0 normalises 4 values", "has 3"]),
        (
            torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2)),
            ["0: a BatchNorm1d is folded"],
        ),
        (torch.nn.BatchNorm1d(4), ["the model: a BatchNorm1d is folded"]),
        (Stack(torch.nn.LSTM(4, 5, proj_size=3)), ["0: an LSTM with proj_size cannot be compiled"]),
        (torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))), ["0.0 is a Conv2d"]),
        (torch.nn.Conv2d(1, 1, 1), ["the model is a Conv2d"]),
        (torch.nn.Sequential(), ["no layer"]),
        (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(4, 2)), ["op 1", "gives 3"]),
        (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(4, 2)), ["first op"]),
        (torch.nn.Embedding(4, 2, max_norm=1.0), ["max_norm"]),
    ],
)
def test_refusals_name_the_module(model, words) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        sf.compile_model(model)
    for word in words:
        assert word in str(error.value)


def test_a_module_in_its_second_place_is_compiled_again() -> None:
    """The listing of children that torch gives leaves it out, and the program would be another network."""
    shared = torch.nn.Linear(3, 3)
    assert_plays_alike(Stack(torch.nn.Embedding(4, 3), shared, EGRU(3, 3), shared), [0, 1, 2, 3])


def test_non_finite_weight_is_refused() -> None:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*0\.weight\.values holds nan at \[1, 2\]"):
        sf.compile_model(layer)


def test_compiling_leaves_the_model_alone() -> None:
    model = Stack(torch.nn.Embedding(3, 4), EGRU(4, 5), torch.nn.Linear(5, 3)).train()
    before = copy.deepcopy(model.state_dict())
    sf.compile_model(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_third_party_gru_plays_as_in_torch(data_folder) -> None:
    """NSNet2's trained GRU layers (400 units), from their published ONNX arrays: gates z, r, n there."""
    folder = data_folder("models/nsnet2")

    def zrn_to_rzn(array: np.ndarray) -> torch.Tensor:
        z, r, n = np.split(array, 3)
        return torch.from_numpy(np.concatenate([r, z, n]).copy())

    layer = torch.nn.GRU(400, 400)
    w, u, b = (np.load(folder / f"onnx__GRU_{i}.npy") for i in (184, 185, 186))
    with torch.no_grad():
        layer.weight_ih_l0.copy_(zrn_to_rzn(w[0]))
        layer.weight_hh_l0.copy_(zrn_to_rzn(u[0]))
        layer.bias_ih_l0.copy_(zrn_to_rzn(b[0, :1200]))
        layer.bias_hh_l0.copy_(zrn_to_rzn(b[0, 1200:]))
    x = np.random.default_rng(0).standard_normal((200, 400)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)[:, None])[0][:, 0].numpy()
    got = sf.Engine(sf.compile_model(layer)).stream().run(x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=FREE_RUNNING_F32)


def test_third_party_lstm_plays_as_in_torch(data_folder) -> None:
    """Silero's voice activity detector: its trained LSTM of 128 units, from the published weights."""
    from safetensors.torch import load_file

    weights = load_file(data_folder("models/silero_vad") / "silero_vad_16k.safetensors")
    layer = torch.nn.LSTM(128, 128)
    layer.load_state_dict(
        {f"{name}_l0": weights[f"lstm_cell.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    )
    x = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    with torch.no_grad():
        expected, (_, c) = layer(torch.from_numpy(x)[:, None])
    stream = sf.Engine(sf.compile_model(layer)).stream()
    np.testing.assert_allclose(stream.run(x), expected[:, 0].numpy(), rtol=0, atol=FREE_RUNNING_F32)
    np.testing.assert_allclose(stream.save_state()["0.c"], c[0, 0].numpy(), rtol=0, atol=FREE_RUNNING_F32)
