"""`python -m slurm_corpus FOLDER`: four shards of plain text."""

from __future__ import annotations

import io
import random
import sys
import tarfile
from pathlib import Path

WORDS = [
    "a",
    "small",
    "red",
    "circle",
    "and",
    "the",
    "large",
    "blue",
    "square",
    "stand",
    "left",
    "of",
    "one",
    "green",
    "triangle",
    "while",
    "it",
    "turns",
]


def main(folder: Path) -> None:
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as archive:
            for sample in range(60):
                text = " ".join(draw.choices(WORDS, k=40)) + f" {sample}."
                member = tarfile.TarInfo(f"{shard}_{sample:04d}.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
