"""Answers in the shape of OpenAI's interface: JSON objects and server-sent events."""

from __future__ import annotations

import base64
import json
import time
import uuid
from typing import Any

import numpy as np

from launch.generation.files import png_bytes, trace_of
from launch.generation.scheduler import Finished, Job, Preview, Told
from model.errors import UserError
from training.inference.answering import Answering
from training.inference.observing import TextPiece


def error_body(message: str, kind: str, field: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def failure_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that failed: the asker's mistake is told, a defect is not shown."""
    if isinstance(error, UserError):
        return 400, error_body(str(error), "invalid_request_error")
    return 500, error_body("the server failed; its log says how", "server_error")


def base64_png(pixels: np.ndarray) -> str:
    return base64.b64encode(png_bytes(pixels)).decode()


def event(value: dict[str, Any] | str, name: str = "") -> bytes:
    """One server-sent event."""
    data = value if isinstance(value, str) else json.dumps(value)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def trace(job: Job, answering: Answering) -> dict[str, Any]:
    """What to know to draw the same answer again: `seed` and `first_index=index` of `nextstate generate`."""
    return trace_of(answering, job.seed) | {"text": answering.text}


class PicturesReply:
    """`/v1/images/generations` and `/v1/images/edits`."""

    def __init__(self, jobs: list[Job], path: str) -> None:
        self.jobs, self.created = jobs, int(time.time())
        self.name = "image_edit" if path.endswith("edits") else "image_generation"
        self.pictures: dict[int, list[Finished]] = {index: [] for index in range(len(jobs))}
        self.traces: dict[int, dict[str, Any]] = {}

    def add(self, index: int, told: Told) -> list[bytes]:
        """The events of a stream."""
        if isinstance(told, Preview):
            kind = f"{self.name}.partial_image"
            seen = {"partial_image_index": told.number} | told.fields()
            return [event({"type": kind, "b64_json": base64_png(told.pixels), "index": index} | seen, kind)]
        if isinstance(told, Finished):
            self.pictures[index].append(told)
        if isinstance(told, Answering):
            self.traces[index] = trace(self.jobs[index], told)
            kind = f"{self.name}.completed"
            head = {"type": kind, "created_at": self.created, "index": index}
            return [event(head | self._entry(index), kind)]
        return []

    def _entry(self, index: int) -> dict[str, Any]:
        found = self.pictures[index]
        return {"b64_json": base64_png(found[0].pixels) if found else None, "nextstate": self.traces[index]}

    def body(self) -> dict[str, Any]:
        return {"created": self.created, "data": [self._entry(index) for index in range(len(self.jobs))]}

    def end(self) -> list[bytes]:
        return []


class ChatReply:
    """`/v1/chat/completions`: text and pictures in order; in chunks when it is streamed."""

    def __init__(self, job: Job, model_name: str) -> None:
        self.job, self.model_name = job, model_name
        self.identity, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.parts: list[dict[str, Any]] = []
        self.answering: Answering | None = None

    def add(self, index: int, told: Told) -> list[bytes]:
        """The chunks of a stream. `images` as other servers have it, with the codes to go on from."""
        if isinstance(told, TextPiece):
            self._add_text(told.text)
            return [self._chunk({"content": told.text})]
        if isinstance(told, Preview):
            partial = {"url": f"data:image/png;base64,{base64_png(told.pixels)}", "index": told.number}
            return [self._chunk({"partial_image": partial | told.fields()})]
        if isinstance(told, Finished):
            self.parts.append(picture_part(told))
            return [self._chunk({"images": [picture_part(told)]})]
        if isinstance(told, Answering):
            self.answering = told
            return [self._chunk({}, "stop" if told.finished else "length")]
        return []

    def _add_text(self, text: str) -> None:
        if self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"type": "text", "text": text})

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self.answering is not None:
            body["nextstate"] = trace(self.job, self.answering)
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model_name}

    def body(self) -> dict[str, Any]:
        one = self.answering
        assert one is not None, "told last"
        images = [part for part in self.parts if part["type"] == "image_url"]
        message = {"role": "assistant", "content": one.text, "images": images, "parts": self.parts}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if one.finished else "length"}
        usage = {"prompt_tokens": one.num_prompt_tokens, "completion_tokens": len(one.ids)}
        usage["total_tokens"] = sum(usage.values())
        return self._head("chat.completion") | {"choices": [choice], "usage": usage, "nextstate": trace(self.job, one)}

    def end(self) -> list[bytes]:
        return [event("[DONE]")]


Reply = PicturesReply | ChatReply


def picture_part(told: Finished) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64_png(told.pixels)}"
    return {"type": "image_url", "image_url": {"url": url}, "codes": told.codes.tolist()}
