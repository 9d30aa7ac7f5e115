"""Long walks through the shapes world: a first frame, and for every step the words that say what happens next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.shapes_world.judge import shows
from examples.shapes_world.motion import STEPS, Track, law_text
from examples.shapes_world.world import GRID, Item, Scene, draw_array, make_scene, seen_items


@dataclass
class Walk:
    """One rollout: see `training.inference.world_rollouts.Rollout`."""

    scenes: list[Scene]  # the first one is given
    words: list[str]
    image_size: tuple[int, int]

    @property
    def first(self) -> np.ndarray:
        picture = Image.fromarray(draw_array(self.scenes[0]))
        return np.array(picture.resize(self.image_size, Image.Resampling.BICUBIC))

    def is_right(self, step: int, picture: np.ndarray | None) -> bool:
        """Does the picture show the state after `step` + 1 steps?"""
        return picture is not None and shows(picture, self.scenes[step + 1])


@dataclass
class Rollouts:
    """`num_rollouts` walks of `num_states` steps of two shapes; the same for the same fields."""

    num_rollouts: int = 40
    num_states: int = 8
    seed: int = 2000
    image_pixels: int = 48

    def rollouts(self) -> list[Walk]:
        rng = np.random.default_rng(self.seed)
        return [self._walk(rng) for _ in range(self.num_rollouts)]

    def _walk(self, rng: np.random.Generator) -> Walk:
        items = _two_items(rng)
        scenes, words = [make_scene(items)], []
        for _ in range(self.num_states):
            tracks = _next_tracks(rng, items)
            words.append(law_text(tuple(sorted(tracks, key=lambda track: (track.start.row, track.start.column)))))
            items = [track.at(1) for track in tracks]
            scenes.append(make_scene(items))
        return Walk(scenes, words, (self.image_pixels, self.image_pixels))


def _two_items(rng: np.random.Generator) -> list[Item]:
    """Two shapes that can be told apart by name, in different cells."""
    known = seen_items()
    while True:
        first, second = (known[index] for index in rng.choice(len(known), 2, replace=False))
        if (first.row, first.column) != (second.row, second.column) and (first.shape, first.color) != (
            second.shape,
            second.color,
        ):
            return [first, second]


def _next_tracks(rng: np.random.Generator, items: list[Item]) -> list[Track]:
    """Laws for one step: on the grid, into cells that are free and were, and something moves."""
    while True:
        tracks = [Track(item, str(rng.choice(list(STEPS)))) for item in items]
        places = [(track.at(1).row, track.at(1).column) for track in tracks]
        held = [(item.row, item.column) for item in items]
        on_grid = all(0 <= row < GRID and 0 <= column < GRID for row, column in places)
        apart = places[0] not in (places[1], held[1]) and places[1] != held[0]
        if on_grid and apart and any(track.law != "stay" for track in tracks):
            return tracks
