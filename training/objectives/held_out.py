"""Held-out loss in the loop: the same rows every time, by all ranks together, the same figures in every layout."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from data_pipeline.loading.batch import MicroBatch
from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.packing.held_out import check_kept_apart
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.vocabulary import TokenClass, Vocabulary
from training.config import TrainConfig
from training.contracts.batches import Policy, Ranks
from training.contracts.inputs import InputMaker
from training.objectives.next_token import NextToken
from training.objectives.token_options import NextTokenOptions

CLASS_NAMES = [kind.name.lower() for kind in TokenClass]
# Of one forward pass, where the stage's own micro-batch is smaller: without a backward pass little of it is kept, and
# what a pass costs whatever its size is paid less often.
TOKENS_AT_ONCE = 4096
# Given to the engine together, so that a pipeline is filled once and not for each.
BATCHES_AT_ONCE = 16


class HeldOutRows(Protocol):
    """One set: rows 0 to `num_rows`."""

    num_rows: int
    micro_batch_size: int
    source_names: list[str]

    def batch(self, first_row: int) -> MicroBatch:
        """`micro_batch_size` rows from `first_row` on; those beyond `num_rows` are not counted."""
        ...


class PackedRows:
    """The first rows of a packed dataset, in an order of their own that nothing of the run enters."""

    def __init__(self, config: TrainConfig, path: str, options: NextTokenOptions, num_replicas: int = 1):
        stage = config.stage
        self.num_rows = min(config.validation.num_rows, read_dataset_manifest(path)["num_rows"])
        size = rows_at_once(self.num_rows, stage.sequence_length, stage.micro_batch_size, num_replicas)
        self._source = PackedDataSource(
            datasets={"held_out": path},
            weights={"held_out": 1.0},
            seed=0,
            sequence_length=stage.sequence_length,
            global_batch_size=size,
            micro_batch_size=size,
            data_parallel_rank=0,
            data_parallel_size=1,
            loss_weights=asdict(options.loss_weights),
            document_attention=options.document_attention,
            vocabulary=Vocabulary.from_config(config.model.vocabulary),
            prefetch_batches=0,
            stage="validation",
        )
        self.micro_batch_size, self.source_names = size, self._source.source_names

    def batch(self, first_row: int) -> MicroBatch:
        (found,) = self._source.batch(first_row)
        return found

    def close(self) -> None:
        self._source.close()


def rows_at_once(num_rows: int, sequence_length: int, micro_batch_size: int, num_replicas: int) -> int:
    """Rows of a forward pass, so that the passes of a replica are few and of one size; at least those of a micro-batch."""
    share = -(-num_rows // num_replicas)
    num_passes = -(-share // max(1, TOKENS_AT_ONCE // sequence_length))
    return max(micro_batch_size, -(-share // num_passes))


class Validation:
    """The sets of `stage.validation`, opened once, measured every `validation.every_steps` steps and at the end."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        """Raises `UserError` for a set that cannot be read or is of another length, vocabulary or tokenizer, or is trained on."""
        values = config.stage.objective_options
        known = {name: values[name] for name in ("document_attention",) if name in values}
        options = NextTokenOptions(**known)
        weights = values.get("loss_weights")
        if weights:
            options.loss_weights = type(options.loss_weights)(**weights)
        self.config, self.ranks = config, ranks
        self._inputs = NextToken(config, options)
        self._sets = {
            name: PackedRows(config, path, options, ranks.data_parallel_size)
            for name, path in config.stage.validation.items()
        }
        training = {
            name: read_dataset_manifest(entry.path) for name, entry in config.stage.data.datasets_in_use().items()
        }
        for path in config.stage.validation.values():
            check_kept_apart(training, read_dataset_manifest(path), path)

    def is_due(self, step: int) -> bool:
        return step % self.config.validation.every_steps == 0 or step == self.config.stage.steps

    def measure(self, policy: Policy) -> dict[str, Any]:
        """{"held_out_loss": {set: {class: loss}}, "held_out_loss_by_source": {set: {source: loss}}} and "held_out_seconds".

        All ranks call it.
        """
        started = time.monotonic()
        found = {name: loss_of(policy, self._inputs, self.ranks, rows) for name, rows in self._sets.items()}
        return {
            "held_out_loss": {name: by_class for name, (by_class, _) in found.items()},
            "held_out_loss_by_source": {name: by_source for name, (_, by_source) in found.items()},
            "held_out_seconds": round(time.monotonic() - started, 3),
        }

    def close(self) -> None:
        for rows in self._sets.values():
            rows.close()


def loss_of(
    policy: Policy, inputs: InputMaker, ranks: Ranks, rows: HeldOutRows
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean loss by class ("all": weighted as the training loss is) and by source.

    Replicas share the micro-batches. Sums are float64 and added up over all ranks, of which a replica's all say the
    same, so that the figures differ between layouts only as the log-probabilities do.
    """
    num_classes, num_sources, size = len(CLASS_NAMES), len(rows.source_names), rows.micro_batch_size
    sums = np.zeros((2, 1 + num_classes + num_sources))
    firsts = range(ranks.data_parallel_rank * size, rows.num_rows, size * ranks.data_parallel_size)
    for number in range(0, len(firsts), BATCHES_AT_ONCE):
        some = firsts[number : number + BATCHES_AT_ONCE]
        batches = [rows.batch(first) for first in some]
        for first, batch, log_probs in zip(some, batches, policy.log_probs(batches, inputs), strict=True):
            losses = -log_probs.double().cpu().numpy().reshape(batch.labels.shape)
            sums += _sums(batch, losses, min(size, rows.num_rows - first), num_classes, num_sources)
    sums = ranks.sum(sums) * (ranks.data_parallel_size / ranks.world_size)
    means = {
        name: total / weight
        for name, total, weight in zip(["all", *CLASS_NAMES, *rows.source_names], *sums.tolist(), strict=True)
        if weight > 0
    }
    by_source = {name: means[name] for name in rows.source_names if name in means}
    return {name: means[name] for name in ("all", *CLASS_NAMES) if name in means}, by_source


def _sums(batch: MicroBatch, losses: np.ndarray, num_rows: int, num_classes: int, num_sources: int) -> np.ndarray:
    """[2, 1 + classes + sources]: sums of losses, and what they are divided by, over the first `num_rows` rows."""
    counted = np.zeros(losses.shape, bool)
    counted[:num_rows] = batch.loss_weights[:num_rows] > 0
    weights = batch.loss_weights[counted].astype(np.float64)
    values = losses[counted]
    found = [np.array([[values @ weights], [weights.sum()]])]
    for ids, size in ((batch.loss_classes, num_classes), (batch.sources, num_sources)):
        of = ids[counted].astype(np.int64)
        found.append(np.stack((np.bincount(of, values, size), np.bincount(of, minlength=size))))
    return np.concatenate(found, axis=1)
