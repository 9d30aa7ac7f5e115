"""Pictures: decoding, and resizing to a whole number of visual tokens."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.sources.samples import SampleError

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, made an error here


@dataclass
class ImageConfig:
    """Areas in pixels. A 48 x 48 picture has an area of 2,304."""

    max_area: int = 512 * 512  # larger pictures are reduced to it
    min_area: int = 0  # smaller pictures are enlarged to it
    # As the released code rounds, the area may pass max_area, by 3.1% at 512 x 512 and 16 pixels a token
    # (tests/data_pipeline/test_filters_image.py).
    resize: str = "bounded"  # bounded: never above max_area; emu35: every picture to max_area, enlarged too


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None) -> np.ndarray:
    """uint8 [H, W, 3], upright, transparency on white. `formats`: Pillow's names of what may be read; None: all.

    Raises `SampleError`: `corrupt_image`, or `image_too_large` before more than `max_pixels` are unpacked.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            if picture.width * picture.height > max_pixels:
                raise SampleError("image_too_large", f"{picture.width} x {picture.height}")
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
                upright = Image.alpha_composite(white, layer)
            return _to_rgb(upright)
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    # Pillow's decoders raise these on bytes that are not what they claim to be.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise SampleError("corrupt_image", f"{type(error).__name__}: {error}") from error


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Pillow's own conversion cuts grey values of 16 bits and floats off at 255."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        sixteen_bits = picture.mode != "I" or values.max(initial=0) > 255
        grey = np.clip(values >> 8 if sixteen_bits else values, 0, 255)
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture), nan=0.0, posinf=1.0, neginf=0.0)
        grey = np.clip(values * 255 if values.max(initial=0.0) <= 1.0 else values, 0, 255).round()
    else:
        return np.array(picture.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


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
