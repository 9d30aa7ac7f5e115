"""What lasts on a disk: files that appear whole or not at all, JSON, locks, fingerprints and checksums.

A process that dies leaves its temporaries behind; the next writer of the same files replaces or removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
import types
import typing
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from model.errors import UserError

TEMPORARY_MARK = ".tmp-"  # a temporary is `<final name>.tmp-<process id>`
# The disk is full, the user's quota is, or the file would pass the limit on file sizes.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_BLOCK_BYTES = 1 << 22
SECONDS_BETWEEN_TRIES = 0.1  # of a lock that another process holds
_SORTED_JSON = json.JSONEncoder(sort_keys=True)  # kept: to make one costs as much as a small manifest

Record = TypeVar("Record")


def temporary_path(final: Path) -> Path:
    return final.with_name(f"{final.name}{TEMPORARY_MARK}{os.getpid()}")


def flush_to_disk(path: Path) -> None:
    """Of a file its content, of a folder its names (so that a rename in it is durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished temporary file the final one; once this returns it survives a power cut."""
    flush_to_disk(temporary)
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one. Raises OSError; the old file is then untouched."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `replace_file`; one key a line, in the order given, ASCII only."""
    replace_file(path, json.dumps(value, indent=1) + "\n")


def read_json(
    path: Path,
    *,
    damaged: str = "a file is not valid JSON",
    fix: str = "delete it and run the command that writes it again",
) -> Any:
    """Raises `UserError` when the file is missing or is not JSON; `damaged` and `fix` are what it then says."""
    try:
        with open(path, "rb", buffering=0) as stream:  # a buffer costs more than reading a small file
            return json.loads(stream.readall())
    except FileNotFoundError:
        raise UserError("a file is missing", where=str(path), fix="run the command that writes it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(damaged, where=str(path), got=str(error), fix=fix) from None


def read_json_object(path: Path, *, damaged: str, fix: str) -> dict[str, Any]:
    """As `read_json`, of a file that holds one object."""
    value = read_json(path, damaged=damaged, fix=fix)
    if not isinstance(value, dict):
        raise UserError(damaged, where=str(path), expected="a JSON object", got=type(value).__name__, fix=fix)
    return value


def absent(paths: Mapping[str, Path | str | None]) -> list[str]:
    """A line for each path that is named and is not there, by the key that names it."""
    return [f"{key}={path} is not there" for key, path in paths.items() if path and not Path(path).exists()]


@contextlib.contextmanager
def told_no_space(
    folder: Path,
    needed_bytes: int,
    fix: str = "free space there (or raise the limit) and run the same command again: finished files are kept",
) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit into a `UserError` naming the folder and the bytes needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"cannot write: {os.strerror(error.errno)}",
            where=str(folder),
            expected=f"room for {needed_bytes:,} bytes",
            got=f"{shutil.disk_usage(folder).free:,} bytes free",
            fix=fix,
        ) from error


@contextlib.contextmanager
def lock(
    path: Path, taken: str, *, fix: str, where: Path | None = None, waiting_seconds: float = 0.0
) -> Iterator[None]:
    """Hold the lock file `path`, whose folder exists; the system frees the lock of a process that died.

    Another holder is waited for at most `waiting_seconds`, then a `UserError` says `taken`, where (the lock's folder
    unless `where` is given), who holds it and `fix`. The file goes with the lock, and stays after a kill.
    Raises OSError when the file cannot be written.
    """
    deadline = time.monotonic() + waiting_seconds
    while True:
        with path.open("a+", encoding="utf-8") as stream:
            _take(stream.fileno(), path, taken, fix, where or path.parent, deadline)
            if not is_named(stream.fileno(), path):
                continue  # its holder removed it while we waited: a lock on it would keep nobody out
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n")
            stream.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
                    path.unlink()  # while it is held
            return


def is_named(descriptor: int, path: Path) -> bool:
    """Is the open file the one that lies at `path`?"""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take(descriptor: int, path: Path, taken: str, fix: str, where: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip()
                raise UserError(taken, where=str(where), got=holder, fix=fix) from None
            time.sleep(min(SECONDS_BETWEEN_TRIES, max(0.0, deadline - time.monotonic())))
        except OSError as error:
            raise UserError(
                "the file system takes no locks",
                where=str(path),
                got=str(error),
                fix="choose a folder on another file system, or mount this one with locks",
            ) from None


def fingerprint_of(values: Any) -> str:
    """Of plain JSON values, the order of keys excepted: 32 hexadecimal digits."""
    return hashlib.blake2b(_SORTED_JSON.encode(values).encode(), digest_size=16).hexdigest()


def crc32_of(path: Path) -> str:
    """Eight hexadecimal digits; read in blocks (measured here: four times as fast as blake2b)."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def record_of(kind: type[Record], values: object) -> Record:
    """A dataclass `kind` of the JSON object `values`, which it keeps whole in its field `values`.

    Keys that are absent keep their defaults, unknown ones are no mistake. Raises ValueError that names the field whose
    value has another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is expected, not {type(values).__name__}")
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name != "values" and name in values:
            if not _fits(values[name], hint):
                raise ValueError(f"{name} cannot be {values[name]!r}")
            found[name] = values[name]
    return kind(values=values, **found)  # type: ignore[call-arg]


def _fits(value: object, hint: Any) -> bool:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    accepted = tuple(typing.get_origin(member) or member for member in members)
    if isinstance(value, bool):
        return bool in accepted
    return isinstance(value, accepted) or (float in accepted and isinstance(value, int))
