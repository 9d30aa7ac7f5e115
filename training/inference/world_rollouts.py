"""World rollouts: a frame and words give the next frame, which is the frame of the next step; errors add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from model.generation.settings import SamplingConfig
from training.inference.evaluation import EvaluationModel
from training.inference.prompts import Prompt


class Rollout(Protocol):
    """One start, and what is said at each step. Pictures are uint8 [H, W, 3]."""

    words: list[str]
    image_size: tuple[int, int]  # height and width in pixels

    @property
    def first(self) -> np.ndarray: ...
    def is_right(self, step: int, picture: np.ndarray | None) -> bool: ...


class RolloutTask(Protocol):
    def rollouts(self) -> Sequence[Rollout]:
        """All with as many steps."""
        ...


def roll_out(
    model: EvaluationModel, rollouts: Sequence[Rollout], sampling: SamplingConfig, seed: int = 0
) -> list[list[np.ndarray | None]]:
    """For each rollout its frames, the first one included. Where a step gives no picture the rollout ends: None.

    The model sees the last frame and its words only, so a rollout may be of any length.
    """
    frames: list[list[np.ndarray | None]] = [[rollout.first] for rollout in rollouts]
    for step in range(max((len(rollout.words) for rollout in rollouts), default=0)):
        going = [number for number, own in enumerate(frames) if own[-1] is not None]
        prompts = [
            Prompt(
                "interleaved",
                parts=[frames[number][-1], rollouts[number].words[step]],  # type: ignore[list-item]
                image_size=rollouts[number].image_size,
            )
            for number in going
        ]
        answers = dict(zip(going, model.generate(prompts, sampling, seed, step * len(rollouts)), strict=True))
        for number, own in enumerate(frames):
            images = answers[number].images if number in answers else []
            own.append(images[0] if images else None)
    return frames


def accuracy_by_step(rollouts: Sequence[Rollout], frames: Sequence[Sequence[np.ndarray | None]]) -> list[float]:
    """Share of rollouts whose frame after each step shows what it should."""
    right = [
        [rollout.is_right(step, picture) for step, picture in enumerate(own[1:])]
        for rollout, own in zip(rollouts, frames, strict=True)
    ]
    return [float(share) for share in np.mean(right, axis=0)] if right else []


def strip(frames: Sequence[np.ndarray | None]) -> np.ndarray:
    """The frames of one rollout beside one another, uint8 [H, n * W, 3]; where none came it is black."""
    shown = next(frame for frame in frames if frame is not None)
    return np.concatenate([np.zeros_like(shown) if frame is None else frame for frame in frames], axis=1)
