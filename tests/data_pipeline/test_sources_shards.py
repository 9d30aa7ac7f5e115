"""Reading raw shards: kinds, keys, metadata, damage."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_pipeline.kinds.registry import KindSet, read_shard
from data_pipeline.sources import BadSample, Sample, SampleError, patterns
from data_pipeline.sources.patterns import find_shards
from data_pipeline.sources.samples import source_images
from data_pipeline.sources.shards import split_name
from model.errors import UserError


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def outcome(path: Path) -> list[tuple[str, str]]:
    """(key, kind or reason) of each sample."""
    return [(item.key, item.kind if isinstance(item, Sample) else item.reason) for item in read_shard(path)]


@pytest.mark.parametrize(
    ("extensions", "kind"),
    [
        (["jpg", "txt"], "image_text"),
        (["png", "txt", "json"], "image_text"),
        (["webp", "txt"], "image_text"),
        (["mp4", "txt"], "video_text"),
        (["mp4", "words.json"], "video_interleaved"),
        (["mkv", "vtt"], "video_interleaved"),
        (["webm", "srt", "json"], "video_interleaved"),
        (["instruction.txt", "source_0.png", "target.png"], "x2i"),
        (["instruction.txt", "source_0.png", "source_1.jpg", "target.jpg"], "x2i"),
        (["txt"], "text"),
        (["txt", "json"], "text"),
        (["jpg"], None),
        (["jpg", "png", "txt"], None),
        (["mp4"], None),
        (["mp4", "vtt", "srt"], None),
        (["mp4", "txt", "vtt"], None),
        (["instruction.txt", "target.png"], None),
        (["instruction.txt", "source_0.png"], None),
        (["json"], "chat"),
        (["flac", "txt"], None),
    ],
)
def test_kind_follows_from_the_extensions(extensions: list[str], kind: str | None) -> None:
    found = KindSet().detect(extensions)
    assert (found and found.name) == kind


def test_source_images_are_in_order_of_their_numbers() -> None:
    names = ["source_10.png", "source_2.png", "source_0.jpg", "target.png"]
    assert source_images(names) == ["source_0.jpg", "source_2.png", "source_10.png"]


def test_reads_what_webdataset_writes(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a/1", "txt": "one", "jpg": b"bytes", "json": {"split_ok": True}})
        writer.write({"__key__": "a/2", "mp4": b"bytes", "words.json": [], "json": {}})
    first, second = read_shard(path)
    assert isinstance(first, Sample)
    assert (first.key, first.kind) == ("a/1", "image_text")
    assert first.parts["jpg"] == b"bytes"
    assert first.metadata == {"split_ok": True}
    assert isinstance(second, Sample)
    assert (second.key, second.kind) == ("a/2", "video_interleaved")


@given(
    folders=st.lists(st.text("ab._", min_size=1, max_size=4), max_size=3),
    stem=st.text("ab_", min_size=1, max_size=4),
    extension=st.text("ab.", min_size=1, max_size=6),
)
def test_keys_are_those_of_webdataset(folders: list[str], stem: str, extension: str) -> None:
    path = "/".join([*folders, f"{stem}.{extension}"])
    assert split_name(path) == base_plus_ext(path)
    assert split_name("/".join([*folders, stem]))[1] == ""  # webdataset has no key for it


def test_bad_samples_are_named_and_stop_nothing(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "0.tar",
        [
            ("unknown.flac", b"x"),
            ("silent.mp4", b""),
            ("silent.txt", b"a clip"),
            ("blank.JPG", b""),
            ("blank.txt", b"a picture"),
            ("mute.jpg", b"x"),
            ("mute.txt", b""),
            ("odd.txt", b"x"),
            ("odd.json", b"{not json"),
            ("list.txt", b"x"),
            ("list.json", b"[]"),
            ("twice.txt", b"x"),
            ("twice.txt", b"y"),
            ("good.txt", b"hello"),
        ],
    )
    assert outcome(path) == [
        ("unknown", "unknown_kind"),
        ("silent", "empty_video"),
        ("blank", "empty_image"),
        ("mute", "empty_text"),
        ("odd", "bad_metadata"),
        ("list", "bad_metadata"),
        ("twice", "duplicate_part"),
        ("good", "text"),
    ]


def test_a_text_is_utf8_without_mark_and_not_blank() -> None:
    marked = KindSet().sample("k", {"txt": "\ufeff  你好\r\nworld\r\n".encode()})
    assert marked.text("txt") == "你好\nworld"
    for content, reason in ((b"\xff\xfe\x00", "corrupt_text"), (b" \n ", "empty_text")):
        with pytest.raises(SampleError) as caught:
            KindSet().sample("k", {"txt": content}).text("txt")
        assert caught.value.reason == reason


FILES = [(f"{number}.{extension}", bytes([number]) * 2000) for number in range(3) for extension in ("jpg", "txt")]
# Each file takes a header block and four blocks of data.
MEMBER_BYTES = 5 * 512


@pytest.mark.parametrize(
    ("kept_bytes", "expected"),
    [
        # In the data of 2.txt: the sample with the missing part goes, those before it stay.
        (5 * MEMBER_BYTES + 900, [("0", "image_text"), ("1", "image_text"), ("2", "truncated_tar")]),
        # In the data of 2.jpg.
        (4 * MEMBER_BYTES + 900, [("0", "image_text"), ("1", "image_text"), ("2", "truncated_tar")]),
        # In a header: whether the last sample was whole cannot be known.
        (4 * MEMBER_BYTES + 100, [("0", "image_text"), ("1", "truncated_tar")]),
        # Between two members, where tarfile sees a regular end.
        (4 * MEMBER_BYTES, [("0", "image_text"), ("1", "truncated_tar")]),
        (6 * MEMBER_BYTES, [("0", "image_text"), ("1", "image_text"), ("2", "truncated_tar")]),
        (0, [("", "truncated_tar")]),
        (100, [("", "truncated_tar")]),
    ],
)
def test_a_truncated_tar_keeps_what_stands_before_the_damage(
    tmp_path: Path, kept_bytes: int, expected: list[tuple[str, str]]
) -> None:
    path = write_tar(tmp_path / "0.tar", FILES)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert outcome(path) == expected


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", FILES)
    content = bytearray(path.read_bytes())
    content[4 * MEMBER_BYTES + 120] ^= 0xFF  # in the header of 2.jpg
    path.write_bytes(content)
    assert outcome(path) == [("0", "image_text"), ("1", "truncated_tar")]


def test_a_whole_tar_has_no_damage_whatever_its_length(tmp_path: Path) -> None:
    for count in range(1, 9):
        path = write_tar(tmp_path / "0.tar", [(f"{n}.txt", b"x" * 700 * n) for n in range(1, count)])
        assert all(isinstance(item, Sample) for item in read_shard(path))


def test_compressed_tars_are_read_and_their_damage_is_seen(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "0.tar", FILES).read_bytes()
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(plain))
    assert [name for name, _ in outcome(path)] == ["0", "1", "2"]
    # Content that does not compress, so that half of the file is about half of the samples.
    noisy = [(name, random.Random(name).randbytes(3000)) for name, _ in FILES]
    packed = gzip.compress(write_tar(tmp_path / "1.tar", noisy).read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    assert outcome(path) == [("0", "image_text"), ("1", "truncated_tar")]


def test_not_a_tar_is_one_bad_entry(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"this is not a tar file" * 100)
    assert [(item.reason, type(item)) for item in read_shard(path)] == [("truncated_tar", BadSample)]


def test_a_missing_shard_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(read_shard(tmp_path / "none.tar"))


def test_patterns_and_braces_name_shards(tmp_path: Path) -> None:
    for name in ("x-000.tar", "x-001.tar", "a/x-000.tar", "b[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        paths = find_shards([f"{tmp_path}/{pattern}" for pattern in patterns], "input")
        return [str(path.relative_to(tmp_path)) for path in paths]

    assert found("x-{000..001}.tar", "x-*.tar") == ["x-000.tar", "x-001.tar"]
    assert found("{a,.}/x-000.tar") == ["a/x-000.tar", "x-000.tar"]
    assert found("**/x-000.tar") == ["a/x-000.tar", "x-000.tar"]
    assert found("b[1].tar") == ["b[1].tar"]
    for pattern, message in (
        ("x-{000..002}.tar", "x-002.tar"),
        ("none/*.tar", "no input shards"),
        ("x-{000..", "braces"),
        ("s3://bucket/x.tar", "copy them"),
    ):
        with pytest.raises(UserError, match=message):
            found(pattern)


def test_a_folder_in_place_of_a_shard_is_answered_with_its_pattern(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="tar -cf"):
        find_shards([f"{tmp_path}/photos"], "input")
    (tmp_path / "photos" / "0.tar").touch()
    with pytest.raises(UserError, match=r"photos/\*.tar'"):
        find_shards([f"{tmp_path}/photos"], "input")


@pytest.mark.parametrize("many", [1, 1000])
def test_plain_files_are_files_and_no_links(tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MANY", many)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.tar").mkdir()
    for name in ("0.tar", "1.tar", "folder.tar/2.tar"):
        (tmp_path / name).touch()
    (tmp_path / "link.tar").symlink_to(tmp_path / "0.tar")
    (tmp_path / "nowhere.tar").symlink_to(tmp_path / "missing.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    names = ["0.tar", "folder.tar", "folder.tar/2.tar", "link.tar", "nowhere.tar", "pipe.tar", "missing.tar"]
    expected = {"0.tar", "folder.tar/2.tar"}
    assert patterns.plain_files(names) == expected
    assert patterns.plain_files([f"{tmp_path}/{name}" for name in names]) == {f"{tmp_path}/{one}" for one in expected}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").symlink_to(tmp_path / "0.tar")
    assert find_shards(["links/*.tar"], "input") == [Path("links/0.tar")]  # a link to a file is a shard too


def test_a_pipe_in_place_of_a_shard_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match="is no file"):
        find_shards([f"{tmp_path}/*.tar"], "input")
