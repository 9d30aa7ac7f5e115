"""The free world: one to five coloured bodies of two sizes on a textured grey ground, across the patches
of the tokenizer, and how they are drawn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from examples.shapes_world.world import COLORS as ALL_COLORS
from examples.shapes_world.world import draw_shape

SIDE = 48  # pixels of a picture, in which all lengths here are
SIZES = {"small": 5.0, "large": 7.0}  # half the side of a body's box
# Middles lie at multiples of LATTICE, the corners of the tokenizer's patches: every body lies across four of them. It
# takes the room of these four, so that no patch shows two bodies.
LATTICE = 8
ROOM = 8.0  # half the side of it
MAX_BODIES = 5
SCALE = 4  # drawn at this many times the size and averaged down: edges are soft
SHAPES = ("square", "triangle", "bar")  # a small circle or cross is too much like a square
COLORS = {name: rgb for name, rgb in ALL_COLORS.items() if name in ("red", "green", "blue", "yellow")}
HELD_OUT_PAIRS = frozenset({("bar", "red"), ("square", "yellow"), ("triangle", "blue")})  # no document names them
GROUNDS = ("plain", "stripes")
LEVELS, CONTRASTS, PERIODS, ANGLES = (160.0,), (20.0,), (8.0,), (0.0,)


@dataclass(frozen=True, order=True)
class Body:
    shape: str
    color: str
    size: str
    x: float  # of its middle, from the left
    y: float  # from the top

    @property
    def half(self) -> float:
        return SIZES[self.size]

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.color

    @property
    def name(self) -> str:
        """What tells it from the others: no two bodies of a scene have one shape and one colour."""
        return f"{self.color} {self.shape}"

    @property
    def is_on_lattice(self) -> bool:
        return self.x % LATTICE == 0 and self.y % LATTICE == 0

    def at(self, x: float, y: float) -> Body:
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Ground:
    """A grey texture: nothing in it has a colour."""

    kind: str
    level: float  # mean, 0 to 255
    contrast: float  # levels above and below the mean
    period: float  # pixels
    angle: float  # radians


Scene = tuple[Body, ...]


def is_held_out(shape: str, color: str) -> bool:
    return (shape, color) in HELD_OUT_PAIRS


@functools.cache
def pairs(held_out: bool) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in itertools.product(SHAPES, COLORS) if is_held_out(*pair) == held_out)


def random_ground(rng: np.random.Generator) -> Ground:
    kind = GROUNDS[rng.integers(len(GROUNDS))]
    return Ground(kind, *(float(rng.choice(one)) for one in (LEVELS, CONTRASTS, PERIODS, ANGLES)))


def are_apart(one: Body, other: Body) -> bool:
    return max(abs(one.x - other.x), abs(one.y - other.y)) >= 2 * ROOM


def random_scene(rng: np.random.Generator, count: int, *, held_out: bool = False) -> Scene:
    """`count` bodies of different pairs that lie apart; with `held_out` one of them, at a random place in the order, is."""
    while True:
        chosen = [pairs(False)[index] for index in rng.choice(len(pairs(False)), count, replace=False)]
        if held_out:
            chosen[rng.integers(count)] = pairs(True)[rng.integers(len(pairs(True)))]
        bodies = place(rng, chosen)
        if bodies is not None:
            return bodies


def place(rng: np.random.Generator, chosen: Sequence[tuple[str, str]], attempts: int = 60) -> Scene | None:
    bodies: list[Body] = []
    for _ in range(attempts):
        if len(bodies) == len(chosen):
            break
        size = tuple(SIZES)[rng.integers(len(SIZES))]
        middle = LATTICE * rng.integers(1, SIDE // LATTICE, size=2)
        body = Body(*chosen[len(bodies)], size, float(middle[0]), float(middle[1]))
        if all(are_apart(body, other) for other in bodies):
            bodies.append(body)
    return tuple(bodies) if len(bodies) == len(chosen) else None


def draw_ground(ground: Ground) -> np.ndarray:
    """Levels, float [SIDE, SIDE]."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5  # the middles of pixels
    along = x * np.cos(ground.angle) + y * np.sin(ground.angle)
    across = y * np.cos(ground.angle) - x * np.sin(ground.angle)
    waves: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: np.zeros((SIDE, SIDE)),
        "stripes": lambda: np.sign(np.sin(2 * np.pi * along / ground.period)),
        "checks": lambda: np.sign(
            np.sin(2 * np.pi * along / ground.period) * np.sin(2 * np.pi * across / ground.period)
        ),
    }
    return ground.level + ground.contrast * waves[ground.kind]()


def draw(scene: Scene, ground: Ground) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    pixels = np.repeat(draw_ground(ground)[..., None], 3, axis=2)
    for body in scene:
        cover = coverage(body.shape, body.x, body.y, body.half)[..., None]
        pixels = pixels * (1 - cover) + np.array(COLORS[body.color], np.float64) * cover
    return pixels.round().clip(0, 255).astype(np.uint8)


@functools.lru_cache(4096)  # places of the lattice come again and again
def coverage(shape: str, x: float, y: float, half: float) -> np.ndarray:
    """The share of each pixel that a shape covers, float [SIDE, SIDE]."""
    mask = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE))
    canvas, white = ImageDraw.Draw(mask), (255, 255, 255)
    if shape == "bar":  # lies, half as high as wide
        box = (x - half, y - half / 2, x + half, y + half / 2)
        canvas.rectangle([SCALE * side for side in box], fill=white)
    else:
        draw_shape(canvas, shape, x * SCALE, y * SCALE, half * SCALE, white)
    full = np.asarray(mask)[..., 0].reshape(SIDE, SCALE, SIDE, SCALE)
    result: np.ndarray = full.mean(axis=(1, 3)) / 255
    result.setflags(write=False)
    return result
