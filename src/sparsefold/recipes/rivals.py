"""Other engines on the same work: a dense GRU or LSTM, one step at a time, one thread, state moving.

Each rival is a callable that plays one step, a token id or float32 (I,) to float32 (O,), and keeps its own state, at the best
settings known to us.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsefold.bench import pinned, race
from sparsefold.engine import Engine, interpret
from sparsefold.nn import EGRUState, Stack, StackState
from sparsefold.program import Program

Input = Any  # a token id in front of an embedding, otherwise float32 (I,)
Call = Callable[[Input], NDArray[np.float32]]

OWN = "sparsefold"  # in float32; with rounded weights the name of the precision follows
PARITY_BYTES = 512
PARITY_BOUND = 1e-4  # largest difference of a logit; float32 sums over 1024 units differ in order
ROUNDED_BYTES = 64
ROUNDED_BOUND = 2e-2  # the int8 code of an input may be one more: 1/127 of the largest, times a weight of the decoder
TIMED_BYTES = 6_000


class ParityError(FloatingPointError):
    """An engine that disagrees with its reference."""


class Rival(NamedTuple):
    """A name for tables, the call that plays one byte, and the settings it runs with."""

    name: str
    call: Call
    settings: str


def torch_eager(model: Stack) -> Rival:
    """The model as torch plays it step by step: cells (a quarter faster than ``nn.GRU`` at 256 units), ``inference_mode``."""
    return Rival("torch eager", _step_by_step(model, _cells(model)), "cells, float32, inference_mode, 1 thread")


def torch_int8(model: Stack) -> Rival:
    """``torch.ao.quantization.quantize_dynamic`` on the same cells: int8 weights, activations quantised per call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this module will move; it is the rival all the same
        quantize: Any = torch.ao.quantization.quantize_dynamic
        kinds = {torch.nn.GRUCell, torch.nn.LSTMCell, torch.nn.Linear}
        quantized = quantize(torch.nn.ModuleList(_cells(model)), kinds, dtype=torch.qint8)
    settings = f"quantize_dynamic, {torch.backends.quantized.engine}, inference_mode, 1 thread"
    return Rival("torch int8", _step_by_step(model, list(quantized)), settings)


def onnx_runtime(model: Stack, int8: bool = False) -> Rival:
    """ONNX Runtime: one session, one thread, inputs and outputs bound once, two sets of state buffers in turn.

    ``int8``: its own dynamic quantisation, which has LSTM, Gemm and Gather but no GRU.
    """
    ort = _rival_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    graph = _quantized(onnx_model(model)) if int8 else onnx_model(model)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    buffers = {i.name: np.zeros(i.shape, _NUMPY[i.type]) for i in session.get_inputs()}
    spare = {f"{name}_next": np.zeros_like(array) for name, array in buffers.items() if name != "x"}
    outputs = {o.name: np.zeros(o.shape, np.float32) for o in session.get_outputs() if o.name == "y"}
    bindings = []
    for turn in range(2):
        binding = session.io_binding()
        for name, array in buffers.items():
            source = spare[f"{name}_next"] if turn and name != "x" else array
            binding.bind_input(name, "cpu", 0, source.dtype, source.shape, source.ctypes.data)
        for name, array in (outputs | spare).items():
            target = buffers[name.removesuffix("_next")] if turn and name != "y" else array
            binding.bind_output(name, "cpu", 0, np.float32, target.shape, target.ctypes.data)
        bindings.append(binding)
    turn = 0
    play = session.run_with_iobinding
    x, y = buffers["x"].reshape(-1), outputs["y"].reshape(-1)

    def call(value: Input, keep: Any = (buffers, spare)) -> NDArray[np.float32]:
        nonlocal turn  # `keep`: the bindings hold bare addresses of the states
        x[:] = value
        play(bindings[turn])
        turn ^= 1
        return y

    bits = "" if _multiplies_codes() else ", 7-bit weights"
    kind = f"int8 (quantize_dynamic{bits})" if int8 else "float32"
    settings = f"onnxruntime {ort.__version__}, {kind}, 1 thread, bound inputs and outputs"
    return Rival("ONNX Runtime int8" if int8 else "ONNX Runtime", call, settings)


def openvino(model: Stack) -> Rival:
    """OpenVINO, float32: one compiled model, latency hint, one stream, one thread, one request with its own tensors."""
    ov = _rival_module("openvino")
    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(core.read_model(onnx_model(model)), "CPU", options).create_infer_request()
    inputs = {i.any_name: request.get_tensor(i).data for i in request.model_inputs}
    outputs = {o.any_name: request.get_tensor(o).data for o in request.model_outputs}
    for array in inputs.values():
        array[...] = 0
    x = inputs["x"].reshape(-1)
    y: NDArray[np.float32] = outputs["y"].reshape(-1)
    states = [(inputs[name], outputs[f"{name}_next"]) for name in inputs if name != "x"]
    infer = request.infer
    _KEPT.append(request)

    def call(value: Input) -> NDArray[np.float32]:
        x[:] = value
        infer()
        for now, after in states:
            now[...] = after
        return y

    return Rival(
        "OpenVINO", call, f"openvino {ov.__version__.split('-')[0]}, float32, latency hint, 1 thread, 1 stream"
    )


# A compiled model takes the thread's stack for signals and gives it back when it goes. Of two that do not go in reverse order
# the thread is left with one that is no more, and the next signal, a Ctrl-C, would end the process: so none goes.
_KEPT: list[Any] = []

_NUMPY = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


def _rival_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"this rival needs {name}: pip install 'sparsefold[bench]'.") from error


def _members(model: Stack) -> tuple[Any, Any, Any]:
    """(Embedding or None, GRU or LSTM, Linear or None)."""
    modules: list[Any] = list(model)
    embedding = modules.pop(0) if isinstance(modules[0], torch.nn.Embedding) else None
    decoder = modules.pop() if isinstance(modules[-1], torch.nn.Linear) else None
    if not modules or not all(
        type(m) is type(modules[0]) and isinstance(m, torch.nn.GRU | torch.nn.LSTM) for m in modules
    ):
        raise ValueError("the rivals play an Embedding or none, torch.nn.GRUs or LSTMs, and a Linear or none.")
    recurrent = modules[0] if len(modules) == 1 else _joined(modules)
    if recurrent.bidirectional or not recurrent.bias or getattr(recurrent, "proj_size", False):
        raise ValueError("the rivals play recurrent layers of one direction, with biases and without projection.")
    return embedding, recurrent, decoder


def _joined(layers: list[Any]) -> Any:
    """One module of several layers for modules of one layer each."""
    units = layers[0].hidden_size
    if any(m.num_layers != 1 or m.hidden_size != units for m in layers) or any(
        m.input_size != units for m in layers[1:]
    ):
        raise ValueError(
            "the rivals play recurrent modules in a row where each is one layer of as many units as the others."
        )
    kind = torch.nn.GRU if isinstance(layers[0], torch.nn.GRU) else torch.nn.LSTM
    joined = kind(layers[0].input_size, units, len(layers))
    named = {f"{name.removesuffix('_l0')}_l{k}": p for k, m in enumerate(layers) for name, p in m.state_dict().items()}
    joined.load_state_dict(named)
    return joined.eval()


def _cells(model: Stack) -> list[Any]:
    """One torch cell for each recurrent layer, and the decoder where there is one."""
    _, recurrent, decoder = _members(model)
    cell = torch.nn.GRUCell if isinstance(recurrent, torch.nn.GRU) else torch.nn.LSTMCell
    cells: list[Any] = []
    for k in range(recurrent.num_layers):
        cells.append(cell(recurrent.input_size if k == 0 else recurrent.hidden_size, recurrent.hidden_size))
        layer = {n: v for n, v in recurrent.state_dict().items() if n.endswith(f"_l{k}")}
        cells[-1].load_state_dict({name.removesuffix(f"_l{k}"): value for name, value in layer.items()})
    return [c.eval() for c in (*cells, *([decoder] if decoder else []))]


def _step_by_step(model: Stack, cells: list[Any]) -> Call:
    embedding, recurrent, decoder = _members(model)
    last = cells.pop() if decoder else None
    zero = torch.zeros(1, recurrent.hidden_size)
    lstm = isinstance(recurrent, torch.nn.LSTM)
    states: list[Any] = [(zero, zero) if lstm else zero for _ in cells]
    token = torch.zeros(1, dtype=torch.long)

    @torch.inference_mode()
    def call(value: Input) -> NDArray[np.float32]:
        if embedding is None:
            x = torch.from_numpy(value)[None]
        else:
            token[0] = value
            x = embedding(token)
        for k, cell in enumerate(cells):
            states[k] = cell(x, states[k])
            x = states[k][0] if lstm else states[k]
        y: NDArray[np.float32] = (last(x) if last else x)[0].numpy()
        return y

    return call


def _quantized(graph: bytes) -> bytes:
    """The graph after ONNX Runtime's dynamic quantisation."""
    quantization = _rival_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ready, after = (Path(folder) / f"{name}.onnx" for name in ("f32", "ready", "i8"))
        before.write_bytes(graph)
        _rival_module("onnxruntime.quantization.shape_inference").quant_pre_process(
            before,
            ready,
            skip_symbolic_shape=True,  # every shape of this graph is a number
        )
        # Where it multiplies codes by vpmaddubsw, two products of 8 bits do not fit the 16 of their sum: its makers ask for 7.
        quantization.quantize_dynamic(
            ready, after, weight_type=quantization.QuantType.QInt8, reduce_range=not _multiplies_codes()
        )
        return after.read_bytes()


def _multiplies_codes() -> bool:
    """Whether the processor has instructions for products of int8 codes that no sum overflows."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told.get("architecture") != "x86_64" or bool(told.get("avx512_vnni") or told.get("avx_vnni"))


def onnx_model(model: Stack) -> bytes:
    """The model as an ONNX graph of one step: x and the states of every layer -> y and the next states."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    embedding, recurrent, decoder = _members(model)
    hidden, lstm = recurrent.hidden_size, isinstance(recurrent, torch.nn.LSTM)
    order = (0, 3, 1, 2) if lstm else (1, 0, 2)  # torch's gates i f g o and r z n; ONNX's i o f g and z r n
    constants: dict[str, NDArray[Any]] = {"axis": np.array([0], np.int64)}
    value = helper.make_tensor_value_info

    def reordered(parameter: Tensor) -> NDArray[np.float32]:
        gates = parameter.detach().numpy().reshape(len(order), hidden, -1)
        return np.concatenate([gates[g] for g in order])

    inputs, outputs, nodes = [], [], []
    x = "x"
    if embedding is None:
        inputs.append(value("x", TensorProto.FLOAT, [1, 1, recurrent.input_size]))
    else:
        inputs.append(value("x", TensorProto.INT64, [1, 1]))
        constants["embedding"] = embedding.weight.detach().numpy()
        nodes.append(helper.make_node("Gather", ["embedding", "x"], ["embedded"]))
        x = "embedded"
    for k in range(recurrent.num_layers):
        weights = {
            n: reordered(getattr(recurrent, f"{n}_l{k}")) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        biases = np.concatenate([weights["bias_ih"][:, 0], weights["bias_hh"][:, 0]])
        constants |= {f"W{k}": weights["weight_ih"][None], f"R{k}": weights["weight_hh"][None], f"B{k}": biases[None]}
        names = [f"h{k}", f"c{k}"] if lstm else [f"h{k}"]
        for name in names:
            inputs.append(value(name, TensorProto.FLOAT, [1, 1, hidden]))
            outputs.append(value(f"{name}_next", TensorProto.FLOAT, [1, 1, hidden]))
        options: dict[str, Any] = {} if lstm else {"linear_before_reset": 1}
        after = [f"{name}_next" for name in names]
        nodes.append(
            helper.make_node(
                "LSTM" if lstm else "GRU", [x, f"W{k}", f"R{k}", f"B{k}", "", *names], ["", *after],
                hidden_size=hidden, **options,
            )
        )  # fmt: skip
        x = after[0]
    nodes.append(helper.make_node("Squeeze", [x, "axis"], ["state" if decoder else "y"]))
    if decoder:
        constants |= {"decoder": decoder.weight.detach().numpy(), "bias": decoder.bias.detach().numpy()}
        nodes.append(helper.make_node("Gemm", ["state", "decoder", "bias"], ["y"], transB=1))
    outputs.insert(0, value("y", TensorProto.FLOAT, [1, decoder.out_features if decoder else hidden]))
    stored = [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "step", inputs, outputs, stored), opset_imports=[helper.make_opsetid("", 17)]
    )
    proto.ir_version = 9
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def measure(
    models: Mapping[str, Stack],
    programs: Mapping[tuple[str, str], Program],
    bits: Mapping[tuple[str, str], float],
    tokens: NDArray[np.int64],
) -> list[dict[str, Any]]:
    """Parity first, then one race of all engines over the same bytes, one thread, pinned, state moving.

    Args:
        models: the torch networks; the rivals play those whose layer is a ``torch.nn.GRU`` or LSTM.
        programs: (network, name of the engine) -> the network compiled.
        bits: bits per character of each of these on ``tokens``.
        tokens: (T,) a text; the first ``PARITY_BYTES`` are compared, the first ``TIMED_BYTES`` timed.

    Returns:
        One row for each network and engine (docs/results.md). A float32 rival's bits are its network's: its logits were
        compared. An int8 rival plays the whole text.

    Raises:
        ParityError: an engine differs from its reference by more than its bound; nothing is timed then.
    """
    check = tokens[:PARITY_BYTES].tolist()
    rows: list[dict[str, Any]] = []
    players: dict[str, Any] = {}
    bound: float | None
    for (key, name), program in programs.items():
        engine = Engine(program)
        rounded = name != OWN
        worst = _off_its_file(program, tokens) if rounded else teacher_forced(models[key], engine, check)
        bound = ROUNDED_BOUND if rounded else PARITY_BOUND
        rows.append(_row(key, name, worst, bound, bits[key, name], _settings(engine, name)))
        players[f"{key}/{name}"] = engine.stream().step
    for key, model in models.items():
        if not isinstance(model[1], torch.nn.GRU | torch.nn.LSTM):
            continue
        expected = _torch_logits(model, tokens[:PARITY_BYTES])
        for rival in (onnx_runtime(model), openvino(model), torch_eager(model), torch_int8(model)):
            int8 = rival.name.endswith("int8")
            played = tokens[:-1] if int8 else tokens[:PARITY_BYTES]
            logits = np.array([rival.call(token).copy() for token in played.tolist()])
            worst = float(np.abs(logits[:PARITY_BYTES] - expected).max())
            quality = _bits(logits, tokens[1:]) if int8 else bits[key, OWN]
            bound = None if int8 else PARITY_BOUND
            rows.append(_row(key, rival.name, worst, bound, quality, rival.settings))
            players[f"{key}/{rival.name}"] = rival.call
    with pinned():
        latencies = race(players, tokens[:TIMED_BYTES].tolist(), rounds=20, warmup=500)
    for row in rows:
        row["latency_us"] = latencies[f"{row['network']}/{row['engine']}"].to_dict()
    return rows


def _row(key: str, engine: str, worst: float, bound: float | None, bits: float, settings: str) -> dict[str, Any]:
    ours = engine.startswith(OWN)
    rounded = ours and engine != OWN
    reference, compared = ("its own file, float64", ROUNDED_BYTES) if rounded else ("torch, float32", PARITY_BYTES)
    if bound is not None and not worst <= bound:
        raise ParityError(
            f"{engine} on {key} differs from {reference.partition(',')[0]} by {worst:.2e} in a logit, the bound is {bound:.0e}: "
            "nothing is timed."
        )
    parity = {"max_abs_error": worst, "bound": bound, "against": reference, "bytes": compared}
    return {
        "network": key,
        "engine": engine,
        "rival": not ours,
        "bits_per_char": bits,
        "parity": parity,
        "settings": settings,
    }


def _settings(engine: Engine, name: str) -> str:
    precision = name.removeprefix(OWN).strip() or "float32"
    return f"{precision}, {engine.isa}, 1 thread" + (", embedding folded" if engine.folded else "")


@torch.no_grad()
def _torch_logits(model: Stack, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[:, None])[0][:, 0].numpy()
    return logits


@torch.no_grad()
def teacher_forced(model: Stack, engine: Engine, tokens: list[int]) -> float:
    """Largest difference of a logit from torch's, the engine's state set to torch's before every byte."""
    stream, state, worst = engine.stream(), None, 0.0
    for token in tokens:
        if state is not None:
            stream.load_state(_engine_state(state))
        logits, state, _ = model(torch.tensor([[token]]), state)
        worst = max(worst, float(np.abs(logits[0, 0].numpy() - stream.step(token)).max()))
    return worst


def _off_its_file(program: Program, tokens: NDArray[np.int64]) -> float:
    """Largest difference of a logit from what the file says in float64, the engine's state set to that before every byte."""
    stream, state, worst = Engine(program).stream(), None, 0.0
    for token in tokens[:ROUNDED_BYTES].tolist():
        if state is not None:
            stream.load_state(state)
        seen = interpret(program, [token], state)
        worst = max(worst, float(np.abs(stream.step(token) - seen.outputs[0]).max()))
        state = {name: value.astype(np.float32) for name, value in seen.state.items()}
    return worst


def _engine_state(state: StackState) -> dict[str, NDArray[np.float32]]:
    """What the engine names the states of a Stack whose recurrent modules have one layer each."""
    found: dict[str, NDArray[np.float32]] = {}
    for i, layer in enumerate(state):
        if isinstance(layer, EGRUState):
            found |= {f"{i}.h": layer.h[0, 0].numpy(), f"{i}.y": layer.y[0, 0].numpy()}
        elif isinstance(layer, tuple):  # an LSTM's
            found |= {f"{i}.h": layer[0][0, 0].numpy(), f"{i}.c": layer[1][0, 0].numpy()}
        elif layer is not None:
            found[f"{i}.h"] = layer[0, 0].numpy()
    return found


def _bits(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    return float(loss) / float(np.log(2))
