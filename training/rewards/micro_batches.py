"""Requests of many clients to one scorer, put together into batches."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from model.errors import UserError
from training.rewards.base import Answer, Reward, Scores, scores_of


@dataclass
class ServiceLimits:
    max_batch: int = 32  # answers that a scorer sees at once
    max_wait_seconds: float = 0.01  # for a batch to fill
    max_waiting: int = 4096  # answers in a scorer's queue; more are answered with status 429
    max_request_bytes: int = 1 << 27  # larger ones are answered with status 413
    max_deadline_seconds: float = 600.0  # the longest that a request may ask for
    max_known: int = 65536  # scores that are kept for requests that come again


class TooManyWaitingError(Exception):
    """The queue is full: ask again later."""


@dataclass(frozen=True)
class Verdict:
    """What a scorer said of one answer."""

    score: float | None
    fault: str = ""  # why there is no score


@dataclass
class Waiting:
    answer: Answer
    end: float  # of time.monotonic(); later nobody waits for the score
    verdict: asyncio.Future[Verdict]


class MicroBatcher:
    """Scores answers one batch at a time, on a thread of its own; made inside a running event loop.

    An answer that is known or under way is not scored again: a retry gets the verdict of the first try. Failures are
    forgotten, so that a retry can succeed.
    """

    def __init__(self, reward: Reward, limits: ServiceLimits):
        self.reward, self.limits = reward, limits
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(limits.max_waiting)
        self._known: OrderedDict[str, asyncio.Future[Verdict]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward {reward.name}")
        self._worker = asyncio.create_task(self._work())

    async def score(self, key: str, answer: Answer, seconds: float) -> Verdict:
        """Within `seconds`. Raises `TooManyWaitingError`."""
        verdict = self._known.get(key)
        if verdict is None:
            verdict = asyncio.get_running_loop().create_future()
            try:
                self._queue.put_nowait(Waiting(answer, time.monotonic() + seconds, verdict))
            except asyncio.QueueFull:
                raise TooManyWaitingError from None
            self._known[key] = verdict
            verdict.add_done_callback(lambda done: self._forget(key, done))
        try:
            return await asyncio.wait_for(asyncio.shield(verdict), seconds)
        except TimeoutError:
            return Verdict(None, "deadline")

    def _forget(self, key: str, done: asyncio.Future[Verdict]) -> None:
        """Failures at once, and the oldest verdicts when there are too many."""
        if done.cancelled() or done.result().score is None:
            self._known.pop(key, None)
        while len(self._known) > self.limits.max_known and next(iter(self._known.values())).done():
            self._known.popitem(last=False)

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            alive = [one for one in batch if one.end > time.monotonic()]
            for one in batch:
                if one not in alive:
                    one.verdict.set_result(Verdict(None, "deadline"))
            if alive:
                answers = [one.answer for one in alive]
                scores = await asyncio.get_running_loop().run_in_executor(self._thread, asked, self.reward, answers)
                fault = ", ".join(scores.faults)
                for one, value in zip(alive, scores.values, strict=True):
                    one.verdict.set_result(Verdict(value, "" if value is not None else fault))

    async def _next_batch(self) -> list[Waiting]:
        """At least one; more as they come, until the batch is full or its first has waited long enough."""
        batch = [await self._queue.get()]
        end = time.monotonic() + self.limits.max_wait_seconds
        while len(batch) < self.limits.max_batch and (seconds := end - time.monotonic()) > 0:
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), seconds))
            except TimeoutError:
                break
        return batch

    async def close(self) -> None:
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)


def asked(reward: Reward, answers: Sequence[Answer]) -> Scores:
    """A scorer that is set up wrongly says so to every client, and the service goes on with the others."""
    try:
        return scores_of(reward, answers)
    except UserError as error:
        return Scores([None] * len(answers), {error.what: len(answers)})
