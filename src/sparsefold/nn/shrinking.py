"""A smaller network without the units that never speak."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from .activity import Activity
from .adaptive import AdaptiveDecoder
from .modules import EGRU, Stack

_PASSES_ZEROS = (nn.Dropout, nn.Identity, nn.ReLU)  # a silent unit is silent behind them too


def shrink(model: Stack, *activities: Activity) -> Stack:
    """A copy of `model` without those units of its EGRU layers that spoke in none of the `activities`.

    Nobody reads a unit that never speaks, so on what was played to get the activities the copy gives the same outputs; on other
    inputs a unit that is gone might have spoken. Play enough of the data, in evaluation:

        with torch.no_grad():
            smaller = nn.shrink(model, *(model(x)[2] for x in batches))

    Layers and directions of one EGRU have one size: of each as many silent units go as the one with the fewest has, and one unit
    always stays. The rows of its gates, its biases and threshold go, and the columns that read it: in the layer's recurrent
    matrix, in its next layer, and in the Linear, AdaptiveDecoder, EGRU, GRU, LSTM or RNN that follows in the Stack. An EGRU that
    nothing follows keeps its units: they are the outputs.

    Raises:
        ValueError: no activity, or one of another model; an EGRU with output="state", whose silent units are read all the same;
            a follower whose columns cannot be found.
    """
    if not activities:
        raise ValueError("shrink needs the activity of at least one forward. Pass what model(x) returned last.")
    smaller, modules = copy.deepcopy(model), list(model.named_children())
    rates, sizes = [a.rates for a in activities], [a for m in model if isinstance(m, EGRU) for a in _sizes(m)]
    if any([len(r) for r in each] != sizes for each in rates):
        raise ValueError(
            f"an activity has units {[len(r) for r in rates[0]]} by layer and direction, this Stack {sizes}. "
            "Pass what this model returned."
        )
    most = [torch.stack([r.detach() for r in each]).amax(0) for each in zip(*rates, strict=True)]
    for i, (name, layer) in enumerate(modules):
        if not isinstance(layer, EGRU):
            continue
        mine, most = most[: len(_sizes(layer))], most[len(_sizes(layer)) :]
        if layer.output == "state":
            raise ValueError(
                f"module {name}: with output='state' the reader sees the state of every unit, so one that never speaks is read "
                "all the same and cannot go. Train with output='events', or leave the units."
            )
        drop = min(min(int((rate == 0).sum()) for rate in mine), layer.hidden_size - 1)
        if drop == 0:
            continue
        reader = next((j for j in range(i + 1, len(modules)) if not isinstance(modules[j][1], _PASSES_ZEROS)), None)
        if reader is None:  # its units are the outputs
            continue
        kept = [_all_but(rate, drop) for rate in mine]
        _keep_units(cast(EGRU, smaller[i]), kept)
        directions = 2 if layer.bidirectional else 1
        last = kept[-directions:]
        columns = torch.cat([k + d * layer.hidden_size for d, k in enumerate(last)])
        _keep_inputs(modules[reader][0], smaller[reader], columns)
    return smaller


def _sizes(layer: EGRU) -> list[int]:
    return [layer.hidden_size] * (layer.num_layers * (2 if layer.bidirectional else 1))


def _all_but(rate: Tensor, drop: int) -> Tensor:
    """Units that stay, in order: all but the first `drop` silent ones."""
    gone = (rate == 0).nonzero().flatten()[:drop]
    stays = torch.ones(len(rate), dtype=torch.bool, device=rate.device)
    stays[gone] = False
    return stays.nonzero().flatten()


def _keep_units(layer: EGRU, kept: list[Tensor]) -> None:
    """Leave the units `kept` of each layer and direction."""
    units, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    for n, keep in enumerate(kept):
        suffix = f"_l{n // directions}{'_reverse' if n % directions else ''}"
        rows = torch.cat([keep + gate * units for gate in range(3)])
        _cut(layer, "weight_ih" + suffix, rows)
        _cut(layer, "weight_hh" + suffix, rows, keep)
        if n >= directions:
            below = kept[n // directions * directions - directions :][:directions]
            columns = torch.cat([k + d * units for d, k in enumerate(below)])
            _cut(layer, "weight_ih" + suffix, None, columns)
        for name in ("bias_ih", "bias_hh") if layer.bias else ():
            _cut(layer, name + suffix, rows)
        _cut(layer, "threshold" + suffix, keep)
    layer.hidden_size = len(kept[0])


def _keep_inputs(name: str, reader: nn.Module, columns: Tensor) -> None:
    """Leave these inputs of what reads the layer."""
    if isinstance(reader, nn.Linear):
        _cut(reader, "weight", None, columns)
        reader.in_features = len(columns)
    elif isinstance(reader, AdaptiveDecoder):
        _keep_inputs(name, reader.head, columns)
        for tail in reader.tails:
            _keep_inputs(name, tail.get_submodule("0"), columns)
        reader.in_features = len(columns)
    elif isinstance(reader, EGRU | nn.RNNBase):
        for suffix in ("_l0", "_l0_reverse") if reader.bidirectional else ("_l0",):
            _cut(reader, "weight_ih" + suffix, None, columns)
        reader.input_size = len(columns)
        if isinstance(reader, nn.RNNBase):
            reader._init_flat_weights()
    else:
        raise ValueError(
            f"module {name} ({type(reader).__name__}) reads the units that would go, and its part for each is not known. "
            "A Linear, AdaptiveDecoder, EGRU, GRU, LSTM or RNN may follow, behind Dropout, Identity or ReLU."
        )


def _cut(module: nn.Module, name: str, rows: Tensor | None, columns: Tensor | None = None) -> None:
    p = module.get_parameter(name)
    with torch.no_grad():
        value = p if rows is None else p[rows]
        value = value if columns is None else value[:, columns]
    setattr(module, name, nn.Parameter(value.clone(), p.requires_grad))
