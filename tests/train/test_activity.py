"""Event rates and their penalty, in one process and averaged over two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn as torch_nn

from sparsefold.nn import EGRU, Activity, Stack
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


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
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
    torch.save({"rates": [r.detach() for r in activity.rates], "grads": grads}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_act_as_one_batch(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model, x = half_the_batch()
    activity = model(x)[2]
    activity.penalty(0.1, 100.0).backward()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["rates"], [r.detach() for r in activity.rates], rtol=0, atol=DISTRIBUTED_F32)
        wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got["grads"].keys() == wanted.keys()
        for name, grad in wanted.items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(got["grads"][name], grad, rtol=0, atol=scale * 24 * DISTRIBUTED_F32)
