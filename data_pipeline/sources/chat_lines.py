"""Chats as people have them, to chat samples: `messages` lines of Hugging Face's kind, and pairs of any-to-image.

A line is a JSON object. `messages`: a list of {"role", "content"}, the content a text or a list of items
({"type": "text", "text"}, {"type": "image", "image": PATH}, {"type": "video", "video": PATH}); an `image` item without a path
and each `<image>` in a text take the next of the line's `images`. `conversations` with {"from", "value"} is read too. Pairs:
`instruction`, `sources` (paths) and `target` (a path).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, SampleError

FORMATS = ("messages", "x2i")
ROLES = {"human": "user", "gpt": "assistant"}  # names that other tools have for them
PLACE = re.compile(r"<(image|video)>")
EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
PATH_KEYS = ("path", "url", "file")  # beside the item's own type


@dataclass(frozen=True)
class ChatSample:
    """`files`: the sample's extension (`image_0.png`) -> where its bytes are."""

    metadata: dict[str, Any]  # task and messages, see `data_pipeline.kinds.messages`
    files: dict[str, Path]


class _Files:
    """The files of one sample as they are named, in `folder` and nowhere else."""

    def __init__(self, folder: Path, line: Mapping[str, Any]):
        self.folder = folder.resolve()
        self.files: dict[str, Path] = {}
        self.waiting = {kind: iter(listed(line, f"{kind}s")) for kind in EXTENSIONS}
        self.numbers = dict.fromkeys(EXTENSIONS, 0)

    def next(self, kind: str) -> dict[str, str]:
        """The item of the line's next `images` or `videos`."""
        path = next(self.waiting[kind], None)
        if path is None:
            raise SampleError("missing_media", f"more places for an {kind} than the line's {kind}s")
        return self.item(kind, path)

    def item(self, kind: str, name: object) -> dict[str, str]:
        if isinstance(name, Mapping):  # {"path": ...}, as Hugging Face's Image feature has it
            name = next((name[key] for key in PATH_KEYS if key in name), None)
        if not isinstance(name, str) or not name:
            raise SampleError("bad_line", f"an {kind} that is no path")
        try:
            path = (self.folder / name.removeprefix("file://")).resolve()
        except (ValueError, RuntimeError, OSError) as error:  # a zero byte, half a surrogate pair, links in a circle
            raise SampleError("bad_line", f"{name!r} is no path: {error}") from None
        if not path.is_relative_to(self.folder):
            raise SampleError("media_outside", f"{name}: not below {self.folder}")
        extension = path.suffix[1:].lower()
        if extension not in EXTENSIONS[kind]:
            raise SampleError("unknown_media", f"{name}: {kind}s are {', '.join(EXTENSIONS[kind])}")
        if not path.is_file():
            raise SampleError("missing_media", name)
        part = f"{kind}_{self.numbers[kind]}.{extension}"
        self.numbers[kind] += 1
        self.files[part] = path
        return {"type": kind, kind: part}

    def check_all_used(self) -> None:
        for kind, paths in self.waiting.items():
            if left := list(paths):
                raise SampleError("unused_media", f"{kind}s without a place: {', '.join(map(str, left))}")


def listed(line: Mapping[str, Any], key: str) -> list[Any]:
    values = line.get(key) or []
    if not isinstance(values, list):
        raise SampleError("bad_line", f"{key} is no list")
    return values


def read_line(text: str, line_format: str, folder: Path, default_task: str) -> ChatSample:
    """Raises `SampleError` for a line that is no sample. Roles and turns are checked when the sample is read."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("no_json", str(error)) from error
    if not isinstance(line, dict):
        raise SampleError("bad_line", "no JSON object")
    return from_pair(line, folder) if line_format == "x2i" else from_messages(line, folder, default_task)


def from_messages(line: Mapping[str, Any], folder: Path, default_task: str) -> ChatSample:
    files = _Files(folder, line)
    messages = []
    for message in listed(line, "messages") or listed(line, "conversations"):
        if not isinstance(message, dict):
            raise SampleError("bad_line", "a message is no JSON object")
        role = message.get("role", message.get("from"))
        content = list(items_of(message.get("content", message.get("value")), files))
        kept = {key: value for key, value in message.items() if key == "supervised"}
        messages.append({"role": ROLES.get(str(role), role), "content": content} | kept)
    files.check_all_used()
    metadata = {"task": line.get("task") or default_task, "messages": messages}
    return ChatSample(metadata, files.files)


def items_of(content: object, files: _Files) -> Iterator[dict[str, Any]]:
    """The items of a content, files named as they are in the sample."""
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(items, list):
        raise SampleError("bad_line", "a content is neither a text nor a list")
    for item in items:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind in EXTENSIONS:
            path = next((item[key] for key in (kind, *PATH_KEYS) if item.get(key)), None)
            yield files.next(kind) if path is None else files.item(kind, path)
        elif kind == "text" and isinstance(item.get("text"), str):
            yield from texts_and_places(item["text"], files)
        else:
            yield item


def texts_and_places(text: str, files: _Files) -> Iterator[dict[str, Any]]:
    """`"before <image> after"`: a text, the next image, a text."""
    for number, piece in enumerate(PLACE.split(text)):
        if number % 2:
            yield files.next(piece)
        elif piece.strip():
            yield {"type": "text", "text": piece.strip()}


def from_pair(line: Mapping[str, Any], folder: Path) -> ChatSample:
    files = _Files(folder, {})
    instruction = line.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise SampleError("bad_line", "no instruction")
    sources = [files.item("image", path) for path in listed(line, "sources")]
    target = files.item("image", line.get("target"))
    asked = [*sources, {"type": "text", "text": instruction}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": [target]}]
    return ChatSample({"task": line.get("task") or "x2i", "messages": messages}, files.files)
