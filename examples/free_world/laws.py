"""How bodies move: straight on, back from the walls, and off one another as equal boxes do. Frames alone show the law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.free_world.bodies import LATTICE, ROOM, SIDE, Body, Scene, are_apart, random_scene

STEPS = (-LATTICE, 0, LATTICE)  # pixels a frame, along each axis
SUBSTEPS = 4  # of a frame: on the lattice all that meets does so after half frames
NUM_SHOWN = 3  # frames that show the law: two say it, the third says it again
NUM_FRAMES = NUM_SHOWN + 1  # and what comes next
SEEN_PIXELS = float(
    LATTICE
)  # something moves by so much from each frame to the next: a copy of the last frame is wrong

Law = tuple[int, int]  # pixels a frame to the right and down
HELD_OUT_LAWS: frozenset[Law] = frozenset({(LATTICE, -LATTICE), (-LATTICE, 0)})  # no training clip begins so


@dataclass(frozen=True)
class Clip:
    scenes: tuple[Scene, ...]  # one a frame; bodies keep their places in the order
    laws: tuple[Law, ...]  # of the bodies at the start

    def words(self) -> str:
        """The law in words; never where anything is."""
        told = [f"the {body.name} moves {course(law)}" for body, law in zip(self.scenes[0], self.laws, strict=True)]
        return " and ".join(told)


def course(law: Law) -> str:
    """ "8 right 4 up"."""
    right, down = law
    across = f"{abs(right)} {'right' if right > 0 else 'left'}"
    along = f"{abs(down)} {'down' if down > 0 else 'up'}"
    return " ".join(words for words, step in ((across, right), (along, down)) if step)


def is_held_out_law(law: Law) -> bool:
    return law in HELD_OUT_LAWS


def laws(held_out: bool) -> list[Law]:
    every = [law for law in itertools.product(STEPS, STEPS) if law != (0, 0)]
    return [law for law in every if is_held_out_law(law) == held_out]


def velocity(law: Law) -> np.ndarray:
    return np.array(law, np.float64)


def simulate(start: Scene, velocities: np.ndarray, num_frames: int = NUM_FRAMES) -> tuple[Scene, ...]:
    """Scenes of `num_frames` frames, the first as given. `velocities` [bodies, 2] in pixels a frame."""
    # All lengths are counted in parts of a pixel, so that what is added up stays exact.
    places = SUBSTEPS * np.array([[body.x, body.y] for body in start])
    speeds: np.ndarray = velocities.astype(np.float64)  # a copy
    room = SUBSTEPS * ROOM
    scenes = [start]
    for _ in range(num_frames - 1):
        for _ in range(SUBSTEPS):
            for _ in range(len(start) + 1):  # one turned back by a wall may turn back the next at the same moment
                bounce(places, speeds, room)
                collide(places, speeds, room)
            bounce(places, speeds, room)
            places += speeds
        shown = places / SUBSTEPS
        scenes.append(tuple(body.at(float(x), float(y)) for body, (x, y) in zip(start, shown, strict=True)))
    return tuple(scenes)


def bounce(places: np.ndarray, speeds: np.ndarray, room: float) -> None:
    """Whoever is at a wall and moves on into it turns back."""
    far = SUBSTEPS * SIDE - room
    speeds[((places <= room) & (speeds < 0)) | ((places >= far) & (speeds > 0))] *= -1


def collide(places: np.ndarray, speeds: np.ndarray, room: float) -> None:
    """Two that touch and approach exchange their speeds along the axis on which they touch (equal masses, elastic)."""
    for one in range(len(places)):
        for other in range(one):
            apart = places[one] - places[other]
            overlap = 2 * room - np.abs(apart)
            if (overlap < 0).any():
                continue
            axis = int(overlap.argmin())
            if apart[axis] * (speeds[one, axis] - speeds[other, axis]) < 0:
                speeds[[one, other], axis] = speeds[[other, one], axis]


def random_clip(
    rng: np.random.Generator,
    count: int,
    *,
    held_out: bool = False,
    held_out_pair: bool = False,
    num_frames: int = NUM_FRAMES,
    num_straight: int = NUM_SHOWN,
) -> Clip:
    """Through the first `num_straight` frames all move straight on, so that they say how; then they may meet something.

    With `held_out` one body begins by a held-out law, else none does; with `held_out_pair` one body has such a pair.
    """
    while True:
        start = random_scene(rng, count, held_out=held_out_pair)
        known, unknown = laws(False), laws(True)
        chosen = [known[index] for index in rng.integers(len(known), size=count)]
        if held_out:
            chosen[rng.integers(count)] = unknown[rng.integers(len(unknown))]
        scenes = simulate(start, np.array([velocity(law) for law in chosen]), num_frames)
        if is_straight(scenes[:num_straight], chosen) and is_clear(scenes):
            return Clip(scenes, tuple(chosen))


def is_straight(scenes: Sequence[Scene], chosen: Sequence[Law]) -> bool:
    """No body has met anything in these frames."""
    return all(
        (new.x - old.x, new.y - old.y) == law
        for before, after in itertools.pairwise(scenes)
        for old, new, law in zip(before, after, chosen, strict=True)
    )


def is_clear(scenes: Sequence[Scene]) -> bool:
    """Something moves visibly between any two frames; all bodies lie apart and on the lattice (a corner met may say else)."""
    moved = [
        max(math.hypot(one.x - other.x, one.y - other.y) for one, other in zip(before, after, strict=True))
        for before, after in itertools.pairwise(scenes)
    ]
    stays = all(body.is_on_lattice for scene in scenes for body in scene)
    return stays and min(moved) >= SEEN_PIXELS and all(map(lies_apart, scenes))


def lies_apart(scene: Scene) -> bool:
    return all(are_apart(one, other) for number, one in enumerate(scene) for other in scene[:number])


def changed_course(clip: Clip) -> list[Body]:
    """Bodies of the last frame that no longer move as they began: they met a wall or one another."""
    found = []
    for number, law in enumerate(clip.laws):
        before, last = clip.scenes[-2][number], clip.scenes[-1][number]
        straight = velocity(law)
        if math.hypot(last.x - before.x - straight[0], last.y - before.y - straight[1]) > 0.5:
            found.append(last)
    return found
