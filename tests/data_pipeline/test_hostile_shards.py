"""Shards as people have them: files apart, links, joined archives, huge headers, a million members."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.kinds.registry import read_shard
from data_pipeline.sources import BadSample, Sample
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
    assert list(reasons.values()).count("image_text") == 5


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
