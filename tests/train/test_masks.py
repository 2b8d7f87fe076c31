"""Masks against a slow oracle that ranks one candidate at a time."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefold.sparsify import Block, Cubic, Magnitude, block_mask, magnitude_mask

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
