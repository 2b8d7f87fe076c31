"""The pruner on torch's layers and ours: exact densities, monotone ramps, momentum, exact resume, errors."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from sparsefold.nn import EGRU, EGRUCell, Stack
from sparsefold.nn.kept import kept
from sparsefold.sparsify import (
    NM,
    SET,
    Block,
    ColumnBalanced,
    Complementary,
    Cubic,
    Iterative,
    Magnitude,
    OneShot,
    Pruner,
    RigL,
    Threshold,
    TwoSlopes,
    block_mask,
    masks,
    thresholds,
)
from tolerances import LASSO_F64

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


# --- schedules that do more than fall --------------------------------------------------------------------------------

EVERY_RULE = {
    "1.weight_hh*": Block(0.25, (4, 1), keep_diagonal=True),
    "1.weight_ih*": Complementary(4),
    "2.weight_hh*": Complementary(3, sets="unit", choice="permuted"),
    "2.weight_ih*": NM(2, 4),
    "3.weight_hh*": Complementary(2, 2, choice="balanced"),
    "3.weight_ih*": ColumnBalanced(0.25, 2),
    "?.weight": Magnitude(0.5, "global"),
}


@pytest.mark.parametrize("grow", [SET(every=3, end=10), RigL(every=3, end=10, share=0.5)])
def test_regrowth_keeps_every_count_and_moves(grow):
    net = model()
    opt = torch.optim.AdamW(net.parameters(), 0.05)
    pruner = Pruner(net, EVERY_RULE, grow)
    seen: list[dict[str, torch.Tensor]] = []
    g = torch.Generator().manual_seed(1)
    for step in range(1, 14):
        opt.zero_grad()
        net(torch.randn(3, 2, 4, generator=g))[0].square().sum().backward()
        opt.step()
        assert pruner.step() == (step in (1, 3, 6, 9))
        assert all(not net.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())
        if step in (1, 3, 6, 9):
            seen.append(dict(pruner.masks))
    for name in pruner.masks:
        assert not seen[0][name].equal(seen[-1][name]), name
        target = pruner._targets[name]
        at = target.candidates()
        per_group = [masks.gather(each[name], at).any(-1).sum(1) for each in seen]
        assert all(one.equal(per_group[0]) for one in per_group), name
    returned = seen[-1]["4.weight"] & ~seen[0]["4.weight"]
    assert returned.any() and pruner.masks["4.weight"].equal(seen[-1]["4.weight"])


def test_the_first_mask_of_training_sparse_is_random_and_the_seeds_own():
    def first(seed):
        torch.manual_seed(0)
        net = nn.Linear(40, 10)
        pruner = Pruner(net, {"weight": Magnitude(0.2)}, SET(every=5, end=9), seed=seed)
        pruner.step()
        return pruner.masks["weight"]

    assert first(0).sum() == 80 and first(0).equal(first(0)) and not first(0).equal(first(1))
    torch.manual_seed(0)
    assert not first(0).equal(Magnitude(0.2).mask(nn.Linear(40, 10).weight))


def test_weights_return_where_the_gradient_is_largest_and_start_from_zero():
    net = nn.Linear(6, 1, bias=False)
    pruner = Pruner(net, {"weight": Magnitude(0.5)}, RigL(every=2, end=1000, share=0.34))
    pruner.step()
    alive = pruner.masks["weight"].clone()
    with torch.no_grad():
        net.weight[alive] = torch.tensor([1.0, 3.0, -2.0])
    weakest = alive.nonzero()[0]
    gradient = torch.arange(6.0)[None]
    net.weight.grad = -gradient
    pruner.step()
    comes = torch.where(alive, -1.0, gradient).argmax()
    expected = alive.clone()
    expected[tuple(weakest)] = False
    expected[0, comes] = True
    assert pruner.masks["weight"].equal(expected)
    assert net.weight[0, comes] == 0
    net.weight.grad = None
    pruner.step()
    with pytest.raises(ValueError, match=r"weight has no gradient.*before optimizer.zero_grad"):
        pruner.step()


@pytest.mark.parametrize("rewind_to", [0, 2])
def test_rewinding_trains_the_ticket_from_where_it_was(rewind_to):
    net = model()
    opt = torch.optim.SGD(net.parameters(), 0.05)
    pruner = Pruner(net, RULES, Iterative(begin=4, every=3, rounds=2, rewind_to=rewind_to))
    if rewind_to:
        train(net, opt, pruner, rewind_to)
    start = copy.deepcopy(dict(net.named_parameters()))
    train(net, opt, pruner, 7 - rewind_to, seed=3)
    for name, p in net.named_parameters():
        mask = pruner.masks.get(name)
        assert p.equal(start[name] if mask is None else torch.where(mask, start[name], 0)), name
    assert pruner.density()["4.weight"] == 0.5
    train(net, opt, pruner, 1)
    assert not net[4].bias.equal(start["4.bias"])


def test_rounds_without_rewinding_go_on():
    net = model()
    pruner = Pruner(net, {"4.weight": Magnitude(0.25)}, Iterative(begin=2, every=2, rounds=2))
    found = []
    for _ in range(5):
        pruner.step()
        found.append(pruner.density()["4.weight"])
    assert found == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_threshold_mode_reports_the_density_it_arrives_at():
    net = nn.Linear(30, 20)
    with torch.no_grad():
        net.weight.copy_(torch.arange(1.0, 601).view(20, 30) / 600)
    rules = thresholds(net, ["weight"])
    pruner = Pruner(net, rules, TwoSlopes(start=2, ramp=4, end=8, every=2))
    q = rules["weight"].q
    assert q == pytest.approx(0.9, abs=0.01)
    # theta = 2 q · 2 / (2 · 2 + 3 · 4) = q / 4, phi = 3 q / 8; last update at step 6: (theta · 3 + phi · 3) / 2.
    expected = {1: 0.0, 2: q / 8, 4: (q / 4 * 3 + 3 * q / 8) / 2, 6: (q / 4 * 3 + 3 * q / 8 * 3) / 2}
    below = 0.0
    for step in range(1, 12):
        pruner.step()
        below = expected.get(step, below)
        assert pruner.density()["weight"] == pytest.approx(sum(i / 600 >= below for i in range(1, 601)) / 600, abs=1e-9)
    assert 0.1 < pruner.density()["weight"] < 0.2


@pytest.mark.parametrize("monotone", [True, False])
def test_a_threshold_may_judge_anew(monotone):
    net = nn.Linear(4, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    pruner = Pruner(net, {"weight": Threshold(2.25, monotone=monotone)}, TwoSlopes(0, 0, 2, every=1))
    pruner.step()  # theta = 2 q / 6, epsilon = theta + 2 · 1.5 theta = 3: the weight of 3 just stays
    assert pruner.masks["weight"].tolist() == [[False, False, True, True]]
    with torch.no_grad():
        net.weight[0, 0] = 9.0
    pruner._step = 0
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[not monotone, False, True, True]]


# --- group lasso -----------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_lasso_until_pruning_ends():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    pruner = Pruner(net, {"*.weight": Block(0.5, (2, 1))}, Cubic(1, 3), group_lasso=0.1)
    expected = 0.1 * sum(layer.weight.view(-1, 2, layer.in_features).norm(dim=1).sum() for layer in net)
    assert pruner.penalty().item() == pytest.approx(expected.item(), abs=10 * LASSO_F64)
    pruner.penalty().backward()
    assert net[1].weight.grad.view(1, 2, 6).norm(dim=1) == pytest.approx(0.1)
    for step in range(1, 5):
        pruner.step()
        assert bool(pruner.penalty() > 0) == (step < 3)
    before = net[0].weight.clone()
    pruner.proximal(1e9)
    assert net[0].weight.equal(before), "the proximal step has ended too"
    assert Pruner(net, {"*.weight": Block(0.5, (2, 1))}).penalty() == 0


def test_the_lasso_alone_makes_whole_blocks_zero():
    net = model()
    pruner = Pruner(net, {"*weight_hh*": Block(1.0, (4, 1))}, group_lasso=1.0)
    weight = net[1].weight_hh_l0
    for _ in range(3):
        before = weight.detach().clone()
        pruner.step()
        pruner.proximal(0.2)
        norms = before.view(3, 2, 4, 8).norm(dim=2, keepdim=True)
        expected = before.view(3, 2, 4, 8) * (1 - 0.2 / norms.clamp(min=1e-30)).clamp(min=0)
        torch.testing.assert_close(weight.detach(), expected.view(24, 8), rtol=1e-6, atol=0)
    pruner.proximal(100.0)
    assert not weight.any() and pruner.penalty() == 0
    pruner.penalty().backward()
    assert not weight.grad.any()


# --- resume, in every mode -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        Cubic(1, 12, 2),
        Iterative(3, 3, 3, rewind_to=1),
        SET(every=2, end=12),
        RigL(every=2, end=12),
        OneShot(7),
    ],
    ids=lambda s: type(s).__name__,
)
def test_killing_and_resuming_gives_the_same_bits(schedule):
    def parts():
        torch.manual_seed(0)
        net = model()
        return net, torch.optim.AdamW(net.parameters(), 0.01), Pruner(net, EVERY_RULE, schedule, group_lasso=1e-3)

    def steps(net, opt, pruner, begin, end):
        for step in range(begin, end):
            g = torch.Generator().manual_seed(step)
            opt.zero_grad()
            (net(torch.randn(3, 2, 4, generator=g))[0].square().sum() + pruner.penalty()).backward()
            opt.step()
            if pruner.step() and schedule.rewind_to is not None:
                opt.state.clear()

    whole = parts()
    steps(*whole, 0, 14)
    for killed in (2, 5, 8):
        first = parts()
        steps(*first, 0, killed)
        file = io.BytesIO()
        torch.save([x.state_dict() for x in first], file)
        file.seek(0)
        again = parts()
        for x, state in zip(again, torch.load(file, weights_only=True), strict=True):
            x.load_state_dict(state)
        steps(*again, killed, 14)
        assert all(a.equal(b) for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True))
        assert all(mask.equal(again[2].masks[name]) for name, mask in whole[2].masks.items())


def test_a_state_without_random_state_still_loads():
    net = model()
    pruner = Pruner(net, RULES)
    pruner.step()
    old = {key: pruner.state_dict()[key] for key in ("step", "masks")}
    fresh = Pruner(model(), RULES)
    fresh.load_state_dict(old)
    assert all(mask.equal(fresh.masks[name]) for name, mask in pruner.masks.items())


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_summary_counts_every_gate():
    net = model()
    pruner = Pruner(net, {"1.weight_hh*": Block((0.25, 0.5, 1.0), (4, 1)), "4.weight": NM(1, 4)})
    pruner.step()
    head, *lines = pruner.summary().splitlines()
    assert head.split() == ["matrix", "gate", "kept", "density", "candidates", "in", "a", "row", "in", "a", "column"]
    assert lines[0].split()[:7] == ["1.weight_hh_l0", "0", "16/64", "25.00%", "4/16", "blocks", *_row_range(pruner, 0)]
    assert lines[1].split()[:5] == ["1", "32/64", "50.00%", "8/16", "blocks"]
    assert lines[2].split() == ["2", "64/64", "100.00%", "16/16", "blocks", "8–8", "8–8"]
    assert lines[3].split()[:7] == ["4.weight", "0", "6/24", "25.00%", "6/24", "weights", "2–2"]


def _row_range(pruner, gate):
    rows = pruner.masks["1.weight_hh_l0"].view(3, 8, 8)[gate].sum(1).tolist()
    return [f"{min(rows)}–{max(rows)}"]


def test_rules_and_schedules_that_do_not_belong_together():
    net = model()
    with pytest.raises(ValueError, match="rule Threshold and the schedule Cubic do not belong"):
        Pruner(net, {"4.weight": Threshold(0.1)}, Cubic(1, 2))
    with pytest.raises(ValueError, match="rule Magnitude and the schedule TwoSlopes"):
        Pruner(net, {"4.weight": Magnitude(0.1)}, TwoSlopes(1, 2, 3))
    with pytest.raises(ValueError, match=r"1.weight_ih_l0: only square gates have a diagonal to keep, these are 8 x 6"):
        Pruner(net, {"1.weight_ih_l0": Magnitude(0.1, keep_diagonal=True)})
    with pytest.raises(ValueError, match="group_lasso is a weight"):
        Pruner(net, {"4.weight": Magnitude(0.1)}, group_lasso=-1.0)
    with pytest.raises(ValueError, match="a transposed convolution's, inputs first"):
        Pruner(nn.ConvTranspose1d(3, 4, 5), {"weight": Magnitude(0.1)})


def test_a_mark_says_what_is_held_at_zero_for_good(tmp_path):
    """Set while no weight can return, gone with the pruner, in copies of the model alone, and in pickles."""
    model = nn.GRU(8, 32)
    pruner = Pruner(model, {"weight_hh*": Block(density=0.25, block=(16, 1))}, Cubic(1, 4))
    weight = model.weight_hh_l0
    for _ in range(5):
        pruner.step()
        assert weight.kept() is pruner.masks["weight_hh_l0"]
    assert not hasattr(model.weight_ih_l0, "kept")
    alone, (copied, held) = copy.deepcopy(model), copy.deepcopy((model, pruner))
    assert getattr(alone.weight_hh_l0, "kept", None) is None
    assert copied.weight_hh_l0.kept() is held.masks["weight_hh_l0"]
    assert kept(pickle.loads(pickle.dumps(model)).weight_hh_l0) is None
    torch.save(model.state_dict(keep_vars=True), path := tmp_path / "model.pt")
    assert kept(torch.load(path, weights_only=True)["weight_hh_l0"]) is None
    resumed = Pruner(alone, {"weight_hh*": Block(density=0.25, block=(16, 1))}, Cubic(1, 4))
    resumed.load_state_dict(pruner.state_dict())
    assert torch.equal(alone.weight_hh_l0.kept(), weight.kept())
    Pruner(model, {"weight_hh*": Block(density=0.25, block=(16, 1))}, SET(every=2, end=9)).step()
    assert weight.kept is None
    pruner.step()
    assert weight.kept() is not None
    del pruner
    assert weight.kept() is None
