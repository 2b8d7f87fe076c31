"""AdaptiveDecoder: probabilities of all words, the same in training, gradients, its start, and cutoffs that are none."""

from __future__ import annotations

import pytest
import torch

from sparsefold.nn import AdaptiveDecoder

CUTOFFS = (5, 22, 28)


def decoder(**options) -> AdaptiveDecoder:
    torch.manual_seed(0)
    return AdaptiveDecoder(12, 30, CUTOFFS, **options)


def test_the_probabilities_of_all_words_sum_to_one() -> None:
    found = decoder().eval()(torch.randn(4, 3, 12))
    assert found.shape == (4, 3, 30)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, 3))


def test_it_is_the_equation_written_out() -> None:
    module, x = decoder().double().eval(), torch.randn(12).double()
    first = torch.softmax(module.head(x), -1)
    expected = [*first[:5]]
    for k, tail in enumerate(module.tails):
        projection, wide = tail
        expected += [*(first[5 + k] * torch.softmax(wide.weight @ (projection.weight @ x) + wide.bias, -1))]
    torch.testing.assert_close(module(x[None, None])[0, 0].exp(), torch.stack(expected))


def test_each_word_has_the_vector_that_its_logit_multiplies() -> None:
    module, x = decoder().double(), torch.randn(12).double()
    assert module.vectors().shape == (30, 12)
    logits = [module.head(x)[:5], *(tail(x) for tail in module.tails)]
    biases = [module.head.bias[:5], *(tail.get_parameter("1.bias") for tail in module.tails)]
    torch.testing.assert_close(module.vectors() @ x, torch.cat(logits) - torch.cat(biases))


def test_it_is_torchs_adaptive_softmax() -> None:
    module = AdaptiveDecoder(16, 30, CUTOFFS, divide=2.0).eval()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 30, [*CUTOFFS], div_value=2.0, head_bias=True)
    with torch.no_grad():
        theirs.head.weight.copy_(module.head.weight)
        theirs.head.bias.copy_(module.head.bias)
        for ours, tail in zip(module.tails, theirs.tail, strict=True):
            tail[0].weight.copy_(ours[0].weight)
            tail[1].weight.copy_(ours[1].weight)
            ours[1].bias.zero_()  # theirs has none
        x = torch.randn(7, 16)
        torch.testing.assert_close(module(x), theirs.log_prob(x))


def test_in_training_it_gives_the_targets_as_evaluation_does() -> None:
    module, x = decoder(), torch.randn(10, 6, 12)
    y = torch.arange(60).view(10, 6) % 30  # every word
    assert module.train().targets(y) is y
    found = module(x)
    torch.testing.assert_close(found, module.eval()(x).gather(-1, y[..., None])[..., 0])
    module.targets(y)  # in evaluation all words are given, whatever is wanted
    assert module(x).shape == module.train()(x).shape == (10, 6, 30)


@pytest.mark.parametrize("words", [[1, 2, 3, 4], [0, 6, 24, 29], [7, 7, 7, 21]], ids=["head", "each", "one-cluster"])
def test_gradients(words) -> None:
    module = decoder().double()
    y = torch.tensor(words).view(2, 2)
    parameters = dict(module.named_parameters())

    def play(x, *values):
        module.targets(y)
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(2, 2, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(play, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_probabilities_are_float32_at_least(dtype) -> None:
    module, x = decoder().to(dtype), torch.randn(3, 2, 12).to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    module.targets(torch.tensor([[1, 9], [23, 29], [0, 5]]))
    assert module(x).dtype == module.eval()(x).dtype == wanted


def test_the_biases_start_at_how_often_words_are_met() -> None:
    share = torch.rand(30)
    share /= share.sum()
    module = decoder(share=share).eval()
    torch.testing.assert_close(module(torch.zeros(1, 1, 12))[0, 0].exp(), share)


def test_each_projection_is_narrower_and_gives_a_number_at_least() -> None:
    module = AdaptiveDecoder(20, 30, CUTOFFS, divide=5.0)
    assert [tail[0].out_features for tail in module.tails] == [4, 1, 1]
    assert "20, 30, cutoffs=(5, 22, 28)" in repr(module)


@pytest.mark.parametrize("cutoffs", [(), (0,), (30,), (31,), (-1,), (5, 5), (6, 5), (5, 30), (0, 5)], ids=str)
def test_cutoffs_that_do_not_rise_within_the_words_are_refused(cutoffs) -> None:
    with pytest.raises(
        ValueError, match=r"cutoffs rise, each at least 1 and less than the number of words, 30; got \["
    ):
        AdaptiveDecoder(12, 30, cutoffs)


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    for divide in (0.0, -1.0, 0.5, 1e-300, float("nan")):
        with pytest.raises(ValueError, match="divide says how much narrower"):
            AdaptiveDecoder(12, 30, CUTOFFS, divide=divide)
    with pytest.raises(ValueError, match=r"how often each of 30 words is met; got shape \(29,\)"):
        AdaptiveDecoder(12, 30, CUTOFFS, share=torch.ones(29))
