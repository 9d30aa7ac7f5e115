"""The folder side of the checkpoint format: which folders are checkpoints and what their manifests say. No torch.

The format itself is described in `model/checkpoint/reader.py`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from model.checkpoint.small_files import read_object
from model.durable import record_of
from model.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKPOINTS_FOLDER = "checkpoints"
FIX = "bring the checkpoint back from a copy, or use another one"  # of whatever is damaged in one
STEP_FOLDER_PATTERN = re.compile(r"step_(\d{8,})")


def step_folder_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(stage_folder: Path) -> list[Path]:
    """The published checkpoint folders of a stage, newest first. Folders without a manifest do not count."""
    found = []
    for folder in (Path(stage_folder) / CHECKPOINTS_FOLDER).glob("step_*"):
        match = STEP_FOLDER_PATTERN.fullmatch(folder.name)
        if match and _has_manifest(folder):
            found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST_NAME).is_file()
    except OSError:  # no permission, a broken disk: listed, so that whoever opens it says so
        return True


# Files by which other programs' training checkpoints are known, and what they are.
FOREIGN_FORMATS = {
    "zero_to_fp32.py": "DeepSpeed's own format",
    "global_step*/*model_states.pt": "DeepSpeed's own format",
    "*model_states.pt": "DeepSpeed's own format",
    "latest_checkpointed_iteration.txt": "Megatron's own format",
    "*.distcp": "torch's distributed format",
    "model*.safetensors": "published weights",
}


def foreign_format(folder: Path) -> str:
    """What kind of checkpoint of another program lies there, or ""."""
    return next((title for pattern, title in FOREIGN_FORMATS.items() if any(Path(folder).glob(pattern))), "")


def latest_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a stage folder."""
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        is_published = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        got = "a model in a published layout" if is_published else "a folder without one"
        convert = f"nextstate convert from_hf source={path} target=FOLDER layout=NAME, and name that folder"
        raise UserError(
            "no complete checkpoint found",
            where=str(path),
            expected=f"a checkpoint folder with {MANIFEST_NAME}, or a stage folder with "
            f"{CHECKPOINTS_FOLDER}/step_*/{MANIFEST_NAME}",
            got=got if path.is_dir() else "no such folder",
            fix=convert if is_published else "train the stage first, or name another folder",
        )
    return found[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, refused when it cannot be understood or does not have its checksum."""
    path = Path(folder) / MANIFEST_NAME
    if not os.path.lexists(path):
        raise UserError("not a checkpoint: it has no manifest", where=str(folder))
    manifest = read_object(path, "the checkpoint's manifest")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or not isinstance(manifest.get("keys"), dict):
        raise UserError(
            "this checkpoint cannot be read by this version",
            where=str(path),
            expected=f"format_version {FORMAT_VERSION} and a table of keys",
            got=f"format_version {version}",
        )
    if manifest.get("manifest_crc32") != manifest_checksum(manifest) or not isinstance(manifest.get("files"), dict):
        raise UserError(
            "the checkpoint's manifest is damaged",
            where=str(path),
            expected=f"manifest_crc32 {manifest_checksum(manifest)}, as its content has",
            got=str(manifest.get("manifest_crc32")),
            fix=FIX,
        )
    damage = _table_damage(manifest["keys"]) or _files_damage(manifest["files"])
    if damage:
        raise UserError("the checkpoint's manifest is damaged", where=str(path), got=damage, fix=FIX)
    return manifest


def _table_damage(keys: dict[str, Any]) -> str:
    """What is wrong with the table of tensors: a checksum says that it is whole, not that a reader can use it."""
    for key, entry in keys.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not _sizes(entry, "global_shape"):
            return f"keys: {key!r} has no dtype or no global_shape"
        pieces = entry.get("pieces")
        if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
            return f"keys: {key!r} has no list of pieces"
        rank = len(entry["global_shape"])
        for piece in pieces:
            is_named = isinstance(piece.get("name"), str) and _is_file_name(piece.get("file"))
            if not is_named or any(not _sizes(piece, name) or len(piece[name]) != rank for name in ("offset", "shape")):
                return f"keys: {key!r} has the piece {piece!r}"
    return ""


def _files_damage(files: dict[str, Any]) -> str:
    for name, entry in files.items():
        is_good = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("crc32"), str)
        if not is_good or not _is_file_name(name):
            return f"files: {name!r}: {entry!r}"
    return ""


def _sizes(entry: dict[str, Any], name: str) -> bool:
    sizes = entry.get(name)
    return isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)


def _is_file_name(name: object) -> bool:
    """Of a file below the checkpoint's own folder: a manifest leads nowhere else."""
    is_name = isinstance(name, str) and name not in ("", ".") and "\0" not in name
    return is_name and not os.path.isabs(str(name)) and ".." not in str(name).split("/")


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """What stands under `manifest_crc32`: of all else in the manifest."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


class PieceEntry(TypedDict):
    """A rectangle of a logical tensor: where it is stored and where it belongs."""

    file: str
    name: str
    offset: list[int]
    shape: list[int]
    crc32: NotRequired[str]  # of its bytes; absent in checkpoints from before pieces had one


class TensorEntry(TypedDict):
    global_shape: list[int]
    dtype: str
    pieces: list[PieceEntry]


class FileEntry(TypedDict):
    bytes: int
    crc32: str  # eight hexadecimal digits
    header_crc32: NotRequired[str]  # of the header, with the eight bytes of its length


class TokenizerReference(NamedTuple):
    """A tokenizer that a checkpoint was trained with."""

    path: str  # below the run folder
    fingerprint: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What `manifest.json` says, typed. `values` holds all of it as it was read, unknown keys included."""

    values: dict[str, Any] = field(repr=False)
    keys: dict[str, TensorEntry] = field(default_factory=dict, repr=False)
    files: dict[str, FileEntry] = field(default_factory=dict, repr=False)
    layout: dict[str, Any] | None = None  # of the ranks that wrote it
    kind: str | None = None  # transformer | vision_tokenizer
    step: int | None = None
    consumed_samples: int | None = None
    data_fingerprint: str | None = None
    model: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None
    config: dict[str, Any] | None = None  # of the training run
    state: dict[str, Any] | None = None  # of the loop, the guard and the callbacks
    text_tokenizer: dict[str, Any] | str | None = None
    vision_tokenizer: dict[str, Any] | str | None = None
    image_format: str = "emu35"  # of the documents that it was trained on
    wandb_run_id: str | None = None
    manifest_crc32: str | None = None

    @classmethod
    def of(cls, values: dict[str, Any], place: Path | str) -> CheckpointManifest:
        """Raises `UserError` that names the field whose value has another type."""
        try:
            return record_of(cls, values)
        except ValueError as error:
            raise UserError("the checkpoint's manifest is damaged", where=str(place), got=str(error)) from None

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest:
        return cls.of(read_manifest(folder), folder)

    def tokenizer(self, name: str) -> TokenizerReference | None:
        """`text_tokenizer` or `vision_tokenizer`; a fingerprint alone is that of a tokenizer at its usual place."""
        record = getattr(self, name)
        if not record:
            return None
        return (
            TokenizerReference(name, record)
            if isinstance(record, str)
            else TokenizerReference(record["path"], record["fingerprint"])
        )

    def tokenizer_place(self, name: str, checkpoint: Path) -> Path | None:
        """Where that tokenizer should be: inside the checkpoint, at its recorded place, or at the usual one of its run."""
        if (checkpoint / name).is_dir():  # a converted checkpoint has it inside
            return checkpoint / name
        recorded = self.tokenizer(name)
        if recorded is None:
            return None
        above = checkpoint.absolute().parents
        run_folder = above[min(2, len(above) - 1)]  # run / stage / checkpoints / step
        # What a conversion made lies in the run folder itself.
        bases = [run_folder] if checkpoint.parent.name == CHECKPOINTS_FOLDER else [above[0], run_folder]
        found = [place for base in bases for place in (base / recorded.path, base / name) if place.exists()]
        return found[0] if found else bases[0] / recorded.path
