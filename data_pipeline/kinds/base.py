"""What a kind of sample says of itself, from the files in a shard to the document.

A new kind is a class derived from `SampleKind`, in any package: configurations name it by its dotted path
(`kinds=[my_package.my_module.MyKind]`), and nothing here has to change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from data_pipeline.documents.builder import Document, Text
from data_pipeline.documents.templates import Chat, Conversation, DocumentLayout, EncodedSample
from data_pipeline.sources.image import ImageConfig, decode_image, smart_resize
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample, SampleError
from data_pipeline.video.keyframes import VideoConfig, read_key_frames
from data_pipeline.video.sound import read_sound
from data_pipeline.video.speech import SpeechConfig, phrases, recognizer_of
from data_pipeline.video.transcript import Word

TEXT_EXTENSIONS = ("txt", "instruction.txt")
MAX_SAMPLE_PIXELS = 192 << 20  # of a video's key frames, resized: an hour at one frame of 512 x 512 in 5 seconds


@dataclass(frozen=True)
class Pixels:
    """A picture before it has codes."""

    pixels: np.ndarray  # uint8 [H, W, 3], H and W multiples of the vision tokenizer's factor
    original_size: tuple[int, int]  # (height, width) in the file
    time_ms: int = 0


@dataclass(frozen=True)
class PreparedSample:
    """A sample decoded: texts and pictures in the order in which its kind's documents have them."""

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


@dataclass(frozen=True)
class MediaDecoder:
    """Files to pictures of whole visual tokens. `factor` is the pixels of a visual token's side."""

    image: ImageConfig
    video: VideoConfig
    factor: int
    asr: SpeechConfig = field(default_factory=SpeechConfig)

    def picture(self, data: bytes) -> Pixels:
        """Raises `SampleError`."""
        return self._resized(decode_image(data))

    def frames(self, data: bytes) -> list[Pixels]:
        """The key frames of a video. Raises `SampleError`."""
        return self.film(data)[0]

    def film(self, data: bytes) -> tuple[list[Pixels], float]:
        """The key frames of a video and the seconds until its end. Raises `SampleError`."""
        frames, seconds = read_key_frames(data, self.video)
        made: list[Pixels] = []
        num_pixels = 0
        for frame in frames:
            made.append(self._resized(frame.pixels, round(frame.time_seconds * 1000)))
            num_pixels += made[-1].pixels.size // 3
            if num_pixels > MAX_SAMPLE_PIXELS:
                raise SampleError("too_many_frames", f"{len(made)} frames of {num_pixels:,} pixels, and more")
        return made, seconds

    def sound(self, data: bytes) -> np.ndarray:
        """The sound of a film, int16 [n], `SAMPLE_RATE` a second. Raises `SampleError`."""
        return np.concatenate(list(read_sound(data)))

    def words(self, data: bytes) -> list[Word]:
        """What is said in a film, in phrases with their times. Raises `SampleError`: `no_speech`, and what `read_sound` raises."""
        said = phrases(recognizer_of(self.asr).words(self.sound(data)), self.asr.pause_seconds)
        if not said:
            raise SampleError("no_speech", "the recognizer heard no word")
        return said

    def _resized(self, pixels: np.ndarray, time_ms: int = 0) -> Pixels:
        original_size = (pixels.shape[0], pixels.shape[1])
        return Pixels(smart_resize(pixels, self.image, self.factor), original_size, time_ms)


class SampleKind(ABC):
    """One kind of sample. It has no state: one instance serves all samples.

    Every method may raise `SampleError`, which sends the sample to quarantine under the error's reason.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the same sample would give another document; part of fingerprints

    @abstractmethod
    def accepts(self, extensions: AbstractSet[str]) -> bool:
        """Do files with these extensions make such a sample? `KEY.json`, the metadata, is not among them."""

    def check(self, sample: Sample) -> None:  # noqa: B027 (most kinds have nothing to add)
        """Refuse by raising `SampleError` what shows without decoding."""

    @abstractmethod
    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        """The sample's texts and decoded pictures in the document's order."""

    def document(self, sample: EncodedSample, layout: DocumentLayout) -> Document:
        """The document of pretraining: BOS, the parts in order, EOS."""
        return layout.builder.interleaved(sample.identity, sample.parts)

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat | Conversation:
        """The sample as a question and its answer."""
        raise SampleError("no_chat_format", f"samples of kind {self.name} have no question")

    def texts(self, sample: Sample) -> Iterator[str]:
        """What the text tokenizer is trained on."""
        for extension in sample.parts:
            if extension in TEXT_EXTENSIONS:
                yield sample.text(extension)

    def images(self, sample: Sample) -> dict[str, bytes]:
        """What the vision tokenizer is trained on: picture and video files, by their extensions."""
        wanted = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
        return {name: data for name, data in sample.parts.items() if name.rsplit(".", 1)[-1] in wanted}
