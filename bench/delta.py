"""Delta networks on trained speech models of others: ``python bench/delta.py``.

NSNet2 (two GRU layers of 400 units) and the first half of DTLN (two LSTM layers of 128), both noise suppressors that give a
gain for each bin of a spectrum, are read from ``SPARSEFOLD_DATA/models``; nothing of them is trained or kept. Thresholds are
calibrated on pieces of a recording and checked on others of it. Then the recurrent layers alone play the latter: ours dense,
ours with changes, both in float32 and with int8 weights, and the rivals, who read everything; one pinned thread, all in turns,
Python call included. Errors are of the whole model whose recurrent layers alone are rounded or send changes, those of the
int8 rivals too.
"""

from __future__ import annotations

import argparse
import os
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sparsefold.bench import pinned, provenance, race, write_lines
from sparsefold.calibrate import Calibration, Loss, calibrate_delta
from sparsefold.engine import Engine, Stream
from sparsefold.formats import Dense, Precision
from sparsefold.nn import Stack
from sparsefold.program import GRU, LSTM, Linear, Program, Recurrent, ReLU
from sparsefold.recipes import rivals

FFT = 512
PIECE = 200  # spectra, of about two seconds
PARITY_STEPS = 20
PRECISIONS: tuple[Precision, ...] = ("f32", "i8")  # of weights whose products read changes
LOSSES = (0.01, 0.03)  # relative errors of the enhanced spectrum: 40 and 30 dB below it


@dataclass(frozen=True)
class Model:
    """A trained suppressor: its program up to the logits of the gains, hop of its spectra, and the features it reads."""

    name: str
    program: Program
    hop: int
    features: Callable[[NDArray[Any]], NDArray[np.float32]]  # of magnitudes (T, bins)


def data() -> Path:
    """The folder with models and recordings of others."""
    folder = os.environ.get("SPARSEFOLD_DATA")
    if not folder:
        raise FileNotFoundError(
            "set SPARSEFOLD_DATA to the folder that holds models/nsnet2, models/dtln, models/silero_vad."
        )
    return Path(folder)


def reordered(stacked: NDArray[Any], order: tuple[int, ...]) -> NDArray[np.float32]:
    """Gates of ONNX in our order."""
    gates = np.split(stacked, len(order))
    return np.ascontiguousarray(np.concatenate([gates[g] for g in order]), np.float32)


def recurrent(kind: type[Recurrent], w: NDArray[Any], r: NDArray[Any], b: NDArray[Any]) -> Any:
    """A layer from the tensors of an ONNX node: gates z, r, h of a GRU, and i, o, f, c of an LSTM."""
    order = (1, 0, 2) if kind is GRU else (0, 2, 3, 1)
    bias = np.split(b[0], 2)
    matrices = (Dense.from_dense(reordered(m[0], order), len(order)) for m in (w, r))
    return kind(*matrices, *(reordered(half, order) for half in bias))


def linear(weight: NDArray[Any], bias: NDArray[Any]) -> Linear:
    """From a weight (inputs, outputs)."""
    return Linear(Dense.from_dense(np.ascontiguousarray(weight.T, np.float32)), bias.astype(np.float32))


def nsnet2() -> Model:
    """Log power -> linear, two GRU layers, two linear layers with ReLU, logits of the gains."""
    folder = data() / "models/nsnet2"
    load = lambda name: np.load(folder / f"{name}.npy")  # noqa: E731
    layers = [recurrent(GRU, *(load(f"onnx__GRU_{n}") for n in names)) for names in ((184, 185, 186), (204, 205, 206))]
    first, *rest = (
        linear(load(f"onnx__MatMul_{n}"), load(f"fc{k}_bias")) for k, n in enumerate((166, 207, 208, 209), 1)
    )
    ops = first, *layers, rest[0], ReLU(600), rest[1], ReLU(600), rest[2]
    log_power = lambda m: np.log10(np.maximum(m.astype(np.float64) ** 2, 1e-12)).astype(np.float32)  # noqa: E731
    return Model("NSNet2", Program(ops), 160, log_power)


def dtln() -> Model:
    """Magnitudes -> two LSTM layers, logits of the gains: the first half of DTLN."""
    import onnx

    graph = onnx.load(data() / "models/dtln/model_1.onnx").graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    layers = [recurrent(LSTM, *(arrays[f"lstm_{k}_{n}"] for n in "WRB")) for k in (4, 5)]
    ops = *layers, linear(arrays["dense_2/kernel:0"], arrays["dense_2/bias:0"])
    return Model("DTLN, first half", Program(ops), 128, lambda m: m)


def recording() -> NDArray[np.float64]:
    """A minute of speech, 16 kHz."""
    with wave.open(str(data() / "models/silero_vad/test.wav")) as file:
        if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (16000, 2, 1):
            raise ValueError("the recording is one channel of 16 bits at 16 kHz.")
        return np.frombuffer(file.readframes(file.getnframes()), np.int16) / 2**15


def magnitudes(audio: NDArray[Any], hop: int) -> NDArray[np.float32]:
    """(T, 257): of windows of 512 samples."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, FFT)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(FFT), axis=1)).astype(np.float32)


def pieces(model: Model) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Magnitudes of the recording in pieces: every fourth to calibrate on, and those in the middle between them to check."""
    whole = magnitudes(recording(), model.hop)
    cut = [whole[k : k + PIECE] for k in range(0, len(whole) - PIECE + 1, PIECE)]
    return cut[::4], cut[2::4]


def spectrum_error(program: Program, model: Model, spectra: list[NDArray[np.float32]]) -> Loss:
    """The loss: of all that the gains leave, relative to what those of ``program`` leave."""

    def left(outputs: list[NDArray[Any]]) -> NDArray[np.float64]:
        gains = 0.5 * (1 + np.tanh(0.5 * np.concatenate(outputs).astype(np.float64)))
        found: NDArray[np.float64] = gains * np.concatenate(spectra)
        return found

    expected = left(played(program, model, spectra)[0])
    return lambda outputs: float(np.linalg.norm(left(outputs) - expected) / np.linalg.norm(expected))


def played(program: Program, model: Model, spectra: list[NDArray[np.float32]]) -> tuple[list[NDArray[Any]], Stream]:
    """Outputs for each piece, from the beginning, and the stream that counted."""
    stream, outputs = Engine(program).stream(), []
    for m in spectra:
        stream.reset()
        outputs.append(stream.run(model.features(m)))
    return outputs, stream


def calibrated(model: Model, max_loss: float, weights: Precision = "f32") -> tuple[Calibration, float, Stream]:
    """(what calibration found, the loss on what it has not heard, the stream that played that).

    ``max_loss`` is by how much the loss may rise above what rounding costs.
    """
    sample, others = pieces(model)
    loss, program = spectrum_error(model.program, model, sample), layers_rounded(model.program, weights)
    found = calibrate_delta(program, [model.features(m) for m in sample], loss, max_loss)
    outputs, stream = played(found.program, model, others)
    return found, spectrum_error(model.program, model, others)(outputs), stream


def layers_rounded(program: Program, weights: Precision) -> Program:
    """The program with rounded recurrent layers; all others stay."""
    ops = zip(program.ops, program.rounded(weights).ops, strict=True)
    return Program(tuple(new if isinstance(old, Recurrent) else old for old, new in ops))


def losses_of(model: Model, outputs: Callable[[list[NDArray[np.float32]]], list[NDArray[Any]]]) -> dict[str, float]:
    """Losses of outputs for each piece: of those that are calibrated on, and of the others."""
    sample, others = (spectrum_error(model.program, model, m)(outputs(m)) for m in pieces(model))
    return {"loss": sample, "loss_checked": others}


def played_by(make: Callable[[], rivals.Rival], model: Model, spectra: list[NDArray[np.float32]]) -> list[NDArray[Any]]:
    """Outputs of the model for each piece, its recurrent layers being played by a rival that is made anew each time."""
    ops, outputs = model.program.ops, []
    first, layers = layers_alone(model.program)
    rest = Program(ops[first + len(layers.ops) :])
    for m in spectra:
        x, call = model.features(m), make().call
        if first:
            x = Engine(Program(ops[:first])).stream().run(x)
        outputs.append(Engine(rest).stream().run(np.array([call(v).copy() for v in x])))
    return outputs


def layers_alone(program: Program) -> tuple[int, Program]:
    """(the first recurrent op, the recurrent layers as a program)."""
    first = next(i for i, op in enumerate(program.ops) if isinstance(op, Recurrent))
    return first, Program(tuple(op for op in program.ops if isinstance(op, Recurrent)))


def opponents(program: Program, inputs: NDArray[np.float32]) -> dict[str, tuple[Callable[[], rivals.Rival], float]]:
    """Every rival on the dense recurrent layers: (what makes it, its largest difference from the engine; int8 may differ)."""
    op = program.ops[0]
    kind = torch.nn.GRU if isinstance(op, GRU) else torch.nn.LSTM
    module = kind(op.inputs, op.outputs, len(program.ops))
    with torch.no_grad():
        for k, layer in enumerate(program.ops):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                value = getattr(layer, name)
                array = value if isinstance(value, np.ndarray) else value.to_dense()
                getattr(module, f"{name}_l{k}").copy_(torch.from_numpy(array.copy()))
    model = Stack(module).eval()
    made = [
        partial(make, model) for make in (rivals.onnx_runtime, rivals.openvino, rivals.torch_eager, rivals.torch_int8)
    ]
    if kind is torch.nn.LSTM:
        made.append(partial(rivals.onnx_runtime, model, int8=True))
    expected = Engine(program).stream().run(inputs[:PARITY_STEPS])
    found: dict[str, tuple[Callable[[], rivals.Rival], float]] = {}
    for make in made:
        rival = make()
        error = float(np.abs(np.array([rival.call(x).copy() for x in inputs[:PARITY_STEPS]]) - expected).max())
        if error > 1e-4 and "int8" not in rival.name:
            raise RuntimeError(f"{rival.name} is {error:.1e} off: nothing is timed.")
        found[rival.name] = make, error
    return found


def measure(model: Model, losses: Sequence[float] = LOSSES) -> list[dict[str, Any]]:
    """One model: calibrated for every loss, then one race of its recurrent layers over all that was not heard."""
    first, dense = layers_alone(model.program)
    _, others = pieces(model)
    features = np.concatenate([model.features(m) for m in others])
    inputs = Engine(Program(model.program.ops[:first])).stream().run(features) if first else features
    against = opponents(dense, inputs)
    playing = {name: make() for name, (make, _) in against.items()}
    programs: dict[str, Program] = {"ours, dense": dense, "ours, dense, w8a8": dense.rounded("w8a8")}
    found = {}
    for weights in PRECISIONS:
        for loss in losses:
            name = f"ours, changes, loss {loss:.0%}" + f", {weights}" * (weights != "f32")
            found[name] = calibrated(model, loss, weights)
            programs[name] = layers_alone(found[name][0].program)[1]
    streams = {name: Engine(program).stream() for name, program in programs.items()}
    players = {n: s.step for n, s in streams.items()} | {n: r.call for n, r in playing.items()}
    with pinned():
        times = race(players, list(inputs), rounds=10, warmup=50)
    fastest = {
        kind: min(times[n].p50 for n in against if ("int8" in n) == (kind == "int8")) for kind in ("f32", "int8")
    }
    lines = []
    for name in players:
        line: dict[str, Any] = {"model": model.name, "engine": name, "latency_us": times[name].to_dict()}
        line |= {"units": dense.outputs, "layers": len(dense.ops), "cell": dense.ops[0].kind}
        line |= {f"ratio_to_fastest_{kind}": time / times[name].p50 for kind, time in fastest.items()}
        line["ratio_to_dense"] = times["ours, dense"].p50 / times[name].p50
        if name in found:
            calibration, checked, stream = found[name]
            line |= {"loss": calibration.loss, "loss_checked": checked}
            line |= {"sample_steps": calibration.steps, "checked_steps": stream.counters.steps}
            line["sent"] = calibration.program.metadata["delta"]["sent"]
        if "w8a8" in name:
            line |= losses_of(model, lambda m: played(layers_rounded(model.program, "w8a8"), model, m)[0])
        if "int8" in name:
            line |= losses_of(model, partial(played_by, against[name][0], model))
        if name in streams:
            counts, total = streams[name].counters, streams[name].cost
            rates = [counts.read_rate(i, role) for i in range(len(dense.ops)) for role in ("input", "recurrent")]
            line |= {"event_rates": rates, "cost": total.to_dict(), "settings": f"{streams[name].engine.isa}, 1 thread"}
        else:
            error = against[name][1]
            line["settings"] = f"{playing[name].settings}, largest difference from the engine {error:.1e}"
        lines.append(line)
    return lines


def main() -> None:
    """Runs both models and writes bench/results/<machine>/delta-<date>-<commit>.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = provenance("python bench/delta.py")
    lines = []
    with threadpool_limits(1):
        for make in (nsnet2, dtln):
            lines += measure(make())
    for e in lines:
        quality = f", loss {e['loss']:.3f}, checked {e['loss_checked']:.3f}" if "loss" in e else ""
        macs = f", {e['cost']['macs_effective']:,.0f} MACs" if "cost" in e else ""
        print(
            f"{e['model']:<18}{e['engine']:<28}{e['latency_us']['p50']:>9.2f} us{e['ratio_to_fastest_f32']:>7.2f}x of "
            f"float32{e['ratio_to_fastest_int8']:>7.2f}x of int8{macs}{quality}"
        )
    print(write_lines(args.out, "delta-", about, lines))


if __name__ == "__main__":
    main()
