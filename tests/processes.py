"""Processes of tests, forked from a server that runs nothing else: no lock that a thread of the suite holds is held in them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sparsefold.recipes.lm"])


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def alone(work: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a process that does this work."""
    return _exits([(work, arguments)])[0]


def together(work: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What this work returns, or says that it raises, in each of some processes that are told what torchrun tells its own."""
    port, said = free_port(), CONTEXT.SimpleQueue()
    calls = [(_member, (said, rank, count, port, work, arguments)) for rank in range(count)]
    assert _exits(calls) == [0] * count
    return [value for _, value in sorted(said.get() for _ in calls)]


def _member(said: Any, rank: int, count: int, port: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    told = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        said.put((rank, work(*arguments)))
    except BaseException as error:
        said.put((rank, f"{type(error).__name__}: {error}"))


def _exits(calls: list[tuple[Callable[..., None], tuple[Any, ...]]], seconds: float = 120.0) -> list[int]:
    workers = [CONTEXT.Process(target=_one_thread, args=call, daemon=True) for call in calls]
    try:
        for worker in workers:
            worker.start()
        until = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
        late = [number for number, worker in enumerate(workers) if worker.exitcode is None]
        assert not late, f"process {late} of {len(workers)} did not end within {seconds:.0f} seconds"
        return [worker.exitcode for worker in workers]
    finally:
        for worker in workers:  # what is left would be waited for when the suite ends
            worker.kill()


def _one_thread(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    work(*arguments)
