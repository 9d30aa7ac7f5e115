"""Where tensors are read from: safetensors folders, our checkpoints, torch files, and values made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.checksums import file_damage
from model.checkpoint.manifest import FIX, MANIFEST_NAME, latest_checkpoint, list_checkpoints, read_manifest
from model.checkpoint.small_files import open_regular, read_object
from model.conversion.safetensors_file import SafetensorsFile
from model.conversion.tensors import ITEM_BYTES, TensorInfo
from model.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def file_identity(path: Path) -> list[Any]:
    status = os.stat(path)
    return [path.name, status.st_size, status.st_mtime_ns]


class SafetensorsSource:
    """The tensors of one safetensors file, or of a folder of them (with or without an index)."""

    def __init__(self, path: Path):
        self.place = str(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._homes: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._paths = safetensors_paths(path)
        self._fix = ""
        problems: list[str] = []
        for file_path in self._paths:
            file = self._files[file_path.name] = SafetensorsFile(file_path)
            for name, stored in file.tensors.items():
                if name in self._homes:
                    problems.append(f"{name} is in {self._homes[name].path.name} and {file_path.name}")
                self._homes[name] = file
                self.tensors[name] = stored.info
        problems += [
            f"{name} is not in {home}, where the index has it"
            for name, home in index_entries(path).items()
            if name not in self._homes or self._homes[name].path.name != home
        ]
        if problems:
            raise UserError("the files of the checkpoint contradict each other", where=self.place, got=listed(problems))

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> int | None:
        return self._homes[name].read_into(name, start * self.tensors[name].row_bytes, out)

    def expect(self, sums: dict[str, str], fix: str) -> None:
        """crc32 by name, as a record beside the files has them; `verify` compares. `fix`: what to do if they differ."""
        self._fix = fix
        for file in self._files.values():
            file.expect({name: sums[name] for name in file.tensors if name in sums})

    def verify(self) -> None:
        refuse_damage(self._files.values(), self._fix)

    def rows_at_once(self, name: str) -> int | None:
        return None

    def identity(self) -> Any:
        return [file_identity(path) for path in self._paths]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def refuse_damage(files: Iterable[SafetensorsFile], fix: str) -> None:
    damaged = [f"{file.path}: {problem}" for file in files for problem in file.verify()]
    if damaged:
        raise UserError("the checkpoint's files do not have their checksums", got=listed(damaged), fix=fix)


def safetensors_paths(path: Path) -> list[Path]:
    """The files that make up a checkpoint: `path` itself, those of the index, or all of the folder."""
    if path.is_file():
        return [path]
    indexed = sorted(set(index_entries(path).values()))
    missing = [name for name in indexed if not (path / name).is_file()]
    if missing:
        raise UserError(
            "files of the checkpoint are missing",
            where=str(path),
            expected=listed(indexed),
            got=f"no {listed(missing)}",
            fix="fetch them",
        )
    return [path / name for name in indexed] or sorted(path.glob("*.safetensors"))


def index_entries(path: Path) -> dict[str, str]:
    """Tensor -> file, from the index of a sharded checkpoint; empty where there is none."""
    index = path / INDEX_NAME
    if not index.is_file():
        return {}
    try:
        entries = read_object(index, "the index of the checkpoint")["weight_map"]
        assert all("/" not in name and name not in ("", ".", "..") for name in entries.values())
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            "the index of the checkpoint is damaged",
            where=str(index),
            expected='{"weight_map": {tensor: file}}',
            got=f"{type(error).__name__} {error}",
        ) from None
    result: dict[str, str] = entries
    return result


class CheckpointSource:
    """The logical tensors of one of our checkpoints, whatever layout wrote it."""

    def __init__(self, folder: Path):
        self.folder = latest_checkpoint(folder)
        self.place = str(self.folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self.tensors = {
                name: TensorInfo(tuple(entry["global_shape"]), str(entry["dtype"]))
                for name, entry in self.manifest["keys"].items()
            }
            unknown = sorted({info.dtype for info in self.tensors.values()} - ITEM_BYTES.keys())
            names = {piece["file"] for e in self.manifest["keys"].values() for piece in e["pieces"]}
        except (KeyError, TypeError) as error:
            raise UserError("the checkpoint's manifest is damaged", where=self.place, got=repr(error)) from None
        if unknown:
            raise UserError("the checkpoint has unknown dtypes", where=self.place, got=listed(unknown))
        try:
            for name in sorted(names):
                self._files[name] = SafetensorsFile(self.folder / name)
                damage = file_damage(self.folder / name, self.manifest["files"].get(name))
                if damage:
                    raise UserError("the checkpoint is damaged", where=str(self.folder / name), got=damage, fix=FIX)
            self._check_pieces()
        except BaseException:
            self.close()
            raise

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> int | None:
        info = self.tensors[name]
        num_read, crcs = 0, []
        for piece in self.manifest["keys"][name]["pieces"]:
            one_read, crc = self._read_piece(piece, info, start, stop, out)
            num_read += one_read
            if one_read:
                crcs.append(crc)
        assert num_read == out.size, f"{name}: {num_read} bytes of {out.size}"
        return crcs[0] if len(crcs) == 1 else None

    def verify(self) -> None:
        refuse_damage(self._files.values(), FIX)

    def _read_piece(
        self, piece: dict[str, Any], info: TensorInfo, start: int, stop: int, out: np.ndarray
    ) -> tuple[int, int | None]:
        """Bytes that the piece had of the rows, and their crc32 if they are whole rows."""
        offset, shape = piece["offset"] or [0], piece["shape"] or [1]
        low, high = max(start, offset[0]), min(stop, offset[0] + shape[0])
        if low >= high:
            return 0, None
        item = ITEM_BYTES[info.dtype]
        file = self._files[piece["file"]]
        width = (out.shape[1] // item) if len(shape) != 2 else shape[1]
        first_byte = (low - offset[0]) * width * item
        rows = slice(low - start, high - start)
        if width * item == out.shape[1]:
            crc: int | None = file.read_into(piece["name"], first_byte, out[rows])
        else:
            part = np.empty((high - low, width * item), np.uint8)
            file.read_into(piece["name"], first_byte, part)
            first, crc = offset[1] * item, None
            out[rows, first : first + width * item] = part
        return (high - low) * width * item, crc

    def _check_pieces(self) -> None:
        problems = []
        for name, entry in self.manifest["keys"].items():
            info, covered = self.tensors[name], 0
            for piece in entry["pieces"]:
                stored = self._files[piece["file"]].tensors.get(piece["name"])
                if stored is None or stored.info != TensorInfo(tuple(piece["shape"]), info.dtype):
                    problems.append(f"{piece['file']} does not hold {piece['name']} as the manifest says")
                    continue
                covered += stored.info.num_bytes
                if "crc32" in piece:
                    self._files[piece["file"]].expect({piece["name"]: piece["crc32"]})
                whole_rows = list(piece["shape"][1:]) == list(info.shape[1:])
                assert whole_rows or len(info.shape) == 2, f"{name}: pieces are blocks of a matrix"
            if covered != info.num_bytes:
                problems.append(f"{name}: {covered} bytes of {info.num_bytes}")
        if problems:
            raise UserError("the checkpoint is damaged", where=self.place, got=listed(problems))

    def rows_at_once(self, name: str) -> int | None:
        return None

    def identity(self) -> Any:
        return [self.manifest.get("manifest_crc32")] + [file_identity(self.folder / name) for name in self._files]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class TorchSource:
    """A state dict that torch saved, memory-mapped. Loaded with `weights_only`: code in it is never run."""

    def __init__(self, paths: list[Path]):
        import torch

        self.place = ", ".join(map(str, paths))
        self._paths = paths
        self._values: dict[str, Any] = {}
        problems: list[str] = []
        for path in paths:
            for name, value in _load_state_dict(path).items():
                if isinstance(value, torch.Tensor):
                    if problem := _unreadable(value):
                        problems.append(f"{name}: {problem}")
                    else:
                        self._values[name] = value.detach().contiguous()
        if problems:
            raise UserError(
                "the file holds tensors that are no plain tables of numbers",
                where=self.place,
                expected="dense tensors with values, of the known dtypes",
                got=listed(problems),
                fix="save dense tensors with the tool that made this file",
            )
        self.tensors = {
            name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in self._values.items()
        }

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        import torch

        value = self._values[name]
        rows = value.reshape(1) if value.dim() == 0 else value[start:stop]
        out[:] = rows.reshape(-1).view(torch.uint8).numpy().reshape(out.shape)

    def verify(self) -> None:
        pass

    def rows_at_once(self, name: str) -> int | None:
        return None

    def identity(self) -> Any:
        return [file_identity(path) for path in self._paths]

    def close(self) -> None:
        self._values.clear()


def _unreadable(value: Any) -> str:
    """Why a tensor of torch has no rows of bytes that mean its values, or ""."""
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided:
        return f"{value.layout} layout".removeprefix("torch.")
    if value.is_meta:
        return "a meta tensor, without values"
    if value.is_quantized or dtype not in ITEM_BYTES:
        return f"dtype {dtype}"
    return ""


def _load_state_dict(path: Path) -> dict[str, Any]:
    """The tensors by name; of a training checkpoint those under `state_dict`."""
    import pickle
    import zipfile

    import torch

    os.close(open_regular(path, "the file"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            "the file is a pickle that holds more than tensors; it was not run",
            where=str(path),
            expected="a state dict of tensors, or safetensors",
            got=first_line(error),
            fix="save the tensors alone as safetensors, with the tool that made this file",
        ) from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise UserError("the file cannot be read by torch", where=str(path), got=first_line(error)) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(
            "the file holds no state dict", where=str(path), expected="a table of tensors", got=type(content).__name__
        )
    return content


class MadeSource:
    """Values that a function makes: `make(name, start, stop, out)` fills rows of bytes."""

    def __init__(
        self,
        place: str,
        tensors: dict[str, TensorInfo],
        make: Callable[[str, int, int, np.ndarray], None],
        rows_at_once: Callable[[str], int] | None = None,
    ):
        self.place, self.tensors = place, tensors
        self._make, self._rows_at_once = make, rows_at_once

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        self._make(name, start, stop, out)

    def verify(self) -> None:
        pass

    def rows_at_once(self, name: str) -> int | None:
        return self._rows_at_once(name) if self._rows_at_once else None

    def identity(self) -> Any:
        return self.place

    def close(self) -> None:
        pass


def open_foreign(path: Path) -> SafetensorsSource | TorchSource:
    """The tensors of a checkpoint that is not ours: a file or a folder."""
    if not path.exists():  # a link to itself neither
        raise UserError("there is no such file or folder", got=str(path), fix="name the folder of the checkpoint")
    if path.is_dir():
        if safetensors_paths(path):
            return SafetensorsSource(path)
        found = sorted(file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES)
        if found:
            return TorchSource(found)
    elif path.suffix == ".safetensors":
        return SafetensorsSource(path)
    elif path.suffix in TORCH_SUFFIXES:
        return TorchSource([path])
    is_ours = path.is_dir() and ((path / MANIFEST_NAME).is_file() or list_checkpoints(path))
    raise UserError(
        "no weights found",
        where=str(path),
        expected="*.safetensors, or *.bin, *.ckpt, *.pt of torch",
        got="a checkpoint of ours, which needs no conversion" if is_ours else "",
        fix="use it as it is" if is_ours else "",
    )


def listed(items: list[str], limit: int = 40) -> str:
    """All of a list, or as much of it as a message can hold."""
    shown = "; ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}; and {len(items) - limit} more"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
