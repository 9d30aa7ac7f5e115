"""What is asked: prompts from the command line or from a file, bounded and checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.sources.image import MAX_PIXELS, PICTURE_FORMATS, decode_image
from data_pipeline.sources.samples import SampleError
from launch.generation.sizes import Size, read_size
from model.errors import UserError
from training.inference.prompts import FORMATS, Prompt, is_unicode

EXPECTED = (
    '{"text": "...", "images": ["PATH", ...]} or {"parts": [{"text": "..."}, {"image": "PATH"}, ...]}, '
    "and of format, image_size, states, words what differs from the command line"
)


@dataclass(frozen=True)
class Question:
    """One question; paths of pictures are not opened yet. `parts`: text and pictures in order, in place of both."""

    text: str = ""
    images: list[str] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)  # {"text": ...} or {"image": path}
    format: str = "t2i"
    image_size: Size = (0, 0)
    states: int = 0  # of a world rollout; 0: none
    words: list[str] = field(default_factory=list)  # said before each state


def read_questions(path: Path, defaults: Question) -> list[Question]:
    """The questions of a file: .jsonl with an object a line, otherwise a prompt a line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the prompts file cannot be read", where=str(path), got=str(error)) from error
    if not lines:
        raise UserError("the prompts file holds no prompt", where=str(path))
    if path.suffix == ".jsonl":
        return [_of_line(path, number, line, defaults) for number, line in enumerate(lines, 1)]
    return [replace(defaults, text=line) for line in lines]


def _of_line(path: Path, number: int, line: str, defaults: Question) -> Question:
    where = f"{path}, prompt {number}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("not a JSON object", where=where, got=str(error)) from error
    problem = _problem(values)
    if problem:
        raise UserError("not a prompt", where=where, expected=EXPECTED, got=f"{problem} in {line[:80]}")
    if "image_size" in values:
        values["image_size"] = read_size(values["image_size"])
    base = path.parent
    values["images"] = [str(base / name) for name in values.get("images", [])]
    values["parts"] = [
        {"image": str(base / part["image"])} if "image" in part else part for part in values.get("parts", [])
    ]
    question = replace(defaults, **values)
    check_question(question, where)
    return question


def _problem(values: Any) -> str:
    """What is wrong with an object of a prompts file; empty: nothing."""
    if not isinstance(values, dict):
        return "no object"
    checks = {
        "text": lambda value: isinstance(value, str),
        "images": are_texts,
        "parts": are_parts,
        "format": lambda value: isinstance(value, str),
        "image_size": lambda value: read_size(value) is not None,
        "states": lambda value: type(value) is int and value >= 0,
        "words": are_texts,
    }
    unknown = [name for name in values if name not in checks]
    if unknown:
        return f"unknown key {unknown[0]!r}"
    for name, value in values.items():
        if not checks[name](value):
            return f"a value of {name} that does not fit"
    if "parts" in values and ("text" in values or "images" in values):
        return "parts beside text or images"
    return "" if "parts" in values or "text" in values else "neither text nor parts"


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and list(one) in (["text"], ["image"]) and all(isinstance(v, str) for v in one.values())
        for one in value
    )


def check_question(question: Question, where: str = "") -> None:
    """Raises `UserError` for what cannot be asked, whatever the model."""
    if not is_unicode([question.text, question.images, question.parts, question.words]):
        raise UserError("a text of a prompt is not Unicode", where=where, got=ascii(question.text)[:80])
    if question.format not in FORMATS:
        raise UserError("unknown format of a prompt", where=where, expected=", ".join(FORMATS), got=question.format)
    has_pictures = bool(question.images) or any("image" in part for part in question.parts)
    if question.format == "x2i" and not has_pictures:
        raise UserError("x2i needs source pictures", where=where, fix="images=[scene.png]")
    if question.format == "t2i" and has_pictures:
        raise UserError("t2i draws from words alone", where=where, got="source pictures", fix="format=x2i")
    if question.states and question.format not in ("interleaved", "explore"):
        raise UserError(
            "a world rollout continues frames and words",
            where=where,
            expected="format=interleaved or format=explore",
            got=f"format={question.format}",
        )
    if question.words and not question.states:
        raise UserError("words are said before the states of a rollout", where=where, fix="states=N")


def prompt_of(question: Question) -> Prompt:
    """The prompt with its pictures, its image size still open. Raises `UserError` for pictures that cannot be read."""
    if question.parts:
        parts = [load_image(Path(part["image"])) if "image" in part else part["text"] for part in question.parts]
    else:
        parts = [*(load_image(Path(name)) for name in question.images), *([question.text] if question.text else [])]
    return prompt_of_parts(question.format, parts)


def prompt_of_parts(prompt_format: str, parts: Sequence[str | np.ndarray]) -> Prompt:
    """Text and pictures in order as the format wants them: chat tasks have the pictures apart from the words."""
    if prompt_format == "interleaved":
        return Prompt(prompt_format, parts=list(parts))
    text = " ".join(part for part in parts if isinstance(part, str))
    return Prompt(prompt_format, text, [part for part in parts if not isinstance(part, str)])


def load_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError("a source picture cannot be read", where=str(path), got=str(error)) from error
    return read_picture(data, str(path))


def read_picture(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file from anywhere; what it unpacks to is bounded before it is unpacked."""
    try:
        return decode_image(data, max_pixels)
    except SampleError as error:
        raise UserError(
            "a source picture cannot be read",
            where=where,
            expected=f"a whole {', '.join(PICTURE_FORMATS)} file of at most {max_pixels:,} pixels",
            got=str(error),
        ) from error
