"""Which document a sample of each kind becomes, in pretraining and in chat format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.documents.builder import Document, DocumentBuilder, Part, Picture, Text, document_id, fraction
from data_pipeline.sources.samples import SampleError
from model.errors import Problems

FORMATS = ("pretrain", "chat")


@dataclass
class LayoutConfig:
    image_format: str = "emu35"  # emu35 | emu3: EOL after the last row too, and EOF
    image_first_probability: float = 0.0  # share of pretraining pairs with the caption last
    condition_dropout_probability: float = 0.0  # share of chats without task and question
    context_frames: int = 1  # frames in the prompt of a chat made from a video
    splittable_text: bool = True  # may the packer cut plain text to fill a hole?

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.image_format in ("emu35", "emu3"),
            f"{key}.image_format",
            f"unknown image format {self.image_format!r}",
            f"{key}.image_format=emu35",
        )
        for name in ("image_first_probability", "condition_dropout_probability"):
            problems.check(0.0 <= getattr(self, name) <= 1.0, f"{key}.{name}", "must be in [0, 1]")
        problems.check(self.context_frames > 0, f"{key}.context_frames", "must be positive")


class DocumentLayout:
    """Turns the parts of a sample into its document. Choices depend on (seed, key) only."""

    def __init__(self, builder: DocumentBuilder, document_format: str, config: LayoutConfig, source: str, seed: int):
        assert document_format in FORMATS, document_format
        self.builder = builder
        self.format = document_format
        self.config = config
        self.source = source
        self.seed = seed

    def build(self, key: str, kind: str, parts: Sequence[Part], metadata: dict[str, Any]) -> Document:
        """`parts` in the order that `PreparedSample` documents. Raises `SampleError`."""
        identity = document_id(self.source, key)
        if self.format == "chat":
            return self._chat(identity, key, kind, parts)
        if kind == "text":
            text = parts[0]
            assert isinstance(text, Text)
            splittable = bool(metadata.get("split_ok", self.config.splittable_text))
            return self.builder.text(identity, text.text, splittable=splittable)
        if kind == "image_text":
            chance = fraction(self.seed, "image_first", key)
            if chance < self.config.image_first_probability:
                parts = parts[::-1]
        return self.builder.interleaved(identity, parts)

    def _chat(self, identity: int, key: str, kind: str, parts: Sequence[Part]) -> Document:
        texts = [part.text for part in parts if isinstance(part, Text)]
        pictures = [part for part in parts if isinstance(part, Picture)]
        chance = fraction(self.seed, "condition_dropout", key)
        unconditional = chance < self.config.condition_dropout_probability
        response: Sequence[Part]
        if kind == "image_text":
            task, question, images, response = "t2i", texts[0], [], pictures
        elif kind == "x2i":
            task, question = "x2i", texts[0]
            images, response = pictures[:-1], pictures[-1:]
        elif kind == "video_text":
            task, question, images, response = "story", texts[0], [], pictures
        elif kind == "video_interleaved":
            task = "explore"
            question, images, response = split_video(parts, self.config.context_frames)
        else:
            raise SampleError("no_chat_format", f"samples of kind {kind} have no question")
        return self.builder.chat(identity, task, question, images, response, unconditional=unconditional)


def split_video(parts: Sequence[Part], num_context_frames: int) -> tuple[str, list[Picture], Sequence[Part]]:
    """An interleaved video as a chat: (question, context frames, response).

    The question is what is said before the last context frame; the response is what follows it,
    with at least one frame. Raises `SampleError("too_few_frames")` where there is none.
    """
    question, images, response = split_context(parts, num_context_frames)
    if not any(isinstance(part, Picture) for part in response):
        raise SampleError("too_few_frames", f"no frame after {num_context_frames} of context")
    return question, images, response


def split_context(parts: Sequence[Part], num_context_frames: int) -> tuple[str, list[Picture], Sequence[Part]]:
    """(what is said before the last context frame, context frames, all that follows it)."""
    texts: list[str] = []
    images: list[Picture] = []
    for position, part in enumerate(parts):
        if len(images) == num_context_frames:
            return " ".join(texts), images, parts[position:]
        if isinstance(part, Text):
            texts.append(part.text)
        else:
            images.append(part)
    return " ".join(texts), images, []
