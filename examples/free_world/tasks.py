"""Evaluation tasks of the free world, named by dotted path in a configuration; `held_out=false` asks for what was seen."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from examples.free_world.bodies import MAX_BODIES, SIDE, draw, random_ground, random_scene
from examples.free_world.edits import random_edit
from examples.free_world.judge import read_scene, same_bodies, same_places
from examples.free_world.laws import random_clip
from examples.free_world.words import WHAT_NEXT, describe, with_words_between
from training.inference.evaluation import EvaluationPrompt

MAX_MOVING = 2  # bodies of a clip


@dataclass
class FreeTask:
    """What the tasks share. Scenes have one to `max_bodies` bodies, as many of each number."""

    name: str = field(default="", init=False)
    num_prompts: int = 200
    seed: int = 2000
    held_out: bool = True
    max_bodies: int = MAX_BODIES
    tolerance_pixels: float = 3.0  # of a body's place, where it counts

    def prompts(self) -> list[EvaluationPrompt]:
        """The same list for the same fields."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        return [self.make_prompt(rng, 1 + number % self.max_bodies) for number in range(self.num_prompts)]

    def make_prompt(self, rng: np.random.Generator, count: int) -> EvaluationPrompt:
        raise NotImplementedError

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        """Has the first picture the bodies asked for, each where it has to be? No picture is a failure."""
        scene = read_scene(images[0]) if images else None
        return scene is not None and same_places(scene, prompt.target, self.tolerance_pixels)


@dataclass
class FreeT2I(FreeTask):
    """A caption names bodies and how they lie to one another; a held-out pair is among them."""

    name: str = field(default="t2i_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, count: int) -> EvaluationPrompt:
        scene = random_scene(rng, count, held_out=self.held_out)
        text, relations = describe(scene, rng)
        return EvaluationPrompt(format="t2i", text=text, target=(scene, relations), image_size=(SIDE, SIDE))

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        """The bodies that are named, no other, and every relation that is stated."""
        scene, relations = prompt.target
        shown = read_scene(images[0]) if images else None
        return shown is not None and same_bodies(shown, scene) and all(one.holds(shown) for one in relations)


@dataclass
class FreeNextState(FreeTask):
    """Three frames show where all is and how it moves; a body follows a law by which no training document begins.

    With `words` the last of them and the law in words take their place.
    """

    name: str = field(default="next_state_accuracy", init=False)
    max_bodies: int = MAX_MOVING
    words: bool = False

    def make_prompt(self, rng: np.random.Generator, count: int) -> EvaluationPrompt:
        clip = random_clip(rng, count, held_out=self.held_out)
        ground = random_ground(rng)
        *shown, target = clip.scenes
        frames = [draw(scene, ground) for scene in shown]
        prompt = EvaluationPrompt(format="x2i", target=target, image_size=(SIDE, SIDE))
        if self.words:
            return replace(prompt, text=clip.words(), images=frames[-1:])
        return replace(prompt, format="interleaved", parts=[*with_words_between(frames), WHAT_NEXT])


@dataclass
class FreeEdit(FreeTask):
    """A picture and what to change in it; a new colour makes a held-out pair."""

    name: str = field(default="edit_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, count: int) -> EvaluationPrompt:
        edit = random_edit(rng, count, held_out=self.held_out)
        source = draw(edit.source, random_ground(rng))
        return EvaluationPrompt(
            format="x2i", text=edit.instruction, images=[source], target=edit.target, image_size=(SIDE, SIDE)
        )


@dataclass
class FreeReconstruction(FreeTask):
    """A true picture, judged after the vision tokenizer has encoded and decoded it: the ceiling of the others."""

    name: str = field(default="reconstruction_accuracy", init=False)

    def make_prompt(self, rng: np.random.Generator, count: int) -> EvaluationPrompt:
        scene = random_scene(rng, count, held_out=self.held_out)
        picture = draw(scene, random_ground(rng))
        return EvaluationPrompt(format="reconstruction", images=[picture], target=scene, image_size=(SIDE, SIDE))
