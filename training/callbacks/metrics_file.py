"""metrics.jsonl: one line a step, never two for one step, whatever restarts and rollbacks happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.callbacks.base import Callback
from training.contracts.run_view import RunView
from training.metrics import METRICS_NAME, StepRecord
from training.reliability.events import EventLog, tell
from training.reliability.json_lines import JsonLines, parse_line


class MetricsFile(Callback):
    """Writes the metrics of rank 0. The length of the file is part of each checkpoint.

    On resume and on rollback the file is cut to that length, so steps in it only ever go up. A disk that takes no
    more, and damage in what was written, cost lines, never the run; both are told.
    """

    order = 10
    name = "metrics_file"

    def __init__(self, stage_folder: Path, events: EventLog, every_steps: int):
        self.path = stage_folder / METRICS_NAME
        self.events = events
        self.every_steps = every_steps
        self._lines = JsonLines(self.path)
        self._num_bytes_at_checkpoint = 0
        self._is_failing = False

    def on_start(self, run: RunView) -> None:
        self._cut_to(run.state.step)

    def on_roll_back(self, run: RunView) -> None:
        self._cut_to(run.state.step)

    def on_step(self, run: RunView, record: StepRecord) -> None:
        is_due = record.step % self.every_steps == 0
        if not (is_due or record.step in (1, run.config.stage.steps) or record.skipped or record.held_out):
            return
        try:
            self._lines.append(record.to_line())
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                tell(f"metrics can no longer be written: {error}; training goes on")
                self.events.record("metrics_failed", step=record.step, error=str(error))
            self._is_failing = True

    def on_end(self, run: RunView, status: str) -> None:
        self._lines.close()

    def state(self) -> dict[str, Any]:
        return {"num_bytes": self._lines.num_bytes}

    def load_state(self, state: dict[str, Any]) -> None:
        self._num_bytes_at_checkpoint = int(state["num_bytes"])

    def _cut_to(self, step: int) -> None:
        """Keep the lines up to `step`: by the length noted in the checkpoint, else by reading the file."""
        content = self.path.read_bytes()
        length = min(self._num_bytes_at_checkpoint, self._lines.num_bytes)
        if not _ends_with_step_up_to(content[:length], step):
            length = _length_up_to_step(content.splitlines(keepends=True), step)
        self._lines.truncate(length)
        num_damaged = sum(_step_of(line) is None for line in content.splitlines())
        if num_damaged:
            tell(f"{num_damaged} lines of {self.path} are damaged; they stay as they are and nobody counts them")
            self.events.record("metrics_damaged", step=step, num_lines=num_damaged)


def _step_of(line: bytes) -> int | None:
    """None where the line is damaged."""
    step = (parse_line(line) or {}).get("step")
    return step if type(step) is int else None


def _ends_with_step_up_to(content: bytes, step: int) -> bool:
    """Of the last line that can be read."""
    steps = (_step_of(line) for line in reversed(content.splitlines()))
    last = next((one for one in steps if one is not None), None)
    return not content or (content.endswith(b"\n") and last is not None and last <= step)


def _length_up_to_step(lines: list[bytes], step: int) -> int:
    """Bytes up to the last line that is known to be of a step up to `step`."""
    ends, num_bytes = [0], 0
    for line in lines:
        num_bytes += len(line)
        found = _step_of(line)
        if found is not None and found <= step:
            ends.append(num_bytes)
    return ends[-1]
