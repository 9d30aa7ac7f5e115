"""Run the ranks of a stage as processes of this machine, and answer for them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.local.worker import ANSWER_NAME, MEETING_PREFIX, PARENT_VARIABLE, REPORT_VARIABLE
from model.errors import UserError
from model.parallel.groups import RENDEZVOUS_VARIABLE
from training.config import TrainConfig, save_yaml
from training.reliability.signals import STOP_SIGNALS, heard_signals
from training.stage import EXIT_STOPPED, StoppedEarly, refuse_taken, run_stage

LAUNCHER_LOCK = "launcher.lock"  # held by the process that made a meeting folder
SECONDS_TO_LOCK = 60.0  # a folder without a holder is left alone for so long: it may just be being made
SECONDS_BETWEEN_LOOKS = 0.05
# After one rank failed the others get this long to notice, tell their own story and end.
GRACE_SECONDS = 5.0


@dataclass
class Worker:
    """One rank: its process, where its messages go, what it reports when it fails."""

    rank: int
    process: subprocess.Popen[bytes]
    log_path: Path | None  # None: rank 0, which writes to this process's stderr
    report_path: Path
    was_killed: bool = False  # by this process, because another rank had failed

    def read_report(self) -> dict[str, Any] | None:
        return json.loads(self.report_path.read_text()) if self.report_path.exists() else None


class Supervisor:
    """Starts the ranks, passes signals on to them, and ends all when one fails.

    The ranks are in sessions of their own, so a Ctrl-C of the terminal reaches them once: through here. The second
    one kills them.
    """

    def __init__(self, task: str, config_path: Path, folder: Path, log_folder: Path, world_size: int):
        self.task = task
        self._read_end, self._write_end = os.pipe()
        self.signals_sent: set[int] = set()
        self.workers: list[Worker] = []
        self._previous: dict[int, Any] = {}  # handlers to put back
        log_folder.mkdir(parents=True, exist_ok=True)
        # Signals wait until all ranks are there to hear of them, and in a rank until it is ready for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for rank in range(world_size):
                self.workers.append(self._start(rank, world_size, config_path, folder, log_folder))
            self._previous = {number: signal.signal(number, self._forward) for number in heard_signals()}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(self._read_end)

    def wait(self) -> list[int]:
        """Exit codes by rank, negative for a signal; those that this process killed have the code -SIGKILL."""
        try:
            deadline = None
            while any(worker.process.poll() is None for worker in self.workers):
                if deadline is None and self._has_failure():
                    deadline = time.monotonic() + GRACE_SECONDS
                if deadline is not None and time.monotonic() > deadline:
                    self.kill()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self.kill()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            os.close(self._write_end)
        return [worker.process.returncode for worker in self.workers]

    def kill(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.was_killed = True
                worker.process.kill()
                worker.process.wait()

    def _start(self, rank: int, world_size: int, config_path: Path, folder: Path, log_folder: Path) -> Worker:
        report_path = folder / f"report_{rank:05d}.json"
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            RENDEZVOUS_VARIABLE: str(folder / "rendezvous"),
            REPORT_VARIABLE: str(report_path),
            PARENT_VARIABLE: str(self._read_end),
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        log_path = log_folder / f"rank_{rank:05d}.log" if rank else None
        log = open(log_path, "ab") if log_path else None  # noqa: SIM115 (closed below)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.local.worker", "--task", self.task, "--config", str(config_path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log or 2,
                stderr=log or 2,
                pass_fds=(self._read_end,),
                start_new_session=True,
            )
        finally:
            if log:
                log.close()
        return Worker(rank, process, log_path, report_path)

    def _has_failure(self) -> bool:
        return any(worker.process.poll() not in (None, 0, EXIT_STOPPED) for worker in self.workers)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.signals_sent:
            self.kill()
        self.signals_sent.add(number)
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)


def run_local(config: TrainConfig) -> dict[str, Any]:
    """Run one stage here: in this process when it has one rank, else in one process a rank.

    Raises what the ranks would have raised: `UserError`, `StoppedEarly`; a defect is told on stderr and ends in
    `SystemExit(1)`.
    """
    world_size = config.parallel.world_size
    if world_size == 1:
        return run_stage(config)
    refuse_taken(config.stage_folder)
    with meeting_folder() as folder:
        save_yaml(config, folder / "config.yaml")
        logs = config.stage_folder / "logs"
        return run_ranks("train", folder / "config.yaml", folder, logs, world_size)


@contextlib.contextmanager
def meeting_folder() -> Iterator[Path]:
    """Where the ranks meet, report and answer. It goes with this process, however that ends.

    The ranks remove it when this process was killed; where all were killed at once, the next launcher does.
    """
    _sweep(Path(tempfile.gettempdir()))
    with (
        tempfile.TemporaryDirectory(prefix=MEETING_PREFIX, ignore_cleanup_errors=True) as name,
        open(Path(name) / LAUNCHER_LOCK, "w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(name)


def _sweep(temporary: Path) -> None:
    """Remove meeting folders whose launcher is no more: the system has freed their locks."""
    for folder in temporary.glob(f"{MEETING_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, held, or just removed
            if time.time() - folder.stat().st_mtime < SECONDS_TO_LOCK:
                continue
            with open(folder / LAUNCHER_LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def run_ranks(task: str, config_path: Path, folder: Path, log_folder: Path, world_size: int) -> dict[str, Any]:
    """Run a task of `launch.local.worker` in one process a rank, and return what rank 0 answers. Raises as `run_local`."""
    supervisor = Supervisor(task, config_path, folder, log_folder, world_size)
    codes = supervisor.wait()
    judge_exits(supervisor.workers, codes, supervisor.signals_sent)
    return json.loads((folder / ANSWER_NAME).read_text(encoding="utf-8"))


def judge_exits(workers: list[Worker], codes: list[int], signals_sent: set[int]) -> None:
    """Raise for the rank that tells most about why the run did not end well; nothing when all ended with 0."""
    if all(code == 0 for code in codes):
        return
    reports = {worker.rank: report for worker in workers if (report := worker.read_report())}
    for report in reports.values():
        if report["kind"] == "user_error":
            raise UserError(report["message"])
    # A rank that died of the signal itself had not begun to train: nothing is lost.
    if all(code in (0, EXIT_STOPPED) for code in codes) or any(-code in signals_sent for code in codes):
        raise StoppedEarly
    deaths = [
        _describe_death(worker, code)
        for worker, code in zip(workers, codes, strict=True)
        if code not in (0, EXIT_STOPPED) and not worker.was_killed and worker.rank not in reports
    ]
    if deaths or not reports:
        message = "\n".join(deaths or ["all ranks were killed"])
    else:
        rank, report = min(reports.items(), key=lambda item: item[1]["time"])
        message = f"rank {rank} failed:\n{report['message']}"
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)


def _describe_death(worker: Worker, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"rank {worker.rank}: {how}{hint}" + (f", its log: {worker.log_path}" if worker.log_path else "")
