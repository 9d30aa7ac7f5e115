"""A disk that is full soon."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, num_kib: int) -> Iterator[Path]:
    """A real file system of `num_kib` where mounting is allowed, else a limit on the size of each file."""
    folder.mkdir()
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", folder], capture_output=True)
    if answer.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_kib * 1024, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only_disk(folder: Path) -> Iterator[bool]:
    """A folder in which nobody can write; False where that cannot be had, as for root without mounts."""
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield True
        folder.chmod(0o755)
        return
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder], capture_output=True)
    try:
        yield answer.returncode == 0
    finally:
        if answer.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)
