"""What stands before every request: the token, the size and the patience of bodies, and other sites' pages."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.generation.replies import error_body

OPEN_PATHS = ("/", "/page.js", "/health")  # without a token: nothing of a model is in them


class Guard:
    """Refuses requests without the token, or sent by a page of another site; bounds bodies while they are read."""

    def __init__(self, app: ASGIApp, token: str | None, max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.token = app, token
        self.max_body_bytes, self.body_seconds = max_body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        origin = headers.get("origin")
        if origin is not None and origin.split("://")[-1] != headers.get("host"):
            return JSONResponse(error_body("requests of other sites' pages are refused", "forbidden"), 403)
        if self.token is None or path in OPEN_PATHS:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        body = error_body("the token is missing or wrong: Authorization: Bearer TOKEN", "authentication_error")
        return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})

    def _bounded(self, receive: Receive) -> Receive:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.body_seconds
        num_bytes, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # from here on `receive` waits for the client to go
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time") from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_body_bytes:,} bytes")
            return message

        return bounded


def http_error(request: Any, error: Exception) -> JSONResponse:
    """Starlette's own refusals (404, 405, 413, ...) in the shape of the others."""
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers)
