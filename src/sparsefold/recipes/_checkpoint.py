"""The files of a run: what a resume needs, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsefold.nn import EGRU, EGRUState, StackState
from sparsefold.program import write_atomically
from sparsefold.recipes import _distributed as processes

CHECKPOINT_VERSION = 2
READABLE = ("1", "2")  # version 1 knew neither averages nor several processes, and means what 2 does without them
TRANSFER_VERSION = "1"
# What may differ between the machine that a transfer checkpoint comes from and the one that goes on: how, not what.
_OF_THE_MACHINE = {
    "corpus", "data_dir", "minutes", "device", "threads", "precision", "eval_every", "checkpoint_every", "checkpoint_minutes",
    "tensorboard",
}  # fmt: skip


Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class Progressed:
    """Where a run is: what a checkpoint keeps beside tensors."""

    step: int = 0
    best: float | None = None  # lowest validation so far
    best_step: int = 0
    seconds: float = 0.0
    loss_mean: float = 0.0  # running mean of the loss in bits
    stopped: bool = False
    valid: list[float] = field(default_factory=list)  # every validation so far, in bits


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises ``ValueError`` for anything that is not one this version reads."""
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
    if version not in READABLE or "facts" not in meta:
        known = "it is a compiled program" if "sparsefold" in meta else f"it says version {version}"
        raise ValueError(
            f"{path} is no checkpoint that this version of sparsefold reads ({known}). "
            "Pass the folder of a run, or one of its .safetensors files."
        )
    try:
        facts = json.loads(meta["facts"])
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), dict) for key in ("about", "progress")):
        raise ValueError(f"{path} does not say what run it is of: it is damaged. Train anew in another folder (--out).")
    return tensors, facts


def made_with(path: Path, facts: Mapping[str, Any], words_in: str = "vocabulary") -> tuple[dict[str, Any], list[Any]]:
    """Settings of a checkpoint's network, and its vocabulary or what else ``words_in`` names.

    Raises ``ValueError`` where it does not say them.
    """
    config, words = (facts["about"].get(key) for key in ("config", words_in))
    if not (isinstance(config, dict) and isinstance(words, list)):
        raise ValueError(
            f"{path} does not say the settings and the {words_in} of its network: it is damaged, or of no recipe."
        )
    return config, words


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def make_folder(folder: Path) -> None:
    """Make the folder of a run. Raises ``ValueError`` where files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot write to the run folder {folder}: {reason}. Choose another with --out.") from error


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], at: Progressed) -> None:
    """Write a checkpoint whole. Raises ``OSError`` where it cannot be, with what became of the one before."""
    facts = json.dumps({"about": about, "progress": vars(at)})
    meta = {"sparsefold_checkpoint": str(CHECKPOINT_VERSION), "facts": facts}
    owned: dict[int, str] = {}  # weights that two modules share are stored once
    stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items() if owned.setdefault(id(v), k) == k}
    _write(path, save(stored, meta))


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        kept = f"{path.name} is still whole, as it was before" if path.exists() else "nothing was saved there yet"
        reason = f"{error.strerror or error}: {len(data):,} bytes were not written; {kept}. Make room and run the command again"
        raise OSError(error.errno, reason, str(path)) from error


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that a checkpoint gives them."""
    return {f"model.{k}": v for k, v in model.state_dict(keep_vars=True).items()}


def tensors_of(trainer: Any, state: StackState | None) -> dict[str, Tensor]:
    """Everything with bits in it: weights, moments, mean, masks, random states, carried states. All processes call it."""
    own = {f"state.{i}.{k}": v for i, s in enumerate(state or ()) for k, v in enumerate(_tuple(s))}
    own["random"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state(trainer.device)
    out = model_tensors(trainer.model)
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        out.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in moments.items() if v is not None})
    if trainer.average:
        out.update({f"average.{k}": v for k, v in trainer.average.tensors().items()})
    if trainer.pruner:
        pruner = trainer.pruner.state_dict()
        out["pruner.step"] = torch.tensor(pruner["step"])
        out["pruner.random"] = pruner["random"]
        out.update({f"pruner.{kind}.{k}": v for kind in ("masks", "start") for k, v in pruner[kind].items()})
    for rank, others in enumerate(processes.gathered({k: v.cpu() for k, v in own.items()})):
        out.update({(k if rank == 0 else f"process.{rank}.{k}"): v for k, v in others.items()})
    return out


def resume(trainer: Any, path: Path) -> tuple[Progressed, StackState | None]:
    """Put a checkpoint back into model, optimiser, average, pruner and random states; returns progress and carried state."""
    tensors, facts = read_checkpoint(path)
    was, now = facts["about"], json.loads(json.dumps(trainer.about))
    if "config" in was:
        was = {**was, "config": _filled(was["config"], trainer)}
    if was != now:
        old, new = was.get("config", {}), now.get("config", {})
        changed = [k for k in new if old.get(k) != new[k]] or [k for k in {**was, **now} if was.get(k) != now.get(k)]
        raise ValueError(
            f"{path.parent} holds a run with another {', '.join(changed)}. "
            "Give the same settings to resume it, or another --out to start anew."
        )
    trainer.model.load_state_dict(whole(part(tensors, "model."), trainer.model))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in part(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    fresh = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({**fresh, "state": moments})
    if trainer.average:
        trainer.average.load(part(tensors, "average."))
    if trainer.pruner:
        saved: dict[str, Any] = {"step": int(tensors["pruner.step"])}
        saved |= {name: part(tensors, f"pruner.{name}.") for name in ("masks", "start")}
        saved |= {"random": tensors["pruner.random"]} if "pruner.random" in tensors else {}
        trainer.pruner.load_state_dict(saved)
    own = part(tensors, f"process.{processes.rank()}.") if processes.rank() else tensors
    torch.set_rng_state(own["random"])
    if trainer.device.type == "cuda" and "random_cuda" in own:
        torch.cuda.set_rng_state(own["random_cuda"], trainer.device)
    states: list[Any] = []
    for i, module in enumerate(trainer.model):
        found = part(own, f"state.{i}.")
        values = [found[str(k)].to(trainer.device) for k in range(len(found))]
        if isinstance(module, EGRU) and values:
            states.append(EGRUState(*values))
        else:
            states.append(tuple(values) if len(values) > 1 else next(iter(values), None))
    carried = StackState(states) if any(s is not None for s in states) else None
    return Progressed(**facts["progress"]), carried


def write_transfer(path: Path, trainer: Any, at: Progressed) -> int:
    """Write the little that another machine needs to go on with a training; returns the bytes of the file.

    Of a matrix that the pruner holds these are the live weights and their second moments, both in bfloat16, and a bit for each
    weight that says whether it lives; of any other matrix all of both. Vectors are in float32. Left out are first moments,
    carried states, random states, averages and the best network so far: what goes on from here comes to other bits.

    Raises:
        ValueError: the optimiser has no second moments: it is not AdamW, or has not stepped yet.
        OSError: as :func:`save_checkpoint`.
    """
    masks = trainer.pruner.masks if trainer.pruner else {}
    out: dict[str, Tensor] = {}
    updates = 0
    for name, p in trainer.model.named_parameters():
        values = {"weight": p.detach()}
        if p.requires_grad:
            moments = trainer.optimizer.state.get(p, {})
            if "exp_avg_sq" not in moments:
                raise ValueError(
                    "a transfer checkpoint holds second moments; the optimiser has none. AdamW has, after a step."
                )
            values["moment"], updates = moments["exp_avg_sq"], int(moments["step"])
        if name in masks:
            mask = masks[name].to(p.device)
            values = {kind: value[mask] for kind, value in values.items()}
            out[f"live.{name}"] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        dtype = torch.bfloat16 if p.dim() > 1 else torch.float32
        out |= {f"{kind}.{name}": value.to("cpu", dtype).contiguous() for kind, value in values.items()}
    progress = {"step": at.step, "seconds": at.seconds, "loss_mean": at.loss_mean}
    facts = json.dumps({"about": trainer.about, "progress": progress, "updates": updates})
    _write(path, data := save(out, {"sparsefold_transfer": TRANSFER_VERSION, "facts": facts}))
    return len(data)


def transfer_facts(path: Path) -> dict[str, Any]:
    """What a transfer checkpoint says beside its tensors: about, progress, updates. Raises ``ValueError`` for anything else."""
    if not path.is_file():
        raise ValueError(f"there is no transfer checkpoint {path}.")
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable transfer checkpoint: {error}. It is damaged or foreign.") from error
    if meta.get("sparsefold_transfer") != TRANSFER_VERSION:
        known = "it is the checkpoint of a run" if "sparsefold_checkpoint" in meta else "it says nothing of the kind"
        known = f"its version is {meta['sparsefold_transfer']}" if "sparsefold_transfer" in meta else known
        raise ValueError(f"{path} is no transfer checkpoint that this version of sparsefold reads ({known}).")
    try:
        facts: dict[str, Any] = json.loads(meta["facts"])
        progress, steps = facts["progress"], facts["about"]["config"]["steps"]
        counts = (progress["step"], steps, facts["updates"])
        if not all(type(n) is int for n in counts) or not 1 <= progress["step"] <= steps or facts["updates"] < 1:
            raise ValueError(f"step, steps and updates are {counts}")
        if not all(math.isfinite(progress[key]) and progress[key] >= 0 for key in ("seconds", "loss_mean")):
            raise ValueError("its seconds or loss are not finite")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is a damaged transfer checkpoint: its facts are not as they should be ({error})."
        ) from error
    return facts


@torch.no_grad()
def read_transfer(path: Path, trainer: Any) -> Progressed:
    """Put a transfer checkpoint into model, optimiser and pruner, first moments being zero; returns how far it had come.

    They stay as they were where it is refused.

    Raises:
        ValueError: it is none, is damaged, or comes from a training with other settings or another text.
    """
    facts = transfer_facts(path)
    _same_training(path, facts["about"], json.loads(json.dumps(trainer.about)), trainer)
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    parameters = dict(trainer.model.named_parameters())
    pruned = set(trainer.pruner.masks) if trainer.pruner else set()
    wanted = {f"weight.{n}" for n in parameters} | {f"moment.{n}" for n, p in parameters.items() if p.requires_grad}
    if odd := sorted((wanted | {f"live.{n}" for n in pruned}) ^ tensors.keys()):
        raise ValueError(
            f"{path} is of another network or pruned otherwise: {', '.join(odd[:3])} is in one of the two alone."
        )
    masks = {n: _unpacked(path, n, tensors[f"live.{n}"], parameters[n].shape) for n in pruned}
    found = {}
    for name, p in parameters.items():
        shape = (int(masks[name].sum()),) if name in masks else tuple(p.shape)
        dtype = torch.bfloat16 if p.dim() > 1 else torch.float32
        for kind in ("weight", "moment") if p.requires_grad else ("weight",):
            value = tensors[f"{kind}.{name}"]
            if (tuple(value.shape), value.dtype) != (shape, dtype):
                raise ValueError(
                    f"{path} is damaged or of another network: {kind}.{name} is {tuple(value.shape)} of {value.dtype}, "
                    f"to be {shape} of {dtype}."
                )
            if not value.isfinite().all() or (kind == "moment" and bool((value < 0).any())):
                raise ValueError(
                    f"{path} is damaged: {kind}.{name} holds a number that is not finite, or a negative moment."
                )
            if name in masks:
                value = torch.zeros(p.shape).masked_scatter_(masks[name], value.float())
            found[kind, name] = value.to(p.device, p.dtype)
    for name, p in parameters.items():
        p.copy_(found["weight", name])
        if p.requires_grad:
            count = torch.tensor(float(facts["updates"]), device=p.device)
            moments = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": found["moment", name]}
            trainer.optimizer.state[p] = moments
    progress = facts["progress"]
    if trainer.pruner:
        trainer.pruner.load_state_dict({"step": progress["step"], "masks": masks})
    return Progressed(step=progress["step"], seconds=progress["seconds"], loss_mean=progress["loss_mean"])


def _filled(config: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """A checkpoint's config, settings that did not exist when its run began at their defaults."""
    return {**json.loads(json.dumps(trainer.defaults)), **config}


def _same_training(path: Path, was: Any, now: Any, trainer: Any) -> None:
    old, new = _filled(was["config"], trainer), now["config"]
    changed = [key for key in new if key not in _OF_THE_MACHINE and old.get(key) != new[key]]
    texts = [about.get("corpus") for about in (was, now)]
    if not all(isinstance(text, dict) for text in texts) or texts[0].get("sha256") != texts[1].get("sha256"):
        changed.append("text")
    if was.get("vocabulary") != now.get("vocabulary"):
        changed.append("vocabulary")
    if changed:
        raise ValueError(
            f"{path} comes from a training with another {', '.join(changed)}. Give the settings that it had."
        )


def _unpacked(path: Path, name: str, bits: Tensor, shape: torch.Size) -> Tensor:
    count = shape.numel()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-count // 8),):
        raise ValueError(
            f"{path} is damaged or of another network: live.{name} is not a bit for each of {count:,} weights."
        )
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(np.bool_)).view(shape)


def whole(tensors: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, in which shared weights stand under each of their names."""
    names: dict[int, str] = {}
    found = dict(tensors)
    for name, value in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(value), name)
        if first != name and first in found:
            found.setdefault(name, found[first])
    return found


def holding(make: Callable[[], Model], tensors: Mapping[str, Tensor], path: Path) -> Model:
    """The model that ``make`` builds, with the weights of the checkpoint at ``path``.

    Shapes are compared before memory is asked for: the settings of a damaged file may ask for any amount.

    Raises:
        ValueError: the file holds other weights than the model has.
    """
    with torch.device("meta"), _Unset():
        blank = make()
    found = whole(tensors, blank)
    wanted, there = ({k: tuple(v.shape) for k, v in each.items()} for each in (blank.state_dict(), found))
    if odd := sorted(k for k in wanted.keys() | there.keys() if wanted.get(k) != there.get(k)):
        what = f"{odd[0]} is {there.get(odd[0], 'missing')}, by the settings {wanted.get(odd[0], 'not there')}"
        raise ValueError(f"{path} holds other weights than its own settings ask for: it is damaged. {what}.")
    with _Unset():
        model = make()
    model.load_state_dict(found)
    return model


class _Unset(TorchFunctionMode):
    """Nothing is drawn for weights while this lasts: what was read takes their place. On torch's meta device a first draw takes
    seconds, in which torch loads its compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _tuple(state: Any) -> tuple[Tensor, ...]:
    return () if state is None else state if isinstance(state, tuple) else (state,)
