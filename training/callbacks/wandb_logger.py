"""Weights & Biases: a copy of the metrics for people who look there. The truth is metrics.jsonl."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from training.callbacks.base import Callback
from training.config import LoggingConfig
from training.contracts.run_view import RunView
from training.metrics import PICTURES_NAME, StepRecord
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
        self._shown: set[str] = set()

    def on_start(self, run: RunView) -> None:
        self._new_pictures()  # an earlier run showed them
        self._attempt(lambda: self._start(run))

    def on_step(self, run: RunView, record: StepRecord) -> None:
        if self._wandb_run is not None and (record.held_out or record.step % self.config.every_steps == 0):
            self._attempt(lambda: self._wandb_run.log(flatten(record.to_line())))
        for folder in self._new_pictures() if self._wandb_run is not None else ():
            self._attempt(functools.partial(self._show, record.step, folder))

    def on_end(self, run: RunView, status: str) -> None:
        if self._wandb_run is not None:
            self._attempt(lambda: self._wandb_run.finish(exit_code=0 if status != "failed" else 1))
            self._wandb_run = None

    def _new_pictures(self) -> list[Path]:
        """Folders of pictures that the objective kept since the last call."""
        folders = [path for path in self.stage_folder.glob(f"{PICTURES_NAME}/*") if path.name not in self._shown]
        self._shown |= {path.name for path in folders}
        return folders

    def _show(self, step: int, folder: Path) -> None:
        """Its pictures under their names, as those of a step."""
        import wandb

        images = [wandb.Image(str(path), caption=path.stem) for path in sorted(folder.glob("*.png"))]
        self._wandb_run.log({"step": step, PICTURES_NAME: images})

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
