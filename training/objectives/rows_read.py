"""What a curriculum has read of its data, by the manifests of its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from data_pipeline.loading.mixture import Cursor
from data_pipeline.loading.reading_record import ReadingRecord
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.checkpoint.manifest import latest_checkpoint, list_checkpoints, read_manifest
from model.errors import UserError
from training.config import TrainConfig

RECORD_KEY = "data_read"  # of a checkpoint's manifest: `ReadingRecord.to_dict`


class Beginning(NamedTuple):
    """Where an order of rows begins: the stage's first sample in it, and what had been read, by fingerprint."""

    first_sample: int
    cursors: dict[str, Cursor]


class History(TypedDict):
    """What two manifests say of the rows that were read, as JSON values; None where there is no such checkpoint."""

    own: dict[str, Any] | None  # of the stage's newest checkpoint
    start: dict[str, Any] | None  # of the checkpoint that the stage starts from


def history_of(config: TrainConfig) -> History:
    """As this process sees the folders. All ranks need the same one (`training.reliability.agreement`)."""
    start = None
    if config.stage.initialize_from is not None:
        with contextlib.suppress(UserError):  # loading the weights says what is wrong with it
            start = _read_record(read_manifest(latest_checkpoint(Path(config.stage.initialize_from))))
    own = _own_manifest(config)
    return {"own": own and _read_record(own), "start": start}


def _read_record(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in (RECORD_KEY, "consumed_samples", "data_fingerprint") if key in manifest}


def rows_read_before(history: History) -> Beginning:
    """Where the stages before this one stopped in every dataset, by the datasets' fingerprints.

    A stage that has checkpoints of its own goes on as it began, or as it was changed. Another one goes on behind the
    checkpoint that it starts from; fresh weights, and weights that were not trained on packed rows, have read nothing.
    """
    own, start = history["own"], history["start"]
    if own is not None:
        if RECORD_KEY not in own:
            return Beginning(0, {})
        record = ReadingRecord.from_dict(own[RECORD_KEY])
        return Beginning(record.first_sample, record.before)
    if start is None or RECORD_KEY not in start:
        return Beginning(0, {})
    return Beginning(0, ReadingRecord.from_dict(start[RECORD_KEY]).after(int(start["consumed_samples"])))


def beginning_of_other_data(config: TrainConfig, history: History, fingerprint: str) -> Beginning | None:
    """Where a stage goes on whose data, now of this fingerprint, are not those of its newest checkpoint.

    Behind that checkpoint: what was read of each dataset stays read. None where nothing changed, where no change is
    allowed, and where the checkpoint does not say what it had read.
    """
    own = history["own"] if config.checkpoint.allow_data_change else None
    if own is None or RECORD_KEY not in own or own["data_fingerprint"] == fingerprint:
        return None
    consumed_samples = int(own["consumed_samples"])
    return Beginning(consumed_samples, ReadingRecord.from_dict(own[RECORD_KEY]).after(consumed_samples))


def data_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of the data differs between two manifests' records, a line each."""
    lines = []
    before, after = (manifest.get(RECORD_KEY, {}).get("datasets", {}) for manifest in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            lines.append(f"{name}: added, {after[name]['num_rows']:,} rows")
        elif name not in after:
            lines.append(f"{name}: left out")
        elif before[name]["fingerprint"] != after[name]["fingerprint"]:
            lines.append(f"{name}: other rows, {before[name]['num_rows']:,} -> {after[name]['num_rows']:,}")
    shares = [_shares_of(manifest.get(RECORD_KEY, {})) for manifest in (old, new)]
    return lines if shares[0] == shares[1] else [*lines, f"shares by sample: {shares[0]} -> {shares[1]}"]


def _shares_of(record: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """By the sample from which on they hold."""
    first = {name: entry["share"] for name, entry in record.get("datasets", {}).items()}
    phases = [(record.get("first_sample", 0), first), *record.get("changes", ())]
    return {
        int(sample): {name: round(share / sum(shares.values()), 4) for name, share in shares.items() if share}
        for sample, shares in phases
    }


def _own_manifest(config: TrainConfig) -> dict[str, Any] | None:
    """Of the newest checkpoint of this stage that has a readable one."""
    for folder in list_checkpoints(config.stage_folder):
        try:
            manifest: dict[str, Any] = read_manifest(folder)
        except UserError:  # resuming says what is wrong with it
            continue
        return manifest
    return None


def coverage_of_stage(stage_folder: Path) -> dict[str, dict[str, float]]:
    """What the curriculum had read at the stage's newest checkpoint; see `ReadingRecord.coverage`. {} without one."""
    for folder in list_checkpoints(stage_folder):
        manifest: dict[str, Any] = read_manifest(folder)
        if RECORD_KEY in manifest:
            return ReadingRecord.from_dict(manifest[RECORD_KEY]).coverage(int(manifest["consumed_samples"]))
    return {}


def refuse_other_data(config: TrainConfig) -> None:
    """Raise `UserError` where a finished stage has read other data than those that it is given now.

    A path that has changed is no difference, and data that are gone are not asked for.
    """
    records = (read_manifest(folder).get(RECORD_KEY) for folder in list_checkpoints(config.stage_folder))
    record = next((ReadingRecord.from_dict(record) for record in records if record), None)
    for name, entry in config.stage.data.datasets.items() if record else ():
        try:
            found = str(read_dataset_manifest(Path(entry.path))["fingerprint"])
        except UserError:
            continue
        known = record.datasets.get(name)  # type: ignore[union-attr]
        if known is not None and known.fingerprint != found:
            raise UserError(
                "this stage is finished, and was trained on other data",
                where=f"stage.data.datasets.{name}.path={entry.path}",
                expected=f"the dataset of fingerprint {known.fingerprint}",
                got=found,
                fix="give it the data that it has read, or choose another run_folder or stage.name",
            )
