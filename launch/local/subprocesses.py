"""Child processes under supervision: their output is shown and logged, signals reach them, memory is sampled."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from training.reliability.events import tell
from training.reliability.signals import heard_signals

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Outcome:
    exit_code: int  # 128 + n after signal n, as in a shell
    wall_seconds: float
    peak_memory_bytes: int  # resident memory summed over the process tree, pages shared by two processes counted twice


class Supervised:
    """A child process: its stdout and stderr go to our stderr, each line with `prefix`, and into `log`."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        prefix: str = "",
        environment: Mapping[str, str] | None = None,
        sample_seconds: float = 0.5,
    ):
        """Starts it; it gets SIGTERM when this process dies. `environment` None: ours."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started, self._log = time.perf_counter(), log.open("ab", buffering=0)
        self.child = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
            env=environment,
        )
        assert self.child.stdout is not None
        self._relay = threading.Thread(target=relay_lines, args=(self.child.stdout, self._log, prefix), daemon=True)
        self._memory = MemorySampler(self.child.pid, sample_seconds)
        self._relay.start()
        self._memory.start()

    @property
    def peak_memory_bytes(self) -> int:
        """So far."""
        return self._memory.peak_bytes

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)

    def finish(self) -> Outcome:
        """Waits for its end."""
        code = self.child.wait()
        seconds = time.perf_counter() - self._started
        self._memory.finish()
        self._relay.join(timeout=10.0)  # a grandchild that outlives the child may keep the pipe open
        if not self._relay.is_alive():
            self._log.close()
        return Outcome(code if code >= 0 else 128 - code, seconds, self._memory.peak_bytes)


def run_supervised(arguments: list[str], log: Path, *, prefix: str = "", sample_seconds: float = 0.5) -> Outcome:
    """Runs `arguments` to the end, and passes on the signals that stop a run: a training stage saves and exits with 3."""
    one = Supervised(arguments, log, prefix=prefix, sample_seconds=sample_seconds)
    with signals_to([one]):
        return one.finish()


def end_with_parent() -> None:
    """In the child, before it starts: ask Linux for a SIGTERM when the parent dies, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def relay_lines(source: IO[bytes], log: IO[bytes], prefix: str) -> None:
    """Read to the end whatever becomes of the lines: a child whose pipe nobody reads would stop for ever.

    A log on a full disk is told once and goes on when there is space again; stderr may be closed.
    """
    is_full = False
    for line in source:
        try:
            log.write(line)
            log.flush()
        except OSError as error:
            if not is_full:
                tell(f"{prefix}its log can no longer be written: {error}; it goes on")
            is_full = True
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(prefix + line.decode("utf-8", "replace"))
            sys.stderr.flush()


@contextlib.contextmanager
def signals_to(children: Collection[Supervised], heard: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """While the block runs, signals that stop a run go to all that are children when they arrive, and to `heard`.

    Off the main thread Python allows no handlers: nothing is passed on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        heard(number)
        for one in list(children):
            one.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in heard_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MemorySampler(threading.Thread):
    """Samples the resident memory of a process and all its descendants."""

    def __init__(self, pid: int, sample_seconds: float):
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid, self._sample_seconds, self._done = pid, sample_seconds, threading.Event()

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._pid)
            self.peak_bytes = tree_memory_bytes(root)  # at once: the process may be a short one
            while not self._done.wait(self._sample_seconds):
                self.peak_bytes = max(self.peak_bytes, tree_memory_bytes(root))

    def finish(self) -> None:
        self._done.set()
        self.join()


def tree_memory_bytes(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it ended between the listing and the reading
            total += process.memory_info().rss
    return total
