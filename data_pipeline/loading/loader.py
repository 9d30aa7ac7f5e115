"""Batches for a data-parallel rank: a pure function of the number of samples consumed so far.

Global batch b holds the samples n..n + G of the mixture's order, n = b * G. Micro-batch m of rank r holds the
samples n + (m * data_parallel_size + r) * micro_batch_size and those after it, so all ranks together read the
same global batch however many they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.prompts import label
from data_pipeline.loading.batch import MicroBatch, build_micro_batch
from data_pipeline.loading.mixture import Cursor, Mixture
from data_pipeline.loading.reading_record import ReadingRecord
from data_pipeline.storage.descriptors import DescriptorCache
from data_pipeline.storage.file_errors import file_errors_are_user_errors
from data_pipeline.storage.packed_files import PackedDataset
from data_pipeline.storage.read_ahead import Readers
from data_pipeline.storage.segments import MAX_TASKS, tasks_of
from model.durable import fingerprint_of
from model.errors import Problems, UserError
from model.vocabulary import TokenClass, Vocabulary, description_of_ids


class PackedDataSource:
    """Reads packed datasets in the order of a `Mixture`; see `training.objectives.offline_rows.Rows`.

    datasets: name -> packed folder; weights: name -> weight in the mixture. loss_weights: weight of each class of
    label, {"text", "visual", "structure"}. document_attention: "document" (attention and positions restart with each
    document) or "full" (with each row). prefetch_batches: global batches read ahead by one background thread; 0 reads
    in the caller. stage: its name, which enters the order. read_before: where earlier stages stopped in a dataset, by
    the dataset's fingerprint; `record` says the same of this stage. weight_changes: (sample, weights from there on).
    first_sample: where `read_before` is meant and this order begins; no earlier one can be read. `fingerprint` changes
    with what any sample holds, not with batch sizes or ranks.

    Raises `UserError` for a missing or unfinished dataset, another sequence length, and packed files of another
    vocabulary or of tokenizers that differ.
    """

    @file_errors_are_user_errors("a packed dataset")
    def __init__(
        self,
        datasets: Mapping[str, str | Path],
        weights: Mapping[str, float],
        seed: int,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        loss_weights: Mapping[str, float],
        document_attention: str,
        vocabulary: Vocabulary,
        prefetch_batches: int = 2,
        stage: str = "",
        read_before: Mapping[str, Cursor] | None = None,
        weight_changes: Sequence[tuple[int, Mapping[str, float]]] = (),
        first_sample: int = 0,
    ):
        self._sequence_length, self._global_batch_size = sequence_length, global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._num_ranks = data_parallel_rank, data_parallel_size
        self._vocabulary, self._prefetch_batches = vocabulary, prefetch_batches
        self._check(document_attention, loss_weights)
        self._document_attention = document_attention
        self._class_weights = np.array([loss_weights[kind.name.lower()] for kind in TokenClass], np.float32)
        descriptors = DescriptorCache()
        opened = {name: PackedDataset(folder, descriptors) for name, folder in sorted(datasets.items())}
        _check_datasets(opened, sequence_length, vocabulary)
        fingerprints = {name: dataset.fingerprint for name, dataset in opened.items()}
        before = dict(read_before or {})
        cursors = {name: before[known] for name, known in fingerprints.items() if known in before}
        sizes = {name: len(dataset) for name, dataset in opened.items()}
        self.mixture = Mixture(sizes, weights, seed, stage, cursors, weight_changes, first_sample)
        self.record = ReadingRecord.of(self.mixture, fingerprints, before)
        self._datasets = [opened[name] for name in self.mixture.names]
        self._descriptors = descriptors
        self.source_names, self._source_maps = label_maps(self._datasets)
        self.fingerprint = self._compute_fingerprint()
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self._reader = Readers(1, "prefetch") if prefetch_batches > 0 else None
        self._closed = False

    def batch(self, first_sample: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch that starts at `first_sample`.

        Errors of the background thread are raised here, in the call that asks for the batch they belong to.
        """
        assert not self._closed, "the data source is closed"
        if first_sample < self.mixture.first_sample:
            raise UserError(
                "the data of this stage were changed behind this place, and what was read before cannot be read again",
                expected=f"sample {self.mixture.first_sample} or a later one",
                got=f"sample {first_sample}: a checkpoint from before the change",
                fix="move the damaged checkpoints behind it away, then start again with checkpoint.allow_data_change=true",
            )
        if self._reader is None:
            return self._read(first_sample)
        wanted = [first_sample + number * self._global_batch_size for number in range(self._prefetch_batches + 1)]
        for sample in [sample for sample in self._ahead if sample not in wanted]:
            self._ahead.pop(sample).cancel()
        for sample in wanted:
            if sample not in self._ahead:
                self._ahead[sample] = self._reader.submit(self._read, sample)
        return self._ahead.pop(first_sample).result()

    @property
    def num_rows(self) -> int:
        """Of all datasets, each row once."""
        return sum(len(dataset) for dataset in self._datasets)

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for future in self._ahead.values():
            future.cancel()
        if self._reader is not None:
            self._reader.close()
        self._ahead.clear()
        self._descriptors.close()

    @file_errors_are_user_errors("a packed dataset")
    def _read(self, first_sample: int) -> list[MicroBatch]:
        stride = self._micro_batch_size * self._num_ranks
        offsets = np.arange(0, self._global_batch_size, stride) + self._rank * self._micro_batch_size
        samples = first_sample + offsets[:, None] + np.arange(self._micro_batch_size)
        located = self.mixture.locate_many(samples.ravel())
        datasets = located.datasets.reshape(samples.shape)
        rows = located.rows.reshape(samples.shape)
        return [self._micro_batch(*pair) for pair in zip(datasets, rows, strict=True)]

    def _micro_batch(self, datasets: np.ndarray, rows: np.ndarray) -> MicroBatch:
        tokens = np.empty((len(rows), self._sequence_length), np.int64)
        parts: list[np.ndarray] = []
        for index, (dataset, row) in enumerate(zip(datasets.tolist(), rows.tolist(), strict=True)):
            segments = self._datasets[dataset].row_into(row, tokens[index]).copy()
            segments["source"] = self._source_maps[dataset][segments["source"], tasks_of(segments)]
            parts.append(segments)
        return build_micro_batch(
            tokens, np.concatenate(parts), self._class_weights, self._document_attention, self._vocabulary
        )

    def _compute_fingerprint(self) -> str:
        described = {
            "mixture": self.mixture.fingerprint,
            "sequence_length": self._sequence_length,
            "datasets": {
                name: dataset.fingerprint for name, dataset in zip(self.mixture.names, self._datasets, strict=True)
            },
        }
        return fingerprint_of(described)

    def _check(self, document_attention: str, loss_weights: Mapping[str, float]) -> None:
        problems = Problems()
        rows_at_once = self._micro_batch_size * self._num_ranks
        divides = rows_at_once > 0 and self._global_batch_size % rows_at_once == 0
        problems.check(
            divides,
            "stage.global_batch_size",
            f"{self._global_batch_size} is not a multiple of micro_batch_size * data-parallel size = {rows_at_once}",
        )
        problems.check(
            document_attention in ("document", "full"),
            "stage.objective.document_attention",
            f"unknown value {document_attention!r}",
            "stage.objective.document_attention=document",
        )
        classes = {kind.name.lower() for kind in TokenClass}
        problems.check(
            set(loss_weights) == classes,
            "stage.objective.loss_weights",
            f"expected {sorted(classes)}, got {sorted(loss_weights)}",
        )
        problems.raise_if_any()
        assert 0 <= self._rank < self._num_ranks


def label_maps(datasets: Sequence[PackedDataset]) -> tuple[list[str], list[np.ndarray]]:
    """What labels are counted under, by name, and for each dataset uint16 [sources, MAX_TASKS]: which of them.

    A source, and for its documents of a task the two together (`data_pipeline.documents.prompts.label`). Datasets packed
    before tasks were kept have none.
    """
    known = {one for dataset in datasets for one in (*dataset.sources, *dataset.manifest.get("tasks", {}))}
    names = sorted(known)
    numbers = {name: number for number, name in enumerate(names)}
    maps = [
        np.array(
            [
                [numbers.get(label(source, task), numbers[source]) for task in range(MAX_TASKS)]
                for source in dataset.sources
            ],
            np.uint16,
        )
        for dataset in datasets
    ]
    return names, maps


def check_rows(
    name: str, folder: Path, manifest: Mapping[str, Any], sequence_length: int, vocabulary: Vocabulary
) -> None:
    """Raises `UserError` when a packed dataset has rows of another length or was tokenized for another vocabulary."""
    packed = int(manifest["config"]["sequence_length"])
    if packed != sequence_length:
        raise UserError(
            f"dataset {name!r} is packed in rows of another length",
            where=str(folder),
            expected=f"{sequence_length} tokens",
            got=str(packed),
            fix=f"stage.sequence_length={packed}, or pack it again",
        )
    has_pictures = manifest.get("vision_tokenizer") is not None
    expected = description_of_ids(vocabulary.describe(), has_pictures=has_pictures)
    found = description_of_ids(manifest["vocabulary"] or {}, has_pictures=has_pictures)
    keys = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if keys:
        sizes = [
            key for key in keys if key in ("text_size", "visual_size") and key in found
        ]  # the rest follows from them
        fix = " ".join(f"model.vocabulary.{key}={found[key]}" for key in sizes)
        raise UserError(
            f"dataset {name!r} was tokenized for another vocabulary",
            where=str(folder),
            expected=str({key: expected.get(key) for key in sizes or keys}),
            got=str({key: found.get(key) for key in sizes or keys}),
            fix=f"{fix or 'set model.vocabulary as it was when the data was tokenized'}, or tokenize again",
        )


def _check_datasets(datasets: Mapping[str, PackedDataset], sequence_length: int, vocabulary: Vocabulary) -> None:
    tokenizers: dict[tuple[str, str], list[str]] = {}
    for name, dataset in datasets.items():
        check_rows(name, dataset.folder, dataset.manifest, sequence_length, vocabulary)
        for kind in ("text_tokenizer", "vision_tokenizer"):
            if dataset.manifest.get(kind):
                tokenizers.setdefault((kind, str(dataset.manifest[kind])), []).append(name)
    for kind in ("text_tokenizer", "vision_tokenizer"):
        said = {found: names for (key, found), names in tokenizers.items() if key == kind}
        if len(said) > 1:
            raise UserError(
                f"the datasets do not agree on the {kind.replace('_', ' ')}",
                got=str(said),
                fix="tokenize and pack all of them with the same tokenizers",
            )
