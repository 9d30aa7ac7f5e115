"""A vision-language model as judge, behind any server that speaks the chat completions API (vLLM, SGLang)."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from training.rewards.base import Answer
from training.rewards.calls import CallError, CallPolicy, json_reply, new_client, tried
from training.rewards.wire import png_bytes

if TYPE_CHECKING:
    import httpx

QUESTION = """You judge the answer of an image generator. The request was:
{prompt}
The first {num_prompt_images} pictures belong to the request, the last {num_images} are the answer. Its text was:
{text}
How well does the answer do what the request asks, from 1 (not at all) to 10 (perfectly)?
Reply with JSON only: {{"score": NUMBER}}"""


@dataclass
class VlmJudge:
    """A model's mark from 1 to 10 for each answer; an answer without a picture has 1.

    The mark is read from the JSON object that the model is asked for; a reply without one is asked for again, then
    missing.
    """

    url: str  # "http://host:8000/v1"
    model: str  # as the server names it
    token_file: str | None = None
    question: str = QUESTION
    max_tokens: int = 64  # of the reply
    limits: dict[str, Any] = field(default_factory=dict)  # of `CallPolicy`
    name: ClassVar[str] = "vlm_judge"

    def __post_init__(self) -> None:
        self.policy = CallPolicy(**self.limits)
        self.faults: Counter[str] = Counter()
        self.version = f"1+{self.model}"
        self._token = Path(self.token_file).read_text(encoding="utf-8").strip() if self.token_file else ""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return asyncio.run(self._score(answers))

    async def _score(self, answers: Sequence[Answer]) -> list[float | None]:
        places = asyncio.Semaphore(self.policy.parallel)
        async with new_client(self.policy) as client:
            return await asyncio.gather(*(self._mark(client, places, answer) for answer in answers))

    async def _mark(self, client: httpx.AsyncClient, places: asyncio.Semaphore, answer: Answer) -> float | None:
        if not any(image is not None for image in answer.images):
            return 1.0
        marks: list[float] = []
        body = self.request(answer)

        async def once(_: float) -> None:
            reply = await json_reply(
                client,
                f"{self.url.rstrip('/')}/chat/completions",
                token=self._token,
                max_bytes=self.policy.max_reply_bytes,
                body=body,
            )
            marks.append(mark_in(reply))

        async with places:
            return marks[0] if await tried(self.policy, once, self.faults) else None

    def request(self, answer: Answer) -> dict[str, Any]:
        """Greedy: the same answer gets the same mark."""
        images = [image for image in answer.images if image is not None]
        words = self.question.format(
            prompt=answer.prompt, text=answer.text, num_prompt_images=len(answer.prompt_images), num_images=len(images)
        )
        pictures = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in (*answer.prompt_images, *images)]
        content = [*pictures, {"type": "text", "text": words}]
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}


def data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def mark_in(reply: Mapping[str, Any]) -> float:
    """The mark in a chat completion, in [1, 10]. Raises `CallError` where there is none."""
    try:
        text = reply["choices"][0]["message"]["content"]
        mark = json.loads(text[text.index("{") : text.rindex("}") + 1])["score"]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CallError("reply without a mark") from error
    if isinstance(mark, bool) or not isinstance(mark, int | float) or not math.isfinite(mark) or not 1 <= mark <= 10:
        raise CallError("mark outside of 1 to 10")
    return float(mark)
