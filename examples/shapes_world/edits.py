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


def instruction(item: Item, color: str) -> str:
    """How to ask for `item` in `color`.

    It names the place as captions do, so that no other item fits. One wording only: in documents of one length a small
    model soon finds where a token is copied from.
    """
    return f"make the {item.color} {item.shape} at {item.place} {color}"


def make_edit(scene: Scene, item: Item, color: str) -> Edit:
    target = make_scene([recolor(item, color) if other == item else other for other in scene])
    return Edit(scene, instruction(item, color), target)


def random_edit(rng: np.random.Generator, num_items: int) -> Edit:
    """A pair with no held-out combination in source or target."""
    names = tuple(COLORS)
    while True:
        scene = random_scene(rng, num_items)
        item = scene[rng.integers(num_items)]
        color = names[rng.integers(len(names))]
        if color == item.color or is_held_out(recolor(item, color)):
            continue
        return make_edit(scene, item, color)


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
        return make_edit(make_scene([item, *others]), item, wanted.color)
