"""Prompts of the shapes world for reinforcement learning: what evaluation asks, with what the rewards need to know."""

from __future__ import annotations

from dataclasses import dataclass

from examples.shapes_world.scenes import scenes_wanted
from examples.shapes_world.tasks import CrowdedT2I, EditAccuracy, T2IAccuracy
from training.inference.prompts import Prompt
from training.objectives.grpo.questions import Question


@dataclass
class SceneQuestions:
    """Captions that ask for scenes; of combinations that training documents show, unless `held_out`."""

    num_prompts: int = 512
    num_shapes: int = 3  # in each scene; one in twenty captioned pictures shows as many
    seed: int = 2000  # another one than evaluation has
    held_out: bool = False
    image_pixels: int = 48
    shuffled: bool = False  # judge each answer by the scene of another prompt: nothing can be learnt

    def questions(self) -> list[Question]:
        task = CrowdedT2I(self.num_prompts, self.seed, self.held_out, self.image_pixels, num_shapes=self.num_shapes)
        return asked(task, self.shuffled)


@dataclass
class EditQuestions(SceneQuestions):
    """Pictures with an instruction that recolours one shape."""

    def questions(self) -> list[Question]:
        return asked(EditAccuracy(self.num_prompts, self.seed, self.held_out, self.image_pixels), self.shuffled)


def asked(task: T2IAccuracy | EditAccuracy, shuffled: bool) -> list[Question]:
    prompts = task.prompts()
    targets = [prompt.target for prompt in prompts]
    if shuffled:  # by half of the list: never its own
        targets = targets[len(targets) // 2 :] + targets[: len(targets) // 2]
    return [
        Question(Prompt(one.format, one.text, one.images, image_size=one.image_size), scenes_wanted([target]))
        for one, target in zip(prompts, targets, strict=True)
    ]
