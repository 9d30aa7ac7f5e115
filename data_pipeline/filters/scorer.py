"""Scores of a model elsewhere: one HTTP request a batch of samples."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.kinds.base import Pixels, PreparedSample
from model.errors import UserError

_MAX_WAIT_SECONDS = 30.0


@dataclass
class HttpScorer:
    """What the service at `url` says of samples: `batch_size` of them in a request.

    Sent: `{"samples": [{"key", "kind", "texts": [...], "pictures": [JPEG in base64, ...]}, ...]}`, pictures with a longer side of
    at most `picture_side` and at most `max_pictures` of a sample, spread evenly. Wanted: `{"scores": [number or null, ...]}` in
    the same order, null for nothing to say. A request that fails is sent again, `attempts` times in all; after that the job ends
    with one message and the same command goes on: no sample is kept or left out because a service was away.
    """

    url: str = ""
    label: str = "http_scorer"  # stands for the filter in reasons and reports: one a model
    unit: str = "score"
    batch_size: int = 32
    max_pictures: int = 8
    picture_side: int = 384
    timeout_seconds: float = 120.0
    attempts: int = 5
    wait_seconds: float = 1.0  # before the second attempt; twice as long before each later one

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or self.batch_size < 1 or self.attempts < 1:
            raise UserError(
                "a scorer needs the URL of its service",
                where="filters.options",
                got=f"url={self.url!r}, batch_size={self.batch_size}, attempts={self.attempts}",
                fix="{name: http_scorer, minimum: 0.5, options: {url: 'http://host:8000/score', label: aesthetic}}",
            )

    @property
    def name(self) -> str:
        return self.label

    def score(self, sample: PreparedSample) -> float | None:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[PreparedSample]) -> list[float | None]:
        scores: list[float | None] = []
        for first in range(0, len(samples), self.batch_size):
            scores += self._ask([self._encoded(sample) for sample in samples[first : first + self.batch_size]])
        return scores

    def _ask(self, samples: list[dict[str, Any]]) -> list[float | None]:
        import httpx

        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(_MAX_WAIT_SECONDS, self.wait_seconds * 2 ** (attempt - 1)))
            try:
                reply = httpx.post(self.url, json={"samples": samples}, timeout=self.timeout_seconds)
                reply.raise_for_status()
                return _scores_in(reply.json(), len(samples))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                failure = error
        raise UserError(
            f"the scorer {self.name!r} does not answer",
            where=self.url,
            expected='{"scores": [one number or null a sample]}',
            got=f"{type(failure).__name__}: {failure} ({self.attempts} times)",
            fix="start the service, then the same command again: shards that are done are kept",
        ) from failure

    def _encoded(self, sample: PreparedSample) -> dict[str, Any]:
        pictures = sample.pictures
        step = max(1, math.ceil(len(pictures) / self.max_pictures))
        return {
            "key": sample.key,
            "kind": sample.kind,
            "texts": sample.texts,
            "pictures": [base64.b64encode(as_jpeg(one, self.picture_side)).decode() for one in pictures[::step]],
        }


def as_jpeg(picture: Pixels, longest_side: int) -> bytes:
    image = Image.fromarray(picture.pixels)
    image.thumbnail((longest_side, longest_side))
    target = io.BytesIO()
    image.save(target, "jpeg", quality=90)
    return target.getvalue()


def _scores_in(reply: Any, count: int) -> list[float | None]:
    """Raises `ValueError` for anything but one finite number or null a sample."""
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"{count} scores were wanted, got {str(reply)[:200]}")
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"a score is no number: {score!r}")
        if score is not None and not math.isfinite(score):
            raise ValueError(f"a score is not finite: {score!r}")
    return [None if score is None else float(score) for score in scores]
