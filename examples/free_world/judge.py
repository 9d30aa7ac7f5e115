"""The judge: finds the bodies of a picture by colour and outline, with no learned part.

Grounds are grey, so what has a colour is a body. A connected patch of one colour is read when it overlaps the outline of a
shape of its own size (IoU); a picture with a patch that cannot be read is not read at all.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from examples.free_world.bodies import COLORS, SHAPES, SIDE, SIZES, Body, Scene, coverage

MIN_SATURATION = 40.0  # highest minus lowest channel
MIN_PIXELS = 10  # a smaller patch is dirt and no body
MIN_IOU = 0.75
MAX_COLOR_DISTANCE = 70.0  # in RGB
MAX_SIZE_ERROR = 0.25  # of half a body's side
WINDOW = 28  # pixels around a body, the largest and what it is moved by
STEPS_PER_PIXEL = 2  # places at which an outline is tried
REACH = 3  # steps to each side of the middle of what is seen: a thin tip is not seen


def saturation(picture: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = picture.astype(np.float32)
    result: np.ndarray = pixels.max(axis=-1) - pixels.min(axis=-1)
    return result


def patches(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a bool [H, W] mask (by edges), each a mask."""
    left, found = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        part[np.unravel_index(np.argmax(left), mask.shape)] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= mask
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        found.append(part)
    return found


def color_of(pixels: np.ndarray) -> str | None:
    """The palette's colour nearest to the median of [n, 3] pixels."""
    middle = np.median(pixels.astype(np.float32), axis=0)
    distances = {name: float(np.linalg.norm(middle - rgb)) for name, rgb in COLORS.items()}
    name = min(distances, key=lambda one: distances[one])
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


Outlines = tuple[np.ndarray, list[tuple[str, float, float]]]


@functools.cache
def outlines(half: float, right: float, down: float) -> Outlines:
    """All shapes of a size around a pixel's corner that lies so much before the middle of what is seen.

    Masks bool [n, WINDOW, WINDOW] (at least half of a pixel is covered), and of each the shape and where its middle is
    from that corner.
    """
    reach, corner = [step / STEPS_PER_PIXEL for step in range(-REACH, REACH + 1)], SIDE // 2
    near_first = sorted(
        itertools.product(reach, reach), key=lambda place: math.hypot(*place)
    )  # of equal ones the nearest
    places = [(shape, right + x, down + y) for x, y in near_first for shape in SHAPES]
    cut = slice(corner - WINDOW // 2, corner + WINDOW // 2)
    masks = [coverage(shape, corner + x, corner + y, half)[cut, cut] > 0.5 for shape, x, y in places]
    return np.stack(masks), places


def best_outline(covered: np.ndarray, half: float, x: float, y: float) -> tuple[float, str, float, float]:
    """(IoU, shape, x, y) of the outline that fits a mask best, its middle within `REACH` steps of (x, y)."""
    column, row = math.floor(x), math.floor(y)
    seen = np.pad(covered, WINDOW // 2)[row : row + WINDOW, column : column + WINDOW]
    masks, places = outlines(half, x - column, y - row)
    overlaps = (masks & seen).sum((1, 2)) / (masks | seen).sum((1, 2))
    best = int(overlaps.argmax())
    shape, right, down = places[best]
    return float(overlaps[best]), shape, column + right, row + down


def read_body(picture: np.ndarray, patch: np.ndarray) -> Body | None:
    color = color_of(picture[patch])
    if color is None:
        return None
    full = max(COLORS[color]) - min(COLORS[color])
    covered = patch & (saturation(picture) > full / 2)  # at least half of the pixel
    if not covered.any():
        return None
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    half = max(np.ptp(rows) + 1, np.ptp(columns) + 1) / 2
    size = min(SIZES, key=lambda name: abs(SIZES[name] - half))
    if abs(SIZES[size] - half) > MAX_SIZE_ERROR * SIZES[size]:
        return None
    middle = float(columns[0] + columns[-1] + 1) / 2, float(rows[0] + rows[-1] + 1) / 2
    overlap, shape, x, y = best_outline(covered, SIZES[size], *middle)
    return Body(shape, color, size, x, y) if overlap >= MIN_IOU else None


def read_scene(picture: np.ndarray) -> Scene | None:
    """The bodies in an RGB uint8 picture [SIDE, SIDE, 3]; None when any patch of colour cannot be read."""
    if picture.shape != (SIDE, SIDE, 3):
        return None
    bodies = []
    for patch in patches(saturation(picture) > MIN_SATURATION):
        if patch.sum() >= MIN_PIXELS:
            body = read_body(picture, patch)
            if body is None:
                return None
            bodies.append(body)
    return tuple(sorted(bodies))


def same_bodies(one: Scene, other: Scene) -> bool:
    """The same shapes, colours and sizes, wherever they are."""
    return sorted((*body.pair, body.size) for body in one) == sorted((*body.pair, body.size) for body in other)


def same_places(one: Scene, other: Scene, tolerance_pixels: float) -> bool:
    """The same bodies, each within so many pixels of where the other scene has it. Pairs name bodies."""
    places = {body.pair: body for body in other}
    return same_bodies(one, other) and all(
        math.hypot(body.x - places[body.pair].x, body.y - places[body.pair].y) <= tolerance_pixels for body in one
    )
