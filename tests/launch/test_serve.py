"""The server in one process, over a model without a network."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from toy_inference import TEXT_SIZE, TEXTS, GrayTokenizer, HashDecoder, toy_model

from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from launch.commands import serve
from launch.generation.scheduler import preview_number
from model.errors import UserError
from training.inference.observing import Rows
from training.inference.prompts import Prompt

DRAW, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
TOKEN = "a-token-of-enough-length"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXTS, folder, TEXT_SIZE)
    return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())


def app_of(tokenizer: SentencePieceTokenizer, token: str | None = None, decoder: Any = None, **values: Any) -> Any:
    config = serve.Config(checkpoint="somewhere", image_size=[16, 24], max_body_megabytes=1, **values)
    config.sampling.max_new_tokens = 1500
    config.max_source_pixels, config.max_request_pixels = 100_000, 300_000
    return serve.app_of(config, toy_model(tokenizer, decoder, max_images=2), token)


@pytest.fixture(scope="module")
def client(tokenizer: SentencePieceTokenizer) -> Iterator[TestClient]:
    with TestClient(app_of(tokenizer), base_url="http://127.0.0.1") as client:
        yield client


def png(seed: int = 0, height: int = 16, width: int = 24) -> bytes:
    codes = np.random.default_rng(seed).integers(0, 64, (1, height // 8, width // 8))
    buffer = io.BytesIO()
    Image.fromarray(GrayTokenizer().decode(codes)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.split(",")[-1]))))


def events(body: str) -> list[Any]:
    datas = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def test_pictures_are_those_of_generate(client: TestClient, tokenizer: SentencePieceTokenizer) -> None:
    answer = client.post(DRAW, json={"prompt": TEXTS[0], "n": 2, "seed": 5, "size": "24x16", "temperature": 0.8})
    assert answer.status_code == 200, answer.text
    model, sampling = toy_model(tokenizer), serve.Config().sampling
    sampling.image.temperature = 0.8
    expected = model.generate([Prompt("t2i", TEXTS[0], image_size=(16, 24))] * 2, sampling, seed=5)
    for index, (entry, output) in enumerate(zip(answer.json()["data"], expected, strict=True)):
        assert np.array_equal(pixels(entry["b64_json"]), output.images[0])
        assert entry["nextstate"]["ids"] == output.tokens.tolist()
        assert (entry["nextstate"]["seed"], entry["nextstate"]["index"]) == (5, index)
    # Without a seed every answer has a number of its own.
    alone = [client.post(DRAW, json={"prompt": "a"}).json()["data"][0]["nextstate"] for _ in range(2)]
    assert alone[0]["index"] != alone[1]["index"]
    assert alone[0]["ids"] != alone[1]["ids"]


def test_a_picture_is_watched_while_it_is_drawn(client: TestClient) -> None:
    body = {"prompt": "a", "seed": 1, "size": "16x64", "partial_images": 3, "stream": True}
    answer = client.post(DRAW, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *partial, last = events(answer.text)
    assert [one["type"] for one in partial] == ["image_generation.partial_image"] * 3
    assert [one["rows"] for one in partial] == [2, 4, 6]
    whole = pixels(last["b64_json"])
    assert whole.shape == (64, 16, 3)
    for one in partial:
        assert np.array_equal(pixels(one["b64_json"]), whole[: one["rows"] * 8])
    body = {"prompt": "a", "seed": 1, "size": "16x64"}
    assert client.post(DRAW, json=body).json()["data"][0]["b64_json"] == last["b64_json"]


@pytest.mark.parametrize(("rows", "wanted"), [(2, 3), (7, 3), (64, 16), (5, 1)])
def test_previews_are_spread_over_the_rows(rows: int, wanted: int) -> None:
    grids = [Rows(np.zeros((number, 1), np.int64), (rows, 1)) for number in range(1, rows + 1)]
    found = [number for one in grids if (number := preview_number(one, wanted)) is not None]
    assert found == sorted(set(found))
    assert len(found) == min(wanted, rows - 1) or rows <= wanted
    assert all(0 <= number < wanted for number in found)


def test_edits_come_as_forms_and_as_json(client: TestClient) -> None:
    settings = {"prompt": "make it blue", "seed": "3", "top_k": "40"}
    pictures = [("image[]", ("a.png", png(1), "image/png")), ("image[]", ("b.png", png(2), "image/png"))]
    form = client.post(EDIT, data=settings, files=pictures)
    assert form.status_code == 200, form.text
    body = {"prompt": "make it blue", "seed": 3, "top_k": 40}
    body["images"] = [{"image_url": url(png(1))}, {"image_url": url(png(2))}]
    again = client.post(EDIT, json=body)
    assert again.json()["data"][0]["b64_json"] == form.json()["data"][0]["b64_json"]
    body["images"] = body["images"][::-1]
    assert client.post(EDIT, json=body).json()["data"][0]["b64_json"] != form.json()["data"][0]["b64_json"]


def test_a_chat_streams_text_and_pictures_in_order(client: TestClient) -> None:
    content = [{"type": "text", "text": "how?"}, {"type": "image_url", "image_url": {"url": url(png())}}]
    body = {"messages": [{"role": "user", "content": content}], "format": "story", "seed": 8, "max_tokens": 55}
    plain = client.post(CHAT, json=body).json()
    message = plain["choices"][0]["message"]
    *chunks, done = events(client.post(CHAT, json=body | {"stream": True}).text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert [one for delta in deltas for one in delta.get("images", [])] == message["images"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert plain["usage"]["completion_tokens"] <= 55
    assert plain["nextstate"]["ids"] == chunks[-1]["nextstate"]["ids"]


def test_a_world_goes_on_from_codes_without_loss(client: TestClient, tokenizer: SentencePieceTokenizer) -> None:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(png())}}]
    body = {"messages": [{"role": "user", "content": content}], "format": "interleaved", "states": 1, "words": ["up"]}
    first = client.post(CHAT, json=body).json()
    (picture,) = first["choices"][0]["message"]["images"]
    content += [{"type": "text", "text": "up"}, {"type": "image_codes", "codes": picture["codes"]}]
    second = client.post(CHAT, json=body | {"messages": [{"role": "user", "content": content}]}).json()
    # The next prompt is the last one, its words and what was generated: nothing is encoded again.
    said = len(tokenizer.encode("up"))
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + said + len(first["nextstate"]["ids"])
    assert second["choices"][0]["finish_reason"] == "stop"


def claims(width: int, height: int) -> bytes:
    import zlib

    whole = png()
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + whole[24:29]
    return whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]


def user(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (DRAW, "{", 400, "the body is not JSON"),
        (DRAW, "[" * 200_000, 400, "the body is not JSON"),
        (DRAW, "9" * 5000, 400, "the body is not JSON"),
        (DRAW, "[]", 400, "not a JSON object"),
        (DRAW, '{"prompt": "a", "temperature": NaN}', 400, "NaN is no JSON number"),
        (DRAW, '{"prompt": "a", "temperature": 1e999}', 400, "temperature must be a number"),
        (DRAW, "{}", 400, "prompt must be a string"),
        (DRAW, '{"prompt": "\\ud83d"}', 400, "half of a surrogate pair"),
        (DRAW, '{"prompt": "a", "\\udc00": 1}', 400, "half of a surrogate pair"),
        (DRAW, {"prompt": "a", "n": 11}, 400, "n must be a whole number in [1, 10]"),
        (DRAW, {"prompt": "a", "n": True}, 400, "n must be a whole number"),
        (DRAW, {"prompt": "a", "seed": -1}, 400, "seed must be"),
        (DRAW, {"prompt": "a", "nn": 1}, 400, "unknown field 'nn'"),
        (DRAW, {"prompt": "a", "model": "gpt"}, 404, "there is no model 'gpt'"),
        (DRAW, {"prompt": "a", "response_format": "url"}, 400, "response_format must be one of b64_json"),
        (DRAW, {"prompt": "a", "size": "big"}, 400, "size must be"),
        (DRAW, {"prompt": "a", "size": 5}, 400, "size must be"),
        (DRAW, {"prompt": "a", "size": "20x16"}, 400, "not a whole number of visual tokens"),
        (DRAW, {"prompt": "a", "size": "8x99992"}, 400, "outside of what the model is asked for"),
        (DRAW, {"prompt": "word " * 3000}, 400, "leaves no room"),
        (DRAW, "x" * 1_100_000, 413, "larger than 1,048,576 bytes"),
        (EDIT, {"prompt": "a"}, 400, "1 to 16 pictures are edited, got 0"),
        (EDIT, {"prompt": "a", "images": [{"image_url": "https://example.org/a.png"}]}, 400, "must be a data URL"),
        (EDIT, {"prompt": "a", "images": [{"image_url": "data:image/png;base64,*"}]}, 400, "not base64"),
        (EDIT, {"prompt": "a", "images": [{"image_url": url(png()[:40])}]}, 400, "corrupt_image"),
        (EDIT, {"prompt": "a", "images": [{"image_url": url(claims(400, 400))}]}, 400, "image_too_large"),
        (EDIT, {"prompt": "a", "images": [{"image_url": url(b"%!PS-Adobe-3.0 EPSF-3.0\n")}]}, 400, "corrupt_image"),
        (EDIT, {"prompt": "a", "images": [{"image_url": url(png(0, 296, 296))}] * 4}, 400, "at most 37,152 pixels"),
        (CHAT, user(*[{"type": "image_url", "image_url": url(png(0, 296, 296))}] * 4), 400, "at most 37,152 pixels"),
        (CHAT, {"messages": []}, 400, "messages must be a list"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "answers one message of the user"),
        (CHAT, user({"type": "video"}), 400, "a part of a message is"),
        (CHAT, user({"type": "image_codes", "codes": [[1], [1, 2]]}), 400, "codes must be rows of one length"),
        (CHAT, user({"type": "image_codes", "codes": [[64]]}), 400, "codes below 64"),
        (CHAT, user({"type": "text", "text": ""}), 400, "the messages say nothing"),
        (CHAT, user({"type": "text", "text": "a"}) | {"format": "poem"}, 400, "format must be one of"),
        (CHAT, user({"type": "text", "text": "a"}) | {"states": 3}, 400, "states are rolled on with"),
        (
            CHAT,
            user({"type": "text", "text": "a"}) | {"format": "interleaved", "states": 200},
            400,
            "no room for 200 states",
        ),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
    ],
)
def test_bad_requests_are_told_and_nothing_more(
    client: TestClient, path: str, body: Any, status: int, message: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert client.get("/health").json()["answers_waiting"] == 0


def test_other_sites_and_strangers_are_kept_out(client: TestClient, tokenizer: SentencePieceTokenizer) -> None:
    body = {"prompt": "a"}
    assert client.post(DRAW, content=json.dumps(body), headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(DRAW, json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post(DRAW, json=body, headers={"Origin": "http://127.0.0.1"}).status_code == 200
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    with TestClient(app_of(tokenizer, TOKEN)) as guarded:  # no lifespan of the other one is touched
        url_of_loopback = "http://127.0.0.1"
        assert guarded.get(f"{url_of_loopback}/health").status_code == 200
        assert guarded.get(f"{url_of_loopback}/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = guarded.post(f"{url_of_loopback}{DRAW}", json=body, headers=headers)
            assert answer.status_code == 401
            assert guarded.get(f"{url_of_loopback}/metrics", headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert guarded.post(f"{url_of_loopback}{DRAW}", json=body, headers=headers).status_code == 200


def together(app: Any, bodies: list[dict[str, Any]]) -> tuple[list[httpx.Response], str, dict[str, Any]]:
    """Answers to requests that are all sent at once, and what the server says of itself afterwards."""

    async def ask() -> tuple[list[httpx.Response], str, dict[str, Any]]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
        ):
            answers = await asyncio.gather(*(client.post(DRAW, json=body) for body in bodies))
            return list(answers), (await client.get("/metrics")).text, (await client.get("/health")).json()

    return asyncio.run(ask())


def test_a_hundred_at_once(tokenizer: SentencePieceTokenizer) -> None:
    """Some are answered, in batches; the others are told to come back; nothing is left behind."""
    asked = [{"prompt": TEXTS[index % 3], "size": "16x8"} for index in range(100)]
    answers, metrics, health = together(app_of(tokenizer, max_waiting=24), asked)
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 24
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)
    assert health == {"status": "ok", "model": "nextstate", "answers_waiting": 0}
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values['nextstate_requests_total{path="/v1/images/generations",status="200"}']) == codes.count(200)
    assert float(values["nextstate_batch_size_sum"]) == codes.count(200)
    assert float(values["nextstate_batch_size_count"]) < codes.count(200) / 2, "they were answered together"
    assert float(values["nextstate_generated_pictures_total"]) == codes.count(200)


def test_an_answer_does_not_depend_on_its_company(tokenizer: SentencePieceTokenizer, client: TestClient) -> None:
    asked = [
        {"prompt": "a", "size": size, "seed": seed, "temperature": temperature, "guidance_scale": guidance}
        for size, seed, temperature, guidance in [
            ("32x16", 1, 1.0, 1),
            ("32x16", 2, 1.0, 1),
            ("32x16", 1, 0.3, 1),
            ("16x32", 1, 1.0, 1),
            ("32x16", 1, 1.0, 3),
        ]
    ] * 2
    answers, _, _ = together(app_of(tokenizer), asked)
    ids = [answer.json()["data"][0]["nextstate"]["ids"] for answer in answers]
    alone = [client.post(DRAW, json=body).json()["data"][0]["nextstate"]["ids"] for body in asked[:5]]
    assert ids == alone * 2
    assert len({tuple(one) for one in alone}) == 5


class CountingDecoder(HashDecoder):
    """Counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0

    def step(self, ids: Any, advances: Any = None, columns: Any = None) -> Any:
        self.num_steps += 1
        return super().step(ids, advances, columns)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(tokenizer: SentencePieceTokenizer, stream: bool) -> None:
    decoder = CountingDecoder()
    app = app_of(tokenizer, decoder=decoder, max_waiting=1)

    async def ask() -> tuple[int, str]:
        async with app.router.lifespan_context(app):
            body = json.dumps({"prompt": "a", "size": "8x4800", "stream": stream, "partial_images": 16}).encode()
            sent: list[Any] = []
            gone = asyncio.Event()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
            scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
            scope |= {"method": "POST", "scheme": "http", "path": DRAW, "raw_path": DRAW.encode(), "query_string": b""}
            running = asyncio.create_task(app(scope | {"headers": headers, "root_path": ""}, receive, send))
            while decoder.num_steps < 20 and not running.done():
                await asyncio.sleep(0.01)
            gone.set()
            await asyncio.wait_for(running, 20)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                after = await client.post(DRAW, json={"prompt": "a", "size": "16x8"})  # the one place is free again
                return after.status_code, (await client.get("/metrics")).text

    status, metrics = asyncio.run(ask())
    assert status == 200
    assert "nextstate_disconnects_total 1.0" in metrics
    assert decoder.num_steps < 600, "the picture of 600 rows was given up"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "checkpoint: is required"),
        ({"checkpoint": "c", "host": "0.0.0.0"}, "token_file: is required when others can reach"),
        ({"checkpoint": "c", "port": 70000}, "port: must be in"),
        ({"checkpoint": "c", "format": "poem"}, "unknown format 'poem'"),
        ({"checkpoint": "c", "max_waiting": 0}, "max_waiting: must be positive"),
        ({"checkpoint": "c", "token_file": "nowhere"}, "the token cannot be read"),
        ({"checkpoint": "c", "token_file": "short"}, "too short"),
    ],
)
def test_settings_that_do_not_serve(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("abc")
    with pytest.raises(UserError, match=message):
        serve.run(serve.Config(**values))
