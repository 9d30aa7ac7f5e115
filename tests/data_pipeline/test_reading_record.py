"""Stages of a curriculum one after another: unread rows first, every row once an epoch across all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.mixture import Cursor, Mixture
from data_pipeline.loading.reading_record import ReadingRecord
from data_pipeline.storage.format import FORMAT_VERSION
from model.checkpoint.manifest import manifest_checksum
from model.errors import UserError
from training.config import DatasetEntry, StageConfig, TrainConfig
from training.objectives.rows_read import (
    RECORD_KEY,
    beginning_of_other_data,
    coverage_of_stage,
    data_changes,
    history_of,
    rows_read_before,
)
from training.stage import finished_summary

NAMES = ("a", "b", "c")
SIZES = st.fixed_dictionaries({name: st.integers(1, 60) for name in NAMES})
WEIGHTS = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)
# `changed`: the sample at which the data are opened anew, with other weights; `later`: the weights after 40 samples.
STAGE = st.fixed_dictionaries(
    {"weights": WEIGHTS, "samples": st.integers(0, 90), "changed": st.integers(0, 90), "later": WEIGHTS}
)


def mixture_of(sizes: dict[str, int], weights: list[float], stage: str, before: dict[str, Cursor], **changes):
    """A stage over datasets whose fingerprints are "of a"...; returns the mixture and its record."""
    cursors = {name: before[f"of {name}"] for name in sizes if f"of {name}" in before}
    mixture = Mixture(sizes, dict(zip(sizes, weights, strict=True)), 7, stage, cursors, **changes)
    return mixture, ReadingRecord.of(mixture, {name: f"of {name}" for name in sizes}, before)


def read(mixture: Mixture, num_samples: int) -> list[tuple[str, int]]:
    located = mixture.locate_many(np.arange(mixture.first_sample, max(mixture.first_sample, num_samples)))
    return [(mixture.names[dataset], row) for dataset, row in zip(located.datasets, located.rows.tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, stages=st.lists(STAGE, min_size=1, max_size=4))
def test_rows_come_once_an_epoch_across_the_stages(sizes, stages):
    before: dict[str, Cursor] = {}
    seen: Counter[tuple[str, int]] = Counter()
    totals: Counter[str] = Counter()
    for number, stage in enumerate(stages):
        # In the middle of the stage its data change: what was read of each dataset stays read.
        changed = min(stage["changed"], stage["samples"])
        mixture, record = mixture_of(sizes, stage["weights"], f"stage_{number}", before)
        seen.update(read(mixture, changed))
        totals.update(name for name, _ in read(mixture, changed))
        later = [(40, dict(zip(sizes, stage["later"], strict=True)))]
        mixture, record = mixture_of(
            sizes, stage["weights"], f"stage_{number}", record.after(changed), changes=later, first_sample=changed
        )
        record = ReadingRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        rows = read(mixture, stage["samples"])
        by_name = Counter(name for name, _ in rows)
        assert record.rows_read(stage["samples"]) == {name: by_name[name] for name in mixture.names}
        seen.update(rows)
        totals.update(by_name)
        coverage = record.coverage(stage["samples"])
        for name in mixture.names:
            counts = [seen[name, row] for row in range(sizes[name])]
            assert max(counts) - min(counts) <= 1  # nothing is read again while a row is unread
            assert coverage[name] == {
                "num_rows": sizes[name],
                "rows_read": totals[name],
                "epochs": totals[name] / sizes[name],
            }
        before = record.after(stage["samples"])
    assert {name: before[f"of {name}"].position for name in totals} == dict(totals)


def test_stages_that_do_not_go_on_have_orders_of_their_own():
    sizes = {"a": 386}
    orders = {stage: read(mixture_of(sizes, [1], stage, {})[0], 386) for stage in ("pretrain_1", "pretrain_2")}
    assert sorted(orders["pretrain_1"]) == sorted(orders["pretrain_2"])
    same = sum(one == two for one, two in zip(*orders.values(), strict=True))
    assert same < 10
    overlap = set(orders["pretrain_1"][:48]) & set(orders["pretrain_2"][:48])
    assert len(overlap) < 20  # 6 expected; 48 when the stage is not part of the key


def test_the_fingerprint_tells_stage_and_place():
    fingerprints = {
        mixture_of({"a": 9}, [1], stage, {"of a": cursor} if cursor else {})[0].fingerprint
        for stage, cursor in (
            ("one", None),
            ("two", None),
            ("two", Cursor("7/one/a", 0)),
            ("two", Cursor("7/one/a", 1)),
        )
    }
    assert len(fingerprints) == 3  # a cursor at the beginning of stage one's order is stage one's order
    assert (
        mixture_of({"a": 9}, [1], "one", {})[0].fingerprint
        == mixture_of({"a": 9}, [1], "two", {"of a": Cursor("7/one/a", 0)})[0].fingerprint
    )


def test_a_dataset_under_another_name_is_the_same_dataset():
    mixture = Mixture({"renamed": 50}, {"renamed": 1}, 7, "two", {"renamed": Cursor("7/one/a", 20)})
    first = read(mixture_of({"a": 50}, [1], "one", {})[0], 50)
    assert [row for _, row in read(mixture, 30)] == [row for _, row in first[20:]]


def write_checkpoint(stage_folder: Path, step: int, **content: object) -> None:
    folder = stage_folder / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    manifest = {"format_version": 1, "keys": {}, "files": {}, **content}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"manifest_crc32": manifest_checksum(manifest)}))


@pytest.fixture
def record() -> ReadingRecord:
    return mixture_of({"a": 30, "b": 10}, [3, 1], "pretrain_1", {"of c": Cursor("7/zero/c", 5)})[1]


def config_of(run_folder: Path, initialize_from: str | None) -> TrainConfig:
    stage = StageConfig(name="pretrain_2", initialize_from=initialize_from)
    return TrainConfig(run_folder=str(run_folder), stage=stage)


def test_a_stage_goes_on_behind_the_checkpoint_that_it_starts_from(tmp_path: Path, record: ReadingRecord):
    assert rows_read_before(history_of(config_of(tmp_path, None))) == (0, {})
    write_checkpoint(tmp_path / "pretrain_1", 10, consumed_samples=20, **{RECORD_KEY: record.to_dict()})
    config = config_of(tmp_path, str(tmp_path / "pretrain_1"))
    expected = {
        "of a": Cursor("7/pretrain_1/a", 15),
        "of b": Cursor("7/pretrain_1/b", 5),
        "of c": Cursor("7/zero/c", 5),
    }
    assert rows_read_before(history_of(config)) == (0, expected)
    assert coverage_of_stage(tmp_path / "pretrain_1")["a"] == {"num_rows": 30, "rows_read": 15, "epochs": 0.5}
    # A resumed stage begins where it began, whatever has become of the other one.
    _, own = mixture_of({"a": 30}, [1], "pretrain_2", expected)
    write_checkpoint(tmp_path / "pretrain_2", 3, consumed_samples=6, **{RECORD_KEY: own.to_dict()})
    write_checkpoint(tmp_path / "pretrain_1", 20, consumed_samples=40, **{RECORD_KEY: record.to_dict()})
    assert rows_read_before(history_of(config)) == (0, expected)
    assert coverage_of_stage(tmp_path / "pretrain_2")["a"]["rows_read"] == 21


def test_a_dataset_is_read_no_more_often_than_is_allowed(record: ReadingRecord):
    """a: 30 rows, 3 of 4 samples; b: 10 rows, 1 of 4."""
    record.refuse_repetition(40, {"a": 1, "b": 1})
    record.refuse_repetition(400, {"a": 0})
    with pytest.raises(UserError, match="more often than is allowed") as caught:
        record.refuse_repetition(44, {"a": 2, "b": 1})
    assert caught.value.where == "stage.data.datasets.b.max_epochs"
    assert "b 1.1 times (10 rows)" in caught.value.got
    assert "(42 in place of 44)" in caught.value.fix
    record.refuse_repetition(42, {"a": 2, "b": 1})
    before = record.after(40)
    _, later = mixture_of({"a": 30, "b": 10}, [1, 1], "pretrain_2", before)
    later.refuse_repetition(20, {"a": 2, "b": 2})
    with pytest.raises(UserError, match="more often than is allowed") as caught:
        later.refuse_repetition(22, {"a": 2, "b": 2})
    assert "(21 in place of 22)" in caught.value.fix


def test_other_data_begin_behind_the_newest_checkpoint_where_that_is_allowed(tmp_path: Path, record: ReadingRecord):
    content = {"consumed_samples": 20, "data_fingerprint": "old", RECORD_KEY: record.to_dict()}
    write_checkpoint(tmp_path / "pretrain_2", 10, **content)
    config = config_of(tmp_path, None)
    assert beginning_of_other_data(config, history_of(config), "new") is None
    config.checkpoint.allow_data_change = True
    assert beginning_of_other_data(config, history_of(config), "old") is None
    found = beginning_of_other_data(config, history_of(config), "new")
    assert found == (20, record.after(20))
    sizes = {"a": 30, "b": 10, "new": 50}
    _, changed = mixture_of(sizes, [1, 0, 1], "pretrain_2", found.cursors, first_sample=found.first_sample)
    later = content | {"consumed_samples": 30, "data_fingerprint": "new", RECORD_KEY: changed.to_dict()}
    assert data_changes(content, later) == [
        "b: left out",
        "new: added, 50 rows",
        "shares by sample: {0: {'a': 0.75, 'b': 0.25}} -> {20: {'a': 0.5, 'new': 0.5}}",
    ]
    write_checkpoint(tmp_path / "pretrain_2", 15, **later)
    assert beginning_of_other_data(config, history_of(config), "new") is None
    assert rows_read_before(history_of(config)) == (20, found.cursors)
    assert changed.coverage(30)["a"]["rows_read"] == 15 + 5


def test_checkpoints_without_a_record_have_read_nothing(tmp_path: Path):
    write_checkpoint(tmp_path / "converted", 0, consumed_samples=0)
    assert rows_read_before(history_of(config_of(tmp_path, str(tmp_path / "converted")))) == (0, {})
    assert rows_read_before(history_of(config_of(tmp_path, str(tmp_path / "nothing")))) == (0, {})
    assert coverage_of_stage(tmp_path / "converted") == {}


def test_a_finished_stage_is_told_from_the_same_on_other_data(tmp_path: Path, record: ReadingRecord):
    config = config_of(tmp_path, None)
    write_checkpoint(config.stage_folder, 10, consumed_samples=20, **{RECORD_KEY: record.to_dict()})
    (config.stage_folder / "summary.json").write_text(json.dumps({"config_fingerprint": config.fingerprint()}))
    for name, fingerprint in (("moved", "of a"), ("other", "of z")):
        manifest = {"kind": "packed_dataset", "format_version": FORMAT_VERSION, "fingerprint": fingerprint}
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(json.dumps(manifest))
    for name in ("gone", "moved"):
        config.stage.data.datasets = {"a": DatasetEntry(path=str(tmp_path / name))}
        summary = {"config_fingerprint": config.fingerprint()}
        (config.stage_folder / "summary.json").write_text(json.dumps(summary))
        assert finished_summary(config) == summary
    config.stage.data.datasets["a"].path = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"finished, and was trained on other data\n.*other\n.*of a\n.*of z"):
        finished_summary(config)
