"""The reward service: scorers behind HTTP, for training that has no room for them.

    GET  /rewards    {"rewards": {name: version}}
    POST /score      {"reward": name, "deadline_seconds": s, "answers": [...]}   (answers: `training.rewards.wire`)
                     -> {"version": v, "scores": [{"id": i, "score": x or null, "fault": why}]}
    GET  /counts     requests, answers, faults by reason, since the start

Every request carries `Authorization: Bearer TOKEN`. Status 429: too much is waiting, ask again. Ids are made of what an
answer holds, so a request may be sent again at will.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from training.rewards.base import Reward
from training.rewards.micro_batches import MicroBatcher, ServiceLimits, TooManyWaitingError, Verdict
from training.rewards.wire import PixelBudget, WireError, decoded


class BadRequestError(Exception):
    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.message, self.status = message, status


class RewardService:
    """The ASGI application `app` over some rewards."""

    def __init__(self, rewards: Mapping[str, Reward], token: str, limits: ServiceLimits | None = None):
        assert token, "a service without a token is open to everybody on the machine"
        self.rewards = dict(rewards)
        self.limits = limits or ServiceLimits()
        self.counts: Counter[str] = Counter()
        self._token = token.encode()
        self._batchers: dict[str, MicroBatcher] = {}
        routes = [
            Route("/rewards", self._answered(self._list)),
            Route("/counts", self._answered(self._count)),
            Route("/score", self._answered(self._score), methods=["POST"]),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        for name, reward in self.rewards.items():
            self._batchers[name] = MicroBatcher(reward, self.limits)
        yield
        for batcher in self._batchers.values():
            await batcher.close()

    def _answered(self, handler: Any) -> Any:
        """`handler` behind the token; what the client did wrong as a status and one sentence."""

        async def endpoint(request: Request) -> Response:
            self.counts["requests"] += 1
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, b"Bearer " + self._token):
                self.counts["refused"] += 1
                return JSONResponse({"error": "a token is needed: Authorization: Bearer TOKEN"}, 401)
            try:
                return JSONResponse(await handler(request))
            except TooManyWaitingError:
                self.counts["too many waiting"] += 1
                return JSONResponse({"error": "too many answers are waiting"}, 429)
            except BadRequestError as error:
                self.counts[f"status {error.status}"] += 1
                return JSONResponse({"error": error.message}, error.status)
            except ClientDisconnect:
                self.counts["gone"] += 1
                return Response(status_code=400)

        return endpoint

    async def _list(self, _: Request) -> dict[str, Any]:
        return {"rewards": {name: reward.version for name, reward in self.rewards.items()}}

    async def _count(self, _: Request) -> dict[str, Any]:
        return dict(self.counts)

    async def _score(self, request: Request) -> dict[str, Any]:
        body = await self._read(request)
        name, records, seconds = body.get("reward"), body.get("answers"), body.get("deadline_seconds")
        if not isinstance(name, str) or name not in self._batchers:
            raise BadRequestError(f"there is no reward {name!r}; served are {', '.join(self._batchers)}", 404)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise BadRequestError("deadline_seconds must be a positive number")
        seconds = float(min(seconds, self.limits.max_deadline_seconds))
        if not isinstance(records, list):
            raise BadRequestError("answers must be a list")
        try:
            budget = PixelBudget()
            answers = await asyncio.to_thread(lambda: [decoded(record, budget) for record in records])
        except WireError as error:
            raise BadRequestError(str(error)) from error
        batcher = self._batchers[name]
        asking = [batcher.score(one["id"], answer, seconds) for one, answer in zip(records, answers, strict=True)]
        verdicts = await asyncio.gather(*asking, return_exceptions=True)
        if any(isinstance(verdict, TooManyWaitingError) for verdict in verdicts):
            raise TooManyWaitingError  # those that did find room are known when the client asks again
        scores = []
        for record, verdict in zip(records, verdicts, strict=True):
            if not isinstance(verdict, Verdict):
                raise verdict
            self.counts["answers"] += 1
            if verdict.fault:
                self.counts[f"fault: {verdict.fault}"] += 1
            scores.append({"id": record["id"], "score": verdict.score, "fault": verdict.fault})
        return {"version": self.rewards[name].version, "scores": scores}

    async def _read(self, request: Request) -> dict[str, Any]:
        """The request's JSON object. Stops reading where it grows too long, whatever its headers say."""
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > self.limits.max_request_bytes:
                raise BadRequestError(f"a request has at most {self.limits.max_request_bytes} bytes", 413)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"no JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequestError("no JSON object")
        return body
