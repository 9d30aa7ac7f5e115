"""Documents of samples: the formats, the choices they leave, and what a kind of sample is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_pipeline.documents.builder import Document, DocumentBuilder, Part, Picture, Text, Turn, document_id, fraction
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


@dataclass(frozen=True)
class EncodedSample:
    """A sample whose pictures have codes; `parts` in the order in which its kind prepared them."""

    key: str
    identity: int  # the document's id, see `document_id`
    parts: Sequence[Part]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, Text)]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


@dataclass(frozen=True)
class Chat:
    """A sample as a question about pictures, and its answer."""

    task: str  # one of `documents.prompts.TASKS`
    question: str
    images: Sequence[Picture]
    response: Sequence[Part]

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.task, [Turn([Text(self.question), *self.images], self.response)])


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turns."""

    task: str  # one of `documents.prompts.TASK_NAMES`
    turns: Sequence[Turn]
    system: str = ""  # in place of the template's words before the first question

    @property
    def conversation(self) -> Conversation:
        return self


class DocumentKind(Protocol):
    """What a document needs to know of its sample's kind (`data_pipeline.kinds.base.SampleKind`)."""

    def document(self, sample: EncodedSample, layout: DocumentLayout) -> Document: ...
    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat | Conversation: ...


class DocumentLayout:
    """Turns the parts of a sample into its document. Choices depend on (seed, key) only."""

    def __init__(self, builder: DocumentBuilder, document_format: str, config: LayoutConfig, source: str, seed: int):
        assert document_format in FORMATS, document_format
        self.builder = builder
        self.format = document_format
        self.config = config
        self.source = source
        self.seed = seed

    def chance(self, purpose: str, key: str) -> float:
        """A number in [0, 1) that a rerun repeats; choices of one purpose do not depend on those of another."""
        return fraction(self.seed, purpose, key)

    def build(
        self, kind: DocumentKind, key: str, parts: Sequence[Part], metadata: dict[str, Any], shard: str = ""
    ) -> Document:
        """`parts` in the order that the kind prepared them in; `shard` tells equal keys apart. Raises `SampleError`."""
        sample = EncodedSample(key, document_id(self.source, key, shard), parts, metadata)
        if self.format == "pretrain":
            return kind.document(sample, self)
        chat = kind.chat(sample, self).conversation
        unconditional = self.chance("condition_dropout", key) < self.config.condition_dropout_probability
        return self.builder.conversation(
            sample.identity, chat.task, chat.turns, system=chat.system, unconditional=unconditional
        )


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
        elif isinstance(part, Picture):
            images.append(part)
    return " ".join(texts), images, []
