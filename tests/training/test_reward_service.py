"""Rewards over HTTP: a real server on loopback, clients that never hang, and faults that never become a score."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from benchmarks import reward_service as benchmark
from model.errors import UserError
from training.rewards.base import Answer
from training.rewards.client import RemoteReward
from training.rewards.host import read_token, serve, write_private
from training.rewards.micro_batches import ServiceLimits
from training.rewards.service import RewardService
from training.rewards.wire import PixelBudget, WireError, decoded, encoded

TOKEN = "a-token-for-tests"
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 8, 3), np.uint8)
QUICK = {"try_seconds": 2.0, "deadline_seconds": 20.0, "tries": 4, "backoff_seconds": 0.01}


class Asked(benchmark.Number):
    """Remembers what it was asked, and may be held up."""

    def __init__(self, version: str = "1"):
        self.version = version
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()

    def score(self, answers):
        self.batches.append([answer.prompt for answer in answers])
        assert self.free.wait(30)
        return [None if answer.prompt == "unknown" else 1.0 + float(answer.prompt) for answer in answers]


@contextlib.contextmanager
def served(
    reward: object, address: Path, limits: ServiceLimits | None = None, wrapped=lambda app: app
) -> Iterator[str]:
    app = wrapped(RewardService({"number": reward}, TOKEN, limits).app)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        write_private(address, json.dumps({"url": url, "token": TOKEN}))
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def remote(address: Path, **limits) -> RemoteReward:
    return RemoteReward("number", str(address), batch_size=3, start_seconds=60, limits=QUICK | limits)


def patient() -> httpx.Client:
    """httpx by itself waits 5 seconds for a reply, which a slow machine may need longer for."""
    return httpx.Client(timeout=300)


def numbered(count: int) -> list[Answer]:
    return [Answer("t2i", str(index), images=[PICTURE, None], fields={"n": index}) for index in range(count)]


def test_answers_travel_unchanged():
    answer = Answer("x2i", "Größe", [PICTURE], [None, PICTURE], "text", False, {"scenes": [[{"row": 1}]], "half": 0.5})
    record = json.loads(json.dumps(encoded(answer)))
    back = decoded(record)
    assert np.array_equal(back.images[1], PICTURE)
    assert np.array_equal(back.prompt_images[0], PICTURE)
    assert (back.images[0], back.fields, back.finished, back.prompt) == (None, answer.fields, False, "Größe")
    assert encoded(back)["id"] == record["id"]


def png_without_palette() -> str:
    """Pillow meets an assertion of its own where such a picture has transparency."""
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3] * 256)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    data = buffer.getvalue()
    start = data.index(b"PLTE") - 4
    return base64.b64encode(data[:start] + data[start + 12 + int.from_bytes(data[start : start + 4], "big") :]).decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: record | {"task": None},
        lambda record: record | {"fields": []},
        lambda record: record | {"text": "another"},  # the id is not its own
        lambda record: record | {"images": ["no base64!"]},
        lambda record: record | {"images": ["R0lGODlhAQABAAAAACw="]},  # a GIF
        lambda record: record | {"images": [png_without_palette()]},
    ],
)
def test_what_is_no_answer_is_refused(change):
    record = encoded(Answer("t2i", images=[PICTURE]))
    changed = change(record)
    if isinstance(changed, dict) and changed["images"] != record["images"]:
        from model.durable import fingerprint_of

        changed["id"] = fingerprint_of({name: value for name, value in changed.items() if name != "id"})
    with pytest.raises(WireError):
        decoded(changed)


def test_a_request_unfolds_to_so_many_pixels_and_no_more():
    record, budget = encoded(Answer("t2i", images=[PICTURE])), PixelBudget(left=PICTURE.size // 3)
    assert decoded(record, budget).images[0].shape == PICTURE.shape
    with pytest.raises(WireError, match="more than"):
        decoded(record, budget)


def test_scores_in_order_batched_and_asked_once(tmp_path):
    reward = Asked()
    with served(reward, tmp_path / "address", ServiceLimits(max_batch=4, max_wait_seconds=0.2)):
        client = remote(tmp_path / "address")
        assert client.version == "1"
        assert client.score(numbered(10)) == [1.0 + index for index in range(10)]
        assert client.score(numbered(10)[::-1]) == [10.0 - index for index in range(10)]
        unknown = [Answer("t2i", "unknown"), *numbered(1)]
        assert client.score(unknown) == [None, 1.0]
    assert max(map(len, reward.batches)) > 1
    assert max(map(len, reward.batches)) <= 4
    asked = [prompt for batch in reward.batches for prompt in batch]
    assert sorted(prompt for prompt in asked if prompt != "unknown") == sorted(map(str, range(10)))
    assert asked.count("unknown") == 4  # a failure is not kept: every try asked again
    client.policy = replace(client.policy, deadline_seconds=0.3)
    assert client.score(numbered(1)) == [None]  # nobody is there


def test_replies_gone_wrong_cost_tries_and_no_score(tmp_path):
    unreliable = []

    def wrapped(app):
        unreliable.append(benchmark.Unreliable(app, share=0.3))
        return unreliable[0]

    with served(benchmark.Number(), tmp_path / "address", wrapped=wrapped):
        client = remote(tmp_path / "address", tries=30, deadline_seconds=100.0, parallel=16)
        assert client.score(numbered(120)) == [1.0 + index for index in range(120)], client.faults
    assert unreliable[0].number >= len(benchmark.Unreliable.KINDS)
    assert client.faults.total() >= unreliable[0].number


def test_a_service_that_only_fails_gives_missing_scores_in_time(tmp_path):
    with served(benchmark.Number(), tmp_path / "address", wrapped=lambda app: benchmark.Unreliable(app, share=1.0)):
        client = remote(tmp_path / "address", try_seconds=0.5, deadline_seconds=1.5, tries=100)
        assert client.score(numbered(24)) == [None] * 24


def test_a_service_that_dies_and_returns_elsewhere_is_found(tmp_path):
    address = tmp_path / "address"
    with served(Asked(), address):
        client = remote(address, tries=1, deadline_seconds=60)
    results = []
    waiting = threading.Thread(target=lambda: results.append(client.score(numbered(5))))
    waiting.start()
    with served(Asked(), address):
        waiting.join(60)
    assert results == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    with served(Asked(version="2"), address):
        assert client.score(numbered(1)) == [None]
    assert client.faults["version '2' instead of '1'"]


def test_a_scorer_that_hangs_holds_up_nobody(tmp_path):
    reward = Asked()
    with served(reward, tmp_path / "address", ServiceLimits(max_batch=1, max_waiting=2)) as url, patient() as client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        reward.free.clear()
        body = {"reward": "number", "deadline_seconds": 0.3, "answers": [encoded(numbered(1)[0])]}
        reply = client.post(f"{url}/score", json=body, headers=headers)
        assert reply.json()["scores"][0] | {"id": ""} == {"id": "", "score": None, "fault": "deadline"}
        many = body | {"answers": [encoded(answer) for answer in numbered(9)]}
        assert client.post(f"{url}/score", json=many, headers=headers).status_code == 429
        reward.free.set()
        assert remote(tmp_path / "address", tries=50).score(numbered(9)) == [1.0 + index for index in range(9)]


def test_requests_without_token_or_sense_are_refused(tmp_path):
    with served(Asked(), tmp_path / "address", ServiceLimits(max_request_bytes=2000)) as url, patient() as client:
        good = {"reward": "number", "deadline_seconds": 1, "answers": []}
        for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer wrong"}):
            assert client.post(f"{url}/score", json=good, headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        for long in ({}, {"deadline_seconds": 10**400}):
            reply = client.post(f"{url}/score", json=good | long, headers=headers)
            assert reply.json() == {"version": "1", "scores": []}
        bodies: list[tuple[object, int]] = [
            (good | {"reward": "another"}, 404),
            (good | {"reward": ["number"]}, 404),
            (good | {"deadline_seconds": 0}, 400),
            (good | {"deadline_seconds": True}, 400),
            (good | {"answers": 3}, 400),
            (good | {"answers": [{"id": "x"}]}, 400),
            (good | {"reward": "x" * 3000}, 413),
            ([], 400),
        ]
        for body, status in bodies:
            reply = client.post(f"{url}/score", json=body, headers=headers)
            assert (reply.status_code, bool(reply.json()["error"])) == (status, True)
        assert client.post(f"{url}/score", content=b"\x80\x04pickle", headers=headers).status_code == 400
        counts = client.get(f"{url}/counts", headers=headers).json()
        assert (counts["refused"], counts["status 400"], counts["status 404"]) == (3, 6, 2)
    (tmp_path / "address").write_text("{}")
    with pytest.raises(UserError, match="does not answer"):
        RemoteReward("number", str(tmp_path / "address"), start_seconds=0.3, limits={"backoff_seconds": 0.01})


def test_a_token_file_of_other_bytes_is_told(tmp_path):
    (tmp_path / "token").write_bytes(b"\xc1" * 20)
    with pytest.raises(UserError, match="token cannot be read"):
        read_token(tmp_path / "token")


def test_beyond_loopback_a_token_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="needs a token of yours"):
        serve({}, "0.0.0.0", 0, tmp_path / "address", None, ServiceLimits())
    (tmp_path / "token").write_text("short")
    with pytest.raises(UserError, match="at least 16"):
        serve({}, "127.0.0.1", 0, tmp_path / "address", tmp_path / "token", ServiceLimits())


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    address = tmp_path / "run" / "rewards.json"
    command = [sys.executable, "-m", "launch.command_line.cli", "rewards", "serve", f"address={address}"]
    command += ["signals.looks.path=rule_aesthetic"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        client = RemoteReward("looks", str(address), start_seconds=120)
        assert client.score([Answer("t2i", images=[PICTURE])])[0] > 0.5
        assert stat.S_IMODE(address.stat().st_mode) == 0o600
        with pytest.raises(UserError, match="does not serve 'other'"):
            RemoteReward("other", str(address))
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "looks: 1" in stdout, stderr
    assert not address.exists()
