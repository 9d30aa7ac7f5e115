"""Rollouts feed on their own frames; the walks of the shapes world keep to their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from examples.shapes_world.rollouts import Rollouts
from examples.shapes_world.world import draw_array
from model.generation.settings import SamplingConfig
from training.inference.prompts import Output, Prompt
from training.inference.world_rollouts import accuracy_by_step, roll_out, strip


@dataclass
class Count:
    """Each frame is one brighter than the last, if the model can count."""

    start: int
    words: list[str] = field(default_factory=lambda: ["one more"] * 3)
    image_size: tuple[int, int] = (2, 2)

    @property
    def first(self) -> np.ndarray:
        return np.full((2, 2, 3), self.start, np.uint8)

    def is_right(self, step: int, picture: np.ndarray | None) -> bool:
        return picture is not None and picture[0, 0, 0] == self.start + step + 1


class Counter:
    """Counts to 5, and draws nothing of what follows."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, first_index: int = 0
    ) -> list[Output]:
        answers = []
        for prompt in prompts:
            frame, words = prompt.parts
            assert words == "one more"
            images = [frame + 1] if frame[0, 0, 0] < 5 else []  # type: ignore[index, operator]
            answers.append(Output("", images, [], np.zeros(0), np.zeros(0), True))  # type: ignore[arg-type]
        return answers

    def reconstruct(self, images: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]:
        raise AssertionError


def test_a_frame_is_the_prompt_of_the_next() -> None:
    rollouts = [Count(0), Count(3)]
    frames = roll_out(Counter(), rollouts, SamplingConfig())
    assert [[None if f is None else int(f[0, 0, 0]) for f in own] for own in frames] == [[0, 1, 2, 3], [3, 4, 5, None]]
    assert accuracy_by_step(rollouts, frames) == [1.0, 1.0, 0.5]
    assert strip(frames[1]).shape == (2, 8, 3)


def test_walks_of_the_shapes_world_are_what_they_say() -> None:
    walks = Rollouts(num_rollouts=10, num_states=8).rollouts()
    assert [walk.words for walk in walks] == [walk.words for walk in Rollouts(10, 8).rollouts()]
    for walk in walks:
        assert len(walk.words) == 8
        for step, (before, after) in enumerate(zip(walk.scenes, walk.scenes[1:], strict=False)):
            moved = sum(item not in before for item in after)
            assert moved == walk.words[step].count("moves") > 0
            assert walk.is_right(step, draw_array(after))
            assert not walk.is_right(step, draw_array(before))
