"""The pruner on torch's layers and ours: exact densities, monotone ramps, momentum, exact resume, errors."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from sparsefold.nn import EGRU, EGRUCell, Stack
from sparsefold.sparsify import Block, Cubic, Magnitude, Pruner, block_mask

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model() -> Stack:
    return Stack(nn.Linear(4, 6), EGRU(6, 8), nn.GRU(8, 8), nn.LSTM(8, 8), nn.Linear(8, 3))


RULES = {"1.weight_hh*": Block(0.25, (4, 1)), "*.weight_?h_l0": Magnitude(0.1), "4.weight": Magnitude(0.5, "matrix")}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: int, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 2, 4, generator=g))[0].square().sum().backward()
        optimizer.step()
        pruner.step()


def test_the_first_matching_pattern_wins_and_gates_are_exact():
    net = model()
    pruner = Pruner(net, RULES)
    assert set(pruner.density().values()) == {1.0}
    pruner.step()
    kept = {name: mask.sum().item() for name, mask in pruner.masks.items()}
    assert kept == {
        "1.weight_hh_l0": 3 * 4 * 4,  # of 2 x 8 blocks in each gate a quarter, 4 weights each
        "1.weight_ih_l0": 3 * 5,  # 0.1 of 48, rounded up
        "2.weight_hh_l0": 3 * 7,
        "2.weight_ih_l0": 3 * 7,
        "3.weight_hh_l0": 4 * 7,
        "3.weight_ih_l0": 4 * 7,
        "4.weight": 12,
    }
    for name, mask in pruner.masks.items():
        assert torch.equal(net.get_parameter(name) != 0, mask)
        assert pruner.density()[name] == kept[name] / mask.numel()
    assert pruner.masks["1.weight_ih_l0"].view(3, -1).sum(1).tolist() == [5, 5, 5]
    assert (net[0].weight != 0).all()


def test_matrix_scope_ranks_the_gates_together():
    cell = EGRUCell(6, 8)
    with torch.no_grad():
        cell.weight_hh[:8] *= 100
    pruner = Pruner(cell, {"weight_hh": Block(0.25, (8, 1), scope="matrix")})
    wanted = block_mask(cell.weight_hh, 0.25, (8, 1), gates=3, scope="matrix")
    pruner.step()
    assert torch.equal(pruner.masks["weight_hh"], wanted)
    assert wanted.view(3, -1).sum(1).tolist() == [48, 0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_pruned_weights_stay_zero_whatever_the_optimizer_does(optimizer):
    net = model()
    make = {"adamw": lambda p: torch.optim.AdamW(p, 0.01), "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)}
    opt = make[optimizer](net.parameters())
    pruner = Pruner(net, RULES, Cubic(begin=2, end=9, every=3))
    before, moved = pruner.masks, False
    for step in range(1, 14):
        train(net, opt, pruner, 1, seed=step)
        for name, mask in pruner.masks.items():
            weight = net.get_parameter(name)
            assert not weight[~mask].any()
            assert not (mask & ~before[name]).any()
            moved |= bool(
                (opt.state[weight].get("momentum_buffer", opt.state[weight].get("exp_avg"))[~mask] != 0).any()
            )
        if step not in (2, 5, 8, 9):
            assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())
        before = dict(pruner.masks)
    assert moved  # the optimiser did push at pruned weights
    assert pruner.density()["1.weight_hh_l0"] == 0.25
    assert pruner.density()["4.weight"] == 0.5


def test_resuming_in_the_ramp_is_bit_equal():
    def parts():
        torch.manual_seed(0)
        net = model()
        return net, torch.optim.AdamW(net.parameters(), 0.01), Pruner(net, RULES, Cubic(1, 10, 2))

    net, opt, pruner = parts()
    train(net, opt, pruner, 4)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (net, opt, pruner)], file)
    saved = copy.deepcopy(pruner.state_dict())
    train(net, opt, pruner, 8, seed=2)

    again = parts()
    with torch.no_grad():
        again[0][4].weight.fill_(7.0)
    file.seek(0)
    for x, state in zip(again, torch.load(file, weights_only=True), strict=True):
        x.load_state_dict(state)
    train(*again, 8, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again[0].parameters(), strict=True))
    assert all(torch.equal(mask, again[2].masks[name]) for name, mask in pruner.masks.items())
    assert not all(torch.equal(mask, saved["masks"][name]) for name, mask in pruner.masks.items())


def test_loading_masks_zeroes_what_they_drop_and_keeps_no_alias():
    net = model()
    pruner = Pruner(net, RULES)
    pruner.step()
    state = pruner.state_dict()
    other = model()
    fresh = Pruner(other, RULES)
    fresh.load_state_dict(state)
    assert torch.equal(other[4].weight != 0, pruner.masks["4.weight"])
    state["masks"]["4.weight"].fill_(False)
    assert fresh.masks["4.weight"].any()
    assert pruner.masks["4.weight"].any()


def test_a_pruned_weight_never_comes_back():
    net = nn.Linear(8, 2)
    pruner = Pruner(net, {"weight": Magnitude(0.25)}, Cubic(begin=0, end=4))
    pruner.step()
    first = pruner.masks["weight"]
    assert not first.all()
    with torch.no_grad():
        net.weight[~first] = 99.0  # what a large learning rate might do between two steps
    pruner.step()
    assert pruner.masks["weight"].sum() < first.sum()
    assert not (pruner.masks["weight"] & ~first).any()


def test_zeros_are_written_even_over_infinity():
    net = nn.Linear(4, 2)
    pruner = Pruner(net, {"weight": Magnitude(0.5)})
    pruner.step()
    with torch.no_grad():
        net.weight.fill_(float("inf"))
    pruner.step()
    assert torch.equal(net.weight != 0, pruner.masks["weight"])


def test_a_rule_meets_nan_with_a_sentence():
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        Pruner(net, {"weight": Magnitude(0.5)}).step()


def test_a_block_that_does_not_divide_is_warned_about_once_by_name():
    with pytest.warns(UserWarning, match=r"weight_hh_l0: 20 rows per gate .* multiple of 16.*; 32 would be"):
        Pruner(EGRU(6, 20), {"weight_hh_l0": Block(0.5)})
    with pytest.warns(UserWarning, match=r"7 columns are no multiple of 4.*; 8 would be"):
        Pruner(nn.Linear(7, 16), {"weight": Block(0.5, (16, 4))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(EGRU(6, 32), {"weight_*": Block(0.5)})


def test_errors():
    net = model()
    with pytest.raises(ValueError, match=r"no parameter is named '1.weight_hh'. Close names: .*1.weight_hh_l0"):
        Pruner(net, {"1.weight_hh": Magnitude(0.5)})
    with pytest.raises(ValueError, match=r"matches 0.bias of shape \(6,\); rules prune matrices"):
        Pruner(net, {"0.*": Magnitude(0.5)})
    state = Pruner(net, RULES).state_dict()
    with pytest.raises(ValueError, match=r"different parameters: .*4\.weight"):
        Pruner(net, {"1.weight_hh*": Magnitude(0.5)}).load_state_dict(state)
    state["masks"]["4.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"4.weight has shape \(2, 2\), the parameter \(3, 8\)"):
        Pruner(net, RULES).load_state_dict(state)
