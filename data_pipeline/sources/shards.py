"""Reads webdataset tar shards, whole or damaged."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.sources.samples import BadSample
from model.errors import UserError

_END_BLOCK = bytes(tarfile.BLOCKSIZE)


class _DamageError(Exception):
    """The archive cannot be read any further; `key` is the sample it happened in, if known."""

    def __init__(self, detail: str, key: str = ""):
        super().__init__(detail)
        self.key = key


Group = tuple[str, dict[str, bytes]]  # key, and the files of one sample by extension


def read_groups(path: str | Path) -> Iterator[Group | BadSample]:
    """The files of each sample of one tar shard, in its order; what cannot be read as `BadSample`.

    Files of one sample stand together and share a key: the path up to the first dot of the file
    name, as webdataset has it. A damaged tar gives everything before the damage and then one
    `BadSample` with the reason `truncated_tar`, which covers the sample that the damage cut.
    A missing or unreadable file raises `UserError`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            "the input shard does not exist",
            where=str(path),
            expected="a webdataset tar file",
            fix="check the input pattern",
        )
    key, parts, duplicate = "", dict[str, bytes](), ""
    members = _members(path)
    while True:
        try:
            name, extension, data = next(members)
        except StopIteration:
            break
        except _DamageError as damage:
            # Without the damaged member's name, the open sample may lack parts: it cannot be kept.
            if parts and damage.key not in ("", key):
                yield _finish(key, parts, duplicate)
            yield BadSample(damage.key or key, "truncated_tar", str(damage))
            return
        if name != key and parts:
            yield _finish(key, parts, duplicate)
            parts, duplicate = {}, ""
        key = name
        duplicate = duplicate or (extension if extension in parts else "")
        parts[extension] = data
    if parts:
        yield _finish(key, parts, duplicate)


def _finish(key: str, parts: dict[str, bytes], duplicate: str) -> Group | BadSample:
    return BadSample(key, "duplicate_part", duplicate) if duplicate else (key, parts)


def split_name(path: str) -> tuple[str, str]:
    """webdataset's convention: the key is the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, bytes) of each file of the tar; raises `_DamageError` if it ends too soon.

    tarfile, and webdataset's own reader on top of it, takes a broken header as the end of the
    archive without a word. Hence the look at the block where reading ended.
    """
    key = ""
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name, extension = split_name(member.name)
                if not (member.isreg() and name and extension) or name.startswith("__"):
                    continue
                key = name
                stream = archive.extractfile(member)
                assert stream is not None, "a regular file has content"
                data = stream.read()
                if len(data) != member.size:
                    raise _DamageError(f"{len(data)} of {member.size} bytes of {member.name}", key)
                yield name, extension.lower(), data
                key = ""
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != _END_BLOCK:
                raise _DamageError(f"no readable member or end mark at byte {archive.offset}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _DamageError(str(error), key) from error
