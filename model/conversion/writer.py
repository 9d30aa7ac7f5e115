"""Carries out a plan: rows stream from the sources into files, checked, resumable, published by one rename.

Work happens in `.NAME.converting` beside the target: `plan.json` says what is being made, `progress.jsonl` which
blocks of rows are written and with which checksums, `output/` becomes the target. A killed conversion leaves this
folder; the same command goes on with it, and any other starts it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.checksums import join_crc32
from model.conversion.plan import Piece, Plan, Segment, Target
from model.conversion.progress import Progress
from model.conversion.tensors import ITEM_BYTES, TensorInfo, cast_rows, is_finite
from model.durable import NO_SPACE, flush_to_disk, replace_file
from model.errors import UserError

BLOCK_BYTES = 2 << 20  # of one read and write: small enough to be in the cache when it is checksummed and written
FLUSH_SECONDS = 0.05


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a target; `number` is its place in the plan."""

    number: int
    target: Target
    start: int
    stop: int


@dataclass
class Written:
    """What `finish` is told: checksums (crc32, eight hexadecimal digits) and sizes of the weights' files."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, str]  # stored name -> crc32
    non_finite: list[str] = field(default_factory=list)  # targets with infinities or NaN


@dataclass
class Result:
    """Figures of a conversion; `resumed_bytes` were there from an earlier run that was killed."""

    num_bytes: int
    seconds: float
    resumed_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def execute(plan: Plan, target: Path, finish: Callable[[Path, Written], None], *, threads: int = 4) -> Result:
    """Write the plan's files, let `finish` add the others, and publish all of it as the folder `target`.

    Raises `UserError` for a target that exists, a disk without room and a conversion that another process is making.
    """
    target = target.absolute()
    work = _work_folder(target)
    started = time.monotonic()
    with _no_space_told(target.parent, plan.num_bytes), _locked(work):
        fingerprint = plan.fingerprint()
        if _is_published(target, work, fingerprint):
            _remove_work(work)
            return Result(plan.num_bytes, time.monotonic() - started, plan.num_bytes)
        _refuse_existing(target)
        done = _prepare(plan, work, fingerprint)
        _check_room(plan, work)
        writer = _Writer(plan, work, done)
        resumed = writer.progress.num_bytes
        try:
            writer.write(threads)
            _verify_sources(plan, work)
            written = writer.read_back(threads)
            finish(work / "output", written)
            _sync_folder(work / "output")
        finally:
            writer.close()
        os.rename(work / "output", target)
        flush_to_disk(target.parent)
        _remove_work(work)
    return Result(plan.num_bytes, time.monotonic() - started, resumed)


def _verify_sources(plan: Plan, work: Path) -> None:
    """What was made of damaged tensors is not kept for the next run."""
    try:
        for source in plan.sources:
            source.verify()
    except UserError:
        (work / "plan.json").unlink(missing_ok=True)
        raise


def refuse_existing(target: Path) -> None:
    """Early, before sources are read. A target whose work folder is still there is `execute`'s to judge."""
    if _work_folder(target.absolute()).exists():
        return
    _refuse_existing(target)


def _refuse_existing(target: Path) -> None:
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if target.is_symlink() or (target.exists() and not is_empty):
        raise UserError(
            "the destination exists",
            where=str(target),
            expected="a new folder",
            fix="name another target, or remove this one first",
        )


def _work_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.converting"


class _Writer:
    """The open files of one conversion."""

    def __init__(self, plan: Plan, work: Path, done: dict[int, list[int]]):
        self.plan, self.work = plan, work
        self.blocks = list(_blocks(plan))
        self.done = done
        self.non_finite: set[str] = set()
        self.inherited = set(done)  # blocks of an earlier run
        self.positions = {file.name: file.positions for file in plan.files}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        for file in plan.files:
            path = work / "output" / file.name
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors[file.name] = descriptor
            os.ftruncate(descriptor, file.num_bytes)
            _write_all(descriptor, memoryview(file.header), 0)
        self._journal = os.open(work / "progress.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        written = sum(_block_bytes(self.blocks[number]) for number in done)
        self.progress = Progress("convert", sum(map(_block_bytes, self.blocks)), written)

    def write(self, threads: int) -> None:
        waiting = [block for block in self.blocks if block.number not in self.done]
        written = threading.Event()
        with ThreadPoolExecutor(1) as background:
            flushed = background.submit(self._flush_until, written)
            try:
                run_all(self._convert, waiting, threads)
            finally:
                written.set()
            flushed.result()
        self.progress.finish()

    def _flush_until(self, written: threading.Event) -> None:
        """Start what is written on its way to the disk, and give back the memory of what has arrived there.

        At the end little is left to wait for, and a conversion of any size leaves the system's cache to others.
        """
        while not written.wait(FLUSH_SECONDS):
            for descriptor in self._descriptors.values():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _convert(self, block: Block) -> None:
        rows, crc = gather(block)
        self._note_non_finite(block, rows)
        item = ITEM_BYTES[block.target.info.dtype]
        sums = []
        for piece in block.target.pieces:
            low = max(block.start, piece.first_row)
            high = min(block.stop, piece.first_row + piece.num_rows)
            if low >= high:
                sums.append(0)
                continue
            columns = slice(piece.first_column * item, (piece.first_column + piece.num_columns) * item)
            part = np.ascontiguousarray(rows[low - block.start : high - block.start, columns])
            view = part.reshape(-1).data
            # What the source said of these very bytes, so that no pass over them is needed; made and cut ones have none.
            known = crc is not None and part.nbytes == rows.nbytes
            sums.append(crc if known and crc is not None else zlib.crc32(view))
            start = self.positions[piece.file][piece.stored_name]
            start += (low - piece.first_row) * piece.num_columns * item
            _write_all(self._descriptors[piece.file], view, start)
            # At once, while both are in the cache: a comparison costs less than a second checksum.
            if not np.array_equal(self._read(piece.file, start, view.nbytes), part.reshape(-1)):
                raise self._differs(piece)
        line = json.dumps([block.number, sums], separators=(",", ":")).encode() + b"\n"
        with self._lock:
            _write_all(self._journal, memoryview(line), None)
            self.done[block.number] = sums
        self.progress.add(_block_bytes(block))

    def _note_non_finite(self, block: Block, rows: np.ndarray) -> None:
        if not is_finite(rows, block.target.info.dtype):
            self.non_finite.add(block.target.name)

    def read_back(self, threads: int) -> Written:
        """Check what an earlier run has written while the disk takes the rest; the checksums of all of it."""
        inherited = [block for block in self.blocks if block.number in self.inherited]
        self.progress = Progress("check", sum(map(_block_bytes, inherited)), 0)
        with ThreadPoolExecutor(1) as syncing:
            synced = [syncing.submit(os.fsync, one) for one in self._descriptors.values()]
            run_all(self._check, inherited, threads)
            for one in synced:
                one.result()
        self.progress.finish()
        return self._checksums()

    def _check(self, block: Block) -> None:
        item = ITEM_BYTES[block.target.info.dtype]
        for piece, expected in zip(block.target.pieces, self.done[block.number], strict=True):
            low = max(block.start, piece.first_row)
            high = min(block.stop, piece.first_row + piece.num_rows)
            if low >= high:
                continue
            width = piece.num_columns * item
            position = self.positions[piece.file][piece.stored_name] + (low - piece.first_row) * width
            content = self._read(piece.file, position, (high - low) * width)
            if zlib.crc32(content.data) != expected:
                raise self._differs(piece)
            self._note_non_finite(block, content)
        self.progress.add(_block_bytes(block))

    def _read(self, file: str, position: int, num_bytes: int) -> np.ndarray:
        content = np.empty(num_bytes, np.uint8)
        num_read = os.preadv(self._descriptors[file], [content.data], position)
        return content[:num_read]

    def _differs(self, piece: Piece) -> UserError:
        """Nothing of this attempt is worth keeping: the next run starts over."""
        (self.work / "plan.json").unlink(missing_ok=True)
        return UserError(
            "what was written reads back differently",
            where=f"{piece.file}: {piece.stored_name}",
            fix="check the disk, then run the same command again: it starts over",
        )

    def _checksums(self) -> Written:
        """Of each tensor and each file, joined from those of the blocks."""
        tensors: dict[tuple[str, str], tuple[int, int]] = {}
        for block in self.blocks:
            item = ITEM_BYTES[block.target.info.dtype]
            for piece, value in zip(block.target.pieces, self.done[block.number], strict=True):
                rows = min(block.stop, piece.first_row + piece.num_rows) - max(block.start, piece.first_row)
                if rows <= 0:
                    continue
                crc, length = tensors.get((piece.file, piece.stored_name), (0, 0))
                size = rows * piece.num_columns * item
                tensors[piece.file, piece.stored_name] = (join_crc32(crc, value, size), length + size)
        files = {}
        for file in self.plan.files:
            crc = zlib.crc32(file.header)
            for name in file.positions:
                value, length = tensors.get((file.name, name), (0, 0))
                crc = join_crc32(crc, value, length)
            header = f"{zlib.crc32(file.header):08x}"
            files[file.name] = {"bytes": file.num_bytes, "crc32": f"{crc:08x}", "header_crc32": header}
        return Written(files, {name: f"{crc:08x}" for (_, name), (crc, _) in tensors.items()}, sorted(self.non_finite))

    def close(self) -> None:
        for descriptor in (*self._descriptors.values(), self._journal):
            os.close(descriptor)


def run_all(work: Callable[[Any], None], items: list[Any], threads: int) -> None:
    """`work` on every item in threads; the first failure cancels the rest."""
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def split_rows(target: Target) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of the blocks in which a target is made."""
    wanted = [rows for segment in target.segments if (rows := segment.source.rows_at_once(segment.name)) is not None]
    step = max([1, *wanted] if wanted else [1, BLOCK_BYTES // max(1, target.info.row_bytes)])
    for start in range(0, target.info.num_rows, step):
        yield start, min(start + step, target.info.num_rows)


def _blocks(plan: Plan) -> Iterator[Block]:
    spans = [(target, *rows) for target in plan.targets for rows in split_rows(target)]
    for number, (target, start, stop) in enumerate(spans):
        yield Block(number, target, start, stop)


def _block_bytes(block: Block) -> int:
    return (block.stop - block.start) * block.target.info.row_bytes


def gather(block: Block) -> tuple[np.ndarray, int | None]:
    """The block's rows from all segments that have some of them, uint8 [rows, row_bytes], and their crc32 if known."""
    info = block.target.info
    rows = np.empty((block.stop - block.start, info.row_bytes), np.uint8)
    position = 0
    joined: int | None = 0
    for segment in block.target.segments:
        low, high = max(block.start, position), min(block.stop, position + segment.count)
        if low < high:
            into = rows[low - block.start : high - block.start]
            crc = _read_segment(segment, segment.start + low - position, into, info)
            joined = None if joined is None or crc is None else join_crc32(joined, crc, into.nbytes)
        position += segment.count
    return rows, joined


def _read_segment(segment: Segment, first: int, into: np.ndarray, info: TensorInfo) -> int | None:
    """Rows of a source from `first` on, cast where dtypes differ; crc32 of what is in `into`, if the source knows it."""
    if segment.dtype == info.dtype:
        return segment.source.read_rows(segment.name, first, first + len(into), into)
    raw = np.empty((len(into), info.row_elements * ITEM_BYTES[segment.dtype]), np.uint8)
    segment.source.read_rows(segment.name, first, first + len(into), raw)
    into[:] = cast_rows(raw, segment.dtype, info.dtype)
    return None


def _prepare(plan: Plan, work: Path, fingerprint: str) -> dict[int, list[int]]:
    """The blocks that an interrupted run of this very plan has written; otherwise an empty work folder."""
    description = work / "plan.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(description.read_bytes())["fingerprint"] == fingerprint:
            (work / "output").mkdir(exist_ok=True)
            _remove_all_but(work / "output", {file.name for file in plan.files})
            return _read_journal(work / "progress.jsonl")
    description.unlink(missing_ok=True)
    (work / "progress.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work / "output", ignore_errors=True)
    (work / "output").mkdir()
    replace_file(description, json.dumps({"fingerprint": fingerprint, "what": plan.what}))
    return {}


def _remove_all_but(output: Path, names: set[str]) -> None:
    """What `finish` of a killed run has added, whole or half-written: it is added again."""
    for path in sorted(output.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds files of the plan
                path.rmdir()
        elif str(path.relative_to(output)) not in names:
            path.unlink()


def _read_journal(path: Path) -> dict[int, list[int]]:
    """Complete lines only: the last one may be cut, and is then cut away so that the next one starts afresh."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return dict(map(json.loads, whole.splitlines()))


def _is_published(target: Path, work: Path, fingerprint: str) -> bool:
    """Was a run of this plan killed between its rename and the end?"""
    if not target.is_dir() or (work / "output").exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError):
        result: bool = json.loads((work / "plan.json").read_bytes())["fingerprint"] == fingerprint
        return result
    return False


def _check_room(plan: Plan, work: Path) -> None:
    present = sum(file.stat().st_blocks * 512 for file in (work / "output").rglob("*") if file.is_file())
    free = shutil.disk_usage(work).free
    if plan.num_bytes - present > free:
        raise UserError(
            "the disk has no room for the output",
            where=str(work.parent),
            expected=f"{plan.num_bytes - present:,} bytes free",
            got=f"{free:,}",
            fix="free space, or name another target",
        )


@contextlib.contextmanager
def _no_space_told(folder: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            fix = "free space and run the same command: it goes on where it stopped"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            fix = "name a target in a folder that can be written"
        else:
            raise
        raise UserError(
            "the output cannot be written",
            where=str(error.filename or folder),
            expected=f"room for {num_bytes:,} bytes",
            got=os.strerror(error.errno),
            fix=fix,
        ) from None


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """The work folder for this process alone; the system frees the lock of one that died.

    Only who holds the lock removes anything: a process that is refused leaves the folder as it is.
    """
    descriptor = _lock(work)
    try:
        yield
    finally:
        # Nothing begun, or all published: no folder stays behind.
        if not (work / "plan.json").exists():
            _remove_work(work)
        os.close(descriptor)


def _lock(work: Path) -> int:
    """The locked descriptor of `lock` in the work folder, which another process may be removing at this moment."""
    work.parent.mkdir(parents=True, exist_ok=True)
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that its last holder has removed locks nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(work / "lock"), os.fstat(descriptor)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                "another process is writing this target", where=str(work), fix="wait for it, or name another target"
            ) from None
        os.close(descriptor)


def _remove_work(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)


def _write_all(descriptor: int, view: memoryview, position: int | None) -> None:
    while len(view):
        if position is None:
            num_written = os.write(descriptor, view)
        else:
            num_written = os.pwrite(descriptor, view, position)
            position += num_written
        view = view[num_written:]


def _sync_folder(folder: Path) -> None:
    """Everything below a folder, to the disk (the weights are there already)."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            flush_to_disk(path)
    for path in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
        flush_to_disk(path)
