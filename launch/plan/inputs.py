"""What a stage reads before its first step, looked at before anything starts or is queued: weights, rows, classes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.loading.loader import check_rows
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.reading_record import ReadingRecord
from data_pipeline.packing.held_out import check_kept_apart
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.checkpoint.manifest import CheckpointManifest, foreign_format, latest_checkpoint, list_checkpoints
from model.config import SIZES, ModelConfig
from model.errors import UserError
from model.registry import absent_class, find_class
from model.vocabulary import Vocabulary
from training.config import TrainConfig, differences
from training.objectives.registry import KEY, OPTIONS, options_class, options_of
from training.objectives.rows_read import history_of, rows_read_before

PLANNED_ENGINES = ("megatron", "deepspeed")  # whose memory the plan counts


def is_planned(config: TrainConfig) -> bool:
    """True for what trains the transformer on rows of tokens with an engine whose memory is counted."""
    name = config.stage.objective_name
    engine = config.engine or (
        PLANNED_ENGINES[0] if name in OPTIONS else getattr(find_class("objective", name, {}, KEY), "engine", "")
    )
    stage_keys = getattr(options_class(name), "stage_keys", None)
    return engine in PLANNED_ENGINES and (stage_keys is None or "sequence_length" in stage_keys)


def missing_inputs(config: TrainConfig) -> list[str]:
    """Of a stage that starts now: weights to start from, packed rows and what its objective reads that are not there."""
    source, found = config.stage.initialize_from, absent_classes(config)
    options = options_of(config)
    if hasattr(options, "missing_inputs"):
        found += options.missing_inputs(KEY)
    if source is not None and not Path(source).exists():
        found.append(f"stage.initialize_from={source} does not exist")
    if is_planned(config):
        found += unfit_start(config) + unfit_rows(config)
    return found


def absent_classes(config: TrainConfig) -> list[str]:
    """Engine and callbacks of the user's own that cannot be imported."""
    named = {f"callbacks.{name}.path": ("callback", entry.path) for name, entry in config.callbacks.items()}
    if config.engine is not None and "." in config.engine:
        named["engine"] = ("engine", config.engine)
    return [told for key, (kind, path) in named.items() if (told := absent_class(kind, path, key))]


def unfit_start(config: TrainConfig) -> list[str]:
    """Weights that are there but are not those of this transformer; adapters that have none to adapt."""
    source, rank = config.stage.initialize_from, config.model.adapter.rank
    if source is None and rank and not list_checkpoints(config.stage_folder):
        return [
            f"model.adapter.rank={rank} freezes all other weights, and stage.initialize_from names none: it is null"
        ]
    if source is None or not Path(source).exists():
        return []
    try:
        manifest = CheckpointManifest.read(latest_checkpoint(source))
    except UserError as error:
        return [f"stage.initialize_from={source}: {error.what}, {foreign_format(Path(source)) or error.got}"]
    if manifest.kind != "transformer":
        return [f"stage.initialize_from={source} is a checkpoint of kind {manifest.kind}"]
    other = other_sizes(manifest, config.model)
    return [f"stage.initialize_from={source} holds a model of other sizes: {'; '.join(other)}"] if other else []


def other_sizes(manifest: CheckpointManifest, model: ModelConfig) -> list[str]:
    """A line `model.KEY: theirs -> ours` for each size and for each part of the vocabulary in which a checkpoint differs."""
    theirs = {name: value for name, value in (manifest.model or {}).items() if name in SIZES}
    ours = {name: getattr(model, name) for name in theirs}
    found = differences(theirs, ours, "model")
    if manifest.vocabulary:
        found += differences(
            manifest.vocabulary, Vocabulary.from_config(model.vocabulary).describe(), "model.vocabulary"
        )
    return found


def unfit_rows(config: TrainConfig) -> list[str]:
    """Packed rows, to train on or held out, that are not there, are not what the stage reads, or are given twice."""
    entries = config.stage.data.datasets_in_use()
    absent = [f"{name} ({entry.path})" for name, entry in entries.items() if not Path(entry.path).is_dir()]
    found = [f"there are no packed rows of {', '.join(absent)}"] if absent else []
    training, unfit = read_rows(config, {name: entry.path for name, entry in entries.items()})
    found += unfit
    found += [
        f"stage.validation.{name}={path} is no folder of packed rows"
        for name, path in config.stage.validation.items()
        if not Path(path).is_dir()
    ]
    held_out, unfit = read_rows(config, config.stage.validation)
    found += unfit + rows_given_twice(training, held_out)
    for name, manifest in held_out.items():
        found += told_by(lambda: check_kept_apart(training, manifest, config.stage.validation[name]))  # noqa: B023
    if not found:
        found += told_by(lambda: refuse_repetition(config, training))
    return found


def read_rows(config: TrainConfig, folders: Mapping[str, str]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The manifests of those folders that are there, by name, and what is wrong with their rows."""
    read: dict[str, Mapping[str, Any]] = {}
    vocabulary, length = Vocabulary.from_config(config.model.vocabulary), config.stage.sequence_length

    def read_one(name: str, folder: Path) -> None:
        manifest = read_dataset_manifest(folder)
        check_rows(name, folder, manifest, length, vocabulary)
        read[name] = manifest

    found = []
    for name, folder in folders.items():
        if Path(folder).is_dir():
            found += told_by(lambda: read_one(name, Path(folder)))  # noqa: B023
    return read, found


def rows_given_twice(training: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names under which the same rows stand: in the mixture they would be read for two, held out they would be no test."""
    names: dict[str, list[str]] = {}
    for name, manifest in training.items():
        names.setdefault(str(manifest["fingerprint"]), []).append(name)
    found = [
        f"stage.data.datasets.{' and .'.join(same)} hold the same rows; give them one name, with the sum of the weights"
        for same in names.values()
        if len(same) > 1
    ]
    for name, manifest in held_out.items():
        if same := names.get(str(manifest["fingerprint"])):
            found.append(
                f"stage.validation.{name} holds the rows of stage.data.datasets.{same[0]}, which are trained on"
            )
    return found


def refuse_repetition(config: TrainConfig, training: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `UserError` where the stage would read a dataset more often than its `max_epochs`."""
    stage = config.stage
    limits = {name: entry.max_epochs for name, entry in stage.data.datasets_in_use().items() if entry.max_epochs}
    if (
        not limits or config.checkpoint.allow_data_change
    ):  # of changed data the stage's rows say it when they are opened
        return
    beginning = rows_read_before(history_of(config))
    fingerprints = {name: str(manifest["fingerprint"]) for name, manifest in training.items()}
    cursors = {name: beginning.cursors[one] for name, one in fingerprints.items() if one in beginning.cursors}
    (_, weights), *changes = [
        (step * stage.global_batch_size, {name: weights[name] for name in training})
        for step, weights in stage.data.weights_by_step()
    ]
    sizes = {name: int(manifest["num_rows"]) for name, manifest in training.items()}
    mixture = Mixture(sizes, weights, config.seed, stage.name, cursors, changes, beginning.first_sample)
    record = ReadingRecord.of(mixture, fingerprints, beginning.cursors)
    record.refuse_repetition(stage.steps * stage.global_batch_size, limits)


def told_by(check: Callable[[], None]) -> list[str]:
    """What a check refuses, on one line."""
    try:
        check()
    except UserError as error:
        expected = f"expected {error.expected}, " if error.expected else ""
        return [f"{error.what} ({error.where}): {expected}got {error.got or 'none'}; {error.fix}"]
    return []
