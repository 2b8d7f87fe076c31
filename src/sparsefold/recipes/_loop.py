"""One training loop: windows over parallel streams, exact resume, early stop, and nothing lost on Ctrl-C.

Started by ``torchrun --nproc-per-node N``, the same command trains with N processes, each on its share of the streams.
"""

from __future__ import annotations

import io
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from sparsefold.nn import Stack, StackState
from sparsefold.program import write_atomically
from sparsefold.progress import Progress
from sparsefold.recipes import _distributed as processes
from sparsefold.recipes._average import Average
from sparsefold.recipes._checkpoint import Progressed, make_folder, model_tensors, resume, save_checkpoint, tensors_of
from sparsefold.recipes._windows import Batches
from sparsefold.sparsify import Pruner

Unit = Literal["bits_per_char", "perplexity", "bits"]


@dataclass
class Trainer:
    """What a recipe hands to :func:`train`. ``lr(step)``, ``penalty(activity, step)`` are pure functions of the step."""

    model: Stack
    optimizer: torch.optim.Optimizer
    windows: Batches
    steps: int
    lr: Callable[[int], float]
    penalty: Callable[[Any, int], Tensor | float]
    evaluate: Callable[[], float]  # bits per token on the validation split
    clip: float
    pruner: Pruner | None = None
    eval_every: int = 100
    patience: int = 0  # evaluations without a new best before stopping; 0: never
    checkpoint_every: int = 200
    about: dict[str, Any] = field(default_factory=dict)  # recipe, config, corpus: goes into every checkpoint
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings by which an older checkpoint's config is filled in
    unit: Unit = "bits_per_char"  # what is logged and told
    checkpoint_minutes: float = math.inf  # a checkpoint is due after so long, too
    # what the model's outputs are compared with, on the processor or where they are made; told before they are
    targets: Callable[[Tensor], Tensor] = lambda y: y
    # nats of the outputs (T, B, …) against the targets (T, B)
    loss: Callable[[Tensor, Tensor], Tensor] = lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten())
    average: Average | None = None
    snapshots: Mapping[int, str] = field(default_factory=dict)  # after these steps the model is kept under a name
    best_from: int = 0  # no evaluation before this step is the best: the network is not yet as sparse as it is to be
    autocast: torch.dtype | None = None  # of products in training
    tensorboard: bool = False
    until: float = math.inf  # seconds since 1970: a run that is not done then has saved and stopped
    evaluation: float = 0.0  # seconds that an evaluation takes, where that is known before the first
    kept: Callable[[Progressed], None] | None = None  # told of every checkpoint of the run, in the first process

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def told(self, bits: float) -> float:
        """A loss in bits per token in the unit of this training."""
        return 2.0**bits if self.unit == "perplexity" else bits


def train(trainer: Trainer, folder: Path, label: str) -> dict[str, Any]:
    """Train, or go on where ``folder`` left off, and return a summary.

    Writes ``last.safetensors`` (all that a resume needs), ``best.safetensors`` (the model with the best validation), a file for
    each snapshot and ``log.jsonl`` (one line per evaluation). The same folder and config resume with the same bits.

    Raises:
        ValueError: the folder cannot be written, or holds a run of another config.
        OSError: a checkpoint could not be written; the one before it is whole.
        KeyboardInterrupt: after saving, when the user asked to stop or ``until`` is near; the command line says how to resume.
        FloatingPointError: the loss is no longer finite.
    """
    processes.join(trainer.device)
    return _Run(trainer, folder).train(label)


def pace(trainer: Trainer, windows: int = 8) -> tuple[float, float]:
    """Seconds of one step of ``trainer.windows.length`` steps of time, and of one evaluation, measured. The trainer is spent."""
    trainer.model.train()
    state, began, spent, steps = None, 0.0, 0.0, 0
    for i in range(windows + 2):
        x, figures, state = _advance(trainer, trainer.model, i, state)
        steps += len(x) if i >= 2 else 0
        if i in (1, windows + 1):  # the first two allocate
            figures.read()
            began, spent = time.monotonic(), time.monotonic() - began
    with _float32_products(trainer):
        trainer.evaluate()
    return spent / steps * trainer.windows.length, time.monotonic() - began


def _float32_products(trainer: Trainer) -> AbstractContextManager[Any]:
    """The dense products that our layers make in float32 on a processor take bfloat16 factors, if that is the precision."""
    if trainer.autocast is not torch.bfloat16 or trainer.device.type != "cpu":
        return nullcontext()
    found: Any = torch.backends.mkldnn
    return cast(
        "AbstractContextManager[Any]", found.flags(found.enabled, found.deterministic, found.allow_tf32, "bf16")
    )


class _Figures:
    """Loss in bits, norm of the gradient and event rate of a step, which a GPU may still be at work on."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor, activity: Any) -> None:
        self.step = step
        rate = torch.cat([r.detach() for r in activity.rates]).mean() if activity.rates else loss.new_ones(())
        self._told = torch.stack([t.detach().double() for t in (loss, norm, rate)]).to("cpu", non_blocking=True)
        self._written: Any = cast("Any", torch.cuda.Event)() if loss.is_cuda else None
        if self._written:
            self._written.record()

    def read(self) -> tuple[float, float, float]:
        """Waits for the step, not for what was asked of the device after it."""
        if self._written:
            self._written.synchronize()
        loss, norm, rate = self._told.tolist()
        return loss / math.log(2), norm, rate


def _read_late(device: torch.device) -> bool:
    """Whether a step's figures are read when the next one is on its way, so that a GPU has always something to do."""
    return device.type == "cuda" and processes.count() == 1


def _uploaded(tokens: Tensor, device: torch.device) -> Tensor:
    """The same on a device, which may come to it later: from pinned memory the copy waits for nothing."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def _advance(trainer: Trainer, model: Any, step: int, state: StackState | None) -> tuple[Tensor, _Figures, StackState]:
    """One step of training: its inputs, figures and carried state.

    Where figures are read at once, the optimiser is not asked if loss or gradient are not finite.
    """
    x, y, fresh = trainer.windows[step]
    if processes.count() > 1:
        share = x.shape[1] // processes.count()
        own = slice(processes.rank() * share, (processes.rank() + 1) * share)
        x, y = x[:, own], y[:, own]
    x, y = _uploaded(x, trainer.device), trainer.targets(y)
    for group in trainer.optimizer.param_groups:
        group["lr"] = trainer.lr(step)
    narrow: AbstractContextManager[Any] = nullcontext()
    if trainer.autocast:
        narrow = torch.autocast(trainer.device.type, trainer.autocast)
    with _float32_products(trainer):
        with narrow:
            logits, state, activity = model(x, None if fresh else state)
        logits = logits.float() if trainer.autocast else logits
        loss = trainer.loss(logits, _uploaded(y, trainer.device))
        total: Any = loss + trainer.penalty(activity, step)
        total.backward()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, trainer.clip)
    figures = _Figures(step, loss, norm, activity)
    if _read_late(trainer.device) or all(map(math.isfinite, figures.read())):
        trainer.optimizer.step()
        # Before the gradients go: weights may return by them.
        drawn = trainer.pruner is not None and trainer.pruner.step()
        trainer.optimizer.zero_grad()
        if trainer.average:
            if drawn:
                trainer.average.restart()
            trainer.average.update()
    return x, figures, state.detach()


class _Run:
    """A training in a folder."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder, self.first = trainer, folder, processes.rank() == 0
        self.last, self.log = folder / "last.safetensors", folder / "log.jsonl"
        if processes.count() > 1:
            if trainer.windows.batch % processes.count():
                raise ValueError(
                    f"batch={trainer.windows.batch} streams cannot be shared evenly by {processes.count()} processes. "
                    "Choose a multiple."
                )
            trainer.about = {**trainer.about, "processes": processes.count()}
        if self.first:
            make_folder(folder)
            for stale in folder.glob(".*.safetensors.*"):  # what a killed run was writing
                stale.unlink()
        processes.wait()
        self.at, self.state = Progressed(), None
        self.slowest = self.writing = 0.0  # seconds of a step, its evaluation included, and of a checkpoint
        self.waiting: deque[_Figures] = deque()  # of steps whose figures are not read
        self.rate: float | None = None  # of events, in the last step whose figures were
        if self.last.exists():
            self.at, self.state = resume(trainer, self.last)
            self._trim_log()
        else:
            if processes.rank():
                torch.manual_seed(torch.initial_seed() + processes.rank())  # masks of its own
            if self.first:
                self.log.unlink(missing_ok=True)
        processes.wait()

    def train(self, label: str) -> dict[str, Any]:
        """Every step that is left."""
        trainer, at, state = self.trainer, self.at, self.state
        start = saved = time.monotonic()
        self.began, tokens = start - at.seconds, 0
        model = DistributedDataParallel(trainer.model) if processes.count() > 1 else trainer.model
        model.train()
        quiet = None if self.first else io.StringIO()
        with (
            _asked_to_stop() as asked,
            self._board() as board,
            Progress(trainer.steps, label, at.step, quiet) as progress,
        ):
            while at.step < trainer.steps and not at.stopped:
                begun = time.monotonic()
                x, figures, state = _advance(trainer, model, at.step, state)
                self.waiting.append(figures)
                at.step += 1
                tokens += x.shape[0] * x.shape[1] * processes.count()
                done = at.step == trainer.steps
                evaluates = done or at.step % trainer.eval_every == 0 or at.step in trainer.snapshots
                # What a clock or a signal decides, all processes decide alike.
                late = self.first and time.monotonic() - saved >= 60 * trainer.checkpoint_minutes
                late |= trainer.until < math.inf and not self.writing  # how long one takes is to be known
                stop, due = processes.means(trainer.device, asked() or self._short(begun), late)
                due = due or stop or at.step % trainer.checkpoint_every == 0
                self._take(everything=bool(evaluates or due))
                at.seconds = time.monotonic() - self.began
                if evaluates:
                    board(self._evaluate())
                    (stop,) = processes.means(trainer.device, asked() or self._short(begun))
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if done or at.stopped or stop or due:
                    began = time.monotonic()
                    self._keep(self.last, tensors_of(trainer, state))
                    if trainer.kept and self.first:
                        trainer.kept(at)
                    saved = time.monotonic()
                    self.writing = max(self.writing, saved - began)
                if stop and not done:
                    why = "" if asked() or trainer.until == math.inf else f", before {_clock(trainer.until)}"
                    raise KeyboardInterrupt(f"stopped after step {at.step}{why}; everything is saved in {self.folder}.")
                told = f"{at.loss_mean:.3f} bits"
                if trainer.unit == "perplexity":
                    told = f"perplexity {trainer.told(at.loss_mean):.1f}"
                if self.rate is not None:
                    told += f", {self.rate:.1%} events" if self.rate < 1 else ""
                    progress.update(at.step, f"{told}, {tokens / (time.monotonic() - start):,.0f} tokens/s")
        return {
            "steps": at.step,
            "seconds": round(at.seconds, 1),
            f"valid_{trainer.unit}": None if at.best is None else trainer.told(at.best),
            "best_step": at.best_step,
            f"train_{trainer.unit}": trainer.told(at.loss_mean),
            "stopped_early": at.stopped,
        }

    def _take(self, everything: bool) -> None:
        """Read the figures that are due: before anything is evaluated or saved, of all steps.

        Raises:
            FloatingPointError: the loss, or the gradient's norm, is not finite.
        """
        kept = 0 if everything or not _read_late(self.trainer.device) else 1
        while len(self.waiting) > kept:
            figures = self.waiting.popleft()
            bits, norm, self.rate = figures.read()
            (bits,) = processes.means(self.trainer.device, bits)
            if not math.isfinite(bits + norm):
                raise self._diverged(f"the loss is {bits}, its gradient's norm {norm}", figures.step)
            self.at.loss_mean = bits if figures.step == 0 else 0.98 * self.at.loss_mean + 0.02 * bits

    def _short(self, begun: float) -> bool:
        """Whether the time until ``until`` may not do for saving now, or for a step, an evaluation and saving after them.

        Everything is taken to last as long as the slowest of its kind so far, and saving twice as long.
        """
        step = max(self.slowest, time.monotonic() - begun) + self.trainer.evaluation
        return self.first and time.time() + step + 2 * self.writing >= self.trainer.until

    def _evaluate(self) -> dict[str, Any]:
        """The validation split: keeps what is the best or due, begins the average, writes and returns a line of the log."""
        trainer, at = self.trainer, self.at
        in_place = trainer.average.in_place() if trainer.average else nullcontext()
        with in_place, _float32_products(trainer):
            valid = processes.from_first(trainer.device, trainer.evaluate() if self.first else 0.0)
            if not math.isfinite(valid):
                raise self._diverged(f"the loss on the validation split is {valid}", at.step)
            if at.step >= min(trainer.best_from, trainer.steps) and (at.best is None or valid < at.best):
                at.best, at.best_step = valid, at.step
                self._keep(self.folder / "best.safetensors", model_tensors(trainer.model))
            elif (
                trainer.patience
                and at.best is not None
                and at.step - at.best_step >= trainer.patience * trainer.eval_every
            ):
                at.stopped = True
            if at.step in trainer.snapshots:
                name = f"{trainer.snapshots[at.step]}.safetensors"
                self._keep(self.folder / name, model_tensors(trainer.model), {"valid": valid})
        if trainer.average:
            trainer.average.consider(at.step, at.valid, valid)
        at.valid.append(valid)
        at.seconds = time.monotonic() - self.began
        line: dict[str, Any] = {
            "step": at.step,
            "seconds": round(at.seconds, 2),
            f"train_{trainer.unit}": trainer.told(at.loss_mean),
            f"valid_{trainer.unit}": trainer.told(valid),
            "event_rate": self.rate,
        }
        if trainer.pruner:
            line["density"] = trainer.pruner.density()
        if self.first:
            _log(self.log, line)
        return line

    def _keep(self, path: Path, tensors: Mapping[str, Tensor], more: Mapping[str, Any] = MappingProxyType({})) -> None:
        if self.first:
            save_checkpoint(path, tensors, {**self.trainer.about, **more}, self.at)

    def _diverged(self, what: str, step: int) -> FloatingPointError:
        kept = f"{self.last} holds the last good state" if self.last.exists() else "nothing was saved yet"
        return FloatingPointError(
            f"{what} at step {step}: training diverged; {kept}. Train with a lower lr, in another folder (--out)."
        )

    def _trim_log(self) -> None:
        """Drop lines that a killed run wrote after its last checkpoint; the resumed run writes them again."""
        if self.first and self.log.exists():
            kept = [line for line in self.log.read_text().splitlines() if _step_of(line) <= self.at.step]
            write_atomically(self.log, "".join(f"{line}\n" for line in kept).encode())

    @contextmanager
    def _board(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A function that shows a line of the log in TensorBoard, if that was asked for."""
        if not (self.trainer.tensorboard and self.first):
            yield lambda line: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=true needs it: pip install 'sparsefold[tensorboard]'.") from error
        with SummaryWriter(self.folder / "tensorboard", purge_step=self.at.step + 1) as writer:

            def show(line: Mapping[str, Any]) -> None:
                for name, value in line.items():
                    for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                        writer.add_scalar(f"{name}/{inner}".rstrip("/"), number, line["step"])
                writer.flush()

            yield show


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))


def _log(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut short by a kill
        return math.inf


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM let the current step finish; a second Ctrl-C interrupts at once.

    Not of several processes: ``torchrun`` passes on to each of them what the terminal has told them already.
    """
    asked: list[int] = []

    def handler(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT and processes.count() == 1:
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
