"""k winners take all against its definition."""

import copy

import pytest
import torch

from sparsefold.nn import KWTA, anneal


def test_the_largest_win_and_ties_go_to_the_lower_index():
    x = torch.tensor([[3.0, 1, 3, 3, -1, 2], [-5, -1, -1, -7, 0, -1]])
    assert KWTA(6, 2)(x).tolist() == [[3, 0, 3, 0, 0, 0], [0, -1, 0, 0, 0, 0]]
    assert KWTA(6, 1, groups=3)(x).tolist() == [[3, 0, 3, 0, 0, 2], [0, -1, -1, 0, 0, 0]]
    assert KWTA(6, 6)(x).equal(x)


def test_the_gradient_passes_through_the_winners_alone():
    x = torch.randn(4, 3, 10, dtype=torch.float64, requires_grad=True)
    y = KWTA(10, 3)(x)
    won = y != 0
    assert (won.sum(-1) == 3).all()
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert x.grad.equal(torch.where(won, weight, 0))


def test_evaluation_has_its_own_number_of_winners_and_no_boost():
    layer = KWTA(20, 5, k_eval=2, boost=2.0)
    x = torch.randn(7, 20)
    layer.duty.copy_(torch.rand(20))
    before = layer.duty.clone()
    y = layer.eval()(x)
    assert ((y != 0).sum(-1) == 2).all() and layer.duty.equal(before)
    assert y.equal(KWTA(20, 2).eval()(x))


def test_boosting_helps_units_that_win_too_rarely():
    torch.manual_seed(0)
    bias = torch.linspace(0, 1, 40)
    shares = {}
    for boost in (0.0, 3.0):
        layer = KWTA(40, 4, boost=boost, duty_period=100)
        for _ in range(300):
            layer(torch.rand(8, 40) + bias)
        assert layer.duty.sum().item() == pytest.approx(4, rel=1e-4)
        shares[boost] = layer.duty
    assert shares[0.0][:20].sum() < 0.1 < 0.5 < shares[3.0][:20].sum()


def test_boosting_changes_who_wins_and_not_what_is_handed_on():
    layer = KWTA(3, 1, boost=10.0)
    layer.duty.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert layer(torch.tensor([2.0, 1.9, 0.1])).tolist() == pytest.approx([0, 1.9, 0])
    layer.duty.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert layer(torch.tensor([-1.1, -1.0, -9.0])).tolist() == pytest.approx([-1.1, 0, 0]), (
        "below zero help means nearer"
    )


def test_the_boost_may_be_lowered_while_training():
    strength, layer = anneal(4.0, 0.0, 0, 10), KWTA(3, 1)
    winners = []
    for step in range(11):
        layer.duty.copy_(torch.tensor([0.5, 0.0, 0.0]))
        layer.boost = strength(step)
        winners.append(int(layer(torch.tensor([2.0, 1.0, 0.1])).argmax()))
    # exp(boost · 0.5) helps the second against a factor of 2 until boost < 2 ln 2 = 1.39, after step 6.
    assert winners == [1] * 7 + [0] * 4


def test_the_duty_cycle_is_kept_with_the_weights():
    layer = KWTA(8, 2, boost=1.0)
    layer(torch.randn(30, 8))
    other = KWTA(8, 2, boost=1.0)
    other.load_state_dict(layer.state_dict())
    assert other.duty.equal(layer.duty) and copy.deepcopy(layer).duty.equal(layer.duty)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 9}, {"k": 3, "groups": 4}, {"k": 1, "groups": 3}, {"k": 2, "k_eval": 9}]
)
def test_more_winners_than_values_are_refused(options):
    with pytest.raises(ValueError, match="equal parts"):
        KWTA(8, **options)


def test_other_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="boost is at least 0"):
        KWTA(8, 2, boost=-1.0)
    with pytest.raises(ValueError, match="this KWTA has 8 units, but its input has 7"):
        KWTA(8, 2)(torch.zeros(3, 7))
