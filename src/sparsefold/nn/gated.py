"""GRU, LSTM and RNN of torch with recurrent dropout and zoneout, trained on the processor by the library's own kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import gpu, native, reference
from .kept import dropped
from .modules import Backend, _one_of, _probability, _reverse

States = tuple[Tensor, ...]  # h, or h and c
_FEW_STEPS = 12  # do not earn back that the kernels pack the weights once a sequence and direction


class _Gated(nn.RNNBase):
    """What the three add to torch's module of the same name: options, and who runs a sequence."""

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _one_of("backend", backend, get_args(Backend))
        _probability("zoneout", zoneout)
        _probability("recurrent_dropout", recurrent_dropout)
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        self.backend: Backend = backend
        if self.proj_size and (self._optional() or backend != "auto"):
            raise ValueError(
                f"an LSTM with projections (proj_size={self.proj_size}) is torch's own: zoneout and recurrent_dropout are 0 and "
                'backend is "auto". Leave them, or take proj_size=0.'
            )

    def _optional(self) -> bool:
        """Whether an option is set that torch's modules do not have."""
        return bool(self.zoneout or self.recurrent_dropout)

    def _cell(self, cells: Any) -> Any:
        """f(x, *states, four weights, training=, lengths=) -> sequences of the states, and the states to carry on with."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As torch's: (T, B, I), (B, T, I) with batch_first, (T, I) or packed -> output likewise, state.

        State (layers · directions, B, H), of an LSTM a pair (h, c) of these; None is zeros.
        """
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if torch.is_autocast_enabled(data.device.type):
            data = data.to(self.weight_ih_l0.dtype)
        if not packed and data.dim() not in (2, 3):
            raise ValueError(f"input has 3 axes (time, batch, feature), or 2 without a batch, got {tuple(data.shape)}.")
        steps = len(input.batch_sizes) if packed else data.shape[self.batch_first and data.dim() == 3]
        able = native.available(data) and data.dtype == torch.float32  # in float64 they are for checks, and not fast
        fast = self.backend == "native" or (
            self.backend == "auto" and not self.proj_size and able and steps >= _FEW_STEPS
        )
        if self.backend == "auto" and not fast and not self._optional():
            return super().forward(input, hx)  # type: ignore[no-any-return]
        on_gpu = not fast and (
            self.backend == "triton" or (self.backend == "auto" and data.is_cuda and gpu.available(data))
        )
        cells = native if fast else gpu if on_gpu else reference
        with nullcontext() if on_gpu else torch.autocast(data.device.type, enabled=False):
            if packed:
                return self._ragged(cells, input._replace(data=data), hx)
            return self._even(cells, data, hx)

    def _ragged(self, cells: Any, x: PackedSequence, hx: Any) -> tuple[Any, Any]:
        # In the packed (longest first) order throughout, so that the output lines up with other packed data.
        seq, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        start = self._start(seq, hx)
        if x.sorted_indices is not None:
            start = tuple(s[:, x.sorted_indices] for s in start)
        seq, end = self._layers(cells, seq, start, lengths.to(seq.device))
        if x.unsorted_indices is not None:
            end = tuple(s[:, x.unsorted_indices] for s in end)
        data = pack_padded_sequence(seq, lengths).data
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), self._end(end)

    def _even(self, cells: Any, x: Tensor, hx: Any) -> tuple[Any, Any]:
        if x.dim() == 2:
            alone = hx if hx is None else tuple(s[:, None] for s in hx) if isinstance(hx, tuple) else hx[:, None]
            seq, end = self._layers(cells, x[:, None], self._start(x[:, None], alone), None)
            return seq[:, 0], self._end(tuple(s[:, 0] for s in end))
        seq = x.transpose(0, 1) if self.batch_first else x
        seq, end = self._layers(cells, seq, self._start(seq, hx), None)
        return seq.transpose(0, 1) if self.batch_first else seq, self._end(end)

    def _layers(self, cells: Any, seq: Tensor, start: States, lengths: Tensor | None) -> tuple[Tensor, States]:
        """All layers and directions over seq (T, B, I), of which sample b has lengths[b] true steps: None is all."""
        ends: list[States] = []
        ways = ("", "_reverse") if self.bidirectional else ("",)
        for k in range(self.num_layers):
            outputs = []
            for d, way in enumerate(ways):
                trace, end = self._run(
                    cells,
                    f"_l{k}{way}",
                    _reverse(seq, lengths) if d else seq,
                    tuple(s[len(ends)] for s in start),
                    lengths,
                )
                ends.append(end)
                outputs.append(_reverse(trace, lengths) if d else trace)
            seq = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and k < self.num_layers - 1:
                seq = F.dropout(seq, self.dropout, self.training)
        return seq, tuple(map(torch.stack, zip(*ends, strict=True)))

    def _run(self, cells: Any, suffix: str, x: Tensor, start: States, lengths: Tensor | None) -> tuple[Tensor, States]:
        """One layer in one direction over x (T, B, I) -> output (T, B, H) and the state it ends with."""
        weight_hh = getattr(self, "weight_hh" + suffix)
        if self.training and self.recurrent_dropout:
            weight_hh = dropped(weight_hh, self.recurrent_dropout)
        biases = (getattr(self, f"bias_{which}{suffix}") if self.bias else None for which in ("ih", "hh"))
        weights = (getattr(self, "weight_ih" + suffix), weight_hh, *biases)
        trace = self._cell(cells)(x, *start, *weights, zoneout=self.zoneout, training=self.training, lengths=lengths)
        return trace[0], trace[-len(start) :]

    def _start(self, x: Tensor, hx: Any) -> States:
        """State (each (layers · directions, B, H)) if it and x (T, B, I) fit, zeros for None."""
        who, dtype = type(self).__name__, self.weight_ih_l0.dtype
        pair = isinstance(self, nn.LSTM)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input has {x.shape[-1]} features, this {who} reads {self.input_size}.")
        if x.dtype != dtype:
            raise ValueError(f"input is {x.dtype}, this {who} is {dtype}. Convert one of them with .to(dtype).")
        shape = (self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size)
        if hx is None:
            return (x.new_zeros(shape),) * (1 + pair)
        if isinstance(hx, tuple | list) != pair or (pair and len(hx) != 2):
            what = "a pair (h, c) of tensors" if pair else "one tensor h"
            raise ValueError(f"the state of {who} is {what}, got {type(hx).__name__}. Pass what it returned, or None.")
        states = tuple(hx) if pair else (hx,)
        for part in states:
            if part.shape != shape:
                raise ValueError(
                    f"state has shape {shape} (layers and directions, batch, unit), got {tuple(part.shape)}. "
                    "Pass the state this layer returned, or None."
                )
            if part.dtype != dtype:
                raise ValueError(f"state is {part.dtype}, this {who} is {dtype}. Convert it with .to(dtype).")
        return states

    def _end(self, states: States) -> Any:
        return states if len(states) > 1 else states[0]

    def extra_repr(self) -> str:
        """Torch's, and every option that is not its default."""
        options = {"recurrent_dropout": 0.0, "zoneout": 0.0, "zoneout_cell": 0.0, "backend": "auto"}
        values = {name: getattr(self, name, default) for name, default in options.items()}
        return super().extra_repr() + "".join(f", {n}={v!r}" for n, v in values.items() if v != options[n])


class GRU(_Gated, nn.GRU):
    """torch.nn.GRU with `recurrent_dropout`, `zoneout` and `backend`; parameters, arguments and outputs are torch's.

    `recurrent_dropout` drops recurrent weights (DropConnect, one mask per forward), in training only; `zoneout` keeps a
    unit's state with that probability in training, and by its mean in evaluation. Equations: `sparsefold.nn.reference.gru`.

    `backend` "auto" runs sequences of twelve steps or more in float32 on the processor with the library's own kernels
    (`sparsefold.nn.native`, which "native" always runs, float64 too), forward and backward; all else is torch's own, or
    with an option torch's does not have, the plain loop of torch operations, which "reference" always runs.

    Errors: ValueError for an option, input or state that does not fit.

    Source: Cho et al. (2014), arXiv 1406.1078; Krueger et al. (2017), arXiv 1606.01305; Merity et al. (2018), arXiv
    1708.02182, for DropConnect on recurrent weights.
    """

    def _cell(self, cells: Any) -> Any:
        return cells.gru


class LSTM(_Gated, nn.LSTM):
    """torch.nn.LSTM with the options of `GRU`, and `zoneout_cell` for c beside `zoneout` for h.

    With `proj_size` it is torch's own, without options. Equations: `sparsefold.nn.reference.lstm`.

    Errors: ValueError for an option, input or state that does not fit.
    """

    def __init__(self, *args: Any, zoneout_cell: float = 0.0, **kwargs: Any) -> None:
        _probability("zoneout_cell", zoneout_cell)
        self.zoneout_cell = zoneout_cell
        super().__init__(*args, **kwargs)

    def _optional(self) -> bool:
        return super()._optional() or bool(self.zoneout_cell)

    def _cell(self, cells: Any) -> Any:
        return lambda *args, **options: cells.lstm(*args, zoneout_cell=self.zoneout_cell, **options)


class RNN(_Gated, nn.RNN):
    """torch.nn.RNN, tanh or relu, with the options of `GRU`. Equations: `sparsefold.nn.reference.rnn`.

    Errors: ValueError for an option, input or state that does not fit.
    """

    def _cell(self, cells: Any) -> Any:
        return lambda *args, **options: cells.rnn(*args, nonlinearity=self.nonlinearity, **options)
