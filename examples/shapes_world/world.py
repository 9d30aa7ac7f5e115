"""The shapes world: scenes of coloured shapes on a 3x3 grid, and which combinations are held out."""

from __future__ import annotations

import hashlib
import itertools
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


def is_held_out(item: Item) -> bool:
    """One combination of shape, colour and place in seven, chosen by hash, never occurs in a training document."""
    name = f"{item.shape}/{item.color}/{item.row}/{item.column}"
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 7 == 0


def all_items() -> list[Item]:
    product = itertools.product(SHAPES, COLORS, range(GRID), range(GRID))
    return [Item(shape, color, row, column) for shape, color, row, column in product]


def make_scene(items: list[Item]) -> Scene:
    assert len({(item.row, item.column) for item in items}) == len(items), "two items in one cell"
    return tuple(sorted(items, key=lambda item: (item.row, item.column)))


def random_scene(rng: np.random.Generator, num_items: int) -> Scene:
    """A scene without any held-out combination."""
    allowed = [item for item in all_items() if not is_held_out(item)]
    while True:
        items = [allowed[index] for index in rng.choice(len(allowed), num_items, replace=False)]
        if len({(item.row, item.column) for item in items}) == num_items:
            return make_scene(items)


def random_held_out_scene(rng: np.random.Generator, num_items: int) -> Scene:
    """A scene with at least one held-out combination."""
    held_out = [item for item in all_items() if is_held_out(item)]
    first = held_out[rng.integers(len(held_out))]
    while True:
        others = list(random_scene(rng, num_items - 1)) if num_items > 1 else []
        if all((item.row, item.column) != (first.row, first.column) for item in others):
            return make_scene([first, *others])


def caption(scene: Scene) -> str:
    return " and ".join(item.text() for item in scene)


def recolor(item: Item, color: str) -> Item:
    return replace(item, color=color)


def draw(
    scene: Scene, size: int = RAW_SIZE, offsets: dict[Item, tuple[float, float]] | None = None
) -> Image.Image:
    """Render at 4x and shrink. `offsets` moves items by (rows, columns) in cells, for motion between cells."""
    scale = 4
    cell = size * scale / GRID
    picture = Image.new("RGB", (size * scale, size * scale), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    for item in scene:
        row_offset, column_offset = (offsets or {}).get(item, (0.0, 0.0))
        center_y = (item.row + row_offset + 0.5) * cell
        center_x = (item.column + column_offset + 0.5) * cell
        draw_shape(canvas, item.shape, center_x, center_y, cell * FILL / 2, COLORS[item.color])
    return picture.resize((size, size), Image.Resampling.BOX)


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
