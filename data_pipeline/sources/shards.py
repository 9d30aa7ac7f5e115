"""Reads webdataset tar shards, whole or damaged."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from data_pipeline.sources.bounded_tar import BoundedTar, Member
from data_pipeline.sources.samples import BadSample
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from model.errors import UserError

_END_BLOCK = bytes(tarfile.BLOCKSIZE)
BLOCKS_AT_ONCE = 16  # behind an archive; no more than one goes back by in a compressed file
MAX_SAMPLE_BYTES = 2 << 30  # of all files of one sample
MAX_PARTS = 1_000  # files of one sample
MAX_HELD_BYTES = 1 << 30  # of samples whose files do not stand together, until their last file comes
BYTES_AROUND_A_PART = 500  # that Python takes for its name and its place, whatever its size

Group = tuple[str, dict[str, bytes]]  # key, and the files of one sample by extension
Made = TypeVar("Made")


class DamageError(Exception):
    """The archive cannot be read any further; `key` is the sample it happened in, if known."""

    def __init__(self, detail: str, key: str = ""):
        super().__init__(detail)
        self.key = key


@dataclass
class _Open:
    """A sample of which files may still come."""

    parts: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""  # why it cannot be used
    detail: str = ""
    num_members: int = 0
    num_bytes: int = 0  # that its files take in memory

    def add(self, member: _Part) -> None:
        self.num_members += 1
        if member.extension in self.parts:
            self.refuse("duplicate_part", member.extension)
        elif member.problem:
            self.refuse(member.problem, member.extension)
        elif len(self.parts) == MAX_PARTS:
            self.refuse("too_many_parts", f"more than {MAX_PARTS}")
        elif self.num_bytes + len(member.data) > MAX_SAMPLE_BYTES:
            self.refuse("sample_too_large", f"more than {MAX_SAMPLE_BYTES:,} bytes")
        if not self.reason:
            self.parts[member.extension] = member.data
            self.num_bytes += len(member.data) + len(member.key) + BYTES_AROUND_A_PART

    def refuse(self, reason: str, detail: str) -> None:
        if not self.reason:
            self.reason, self.detail = reason, detail
        self.num_bytes = 0
        self.parts.clear()

    def finish(self, key: str) -> Group | BadSample:
        return BadSample(key, self.reason, self.detail) if self.reason else (key, self.parts)


class _Part(NamedTuple):
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

    def place(_: BoundedTar, info: Member, key: str, extension: str) -> Place | None:
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
        members = _members(path, _read_part)
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
                    and held[current].num_members == expected[hash(current)]
                ):
                    yield held[current].finish(current)
                cut = damage.key or current
                yield BadSample(cut, "truncated_tar", str(damage))
                for key in held:
                    if key not in (current, cut):  # its other files lie behind the damage
                        yield BadSample(key, "truncated_tar", str(damage))
                return
            if member.key != current and current in held and held[current].num_members >= expected[hash(current)]:
                done = held.pop(current)
                held_bytes -= done.num_bytes
                yield done.finish(current)
            current = member.key
            sample = held.setdefault(current, _Open())
            before = sample.num_bytes
            sample.add(member)
            if held_bytes + sample.num_bytes - before > MAX_HELD_BYTES and len(held) > 1:
                sample.refuse("scattered_sample", "too much lies between its files: sort the shard by name")
            held_bytes += sample.num_bytes - before
        for key, sample in held.items():
            yield sample.finish(key)


def _count_members(path: Path) -> Counter[int]:
    """How many files of each key the shard holds, up to its end or to where it is damaged. Reads headers only.

    Keys of any length count by their hash; two of one hash would come at the end of their shard, and whole.
    """
    counts: Counter[int] = Counter()
    try:
        for key in _members(path, _key_alone):
            counts[hash(key)] += 1
    except DamageError:
        pass  # the second reading says so
    return counts


def split_name(path: str) -> tuple[str, str]:
    """webdataset's convention: the key is the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension


def _name_of(member: Member) -> tuple[str, str]:
    """Key and extension of a member that belongs to a sample; empty for folders and webdataset's own notes."""
    name = member.name
    is_note = name.startswith("__") and name.endswith("__") and "/" not in name
    if member.isdir() or is_note:
        return "", ""
    key, extension = split_name(name)
    return key, extension.lower()


def _members(path: Path, read: Callable[[BoundedTar, Member, str, str], Made], mode: str = "r:*") -> Iterator[Made]:
    """What `read` makes of each file that belongs to a sample; raises `DamageError` for an early end.

    Archives that were joined (`cat a.tar b.tar`) follow one another; keys of the second one begin with "#1/", as it may
    have those of the first again. tarfile, and webdataset's own reader on top of it, stop at the first archive's end, and
    take a broken header as the end without a word. Hence the look at what stands where reading ended.
    """
    key, number = "", 0
    try:
        with BoundedTar.open(path, mode) as first:  # type: ignore[call-overload]
            archive: BoundedTar | None = first
            while archive is not None:
                for member in _all_of(archive):
                    name, extension = _name_of(member)
                    if name and extension:
                        key = f"#{number}/{name}" if number else name
                        yield read(archive, member, key, extension)
                        key = ""
                archive, number = _next_archive(archive), number + 1
    except tarfile.ReadError as error:
        # With several lines where no way of reading it, compressed or not, fits.
        raise DamageError("not a tar archive" if "\n" in str(error) else str(error), key) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamageError(str(error), key) from error
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the archive
            raise
        raise DamageError(str(error), key) from error


def _all_of(archive: BoundedTar) -> Iterator[Member]:
    while (member := archive.next()) is not None:
        yield member
        yield from archive.plain_members()


def _key_alone(archive: BoundedTar, member: Member, key: str, extension: str) -> str:
    return key


def _read_part(archive: BoundedTar, member: Member, key: str, extension: str) -> _Part:
    if not member.isreg() or member.issparse():
        is_link = isinstance(member, tarfile.TarInfo) and (member.issym() or member.islnk())
        return _Part(key, extension, problem="link_in_tar" if is_link else "not_a_plain_file")
    if member.size > MAX_SAMPLE_BYTES:
        return _Part(key, extension, problem="part_too_large")
    data = archive.content(member)
    if len(data) != member.size:
        raise DamageError(f"{len(data)} of {member.size} bytes of {member.name}", key)
    return _Part(key, extension, data)


def _next_archive(archive: BoundedTar) -> BoundedTar | None:
    """The archive that stands behind this one, which was read to its end mark; None where only zeros follow."""
    stream = archive.fileobj
    assert stream is not None
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != _END_BLOCK:
        raise DamageError(f"no readable member or end mark at byte {archive.offset}")
    position = archive.offset + tarfile.BLOCKSIZE
    while block := stream.read(BLOCKS_AT_ONCE * tarfile.BLOCKSIZE):
        if rest := block.lstrip(b"\0"):
            start = position + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            stream.seek(start)
            try:
                return BoundedTar(archive.name, "r", stream)
            except tarfile.TarError as error:
                raise DamageError(f"other data after the end mark, at byte {start}: {error}") from error
        position += len(block)
    return None
