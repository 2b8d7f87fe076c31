"""Other engines on the same work: the dense GRU of the recipe ``text``, one byte at a time, one thread, state moving.

Each rival is a callable ``token -> logits`` (float32 numpy, (O,)) that keeps its own state, at the best settings known to us.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsefold.bench import pinned, race
from sparsefold.engine import Engine
from sparsefold.nn import EGRUState, Stack, StackState
from sparsefold.program import Program

Call = Callable[[int], NDArray[np.float32]]


PARITY_BYTES = 512
PARITY_BOUND = 1e-4  # largest difference of a logit; float32 sums over 256 units differ in order, and no event may flip
TIMED_BYTES = 10_000


class ParityError(RuntimeError):
    """An engine that disagrees with its reference."""


class Rival(NamedTuple):
    """A name for tables, the call that plays one byte, and the settings it runs with."""

    name: str
    call: Call
    settings: str


def torch_eager(model: Stack) -> Rival:
    """The model as torch plays it step by step: a GRUCell (a quarter faster than ``nn.GRU`` here), ``inference_mode``."""
    return Rival("torch eager", _step_by_step(_cells(model)), "GRUCell, float32, inference_mode, 1 thread")


def torch_int8(model: Stack) -> Rival:
    """``torch.ao.quantization.quantize_dynamic`` on the same cells: int8 weights, activations quantised per call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this module will move; it is the rival all the same
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantized = quantize(_cells(model), {torch.nn.GRUCell, torch.nn.Linear}, dtype=torch.qint8)
    settings = f"quantize_dynamic, {torch.backends.quantized.engine}, inference_mode, 1 thread"
    return Rival("torch int8", _step_by_step(quantized), settings)


def _cells(model: Stack) -> torch.nn.ModuleList:
    """Embedding, GRUCell and Linear with the weights of the recipe's dense one-layer network."""
    embedding, gru, decoder = _members(model)
    cell = torch.nn.GRUCell(gru.input_size, gru.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in gru.state_dict().items()})
    return torch.nn.ModuleList([embedding, cell, decoder]).eval()


def _members(model: Stack) -> tuple[Any, Any, Any]:
    embedding, gru, decoder = model
    if not isinstance(gru, torch.nn.GRU) or gru.num_layers != 1 or gru.bidirectional:
        raise ValueError("the rivals play the recipe's dense network: an Embedding, one GRU layer and a Linear.")
    return embedding, gru, decoder


def _step_by_step(cells: torch.nn.ModuleList) -> Call:
    embedding, cell, decoder = cast(tuple[Any, Any, Any], tuple(cells))
    token = torch.zeros(1, dtype=torch.long)
    h = torch.zeros(1, decoder.in_features)

    @torch.inference_mode()
    def call(x: int) -> NDArray[np.float32]:
        nonlocal h
        token[0] = x
        h = cell(embedding(token), h)
        logits: NDArray[np.float32] = decoder(h)[0].numpy()
        return logits

    return call


def onnx_runtime(model: Stack) -> Rival:
    """ONNX Runtime, float32: one session, one thread, inputs and outputs bound once, two state buffers in turn."""
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise ImportError("the rivals need ONNX Runtime: pip install 'sparsefold[bench]'.") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(onnx_model(model), options, providers=["CPUExecutionProvider"])
    _, gru, decoder = _members(model)
    hidden, tokens = gru.hidden_size, decoder.out_features
    token = np.zeros((1, 1), np.int64)
    logits = np.zeros((1, tokens), np.float32)
    states = [np.zeros((1, 1, hidden), np.float32) for _ in range(2)]
    bindings = []
    for i in range(2):
        binding = session.io_binding()
        binding.bind_input("token", "cpu", 0, np.int64, token.shape, token.ctypes.data)
        binding.bind_input("h", "cpu", 0, np.float32, states[i].shape, states[i].ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        binding.bind_output("h_next", "cpu", 0, np.float32, states[i].shape, states[1 - i].ctypes.data)
        bindings.append(binding)
    turn = 0
    play = session.run_with_iobinding

    def call(x: int, keep: list[NDArray[np.float32]] = states) -> NDArray[np.float32]:
        nonlocal turn  # `keep`: the bindings hold bare addresses of the states
        token[0, 0] = x
        play(bindings[turn])
        turn ^= 1
        row: NDArray[np.float32] = logits[0]
        return row

    return Rival("ONNX Runtime", call, f"onnxruntime {ort.__version__}, float32, 1 thread, bound inputs and outputs")


def onnx_model(model: Stack) -> bytes:
    """The recipe's one-layer GRU model as an ONNX graph of one step: (token, h) -> (logits, h_next)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    embedding, gru, decoder = _members(model)
    hidden = gru.hidden_size

    def zrn(parameter: Tensor) -> NDArray[np.float32]:
        """ONNX orders the gates z, r, h."""
        r, z, n = parameter.detach().numpy().reshape(3, hidden, -1)
        return np.concatenate([z, r, n])

    constants = {
        "embedding": embedding.weight.detach().numpy(),
        "W": zrn(gru.weight_ih_l0)[None],
        "R": zrn(gru.weight_hh_l0)[None],
        "B": np.concatenate([zrn(gru.bias_ih_l0)[:, 0], zrn(gru.bias_hh_l0)[:, 0]])[None],
        "decoder": decoder.weight.detach().numpy(),
        "bias": decoder.bias.detach().numpy(),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "token"], ["x"]),
        helper.make_node(
            "GRU", ["x", "W", "R", "B", "", "h"], ["", "h_next"], hidden_size=hidden, linear_before_reset=1
        ),
        helper.make_node("Squeeze", ["h_next", "axis"], ["state"]),
        helper.make_node("Gemm", ["state", "decoder", "bias"], ["logits"], transB=1),
    ]
    constants["axis"] = np.array([0], np.int64)
    graph = helper.make_graph(
        nodes,
        "gru_step",
        [
            helper.make_tensor_value_info("token", TensorProto.INT64, [1, 1]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 1, hidden]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, decoder.out_features]),
            helper.make_tensor_value_info("h_next", TensorProto.FLOAT, [1, 1, hidden]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 9
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def measure(
    models: Mapping[str, Stack], programs: Mapping[str, Program], bits: Mapping[str, float], tokens: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Parity first, then one race of all engines over the same bytes, one thread, pinned, state moving.

    Args:
        models: the torch networks; ``"gru"`` is the dense one that the rivals play.
        programs: the same networks, compiled.
        bits: bits per character of each compiled network on ``tokens``.
        tokens: (T,) a text; the first ``PARITY_BYTES`` are compared, the first ``TIMED_BYTES`` timed.

    Returns:
        One row for each network and engine (docs/results.md).

    Raises:
        ParityError: an engine differs from torch by more than ``PARITY_BOUND``; nothing is timed then.
    """
    dense = models["gru"]
    opponents = [onnx_runtime(dense), torch_eager(dense), torch_int8(dense)]
    check = tokens[:PARITY_BYTES].tolist()
    expected = _torch_logits(dense, tokens[:PARITY_BYTES])
    rows: list[dict[str, Any]] = []
    players: dict[str, Any] = {}
    for key, program in programs.items():
        engine = Engine(program)
        worst = _teacher_forced(models[key], engine, check)
        rows.append(_row(key, "sparsefold", False, worst, bits[key], _settings(engine)))
        players[f"{key}/sparsefold"] = engine.stream().step
    for rival in opponents:
        logits = np.array([rival.call(token).copy() for token in tokens[:-1].tolist()])
        worst = float(np.abs(logits[:PARITY_BYTES] - expected).max())
        rows.append(_row("gru", rival.name, True, worst, _bits(logits, tokens[1:]), rival.settings))
        players[f"gru/{rival.name}"] = rival.call
    with pinned():
        latencies = race(players, tokens[:TIMED_BYTES].tolist(), rounds=20, warmup=500)
    for row in rows:
        row["latency_us"] = latencies[f"{row['network']}/{row['engine']}"].to_dict()
    return rows


def _row(key: str, engine: str, rival: bool, worst: float, bits: float, settings: str) -> dict[str, Any]:
    bound = None if engine == "torch int8" else PARITY_BOUND
    if bound is not None and not worst <= bound:
        raise ParityError(
            f"{engine} on {key} differs from torch by {worst:.2e} in a logit, the bound is {bound:.0e}: nothing is timed."
        )
    parity = {"max_abs_error": worst, "bound": bound, "against": "torch, float32", "bytes": PARITY_BYTES}
    return {
        "network": key,
        "engine": engine,
        "rival": rival,
        "bits_per_char": bits,
        "parity": parity,
        "settings": settings,
    }


def _settings(engine: Engine) -> str:
    return f"float32, {engine.isa}, 1 thread" + (", embedding folded" if engine.folded else "")


@torch.no_grad()
def _torch_logits(model: Stack, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[:, None])[0][:, 0].numpy()
    return logits


@torch.no_grad()
def _teacher_forced(model: Stack, engine: Engine, tokens: list[int]) -> float:
    """Largest difference of a logit, the engine's state set to torch's before every byte."""
    stream, state, worst = engine.stream(), None, 0.0
    for token in tokens:
        if state is not None:
            stream.load_state(_engine_state(state))
        logits, state, _ = model(torch.tensor([[token]]), state)
        worst = max(worst, float(np.abs(logits[0, 0].numpy() - stream.step(token)).max()))
    return worst


def _engine_state(state: StackState) -> dict[str, NDArray[np.float32]]:
    layer = state[1]
    if isinstance(layer, EGRUState):
        return {"1.h": layer.h[0, 0].numpy(), "1.y": layer.y[0, 0].numpy()}
    return {"1.h": layer[0, 0].numpy()}


def _bits(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    return float(loss) / float(np.log(2))
