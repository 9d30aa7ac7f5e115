"""Files that cannot be read or written, as one message to the user."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.durable import NO_SPACE
from model.errors import UserError

_FIXES = {
    errno.EACCES: "give this user the permission, or take another folder",
    errno.EPERM: "give this user the permission, or take another folder",
    errno.EROFS: "take a folder on a file system that can be written",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENFILE: "close other programs: the system has no more open files",
    errno.ELOOP: "mend the symbolic link, which leads to itself",
    errno.EISDIR: "there is a folder where a file is expected: move it away",
    errno.ENOTDIR: "there is a file where a folder is expected: move it away",
    errno.EIO: "the disk or the file server failed: look at the system's log",
    errno.ESTALE: "the file server replaced the file: mount it again",
}
_FIXES |= dict.fromkeys(NO_SPACE, "free space and run the same command again: finished files are kept")
# These are about processes and connections, not about files.
_OTHERS = (BrokenPipeError, ConnectionError, ChildProcessError, ProcessLookupError, InterruptedError, TimeoutError)


def of_file_error(error: OSError, where: str | Path = "") -> UserError | None:
    """What the system says of a file, a folder or a full disk; None for what a library says, or of processes.

    `where` stands for a file that the system does not name; without it an error that names none is about something else,
    full disks excepted.
    """
    is_full = error.errno in NO_SPACE
    if error.errno is None or isinstance(error, _OTHERS) or not (is_full or error.filename or where):
        return None
    return UserError(
        "the disk is full" if is_full else f"cannot read or write: {os.strerror(error.errno)}",
        where=str(error.filename or where),
        got=os.strerror(error.errno) if is_full else "",
        fix=_FIXES.get(error.errno, "look at the file and run the same command again: finished files are kept"),
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
