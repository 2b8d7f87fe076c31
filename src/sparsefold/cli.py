"""The command line. Commands that train or compile import torch when they are called, not before."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsefold.bench import Latency, pinned, time_calls
from sparsefold.engine import Engine, Stream
from sparsefold.formats import VALUE_TYPES
from sparsefold.program import Embedding, Program, ProgramError, matrices
from sparsefold.progress import Progress

SAMPLE_BYTES = 20_000  # of a text, played to count events before formats are chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``sparsefold``. Returns the exit status: 0, 2 for wrong input, 130 when interrupted."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    if args.command is _train:  # argparse does not look for key=value words behind an option
        args.overrides += [word for word in words if not word.startswith("-")]
        words = [word for word in words if word.startswith("-")]
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        args.command(args)
    except KeyboardInterrupt as stop:
        print(f"\nsparsefold: {str(stop) or 'interrupted.'}", file=sys.stderr)
        if resume := getattr(args, "resume", None):
            print(f"Run the same command again to go on: {shlex.join(resume(args))}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
        return 0
    except (ValueError, ImportError, FloatingPointError) as error:
        print(f"sparsefold: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name = error.filename2 or error.filename  # of a renaming, what the user asked for
        print(f"sparsefold: {f'{name}: ' if name else ''}{error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsefold", description="Recurrent networks that are sparse twice.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(command=function)
        return sub

    demo = add("demo", _demo, "Train, compile, play and measure the demonstration; writes runs/demo.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: runs/demo)")
    demo.add_argument("--fresh", action="store_true", help="throw away what an earlier run left there")
    demo.add_argument("--steps", type=int, default=None, help="training steps of each network")
    demo.add_argument("--full", action="store_true", help="more densities, a sparse decoder, more seeds: longer")
    demo.set_defaults(
        resume=lambda a: [
            "sparsefold", "demo", "--out", str(a.out), *["--full"] * a.full,
            *(["--steps", str(a.steps)] if a.steps is not None else []),
        ]
    )  # fmt: skip

    train = add("train", _train, "Train a recipe, or resume it: sparsefold train text steps=2000 density=0.25")
    train.add_argument("recipe", nargs="?", default="", help="name of a recipe: text")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings; --list shows all")
    train.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/RECIPE)")
    train.add_argument(
        "--list", action="store_true", help="print the recipe's settings (without one: the recipes) and stop"
    )
    train.set_defaults(resume=lambda a: ["sparsefold", "train", a.recipe, *a.overrides, "--out", str(_train_folder(a))])

    compile_ = add("compile", _compile, "Compile a checkpoint (or the folder of a run) to one .sfold file.")
    compile_.add_argument("checkpoint", type=Path)
    compile_.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    compile_.add_argument("--sample", type=Path, metavar="FILE", help="text whose events are counted to choose formats")
    compile_.add_argument("--tune", action="store_true", help="time every format on this processor")
    compile_.add_argument("--weights", choices=list(VALUE_TYPES), default="f32", help="precision of the matrices")

    compile_.add_argument(
        "--delta",
        type=float,
        metavar="THRESHOLD",
        help="GRU, LSTM and RNN layers send changes above it, and nothing else",
    )

    calibrate = add("calibrate", _calibrate, "Find thresholds of changes that a compiled GRU, LSTM or RNN bears.")
    calibrate.add_argument("file", type=Path)
    calibrate.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    calibrate.add_argument(
        "--sample", type=Path, required=True, metavar="FILE",
        help="a text, for a byte-level text model; or a .npy file of token ids (T,) or values (T, I), also (B, T, I)",
    )  # fmt: skip
    calibrate.add_argument(
        "--max-loss", type=float, default=0.01,
        help="bits per character that a text may cost more; of a .npy, the relative error of the outputs (default: 0.01)",
    )  # fmt: skip

    prune = add("prune", _prune, "Prune a checkpoint at once: safetensors, or a torch file without code in it.")
    prune.add_argument("checkpoint", type=Path, metavar="CKPT")
    prune.add_argument("--rules", type=Path, required=True, metavar="FILE", help="TOML: a table for each name pattern")
    prune.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="may be CKPT itself")
    prune.add_argument("--png", type=Path, default=None, metavar="FILE", help="draw the masks")

    run = add("run", _run, "Generate text with a compiled model, as a stream.")
    run.add_argument("file", type=Path)
    run.add_argument("--prompt", default="\n", help="text to start from")
    run.add_argument("--length", type=int, default=400, help="bytes to generate")
    run.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest byte")
    run.add_argument("--seed", type=int, default=0)

    eval_ = add("eval", _eval, "Quality, event rates, cost and time of a compiled model on a text.")
    eval_.add_argument("file", type=Path)
    eval_.add_argument(
        "--text", type=Path, default=None, help="text file (default: the test split it was trained beside)"
    )
    eval_.add_argument("--json", action="store_true", help="print JSON")

    inspect = add("inspect", _inspect, "What a .sfold file holds: ops, formats, sizes, where it comes from.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--png", type=Path, default=None, metavar="FILE", help="draw which weights each matrix holds")

    export = add("export-c", _export_c, "Write a .sfold file as one self-contained C99 file and its header.")
    export.add_argument("file", type=Path)
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made when it is missing")
    export.add_argument("--name", default=None, help="prefix of all names (default: the file's name)")
    export.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one table instead of embedding and first input product (default: where it is smaller)",
    )

    bench = add("bench", _bench, "Latency of one step of a compiled model: p50 and p99, on every instruction set.")
    bench.add_argument("file", type=Path)
    bench.add_argument("--steps", type=int, default=5000)
    bench.add_argument("--isa", default=None, help="only this instruction set")

    report = add("report", _report, "Print the table of a demo's summary.json, or write its HTML report.")
    report.add_argument("summary", type=Path)
    report.add_argument("-o", "--output", type=Path, default=None, metavar="HTML")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("this command needs torch: pip install 'sparsefold[train]'.") from error


def _demo(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.recipes.demo import DemoError, demo
    from sparsefold.recipes.rivals import ParityError

    try:
        demo(args.out, fresh=args.fresh, steps=args.steps, full=args.full)
    except (DemoError, ParityError) as error:
        raise SystemExit(f"sparsefold: {error}") from error


def _recipe(name: str) -> Any:
    _need_torch()
    from sparsefold.recipes import RECIPES

    if name not in RECIPES:
        what = f"there is no recipe {name!r}" if name else "name the recipe to train"
        raise ValueError(f"{what}. Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]


def _train_folder(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / str(args.recipe)


def _train(args: argparse.Namespace) -> None:
    if args.list and not args.recipe:
        _need_torch()
        from sparsefold.recipes import RECIPES

        for name, module in RECIPES.items():
            print(f"{name:<10} {(module.__doc__ or '').partition(chr(10))[0]}")
        return
    recipe = _recipe(args.recipe)
    from dataclasses import asdict

    from sparsefold.program import write_atomically
    from sparsefold.recipes._config import override

    config = override(recipe.Config(), args.overrides)
    if args.list:
        for key, value in asdict(config).items():
            print(f"{key}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return
    folder = _train_folder(args)
    summary = recipe.run(config, folder, args.recipe)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    print(
        f"{summary['valid_bits_per_char']:.4f} bits per character on the validation split "
        f"(step {summary['best_step']} of {summary['steps']}, {summary['seconds']:.0f} s). "
        f"Compile it: sparsefold compile {folder} -o {args.recipe}.sfold"
    )


def _compile(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.lowering import compile_model
    from sparsefold.recipes._loop import read_checkpoint

    best = args.checkpoint / "best.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    _, facts = read_checkpoint(best)
    model, facts = _recipe(facts["about"]["recipe"]).load(best)
    about = facts["about"] | {"training": facts["progress"]}
    sample = None
    if args.sample:
        from sparsefold.data.text import encode

        sample = encode(args.sample.read_bytes()[:SAMPLE_BYTES], about["vocabulary"])
    program = compile_model(model, about, args.weights, sample=sample, tune=args.tune, delta=args.delta)
    program.save(args.output)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    print(_ops_table(program))


def _calibrate(args: argparse.Namespace) -> None:
    from sparsefold.calibrate import calibrate_delta

    program, loss = _load(args.file), None
    if args.sample.suffix == ".npy":
        try:
            sample = np.load(args.sample, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{args.sample} is not an array that numpy.save wrote ({error}).") from error
    else:
        from sparsefold.data.text import encode

        sample = encode(args.sample.read_bytes()[:SAMPLE_BYTES], _vocabulary(program, args.file))
        if len(sample) < 2:
            raise ValueError(f"{args.sample} has {len(sample)} bytes; at least 2 are needed.")

        def loss(outputs: list[NDArray[np.float32]]) -> float:
            return _bits(outputs[0][:-1], sample[1:]) / (len(sample) - 1)

    found = calibrate_delta(program, sample, loss, args.max_loss)
    found.program.save(args.output)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    print(found)


def _prune(args: argparse.Namespace) -> None:
    _need_torch()
    import tomllib
    import warnings

    from sparsefold.program import write_atomically
    from sparsefold.sparsify import Pruner, read_rules

    try:
        rules = read_rules(tomllib.loads(args.rules.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.rules} is not TOML: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{args.rules}: {error}") from error
    tensors, encoded = _read_tensors(args.checkpoint)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        pruner = Pruner(tensors, rules)
    pruner.step()
    write_atomically(args.output, encoded())
    for note in notes:
        print(f"sparsefold: {note.message}", file=sys.stderr)
    print(pruner.summary())
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, zeros stored; compiling drops them.")
    if args.png:
        masks = {name: mask.flatten(1).numpy() for name, mask in pruner.masks.items()}
        _draw_patterns(args.png, {name: (mask, pruner.gates[name]) for name, mask in masks.items()})


def _read_tensors(path: Path) -> tuple[dict[str, Any], Any]:
    """Named tensors of a checkpoint, and a function that gives the file's bytes with whatever they then hold."""
    import io
    import pickle
    import warnings

    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
        return tensors, lambda: save(tensors, metadata)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what other programs' pickles look like
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; code in it is not run. Save the model's state_dict() instead."
        ) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # as damage may have it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is neither a safetensors nor a torch file: {reason}.") from error

    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {name: t for key, v in value.items() for name, t in flat(f"{prefix}.{key}", v).items()}
        return {prefix[1:]: value} if isinstance(value, torch.Tensor) else {}

    def encoded() -> bytes:
        torch.save(loaded, buffer := io.BytesIO())
        return buffer.getvalue()

    return flat("", loaded), encoded


def _draw_patterns(path: Path, matrices: dict[str, tuple[NDArray[np.bool_], int]]) -> None:
    from sparsefold._figures import patterns
    from sparsefold.program import write_atomically

    if not matrices:
        raise ValueError("there is no matrix to draw.")
    write_atomically(path, patterns(matrices))
    print(f"{path}: {path.stat().st_size:,} bytes")


def _load(file: Path) -> Program:
    try:
        return Program.load(file)
    except ProgramError as error:
        raise ValueError(f"{file}: {error}.") from error


def _vocabulary(program: Program, file: Path) -> list[int]:
    vocabulary = program.metadata.get("vocabulary")
    if (
        not isinstance(vocabulary, list)
        or not all(type(b) is int and 0 <= b < 256 for b in vocabulary)
        or not program.takes_tokens
        or not program.inputs == program.outputs == len(vocabulary) + 1
    ):
        raise ValueError(
            f"{file} is not a byte-level text model: its metadata names no vocabulary that fits its sizes."
        )
    return list(vocabulary)


def sample(logits: NDArray[np.float32], temperature: float, random: np.random.Generator) -> int:
    """A token drawn from softmax(logits / temperature), never the last one (unknown); the likeliest at temperature 0."""
    known = logits[:-1].astype(np.float64)
    if temperature == 0:
        return int(known.argmax())
    with np.errstate(over="ignore"):  # a very low temperature: exp(-inf) is the 0 that is meant
        p = np.exp((known - known.max()) / temperature)
    return int(random.choice(len(p), p=p / p.sum()))


def generate(
    stream: Stream, prompt: Sequence[int], length: int, temperature: float, random: np.random.Generator
) -> Any:
    """Plays ``prompt`` and then yields ``length`` drawn tokens, each fed back: a stream of text as it is made."""
    logits = stream.run(np.asarray(prompt, np.int64))[-1]
    for _ in range(length):
        token = sample(logits, temperature, random)
        yield token
        logits = stream.step(token)


def _run(args: argparse.Namespace) -> None:
    from sparsefold.data.text import decode, encode

    if args.length < 0 or not args.temperature >= 0 or args.seed < 0:
        raise ValueError("--length, --temperature and --seed must not be negative.")
    program = _load(args.file)
    vocabulary = _vocabulary(program, args.file)
    prompt = os.fsencode(args.prompt) or b"\n"  # bytes, whatever the terminal's encoding
    stream = Engine(program).stream()
    sys.stdout.buffer.write(prompt)
    sys.stdout.flush()
    random = np.random.default_rng(args.seed)
    for token in generate(stream, encode(prompt, vocabulary).tolist(), args.length, args.temperature, random):
        sys.stdout.buffer.write(decode([token], vocabulary))
        sys.stdout.flush()
    print(f"\n\n{stream.report()}", file=sys.stderr)


def _bits(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Bits in which (T,) targets are told by (T, O) logits, all together."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return -float((wide[np.arange(len(targets)), targets] - np.log(np.exp(wide).sum(1))).sum()) / float(np.log(2))


def evaluate(stream: Stream, tokens: NDArray[np.int64], chunk: int = 4096) -> float:
    """Bits per token of a stream on a text, played once from the stream's state."""
    bits = 0.0
    with Progress(len(tokens) - 1, "eval") as progress:
        for at in range(0, len(tokens) - 1, chunk):
            x, y = tokens[at : at + chunk], tokens[at + 1 : at + chunk + 1]
            bits += _bits(stream.run(x[: len(y)]), y)
            progress.update(at + len(y))
    return bits / (len(tokens) - 1)


def _eval(args: argparse.Namespace) -> None:
    from sparsefold.data.text import encode, load_text

    program = _load(args.file)
    vocabulary = _vocabulary(program, args.file)
    if args.text:
        tokens, what = encode(args.text.read_bytes(), vocabulary), str(args.text)
    else:
        known = program.metadata.get("corpus", {})
        corpus = load_text(None)
        if not isinstance(known, dict) or known.get("sha256") != corpus.sha256:
            raise ValueError("the text this model was trained beside is not at hand. Pass a text with --text.")
        tokens, what = corpus.test, "test split"
    if len(tokens) < 2:
        raise ValueError(f"{what} has {len(tokens)} bytes; at least 2 are needed.")
    stream = Engine(program).stream()
    bits = evaluate(stream, tokens)
    total, rate = stream.cost, stream.counters.event_rate()
    latency = _latency(Engine(program), tokens[:5000].tolist())
    if args.json:
        figures = {"bits_per_char": bits, "bytes": len(tokens), "event_rate": rate, "cost": total.to_dict()}
        print(json.dumps({**figures, "latency_us": latency.to_dict()}, indent=1))
        return
    print(f"{bits:.4f} bits per character on {what}, {len(tokens):,} bytes")
    print(f"{latency.p50:.2f} us per byte p50, {latency.p99:.2f} p99 (one thread, decoder and Python call included)")
    print(stream.report())


def _latency(engine: Engine, inputs: Sequence[Any]) -> Latency:
    stream = engine.stream()
    with pinned():
        time_calls(stream.step, inputs[:500])
        return Latency.of(time_calls(stream.step, inputs))


def _ops_table(program: Program) -> str:
    lines = []
    for i, op in enumerate(program.ops):
        stored = ", ".join(
            f"{name} {m.shape[0]}x{m.shape[1]} {m.description} ({m.nbytes:,} bytes)" for name, m in matrices(op).items()
        )
        if isinstance(op, Embedding):
            stored = f"{op.weight.shape[0]}x{op.weight.shape[1]} ({op.weight.nbytes:,} bytes)"
        deltas = {of: getattr(op, f"delta_{side}", None) for of, side in (("x", "input"), ("h", "hidden"))}
        sends = " and ".join(f"{t:.4g} of {of}" for of, t in deltas.items() if t is not None)
        lines.append(
            f"{i} {op.kind:<10}{op.inputs:>6} -> {op.outputs:<6} {stored}" + f", changes above {sends}" * bool(sends)
        )
    return "\n".join(lines)


def _inspect(args: argparse.Namespace) -> None:
    program = _load(args.file)
    engine = Engine(program)
    print(f"{args.file}: {args.file.stat().st_size:,} bytes, arrays {program.nbytes:,}; in memory {engine.nbytes:,}")
    print(_ops_table(program))
    if engine.folded:
        print(
            "The engine folds the embedding into the first layer's input product: one table of at most 8 MB in memory."
        )
    for line in _choices_table(program.metadata.get("choices")):
        print(line)
    for key, value in program.metadata.items():
        if key == "choices":
            continue
        text = json.dumps(value)
        print(f"{key}: {text if len(text) <= 400 else text[:400] + ' ...'}")
    if args.png:
        found = {
            f"{i} {op.kind} {name}, {m.description}": (m.to_dense() != 0, m.gates)
            for i, op in enumerate(program.ops)
            for name, m in matrices(op).items()
        }
        _draw_patterns(args.png, found)


def _choices_table(choices: Any) -> list[str]:
    """Lines of a table of what ``metadata["choices"]`` says; none where it says something else, for a file is not trusted."""
    try:
        lines = [f"{'matrix':<16}{'chosen':<34}{'ns':>10}  {'known by':<22}next best"]
        for c in choices:
            others = [(str(name), float(ns)) for name, ns in c["candidates"] if name != c["chosen"]]
            rate = "dense x" if c["rate"] == "dense x" else f"{float(c['event_rate']):.1%} {str(c['rate'])[:10]}"
            second = f"{others[0][0][:40]}, {others[0][1]:,.0f}" if others else ""
            known = f"{str(c['by'])[:10]}, {rate}"
            name = f"{int(c['op'])} {str(c['matrix'])[:12]}"
            lines.append(f"{name:<16}{str(c['chosen'])[:33]:<34}{float(c['ns']):>10,.0f}  {known:<22}{second}")
        return lines if len(lines) > 1 else []
    except (TypeError, KeyError, ValueError, OverflowError):
        return []


def _export_c(args: argparse.Namespace) -> None:
    from sparsefold.export_c import write_c

    program = _load(args.file)
    for path in write_c(program, args.output, args.file.stem if args.name is None else args.name, args.fold):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _bench(args: argparse.Namespace) -> None:
    from sparsefold import _native

    if args.steps < 1000:
        raise ValueError("--steps is at least 1000: a p99 of fewer calls says nothing.")
    program = _load(args.file)
    random = np.random.default_rng(0)
    inputs: list[Any]
    if program.takes_tokens:
        inputs = random.integers(0, program.inputs, args.steps).tolist()
    else:
        inputs = list(random.standard_normal((args.steps, program.inputs)).astype(np.float32))
    engines = [Engine(program, isa=isa) for isa in ([args.isa] if args.isa else _native.available_isas())]
    print(f"{args.steps} steps of random input, one thread, state moving, Python call included; microseconds")
    for engine in engines:
        latency = _latency(engine, inputs)
        print(f"{engine.isa:<10} p50 {latency.p50:8.2f}   p99 {latency.p99:8.2f}   mean {latency.mean:8.2f}")


def _report(args: argparse.Namespace) -> None:
    from sparsefold import report

    try:
        summary = json.loads(args.summary.read_text())
    except ValueError as error:
        raise ValueError(f"{args.summary} is not JSON: {error}.") from error
    try:
        if args.output:
            report.write_report(summary, args.output)
            print(args.output)
        else:
            print(report.markdown(summary) if args.markdown else report.table(summary))
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # a field that docs/results.md promises
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{args.summary} is not a summary as the demo writes it ({what}).") from error


if __name__ == "__main__":
    sys.exit(main())
