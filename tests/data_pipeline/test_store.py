"""Token files: Megatron reads what is written here and the other way round; nothing half-written is ever seen."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import Corpus, captioned, text, write_token_file

from data_pipeline.storage.atomic import atomic_write_json, remove_stale_temporaries
from data_pipeline.storage.descriptors import DescriptorCache, read_exactly
from data_pipeline.storage.format import (
    NPY_ERRORS,
    encode_array,
    load_array,
    published_prefixes,
    read_index,
    read_manifest,
    verify_outputs,
)
from data_pipeline.storage.read_ahead import one_ahead
from data_pipeline.storage.segments import SEGMENT_DTYPE, Kind, count_classes, token_classes
from data_pipeline.storage.token_files import TokenFileReader, TokenFileWriter
from model.durable import read_json
from model.errors import UserError
from model.vocabulary import TokenClass


@pytest.fixture(scope="module")
def megatron():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def sample_documents(count: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    corpus = Corpus()
    return [corpus.document(captioned(3 + index, 8) if index % 2 else text(7)) for index in range(count)]


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), seed=st.integers(0, 2**32 - 1))
def test_megatron_and_nextstate_read_and_write_the_same_bytes(megatron, lengths, seed):
    import torch

    random = np.random.default_rng(seed)
    documents = [random.integers(-(2**31), 2**31, length).astype(np.int32) for length in lengths]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = folder / "000000"
        write_token_file(ours, [(tokens, one_segment(tokens)) for tokens in documents])
        builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32)
        for tokens in documents:
            builder.add_item(torch.from_numpy(tokens))
            builder.end_document()
        builder.finalize(str(folder / "theirs.idx"))
        for suffix in ("bin", "idx"):
            assert (folder / f"000000.{suffix}").read_bytes() == (folder / f"theirs.{suffix}").read_bytes()
        read_lengths, _ = read_index(folder / "theirs.idx")
        assert read_lengths.tolist() == lengths
        reader = TokenFileReader(ours)
        assert [reader.tokens(index).tolist() for index in range(len(reader))] == [
            tokens.tolist() for tokens in documents
        ]
        if sum(lengths):  # Megatron cannot map an empty file
            dataset = megatron.IndexedDataset(str(ours))
            assert [dataset[index].tolist() for index in range(len(dataset))] == [
                tokens.tolist() for tokens in documents
            ]


def one_segment(tokens: np.ndarray) -> np.ndarray:
    segments = np.zeros(1 if len(tokens) else 0, SEGMENT_DTYPE)
    segments["length"], segments["kind"] = len(tokens), Kind.TEXT
    return segments


def test_segments_and_parts_of_documents_come_back(tmp_path):
    documents = sample_documents()
    write_token_file(tmp_path / "000003", documents)
    reader = TokenFileReader(tmp_path / "000003")
    assert len(reader) == 5
    for index, (tokens, segments) in enumerate(documents):
        found = reader.segments(index)
        assert (found["row"] == index).all()
        for name in SEGMENT_DTYPE.names:
            if name != "row":
                assert (found[name] == segments[name]).all()
        assert reader.tokens(index, 2, 3).tolist() == tokens[2:5].tolist()


def test_a_file_without_manifest_does_not_exist(tmp_path):
    write_token_file(tmp_path / "000000", sample_documents())
    (tmp_path / "000000.json").unlink()
    assert published_prefixes(tmp_path) == []
    with pytest.raises(UserError, match="missing"):
        TokenFileReader(tmp_path / "000000")


def test_everything_is_flushed_before_it_is_named_and_the_manifest_comes_last(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(temporary: Path, final: Path) -> None:
        events.append(("rename", final.name))
        replace(temporary, final)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_token_file(tmp_path / "000000", sample_documents())
    expected = []
    for name in ("000000.bin", "000000.idx", "000000.seg.npy", "000000.json"):
        expected += [("fsync", f"{name}.tmp-{os.getpid()}"), ("rename", name), ("fsync", tmp_path.name)]
    assert events == expected


def test_an_unfinished_writer_leaves_nothing_and_keeps_the_published_file(tmp_path):
    write_token_file(tmp_path / "000000", sample_documents())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with TokenFileWriter(tmp_path / "000000") as writer:
        writer.add(*sample_documents()[0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_temporaries_of_dead_processes_are_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    dead = tmp_path / f"000000.bin.tmp-{process.pid}"
    alive, other_file = tmp_path / "000000.bin.tmp-1", tmp_path / f"000001.bin.tmp-{process.pid}"
    for path in (dead, alive, other_file):
        path.write_bytes(b"left behind")
    assert remove_stale_temporaries(tmp_path, "000000.") == 1
    assert sorted(tmp_path.iterdir()) == sorted([alive, other_file])


@pytest.fixture
def small_files():
    """The kernel refuses files beyond 64 KiB, as a full disk or a quota does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_named_and_nothing_good_is_lost(tmp_path, small_files):
    write_token_file(tmp_path / "000000", sample_documents())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokens = np.zeros(40_000, np.int32)
    with pytest.raises(UserError, match="cannot write") as caught:
        write_token_file(tmp_path / "000000", [(tokens, one_segment(tokens))])
    assert caught.value.where == str(tmp_path)
    assert "160," in caught.value.expected  # 160,000 bytes of tokens and what belongs to them
    with pytest.raises(UserError, match="cannot write"):
        atomic_write_json(tmp_path / "000000.json", "x" * 70_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", [".bin", ".seg.npy"])
def test_a_flipped_bit_is_attributed_to_its_row(tmp_path, suffix):
    documents = sample_documents()
    prefix = tmp_path / "000000"
    with TokenFileWriter(prefix, with_crc=True) as writer:
        for tokens, segments in documents:
            writer.add(tokens, segments)
        writer.finish({"kind": "packed", "num_rows": len(writer)})
    assert len(np.load(tmp_path / "000000.crc.npy")) == len(documents)
    path = tmp_path / f"000000{suffix}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last row
    path.write_bytes(content)
    reader = TokenFileReader(prefix)
    for row in range(4):
        reader.tokens(row)
    with pytest.raises(UserError, match=r"damaged[\s\S]*000000\.bin, row 4"):
        reader.tokens(4)
    with pytest.raises(UserError, match="checksum"):
        verify_outputs(prefix, read_manifest(prefix))


def test_a_truncated_file_is_named(tmp_path):
    write_token_file(tmp_path / "000000", sample_documents())
    os.truncate(tmp_path / "000000.bin", 30)
    reader = TokenFileReader(tmp_path / "000000")
    with pytest.raises(UserError, match=r"damaged[\s\S]*000000\.bin"):
        reader.tokens(4)
    os.truncate(tmp_path / "000000.idx", 40)
    with pytest.raises(UserError, match=r"damaged[\s\S]*000000\.idx"):
        TokenFileReader(tmp_path / "000000").tokens(0)
    with pytest.raises(UserError, match="truncated"):
        read_index(tmp_path / "000000.idx")


def test_foreign_and_missing_files_are_refused(tmp_path):
    write_token_file(tmp_path / "000000", sample_documents())
    with pytest.raises(UserError, match="kind"):
        read_manifest(tmp_path / "000000", kind="packed")
    (tmp_path / "000000.idx").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a Megatron index"):
        read_index(tmp_path / "000000.idx")
    (tmp_path / "000001.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "000001.json")


ARRAYS = [
    np.arange(5, dtype="<u4"),
    np.zeros(3, SEGMENT_DTYPE),
    np.zeros(0, SEGMENT_DTYPE),
    np.arange(6).reshape(2, 3),  # what numpy alone reads: two dimensions, none, another order
    np.array(7),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
]


@given(st.sampled_from(ARRAYS), st.integers(0, 1 << 12), st.integers(0, 255), st.booleans())
def test_an_array_is_read_as_numpy_reads_it_or_refused(array, place, byte, is_cut):
    """Headers are read without numpy's parser; whatever byte of a file is another or missing, the answer is numpy's."""
    content = bytearray(encode_array(array))
    if place < len(content):
        content[place:] = content[:0] if is_cut else bytes([byte]) + content[place + 1 :]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "000000.crc.npy"
        path.write_bytes(content)
        try:
            expected = np.load(path, allow_pickle=False)
        except NPY_ERRORS:
            with pytest.raises(UserError, match="not a readable"):
                load_array(path)
            return
        found = load_array(path)
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_segments_must_tile_the_tokens(tmp_path):
    tokens, segments = sample_documents()[0]
    with TokenFileWriter(tmp_path / "000000") as writer, pytest.raises(AssertionError, match="tile"):
        writer.add(tokens[:-1], segments)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=4))
def test_documents_laid_end_to_end_are_written_as_one_by_one(cuts):
    documents = [*sample_documents(9), (np.zeros(0, np.int32), np.zeros(0, SEGMENT_DTYPE))]
    documents = [documents[place] for place in (*range(5), 9, *range(5, 9))]
    bounds = [0, *sorted(cuts), len(documents)]
    written = []
    for ends in (range(len(documents) + 1), sorted(set(bounds))):
        with tempfile.TemporaryDirectory() as name:
            with TokenFileWriter(Path(name) / "000000", with_crc=True) as writer:
                for first, end in itertools.pairwise(ends):
                    tokens, segments = (list(parts) for parts in zip(*documents[first:end], strict=True))
                    lengths, counts = ([len(part) for part in parts] for parts in (tokens, segments))
                    writer.add_all(np.concatenate(tokens), np.concatenate(segments), lengths, counts)
                writer.finish({"kind": "tokens", "num_documents": len(writer)})
            written.append({path.name: path.read_bytes() for path in Path(name).iterdir()})
    assert written[0] == written[1]


def test_segments_must_tile_each_document(tmp_path):
    one, other = sample_documents()[:2]
    tokens, segments = (np.concatenate(parts) for parts in zip(one, other, strict=True))
    lengths, counts = [len(one[0]), len(other[0])], [len(one[1]), len(other[1])]
    moved = segments.copy()
    moved["start"][len(one[1])] = 1
    with TokenFileWriter(tmp_path / "000000") as writer:
        writer.add_all(tokens, segments, lengths, counts)
        for wrong in (
            (tokens, segments, lengths[::-1], counts),
            (tokens, segments, lengths, counts[::-1]),
            (tokens, segments, [lengths[0] + 1, lengths[1] - 1], counts),
            (tokens, segments, [sum(lengths), 0], counts),
            (tokens, moved, lengths, counts),
            (tokens, segments[:-1], lengths, counts),
            (tokens, segments, [*lengths, 5], [*counts, 0]),
        ):
            with pytest.raises(AssertionError, match="tile"):
                writer.add_all(*wrong)
        with pytest.raises(AssertionError, match="other tokens"):
            writer.add_all(tokens[:-1], segments, lengths, counts)


@pytest.mark.parametrize("count", [0, 1, 9, 2500])
def test_segments_that_are_written_in_parts_are_the_file_that_numpy_writes(tmp_path, monkeypatch, count):
    monkeypatch.setattr("data_pipeline.storage.token_files._SEGMENT_BYTES_AT_ONCE", 3 * SEGMENT_DTYPE.itemsize)
    segments = np.zeros(count, SEGMENT_DTYPE)
    segments["row"], segments["length"], segments["kind"] = np.arange(count), 1, Kind.TEXT
    with TokenFileWriter(tmp_path / "000000") as writer:
        for number in range(count):
            writer.add(np.array([number]), segments[:1])
        writer.finish({"kind": "tokens", "num_documents": count})
    np.save(tmp_path / "expected.npy", segments)
    assert (tmp_path / "000000.seg.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    TokenFileReader(tmp_path / "000000").verify()


def test_open_files_stay_within_the_limit(tmp_path):
    cache = DescriptorCache(max_open=2)
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"content")
    open_before = len(os.listdir("/proc/self/fd"))
    for path in [*paths, *paths]:
        assert os.pread(cache.get(str(path)), 7, 0) == b"content"
        assert len(cache) <= 2
    assert len(os.listdir("/proc/self/fd")) == open_before + 2
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == open_before


@given(content=st.binary(min_size=1, max_size=40), most=st.integers(1, 5), data=st.data())
def test_reads_that_give_less_go_on_until_the_file_ends(content, most, data):
    """As those of a network file system may."""
    offset = data.draw(st.integers(0, len(content)))
    num_bytes = data.draw(st.integers(1, len(content) + 3))
    with tempfile.TemporaryFile() as stream, pytest.MonkeyPatch.context() as patch:
        stream.write(content)
        stream.flush()
        pread, preadv = os.pread, os.preadv
        patch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, most), at))
        patch.setattr(os, "preadv", lambda file, parts, at: preadv(file, (parts[0][:most],), at))
        if offset + num_bytes <= len(content):
            assert read_exactly(stream.fileno(), num_bytes, offset, Path("x.bin")) == content[offset:][:num_bytes]
            return
        with pytest.raises(UserError, match=r"shorter[\s\S]*x\.bin, row 7") as told:
            read_exactly(stream.fileno(), num_bytes, offset, Path("x.bin"), "row 7")
        assert told.value.got == str(len(content) - offset)


def test_one_item_is_made_ahead_and_errors_and_the_end_reach_both_sides():
    made, closed = [], []

    def items():
        try:
            for number in range(5):
                made.append(number)
                if number == 3:
                    raise ValueError("the fourth")
                yield number
        finally:
            closed.append(True)

    some = one_ahead(items(), "test")
    for item in range(3):
        assert next(some) == item
        assert len(made) <= item + 2
    with pytest.raises(ValueError, match="the fourth"):
        next(some)
    with contextlib.closing(one_ahead(items(), "test")) as some:
        assert next(some) == 0
    assert len(closed) == 2
    assert list(one_ahead((number for number in range(100)), "test")) == list(range(100))


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 9), st.just(0)), max_size=8),
    seed=st.integers(0, 99),
)
def test_counts_by_class_are_those_of_the_tokens(specs, seed):
    segments = np.zeros(len(specs), SEGMENT_DTYPE)
    for segment, (kind, length, _) in zip(segments, specs, strict=True):
        segment["kind"], segment["length"] = kind, length
    tokens = np.random.default_rng(seed).integers(0, 20, int(segments["length"].sum())).astype(np.int32)
    classes = token_classes(tokens, segments, 10)
    expected = {kind.name.lower(): int((classes == kind).sum()) for kind in TokenClass}
    padding = sum(length for kind, length, _ in specs if kind == Kind.PAD)
    expected |= {"structure": expected["structure"] - padding, "padding": padding}
    assert count_classes(tokens, segments, 10) == expected
