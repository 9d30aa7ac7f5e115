"""Write the demo's corpora as webdataset tar shards: `python -m examples.shapes_world.build target=FOLDER [key=value]`.

The same configuration gives the same bytes. `corpus.json` beside the datasets lists counts, sources, licences and the
checksum of every shard; it is written last, and a target that it describes completely is not built again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.folder_claim import claim_folder
from examples.shapes_world.datasets import DATASETS, CorpusConfig, Dataset
from examples.shapes_world.real_media import check_installed
from examples.shapes_world.world import all_items, held_out_items
from model.durable import replace_file
from model.errors import Problems, UserError

FORMAT_VERSION = 1
OWNER = {"mtime": 0.0, "user": "nextstate", "group": "nextstate"}  # fixed, so that bytes depend on the content only


@dataclass(frozen=True)
class World:
    """What `build` is told of a world."""

    datasets: Sequence[Dataset]
    config_class: type[Any]  # a dataclass of sizes, with `seed` and `samples_per_shard`
    target: str  # where the corpora go when nothing else is said
    facts: Callable[[], dict[str, Any]]  # of the world, for `corpus.json`


SHAPES = World(
    DATASETS,
    CorpusConfig,
    "runs/demo/corpora",
    lambda: {"held_out_combinations": len(held_out_items()), "combinations": len(all_items())},
)


def validate(config: Any) -> None:
    problems = Problems()
    for name, value in asdict(config).items():
        problems.check(value >= 0, name, "must not be negative")
    problems.check(config.samples_per_shard > 0, "samples_per_shard", "must be positive", "samples_per_shard=500")
    problems.raise_if_any()


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_dataset(dataset: Dataset, target: Path, config: Any) -> dict[str, Any]:
    """Write one dataset as `target/name/NNNNNN.tar`, published by renaming the finished folder."""
    building, final = target / f".{dataset.name}.building", target / dataset.name
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    count = 0
    pattern = str(building / "%06d.tar")
    with ShardWriter(pattern, maxcount=config.samples_per_shard, verbose=0, encoder=False, **OWNER) as writer:
        for count, sample in enumerate(dataset.samples(config), 1):
            writer.write({"__key__": f"{dataset.name}_{count - 1:06d}", **sample})
    shards = sorted(building.glob("*.tar"))
    entry = {
        "kind": dataset.kind,
        "source": dataset.source,
        "num_samples": count,
        "num_bytes": sum(shard.stat().st_size for shard in shards),
        "shards": {shard.name: checksum(shard) for shard in shards},
    }
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    return entry


def finished(target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The description of `target` when it holds exactly what these settings ask for."""
    description = target / "corpus.json"
    if not description.exists():
        return None
    corpus: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
    if (corpus.get("format_version"), corpus.get("config")) != (FORMAT_VERSION, settings):
        return None
    for name, entry in corpus["datasets"].items():
        for shard, expected in entry["shards"].items():
            path = target / name / shard
            if not path.exists() or checksum(path) != expected:
                return None
    return corpus


def build_corpora(target: Path, config: Any, world: World = SHAPES) -> dict[str, Any]:
    """Write every dataset below `target` and return what `corpus.json` says."""
    validate(config)
    settings = asdict(config)
    with file_errors_are_user_errors(target):
        corpus = finished(target, settings)
        if corpus is not None:
            return corpus
        check_installed(package for dataset in world.datasets for package in dataset.packages)
        with claim_folder(target, "shapes_world"):
            return write_corpora(target, config, world)


def write_corpora(target: Path, config: Any, world: World) -> dict[str, Any]:
    """Write every dataset anew; `corpus.json` is removed first and written last."""
    description = target / "corpus.json"
    description.unlink(missing_ok=True)
    corpus = {
        "format_version": FORMAT_VERSION,
        "config": asdict(config),
        **world.facts(),
        "datasets": write_datasets(target, config, world),
    }
    replace_file(description, json.dumps(corpus, indent=1, ensure_ascii=False) + "\n")
    return corpus


def write_datasets(target: Path, config: Any, world: World) -> dict[str, dict[str, Any]]:
    """Each by one of as many processes as there are cores: none needs another."""
    context = multiprocessing.get_context("spawn")
    num_processes = min(len(world.datasets), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(num_processes, context) as pool:
        entries = {one.name: pool.submit(write_dataset, one, target, config) for one in world.datasets}
        return {name: entry.result() for name, entry in entries.items()}


def parse_arguments(arguments: list[str], world: World = SHAPES) -> tuple[Path, Any]:
    """`target=FOLDER` and the fields of the world's configuration as key=value."""
    types = {field.name: type(field.default) for field in fields(world.config_class)}
    values: dict[str, Any] = {}
    target = Path(world.target)
    problems = Problems()
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if separator and key == "target":
            target = Path(text)
        elif not separator or key not in types:
            problems.add(argument, f"unknown; the keys are target, {', '.join(types)}")
        elif types[key] is bool and text in ("true", "false"):
            values[key] = text == "true"
        elif types[key] is int and text.lstrip("-").isdigit():
            values[key] = int(text)
        else:
            problems.add(argument, f"not a value of type {types[key].__name__}")
    problems.raise_if_any()
    return target, world.config_class(**values)


def main_of(world: World) -> int:
    try:
        corpus = build_corpora(*parse_arguments(sys.argv[1:], world), world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, entry in corpus["datasets"].items():
        print(f"{name:<18} {entry['kind']:<18} {entry['num_samples']:>6} samples {entry['num_bytes'] / 1e6:>8.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main_of(SHAPES))
