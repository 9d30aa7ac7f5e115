"""Processes that are killed on purpose: who belongs to a command, who is left of it, and what it listens on."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "NEXTSTATE_KILLS_MARK"  # in the environment of a command and so of all that it starts
SECONDS_BETWEEN_LOOKS = 0.05
PATIENCE_SECONDS = 30.0  # for those who are left to end
HANG_SECONDS = 600.0  # of one command
VICTIMS = ("parent", "worker", "group")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)  # two of three cannot be heard


@dataclass
class Findings:
    """What went wrong, over all kills of one kind of command."""

    num_kills: int = 0
    by_victim: dict[str, int] = field(default_factory=dict)
    num_orphans: int = 0  # processes that were left after PATIENCE_SECONDS
    num_hangs: int = 0  # commands that did not end
    slowest_end_seconds: float = 0.0  # until the last process of a killed command was gone
    outside_sockets: set[str] = field(default_factory=set)
    wrong_exits: list[str] = field(default_factory=list)


class Command:
    """A command in a session of its own; its processes are found by a mark in their environment, whatever their parent."""

    def __init__(self, arguments: list[str], log: Path, findings: Findings):
        self.mark, self.findings = uuid.uuid4().hex, findings
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch_sockets, daemon=True)
        self._watcher.start()

    def members(self) -> list[psutil.Process]:
        """All of its processes that run; a zombie is none."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and self._is_ours(process.pid):
                    found.append(process)
        return found

    def _is_ours(self, process_id: int) -> bool:
        return f"{MARK}={self.mark}".encode() in Path(f"/proc/{process_id}/environ").read_bytes()

    def _watch_sockets(self) -> None:
        while not self._done.wait(0.5):
            for process in self.members():
                with contextlib.suppress(psutil.Error):
                    for one in process.net_connections("inet"):
                        if one.laddr and not ipaddress.ip_address(one.laddr.ip).is_loopback:
                            self.findings.outside_sockets.add(f"{one.laddr.ip} {one.status}")

    def kill_after(self, seconds: float, draw: random.Random) -> bool:
        """Kill the parent, one of its workers or all at once; False when it had ended before, or ended just now."""
        try:
            self.process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            pass
        victim, number = draw.choice(VICTIMS), draw.choice(SIGNALS)
        members = self.members()
        workers = [one for one in members if one.pid != self.process.pid]
        if victim == "worker" and not workers:
            victim = "parent"
        if victim == "worker":
            chosen = [draw.choice(workers).pid]
        else:
            chosen = [self.process.pid] if victim == "parent" else [one.pid for one in members]
        hits = [self._kill(process_id, number) for process_id in chosen]
        if not any(hits):
            return False
        key = f"{victim} {number.name}"
        self.findings.by_victim[key] = self.findings.by_victim.get(key, 0) + 1
        self.findings.num_kills += 1
        return True

    @staticmethod
    def _kill(process_id: int, number: signal.Signals) -> bool:
        """True when it ran until then: a zombie takes a signal too."""
        try:
            is_running = psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
            os.kill(process_id, number)
        except (psutil.Error, ProcessLookupError):
            return False
        return is_running

    def end(self) -> int:
        """Wait for it and for all that it started; its exit code. A command that goes on after a worker's death may."""
        try:
            code = self.process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self.findings.num_hangs += 1
            code = -signal.SIGKILL
        started = time.monotonic()
        while (left := self.members()) and time.monotonic() - started < PATIENCE_SECONDS:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds = time.monotonic() - started
        self.findings.slowest_end_seconds = max(self.findings.slowest_end_seconds, seconds)
        for process in left:
            print(f"left behind: {process}", file=sys.stderr)
            self.findings.num_orphans += process.pid != self.process.pid
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._done.set()
        self._watcher.join()
        return code
