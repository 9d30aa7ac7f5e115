"""What is asked in the words world, of evaluation and of reinforcement learning; a real reader judges (RapidOCR).

`held_out` asks for texts that no training document and no prompt of reinforcement learning has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from examples.words_world.writing import SHEET, Writing, color_of, draw, random_writing
from training.inference.baselines import Ask, Pictures
from training.inference.evaluation import EvaluationPrompt
from training.inference.prompts import Prompt
from training.objectives.grpo.questions import Question
from training.rewards.base import Answer
from training.rewards.ocr import TextRendering


@dataclass
class WordsTask:
    """A caption asks for a text; the score is that of the reward: 1 - edit distance / longer length."""

    name: str = field(default="t2i_reward", init=False)
    num_prompts: int = 200
    seed: int = 1000
    held_out: bool = True
    one_line: bool = True  # false: the reader looks for lines first, which takes a hundred times as long

    def prompts(self) -> list[EvaluationPrompt]:
        """The same list for the same fields, whichever task it is."""
        rng = np.random.default_rng(self.seed)
        return [self.make_prompt(random_writing(rng, self.held_out)) for _ in range(self.num_prompts)]

    def make_prompt(self, writing: Writing) -> EvaluationPrompt:
        return EvaluationPrompt("t2i", writing.caption, target=writing, image_size=SHEET)

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool | float:
        return self.likeness(prompt, images)

    def likeness(self, prompt: EvaluationPrompt, images: list[np.ndarray]) -> float:
        answer = Answer("t2i", prompt.text, images=list(images), fields={"text": prompt.target.text})
        (score,) = TextRendering(self.one_line).score([answer])
        assert score is not None, "the prompt says which text it wants"
        return score


@dataclass
class WordsExact(WordsTask):
    """The text that was asked for and no other character."""

    name: str = field(default="t2i_sampled", init=False)

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        return self.likeness(prompt, images) == 1.0


@dataclass
class WordsColor(WordsTask):
    """The colour that was asked for, which no reward looks at."""

    name: str = field(default="t2i_color", init=False)

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        return bool(images) and color_of(images[0]) == prompt.target.color


@dataclass
class WordsReconstruction(WordsExact):
    """A true picture, read after the vision tokenizer has encoded and decoded it: the ceiling of the others."""

    name: str = field(default="reconstruction_accuracy", init=False)

    def make_prompt(self, writing: Writing) -> EvaluationPrompt:
        return EvaluationPrompt("reconstruction", images=[draw(writing)], target=writing, image_size=SHEET)


class Drawn:
    """A baseline: the true pictures. What the reader does not read in them, it reads in no answer."""

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: Ask) -> list[Pictures]:
        return [[draw(prompt.target)] for prompt in prompts]


@dataclass
class WordsQuestions:
    """Prompts of reinforcement learning; `fields["text"]` is what the reward `text_rendering` looks for."""

    num_prompts: int = 1024
    seed: int = 2000  # another one than evaluation has
    held_out: bool = False
    shuffled: bool = False  # judge each answer by the text of another prompt: nothing can be learnt

    def questions(self) -> list[Question]:
        prompts = WordsTask(self.num_prompts, self.seed, self.held_out).prompts()
        texts = [prompt.target.text for prompt in prompts]
        if self.shuffled:  # by half of the list
            texts = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
        return [
            Question(Prompt(one.format, one.text, image_size=one.image_size), {"text": text})
            for one, text in zip(prompts, texts, strict=True)
        ]
