"""TensorBoard: a copy of the metrics for people who look there. The truth is metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.errors import UserError
from training.callbacks.base import Callback
from training.callbacks.wandb_logger import flatten
from training.contracts.run_view import RunView
from training.metrics import StepRecord

FOLDER_NAME = "tensorboard"


class TensorBoard(Callback):
    """Event files in <stage folder>/tensorboard; a restart adds one that goes on behind the checkpoint's step."""

    order = 21
    name = "tensorboard"

    def __init__(self, stage_folder: Path, every_steps: int):
        """Raises `UserError` where the package is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "TensorBoard's files need a package that is not installed",
                where="logging.tensorboard",
                fix="pip install 'nextstate[tensorboard]', or logging.tensorboard=false",
            ) from None
        self._make_writer, self.folder, self.every_steps = SummaryWriter, stage_folder / FOLDER_NAME, every_steps
        self._writer: Any = None

    def on_start(self, run: RunView) -> None:
        self._open(run.state.step)

    def on_roll_back(self, run: RunView) -> None:
        self._writer.close()
        self._open(run.state.step)

    def on_step(self, run: RunView, record: StepRecord) -> None:
        if record.held_out or record.step % self.every_steps == 0:
            for name, value in flatten(record.to_line()).items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, record.step)

    def on_end(self, run: RunView, status: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> None:
        """Steps after `step` that an earlier file holds are purged by TensorBoard."""
        self._writer = self._make_writer(str(self.folder), purge_step=step + 1 if step else None)
