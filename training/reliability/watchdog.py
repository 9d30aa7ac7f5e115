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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from training.reliability.events import EventLog, tell

HEARTBEATS_FOLDER = "heartbeats"
HANG_MARKER = "hang"
LONGEST_TICK_SECONDS = 5.0
# Before the first step a phase may last this many timeouts: imports from a crowded disk, nodes that come up late.
TIMEOUTS_OF_THE_START = 3
PATIENCE_WITHOUT_WATCHDOG_SECONDS = 1800.0  # torch's own default


def collective_timeout_seconds(hang_timeout_seconds: float) -> float:
    """How long a collective may wait for a rank: longer than the watchdog, which knows more, needs to end the run."""
    return (
        (TIMEOUTS_OF_THE_START + 1) * hang_timeout_seconds + 60.0
        if hang_timeout_seconds
        else PATIENCE_WITHOUT_WATCHDOG_SECONDS
    )


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Heartbeat:
    """What this rank is doing now. `enter` is called with each change of phase and costs nothing.

    A folder that cannot be written is told once: nobody sees the heartbeat then, and nothing else is lost.
    """

    def __init__(self, stage_folder: Path, rank: int):
        self.folder = stage_folder / HEARTBEATS_FOLDER
        self.rank = rank
        self.is_starting = True  # until the loop runs
        self._has_warned = False
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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(beat))
            os.replace(temporary, path)
        except OSError as error:
            if not self._has_warned:
                tell(f"the heartbeat of rank {self.rank} cannot be written: {error}; training goes on")
                self._has_warned = True


def read_heartbeats(stage_folder: Path, world_size: int) -> list[dict[str, Any]]:
    """The last heartbeat of each rank; ranks without a readable one are left out.

    Heartbeats are replaced often and not flushed to the disk: a power cut may leave an empty one.
    """
    beats = []
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads((stage_folder / HEARTBEATS_FOLDER / f"rank_{rank:05d}.json").read_text()))
    return beats


def rank_behind(beats: list[dict[str, Any]], world_size: int, oldest: float, now: float) -> tuple[int, str]:
    """(rank, phase) of the rank to look at: ranks that wait for another one are ahead of it.

    A heartbeat from before `oldest` is that of an earlier run. A rank that is stopped leaves an old heartbeat; since
    then its phase went on.
    """
    present = {beat["rank"]: beat for beat in beats if beat["time"] >= oldest}
    missing = [rank for rank in range(world_size) if rank not in present]
    if missing:
        return missing[0], "not started"
    behind = min(present.values(), key=lambda beat: (beat["step"], beat["time"] - now - beat["seconds_in_phase"]))
    return behind["rank"], behind["phase"]


def dump_stacks(file: TextIO) -> None:
    """All threads' stacks, the main thread's first: faulthandler begins with the newest thread and ends after 100."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    file.write("Main thread (most recent call last):\n" + "".join(traceback.format_stack(frame)) + "\n")
    file.flush()
    faulthandler.dump_traceback(file=file, all_threads=True)


class Watchdog:
    """A thread that writes this rank's heartbeat and ends the process when a phase lasts too long.

    The rank whose time runs out first leaves a marker, on which the other ranks write their stacks too. A process
    that cannot even run this thread (a C call that keeps the interpreter's lock) is ended by faulthandler's own
    timer, which needs no lock. It is there before the ranks meet, so that a start that hangs is named too.
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
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._open_stacks() as stacks:
            while True:
                self.heartbeat.write()
                if self.timeout_seconds:
                    self._check(stacks)
                if self._closed.wait(self.tick_seconds):
                    break
            faulthandler.cancel_dump_traceback_later()
            if self.timeout_seconds and self._another_rank_hangs():  # its end broke what this rank was doing
                dump_stacks(stacks)
        self.heartbeat.write()
        with contextlib.suppress(OSError):
            if self.stacks_path.stat().st_size == 0:
                self.stacks_path.unlink()

    def _open_stacks(self) -> TextIO:
        """Where stacks go: the file, or stderr where it cannot be made."""
        try:
            return open(self.stacks_path, "w")
        except OSError as error:
            tell(f"{self.stacks_path} cannot be written: {error}; stacks would go to stderr")
            return os.fdopen(os.dup(2), "w")

    def _check(self, stacks: TextIO) -> None:
        limit = self.timeout_seconds * (TIMEOUTS_OF_THE_START if self.heartbeat.is_starting else 1)
        if self.heartbeat.seconds_in_phase() > limit:
            self._report_and_end(stacks)
        elif self._another_rank_hangs():
            dump_stacks(stacks)
        else:
            faulthandler.dump_traceback_later(limit + 2 * self.tick_seconds, exit=True, file=stacks)

    def _another_rank_hangs(self) -> bool:
        try:
            return (self.heartbeat.folder / HANG_MARKER).stat().st_mtime >= self._started
        except OSError:
            return False

    def _report_and_end(self, stacks: TextIO) -> None:
        heartbeat = self.heartbeat
        dump_stacks(stacks)
        with contextlib.suppress(OSError):
            (heartbeat.folder / HANG_MARKER).touch()
        beats, now = read_heartbeats(self.stage_folder, self.world_size), time.time()
        behind, phase_behind = rank_behind(
            beats, self.world_size, self._started - TIMEOUTS_OF_THE_START * self.timeout_seconds, now
        )
        self.events.record(
            "hang",
            step=heartbeat.step,
            phase=heartbeat.phase,
            seconds=round(heartbeat.seconds_in_phase(), 3),
            rank_behind=behind,
            phase_behind=phase_behind,
            stacks=self.stacks_path.name,
        )
        tell(
            f"rank {heartbeat.rank} made no progress for {heartbeat.seconds_in_phase():.0f} seconds in phase "
            f"{heartbeat.phase!r} of step {heartbeat.step + 1}; the rank behind all others is "
            f"{behind} in phase {phase_behind!r}; stacks: {self.stacks_path}"
        )
        time.sleep(2 * self.tick_seconds)  # the other ranks write their stacks
        self._end_process(1)
