"""Batches: every array against a token-by-token oracle; the order is the same for any ranks, access and prefetch."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import VOCABULARY, captioned, mixed_sources, text, video, write_sources
from test_reading_record import write_checkpoint

from data_pipeline.loading.batch import MicroBatch, build_micro_batch
from data_pipeline.loading.loader import PackedDataSource
from data_pipeline.loading.mixture import Mixture
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.storage import packed_files
from data_pipeline.storage.packed_files import PackedDataset, PackedShard
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from model.config import ModelConfig
from model.errors import UserError
from model.vocabulary import TokenClass, Vocabulary, VocabularyConfig
from training.config import DatasetEntry, StageConfig, TrainConfig
from training.objectives.next_token import NextToken
from training.objectives.token_options import NextTokenOptions

LOSS_WEIGHTS = {"text": 1.0, "visual": 0.5, "structure": 0.25}
LENGTH = 256
ARRAYS = ("tokens", "labels", "loss_weights", "loss_classes", "sources", "position_ids")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loader")
    mixed = write_sources(folder / "tokens", mixed_sources())
    chat = [(Kind.STRUCTURE, 1, Flag.NO_LOSS), (Kind.TEXT, 9, Flag.NO_LOSS), (Kind.TEXT, 12, 0)]
    other = write_sources(folder / "tokens2", {"chat": [chat] * 60, "text": [text(30)] * 20})
    config = PackConfig(sequence_length=LENGTH, rows_per_shard=16, window_rows=8)
    pack(mixed, folder / "mixed", config)
    pack(other, folder / "chats", config)
    return {"mixed": folder / "mixed", "chats": folder / "chats"}


def open_source(datasets: dict[str, Path], **changes) -> PackedDataSource:
    settings = {
        "datasets": datasets,
        "weights": {"mixed": 0.7, "chats": 0.3},
        "seed": 1,
        "sequence_length": LENGTH,
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "loss_weights": LOSS_WEIGHTS,
        "document_attention": "document",
        "vocabulary": VOCABULARY,
        "prefetch_batches": 2,
    }
    return PackedDataSource(**(settings | changes))


def same(first: MicroBatch, second: MicroBatch) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in (*ARRAYS, "cu_seqlens"))


def test_a_batch_is_what_the_rows_say(datasets):
    source = open_source(datasets)
    opened = {name: PackedDataset(folder) for name, folder in datasets.items()}
    mixture = Mixture({name: len(dataset) for name, dataset in opened.items()}, {"mixed": 0.7, "chats": 0.3}, 1)
    assert source.source_names == ["chat", "clips", "pairs", "text"]
    for first_sample in (0, 12, 12_000):
        micro_batches = source.batch(first_sample)
        assert len(micro_batches) == 6
        for number, micro_batch in enumerate(micro_batches):
            rows = []
            for sample in range(first_sample + 2 * number, first_sample + 2 * number + 2):
                location = mixture.locate(sample)
                tokens, segments = opened[location.dataset].row(location.row)
                names = [opened[location.dataset].sources[index] for index in segments["source"]]
                rows.append((tokens, segments, [source.source_names.index(name) for name in names]))
            check_against_oracle(micro_batch, rows, "document")
    source.close()


def check_against_oracle(micro_batch: MicroBatch, rows: list, attention: str) -> None:
    """Everything again, one token at a time."""
    size = len(rows[0][0])
    spans = []
    for index, (tokens, segments, sources) in enumerate(rows):
        belongs = [number for number, segment in enumerate(segments) for _ in range(segment["length"])]
        first_of_span = 0
        for position in range(size):
            segment = segments[belongs[position]]
            opens = position == segment["start"]
            padding = segment["kind"] == Kind.PAD
            new_document = opens and (padding or segment["flags"] & Flag.DOCUMENT_START)
            if position == 0 or (opens and padding) or (attention == "document" and new_document):
                spans.append(index * size + position)
                first_of_span = position
            assert micro_batch.tokens[index, position] == tokens[position]
            assert micro_batch.position_ids[index, position] == position - first_of_span
            if position == 0:
                continue
            assert micro_batch.labels[index, position - 1] == tokens[position]
            weight = class_weight(tokens[position], segment["kind"])[0]
            if padding or new_document or segment["flags"] & Flag.NO_LOSS:
                weight = 0.0
            assert micro_batch.loss_weights[index, position - 1] == weight
            if weight:
                expected_class = class_weight(tokens[position], segment["kind"])[1]
                assert micro_batch.loss_classes[index, position - 1] == expected_class
                assert micro_batch.sources[index, position - 1] == sources[belongs[position]]
        assert micro_batch.loss_weights[index, size - 1] == 0
    spans.append(len(rows) * size)
    assert micro_batch.cu_seqlens.tolist() == spans


def class_weight(token: int, kind: int) -> tuple[float, TokenClass]:
    if kind == Kind.IMAGE and token >= VOCABULARY.visual_start:
        return 0.5, TokenClass.VISUAL
    if kind in (Kind.TEXT, Kind.TRANSCRIPT):
        return 1.0, TokenClass.TEXT
    return 0.25, TokenClass.STRUCTURE


SEGMENT_SPECS = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([Kind.TEXT, Kind.IMAGE, Kind.TRANSCRIPT, Kind.STRUCTURE]),
        st.sampled_from([0, Flag.DOCUMENT_START, Flag.NO_LOSS, Flag.DOCUMENT_START | Flag.NO_LOSS]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(SEGMENT_SPECS, min_size=1, max_size=3), attention=st.sampled_from(["document", "full"]))
def test_any_rows_agree_with_the_oracle(rows, attention):
    size = 32
    random = np.random.default_rng(0)
    described, parts = [], []
    for specs in rows:
        segments = np.zeros(len(specs) + 1, SEGMENT_DTYPE)
        for segment, (length, kind, flags, source) in zip(segments, specs, strict=False):
            segment["length"], segment["kind"], segment["flags"], segment["source"] = (length, kind, flags, source)
        segments["length"][-1] = size - segments["length"].sum()  # the last one is padding
        segments["start"] = np.cumsum(segments["length"]) - segments["length"]
        tokens = random.integers(VOCABULARY.visual_start - 20, VOCABULARY.visual_start + 20, size)
        described.append((tokens, segments, segments["source"].tolist()))
        parts.append(segments)
    weights = np.array([LOSS_WEIGHTS[kind.name.lower()] for kind in TokenClass], np.float32)
    tokens = np.stack([tokens for tokens, _, _ in described]).astype(np.int64)
    micro_batch = build_micro_batch(tokens, np.concatenate(parts), weights, attention, VOCABULARY)
    check_against_oracle(micro_batch, described, attention)


def test_types_and_shapes(datasets):
    micro_batch = open_source(datasets, prefetch_batches=0).batch(0)[0]
    dtypes = [getattr(micro_batch, name).dtype.name for name in ARRAYS]
    assert dtypes == ["int64", "int64", "float32", "uint8", "uint16", "int64"]
    for name in ARRAYS:
        assert getattr(micro_batch, name).shape == (2, LENGTH)
        assert getattr(micro_batch, name).flags.c_contiguous
    assert micro_batch.cu_seqlens.dtype == np.int32


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(2, 2), (3, 2), (2, 3), (4, 1), (12, 1), (1, 12)])
def test_ranks_together_read_the_same_global_batch(datasets, num_ranks, micro_batch_size):
    def rows(num_ranks: int, micro_batch_size: int) -> dict[str, list]:
        by_micro_batch = []
        for rank in range(num_ranks):
            source = open_source(
                datasets,
                data_parallel_rank=rank,
                data_parallel_size=num_ranks,
                micro_batch_size=micro_batch_size,
                prefetch_batches=0,
                weight_changes=[(30, {"mixed": 0.1, "chats": 0.9})],
            )
            by_micro_batch.append(source.batch(24))  # the weights change in the middle of it
        ordered = [ranks[number] for number in range(len(by_micro_batch[0])) for ranks in by_micro_batch]
        return {name: np.concatenate([getattr(one, name) for one in ordered]).tolist() for name in ARRAYS}

    assert rows(num_ranks, micro_batch_size) == rows(1, 2)


def test_a_thousand_ranks_read_what_one_reads_across_a_change_of_weights(datasets):
    """Rows alone, as a rank reads them: 2,048 samples a step, from step 3 on with other weights."""

    changes = [(3 * 2048, {"mixed": 0.1, "chats": 0.9})]
    source = open_source(datasets, global_batch_size=2048, prefetch_batches=0, weight_changes=changes)
    source._micro_batch = lambda which, rows: found.append(np.stack([which, rows], 1))

    def together(num_ranks: int) -> list:
        """By step, micro-batch, rank: what `_read` asks for."""
        nonlocal found
        source._num_ranks, by_rank = num_ranks, []
        for source._rank in range(num_ranks):
            found = []
            for step in range(2, 5):
                source._read(step * 2048)
            by_rank.append(np.stack(found))
        return np.stack(by_rank, 1).reshape(-1, 2).tolist()

    found: list = []
    expected = together(1)
    assert all(together(num_ranks) == expected for num_ranks in (2, 64, 1024))
    assert np.bincount([which for which, _ in expected[2048:]]) / 4096 == pytest.approx([0.9, 0.1], abs=1e-3)


def test_batches_are_a_pure_function_of_the_sample(datasets):
    straight = open_source(datasets, prefetch_batches=0)
    expected = {first: straight.batch(first) for first in (0, 12, 24, 36, 120, 7)}
    ahead = open_source(datasets, prefetch_batches=3)
    for first in (0, 12, 24, 120, 0, 7, 36, 12, 12):
        assert all(map(same, ahead.batch(first), expected[first]))
    ahead.close()


def test_reading_ahead_is_bounded(datasets, monkeypatch):
    reads, third = [], threading.Event()
    read = PackedDataSource._read

    def counted(self, first):
        reads.append(first)
        if len(reads) == 3:
            third.set()
        return read(self, first)

    monkeypatch.setattr(PackedDataSource, "_read", counted)
    source = open_source(datasets, prefetch_batches=2)
    source.batch(0)
    assert third.wait(300)
    time.sleep(0.05)  # for a fourth one, which nobody asked for
    assert reads == [0, 12, 24]
    source.batch(12)
    source.close()
    assert reads in ([0, 12, 24], [0, 12, 24, 36])


def test_an_error_of_the_background_thread_is_raised_where_its_batch_is_asked_for(datasets, monkeypatch):
    source = open_source(datasets)
    read = PackedShard.read
    bad = open_source(datasets, prefetch_batches=0).mixture.locate(13)

    def fail(self, number, tokens):
        place = (self.prefix.parent.name, self.prefix.name, number)
        if place == (bad.dataset, f"{bad.row // 16:06d}", bad.row % 16):
            raise UserError("damaged")
        return read(self, number, tokens)

    monkeypatch.setattr(PackedShard, "read", fail)
    source.batch(0)
    with pytest.raises(UserError, match="damaged"):
        source.batch(12)
    monkeypatch.undo()
    assert len(source.batch(12)) == 6
    source.close()


def test_close_ends_the_thread(datasets):
    before = set(threading.enumerate())
    source = open_source(datasets)
    source.batch(0)
    (reader,) = [one for one in set(threading.enumerate()) - before if one.name.startswith("prefetch")]
    source.close()
    source.close()
    assert not reader.is_alive()
    with pytest.raises(AssertionError, match="closed"):
        source.batch(12)


def test_the_fingerprint_tells_what_changes_the_order(datasets):
    base = open_source(datasets).fingerprint
    for changes in (
        {"data_parallel_size": 3, "data_parallel_rank": 2},
        {"micro_batch_size": 1},
        {"global_batch_size": 24},
        {"weights": {"chats": 3.0, "mixed": 7.0}},
    ):
        assert open_source(datasets, **changes).fingerprint == base
    for changes in ({"seed": 2}, {"weights": {"mixed": 0.6, "chats": 0.4}}, {"weights": {"mixed": 1.0, "chats": 0.0}}):
        assert open_source(datasets, **changes).fingerprint != base
    swapped = {"mixed": datasets["chats"], "chats": datasets["mixed"]}
    assert open_source(swapped).fingerprint != base


def test_what_does_not_match_is_refused(datasets, tmp_path):
    other = Vocabulary.from_config(VocabularyConfig(text_size=1_000_000, visual_size=99))
    with pytest.raises(UserError, match="another vocabulary") as caught:
        open_source(datasets, vocabulary=other)
    assert "visual_size" in caught.value.expected
    wider = Vocabulary.from_config(VocabularyConfig(text_size=1_000_000, visual_size=1_000_000, pad_multiple=4096))
    open_source(datasets, vocabulary=wider)  # the padding of the embedding says nothing about ids
    with pytest.raises(UserError, match="another length"):
        open_source(datasets, sequence_length=128)
    with pytest.raises(UserError, match="no finished packed dataset"):
        open_source({"mixed": tmp_path, "chats": datasets["chats"]})
    with pytest.raises(UserError, match="3 problems"):
        open_source(datasets, micro_batch_size=5, document_attention="none", loss_weights={"text": 1.0})
    tokens = write_sources(tmp_path / "tokens", {"pairs": [captioned(9, 9)]}, text_tokenizer="text-2")
    pack(tokens, tmp_path / "packed", PackConfig(sequence_length=LENGTH))
    with pytest.raises(UserError, match="do not agree on the text tokenizer"):
        open_source({"mixed": tmp_path / "packed", "chats": datasets["chats"]})


def test_rows_are_found_however_unevenly_segments_are_spread(tmp_path):
    """The first rows hold thousands of tiny segments, the last ones a single one each."""
    sources = write_sources(
        tmp_path / "tokens", {"clips": [video(2040, 1, 3)] * 2, "text": [text(8190, splittable=False)] * 40}
    )
    pack(sources, tmp_path / "packed", PackConfig(sequence_length=8192, window_rows=1))
    dataset = PackedDataset(tmp_path / "packed")
    everything = np.load(tmp_path / "packed" / "000000.seg.npy")
    counts = np.bincount(everything["row"])
    assert counts.max() > 4000 > 5 > counts.min()
    whole = np.fromfile(tmp_path / "packed" / "000000.bin", "<i4").reshape(len(dataset), 8192)
    batch = np.zeros((2, 8192), np.int64)
    kept = []
    for row in range(len(dataset)):
        tokens, segments = dataset.row(row)
        assert np.array_equal(segments, everything[everything["row"] == row])
        assert np.array_equal(dataset.row_into(row, batch[1]), segments)
        assert np.array_equal(batch[1], whole[row])
        kept.append(tokens)
    assert not batch[0].any()
    assert np.array_equal(np.array(kept), whole)  # no row was written over by a later one


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.sampled_from(["<i8", "<i4", "<u4"]), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_cast_is_the_same_with_torch_and_without(length, dtype, has_torch, seed):
    tokens = np.random.default_rng(seed).integers(0, 2**31, length).astype("<i4")
    target = np.full(length + 2, 7, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_files, "_CAST_AT_ONCE", 16)
        if not has_torch:
            patch.delitem(sys.modules, "torch")
        packed_files.cast_into(target[1:-1], tokens)
    assert target.tolist() == [7, *tokens.tolist(), 7]


@pytest.mark.parametrize("suffix", [".bin", ".seg.npy"])
def test_a_flipped_bit_of_a_row_is_told_however_it_is_read(datasets, tmp_path, suffix):
    damaged = Path(shutil.copytree(datasets["chats"], tmp_path / "chats"))
    content = bytearray((damaged / f"000000{suffix}").read_bytes())
    content[-5] ^= 1  # of the last row
    (damaged / f"000000{suffix}").write_bytes(content)
    dataset = PackedDataset(damaged)
    row = int(dataset.manifest["shards"][0]["num_rows"]) - 1
    dataset.row(row - 1)
    for read in (dataset.row, lambda number: dataset.row_into(number, np.zeros(LENGTH, np.int64))):
        with pytest.raises(UserError, match=rf"damaged[\s\S]*000000\.bin, row {row}"):
            read(row)


def test_a_flipped_bit_stops_the_loader_with_its_row(datasets, tmp_path):
    damaged = Path(shutil.copytree(datasets["chats"], tmp_path / "chats"))
    content = bytearray((damaged / "000000.bin").read_bytes())
    content[2 * LENGTH * 4 + 5] ^= 16
    (damaged / "000000.bin").write_bytes(content)
    source = open_source(datasets | {"chats": damaged})
    with pytest.raises(UserError, match=r"damaged[\s\S]*chats/000000\.bin, row 2"):
        list(map(source.batch, range(0, 1200, 12)))
    (damaged / "000000.json").unlink()
    with pytest.raises(UserError, match="no manifest"):
        PackedDataset(damaged).row(0)
    source.close()


def test_a_stage_that_repeats_a_dataset_too_often_is_refused_before_it_starts(datasets):
    chats = DatasetEntry(str(datasets["chats"]), max_epochs=2)
    num_rows = len(PackedDataset(datasets["chats"]))
    model = ModelConfig(vocabulary=VocabularyConfig(text_size=1_000_000, reserved_size=32, visual_size=1_000_000))

    def open_stage(steps: int, **changes: int) -> PackedDataSource:
        stage = StageConfig(steps=steps, sequence_length=LENGTH, global_batch_size=2, micro_batch_size=1)
        stage.data.datasets = {"chats": chats}
        objective = NextToken(TrainConfig(stage=stage, model=model), NextTokenOptions())
        return objective.packed_rows(0, 1, **changes)

    open_stage(num_rows).close()
    with pytest.raises(UserError, match="more often than is allowed"):
        open_stage(num_rows + 1)
    open_stage(num_rows + 1, num_rows=1).close()  # a look at some rows is no stage


def test_a_dataset_added_to_a_stage_that_runs_repeats_no_row(datasets, tmp_path):
    model = ModelConfig(vocabulary=VocabularyConfig(text_size=1_000_000, reserved_size=32, visual_size=1_000_000))
    stage = StageConfig(name="mine", steps=50, sequence_length=LENGTH, global_batch_size=2, micro_batch_size=1)
    stage.data.datasets = {"mixed": DatasetEntry(str(datasets["mixed"]))}
    config = TrainConfig(run_folder=str(tmp_path), stage=stage, model=model)

    def rows_of(source: PackedDataSource, first: int, end: int) -> list[tuple[str, int]]:
        located = [source.mixture.locate(sample) for sample in range(first, end)]
        return [(location.dataset, location.row) for location in located]

    objective = NextToken(config, NextTokenOptions())
    before = objective.packed_rows(0, 1)
    content = {"consumed_samples": 20, "data_fingerprint": before.fingerprint} | objective.metadata()
    write_checkpoint(tmp_path / "mine", 10, **content)
    stage.data.datasets["chats"] = DatasetEntry(str(datasets["chats"]), weight=0.5)
    assert objective.packed_rows(0, 1).mixture.first_sample == 0  # refused when it resumes
    config.checkpoint.allow_data_change = True
    changed = objective.packed_rows(0, 1)
    seen = rows_of(before, 0, 20) + rows_of(changed, 20, 56)
    assert len({row for name, row in seen if name == "mixed"}) == 20 + 24
    assert sum(name == "chats" for name, _ in seen) == 12
    with pytest.raises(UserError, match="changed behind this place"):
        changed.batch(18)
    # The next start needs the switch no more.
    later = {"consumed_samples": 30, "data_fingerprint": changed.fingerprint} | objective.metadata()
    write_checkpoint(tmp_path / "mine", 15, **later)
    config.checkpoint.allow_data_change = False
    assert objective.packed_rows(0, 1).fingerprint == changed.fingerprint
