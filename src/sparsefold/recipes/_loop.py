"""One training loop: windows over parallel streams, exact resume, early stop, and nothing lost on Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsefold.nn import EGRUState, Stack, StackState
from sparsefold.program import write_atomically
from sparsefold.progress import Progress
from sparsefold.sparsify import Pruner

CHECKPOINT_VERSION = 1


class Windows:
    """A token sequence as ``batch`` parallel streams, read in windows of ``length`` steps, over and over.

    Window ``i`` is a pure function of ``i``, so a resumed run reads what the interrupted one would have read. The state is
    zero at the start of every pass and carried from window to window inside it.
    """

    def __init__(self, tokens: NDArray[np.int64], batch: int, length: int) -> None:
        per_stream = (len(tokens) - 1) // batch
        if per_stream < length:
            raise ValueError(
                f"{len(tokens)} tokens are too few for {batch} streams of at least one window of {length} steps. "
                "Use a longer text, or a smaller batch or window."
            )
        used = torch.from_numpy(tokens[: per_stream * batch + 1].copy())
        self._x = used[:-1].view(batch, per_stream).T.contiguous()  # (time, batch)
        self._y = used[1:].view(batch, per_stream).T.contiguous()
        self.length, self.per_pass = length, per_stream // length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs and targets (time, batch) of window ``i``, and whether a pass starts with it."""
        at = i % self.per_pass * self.length
        return self._x[at : at + self.length], self._y[at : at + self.length], at == 0


def bits_per_char(model: Stack, tokens: NDArray[np.int64], streams: int = 16, window: int = 256) -> float:
    """Bits per token of ``model`` on a text cut into ``streams`` parallel pieces, state carried within each piece."""
    streams = max(1, min(streams, (len(tokens) - 1) // 8))
    windows = Windows(tokens, streams, 1)
    was_training = model.training
    model.eval()
    total, state = 0.0, None
    with torch.no_grad():
        for at in range(0, windows.per_pass, window):
            x, y = windows._x[at : at + window], windows._y[at : at + window]
            logits, state, _ = model(x, state)
            total += float(cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    model.train(was_training)
    return total / (windows.per_pass * streams) / math.log(2)


@dataclass
class Trainer:
    """What a recipe hands to :func:`train`. ``lr(step)``, ``penalty(activity, step)`` are pure functions of the step."""

    model: Stack
    optimizer: torch.optim.Optimizer
    windows: Windows
    steps: int
    lr: Callable[[int], float]
    penalty: Callable[[Any, int], Tensor | float]
    evaluate: Callable[[], float]  # bits per character on the validation split
    clip: float
    pruner: Pruner | None = None
    eval_every: int = 100
    patience: int = 0  # evaluations without a new best before stopping; 0: never
    checkpoint_every: int = 200
    about: dict[str, Any] = field(default_factory=dict)  # recipe, config, corpus: goes into every checkpoint


@dataclass
class Progressed:
    """Where a run is: what a checkpoint keeps beside tensors."""

    step: int = 0
    best: float | None = None  # lowest validation so far
    best_step: int = 0
    seconds: float = 0.0
    loss_mean: float = 0.0  # running mean of the loss in bits
    stopped: bool = False


def train(trainer: Trainer, folder: Path, label: str) -> dict[str, Any]:
    """Train, or go on where ``folder`` left off, and return a summary.

    Writes ``last.safetensors`` (all that a resume needs), ``best.safetensors`` (the model with the best validation) and
    ``log.jsonl`` (one line per evaluation). The same folder and config resume with the same bits.

    Raises:
        ValueError: the folder cannot be written, or holds a run of another config.
        KeyboardInterrupt: after saving, when the user asked to stop; the message says how to resume.
        FloatingPointError: the loss is no longer finite.
    """
    make_folder(folder)
    last, best, log = folder / "last.safetensors", folder / "best.safetensors", folder / "log.jsonl"
    at, state = Progressed(), None
    if last.exists():
        at, state = _resume(trainer, last)
        _trim_log(log, at.step)
    else:
        log.unlink(missing_ok=True)
    began = time.monotonic() - at.seconds
    model, optimizer = trainer.model.train(), trainer.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _asked_to_stop() as asked, Progress(trainer.steps, label, at.step) as progress:
        while at.step < trainer.steps and not at.stopped:
            x, y, fresh = trainer.windows[at.step]
            state = None if fresh else state
            for group in optimizer.param_groups:
                group["lr"] = trainer.lr(at.step)
            logits, state, activity = model(x, state)
            loss = cross_entropy(logits.flatten(0, 1), y.flatten())
            total: Any = loss + trainer.penalty(activity, at.step)
            total.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, trainer.clip))
            bits = float(loss.detach()) / math.log(2)
            if not math.isfinite(bits + norm):  # before the step, so that no checkpoint ever holds what came of it
                raise _diverged(f"the loss is {bits}, its gradient's norm {norm}", at.step, last)
            optimizer.step()
            if trainer.pruner:
                trainer.pruner.step()  # before the gradients go: weights may return by them
            optimizer.zero_grad()
            state = state.detach()
            at.step += 1
            at.loss_mean = bits if at.step == 1 else 0.98 * at.loss_mean + 0.02 * bits
            at.seconds = time.monotonic() - began
            rate = activity.event_rate
            done = at.step == trainer.steps
            if done or at.step % trainer.eval_every == 0:
                valid = trainer.evaluate()
                if not math.isfinite(valid):
                    raise _diverged(f"the loss on the validation split is {valid}", at.step, last)
                if at.best is None or valid < at.best:
                    at.best, at.best_step = valid, at.step
                    _save(best, {f"model.{k}": v for k, v in model.state_dict().items()}, trainer.about, at)
                elif trainer.patience and at.step - at.best_step >= trainer.patience * trainer.eval_every:
                    at.stopped = True
                at.seconds = time.monotonic() - began
                _log(log, trainer, at, valid, rate)
            if done or at.stopped or asked() or at.step % trainer.checkpoint_every == 0:
                _save(last, _tensors(trainer, state), trainer.about, at)
            if asked() and not done:
                raise KeyboardInterrupt(f"stopped after step {at.step}; everything is saved in {folder}.")
            note = f"{at.loss_mean:.3f} bits" + (f", {rate:.1%} events" if activity.rates else "")
            progress.update(at.step, note)
    return {
        "steps": at.step,
        "seconds": round(at.seconds, 1),
        "valid_bits_per_char": at.best,
        "best_step": at.best_step,
        "train_bits_per_char": at.loss_mean,
        "stopped_early": at.stopped,
    }


def _diverged(what: str, step: int, last: Path) -> FloatingPointError:
    kept = f"{last} holds the last good state" if last.exists() else "nothing was saved yet"
    return FloatingPointError(
        f"{what} at step {step}: training diverged; {kept}. Train with a lower lr, in another folder (--out)."
    )


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises ``ValueError`` for anything that is not one of this version."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}. Pass the folder of a run, or one of its .safetensors files.")
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: {error}. It is damaged or foreign; train anew in another folder (--out)."
        ) from error
    version = meta.get("sparsefold_checkpoint")
    if version != str(CHECKPOINT_VERSION) or "facts" not in meta:
        known = "it is a compiled program" if "sparsefold" in meta else f"it says version {version}"
        raise ValueError(
            f"{path} is no checkpoint that this version of sparsefold reads ({known}). "
            "Pass the folder of a run, or one of its .safetensors files."
        )
    return tensors, json.loads(meta["facts"])


def make_folder(folder: Path) -> None:
    """Make the folder of a run. Raises ``ValueError`` where files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot write to the run folder {folder}: {reason}. Choose another with --out.") from error


def _save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], at: Progressed) -> None:
    facts = json.dumps({"about": about, "progress": vars(at)})
    meta = {"sparsefold_checkpoint": str(CHECKPOINT_VERSION), "facts": facts}
    write_atomically(path, save({k: v.detach().contiguous() for k, v in tensors.items()}, meta))


def _tensors(trainer: Trainer, state: StackState | None) -> dict[str, Tensor]:
    """Everything with bits in it: weights, moments, masks, random state, carried state."""
    out = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        out.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in moments.items()})
    if trainer.pruner:
        pruner = trainer.pruner.state_dict()
        out["pruner.step"] = torch.tensor(pruner["step"])
        out["pruner.random"] = pruner["random"]
        out.update({f"pruner.{part}.{k}": v for part in ("masks", "start") for k, v in pruner[part].items()})
    out["random"] = torch.get_rng_state()
    for i, s in enumerate(state or ()):
        if s is not None:
            out.update({f"state.{i}.{k}": v for k, v in enumerate(s if isinstance(s, tuple) else (s,))})
    return out


def _resume(trainer: Trainer, path: Path) -> tuple[Progressed, StackState | None]:
    tensors, facts = read_checkpoint(path)
    was, now = facts["about"], json.loads(json.dumps(trainer.about))
    if was != now:
        old, new = was.get("config", {}), now.get("config", {})
        changed = [k for k in new if old.get(k) != new[k]] or [k for k in now if was.get(k) != now[k]]
        raise ValueError(
            f"{path.parent} holds a run with another {', '.join(changed)}. "
            "Give the same settings to resume it, or another --out to start anew."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    trainer.model.load_state_dict(part("model."))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    fresh = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({**fresh, "state": moments})
    if trainer.pruner:
        saved: dict[str, Any] = {"step": int(tensors["pruner.step"])}
        saved |= {name: part(f"pruner.{name}.") for name in ("masks", "start")}
        saved |= {"random": tensors["pruner.random"]} if "pruner.random" in tensors else {}
        trainer.pruner.load_state_dict(saved)
    torch.set_rng_state(tensors["random"])
    states: list[Any] = []
    for i, module in enumerate(trainer.model):
        found = part(f"state.{i}.")
        values = [found[str(k)] for k in range(len(found))]
        is_event = type(module).__name__ == "EGRU"
        states.append(
            EGRUState(*values)
            if is_event and values
            else tuple(values)
            if len(values) > 1
            else next(iter(values), None)
        )
    carried = StackState(states) if any(s is not None for s in states) else None
    return Progressed(**facts["progress"]), carried


def _log(path: Path, trainer: Trainer, at: Progressed, valid: float, rate: float) -> None:
    line: dict[str, Any] = {
        "step": at.step,
        "seconds": round(at.seconds, 2),
        "train_bits_per_char": at.loss_mean,
        "valid_bits_per_char": valid,
        "event_rate": rate,
    }
    if trainer.pruner:
        line["density"] = trainer.pruner.density()
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _trim_log(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last checkpoint; the resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut short by a kill
        return math.inf


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM let the current step finish; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def handler(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted twice; the last checkpoint stands.")
        asked.append(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever owns the signals decides
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
