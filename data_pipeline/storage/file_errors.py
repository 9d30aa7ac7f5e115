"""Files that cannot be read or written, as one message to the user."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.durable import NO_SPACE
from model.errors import UserError

_FIXES = {
    errno.ENOENT: "check the path: the file, or the folder that it would be in, is not there",
    errno.EACCES: "give this user the permission, or take another folder",
    errno.EPERM: "give this user the permission, or take another folder",
    errno.EROFS: "take a folder on a file system that can be written",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENFILE: "close other programs: the system has no more open files",
    errno.ELOOP: "mend the symbolic link, which leads to itself",
    errno.EEXIST: "there is a file where a folder is expected: move it away",
    errno.EISDIR: "there is a folder where a file is expected: move it away",
    errno.ENOTDIR: "there is a file where a folder is expected: move it away",
    errno.EIO: "the disk or the file server failed: look at the system's log",
    errno.ESTALE: "the file server replaced the file: mount it again",
}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}  # about no file: it may be a socket or a pipe that could not be opened
_FIXES |= dict.fromkeys(NO_SPACE, "free space and run the same command again: finished files are kept")
# These are about processes and connections, not about files.
_OTHERS = (BrokenPipeError, ConnectionError, ChildProcessError, ProcessLookupError, InterruptedError, TimeoutError)


def of_file_error(error: Exception, where: str | Path = "") -> UserError | None:
    """What the system says of a file, a folder, a full disk or the limit on open files; None for anything else.

    `where` stands for a file that the system does not name; without it an error that names none is about something else,
    full disks and the limit excepted. Libraries (gloo, the loader of modules) tell of the limit in errors of their own.
    """
    if not isinstance(error, OSError):
        told = next((number for number in _TOO_MANY if os.strerror(number) in str(error)), None)
        return None if told is None else _told(told, where)
    is_about_all = error.errno in (*NO_SPACE, *_TOO_MANY)
    if error.errno is None or isinstance(error, _OTHERS) or not (is_about_all or error.filename or where):
        return None
    return _told(error.errno, error.filename or where)


def _told(number: int, where: str | Path) -> UserError:
    is_full = number in NO_SPACE
    return UserError(
        "the disk is full" if is_full else f"cannot read or write: {os.strerror(number)}",
        where=str(where),
        got=os.strerror(number) if is_full else "",
        fix=_FIXES.get(number, "look at the file and run the same command again: finished files are kept"),
    )


@contextmanager
def file_errors_are_user_errors(where: str | Path) -> Iterator[None]:
    """Turn what the system says of a file or folder into a `UserError`; `where` stands for a file that it does not name.

    Also a decorator.
    """
    try:
        yield
    except OSError as error:
        told = of_file_error(error, where)
        if told is None:
            raise
        raise told from error


def check_writable(folder: Path) -> None:
    """Raises the `UserError` that the first file in `folder` would be refused with, before anything is computed.

    Makes nothing: of a folder that is not there, the nearest one above it is tried.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        if error.errno is None:
            raise
        raise _told(error.errno, folder) from error
