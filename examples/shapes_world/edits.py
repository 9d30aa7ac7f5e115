"""Edit pairs: a scene, an instruction that names one shape and a new colour, and the scene that it asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.shapes_world.world import (
    COLORS,
    Item,
    Scene,
    held_out_items,
    is_held_out,
    make_scene,
    random_scene,
    recolor,
)


@dataclass(frozen=True)
class Edit:
    source: Scene
    instruction: str
    target: Scene


def instruction(scene: Scene, item: Item, color: str) -> str | None:
    """How to ask for `item` in `color`; None when the wording would fit another item too.

    One wording only: in documents of one length a small model soon finds the place that a token is copied from.
    """
    if sum((other.shape, other.color) == (item.shape, item.color) for other in scene) > 1:
        return None
    return f"make the {item.color} {item.shape} {color}"


def make_edit(scene: Scene, item: Item, color: str) -> Edit | None:
    text = instruction(scene, item, color)
    if text is None:
        return None
    target = make_scene([recolor(item, color) if other == item else other for other in scene])
    return Edit(scene, text, target)


def random_edit(rng: np.random.Generator, num_items: int) -> Edit:
    """A pair with no held-out combination in source or target."""
    names = tuple(COLORS)
    while True:
        scene = random_scene(rng, num_items)
        item = scene[rng.integers(num_items)]
        color = names[rng.integers(len(names))]
        if color == item.color or is_held_out(recolor(item, color)):
            continue
        edit = make_edit(scene, item, color)
        if edit is not None:
            return edit


def random_held_out_edit(rng: np.random.Generator, num_items: int) -> Edit:
    """A pair whose source was seen in training and whose recoloured shape is a held-out combination."""
    wanted_items, names = held_out_items(), tuple(COLORS)
    while True:
        wanted = wanted_items[rng.integers(len(wanted_items))]
        item = recolor(wanted, names[rng.integers(len(names))])
        if item.color == wanted.color or is_held_out(item):
            continue
        others = list(random_scene(rng, num_items - 1)) if num_items > 1 else []
        if any((other.row, other.column) == (item.row, item.column) for other in others):
            continue
        edit = make_edit(make_scene([item, *others]), item, wanted.color)
        if edit is not None:
            return edit
