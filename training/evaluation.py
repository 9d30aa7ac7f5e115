"""What an evaluation task asks of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class EvaluationPrompt:
    """One prompt. Pictures are uint8 [H, W, 3]; `image_size` is (height, width) in pixels of the answer."""

    format: str  # t2i | x2i | interleaved | reconstruction
    text: str = ""  # the question, or the transcript so far
    images: list[np.ndarray] = field(default_factory=list)  # source pictures or earlier frames
    parts: list[str | np.ndarray] = field(
        default_factory=list
    )  # interleaved: texts and frames in time order
    target: Any = None  # what the task's judge needs
    image_size: tuple[int, int] = (48, 48)
