"""The server's routes. Requests become jobs of the scheduler; what the jobs tell becomes the answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.generation import bodies
from launch.generation.bodies import Asked, Limits, RequestError
from launch.generation.counters import Counters
from launch.generation.guards import Guard, http_error
from launch.generation.replies import ChatReply, PicturesReply, Reply, error_body, event, failure_body
from launch.generation.scheduler import Job, QueueFullError, Scheduler, Told
from training.inference.answering import Answering

SILENCE_SECONDS = 15.0  # of a stream, before a comment shows that the server is there
RETRY_SECONDS = 5  # told with 429
GONE = 499  # nginx's number for a client that went; nobody reads the answer
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"


class Server:
    """Handlers of the routes, with what they share."""

    def __init__(self, scheduler: Scheduler, limits: Limits, counters: Counters, seed: int) -> None:
        self.scheduler, self.limits, self.counters, self.seed = scheduler, limits, counters, seed
        self._draws = itertools.count()

    async def generations(self, request: Request) -> Response:
        values = bodies.read_json(await json_body(request))
        asked = bodies.read_generation(values, self.limits)
        return await self._answer(request, asked, partial(PicturesReply, path=request.url.path))

    async def edits(self, request: Request) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            values, files_of_form = await form_body(request)
            budget = self.limits.pixels()
            pictures = [await in_thread(budget.decoded, data, "image") for data in files_of_form]
        else:
            values = bodies.read_json(await json_body(request))
            pictures = await in_thread(bodies.read_images, values.pop("images", []), self.limits)
        asked = bodies.read_edit(values, pictures, self.limits)
        return await self._answer(request, asked, partial(PicturesReply, path=request.url.path))

    async def chat(self, request: Request) -> Response:
        values = bodies.read_json(await json_body(request))
        asked = await in_thread(bodies.read_chat, values, self.limits)
        return await self._answer(request, asked, lambda jobs: ChatReply(jobs[0], self.limits.model_name))

    async def _answer(self, request: Request, asked: Asked, reply_of: Callable[[list[Job]], Reply]) -> Response:
        inbox: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        jobs = self._jobs(asked, inbox)
        try:
            self.scheduler.submit(jobs)
        except QueueFullError:
            body = error_body(f"{self.scheduler.max_waiting} answers are waiting already", "rate_limit_error")
            return JSONResponse(body, 429, headers={"Retry-After": str(RETRY_SECONDS)})
        reply = reply_of(jobs)
        if asked.stream:
            events = self._events(jobs, inbox, reply)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        collecting = asyncio.create_task(self._collect(jobs, inbox, reply))
        leaving = asyncio.create_task(client_gone(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if collecting.done():
                return collecting.result()
            self.counters.disconnects.inc()
            return Response(status_code=GONE)
        finally:
            for task in (collecting, leaving):
                task.cancel()
            let_go(jobs)

    def _jobs(self, asked: Asked, inbox: asyncio.Queue[tuple[int, Told]]) -> list[Job]:
        """One for each answer. Without a seed the server's own serves, with a number for each answer that it gives."""
        loop = asyncio.get_running_loop()

        def teller(index: int) -> Callable[[Told], None]:
            def tell(told: Told) -> None:
                loop.call_soon_threadsafe(inbox.put_nowait, (index, told))

            return tell

        return [
            Job(
                asked.prompt,
                asked.sampling,
                self.seed if asked.seed is None else asked.seed,
                next(self._draws) % 2**31 if asked.seed is None else index,
                teller(index),
                asked.num_states,
                asked.words,
                asked.num_previews if asked.stream else 0,
            )
            for index in range(asked.num_answers)
        ]

    async def _collect(self, jobs: list[Job], inbox: asyncio.Queue[tuple[int, Told]], reply: Reply) -> Response:
        num_open = len(jobs)
        while num_open:
            index, told = await inbox.get()
            if isinstance(told, Exception):
                status, body = failure_body(told)
                return JSONResponse(body, status)
            reply.add(index, told)
            num_open -= isinstance(told, Answering)
        return JSONResponse(await in_thread(reply.body))

    async def _events(
        self, jobs: list[Job], inbox: asyncio.Queue[tuple[int, Told]], reply: Reply
    ) -> AsyncIterator[bytes]:
        num_open, is_over = len(jobs), False
        try:
            while num_open:
                try:
                    index, told = await asyncio.wait_for(inbox.get(), SILENCE_SECONDS)
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                if isinstance(told, Exception):
                    is_over = True
                    yield event(failure_body(told)[1], "error")
                    return
                num_open -= isinstance(told, Answering)
                for chunk in reply.add(index, told):
                    yield chunk
            is_over = True
            for chunk in reply.end():
                yield chunk
        finally:
            if not is_over:
                self.counters.disconnects.inc()
            let_go(jobs)

    async def health(self, request: Request) -> Response:
        body = {"status": "ok", "model": self.limits.model_name, "answers_waiting": self.scheduler.num_waiting}
        if not self.scheduler.is_alive:
            return JSONResponse(body | {"status": "the model's thread has ended"}, 503)
        return JSONResponse(body)

    async def metrics(self, request: Request) -> Response:
        return Response(self.counters.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        entry = {"id": self.limits.model_name, "object": "model", "created": 0, "owned_by": "nextstate"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def page(self, request: Request) -> Response:
        name, kind = ("page.js", "text/javascript") if request.url.path == "/page.js" else ("page.html", "text/html")
        content = files("launch.generation").joinpath(name).read_bytes()
        return Response(content, media_type=kind, headers={"Content-Security-Policy": PAGE_POLICY})


def make_app(
    scheduler: Scheduler,
    limits: Limits,
    counters: Counters,
    *,
    seed: int = 0,
    token: str | None = None,
    hosts: list[str] | None = None,
    max_body_bytes: int = 32 << 20,
    body_seconds: float = 30.0,
) -> Starlette:
    """`hosts`: names by which the server may be called, None: any. The scheduler's thread lives as long as the app."""
    server = Server(scheduler, limits, counters, seed)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await in_thread(scheduler.close)

    def route(path: str, handler: Callable[[Request], Awaitable[Response]], *methods: str) -> Route:
        return Route(path, counted(path, handler, counters), methods=list(methods))

    return Starlette(
        routes=[
            route("/", server.page, "GET"),
            route("/page.js", server.page, "GET"),
            route("/health", server.health, "GET"),
            route("/metrics", server.metrics, "GET"),
            route("/v1/models", server.models, "GET"),
            route("/v1/images/generations", server.generations, "POST"),
            route("/v1/images/edits", server.edits, "POST"),
            route("/v1/chat/completions", server.chat, "POST"),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"]),
            Middleware(Guard, token=token, max_body_bytes=max_body_bytes, body_seconds=body_seconds),
        ],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )


def counted(
    path: str, handler: Callable[[Request], Awaitable[Response]], counters: Counters
) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose refusals are answers, and whose answers are counted."""

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await handler(request)
        except RequestError as error:
            response = JSONResponse(error_body(error.message, "invalid_request_error", error.field), error.status)
        except ClientDisconnect:  # before its body was there
            counters.disconnects.inc()
            response = Response(status_code=GONE)
        counters.requests.labels(path, str(response.status_code)).inc()
        counters.seconds.labels(path).observe(time.perf_counter() - started)
        return response

    return handle


async def json_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind != "application/json":  # which no page of another site can send unasked
        raise RequestError("the body must be application/json", status=415)
    return await request.body()


async def form_body(request: Request) -> tuple[dict[str, Any], list[bytes]]:
    """Fields, numbers among them read as such, and the files `image` or `image[]`."""
    values: dict[str, Any] = {}
    pictures: list[bytes] = []
    async with request.form(max_files=bodies.MAX_PICTURES, max_fields=32) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "image[]"):
                    raise RequestError(f"unknown file {name[:80]!r}; known: image", name[:80])
                pictures.append(await value.read())
            else:
                values[name] = field_value(name, value)
    return values, pictures


def field_value(name: str, value: str) -> Any:
    """Forms know text only."""
    if name in ("n", "seed", "top_k", "partial_images", "temperature", "top_p", "guidance_scale"):
        try:
            return int(value) if value.lstrip("-").isdecimal() and len(value) < 20 else float(value)
        except ValueError:
            raise RequestError(f"{name} must be a number", name) from None
    return {"true": True, "false": False}.get(value, value) if name == "stream" else value


async def client_gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def let_go(jobs: list[Job]) -> None:
    for job in jobs:
        job.is_gone = True


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Decoding pictures and large JSON must not keep others waiting."""
    return await anyio.to_thread.run_sync(partial(function, *arguments))
