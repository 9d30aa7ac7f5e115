"""Checkpoints: published whole or not at all, damage found, any number of ranks on either side."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from fake_objective import FakeCluster, FakeEngine
from small_disk import small_disk

from model.checkpoint.reader import CheckpointReader, list_checkpoints
from model.errors import UserError
from training.reliability.checkpoint import CheckpointFailed, CheckpointStore, find_damage, resolve_initial


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
    assert resolve_initial(tmp_path / "one") == newest
    assert resolve_initial(older) == older
    damage_flip(newest)
    assert resolve_initial(tmp_path / "one") == older
    with pytest.raises(UserError, match="one"):
        resolve_initial(tmp_path / "two")
    damage_flip(older)
    with pytest.raises(UserError, match="damaged"):
        resolve_initial(tmp_path / "one")


def test_reader_sees_the_pieces(tmp_path):
    folder = on_ranks(2, lambda rank, engine: save(make_store(tmp_path, engine), 5))[0]
    with CheckpointReader(folder) as reader:
        assert reader.global_shape("model/weight") == (8, 4)
        assert torch.equal(reader.read("model/weight", (3, 1), (2, 2)), FakeEngine(7).weight[3:5, 1:3])
