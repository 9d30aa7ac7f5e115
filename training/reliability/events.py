"""The event log: every decision about a run that somebody may want to know later, one JSON object a line."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from training.reliability.json_lines import JsonLines

EVENTS_NAME = "events.jsonl"


class EventLog:
    """Rank 0 writes `events.jsonl`; another rank writes `events_rank_XXXXX.jsonl`, made with its first event."""

    def __init__(self, stage_folder: Path, rank: int):
        name = EVENTS_NAME if rank == 0 else f"events_rank_{rank:05d}.jsonl"
        self.path = stage_folder / name
        self.rank = rank
        self._lines: JsonLines | None = None
        self._has_warned = False

    def record(self, event: str, **details: Any) -> None:
        """Append one event. A disk that takes no more is told once on stderr and never stops the run."""
        entry = {"time": time.time(), "rank": self.rank, "event": event} | details
        try:
            self._lines = self._lines or JsonLines(self.path)
            self._lines.append(entry)
        except OSError as error:
            if not self._has_warned:
                tell(f"events can no longer be written to {self.path}: {error}; training goes on")
                self._has_warned = True

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def tell(message: str) -> None:
    """One message for the person at the terminal; stdout is kept for answers. No terminal any more: no message."""
    with contextlib.suppress(OSError, ValueError):
        print(f"nextstate: {message}", file=sys.stderr, flush=True)
