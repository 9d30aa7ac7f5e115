"""Heartbeats, and the watchdog that names a hang: which rank, which phase, every rank's stack."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from training.reliability.events import EventLog, tell

HEARTBEATS_FOLDER = "heartbeats"
HANG_MARKER = "hang"
LONGEST_TICK_SECONDS = 5.0


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Heartbeat:
    """What this rank is doing now. `enter` is called with each change of phase and costs nothing."""

    def __init__(self, stage_folder: Path, rank: int):
        self.folder = stage_folder / HEARTBEATS_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.step = 0
        self.phase = "start"
        self.since = time.monotonic()

    def enter(self, phase: str, step: int | None = None) -> None:
        self.step = self.step if step is None else step
        self.phase = phase
        self.since = time.monotonic()

    def seconds_in_phase(self) -> float:
        return time.monotonic() - self.since

    def write(self) -> None:
        """Publish `rank_XXXXX.json`: {rank, step, phase, seconds_in_phase, time, peak_memory_bytes}."""
        beat = {
            "rank": self.rank,
            "step": self.step,
            "phase": self.phase,
            "seconds_in_phase": self.seconds_in_phase(),
            "time": time.time(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        path = self.folder / f"rank_{self.rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat))
        os.replace(temporary, path)


def read_heartbeats(stage_folder: Path, world_size: int) -> list[dict[str, Any]]:
    """The last heartbeat of each rank of the present run; ranks without a readable one are left out.

    Heartbeats are replaced often and not flushed to the disk: a power cut may leave an empty one.
    """
    found = []
    for rank in range(world_size):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.append(json.loads((stage_folder / HEARTBEATS_FOLDER / f"rank_{rank:05d}.json").read_text()))
    return found


class Watchdog:
    """A thread that writes this rank's heartbeat and ends the process when a phase lasts too long.

    The rank whose time runs out first leaves a marker, on which the other ranks write their stacks too. A process
    that cannot even run this thread (a C call that keeps the interpreter's lock) is ended by faulthandler's own
    timer, which needs no lock.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        events: EventLog,
        world_size: int,
        timeout_seconds: float,
        end_process: Callable[[int], Any] = os._exit,
    ):
        self.heartbeat, self.events, self.world_size = heartbeat, events, world_size
        self.timeout_seconds = timeout_seconds  # 0: heartbeats only
        self.tick_seconds = min(LONGEST_TICK_SECONDS, timeout_seconds / 4) if timeout_seconds else LONGEST_TICK_SECONDS
        self.stage_folder = heartbeat.folder.parent
        self.stacks_path = self.stage_folder / f"stacks_rank_{heartbeat.rank}.txt"
        self._end_process = end_process
        self._started = time.time()
        self._closed = threading.Event()
        self._has_warned = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        with open(self.stacks_path, "w") as stacks:
            while True:
                self._beat()
                if self.timeout_seconds:
                    self._check(stacks)
                if self._closed.wait(self.tick_seconds):
                    break
            faulthandler.cancel_dump_traceback_later()
            is_empty = stacks.tell() == 0
        self._beat()
        if is_empty:
            self.stacks_path.unlink()

    def _beat(self) -> None:
        try:
            self.heartbeat.write()
        except OSError as error:
            if not self._has_warned:
                tell(f"the heartbeat of rank {self.heartbeat.rank} cannot be written: {error}")
                self._has_warned = True

    def _check(self, stacks: TextIO) -> None:
        if self.heartbeat.seconds_in_phase() > self.timeout_seconds:
            self._report_and_end(stacks)
        elif self._another_rank_hangs():
            faulthandler.dump_traceback(file=stacks, all_threads=True)
        else:
            faulthandler.dump_traceback_later(self.timeout_seconds + 2 * self.tick_seconds, exit=True, file=stacks)

    def _another_rank_hangs(self) -> bool:
        marker = self.heartbeat.folder / HANG_MARKER
        return marker.exists() and marker.stat().st_mtime >= self._started

    def _report_and_end(self, stacks: TextIO) -> None:
        heartbeat = self.heartbeat
        faulthandler.dump_traceback(file=stacks, all_threads=True)
        (heartbeat.folder / HANG_MARKER).touch()
        beats = read_heartbeats(self.stage_folder, self.world_size)
        # Ranks that wait for another one are ahead of it: the one that is behind is the one to look at.
        behind = min(beats, key=lambda beat: (beat["step"], -beat["seconds_in_phase"]))
        self.events.record(
            "hang",
            step=heartbeat.step,
            phase=heartbeat.phase,
            seconds=round(heartbeat.seconds_in_phase(), 3),
            rank_behind=behind["rank"],
            phase_behind=behind["phase"],
            stacks=self.stacks_path.name,
        )
        tell(
            f"rank {heartbeat.rank} made no progress for {heartbeat.seconds_in_phase():.0f} seconds in phase "
            f"{heartbeat.phase!r} of step {heartbeat.step + 1}; the rank behind all others is "
            f"{behind['rank']} in phase {behind['phase']!r}; stacks: {self.stacks_path}"
        )
        time.sleep(2 * self.tick_seconds)  # the other ranks write their stacks
        self._end_process(1)
