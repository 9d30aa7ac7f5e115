"""Write the words world's corpora: `python -m examples.words_world.build target=FOLDER [key=value]`; see shapes_world.build."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from examples.shapes_world import real_media
from examples.shapes_world.build import World, main_of
from examples.shapes_world.datasets import Dataset, Sample, generator, text_english
from examples.shapes_world.media import png_bytes
from examples.words_world.writing import HELD_OUT_SHARE, draw, random_writing


@dataclass
class WordsCorpusConfig:
    """How many pictures."""

    seed: int = 1
    num_images: int = 6000
    samples_per_shard: int = 1000


def words_image_text(config: WordsCorpusConfig) -> Iterator[Sample]:
    rng = generator(config.seed, "words_image_text")
    for _ in range(config.num_images):
        writing = random_writing(rng)
        yield {"png": png_bytes(draw(writing)), "txt": writing.caption.encode()}


WORLD = World(
    datasets=(
        Dataset("words_image_text", "image_text", "rendered by examples/words_world (Apache-2.0)", words_image_text),
        # pieces for the text tokenizer
        Dataset("text_english", "text", real_media.ENGLISH_LICENCE, text_english, ("sklearn",)),
    ),
    config_class=WordsCorpusConfig,
    target="runs/words/corpora",
    facts=lambda: {"held_out_share": 1 / HELD_OUT_SHARE},
)

if __name__ == "__main__":
    sys.exit(main_of(WORLD))
