"""The words world: a few digits in one colour on a small sheet, drawn with the font that is part of Pillow.

Each character fills a cell of 8 x 16 pixels at a multiple of 8, so that a vision tokenizer of factor 8 needs two codes
for it, whatever stands beside it.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "0123456789"
LENGTHS = (2, 3, 4)
STEP = 8  # pixels; places are multiples of it
CELL = (16, 8)  # height and width in pixels of a character's cell
SHEET = (24, 72)  # height and width in pixels
MARGIN = 1  # pixels left free around a character
PAPER = (250, 248, 242)
INKS = {"red": (205, 35, 35), "blue": (35, 60, 205), "black": (25, 25, 25)}
COARSE_FONT_PIXELS = 64  # characters are drawn so large and then reduced
HELD_OUT_SHARE = 7  # one text in so many is in no training document


@dataclass(frozen=True)
class Writing:
    """`text` in a colour; `row` and `column` of its first cell's corner, in steps of 8 pixels."""

    text: str
    color: str
    row: int
    column: int

    @property
    def caption(self) -> str:
        """Where it stands is left to who draws it."""
        return f'Write "{self.text}" in {self.color}.'


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def random_writing(rng: np.random.Generator, held_out: bool = False) -> Writing:
    """Any length, colour and place are equally likely; the text is one of those held out, or none of them."""
    while True:
        text = "".join(rng.choice(list(CHARACTERS), int(rng.choice(LENGTHS))))
        if is_held_out(text) == held_out:
            break
    rows, columns = ((side - used) // STEP for side, used in zip(SHEET, (CELL[0], CELL[1] * len(text)), strict=True))
    color = str(rng.choice(list(INKS)))
    return Writing(text, color, int(rng.integers(rows + 1)), int(rng.integers(columns + 1)))


def draw(writing: Writing) -> np.ndarray:
    """uint8 [24, 72, 3]."""
    ink = np.zeros(SHEET, np.float32)  # share of each pixel that is covered
    top = writing.row * STEP
    for number, character in enumerate(writing.text):
        left = writing.column * STEP + number * CELL[1]
        ink[top : top + CELL[0], left : left + CELL[1]] = glyph(character)
    paper, color = np.array(PAPER, np.float32), np.array(INKS[writing.color], np.float32)
    return (paper + ink[:, :, None] * (color - paper)).round().astype(np.uint8)


@functools.cache
def glyph(character: str) -> np.ndarray:
    """How much of each pixel of its cell a character covers: float32 [16, 8] in [0, 1]."""
    font = ImageFont.load_default(COARSE_FONT_PIXELS)
    _, top, _, bottom = font.getbbox(CHARACTERS)
    width = max(font.getlength(one) for one in CHARACTERS)
    coarse = Image.new("L", (round(width), round(bottom - top)))
    ImageDraw.Draw(coarse).text(((width - font.getlength(character)) / 2, -top), character, fill=255, font=font)
    height, width = (side - 2 * MARGIN for side in CELL)
    fine = coarse.resize((width, height), Image.Resampling.BOX)
    return np.pad(np.asarray(fine, np.float32) / 255, MARGIN)


def color_of(picture: np.ndarray) -> str | None:
    """Of the ink in a picture uint8 [H, W, 3]: the nearest one, by the darkest pixels; None on an empty sheet."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    distance = np.abs(pixels - np.array(PAPER)).sum(axis=1)
    inked = pixels[distance > distance.max(initial=0.0) * 0.7]
    if distance.max(initial=0.0) < 100:
        return None
    return min(INKS, key=lambda name: float(np.abs(inked.mean(axis=0) - np.array(INKS[name])).sum()))
