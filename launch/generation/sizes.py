"""Sizes of pictures as people give them: pixels of a side, [height, width], a ratio, or the model's choice."""

from __future__ import annotations

import math
import re
from typing import Any

PUBLISHED_AREA = 1_048_576  # pixels; 4,096 tokens of 16 x 16
# Rows and columns of tokens that the released code asks for at that area (`configs/` of github.com/baaivision/Emu3.5).
# All but 16:9 and 9:16 are what `grid_of_ratio` gives.
PUBLISHED_GRIDS = {
    "4:3": (55, 73),
    "21:9": (41, 97),
    "16:9": (47, 85),
    "3:2": (52, 78),
    "1:1": (64, 64),
    "3:4": (73, 55),
    "9:16": (85, 47),
    "2:3": (78, 52),
}
_RATIO = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")  # width:height

Size = tuple[int, int] | str  # (height, width) in pixels, zeros: the model chooses; or a ratio


def read_size(value: Any) -> Size | None:
    """None when `value` is no size. A number is the side of a square; 0, `auto` and null leave the choice to the model."""
    if value is None or value == "auto":
        return 0, 0
    if isinstance(value, str) and _RATIO.fullmatch(value):
        return value
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    valid = all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in sides)
    return (sides[0], sides[1]) if valid and bool(sides[0]) == bool(sides[1]) else None


def pixels_of(size: Size, area: int, factor: int) -> tuple[int, int]:
    """(height, width) in pixels. A ratio has about `area` pixels, in tokens of `factor` x `factor`."""
    if not isinstance(size, str):
        return size
    num_tokens = area // factor**2
    rows, columns = grid_of_ratio(size, num_tokens)
    if num_tokens == PUBLISHED_AREA // 16**2:
        rows, columns = PUBLISHED_GRIDS.get(size, (rows, columns))
    return rows * factor, columns * factor


def grid_of_ratio(ratio: str, num_tokens: int) -> tuple[int, int]:
    """Rows and columns of at most `num_tokens` tokens: each side is rounded down."""
    width, height = (int(side) for side in ratio.split(":"))
    rows = max(1, math.isqrt(num_tokens * height // width))
    columns = max(1, math.isqrt(num_tokens * width // height))
    return rows, columns
