"""What the workers run: ranks that each see another folder, as on a network file system that shows names late."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as distributed

from model.errors import UserError
from model.parallel.groups import ReplicaRanks
from training import stage
from training.config import TrainConfig
from training.objectives.grpo import grpo
from training.objectives.grpo.grpo_options import GrpoOptions
from training.objectives.next_token import NextToken
from training.objectives.rows_read import rows_read_before
from training.objectives.token_options import NextTokenOptions
from training.reliability.agreement import seen_by_first_rank


def run_stage_in(config: TrainConfig, folders: list[str]) -> str:
    """The stage in a run folder of this rank: what its summary says, or "built" where it would be trained."""
    config.run_folder = folders[distributed.get_rank()]
    with (
        mock.patch.dict(os.environ, RANK=str(distributed.get_rank())),
        mock.patch.object(stage, "build", side_effect=UserError("built")),
    ):
        try:
            return str(stage.run_stage(config)["told"])
        except UserError as error:
            return error.what


def grpo_starts_at(config: TrainConfig, starts: list[str]) -> str:
    """The checkpoint whose tokenizers and weights this rank would open, or why there is none."""
    config.stage.initialize_from = starts[distributed.get_rank()]
    objective = grpo.Grpo(config, GrpoOptions())
    with mock.patch.object(grpo, "CheckpointReader", side_effect=lambda folder: refuse(str(folder))):
        try:
            objective.batches(ReplicaRanks())
        except UserError as error:
            return f"{error.what} {error.where}".strip()
    return "opened"


def refuse(what: str) -> Any:
    raise UserError(what)


def first_samples(config: TrainConfig, folders: list[str]) -> Any:
    """Where the rows of this rank begin: first sample and cursors."""
    config.run_folder = folders[distributed.get_rank()]
    objective = NextToken(config, NextTokenOptions())
    objective.hear_history(ReplicaRanks())
    assert objective._history is not None
    return tuple(rows_read_before(objective._history))


def seen(values: list[Any]) -> Any:
    """What this rank hears where each would see a value of its own; a text is refused."""

    def look() -> Any:
        value = values[distributed.get_rank()]
        if isinstance(value, str):
            raise UserError(value, where="here", expected="a number", got="a text", fix="none")
        return value

    try:
        return seen_by_first_rank(ReplicaRanks(), look)
    except UserError as error:
        return str(error)


def write_summary(folder: Path, config: TrainConfig, told: str) -> None:
    place = folder / config.stage.name
    place.mkdir(parents=True)
    summary = {"told": told, "config_fingerprint": config.fingerprint()}
    (place / stage.SUMMARY_NAME).write_text(json.dumps(summary))
