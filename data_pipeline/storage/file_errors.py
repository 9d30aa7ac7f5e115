"""Files that cannot be read or written, as one message to the user."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
# These are about processes and connections, not about files.
_OTHERS = (BrokenPipeError, ConnectionError, ChildProcessError, ProcessLookupError, InterruptedError, TimeoutError)


@contextmanager
def file_errors_are_user_errors(where: str | Path) -> Iterator[None]:
    """Turn what the system says of a file or folder into a `UserError`; `where` stands for a file that it does not name.

    Also a decorator.
    """
    try:
        yield
    except _OTHERS:
        raise
    except OSError as error:
        if error.errno is None:  # raised by a library, about the content
            raise
        raise UserError(
            f"cannot read or write: {os.strerror(error.errno)}",
            where=str(error.filename or where),
            fix=_FIXES.get(error.errno, "look at the file and run the same command again: finished files are kept"),
        ) from error
