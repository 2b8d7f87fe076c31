"""The pruner beside all else: torch's layers and optimisers, compilation, mixed precision, two processes, others' weights."""

import copy
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparsefold as sf
from sparsefold.nn import Stack
from sparsefold.sparsify import (
    NM,
    SET,
    Block,
    ColumnBalanced,
    Complementary,
    Cubic,
    Magnitude,
    Pruner,
    RigL,
)
from tolerances import FREE_RUNNING_F32

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


LAYERS = {
    "LSTM": (lambda: nn.LSTM(6, 8, 2), (5, 2, 6)),
    "GRU": (lambda: nn.GRU(6, 8, 2), (5, 2, 6)),
    "RNN": (lambda: nn.RNN(6, 8), (5, 2, 6)),
    "bidirectional GRU": (lambda: nn.GRU(6, 8, 2, bidirectional=True), (5, 2, 6)),
    "bidirectional LSTM": (lambda: nn.LSTM(6, 8, bidirectional=True), (5, 2, 6)),
    "LSTM with projection": (lambda: nn.LSTM(6, 8, 2, proj_size=4), (5, 2, 6)),
    "GRU without bias": (lambda: nn.GRU(6, 8, bias=False), (5, 2, 6)),
    "LSTMCell": (lambda: nn.LSTMCell(6, 8), (2, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 8, (3, 2)), (2, 6, 5, 5)),
    "grouped Conv1d": (lambda: nn.Conv1d(6, 8, 3, groups=2), (2, 6, 9)),
    "Linear": (lambda: nn.Linear(6, 8), (5, 2, 6)),
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.02),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01),
}
PATTERNS = ("*weight_?h*", "*weight_hr*", "*weight")


def rules_for(net, rule):
    names = [n for n, p in net.named_parameters() if p.dim() > 1]
    return {pattern: rule for pattern in PATTERNS if any(fnmatchcase(n, pattern) for n in names)}


def out(net, x):
    y = net(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_pruned_exactly_trains_on_and_is_saved_under_its_own_names(layer, optimizer):
    make, shape = LAYERS[layer]
    net = make()
    names = list(net.state_dict())
    opt = OPTIMIZERS[optimizer](net.parameters())
    pruner = Pruner(net, rules_for(net, Block(0.25, (2, 1))), Cubic(1, 5, 2))
    x = torch.randn(shape)
    for _ in range(8):
        opt.zero_grad()
        out(net, x).square().sum().backward()
        opt.step()
        pruner.step()
    assert set(pruner.masks) == {n for n, p in net.named_parameters() if p.dim() > 1}
    for name, mask in pruner.masks.items():
        p = net.get_parameter(name)
        assert torch.equal(p != 0, mask)
        kind = next((g for k, g in GATES.items() if k in layer), 1)
        gates = kind if "weight_ih" in name or "weight_hh" in name else 1
        blocks = mask.flatten(1).view(gates, -1, 2, mask.flatten(1).shape[1])
        assert torch.equal(blocks[:, :, 0], blocks[:, :, 1])
        each = blocks[:, :, 0].flatten(1).sum(1)
        assert each.tolist() == [-(-blocks[0, :, 0].numel() // 4)] * gates
    assert list(net.state_dict()) == names
    again = make()
    again.load_state_dict(copy.deepcopy(net).state_dict())
    with torch.no_grad():
        assert out(again, x).equal(out(net, x))


def test_a_convolution_in_two_dimensions_is_a_matrix_of_outputs_and_everything_else():
    net = nn.Conv2d(3, 4, 2)
    matrix = net.weight.detach().flatten(1).clone()
    pruner = Pruner(net, {"weight": NM(1, 4)})
    pruner.step()
    assert pruner.masks["weight"].flatten(1).equal(NM(1, 4).mask(matrix))
    assert (pruner.masks["weight"].sum((2, 3)) == 1).all()  # the four taps of each input


def test_channels_last_weights_are_pruned_in_place():
    net = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = Magnitude(0.25).mask(net.weight.flatten(1)).view(net.weight.shape)
    pruner = Pruner(net, {"weight": Magnitude(0.25)}, group_lasso=1e-9)
    pruner.proximal(0.1)
    pruner.step()
    assert torch.equal(net.weight != 0, expected)


@pytest.mark.parametrize(
    "schedule", [Cubic(1, 4), SET(every=2, end=5), RigL(every=2, end=5)], ids=lambda s: type(s).__name__
)
def test_a_compiled_model_sees_the_pruned_weights(schedule):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(5, 6)
    results = []
    for model in (compiled, twin):
        opt = torch.optim.AdamW(model.parameters(), 0.02)
        pruner = Pruner(model, {"0.weight": Magnitude(0.25), "2.weight": Block(0.5, (3, 1))}, schedule)
        for _ in range(6):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
            pruner.step()
        results.append((pruner, model(x)))
    assert all(mask.equal(results[1][0].masks[name]) for name, mask in results[0][0].masks.items())
    assert torch.equal(net[0].weight != 0, results[0][0].masks["0.weight"])
    assert results[0][1].equal(net(x)), "the compiled model plays the pruned weights"


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_mixed_precision(cell):
    net = nn.ModuleList([cell(6, 8), nn.Linear(8, 3)])
    opt = torch.optim.AdamW(net.parameters(), 0.02)
    pruner = Pruner(net, {"0.weight*": Block(0.25, (4, 1)), "1.weight": NM(2, 4)}, Cubic(1, 4), group_lasso=1e-3)
    for _ in range(6):
        opt.zero_grad()
        # oneDNN's LSTM in bfloat16 asks for AVX-512, torch's own for nothing.
        with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            loss = net[1](net[0](torch.randn(5, 2, 6))[0]).square().sum() + pruner.penalty()
        loss.backward()
        opt.step()
        pruner.step()
    for name, mask in pruner.masks.items():
        assert net.get_parameter(name).dtype == torch.float32
        assert torch.equal(net.get_parameter(name) != 0, mask)
    assert pruner.density()["1.weight"] == 0.5


def test_half_precision_weights():
    net = nn.Linear(8, 8).bfloat16()
    pruner = Pruner(net, {"weight": Complementary(4)}, group_lasso=0.1)
    pruner.proximal(0.01)
    pruner.step()
    assert net.weight.dtype == torch.bfloat16 and int((net.weight != 0).sum()) == 16


# --- two processes ---------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"rnn": nn.GRU(6, 8), "out": nn.Linear(8, 3)})


class Whole(nn.Module):
    """One forward, as DistributedDataParallel wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["out"](self.parts["rnn"](x)[0])


SCHEDULES = {"cubic": Cubic(1, 5), "set": SET(every=2, end=7), "rigl": RigL(every=2, end=7)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    kept = {}
    for name, schedule in SCHEDULES.items():
        model = nn.parallel.DistributedDataParallel(Whole())
        opt = torch.optim.AdamW(model.parameters(), 0.02)
        rules = {"parts.rnn.weight*": Block(0.25, (4, 1)), "parts.out.weight": Complementary(3)}
        pruner = Pruner(model, rules, schedule)
        random = torch.Generator().manual_seed(rank)
        for _ in range(8):
            opt.zero_grad()
            model(torch.randn(5, 2, 6, generator=random)).square().sum().backward()
            opt.step()
            pruner.step()
        kept[name] = {"masks": pruner.masks, "weights": model.module.state_dict()}
    torch.save(kept, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_keep_the_same_masks(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for schedule in SCHEDULES:
        for what in ("masks", "weights"):
            ours, theirs = first[schedule][what], second[schedule][what]
            assert all(value.equal(theirs[name]) for name, value in ours.items()), (schedule, what)
        assert int(first[schedule]["masks"]["parts.rnn.weight_hh_l0"].sum()) == 3 * 4 * 4


# --- compiled to a program, and other people's weights ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        (Block(0.1, (16, 1)), "block"),
        (Magnitude(0.05), "csc"),
        (Complementary(8, 16), "complementary"),  # one group of 16 in each column of a gate
        (Complementary(8, choice="balanced"), None),
        (ColumnBalanced(0.1, 16), "complementary"),
        (Block(0.1, (16, 1), keep_diagonal=True), None),
        (NM(1, 16), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_what_is_compiled_plays_as_the_pruned_model(cell, rule, stored):
    net = Stack(cell(20, 128), nn.Linear(128, 5))
    pruner = Pruner(net, {"0.weight_hh_l0": rule})
    pruner.step()
    x = torch.randn(30, 20)
    with torch.no_grad():
        expected = net(x[:, None])[0][:, 0].numpy()
    program = sf.compile_model(net)
    np.testing.assert_allclose(sf.Engine(program).stream().run(x.numpy()), expected, rtol=0, atol=FREE_RUNNING_F32)
    recurrent = program.ops[0].weight_hh
    assert stored is None or recurrent.kind == stored
    assert np.array_equal(recurrent.to_dense() != 0, pruner.masks["0.weight_hh_l0"].numpy())


def test_third_party_lstm_is_pruned_loads_and_runs(data_folder):
    """Silero's voice activity detector: LSTM of 128 units and convolutions, from the published state dict."""
    from safetensors.torch import load_file, save

    path = data_folder("models/silero_vad") / "silero_vad_16k.safetensors"
    weights = load_file(path)
    rules = {"lstm_cell.weight_*": Block(0.25, (16, 1)), "conv?.weight": Magnitude(0.5)}
    pruner = Pruner(weights, rules)
    pruner.step()
    assert pruner.density()["lstm_cell.weight_hh"] == 0.25
    assert pruner.masks["lstm_cell.weight_hh"].view(4, -1).sum(1).tolist() == [4096] * 4
    assert [s.shape for s in weights.values()] == [s.shape for s in load_file(path).values()]
    assert len(save(weights)) == len(save(load_file(path)))
    layer = nn.LSTM(128, 128)
    layer.load_state_dict(
        {f"{name}_l0": weights[f"lstm_cell.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    )
    plays_as_in_torch(layer, 128)
    convolution = nn.Conv1d(129, 128, 3)
    convolution.load_state_dict({"weight": weights["conv1.weight"], "bias": weights["conv1.bias"]})
    assert convolution(torch.randn(1, 129, 8)).isfinite().all()


def test_third_party_gru_is_pruned_loads_and_runs(data_folder):
    """NSNet2's trained GRU of 400 units, from its published arrays; their gates are z, r, n."""
    folder = data_folder("models/nsnet2")
    w, u, b = (np.load(folder / f"onnx__GRU_{i}.npy")[0] for i in (184, 185, 186))
    arrays = {"weight_ih_l0": w, "weight_hh_l0": u, "bias_ih_l0": b[:1200], "bias_hh_l0": b[1200:]}
    weights = {
        name: torch.from_numpy(np.concatenate([a[400:800], a[:400], a[800:]]).copy()) for name, a in arrays.items()
    }
    pruner = Pruner(weights, {"weight_*": Block((0.2, 0.1, 0.4), (16, 1))})
    pruner.step()
    assert pruner.masks["weight_hh_l0"].view(3, -1).sum(1).tolist() == [16 * n for n in (2000, 1000, 4000)]
    layer = nn.GRU(400, 400)
    layer.load_state_dict(weights)
    plays_as_in_torch(layer, 400)


def plays_as_in_torch(layer, inputs):
    x = np.random.default_rng(0).standard_normal((100, inputs)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)[:, None])[0][:, 0].numpy()
    program = sf.compile_model(layer)
    assert program.ops[0].weight_hh.kind == "block"
    np.testing.assert_allclose(sf.Engine(program).stream().run(x), expected, rtol=0, atol=FREE_RUNNING_F32)
