"""Folders that differ by rank: the first rank looks and tells the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agreement_runs import first_samples, grpo_starts_at, run_stage_in, seen, write_summary
from rl_world import rl_config, with_layout

from data_pipeline.loading.mixture import Cursor
from data_pipeline.loading.reading_record import ReadingRecord
from model.checkpoint.manifest import CHECKPOINTS_FOLDER, MANIFEST_NAME, manifest_checksum
from training.objectives.rows_read import RECORD_KEY


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_hear_what_the_first_one_sees(pool: Any, ranks: int) -> None:
    assert pool.run(seen, [None, 1, 2], ranks=ranks) == [None] * ranks
    assert pool.run(seen, [[1, {"a": 2}], "wrong", None], ranks=ranks) == [[1, {"a": 2}]] * ranks
    refusals = pool.run(seen, ["wrong", 1, 2], ranks=ranks)
    assert refusals == [refusals[0]] * ranks
    for part in ("wrong", "where:    here", "expected: a number", "got:      a text", "fix:      none"):
        assert part in refusals[0]


@pytest.mark.parametrize("summaries", [["first", ""], ["", "second"], ["first", "second"]])
def test_a_stage_is_finished_where_the_first_rank_finds_its_summary(
    pool: Any, tmp_path: Path, summaries: list[str]
) -> None:
    """Otherwise it is trained, though another rank sees one that was removed meanwhile."""
    config = with_layout(rl_config(tmp_path, tmp_path), data=2)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, told in zip(folders, summaries, strict=True):
        if told:
            write_summary(folder, config, told)
    before = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    found = pool.run(run_stage_in, config, [str(folder) for folder in folders], ranks=2)
    assert found == [summaries[0] or "built"] * 2
    assert {path: path.read_text() for path in tmp_path.rglob("summary.json")} == before


def test_rollouts_start_from_the_checkpoint_that_the_first_rank_finds(pool: Any, tmp_path: Path) -> None:
    config = with_layout(rl_config(tmp_path, tmp_path), data=2)
    starts = []
    for name, steps in (("older", [5]), ("newer", [5, 10]), ("nothing", [])):
        starts.append(tmp_path / name)
        for step in steps:
            folder = tmp_path / name / CHECKPOINTS_FOLDER / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / MANIFEST_NAME).write_text("{}")
    older, newer, nothing = map(str, starts)
    for first, second, expected in (
        (newer, older, f"{newer}/{CHECKPOINTS_FOLDER}/step_00000010"),
        (older, newer, f"{older}/{CHECKPOINTS_FOLDER}/step_00000005"),
        (older, nothing, f"{older}/{CHECKPOINTS_FOLDER}/step_00000005"),
        (nothing, older, f"no complete checkpoint found {nothing}"),
    ):
        assert pool.run(grpo_starts_at, config, [first, second], ranks=2) == [expected] * 2


def test_rows_begin_where_the_first_rank_sees_that_the_stage_before_stopped(pool: Any, tmp_path: Path) -> None:
    """Rows that one rank takes for unread, and the others do not, would be read twice, and others never."""
    config = with_layout(rl_config(tmp_path, tmp_path), data=2)
    config.stage.initialize_from, folders = None, [tmp_path / "first", tmp_path / "second"]
    for folder, first_sample in zip(folders, (16, 8), strict=True):
        record = ReadingRecord({}, {"of a": Cursor("7/zero/a", 5)}, first_sample)
        checkpoint = folder / config.stage.name / CHECKPOINTS_FOLDER / "step_00000010"
        checkpoint.mkdir(parents=True)
        manifest = {"format_version": 1, "keys": {}, "files": {}, RECORD_KEY: record.to_dict(), "consumed_samples": 40}
        (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest | {"manifest_crc32": manifest_checksum(manifest)}))
    for names, expected in ((folders, 16), (folders[::-1], 8)):
        found = pool.run(first_samples, config, list(map(str, names)), ranks=2)
        assert found == [(expected, {"of a": Cursor("7/zero/a", 5)})] * 2
