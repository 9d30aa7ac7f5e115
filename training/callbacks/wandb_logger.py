"""Weights & Biases: a copy of the metrics for people who look there. The truth is metrics.jsonl."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from training.callbacks.base import Callback
from training.config import LoggingConfig
from training.contracts.run_view import RunView
from training.metrics import StepRecord
from training.reliability.events import EventLog, tell


class WandbLogger(Callback):
    """Logs rank 0 under one run id for the life of the stage, restarts included.

    Whatever goes wrong in the logger is told once, noted in the event log, and ends the logging, not the training.
    """

    order = 20
    name = "wandb"

    def __init__(self, stage_folder: Path, events: EventLog, config: LoggingConfig):
        self.stage_folder, self.events, self.config = stage_folder, events, config
        self.run_id: str | None = None
        self._wandb_run: Any = None

    def on_start(self, run: RunView) -> None:
        self._attempt(lambda: self._start(run))

    def on_step(self, run: RunView, record: StepRecord) -> None:
        if self._wandb_run is not None and (record.held_out or record.step % self.config.every_steps == 0):
            self._attempt(lambda: self._wandb_run.log(flatten(record.to_line())))

    def on_end(self, run: RunView, status: str) -> None:
        if self._wandb_run is not None:
            self._attempt(lambda: self._wandb_run.finish(exit_code=0 if status != "failed" else 1))
            self._wandb_run = None

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def load_state(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]

    def _start(self, run: RunView) -> None:
        import wandb

        self.run_id = self.run_id or secrets.token_hex(4)
        self._wandb_run = wandb.init(
            project=self.config.wandb_project,
            id=self.run_id,
            resume="allow",
            name=f"{run.config.name}/{run.config.stage.name}",
            dir=str(self.stage_folder),
            mode=cast(Any, self.config.wandb_mode),
            config=run.config.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # After a rollback steps come twice: a metric of our own is the axis, wandb's counter only goes up.
        self._wandb_run.define_metric("step")
        self._wandb_run.define_metric("*", step_metric="step")

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a logger of others may fail in any way
            self._wandb_run = None
            tell(f"Weights & Biases stopped working: {error}; metrics.jsonl goes on")
            self.events.record("wandb_failed", error=f"{type(error).__name__}: {error}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
