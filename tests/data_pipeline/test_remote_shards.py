"""Shards behind a URL: a real server on loopback that fails, fsspec's own file systems in memory and of the disk."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import fsspec
import pytest

from benchmarks.remote_shards import FailingServer
from data_pipeline.sources import remote
from data_pipeline.sources.copies import Held, ShardCopies
from data_pipeline.sources.inputs import describe_input, find_inputs, is_unchanged
from data_pipeline.sources.remote import RemoteConfig, RemoteShard
from model.errors import Problems, UserError

CONFIG = RemoteConfig(wait_seconds=0.001)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three shards of a few blocks each."""
    (tmp_path / "raw").mkdir()
    for number in range(3):
        (tmp_path / "raw" / f"x-{number:03d}.tar").write_bytes(os.urandom(40_000 + number))
    return tmp_path / "raw"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4_000)


def fetched(shards: list, folder: Path, config: RemoteConfig = CONFIG) -> list[bytes]:
    found = []
    with ShardCopies(folder, config).ahead(shards) as held:
        for one in held:
            assert isinstance(one, Held), one
            found.append(one.path.read_bytes())
    return found


@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_server_loses_nothing(tmp_path: Path, raw: Path, ranges: bool) -> None:
    # Without ranges a whole file has to come at once, so more attempts are needed.
    with FailingServer(raw, failing=0.3, ranges=ranges) as server:
        config = RemoteConfig(attempts=12, wait_seconds=0.001)
        shards = find_inputs([f"{server.url}/*.tar"], "input", config, tmp_path / "notes")
        assert [shard.name for shard in shards] == ["x-000.tar", "x-001.tar", "x-002.tar"]
        assert fetched(shards, tmp_path / "copies", config) == [path.read_bytes() for path in sorted(raw.iterdir())]
    assert server.requests.total() - server.requests["good"] > 3
    if ranges:  # one failure costs one block, not the file
        assert server.requests["good"] < 3 * 11 + 12
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_list_that_was_cut_short_goes_on_and_a_changed_shard_is_noticed(tmp_path: Path, raw: Path) -> None:
    with FailingServer(raw) as server:
        pattern, notes = f"{server.url}/x-{{000..002}}.tar", tmp_path / "notes"
        first = find_inputs([pattern], "input", CONFIG, notes)
        lines = notes.read_bytes().split(b"\n")
        notes.write_bytes(b"\n".join(lines[:1]) + b"\n" + lines[1][:20])
        before = server.requests.total()
        assert find_inputs([pattern, f"{server.url}/x-001.tar"], "input", CONFIG, notes) == first
        assert server.requests.total() == before + 2
        recorded = describe_input(first[0], raw / "x-000.tar")
        assert is_unchanged(first[0], recorded)
        (raw / "x-000.tar").write_bytes(os.urandom(40_000))
        notes.unlink()
        assert not is_unchanged(find_inputs([pattern], "input", CONFIG, notes)[0], recorded)
        with pytest.raises(UserError, match=r"no input shards[\s\S]*x-003"):
            find_inputs([f"{server.url}/x-{{000..003}}.tar"], "input", CONFIG, notes)
        with pytest.raises(UserError, match="no input shards"):
            find_inputs([f"{server.url}/*.zip"], "input", CONFIG, notes)
    assert server.requests.total() < before + 14  # a file that is not there is not asked for again and again


def test_a_server_that_is_gone_is_one_message(tmp_path: Path) -> None:
    config = RemoteConfig(attempts=2, wait_seconds=0.001)
    shards = [RemoteShard(f"http://127.0.0.1:9/{number}.tar", 10) for number in range(3)]  # nobody listens there
    with ShardCopies(tmp_path / "copies", config).ahead(shards) as held:
        answers = list(held)
    assert len(answers) == 3
    assert all(isinstance(one, UserError) and "2 times in a row" in one.got for one in answers)
    for pattern in ("http://127.0.0.1:9/*.tar", "http://127.0.0.1:9/x.tar"):
        with pytest.raises(UserError, match="cannot be read"):
            find_inputs([pattern], "input", config, tmp_path / "notes")


def test_other_file_systems_patterns_and_local_files_together(tmp_path: Path, raw: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a/y-0.tar": b"y0", "/bucket/b/y-1.tar": b"y1", "/bucket/b/other.zip": b""})
    patterns = [str(raw / "x-00[01].tar"), "memory://bucket/**/*.tar", f"file://{raw}/x-{{002..002}}.tar"]
    try:
        shards = find_inputs(patterns, "input", CONFIG, tmp_path / "notes")
        assert [shard.name for shard in shards] == ["x-000.tar", "x-001.tar", "x-002.tar", "y-0.tar", "y-1.tar"]
        expected = [(raw / f"x-00{number}.tar").read_bytes() for number in range(3)] + [b"y0", b"y1"]
        assert fetched(shards, tmp_path / "copies") == expected
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.raises(UserError, match="no longer on its server"):
        ShardCopies(tmp_path / "copies", CONFIG).hold(shards[-1])


def test_copies_stay_in_a_cache_until_the_room_is_needed(tmp_path: Path, raw: Path) -> None:
    config = RemoteConfig(cache=str(tmp_path / "cache"), cache_gigabytes=90_000 / 1e9, wait_seconds=0.001)
    with FailingServer(raw) as server:
        shards = find_inputs([f"{server.url}/*.tar"], "input", config, tmp_path / "notes")
        fetched(shards[:2], tmp_path, config)
        before = server.requests.total()
        fetched(shards[:2], tmp_path, config)
        assert server.requests.total() == before
        copies = ShardCopies(tmp_path, config)
        held = copies.hold(shards[0])
        half = tmp_path / "cache" / "z.tar.tmp-1"
        half.write_bytes(b"of a process that was killed")
        writing = (tmp_path / "cache" / "z.tar.tmp-2").open("wb")
        fcntl.flock(writing, fcntl.LOCK_EX)
        copies.hold(shards[2]).release()  # the one that is read stays, the other makes room
        kept = sorted(path.name.partition("-")[2] for path in copies.folder.iterdir())
        assert kept == ["2", "x-000.tar", "x-002.tar"]
        assert held.path.is_file()
        writing.close()
        held.release()


def test_what_is_secret_is_not_shown() -> None:
    shard = RemoteShard("https://me:secret@host/a/x.tar?signature=secret", 5)
    assert str(shard) == "https://host/a/x.tar"
    assert shard.name == "x.tar"
    assert "secret" not in str(describe_input(shard, Path(__file__)))


def test_a_library_that_is_missing_and_unknown_protocols_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # what was imported before
    for url, message in (("s3://bucket/x.tar", r"nextstate\[remote\]"), ("gopher://host/x.tar", "gopher")):
        with pytest.raises(UserError, match=message):
            find_inputs([url], "input", CONFIG, tmp_path / "notes")
    problems = Problems()
    RemoteConfig(attempts=0, wait_seconds=-1).validate(problems, "remote")
    assert len(problems.found) == 2


def test_shards_of_a_server_are_tokenized_as_those_of_a_disk(tmp_path: Path) -> None:
    from test_tokenize_shards import TEXTS, write_shard

    from data_pipeline.documents.tokenizers import train_sentencepiece
    from launch.commands import tokenize as command

    train_sentencepiece(TEXTS * 5, tmp_path / "text", 280)
    for number in range(2):
        write_shard(tmp_path / f"raw/{number}.tar", [{"__key__": "a", "txt": "hello world"}])
    settings = {"text_tokenizer": str(tmp_path / "text"), "source": "prose", "remote": CONFIG}
    with FailingServer(tmp_path / "raw", failing=0.2) as server:
        local = command.Config(input=f"{tmp_path}/raw/*.tar", target=str(tmp_path / "one"), **settings)
        away = command.Config(input=f"{server.url}/*.tar", target=str(tmp_path / "two"), **settings)
        command.run(local)
        assert command.run(away)["num_documents"] == 2
        assert command.run(away)["skipped_shards"] == 2
        assert command.run(command.Config(**(vars(away) | {"action": "status"})))["done_shards"] == 2
        before = server.requests.total()
        assert command.run(command.Config(**(vars(away) | {"action": "repair"})))["skipped_shards"] == 2
        assert server.requests.total() > before
    for name in ("000000.bin", "000001.seg.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
