"""From torch to a Program: one small rule per module type. The only bridge over the torch line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsefold import program as ops
from sparsefold.calibrate import Site, delta_sites, with_deltas
from sparsefold.formats import Dense, Float, Format, Precision
from sparsefold.lowering.choose import choose, choose_all
from sparsefold.nn import EGRU, GRU, KWTA, LSTM, RNN, AdaptiveDecoder, CausalConv1d, Stack
from sparsefold.program import Op, Program


@dataclass(frozen=True, eq=False)
class _Affine:
    """``y = scale * x + shift`` of the module ``name``, in float64, until a neighbour takes it."""

    name: str
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    @property
    def outputs(self) -> int:
        """Values given."""
        return self.scale.size

    def check(self, size: int) -> None:
        """Refuses a neighbour of another size."""
        if size != self.scale.size:
            raise ValueError(f"{self.name} normalises {self.scale.size} values, but the layer beside it has {size}.")


Delta = float | tuple[float | None, float | None] | None  # thresholds of a layer's inputs and units

# (path, module, values that reach it or 0 where it is the first)
Rule = Callable[[str, Any, int], Sequence[Op | _Affine]]


def compile_model(
    model: torch.nn.Module,
    metadata: Mapping[str, Any] | None = None,
    weights: Precision = "f32",
    head: Literal["log_softmax", "argmax"] | int | None = None,
    sample: Any = None,
    tune: bool = False,
    delta: Delta | Sequence[Delta] = None,
) -> Program:
    """Turns a trained model into a :class:`sparsefold.Program`, choosing a storage format for each matrix by its zeros.

    Args:
        model: ``nn.Stack``, ``torch.nn.Sequential``, or a single module, made of Embedding, EGRU, GRU, LSTM, RNN (also
            torch's), CausalConv1d, Linear, ReLU, KWTA, LayerNorm, LogSoftmax, AdaptiveDecoder, BatchNorm1d (folded into one
            beside it), Dropout and Identity. ``torch.nn.Conv1d``, whose time is the last axis, only among itself, ReLU,
            BatchNorm1d, Dropout and Identity: its outputs are those of the causal convolution from the step on at which all of
            its taps have an input. Evaluation mode is compiled: dropout is gone, zoneout is its mean.
        metadata: JSON-like facts to keep in the file (where the model comes from, its vocabulary, ...).
        weights: "f32"; "bf16" or "i8" round the weight matrices, int8 with one scale a row. Inputs and sums stay float32;
            "w8a8" rounds dense inputs of a product to int8 too, with one scale a step, and sums are exact integers.
        head: what is made of the outputs of every step: "log_softmax"; a number k for the indices of the k largest values and
            then these values, largest first; "argmax" for k = 1; None for nothing.
        sample: inputs as the model will meet them, (T,) or (B, T) token ids or (T, I) or (B, T, I) values; they are played
            once to count how many units speak, on which the choice of formats depends. None: 10 % is assumed.
        tune: choose formats by timing every candidate on this processor, instead of by prices measured once. Either way
            ``metadata["choices"]`` and ``sparsefold inspect`` say what was chosen and why.
        delta: thresholds above which a GRU, LSTM or RNN sends the changes of its inputs and of its units, while the products read
            no other column: one number for both, a pair (inputs, units) in which None reads all, or a list of these, one for
            each such layer. Inputs that are rows of an Embedding, or events, are read as they are. Which thresholds a trained
            model bears, :func:`sparsefold.calibrate_delta` finds.

    Raises:
        ValueError: a module that cannot be compiled, named by its path, with the list of those that can.
    """
    lowered: list[Op | _Affine] = []
    leaves = _flatten("", model)
    _check_axes(model, leaves)
    for name, module in leaves:
        lowered += _rule(name, module)(name, module, _width(lowered))
    folded = _fold(lowered)
    if not folded:
        raise ValueError("the model has no layer to compile. Pass the trained network, e.g. an nn.Stack.")
    try:
        folded += _head(head, _width(folded))
        program = _send_changes(Program(tuple(folded), dict(metadata or {})), delta)
        program = choose_all(program, sample, tune, weights)
        return program.rounded(weights)
    except ValueError as error:
        raise ValueError(f"the model cannot be compiled: {error}") from error


def _send_changes(program: Program, delta: Any) -> Program:
    if delta is None:
        return program
    sites = delta_sites(program)
    layers = sorted({i for i, _ in sites})
    each = delta if isinstance(delta, list) else [delta] * len(layers)
    if not layers or len(each) != len(layers):
        raise ValueError(
            f"delta is for {len(each)} layers, the model has {len(layers)} of GRU, LSTM or RNN. Name one each."
        )
    thresholds: dict[Site, float | None] = {}
    for i, found in zip(layers, each, strict=True):
        pair = found if isinstance(found, tuple) else (found, found)
        numbers = [t for t in pair if t is not None]
        if len(pair) != 2 or not all(isinstance(t, int | float) and not isinstance(t, bool) for t in numbers):
            raise ValueError(
                f"delta is a threshold, a pair (inputs, units), or a list of these; got {found!r} for a layer."
            )
        wanted: dict[Site, float | None] = {(i, "input"): pair[0], (i, "hidden"): pair[1]}
        thresholds |= {site: t for site, t in wanted.items() if site in sites}
    return with_deltas(program, thresholds)


def _width(lowered: Sequence[Op | _Affine]) -> int:
    """Values that the last of them hands on, 0 where there is none."""
    if not lowered:
        return 0
    last = lowered[-1]
    return last.outputs * (1 if isinstance(last, _Affine) else 1 + ops.reads_backwards(last))


def _head(head: Any, width: int) -> list[Op]:
    if head is None:
        return []
    if head == "log_softmax":
        return [ops.LogSoftmax(width)]
    if head != "argmax" and type(head) is not int:
        raise ValueError(f"head is 'log_softmax', 'argmax', a number of largest values, or None; got {head!r}.")
    return [ops.TopK(width, 1 if head == "argmax" else head)]


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


def _check_axes(model: torch.nn.Module, leaves: list[tuple[str, torch.nn.Module]]) -> None:
    """A torch.nn.Conv1d takes time from the last axis: refused where that is the axis of features to others."""
    convolution = next((name for name, m in leaves if type(m) is torch.nn.Conv1d), None)
    other = next((f"{name} ({type(m).__name__})" for name, m in leaves if not isinstance(m, _LAST_AXIS_IS_TIME)), None)
    if other is None and any(isinstance(m, Stack) for m in model.modules()):
        other = "a Stack"
    if convolution is not None and other is not None:
        raise ValueError(
            f"{convolution}: a torch.nn.Conv1d convolves the last axis, in which {other} sees features. "
            "Use sparsefold.nn.CausalConv1d, which convolves over time in (time, batch, feature)."
        )


def _embedding(name: str, module: Any, width: int) -> list[Op]:
    if module.max_norm is not None:
        raise ValueError(f"{name}: an Embedding with max_norm changes its rows when read; set max_norm=None.")
    return [ops.Embedding(_array(module.weight))]


def _linear(name: str, module: Any, width: int) -> list[Op]:
    return [ops.Linear(_matrix(module.weight), _bias(module.bias, module.out_features))]


def _causal_conv1d(name: str, module: Any, width: int) -> list[Op]:
    """Torch's (O, I / groups, kernel) as (O, kernel I), zero between groups."""
    (kernel,), (dilation,), groups = module.kernel_size, module.dilation, module.groups
    weight = _array(module.weight)
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    wide = np.zeros((groups, outputs, kernel, groups, inputs), np.float32)
    for g in range(groups):
        wide[g, :, :, g] = weight[g * outputs : (g + 1) * outputs].transpose(0, 2, 1)
    matrix, bias = Dense.from_dense(wide.reshape(groups * outputs, -1)), _bias(module.bias, groups * outputs)
    if kernel == groups == 1:
        return [ops.Linear(matrix, bias)]
    return [ops.Conv1d(matrix, bias, kernel, dilation, groups)]


def _conv1d(name: str, module: Any, width: int) -> list[Op]:
    (kernel,), (dilation,), (stride,) = module.kernel_size, module.dilation, module.stride
    if stride != 1:
        raise ValueError(f"{name}: a Conv1d of stride {stride} gives no output at some steps. A stream needs stride=1.")
    causal = (kernel - 1) * dilation
    if module.padding not in ((0,), (causal,), "valid") or module.padding_mode != "zeros":
        raise ValueError(
            f"{name}: a Conv1d with padding={module.padding!r} of {module.padding_mode} sees what is to come or what never "
            f"was. Use padding=0, padding={causal} of zeros (the first outputs are the stream's), or sparsefold.nn.CausalConv1d."
        )
    return _causal_conv1d(name, module, width)


def _layers(module: Any) -> list[tuple[str, bool]]:
    """(suffix of its parameters, whether it reads backwards) of every layer and direction, as they are played."""
    ways = (False, True) if module.bidirectional else (False,)
    return [(f"l{k}{'_reverse' * reverse}", reverse) for k in range(module.num_layers) for reverse in ways]


def _arrays(module: Any, layer: str, gates: int) -> tuple[Format, Format, Float, Float]:
    """Weights and biases of a layer of anything that names them as ``torch.nn.RNNBase`` does."""
    biases = (getattr(module, f"bias_{which}_{layer}", None) for which in ("ih", "hh"))
    bias_ih, bias_hh = (_bias(b if module.bias else None, gates * module.hidden_size) for b in biases)
    weight_ih, weight_hh = (_matrix(getattr(module, f"weight_{which}_{layer}"), gates) for which in ("ih", "hh"))
    return weight_ih, weight_hh, bias_ih, bias_hh


def _gru(name: str, module: Any, width: int) -> list[Op]:
    zoneout = getattr(module, "zoneout", 0.0)
    if zoneout:  # an EGRU whose units always speak is a GRU, and has a zoneout
        silent = np.zeros(module.hidden_size, np.float32)
        return [
            ops.EGRU(
                *_arrays(module, layer, 3),
                threshold=silent,
                reset="none",
                event="always",
                output="state",
                zoneout=float(zoneout),
                reverse=reverse,
            )
            for layer, reverse in _layers(module)
        ]
    return [ops.GRU(*_arrays(module, layer, 3), reverse=reverse) for layer, reverse in _layers(module)]


def _no_zoneout(name: str, module: Any) -> None:
    if any(getattr(module, option, 0.0) for option in ("zoneout", "zoneout_cell")):
        raise ValueError(
            f"{name}: {type(module).__name__} keeps a part of its state by zoneout, which the engine has for GRU and EGRU alone. "
            "Set zoneout to 0, or train a GRU."
        )


def _lstm(name: str, module: Any, width: int) -> list[Op]:
    if module.proj_size:
        raise ValueError(f"{name}: an LSTM with proj_size cannot be compiled. Train it with proj_size=0.")
    _no_zoneout(name, module)
    return [ops.LSTM(*_arrays(module, layer, 4), reverse=reverse) for layer, reverse in _layers(module)]


def _rnn(name: str, module: Any, width: int) -> list[Op]:
    _no_zoneout(name, module)
    kind = module.nonlinearity
    return [ops.RNN(*_arrays(module, layer, 1), kind, reverse=reverse) for layer, reverse in _layers(module)]


def _egru(name: str, module: Any, width: int) -> list[Op]:
    last = f"l{module.num_layers - 1}"
    return [
        ops.EGRU(
            *_arrays(module, layer, 3),
            reset_after=module.reset_after,
            threshold=np.maximum(_array(getattr(module, f"threshold_{layer}")), 0),
            reset=module.reset,
            event=module.event,
            output=module.output if layer.removesuffix("_reverse") == last else "events",
            zoneout=float(module.zoneout),
            reverse=reverse,
        )
        for layer, reverse in _layers(module)
    ]


def _relu(name: str, module: Any, width: int) -> list[Op]:
    if not width:
        raise ValueError(f"{name}: a ReLU cannot be the first layer. Apply it to the input before it is played.")
    return [ops.ReLU(width)]


def _kwta(name: str, module: Any, width: int) -> list[Op]:
    return [ops.KWTA(module.units, module.k_eval, module.groups)]


def _log_softmax(name: str, module: Any, width: int) -> list[Op]:
    if module.dim != -1:
        raise ValueError(f"{name}: a LogSoftmax over axis {module.dim} cannot be compiled, only one over the last, -1.")
    return [ops.LogSoftmax(width)]


def _adaptive_decoder(name: str, module: Any, width: int) -> list[Op]:
    first, heads = module.head.out_features - len(module.tails), module.head.out_features
    lowered: list[Op] = [
        ops.Linear(_matrix(module.head.weight), _bias(module.head.bias, heads)),
        ops.LogSoftmax(heads),
    ]
    at = first
    for projection, wide in module.tails:
        matrices = _matrix(projection.weight), _matrix(wide.weight)
        lowered.append(ops.Cluster(*matrices, _bias(wide.bias, wide.out_features), _width(lowered), at))
        at += wide.out_features  # where the next cluster is by now
    return lowered


def _layer_norm(name: str, module: Any, width: int) -> list[Op]:
    if len(module.normalized_shape) != 1:
        axes = len(module.normalized_shape)
        raise ValueError(f"{name}: a LayerNorm over {axes} axes cannot be compiled, only one over the last.")
    units = module.normalized_shape[0]
    weight = np.ones(units, np.float32) if module.weight is None else _array(module.weight)
    return [ops.LayerNorm(weight, _bias(module.bias, units), module.eps)]


def _batch_norm(name: str, module: Any, width: int) -> list[_Affine]:
    if module.running_mean is None:
        raise ValueError(f"{name}: a BatchNorm1d without running statistics cannot be played one step at a time.")
    weight, bias = (_array(module.weight), _array(module.bias)) if module.affine else (1.0, 0.0)
    scale = weight / np.sqrt(_array(module.running_var).astype(np.float64) + module.eps)
    return [_Affine(name, scale, bias - scale * _array(module.running_mean))]


def _fold(lowered: Sequence[Op | _Affine]) -> list[Op]:
    """Every _Affine multiplied into the op before it, or else into the one after it."""
    out: list[Op] = []
    waiting: _Affine | None = None
    taken: _Affine | None = None  # by the op before this one
    for op in (*lowered, None):
        if taken is not None and isinstance(op, ops.Recurrent) and op.reverse:  # reads the same
            op, taken = _scaled_inputs(op, taken), None
        if taken is not None and isinstance(op, ops.Cluster):  # so does each of these
            op = _scaled_projection(op, taken)
        if waiting is not None:
            if not isinstance(op, ops.Linear | ops.Recurrent):
                raise ValueError(
                    f"{waiting.name}: a BatchNorm1d is folded into a Linear, Embedding or convolution before it, or into a "
                    "Linear or recurrent layer after it; here is none. Put it beside one."
                )
            out.append(_scaled_inputs(op, waiting))
            waiting, taken = None, waiting
        elif isinstance(op, _Affine):
            if out and isinstance(out[-1], ops.Linear | ops.Embedding | ops.Conv1d):
                out[-1] = _scaled_outputs(out[-1], op)
            else:
                waiting = op
        elif op is not None:
            out.append(op)
            taken = taken if isinstance(op, ops.LogSoftmax | ops.Cluster) else None
    return out


def _scaled_outputs(op: ops.Linear | ops.Embedding | ops.Conv1d, affine: _Affine) -> Op:
    affine.check(op.outputs)
    if isinstance(op, ops.Embedding):
        return ops.Embedding(_rounded(op.weight * affine.scale + affine.shift))
    weight = Dense(_rounded(op.weight.to_dense() * affine.scale[:, None]))
    return replace(op, weight=weight, bias=_rounded(op.bias * affine.scale + affine.shift))


def _scaled_inputs(op: ops.Linear | ops.Recurrent, affine: _Affine) -> Op:
    affine.check(op.inputs)
    old, bias = (op.weight, op.bias) if isinstance(op, ops.Linear) else (op.weight_ih, op.bias_ih)
    weight = Dense(_rounded(old.to_dense() * affine.scale), old.gates)
    bias = _rounded(bias + old.to_dense() @ affine.shift)
    if isinstance(op, ops.Linear):
        return ops.Linear(weight, bias)
    return replace(op, weight_ih=weight, bias_ih=bias)


def _scaled_projection(op: ops.Cluster, affine: _Affine) -> Op:
    affine.check(op.projection.shape[1])
    old = op.projection.to_dense()
    bias = op.bias + op.weight.to_dense().astype(np.float64) @ (old @ affine.shift)
    return replace(op, projection=Dense(_rounded(old * affine.scale)), bias=_rounded(bias))


def _rounded(values: NDArray[np.float64]) -> Float:
    return np.ascontiguousarray(values, np.float32)


def _nothing(name: str, module: Any, width: int) -> list[Op]:
    return []


_RULES: dict[type[torch.nn.Module], Rule] = {
    torch.nn.Embedding: _embedding,
    torch.nn.Linear: _linear,
    CausalConv1d: _causal_conv1d,
    torch.nn.Conv1d: _conv1d,
    torch.nn.GRU: _gru,
    torch.nn.LSTM: _lstm,
    torch.nn.RNN: _rnn,
    GRU: _gru,
    LSTM: _lstm,
    RNN: _rnn,
    EGRU: _egru,
    torch.nn.ReLU: _relu,
    KWTA: _kwta,
    torch.nn.LayerNorm: _layer_norm,
    torch.nn.LogSoftmax: _log_softmax,
    AdaptiveDecoder: _adaptive_decoder,
    torch.nn.BatchNorm1d: _batch_norm,
    torch.nn.Dropout: _nothing,
    torch.nn.Identity: _nothing,
}


_LAST_AXIS_IS_TIME = (torch.nn.Conv1d, torch.nn.BatchNorm1d, torch.nn.ReLU, torch.nn.Dropout, torch.nn.Identity)


def _rule(name: str, module: torch.nn.Module) -> Rule:
    rule = _RULES.get(type(module))
    if rule is None:
        supported: list[type[torch.nn.Module]] = [Stack, torch.nn.Sequential, *_RULES]
        names = ", ".join(dict.fromkeys(t.__name__ for t in supported))
        raise ValueError(f"{name} is a {type(module).__name__}, which cannot be compiled. Supported: {names}.")
    return rule


def _array(tensor: Tensor) -> Float:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _bias(bias: Tensor | None, size: int) -> Float:
    return np.zeros(size, np.float32) if bias is None else _array(bias)


def _matrix(weight: Tensor, gates: int = 1) -> Format:
    return Dense.from_dense(_array(weight), gates)  # until all of the program is known


__all__ = ["choose", "compile_model"]
