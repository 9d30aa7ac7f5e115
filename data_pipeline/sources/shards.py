"""Reads webdataset tar shards, whole or damaged."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data_pipeline.sources.samples import BadSample
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.errors import UserError

_END_BLOCK = bytes(tarfile.BLOCKSIZE)
MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax record, which tarfile reads into memory
MAX_PART_BYTES = 2 << 30  # of one file of a sample
MAX_PARTS = 1_000  # files of one sample
MAX_HELD_BYTES = 1 << 30  # of samples whose files do not stand together, until their last file comes

Group = tuple[str, dict[str, bytes]]  # key, and the files of one sample by extension
Made = TypeVar("Made")


class DamageError(Exception):
    """The archive cannot be read any further; `key` is the sample it happened in, if known."""

    def __init__(self, detail: str, key: str = ""):
        super().__init__(detail)
        self.key = key


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers that would be read into memory whatever their size."""

    _LONG_HEADERS = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # where tarfile dispatches on the type
        if self.type in self._LONG_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.SubsequentHeaderError(  # type: ignore[attr-defined]
                f"a header of {self.size} bytes"
            )
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclass
class _Open:
    """A sample of which files may still come."""

    parts: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""  # why it cannot be used
    detail: str = ""
    num_members: int = 0

    def add(self, member: _Member) -> None:
        self.num_members += 1
        if member.extension in self.parts:
            self.refuse("duplicate_part", member.extension)
        elif member.problem:
            self.refuse(member.problem, member.extension)
        elif len(self.parts) == MAX_PARTS:
            self.refuse("too_many_parts", f"more than {MAX_PARTS}")
        if not self.reason:
            self.parts[member.extension] = member.data

    def refuse(self, reason: str, detail: str) -> None:
        if not self.reason:
            self.reason, self.detail = reason, detail
        self.parts.clear()

    def finish(self, key: str) -> Group | BadSample:
        return BadSample(key, self.reason, self.detail) if self.reason else (key, self.parts)


@dataclass(frozen=True)
class _Member:
    key: str
    extension: str
    data: bytes = b""
    problem: str = ""  # reason why its sample cannot be used


@dataclass(frozen=True)
class Place:
    """Where a plain file of a sample lies in its shard."""

    key: str
    extension: str
    offset: int  # of its first byte
    size: int  # bytes


def places_in(path: Path) -> Iterator[Place | None]:
    """The plain files of an uncompressed shard, in its order, from headers alone; None for links and other members.

    Raises `DamageError` where it can be read no further, `UserError` when the system does not let us read it.
    """

    def place(_: tarfile.TarFile, info: tarfile.TarInfo, key: str, extension: str) -> Place | None:
        return Place(key, extension, info.offset_data, info.size) if info.isreg() and not info.issparse() else None

    with file_errors_are_user_errors(path):
        yield from _members(path, place, "r:")


def read_groups(path: str | Path) -> Iterator[Group | BadSample]:
    """The files of each sample of one tar shard, in its order; what cannot be read as `BadSample`.

    Files of one sample share a key: the path up to the first dot of the file name, as webdataset has it. They need not
    stand together: the headers are read first, and a sample is given when its last file has come. Links and other
    members that are no plain files spoil their sample, so that a caption never goes without its picture. A damaged tar
    gives everything before the damage and then one `BadSample` with the reason `truncated_tar`, which covers the
    sample that the damage cut. Raises `UserError` for a shard that is missing or that the system does not let us read.
    """
    path = Path(path)
    with file_errors_are_user_errors(path):
        if not path.is_file():
            raise UserError(
                "the input shard does not exist",
                where=str(path),
                expected="a webdataset tar file",
                fix="check the input pattern",
            )
        expected = _count_members(path)
        held: dict[str, _Open] = {}  # by key; the sample of the newest file among them
        held_bytes = 0
        current = ""
        members = _members(path, _read_member)
        while True:
            try:
                member = next(members)
            except StopIteration:
                break
            except DamageError as damage:
                # Without the damaged member's name, the open sample may lack parts: it cannot be kept.
                if (
                    current in held
                    and damage.key not in ("", current)
                    and held[current].num_members == expected[current]
                ):
                    yield held[current].finish(current)
                cut = damage.key or current
                yield BadSample(cut, "truncated_tar", str(damage))
                for key in held.keys() - {current, cut}:  # their other files lie behind the damage
                    yield BadSample(key, "truncated_tar", str(damage))
                return
            if member.key != current and current in held and held[current].num_members >= expected[current]:
                done = held.pop(current)
                held_bytes -= sum(map(len, done.parts.values()))
                yield done.finish(current)
            current = member.key
            sample = held.setdefault(current, _Open())
            before = sum(map(len, sample.parts.values()))
            sample.add(member)
            held_bytes += sum(map(len, sample.parts.values())) - before
            if held_bytes > MAX_HELD_BYTES and len(held) > 1:
                sample.refuse("scattered_sample", "too much lies between its files: sort the shard by name")
                held_bytes = sum(len(data) for one in held.values() for data in one.parts.values())
        for key, sample in held.items():
            yield sample.finish(key)


def _count_members(path: Path) -> Counter[str]:
    """How many files of each key the shard holds, up to its end or to where it is damaged. Reads headers only."""
    counts: Counter[str] = Counter()
    try:
        for member in _members(path, _name_alone):
            counts[member.key] += 1
    except DamageError:
        pass  # the second reading says so
    return counts


def split_name(path: str) -> tuple[str, str]:
    """webdataset's convention: the key is the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension


def _name_of(info: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member that belongs to a sample; empty for folders and webdataset's own notes."""
    is_note = "/" not in info.name and info.name.startswith("__") and info.name.endswith("__")
    if info.isdir() or is_note:
        return "", ""
    key, extension = split_name(info.name)
    return key, extension.lower()


def _members(
    path: Path, read: Callable[[tarfile.TarFile, tarfile.TarInfo, str, str], Made], mode: str = "r:*"
) -> Iterator[Made]:
    """What `read` makes of each file that belongs to a sample; raises `DamageError` for an early end.

    Archives that were joined (`cat a.tar b.tar`) follow one another; keys of the second one begin with "#1/", as it may
    have those of the first again. tarfile, and webdataset's own reader on top of it, stop at the first archive's end, and
    take a broken header as the end without a word. Hence the look at what stands where reading ended.
    """
    key, number = "", 0
    try:
        with tarfile.open(path, mode, tarinfo=_BoundedTarInfo) as first:  # type: ignore[call-overload]
            archive: tarfile.TarFile | None = first
            while archive is not None:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                    name, extension = _name_of(info)
                    if name and extension:
                        key = f"#{number}/{name}" if number else name
                        yield read(archive, info, key, extension)
                        key = ""
                archive, number = _next_archive(archive), number + 1
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamageError(str(error), key) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the archive
            raise
        raise DamageError(str(error), key) from error


def _name_alone(archive: tarfile.TarFile, info: tarfile.TarInfo, key: str, extension: str) -> _Member:
    return _Member(key, extension)


def _read_member(archive: tarfile.TarFile, info: tarfile.TarInfo, key: str, extension: str) -> _Member:
    if not info.isreg() or info.issparse():
        return _Member(key, extension, problem="link_in_tar" if info.issym() or info.islnk() else "not_a_plain_file")
    if info.size > MAX_PART_BYTES:
        return _Member(key, extension, problem="part_too_large")
    stream = archive.extractfile(info)
    assert stream is not None, "a regular file has content"
    data = stream.read()
    if len(data) != info.size:
        raise DamageError(f"{len(data)} of {info.size} bytes of {info.name}", key)
    return _Member(key, extension, data)


def _next_archive(archive: tarfile.TarFile) -> tarfile.TarFile | None:
    """The archive that stands behind this one, which was read to its end mark; None where only zeros follow."""
    stream = archive.fileobj
    assert stream is not None
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != _END_BLOCK:
        raise DamageError(f"no readable member or end mark at byte {archive.offset}")
    position = archive.offset + tarfile.BLOCKSIZE
    while block := stream.read(1 << 20):
        if rest := block.lstrip(b"\0"):
            start = position + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            stream.seek(start)
            try:
                return tarfile.TarFile(fileobj=stream, mode="r", tarinfo=_BoundedTarInfo)
            except tarfile.TarError as error:
                raise DamageError(f"other data after the end mark, at byte {start}: {error}") from error
        position += len(block)
    return None
