"""What there is to inspect below a folder that is itself nothing of ours, such as the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.documents.tokenizers import read_description
from model.checkpoint.manifest import CHECKPOINTS_FOLDER, MANIFEST_NAME, list_checkpoints

MAX_DEPTH = 5  # runs/NAME/packed/STAGE/SOURCE/held_out/NAME, seen from runs/NAME
MAX_SHOWN = 100


def find_below(folder: Path) -> dict[str, str]:
    """Relative path -> what lies there, in the order of the paths; the first `MAX_SHOWN`."""
    found = {}
    for path, kind in _walk(folder, MAX_DEPTH):
        found[str(path.relative_to(folder))] = kind
        if len(found) == MAX_SHOWN:
            break
    return found


def kind_of(folder: Path) -> str:
    """Of what `nextstate inspect FOLDER` would show, "" where that is nothing. Looks at names, reads no data."""
    if (folder / MANIFEST_NAME).is_file():
        return "a checkpoint"
    steps = list_checkpoints(folder)
    if steps:
        return f"a stage, newest checkpoint {steps[0].name}"
    for pattern, kind in (("*.tar", "raw shards"), ("*.idx", "token or packed files")):
        number = sum(1 for _ in folder.glob(pattern))
        if number:
            return f"{kind}: {number:,}"
    return "a text tokenizer" if read_description(folder) else ""


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    try:
        inside = sorted(Path(one.path) for one in os.scandir(folder) if one.is_dir(follow_symlinks=False))
    except PermissionError:
        return
    for path in inside:
        if path.name.startswith(".") or path.name == CHECKPOINTS_FOLDER:
            continue
        kind = kind_of(path)
        if kind:
            yield path, kind
        if depth > 1:
            yield from _walk(path, depth - 1)
