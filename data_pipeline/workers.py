"""Worker processes that may die: whoever watches them does their work again, and they never outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from model.errors import UserError, escapes_shown

MAX_DEATHS = 3  # of workers over one job, before it is taken for the cause
_PATIENCE_SECONDS = 10.0  # for a worker to end by SIGTERM
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    task: list[Any]


def run_supervised(
    work: Callable[[Sequence[Any]], None], tasks: Sequence[Sequence[Any]], num_workers: int
) -> list[tuple[Any, str]]:
    """Call `work(task)` for every task, in `num_workers` processes; `work` must do nothing for jobs that are done.

    A task whose worker died (by a signal, by the kernel's out-of-memory killer) is done again, each of its jobs alone.
    A job over which `MAX_DEATHS` workers died is given up, and the others are done: those given up are returned, each
    with how its last worker died. Raises the first error that `work` raised. The processes are gone when this returns
    or raises, and soon after this process has been killed.
    """
    # A process that had torch's threads running must not be forked.
    context = multiprocessing.get_context("spawn")
    waiting: deque[list[Any]] = deque(list(task) for task in tasks)
    deaths: Counter[str] = Counter()
    given_up: list[tuple[Any, str]] = []
    running: dict[Connection, _Worker] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                worker = _start(context, work, waiting.popleft())
                running[worker.pipe] = worker
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                worker = running[pipe]
                try:
                    error = pipe.recv()
                except (EOFError, OSError):  # it died without a word
                    del running[pipe]
                    worker.process.join()
                    waiting.extend(_again(worker, deaths, given_up))
                    continue
                if error is not None:
                    raise error
                if waiting:
                    worker.task = waiting.popleft()
                    with contextlib.suppress(OSError):  # died meanwhile: the next recv tells
                        pipe.send(worker.task)
                else:
                    del running[pipe]
                    _end(worker)
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            _end(worker)
    return given_up


def _start(context: Any, work: Callable[[Sequence[Any]], None], task: list[Any]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen when the worker dies
    with contextlib.suppress(OSError):  # died already: recv tells
        ours.send(task)
    return _Worker(process, ours, task)


def _again(worker: _Worker, deaths: Counter[str], given_up: list[tuple[Any, str]]) -> list[list[Any]]:
    """The jobs of a dead worker, each as a task of its own; one that has killed too many goes to `given_up`."""
    names = [str(job) for job in worker.task]
    code = worker.process.exitcode
    told = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    if len(names) == 1:
        deaths[names[0]] += 1
        if deaths[names[0]] >= MAX_DEATHS:
            print(f"{MAX_DEATHS} workers died over {names[0]} ({told}): given up", file=sys.stderr, flush=True)
            given_up.append((worker.task[0], told))
            return []
    print(f"a worker died ({told}); its {len(names)} jobs are done again", file=sys.stderr, flush=True)
    return [[job] for job in worker.task]


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(_PATIENCE_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, work: Callable[[Sequence[Any]], None]) -> None:
    """In a worker: do tasks until the pipe closes."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    with escapes_shown():
        _answer_all(pipe, work)


def _answer_all(pipe: Connection, work: Callable[[Sequence[Any]], None]) -> None:
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            work(task)
            answer: BaseException | None = None
        except Exception as error:
            answer = _portable(error)
        try:
            pipe.send(answer)
        except OSError:
            return


def end_with_parent() -> None:
    """Leave at once when the parent is gone, however it went: half-written temporaries are the next run's to remove.

    On Linux the kernel sees to it, also where a library holds the interpreter (a decoder that never returns); elsewhere
    a thread does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sentinel = parent.sentinel

    def leave() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()  # it was perhaps gone before the kernel was asked


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it: an exception with arguments of its own may not unpickle."""
    if isinstance(error, UserError):
        return error
    return RuntimeError(f"in a worker: {type(error).__name__}: {error}")
