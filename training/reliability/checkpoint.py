"""Checkpoints as transactions: written aside, published by one rename, verified before they are trusted.

The format is described in `model/checkpoint/reader.py`. Every rank writes the tensors it owns to its own file;
no tensor is gathered on one rank. What all ranks must do alike they agree on, through `Ranks.any_rank` and
`Ranks.gather`: neither a rank that could not write nor one that sees other files leaves the others waiting.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.checkpoint.checksums import safetensors_sums
from model.checkpoint.reader import (
    CHECKPOINTS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_NAME,
    CheckpointReader,
    dtype_name,
    list_checkpoints,
    manifest_checksum,
    read_manifest,
    step_folder_name,
)
from model.durable import crc32_of, flush_to_disk, replace_file
from model.errors import UserError
from training.contracts.batches import Ranks
from training.contracts.shards import Shard, ShardStore
from training.reliability.agreement import seen_by_first_rank
from training.reliability.finite import describe_non_finite, non_finite_in, non_finite_keys

TEMPORARY_PREFIX = ".tmp-"
NON_FINITE_PREFIX = "non_finite_"  # of a folder kept for eyes; no reader takes it for a checkpoint
TRASH_PREFIX = ".trash-"


class CheckpointFailed(Exception):  # noqa: N818 (a state of the disk, told to the loop)
    """The checkpoint could not be written on some rank. What was published before is untouched."""


class NotFinite(Exception):  # noqa: N818 (a state of the weights, told to the loop)
    """What was to be saved is not finite. It lies aside in `folder`; what was published before is untouched."""

    def __init__(self, folder: Path, keys: list[str]):
        super().__init__(describe_non_finite(keys))
        self.folder = folder


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read into the engine."""

    folder: Path
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage.

    `enter_phase` is told the name of each part of a transaction: the heartbeat shows it.
    """

    def __init__(
        self, stage_folder: Path, ranks: Ranks, shards: ShardStore, keep: int, enter_phase: Callable[[str], Any]
    ):
        self.stage_folder, self.ranks, self.shards, self.keep = stage_folder, ranks, shards, keep
        self.folder = stage_folder / CHECKPOINTS_FOLDER
        self.enter_phase = enter_phase
        self._non_finite: list[str] = []  # keys of the last save; on rank 0 those of all ranks
        self._passed_over: set[Path] = set()  # damaged: they never count as one of `keep`
        if ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        ranks.barrier()

    def has_checkpoint(self) -> bool:
        """The same answer on every rank, even where a network file system shows a rename late."""
        return self.ranks.any_rank(bool(list_checkpoints(self.stage_folder)))

    def save(self, step: int, metadata: dict[str, Any], config_yaml: str, *, keep_older: bool = False) -> Path:
        """Write and publish one checkpoint; every rank calls it. Raises on every rank or none.

        `metadata` goes into the manifest (rank 0's is taken). `keep_older`: no checkpoint is removed for this one.
        Raises `CheckpointFailed` when a rank cannot write, and `NotFinite` when a weight or moment is not finite.
        """
        final = self.folder / step_folder_name(step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}"
        for phase, action in (
            ("checkpoint: make folder", lambda: self._make_folder(temporary)),
            ("checkpoint: write tensors", lambda: self._write_own_files(temporary)),
            ("checkpoint: write manifest", lambda: self._write_manifest(temporary, metadata, config_yaml)),
        ):
            self.enter_phase(phase)
            self._together(action, temporary)
        self.enter_phase("checkpoint: publish")
        if self.ranks.any_rank(bool(self._non_finite)):
            aside = self.folder / f"{NON_FINITE_PREFIX}{final.name}"
            self._together(lambda: self._set_aside(temporary, aside), temporary)
            raise NotFinite(aside, self._non_finite)
        self._together(lambda: self._publish(temporary, final), temporary)
        self.enter_phase("checkpoint: prune")
        if self.ranks.rank == 0 and not keep_older:
            self.prune()
        return final

    def find_non_finite(self) -> str:
        """What is not finite in the present weights and moments, or "". Every rank calls it."""
        self.enter_phase("look for weights that are not finite")
        shards = self.shards.model_shards() + self.shards.optimizer_shards()
        keys = non_finite_keys((shard.key, shard.tensor) for shard in shards)
        return describe_non_finite(keys) if self.ranks.any_rank(bool(keys)) else ""

    def find_usable(self, report_damage: Callable[[Path, str], Any]) -> Path | None:
        """The newest checkpoint that is undamaged and finite; others are reported and passed over. None: there is none.

        The ranks share the work of checking. If all are damaged, it is a `UserError`: starting over silently would
        throw the run away.
        """
        folders = self._listed()
        rank, world_size = self.ranks.rank, self.ranks.world_size
        non_finite = []
        for number, folder in enumerate(folders):
            self.enter_phase(f"verify {folder.name}")
            damage = find_damage(folder, rank, world_size)
            if self.ranks.any_rank(bool(damage)):
                report_damage(folder, damage or "found by another rank")
                continue
            keys = non_finite_in(folder, rank, world_size)
            if self.ranks.any_rank(bool(keys)):
                report_damage(folder, describe_non_finite(keys))
                non_finite.append(folder)
                continue
            self._passed_over = set(folders[:number]) - set(non_finite)
            if rank == 0:
                for other in reversed(non_finite):
                    with contextlib.suppress(OSError):  # it stays, and is passed over again
                        self._set_aside(other, self.folder / f"{NON_FINITE_PREFIX}{other.name}")
            return folder
        if folders:
            raise UserError(
                "every checkpoint of this stage is damaged or not finite",
                where=str(self.folder),
                fix="bring one back from a copy, or remove the stage folder to start over",
            )
        return None

    def _listed(self) -> list[Path]:
        """The checkpoints that the first rank sees, newest first; the same on every rank.

        A rank that does not see one of these folders finds it damaged, and all ranks hear of that.
        """
        names = seen_by_first_rank(self.ranks, lambda: [folder.name for folder in list_checkpoints(self.stage_folder)])
        return [self.folder / name for name in names]

    def load(self, folder: Path) -> Loaded:
        """Read weights, optimizer and (if the layout is the same) the random streams into the engine."""
        self.enter_phase(f"load {folder.name}")
        with CheckpointReader(folder, verified=True) as reader:
            self.shards.load_model(reader)
            self.shards.load_optimizer(reader)
            if reader.manifest["layout"] == self.shards.describe():
                prefix = random_prefix(self.ranks.rank)
                self.shards.load_random_state(
                    {
                        key.removeprefix(prefix): reader.read_full(key)
                        for key in reader.manifest["keys"]
                        if key.startswith(prefix)
                    }
                )
            return Loaded(folder, reader.manifest)

    def prune(self) -> None:
        """Remove all but the newest `keep`. The manifest goes first: half a checkpoint never looks like a whole one.

        A folder that cannot be removed stays for the next time. Damaged ones that are newer stay until the run has
        passed them: they do not count, or they would push a good one out.
        """
        found = list_checkpoints(self.stage_folder)
        good = [folder for folder in found if folder not in self._passed_over][: self.keep]
        kept = {*good, *found[: found.index(good[0])]} if good else set(found)
        for folder in self.folder.glob("step_*"):
            if folder not in kept:
                with contextlib.suppress(OSError):
                    (folder / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _together(self, action: Callable[[], None], temporary: Path) -> None:
        """Run `action` on every rank; if it failed on any, clean up and raise on all."""
        failure = ""
        try:
            action()
        except (OSError, SafetensorError) as error:
            failure = f"{type(error).__name__}: {error}"
        if self.ranks.any_rank(bool(failure)):
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self.ranks.barrier()
            raise CheckpointFailed(failure or "another rank could not write")

    def _make_folder(self, temporary: Path) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def _write_own_files(self, temporary: Path) -> None:
        """`rank_XXXXX.safetensors` and, for rank 0 to merge, a table of what is in it."""
        rank = self.ranks.rank
        shards = self.shards.model_shards() + self.shards.optimizer_shards()
        prefix = random_prefix(rank)
        for name, state in self.shards.random_state().items():
            shape = tuple(state.shape)
            shards.append(Shard(prefix + name, state, shape, (0,) * len(shape)))
        path = temporary / f"rank_{rank:05d}.safetensors"
        tensors, table = lay_out(shards, path.name)
        self._non_finite = non_finite_keys((name.rpartition("@")[0], tensor) for name, tensor in tensors.items())
        save_file(tensors, path)
        sums = safetensors_sums(path)
        for one in table.values():
            for piece in one["pieces"]:
                piece["crc32"] = f"{sums.tensors[piece['name']]:08x}"
        entry = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "crc32": f"{sums.file:08x}",
            "header_crc32": f"{sums.header:08x}",
            "keys": table,
            "non_finite": self._non_finite,
        }
        flush_to_disk(path)
        (temporary / f"rank_{rank:05d}.json").write_text(json.dumps(entry))

    def _write_manifest(self, temporary: Path, metadata: dict[str, Any], config_yaml: str) -> None:
        if self.ranks.rank != 0:
            return
        replace_file(temporary / "config.yaml", config_yaml)
        keys: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for rank in range(self.ranks.world_size):
            path = temporary / f"rank_{rank:05d}.json"
            entry = json.loads(path.read_text())
            files[entry["file"]] = {name: entry[name] for name in ("bytes", "crc32", "header_crc32")}
            merge_tables(keys, entry["keys"])
            self._non_finite = sorted({*self._non_finite, *entry["non_finite"]})
            path.unlink()
        check_cover(keys)
        manifest = metadata | {
            "format_version": FORMAT_VERSION,
            "layout": self.shards.describe(),
            "files": files,
            "keys": keys,
            "non_finite": self._non_finite,
        }
        manifest["manifest_crc32"] = manifest_checksum(manifest)
        replace_file(temporary / MANIFEST_NAME, json.dumps(manifest, allow_nan=False))

    def _publish(self, temporary: Path, final: Path) -> None:
        if self.ranks.rank != 0:
            return
        if final.exists():  # a damaged one that was passed over, or one before a rollback
            trash = self.folder / f"{TRASH_PREFIX}{final.name}"
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(final, trash)
        os.rename(temporary, final)
        flush_to_disk(self.folder)
        self._passed_over.discard(final)

    def _set_aside(self, folder: Path, aside: Path) -> None:
        """Keep a checkpoint that is not finite where nobody loads it; only the last one is kept."""
        if self.ranks.rank != 0:
            return
        for older in self.folder.glob(f"{NON_FINITE_PREFIX}*"):
            shutil.rmtree(older, ignore_errors=True)
        os.rename(folder, aside)

    def _remove_leftovers(self) -> None:
        """What a killed run left behind; the stage's lock says that nobody else is writing here."""
        for prefix in (TEMPORARY_PREFIX, TRASH_PREFIX):
            for folder in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with a checkpoint, or "". Sizes of all files, checksums of this rank's share of them."""
    try:
        manifest = read_manifest(folder)
        for index, (name, expected) in enumerate(sorted(manifest["files"].items())):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if index % world_size == rank and crc32_of(path) != expected["crc32"]:
                return f"{name} does not have its checksum"
    except UserError as error:
        return f"{error.what} {error.got}".strip()
    except OSError as error:  # a broken disk, no permission
        return f"it cannot be read: {error}"
    return ""


def lay_out(shards: list[Shard], file_name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one safetensors file by name, and the manifest's entries for them."""
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Any] = {}
    for shard in shards:
        name = f"{shard.key}@{','.join(map(str, shard.global_offset))}"
        assert name not in tensors, f"two shards at one place: {name}"
        tensors[name] = _own_copy(shard.tensor)
        entry = {
            "global_shape": list(shard.global_shape),
            "dtype": dtype_name(shard.tensor.dtype),
            "pieces": [
                {
                    "file": file_name,
                    "name": name,
                    "offset": list(shard.global_offset),
                    "shape": list(shard.tensor.shape),
                }
            ],
        }
        merge_tables(table, {shard.key: entry})
    return tensors, table


def merge_tables(into: dict[str, Any], table: dict[str, Any]) -> None:
    for key, entry in table.items():
        known = into.setdefault(key, entry | {"pieces": []})
        same = all(known[name] == entry[name] for name in ("global_shape", "dtype"))
        assert same, f"shards of {key} disagree on its shape or dtype"
        known["pieces"] = known["pieces"] + entry["pieces"]


def check_cover(keys: dict[str, Any]) -> None:
    """The shards of a key have as many values as the key: an engine that breaks this has a defect."""
    for key, entry in keys.items():
        num_written = sum(math.prod(piece["shape"]) for piece in entry["pieces"])
        num_expected = math.prod(entry["global_shape"])
        assert num_written == num_expected, f"{key}: {num_written} values of {num_expected}"


def random_prefix(rank: int) -> str:
    return f"random/rank_{rank:05d}/"


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, sharing memory with nothing (safetensors refuses shared memory)."""
    copy = tensor.detach().to("cpu").contiguous()
    return copy.clone() if copy.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else copy
