"""Which files a dataset's name means: paths, patterns, and braces as webdataset writes them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from model.errors import UserError

_MANY = 1000  # shards of one folder


def find_shards(patterns: Iterable[str], key: str) -> list[Path]:
    """The shards in order of their paths, each once: `x.tar`, `x/**/*.tar`, `x-{000..127}.tar`, `{a,b}/*.tar`.

    key: of the configuration, for messages. Raises `UserError` for a pattern without files, and for braces of which one name
    has none: a shard that did not arrive is not left out without a word.
    """
    shards: dict[str, Path] = {}  # by text, which is compared faster than a Path
    for pattern in patterns:
        for name in expanded(pattern, key):
            # A file of this very name is meant, though it may look like a pattern.
            found = [name] if Path(name).exists() else glob.glob(name, recursive=True)
            if not found:
                raise UserError(
                    "no input shards",
                    where=f"{key}={pattern}",
                    expected="webdataset .tar files",
                    got=f"no file of the name or pattern {name}",
                    fix="copy them to a local or shared folder first" if "://" in name else "check the path",
                )
            shards.update((str(path), path) for path in map(Path, found))
    plain = plain_files(shards)
    for name, path in shards.items():
        if name not in plain and not path.is_file():  # a pipe would be waited on for ever
            meant = f"{key}='{path}/*.tar'" if next(path.glob("*.tar"), None) else "tar -cf 000000.tar -C FOLDER ."
            raise UserError(
                "an input shard is no file",
                where=str(path),
                expected="a webdataset .tar file",
                got="a folder" if path.is_dir() else "neither a file nor a folder",
                fix=meant if path.is_dir() else "name a file",
            )
    # Their own order, which pathlib takes ten times as long for.
    return sorted(shards.values(), key=lambda path: path.parts)


def plain_files(paths: Iterable[str]) -> set[str]:
    """Those that are files and no links. A folder that holds many of them is listed once, which says it of all."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    plain: set[str] = set()
    for folder, some in by_folder.items():
        if len(some) < _MANY:
            plain.update(path for path in some if os.path.isfile(path) and not os.path.islink(path))
            continue
        with os.scandir(folder or ".") as entries:
            names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        plain.update(path for path in some if os.path.basename(path) in names)
    return plain


def expanded(pattern: str, key: str) -> list[str]:
    """The names that braces stand for; a file whose own name has braces is meant itself."""
    if Path(pattern).exists() or "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            "the braces of an input pattern cannot be read",
            where=f"{key}={pattern}",
            expected="braces like x-{000..127}.tar or {a,b}/*.tar",
            got=str(error),
        ) from error
