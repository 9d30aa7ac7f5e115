"""Chats of the user's own: messages with pictures, videos' key frames and thoughts (`KEY.json`, see `kinds.messages`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from data_pipeline.documents.builder import Document, Part, Text, Thought, Turn
from data_pipeline.documents.templates import Conversation, DocumentLayout, EncodedSample
from data_pipeline.kinds.base import MediaDecoder, Pixels, SampleKind
from data_pipeline.kinds.messages import MEDIA, THOUGHTS, Item, Message, read_messages
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample, SampleError

_FILE = re.compile(r"(image|video)_\d+\.(\w+)")
_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}


def is_chat_file(extension: str) -> bool:
    """`image_0.png`, `video_3.mp4`."""
    match = _FILE.fullmatch(extension)
    return match is not None and match[2] in _EXTENSIONS[match[1]]


class ChatMessages(SampleKind):
    """`KEY.json` with messages, and the files that they name: `KEY.image_0.png`, ..., `KEY.video_0.mp4`, ..."""

    name = "chat"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        return all(map(is_chat_file, extensions))

    def check(self, sample: Sample) -> None:
        """`missing_media`, `unused_media`, `repeated_media`, and what `read_messages` refuses."""
        files = [item.value for item in read_messages(sample.metadata).items() if item.type in MEDIA]
        there = sample.parts.keys() - {"json"}
        if missing := sorted(set(files) - there):
            raise SampleError("missing_media", ", ".join(missing))
        if unused := sorted(there - set(files)):
            raise SampleError("unused_media", ", ".join(unused))
        if repeated := [name for name, count in Counter(files).items() if count > 1]:
            raise SampleError("repeated_media", ", ".join(repeated))

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        """Each item of the messages: a text (empty where it is a file), then the file's pictures."""
        parts: list[Text | Pixels] = []
        for item in read_messages(sample.metadata).items():
            parts.append(Text("" if item.type in MEDIA else item.value))
            if item.type == "image":
                parts.append(decoder.picture(sample.parts[item.value]))
            elif item.type == "video":
                parts += decoder.frames(sample.parts[item.value])
        return parts

    def document(self, sample: EncodedSample, layout: DocumentLayout) -> Document:
        raise SampleError("chat_only", "a chat has no document of pretraining: format=chat")

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Conversation:
        messages = read_messages(sample.metadata)
        pieces = list(pieces_of(sample.parts))
        taken = iter(pieces)

        def parts_of(message: Message) -> list[Part]:
            return [part for item in message.items for part in item_parts(item, next(taken))]

        turns = [Turn(parts_of(asked), parts_of(answer), answer.supervised) for asked, answer in messages.turns]
        return Conversation(messages.task, turns, messages.system)

    def texts(self, sample: Sample) -> Iterator[str]:
        for item in read_messages(sample.metadata).items():
            if item.type not in MEDIA:
                yield item.value


def pieces_of(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts of each item again: every item begins with a text."""
    piece: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and piece:
            yield piece
            piece = []
        piece.append(part)
    yield piece


def item_parts(item: Item, piece: Sequence[Part]) -> Sequence[Part]:
    if item.type in THOUGHTS:
        return [Thought(item.value, of_image=THOUGHTS[item.type])]
    return piece[1:] if item.type in MEDIA else piece[:1]
