"""The judge: reads a scene from pixels by template matching, with no learned part.

Each cell is compared with every (shape, colour) template and with the empty cell; a cell counts as read when the
foreground mask overlaps the template's (IoU) and the mean foreground colour is nearest to the right colour.
"""

from __future__ import annotations

import functools

import numpy as np

from examples.shapes_world.world import BACKGROUND, COLORS, GRID, SHAPES, Item, Scene, draw, make_scene

MIN_IOU = 0.8
FOREGROUND_DISTANCE = 60.0  # RGB distance from the background that makes a pixel foreground
MIN_FOREGROUND = 0.08  # share of a cell's pixels below which the cell is empty
MAX_COLOR_DISTANCE = 70.0  # RGB distance of the foreground colour from the named colour


@functools.cache
def shape_masks(cell: int) -> dict[str, np.ndarray]:
    """Where each shape covers at least half of a pixel, in a cell of `cell` pixels."""
    masks = {}
    for shape in SHAPES:
        picture = np.asarray(draw((Item(shape, "blue", 1, 1),), cell * GRID))
        masks[shape] = covered(picture[cell : 2 * cell, cell : 2 * cell], "blue")
    return masks


def background_distance(pixels: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pixels.astype(np.float32) - BACKGROUND, axis=-1)


def covered(pixels: np.ndarray, color: str) -> np.ndarray:
    """Pixels nearer to `color` than to the background, measured along the distance from the background."""
    full = float(np.linalg.norm(np.subtract(COLORS[color], BACKGROUND)))
    return background_distance(pixels) > full / 2


def name_color(pixels: np.ndarray, foreground: np.ndarray) -> str | None:
    """The colour of the cell's inner foreground: the half of it that is farthest from the background."""
    distance = background_distance(pixels)
    core = foreground & (distance >= np.median(distance[foreground]))
    mean = pixels[core].astype(np.float32).mean(axis=0)
    distances = {name: float(np.linalg.norm(mean - rgb)) for name, rgb in COLORS.items()}
    color = min(distances, key=lambda name: distances[name])
    return color if distances[color] <= MAX_COLOR_DISTANCE else None


def read_cell(pixels: np.ndarray) -> tuple[str, str] | bool | None:
    """(shape, colour) of a cell, None when it is empty, False when it cannot be read."""
    foreground = background_distance(pixels) > FOREGROUND_DISTANCE
    if foreground.mean() < MIN_FOREGROUND:
        return None
    color = name_color(pixels, foreground)
    if color is None:
        return False
    mask = covered(pixels, color)
    scores = {
        shape: (mask & template).sum() / max(1, (mask | template).sum())
        for shape, template in shape_masks(pixels.shape[0]).items()
    }
    shape = max(scores, key=lambda name: scores[name])
    return (shape, color) if scores[shape] >= MIN_IOU else False


def cells_of(picture: np.ndarray) -> list[tuple[int, int, np.ndarray]] | None:
    """(row, column, pixels) of every cell of an RGB uint8 picture [H, W, 3]; None when it does not divide into cells."""
    height, width = picture.shape[:2]
    if height != width or height % GRID:
        return None
    cell = height // GRID
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    return [
        (row, column, picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell])
        for row, column in places
    ]


def read_scene(picture: np.ndarray) -> Scene | None:
    """The scene in an RGB uint8 picture [H, W, 3], or None when any cell cannot be read."""
    cells = cells_of(picture)
    if cells is None:
        return None
    items = []
    for row, column, pixels in cells:
        found = read_cell(pixels)
        if found is False:
            return None
        if isinstance(found, tuple):
            items.append(Item(found[0], found[1], row, column))
    return make_scene(items)


def shows(picture: np.ndarray, scene: Scene) -> bool:
    """Are exactly the scene's shapes, colours and places in the picture?"""
    return read_scene(picture) == scene
