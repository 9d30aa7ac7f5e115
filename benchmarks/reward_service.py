"""The reward service under load: requests a second of a trivial scorer, and what a client has when replies go wrong.

    python -m benchmarks.reward_service
    python -m benchmarks.reward_service --fault-share 0.2

The service runs in a process of its own, the client in this one; every request holds one answer with one picture.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from training.rewards.base import Answer
from training.rewards.client import RemoteReward
from training.rewards.micro_batches import ServiceLimits

TOKEN = "token-of-the-benchmark"
LATE_SECONDS = 5.0


class Number:
    """The number that the prompt ends with, plus one: never 0."""

    name, version = "number", "1"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [1.0 + float(answer.prompt.split()[-1]) for answer in answers]


class Unreliable:
    """An ASGI application that answers a share of the scoring requests late, broken or wrong, in turn."""

    KINDS = ("late", "status 500", "no JSON", "closed", "wrong ids", "not finite", "partial", "endless")

    def __init__(self, app: Any, share: float, seed: int = 0):
        self.app, self.share, self.random = app, share, random.Random(seed)
        self.number = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/score" or self.random.random() >= self.share:
            await self.app(scope, receive, send)
            return
        kind = self.KINDS[self.number % len(self.KINDS)]
        self.number += 1
        if kind == "late":
            await asyncio.sleep(LATE_SECONDS)
            await self.app(scope, receive, send)
        elif kind == "closed":
            raise ConnectionAbortedError
        elif kind == "endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(round(LATE_SECONDS / 0.1)):
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b""})
        else:
            body = {
                "wrong ids": b'{"version": "1", "scores": [{"id": "of nobody", "score": 0}]}',
                "not finite": b'{"version": "1", "scores": [{"id": "of nobody", "score": NaN}]}',
                "partial": b'{"version": "1", "scores": []}',
            }.get(kind, b"<html>")
            status = 500 if kind == "status 500" else 200
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": body})


def run_service(listener: socket.socket, fault_share: float) -> None:
    import logging

    import uvicorn

    from training.rewards.service import RewardService

    logging.disable(logging.CRITICAL)  # tracebacks of the connections that it closes on purpose
    app = Unreliable(RewardService({"number": Number()}, TOKEN, ServiceLimits()).app, fault_share)
    uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False)).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--fault-share", type=float, default=0.0)
    parser.add_argument("--picture-pixels", type=int, default=48)
    parser.add_argument("--try-seconds", type=float, default=2.0)
    parser.add_argument("--parallel", type=int, default=8)
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    service = multiprocessing.get_context("fork").Process(target=run_service, args=(listener, options.fault_share))
    service.start()
    try:
        measure(f"http://127.0.0.1:{listener.getsockname()[1]}", psutil.Process(service.pid), options)
    finally:
        service.terminate()
        service.join()


def measure(url: str, service: psutil.Process, options: argparse.Namespace) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile("w") as token_file:
        token_file.write(TOKEN)
        token_file.flush()
        limits = {
            "try_seconds": options.try_seconds,
            "deadline_seconds": 60.0,
            "tries": 8,
            "parallel": options.parallel,
        }
        reward = RemoteReward("number", url, token_file.name, batch_size=1, limits=limits)
        picture = np.random.default_rng(0).integers(0, 256, (options.picture_pixels,) * 2 + (3,), np.uint8)
        answers = [Answer("t2i", f"number {index}", images=[picture]) for index in range(options.requests)]
        before, started = cpu_seconds(service), time.perf_counter()
        scores = reward.score(answers)
        seconds = time.perf_counter() - started
    client, served = (after - first for after, first in zip(cpu_seconds(service), before, strict=True))
    missing = sum(score is None for score in scores)
    wrong = sum(score is not None and score != 1.0 + index for index, score in enumerate(scores))
    zeros = sum(score == 0 for score in scores)
    print(f"{options.requests} requests in {seconds:.1f} s: {options.requests / seconds:.0f} requests/s")
    busy = max(client, served)
    print(
        f"CPU: client {client:.2f} s, service {served:.2f} s; {options.requests / busy:.0f} requests/s on two idle cores"
    )
    print(f"missing {missing}, wrong {wrong}, zero {zeros}; failed tries: {dict(reward.faults)}")


def cpu_seconds(service: psutil.Process) -> tuple[float, float]:
    """Of this process and of the service, since their start."""
    return tuple(sum(process.cpu_times()[:2]) for process in (psutil.Process(), service))


if __name__ == "__main__":
    main()
