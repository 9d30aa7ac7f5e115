"""What a conversion leaves beside the weights: the manifest of our checkpoints, the record in published layouts.

An export has a folder `nextstate/` with what the published layout has no place for: the model's configuration, the
checksums of the files, and the rows that pad our vocabulary. Other tools do not look there; `from_hf` does, and gives
back every bit.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, manifest_checksum
from model.checkpoint.small_files import read_object
from model.config import ModelConfig, count_parameters
from model.conversion.plan import Target
from model.conversion.sources import INDEX_NAME, SafetensorsSource
from model.conversion.writer import Written
from model.errors import UserError
from model.vocabulary import Vocabulary

RECORD_FOLDER = "nextstate"
RECORD_NAME = f"{RECORD_FOLDER}/record.json"
PADDING_NAME = f"{RECORD_FOLDER}/padding.safetensors"
RECORD_VERSION = 2  # 2: the record has a checksum of itself
# Of a manifest, what describes the training rather than this copy of it.
CARRIED = (
    "kind",
    "step",
    "consumed_samples",
    "data_fingerprint",
    "text_tokenizer",
    "vision_tokenizer",
    "image_format",
    "config",
    "wandb_run_id",
)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def layout_record(config: ModelConfig, tensor: int, pipeline: int) -> dict[str, Any]:
    """As an engine describes its layout; `converted` says that no random streams come with it."""
    return {
        "engine": "megatron",
        "tensor": tensor,
        "pipeline": pipeline,
        "context": 1,
        "data": 1,
        "num_parameters": count_parameters(config)["total"],
        "converted": True,
    }


def model_metadata(config: ModelConfig, seed: int) -> dict[str, Any]:
    """What a manifest says of a model that this project has not trained."""
    return {
        "kind": "transformer",
        "model": asdict(config),
        "vocabulary": Vocabulary.from_config(config.vocabulary).describe(),
        "step": 0,
        "consumed_samples": 0,
        "data_fingerprint": None,
        "text_tokenizer": None,
        "vision_tokenizer": None,
        "config": {"seed": seed},
    }


def write_manifest(folder: Path, metadata: dict[str, Any], targets: list[Target], written: Written) -> None:
    """`manifest.json` of a checkpoint of ours, from the plan's targets and the checksums of what is on disk."""
    keys = {
        target.name: {
            "global_shape": list(target.info.shape),
            "dtype": target.info.dtype,
            "pieces": [
                {
                    "file": piece.file,
                    "name": piece.stored_name,
                    "offset": list(piece.offset),
                    "shape": list(piece.shape),
                    "crc32": written.tensors.get(piece.stored_name, f"{0:08x}"),
                }
                for piece in target.pieces
            ],
        }
        for target in targets
    }
    manifest = metadata | {"format_version": FORMAT_VERSION, "files": written.files, "keys": keys}
    manifest["manifest_crc32"] = manifest_checksum(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, allow_nan=False), encoding="utf-8")


def write_index(folder: Path, targets: list[Target]) -> None:
    """The index of a sharded export; a single file needs none."""
    weights = [target for target in targets if not target.pieces[0].file.startswith(RECORD_FOLDER)]
    if len({target.pieces[0].file for target in weights}) > 1:
        total = sum(target.info.num_bytes for target in weights)
        table = {target.name: target.pieces[0].file for target in sorted(weights, key=lambda t: t.name)}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": table})


def write_record(folder: Path, layout: str, metadata: dict[str, Any], written: Written) -> None:
    (folder / RECORD_FOLDER).mkdir(exist_ok=True)
    record = {
        "format_version": RECORD_VERSION,
        "layout": layout,
        "files": written.files,
        "tensors_crc32": written.tensors,
        "checkpoint": {name: metadata[name] for name in (*CARRIED, "model", "vocabulary") if name in metadata},
    }
    write_json(folder / RECORD_NAME, record | {"record_crc32": record_checksum(record)})


def record_checksum(record: dict[str, Any]) -> str:
    """Of all else in the record."""
    rest = {name: value for name, value in record.items() if name != "record_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def expect_recorded(source: object, record: dict[str, Any] | None, folder: Path) -> None:
    """Have a source of an export of ours compare what it reads with the export's record."""
    if record and isinstance(source, SafetensorsSource):
        fix = f"fetch the export again; if its weights were changed on purpose, remove {folder / RECORD_FOLDER}"
        source.expect(record["tensors_crc32"], fix)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of an export of ours; None for a folder that another tool wrote."""
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    record = read_object(path, "the record of the export")
    version = record.get("format_version")
    if version != RECORD_VERSION:
        raise UserError(
            "this export was written by another version",
            where=str(path),
            expected=f"format_version {RECORD_VERSION}",
            got=str(version),
            fix=f"convert it again, or remove {path.parent} to read it as any other tool's",
        )
    if record.get("record_crc32") != record_checksum(record):
        raise UserError(
            "the record of the export is damaged",
            where=str(path),
            expected=f"record_crc32 {record_checksum(record)}, as its content has",
            got=str(record.get("record_crc32")),
            fix="fetch the export again",
        )
    return record
