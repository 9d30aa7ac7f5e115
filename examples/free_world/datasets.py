"""The datasets of the free world's curriculum, as samples of a webdataset (file extension -> content)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from examples.free_world.bodies import MAX_BODIES, Ground, Scene, draw, random_ground, random_scene
from examples.free_world.edits import random_edit
from examples.free_world.laws import random_clip
from examples.free_world.tasks import MAX_MOVING, WHAT_NEXT
from examples.free_world.words import describe
from examples.shapes_world import real_media
from examples.shapes_world.datasets import Dataset, Sample, generator, text_english
from examples.shapes_world.media import png_bytes

SOURCE = "rendered by examples/free_world (Apache-2.0)"


@dataclass
class FreeCorpusConfig:
    """How many samples of each kind."""

    seed: int = 1
    num_images: int = 8000
    num_pictures: int = 6000  # for the vision tokenizer alone
    num_videos: int = 8000
    num_clips: int = 6000
    num_told_clips: int = 2000
    num_edits: int = 6000
    samples_per_shard: int = 500


def picture(scene: Scene, ground: Ground) -> bytes:
    return png_bytes(draw(scene, ground))


def free_image_text(config: FreeCorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "free_image_text")
    for number in range(config.num_images):
        scene = random_scene(rng, 1 + number % MAX_BODIES)
        text, _ = describe(scene, rng)
        yield {"png": picture(scene, random_ground(rng)), "txt": text.encode()}


def free_pictures(config: FreeCorpusConfig) -> Iterator[Sample]:
    """Of all pairs, as a published tokenizer sees pictures of all kinds; what is held out, no language model sees here.

    Some have no body: a decoder that has never seen a bare ground makes ghosts where a model draws one.
    """
    rng = generator(config.seed, "free_pictures")
    for number in range(config.num_pictures):
        count = number % (MAX_BODIES + 1)
        scene = random_scene(rng, count, held_out=count > 0 and number // (MAX_BODIES + 1) % 3 == 0)
        yield {"png": picture(scene, random_ground(rng)), "txt": b"a scene"}


def motion(config: FreeCorpusConfig, name: str, count: int, every: int) -> Iterator[Sample]:
    """Two frames and what comes next: the law stands in the frames alone.

    One clip of `every` has a held-out pair; none for 0.
    """
    rng = generator(config.seed, name)
    for number in range(count):
        has_pair = every > 0 and number // MAX_MOVING % every == 0
        clip, ground = random_clip(rng, 1 + number % MAX_MOVING, held_out_pair=has_pair), random_ground(rng)
        yield x2i(clip.scenes, ground, WHAT_NEXT)


def free_motion(config: FreeCorpusConfig) -> Iterator[Sample]:
    return motion(config, "free_motion", config.num_clips, 0)


def free_video(config: FreeCorpusConfig) -> Iterator[Sample]:
    """For pretraining alone: what is held out from captions is seen moving, without a word that names it."""
    return motion(config, "free_video", config.num_videos, 2)


def free_told_motion(config: FreeCorpusConfig) -> Iterator[Sample]:
    """One frame, the law in words, and what comes next."""
    rng = generator(config.seed, "free_told_motion")
    for number in range(config.num_told_clips):
        clip = random_clip(rng, 1 + number % MAX_MOVING)
        yield x2i(clip.scenes[1:], random_ground(rng), clip.words())


def free_edit(config: FreeCorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "free_edit")
    for number in range(config.num_edits):
        edit = random_edit(rng, 1 + number % MAX_BODIES)
        yield x2i((edit.source, edit.target), random_ground(rng), edit.instruction)


def x2i(scenes: tuple[Scene, ...], ground: Ground, text: str) -> Sample:
    *sources, target = (picture(scene, ground) for scene in scenes)
    return {
        "instruction.txt": text.encode(),
        **{f"source_{number}.png": content for number, content in enumerate(sources)},
        "target.png": target,
    }


DATASETS = (
    Dataset("free_image_text", "image_text", SOURCE, free_image_text),
    Dataset("free_pictures", "image_text", SOURCE, free_pictures),
    Dataset("free_video", "x2i", SOURCE, free_video),
    Dataset("free_motion", "x2i", SOURCE, free_motion),
    Dataset("free_told_motion", "x2i", SOURCE, free_told_motion),
    Dataset("free_edit", "x2i", SOURCE, free_edit),
    Dataset("text_english", "text", real_media.ENGLISH_LICENCE, text_english, ("sklearn",)),
)
