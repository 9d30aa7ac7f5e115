"""Text in pictures, found by RapidOCR, whose wheel holds its models (nothing is downloaded)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from data_pipeline.kinds.base import PreparedSample
from model.errors import UserError

_LEAST_CHARACTERS = 2


class PrintedShare:
    """How much of the picture lines of text cover, of the median picture."""

    name = "printed_share"
    unit = "area of text / area"

    def score(self, sample: PreparedSample) -> float | None:
        found = [printed_share(picture.pixels) for picture in sample.pictures]
        return float(np.median(found)) if found else None


def printed_share(pixels: np.ndarray) -> float:
    """The share of a picture uint8 [H, W, 3] that boxes around its lines of text cover; each pixel counts once.

    Lines are read too, and what reads as less than `_LEAST_CHARACTERS` is no text: a cup is read as "8", an eye as "0".
    """
    covered = np.zeros(pixels.shape[:2], bool)
    found = _finder()(np.ascontiguousarray(pixels[:, :, ::-1]))  # it reads BGR, as OpenCV does
    for text, corners in [] if found.boxes is None or not found.txts else zip(found.txts, found.boxes, strict=True):
        if len(text.strip()) < _LEAST_CHARACTERS:
            continue
        (left, top), (right, bottom) = np.maximum(corners.min(axis=0), 0), corners.max(axis=0)
        covered[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return float(covered.mean())


@functools.cache
def _finder() -> Any:
    """One for the process, on one thread: workers are processes."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            "the filter `printed_share` needs RapidOCR", got=str(error), fix="pip install 'nextstate[filters]'"
        ) from error
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False, **threads})
