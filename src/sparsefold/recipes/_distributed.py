"""Several processes that train one model, as ``torchrun`` starts them; alone, all of this does nothing."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch
import torch.distributed as dist

LETTING_GO = 0.2  # seconds

# Ours, until the process ends. Its threads may still wait for Python when the others have gone, and a model that a traceback
# keeps would join them without giving Python up, were it the last to hold the group.
_own: list[dist.ProcessGroup | None] = []


def rank() -> int:
    """Which process this is; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(device: str | torch.device) -> None:
    """Join the processes that ``torchrun`` started, until this one ends. Nothing for one alone, or one that has joined.

    A second group of the same processes may find the addresses of the first, and wait for ever.
    """
    if count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    _own.append(dist.group.WORLD)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized() and dist.group.WORLD in _own:
        # A thread of the group that has still to let go of a tensor waits for Python. It gets it while we sleep; were it to ask
        # when the interpreter has begun to end, Python would end the thread, and with it C++ the process, by SIGABRT.
        time.sleep(LETTING_GO)
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this process: of several GPUs its own.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is cpu, cuda or cuda:N; got {name!r}.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name} was asked for, but torch finds no GPU. Use device=cpu.")
        if ":" not in name:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def means(device: torch.device, *values: float) -> list[float]:
    """The mean over all processes of each value."""
    if count() == 1:
        return list(values)
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return [float(v) for v in together / count()]


def from_first(device: torch.device, value: float) -> float:
    """The value that the first process has."""
    if count() == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)


def gathered(own: Any) -> list[Any]:
    """In the first process what every process has, in order; nothing in the others."""
    if count() == 1:
        return [own]
    parts: list[Any] | None = [None] * count() if rank() == 0 else None
    dist.gather_object(own, parts)
    return parts or []


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()
