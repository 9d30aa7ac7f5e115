"""The checkpoint format as every reader sees it: logical tensors behind a manifest, whatever layout wrote them.

A checkpoint folder `step_00000020/` holds safetensors files and `manifest.json`, which is published last: a folder
without one is not a checkpoint. The manifest's `keys` maps a logical name to

    {"global_shape": [...], "dtype": "float32", "pieces": [{"file", "name", "offset", "shape"}, ...]}

where each piece is a rectangle of the logical tensor, stored under `name` in `file`; the pieces cover the tensor
once. All else in the manifest is metadata of whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
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
    leaving the `with` block) lets them go.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
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
        return DTYPES[self._entry(key)["dtype"]]

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
        file = self._open(piece["file"])
        try:
            # A scalar has no dimension to slice.
            values = file.get_slice(piece["name"])[tuple(source)] if source else file.get_tensor(piece["name"])
        except SafetensorError as error:
            raise UserError(
                "the checkpoint's file does not hold what its manifest says",
                where=f"{self.folder / piece['file']}: {piece['name']}",
                got=str(error),
            ) from None
        result[tuple(target)] = values
        return values.numel()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    "a file of the checkpoint cannot be read", where=str(self.folder / name), got=str(error)
                ) from None
        return self._files[name]
