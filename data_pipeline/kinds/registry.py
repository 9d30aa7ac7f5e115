"""The kinds that come with the project, and the set of kinds that a dataset may hold."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.kinds.base import SampleKind
from data_pipeline.kinds.named_parts import PartsConfig, counted, named_caption
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, BadSample, Sample, SampleError
from data_pipeline.sources.shards import read_groups
from model.errors import UserError
from model.registry import find_class

KINDS = {
    "text": "data_pipeline.kinds.text.PlainText",
    "image_text": "data_pipeline.kinds.pictures.ImageText",
    "video_text": "data_pipeline.kinds.videos.VideoText",
    "video_interleaved": "data_pipeline.kinds.videos.InterleavedVideo",
    "x2i": "data_pipeline.kinds.pictures.AnyToImage",
    "interleaved": "data_pipeline.kinds.interleaved.Interleaved",
    "chat": "data_pipeline.kinds.chat.ChatMessages",
}
PARTS_TRIED = ("txt", "jpg", "instruction.txt", "target.jpg", "vtt", "mp4")  # in a message about what a sample lacks
MAX_PARTS_TRIED = 8
_MOST_SETS = 1_000  # of extensions whose kind is remembered
SPOKEN = "data_pipeline.kinds.videos.SpokenVideo"  # where a recognizer of speech is configured


class KindSet:
    """The kinds that a dataset may hold, tried in their order. No name: those that come with the project.

    names: of `KINDS`, or dotted paths of classes derived from `SampleKind`. Raises `UserError` for an unknown one. parts:
    which files count, and where captions stand.
    """

    def __init__(self, names: Sequence[str] = (), parts: PartsConfig | None = None):
        self.parts = parts or PartsConfig()
        classes = [_find_kind(name) for name in names or KINDS]
        self.by_name = {kind.name: kind() for kind in classes}
        self._detected: dict[frozenset[str], SampleKind | None] = {}  # of sets seen before
        if len(self.by_name) < len(classes):
            raise UserError("two kinds of sample have the same name", got=", ".join(kind.name for kind in classes))

    def __getitem__(self, name: str) -> SampleKind:
        return self.by_name[name]

    def detect(self, extensions: Collection[str]) -> SampleKind | None:
        """The kind that a set of extensions makes, None when it makes none. Metadata does not count."""
        names = frozenset(extensions) - {"json"}
        if names not in self._detected:
            if len(self._detected) >= _MOST_SETS:  # strangers' files may have any extensions
                self._detected.clear()
            self._detected[names] = next((kind for kind in self.by_name.values() if kind.accepts(names)), None)
        return self._detected[names]

    def nearest(self, extensions: Collection[str]) -> list[str]:
        """What kinds that are one file away from these would need; files with another name where none lacks just one."""
        names = frozenset(extensions) - {"json"}
        if len(names) > MAX_PARTS_TRIED:
            return []
        lacking: dict[str, str] = {}
        renamed: dict[str, str] = {}
        for kind in self.by_name.values():
            for wanted in (part for part in PARTS_TRIED if part not in names):
                if kind.accepts(names | {wanted}):
                    lacking.setdefault(kind.name, f"{kind.name} lacks {wanted}")
                for other in sorted(names):
                    if kind.accepts(names - {other} | {wanted}):
                        renamed.setdefault(kind.name, f"{kind.name} takes {wanted}, not {other}")
        return list((lacking or renamed).values())

    def sample(self, key: str, parts: dict[str, bytes]) -> Sample:
        """A sample from the files of one key. Raises `SampleError` for what shows without decoding."""
        parts = counted(parts, self.parts)
        metadata = _read_metadata(parts)
        if self.parts.caption:
            parts["txt"] = named_caption(metadata, self.parts.caption).encode("utf-8", "surrogatepass")
        kind = self.detect(parts)
        if kind is None:
            raise SampleError("unknown_kind", "; ".join(["parts: " + ", ".join(sorted(parts)), *self.nearest(parts)]))
        for extension, data in parts.items():
            if not data:
                raise SampleError(_reason_of_empty(extension), extension)
        sample = Sample(key, kind.name, parts, metadata)
        kind.check(sample)
        return sample


def _find_kind(name: str) -> type[SampleKind]:
    found = find_class("kind of sample", name, KINDS, "kinds")
    if not issubclass(found, SampleKind):
        raise UserError(
            "not a kind of sample", where=name, expected="a class derived from data_pipeline.kinds.base.SampleKind"
        )
    return found


def read_shard(path: str | Path, kinds: KindSet | None = None) -> Iterator[Sample | BadSample]:
    """The samples of one tar shard, in its order; unusable ones as `BadSample`. See `read_groups` for damage."""
    kinds = kinds or KindSet()
    for group in read_groups(path):
        if isinstance(group, BadSample):
            yield group
            continue
        yield _checked(kinds, *group)


def _checked(kinds: KindSet, key: str, parts: dict[str, bytes]) -> Sample | BadSample:
    """Whatever a kind of somebody's own raises is the sample's reason, as in `data_pipeline.tokenize`."""
    try:
        return kinds.sample(key, parts)
    except SampleError as error:
        return BadSample(key, error.reason, error.detail)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        return BadSample(key, f"unexpected_{type(error).__name__}", str(error)[:500])


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
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_metadata", str(error)) from error
    if not isinstance(metadata, dict):
        raise SampleError("bad_metadata", "not a JSON object")
    return metadata
