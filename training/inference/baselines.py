"""What an accuracy has to be held against: answers that need no learning, or that leave the prompt's words out.

A baseline is any class with the shape of `Baseline`; a configuration names it by dotted path. The task judges its answers
as it judges the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from model.registry import find_class, made_with
from training.inference.evaluation import EvaluationPrompt, EvaluationTask

Pictures = list[np.ndarray]  # of one answer, uint8 [H, W, 3] each
Ask = Callable[[Sequence[EvaluationPrompt]], list[Pictures]]  # the model that is evaluated


class Baseline(Protocol):
    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]: ...


class CopyOfTheLast:
    """The last picture of the prompt as it is: what a task gives to a model that does nothing."""

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        return [prompt.pictures[-1:] for prompt in prompts]


@dataclass
class FlatPatches:
    """Every picture of the prompt in patches of one colour, their mean: what a reconstruction costs nobody to learn."""

    pixels: int = 0  # a patch's side, those at the borders may be smaller; 0: the whole picture is one

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        return [[self._flattened(image) for image in prompt.images] for prompt in prompts]

    def _flattened(self, image: np.ndarray) -> np.ndarray:
        found = np.empty_like(image)
        height, width = image.shape[:2]
        for top in range(0, height, self.pixels or height):
            for left in range(0, width, self.pixels or width):
                place = np.s_[top : top + (self.pixels or height), left : left + (self.pixels or width)]
                found[place] = np.round(image[place].mean(axis=(0, 1)))
        return found


class OtherWords:
    """The model, asked in the words of the next prompt about the pictures of this one: what the words are good for."""

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        return ask([with_words_of(prompt, other) for prompt, other in zip(prompts, rotated(prompts), strict=True)])


def rotated(prompts: Sequence[EvaluationPrompt]) -> list[EvaluationPrompt]:
    """For each prompt another one: the next that has as many texts and other words, itself where there is none."""
    found = []
    for number, prompt in enumerate(prompts):
        others = [*prompts[number + 1 :], *prompts[:number]]
        same_form = (one for one in others if len(texts(one)) == len(texts(prompt)) and texts(one) != texts(prompt))
        found.append(next(same_form, prompt))
    return found


def texts(prompt: EvaluationPrompt) -> list[str]:
    """All that it says, wherever its format has it."""
    return [prompt.text, *(part for part in prompt.parts if isinstance(part, str))]


def with_words_of(prompt: EvaluationPrompt, other: EvaluationPrompt) -> EvaluationPrompt:
    text, *words = texts(other)
    others = iter(words)
    parts = [next(others) if isinstance(part, str) else part for part in prompt.parts]
    return replace(prompt, text=text, parts=parts)


def load_baseline(path: str, arguments: Mapping[str, Any], key: str) -> Baseline:
    """The baseline of class `package.module.Class`, made with `arguments`."""
    baseline: Baseline = made_with(find_class("baseline", path, {}, key), "baseline", arguments, key)
    return baseline


def accuracy_of(
    baseline: Baseline, task: EvaluationTask, prompts: Sequence[EvaluationPrompt], ask: Ask
) -> dict[str, Any]:
    """`accuracy` and `count` over these prompts; no text comes with a baseline's pictures."""
    answers = baseline.answers(prompts, ask)
    scores = [float(task.judge(prompt, images, "")) for prompt, images in zip(prompts, answers, strict=True)]
    return {"accuracy": float(np.mean(scores)) if scores else 0.0, "count": len(scores)}
