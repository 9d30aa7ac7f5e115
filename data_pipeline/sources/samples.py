"""Raw samples: what one is, and how a bad one is named."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")
MAX_DETAIL_CHARACTERS = 500  # of what is said of a bad sample: names in an archive have any length
TRANSCRIPT_EXTENSIONS = ("words.json", "vtt", "srt", "ass", "ssa", "ttml")

_NUMBERED_IMAGE = re.compile(r"([a-z]+)_(\d{1,6})\.(\w+)")


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
    kind: str  # name of its `data_pipeline.kinds.base.SampleKind`
    parts: dict[str, bytes]
    metadata: dict[str, Any] = field(default_factory=dict)  # the optional `{key}.json`

    def text(self, extension: str) -> str:
        """The part as text: UTF-8, without a byte order mark, with `\\n` line ends, stripped.

        Raises `SampleError`: `corrupt_text` if it is not UTF-8, `empty_text` if nothing is left.
        """
        try:
            # Not "utf-8-sig", which is Python and reads a text twice.
            text = self.parts[extension].removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise SampleError("corrupt_text", f"{extension}: {error}") from error
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = text.strip()
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", self.detail[:MAX_DETAIL_CHARACTERS])


def unusable(key: str, error: Exception) -> BadSample:
    """One bad sample never ends a job: whatever it raises is its reason.

    What is the user's (`UserError`) or the system's (files, memory of the whole process) does end it: it is raised again.
    """
    if isinstance(error, SampleError):
        return BadSample(key, error.reason, error.detail)
    is_of_a_file = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    if is_of_a_file or isinstance(error, (UserError, MemoryError)):
        raise error
    return BadSample(key, f"unexpected_{type(error).__name__}", str(error)[:MAX_DETAIL_CHARACTERS])


def is_image(extension: str, stem: str = "") -> bool:
    """Is it an image's extension: `png`, or with a stem `target.png`?"""
    prefix = f"{stem}." if stem else ""
    return extension.startswith(prefix) and extension[len(prefix) :] in IMAGE_EXTENSIONS


def source_images(extensions: Collection[str]) -> list[str]:
    """The extensions of `source_0.png`, `source_1.png`..., by their number."""
    return numbered_images(extensions, "source")


def numbered_images(extensions: Collection[str], stem: str) -> list[str]:
    """The extensions of `STEM_0.png`, `STEM_1.png`..., by their number."""
    matches = [_NUMBERED_IMAGE.fullmatch(extension) for extension in extensions]
    found = [match for match in matches if match and match[1] == stem and match[3] in IMAGE_EXTENSIONS]
    return [match.string for match in sorted(found, key=lambda match: int(match[2]))]
