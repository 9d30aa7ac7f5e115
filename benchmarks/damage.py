"""Flipped bits in the files of a checkpoint, and who finds them: every reader must, and none may publish anything.

    python -m benchmarks.damage --flips 282

Each flip changes one bit of one file of a fresh checkpoint of two tensor-parallel ranks (tensors, headers and the
manifest), and every reader reads it: whole, row by row, by converting and by resuming. Prints one JSON object: by reader
how many it found, and how many changed nothing that it reads (white space of a manifest).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from model.checkpoint.manifest import MANIFEST_NAME
from model.checkpoint.reader import CheckpointReader
from model.config import ModelConfig
from model.conversion import actions
from model.conversion.actions import Options
from model.conversion.safetensors_file import SafetensorsFile
from model.errors import UserError
from model.vocabulary import VocabularyConfig
from training.reliability.checkpoint import find_damage

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocabulary=VocabularyConfig(text_size=40, visual_size=9, pad_multiple=16),
)


def data_positions(path: Path) -> range:
    """Where the tensors' bytes are in a safetensors file."""
    file = SafetensorsFile(path)
    first = min(stored.position for stored in file.tensors.values())
    file.close()
    return range(first, path.stat().st_size)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def read_all(folder: Path, _: Path) -> None:
    with CheckpointReader(folder) as reader:
        for key in reader.keys():  # noqa: SIM118
            reader.read_full(key)


def read_row_by_row(folder: Path, _: Path) -> None:
    """A reader that never asks for a whole piece verifies whole pieces."""
    with CheckpointReader(folder) as reader:
        for key in reader.keys():  # noqa: SIM118
            shape = reader.global_shape(key)
            for row in range(shape[0]):
                reader.read(key, (row, *(0,) * (len(shape) - 1)), (1, *shape[1:]))


def reshard(folder: Path, target: Path) -> None:
    actions.reshard(folder, target, Options(pipeline=2))


def to_published(folder: Path, target: Path) -> None:
    actions.to_published(folder, target, "qwen3", Options())


def cast(folder: Path, target: Path) -> None:
    actions.to_published(folder, target, "qwen3", Options(dtype="bfloat16"))


def resume(folder: Path, _: Path) -> None:
    """What a stage asks before it goes on from a checkpoint."""
    if damage := find_damage(folder):
        raise UserError(damage)


READERS = (read_all, read_row_by_row, reshard, to_published, cast, resume)


def positions(path: Path, draw: random.Random) -> int:
    """Headers and the manifest as often as tensors, though they are small."""
    if path.name == MANIFEST_NAME:
        return draw.randrange(path.stat().st_size)
    data = data_positions(path)
    return draw.choice(data if draw.random() < 0.7 else range(min(data)))


def found_by(reader: object, folder: Path, target: Path) -> bool:
    try:
        reader(folder, target)  # type: ignore[operator]
    except UserError:
        return not target.exists()
    shutil.rmtree(target, ignore_errors=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=282)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    found, num_same = dict.fromkeys((one.__name__ for one in READERS), 0), 0
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nextstate-damage-") as name:
        folder, target = Path(name) / "checkpoint", Path(name) / "out"
        actions.initialize(folder, CONFIG, Options(tensor=2))
        for reader in READERS:
            reader(folder, Path(name) / reader.__name__)  # sound, it is read
        paths = [*sorted(folder.glob("*.safetensors")), folder / MANIFEST_NAME]
        for number in range(options.flips):
            path = paths[number % len(paths)]
            content, position = path.read_bytes(), positions(path, draw)
            flip(path, position, draw.randrange(8))
            if path.name == MANIFEST_NAME and says_the_same(path.read_bytes(), content):
                num_same += 1
            else:
                for reader in READERS:
                    is_found = found_by(reader, folder, target)
                    found[reader.__name__] += is_found
                    missed += [] if is_found else [f"{reader.__name__}: {path.name} at {position}"]
            path.write_bytes(content)
    print(json.dumps({"flips": options.flips, "same_values": num_same, "found": found, "missed": missed}, indent=1))
    return 1 if missed else 0


def says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
