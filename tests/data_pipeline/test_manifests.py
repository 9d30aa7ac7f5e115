"""Notes of a folder's manifests: never anything but what the manifests say, whatever happens to either."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.storage import manifests as manifests_module
from data_pipeline.storage.atomic import encode_json
from data_pipeline.storage.format import read_manifest, seal
from data_pipeline.storage.manifests import NOTES_FOLDER, Manifests
from model.errors import UserError


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of eight manifests, noted from two on; nothing waits for the disk."""
    monkeypatch.setattr(manifests_module, "_MANIFESTS_AT_ONCE", 8)
    monkeypatch.setattr(manifests_module, "_LEAST_NOTED", 2)
    monkeypatch.setattr(manifests_module, "_READ_BY_A_THREAD", 3)
    monkeypatch.setattr(manifests_module, "_MOST_SMALL_PARTS", 2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def publish(folder: Path, number: int, said: int, kind: str = "tokens", at_second: int = 1_000_000_000) -> None:
    """A manifest of one size, whatever it says."""
    manifest: dict[str, Any] = {
        "kind": kind,
        "format_version": 1,
        "num_tokens": 1000 + said % 9000,
        "vocabulary": {"preset": "emu35", "size": said % 2},
        "outputs": {f"{number:06d}.bin": f"{said:032d}"},
    }
    if said % 5 == 0:
        manifest |= {"inputs": [{"name": "shard ☃.tar"}], "vision_tokenizer": None}
    path = folder / f"{number:06d}.json"
    path.write_bytes(encode_json(seal(manifest)))
    os.utime(path, (at_second, at_second))


def read_each(folder: Path) -> dict[str, Any]:
    """From the manifests themselves."""
    return {path.stem: read_manifest(path.with_suffix("")) for path in sorted(folder.glob("*.json"))}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The manifests that are read themselves."""
    names: list[str] = []

    def read(prefix: str | Path, kind: str | None = None) -> dict[str, Any]:
        names.append(Path(prefix).name)
        return read_manifest(prefix, kind)

    monkeypatch.setattr(manifests_module, "read_manifest", read)
    return names


def test_what_was_read_once_is_not_opened_again(tmp_path: Path, opened: list[str]) -> None:
    for number in range(20):
        publish(tmp_path, number, number)
    for most in (20, 0, 0):
        assert dict(Manifests(tmp_path, "tokens").each()) == read_each(tmp_path)
        assert len(opened) == most
        opened.clear()
    publish(tmp_path, 3, 77, at_second=1_000_000_001)
    (tmp_path / "000004.json").unlink()
    publish(tmp_path, 20, 20)
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert opened == ["000003", "000020"]
    publish(tmp_path, 5, 5, kind="packed", at_second=1_000_000_002)
    with pytest.raises(UserError, match="not the kind of file"):
        dict(Manifests(tmp_path, "tokens").each())
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)  # the notes are of all kinds
    with pytest.raises(UserError, match=r"not the kind of file[\s\S]*000000"):
        dict(Manifests(tmp_path, "packed").each())


def test_a_manifest_that_changed_lately_is_not_noted(tmp_path: Path, opened: list[str]) -> None:
    """Changed again within a tick of the clock it would look the same."""
    for number in range(4):
        publish(tmp_path, number, number)
        os.utime(tmp_path / f"{number:06d}.json")
    dict(Manifests(tmp_path).each())
    for number in range(4):
        status = (tmp_path / f"{number:06d}.json").stat()
        publish(tmp_path, number, number + 100)
        os.utime(tmp_path / f"{number:06d}.json", ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert len(opened) == 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["publish", "remove", "start", "damage", "lose"]), st.integers(0, 30), st.integers()),
        max_size=60,
    )
)
def test_the_answer_is_that_of_the_manifests(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for second, (what, number, value) in enumerate(changes):
        parts = sorted(folder.glob(f"{NOTES_FOLDER}/*"))
        if what == "publish":
            for one in range(number, number + 4):  # what is published later has another time or size
                publish(folder, one, abs(value) % 10**9, at_second=1_000_000_000 + second)
        elif what == "remove":
            (folder / f"{number:06d}.json").unlink(missing_ok=True)
        elif what == "damage" and parts:
            path = parts[number % len(parts)]
            content = bytearray(path.read_bytes())
            content[value % len(content)] ^= 1 << number % 8
            path.write_bytes(content[: len(content) - number % 3])
        elif what == "lose" and parts:
            parts[number % len(parts)].unlink()
        else:
            assert dict(Manifests(folder).each()) == read_each(folder)
    assert dict(Manifests(folder).each()) == read_each(folder)


def test_small_parts_are_joined(tmp_path: Path, opened: list[str]) -> None:
    for number in range(0, 40, 2):
        publish(tmp_path, number, number)
        publish(tmp_path, number + 1, number)
        assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert len(opened) == 40
    assert len(list((tmp_path / NOTES_FOLDER).iterdir())) <= 40 // 4 + 3
    for number in range(38):
        (tmp_path / f"{number:06d}.json").unlink()
    for _ in range(2):
        assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert len(opened) == 40
    assert len(list((tmp_path / NOTES_FOLDER).iterdir())) == 1


def test_what_a_killed_writer_leaves_is_passed_over_and_removed(tmp_path: Path, opened: list[str]) -> None:
    for number in range(8):
        publish(tmp_path, number, number)
    dict(Manifests(tmp_path).each())
    (part,) = (tmp_path / NOTES_FOLDER).iterdir()
    left = part.with_name(f"{part.name}.tmp-99999999")  # no process has this number
    left.write_bytes(part.read_bytes())
    part.unlink()
    opened.clear()
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert len(opened) == 8
    assert list((tmp_path / NOTES_FOLDER).iterdir()) == [part]


def test_threads_read_where_reads_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    readers = set()
    read = Manifests._read_some
    monkeypatch.setattr(
        Manifests, "_read_some", lambda *given: readers.add(threading.current_thread().name) or read(*given)
    )
    for number in range(24):
        publish(tmp_path, number, number)
    for waits, expected in ((0, {"MainThread"}), (9, {"MainThread", "manifests"})):
        times = itertools.count(0, waits)
        monkeypatch.setattr(manifests_module, "_times_waited", lambda times=times: next(times))
        assert list(Manifests(tmp_path).each()) == list(read_each(tmp_path).items())
        assert {name.partition("_")[0] for name in readers} == expected
        shutil.rmtree(tmp_path / NOTES_FOLDER)
        readers.clear()
    assert len(opened) == 48


def test_a_folder_that_cannot_be_written_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(manifests_module, "replace_file", refuse)
    for number in range(9):
        publish(tmp_path, number, number)
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    shutil.rmtree(tmp_path / NOTES_FOLDER)
    (tmp_path / NOTES_FOLDER).write_text("a file in the place of the folder")
    assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)


def test_many_note_at_once(tmp_path: Path, opened: list[str]) -> None:
    for number in range(64):
        publish(tmp_path, number, number)
    expected, wrong = read_each(tmp_path), []

    def look(names: list[str]) -> None:
        for _ in range(4):
            found = dict(Manifests(tmp_path).each(names))
            if found != {name: expected[name] for name in names}:
                wrong.append(found)

    shares = [[f"{number:06d}" for number in range(first, 64, 4)] for first in range(4)] + [sorted(expected)]
    threads = [threading.Thread(target=look, args=(names,)) for names in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    opened.clear()
    assert dict(Manifests(tmp_path).each()) == expected
    assert not opened


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    for number in range(9):
        publish(tmp_path, number, number)
    manifests = Manifests(tmp_path)
    path = tmp_path / "000007.json"
    harm(path)
    with pytest.raises(UserError, match="000007"):
        dict(manifests.each())
    if path.exists():
        with pytest.raises(UserError, match="000007"):
            dict(manifests.each(may_be_gone=True))
    else:
        assert dict(manifests.each(may_be_gone=True)) == read_each(tmp_path)
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="000007"):
            dict(Manifests(tmp_path).each(may_be_gone=True))


def test_manifests_without_a_checksum_are_read_each_time(tmp_path: Path, opened: list[str]) -> None:
    for number in range(4):
        publish(tmp_path, number, number)
        path = tmp_path / f"{number:06d}.json"
        manifest = json.loads(path.read_bytes())
        del manifest["checksum"]
        path.write_bytes(encode_json(manifest))
        os.utime(path, (1_000_000_000, 1_000_000_000))
    for _ in range(2):
        assert dict(Manifests(tmp_path).each()) == read_each(tmp_path)
    assert len(opened) == 8
