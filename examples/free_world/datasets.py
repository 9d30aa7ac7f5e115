"""The datasets of the free world's curriculum, as samples of a webdataset (file extension -> content)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from examples.free_world.bodies import MAX_BODIES, Ground, Scene, draw, random_ground, random_scene
from examples.free_world.edits import Edit, random_edit, random_edit_in_part
from examples.free_world.laws import random_clip
from examples.free_world.tasks import MAX_MOVING
from examples.free_world.words import describe, describe_in_part, with_words_between
from examples.shapes_world import real_media
from examples.shapes_world.datasets import Dataset, Sample, generator, text_english
from examples.shapes_world.media import png_bytes

VIDEO_FRAMES = (4, 10)  # at least, at most
SOURCE = "rendered by examples/free_world (Apache-2.0)"


@dataclass
class FreeCorpusConfig:
    """How many samples of each kind."""

    seed: int = 1
    num_images: int = 8000
    num_part_named: int = 6000
    num_pictures: int = 6000  # for the vision tokenizer alone
    num_videos: int = 8000
    num_told_clips: int = 2000
    num_edits: int = 5000
    num_part_named_edits: int = 3000
    samples_per_shard: int = 500


def picture(scene: Scene, ground: Ground) -> bytes:
    return png_bytes(draw(scene, ground))


def free_image_text(config: FreeCorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "free_image_text")
    for number in range(config.num_images):
        scene = random_scene(rng, 1 + number % MAX_BODIES)
        text, _ = describe(scene, rng)
        yield {"png": picture(scene, random_ground(rng)), "txt": text.encode()}


def free_part_named(config: FreeCorpusConfig) -> Iterator[Sample]:
    """Pictures of all pairs; of a held-out one the caption says the colour or the shape and leaves the other."""
    rng = generator(config.seed, "free_part_named")
    for number in range(config.num_part_named):
        scene = random_scene(rng, 1 + number % MAX_BODIES, held_out=bool(rng.integers(2)))
        yield {"png": picture(scene, random_ground(rng)), "txt": describe_in_part(scene, rng).encode()}


def free_pictures(config: FreeCorpusConfig) -> Iterator[Sample]:
    """Of all pairs, as a published tokenizer sees pictures of all kinds; what is held out, no language model sees here.

    Some have no body: a decoder that has never seen a bare ground makes ghosts where a model draws one.
    """
    rng = generator(config.seed, "free_pictures")
    for number in range(config.num_pictures):
        count = number % (MAX_BODIES + 1)
        scene = random_scene(rng, count, held_out=count > 0 and number // (MAX_BODIES + 1) % 3 == 0)
        yield {"png": picture(scene, random_ground(rng)), "txt": b"a scene"}


def free_video(config: FreeCorpusConfig) -> Iterator[Sample]:
    """Clips in which the law stands in the frames alone; half of them have a pair that no document names."""
    rng, (fewest, most) = generator(config.seed, "free_video"), VIDEO_FRAMES
    for number in range(config.num_videos):
        has_pair = number // MAX_MOVING % 2 == 0
        num_frames = int(rng.integers(fewest, most + 1))
        count = 1 + number % MAX_MOVING
        clip = random_clip(rng, count, held_out_pair=has_pair, num_frames=num_frames, num_straight=2)
        yield film(clip.scenes, random_ground(rng))


def free_told_motion(config: FreeCorpusConfig) -> Iterator[Sample]:
    """One frame, the law in words, and what comes next."""
    rng = generator(config.seed, "free_told_motion")
    for number in range(config.num_told_clips):
        clip = random_clip(rng, 1 + number % MAX_MOVING)
        yield x2i(clip.scenes[-2:], random_ground(rng), clip.words())


def free_edit(config: FreeCorpusConfig) -> Iterator[Sample]:
    return edits(config, "free_edit", config.num_edits, random_edit)


def free_part_named_edit(config: FreeCorpusConfig) -> Iterator[Sample]:
    """The body that changes is told by its colour, and may have or get any pair."""
    return edits(config, "free_part_named_edit", config.num_part_named_edits, random_edit_in_part)


def edits(
    config: FreeCorpusConfig, name: str, count: int, draw_one: Callable[[np.random.Generator, int], Edit]
) -> Iterator[Sample]:
    rng = generator(config.seed, name)
    for number in range(count):
        edit = draw_one(rng, 1 + number % MAX_BODIES)
        yield x2i((edit.source, edit.target), random_ground(rng), edit.instruction)


def film(scenes: tuple[Scene, ...], ground: Ground) -> Sample:
    """Frames with the same words between them, as a page of texts and pictures."""
    pictures = [f"picture_{number}.png" for number in range(len(scenes))]
    parts = with_words_between(pictures)
    page = {
        "texts": [None if part in pictures else part for part in parts],
        "images": [part if part in pictures else None for part in parts],
    }
    frames = {name: picture(scene, ground) for name, scene in zip(pictures, scenes, strict=True)}
    return {"json": json.dumps(page).encode(), **frames}


def x2i(scenes: tuple[Scene, ...], ground: Ground, text: str) -> Sample:
    *sources, target = (picture(scene, ground) for scene in scenes)
    return {
        "instruction.txt": text.encode(),
        **{f"source_{number}.png": content for number, content in enumerate(sources)},
        "target.png": target,
    }


DATASETS = (
    Dataset("free_image_text", "image_text", SOURCE, free_image_text),
    Dataset("free_part_named", "image_text", SOURCE, free_part_named),
    Dataset("free_pictures", "image_text", SOURCE, free_pictures),
    Dataset("free_video", "interleaved", SOURCE, free_video),
    Dataset("free_told_motion", "x2i", SOURCE, free_told_motion),
    Dataset("free_edit", "x2i", SOURCE, free_edit),
    Dataset("free_part_named_edit", "x2i", SOURCE, free_part_named_edit),
    Dataset("text_english", "text", real_media.ENGLISH_LICENCE, text_english, ("sklearn",)),
)
