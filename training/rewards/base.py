"""What is judged, and what a reward promises.

A reward is any class with `name`, `version` and `score`; a configuration names ours by a short name and others by dotted
path (`training.rewards.registry`). It sees whole answers in batches and says a number for each, or that it has none.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from model.errors import UserError


@dataclass
class Answer:
    """One answer of the model and what was asked. Pictures are uint8 [H, W, 3]."""

    task: str  # as its prompt names it; signals are normalised and weighted by task
    prompt: str = ""  # the question's words
    prompt_images: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray | None] = field(default_factory=list)  # in order; None: its tokens are no whole picture
    text: str = ""  # all text of the answer
    finished: bool = True  # False: the length limit came first
    # What the prompt wants, for rewards that know it ("scenes", "text", ...). JSON values: they travel to services.
    fields: dict[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """Judges answers. Higher is better, in a unit of its own: `training.rewards.scale` brings it to [1, 10].

    The same answer has the same score whatever stands beside it in a batch.
    """

    name: str
    version: str  # changes when the same answer would get another score

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score an answer, in order. None: it could not be judged, which is not the same as a bad answer.

        A bad answer has a low score: no picture where one was asked for, a picture that is not whole, no text.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """What a reward said of a batch of answers."""

    values: list[float | None]  # finite, or None where it is missing
    faults: dict[str, int] = field(default_factory=dict)  # why values are missing: reason -> how many


def scores_of(reward: Reward, answers: Sequence[Answer]) -> Scores:
    """Ask a reward, and take only what can be believed: everything else is missing, never 0, and counted.

    NaN and infinities are missing. Where the number of scores is not that of the answers, or `score` raises, nothing
    says whose they are, so all are missing. `UserError` passes: a wrong configuration is not a fault of one batch.
    """
    if not answers:
        return Scores([])
    try:
        given = list(reward.score(answers))
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        return Scores([None] * len(answers), {f"raised {type(error).__name__}": len(answers)})
    if len(given) != len(answers):
        return Scores([None] * len(answers), {f"{len(given)} scores for {len(answers)} answers": len(answers)})
    faults: Counter[str] = Counter()
    values: list[float | None] = []
    for value in given:
        fault = fault_of(value)
        values.append(None if fault else float(value))  # type: ignore[arg-type]
        if fault:
            faults[fault] += 1
    return Scores(values, dict(faults))


def fault_of(value: object) -> str:
    """Why a score cannot be used; empty when it can."""
    if value is None:
        return "not judged"
    if isinstance(value, bool | np.bool_):
        return ""
    if not isinstance(value, int | float | np.integer | np.floating):
        return "not a number"
    try:
        return "" if math.isfinite(value) else "not finite"
    except OverflowError:  # a whole number beyond what a float holds
        return "not finite"
