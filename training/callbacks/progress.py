"""One line on stderr that says how far the run is."""

from __future__ import annotations

import contextlib
import sys
import time

from training.callbacks.base import Callback
from training.contracts.run_view import RunView
from training.metrics import StepRecord

SECONDS_BETWEEN_LINES = 10.0  # where stderr is a file; a terminal's line is rewritten in place


class ProgressLine(Callback):
    """step/total, loss, tokens per second, time left; made for rank 0."""

    order = 30
    name = "progress"

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last_line_at = 0.0
        self._last_width = 0
        self._num_steps = 0
        self._seconds = 0.0

    def on_step(self, run: RunView, record: StepRecord) -> None:
        total = run.config.stage.steps
        self._num_steps += 1
        self._seconds += record.step_seconds
        is_last = record.step >= total
        now = time.monotonic()
        if not self._is_terminal and not is_last and now - self._last_line_at < SECONDS_BETWEEN_LINES:
            return
        self._last_line_at = now
        left = (total - record.step) * self._seconds / self._num_steps
        text = (
            f"{run.config.stage.name}: step {record.step}/{total}  loss {record.result.loss:.4f}  "
            f"{record.tokens_per_second:,.0f} tokens/s  {format_seconds(left)} left"
        )
        ending = "\n" if is_last or not self._is_terminal else ""
        # On a terminal each line goes over the one before and hides all of it.
        start, text = ("\r", text.ljust(self._last_width)) if self._is_terminal else ("", text)
        self._last_width = len(text.rstrip())
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            print(start + text, end=ending, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
