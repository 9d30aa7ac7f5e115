"""The shapes world: scenes of coloured shapes on a 3x3 grid, and which combinations are held out."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 190),
    "orange": (245, 135, 30),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
GRID = 3
BACKGROUND = (245, 245, 245)
RAW_SIZE = 96  # pixels of a raw picture's side; the pipeline resizes
CAPTIONS = ("{}", "there is {}", "a picture of {}")
FILL = 0.74  # side of a shape relative to its cell


@dataclass(frozen=True, order=True)
class Item:
    shape: str
    color: str
    row: int
    column: int

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    def text(self) -> str:
        return f"a {self.color} {self.shape} at {self.place}"


Scene = tuple[Item, ...]  # sorted by place, at most one item a cell


@functools.cache
def is_held_out(item: Item) -> bool:
    """One combination of shape, colour and place in seven, chosen by hash, never occurs in a training document."""
    name = f"{item.shape}/{item.color}/{item.row}/{item.column}"
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 7 == 0


@functools.cache
def all_items() -> tuple[Item, ...]:
    product = itertools.product(SHAPES, COLORS, range(GRID), range(GRID))
    return tuple(Item(shape, color, row, column) for shape, color, row, column in product)


@functools.cache
def held_out_items() -> tuple[Item, ...]:
    return tuple(item for item in all_items() if is_held_out(item))


@functools.cache
def seen_items() -> tuple[Item, ...]:
    return tuple(item for item in all_items() if not is_held_out(item))


def make_scene(items: Sequence[Item]) -> Scene:
    assert len({(item.row, item.column) for item in items}) == len(items), "two items in one cell"
    return tuple(sorted(items, key=lambda item: (item.row, item.column)))


def random_scene(rng: np.random.Generator, num_items: int) -> Scene:
    """A scene without any held-out combination."""
    allowed = seen_items()
    while True:
        items = [allowed[index] for index in rng.choice(len(allowed), num_items, replace=False)]
        if len({(item.row, item.column) for item in items}) == num_items:
            return make_scene(items)


def random_held_out_scene(rng: np.random.Generator, num_items: int) -> Scene:
    """A scene with at least one held-out combination."""
    held_out = held_out_items()
    first = held_out[rng.integers(len(held_out))]
    while True:
        others = list(random_scene(rng, num_items - 1)) if num_items > 1 else []
        if all((item.row, item.column) != (first.row, first.column) for item in others):
            return make_scene([first, *others])


def caption(scene: Scene, wording: int = 0) -> str:
    """What is where, in one of the wordings of `CAPTIONS`; 0 is the plain one."""
    return CAPTIONS[wording].format(" and ".join(item.text() for item in scene))


def recolor(item: Item, color: str) -> Item:
    return replace(item, color=color)


@functools.cache
def sprite(shape: str, color: str, cell: int) -> np.ndarray:
    """The shape on the background, cropped to its box: uint8 [side, side, 3] for cells of `cell` pixels.

    Drawn at 4x and averaged down, so edges are soft. `side` has the parity of `cell`, so the sprite can be centred.
    """
    scale = 4
    side = cell - 2 * int(cell * (1 - FILL) / 2)
    picture = Image.new("RGB", (side * scale, side * scale), BACKGROUND)
    middle = side * scale / 2
    draw_shape(ImageDraw.Draw(picture), shape, middle, middle, cell * scale * FILL / 2, COLORS[color])
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BOX))
    pixels.setflags(write=False)
    return pixels


def draw_array(scene: Scene, size: int = RAW_SIZE, offsets: Sequence[tuple[float, float]] | None = None) -> np.ndarray:
    """The scene as uint8 [size, size, 3]; `size` is a multiple of GRID.

    `offsets` holds one (rows, columns) shift in cells per item, for motion between cells; it is rounded to pixels.
    """
    assert size % GRID == 0, f"{size} pixels do not divide into {GRID} cells"
    cell = size // GRID
    pixels = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
    for item, (row_offset, column_offset) in zip(scene, offsets or [(0.0, 0.0)] * len(scene), strict=True):
        shape = sprite(item.shape, item.color, cell)
        margin = (cell - shape.shape[0]) // 2
        top = item.row * cell + round(row_offset * cell) + margin
        left = item.column * cell + round(column_offset * cell) + margin
        pixels[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
    return pixels


def draw(scene: Scene, size: int = RAW_SIZE) -> Image.Image:
    return Image.fromarray(draw_array(scene, size))


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float, color: tuple[int, int, int]
) -> None:
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    elif shape == "square":
        canvas.rectangle(box, fill=color)
    elif shape == "triangle":
        canvas.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=color)
    else:
        arm = half * 0.4
        canvas.rectangle((x - arm, y - half, x + arm, y + half), fill=color)
        canvas.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
