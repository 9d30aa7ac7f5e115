"""The checkpoint format as every reader sees it: logical tensors behind a manifest, whatever layout wrote them.

A checkpoint folder `step_00000020/` holds safetensors files and `manifest.json`, which is published last: a folder
without one is not a checkpoint. The manifest's `keys` maps a logical name to

    {"global_shape": [...], "dtype": "float32", "pieces": [{"file", "name", "offset", "shape", "crc32"}, ...]}

where each piece is a rectangle of the logical tensor, stored under `name` in `file`; the pieces cover the tensor
once. `crc32` is that of the piece's bytes: whoever reads a part of a piece verifies the whole piece first, and need
not read the rest of a file (weights are a quarter of a checkpoint, or less). `files` has, by name, `bytes`, `crc32` and
`header_crc32` of each file. Checkpoints from before pieces had checksums are verified file by file.

All else in the manifest is metadata of whoever wrote it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint.checksums import BLOCK_BYTES, file_damage
from model.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    FIX,
    FORMAT_VERSION,
    MANIFEST_NAME,
    STEP_FOLDER_PATTERN,
    latest_checkpoint,
    list_checkpoints,
    manifest_checksum,
    read_manifest,
    step_folder_name,
)
from model.errors import UserError

__all__ = [
    "CHECKPOINTS_FOLDER",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "STEP_FOLDER_PATTERN",
    "CheckpointReader",
    "dtype_name",
    "latest_checkpoint",
    "list_checkpoints",
    "manifest_checksum",
    "read_manifest",
    "step_folder_name",
]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a dtype: `float32`, `bfloat16`, ..."""
    return str(dtype).removeprefix("torch.")


class CheckpointReader:
    """Reads any rectangle of any logical tensor of one checkpoint folder, from all pieces that overlap it.

    Implements `training.contracts.shards.ShardReader`. Files are opened on first use and memory-mapped; `close` (or
    leaving the `with` block) lets them go. Each piece is verified on first use, in blocks: a damaged one is a
    `UserError`. `verified` says that the caller has just compared every file with its checksum.
    """

    def __init__(self, folder: Path | str, *, verified: bool = False):
        self.folder = Path(folder)
        self._verified = verified
        self._verified_pieces: set[tuple[str, str]] = set()
        self.manifest = read_manifest(self.folder)
        self.metadata: dict[str, Any] = {name: value for name, value in self.manifest.items() if name != "keys"}
        self._table: dict[str, dict[str, Any]] = self.manifest["keys"]
        self._files: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()

    def keys(self) -> Iterable[str]:
        return self._table.keys()

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key)["global_shape"])

    def dtype(self, key: str) -> torch.dtype:
        name = self._entry(key)["dtype"]
        if name not in DTYPES:
            raise UserError("a tensor has an unknown dtype", where=f"{self.folder}: {key}", got=name)
        return DTYPES[name]

    def read_full(self, key: str) -> torch.Tensor:
        shape = self.global_shape(key)
        return self.read(key, (0,) * len(shape), shape)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The rectangle of `key` that starts at `offset` and has `shape`; a new tensor in the stored dtype."""
        global_shape = self.global_shape(key)
        inside = len(offset) == len(shape) == len(global_shape) and all(
            start >= 0 and start + length <= whole
            for start, length, whole in zip(offset, shape, global_shape, strict=True)
        )
        assert inside, f"{key}: offset {tuple(offset)} shape {tuple(shape)} is not inside {global_shape}"
        result = torch.empty(tuple(shape), dtype=self.dtype(key))
        num_copied = 0
        for piece in self._entry(key)["pieces"]:
            num_copied += self._copy_overlap(piece, result, offset)
        if num_copied != math.prod(shape):
            raise UserError(
                "the checkpoint does not hold the whole of a tensor",
                where=f"{self.folder}: {key}",
                expected=f"{math.prod(shape)} values",
                got=f"{num_copied}",
            )
        return result

    def _entry(self, key: str) -> dict[str, Any]:
        if key not in self._table:
            raise UserError("the checkpoint has no such tensor", where=str(self.folder), expected=key)
        return self._table[key]

    def _copy_overlap(self, piece: dict[str, Any], result: torch.Tensor, offset: Sequence[int]) -> int:
        """Copy what `piece` has of the rectangle at `offset` into `result`; the number of values copied."""
        source, target = [], []
        for piece_start, piece_length, start, length in zip(
            piece["offset"], piece["shape"], offset, result.shape, strict=True
        ):
            low = max(piece_start, start)
            high = min(piece_start + piece_length, start + length)
            if low >= high:
                return 0
            source.append(slice(low - piece_start, high - piece_start))
            target.append(slice(low - start, high - start))
        try:
            file = self._verified_file(piece, result.dtype)
            # A scalar has no dimension to slice.
            values = file.get_slice(piece["name"])[tuple(source)] if source else file.get_tensor(piece["name"])
        except SafetensorError as error:
            raise self._damaged(piece["file"], f"{piece['name']} as the manifest says", str(error)) from None
        result[tuple(target)] = values
        found: int = values.numel()
        return found

    def _verified_file(self, piece: dict[str, Any], dtype: torch.dtype) -> Any:
        """The file of a piece, once the piece is found as the manifest describes it. Raises `SafetensorError`."""
        name, stored = piece["file"], piece["name"]
        file = self._open(name)
        if self._verified or (name, stored) in self._verified_pieces:
            return file
        whole = file.get_slice(stored)
        if whole.get_shape() != piece["shape"]:
            raise self._damaged(name, f"{stored} with shape {piece['shape']}", str(whole.get_shape()))
        if "crc32" in piece:
            got, found_dtype = self._sum_of_piece(file, piece)
            if found_dtype != dtype:
                raise self._damaged(name, f"{stored} of {dtype_name(dtype)}", dtype_name(found_dtype))
            if got != piece["crc32"]:
                raise self._damaged(name, f"{stored} with crc32 {piece['crc32']}", got)
        self._verified_pieces.add((name, stored))
        return file

    @staticmethod
    def _sum_of_piece(file: Any, piece: dict[str, Any]) -> tuple[str, torch.dtype]:
        """crc32 of a piece's bytes, a few megabytes of the mapped file at a time, and its dtype."""
        shape = piece["shape"]
        if not shape or not math.prod(shape):
            values = file.get_tensor(piece["name"])
            return f"{zlib.crc32(_bytes_of(values)):08x}", values.dtype
        whole, crc = file.get_slice(piece["name"]), 0
        step = max(1, BLOCK_BYTES // (8 * math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            values = whole[start : start + step]
            crc = zlib.crc32(_bytes_of(values), crc)
        return f"{crc:08x}", values.dtype

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                if not self._verified and (damage := file_damage(path, self.manifest["files"].get(name))):
                    raise self._damaged(name, "", damage)
                self._files[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    "a file of the checkpoint cannot be read", where=str(path), got=str(error), fix=FIX
                ) from None
        return self._files[name]

    def _damaged(self, name: str, expected: str, got: str) -> UserError:
        return UserError(
            "a file of the checkpoint is damaged", where=str(self.folder / name), expected=expected, got=got, fix=FIX
        )


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data
