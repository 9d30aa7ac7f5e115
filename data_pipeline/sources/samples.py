"""Raw samples: what one is, which kinds there are, and how a bad one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")
TRANSCRIPT_EXTENSIONS = ("words.json", "vtt", "srt")
KINDS = ("image_text", "video_text", "video_interleaved", "x2i", "text")

_SOURCE_IMAGE = re.compile(r"source_(\d+)\.(\w+)")


class SampleError(Exception):
    """A sample that cannot be used. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Sample:
    """One sample of a shard. `parts` maps a file's extension (`jpg`, `words.json`) to its bytes."""

    key: str
    kind: str  # one of KINDS
    parts: dict[str, bytes]
    metadata: dict[str, Any] = field(default_factory=dict)  # the optional `{key}.json`

    def text(self, extension: str) -> str:
        """The part as text: UTF-8, without a byte order mark, with `\\n` line ends, stripped.

        Raises `SampleError`: `corrupt_text` if it is not UTF-8, `empty_text` if nothing is left.
        """
        try:
            text = self.parts[extension].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError("corrupt_text", f"{extension}: {error}") from error
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if not text:
            raise SampleError("empty_text", extension)
        return text

    def extension_among(self, extensions: Collection[str]) -> str:
        """The extension of the one part that is of these types."""
        found = [extension for extension in self.parts if extension in extensions]
        assert len(found) == 1, f"{self.key}: {found}"
        return found[0]


@dataclass(frozen=True)
class BadSample:
    """What goes to the quarantine list: which sample, the reason it is counted under, details."""

    key: str
    reason: str
    detail: str = ""


def is_image(extension: str, stem: str = "") -> bool:
    """Is it an image's extension: `png`, or with a stem `target.png`?"""
    prefix = f"{stem}." if stem else ""
    return extension.startswith(prefix) and extension[len(prefix) :] in IMAGE_EXTENSIONS


def source_images(extensions: Collection[str]) -> list[str]:
    """The extensions of `source_0.png`, `source_1.png`..., by their number."""
    matches = [_SOURCE_IMAGE.fullmatch(extension) for extension in extensions]
    found = [match for match in matches if match and match[2] in IMAGE_EXTENSIONS]
    return [match.string for match in sorted(found, key=lambda match: int(match[1]))]


def detect_kind(extensions: Collection[str]) -> str | None:
    """The kind that a set of extensions makes, None when it makes none. Metadata does not count."""
    names = set(extensions) - {"json"}
    images = {name for name in names if is_image(name)}
    videos = names & set(VIDEO_EXTENSIONS)
    transcripts = names & set(TRANSCRIPT_EXTENSIONS)
    if names == {"txt"}:
        return "text"
    if len(images) == 1 and names == images | {"txt"}:
        return "image_text"
    if len(videos) == 1 and names == videos | {"txt"}:
        return "video_text"
    if len(videos) == 1 and len(transcripts) == 1 and names == videos | transcripts:
        return "video_interleaved"
    sources = set(source_images(names))
    targets = {name for name in names if is_image(name, "target")}
    if sources and len(targets) == 1 and names == sources | targets | {"instruction.txt"}:
        return "x2i"
    return None


def make_sample(key: str, parts: dict[str, bytes]) -> Sample:
    """A sample from the files of one key. Raises `SampleError` for what shows without decoding."""
    kind = detect_kind(parts)
    if kind is None:
        raise SampleError("unknown_kind", "parts: " + ", ".join(sorted(parts)))
    for extension, data in parts.items():
        if not data:
            raise SampleError(_reason_of_empty(extension), extension)
    return Sample(key, kind, parts, _read_metadata(parts))


def _reason_of_empty(extension: str) -> str:
    if extension in VIDEO_EXTENSIONS:
        return "empty_video"
    if extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS:
        return "empty_image"
    return "empty_text"


def _read_metadata(parts: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        metadata = json.loads(parts["json"])
    except ValueError as error:
        raise SampleError("bad_metadata", str(error)) from error
    if not isinstance(metadata, dict):
        raise SampleError("bad_metadata", "not a JSON object")
    return metadata
