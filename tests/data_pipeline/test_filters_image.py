"""Pictures: decoding, resizing; quality filters."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import math
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipeline.documents.builder import Text
from data_pipeline.filters.base import FilterChain, FilterConfig, make_filter
from data_pipeline.kinds.base import Pixels, PreparedSample
from data_pipeline.sources import SampleError
from data_pipeline.sources.image import ImageConfig, decode_image, fit_size, released_size, smart_resize
from data_pipeline.storage.segments import Kind
from model.errors import Problems, UserError


def photo(name: str) -> bytes:
    specification = importlib.util.find_spec("skimage")
    assert specification is not None
    assert specification.origin is not None
    return (Path(specification.origin).parent / "data" / name).read_bytes()


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_the_demos_sizes() -> None:
    assert fit_size(96, 96, factor=8, max_area=2304) == (48, 48)
    assert fit_size(96, 96, factor=8, max_area=576) == (24, 24)


def test_published_area_gives_the_published_grid() -> None:
    assert fit_size(2000, 2000, factor=16, max_area=1024 * 1024) == (1024, 1024)


def test_small_pictures_are_not_enlarged_unless_asked() -> None:
    assert fit_size(40, 24, factor=8, max_area=10**6) == (40, 24)
    assert fit_size(40, 40, factor=8, max_area=10**6, min_area=6400) == (80, 80)
    assert fit_size(3, 3, factor=8, max_area=10**6) == (8, 8)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([1, 8, 16]),
    max_tokens=st.integers(1, 5000),
)
def test_sizes_keep_area_and_aspect(height: int, width: int, factor: int, max_tokens: int) -> None:
    max_area = max_tokens * factor**2
    rows, columns = fit_size(height, width, factor=factor, max_area=max_area)
    assert rows % factor == 0 == columns % factor
    assert rows * columns <= max_area
    if min(height, width) >= 2 * factor:  # never enlarged beyond rounding to the nearest token
        assert rows <= height + factor / 2
        assert columns <= width + factor / 2
    if min(rows, columns) >= 8 * factor:
        assert (rows / columns) / (height / width) == pytest.approx(1, abs=0.2)


def test_real_photos_are_decoded_and_resized() -> None:
    pixels = decode_image(photo("astronaut.png"))
    assert pixels.shape == (512, 512, 3)
    assert pixels.dtype == np.uint8
    resized = smart_resize(pixels, ImageConfig(max_area=2304), 8)
    assert resized.shape == (48, 48, 3)
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resized, expected)
    assert decode_image(photo("rocket.jpg")).shape == (427, 640, 3)


def test_modes_other_than_rgb_become_rgb() -> None:
    grey = decode_image(photo("camera.png"))
    assert grey.shape == (512, 512, 3)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encode(clear, "png")) == 255).all()  # transparent: white
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
    assert (decode_image(encode(palette, "png")) == (10, 200, 30)).all()
    assert decode_image(encode(Image.new("CMYK", (4, 4)), "jpeg")).shape == (4, 4, 3)


def test_the_cameras_orientation_is_applied() -> None:
    picture = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(encode(picture, "jpeg", exif=exif)).shape == (4, 2, 3)


def test_pictures_of_the_right_size_are_left_alone() -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    assert smart_resize(pixels, ImageConfig(max_area=2304), 8) is pixels


@pytest.mark.parametrize("kept", [0, 10, 300, 5000])
def test_corrupt_pictures_are_named(kept: int) -> None:
    for name in ("rocket.jpg", "coffee.png"):
        with pytest.raises(SampleError) as caught:
            decode_image(photo(name)[:kept])
        assert caught.value.reason == "corrupt_image"


def test_flipped_bytes_never_raise_anything_else() -> None:
    for kind in ("png", "jpeg", "webp"):
        content = encode(Image.fromarray(decode_image(photo("rocket.jpg"))[:64, :64]), kind)
        rng = np.random.default_rng(0)
        for _ in range(60):
            damaged = bytearray(content)
            for position in rng.integers(0, len(damaged), 5):
                damaged[position] = rng.integers(256)
            with contextlib.suppress(SampleError):
                decode_image(bytes(damaged))


def test_decompression_bombs_are_refused() -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)), "png")
    assert len(bomb) < 200_000
    with pytest.raises(SampleError) as caught:
        decode_image(bomb)
    assert caught.value.reason == "image_too_large"


def prepared(*parts: Text | Pixels) -> PreparedSample:
    return PreparedSample("key", "image_text", list(parts))


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
WIDE = Pixels(NOISE, (100, 400))
BLANK = Pixels(np.full((8, 8, 3), (9, 99, 199), np.uint8), (64, 64))


def score(name: str, sample: PreparedSample) -> float | None:
    return make_filter(name).score(sample)


def test_scores() -> None:
    both = prepared(Text("four"), WIDE, BLANK, Text("你好"))
    assert score("min_size", both) == 64
    assert score("aspect_ratio", both) == 4
    assert score("blank_image", both) == 0
    assert score("blank_image", prepared(WIDE)) > 50  # type: ignore[operator]
    assert score("text_length", both) == 6
    for name in ("min_size", "aspect_ratio", "blank_image"):
        assert score(name, prepared(Text("no picture"))) is None


RAMP = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3 + 20, 3, axis=2).repeat(64, axis=0)
SHIFTED = np.roll(RAMP, 32, axis=1)


def film(*parts: Text | Pixels) -> PreparedSample:
    return PreparedSample("key", "video_interleaved", list(parts))


def test_scores_of_pictures_and_films() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)))
    assert score("sharpness", prepared(Pixels(noise, (64, 64)))) > 100 * score(
        "sharpness", prepared(Pixels(blurred, (64, 64)))
    )  # type: ignore[operator]
    assert score("sharpness", prepared(Pixels(noise[:2], (2, 64)))) == 0
    half = noise.copy() // 2 + 50
    half[:32] = 255
    assert score("clipped_share", prepared(Pixels(half, (64, 64)))) == 0.5
    frames = [Pixels(RAMP, (64, 64)), Pixels(RAMP + 1, (64, 64), 4000), Pixels(SHIFTED, (64, 64), 9000)]
    speech = [Text("hello", Kind.TRANSCRIPT, 1500)]
    talk = film(frames[0], *speech, *frames[1:])
    assert score("repeated_frames", talk) == 0.5
    assert score("duration", talk) == 9.0
    assert score("speechless_share", talk) == pytest.approx(2 / 3)
    for name in ("repeated_frames", "duration", "speechless_share"):
        assert score(name, prepared(*talk.parts)) is None or name == "speechless_share"
    assert score("speechless_share", film(*frames)) is None


def test_scores_of_texts() -> None:
    sentence = "one two three four five six seven eight nine ten "
    assert score("repeated_text", prepared(Text(sentence * 4))) == pytest.approx(0.75)
    assert score("repeated_text", prepared(Text(sentence))) == 0
    chinese = "红色的圆形在左上角它向右移动然后变成蓝色最后消失"
    assert score("repeated_text", prepared(Text(chinese * 2))) == pytest.approx(20 / 48)
    assert score("letter_share", prepared(Text("ab é 1!"))) == pytest.approx(3 / 5)
    english = Text("The cat sat on the mat and looked out of the window at the rain.")
    assert score("language", prepared(english)) > 0.9  # type: ignore[operator]
    assert make_filter("language", {"languages": ["fr"]}).score(prepared(english)) < 0.1  # type: ignore[operator]
    assert score("language", prepared(WIDE)) is None


def test_text_in_a_picture_is_found_by_a_real_reader() -> None:
    page = Image.new("RGB", (320, 160), "white")
    ImageDraw.Draw(page).text((20, 50), "SALE TODAY", fill="black", font=ImageFont.load_default(40))
    printed = score("printed_share", prepared(Pixels(np.asarray(page), (160, 320))))
    assert 0.1 < printed < 0.5  # type: ignore[operator]
    assert score("printed_share", prepared(Pixels(decode_image(photo("chelsea.png")), (300, 451)))) < 0.03  # type: ignore[operator]


def test_a_scorer_elsewhere_is_asked_in_batches_and_again_when_it_fails() -> None:
    replies: list[tuple[int, object]] = [(503, {}), (200, {"scores": [1]}), (200, {"scores": [0.2, None, 0.9]})]
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, reply = replies.pop(0) if replies else (200, {"scores": [0.5]})
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {"url": f"http://127.0.0.1:{server.server_port}", "batch_size": 3, "wait_seconds": 0.0, "label": "beauty"}
    chain = FilterChain(
        [
            FilterConfig("min_size", minimum=10),
            FilterConfig("http_scorer", minimum=0.3, options=options),
            FilterConfig("text_length", maximum=5),
        ]
    )
    texts = ["a", "b", "too long", "d"]
    samples = [PreparedSample(text, "image_text", [Text(text), WIDE]) for text in texts]
    refused = chain.check_batch(samples)
    server.shutdown()
    assert [one and one.reason for one in refused] == ["filter_beauty", None, "filter_text_length", None]
    assert [len(one["samples"]) for one in asked] == [3, 3, 3, 1]
    first = asked[0]["samples"][0]
    assert (first["key"], first["kind"], first["texts"]) == ("a", "image_text", ["a"])
    assert Image.open(io.BytesIO(base64.b64decode(first["pictures"][0]))).size == (8, 8)
    records = [json.loads(line) for line in chain.record.lines()]
    assert [(one["filter"], one["asked"], one["refused"]) for one in records] == [
        ("beauty", 3, 1),
        ("text_length", 3, 1),
    ]
    server.server_close()
    with pytest.raises(UserError, match="does not answer"):
        make_filter("http_scorer", options | {"attempts": 2}).score(samples[0])
    for wrong in ({"url": "host"}, {"adress": "http://host"}):
        with pytest.raises(UserError, match=r"URL|options that the filter does not take"):
            make_filter("http_scorer", wrong)


def test_those_nearest_to_a_bound_are_kept_to_be_looked_at() -> None:
    chain = FilterChain([FilterConfig("text_length", minimum=10, maximum=20)])
    for length in range(1, 31):
        with contextlib.suppress(SampleError):
            chain.check(PreparedSample(str(length), "image_text", [Text("x" * length), WIDE]))
    (line,) = chain.record.lines()
    record = json.loads(line)
    assert (record["asked"], record["refused"]) == (30, 19)
    assert sorted(int(one["key"]) for one in record["nearest_kept"]) == [10, 11, 19, 20]
    assert sorted(int(one["key"]) for one in record["nearest_refused"]) == [8, 9, 21, 22]
    assert Image.open(io.BytesIO(base64.b64decode(record["nearest_kept"][0]["thumbnail"]))).size == (8, 8)
    assert chain.record.lines() == []


def test_the_chain_names_the_filter_that_refuses() -> None:
    chain = FilterChain([FilterConfig("aspect_ratio", maximum=3.0), FilterConfig("blank_image", minimum=2.0)])
    chain.check(prepared(Pixels(NOISE, (100, 300))))
    chain.check(prepared(Text("no picture")))
    for picture, reason in ((WIDE, "filter_aspect_ratio"), (BLANK, "filter_blank_image")):
        with pytest.raises(SampleError) as caught:
            chain.check(prepared(picture))
        assert caught.value.reason == reason


def test_filter_configs_are_checked() -> None:
    problems = Problems()
    FilterConfig("beauty", minimum=1).validate(problems, "filters[0]")
    FilterConfig("min_size").validate(problems, "filters[1]")
    assert len(problems.found) == 2


def test_the_released_sizes_enlarge_too_and_may_pass_the_area() -> None:
    """3,000 sizes at the released area of 1,024 tokens, each held against the rule in exact numbers."""
    rng, excess = np.random.default_rng(0), 0.0
    for height, width in rng.integers(64, 4096, (3000, 2)).tolist():
        rows, columns = released_size(height, width, factor=16, area=512 * 512)
        ideal = [math.isqrt(512 * 512 * height // width), 0]  # whole pixels of the height
        ideal[1] = int(Fraction(ideal[0]) * width / height)
        for side, wanted in zip((rows, columns), ideal, strict=True):
            assert side % 16 == 0
            assert abs(side - max(16, wanted)) <= 9  # half a token, and a pixel of rounding in floating point
        excess = max(excess, rows * columns / 512**2 - 1) if max(height, width) <= 4 * min(height, width) else excess
    assert excess == 0.03125  # sides at most four times as long as the other
    assert released_size(48, 48, factor=16, area=512 * 512) == (512, 512)
    assert released_size(480, 640, factor=16, area=720 * 720) == (624, 832)
    assert released_size(1, 9999, factor=16, area=512 * 512)[0] == 16
    small = np.zeros((32, 48, 3), np.uint8)
    assert smart_resize(small, ImageConfig(max_area=96 * 96, resize="emu35"), 16).shape == (80, 112, 3)
    assert smart_resize(small, ImageConfig(max_area=96 * 96), 16).shape == (32, 48, 3)
