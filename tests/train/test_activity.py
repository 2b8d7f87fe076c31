"""Event rates and their penalty, in one process and averaged over two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn as torch_nn

from sparsefold.nn import EGRU, KWTA, Activity, Stack, anneal, param_groups
from tolerances import DISTRIBUTED_F32, MEAN_F64

torch.set_num_threads(1)


def test_rates_are_counted_events():
    torch.manual_seed(0)
    layer = EGRU(3, 5, 2)
    model = Stack(layer, torch_nn.Linear(5, 2))
    x = torch.randn(7, 4, 3)
    activity = model(x)[2]
    state, counts = None, torch.zeros(2, 5)
    for x_t in x:
        _, state = layer(x_t[None], state)
        counts += (state.y > 0).sum(1)
    assert 0 < counts.sum() < 2 * 7 * 4 * 5
    assert torch.equal(torch.stack(activity.rates) * 28, counts)
    assert activity.event_rate == pytest.approx(counts.sum().item() / (2 * 28 * 5), rel=1e-6)
    assert "event_rate=" in repr(activity)


def test_event_rate_weighs_layers_by_their_units():
    assert Activity([torch.ones(3), torch.zeros(1)]).event_rate == 0.75
    assert Activity([]).event_rate == 1.0
    assert Activity([]).penalty(0.1, 5.0).item() == 0


@pytest.mark.parametrize("per", ["unit", "mean"])
def test_penalty_and_its_gradient(per):
    values = ([0.5, 0.0, 0.3, 0.1], [0.25, 0.75])
    rates = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    penalty = Activity(rates).penalty(0.2, 10.0, per=per)
    if per == "unit":
        wanted = 10 * ((0.3**2 + 0.1**2) / 4 + (0.05**2 + 0.55**2) / 2)
        grads = [[10 * 2 * e / 4 for e in (0.3, 0, 0.1, 0)], [10 * 2 * e / 2 for e in (0.05, 0.55)]]
    else:
        wanted = 10 * (0.025**2 + 0.3**2)
        grads = [[10 * 2 * 0.025 / 4] * 4, [10 * 2 * 0.3 / 2] * 2]
    penalty.backward()
    assert penalty.item() == pytest.approx(wanted, abs=10 * MEAN_F64)
    for rate, grad in zip(rates, grads, strict=True):
        assert rate.grad.tolist() == pytest.approx(grad, abs=10 * MEAN_F64)


def test_the_penalty_reaches_the_weights_through_the_surrogate():
    torch.manual_seed(0)
    layer = EGRU(3, 5)
    _, _, rates = layer(torch.randn(7, 4, 3), with_activity=True)
    Activity(rates).penalty(0.0, 1.0).backward()
    # More bias on the candidate means more events: on average the penalty pushes down.
    assert layer.bias_ih_l0.grad[10:].mean() > 0


def test_each_layer_may_have_its_own_target():
    rates = [torch.tensor([0.5, 0.1]), torch.tensor([0.5, 0.1])]
    activity = Activity(rates)
    assert activity.penalty([0.3, 0.05], 2.0).item() == pytest.approx(
        2 * (0.2**2 / 2 + (0.45**2 + 0.05**2) / 2), rel=1e-6
    )
    assert activity.penalty([0.3, 0.3], 2.0).equal(activity.penalty(0.3, 2.0))


def test_an_annealed_target_pulls_a_layer_down():
    torch.manual_seed(0)
    model = Stack(EGRU(3, 16), EGRU(16, 16))
    opt = torch.optim.AdamW(model.parameters(), 0.02)
    targets = [anneal(0.5, 0.3, 0, 60), anneal(0.5, 0.05, 0, 60)]
    x = torch.randn(20, 8, 3)
    for step in range(120):
        opt.zero_grad()
        model(x)[2].penalty([target(step) for target in targets], 100.0).backward()
        opt.step()
    high, low = (r.mean().item() for r in model(x)[2].rates)
    assert low < 0.07 < high < 0.32


def test_the_l1_of_what_is_emitted_and_its_gradient():
    torch.manual_seed(0)
    model = Stack(EGRU(3, 5, 2, output="state"), EGRU(5, 4)).double()
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    total, seen, state = 0.0, [], (None, None)
    for x_t in x:
        _, first = model[0](x_t[None], state[0])
        _, second = model[1](model[0](x_t[None], state[0])[0], state[1])
        seen.append([*first.y, *second.y])
        state = first, second
    for layer in zip(*seen, strict=True):
        total += torch.stack(layer).abs().mean()
    activity = model(x)[2]
    assert activity.l1(3.0).item() == pytest.approx(3 * total.item(), abs=100 * MEAN_F64)
    activity.l1(1.0).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith("0.bias_ih"))
    assert model[0].bias_ih_l0.grad[10:].mean() > 0  # it pushes the candidate down
    assert Activity([]).l1(5.0).item() == 0


def test_the_l1_leaves_padding_out():
    torch.manual_seed(0)
    layer = EGRU(3, 5)
    samples = [torch.randn(n, 3) for n in (6, 2)]
    packed = torch_nn.utils.rnn.pack_sequence(samples)
    (mean,) = layer(packed, with_emitted=True)[2]
    ys = torch.cat([layer(s[:, None], with_emitted=False)[0][:, 0] for s in samples])
    torch.testing.assert_close(mean(), ys.abs().mean(0), rtol=1e-6, atol=1e-7)


def test_decoupled_decay_of_the_recurrent_matrices_alone_makes_units_speak_less():
    rates = {}
    for decay in (0.0, 10.0):
        torch.manual_seed(0)
        model = Stack(EGRU(3, 16, threshold=0.1), torch_nn.Linear(16, 2))
        groups = param_groups(model, 0.0, decay)
        assert [g["weight_decay"] for g in groups] == [0.0, decay, 0.0]
        assert [len(g["params"]) for g in groups] == [1, 2, 3]
        opt = torch.optim.AdamW(groups, 0.01)
        before, reader = model(torch.ones(9, 8, 3))[2].event_rate, model[1].weight.detach().clone()
        for _ in range(30):
            opt.zero_grad()
            (0 * model(torch.ones(9, 8, 3))[0]).sum().backward()
            opt.step()
        rates[decay] = model(torch.ones(9, 8, 3))[2].event_rate
        assert model[1].weight.equal(reader)
    assert rates[10.0] < rates[0.0] == before


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda a: a.penalty([0.1, 0.2], 1.0), "2 target rates are given, this network has 1 layers"),
        (lambda a: a.penalty([1.5], 1.0), "target_rate=.1.5"),
        (lambda a: a.l1(-1.0), "weight >= 0, got -1.0"),
        (lambda a: a.penalty(1.5, 1.0), "target_rate=1.5"),
        (lambda a: a.penalty(0.1, -1.0), "weight=-1.0"),
        (lambda a: a.penalty(0.1, 1.0, per="layer"), "'unit' or 'mean', got 'layer'"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Activity([torch.ones(2)]))


def half_the_batch() -> tuple[Stack, torch.Tensor]:
    torch.manual_seed(0)
    return Stack(EGRU(3, 5, 2)), torch.randn(6, 4, 3)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, x = half_the_batch()
    parallel = torch_nn.parallel.DistributedDataParallel(model)
    activity = parallel(x[:, 2 * rank : 2 * rank + 2])[2]
    activity.penalty(0.1, 100.0).backward()
    if rank == 0:
        with torch.no_grad():  # evaluation on one process alone must not wait for the other
            model(x)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    winners = KWTA(5, 2, duty_period=10)
    winners(x[:3, 2 * rank : 2 * rank + 2, :1] * torch.arange(5.0))
    with torch.no_grad():
        winners(torch.arange(5.0))  # here each process counts for itself
    kept = {"rates": [r.detach() for r in activity.rates], "grads": grads, "duty": winners.duty}
    torch.save(kept, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_act_as_one_batch(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model, x = half_the_batch()
    activity = model(x)[2]
    activity.penalty(0.1, 100.0).backward()
    winners = KWTA(5, 2, duty_period=10)
    winners(x[:3, :, :1] * torch.arange(5.0))
    winners(torch.arange(5.0))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["duty"], winners.duty, rtol=0, atol=DISTRIBUTED_F32)
        torch.testing.assert_close(got["rates"], [r.detach() for r in activity.rates], rtol=0, atol=DISTRIBUTED_F32)
        wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got["grads"].keys() == wanted.keys()
        for name, grad in wanted.items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(got["grads"][name], grad, rtol=0, atol=scale * 24 * DISTRIBUTED_F32)
