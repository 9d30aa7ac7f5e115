"""The shapes world as rewards see it: which scenes a prompt wants, and which scene a picture shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.shapes_world.judge import cells_of, read_cell
from examples.shapes_world.world import Item, Scene
from training.rewards.rules import SceneReading


def scenes_wanted(scenes: Sequence[Scene]) -> dict[str, Any]:
    """`fields` of answers that are to show these scenes, one a picture."""
    return {"scenes": [[dataclasses.asdict(item) for item in scene] for scene in scenes]}


def compared(picture: np.ndarray, scene: Scene) -> str:
    """In words: what of the scene is missing in the picture, and what else is there; "as wanted" where nothing is."""
    cells = cells_of(picture)
    if cells is None:
        return f"a picture of {picture.shape[0]} x {picture.shape[1]} pixels has no cells"
    found = [(row, column, read_cell(pixels)) for row, column, pixels in cells]
    seen = [Item(*one, row, column) for row, column, one in found if isinstance(one, tuple)]
    unreadable = sum(one is False for *_, one in found)
    parts = [f"{item.text()} is missing" for item in scene if item not in seen]
    parts += [f"{item.text()} not asked for" for item in seen if item not in scene]
    parts += [f"{unreadable} unreadable cell{'s' * (unreadable > 1)}"] if unreadable else []
    return ", ".join(parts) or "as wanted"


class ShapesReader:
    """Cell by cell, by the judge of evaluation; a cell that it cannot read spoils that cell only."""

    version = "shapes.1"

    def read(self, picture: np.ndarray) -> SceneReading:
        """A picture that does not divide into cells is one thing of which nothing can be told."""
        cells = cells_of(picture)
        if cells is None:
            return SceneReading([], num_unreadable=1)
        found = [(row, column, read_cell(pixels)) for row, column, pixels in cells]
        items = [Item(*seen, row, column) for row, column, seen in found if isinstance(seen, tuple)]
        return SceneReading([dataclasses.asdict(item) for item in items], sum(seen is False for *_, seen in found))
