from collections.abc import Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray

def available_isas() -> list[str]: ...
def intel() -> bool: ...
def kernels() -> list[str]: ...
def activations(
    x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    sigmoid: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    tanh: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    isa: str = "",
) -> None: ...

class Matrix:
    @staticmethod
    def dense(
        values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        gates: int = 1,
    ) -> Matrix: ...
    @staticmethod
    def block(
        rows: int,
        cols: int,
        gates: int,
        values: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None, None), order="C", device="cpu", writable=False)
        ],
        block_row: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        start: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> Matrix: ...
    def set_precision(
        self,
        precision: str,
        scale: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...
    @staticmethod
    def complementary(
        rows: int,
        gates: int,
        overlay: int,
        values: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None, None), order="C", device="cpu", writable=False)
        ],
        live: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), order="C", device="cpu", writable=False)],
    ) -> Matrix: ...

class Packed:
    def __init__(self, matrix: Matrix, isa: str = "") -> None: ...
    @property
    def padded_rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def matvec(
        self,
        x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
        repeat: int = 1,
    ) -> None: ...
    def matvec_events(
        self,
        index: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        value: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    ) -> None: ...
    def matvec_lists(
        self,
        index: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        value: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        start: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    ) -> None: ...

class Engine:
    def __init__(self) -> None: ...
    def add_embedding(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    ) -> None: ...
    def add_linear(
        self,
        weight: Matrix,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...
    def add_conv1d(
        self,
        weight: Matrix,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        kernel: int,
        dilation: int,
        groups: int,
    ) -> None: ...
    def add_gru(
        self,
        weight_ih: Matrix,
        weight_hh: Matrix,
        bias_ih: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        bias_hh: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        reset_after: bool,
        delta_input: float = -1.0,
        delta_hidden: float = -1.0,
        reverse: bool = False,
    ) -> None: ...
    def add_egru(
        self,
        weight_ih: Matrix,
        weight_hh: Matrix,
        bias_ih: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        bias_hh: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        threshold: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        reset_after: bool,
        reset: str,
        always: bool,
        emits_events: bool,
        zoneout: float,
        reverse: bool = False,
    ) -> None: ...
    def add_lstm(
        self,
        weight_ih: Matrix,
        weight_hh: Matrix,
        bias_ih: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        bias_hh: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        delta_input: float = -1.0,
        delta_hidden: float = -1.0,
        reverse: bool = False,
    ) -> None: ...
    def add_rnn(
        self,
        weight_ih: Matrix,
        weight_hh: Matrix,
        bias_ih: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        bias_hh: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        relu: bool,
        delta_input: float = -1.0,
        delta_hidden: float = -1.0,
        reverse: bool = False,
    ) -> None: ...
    def add_relu(self) -> None: ...
    def add_events(self, units: int) -> None: ...
    def add_kwta(self, units: int, k: int, groups: int) -> None: ...
    def add_log_softmax(self, units: int) -> None: ...
    def add_top_k(self, units: int, k: int) -> None: ...
    def add_cluster(
        self,
        projection: Matrix,
        weight: Matrix,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        units: int,
        at: int,
    ) -> None: ...
    def add_layer_norm(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        epsilon: float,
    ) -> None: ...
    def finish(self, isa: str, fold_limit: int, threads: int = 1) -> None: ...
    def step_batch_tokens(
        self,
        streams: Sequence[Stream],
        tokens: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None: ...
    def step_batch_values(
        self,
        streams: Sequence[Stream],
        x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def folded(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

class Stream:
    def __init__(self, engine: Engine) -> None: ...
    def step(self, x: object | None, out: object) -> None: ...
    def score(self, x: object | None, target: object | None) -> float: ...
    def score_tokens(
        self,
        tokens: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu", writable=False)],
        targets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    ) -> None: ...
    def score_values(
        self,
        x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        targets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    ) -> None: ...
    def run_tokens(
        self,
        tokens: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
        trace: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None: ...
    def run_values(
        self,
        x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
        trace: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None: ...
    def reset(self) -> None: ...
    def reset_counters(self) -> None: ...
    def read(
        self, op: int, name: str, out: Annotated[NDArray, dict(shape=(None,), order="C", device="cpu")]
    ) -> None: ...
    def write(
        self,
        op: int,
        name: str,
        values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def trace_width(self) -> int: ...

class KeptBlocks:
    def __init__(
        self, mask: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu", writable=False)], gates: int
    ) -> None: ...

class BlocksF32:
    @property
    def packed(self) -> bool: ...

class BlocksF64:
    @property
    def packed(self) -> bool: ...

class Team:
    def __init__(self, threads: int, isa: str = "", runtime: bool = True) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def borrows(self) -> bool:
        """Whether its threads are those of the OpenMP runtime that is loaded."""

    @overload
    def advise(self, x: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")]) -> None: ...
    @overload
    def advise(self, x: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")]) -> None: ...
    @overload
    def count(self, x: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)]) -> int: ...
    @overload
    def count(self, x: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)]) -> int: ...
    @overload
    def transpose(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        gates: int,
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> bool: ...
    @overload
    def transpose(
        self,
        weight: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        gates: int,
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> bool: ...
    @overload
    def pack(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        gates: int,
        most: float,
        previous: BlocksF32 | None,
        kept: KeptBlocks | None,
    ) -> BlocksF32: ...
    @overload
    def pack(
        self,
        weight: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        gates: int,
        most: float,
        previous: BlocksF64 | None,
        kept: KeptBlocks | None,
    ) -> BlocksF64: ...
    @overload
    def input_product(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF32 | None,
        bias: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        x: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        events: bool,
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def input_product(
        self,
        weight: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF64 | None,
        bias: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        x: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        events: bool,
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def input_gradient(
        self,
        blocks: BlocksF32,
        g: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def input_gradient(
        self,
        blocks: BlocksF64,
        g: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def egru_forward(
        self,
        options: dict,
        hidden: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF32 | None,
        blocks_n: BlocksF32 | None,
        every: bool,
        bias_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        theta: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        mask: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        y0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        h0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        tape: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        u: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        o: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")] | None,
        y: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        h: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def egru_forward(
        self,
        options: dict,
        hidden: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF64 | None,
        blocks_n: BlocksF64 | None,
        every: bool,
        bias_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        theta: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        mask: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        y0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        h0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        tape: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        u: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        o: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")] | None,
        y: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        h: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def egru_backward(
        self,
        options: dict,
        hidden: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF32 | None,
        blocks_n: BlocksF32 | None,
        every: bool,
        theta: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        mask: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        y0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        h0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        tape: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        u: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        y: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        grad_y: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_u: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_o: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_y_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_h_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        wants_y0: bool,
        gates: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dy: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dh: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dtheta: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dbias: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def egru_backward(
        self,
        options: dict,
        hidden: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF64 | None,
        blocks_n: BlocksF64 | None,
        every: bool,
        theta: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        mask: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        y0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        h0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        tape: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        u: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        y: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        grad_y: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_u: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_o: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_y_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_h_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        wants_y0: bool,
        gates: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dy: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dh: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dtheta: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dbias: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def outer(
        self,
        g: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        parts: Sequence[int],
        head: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        rest: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        scale: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu", writable=False)] | None,
        live: BlocksF32 | None,
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def outer(
        self,
        g: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        parts: Sequence[int],
        head: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        rest: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        scale: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu", writable=False)] | None,
        live: BlocksF64 | None,
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def outer_blocks(
        self,
        g: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        parts: Sequence[int],
        head: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        rest: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF32,
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def outer_blocks(
        self,
        g: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        parts: Sequence[int],
        head: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        rest: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        wild: Annotated[NDArray[numpy.uint8], dict(order="C", device="cpu", writable=False)] | None,
        blocks: BlocksF64,
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def gated_forward(
        self,
        kind: str,
        keep_h: float,
        keep_c: float,
        weight: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        blocks: BlocksF32 | None,
        blocks_n: BlocksF32 | None,
        bias_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        mask_h: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        mask_c: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        h0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        c0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        live: Annotated[NDArray[numpy.int32], dict(order="C", device="cpu", writable=False)] | None,
        tape: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        cells: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")] | None,
    ) -> None: ...
    @overload
    def gated_forward(
        self,
        kind: str,
        keep_h: float,
        keep_c: float,
        weight: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        blocks: BlocksF64 | None,
        blocks_n: BlocksF64 | None,
        bias_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        mask_h: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        mask_c: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        h0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        c0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        live: Annotated[NDArray[numpy.int32], dict(order="C", device="cpu", writable=False)] | None,
        tape: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        cells: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")] | None,
    ) -> None: ...
    @overload
    def gated_backward(
        self,
        kind: str,
        keep_h: float,
        keep_c: float,
        weight: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        blocks: BlocksF32 | None,
        blocks_n: BlocksF32 | None,
        mask_h: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        mask_c: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        h0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        c0: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        live: Annotated[NDArray[numpy.int32], dict(order="C", device="cpu", writable=False)] | None,
        tape: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
        cells: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_cells: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_h_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        grad_c_n: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)] | None,
        gates: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dh: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
        dc: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")] | None,
        dbias: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    ) -> None: ...
    @overload
    def gated_backward(
        self,
        kind: str,
        keep_h: float,
        keep_c: float,
        weight: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        blocks: BlocksF64 | None,
        blocks_n: BlocksF64 | None,
        mask_h: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        mask_c: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        h0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        c0: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        live: Annotated[NDArray[numpy.int32], dict(order="C", device="cpu", writable=False)] | None,
        tape: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)],
        cells: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_out: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_cells: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_h_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        grad_c_n: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu", writable=False)] | None,
        gates: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dh: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
        dc: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")] | None,
        dbias: Annotated[NDArray[numpy.float64], dict(order="C", device="cpu")],
    ) -> None: ...
