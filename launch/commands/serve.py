"""`nextstate serve`: a checkpoint behind an OpenAI-style interface, and a page to try it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.generation.sizes import PUBLISHED_AREA, read_size
from model.errors import Problems, UserError
from model.generation.decoding_config import DecodingConfig
from model.generation.settings import SamplingConfig
from training.inference.choice import check_choice
from training.inference.prompts import FORMATS, InferenceOptions

HELP = """Serve a trained checkpoint over HTTP, with a page to try prompts and to continue a world.

/v1/images/generations, /v1/images/edits and /v1/chat/completions speak as OpenAI's interface does, as far as the model
can; /health and /metrics tell how it goes. It listens on this machine alone unless host and token_file say otherwise.
It needs the extra `serve`: pip install nextstate[serve]. Ctrl-C ends it.

examples:
  nextstate serve checkpoint=runs/demo/sft image_size=48
  nextstate serve checkpoint=runs/emu35/sft_2 preset=emu35_t2i host=0.0.0.0 token_file=token.txt"""

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass
class Config:
    checkpoint: str = ""  # a stage folder (its newest checkpoint) or a checkpoint folder
    host: str = "127.0.0.1"  # the address to listen on; any but loopback needs a token
    port: int = 8000  # 0: any free one
    token_file: str | None = None  # holds what clients send as "Authorization: Bearer TOKEN"
    model_name: str = "nextstate"  # what clients call the model
    format: str = "howto"  # how a chat is put when it does not say: howto | story | explore | vla | interleaved
    image_size: Any = 0  # of answers that ask for none: pixels of a square, [height, width], "width:height"; 0: any
    image_area: int = PUBLISHED_AREA  # pixels of a picture whose size is given as a ratio
    max_waiting: int = 64  # answers that are not over; further requests get 429
    max_answers: int = 10  # of one request
    max_body_megabytes: int = 32  # of one request
    max_source_pixels: int = 16_777_216  # of one picture that is sent
    max_request_pixels: int = 67_108_864  # of all pictures of one request
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    as_trained: bool = True  # where `sampling` sets a length at most, draw as reinforcement learning drew its answers
    answers: InferenceOptions = field(default_factory=InferenceOptions)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)  # how pictures are decoded
    text_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    vision_tokenizer: str | None = None  # folder; null: the one that the checkpoint names
    seed: int = 0  # of answers that ask for none; each has a number of its own
    json: bool = False  # answer with one JSON object, when it ends

    def validate(self) -> None:
        problems = Problems()
        problems.check(bool(self.checkpoint), "checkpoint", "is required", "checkpoint=<stage folder>")
        problems.check(
            self.host in LOOPBACK or self.token_file is not None,
            "token_file",
            f"is required when others can reach the server (host={self.host})",
            "token_file=PATH, or host=127.0.0.1",
        )
        problems.check(0 <= self.port < 65536, "port", "must be in [0, 65535]", "port=8000")
        problems.check(self.format in FORMATS, "format", f"unknown format {self.format!r}", "format=howto")
        problems.check(
            read_size(self.image_size) is not None, "image_size", f"not a size: {self.image_size!r}", "image_size=48"
        )
        limits = ("max_waiting", "max_answers", "max_body_megabytes", "max_source_pixels", "max_request_pixels")
        for name in ("image_area", *limits):
            problems.check(getattr(self, name) > 0, name, "must be positive", f"{name}=1")
        self.sampling.validate(problems)
        self.answers.validate(problems, "answers")
        self.decoding.validate(problems, "decoding")
        self.decoding.validate_read(problems, "decoding")
        problems.raise_if_any()


def run(config: Config) -> dict[str, Any]:
    """Serves until SIGINT or SIGTERM; the answer says how many requests came."""
    config.validate()
    token = read_token(config.token_file)
    check_choice(
        config.checkpoint,
        config.decoding.strategy,
        [read_size(config.image_size) or (0, 0)],
        text_tokenizer=config.text_tokenizer,
        vision_tokenizer=config.vision_tokenizer,
    )
    server_of = import_server()
    from training.inference.model import InferenceModel

    model = InferenceModel.load(config.checkpoint, config.text_tokenizer, config.vision_tokenizer, config.answers)
    model.decode_with(config.decoding)
    app = app_of(config, model, token)
    server = server_of(app)
    listener = bound(config)
    address = f"http://{config.host}:{listener.getsockname()[1]}"
    print(f"{config.model_name}: {address}", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
    return {"address": address, "requests": app.state.counters.num_requests()}


def import_server() -> Any:
    """Makes uvicorn's server; refused with the way to mend it where the extra is not installed."""
    try:
        import multipart  # noqa: F401 - Starlette reads forms with it
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            "what serves HTTP is not installed", got=str(error), fix="pip install nextstate[serve]"
        ) from error

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """SIGINT and SIGTERM end the server, and not the process behind it as uvicorn has it."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return lambda app: Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, h11_max_incomplete_event_size=65536)
    )


def bound(config: Config) -> Any:
    """The listening socket, so that the port is known (and refused) before a client can ask."""
    import socket

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        raise UserError(
            "the address cannot be listened on", where=f"{config.host}:{config.port}", got=str(error), fix="port=0"
        ) from error
    return listener


def read_token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the token cannot be read", where=path, got=str(error)) from error
    if len(token) < 16:
        raise UserError("the token is too short to keep anyone out", where=path, expected="16 characters or more")
    return token


def app_of(config: Config, model: Any, token: str | None) -> Any:
    from launch.generation.app import make_app
    from launch.generation.bodies import Limits
    from launch.generation.counters import Counters
    from launch.generation.scheduler import Scheduler

    counters = Counters()
    limits = Limits(
        config.model_name,
        model.vision_tokenizer.factor,
        model.vision_tokenizer.codebook_size,
        model.sampling_as_trained(config.sampling) if config.as_trained else config.sampling,
        config.image_size,
        config.image_area,
        config.format,
        config.max_answers,
        config.max_source_pixels,
        config.max_request_pixels,
    )
    app = make_app(
        Scheduler(model, config.max_waiting, counters),
        limits,
        counters,
        seed=config.seed,
        token=token,
        hosts=list(LOOPBACK) if config.host in LOOPBACK else None,
        max_body_bytes=config.max_body_megabytes << 20,
    )
    app.state.counters = counters
    return app


def render(answer: dict[str, Any]) -> str:
    return f"{answer['address']}: {answer['requests']} requests"
