"""What a callback is: something optional that watches the loop, in a declared order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from training.contracts.run_view import RunView
from training.metrics import StepRecord


class Callback:
    """Watches the loop. Callbacks are called in ascending `order`, on every rank; none may use a collective.

    A callback never changes what is trained: decisions about steps belong to the guard and the loop.
    """

    order: ClassVar[int] = 0
    name: ClassVar[str] = ""  # key of its state in the checkpoint

    def on_start(self, run: RunView) -> None:
        """Before the first step, after a checkpoint (if any) was loaded into `run.state`."""

    def on_step(self, run: RunView, record: StepRecord) -> None:
        """After a step was applied or skipped; `run.state` already counts it."""

    def on_roll_back(self, run: RunView) -> None:
        """After `run.state` went back to an earlier step."""

    def on_checkpoint(self, run: RunView, folder: Path) -> None:
        """After a checkpoint was published."""

    def on_end(self, run: RunView, status: str) -> None:
        """Always, also after an error; `status` is finished, stopped or failed."""

    def state(self) -> dict[str, Any]:
        """What it wants back after a restart: JSON values, taken from rank 0."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`, called before `on_start` and before `on_roll_back`."""


def in_order(callbacks: list[Callback]) -> list[Callback]:
    return sorted(callbacks, key=lambda callback: callback.order)
