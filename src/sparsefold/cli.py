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

from sparsefold import hearing, language
from sparsefold.bench import Latency, pinned, time_calls
from sparsefold.engine import Engine
from sparsefold.formats import VALUE_TYPES
from sparsefold.program import Embedding, Program, ProgramError, matrices
from sparsefold.vocabulary import Vocabulary

_DATA_DIR = "folder of the published corpora, ptb and wikitext-2 (default: SPARSEFOLD_DATA)"


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
        if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
            print(f"\nsparsefold: {str(stop) or 'interrupted.'}", file=sys.stderr)
            if resume := getattr(args, "resume", None):
                print(
                    f"Run the same command again to go on: {_started_by()}{shlex.join(resume(args))}", file=sys.stderr
                )
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


def _started_by() -> str:
    """What stands before our own command where torchrun has started it."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return f"torchrun --nproc-per-node {count} --no-python " if count > 1 else ""


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
    train.add_argument("--data-dir", type=Path, default=None, help=f"{_DATA_DIR}; what is missing is downloaded there")
    train.set_defaults(
        resume=lambda a: [
            "sparsefold", "train", a.recipe, *a.overrides, "--out", str(_train_folder(a)),
            *(["--data-dir", str(a.data_dir)] if a.data_dir else []),
        ]
    )  # fmt: skip

    sweep = add("sweep", _sweep, "Search over a recipe's settings on Optuna: sparsefold sweep ptb grid.toml")
    sweep.add_argument("recipe")
    sweep.add_argument("space", type=Path, metavar="FILE", help="TOML: for each setting a value, a list, or a range")
    sweep.add_argument("--out", type=Path, default=None, help="folder of the trials (default: runs/sweep-RECIPE)")
    sweep.add_argument("--storage", default="", help="file or URL that all workers share (default: a journal in --out)")
    sweep.add_argument("--trials", type=int, default=None, help="of all workers (default: the whole grid, or 20)")
    sweep.set_defaults(
        resume=lambda a: [
            "sparsefold", "sweep", a.recipe, str(a.space), "--out", str(a.out or f"runs/sweep-{a.recipe}"),
            *(["--storage", a.storage] if a.storage else []), *(["--trials", str(a.trials)] if a.trials else []),
        ]
    )  # fmt: skip

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

    describe = add("describe", _describe, "Quality, MACs and time of a trained language model beside dense networks.")
    describe.add_argument("run", type=Path, help="folder of a run of the recipes lm, ptb, wikitext2 or ptb-paper")
    describe.add_argument(
        "--rivals", action=argparse.BooleanOptionalAction, default=True, help="time dense networks too"
    )
    describe.add_argument("--calls", type=int, default=1000, help="timed steps of each engine")
    describe.add_argument("--data-dir", default="", help=_DATA_DIR)

    calibrate = add("calibrate", _calibrate, "Find thresholds of changes that a compiled GRU, LSTM or RNN bears.")
    calibrate.add_argument("file", type=Path)
    calibrate.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    calibrate.add_argument(
        "--sample", type=Path, required=True, metavar="FILE",
        help="a text, for a language model; or a .npy file of token ids (T,) or values (T, I), also (B, T, I)",
    )  # fmt: skip
    calibrate.add_argument(
        "--max-loss", type=float, default=0.01,
        help="bits per character or word that a text may cost more; of a .npy, the relative error of the outputs (default: 0.01)",
    )  # fmt: skip

    prune = add("prune", _prune, "Prune a checkpoint at once: safetensors, or a torch file without code in it.")
    prune.add_argument("checkpoint", type=Path, metavar="CKPT")
    prune.add_argument("--rules", type=Path, required=True, metavar="FILE", help="TOML: a table for each name pattern")
    prune.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="may be CKPT itself")
    prune.add_argument("--png", type=Path, default=None, metavar="FILE", help="draw the masks")

    run = add(
        "run", _run, "Generate text with a compiled language model, as a stream; or name what is said in recordings."
    )
    run.add_argument("file", type=Path)
    run.add_argument("--prompt", default="", help="text to start from; none: the beginning of a line")
    run.add_argument("--tokens", type=int, default=400, help="bytes, or words, to generate (default: 400)")
    run.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: 0.7)")
    run.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (default: all)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--wav", type=Path, nargs="+", default=[], metavar="FILE", help="recordings, for a model that hears"
    )
    _add_fold(run, "up to 8 MB")

    eval_ = add(
        "eval",
        _eval,
        "Quality, event rates, cost and time of a compiled language model on a text, or of one that hears.",
    )
    eval_.add_argument("file", type=Path)
    eval_.add_argument(
        "--text", type=Path, default=None, help="text file (default: the test split it was trained beside)"
    )
    eval_.add_argument(
        "--wav", type=Path, default=None, metavar="DIR",
        help="for a model that hears: files LABEL_*.wav (default: the test split of the published digits)",
    )  # fmt: skip
    eval_.add_argument("--data-dir", type=Path, default=None, help=_DATA_DIR)
    eval_.add_argument("--json", action="store_true", help="print JSON")
    _add_fold(eval_, "up to 8 MB")

    inspect = add("inspect", _inspect, "What a .sfold file holds: ops, formats, sizes, where it comes from.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--png", type=Path, default=None, metavar="FILE", help="draw which weights each matrix holds")

    export = add("export-c", _export_c, "Write a .sfold file as one self-contained C99 file and its header.")
    export.add_argument("file", type=Path)
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made when it is missing")
    export.add_argument("--name", default=None, help="prefix of all names (default: the file's name)")
    _add_fold(export, "where it is smaller")

    bench = add("bench", _bench, "Latency of one step of a compiled model: p50 and p99, on every instruction set.")
    bench.add_argument("file", type=Path)
    bench.add_argument("--steps", type=int, default=5000)
    bench.add_argument("--isa", default=None, help="only this instruction set")
    _add_fold(bench, "up to 8 MB")

    report = add("report", _report, "Print the table of a demo's summary.json, or write its HTML report.")
    report.add_argument("summary", type=Path)
    report.add_argument("-o", "--output", type=Path, default=None, metavar="HTML")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def _add_fold(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"one table in memory instead of embedding and first input product (default: {default})",
    )


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("this command needs torch: pip install 'sparsefold[train]'.") from error


def _demo(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.recipes.demo import DemoError, demo

    try:
        demo(args.out, fresh=args.fresh, steps=args.steps, full=args.full)
    except DemoError as error:
        raise SystemExit(f"sparsefold: {error}") from error


def _recipe(name: str) -> Any:
    _need_torch()
    from sparsefold.recipes.names import RECIPES

    if name not in RECIPES:
        what = f"there is no recipe {name!r}" if name else "name the recipe to train"
        raise ValueError(f"{what}. Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]


def _train_folder(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / str(args.recipe)


def _train(args: argparse.Namespace) -> None:
    if args.list and not args.recipe:
        _need_torch()
        from sparsefold.recipes.names import RECIPES

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
            joint = "," if isinstance(value, tuple) and any(isinstance(v, float) for v in value) else "x"
            print(f"{key}={joint.join(map(str, value)) if isinstance(value, tuple) else value}")
        return
    if args.data_dir:
        os.environ["SPARSEFOLD_DATA"] = str(args.data_dir)  # for whatever this command starts, too
    folder = _train_folder(args)
    summary = recipe.run(config, folder, args.recipe)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first has written and says so
        return
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    if hasattr(recipe, "told"):
        print(recipe.told(summary))
        return
    quality = f"perplexity {summary.get('valid_perplexity', 0):.2f}"
    if "valid_bits_per_char" in summary:
        quality = f"{summary['valid_bits_per_char']:.4f} bits per character"
    print(
        f"{quality} on the validation split (step {summary['best_step']} of {summary['steps']}, {summary['seconds']:.0f} s). "
        f"Compile it: sparsefold compile {folder} -o {args.recipe}.sfold"
    )


def _sweep(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.recipes.sweep import read_space, sweep, table

    folder = args.out or Path("runs") / f"sweep-{args.recipe}"
    print(table(sweep(args.recipe, read_space(args.space), folder, args.storage, args.trials)))
    print(f"All trials: {folder / 'sweep.json'}")


def _compile(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.lowering import compile_model
    from sparsefold.recipes._checkpoint import read_checkpoint

    best = args.checkpoint / "best.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    _, facts = read_checkpoint(best)
    if not isinstance(recipe := facts["about"].get("recipe"), str):
        raise ValueError(f"{best} does not say which recipe made it: it is damaged, or of a training of your own.")
    model, facts = _recipe(recipe).load(best)
    about = facts["about"] | {"training": facts["progress"]}
    sample = None
    if args.sample:
        sample = language.sample_of(args.sample, Vocabulary.from_metadata(about))
    program = compile_model(model, about, args.weights, sample=sample, tune=args.tune, delta=args.delta)
    program.save(args.output)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    print(_ops_table(program))


def _describe(args: argparse.Namespace) -> None:
    _need_torch()
    from sparsefold.recipes import describe

    print(describe.told(describe.run(args.run, args.data_dir, args.rivals, args.calls)))
    print(args.run / "described.json")


def _calibrate(args: argparse.Namespace) -> None:
    from sparsefold.calibrate import calibrate_delta

    program, loss = _load(args.file), None
    if args.sample.suffix == ".npy":
        try:
            sample = np.load(args.sample, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{args.sample} is not an array that numpy.save wrote ({error}).") from error
    else:
        sample = language.sample_of(args.sample, language.vocabulary_of(program, args.file))

        def loss(outputs: list[NDArray[np.float32]]) -> float:
            return language.bits(outputs[0][:-1], sample[1:]) / (len(sample) - 1)

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


def _run(args: argparse.Namespace) -> None:
    program = _load(args.file)
    if args.wav or "hears" in program.metadata:
        if not args.wav:
            raise ValueError(f"{args.file} hears, and writes nothing. Name recordings: --wav FILE.")
        hearing.tell(program, args.file, args.wav)
        return
    prompt = os.fsencode(args.prompt)  # bytes, whatever the terminal's encoding
    language.write(program, args.file, prompt, args.tokens, args.temperature, args.top_k, args.seed, args.fold)


def _eval(args: argparse.Namespace) -> None:
    program = _load(args.file)
    if args.wav or "hears" in program.metadata:
        hearing.score(program, args.file, args.wav, args.data_dir, args.json)
        return
    language.read(program, args.file, args.text, args.data_dir, args.json, args.fold)


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
    fold: Any = "auto" if args.fold is None else args.fold
    engines = [Engine(program, fold, isa) for isa in ([args.isa] if args.isa else _native.available_isas())]
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
