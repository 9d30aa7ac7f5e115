"""The folder side of the checkpoint format: which folders are checkpoints and what their manifests say. No torch.

The format itself is described in `model/checkpoint/reader.py`.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from model.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKPOINTS_FOLDER = "checkpoints"
STEP_FOLDER_PATTERN = re.compile(r"step_(\d{8,})")


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
        raise UserError("the checkpoint's manifest is damaged", where=str(path), got=str(error)) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION or not isinstance(manifest.get("keys"), dict):
        raise UserError(
            "this checkpoint cannot be read by this version",
            where=str(path),
            expected=f"format_version {FORMAT_VERSION} and a table of keys",
            got=f"format_version {version}",
        )
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """What stands under `manifest_crc32`: of all else in the manifest."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
