"""From torch to a Program: one small rule per module type. The only bridge over the torch line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefold import program as ops
from sparsefold.formats import Float, Format
from sparsefold.lowering.choose import choose
from sparsefold.nn import EGRU, Stack
from sparsefold.program import Op, Program

Rule = Callable[[str, Any, int], list[Op]]  # (path, module, values that reach it or 0 where it is the first)


def compile_model(model: torch.nn.Module, metadata: Mapping[str, Any] | None = None) -> Program:
    """Turns a trained model into a :class:`sparsefold.Program`, choosing a storage format for each matrix by its zeros.

    Args:
        model: ``nn.Stack``, ``torch.nn.Sequential``, or a single module, made of Embedding, EGRU, ``torch.nn.GRU``, LSTM, RNN,
            Linear, ReLU, Dropout and Identity. Evaluation mode is compiled: dropout is gone, zoneout is its mean.
        metadata: JSON-like facts to keep in the file (where the model comes from, its vocabulary, ...).

    Raises:
        ValueError: a module that cannot be compiled, named by its path, with the list of those that can.
    """
    lowered: list[Op] = []
    for name, module in _flatten("", model):
        lowered += _rule(name, module)(name, module, lowered[-1].outputs if lowered else 0)
    if not lowered:
        raise ValueError("the model has no layer to compile. Pass the trained network, e.g. an nn.Stack.")
    try:
        return Program(tuple(lowered), dict(metadata or {}))
    except ValueError as error:
        raise ValueError(f"the model cannot be compiled: {error}") from error


def _flatten(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    if type(module) in (Stack, torch.nn.Sequential):
        children = module._modules.items()  # named_children() leaves out a module's second place
        return [
            leaf
            for key, child in children
            if child is not None
            for leaf in _flatten(f"{name}.{key}".lstrip("."), child)
        ]
    return [(name or "the model", module)]


def _embedding(name: str, module: Any, width: int) -> list[Op]:
    if module.max_norm is not None:
        raise ValueError(f"{name}: an Embedding with max_norm changes its rows when read; set max_norm=None.")
    return [ops.Embedding(_array(module.weight))]


def _linear(name: str, module: Any, width: int) -> list[Op]:
    return [ops.Linear(_matrix(module.weight), _bias(module.bias, module.out_features))]


def _refuse_bidirectional(name: str, module: Any) -> None:
    if module.bidirectional:
        raise ValueError(
            f"{name}: a bidirectional {type(module).__name__} needs the whole sequence and cannot be streamed."
        )


def _arrays(module: Any, k: int, gates: int) -> tuple[Format, Format, Float, Float]:
    """Weights and biases of layer ``k`` of anything that names them as ``torch.nn.RNNBase`` does."""
    biases = (getattr(module, f"bias_{which}_l{k}", None) for which in ("ih", "hh"))
    bias_ih, bias_hh = (_bias(b if module.bias else None, gates * module.hidden_size) for b in biases)
    weight_ih, weight_hh = (_matrix(getattr(module, f"weight_{which}_l{k}"), gates) for which in ("ih", "hh"))
    return weight_ih, weight_hh, bias_ih, bias_hh


def _gru(name: str, module: Any, width: int) -> list[Op]:
    _refuse_bidirectional(name, module)
    return [ops.GRU(*_arrays(module, k, 3)) for k in range(module.num_layers)]


def _lstm(name: str, module: Any, width: int) -> list[Op]:
    _refuse_bidirectional(name, module)
    if module.proj_size:
        raise ValueError(f"{name}: an LSTM with proj_size cannot be compiled. Train it with proj_size=0.")
    return [ops.LSTM(*_arrays(module, k, 4)) for k in range(module.num_layers)]


def _rnn(name: str, module: Any, width: int) -> list[Op]:
    _refuse_bidirectional(name, module)
    return [ops.RNN(*_arrays(module, k, 1), nonlinearity=module.nonlinearity) for k in range(module.num_layers)]


def _egru(name: str, module: Any, width: int) -> list[Op]:
    _refuse_bidirectional(name, module)
    return [
        ops.EGRU(
            *_arrays(module, k, 3),
            reset_after=module.reset_after,
            threshold=np.maximum(_array(getattr(module, f"threshold_l{k}")), 0),
            reset=module.reset,
            event=module.event,
            output=module.output if k == module.num_layers - 1 else "events",
            zoneout=float(module.zoneout),
        )
        for k in range(module.num_layers)
    ]


def _relu(name: str, module: Any, width: int) -> list[Op]:
    if not width:
        raise ValueError(f"{name}: a ReLU cannot be the first layer. Apply it to the input before it is played.")
    return [ops.ReLU(width)]


def _nothing(name: str, module: Any, width: int) -> list[Op]:
    return []


_RULES: dict[type[torch.nn.Module], Rule] = {
    torch.nn.Embedding: _embedding,
    torch.nn.Linear: _linear,
    torch.nn.GRU: _gru,
    torch.nn.LSTM: _lstm,
    torch.nn.RNN: _rnn,
    EGRU: _egru,
    torch.nn.ReLU: _relu,
    torch.nn.Dropout: _nothing,
    torch.nn.Identity: _nothing,
}


def _rule(name: str, module: torch.nn.Module) -> Rule:
    rule = _RULES.get(type(module))
    if rule is None:
        supported: list[type[torch.nn.Module]] = [Stack, torch.nn.Sequential, *_RULES]
        names = ", ".join(t.__name__ for t in supported)
        raise ValueError(f"{name} is a {type(module).__name__}, which cannot be compiled. Supported: {names}.")
    return rule


def _array(tensor: Tensor) -> Float:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _bias(bias: Tensor | None, size: int) -> Float:
    return np.zeros(size, np.float32) if bias is None else _array(bias)


def _matrix(weight: Tensor, gates: int = 1) -> Format:
    return choose(_array(weight), gates)


__all__ = ["choose", "compile_model"]
