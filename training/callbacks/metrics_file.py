"""metrics.jsonl: one line a step, never two for one step, whatever restarts and rollbacks happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.callbacks.base import Callback
from training.contracts.run_view import RunView
from training.metrics import METRICS_NAME, StepRecord
from training.reliability.events import EventLog, tell
from training.reliability.json_lines import JsonLines


class MetricsFile(Callback):
    """Writes the metrics of rank 0. The length of the file is part of each checkpoint.

    On resume and on rollback the file is cut to that length, so steps in it only ever go up. A disk that takes no
    more costs lines, never the run.
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
        if not (is_due or record.step in (1, run.config.stage.steps) or record.skipped):
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
        length = min(self._num_bytes_at_checkpoint, self._lines.num_bytes)
        with open(self.path, "rb") as file:
            if not self._ends_with_step_up_to(file.read(length), step):
                file.seek(0)
                length = _length_up_to_step(file.read().splitlines(keepends=True), step)
        self._lines.truncate(length)

    @staticmethod
    def _ends_with_step_up_to(content: bytes, step: int) -> bool:
        if not content:
            return True
        last_line = content[:-1].rpartition(b"\n")[2]
        return content.endswith(b"\n") and json.loads(last_line)["step"] <= step


def _length_up_to_step(lines: list[bytes], step: int) -> int:
    """Bytes of the leading lines whose step is at most `step`."""
    num_bytes = 0
    for line in lines:
        if json.loads(line)["step"] > step:
            break
        num_bytes += len(line)
    return num_bytes
