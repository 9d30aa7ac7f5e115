"""Next-token prediction on packed sequences: pretraining and supervised finetuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.documents.prompts import source_and_task
from data_pipeline.loading.batch import MicroBatch
from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.storage.format import TOKENIZER_PATHS
from data_pipeline.storage.packed_files import read_dataset_manifest
from model.backbone.attention_plan import packed_documents
from model.vocabulary import TokenClass, Vocabulary
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.inputs import LocalInput, LossSums, ModelInput, TokenScores
from training.contracts.results import StepResult
from training.objectives.offline_rows import OfflineRows
from training.objectives.rows_read import (
    RECORD_KEY,
    Beginning,
    History,
    beginning_of_other_data,
    history_of,
    rows_read_before,
)
from training.objectives.token_options import NextTokenOptions
from training.reliability.agreement import seen_by_first_rank

CHECKPOINT_KIND = "transformer"
CLASS_NAMES = [kind.name.lower() for kind in TokenClass]


class NextToken:
    """Cross entropy of the next token, weighted by the class of the label; see `training.contracts.objective`."""

    Options = NextTokenOptions
    engine = "megatron"

    def __init__(self, config: TrainConfig, options: NextTokenOptions):
        self.config, self.options = config, options
        self.vocabulary = Vocabulary.from_config(config.model.vocabulary)
        self.source_names: list[str] = []
        self._data: dict[str, Any] = {}  # what a checkpoint says of the rows
        self._history: History | None = None  # as the first rank sees it

    @property
    def num_sums(self) -> int:
        return 1 + self._num_kinds

    @property
    def _num_kinds(self) -> int:
        """Classes and sources, which labels are counted by."""
        return len(TokenClass) + len(self.source_names)

    def batches(self, ranks: Ranks) -> OfflineRows:
        self.hear_history(ranks)
        return OfflineRows(self.packed_rows(ranks.data_parallel_rank, ranks.data_parallel_size))

    def hear_history(self, ranks: Ranks) -> None:
        """Where the order of the rows begins must not depend on when a rank sees the newest checkpoint."""
        self._history = seen_by_first_rank(ranks, lambda: history_of(self.config))

    def packed_rows(
        self, data_parallel_rank: int, data_parallel_size: int, num_rows: int | None = None
    ) -> PackedDataSource:
        """The stage's rows as this data-parallel rank reads them; with `num_rows` global batches of so many, unprefetched."""
        stage = self.config.stage
        datasets = stage.data.datasets_in_use()
        history = self._history or history_of(self.config)
        rows = self._open(data_parallel_rank, data_parallel_size, num_rows, rows_read_before(history))
        other = beginning_of_other_data(self.config, history, rows.fingerprint)
        if other is not None:
            rows.close()
            rows = self._open(data_parallel_rank, data_parallel_size, num_rows, other)
        if num_rows is None:
            limits = {name: entry.max_epochs for name, entry in datasets.items()}
            rows.record.refuse_repetition(stage.steps * stage.global_batch_size, limits)
        self.source_names = rows.source_names
        run_folder, folders = Path(self.config.run_folder), [entry.path for entry in datasets.values()]
        self._data = tokenizers_of(folders, run_folder) | {RECORD_KEY: rows.record.to_dict()}
        return rows

    def _open(
        self, data_parallel_rank: int, data_parallel_size: int, num_rows: int | None, beginning: Beginning
    ) -> PackedDataSource:
        stage = self.config.stage
        datasets = stage.data.datasets_in_use()
        (_, weights), *changes = [
            (step * stage.global_batch_size, {name: weights[name] for name in datasets})
            for step, weights in stage.data.weights_by_step()
        ]
        return PackedDataSource(
            datasets={name: entry.path for name, entry in datasets.items()},
            weights=weights,
            seed=self.config.seed,
            sequence_length=stage.sequence_length,
            global_batch_size=num_rows or stage.global_batch_size,
            micro_batch_size=1 if num_rows else stage.micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            loss_weights=asdict(self.options.loss_weights),
            document_attention=self.options.document_attention,
            vocabulary=self.vocabulary,
            prefetch_batches=0 if num_rows else stage.data.prefetch_batches,
            stage=stage.name,
            read_before=beginning.cursors,
            weight_changes=changes,
            first_sample=beginning.first_sample,
        )

    def inputs(self, batch: MicroBatch) -> ModelInput:
        return ModelInput(
            tokens=batch.tokens.reshape(-1),
            position_ids=batch.position_ids.reshape(-1),
            plan=packed_documents(batch.cu_seqlens),
            labels=batch.labels.reshape(-1),
            weights=batch.loss_weights.reshape(-1),
            fields={
                "class": batch.loss_classes.reshape(-1).astype(np.int64),
                "source": batch.sources.reshape(-1).astype(np.int64),
            },
        )

    def totals(self, batches: Sequence[MicroBatch]) -> np.ndarray:
        """float64 [2 + classes + sources]: weight, positions, and labels with loss by class and by source."""
        totals = np.zeros(2 + self._num_kinds)
        by_class, by_source = np.split(totals[2:], [len(TokenClass)])
        for batch in batches:
            counted = batch.loss_weights > 0
            totals[0] += float(batch.loss_weights.sum(dtype=np.float64))
            totals[1] += batch.tokens.size
            by_class += np.bincount(batch.loss_classes[counted], minlength=len(by_class))
            by_source += np.bincount(batch.sources[counted], minlength=len(by_source))
        return totals

    def weighted_losses(
        self, scores: TokenScores, inputs: LocalInput, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of weights * losses, the losses [T_local]): what an objective derived from this one changes."""
        return scores.weighted_losses(inputs.labels, weights)

    def label_log_probs(self, scores: TokenScores, inputs: LocalInput) -> torch.Tensor:
        return scores.log_probs(inputs.labels)

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        scale = torch.where(totals[0] > 0, 1.0 / totals[0], 0.0).to(inputs.weights.dtype)
        loss, losses = self.weighted_losses(scores, inputs, inputs.weights * scale)
        return LossSums(loss, self._sums(losses.detach().double(), inputs))

    def _sums(self, losses: torch.Tensor, inputs: LocalInput) -> torch.Tensor:
        """The weighted sum, and unweighted sums over the labels with loss by class and by source."""
        counted = torch.where(inputs.weights > 0, losses, 0.0)
        weighted = (losses * inputs.weights).sum()
        by_class = torch.bincount(inputs.fields["class"], counted, minlength=len(TokenClass))
        by_source = torch.bincount(inputs.fields["source"], counted, minlength=len(self.source_names))
        return torch.cat((weighted[None], by_class, by_source))

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        weight, num_tokens = float(totals[0]), int(totals[1])
        class_counts, source_counts = np.split(totals[2:], [len(TokenClass)])
        class_sums, source_sums = np.split(sums[1:], [len(TokenClass)])
        metrics: dict[str, Any] = {
            f"loss_{name}": loss for name, loss in _means(CLASS_NAMES, class_sums, class_counts).items()
        }
        metrics |= {
            "tokens_by_class": _counts(CLASS_NAMES, class_counts),
            "tokens_by_source": {name: int(n) for name, n in _by_source(self.source_names, source_counts).items()},
            "loss_by_source": _ratios(
                _by_source(self.source_names, source_sums), _by_source(self.source_names, source_counts)
            ),
        }
        by_task = _ratios(_by_task(self.source_names, source_sums), _by_task(self.source_names, source_counts))
        if by_task:
            metrics["loss_by_task"] = by_task
        scale = 1.0 / weight if weight > 0 else 0.0
        return StepResult(float(sums[0]) * scale, gradient_norm, num_tokens, weight > 0, metrics)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of its model: enough to rebuild it and to find tokenizers that fit; and of its rows."""
        return {
            "kind": CHECKPOINT_KIND,
            "model": asdict(self.config.model),
            "vocabulary": self.vocabulary.describe(),
        } | self._data

    def final_metrics(self) -> dict[str, float]:
        return {}


def tokenizers_of(datasets: Sequence[str], run_folder: Path) -> dict[str, Any]:
    """Which tokenizers packed datasets name: the first that names one counts, the loader has compared them.

    With their place where it is recorded, as `path_in_run` has it; else the fingerprint alone, for the usual place.
    """
    tokenizers: dict[str, Any] = {"text_tokenizer": None, "vision_tokenizer": None}
    for folder in datasets:
        manifest = read_dataset_manifest(folder)
        paths = manifest.get(TOKENIZER_PATHS) or {}
        for name, known in tokenizers.items():
            fingerprint, path = manifest.get(name), paths.get(name)
            said = {"path": path_in_run(Path(path), run_folder), "fingerprint": fingerprint} if path else fingerprint
            tokenizers[name] = known or (said if fingerprint else None)
    return tokenizers


def path_in_run(place: Path, run_folder: Path) -> str:
    """As a checkpoint names a tokenizer: below its run folder, which may be moved, else the whole path."""
    whole, above = place.absolute(), run_folder.absolute()
    return str(whole.relative_to(above) if whole.is_relative_to(above) else whole)


def _means(names: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    rows = zip(names, sums.tolist(), counts.tolist(), strict=True)
    return {name: total / count for name, total, count in rows if count > 0}


def _by_source(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Sums over the tasks of each source."""
    return _summed([source_and_task(label)[0] for label in labels], values)


def _by_task(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Sums over the sources of each task, over those that have one."""
    summed = _summed([source_and_task(label)[1] for label in labels], values)
    return {task: value for task, value in summed.items() if task}


def _summed(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Values of one name added up, names in the order in which they first appear."""
    sums: dict[str, float] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        sums[name] = sums.get(name, 0.0) + value
    return sums


def _ratios(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    return {name: sums[name] / count for name, count in counts.items() if count > 0}


def _counts(names: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(names, counts.tolist(), strict=True)}
