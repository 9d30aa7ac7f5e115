"""A server as it is started, over a checkpoint of fresh weights: against `generate`, against a browser, to its end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from browser import Browser
from handmade_vision import save_vision_tokenizer
from toy_inference import TEXT_SIZE, TEXTS

from data_pipeline.documents.tokenizers import train_sentencepiece
from launch.command_line import cli
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import initialize_weights

TOY = ["model=toy", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48"]
START_SECONDS = 240  # importing torch and megatron on a busy machine


@dataclass
class Running:
    process: subprocess.Popen[str]
    address: str
    keys: list[str]  # of `generate` for the same model


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    train_sentencepiece(TEXTS, folder / "text", TEXT_SIZE)
    (folder / "vision").mkdir()
    config = VisionTokenizerConfig(
        ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1, attn_resolutions=[6], resolution=48, z_channels=8, embed_dim=8,
        n_embed=512, norm_groups=4,
    )  # fmt: skip
    model = IBQ(config)
    initialize_weights(model, 0)
    save_vision_tokenizer(folder / "vision", model)
    assert cli.main(["convert", "init", *TOY, "seed=1", f"target={folder / 'fresh'}", "json=true"]) == 0
    keys = [f"checkpoint={folder / 'fresh'}", f"text_tokenizer={folder / 'text'}", "sampling.max_new_tokens=2000"]
    keys.append(f"vision_tokenizer={folder / 'vision'}")
    command = [sys.executable, "-m", "launch.command_line.cli", "serve", *keys, "image_size=16", "port=0", "json=true"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"nextstate: (http://\S+)", (folder / "log").read_text())):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    yield Running(process, found[1], keys)
    if process.poll() is None:
        process.kill()
    process.wait()


def test_a_page_draws_and_a_world_goes_on(running: Running, tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    try:
        browser.open(running.address)
        browser.run("get('prompt').value = 'a red circle'; get('size').value = '32x32'; get('seed').value = 4")
        browser.run("get('draw').requestSubmit()")
        browser.until("document.querySelector('#pictures figure[data-done]')")
        image = "document.querySelector('#pictures img')"
        assert browser.run(f"{image}.naturalWidth") == 32
        assert "seed 4, number 0: 17 forwards" in browser.run("get('pictures').textContent")
        drawn = base64.b64decode(browser.run(f"{image}.src").split(",")[1])
        browser.run(f"{image}.click(); get('words').value = 'it moves right'")
        for number in (1, 2):
            browser.run("get('roll').requestSubmit()")
            browser.until(f"document.querySelectorAll('#states figure[data-done]').length === {number}")
        assert browser.run("document.querySelectorAll('#states img').length") == 3
        assert browser.run("world.filter((part) => part.type === 'image_codes').length") == 2
        browser.run("get('prompt').value = 'a'; get('size').value = 'odd'; get('draw').requestSubmit()")
        browser.until("get('problem').textContent.includes('size must be')")
    finally:
        browser.close()
    answer = httpx.post(
        f"{running.address}/v1/images/generations",
        json={"prompt": "a red circle", "size": "32x32", "seed": 4},
        timeout=60,
    ).json()
    assert base64.b64decode(answer["data"][0]["b64_json"]) == drawn


def test_generate_draws_the_same(running: Running, tmp_path: Path) -> None:
    asked = {"prompt": "it moves right", "size": "16x24", "seed": 7, "n": 2}
    answer = httpx.post(f"{running.address}/v1/images/generations", json=asked, timeout=60).json()
    served = [entry["nextstate"]["ids"] for entry in answer["data"]]
    out = tmp_path / "out"
    line = ["generate", *running.keys, "prompt=it moves right", "image_size=[24,16]", "seed=7", "num=2", f"out={out}"]
    assert cli.main(line) == 0
    assert [entry["ids"] for entry in json.loads((out / "trace.json").read_text())["answers"]] == served
    assert (out / "000_1_0.png").read_bytes() == base64.b64decode(answer["data"][1]["b64_json"])


def test_whoever_goes_is_forgotten_and_the_server_ends_when_told(running: Running) -> None:
    host, port = running.address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "size": "320x320"}).encode()  # 1,600 tokens: seconds
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(running, 1)
    wait_for(running, 0)
    assert "nextstate_disconnects_total 1.0" in httpx.get(f"{running.address}/metrics", timeout=60).text
    running.process.send_signal(signal.SIGTERM)
    out, _ = running.process.communicate(timeout=60)
    assert running.process.returncode == 0
    answer = json.loads(out)
    assert answer["address"] == running.address
    assert answer["requests"] > 5


def wait_for(running: Running, num_waiting: int) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{running.address}/health", timeout=60).json()["answers_waiting"] != num_waiting:
        assert time.monotonic() < deadline, f"never {num_waiting} answers waiting"
        time.sleep(0.02)
