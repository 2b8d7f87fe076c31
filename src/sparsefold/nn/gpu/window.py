"""A window's loop over time: products by torch's own library, a kernel for all the rest of a step, no Python between them.

What a captured loop touches must stay where it is: a `Room` holds the weight, the state and the products of one step for layers
of one size; all that grows with the length of a window is fresh memory, whose addresses are in the room's table (`kernels.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROOMS, _GRAPHS = 16, 64  # at most, the room used last staying longest; graphs in each room
_PAD = 16  # rows begin at multiples of 32 bytes or more, as products on tensor cores want them
_BLOCK = 256
_rooms: OrderedDict[Any, Room] = OrderedDict()
_pools: dict[Any, Any] = {}
_lock = threading.Lock()


def kernels() -> Any:
    """The module of kernels: importing it imports Triton, which compiles nothing before a kernel runs."""
    from . import kernels

    return kernels


def padded(units: int) -> int:
    """Units to a row."""
    return -(-units // _PAD) * _PAD


@dataclass(frozen=True)
class Size:
    """What layers that may share a room have in common; a stream of work has its own."""

    device: torch.device
    stream: int
    batch: int
    units: int
    parts: tuple[int, ...]  # gates of each product of a step
    io: torch.dtype
    matmul: torch.dtype

    @property
    def gates(self) -> int:
        """All gates."""
        return sum(self.parts)

    @property
    def state(self) -> torch.dtype:
        """The dtype of what is carried from step to step and computed in."""
        return torch.float64 if self.io == torch.float64 else torch.float32


class Room:
    """Buffers of one step, and the graphs of the loops that were captured over them."""

    def __init__(self, size: Size) -> None:
        B, H, HP = size.batch, size.units, padded(size.units)
        self.size, self.width = size, HP

        def zeros(*shape: int, dtype: torch.dtype = size.matmul) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=size.device)

        self.weight = zeros(size.gates * HP, HP)
        self.products = [zeros(B, gates * HP) for gates in size.parts]
        self.q = [zeros(B, gates * HP) for gates in size.parts]
        self.said, self.scaled = zeros(B, HP), zeros(B, HP)
        self.first, self.second, self.third = (zeros(B, H, dtype=size.state) for _ in range(3))
        self.table = zeros(kernels().TABLE, dtype=torch.int64)
        self.graphs: OrderedDict[Any, Any] = OrderedDict()
        self.lock = threading.Lock()
        self.captures = size.device.type == "cuda"
        elements = B * H
        self.block = _BLOCK if size.device.type == "cuda" else max(1 << (elements - 1).bit_length(), 2)
        self.grid = (-(-elements // self.block),)

    @contextmanager
    def held(self) -> Iterator[None]:
        """One at a time, on the room's device, in the dtypes that are written down."""
        device = self.size.device
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self.lock, here, torch.autocast(device.type, enabled=False):
            yield

    def dtypes(self) -> dict[str, Any]:
        """The constants that every kernel wants."""
        return {
            "H": self.size.units,
            "HP": self.width,
            "STATE": triton_dtype(self.size.state),
            "MATMUL": triton_dtype(self.size.matmul),
            "BLOCK": self.block,
        }

    def take(self, weight: Tensor) -> None:
        """The recurrent weight (gates · H, H) of the layer that is to run, in the products' dtype and rows."""
        H, gates = self.size.units, self.size.gates
        self.weight.view(gates, self.width, self.width)[:, :H, :H].copy_(weight.reshape(gates, H, H))

    def play(self, key: Any, addresses: dict[str, Any], loop: Callable[[], None]) -> None:
        """Run `loop` over tensors at `addresses`: {place in the table: tensor, None or (tensor, stride, stride)}.

        The first time launch by launch, which compiles what is not compiled; from the second on as one graph.
        """
        values = [0] * kernels().TABLE
        for place, what in addresses.items():
            for i, value in enumerate(what if isinstance(what, tuple) else (what,)):
                at = getattr(kernels(), place).value + i
                values[at] = value.data_ptr() if isinstance(value, Tensor) else value or 0
        kernels().fill[(1,)](self.table, *values)
        if not self.captures or torch.cuda.is_current_stream_capturing():
            loop()
        elif key not in self.graphs:
            loop()
            self.graphs[key] = None
        else:
            if self.graphs[key] is None:
                self.graphs[key] = self._capture(loop)
            self.graphs[key].replay()
            self.graphs.move_to_end(key)
        while len(self.graphs) > _GRAPHS:
            self.graphs.popitem(last=False)

    def _capture(self, loop: Callable[[], None]) -> Any:
        where = self.size.device, self.size.stream
        if where not in _pools:
            _pools[where] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pools[where], capture_error_mode="thread_local"):
            loop()
        return graph


def room(batch: int, units: int, parts: tuple[int, ...], like: Tensor, matmul: torch.dtype) -> Room:
    """The room of layers of this size on the device and stream of `like`."""
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    size = Size(like.device, stream, batch, units, parts, like.dtype, matmul)
    with _lock, torch.inference_mode(False):  # a room outlasts the mode it was first needed in
        if size not in _rooms:
            _rooms[size] = Room(size)
            while len(_rooms) > _ROOMS:
                _rooms.popitem(last=False)
        _rooms.move_to_end(size)
        return _rooms[size]


def precision() -> str:
    """How torch multiplies float32 on the device now; a graph keeps what held when it was captured."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for it."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}[dtype]


def blank(like: Tensor, rows: int, gates: int, units: int, dtype: torch.dtype) -> Tensor:
    """A tape (rows, gates · HP) to be written, zero beyond the units: products read whole rows."""
    width = padded(units)
    tape = like.new_empty(rows, gates * width, dtype=dtype)
    tape.view(rows, gates, width)[:, :, units:].zero_()
    return tape


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values x (…, I) as a matrix whose rows begin at whole multiples of `_PAD` elements, zeros filling up."""
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    lack = padded(x.shape[1]) - x.shape[1]
    return torch.nn.functional.pad(x, (0, lack)) if lack else x


def gate_rows(weight: Tensor, order: list[int], gates: int, dtype: torch.dtype) -> Tensor:
    """A weight (gates · H, I) with its gates in this order, each padded to whole rows, and its columns as in `rows`."""
    H = len(weight) // gates
    if order == list(range(gates)) and padded(H) == H:
        return rows(weight, dtype)
    out = weight.new_zeros(gates, padded(H), padded(weight.shape[1]), dtype=dtype)
    for i, gate in enumerate(order):
        out[i, :H, : weight.shape[1]] = weight[gate * H : (gate + 1) * H]
    return out.view(gates * padded(H), -1)


def gathered(product: Tensor, order: list[int], units: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight's gradient out of a product over padded gates in this order: `gate_rows` the other way round."""
    parts = product.view(len(order), -1, product.shape[1])[:, :units, :columns]
    out = product.new_empty(len(order), units, columns, dtype=dtype)
    for i, gate in enumerate(order):
        out[gate] = parts[i]
    return out.view(-1, columns)


def from_above(grad: Tensor | None, dtype: torch.dtype) -> tuple[Any, int, int] | None:
    """A gradient (T, B, H) as the kernels read it: in this dtype, the units of a row side by side, rows where they are."""
    if grad is None:
        return None
    grad = grad.detach().to(dtype)
    grad = grad if grad.stride(2) == 1 or grad.shape[2] == 1 else grad.contiguous()
    return grad, grad.stride(0), grad.stride(1)


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of x are made in: bfloat16 where autocast asks for it, else as x is."""
    kind = x.device.type
    asked = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if asked and x.dtype == torch.float32 else x.dtype


def draw(x: Tensor, like: Tensor, probabilities: list[float]) -> list[Tensor | None]:
    """For each probability to keep the old state a mask (T, *like.shape) of what takes the new one; None where it is 0.

    On a GPU one draw each; elsewhere a draw a step, one after the other, as the reference draws.
    """
    masks = [torch.empty(len(x), *like.shape, dtype=torch.bool, device=x.device) if p else None for p in probabilities]
    for steps in [slice(None)] if x.is_cuda else range(len(x)):
        for mask, p in zip(masks, probabilities, strict=True):
            if mask is not None:
                mask[steps] = torch.empty(mask[steps].shape, dtype=like.dtype, device=x.device).bernoulli_(1 - p)
    return masks


def why_not(x: Tensor) -> str | None:
    """What keeps these kernels from tensors like x, None where they can run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; a torch for CUDA brings it along)"
    if not x.is_cuda and not _interpreted():
        return f"they run on a GPU, and torch.cuda.is_available() is {torch.cuda.is_available()}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return "they take float32, bfloat16 and float64"
    return None


def available(x: Tensor) -> bool:
    """Whether these kernels can run on tensors like x; where they cannot, a warning says why, once."""
    reason = why_not(x)
    if reason is not None:
        _warn(reason)
    return reason is None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"the GPU's own kernels are left aside and the plain loop runs: {reason}.", stacklevel=2)


def _interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET=1), which runs them on the processor."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernels().fill, InterpretedFunction)


def check(
    x: Tensor,
    y0: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    threshold: Tensor | None,
    *,
    gates: int,
    lengths: Tensor | None = None,
) -> None:
    """ValueError unless all tensors are of one kind and fit."""
    reason = why_not(x)
    if reason:
        raise ValueError(
            f"the GPU's kernels cannot take {x.dtype} on {x.device}: {reason}. Use sparsefold.nn.reference."
        )
    if x.dim() != 3 or h0.dim() != 2:
        raise ValueError(
            f"x has 3 axes (time, batch, feature) and a state 2 (batch, unit), got {tuple(x.shape)}, {tuple(h0.shape)}."
        )
    B, I, H = x.shape[1], x.shape[2], h0.shape[1]  # noqa: E741
    wanted = {
        "y0": (y0, (B, H)), "h0": (h0, (B, H)), "weight_ih": (weight_ih, (gates * H, I)),
        "weight_hh": (weight_hh, (gates * H, H)), "bias_ih": (bias_ih, (gates * H,)), "bias_hh": (bias_hh, (gates * H,)),
        "threshold": (threshold, (H,)),
    }  # fmt: skip
    for name, (t, shape) in wanted.items():
        if t is None:
            continue
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"x is {x.dtype} on {x.device}, another input {t.dtype} on {t.device}: {name}. Convert one of them."
            )
        if t.shape != shape:
            raise ValueError(f"{name} is {shape} for {H} units and x of {I} features, got {tuple(t.shape)}.")
    if lengths is not None and (lengths.shape != (B,) or lengths.device != x.device or lengths.dtype != torch.int64):
        raise ValueError(
            f"lengths is an int64 tensor ({B},) on {x.device}, got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}."
        )
