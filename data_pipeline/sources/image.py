"""Pictures: decoding, and resizing to a whole number of visual tokens."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.sources.samples import SampleError

# Of one picture, and of a frame as it is shown: at most 11 bytes a pixel are held while it is decoded.
MAX_PIXELS = 80_000_000
MAX_JPEG_SCANS = 200  # each pass over the picture costs as much as the first; encoders write about ten
# What a dataset may hold, whatever its files are called. Pillow tells formats by content, and some of those that it knows
# start other programs (EPS: Ghostscript) or read other files.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_STRIP_PIXELS = 1 << 22  # converted at once
# Pillow's decoders raise these on bytes that are not what they claim to be.
_CORRUPT = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)


@dataclass
class ImageConfig:
    """Areas in pixels. A 48 x 48 picture has an area of 2,304."""

    max_area: int = 512 * 512  # larger pictures are reduced to it
    min_area: int = 0  # smaller pictures are enlarged to it
    # As the released code rounds, the area may pass max_area, by 3.1% at 512 x 512 and 16 pixels a token
    # (tests/data_pipeline/test_filters_image.py).
    resize: str = "bounded"  # bounded: never above max_area; emu35: every picture to max_area, enlarged too


@contextlib.contextmanager
def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A picture of one of `PICTURE_FORMATS`, its pixels not decoded yet: the one place where pictures are opened.

    Raises `SampleError`, also for what the block raises about the picture's bytes: `corrupt_image`, `image_too_large`.
    """
    try:
        if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise SampleError("corrupt_image", f"{data.count(bytes((0xFF, 0xDA)))} scans")
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise SampleError("image_too_large", f"{picture.width} x {picture.height}")
            yield picture
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except _CORRUPT as error:
        raise SampleError("corrupt_image", f"{type(error).__name__}: {error}") from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3], upright, transparency on white. Raises `SampleError`, see `open_picture`."""
    with open_picture(data, max_pixels) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        return _to_rgb(picture)


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], converted strip by strip: what a large picture needs beside itself is small."""
    picture.load()
    convert = _conversion(picture)
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top, strip in _strips(picture):
        pixels[top : top + strip.height] = convert(strip)
    return pixels


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, rows) from top to bottom."""
    step = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, step):
        yield top, picture.crop((0, top, picture.width, min(top + step, picture.height)))


def _conversion(picture: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """What makes a strip of this picture RGB, or grey [h, w, 1].

    Pillow's own conversion cuts grey values of 16 bits and floats off at 255.
    """
    if picture.mode.startswith("I"):
        highest = max(np.asarray(strip).max(initial=0) for _, strip in _strips(picture))
        shift = 8 if picture.mode != "I" or highest > 255 else 0
        return lambda strip: np.clip(np.asarray(strip).astype(np.int64) >> shift, 0, 255)[:, :, None]
    if picture.mode == "F":

        def values(strip: Image.Image) -> np.ndarray:
            return np.nan_to_num(np.asarray(strip), nan=0.0, posinf=1.0, neginf=0.0)

        highest = max(values(strip).max(initial=0.0) for _, strip in _strips(picture))
        scale = 255 if highest <= 1.0 else 1
        return lambda strip: np.clip(values(strip) * scale, 0, 255).round()[:, :, None]
    if picture.has_transparency_data:
        return _on_white
    return lambda strip: np.asarray(strip.convert("RGB"))


def _on_white(strip: Image.Image) -> np.ndarray:
    layer = strip.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))


def fit_size(height: int, width: int, *, factor: int, max_area: int, min_area: int = 0) -> tuple[int, int]:
    """The size (height, width) in pixels to resize to: multiples of `factor`, the aspect kept.

    The area never exceeds `max_area` (save that each side has at least one token), and pictures
    already below it keep their size, up to rounding, unless they are below `min_area`.
    """
    assert min(height, width, factor) > 0
    area = height * width
    scale = math.sqrt(min(max_area, max(min_area, area)) / area)
    rows = max(1, round(height * scale / factor))
    columns = max(1, round(width * scale / factor))
    max_tokens = max(1, max_area // factor**2)
    # Rounding up may pass the limit: give up tokens of the longer side, where one changes least.
    if rows * columns > max_tokens:
        if rows >= columns:
            columns = min(columns, max_tokens)
            rows = max(1, max_tokens // columns)
        else:
            rows = min(rows, max_tokens)
            columns = max(1, max_tokens // rows)
    return rows * factor, columns * factor


def released_size(height: int, width: int, *, factor: int, area: int) -> tuple[int, int]:
    """The size (height, width) that the released Emu3.5 code resizes to: the height first, then the width from it.

    Whole pixels are cut off, then each side is rounded to the nearest multiple of `factor`. A side of zero tokens, which the
    released code would give a long strip, is one token here.
    """
    aspect = width / height
    rows = int(math.sqrt(area / aspect))
    columns = int(rows * aspect)
    nearest = [max(1, (side + factor // 2) // factor) * factor for side in (rows, columns)]
    return nearest[0], nearest[1]


def smart_resize(picture: np.ndarray, config: ImageConfig, factor: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [H', W', 3] by bicubic interpolation; see `fit_size`."""
    if config.resize == "emu35":
        height, width = released_size(*picture.shape[:2], factor=factor, area=config.max_area)
    else:
        height, width = fit_size(*picture.shape[:2], factor=factor, max_area=config.max_area, min_area=config.min_area)
    if (height, width) == picture.shape[:2]:
        return picture
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized)
