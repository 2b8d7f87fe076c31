"""Masks against slow oracles that rank one candidate at a time, or try every choice there is."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefold import formats
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
    RigL,
    Threshold,
    TwoSlopes,
    Weighted,
    block_mask,
    magnitude_mask,
    masks,
    read_rules,
    thresholds,
)
from tolerances import LASSO_F64, THRESHOLD_F64

torch.set_num_threads(1)


def oracle(weight, density, rows, cols, gates, scope, within=None):
    """Rank blocks by exact fractions; (1, 1) blocks are single weights, whose squares rank as magnitudes do."""
    R, C = weight.shape[0] // gates, weight.shape[1]
    candidates = []
    for g in range(gates):
        for top in range(0, R, rows):
            for left in range(0, C, cols):
                place = np.s_[g * R + top : g * R + min(top + rows, R), left : left + cols]
                values = [Fraction(float(v)) ** 2 for v in weight[place].flat]
                dead = within is not None and not within[place].any()
                candidates.append((g, -1 if dead else sum(values) / len(values), place))
    mask = np.zeros(weight.shape, dtype=bool)
    for group in range(gates) if scope == "gate" else [None]:
        chosen = [c for c in candidates if group is None or c[0] == group]
        keep = math.ceil(Fraction(str(density)) * len(chosen))
        for _, score, place in sorted(chosen, key=lambda c: -c[1])[:keep]:
            mask[place] = score >= 0
    return mask if within is None else mask & within


@st.composite
def problems(draw):
    gates, R, C = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    # Few distinct values, so that ties are the rule.
    values = draw(
        st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0, 0.1]), min_size=gates * R * C, max_size=gates * R * C)
    )
    weight = np.array(values, dtype=np.float32).reshape(gates * R, C)
    density = draw(st.sampled_from([0.0, 1.0, 0.1, 0.3, 0.5, 0.7, 0.25, 1 / 3]))
    return weight, density, gates, draw(st.sampled_from(["gate", "matrix"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4), st.integers(1, 3), st.sampled_from([None, 0.4, 0.8]))
def test_masks_equal_the_oracle(problem, rows, cols, before):
    weight, density, gates, scope = problem
    tensor = torch.from_numpy(weight)
    within = None if before is None else oracle(weight[::-1], before, rows, cols, gates, scope)
    earlier = None if within is None else torch.from_numpy(within)
    got = block_mask(tensor, density, (rows, cols), gates, scope, earlier)
    assert got.dtype == torch.bool
    assert np.array_equal(got.numpy(), oracle(weight, density, rows, cols, gates, scope, within))
    got = magnitude_mask(tensor, density, gates, scope, earlier)
    assert np.array_equal(got.numpy(), oracle(weight, density, 1, 1, gates, scope, within))


@pytest.mark.parametrize("n", [1, 10, 30, 70, 1000])
@pytest.mark.parametrize("density", [0.0, 0.07, 0.1, 1 - 0.9, 0.1 + 0.2, 0.29, 1 / 3, 0.5, 1.0])
def test_rounding_noise_keeps_no_weight_more(n, density):
    kept = int(magnitude_mask(torch.arange(float(n))[None], density).sum())
    assert kept == math.ceil(Fraction(density).limit_denominator(1000) * n)


def test_a_tiny_density_keeps_one_and_edges_are_exact():
    weight = torch.randn(6, 5)
    assert magnitude_mask(weight, 1e-9, gates=3).sum(1).view(3, 2).sum(1).tolist() == [1, 1, 1]
    assert not magnitude_mask(weight, 0.0).any()
    assert block_mask(weight, 1.0, (4, 4)).all()
    assert block_mask(weight, 0.01, (4, 4), gates=2).sum().item() > 0


def test_ties_go_to_the_lowest_index_and_short_blocks_compete_by_their_mean():
    assert magnitude_mask(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    weight = torch.tensor([[1.0], [1.0], [2.0]])
    assert block_mask(weight, 0.5, (2, 1)).flatten().tolist() == [False, False, True]
    assert block_mask(torch.ones(3, 1), 0.5, (2, 1)).flatten().tolist() == [True, True, False]


def test_infinite_weights_and_half_precision_rank():
    weight = torch.tensor([[1.0, float("-inf"), 2.0, 0.5]])
    assert magnitude_mask(weight, 0.25).tolist() == [[False, True, False, False]]
    assert block_mask(weight.bfloat16(), 0.5, (1, 2)).tolist() == [[True, True, False, False]]


W = torch.ones(6, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: magnitude_mask(W * float("nan"), 0.5), "holds NaN"),
        (lambda: block_mask(W * float("nan"), 0.5, (2, 1)), "holds NaN"),
        (lambda: magnitude_mask(W, 1.5), r"in \[0, 1\], got 1.5"),
        (lambda: magnitude_mask(W, float("nan")), "got nan"),
        (lambda: magnitude_mask(W[0], 0.5), r"for a matrix, got shape \(4,\)"),
        (lambda: magnitude_mask(W, 0.5, gates=4), "4 gates do not divide 6 rows"),
        (lambda: magnitude_mask(W, 0.5, scope="global"), "'gate' or 'matrix', got 'global'"),
        (lambda: magnitude_mask(W, 0.5, within=W[:2].bool()), r"shape \(2, 4\), the weight \(6, 4\)"),
        (lambda: Magnitude(-0.1), "got -0.1"),
        (lambda: Magnitude(0.1, scope="all"), "got 'all'"),
        (lambda: Block(2.0), "got 2.0"),
        (lambda: Block(0.5, block=(0, 1)), r"each at least 1, got \(0, 1\)"),
        (lambda: Cubic(begin=5, end=4), "begin=5, end=4"),
        (lambda: Cubic(begin=0, end=0), "end >= 1"),
        (lambda: Cubic(begin=1, end=4, every=0), "every=0"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_cubic_ramp():
    ramp = Cubic(begin=10, end=30, every=7)
    assert [s for s in range(40) if ramp.due(s)] == [10, 17, 24, 30]
    assert ramp.density(0, 0.1) == ramp.density(10, 0.1) == 1
    assert ramp.density(20, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert ramp.density(30, 0.1) == ramp.density(99, 0.1) == 0.1
    shot = Cubic(begin=4, end=4)
    assert [s for s in range(9) if shot.due(s)] == [4]
    assert (shot.density(3, 0.1), shot.density(4, 0.1)) == (1, 0.1)


# --- scores, gates, diagonals ----------------------------------------------------------------------------------------

SCORES = {
    "max": max,
    "l1": lambda values: sum(values) / len(values),
    "l2": lambda values: sum(v * v for v in values) / len(values),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4), st.integers(1, 3), st.sampled_from(list(SCORES)))
def test_every_score_ranks_as_its_definition(problem, rows, cols, score):
    weight, density, gates, _ = problem
    R, C = weight.shape[0] // gates, weight.shape[1]
    expected = np.zeros_like(weight, dtype=bool)
    for g in range(gates):
        places = [
            np.s_[g * R + top : g * R + min(top + rows, R), left : left + cols]
            for top in range(0, R, rows)
            for left in range(0, C, cols)
        ]
        ranked = sorted(places, key=lambda p: -SCORES[score]([abs(Fraction(float(v))) for v in weight[p].flat]))
        for place in ranked[: math.ceil(Fraction(str(density)) * len(places))]:
            expected[place] = True
    rule = Block(density, (rows, cols), score=score)
    assert np.array_equal(rule.mask(torch.from_numpy(weight), gates).numpy(), expected)


def test_each_gate_may_have_its_own_density():
    weight = torch.randn(12, 10)
    mask = Magnitude((0.05, 0.5, 1.0)).mask(weight, gates=3)
    assert mask.view(3, -1).sum(1).tolist() == [2, 20, 40]
    for g, density in enumerate((0.05, 0.5, 1.0)):
        assert mask[4 * g : 4 * g + 4].equal(magnitude_mask(weight[4 * g : 4 * g + 4], density))
    assert Block((0.0, 0.25), (2, 1)).mask(weight, gates=2).view(2, -1).sum(1).tolist() == [0, 16]


@pytest.mark.parametrize(
    "rule",
    [Magnitude(0.3), Block(0.3, (2, 1), "matrix"), ColumnBalanced(0.3), Magnitude(0.2, keep_diagonal=True)],
)
def test_weighted_rows_rank_as_the_weight_times_their_factors(rule):
    random = torch.Generator().manual_seed(1)
    w, rows = torch.randn(8, 8, generator=random), torch.rand(8, generator=random) * 3
    within = torch.rand(8, 8, generator=random) < 0.8
    assert torch.equal(Weighted(rule, rows).mask(w), rule.mask(w * rows[:, None]))
    assert torch.equal(
        Weighted(rule, rows).mask(w, value=0.5, within=within), rule.mask(w * rows[:, None], 1, 0.5, within)
    )
    assert not torch.equal(Weighted(rule, rows).mask(w), rule.mask(w))
    with pytest.raises(ValueError, match="each of 8 rows"):
        Weighted(rule, rows[:7]).mask(w)


@pytest.mark.parametrize("rule", [Magnitude(0.2, keep_diagonal=True), Block(0.2, (2, 2), keep_diagonal=True)])
def test_the_diagonal_is_kept_on_top_and_has_no_part_in_the_ranking(rule):
    torch.manual_seed(0)
    weight = torch.randn(15, 5)
    diagonal = torch.eye(5, dtype=torch.bool).repeat(3, 1)
    mask = rule.mask(weight, gates=3)
    assert mask[diagonal].all()
    # A huge diagonal, or none, changes nothing else; the rest is what a matrix without it would keep.
    for value in (0.0, 1e6):
        assert rule.mask(torch.where(diagonal, value, weight), gates=3).equal(mask)
    if isinstance(rule, Magnitude):
        assert (mask & ~diagonal).view(3, -1).sum(1).tolist() == [4, 4, 4]  # a fifth of twenty
    kept = type(rule)(0.0, keep_diagonal=True).mask(weight, gates=3)
    assert kept.equal(diagonal)


def test_a_global_rule_ranks_all_matrices_together():
    small, large = torch.rand(4, 5), 10 + torch.rand(6, 5)
    ats = [masks.blocks(4, 5, 2, (2, 1)), masks.blocks(6, 5, 1, (2, 1))]
    rule = Block(0.6, (2, 1), scope="global")
    kept = rule.choose([rule.scores(w, at) for w, at in zip((small, large), ats, strict=True)], ats, [5, 5], 0.6)
    assert kept[1].all() and kept[0].sum() == 0  # 15 of 25 blocks are the larger matrix's
    kept = rule.choose([rule.scores(w, at) for w, at in zip((small, large), ats, strict=True)], ats, [5, 5], 0.8)
    assert kept[1].all() and kept[0].sum() == 5


# --- n of m, columns in balance --------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 5), st.data())
def test_n_of_m(problem, m, data):
    weight, density, _, _ = problem
    n = data.draw(st.integers(0, m))
    rule = NM(n, m)
    expected = np.zeros_like(weight, dtype=bool)
    on_the_way = np.zeros_like(expected)
    for row, left in itertools.product(range(len(weight)), range(0, weight.shape[1], m)):
        group = np.abs(weight[row, left : left + m])
        order = sorted(range(len(group)), key=lambda i: -group[i])
        expected[row, left + np.array(order[:n], int)] = True
        keep = max(n, math.ceil(Fraction(str(density)) * m))
        on_the_way[row, left + np.array(order[:keep], int)] = True
    tensor = torch.from_numpy(weight)
    assert np.array_equal(rule.mask(tensor).numpy(), expected)
    assert np.array_equal(rule.mask(tensor, value=density).numpy(), on_the_way)
    earlier = rule.mask(tensor.flip(0).contiguous())
    assert not (rule.mask(tensor, within=earlier) & ~earlier).any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4))
def test_every_column_of_a_gate_keeps_as_many_groups(problem, group):
    weight, density, gates, _ = problem
    R, C = weight.shape[0] // gates, weight.shape[1]
    expected = np.zeros_like(weight, dtype=bool)
    for g, column in itertools.product(range(gates), range(C)):
        places = [np.s_[g * R + top : g * R + min(top + group, R), column] for top in range(0, R, group)]
        order = sorted(places, key=lambda p: -SCORES["l1"]([abs(Fraction(float(v))) for v in weight[p]]))
        for place in order[: math.ceil(Fraction(str(density)) * len(places))]:
            expected[place] = True
    assert np.array_equal(ColumnBalanced(density, group).mask(torch.from_numpy(weight), gates).numpy(), expected)


# --- complementary ---------------------------------------------------------------------------------------------------


def groups_by_hand(rows, gates, k, g):
    """Rows of group q of set s of every gate, by the definition in the format."""
    R = rows // gates
    sets = -(-R // (k * g))
    return {
        (gate, s, q): [gate * R + r for r in range((q * sets + s) * g, (q * sets + s + 1) * g) if r < R]
        for gate, s, q in itertools.product(range(gates), range(sets), range(k))
    }


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4), st.integers(1, 3))
def test_in_each_column_the_heaviest_group_of_a_set_lives(problem, k, g):
    weight, density, gates, _ = problem
    groups = groups_by_hand(len(weight), gates, k, g)
    for value, keep in ((None, 1), (density, max(1, math.ceil(Fraction(str(density)) * k)))):
        expected = np.zeros_like(weight, dtype=bool)
        for gate, s in {(gate, s) for gate, s, _ in groups}:
            for column in range(weight.shape[1]):
                alive = [q for q in range(k) if groups[gate, s, q]]
                alive.sort(key=lambda q: -sum(abs(Fraction(float(weight[r, column]))) for r in groups[gate, s, q]))
                for q in alive[:keep]:
                    expected[groups[gate, s, q], column] = True
        mask = Complementary(k, g).mask(torch.from_numpy(weight), gates, value)
        assert np.array_equal(mask.numpy(), expected)
    formats.Complementary.from_dense(np.where(expected, weight, 0) if keep == 1 else np.zeros_like(weight), k, g, gates)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 2), st.data())
def test_the_balanced_assignment_is_the_best_of_all(k, columns, sets, data):
    values = data.draw(st.lists(st.integers(0, 9), min_size=sets * k * columns, max_size=sets * k * columns))
    scores = torch.tensor(values, dtype=torch.float64).view(sets, columns, k)
    kept = masks.balanced(scores)
    assert (kept.sum(2) == 1).all()
    low, high = columns // k, -(-columns // k)
    loads = kept.sum(1)
    assert (loads >= low).all() and (loads <= high).all()
    for s in range(sets):
        best = max(
            sum(scores[s, j, q].item() for j, q in enumerate(owner))
            for owner in itertools.product(range(k), repeat=columns)
            if all(low <= owner.count(q) <= high for q in range(k))
        )
        assert scores[s][kept[s]].sum().item() == best


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(2, 3), st.integers(1, 5), st.data())
def test_where_groups_have_died_balance_is_the_best_left(k, columns, data):
    values = data.draw(st.lists(st.integers(0, 9), min_size=k * columns, max_size=k * columns))
    scores = torch.tensor(values, dtype=torch.float64).view(1, columns, k)
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k * columns, max_size=k * columns))).view_as(scores)
    dead[..., data.draw(st.integers(0, k - 1))] = False  # every column keeps a choice
    scores[dead] = -math.inf
    kept = masks.balanced(scores)
    assert (kept.sum(2) == 1).all() and not (kept & dead).any()
    existing = [q for q in range(k) if not dead[0, :, q].all()]
    low, high = columns // len(existing), -(-columns // len(existing))

    def judged(owner):
        loads = [owner.count(q) for q in existing]
        fault = sum(max(n - high, 0) + max(low - n, 0) for n in loads)
        return -fault, sum(scores[0, j, q].item() for j, q in enumerate(owner))

    owners = [o for o in itertools.product(range(k), repeat=columns) if not any(dead[0, j, q] for j, q in enumerate(o))]
    assert judged(tuple(kept[0].int().argmax(1).tolist())) == max(map(judged, owners))


@pytest.mark.parametrize("choice", ["balanced", "random", "permuted"])
@pytest.mark.parametrize(("rows", "columns", "k", "g"), [(12, 12, 4, 1), (24, 13, 3, 2), (6, 5, 6, 1), (8, 9, 1, 1)])
def test_fan_in_differs_by_one_at_most(choice, rows, columns, k, g):
    torch.manual_seed(0)
    weight = torch.randn(2 * rows, columns)
    mask = Complementary(k, g, choice=choice).mask(weight, gates=2)
    stored = formats.Complementary.from_dense((weight * mask).numpy(), k, g, 2)
    assert np.array_equal(stored.to_dense(), (weight * mask).numpy())
    fan_in = mask.sum(1)
    if choice == "permuted":  # exactly one in every k columns, so that rows differ where the last k are fewer
        assert (mask[:, : columns // k * k].view(2 * rows, -1, k).sum(2) == 1).all()
    assert fan_in.max() - fan_in.min() <= 1
    assert mask.sum() == 2 * rows * columns / k
    if k > 1 and choice != "balanced":
        assert not mask.equal(Complementary(k, g, choice=choice, seed=1).mask(weight, gates=2))
        assert mask.equal(Complementary(k, g, choice=choice).mask(torch.ones_like(weight), gates=2))


def test_random_owners_stay_owners_while_the_density_falls():
    weight = torch.randn(16, 10)
    for choice in ("random", "permuted", "balanced"):
        rule, within = Complementary(8, choice=choice), None
        for density in (1.0, 0.7, 0.4, 0.2, 1 / 8):
            within = rule.mask(weight, value=density, within=within)
            assert within.view(8, 2, 10).sum(0).unique().tolist() == [max(1, math.ceil(density * 8))]
        assert choice == "balanced" or within.equal(rule.mask(weight))


def test_padding_never_owns_a_column():
    for choice in ("magnitude", "balanced", "random", "permuted"):
        mask = Complementary(4, 2, choice=choice).mask(torch.zeros(5, 9))  # one set of 2, 2 and 1 rows, and none
        owners = torch.stack([mask[0:2].all(0), mask[2:4].all(0), mask[4]])
        assert owners.sum(0).tolist() == [1] * 9, choice


def test_sets_of_a_unit_hold_one_row_of_each_gate():
    weight = torch.randn(3 * 8, 7)
    mask = Complementary(3, sets="unit").mask(weight, gates=3)
    assert (mask.view(3, 8, 7).sum(0) == 1).all()
    assert (weight * mask).abs().view(3, 8, 7).sum(0).equal(weight.abs().view(3, 8, 7).amax(0))
    with pytest.raises(ValueError, match="a multiple of the 3 gates"):
        Complementary(4, sets="unit").mask(weight, gates=3)


# --- regrowth and lasso ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
def test_regrowth_exchanges_the_weakest_for_the_strongest(groups, n, share, data):
    def draw(values):
        return data.draw(st.lists(values, min_size=groups * n, max_size=groups * n))

    kept = torch.tensor(draw(st.booleans())).view(groups, n)
    scores = torch.tensor(draw(st.integers(0, 5)), dtype=torch.float64).view(groups, n)
    growth = torch.tensor(draw(st.integers(0, 5)), dtype=torch.float64).view(groups, n)
    got = masks.regrown(kept, scores, growth, share)
    expected = kept.tolist()
    alive = sorted(kept.nonzero().tolist(), key=lambda p: scores[p[0], p[1]].item())
    dropped = alive[: int(share * len(alive))]
    for g, i in dropped:
        expected[g][i] = False
    for g in range(groups):
        lost = [i for h, i in dropped if h == g]
        others = [i for i in range(n) if not kept[g, i]]
        others.sort(key=lambda i: -growth[g, i].item())
        for i in [*others, *sorted(lost)][: len(lost)]:
            expected[g][i] = True
    assert got.tolist() == expected
    assert got.sum(1).equal(kept.sum(1))


def test_the_lasso_and_its_gradient():
    weight = torch.tensor([[3.0, 0, 1], [4, 0, 1], [0, 5, 0]], dtype=torch.float64, requires_grad=True)
    at = masks.blocks(3, 3, 1, (2, 1))
    value = masks.lasso(weight, at)
    assert value.item() == pytest.approx(5 + 0 + math.sqrt(2) + 0 + 5 + 0, abs=LASSO_F64)
    value.backward()
    half = math.sqrt(0.5)
    expected = torch.tensor([[0.6, 0, half], [0.8, 0, half], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=LASSO_F64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.5, 2.0, 1e3]))
def test_the_proximal_step_is_its_closed_form(problem, rows, cols, amount):
    weight, _, gates, _ = problem
    tensor = torch.from_numpy(weight).double()
    got = masks.proximal(tensor, masks.blocks(*weight.shape, gates, (rows, cols)), amount).numpy()
    R, C = weight.shape[0] // gates, weight.shape[1]
    for g, top, left in itertools.product(range(gates), range(0, R, rows), range(0, C, cols)):
        place = np.s_[g * R + top : g * R + min(top + rows, R), left : left + cols]
        block = weight[place].astype(float)
        norm = math.sqrt((block**2).sum())
        wanted = block * max(0.0, 1 - amount / norm) if norm else block
        assert np.abs(got[place] - wanted).max() <= LASSO_F64
        if norm <= amount:
            assert not got[place].any()
        else:  # the optimum of ½‖v − w‖² + amount ‖v‖ has v − w + amount v / ‖v‖ = 0
            v = got[place]
            assert np.abs(v - block + amount * v / math.sqrt((v**2).sum())).max() <= 100 * LASSO_F64


# --- schedules -------------------------------------------------------------------------------------------------------


def test_the_threshold_rises_in_two_slopes_computed_by_hand():
    # q = 0.11: theta = 2 · 0.11 · 100 / (2 · 300 + 3 · 200) = 22 / 1200 = 0.018333…, phi = 0.0275.
    ramp = TwoSlopes(start=200, ramp=500, end=700, every=100)
    assert [s for s in range(1000) if ramp.due(s)] == [200, 300, 400, 500, 600]
    theta, phi = 22 / 1200, 0.0275
    by_hand = {
        200: theta * 1 / 100,
        300: theta * 101 / 100,
        499: theta * 300 / 100,
        500: (theta * 301 + phi * 1) / 100,
        600: (theta * 301 + phi * 101) / 100,
        699: (theta * 301 + phi * 200) / 100,
    }
    for step, epsilon in by_hand.items():
        assert ramp.density(step, 0.11) == pytest.approx(epsilon, rel=THRESHOLD_F64)
    assert by_hand[699] == pytest.approx(0.11, rel=2 / 600)  # q, up to one step of the ramp
    assert TwoSlopes(0, 10, 20, 1, ratio=2.0).density(15, 1.0) == pytest.approx(
        2 / 50 * 11 + 4 / 50 * 6, rel=THRESHOLD_F64
    )


@pytest.mark.parametrize(
    ("block", "factor"),
    [((1, 1), 1), ((4, 4), 2.0), ((12, 2), 2.2134), ((8, 4), 2.3784), ((16, 16), 4), ((32, 32), 5.6569)],
)
def test_the_threshold_of_a_block_grows_with_the_fourth_root_of_its_size(block, factor):
    assert Threshold(0.1, block).final == pytest.approx(0.1 * factor, rel=1e-4)


def test_a_threshold_keeps_blocks_that_reach_it():
    weight = torch.tensor([[0.1, -0.5, 0.2], [0.3, 0.1, 0.2]])
    assert Threshold(0.0, (2, 1)).mask(weight, value=0.3).tolist() == [[True, True, False]] * 2


def test_q_is_a_quantile_of_a_trained_model():
    net = torch.nn.Linear(10, 10)
    with torch.no_grad():
        net.weight.copy_((torch.arange(100.0) - 50).view(10, 10))
    rules = thresholds(net, ["weight"], (2, 1), share=0.9)
    assert rules == {"weight": Threshold(45.0, (2, 1))}  # of 0, 1, 1, … 49, 49, 50 the ninetieth
    with pytest.raises(ValueError, match="no matrix is named 'bias'"):
        thresholds(net, ["bias"])


def test_rounds_each_drop_the_same_share_of_what_is_left():
    rounds = Iterative(begin=10, every=5, rounds=3)
    assert [s for s in range(40) if rounds.due(s)] == [10, 15, 20] and rounds.end == 20
    assert [rounds.density(s, 0.125) for s in (9, 10, 14, 15, 20, 99)] == pytest.approx(
        [1, 0.5, 0.5, 0.25, 0.125, 0.125]
    )
    assert rounds.density(20, 0.1) == 0.1
    assert OneShot(3).density(2, 0.1) == 1 and OneShot(3).density(3, 0.1) == 0.1
    assert [s for s in range(9) if OneShot(3).due(s)] == [3]


def test_how_much_is_exchanged():
    assert [s for s in range(1, 40) if SET(every=10, end=30).due(s)] == [1, 10, 20]
    assert SET(every=10, end=30, share=0.4).exchanged(20) == 0.4
    rigl = RigL(every=10, end=40, share=0.4)
    assert [rigl.exchanged(s) for s in (0, 20, 40, 50)] == pytest.approx([0.4, 0.2, 0, 0], abs=1e-12)
    assert rigl.density(1, 0.1) == 0.1


# --- rules from a file -----------------------------------------------------------------------------------------------


def test_rules_are_read_from_tables():
    table = {
        "a*": {"rule": "block", "density": [0.1, 0.2, 0.3], "block": [8, 1], "keep_diagonal": True},
        "b": {"rule": "magnitude", "density": 1, "scope": "global"},
        "c": {"rule": "nm", "n": 2, "m": 4},
        "d": {"rule": "complementary", "overlay": 4, "choice": "balanced"},
        "e": {"rule": "column_balanced", "density": 0.5, "group": 16},
    }
    assert read_rules(table) == {
        "a*": Block((0.1, 0.2, 0.3), (8, 1), keep_diagonal=True),
        "b": Magnitude(1, "global"),
        "c": NM(2, 4),
        "d": Complementary(4, choice="balanced"),
        "e": ColumnBalanced(0.5, 16),
    }


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({}, "there is no rule"),
        ({"a": 3}, "'a' is a table with rule = one of magnitude, block"),
        ({"a": {"density": 0.5}}, "is a table with rule"),
        ({"a": {"rule": "blok"}}, "unknown rule 'blok'. Did you mean 'block'"),
        ({"a": {"rule": "block", "densty": 1}}, "block has no argument 'densty'. Arguments: density, block"),
        ({"a": {"rule": "block"}}, "block needs density"),
        ({"a": {"rule": "nm", "n": 2}}, "nm needs m"),
        ({"a": {"rule": "block", "density": "x"}}, "density must be a number or a list of numbers, got 'x'"),
        ({"a": {"rule": "block", "density": True}}, "density must be a number or a list of numbers, got True"),
        (
            {"a": {"rule": "block", "density": 0.5, "block": [1.5, 1]}},
            "block must be a list of 2 whole numbers, got .1.5, 1.",
        ),
        ({"a": {"rule": "block", "density": 0.5, "block": 4}}, "block must be a list of 2 whole numbers, got 4"),
        ({"a": {"rule": "block", "density": 0.5, "keep_diagonal": 1}}, "keep_diagonal must be true or false"),
        (
            {"a": {"rule": "block", "density": 0.5, "scope": 3}},
            "scope must be one of 'gate', 'matrix', 'global', got 3",
        ),
        ({"a": {"rule": "block", "density": 7}}, "'a': density is the share"),
        ({"a": {"rule": "nm", "n": [1, 2], "m": 3}}, "whole number"),
        ({"a": {"rule": "column_balanced", "density": [0.5, 0.5]}}, "density must be a number, got .0.5, 0.5."),
    ],
)
def test_wrong_tables_get_a_sentence(table, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_rules(table)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Magnitude((0.1, 0.2)).mask(W, gates=3), "2 densities are given, this matrix has 3 gates"),
        (lambda: Magnitude((0.1, 0.2), "matrix"), "needs scope='gate', got 'matrix'"),
        (lambda: Magnitude((0.1, 1.2)), r"in \[0, 1\], got \(0.1, 1.2\)"),
        (lambda: Magnitude(0.1, keep_diagonal=True).mask(W, gates=3), "only square gates have a diagonal"),
        (lambda: Block(0.1, score="l3"), "score is 'max', 'l1' or 'l2', got 'l3'"),
        (lambda: NM(3, 2), "n=3, m=2"),
        (lambda: Complementary(0), "overlay is at least 1, got 0"),
        (lambda: Complementary(2, 0), "group is at least 1"),
        (lambda: Complementary(2, choice="best"), "choice is 'magnitude', .*got 'best'"),
        (lambda: ColumnBalanced(0.5, 0), "group is at least 1"),
        (lambda: Threshold(-1.0), "q is a quantile"),
        (lambda: OneShot(0), "at is at least 1"),
        (lambda: Iterative(1, 0, 1), "every is at least 1"),
        (lambda: Iterative(5, 1, 1, rewind_to=5), "a step before the first pruning, 5, got 5"),
        (lambda: TwoSlopes(5, 4, 9), "start=5, ramp=4"),
        (lambda: TwoSlopes(5, 5, 5), "start < end"),
        (lambda: TwoSlopes(1, 2, 3, ratio=float("nan")), "ratio"),
        (lambda: SET(every=0, end=1), "every is at least 1"),
        (lambda: RigL(every=1, end=9, share=2.0), "got 2.0"),
    ],
)
def test_errors_of_the_other_rules_and_schedules(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
