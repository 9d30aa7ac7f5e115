"""Filters of pictures and films that need no model. They see pictures as the vision tokenizer will, resized."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from data_pipeline.documents.builder import Text
from data_pipeline.kinds.base import PreparedSample
from data_pipeline.storage.segments import Kind

_DARKEST, _BRIGHTEST = 4, 251  # of 255: a pixel beyond them has lost what it showed
_HASH_SIDE = 8


class Sharpness:
    """The variance of the Laplacian of the brightness (Pech-Pacheco et al. 2000), of the median picture."""

    name = "sharpness"
    unit = "variance of the Laplacian"

    def score(self, sample: PreparedSample) -> float | None:
        found = [float(_laplacian(_brightness(picture.pixels)).var()) for picture in sample.pictures]
        return float(np.median(found)) if found else None


class ClippedShare:
    """Pixels that are nearly black or nearly white, of the median picture: under- and overexposed."""

    name = "clipped_share"
    unit = "clipped pixels / pixels"

    def score(self, sample: PreparedSample) -> float | None:
        found = []
        for picture in sample.pictures:
            brightness = _brightness(picture.pixels)
            found.append(float(((brightness <= _DARKEST) | (brightness >= _BRIGHTEST)).mean()))
        return float(np.median(found)) if found else None


@dataclass
class RepeatedFrames:
    """Key frames that look like the one before, of those that have one before.

    Two look alike when their difference hashes (brightness of 9 x 8 pixels, each compared with its neighbour) differ in at
    most `max_bits` of 64.
    """

    max_bits: int = 6
    name = "repeated_frames"
    unit = "frames like the one before / frames after the first"

    def score(self, sample: PreparedSample) -> float | None:
        hashes = [difference_hash(picture.pixels) for picture in sample.pictures]
        if len(hashes) < 2 or not is_film(sample):
            return None
        alike = [(one != other).sum() <= self.max_bits for one, other in pairwise(hashes)]
        return sum(alike) / len(alike)


class Duration:
    """Seconds to the last key frame or word of a film."""

    name = "duration"
    unit = "seconds"

    def score(self, sample: PreparedSample) -> float | None:
        return max(part.time_ms for part in sample.parts) / 1000 if is_film(sample) else None


class SpeechlessShare:
    """Key frames of a film with a transcript after which nobody speaks before the next one."""

    name = "speechless_share"
    unit = "frames without speech / frames"

    def score(self, sample: PreparedSample) -> float | None:
        speech = [isinstance(part, Text) and part.kind == Kind.TRANSCRIPT for part in sample.parts]
        num_frames = len(sample.pictures)
        if not any(speech) or not num_frames:
            return None
        silent = [not (one or after) for one, after in zip(speech, [*speech[1:], False], strict=True)]
        return sum(silent) / num_frames


def is_film(sample: PreparedSample) -> bool:
    return sample.kind in ("video_text", "video_interleaved", "video_spoken")


def difference_hash(pixels: np.ndarray) -> np.ndarray:
    """bool [64] of a picture uint8 [H, W, 3]."""
    small = Image.fromarray(pixels).convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.int16)
    bits: np.ndarray = values[:, 1:] > values[:, :-1]
    return bits.reshape(-1)


def _brightness(pixels: np.ndarray) -> np.ndarray:
    """float32 [H, W]; the weights of ITU-R BT.601."""
    found: np.ndarray = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return found


def _laplacian(values: np.ndarray) -> np.ndarray:
    """[H - 2, W - 2]: the four neighbours less four times the middle; zeros for a picture too small to have a middle."""
    if min(values.shape) < 3:
        return np.zeros((1, 1), np.float32)
    middle = values[1:-1, 1:-1]
    around: np.ndarray = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return around - 4 * middle
