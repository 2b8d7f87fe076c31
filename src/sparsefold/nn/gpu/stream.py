"""One sample at a time, where reading the weights is the price: of the blocks that exist those whose input spoke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .window import kernels, triton_dtype, why_not

if TYPE_CHECKING:
    from ..modules import EGRU

ROWS = 16  # of a block; a block is one column wide
_CHUNK, _WARPS = 512, 16  # blocks of a gate looked at at once: with 1350 units, inputs and 10 % of blocks it has 270


class Stream:
    """A stream through the layers of a trained EGRU, batch 1: a kernel a layer (two with reset_after=False), all in one graph.

    Weights are kept as those 16×1 blocks, counted from the first row of each gate, that are not all zero, in the EGRU's dtype or
    in `weights`; all else is float32 (float64 for an EGRU in float64). Later changes to the EGRU are not seen. `counts`
    (layers, 2) holds events and blocks read since the last reset.

    Errors: ValueError for an EGRU that is bidirectional or lies where the kernels cannot run.
    """

    @torch.inference_mode(False)
    def __init__(self, egru: EGRU, weights: torch.dtype | None = None) -> None:
        like: Tensor = egru.weight_ih_l0.detach()  # type: ignore[operator]
        reason = why_not(like)
        if reason:
            raise ValueError(f"a Stream runs on a GPU, the EGRU is {like.dtype} on {like.device}: {reason}.")
        if egru.bidirectional:
            raise ValueError(
                "a Stream goes forward, this EGRU is bidirectional. Run whole sequences through the module."
            )
        state = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.units, self.inputs, self.steps = egru.hidden_size, egru.input_size, 0
        self._layers = [_Layer(egru, k, weights or like.dtype, state) for k in range(egru.num_layers)]
        self.counts = torch.zeros(len(self._layers), 2, dtype=torch.int64, device=like.device)
        self.output = torch.zeros(self.units, dtype=state, device=like.device)
        self._graphs: list[Any] = []
        if like.is_cuda:
            with torch.cuda.device(like.device):
                for parity in (0, 1):  # compiles
                    self._launch(parity)
                for parity in (0, 1):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        self._launch(parity)
                    self._graphs.append(graph)
        self.reset()

    def reset(self) -> None:
        """State and counts to zero."""
        for layer in self._layers:
            layer.seen.zero_()
            layer.hidden.zero_()
        self.counts.zero_()
        self.steps = 0

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One step from x (I,): y or u of the last layer, (H,), in a tensor that the next step overwrites."""
        if x.shape != (self.inputs,):
            raise ValueError(f"x has shape ({self.inputs},), got {tuple(x.shape)}.")
        parity = self.steps % 2
        self._layers[0].seen[parity, : self.inputs].copy_(x)
        self.steps += 1
        if self._graphs:
            self._graphs[parity].replay()
        else:
            self._launch(parity)
        return self.output

    def _launch(self, parity: int) -> None:
        for k, layer in enumerate(self._layers):
            last = k == len(self._layers) - 1
            onward = self.output if last else self._layers[k + 1].seen[parity]
            layer.launch(parity, onward, self.counts[k], last)


class _Layer:
    """Blocks and state of one layer; what it reads is there twice, since a unit writes its y while others read the old ones."""

    def __init__(self, egru: EGRU, k: int, weights: torch.dtype, state: torch.dtype) -> None:
        H = egru.hidden_size
        w_i, w_h = (getattr(egru, f"weight_{n}_l{k}").detach() for n in ("ih", "hh"))
        device = w_i.device
        I = w_i.shape[1]  # noqa: E741
        self.parts = ("all",) if egru.reset_after else ("reset", "rest")
        self.groups = -(-H // ROWS)
        self.values, self.columns, self.starts = _blocks(w_i, w_h, H, egru.reset_after)
        self.values = self.values.to(weights)
        zero = w_i.new_zeros(3 * H)
        b_i, b_h = (getattr(egru, f"bias_{n}_l{k}").detach() if egru.bias else zero for n in ("ih", "hh"))
        self.bias = torch.cat([b_i[: 2 * H] + b_h[: 2 * H], b_i[2 * H :], b_h[2 * H :]]).to(state)
        self.theta = getattr(egru, f"threshold_l{k}").detach().clamp(min=0).to(state)
        self.seen = torch.zeros(2, I + 2 * H, dtype=state, device=device)
        self.hidden = torch.zeros(H, dtype=state, device=device)
        self.output = egru.output
        self.form = {
            "H": H, "D": I, "ROWS": ROWS, "RESET": egru.reset, "EVENT": egru.event, "KEEP": float(egru.zoneout),
            "STATE": triton_dtype(state), "CHUNK": _CHUNK if device.type == "cuda" else 16, "num_warps": _WARPS,
        }  # fmt: skip

    def launch(self, parity: int, onward: Tensor, counts: Tensor, last: bool) -> None:
        said = self.seen[1 - parity, self.form["D"] :]
        for part in self.parts:
            kernels().stream_step[(self.groups,)](
                self.values, self.columns, self.starts, self.seen[parity], said, onward, self.hidden, self.bias, self.theta,
                counts, PART=part, HANDS_ON_STATE=last and self.output == "state", **self.form,
            )  # fmt: skip


def _blocks(w_i: Tensor, w_h: Tensor, H: int, reset_after: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values (n, ROWS), columns (n,), starts (groups · 4 + 1,)): for each group of units blocks of r, z, n from x, n from y⁻.

    Columns count through (x, y⁻, r ⊙ y⁻); the last are what W_hn reads without reset_after.
    """
    I, groups = w_i.shape[1], -(-H // ROWS)  # noqa: E741
    parts: list[list[Tensor]] = [[], [], []]
    for w, at, hidden in ((w_i, 0, False), (w_h, I, True)):
        full = torch.nn.functional.pad(w.view(3, H, -1), (0, 0, 0, groups * ROWS - H))
        full = full.view(3, groups, ROWS, -1).permute(1, 0, 3, 2)  # group, gate, column, row
        group, gate, column = torch.nonzero((full != 0).any(3), as_tuple=True)
        offset = torch.where(gate == 2, H, 0) if hidden and not reset_after else 0
        order = group * 4 + torch.where(gate == 2, 3, gate) if hidden else group * 4 + gate
        for part, found in zip(parts, (full[group, gate, column], column + at + offset, order), strict=True):
            part.append(found)
    values, columns, order = (torch.cat(p) for p in parts)
    by_row = torch.argsort(order, stable=True)
    starts = torch.zeros(groups * 4 + 1, dtype=torch.int32, device=w_i.device)
    starts[1:] = torch.bincount(order, minlength=groups * 4).cumsum(0)
    return values[by_row].contiguous(), columns[by_row].to(torch.int32), starts
