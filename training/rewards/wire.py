"""Answers as they travel to a service: JSON, pictures as PNG in base64. Never a pickle."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model.durable import fingerprint_of
from training.rewards.base import Answer

MAX_PIXELS = 1 << 27  # of all pictures of a request together: 128 megapixels, 400 MB
TEXT_FIELDS = ("task", "prompt", "text")
# Pillow raises these on bytes that are no PNG (AssertionError: a palette that is not there), base64 a ValueError.
_CORRUPT = (OSError, SyntaxError, ValueError, AssertionError)


class WireError(ValueError):
    """What arrived is no answer; the message says why."""


@dataclass
class PixelBudget:
    """How much a request may still unfold to: a small PNG can hold a huge picture."""

    left: int = MAX_PIXELS

    def take(self, num_pixels: int) -> None:
        self.left -= num_pixels
        if self.left < 0:
            raise WireError(f"its pictures have more than {MAX_PIXELS} pixels")


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3], without loss: a scorer must see the model's own mistakes, not those of a compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encoded(answer: Answer) -> dict[str, Any]:
    """JSON values of an answer, with `id`: what it holds decides it, so the same answer may be sent again."""
    values: dict[str, Any] = {name: getattr(answer, name) for name in TEXT_FIELDS}
    values |= {"finished": answer.finished, "fields": answer.fields}
    values["prompt_images"] = [_encoded_image(image) for image in answer.prompt_images]
    values["images"] = [None if image is None else _encoded_image(image) for image in answer.images]
    return values | {"id": fingerprint_of(values)}


def decoded(values: object, budget: PixelBudget | None = None) -> Answer:
    """The answer in what arrived. Raises `WireError`; whatever was sent, nothing but JSON and PNG is read.

    `budget`: of the request that it is part of.
    """
    budget = budget or PixelBudget()
    if not isinstance(values, Mapping):
        raise WireError("an answer is no JSON object")
    for name in TEXT_FIELDS:
        if not isinstance(values.get(name), str):
            raise WireError(f"{name} is no text")
    fields, images, sources = values.get("fields"), values.get("images"), values.get("prompt_images")
    if not isinstance(fields, dict) or not isinstance(images, list) or not isinstance(sources, list):
        raise WireError("fields is no JSON object, or images or prompt_images no list")
    content = {name: value for name, value in values.items() if name != "id"}
    try:
        own_id = fingerprint_of(content)
    except RecursionError:
        raise WireError("it is nested too deeply") from None
    if values.get("id") != own_id:
        raise WireError("its id is not that of its content")
    return Answer(
        values["task"],
        values["prompt"],
        [_decoded_image(image, budget) for image in sources],
        [None if image is None else _decoded_image(image, budget) for image in images],
        values["text"],
        bool(values.get("finished")),
        fields,
    )


def _encoded_image(image: np.ndarray) -> str:
    return base64.b64encode(png_bytes(image)).decode("ascii")


def _decoded_image(text: object, budget: PixelBudget) -> np.ndarray:
    if not isinstance(text, str):
        raise WireError("a picture is no text")
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            budget.take(picture.width * picture.height)
            return np.asarray(picture.convert("RGB"))
    except WireError:
        raise
    except (Image.DecompressionBombError, *_CORRUPT) as error:
        raise WireError(f"a picture is no PNG in base64: {error}") from error
