"""One scale for every signal: [1, 10] by frozen quantiles of its task.

Emu3.5 publishes the range and nothing else (arXiv 2510.26583, section 4.2). Here 1 and 10 are the 1% and the 99% quantile of
what the reward says of answers to that task by the model before training, straight between them and flat outside. They
are fitted once and kept: a scale that moves along with the model makes a curve of rewards meaningless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import fingerprint_of, read_json, write_json
from model.errors import UserError

LOWEST, HIGHEST = 1.0, 10.0
QUANTILES = (0.01, 0.99)
FORMAT = 1  # of the file
FIT_AGAIN = "nextstate rewards calibrate writes it again"


@dataclass(frozen=True)
class Scale:
    """What a reward's raw scores mean in one task."""

    low: float  # the raw score that is 1
    high: float  # the raw score that is 10
    reward_version: str  # of the reward that it was fitted to
    num_answers: int  # that it was fitted to; 0: the range was set by hand

    def applied(self, raw: float) -> float:
        share = (raw - self.low) / (self.high - self.low)
        return LOWEST + (HIGHEST - LOWEST) * min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Scales:
    """The frozen scales of all tasks and rewards."""

    by_task: Mapping[str, Mapping[str, Scale]]  # task -> name of the reward -> scale

    @property
    def version(self) -> str:
        """Of all of it: part of checkpoints, so that a run never goes on with other scales."""
        return fingerprint_of(self.as_json())

    def find(self, task: str, reward: str, reward_version: str) -> Scale:
        """Raises `UserError` where there is none, and where it was fitted to another version of the reward."""
        scale = self.by_task.get(task, {}).get(reward)
        if scale is None:
            raise UserError(
                "a reward has no scale for a task",
                where=f"reward {reward!r}, task {task!r}",
                expected="a range in the configuration, or quantiles of this task in the file of scales",
                got=f"tasks with scales: {', '.join(self.by_task) or 'none'}",
                fix=FIT_AGAIN,
            )
        if scale.reward_version != reward_version:
            raise UserError(
                "a scale was fitted to another version of its reward",
                where=f"reward {reward!r}, task {task!r}",
                expected=reward_version,
                got=scale.reward_version,
                fix=FIT_AGAIN,
            )
        return scale

    def as_json(self) -> dict[str, Any]:
        by_task = {
            task: {name: asdict(scale) for name, scale in sorted(scales.items())}
            for task, scales in sorted(self.by_task.items())
        }
        return {"format": FORMAT, "quantiles": list(QUANTILES), "by_task": by_task}

    def save(self, path: Path) -> None:
        write_json(path, self.as_json() | {"version": self.version})

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Raises `UserError` for a file that is missing, damaged or was changed by hand."""
        content = read_json(path, damaged="the file of scales is not valid JSON", fix=FIT_AGAIN)
        try:
            scales = cls.of(content["by_task"])
            version, written_format = content["version"], content["format"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("the file of scales is damaged", where=str(path), got=str(error), fix=FIT_AGAIN) from error
        if written_format != FORMAT or version != scales.version:
            raise UserError(
                "the file of scales does not fit its own version",
                where=str(path),
                expected=f"format {FORMAT}, version {version}",
                got=f"format {written_format}, version {scales.version}",
                fix=FIT_AGAIN,
            )
        return scales

    @classmethod
    def of(cls, by_task: Mapping[str, Mapping[str, Any]]) -> Scales:
        """Raises KeyError, TypeError or ValueError where it is not what `as_json` wrote."""
        return cls(
            {task: {name: scale_of(values) for name, values in scales.items()} for task, scales in by_task.items()}
        )


def scale_of(values: Mapping[str, Any]) -> Scale:
    """Raises KeyError, TypeError or ValueError."""
    low, high, num_answers = float(values["low"]), float(values["high"]), int(values["num_answers"])
    scale = Scale(low, high, str(values["reward_version"]), num_answers)
    if not (math.isfinite(scale.low) and math.isfinite(scale.high) and scale.low < scale.high):
        raise ValueError(f"a scale from {scale.low} to {scale.high}")
    return scale


def fitted(raw: Sequence[float | None], reward_version: str, where: str) -> Scale:
    """The scale of one reward and task from raw scores; missing ones are left out.

    Raises `UserError` where the scores do not spread: such a reward says nothing there.
    """
    values = np.array([value for value in raw if value is not None], dtype=np.float64)
    low, high = np.quantile(values, QUANTILES) if len(values) else (0.0, 0.0)
    if not low < high:
        raise UserError(
            "a reward cannot be brought to a scale: its scores do not spread",
            where=where,
            expected="answers of which some are better than others",
            got=f"{len(values)} scores of {len(raw)} answers, quantiles {low:g} and {high:g}",
            fix="more or other answers, or set the reward's range in the configuration",
        )
    return Scale(float(low), float(high), reward_version, len(values))
