"""The messages of a chat sample: read from its JSON, checked, and what of them has loss.

    {"task": "x2i",
     "messages": [
       {"role": "system", "content": "..."},
       {"role": "user", "content": [{"type": "image", "image": "image_0.png"}, {"type": "text", "text": "..."}]},
       {"role": "assistant", "supervised": true,
        "content": [{"type": "global_thought", "text": "..."}, {"type": "image_thought", "text": "..."},
                    {"type": "image", "image": "image_1.png"}, {"type": "video", "video": "video_0.mp4"}]}]}

A content that is a text stands for one item of it. `task` left out: a general chat. `system` is optional and comes first;
then user and assistant by turns, the assistant last. `supervised` is true where it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.documents.prompts import GENERAL, TASKS
from data_pipeline.sources.samples import SampleError

MEDIA = ("image", "video")
THOUGHTS = {"global_thought": False, "image_thought": True}  # type of an item -> is it about one picture?


@dataclass(frozen=True)
class Item:
    """A piece of a message."""

    type: str  # text | image | video | global_thought | image_thought
    value: str  # the words, or the extension of the sample's file


@dataclass(frozen=True)
class Message:
    role: str  # user | assistant
    items: Sequence[Item]
    supervised: bool = True


@dataclass(frozen=True)
class Messages:
    task: str
    system: str
    turns: Sequence[tuple[Message, Message]]  # question and answer

    def items(self) -> Iterator[Item]:
        """All of them in order."""
        for turn in self.turns:
            for message in turn:
                yield from message.items


def read_messages(metadata: dict[str, Any]) -> Messages:
    """Raises `SampleError`: `no_messages`, `bad_message`, `unknown_role`, `unknown_task`, `turns_out_of_order`,
    `no_supervised_turn`, `corrupt_text`."""
    task = metadata.get("task") or GENERAL
    if task not in (*TASKS, GENERAL):
        raise SampleError("unknown_task", f"{task!r}; tasks are {', '.join((*TASKS, GENERAL))}")
    listed = metadata.get("messages")
    if not isinstance(listed, list) or not listed:
        raise SampleError("no_messages", "KEY.json has no list `messages`")
    system = ""
    if role_of(listed[0], 0) == "system":
        system, listed = system_words(listed[0]), listed[1:]
    messages = [read_message(message, number) for number, message in enumerate(listed)]
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError("turns_out_of_order", " ".join(roles) or "no user")
    turns = list(zip(messages[::2], messages[1::2], strict=True))
    if not any(answer.supervised for _, answer in turns):
        raise SampleError("no_supervised_turn", f"{len(turns)} answers, all without loss")
    return Messages(task, system, turns)


def role_of(message: object, number: int) -> str:
    if not isinstance(message, dict):
        raise SampleError("bad_message", f"message {number} is no JSON object")
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise SampleError("unknown_role", f"message {number}: {role!r}")
    return str(role)


def system_words(message: dict[str, Any]) -> str:
    items = read_items(message.get("content"), 0)
    if any(item.type != "text" for item in items):
        raise SampleError("bad_message", "the system's message holds more than text")
    return " ".join(item.value for item in items)


def read_message(message: object, number: int) -> Message:
    role = role_of(message, number)
    assert isinstance(message, dict)
    items = read_items(message.get("content"), number)
    supervised = message.get("supervised", True)
    if not isinstance(supervised, bool):
        raise SampleError("bad_message", f"message {number}: supervised is {supervised!r}, not true or false")
    if role != "assistant" and any(item.type in THOUGHTS for item in items):
        raise SampleError("bad_message", f"message {number}: a thought that is not the assistant's")
    return Message(role, items, supervised)


def read_items(content: object, number: int) -> list[Item]:
    listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(listed, list) or not listed:
        raise SampleError("bad_message", f"message {number} has no content")
    return [read_item(item, number) for item in listed]


def read_item(item: object, number: int) -> Item:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in ("text", *MEDIA, *THOUGHTS):
        raise SampleError("bad_message", f"message {number}: an item of type {kind!r}")
    value = item.get(kind if kind in MEDIA else "text")
    if not isinstance(value, str) or not value.strip():
        raise SampleError("bad_message", f"message {number}: {kind} without {'a file' if kind in MEDIA else 'words'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SampleError("corrupt_text", f"message {number}: {error}") from None
    return Item(str(kind), value.lower() if kind in MEDIA else value.strip())
