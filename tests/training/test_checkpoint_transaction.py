"""Checkpoints: published whole or not at all, damage found, any number of ranks on either side."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from fake_objective import FakeCluster, FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from model.checkpoint.reader import CheckpointReader, list_checkpoints, manifest_checksum
from model.errors import UserError
from training.reliability import checkpoint, initial
from training.reliability.checkpoint import CheckpointFailed, CheckpointStore, NotFinite, find_damage
from training.reliability.finite import is_finite
from training.reliability.initial import resolve_initial


def nothing(_phase: str) -> None:
    pass


def make_store(folder: Path, engine: FakeEngine, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, engine, engine, keep, nothing)


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"step": step, "kind": "fake"}, "a: 1\n")


def on_ranks(world_size: int, action) -> list:
    """Run action(rank, engine) in a thread for each rank; results or exceptions by rank."""
    cluster = FakeCluster(world_size)
    results: list = [None] * world_size

    def work(rank: int) -> None:
        try:
            results[rank] = action(rank, FakeEngine(7, cluster, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("num_writers", [1, 2, 4])
@pytest.mark.parametrize("num_readers", [1, 2])
def test_round_trip_over_numbers_of_ranks(tmp_path, num_writers, num_readers):
    def write(rank, engine):
        engine.momentum += 3.0
        engine.num_updates += 5
        save(make_store(tmp_path, engine), 5)
        return engine.weight

    weight = on_ranks(num_writers, write)[0]

    def read(rank, engine):
        engine.weight.zero_()
        folder = make_store(tmp_path, engine).find_usable(pytest.fail)
        engine_store = make_store(tmp_path, engine)
        engine_store.load(folder)
        return engine

    for engine in on_ranks(num_readers, read):
        assert torch.equal(engine.weight, weight)
        assert torch.equal(engine.momentum, torch.full_like(weight, 3.0))
        assert int(engine.num_updates) == 5


def test_random_streams_return_only_to_the_same_layout(tmp_path):
    engine = FakeEngine(7)
    torch.randn(3, generator=engine.noise)
    folder = save(make_store(tmp_path, engine), 1)
    same = FakeEngine(7)
    make_store(tmp_path, same).load(folder)
    assert torch.equal(same.noise.get_state(), engine.noise.get_state())

    def load_elsewhere(rank, other):
        before = other.noise.get_state()
        make_store(tmp_path, other).load(folder)
        return torch.equal(before, other.noise.get_state())

    assert on_ranks(2, load_elsewhere) == [True, True]


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "rank_00000.safetensors", 100)


def damage_flip(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_remove(folder: Path) -> None:
    (folder / "rank_00000.safetensors").unlink()


def damage_manifest_syntax(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def damage_manifest_value(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 11}))


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_remove, damage_manifest_syntax, damage_manifest_value]
)
def test_damaged_newest_is_passed_over(tmp_path, damage):
    store = make_store(tmp_path, FakeEngine())
    older, newest = save(store, 5), save(store, 10)
    assert store.find_usable(pytest.fail) == newest
    damage(newest)
    told = []
    assert store.find_usable(lambda folder, text: told.append((folder, text))) == older
    assert [folder for folder, _ in told] == [newest]
    damage(older)
    with pytest.raises(UserError, match="every checkpoint"):
        store.find_usable(lambda folder, text: None)


def test_damage_seen_by_one_rank_is_known_to_all(tmp_path):
    on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 5))
    on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 10))
    content = bytearray((tmp_path / "checkpoints/step_00000010/rank_00001.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "checkpoints/step_00000010/rank_00001.safetensors").write_bytes(content)
    found = on_ranks(2, lambda rank, engine: make_store(tmp_path, engine).find_usable(lambda *damage: None))
    assert [folder.name for folder in found] == ["step_00000005"] * 2


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_to_which_the_newest_is_shown_late_goes_where_the_others_go(tmp_path, monkeypatch, late):
    for step in (5, 10):
        on_ranks(2, lambda rank, engine, step=step: save(make_store(tmp_path, engine), step))
    here = threading.local()
    monkeypatch.setattr(checkpoint, "list_checkpoints", lambda folder: list_checkpoints(folder)[here.num_unseen :])

    def find(rank, engine):
        here.num_unseen = int(rank == late)
        return make_store(tmp_path, engine).find_usable(pytest.fail)

    assert on_ranks(2, find) == [tmp_path / "checkpoints" / f"step_{5 if late == 0 else 10:08d}"] * 2


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    store = make_store(tmp_path, FakeEngine())
    damage_flip(save(store, 5))
    folder = save(store, 5)
    assert find_damage(folder) == ""
    assert sorted(path.name for path in store.folder.iterdir())[-1] == "step_00000005"


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path):
    store = make_store(tmp_path, FakeEngine(), keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]
    shutil.copytree(store.folder / "step_00000004", store.folder / ".tmp-step_00000005")
    (store.folder / "step_00000002").mkdir()  # its manifest was removed, then the process was killed
    save(make_store(tmp_path, FakeEngine(), keep=2), 5)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000004", "step_00000005"]


def test_one_rank_that_cannot_write_fails_all_and_leaves_nothing(tmp_path):
    on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 5))

    def write(rank, engine):
        store = make_store(tmp_path, engine)
        if rank == 1:
            store._write_own_files = lambda temporary: (_ for _ in ()).throw(OSError(28, "No space"))
        save(store, 10)

    results = on_ranks(2, write)
    assert all(isinstance(result, CheckpointFailed) for result in results)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert find_damage(tmp_path / "checkpoints/step_00000005") == ""


def test_full_disk_removes_the_unfinished_one(tmp_path):
    with small_disk(tmp_path / "small", 256) as folder:
        engine = FakeEngine()
        store = make_store(folder, engine)
        save(store, 5)
        engine.random_state = lambda: {"large": torch.zeros(300_000, dtype=torch.uint8)}
        with pytest.raises(CheckpointFailed):
            save(store, 10)
        assert [path.name for path in store.folder.iterdir()] == ["step_00000005"]
        assert find_damage(store.folder / "step_00000005") == ""


def test_shards_that_do_not_cover_their_tensor_are_a_defect(tmp_path):
    engine = FakeEngine()
    engine.model_shards = lambda: FakeEngine._shards(engine, "model/weight", engine.weight[:4])
    with pytest.raises(AssertionError, match="model/weight"):
        save(make_store(tmp_path, engine), 1)


def test_initialize_from(tmp_path):
    store = make_store(tmp_path / "one", FakeEngine())
    older, newest = save(store, 5), save(store, 10)
    assert resolve_initial(tmp_path / "one", FakeEngine()) == newest
    assert resolve_initial(older, FakeEngine()) == older
    damage_flip(newest)
    assert resolve_initial(tmp_path / "one", FakeEngine()) == older
    with pytest.raises(UserError, match="one"):
        resolve_initial(tmp_path / "two", FakeEngine())
    damage_flip(older)
    with pytest.raises(UserError, match="damaged"):
        resolve_initial(tmp_path / "one", FakeEngine())


@pytest.mark.parametrize("failing", [0, 1])
def test_all_ranks_start_from_the_same_checkpoint(tmp_path, monkeypatch, failing):
    """One rank cannot read the newest; none reads all of it."""
    for step in (5, 10):
        on_ranks(2, lambda rank, engine, step=step: save(make_store(tmp_path, engine), step))
    asked = []

    def damage_here(folder, rank, world_size):
        asked.append((folder.name, rank, world_size))
        return "it cannot be read" if rank == failing and folder.name.endswith("10") else ""

    monkeypatch.setattr(initial, "find_damage", damage_here)
    found = on_ranks(2, lambda rank, engine: resolve_initial(tmp_path, engine))
    assert [folder.name for folder in found] == ["step_00000005"] * 2
    assert sorted(asked) == [(f"step_{step:08d}", rank, 2) for step in (5, 10) for rank in (0, 1)]


def test_reader_sees_the_pieces(tmp_path):
    folder = on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 5))[0]
    with CheckpointReader(folder) as reader:
        assert reader.global_shape("model/weight") == (8, 4)
        assert torch.equal(reader.read("model/weight", (3, 1), (2, 2)), FakeEngine(7).weight[3:5, 1:3])


# --- weights that are not finite, disks that do not read ------------------------------------------------------------


@given(
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_is_finite_is_isfinite(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_one_rank_with_a_nan_keeps_all_from_publishing(tmp_path):
    on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 5))

    def write(rank, engine):
        engine.momentum[6, 1] = torch.inf  # a row of rank 1; the other has nothing wrong
        save(make_store(tmp_path, engine), 10)

    results = on_ranks(2, write)
    assert all(isinstance(result, NotFinite) for result in results)
    assert "moments are not finite (optimizer/momentum)" in str(results[0])
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000005"]
    aside = tmp_path / "checkpoints/non_finite_step_00000010"
    assert json.loads((aside / "manifest.json").read_text())["non_finite"] == ["optimizer/momentum"]


def poisoned_by_an_older_version(store: CheckpointStore, step: int, monkeypatch) -> Path:
    """Published with a NaN, and with a manifest that says nothing of it."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "non_finite_keys", lambda tensors: [])
        store.shards.weight[0, 0] = torch.nan
        folder = save(store, step)
    path = folder / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "non_finite"}
    path.write_text(json.dumps(manifest | {"manifest_crc32": manifest_checksum(manifest)}))
    return folder


def test_a_poisoned_checkpoint_is_not_loaded(tmp_path, monkeypatch):
    store = make_store(tmp_path, FakeEngine())
    good = save(store, 5)
    poisoned = poisoned_by_an_older_version(store, 10, monkeypatch)
    assert find_damage(poisoned) == ""
    assert resolve_initial(tmp_path, FakeEngine()) == good
    told = []
    assert store.find_usable(lambda folder, text: told.append((folder, text))) == good
    assert told == [(poisoned, "the weights are not finite (model/weight)")]
    assert (store.folder / "non_finite_step_00000010").is_dir()
    assert list_checkpoints(tmp_path) == [good]


def test_nothing_but_poisoned_checkpoints(tmp_path, monkeypatch):
    store = make_store(tmp_path, FakeEngine())
    poisoned = poisoned_by_an_older_version(store, 10, monkeypatch)
    with pytest.raises(UserError, match="damaged or not finite"):
        store.find_usable(lambda folder, text: None)
    assert list_checkpoints(tmp_path) == [poisoned]  # a restart must not begin anew without a word


def test_damaged_checkpoints_push_no_good_one_out(tmp_path):
    store = make_store(tmp_path, FakeEngine(), keep=2)
    older, newest = save(store, 10), save(store, 15)
    damage_flip(newest)
    assert store.find_usable(lambda folder, text: None) == older
    save(store, 12)
    assert older.is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, name, number):
    """A broken disk cannot be had here: opening one file of the newest checkpoint fails as it would there."""
    store = make_store(tmp_path, FakeEngine())
    older, newest = save(store, 5), save(store, 10)

    def broken(original):
        def opened(file, *arguments, **options):
            if str(file) == str(newest / name):
                raise OSError(number, os.strerror(number), str(file))
            return original(file, *arguments, **options)

        return opened

    monkeypatch.setattr("builtins.open", broken(open))
    monkeypatch.setattr(io, "open", broken(io.open))  # pathlib's
    monkeypatch.setattr(os, "open", broken(os.open))
    told = []
    assert store.find_usable(lambda folder, text: told.append((folder, text))) == older
    assert told[0][0] == newest
    assert os.strerror(number) in told[0][1]
    assert resolve_initial(tmp_path, FakeEngine()) == older
    assert newest.is_dir()  # it may be readable again


def test_a_checkpoint_folder_without_permission_is_passed_over(tmp_path, monkeypatch):
    """Tests run as root too, whom no permission stops: looking into the newest folder fails as it would for others."""
    store = make_store(tmp_path, FakeEngine())
    older, newest = save(store, 5), save(store, 10)
    original = Path.stat

    def refused(path, **options):
        if path.is_relative_to(newest) and path != newest:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    told = []
    assert store.find_usable(lambda folder, text: told.append(folder)) == older
    assert told == [newest]
