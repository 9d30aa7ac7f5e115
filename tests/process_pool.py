"""A pool of worker processes over gloo: megatron is imported once, and many cases run inside.

It is no part of a conftest.py: several folders have one, and the workers import this module by its name.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MAX_RANKS = 4
JOB_TIMEOUT_SECONDS = 300


def _run_job(job: dict[str, Any], rank: int) -> Any:
    """One job in a fresh process group; the function finds `torch.distributed` ready and no parallel layout."""
    for entry in job["path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    import torch.distributed as distributed

    from model.parallel import groups

    groups.keep_to_loopback()
    try:
        distributed.init_process_group("gloo", init_method=job["store"], rank=rank, world_size=job["world_size"])
        distributed.barrier()  # a rank that is done at once would hang up on one that still connects
        function = getattr(importlib.import_module(job["module"]), job["function"])
        return function(*job["arguments"], **job["options"])
    finally:
        groups.destroy()


def _worker(connection: Connection, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        try:
            connection.send((True, _run_job(job, rank)))
        except BaseException:  # reported to the test, which raises it
            connection.send((False, traceback.format_exc()))


class ProcessPool:
    """Workers 0 .. MAX_RANKS - 1, each started when first needed; megatron is imported once for all of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        # The server imports torch, megatron and deepspeed once; each worker is a fork of it.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training.engines.megatron.engine", "training.engines.deepspeed.engine"])
        self.workers: list[tuple[Any, Connection]] = []
        self.num_jobs = 0

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int = MAX_RANKS, **options: Any) -> list[Any]:
        """`function(*arguments, **options)` on `ranks` processes at once; their results by rank.

        The function is imported by name in the workers, so it must stand at the top of a module. Fails with the
        worker's traceback when any rank fails.
        """
        while len(self.workers) < ranks:
            self._start()
        self.num_jobs += 1
        job = {
            "module": function.__module__,
            "function": function.__name__,
            "arguments": arguments,
            "options": options,
            "path": list(sys.path),
            "world_size": ranks,
            "store": f"file://{self.folder}/store_{self.num_jobs}",
        }
        connections = [connection for _, connection in self.workers[:ranks]]
        for connection in connections:
            connection.send(job)
        answers = [self._answer(connection) for connection in connections]
        failures = [f"rank {rank}:\n{value}" for rank, (done, value) in enumerate(answers) if not done]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_worker, args=(theirs, len(self.workers)), daemon=True)
        process.start()
        theirs.close()
        self.workers.append((process, ours))

    def _answer(self, connection: Connection) -> tuple[bool, Any]:
        """A worker that hangs or dies ends the pool: its peers wait for it in a collective."""
        try:
            if connection.poll(JOB_TIMEOUT_SECONDS):
                answer: tuple[bool, Any] = connection.recv()
                return answer
            reason = f"no answer within {JOB_TIMEOUT_SECONDS} s"
        except EOFError:
            reason = "the process died"
        except OSError:
            reason = "ended with the pool, which a rank before it failed"
        self.close()
        return False, reason

    def close(self) -> None:
        for process, connection in self.workers:
            process.terminate()
            process.join()
            connection.close()
        self.workers = []
