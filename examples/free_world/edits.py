"""Edits of free-world pictures: what is asked is said without a place, since shape and colour tell the bodies apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from examples.free_world.bodies import COLORS, SIZES, Body, Scene, is_held_out, random_scene
from examples.free_world.words import THING


@dataclass(frozen=True)
class Edit:
    source: Scene
    instruction: str
    target: Scene


def recolor(scene: Scene, body: Body, name: str, color: str) -> Edit | None:
    changed = replace(body, color=color)
    if changed.pair in {one.pair for one in scene}:  # it would have another's name, or nothing changes
        return None
    return Edit(scene, f"make the {name} {color}", swapped(scene, body, changed))


def resize(scene: Scene, body: Body, name: str) -> Edit:
    other = next(size for size in SIZES if size != body.size)
    return Edit(scene, f"make the {name} {other}", swapped(scene, body, replace(body, size=other)))


def remove(scene: Scene, body: Body, name: str) -> Edit | None:
    if len(scene) == 1:
        return None
    return Edit(scene, f"remove the {name}", tuple(one for one in scene if one is not body))


def swapped(scene: Scene, body: Body, changed: Body) -> Scene:
    return tuple(changed if one is body else one for one in scene)


def any_edit(rng: np.random.Generator, scene: Scene, body: Body, name: str, *, only_color: bool = False) -> Edit | None:
    """Every second one is a new colour."""
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    kind = 0 if only_color else rng.integers(4)
    return (
        recolor(scene, body, name, color),
        recolor(scene, body, name, color),
        resize(scene, body, name),
        remove(scene, body, name),
    )[kind]


def random_edit(rng: np.random.Generator, count: int, *, held_out: bool = False) -> Edit:
    """A scene of `count` bodies of known pairs and one change; with `held_out` a new colour makes a held-out pair."""
    while True:
        scene = random_scene(rng, count)
        body = scene[rng.integers(count)]
        edit = any_edit(rng, scene, body, body.name, only_color=held_out)
        if edit is not None and any(is_held_out(*one.pair) for one in edit.target) == held_out:
            return edit


def random_edit_in_part(rng: np.random.Generator, count: int) -> Edit:
    """A change of any pair, held-out ones too, told by the colour alone, which no other body of the scene has."""
    while True:
        scene = random_scene(rng, count, held_out=bool(rng.integers(2)))
        body = scene[rng.integers(count)]
        if sum(one.color == body.color for one in scene) == 1:
            edit = any_edit(rng, scene, body, f"{body.color} {THING}")
            if edit is not None:
                return edit
