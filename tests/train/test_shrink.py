"""Networks without their silent units give the same outputs from fewer weights."""

import copy

import pytest
import torch
from torch import nn as torch_nn

import sparsefold as sf
from sparsefold.nn import EGRU, Activity, AdaptiveDecoder, Stack, shrink
from tolerances import SHRUNK_F64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def silence(layer: EGRU, suffix: str, units: list[int]) -> None:
    with torch.no_grad():
        getattr(layer, "threshold" + suffix)[units] = 1e3


FOLLOWERS = {
    "linear": lambda n: torch_nn.Linear(n, 3),
    "adaptive softmax": lambda n: AdaptiveDecoder(n, 12, [3, 7]),
    "egru": lambda n: EGRU(n, 4),
    "gru": lambda n: torch_nn.GRU(n, 4),
    "bidirectional lstm": lambda n: torch_nn.LSTM(n, 4, bidirectional=True),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_outputs_are_the_same(follower, layers, bidirectional):
    layer = EGRU(5, 9, layers, bidirectional=bidirectional, bias=follower != "gru")
    reader = FOLLOWERS[follower](9 * (1 + bidirectional))
    model = Stack(torch_nn.Identity(), layer, torch_nn.Dropout(0.5), torch_nn.ReLU(), reader).double().eval()
    for n, suffix in enumerate(s for pair in layer._suffixes for s in pair):
        silence(layer, suffix, [n, 4, 8] if n < 3 else [0, 1, 2, 3])
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(20, 3, 5, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        activities = [model(x)[2] for x in batches]
        assert all(int((sum(a.rates[i] for a in activities) == 0).sum()) >= 3 for i in range(len(layer._suffixes)))
        smaller = shrink(model, *activities)
        assert all(before[k].equal(v) for k, v in model.state_dict().items())
        assert smaller[1].hidden_size == 9 - min(
            int((torch.stack([a.rates[i] for a in activities]).amax(0) == 0).sum())
            for i in range(layers * (1 + bidirectional))
        )
        assert smaller[1].hidden_size <= 6
        for x in batches:
            expected, got = model(x)[0], smaller(x)[0]
            torch.testing.assert_close(got, expected, rtol=0, atol=SHRUNK_F64)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    output, _, activity = smaller.train()(batches[0])
    (output.sum() + activity.penalty(0.0, 1.0)).backward()
    assert smaller[1].weight_hh_l0.grad is not None and smaller[1].threshold_l0.grad is None


def test_what_is_left_compiles():
    layer = EGRU(5, 9)
    model = Stack(layer, torch_nn.Linear(9, 3)).eval()
    silence(layer, "_l0", [2, 5])
    x = torch.randn(20, 1, 5)
    with torch.no_grad():
        smaller = shrink(model, model(x)[2])
    ours, theirs = sf.compile_model(smaller), sf.compile_model(model)
    assert ours.ops[0].outputs <= 7 < theirs.ops[0].outputs
    a, b = (sf.Engine(p).stream().run(x[:, 0].numpy()) for p in (ours, theirs))
    assert abs(a - b).max() < 1e-5


def test_a_unit_that_speaks_once_stays_and_one_always_does():
    layer = EGRU(5, 9)
    model = Stack(layer, torch_nn.Linear(9, 3)).eval()
    once = torch.zeros(9)
    once[3] = 0.01
    assert shrink(model, Activity([torch.zeros(9)]), Activity([once]))[0].hidden_size == 1
    kept = shrink(model, Activity([torch.zeros(9)]), Activity([once]))[0]
    assert kept.weight_ih_l0.equal(layer.weight_ih_l0[[3, 12, 21]])
    assert shrink(model, Activity([torch.zeros(9)]))[0].hidden_size == 1
    same = shrink(model, Activity([torch.ones(9)]))
    assert same is not model and all(a.equal(b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_refusals():
    silent = Activity([torch.zeros(9)])
    with pytest.raises(ValueError, match=r"module 0: with output='state' .* is read all the same"):
        shrink(Stack(EGRU(5, 9, output="state"), torch_nn.Linear(9, 3)), silent)
    assert shrink(Stack(EGRU(5, 9), torch_nn.ReLU()), silent)[0].hidden_size == 9, "its units are the outputs"
    with pytest.raises(ValueError, match=r"module 1 \(LayerNorm\) reads the units that would go"):
        shrink(Stack(EGRU(5, 9), torch_nn.LayerNorm(9)), silent)
    with pytest.raises(ValueError, match="at least one forward"):
        shrink(Stack(EGRU(5, 9), torch_nn.Linear(9, 3)))
    with pytest.raises(ValueError, match=r"units \[9\] by layer and direction, this Stack \[8\]"):
        shrink(Stack(EGRU(5, 8), torch_nn.Linear(8, 3)), silent)
