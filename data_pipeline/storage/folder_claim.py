"""Who may write in a folder: one command at a time, or several of the same configuration (the tasks of a job array)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.durable import is_named
from model.errors import UserError

LOCK_NAME = ".lock"
_REMOVAL_ATTEMPTS = 4
_PATIENCE_SECONDS = 2.0  # for another one to write its claim down, or to end after it was killed
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_log = logging.getLogger(__name__)


@contextmanager
def claim_folder(folder: Path, work: str, configuration: str | None = None) -> Iterator[None]:
    """Make `folder` and hold it while the block runs. The system frees it when the process dies.

    With a `configuration` (a fingerprint) whoever has the same one may write at the same time. Raises `UserError`
    when another one writes there. Where the file system has no locks, that is logged and the block runs.
    """
    with file_errors_are_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor, is_held = _claim(path, work, configuration)
    try:
        yield
    finally:
        if is_held:
            _remove_as_last(descriptor, path)
        os.close(descriptor)


def clear_claim(folder: Path) -> None:
    """Take away what a holder that was killed at its very end left in a folder where nothing is to do any more.

    Somebody else's claim stays, and so does everything in a folder that cannot be written.
    """
    path = folder / LOCK_NAME
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            _remove_as_last(descriptor, path)
        finally:
            os.close(descriptor)


def _remove_as_last(descriptor: int, path: Path) -> None:
    """The last one takes the file away, while nobody else can hold it. Two who end at once are each in the other's way."""
    for attempt in range(_REMOVAL_ATTEMPTS):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            with contextlib.suppress(OSError):  # read-only by now
                if is_named(descriptor, path):
                    path.unlink()
            return
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(random.uniform(0, 0.01 * (attempt + 1)))


def _claim(path: Path, work: str, configuration: str | None) -> tuple[int, bool]:
    """The open lock file, and whether it is held: not where the file system has no locks."""
    while True:
        with file_errors_are_user_errors(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _acquire(descriptor, path.parent, work, configuration)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            _log.warning("%s: no locks on this file system; see that nobody else writes there", path.parent)
            return descriptor, False
        except UserError:
            os.close(descriptor)
            raise
        if is_named(descriptor, path):
            return descriptor, True
        os.close(descriptor)  # removed by its last holder meanwhile: a lock on it would keep nobody out


def _acquire(descriptor: int, folder: Path, work: str, configuration: str | None) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        if configuration is not None and _try_lock(descriptor, fcntl.LOCK_SH):
            if _read_claim(descriptor)[0] == configuration:
                return
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        if _try_lock(descriptor, fcntl.LOCK_EX):
            _write_claim(descriptor, configuration or "", work)
            if configuration is None:
                return
            continue  # takes it together with others now, if none of another configuration came between
        if time.monotonic() > deadline:
            raise UserError(
                "another command is writing in this folder",
                where=str(folder),
                expected=f"nobody, or {work} with the same input and configuration" if configuration else "nobody",
                got=_read_claim(descriptor)[1] or "a process that has not said what it does",
                fix="wait for it, stop it, or choose another target",
            )
        time.sleep(0.05)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_claim(descriptor: int, configuration: str, work: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{configuration}\n{work}, process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _read_claim(descriptor: int) -> tuple[str, str]:
    """Configuration, and who."""
    lines = [*os.pread(descriptor, 4096, 0).decode("utf-8", "replace").split("\n"), "", ""]
    return lines[0], lines[1]
