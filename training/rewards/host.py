"""Runs the reward service: a socket, a token, and a file that says where both are."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from model.durable import publish, temporary_path
from model.errors import UserError
from training.rewards.base import Reward
from training.rewards.micro_batches import ServiceLimits


def serve(
    rewards: Mapping[str, Reward], host: str, port: int, address: Path, token_file: Path | None, limits: ServiceLimits
) -> None:
    """Serve until SIGINT or SIGTERM. `address` gets {"url", "token"}, readable for this user alone, and goes at the end.

    port 0: a free one. Without `token_file` a new token is made; beyond loopback a file is asked for.
    """
    try:
        import uvicorn

        from training.rewards.service import RewardService
    except ImportError as error:
        raise UserError(
            "the reward service needs starlette and uvicorn", got=str(error), fix="pip install 'nextstate[rewards]'"
        ) from error
    if token_file is None and not is_loopback(host):
        raise UserError(
            "a service that others can reach needs a token of yours",
            where=f"host={host}",
            expected="token_file=FILE with the token that clients send",
            fix="host=127.0.0.1, or token_file=FILE",
        )
    token = read_token(token_file) if token_file else secrets.token_urlsafe(32)
    service = RewardService(rewards, token, limits)
    try:
        listener = socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise UserError("the service cannot listen", where=f"{host}:{port}", got=str(error), fix="port=0") from error
    url = f"http://{host}:{listener.getsockname()[1]}"
    write_private(address, json.dumps({"url": url, "token": token}) + "\n")
    server = uvicorn.Server(
        uvicorn.Config(service.app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    )

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn sends the signal that ended it again, to what handled it before: this one leaves the end to us.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        remove_own(address, url)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the token cannot be read", where=str(path), got=str(error)) from error
    if not token.isascii() or len(token) < 16:
        raise UserError("a token is at least 16 ASCII characters", where=str(path), got=f"{len(token)} characters")
    return token


def write_private(path: Path, text: str) -> None:
    """A file that this user alone can read, whole from the moment it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    publish(temporary, path)


def remove_own(address: Path, url: str) -> None:
    """Unless another service has taken the place meanwhile."""
    try:
        if json.loads(address.read_text(encoding="utf-8"))["url"] == url:
            address.unlink()
    except (OSError, ValueError, KeyError):
        return
