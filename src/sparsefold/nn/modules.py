"""The modules of training: EGRU with the signature of torch.nn.GRU, its cell, and a stack that carries state."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import gpu, native, reference
from .activity import Activity
from .events import Triangle
from .kept import dropped
from .reference import EGRUTrace, Reset, Tape, carried

Output = Literal["events", "state"]
Backend = Literal["auto", "native", "triton", "reference"]
_FEW_STEPS = 4


class EGRUState(NamedTuple):
    """What an EGRU carries from window to window: emitted y and private h, each (layers · directions, B, H)."""

    y: Tensor
    h: Tensor

    def detach(self) -> EGRUState:
        """The same values, cut from the graph: truncated backpropagation through time."""
        return EGRUState(self.y.detach(), self.h.detach())

    def to(self, *args: Any, **kwargs: Any) -> EGRUState:
        """Both tensors through Tensor.to."""
        return EGRUState(self.y.to(*args, **kwargs), self.h.to(*args, **kwargs))


class _EventRecurrent(nn.Module):
    """What EGRU and EGRUCell share: options, parameters of one layer and direction, and running them."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        threshold: float = 0.05,
        learn_threshold: bool = False,
        reset: Reset = "threshold",
        reset_after: bool = True,
        surrogate: Triangle = Triangle(),  # noqa: B008 - frozen
        output: Output = "events",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        event: Literal["threshold", "always"] = "threshold",
        backend: Backend = "auto",
        tape: Tape = "full",
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise ValueError(f"{name} is at least 1, got {size}.")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"a threshold is finite and >= 0, got {threshold}.")
        _one_of("reset", reset, get_args(Reset))
        _one_of("output", output, get_args(Output))
        _one_of("event", event, ("threshold", "always"))
        _one_of("backend", backend, get_args(Backend))
        _one_of("tape", tape, get_args(Tape))
        _probability("zoneout", zoneout)
        _probability("recurrent_dropout", recurrent_dropout)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.initial_threshold = threshold  # the thresholds themselves are parameters
        self.learn_threshold = learn_threshold
        self.reset: Reset = reset
        self.reset_after = reset_after
        self.surrogate = surrogate
        self.output: Output = output
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.event: Literal["threshold", "always"] = event
        self.backend: Backend = backend
        self.tape: Tape = tape

    def _add_parameters(self, suffix: str, input_size: int) -> None:
        H = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (3 * H, input_size), "weight_hh": (3 * H, H)}
        if self.bias:
            shapes |= {"bias_ih": (3 * H,), "bias_hh": (3 * H,)}
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape)))
        theta = nn.Parameter(torch.empty(H), requires_grad=self.learn_threshold)
        self.register_parameter("threshold" + suffix, theta)

    def reset_parameters(self) -> None:
        """W ~ N(0, 1/I), U ~ N(0, 1/H), biases 0 but b_iz = +1: z keeps, so the state is kept at the start."""
        H = self.hidden_size
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.startswith("weight"):
                    p.normal_(std=p.shape[1] ** -0.5)
                elif name.startswith("threshold"):
                    p.fill_(self.initial_threshold)
                else:
                    p.zero_()
                    if name.startswith("bias_ih"):
                        p[H : 2 * H] = 1

    def _run(self, suffix: str, x: Tensor, y: Tensor, h: Tensor) -> EGRUTrace:
        """One layer in one direction over x (T, B, I)."""
        # The kernels turn a weight over once a sequence, which a few steps do not earn back.
        auto = self.backend == "auto"
        cells: Any = reference
        if self.backend == "native" or (auto and native.available(x) and len(x) >= _FEW_STEPS):
            cells = native
        elif self.backend == "triton" or (auto and x.is_cuda and gpu.available(x)):
            cells = gpu
        weight_hh = getattr(self, "weight_hh" + suffix)
        if self.training and self.recurrent_dropout:
            weight_hh = dropped(weight_hh, self.recurrent_dropout)
        # The GPU's kernels make their products in what autocast asks for, and carry the state in float32 all the same.
        with nullcontext() if cells is gpu else torch.autocast(x.device.type, enabled=False):
            return cells.egru(  # type: ignore[no-any-return]
                x,
                y,
                h,
                getattr(self, "weight_ih" + suffix),
                weight_hh,
                getattr(self, "bias_ih" + suffix) if self.bias else None,
                getattr(self, "bias_hh" + suffix) if self.bias else None,
                getattr(self, "threshold" + suffix),
                reset=self.reset,
                reset_after=self.reset_after,
                surrogate=self.surrogate,
                event=self.event,
                zoneout=self.zoneout,
                training=self.training,
                tape=self.tape,
            )

    def _check(self, x: Tensor, state: EGRUState | None, lead: tuple[int, ...]) -> tuple[Tensor, EGRUState]:
        """Input (…, B, I) and state (*lead, B, H) if they fit, zeros for None; under autocast in the layer's dtype."""
        who, dtype = type(self).__name__, next(self.parameters()).dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input has {x.shape[-1]} features, this {who} reads {self.input_size}.")
        if x.dtype != dtype:
            raise ValueError(f"input is {x.dtype}, this {who} is {dtype}. Convert one of them with .to(dtype).")
        shape = (*lead, x.shape[-2], self.hidden_size)
        if state is None:
            zero = x.new_zeros(shape)
            return x, EGRUState(zero, zero)
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(
                f"state is an EGRUState(y, h), got {type(state).__name__}. Pass what {who} returned, or None."
            )
        for part in state:
            if part.dim() != len(shape):
                raise ValueError(f"state tensors have shape {shape}, got {tuple(part.shape)}.")
            words = (f"units, this {who} has", "samples, the input has", f"layers and directions, this {who} has")
            for word, got, wanted in zip(words, reversed(part.shape), reversed(shape), strict=False):
                if got != wanted:
                    raise ValueError(
                        f"hidden state has {got} {word} {wanted}. Pass the state this layer returned, or None."
                    )
            if part.dtype != dtype:
                raise ValueError(
                    f"hidden state is {part.dtype}, this {who} is {dtype}. Convert it with state.to(dtype)."
                )
        return x, EGRUState(*state)

    def extra_repr(self) -> str:
        """Sizes, and every option that differs from its default."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        known = {p.name: p for c in (type(self), _EventRecurrent) for p in inspect.signature(c).parameters.values()}
        for name, parameter in known.items():
            value = getattr(self, "initial_threshold" if name == "threshold" else name, parameter.default)
            if parameter.default is not parameter.empty and (value != parameter.default or name == "threshold"):
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


class EGRU(_EventRecurrent):
    """Event-based GRU layers: torch.nn.GRU's signature and parameter names, with units that speak only in events.

    The cell's equations are those of `sparsefold.nn.reference.egru`. Other units, the next layer and, with
    output="events", the reader see y = o ⊙ u, which is zero unless u crosses the threshold; output="state" hands the
    dense u of the last layer to the reader (a small readout learns better from it). Between layers it is always y.

    Parameters, per layer k (and `_reverse` of it): `weight_ih_l{k}` (3H, I), `weight_hh_l{k}` (3H, H), `bias_ih_l{k}`,
    `bias_hh_l{k}` (3H,), gates r, z, n, and the raw `threshold_l{k}` (H,), used as max(θ, 0) and frozen unless
    `learn_threshold`. `dropout` acts between layers, `recurrent_dropout` drops recurrent weights (one mask per
    forward), `zoneout` keeps a unit's state; all three in training only, zoneout by its mean in evaluation.

    `backend` "auto" trains with the library's own kernels where they can: `sparsefold.nn.native` for float32 and float64 on the
    processor, sequences of four steps or more; `sparsefold.nn.gpu` ("triton") on a GPU; else, and with "reference", the plain
    loop of torch operations runs.

    `tape` "full" keeps 20 bytes for each step, unit and sample in float32 beside input and output until the backward has run,
    "recompute" 4, with the forward's work done twice and the same gradients; both are for the kernels alone.

    Errors: ValueError for an option, input or state that does not fit.

    Source: Subramoney et al. (2023), arXiv 2206.06178.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        threshold: float = 0.05,
        learn_threshold: bool = False,
        reset: Reset = "threshold",
        reset_after: bool = True,
        surrogate: Triangle = Triangle(),  # noqa: B008 - frozen
        output: Output = "events",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        event: Literal["threshold", "always"] = "threshold",
        backend: Backend = "auto",
        tape: Tape = "full",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            threshold=threshold,
            learn_threshold=learn_threshold,
            reset=reset,
            reset_after=reset_after,
            surrogate=surrogate,
            output=output,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            event=event,
            backend=backend,
            tape=tape,
        )
        if num_layers < 1:
            raise ValueError(f"num_layers is at least 1, got {num_layers}.")
        _probability("dropout", dropout)
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers, and this EGRU has one: it does nothing.", stacklevel=2)
        self.num_layers, self.batch_first = num_layers, batch_first
        self.dropout, self.bidirectional = dropout, bidirectional
        directions = ("", "_reverse") if bidirectional else ("",)
        self._suffixes = [[f"_l{k}{d}" for d in directions] for k in range(num_layers)]
        for k, suffixes in enumerate(self._suffixes):
            for suffix in suffixes:
                self._add_parameters(suffix, input_size if k == 0 else hidden_size * len(directions))
        self.reset_parameters()

    @classmethod
    def from_gru(cls, gru: nn.GRU, **options: Any) -> Self:
        """An EGRU with the weights, sizes, dtype and device of a torch.nn.GRU; `options` are EGRU's keywords."""
        if not isinstance(gru, nn.GRU):
            raise ValueError(f"from_gru starts from a torch.nn.GRU, got {type(gru).__name__}.")
        layer = cls(
            gru.input_size,
            gru.hidden_size,
            gru.num_layers,
            gru.bias,
            gru.batch_first,
            gru.dropout,
            gru.bidirectional,
            **options,
        )
        layer.to(next(gru.parameters()))
        layer.load_state_dict(gru.state_dict(), strict=False)
        return layer.train(gru.training)

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: EGRUState | None = None,
        *,
        with_activity: bool = False,
        with_emitted: bool = False,
    ) -> tuple[Any, ...]:
        """Input (T, B, I), (B, T, I) with batch_first, or packed -> output (…, directions · H) likewise, EGRUState.

        The state is each sample's at its own last step, (layers · directions, B, H). `with_activity` adds a list of
        rates, (H,) per layer and direction: the mean of o over time and batch (padding left out) with the surrogate's
        gradient. `with_emitted` adds, per layer and direction, a function that computes the like mean of |y|.
        """
        lead = (sum(map(len, self._suffixes)),)
        if isinstance(x, PackedSequence):
            # Kept in the packed (longest first) order throughout, so that the output lines up with other packed data.
            seq, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
            seq, start = self._check(seq, state, lead)
            start, lengths = _permuted(start, x.sorted_indices), lengths.to(seq.device)
            seq, end, rates, emitted = self._layers(seq, start, lengths, with_activity)
            end = _permuted(end, x.unsorted_indices)
            data = pack_padded_sequence(seq, lengths).data
            output: Any = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        else:
            if x.dim() != 3:
                raise ValueError(f"input has 3 axes (time, batch, feature), got shape {tuple(x.shape)}.")
            seq, start = self._check(x.transpose(0, 1) if self.batch_first else x, state, lead)
            seq, end, rates, emitted = self._layers(seq, start, None, with_activity)
            output = seq.transpose(0, 1) if self.batch_first else seq
        return output, end, *([rates] if with_activity else []), *([emitted] if with_emitted else [])

    def _layers(
        self, seq: Tensor, start: EGRUState, lengths: Tensor | None, with_rates: bool
    ) -> tuple[Tensor, EGRUState, list[Tensor], list[Callable[[], Tensor]]]:
        """All layers and directions over seq (T, B, I), of which sample b has lengths[b] true steps: None is all."""
        ends: list[EGRUState] = []
        rates: list[Tensor] = []
        emitted: list[Callable[[], Tensor]] = []
        for k, suffixes in enumerate(self._suffixes):
            last = k == self.num_layers - 1
            outputs = []
            for d, suffix in enumerate(suffixes):
                y0, h0 = start.y[len(ends)], start.h[len(ends)]
                trace = self._run(suffix, _reverse(seq, lengths) if d else seq, y0, h0)
                ends.append(self._final(trace, suffix, lengths))
                if with_rates:
                    rates.append(_rate(trace.o, lengths))
                emitted.append(lambda y=trace.y: _rate(y.abs(), lengths))  # type: ignore[misc]
                out = trace.u if last and self.output == "state" else trace.y
                outputs.append(_reverse(out, lengths) if d else out)
            seq = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and not last:
                seq = F.dropout(seq, self.dropout, self.training)
        return seq, EGRUState(*map(torch.stack, zip(*ends, strict=True))), rates, emitted

    def _final(self, trace: EGRUTrace, suffix: str, lengths: Tensor | None) -> EGRUState:
        """State at each sample's true end: padded steps were run, and are not looked at."""
        if lengths is None:
            return EGRUState(trace.y_n, trace.h_n)
        at = lengths - 1, torch.arange(len(lengths), device=lengths.device)
        theta = getattr(self, "threshold" + suffix).clamp(min=0)
        return EGRUState(trace.y[at], carried(trace.u[at], trace.o[at], theta, self.reset))


class EGRUCell(_EventRecurrent):
    """One step of `EGRU`: x (B, I), state (B, H) each -> output (B, H), EGRUState. Keywords and equations are EGRU's.

    Parameters `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`, as torch.nn.GRUCell names them, and the raw `threshold`.
    With `recurrent_dropout` each step draws its own mask.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **options: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **options)
        self._add_parameters("", input_size)
        self.reset_parameters()

    def forward(self, x: Tensor, state: EGRUState | None = None) -> tuple[Tensor, EGRUState]:
        """One step; state None is zeros."""
        if x.dim() != 2:
            raise ValueError(f"input has 2 axes (batch, feature), got shape {tuple(x.shape)}.")
        x, start = self._check(x, state, ())
        trace = self._run("", x[None], *start)
        return (trace.u if self.output == "state" else trace.y)[0], EGRUState(trace.y_n, trace.h_n)


class CausalConv1d(nn.Conv1d):
    """torch.nn.Conv1d along the time axis of (T, B, C), seeing nothing of what is to come, with state.

    ::

        y_t = bias + sum over k of weight[:, :, k] x_(t - (kernel_size - 1 - k) dilation)

    Parameters are torch.nn.Conv1d's: `weight` (out_channels, in_channels / groups, kernel_size), `bias` (out_channels,).
    What lies before the first step is zero, or `state`: the last (kernel_size - 1) · dilation inputs. A window after
    the other with the state in between equals the whole sequence. A stride is not offered: a stream gives an output at
    every step.

    Errors: ValueError for sizes, an input or a state that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        for name, size in (("kernel_size", kernel_size), ("dilation", dilation), ("groups", groups)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is a whole number, at least 1, got {size!r}.")
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, groups=groups, bias=bias)
        self.history = (kernel_size - 1) * dilation

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Input (T, B, in_channels) -> output (T, B, out_channels), state (history, B, in_channels); state None is zeros."""
        if x.dim() != 3 or x.shape[2] != self.in_channels:
            raise ValueError(f"input has shape (time, batch, {self.in_channels}), got {tuple(x.shape)}.")
        shape = (self.history, *x.shape[1:])
        if state is None:
            state = x.new_zeros(shape)
        if state.shape != shape:
            raise ValueError(
                f"state has shape {shape}, got {tuple(state.shape)}. Pass the state this layer returned, or None."
            )
        seen = torch.cat([state, x])
        if not len(x):
            return x.new_zeros((0, x.shape[1], self.out_channels)), seen
        output = self._conv_forward(seen.permute(1, 2, 0), self.weight, self.bias).permute(2, 0, 1)
        return output, seen[len(x) :]


class StackState(tuple[Any, ...]):
    """States of a Stack's modules in order, None for those that carry none."""

    __slots__ = ()

    def detach(self) -> StackState:
        """The same values, cut from the graph."""
        return StackState(_detach(s) for s in self)


class Stack(nn.Sequential):
    """nn.Sequential that carries state: forward(x, state=None) -> (output, state, activity).

    Members are EGRU, CausalConv1d, torch.nn.GRU, LSTM or RNN, which carry state, and modules of one tensor to one tensor,
    which do not. `state` is a StackState, None to start; `activity` is the `Activity` of all EGRU members.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        for name, module in self.named_children():
            inner = next((m for m in module.modules() if isinstance(m, _RECURRENT)), None)
            if inner is not None and not isinstance(module, _CARRIES_STATE):
                raise ValueError(
                    f"module {name} ({type(module).__name__}) holds a recurrent {type(inner).__name__} whose state a "
                    "Stack cannot carry. List EGRU, CausalConv1d, GRU, LSTM and RNN modules themselves as members."
                )

    def forward(self, x: Any, state: StackState | None = None) -> tuple[Any, StackState, Activity]:
        """Run the members in order; x is what the first of them reads."""
        if state is None:
            state = StackState([None] * len(self))
        elif len(state) != len(self):
            raise ValueError(
                f"state has {len(state)} entries, this Stack has {len(self)} modules. Pass the state it returned."
            )
        states: list[Any] = []
        rates: list[Tensor] = []
        emitted: list[Callable[[], Tensor]] = []
        for module, old in zip(self, state, strict=True):
            new = None
            if isinstance(module, EGRU):
                x, new, layer_rates, layer_emitted = module(x, old, with_activity=True, with_emitted=True)
                rates += layer_rates
                emitted += layer_emitted
            elif isinstance(module, _CARRIES_STATE):
                x, new = module(x, old)
            else:
                x = module(x)
            states.append(new)
        return x, StackState(states), Activity(rates, emitted)


_CARRIES_STATE = (EGRU, CausalConv1d, nn.RNNBase)
_RECURRENT = (*_CARRIES_STATE, EGRUCell, nn.RNNCellBase, Stack)


def param_groups(model: nn.Module, weight_decay: float, recurrent_decay: float | None = None) -> list[dict[str, Any]]:
    """Optimiser groups: `weight_decay` on matrices (two axes or more), none on biases and thresholds.

    `recurrent_decay` is that of EGRU's matrices alone (None: the same). With AdamW it is decoupled from the gradient, and the
    lever on activity of EGRU's authors: small weights leave states below their thresholds, so units speak less (Subramoney et
    al., 2023; Mukherji et al., 2023, arXiv 2311.07625). Frozen parameters (requires_grad False) are left out.
    """
    own = {id(p) for m in model.modules() if isinstance(m, _EventRecurrent) for p in m.parameters(recurse=False)}
    matrices: list[nn.Parameter] = []
    recurrent: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            apart = recurrent_decay is not None and id(p) in own
            (vectors if p.dim() < 2 else recurrent if apart else matrices).append(p)
    decays = (matrices, weight_decay), (recurrent, recurrent_decay), (vectors, 0.0)
    return [{"params": params, "weight_decay": decay} for params, decay in decays if params]


def anneal(start: float, end: float, begin: int, until: int) -> Callable[[int], float]:
    """A value moving linearly from `start` at step `begin` to `end` at step `until`, constant before and after."""
    if until < begin:
        raise ValueError(f"anneal ends at or after it begins, got begin={begin}, until={until}.")

    def value(step: int) -> float:
        if step >= until:
            return end
        return start if step <= begin else start + (end - start) * (step - begin) / (until - begin)

    return value


def _permuted(state: EGRUState, order: Tensor | None) -> EGRUState:
    return state if order is None else EGRUState(state.y[:, order], state.h[:, order])


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn x (T, B, …) backwards in time, each sample within its own length; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    return x[torch.where(t < lengths, lengths - 1 - t, t), torch.arange(x.shape[1], device=x.device)]


def _rate(o: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean of o (T, B, H) over its true steps: (H,)."""
    if lengths is None:
        return o.sum((0, 1)) / max(o.shape[0] * o.shape[1], 1)
    true = torch.arange(len(o), device=o.device)[:, None] < lengths
    return (o * true[..., None]).sum((0, 1)) / lengths.sum()


def _detach(state: Any) -> Any:
    if state is None or isinstance(state, Tensor | EGRUState):
        return state if state is None else state.detach()
    return tuple(s.detach() for s in state)


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, got {value!r}.")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability in [0, 1], got {value}.")
