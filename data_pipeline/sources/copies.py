"""Local copies of remote shards: fetched ahead, kept as long as there is room, shared by processes.

Whoever reads or writes a copy holds a lock on the file, which the system frees when the process dies. A file that nobody holds
may go: a copy to make room, half of one because its process is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.sources.inputs import Shard
from data_pipeline.sources.remote import RemoteConfig, RemoteShard, read_blocks
from data_pipeline.storage.read_ahead import Readers
from model.durable import TEMPORARY_MARK, publish, temporary_path, told_no_space
from model.errors import UserError


class Held:
    """A file on this machine, until `release`; a copy is locked that long."""

    def __init__(self, path: Path, descriptor: int | None = None):
        self.path, self._descriptor = path, descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ShardCopies:
    """Copies in one folder, which other processes may use too. Without `config.cache` none stays that nobody reads."""

    def __init__(self, folder: Path, config: RemoteConfig):
        self.folder, self.config = Path(config.cache) if config.cache else folder, config
        self._most_bytes = int(config.cache_gigabytes * 1e9) if config.cache else 0
        self._stopping = threading.Event()

    def hold(self, shard: Shard) -> Held:
        """The shard as a local file. Raises `UserError` when it cannot be fetched or kept."""
        if isinstance(shard, Path):
            return Held(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path_of(shard)
        while True:
            held = _hold_existing(path, shard.num_bytes)
            if held is not None:
                return held
            self.make_room(shard.num_bytes)
            self._fetch(shard, path)

    @contextmanager
    def ahead(self, shards: Sequence[Shard]) -> Iterator[Iterator[Held | UserError]]:
        """Each shard in turn, held until the next one is asked for, which is fetched meanwhile."""
        reader = Readers(1, "shard_copies")
        waiting: list[Future[Held]] = []

        def in_turn() -> Iterator[Held | UserError]:
            for number in range(len(shards)):
                while len(waiting) < min(2, len(shards) - number):
                    waiting.append(reader.submit(self.hold, shards[number + len(waiting)]))
                try:
                    held = waiting[0].result()
                except UserError as error:
                    waiting.pop(0)
                    yield error
                    continue
                yield held
                waiting.pop(0)
                held.release()
                if not self._most_bytes:
                    self.make_room(0)

        self._stopping.clear()
        try:
            yield in_turn()
        finally:
            self._stopping.set()
            for future in waiting:
                future.cancel()
            reader.close()
            for future in waiting:
                if not future.cancelled() and future.exception() is None:
                    future.result().release()
            if not self._most_bytes:
                self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Remove copies that nobody holds, those read longest ago first, until so many bytes more may be kept."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another process was first
                status = path.stat()
                found.append((TEMPORARY_MARK not in path.name, status.st_mtime, status.st_size, path))
        total = sum(size for _, _, size, _ in found)
        for is_copy, _, size, path in sorted(found):
            if is_copy and total + num_bytes <= self._most_bytes:
                return
            if _remove_unless_held(path):
                total -= size

    def _path_of(self, shard: RemoteShard) -> Path:
        """A name of its own for each content of each URL; without a version the size has to tell."""
        identity = f"{shard}\n{shard.num_bytes}\n{shard.version}"
        return self.folder / f"{hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()}-{shard.name}"

    def _fetch(self, shard: RemoteShard, path: Path) -> None:
        temporary = temporary_path(path)
        with told_no_space(self.folder, shard.num_bytes), temporary.open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not os.fstat(stream.fileno()).st_nlink:  # taken for a dead one's before it was locked
                return
            end = 0
            try:
                for offset, block in read_blocks(shard, self.config):
                    if self._stopping.is_set():
                        raise UserError("the copy of a shard is no longer wanted", where=str(shard))
                    stream.seek(offset)
                    stream.write(block)
                    end = offset + len(block)
            except FileNotFoundError:
                raise UserError(
                    "a shard is no longer on its server", where=str(shard), fix="nextstate tokenize repair asks anew"
                ) from None
            assert end == shard.num_bytes
            stream.flush()
            publish(temporary, path)


def _hold_existing(path: Path, num_bytes: int) -> Held | None:
    """A copy that is there and stays there while it is held; None when it is not, or was removed in between."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == num_bytes:
            os.utime(descriptor)  # read just now
            return Held(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_unless_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False
