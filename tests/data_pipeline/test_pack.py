"""Packing: nothing is lost, images stay whole, rows are full, and the bytes are a pure function of the input."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_samples import VOCABULARY, Corpus, captioned, mixed_sources, text, video, write_sources, write_token_file

from data_pipeline.packing import pack as pack_module
from data_pipeline.packing.held_out import HeldOutSet, check_kept_apart, sets_of, validate
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.packing.pool import Pool
from data_pipeline.packing.window import Piece
from data_pipeline.storage.folder_claim import LOCK_NAME, claim_folder
from data_pipeline.storage.format import published_prefixes, read_manifest, verify_outputs
from data_pipeline.storage.packed_files import PackedDataset, read_dataset_manifest
from data_pipeline.storage.segments import Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader
from model.errors import Problems, UserError

CONFIG = PackConfig(sequence_length=512, rows_per_shard=16, window_rows=8, seed=3)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Whether data is flushed is tested in test_store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("tokens"), mixed_sources())


@pytest.fixture(scope="module")
def packed(sources, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "mixed"
    pack(sources, target, CONFIG)
    return target


def content(folder: Path) -> dict[str, bytes]:
    """But for the lock, which names the process that held it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def all_documents(sources: dict[str, Path]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(source, tokens, segments) of every document of the token files."""
    pool = Pool({name: [folder] for name, folder in sources.items()})
    lengths, _ = pool.load_index()
    found = []
    for document in range(len(pool)):
        tokens, segments = pool.read(Piece(document, 0, int(lengths[document])))
        found.append((int(segments["source"][0]), tokens, segments))
    return found


def pieces_by_document(dataset: PackedDataset) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    """Pieces of each document, found in the rows by their marks; rows are checked to be well formed."""
    found = defaultdict(list)
    for row in range(len(dataset)):
        tokens, segments = dataset.row(row)
        assert segments["start"][0] == 0
        assert (np.cumsum(segments["length"]) == [*segments["start"][1:], len(tokens)]).all()
        starts = np.flatnonzero((segments["flags"] & Flag.DOCUMENT_START).astype(bool) | (segments["kind"] == Kind.PAD))
        assert starts[0] == 0
        for first, end in zip(starts, [*starts[1:], len(segments)], strict=True):
            part = segments[first:end]
            if part["kind"][0] == Kind.PAD:
                assert end == len(segments) == first + 1
                assert (tokens[part["start"][0] :] == VOCABULARY.pad).all()
                continue
            assert len(set(part["document"].tolist())) == 1
            span = tokens[part["start"][0] : part["start"][0] + part["length"].sum()]
            found[int(part["document"][0])].append((span, part))
    return found


def place(piece: np.ndarray, document: np.ndarray) -> int:
    """Where in its document a piece comes from, told by its first token that is unique."""
    unique = piece[~np.isin(piece, [VOCABULARY.boi, VOCABULARY.eoi])][0]
    return int(np.flatnonzero(document == unique)[0])


def assert_everything_is_there(sources: dict[str, Path], target: Path) -> None:
    found = pieces_by_document(PackedDataset(target))
    originals = all_documents(sources)
    assert len(found) == len(originals)
    for source, tokens, segments in originals:
        pieces = sorted(found[int(segments["document"][0])], key=lambda piece: place(piece[0], tokens))
        assert np.concatenate([piece for piece, _ in pieces]).tolist() == tokens.tolist()
        for number, (_, part) in enumerate(pieces):
            assert (part["source"] == source).all()
            assert (((part["flags"] & Flag.CUT) != 0) == (number > 0)).all()
        images = segments[segments["kind"] == Kind.IMAGE]
        kept = np.concatenate([part[part["kind"] == Kind.IMAGE] for _, part in pieces])
        for name in ("length", "grid_height", "grid_width", "time_ms", "document"):
            assert kept[name].tolist() == images[name].tolist()


def test_every_document_is_there_once_and_images_are_whole(sources, packed):
    assert_everything_is_there(sources, packed)


def test_rows_are_full_and_the_summary_counts_them(sources, packed):
    summary = pack_module.summarise(packed)
    originals = all_documents(sources)
    num_real = sum(len(tokens) for _, tokens, _ in originals)
    text_share = sum(len(tokens) for source, tokens, _ in originals if source == 2) / num_real
    assert 0.08 < text_share < 0.12
    assert summary.num_real_tokens == num_real
    assert summary.fill == num_real / summary.num_tokens >= 0.995
    assert summary.num_tokens == summary.num_rows * 512
    by_source = [sum(len(tokens) for number, tokens, _ in originals if number == source) for source in range(3)]
    assert summary.sources == dict(zip(["clips", "pairs", "text"], by_source, strict=True))
    dataset = PackedDataset(packed)
    visual = sum(int(VOCABULARY.is_visual(dataset.row(row)[0]).sum()) for row in range(len(dataset)))
    assert summary.counts_by_class["visual"] == visual
    assert sum(summary.counts_by_class.values()) == summary.num_tokens


def test_a_start_reads_each_file_no_more_often_than_it_must(sources, tmp_path, monkeypatch):
    """Of 100,000 token files every further look costs minutes. Once for the checksum, once for what is in it."""
    looks: Counter[str] = Counter()
    opened = Path.open  # `Path.read_bytes` opens by it
    monkeypatch.setattr(
        Path, "open", lambda path, *rest, **more: (looks.update([path.name]), opened(path, *rest, **more))[1]
    )
    monkeypatch.setattr(pack_module._Packing, "write_shard", lambda *_: pytest.fail("planned"))
    with pytest.raises(pytest.fail.Exception, match="planned"):
        pack(sources, tmp_path / "packed", CONFIG)
    names = {path.name for folder in sources.values() for path in folder.iterdir()}
    most = {".json": 1, ".bin": 1, ".idx": 2, ".seg.npy": 2, ".crc.npy": 2}
    for name in names:
        num_sources = sum((folder / name).is_file() for folder in sources.values())
        assert looks[name] <= most[name[name.index(".") :]] * num_sources, name


def test_rows_mix_sources(packed):
    dataset = PackedDataset(packed)
    mixed = sum(len(set(dataset.row(row)[1]["source"].tolist())) > 1 for row in range(len(dataset)))
    assert mixed > 0.5 * len(dataset)


def test_manifests_describe_the_shards(packed):
    prefixes = published_prefixes(packed)
    assert len(prefixes) > 3
    for prefix in prefixes:
        manifest = read_manifest(prefix, kind="packed")
        verify_outputs(prefix, manifest)
        assert manifest["sources"] == ["clips", "pairs", "text"]
        assert manifest["vocabulary"] == VOCABULARY.describe()
        assert manifest["num_tokens"] == manifest["num_rows"] * 512


def test_the_same_input_gives_the_same_bytes_wherever_it_stands(sources, packed, tmp_path):
    moved = {name: shutil.copytree(folder, tmp_path / "moved" / name) for name, folder in sources.items()}
    pack(dict(reversed(moved.items())), tmp_path / "again", CONFIG)
    assert content(tmp_path / "again") == content(packed)
    other_seed = PackConfig(sequence_length=512, rows_per_shard=16, window_rows=8, seed=4)
    pack(sources, tmp_path / "other", other_seed)
    assert content(tmp_path / "other")["000000.bin"] != content(packed)["000000.bin"]


@pytest.mark.parametrize("rows_before_death", [0, 16, 41, 64])
def test_a_killed_run_is_continued_to_the_same_bytes(sources, packed, tmp_path, rows_before_death):
    target = tmp_path / "target"
    child = os.fork()
    if child == 0:
        die_after(rows_before_death)
        pack(sources, target, CONFIG)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    survivors = {name: data for name, data in content(target).items() if name.endswith(".json")}
    assert len(survivors) == rows_before_death // 16
    assert any(".tmp-" in path.name for path in target.iterdir())
    times = {name: (target / name).stat().st_mtime_ns for name in survivors}
    pack(sources, target, CONFIG)
    assert content(target) == content(packed)
    assert times == {name: (target / name).stat().st_mtime_ns for name in survivors}


def die_after(num_rows: int) -> None:
    """In a child process: kill -9 when the given number of rows has been written."""
    add = pack_module.TokenFileWriter.add
    written = 0

    def add_or_die(self, tokens, segments):
        nonlocal written
        if written == num_rows:
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        add(self, tokens, segments)

    pack_module.TokenFileWriter.add = add_or_die  # type: ignore[method-assign]


def test_a_full_disk_stops_packing_and_the_same_command_continues(sources, packed, tmp_path):
    """The kernel refuses files beyond one shard's rows but not the first shard, as a disk that fills up does."""
    target = tmp_path / "target"
    add, num_added = pack_module.TokenFileWriter.add, 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def add_until_full(self, tokens, segments):
        nonlocal num_added
        num_added += 1
        if num_added == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, limits[1]))
        add(self, tokens, segments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module.TokenFileWriter, "add", add_until_full)
        try:
            with pytest.raises(UserError, match="cannot write") as caught:
                pack(sources, target, CONFIG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.where == str(target)
    assert sorted(content(target)) == [f"000000{end}" for end in (".bin", ".crc.npy", ".idx", ".json", ".seg.npy")]
    pack(sources, target, CONFIG)
    assert content(target) == content(packed)


def test_a_finished_target_is_not_touched_and_a_lost_shard_is_written_again(sources, packed, tmp_path):
    target = shutil.copytree(packed, tmp_path / "target")
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    pack(sources, target, CONFIG)
    assert before == {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    (target / "000001.json").unlink()
    (target / "000001.bin").write_bytes(b"damaged")
    pack(sources, target, CONFIG)
    assert content(target) == content(packed)


def test_a_target_of_another_configuration_is_refused(sources, packed):
    before = content(packed)
    with pytest.raises(UserError, match="another configuration"):
        pack(sources, packed, PackConfig(sequence_length=256, rows_per_shard=16))
    assert content(packed) == before


def test_long_documents_are_cut_at_boundaries_and_what_cannot_fit_is_refused(tmp_path):
    sources = write_sources(
        tmp_path / "tokens",
        {
            "clips": [video(12, 9, 45), captioned(10, 99), captioned(10, 101), video(30, 3, 20)],
            "text": [text(450), text(101, splittable=False), []],
        },
    )
    config = PackConfig(sequence_length=100, rows_per_shard=100, window_rows=4, seed=0)
    summary = pack(sources, tmp_path / "packed", config)
    assert summary.quarantined == {"image_longer_than_row": 1, "segment_longer_than_row": 1, "empty_document": 1}
    listed = [json.loads(line) for line in (tmp_path / "packed" / "dataset.quarantine.jsonl").open()]
    assert {(entry["source"], entry["index"]) for entry in listed} == {("clips", 2), ("text", 1), ("text", 2)}
    found = pieces_by_document(PackedDataset(tmp_path / "packed"))
    originals = {int(segments["document"][0]): segments for _, _, segments in all_nonempty(sources)}
    for document in (0, 1, 3):  # no splittable text: cut between segments only
        kept = np.concatenate([part for _, part in found[document]])
        assert sorted(kept["length"].tolist()) == sorted(originals[document]["length"].tolist())
    assert sum(len(span) for span, _ in found[4]) == 452
    assert len(found[0]) == 8  # of at most two frames each
    assert summary.num_real_tokens == sum(len(span) for parts in found.values() for span, _ in parts)


def all_nonempty(sources):
    pool = Pool({name: [folder] for name, folder in sources.items()})
    lengths, _ = pool.load_index()
    for document in np.flatnonzero(lengths):
        tokens, segments = pool.read(Piece(int(document), 0, int(lengths[document])))
        yield document, tokens, segments


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_corpus_is_packed_without_loss(tmp_path_factory, data):
    random_text = st.builds(text, st.integers(1, 150), st.just(True))
    random_pair = st.builds(captioned, st.integers(1, 40), st.integers(3, 40))
    random_clip = st.builds(video, st.integers(1, 6), st.integers(1, 20), st.integers(3, 40))
    specs = data.draw(st.lists(st.one_of(random_text, random_pair, random_clip), min_size=1, max_size=25))
    folder = tmp_path_factory.mktemp("any")
    sources = write_sources(folder / "tokens", {"all": specs})
    config = PackConfig(
        sequence_length=data.draw(st.integers(40, 120)),
        rows_per_shard=7,
        window_rows=data.draw(st.integers(1, 6)),
        minimum_piece_tokens=data.draw(st.integers(1, 10)),
        seed=data.draw(st.integers(0, 99)),
    )
    summary = pack(sources, folder / "packed", config)
    assert summary.quarantined == {}
    assert_everything_is_there(sources, folder / "packed")


def test_rows_are_written_as_they_are_planned(tmp_path, monkeypatch):
    """A shard's plan is never held as a whole, in memory that would grow with it."""
    sources = write_sources(tmp_path / "tokens", {"text": [text(30, splittable=False)] * 200})
    plan, assemble = pack_module._Packing.plan, pack_module._Packing.assemble
    planned, written = [], []

    def counted(packing):
        for row in plan(packing):
            planned.append(row)
            yield row

    def assembled(packing, row, vocabulary):
        written.append(row)
        assert len(planned) == len(written)
        return assemble(packing, row, vocabulary)

    monkeypatch.setattr(pack_module._Packing, "plan", counted)
    monkeypatch.setattr(pack_module._Packing, "assemble", assembled)
    pack(sources, tmp_path / "packed", PackConfig(sequence_length=64, rows_per_shard=90, window_rows=2))
    assert len(written) == len(planned) > 90


@settings(max_examples=100, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.just(Kind.TEXT), st.integers(1, 12), st.sampled_from([0, Flag.SPLITTABLE])), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_a_filler_is_cut_at_the_last_place_allowed(specs, data):
    _, segments = Corpus().document(specs)
    pool = Pool.__new__(Pool)
    pool.segments = lambda document: segments  # type: ignore[method-assign]
    total = int(segments["length"].sum())
    start = data.draw(st.integers(0, total - 1))
    limit = data.draw(st.integers(1, total + 5))
    allowed = {0, total}
    for segment in segments:
        first, end = int(segment["start"]), int(segment["start"] + segment["length"])
        allowed |= {first, end} | (set(range(first, end)) if segment["flags"] & Flag.SPLITTABLE else set())
    best = max((place - start for place in allowed if 0 <= place - start <= limit), default=0)
    assert pool.cut(Piece(0, start, total - start), limit) == best


@settings(max_examples=15, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.05, 0.5]),
    listed=st.sets(st.integers(0, 23), max_size=3),
    removed=st.sets(st.integers(0, 23), max_size=2),
    seed=st.integers(0, 3),
)
def test_documents_held_out_are_in_no_row_that_is_trained_on(few, tmp_path_factory, share, listed, removed, seed):
    target = tmp_path_factory.mktemp("held_out")
    config = PackConfig(sequence_length=128, rows_per_shard=4, window_rows=2, seed=seed)
    sets = {"listed": HeldOutSet(documents=frozenset(listed))} if listed - removed else {}
    sets |= {"some": HeldOutSet(share=share)} if share else {}
    taken = set(np.flatnonzero(HeldOutSet(share).takes("some", np.arange(24, dtype=np.uint64))).tolist())
    if share and not taken - listed - removed:
        with pytest.raises(UserError, match="no document is held out for 'some'"):
            pack(few, target, config, frozenset(removed), sets)
        return
    summary = pack(few, target, config, frozenset(removed), sets)
    before = content(target)
    parts = {"": target} | {name: target / "held_out" / name for name in sets}
    found = {name: set(pieces_by_document(PackedDataset(folder))) for name, folder in parts.items()}
    assert sorted(one for ids in found.values() for one in ids) == sorted(set(range(24)) - removed)
    assert found.get("listed", set()) == listed - removed
    assert summary.held_out == {name: len(found[name]) for name in sets}
    # Another pool, order and row length: the share takes the same documents.
    if share == 0.5:
        folder, other = tmp_path_factory.mktemp("other"), replace(config, seed=9, sequence_length=256)
        pack({"a": few["a"]}, folder, other, held_out={"some": sets["some"]})
        again = set(pieces_by_document(PackedDataset(folder / "held_out" / "some")))
        assert found["some"] & set(range(12)) == again - removed - listed
    manifests = {name: json.loads((folder / "dataset.json").read_text()) for name, folder in parts.items()}
    for name in sets:
        check_kept_apart({"mine": manifests[""]}, manifests[name], parts[name])
        with pytest.raises(UserError, match="trained on documents that the validation set holds"):
            check_kept_apart({"mine": manifests[""] | {"held_out": {}}}, manifests[name], parts[name])
    pack(few, target, config, frozenset(removed), sets)
    assert content(target) == before


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, Path]:
    """Documents 0 to 11 in source a, 12 to 23 in b; one in three is longer than a row."""
    specs = [text(20 + 60 * (number % 3)) if number % 2 else captioned(5, 20) for number in range(12)]
    return write_sources(tmp_path_factory.mktemp("few"), {"a": specs, "b": specs})


def test_a_share_takes_its_share_and_sets_are_apart():
    ids = np.arange(200_000, dtype=np.uint64)
    sets = {"one": HeldOutSet(share=0.01), "two": HeldOutSet(share=0.01), "list": HeldOutSet(documents=frozenset({5}))}
    numbers = sets_of(sets, ids)
    counts = np.bincount(numbers)
    assert counts[1] == 1
    assert counts[2:] == pytest.approx([2000, 1980], rel=0.1)
    problems = Problems()
    validate({"..": HeldOutSet(share=0.1), "a": HeldOutSet(), "b": HeldOutSet(share=1.0)}, problems)
    assert len(problems.found) == 3


def test_disagreeing_token_files_are_refused_and_listed(sources, tmp_path):
    documents = [Corpus().document(text(10))]
    for key, value in (("text_tokenizer", "text-2"), ("vocabulary", VOCABULARY.describe() | {"visual_size": 5})):
        write_token_file(tmp_path / key / "000000", documents, **{key: value})
        with pytest.raises(UserError, match=f"do not agree on the {key.replace('_', ' ')}") as caught:
            pack(sources | {"other": tmp_path / key}, tmp_path / "target", CONFIG)
        assert str(tmp_path / key / "000000") in caught.value.got
        assert str(sources["clips"] / "000000") in caught.value.got
    # Texts alone have the same ids whatever number of codes follows; the rows' vocabulary is that of the pictures.
    fewer = dataclasses.replace(VOCABULARY, visual_size=5).describe()
    paths = {"tokenizer_paths": {"text_tokenizer": "/somewhere/text"}}
    write_token_file(tmp_path / "a_text" / "000000", documents, vision_tokenizer=None, vocabulary=fewer, **paths)
    pack({"a": tmp_path / "a_text"} | sources, tmp_path / "target", CONFIG)
    manifest = read_dataset_manifest(tmp_path / "target")
    assert (manifest["vocabulary"], manifest["vision_tokenizer"]) == (VOCABULARY.describe(), "vision-1")
    assert manifest["tokenizer_paths"] == {"text_tokenizer": "/somewhere/text"}


def test_bad_input_is_named(sources, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        pack({"a": tmp_path / "missing"}, tmp_path / "target", CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished token files"):
        pack({"a": tmp_path / "empty"}, tmp_path / "target", CONFIG)
    with pytest.raises(UserError, match="no source is given"):
        pack({}, tmp_path / "target", CONFIG)
    with pytest.raises(UserError, match="3 problems"):
        pack(sources, tmp_path / "target", PackConfig(sequence_length=0, rows_per_shard=0, minimum_piece_tokens=4))
    tokens, segments = Corpus().document(text(10))
    tokens[3] = VOCABULARY.size
    write_token_file(tmp_path / "foreign" / "000000", [(tokens, segments)])
    with pytest.raises(UserError, match="outside the vocabulary"):
        pack({"a": tmp_path / "foreign"}, tmp_path / "target", CONFIG)
    write_token_file(tmp_path / "damaged" / "000000", [Corpus().document(text(10))])
    (tmp_path / "damaged" / "000000.bin").write_bytes(b"\0" * 48)
    with pytest.raises(UserError, match="checksum"):
        pack({"a": tmp_path / "damaged"}, tmp_path / "target", CONFIG)


def many_files(folder: Path, count: int) -> dict[str, Path]:
    """Two documents in each, as long as half a row, and a last file without any."""
    corpus = Corpus()
    for number in range(count):
        documents = [corpus.document(text(CONFIG.sequence_length // 2 - 2)) for _ in range(2 * (number < count - 1))]
        write_token_file(folder / f"{number:06d}", documents, with_crc=True)
    return {"many": folder}


def files_as_they_come(seed: int) -> list[int]:
    """Numbers of the 39 files that have documents, by the first of these in the order of the rows."""
    order = np.concatenate(list(pack_module._document_order(78, seed))) // 2
    return list(dict.fromkeys(order.tolist()))


@pytest.mark.parametrize(
    ("what", "suffix"), [("middle", ".bin"), ("middle", ".seg.npy"), ("last", ".bin"), ("empty", ".idx")]
)
def test_a_damaged_file_is_told_before_anything_of_it_is_in_a_row(tmp_path, monkeypatch, what, suffix):
    """Files are verified as their documents come; what was published before stays, and is gone on from."""
    monkeypatch.setattr(pack_module, "_LEAST_ORDER_BLOCK", 8)
    monkeypatch.setattr(pack_module, "_ORDER_BLOCK", 8)
    config = replace(CONFIG, rows_per_shard=4, window_rows=2)
    sources = many_files(tmp_path / "tokens", 40)
    pack(sources, tmp_path / "whole", config)
    files = files_as_they_come(config.seed)
    number = {"middle": files[25], "last": files[-1], "empty": 39}[what]
    damaged = tmp_path / "tokens" / f"{number:06d}{suffix}"
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"a file is damaged: its checksum[\s\S]*{damaged.name}"):
        pack(sources, tmp_path / "target", config)
    published = content(tmp_path / "target")
    assert "000000.json" in published
    assert "dataset.json" not in published
    damaged.write_bytes(intact)
    pack(sources, tmp_path / "target", config)
    assert content(tmp_path / "target") == content(tmp_path / "whole")
    assert published.items() <= content(tmp_path / "whole").items()


def test_with_documents_left_out_every_file_is_verified_first(tmp_path, monkeypatch):
    """What a damaged file says of its documents must not decide over the first rows."""
    monkeypatch.setattr(pack_module, "_LEAST_ORDER_BLOCK", 8)
    monkeypatch.setattr(pack_module, "_ORDER_BLOCK", 8)
    sources = many_files(tmp_path / "tokens", 40)
    config = replace(CONFIG, rows_per_shard=4, window_rows=2)
    damaged = tmp_path / "tokens" / f"{files_as_they_come(config.seed)[-1]:06d}.seg.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")  # a time
    for chosen in ({"removed": frozenset([5])}, {"held_out": {"few": HeldOutSet(0.2)}}):
        with pytest.raises(UserError, match="checksum"):
            pack(sources, tmp_path / "target", config, **chosen)
        assert not list((tmp_path / "target").rglob("*.json"))


def test_the_first_row_opens_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "_LEAST_ORDER_BLOCK", 8)
    sources = many_files(tmp_path / "tokens", 40)
    pool = Pool({name: [folder] for name, folder in sources.items()})
    opened = []
    load = TokenFileReader.all_segments

    def count(reader, *, verify):
        opened.append(reader.prefix.name)
        return load(reader, verify=verify)

    monkeypatch.setattr(TokenFileReader, "all_segments", count)
    first = np.array([3, 70, 71])
    lengths, fillers = pool.load_index(first, verify=True)
    assert (lengths[first] == CONFIG.sequence_length // 2).all()
    assert fillers[first].all()
    assert opened == ["000001", "000035"]
    pool.load_index(verify=True)
    assert len(opened) == len(set(opened)) == 40
    assert (pool.load_index()[0] == CONFIG.sequence_length // 2).all()


def test_a_folder_that_another_command_writes_is_refused_and_a_finished_one_is_only_read(sources, packed, tmp_path):
    with (
        claim_folder(tmp_path / "target", "pack"),
        pytest.raises(UserError, match=r"another command[\s\S]*pack, process"),
    ):
        pack(sources, tmp_path / "target", CONFIG)
    assert not list((tmp_path / "target").glob("*.json"))
    with claim_folder(packed, "pack"):
        pack(sources, packed, CONFIG)
        assert (packed / LOCK_NAME).exists()
    (packed / LOCK_NAME).write_text("left by one that was killed at its very end")
    pack(sources, packed, CONFIG)
    assert not (packed / LOCK_NAME).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        pack(sources, tmp_path / "file" / "target", CONFIG)


def test_the_command_answers(sources, tmp_path):
    from launch.commands.pack import Config, run

    config = Config(
        tokens={name: str(folder) for name, folder in sources.items()},
        target=str(tmp_path / "target"),
        sequence_length=512,
        rows_per_shard=64,
        window_rows=8,
        minimum_piece_tokens=5,
    )
    answer = run(config)
    assert json.loads((tmp_path / "target" / "dataset.json").read_text())["config"]["minimum_piece_tokens"] == 5
    assert json.loads(json.dumps(answer)) == answer
    assert {"fill", "num_rows", "num_tokens", "num_real_tokens", "sources", "target"} <= set(answer)
    with pytest.raises(UserError, match="target"):
        run(Config(tokens=config.tokens))
