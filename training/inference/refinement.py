"""Pictures on their way from noise: what parallel decoding has before each of its steps, and in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from model.generation.settings import SamplingConfig
from training.inference.answering import Answering, answer_all, begin
from training.inference.model import InferenceModel
from training.inference.observing import Event, Refined
from training.inference.prompts import Prompt


def refine(
    model: InferenceModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int = 0
) -> list[list[np.ndarray]]:
    """Of each prompt's first picture, uint8 [H, W, 3]: before every step that masks nothing, and the finished one.

    The model decodes with the strategy `dida`.
    """
    states: dict[int, list[np.ndarray]] = defaultdict(list)

    def see(answering: Answering, event: Event) -> None:
        if isinstance(event, Refined) and not answering.pictures:
            states[id(answering)].append(event.codes)

    answerings = begin(model, prompts, sampling, range(len(prompts)))
    answer_all(model, answerings, sampling, seed, see)
    return [
        [model.picture(codes) for codes in (*states[id(answering)], *answering.pictures[:1])]
        for answering in answerings
    ]
