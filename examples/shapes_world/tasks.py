"""Evaluation tasks of the shapes world, named by dotted path in a configuration.

A task makes prompts and judges what came back; it knows nothing of models. By default every answer that is asked for
holds a combination of shape, colour and place that no training document shows; `held_out=False` asks for seen ones.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from examples.shapes_world.edits import random_edit, random_held_out_edit
from examples.shapes_world.judge import shows
from examples.shapes_world.media import mp4_bytes, mp4_frames
from examples.shapes_world.motion import (
    FRAMES_PER_SECOND,
    NUM_RESTS,
    Clip,
    clip_frames,
    law_text,
    random_clip,
    random_held_out_clip,
    rest_scene,
)
from examples.shapes_world.scenes import compared, scenes_wanted
from examples.shapes_world.world import caption, draw_array, random_held_out_scene, random_scene
from training.inference.evaluation import EvaluationPrompt
from training.rewards.base import Answer
from training.rewards.rules import SceneMatch

MAX_ATTEMPTS_ALONE = 200  # draws of a new one-shape prompt before only two shapes are asked for


@dataclass
class ShapesTask(ABC):
    """What the tasks share: how many prompts, from which seed, and the judge of the answer's first picture."""

    name: str = field(default="", init=False)
    num_prompts: int = 200
    seed: int = 1000
    held_out: bool = True
    image_pixels: int = 48  # side of the pictures shown and asked for; a multiple of the judge's 3 cells

    def prompts(self) -> list[EvaluationPrompt]:
        """Distinct prompts; the same list for the same fields.

        One in eight holds one shape, the others two. There are only as many scenes of one shape as combinations: when
        many draws have found no new one, the rest hold two.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        chosen: dict[tuple[object, ...], EvaluationPrompt] = {}
        known_alone = 0  # draws of one shape in a row that had been drawn before
        while len(chosen) < self.num_prompts:
            number = len(chosen)
            alone = number % 8 == 0 and known_alone < MAX_ATTEMPTS_ALONE
            prompt = self.make_prompt(rng, 1 if alone else 2, number)
            key = (prompt.text, prompt.target, *(image.tobytes() for image in prompt.images))
            if alone:
                known_alone = known_alone + 1 if key in chosen else 0
            chosen.setdefault(key, prompt)
        return list(chosen.values())

    @abstractmethod
    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        """Prompt `number` of the list, with one or two shapes."""

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool | float:
        """Does the first picture (uint8 [H, W, 3]) show exactly the scene asked for? No picture is a failure."""
        return bool(images) and shows(images[0], prompt.target)

    def wanted(self, prompt: EvaluationPrompt) -> list[np.ndarray]:
        """For the report: the scene asked for, as a right answer would show it."""
        return [self.shrink(draw_array(prompt.target))]

    def reason(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> str:
        """For the report: what the judge misses in the first picture, and what it sees that was not asked for."""
        return compared(images[0], prompt.target) if images else "no picture"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image_pixels, self.image_pixels

    def shrink(self, pixels: np.ndarray) -> np.ndarray:
        """To the size the model sees, by the bicubic filter with which the data pipeline shrinks raw pictures."""
        return np.array(Image.fromarray(pixels).resize(self.image_size, Image.Resampling.BICUBIC))


@dataclass
class T2IAccuracy(ShapesTask):
    """A caption asks for a scene."""

    name: str = field(default="t2i_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        scene = (random_held_out_scene if self.held_out else random_scene)(rng, num_items)
        return EvaluationPrompt(format="t2i", text=caption(scene), target=scene, image_size=self.image_size)


@dataclass
class EditAccuracy(ShapesTask):
    """A picture and an instruction that recolours one shape; the new colour makes a held-out combination."""

    name: str = field(default="edit_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        edit = (random_held_out_edit if self.held_out else random_edit)(rng, num_items)
        return EvaluationPrompt(
            format="x2i",
            text=edit.instruction,
            images=[self.shrink(draw_array(edit.source))],
            target=edit.target,
            image_size=self.image_size,
        )


@dataclass
class NextStateAccuracy(ShapesTask):
    """Frames and transcript so far; the next frame has every shape where its law puts it.

    The frame to predict is the second or the third rest, in turn; a shape that moves makes it a held-out combination.
    """

    name: str = field(default="next_state_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        rest = 1 + number // 2 % (NUM_RESTS - 1)
        if self.held_out:
            clip = random_held_out_clip(rng, num_items, rest)
        else:
            clip = random_clip(rng, num_items)
        frames = self.rest_frames(clip, rest)
        text = law_text(clip)
        return EvaluationPrompt(
            format="interleaved",
            text=" ".join([text] * rest),
            images=frames,
            parts=[part for frame in frames for part in (frame, text)],
            target=rest_scene(clip, rest),
            image_size=self.image_size,
        )

    def rest_frames(self, clip: Clip, count: int) -> list[np.ndarray]:
        """The frame in the middle of each of the first `count` seconds, taken from a real MP4 of the clip up to there."""
        middles = [rest + 0.5 for rest in range(count)]
        data = mp4_bytes(clip_frames(clip)[: int(middles[-1] * FRAMES_PER_SECOND) + 1], FRAMES_PER_SECOND)
        return [self.shrink(pixels) for pixels in mp4_frames(data, middles)]


@dataclass
class ReconstructionAccuracy(ShapesTask):
    """A true scene, to be judged after the vision tokenizer has encoded and decoded it: the ceiling of the others."""

    name: str = field(default="reconstruction_accuracy", init=False)

    def wanted(self, prompt: EvaluationPrompt) -> list[np.ndarray]:
        return []  # the picture of the prompt

    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        scene = (random_held_out_scene if self.held_out else random_scene)(rng, num_items)
        return EvaluationPrompt(
            format="reconstruction", images=[self.shrink(draw_array(scene))], target=scene, image_size=self.image_size
        )


@dataclass
class CrowdedT2I(T2IAccuracy):
    """Captions that ask for three shapes, which few training pictures show."""

    name: str = field(default="t2i_crowded", init=False)
    num_shapes: int = 3

    def make_prompt(self, rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        return super().make_prompt(rng, self.num_shapes, number)


@dataclass
class CrowdedReward(CrowdedT2I):
    """The same prompts, each answer with the reward of reinforcement learning: 0 to 1."""

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> float:
        answer = Answer(prompt.format, prompt.text, images=list(images), fields=scenes_wanted([prompt.target]))
        (score,) = SceneMatch("examples.shapes_world.scenes.ShapesReader").score([answer])
        assert score is not None, "the prompt says which scene it wants"
        return score
