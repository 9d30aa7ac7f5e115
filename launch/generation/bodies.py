"""Bodies of requests, in the shape of OpenAI's interface, to prompts. Whatever comes in is bounded and checked here.

A body that does not fit is a `RequestError`, which becomes one JSON answer with the name of the field.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from launch.generation.questions import prompt_of_parts, read_picture
from launch.generation.sizes import pixels_of, read_size
from model.errors import UserError
from model.generation.settings import SamplingConfig
from training.inference.prompts import FORMATS, Prompt, is_unicode

MAX_PICTURES = 16  # of one prompt
MAX_STATES = 256
MAX_PREVIEWS = 16
MAX_SEED = 2**63 - 1
DRAWING_FIELDS = ("seed", "temperature", "top_p", "top_k", "guidance_scale", "partial_images", "stream", "size", "n")
COMMON_FIELDS = ("model", "user", *DRAWING_FIELDS)  # `user` is allowed and not read
PICTURE_FIELDS = ("prompt", "response_format", "output_format", *COMMON_FIELDS)
CHAT_FIELDS = ("messages", "format", "states", "words", "max_tokens", "max_completion_tokens", *COMMON_FIELDS)
_DATA_URL = re.compile(r"data:image/[a-z.+-]{1,20};base64,")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # escaped in JSON; most are halves of pairs that are whole
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")  # width x height


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, message, the field that it is about."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.field, self.status = message, field, status


@dataclass(frozen=True)
class Limits:
    """What a server allows and what it takes where a request says nothing."""

    model_name: str
    factor: int  # pixels of a side per visual token
    codebook_size: int
    sampling: SamplingConfig
    image_size: Any  # as of `read_size`
    image_area: int
    chat_format: str
    max_answers: int  # of one request
    max_pixels: int  # of one source picture
    max_pixels_together: int  # of all source pictures of one request

    def pixels(self) -> PixelBudget:
        return PixelBudget(self.max_pixels, self.max_pixels_together)


@dataclass
class PixelBudget:
    """How far the pictures of one request may unfold: a few kilobytes can hold millions of pixels."""

    each: int
    together: int  # what is left

    def decoded(self, data: bytes, name: str) -> np.ndarray:
        """uint8 [H, W, 3]. `name`: of the request's field."""
        try:
            picture = read_picture(data, name, min(self.each, self.together))
        except UserError as error:
            raise RequestError(str(error), name) from None
        self.together -= picture.shape[0] * picture.shape[1]
        return picture

    def decoded_url(self, value: Any, name: str) -> np.ndarray:
        """As `decoded`, of a data URL. Nothing is ever fetched."""
        match = _DATA_URL.match(value) if isinstance(value, str) else None
        if match is None:
            raise RequestError("a picture must be a data URL: data:image/png;base64,...", name)
        try:
            data = base64.b64decode(value[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise RequestError("a picture's data URL is not base64", name) from None
        return self.decoded(data, name)


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    prompt: Prompt
    sampling: SamplingConfig
    seed: int | None
    num_answers: int = 1
    num_previews: int = 0
    stream: bool = False
    num_states: int = 0
    words: list[str] = field(default_factory=list)


def read_json(raw: bytes) -> dict[str, Any]:
    """The object in a body. Numbers that JSON does not know, deep nesting and other sorts of values are refused."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        text = raw.decode()
        values = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise RequestError("the body is not a JSON object")
    if _HALF_PAIR.search(text) and not is_unicode(values):
        raise RequestError("a text in the body is not Unicode: half of a surrogate pair")
    return values


class Fields:
    """The fields of a body, read one by one with their type and bounds. Null is the same as absent."""

    def __init__(self, values: Mapping[str, Any], known: Sequence[str]) -> None:
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise RequestError(f"unknown field {unknown[0][:80]!r}; known: {', '.join(known)}", unknown[0][:80])
        self.values = {name: value for name, value in values.items() if value is not None}

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string", name)
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise RequestError(f"{name} must be a whole number in [{low}, {high}]", name)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise RequestError(f"{name} must be a number in [{low}, {high}]", name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", name)
        return value

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        value = self.text(name, default)
        if value not in options:
            raise RequestError(f"{name} must be one of {', '.join(options)}", name)
        return value


def read_generation(values: Mapping[str, Any], limits: Limits) -> Asked:
    """`/v1/images/generations`."""
    fields = Fields(values, PICTURE_FIELDS)
    check_encoding(fields)
    return _asked(fields, Prompt("t2i", fields.text("prompt")), limits, "image")


def read_edit(values: Mapping[str, Any], pictures: Sequence[np.ndarray], limits: Limits) -> Asked:
    """`/v1/images/edits`; the pictures come as files of a form, or in `images` of a JSON body (`read_images`)."""
    fields = Fields(values, PICTURE_FIELDS)
    check_encoding(fields)
    if not 1 <= len(pictures) <= MAX_PICTURES:
        raise RequestError(f"1 to {MAX_PICTURES} pictures are edited, got {len(pictures)}", "image")
    return _asked(fields, Prompt("x2i", fields.text("prompt"), list(pictures)), limits, "image")


def read_images(value: Any, limits: Limits) -> list[np.ndarray]:
    """`images` of a JSON body: [{"image_url": data URL}, ...]."""
    is_list = isinstance(value, list) and all(isinstance(one, dict) and set(one) == {"image_url"} for one in value)
    if not is_list or len(value) > MAX_PICTURES:
        raise RequestError(f'images must be at most {MAX_PICTURES} of {{"image_url": "data:image/..."}}', "images")
    budget = limits.pixels()
    return [budget.decoded_url(one["image_url"], "images") for one in value]


def read_chat(values: Mapping[str, Any], limits: Limits) -> Asked:
    """`/v1/chat/completions`, the part of it that this model can answer."""
    fields = Fields(values, CHAT_FIELDS)
    fields.whole("n", 1, 1, 1)
    prompt_format = fields.choice("format", FORMATS, limits.chat_format)
    parts = read_messages(fields.values.get("messages"), prompt_format, limits)
    words = fields.values.get("words", [])
    if not isinstance(words, list) or not all(isinstance(one, str) for one in words) or len(words) > MAX_STATES:
        raise RequestError(f"words must be at most {MAX_STATES} strings", "words")
    num_states = fields.whole("states", 0, 0, MAX_STATES)
    if num_states and prompt_format not in ("interleaved", "explore"):
        raise RequestError("states are rolled on with format interleaved or explore", "states")
    if words and not num_states:
        raise RequestError("words are said before the states of a rollout", "words")
    asked = _asked(fields, prompt_of_parts(prompt_format, parts), limits, "text")
    limit = asked.sampling.max_new_tokens
    for name in ("max_tokens", "max_completion_tokens"):
        limit = min(limit, fields.whole(name, limit, 1, 2**31))
    sampling = replace(asked.sampling, max_new_tokens=limit)
    return replace(asked, sampling=sampling, num_states=num_states, words=words)


def read_messages(messages: Any, prompt_format: str, limits: Limits) -> list[str | np.ndarray]:
    """Text and pictures of the messages, in order."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError("messages must be a list of objects, not empty", "messages")
    if prompt_format != "interleaved" and (len(messages) != 1 or messages[0].get("role") != "user"):
        raise RequestError(
            f"format {prompt_format} answers one message of the user; format interleaved continues several", "messages"
        )
    parts: list[str | np.ndarray] = []
    budget = limits.pixels()
    for message in messages:
        unknown = set(message) - {"role", "content"}
        if unknown or message.get("role") not in ("system", "user", "assistant"):
            raise RequestError("a message has a role (system, user, assistant) and a content", "messages")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list):
            raise RequestError("the content of a message must be a string or a list", "messages")
        parts += [read_part(item, limits, budget) for item in items]
        if sum(not isinstance(part, str) for part in parts) > MAX_PICTURES * 16:
            raise RequestError(f"at most {MAX_PICTURES * 16} pictures", "messages")
    parts = [part for part in parts if not isinstance(part, str) or part]
    if not parts:
        raise RequestError("the messages say nothing", "messages")
    return parts


def read_part(item: Any, limits: Limits, budget: PixelBudget) -> str | np.ndarray:
    """A text, a picture as a data URL, or a picture as codes (of an answer, to go on from it without loss)."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return str(item["text"])
    if kind == "image_url":
        value = item.get("image_url")
        return budget.decoded_url(value.get("url") if isinstance(value, dict) else value, "messages")
    if kind == "image_codes":
        return read_codes(item.get("codes"), limits)
    raise RequestError(
        'a part of a message is {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}} or '
        '{"type": "image_codes", "codes": [[...], ...]}',
        "messages",
    )


def read_codes(value: Any, limits: Limits) -> np.ndarray:
    """int64 [h, w], every code in the codebook."""
    rows = value if isinstance(value, list) and 1 <= len(value) <= 999 else [[]]
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    is_grid = 1 <= width <= 999 and all(isinstance(row, list) and len(row) == width for row in rows)
    if not is_grid or not all(type(code) is int and 0 <= code < limits.codebook_size for row in rows for code in row):
        raise RequestError(f"codes must be rows of one length with codes below {limits.codebook_size}", "messages")
    return np.array(rows, np.int64)


def check_encoding(fields: Fields) -> None:
    """Pictures are answered as PNG in base64: files are not kept, so there is no URL."""
    fields.choice("response_format", ("b64_json",), "b64_json")
    fields.choice("output_format", ("png",), "png")


def _asked(fields: Fields, prompt: Prompt, limits: Limits, phase: str) -> Asked:
    """What all requests have in common; temperature, top_p and top_k are those of `phase` (text or image)."""
    name = fields.text("model", limits.model_name)
    if name != limits.model_name:
        raise RequestError(f"there is no model {name[:80]!r}; this server has {limits.model_name!r}", "model", 404)
    default = getattr(limits.sampling, phase)
    changed = replace(
        default,
        temperature=fields.number("temperature", default.temperature, 0, 10),
        top_p=fields.number("top_p", default.top_p, 1e-6, 1),
        top_k=fields.whole("top_k", default.top_k, 0, 2**31),
    )
    guidance = fields.number("guidance_scale", limits.sampling.guidance_scale, 0, 100)
    sampling = replace(limits.sampling, guidance_scale=guidance, **{phase: changed})
    prompt.image_size = _pixels(fields.values.get("size"), limits)
    return Asked(
        prompt,
        sampling,
        fields.whole("seed", 0, 0, MAX_SEED) if "seed" in fields.values else None,
        fields.whole("n", 1, 1, limits.max_answers),
        fields.whole("partial_images", 0, 0, MAX_PREVIEWS),
        fields.flag("stream"),
    )


def _pixels(value: Any, limits: Limits) -> tuple[int, int]:
    """(height, width) of `size`: "WIDTHxHEIGHT", "16:9" or "auto" (as the server is set)."""
    if value in (None, "auto"):
        value = limits.image_size
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = [int(match[2]), int(match[1])]
    elif not isinstance(value, str):
        value = ""
    size = read_size(value)
    if size is None:
        raise RequestError('size must be "WIDTHxHEIGHT" in pixels, a ratio such as "16:9", or "auto"', "size")
    return pixels_of(size, limits.image_area, limits.factor)
