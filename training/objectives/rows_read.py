"""What a curriculum has read of its data, by the manifests of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.loading.mixture import Cursor
from data_pipeline.loading.reading_record import ReadingRecord
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.checkpoint.manifest import latest_checkpoint, list_checkpoints, read_manifest
from model.errors import UserError
from training.config import TrainConfig

RECORD_KEY = "data_read"  # of a checkpoint's manifest: `ReadingRecord.to_dict`


def rows_read_before(config: TrainConfig) -> dict[str, Cursor]:
    """Where the stages before this one stopped in every dataset, by the datasets' fingerprints.

    A stage that has checkpoints of its own goes on as it began. Another one goes on behind the checkpoint that it
    starts from; fresh weights, and weights that were not trained on packed rows, have read nothing.
    """
    for folder in list_checkpoints(config.stage_folder):
        try:
            own = read_manifest(folder)
        except UserError:  # resuming says what is wrong with it
            continue
        return ReadingRecord.from_dict(own[RECORD_KEY]).before if RECORD_KEY in own else {}
    if config.stage.initialize_from is None:
        return {}
    try:
        manifest = read_manifest(latest_checkpoint(Path(config.stage.initialize_from)))
    except UserError:  # loading the weights says what is wrong with it
        return {}
    if RECORD_KEY not in manifest:
        return {}
    return ReadingRecord.from_dict(manifest[RECORD_KEY]).after(int(manifest["consumed_samples"]))


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
