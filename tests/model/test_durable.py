"""Files that last: whole or not at all, one holder of a lock, the same fingerprint whatever the order of keys."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.durable import (
    crc32_of,
    fingerprint_of,
    lock,
    read_json,
    read_json_object,
    replace_file,
    told_no_space,
    write_json,
)
from model.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FORK = multiprocessing.get_context("fork")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]  # no temporary is left


@settings(max_examples=50, deadline=None)
@given(value=JSON)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text(encoding="ascii") == json.dumps(value, indent=1) + "\n"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{", b"[" * 100_000])
def test_damaged_json_names_the_file(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="the state is damaged") as caught:
        read_json(path, damaged="the state is damaged", fix="remove it")
    assert caught.value.where == str(path)
    assert caught.value.fix == "remove it"


def test_missing_json_and_another_kind_of_value(tmp_path):
    with pytest.raises(UserError, match="missing") as caught:
        read_json(tmp_path / "nowhere.json")
    assert caught.value.where.endswith("nowhere.json")
    write_json(tmp_path / "list.json", [1])
    with pytest.raises(UserError, match="damaged") as caught:
        read_json_object(tmp_path / "list.json", damaged="the record is damaged", fix="remove it")
    assert (caught.value.expected, caught.value.got) == ("a JSON object", "list")


@settings(max_examples=50, deadline=None)
@given(values=st.dictionaries(st.text(), JSON, min_size=1))
def test_a_fingerprint_does_not_see_the_order_of_keys(values):
    backwards = dict(reversed(values.items()))
    text = json.dumps(values, sort_keys=True)
    assert fingerprint_of(values) == fingerprint_of(backwards)
    assert fingerprint_of(values) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert fingerprint_of(values) != fingerprint_of(values | {"one more": [values]})


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("model.durable.READ_BLOCK_BYTES", 7)
    content = os.urandom(50)
    (tmp_path / "file").write_bytes(content)
    assert crc32_of(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_no_space_is_told_and_other_errors_are_not(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(UserError, match=os.strerror(number)) as caught, told_no_space(tmp_path, 12_345):
            raise OSError(number, "told by the system")
        assert "12,345 bytes" in str(caught.value)
        assert caught.value.where == str(tmp_path)
    with pytest.raises(PermissionError), told_no_space(tmp_path, 1):
        raise PermissionError(errno.EACCES, "not ours")


def hold(path: Path, has_lock, may_end) -> None:
    with lock(path, "taken", fix="wait"):
        has_lock.set()
        may_end.wait(30)


def start_holder(path: Path):
    has_lock, may_end = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(path, has_lock, may_end))
    holder.start()
    assert has_lock.wait(30)
    return holder, may_end


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path):
    path = tmp_path / ".lock"
    holder, _ = start_holder(path)
    with (
        pytest.raises(UserError, match="another run") as caught,
        lock(path, "another run is here", fix="wait", where=tmp_path / "run"),
    ):
        pass
    assert f"process {holder.pid} on" in caught.value.got
    assert (caught.value.where, caught.value.fix) == (str(tmp_path / "run"), "wait")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with lock(path, "taken", fix="wait"):
        assert path.read_text().startswith(f"process {os.getpid()} on")
        assert path.read_text().count("\n") == 1
    assert not path.exists()
    with lock(path, "taken", fix="wait"):  # free again after its block
        pass
    assert list(tmp_path.iterdir()) == []


def count_up(path: Path, counter: Path) -> None:
    for _ in range(60):
        with lock(path, "taken", fix="wait", waiting_seconds=60):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_a_lock_that_is_removed_by_its_holder_still_keeps_others_out(tmp_path):
    (tmp_path / "counter").write_text("0")
    workers = [FORK.Process(target=count_up, args=(tmp_path / ".lock", tmp_path / "counter")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "counter").read_text() == "240"


def test_a_lock_is_waited_for(tmp_path):
    holder, may_end = start_holder(tmp_path / ".lock")
    may_end.set()
    with lock(tmp_path / ".lock", "taken", fix="wait", waiting_seconds=30):
        holder.join(30)
    assert holder.exitcode == 0


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("model.durable.fcntl.flock", refuse)
    with pytest.raises(UserError, match="takes no locks"), lock(tmp_path / ".lock", "taken", fix="wait"):
        pass
