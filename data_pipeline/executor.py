"""Runs shard jobs: which shard belongs to which task; the tasks on datatrove or in this process.

A task is a group of shards chosen by a hash of the shard's name. What is done is told by the token
files' manifests and by nothing else, so the number of tasks may change at any time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.workers import run_supervised
from model.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.sources.inputs import Shard

EXECUTORS = ("auto", "local", "datatrove")


@dataclass(frozen=True)
class ShardJob:
    shard: Shard
    prefix: Path  # of the token file that it becomes
    name: str = ""  # part of its documents' ids; empty: the shard's file name


def task_of(shard_name: str, num_tasks: int) -> int:
    """The task of a shard: the same whatever other shards there are."""
    digest = hashlib.blake2b(shard_name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_tasks


def group_jobs(jobs: Sequence[ShardJob], num_tasks: int) -> list[list[ShardJob]]:
    """The jobs of each of `num_tasks` tasks; some may have none."""
    groups: list[list[ShardJob]] = [[] for _ in range(num_tasks)]
    for job in jobs:
        groups[task_of(job.shard.name, num_tasks)].append(job)
    return groups


def choose_executor(name: str, workers: int) -> str:
    """`auto` is datatrove where it is installed and there is more than one worker.

    One worker needs no executor: datatrove starts a manager process and writes log files for it.
    """
    installed = importlib.util.find_spec("datatrove") is not None
    if name == "auto":
        return "datatrove" if installed and workers > 1 else "local"
    if name == "datatrove" and not installed:
        raise UserError(
            "datatrove is not installed",
            where="executor=datatrove",
            fix="pip install 'nextstate[cluster]', or executor=local",
        )
    return name


def run_tasks(
    work: Callable[[Sequence[ShardJob]], None],
    tasks: Sequence[Sequence[ShardJob]],
    *,
    workers: int,
    executor: str,
    log_folder: Path,
) -> list[tuple[ShardJob, str]]:
    """Call `work` with every task's jobs, `workers` tasks at a time; the first error stops it all.

    Returns the jobs that were given up because every worker died over them, and how the last one died.

    `work` must be picklable: with several workers it runs in processes started afresh (`data_pipeline.workers`), whose
    sudden end is noticed: their shards are done again by another one.
    """
    filled = [list(task) for task in tasks if task]
    workers = max(1, min(workers, len(filled)))
    if not filled:
        return []
    if executor == "datatrove":
        return _run_on_datatrove(work, filled, workers, log_folder)
    return _run_all(work, filled, workers)


def _run_all(
    work: Callable[[Sequence[ShardJob]], None], tasks: list[list[ShardJob]], workers: int
) -> list[tuple[ShardJob, str]]:
    if workers > 1:
        return run_supervised(work, tasks, workers)
    for task in tasks:
        work(task)
    return []


@dataclass
class _DatatroveTask:
    """A task as datatrove runs one: with a log of its own and statistics."""

    work: Callable[[Sequence[ShardJob]], None]
    log_folder: str
    numbers: dict[str, int]  # of the task that a shard belongs to
    num_tasks: int

    def __call__(self, jobs: Sequence[ShardJob]) -> None:
        from datatrove.executor.local import LocalPipelineExecutor

        rank, step = self.numbers[str(jobs[0].prefix)], _Step(self.work, list(jobs))
        # Marks of completed ranks are datatrove's own; the manifests know better.
        executor = LocalPipelineExecutor([step], self.num_tasks, 1, self.log_folder, skip_completed=False)
        # Its `run` starts a pool, which waits for ever for a worker that was killed. What runs a single rank has an
        # underscore, but it is what a pool of its own calls. Local rank 1: the log goes to its file only.
        executor._run_for_rank(rank, local_rank=1)
        if step.refusal is not None:
            raise step.refusal


@dataclass
class _Step:
    """One pipeline step in datatrove's sense: called with (data, rank, world size)."""

    work: Callable[[Sequence[ShardJob]], None]
    jobs: list[ShardJob]
    refusal: UserError | None = None  # the command says it; datatrove would print a traceback beside it

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        try:
            self.work(self.jobs)
        except UserError as error:
            self.refusal = error


def _run_on_datatrove(
    work: Callable[[Sequence[ShardJob]], None], tasks: list[list[ShardJob]], workers: int, log_folder: Path
) -> list[tuple[ShardJob, str]]:
    numbers = {str(job.prefix): number for number, task in enumerate(tasks) for job in task}
    return _run_all(_DatatroveTask(work, str(log_folder), numbers, len(tasks)), tasks, workers)


def threads_per_worker(workers: int) -> int:
    """The share of this process's cores that a worker's torch may use."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers))
