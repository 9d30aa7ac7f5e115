"""Edits of free-world pictures: what is asked is said without a place, since shape and colour tell the bodies apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from examples.free_world.bodies import SIZES, Body, Scene, fits, is_held_out, random_scene
from examples.shapes_world.world import COLORS


@dataclass(frozen=True)
class Edit:
    source: Scene
    instruction: str
    target: Scene


def recolor(scene: Scene, body: Body, color: str) -> Edit | None:
    changed = replace(body, color=color)
    if changed.pair in {one.pair for one in scene}:  # it would have another's name, or nothing changes
        return None
    return Edit(scene, f"make the {body.name} {color}", swapped(scene, body, changed))


def resize(scene: Scene, body: Body) -> Edit | None:
    other = next(size for size in SIZES if size != body.size)
    changed = body.resized(other)
    if not fits(changed, [one for one in scene if one is not body]):
        return None
    return Edit(scene, f"make the {body.name} {other}", swapped(scene, body, changed))


def remove(scene: Scene, body: Body) -> Edit | None:
    if len(scene) == 1:
        return None
    return Edit(scene, f"remove the {body.name}", tuple(one for one in scene if one is not body))


def swapped(scene: Scene, body: Body, changed: Body) -> Scene:
    return tuple(changed if one is body else one for one in scene)


def random_edit(rng: np.random.Generator, count: int, *, held_out: bool = False) -> Edit:
    """A scene of `count` bodies of known pairs and one change; with `held_out` a new colour makes a held-out pair."""
    names = tuple(COLORS)
    while True:
        scene = random_scene(rng, count)
        body = scene[rng.integers(count)]
        color = names[rng.integers(len(names))]
        kind = 0 if held_out else rng.integers(4)
        edit = (recolor(scene, body, color), recolor(scene, body, color), resize(scene, body), remove(scene, body))[
            kind
        ]
        if edit is not None and any(is_held_out(*one.pair) for one in edit.target) == held_out:
            return edit
