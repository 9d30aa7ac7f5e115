"""The checkpoint format as every reader sees it: logical tensors behind a manifest, whatever layout wrote them.

A checkpoint folder `step_00000020/` holds safetensors files and `manifest.json`, which is published last: a folder
without one is not a checkpoint. The manifest's `keys` maps a logical name to

    {"global_shape": [...], "dtype": "float32", "pieces": [{"file", "name", "offset", "shape"}, ...]}

where each piece is a rectangle of the logical tensor, stored under `name` in `file`; the pieces cover the tensor
once. All else in the manifest is metadata of whoever wrote it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKPOINTS_FOLDER = "checkpoints"
STEP_FOLDER_PATTERN = re.compile(r"step_(\d{8,})")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a dtype: `float32`, `bfloat16`, ..."""
    return str(dtype).removeprefix("torch.")


def step_folder_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(stage_folder: Path) -> list[Path]:
    """The published checkpoint folders of a stage, newest first. Folders without a manifest do not count."""
    found = []
    for folder in (Path(stage_folder) / CHECKPOINTS_FOLDER).glob("step_*"):
        match = STEP_FOLDER_PATTERN.fullmatch(folder.name)
        if match and (folder / MANIFEST_NAME).is_file():
            found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def latest_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a stage folder."""
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(
            "no complete checkpoint found",
            where=str(path),
            expected=f"a checkpoint folder with {MANIFEST_NAME}, or a stage folder with "
            f"{CHECKPOINTS_FOLDER}/step_*/{MANIFEST_NAME}",
            got="a folder without one" if path.is_dir() else "no such folder",
            fix="train the stage first, or name another folder",
        )
    return found[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, refused when it cannot be understood."""
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("not a checkpoint: it has no manifest", where=str(folder)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "the checkpoint's manifest is damaged", where=str(path), got=str(error)
        ) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION or not isinstance(manifest.get("keys"), dict):
        raise UserError(
            "this checkpoint cannot be read by this version",
            where=str(path),
            expected=f"format_version {FORMAT_VERSION} and a table of keys",
            got=f"format_version {version}",
        )
    return manifest


class CheckpointReader:
    """Reads any rectangle of any logical tensor of one checkpoint folder, from all pieces that overlap it.

    Implements `training.engines.base.ShardReader`. Files are opened on first use and memory-mapped; `close` (or
    leaving the `with` block) lets them go.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.metadata: dict[str, Any] = {
            name: value for name, value in self.manifest.items() if name != "keys"
        }
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
        assert inside, (
            f"{key}: offset {tuple(offset)} shape {tuple(shape)} is not inside {global_shape}"
        )
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
            raise UserError(
                "the checkpoint has no such tensor", where=str(self.folder), expected=key
            )
        return self._table[key]

    def _copy_overlap(
        self, piece: dict[str, Any], result: torch.Tensor, offset: Sequence[int]
    ) -> int:
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
            values = (
                file.get_slice(piece["name"])[tuple(source)]
                if source
                else file.get_tensor(piece["name"])
            )
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
                    "a file of the checkpoint cannot be read",
                    where=str(self.folder / name),
                    got=str(error),
                ) from None
        return self._files[name]
