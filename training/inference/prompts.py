"""Questions, answers and options of inference. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.documents.prompts import TASKS
from model.errors import Problems

FORMATS = (*TASKS, "interleaved")
INTERLEAVED_TASKS = tuple(task for task in TASKS if task not in ("t2i", "x2i"))  # answered with text and pictures
INTERLEAVED_TASK = "explore"  # of the chat template, when interleaved prompts are asked as chat


def is_unicode(value: Any) -> bool:
    """Can all texts in a JSON value be written as UTF-8? Half of a surrogate pair (`"\\ud800"`) cannot; tokenizers fail of it."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and not one.isascii():
            try:
                one.encode()
            except UnicodeEncodeError:
                return False
    return True


@dataclass
class Prompt:
    """One question.

    Pictures are uint8 [H, W, 3] of any size; they are resized to the area of `image_size`, which is the height and
    width in pixels of the pictures to make (zeros: the model chooses). Codes, integers [h, w], are taken as they are.
    """

    format: str  # t2i | x2i | interleaved | howto | story | explore | vla
    text: str = ""  # caption or instruction
    images: list[np.ndarray] = field(default_factory=list)  # sources
    # What came so far, in order; read for interleaved prompts, which have neither text nor images apart from it.
    parts: list[str | np.ndarray] = field(default_factory=list)
    image_size: tuple[int, int] = (0, 0)


@dataclass
class Output:
    """One answer. `parts` holds its text and pictures (uint8 [H, W, 3]) in order."""

    text: str
    images: list[np.ndarray]
    parts: list[str | np.ndarray]
    tokens: np.ndarray  # int64 [n]
    log_probs: np.ndarray  # float32 [n]; see `model.generation.ar.Generation`
    finished: bool  # False: the length limit came first
    codes: list[np.ndarray] = field(default_factory=list)  # int64 [H, W] of each of `images`


@dataclass
class InferenceOptions:
    """How prompts are put and what may be answered."""

    interleaved_as: str = "document"  # document: continue it; chat: ask in the chat template
    context_frames: int = 1  # of interleaved prompts as chat: what follows them belongs to the answer
    max_images: int = 1  # in the answer to an interleaved prompt or task; t2i and x2i are answered with one
    image_first: bool = True  # answers start with a picture, except after an interleaved one
    # An edit of one picture has that picture's grid, later pictures that of the one before. An image size that a prompt
    # gives stands above the model's choice.
    grids: str = "released"  # released: as above; free: the model chooses every time
    max_grid_side: int = 999  # in tokens, of a grid that the model chooses; 99: two digits a side
    image_tokens: list[int] = field(
        default_factory=lambda: [1, 16_384]
    )  # fewest and most of a picture; the most also where the model chooses
    max_batch_size: int = 256  # sequences decoded at once

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.interleaved_as in ("document", "chat"),
            f"{key}.interleaved_as",
            f"unknown value {self.interleaved_as!r}",
            f"{key}.interleaved_as=document",
        )
        problems.check(self.context_frames > 0, f"{key}.context_frames", "must be positive")
        problems.check(self.max_images > 0, f"{key}.max_images", "must be positive")
        problems.check(
            self.grids in ("released", "free"), f"{key}.grids", f"unknown value {self.grids!r}", f"{key}.grids=released"
        )
        problems.check(1 <= self.max_grid_side <= 999, f"{key}.max_grid_side", "must be in [1, 999]")
        problems.check(
            len(self.image_tokens) == 2 and 1 <= self.image_tokens[0] <= self.image_tokens[1],
            f"{key}.image_tokens",
            f"not two rising numbers: {list(self.image_tokens)}",
            f"{key}.image_tokens=[1,4096]",
        )
        problems.check(self.max_batch_size > 0, f"{key}.max_batch_size", "must be positive")


@dataclass
class ComparisonConfig:
    """What `evaluate decoders=[...]` measures beside the tasks' accuracies."""

    statistics_temperature: float = 1.0  # of visual tokens in the samples that statistics are taken of
    statistics_prompts: int = 200  # of the first task that asks for new pictures
    dida_steps: list[int] = field(default_factory=list)  # also measured for dida, beside its own
    dida_steps_prompts: int = 250  # the first of each task, for accuracies in those numbers of steps
    single_prompts: int = 8  # asked one at a time for the latency

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.statistics_temperature >= 0, f"{key}.statistics_temperature", "must not be negative")
        for name in ("statistics_prompts", "dida_steps_prompts", "single_prompts"):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive", f"{key}.{name}=8")
        problems.check(
            all(steps > 0 for steps in self.dida_steps),
            f"{key}.dida_steps",
            "must be positive",
            f"{key}.dida_steps=[4]",
        )
