"""Text in pictures, read by a real reader: RapidOCR, whose wheel holds its models (nothing is downloaded)."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from model.errors import UserError
from training.rewards.base import Answer

SURE = 0.5  # RapidOCR's own bound for lines that it found
LINE_HEIGHT = 48  # pixels, to which its network for reading brings every line
Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the picture's height and width


@dataclass(frozen=True)
class Line:
    """A line of text found in a picture."""

    text: str
    box: Box


@functools.cache
def reader(one_line: bool = False) -> Any:
    """One for the process, on one thread: scorers run beside training and beside each other.

    `one_line`: it takes a picture for one line of text, without the search for lines and without the margin to the right
    that RapidOCR gives to short lines: both take most of the time of small pictures.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            "the reward reads text with RapidOCR, which is not installed",
            got=str(error),
            fix="pip install 'nextstate[rewards]'",
        ) from error
    params: dict[str, Any] = {"Global.log_level": "error", "Global.use_cls": False}
    params |= {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    if one_line:
        params |= {"Global.use_det": False, "Rec.rec_img_shape": [3, LINE_HEIGHT, LINE_HEIGHT]}
    return RapidOCR(params=params)


@functools.cache
def reader_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"rapidocr-{version('rapidocr')}"
    except PackageNotFoundError:
        return "rapidocr-missing"  # `reader` refuses with the cure


def read_lines(picture: np.ndarray) -> list[Line]:
    """The lines of text in a picture uint8 [H, W, 3], from top to bottom."""
    height, width = picture.shape[:2]
    found = reader()(as_bgr(picture))
    if found.boxes is None or not found.txts:
        return []
    lines = []
    for text, corners in zip(found.txts, found.boxes, strict=True):
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        lines.append(Line(text, (top / height, left / width, bottom / height, right / width)))
    return sorted(lines, key=lambda line: (line.box[0] + line.box[2], line.box[1]))


def read_one_line(picture: np.ndarray) -> str:
    """The text of a picture uint8 [H, W, 3] that is one line of it; empty where the reader is not sure of it."""
    found = reader(one_line=True)(as_bgr(picture))
    if not found.txts:
        return ""
    return "".join(text for text, score in zip(found.txts, found.scores, strict=True) if score >= SURE)


def as_bgr(picture: np.ndarray) -> np.ndarray:
    """As the reader has it, which is OpenCV's order."""
    return np.ascontiguousarray(picture[:, :, ::-1])


def plain(text: str) -> str:
    """What is compared: Unicode compatibility forms, and no space: a reader does not see how many there are."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def likeness(read: str, wanted: str) -> float:
    """1 - edit distance / length of the longer one: symmetric, so that text too much costs as text missing does."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(plain(read), plain(wanted)))


@dataclass
class TextRendering:
    """Does the first picture show the text of `fields["text"]` and no other? In [0, 1]."""

    name: ClassVar[str] = "text_rendering"
    one_line: bool = False  # the whole picture is one line of text: nothing is looked for, only read

    @property
    def version(self) -> str:
        return f"1{'-one-line' if self.one_line else ''}+{reader_version()}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float | None:
        wanted = answer.fields.get("text")
        if not isinstance(wanted, str):
            return None
        if not answer.images or answer.images[0] is None:
            return 0.0
        picture = answer.images[0]
        read = read_one_line(picture) if self.one_line else "".join(line.text for line in read_lines(picture))
        return likeness(read, wanted)


@dataclass
class TextLayout:
    """Do the lines of `fields["text_boxes"]` stand where they should? In [0, 1].

    Each entry is `{"text": ..., "box": [top, left, bottom, right]}` in shares of the picture. A wanted line takes the
    line read that is most like it; what it is worth is likeness x intersection over union of the boxes. Lines too many
    count in the mean with 0.
    """

    name: ClassVar[str] = "text_layout"

    @property
    def version(self) -> str:
        return f"1+{reader_version()}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float | None:
        wanted = answer.fields.get("text_boxes")
        if not isinstance(wanted, list) or not wanted:
            return None
        if not answer.images or answer.images[0] is None:
            return 0.0
        left = read_lines(answer.images[0])
        num_read, worth = len(left), 0.0
        for one in wanted:
            if left:
                best = max(left, key=lambda line: likeness(line.text, one["text"]))
                worth += likeness(best.text, one["text"]) * overlap(best.box, tuple(one["box"]))
                left.remove(best)
        return worth / max(len(wanted), num_read)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, height) * max(0.0, width)
    either = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - both
    return both / either if either > 0 else 0.0
