"""Interleaved documents: the order of the page, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.documents.builder import Text
from data_pipeline.kinds.base import MediaDecoder
from data_pipeline.kinds.registry import KindSet, read_shard
from data_pipeline.sources import BadSample, Sample, SampleError
from data_pipeline.sources.image import ImageConfig
from data_pipeline.video.keyframes import VideoConfig

DECODER = MediaDecoder(ImageConfig(), VideoConfig(), 8)


def png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(stream, "png")
    return stream.getvalue()


def read(metadata: Any, num_images: int) -> list[str | int]:
    """Texts and the grey of pictures; picture n is of grey 10 n."""
    kinds = KindSet()
    parts = {f"picture_{number}.png": png(10 * number) for number in range(num_images)}
    sample = kinds.sample("key", {**parts, "json": json.dumps(metadata).encode()})
    assert sample.kind == "interleaved"
    prepared = kinds[sample.kind].prepare(sample, DECODER)
    return [part.text if isinstance(part, Text) else int(part.pixels[0, 0, 0]) for part in prepared]


def test_the_two_layouts() -> None:
    obelics = {"texts": ["first", None, None, "second ", None], "images": [None, "a.jpg", "b.jpg", None, "c.jpg"]}
    assert read(obelics, 3) == ["first", 0, 10, "second", 20]
    info = [{"matched_text_index": 2}, {"matched_text_index": 0, "image_name": "x.png"}, {"matched_text_index": 2}]
    mmc4 = {"text_list": ["One.", "Two.", "Three.", "", "Four."], "image_info": info}
    assert read(mmc4, 3) == [10, "One. Two.", 0, 20, "Three. Four."]


@settings(max_examples=25, deadline=None)
@given(page=st.lists(st.booleans(), min_size=1, max_size=14))
def test_the_order_of_any_page_is_kept(page: list[bool]) -> None:
    """More than ten pictures: picture_10 comes behind picture_9."""
    metadata = {
        "texts": [None if picture else f"t{place}" for place, picture in enumerate(page)],
        "images": ["x" if picture else None for picture in page],
    }
    if all(page) or not any(page):
        with pytest.raises(SampleError, match=r"empty_text|no_messages"):
            read(metadata, sum(page))
        return
    flat = [word for item in read(metadata, sum(page)) for word in (item.split() if isinstance(item, str) else [item])]
    numbers = iter(range(sum(page)))
    assert flat == [10 * next(numbers) if picture else f"t{place}" for place, picture in enumerate(page)]


@pytest.mark.parametrize(
    ("metadata", "num_images", "reason"),
    [
        ({}, 1, "bad_metadata"),
        ({"texts": ["a", None], "images": [None, "x"]}, 2, "missing_image"),
        ({"texts": ["a", None, None], "images": [None, "x", "y"]}, 1, "missing_image"),
        ({"texts": ["a", "b"], "images": [None, "x"]}, 1, "bad_metadata"),
        ({"texts": ["a"], "images": [None, "x"]}, 1, "bad_metadata"),
        ({"texts": [7, None], "images": [None, "x"]}, 1, "bad_metadata"),
        ({"texts": "a", "images": [None]}, 1, "bad_metadata"),
        ({"texts": ["\ud83d", None], "images": [None, "x"]}, 1, "corrupt_text"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 1}]}, 1, "bad_metadata"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x"}]}, 1, "bad_metadata"),
        ({"text_list": [" "], "image_info": [{"matched_text_index": 0}]}, 1, "empty_text"),
    ],
)
def test_what_does_not_fit_together_is_named(metadata: Any, num_images: int, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        read(metadata, num_images)
    assert caught.value.reason == reason


def test_a_shard_of_them(tmp_path: Path) -> None:
    page = json.dumps({"texts": ["a", None], "images": [None, "x"]}).encode()
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "page", "picture_0.png": png(1), "json": page})
        writer.write({"__key__": "lost", "json": page})
    page_sample, lost = read_shard(tmp_path / "0.tar")
    assert isinstance(page_sample, Sample)
    assert list(KindSet()["interleaved"].texts(page_sample)) == ["a"]
    assert isinstance(lost, BadSample)
    assert lost.reason == "no_messages"
