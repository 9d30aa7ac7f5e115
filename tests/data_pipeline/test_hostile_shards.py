"""Shards as people have them: files apart, links, joined archives, huge headers, a million members."""

from __future__ import annotations

import _compression
import gzip
import io
import itertools
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hang_guard import ends_within
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.kinds.registry import read_shard
from data_pipeline.sources import BadSample, Sample, bounded_tar
from data_pipeline.sources import shards as shards_module
from data_pipeline.sources.shards import places_in
from model.errors import UserError
from training.tokenizers.image_stream import CorpusIndex
from training.tokenizers.tokenizer_options import ImageCorpus

Entry = tuple[str, bytes | str]  # name, and bytes or the target of a link


def write_tar(path: Path, entries: list[Entry], link: bytes = tarfile.SYMTYPE, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = link, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def outcome(path: Path) -> list[tuple[str, str]]:
    return [(item.key, item.kind if isinstance(item, Sample) else item.reason) for item in read_shard(path)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_files_of_a_sample_that_stand_apart_are_joined(tmp_path: Path, mode: str) -> None:
    captions: list[Entry] = [(f"{number}.txt", b"caption %d" % number) for number in range(4)]
    pictures: list[Entry] = [(f"{number}.jpg", b"jpeg %d" % number) for number in range(4)]
    path = write_tar(tmp_path / "0.tar", [*captions, ("alone.txt", b"prose"), *pictures], mode=mode)
    found = list(read_shard(path))
    assert [(item.key, item.kind) for item in found if isinstance(item, Sample)] == [
        ("alone", "text"),
        *((str(number), "image_text") for number in range(4)),
    ]
    for number, item in enumerate(found[1:]):
        assert isinstance(item, Sample)
        assert item.parts == {"txt": b"caption %d" % number, "jpg": b"jpeg %d" % number}


def test_what_would_hold_too_much_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_HELD_BYTES", 5500)
    first: list[Entry] = [(f"{number}.jpg", bytes(1000)) for number in range(8)]
    path = write_tar(tmp_path / "0.tar", [*first, *((f"{number}.txt", b"x") for number in range(8))])
    reasons = dict(outcome(path))
    assert set(reasons.values()) == {"image_text", "scattered_sample"}
    assert list(reasons.values()).count("image_text") == 3  # what is around a file counts too
    monkeypatch.setattr(shards_module, "MAX_SAMPLE_BYTES", 2500)
    parts: list[Entry] = [(f"a.source_{number}.png", bytes(1000)) for number in range(3)]
    assert outcome(write_tar(tmp_path / "0.tar", [*parts, ("b.txt", b"x")])) == [
        ("a", "sample_too_large"),
        ("b", "text"),
    ]


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_caption_whose_picture_is_a_link_is_no_text(tmp_path: Path, link: bytes) -> None:
    path = write_tar(
        tmp_path / "0.tar", [("a.jpg", b"jpeg"), ("a.txt", b"x"), ("b.jpg", "a.jpg"), ("b.txt", b"x")], link
    )
    reason = "not_a_plain_file" if link == tarfile.FIFOTYPE else "link_in_tar"
    assert outcome(path) == [("a", "image_text"), ("b", reason)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_joined_archives_are_read_one_after_another(tmp_path: Path, mode: str) -> None:
    pair: list[Entry] = [("a.txt", b"x"), ("b.jpg", b"jpeg"), ("b.txt", b"y")]
    one = write_tar(tmp_path / "1.tar", pair, mode=mode).read_bytes()
    whole = [("a", "text"), ("b", "image_text")]
    path = tmp_path / "0.tar"
    path.write_bytes(one + one + one)
    again = [(f"#{number}/{key}", kind) for number in (1, 2) for key, kind in whole]
    assert outcome(path) == [*whole, *again]
    if mode == "w":
        path.write_bytes(one + bytes(20_480))
        assert outcome(path) == whole
        for tail in (b"no archive" * 100, one[512:]):
            path.write_bytes(one + tail)
            assert outcome(path)[-1][1] == "truncated_tar"
        path.write_bytes(one + one[:1024])  # the second was cut off
        assert outcome(path) == [*whole, ("#1/a", "truncated_tar")]


def test_keys_that_begin_with_underscores_are_keys(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("__x.txt", b"x"), ("_y.txt", b"x"), ("__note__", b"x"), ("d/__z.txt", b"x")])
    assert outcome(path) == [("__x", "text"), ("_y", "text"), ("d/__z", "text")]


def test_a_huge_header_is_refused_and_not_read(tmp_path: Path) -> None:
    """A sparse file: the pax header says 600 MB of records."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 600_000_000
    path = tmp_path / "0.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, 600_100_000)
    tracemalloc.start()
    try:
        assert [reason for _, reason in outcome(path)] == ["truncated_tar"]
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def header(kind: bytes, size: int = 0, name: str = "a.txt") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def record(content: bytes) -> bytes:
    """A pax record of `KEYWORD=VALUE`, with its own length before it."""
    length = len(content) + 2
    while len(str(length)) + 2 + len(content) != length:
        length = len(str(length)) + 2 + len(content)
    return b"%d %s\n" % (length, content)


def pax(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header(kind, len(content), "pax") + block(content)


GOOD, MEMBER = (header(tarfile.REGTYPE, 1, name) + block(b"x") for name in ("b.txt", "a.txt"))
END = bytes(2 * tarfile.BLOCKSIZE)
TABLE = b"00000000001\0" * 42 + b"\1" + bytes(7)  # of a sparse file, which goes on in the next block


def sparse_header() -> bytes:
    content = bytearray(header(tarfile.GNUTYPE_SPARSE))
    content[482] = 1  # its table goes on in the next block
    content[148:156] = b"%06o\0 " % (sum(content) - sum(content[148:156]) + 8 * ord(" "))
    return bytes(content)


HOSTILE = {
    "digits": pax(b"1" * 400_000),  # a pattern of Python's is tried at each of them, and there to their end
    "backwards": pax(record(b"size=-512")),
    "below_zero": header(tarfile.REGTYPE, -1024),
    "beyond_everything": header(tarfile.REGTYPE, 1 << 80),
    "no_number": pax(record(b"size=" + b"9" * 5_000)),
    "a_chain": pax(record(b"path=a.txt")) * 2_000,
    "globals": pax(record(b"comment=x"), tarfile.XGLTYPE) * 2_000,
    "long_name": pax(record(b"path=" + b"x" * 5_000)),
    "sparse_1.0": pax(record(b"GNU.sparse.major=1") + record(b"GNU.sparse.minor=0")),
    "sparse_0.1": pax(record(b"GNU.sparse.map=" + b"1,x" * 99)),
    "sparse_size": pax(record(b"GNU.sparse.realsize=x")),
    "sparse_without_end": sparse_header() + TABLE * 9,
    "no_length": pax(b"0 path=x\n"),
    "no_blank": pax(b"path=xxxxxxxxx\n"),
    "a_length_too_long": pax(b"9999999 path=x\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_python_trips_over_are_damage(tmp_path: Path, name: str) -> None:
    """Hours, circles without an end, and errors that are none of archives."""
    path = tmp_path / "0.tar"
    path.write_bytes(GOOD + HOSTILE[name] + MEMBER + END)
    with ends_within(30):
        found = list(itertools.islice(read_shard(path), 10))
    assert 1 <= len(found) <= 3
    assert {item.reason for item in found if isinstance(item, BadSample)} <= {"truncated_tar", "not_a_plain_file"}
    assert isinstance(found[-1], BadSample)
    path.write_bytes(HOSTILE[name] + MEMBER + END)  # the first header is read where the archive is opened
    assert isinstance(list(itertools.islice(read_shard(path), 10))[-1], BadSample)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_header_with_a_true_checksum_is_read_or_damage(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = bytearray(header(data.draw(st.sampled_from([bytes([kind]) for kind in b"01234567LKSxgXV\0"])), 512))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([0, 100, 124, 136, 345, 386, 398, 482, 483]))
        piece = data.draw(st.binary(min_size=1, max_size=12))
        content[place : place + len(piece)] = piece
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:]) + 8 * ord(" "))
    path = tmp_path_factory.mktemp("any") / "0.tar"
    path.write_bytes(GOOD + bytes(content) + block(data.draw(st.binary(max_size=600))) + GOOD + END)
    with ends_within(30):
        assert len(list(itertools.islice(read_shard(path), 10))) < 10


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_headers_read_many_at_a_time_say_what_they_say_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Archives of any format, whole, cut off or damaged: the same samples, in the same order, with the same damage."""
    names = st.sampled_from(
        ["a.txt", "b.txt", "b.jpg", "d/c.txt", "\u00e9.txt", "x" * 90 + ".txt", "y" * 120 + ".txt", "__n__"]
    )
    path = tmp_path_factory.mktemp("any") / "0.tar"
    archive_format = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(path, "w", format=archive_format) as archive:
        for name in data.draw(st.lists(names, max_size=12)):
            if archive_format == tarfile.USTAR_FORMAT and len(name) > 100:
                continue
            info = tarfile.TarInfo(name)
            info.type = data.draw(
                st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.AREGTYPE])
            )
            info.mtime = data.draw(st.sampled_from([7, 1700000000.25]))
            if archive_format == tarfile.PAX_FORMAT:
                info.pax_headers = data.draw(st.sampled_from([{}, {"atime": "1.5"}, {"comment": "\u7ea2"}]))
            info.size = data.draw(st.sampled_from([0, 1, 512, 700, 20_000])) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data.draw(st.binary(min_size=1, max_size=3)) * info.size))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, min(len(content), 6_000) - 1))] ^= data.draw(st.sampled_from([1, 32, 255]))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content)] * 3 + [3_000, 5_000, 21_999]))])
    at_once = list(read_shard(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_tar.BoundedTar, "plain_members", lambda archive: iter(()))
        assert at_once == list(read_shard(path))


def test_plain_members_are_read_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As webdataset writes them: a time in a pax header before each. One is read by `next`, and what ends the archive."""
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(50):
            writer.write({"__key__": f"{number:04d}", "txt": "text " * number or "x", "jpg": bytes(20_000)})
    num_calls = 0
    one_by_one = bounded_tar.BoundedTar.next

    def counted(archive: bounded_tar.BoundedTar) -> Any:
        nonlocal num_calls
        num_calls += 1
        return one_by_one(archive)

    monkeypatch.setattr(bounded_tar.BoundedTar, "next", counted)
    found = list(read_shard(path))
    assert [(item.key, len(item.parts["txt"])) for item in found if isinstance(item, Sample)] == [
        (f"{number:04d}", max(1, 5 * number)) for number in range(50)
    ]
    assert num_calls < 20  # in two readings, of which each tries the compressed formats first


NAME_CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_usual_header_says_what_python_reads_in_it(data: Any) -> None:
    info = tarfile.TarInfo(
        data.draw(st.text(NAME_CHARACTERS, max_size=24) | st.from_regex(r"[a-z]{40,70}/[a-z]{40,70}", fullmatch=True))
    )
    info.size, info.type = (
        data.draw(st.integers(0, 8**11 - 1)),
        data.draw(st.sampled_from([b"0", b"x", b"5", b"S", b"\0"])),
    )
    written = info.tobuf(data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    header = bytearray(written[-512:])
    for place in data.draw(st.lists(st.integers(0, 511), max_size=3)):
        header[place] = data.draw(st.sampled_from(b"07 \0/a\x80\xff"))
    if data.draw(st.booleans()):
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    found = []
    for reader in (bounded_tar.BoundedTarInfo, tarfile.TarInfo):
        try:
            read = reader.frombuf(bytes(header), "utf-8", "surrogateescape")
            found.append((read.name, read.size, read.type, read.isreg(), read.linkname, read.offset))
        except (tarfile.HeaderError, ValueError) as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


def test_pax_headers_say_what_python_reads_in_them(tmp_path: Path) -> None:
    names = ["k" * 200 + "/a.txt", "\u00e9\u7ea2.txt", "plain.txt"]
    path = write_tar(tmp_path / "0.tar", [], mode="w")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 1, {"mtime": "1.5", "SCHILY.xattr.user.x": "a=b 12 c\n"}
            archive.addfile(info, io.BytesIO(b"x"))
    assert outcome(path) == [(name.removesuffix(".txt"), "text") for name in names]
    path.write_bytes(pax(record(b"size=1")) + header(tarfile.REGTYPE, 0) + block(b"x") + GOOD + END)
    assert outcome(path) == [("a", "text"), ("b", "text")]


def peak_of_reading(path: Path) -> int:
    tracemalloc.start()
    try:
        for _ in read_shard(path):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_a_small_file_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file may hold a thousand times its size of tables, of names, and of nothing."""
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(GOOD + sparse_header() + TABLE * 8_000 + bytes(512) + MEMBER + END))
    assert peak_of_reading(path) < 5_000_000
    long = b"".join(pax(record(b"path=%d/" % number + b"x" * 4_000)) + header(tarfile.REGTYPE) for number in range(600))
    path.write_bytes(gzip.compress(long + END))
    assert peak_of_reading(path) < 1_500_000
    monkeypatch.setattr(bounded_tar, "FREE_BYTES", 1 << 20)
    path.write_bytes(gzip.compress(GOOD + END + bytes(4 << 20)))
    (bad,) = read_shard(path)
    assert isinstance(bad, BadSample)
    assert "times the size" in bad.detail


def test_joined_compressed_archives_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To go back in a compressed file is to begin it again."""
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress((GOOD + END) * 200 + MEMBER * 20 + END))
    num_rewinds = 0
    rewind = _compression.DecompressReader._rewind  # type: ignore[attr-defined]

    def counted(reader: Any) -> None:
        nonlocal num_rewinds
        num_rewinds += 1
        rewind(reader)

    monkeypatch.setattr(_compression.DecompressReader, "_rewind", counted)
    found = outcome(path)
    assert found[:3] == [("b", "text"), ("#1/b", "text"), ("#2/b", "text")]
    assert found[-1] == ("#200/a", "duplicate_part")
    assert num_rewinds < 5


def test_places_of_files_are_found_from_bounded_headers(tmp_path: Path) -> None:
    """As the vision tokenizer's index finds them: in joined archives too, without links, and never a huge header."""
    pair: list[Entry] = [("a.jpg", b"jpeg"), ("b.jpg", "a.jpg"), ("c.png", b"png")]
    one = write_tar(tmp_path / "1.tar", pair).read_bytes()
    path = tmp_path / "0.tar"
    path.write_bytes(one + one)
    content = path.read_bytes()
    found = [
        (place.key, content[place.offset : place.offset + place.size]) if place else None for place in places_in(path)
    ]
    assert found == [("a", b"jpeg"), None, ("c", b"png"), ("#1/a", b"jpeg"), None, ("#1/c", b"png")]
    huge = tarfile.TarInfo("pax")
    huge.type, huge.size = tarfile.XHDTYPE, 600_000_000
    path.write_bytes(one[: 5 * tarfile.BLOCKSIZE] + huge.tobuf(tarfile.USTAR_FORMAT))  # three headers, two files
    os.truncate(path, 600_100_000)
    num_bad: Counter[str] = Counter()
    tracemalloc.start()
    try:
        index = CorpusIndex("x", ImageCorpus(str(path)), num_bad)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert (len(index), num_bad) == (2, {"truncated_tar": 1})
    with pytest.raises(UserError, match="No such file"):
        list(places_in(tmp_path / "missing.tar"))


def test_memory_does_not_grow_with_the_members(tmp_path: Path) -> None:
    """Headers alone, 2,000 of them, all of one sample: half a kilobyte each in the file."""
    path = tmp_path / "0.tar"
    with path.open("wb") as stream:
        for number in range(2_000):
            stream.write(tarfile.TarInfo(f"a.{number}").tobuf(tarfile.USTAR_FORMAT))
        stream.write(bytes(10_240))
    tracemalloc.start()
    try:
        (found,) = read_shard(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, BadSample)
    assert found.reason == "too_many_parts"
    assert peak < 5_000_000


def test_what_the_system_refuses_is_the_users_and_no_sample(tmp_path: Path) -> None:
    """Of /proc/self/mem the system gives an input/output error, to root too."""
    for path, message in (
        (Path("/proc/self/mem"), "Input/output error"),
        (tmp_path, "does not exist"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_shard(path))
