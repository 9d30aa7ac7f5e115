"""HTTP calls to scorers that end: deadlines over everything, tries with back-off, and a reason for every failure."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.errors import UserError

if TYPE_CHECKING:
    import httpx

LONGEST_PAUSE_SECONDS = 2.0  # between two tries
RETRIED = (408, 425, 429)  # and 5xx: the same request may succeed later


@dataclass(frozen=True)
class CallPolicy:
    """How long and how often a scorer is asked."""

    deadline_seconds: float = 120.0  # all tries of one request together
    try_seconds: float = 40.0  # one try, from connecting to the last byte
    tries: int = 3  # that somebody answered, or kept waiting
    backoff_seconds: float = 0.2  # before the second try, twice as long before each further one
    parallel: int = 8  # requests at once
    max_reply_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        if min(self.deadline_seconds, self.try_seconds, self.tries, self.parallel, self.max_reply_bytes) <= 0:
            raise UserError("a limit of calls to a scorer must be positive", got=str(self))


class CallError(Exception):
    """A try that failed. `again`: another one may succeed. `answered`: somebody was there, so it counts as a try."""

    def __init__(self, reason: str, *, again: bool = True, answered: bool = True):
        super().__init__(reason)
        self.reason, self.again, self.answered = reason, again, answered


async def tried(policy: CallPolicy, once: Callable[[float], Awaitable[None]], faults: Counter[str]) -> bool:
    """`once(seconds left)` until it returns, within the policy's limits; False when it never did.

    While nobody is there only the deadline ends it: a service may die and return. Every failed try is counted in
    `faults` by its reason. Nothing but a `CallError` of `once` is taken for one.
    """
    end, pause, num_tries = time.monotonic() + policy.deadline_seconds, policy.backoff_seconds, 0
    while num_tries < policy.tries:
        seconds = min(policy.try_seconds, end - time.monotonic())
        if seconds <= 0:
            faults["deadline"] += 1
            return False
        try:
            async with asyncio.timeout(seconds):
                await once(seconds)
            return True
        except TimeoutError:
            faults["late"] += 1
            num_tries += 1
        except CallError as fault:
            faults[fault.reason] += 1
            num_tries += fault.answered
            if not fault.again:
                return False
        if num_tries < policy.tries:
            await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, end - time.monotonic())))
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
    return False


async def json_reply(
    client: httpx.AsyncClient, url: str, *, token: str, max_bytes: int, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON object that a POST of `body` (without one, a GET) is answered with. Raises `CallError`."""
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    method = "GET" if body is None else "POST"
    try:
        async with client.stream(method, url, json=body, headers=headers) as reply:
            if reply.status_code != 200:
                again = reply.status_code in RETRIED or reply.status_code >= 500
                raise CallError(f"status {reply.status_code}", again=again)
            data = bytearray()
            async for piece in reply.aiter_bytes():
                data += piece
                if len(data) > max_bytes:
                    raise CallError("reply too long")
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        refused = isinstance(error, httpx.ConnectError)
        raise CallError(f"connection: {type(error).__name__}", answered=not refused) from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CallError("reply is no JSON") from error
    if not isinstance(value, dict):
        raise CallError("reply is no JSON object")
    return value


def new_client(policy: CallPolicy) -> httpx.AsyncClient:
    """No proxies and no redirects: a token goes to the address that was given and nowhere else."""
    try:
        import httpx
    except ImportError as error:
        raise UserError(
            "a remote scorer needs httpx, which is not installed",
            got=str(error),
            fix="pip install 'nextstate[rewards]'",
        ) from error
    limits = httpx.Limits(max_connections=policy.parallel)
    return httpx.AsyncClient(timeout=policy.try_seconds, limits=limits, trust_env=False, follow_redirects=False)
