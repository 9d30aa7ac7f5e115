"""A pool of worker processes over gloo: megatron is imported once, and many cases run inside.

It is no part of a conftest.py: several folders have one, and the workers import this module by its name.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_RANKS = 4
JOB_TIMEOUT_SECONDS = 300
# Behind a rank that failed, for those that do not hear of it: its connections are closed before it answers.
FAILURE_TIMEOUT_SECONDS = 30
STACK_TIMEOUT_SECONDS = 10


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


def _worker(connection: Connection, rank: int, stack: Path) -> None:
    import torch

    torch.set_num_threads(1)
    stream = stack.open("w")
    faulthandler.register(signal.SIGUSR1, file=stream)
    while (job := connection.recv()) is not None:
        try:
            answer = True, _run_job(job, rank)
        except BaseException:  # reported to the test, which raises it
            answer = False, traceback.format_exc()
        if not answer[0]:
            # The error's frames held models, and these their groups, whose connections were open until here: a rank
            # that waits for this one in a collective would wait for ever.
            gc.collect()
        connection.send(answer)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    stack: Path  # where it writes what it is doing when it is asked to by a signal

    def where(self) -> str:
        """The stack of a worker that does not answer. faulthandler writes it, which needs no lock of the interpreter."""
        os.kill(self.process.pid, signal.SIGUSR1)
        end, text = time.monotonic() + STACK_TIMEOUT_SECONDS, ""
        while time.monotonic() < end:
            time.sleep(0.1)
            before, text = text, self.stack.read_text()
            if text and text == before:
                break
        return text


class ProcessPool:
    """Workers 0 .. MAX_RANKS - 1, each started when first needed; megatron is imported once for all of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        # The server imports torch, megatron and deepspeed once; each worker is a fork of it.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training.engines.megatron.engine", "training.engines.deepspeed.engine"])
        self.workers: list[_Worker] = []
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
        for worker in self.workers[:ranks]:
            worker.connection.send(job)
        answers = self._answers(self.workers[:ranks])
        failures = [f"rank {rank}:\n{value}" for rank, (done, value) in enumerate(answers) if not done]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        rank = len(self.workers)
        stack = self.folder / f"stack_{self.num_jobs}_{rank}.txt"
        process = self.context.Process(target=_worker, args=(theirs, rank, stack), daemon=True)
        process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours, stack))

    def _answers(self, workers: list[_Worker]) -> list[tuple[bool, Any]]:
        """By rank. A worker that hangs or dies ends the pool: its peers may wait for it in a collective."""
        silent = {worker.connection: rank for rank, worker in enumerate(workers)}
        answers: dict[int, tuple[bool, Any]] = {}
        end, is_whole, limit = time.monotonic() + JOB_TIMEOUT_SECONDS, True, f"within {JOB_TIMEOUT_SECONDS} s"
        while silent and (ready := wait(list(silent), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = silent.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank], is_whole = (False, "the process died"), False
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + FAILURE_TIMEOUT_SECONDS)
                    limit = "after another rank failed"
        for rank in silent.values():
            answers[rank] = False, f"no answer {limit}\n{workers[rank].where()}"
        if silent or not is_whole:
            self.close()
        return [answers[rank] for rank in range(len(workers))]

    def close(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()
        self.workers = []
