"""A raw sample decoded: its texts, and its pictures at the size the vision tokenizer gets them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.documents.builder import Text
from data_pipeline.sources.image import ImageConfig, decode_image, smart_resize
from data_pipeline.sources.samples import (
    IMAGE_EXTENSIONS,
    TRANSCRIPT_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Sample,
    is_image,
    source_images,
)
from data_pipeline.storage.segments import Kind
from data_pipeline.video.keyframes import VideoConfig, extract_key_frames
from data_pipeline.video.transcript import interleave, parse_transcript


@dataclass(frozen=True)
class Pixels:
    """A picture before it has codes."""

    pixels: np.ndarray  # uint8 [H, W, 3], H and W multiples of the vision tokenizer's factor
    original_size: tuple[int, int]  # (height, width) in the file
    time_ms: int = 0


@dataclass(frozen=True)
class PreparedSample:
    """Texts and pictures in the order a document has them.

    image_text: caption, picture. video_text: caption, frames. video_interleaved: speech and frames
    by time. x2i: source pictures, instruction, target picture. text: the text.
    """

    key: str
    kind: str
    parts: list[Text | Pixels]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Pixels]:
        return [part for part in self.parts if isinstance(part, Pixels)]

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, Text)]


class SamplePreparer:
    """Decodes samples of every kind. `factor` is the pixels of a visual token's side."""

    def __init__(self, image: ImageConfig, video: VideoConfig, factor: int):
        self.image = image
        self.video = video
        self.factor = factor

    def prepare(self, sample: Sample) -> PreparedSample:
        """Raises `SampleError` naming the reason when the sample cannot be used."""
        parts: list[Text | Pixels]
        if sample.kind == "text":
            parts = [Text(sample.text("txt"))]
        elif sample.kind == "image_text":
            picture = sample.parts[sample.extension_among(IMAGE_EXTENSIONS)]
            parts = [Text(sample.text("txt")), self._picture(picture)]
        elif sample.kind == "x2i":
            parts = self._edit(sample)
        elif sample.kind == "video_text":
            parts = [Text(sample.text("txt")), *self._frames(sample)]
        else:
            assert sample.kind == "video_interleaved", sample.kind
            parts = self._interleaved(sample)
        return PreparedSample(sample.key, sample.kind, parts, sample.metadata)

    def _edit(self, sample: Sample) -> list[Text | Pixels]:
        target = next(name for name in sample.parts if is_image(name, "target"))
        sources = [self._picture(sample.parts[name]) for name in source_images(sample.parts)]
        instruction = Text(sample.text("instruction.txt"))
        return [*sources, instruction, self._picture(sample.parts[target])]

    def _interleaved(self, sample: Sample) -> list[Text | Pixels]:
        extension = sample.extension_among(TRANSCRIPT_EXTENSIONS)
        words = parse_transcript(extension, sample.text(extension))
        frames = self._frames(sample)
        parts: list[Text | Pixels] = []
        for item in interleave(words, [frame.time_ms / 1000 for frame in frames]):
            if isinstance(item, int):
                parts.append(frames[item])
            else:
                time_ms = max(0, round(item.time_seconds * 1000))
                parts.append(Text(item.text, Kind.TRANSCRIPT, time_ms))
        return parts

    def _frames(self, sample: Sample) -> list[Pixels]:
        data = sample.parts[sample.extension_among(VIDEO_EXTENSIONS)]
        return [
            self._resized(frame.pixels, round(frame.time_seconds * 1000))
            for frame in extract_key_frames(data, self.video)
        ]

    def _picture(self, data: bytes) -> Pixels:
        return self._resized(decode_image(data))

    def _resized(self, pixels: np.ndarray, time_ms: int = 0) -> Pixels:
        original_size = (pixels.shape[0], pixels.shape[1])
        return Pixels(smart_resize(pixels, self.image, self.factor), original_size, time_ms)
