"""Write the free world's corpora: `python -m examples.free_world.build target=FOLDER [key=value]`; see shapes_world.build."""

from __future__ import annotations

import sys

from examples.free_world.bodies import pairs
from examples.free_world.datasets import DATASETS, FreeCorpusConfig
from examples.free_world.laws import laws
from examples.shapes_world.build import World, main_of

WORLD = World(
    datasets=DATASETS,
    config_class=FreeCorpusConfig,
    target="runs/world/corpora",
    facts=lambda: {"held_out_pairs": sorted(map(list, pairs(True))), "held_out_laws": sorted(map(list, laws(True)))},
)

if __name__ == "__main__":
    sys.exit(main_of(WORLD))
