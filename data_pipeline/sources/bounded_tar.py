"""tarfile, made safe for archives of strangers: no header costs more time or memory than it deserves.

The library reads any header into memory, keeps tables of sparse files and global records for as long as the archive is
open, follows sizes below zero backwards, and takes hours for a pax header of a million digits.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax record
MAX_NAME_CHARACTERS = 4096  # of a member; Linux has no longer path
MAX_HEADERS_IN_A_ROW = 16  # before a member; a global one, a pax one and two long names are usual
MAX_MEMBER_BYTES = 1 << 50  # more is a damaged number
MAX_EXPANSION = 200  # bytes out of one byte of a compressed shard, beyond the first `FREE_BYTES`
FREE_BYTES = 1 << 30
KEPT_BYTES = 1 << 14  # of a compressed stream, to go back in
HEADER_BYTES = 3 * tarfile.BLOCKSIZE  # of a plain member: a pax header, its records, the member's own header
MANY_BYTES, FEW_BYTES = 1 << 18, 1 << 12  # read at once where members are small, and where they are not
SMALL_MEMBER_BYTES = 1 << 14
# As every writer of today has them: mode, uid, gid, size, time, checksum, type, no link; magic of POSIX or GNU; device numbers.
_USUAL_HEADER = re.compile(
    rb"(?:[0-7]{7}\0){3}([0-7]{11})\0[0-7]{11}\0([0-7]{6})\0 ([0x])\0{100}ustar[\0 ].{66}(?:[0-7]{7}\0|\0{8}){2}",
    re.DOTALL,
)
_TIME_RECORD = re.compile(rb"(\d\d) mtime=[\d.]+\n")  # all that webdataset's writer says beside the header
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses, by `tarfile.ReadError`, what would take too much; of pax records it knows the path and the size."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        """The library reads 21 fields of each header; of a usual one we need four. Any other is the library's."""
        usual = _USUAL_HEADER.match(buf, 100) if len(buf) == tarfile.BLOCKSIZE else None
        if usual is None or _sum_of(buf) != int(usual[2], 8):
            return super().frombuf(buf, encoding, errors)
        info = cls()
        info.name, prefix = (
            bytes(part).partition(b"\0")[0].decode(encoding, errors) for part in (buf[:100], buf[345:500])
        )
        if prefix:
            info.name = f"{prefix}/{info.name}"
        info.size, info.type = int(usual[1], 8), usual[3]
        return info

    def _proc_member(self, archive: Any) -> Any:  # where tarfile dispatches on the type
        _check_size(self)
        if self.type in _LONG_HEADERS:
            archive.num_headers += 1
            if archive.num_headers > MAX_HEADERS_IN_A_ROW:
                raise _refusal(f"more than {MAX_HEADERS_IN_A_ROW} headers in a row")
            if self.size > MAX_HEADER_BYTES:
                raise _refusal(f"a header of {self.size} bytes")
        member = super()._proc_member(archive)  # type: ignore[misc]
        if len(member.name) > MAX_NAME_CHARACTERS:
            raise _refusal(f"a name of {len(member.name)} characters")
        return member

    def _proc_pax(self, archive: Any) -> Any:
        records = _read_pax_records(archive.fileobj.read(self._block(self.size))[: self.size])  # type: ignore[attr-defined]
        try:
            member = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise _refusal(str(error)) from None
        if self.type == tarfile.XGLTYPE:  # about all files: no name, no size
            return member
        member.offset = self.offset
        if any(name.startswith("GNU.sparse.") for name in records):
            member.sparse = []  # type: ignore[assignment]  # marks it; its table is not read
        known = {name: value for name, value in records.items() if name in ("path", "size")}
        member._apply_pax_info(known, archive.encoding, archive.errors)  # type: ignore[attr-defined]
        if "size" in known:
            _check_size(member)
            has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
            archive.offset = member.offset_data + (self._block(member.size) if has_data else 0)  # type: ignore[attr-defined]
        return member

    def _proc_sparse(self, archive: Any) -> Any:
        """GNU's old form: the table is passed over."""
        is_extended = self._sparse_structs[1]  # type: ignore[attr-defined]
        while is_extended:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise _refusal("the table of a sparse file has no end")
            is_extended = bool(block[504])
        self.sparse = []  # type: ignore[assignment]
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


class PlainMember(NamedTuple):
    """A regular file in an archive: as much of `tarfile.TarInfo` as is asked for here."""

    name: str
    size: int
    offset_data: int
    data: bytes | None = None  # None: to be read

    def isreg(self) -> bool:
        return True

    def issparse(self) -> bool:
        return False

    def isdir(self) -> bool:
        return False


Member = tarfile.TarInfo | PlainMember


class BoundedTar(tarfile.TarFile):
    """To be read with `next` and `plain_members` alone: members are not kept.

    Raises `tarfile.TarError` for every archive that is none.
    """

    tarinfo = BoundedTarInfo
    num_headers = 0  # of the member that is being read

    def __init__(self, name: Any = None, mode: Any = "r", fileobj: Any = None, **options: Any):
        is_compressed = fileobj is not None and not isinstance(fileobj, (Rereadable, io.BufferedReader))
        if is_compressed:
            fileobj = Rereadable(fileobj, os.path.getsize(name))
        super().__init__(name, mode, fileobj, **options)

    def next(self) -> tarfile.TarInfo | None:
        self.num_headers = 0
        self.members: list[tarfile.TarInfo] = []
        try:
            return super().next()
        except (ValueError, ArithmeticError, IndexError) as error:  # of numbers that are none, and tables cut short
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error

    def plain_members(self) -> Iterator[PlainMember]:
        """The members from here on, as long as they are plain files with usual headers that the archive holds whole.

        Ends without a word before anything else, which is for `next`. Headers are read many at a time, of uncompressed
        archives: `next` takes several times as long for each.
        """
        if not isinstance(self.fileobj, io.BufferedReader):
            return
        descriptor = self.fileobj.fileno()
        num_bytes, block, start, step = os.fstat(descriptor).st_size, b"", 0, MANY_BYTES
        while True:
            at = self.offset - start
            if at + HEADER_BYTES > len(block):
                block, start, at = os.pread(descriptor, step, self.offset), self.offset, 0
            found = _plain_header(block, at)
            if found is None:
                return
            name, size, at = found
            end = start + at + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > num_bytes:
                return
            self.offset = end
            step = MANY_BYTES if size < SMALL_MEMBER_BYTES else FEW_BYTES
            data = block[at : at + size] if at + size <= len(block) else None
            yield PlainMember(name, size, start + at, data)

    def content(self, member: Member) -> bytes:
        """Of a regular file; less where the archive is cut off."""
        if isinstance(member, PlainMember):
            if member.data is not None:
                return member.data
            assert self.fileobj is not None
            self.fileobj.seek(member.offset_data)
            return self.fileobj.read(member.size)
        stream = self.extractfile(member)
        assert stream is not None, "a regular file has content"
        return stream.read()


def _plain_header(block: bytes, at: int) -> tuple[str, int, int] | None:
    """Name and size of the plain file whose headers begin at `at`, and where its data begin; None for anything else."""
    header = block[at : at + tarfile.BLOCKSIZE]
    usual = _usual_header(header)
    at += tarfile.BLOCKSIZE
    if usual is not None and usual[3] == b"x":
        size = int(usual[1], 8)
        if size > tarfile.BLOCKSIZE or not _is_of_times(block[at : at + size]):
            return None
        header = block[at + tarfile.BLOCKSIZE : at + 2 * tarfile.BLOCKSIZE]
        usual = _usual_header(header)
        at += 2 * tarfile.BLOCKSIZE
    if usual is None or usual[3] != b"0":
        return None
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode(), int(usual[1], 8), at


def _usual_header(header: bytes) -> re.Match[bytes] | None:
    """Size, checksum and type of a usual header, true and without a letter beyond ASCII."""
    usual = _USUAL_HEADER.match(header, 100)
    return usual if usual is not None and header.isascii() and _sum_of(header) == int(usual[2], 8) else None


def _is_of_times(records: bytes) -> bool:
    """Do these pax records say nothing but when the file was changed?"""
    found = _TIME_RECORD.fullmatch(records)
    return found is not None and int(found[1]) == len(records)


def _sum_of(header: bytes) -> int:
    """What a header's checksum is made of: the sum of its bytes, those of the checksum itself taken as blanks."""
    # Adler's first sum is 1 + that of the bytes, modulo 65,521: more than 512 bytes of ASCII make.
    total = (zlib.adler32(header) & 0xFFFF) - 1 if header.isascii() else sum(header)
    return total - sum(header[148:156]) + 256


class Rereadable:
    """A compressed file in which going back by up to `KEPT_BYTES` costs nothing: else it is read anew from its start."""

    def __init__(self, stream: Any, packed_bytes: int):
        self._stream = stream
        self._limit = max(FREE_BYTES, MAX_EXPANSION * packed_bytes)
        self._kept = b""  # the bytes before `_end`
        self._end = self._position = int(stream.tell())

    def read(self, num_bytes: int) -> bytes:
        start = len(self._kept) - (self._end - self._position)
        found = self._kept[start : start + num_bytes]
        if len(found) < num_bytes:
            more = self._stream.read(num_bytes - len(found))
            self._kept = (self._kept + more if len(more) < KEPT_BYTES else more)[-KEPT_BYTES:]
            self._end += len(more)
            found += more
            if self._end > self._limit:
                raise tarfile.ReadError(f"more than {MAX_EXPANSION} times the size of the compressed file")
        self._position += len(found)
        return bytes(found)

    def seek(self, position: int) -> None:
        if position < self._end - len(self._kept):
            self._stream.seek(position)
            self._kept, self._end = b"", position
        self._position = min(position, self._end)
        while self._position < position and self.read(min(position - self._position, 1 << 16)):
            pass  # a place behind the end is not reached: what is read there is empty

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._stream.close()


def _refusal(message: str) -> Exception:
    """What tarfile passes on with its message wherever it stands; other errors end an archive without a word."""
    return tarfile.SubsequentHeaderError(message)  # type: ignore[attr-defined]


def _check_size(info: tarfile.TarInfo) -> None:
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise _refusal("a size below zero" if info.size < 0 else f"a size of {info.size:,} bytes")


def _read_pax_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEYWORD=VALUE\\n` records, in one pass."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 8)
        digits = data[position : max(space, position)]
        end = position + (int(digits) if digits.isdigit() else 0)
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not position < space < end <= len(data) or not equals:
            raise _refusal("a pax header with a bad record")
        records[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records
