"""Documents that are alike: what MinHash says is held against Jaccard by brute force, and the choice depends on nothing else."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import webdataset
from packed_samples import Corpus, text, write_token_file
from PIL import Image, ImageDraw

from data_pipeline.documents.builder import Text
from data_pipeline.documents.tokenizers import train_sentencepiece
from data_pipeline.documents.words import WORD
from data_pipeline.filters.base import FilterChain, FilterConfig, make_filter
from data_pipeline.filters.near_duplicates import NearDuplicates
from data_pipeline.kinds.base import Pixels, PreparedSample
from data_pipeline.packing import duplicates
from data_pipeline.packing.choice import Choice
from data_pipeline.packing.duplicates import Left, rule_of, similarities
from data_pipeline.packing.held_out import HeldOutSet
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.packing.pool import Pool
from data_pipeline.packing.removed import read_removed
from data_pipeline.storage.format import encode_array
from data_pipeline.storage.packed_files import read_dataset_manifest
from data_pipeline.storage.segments import Kind
from data_pipeline.storage.signatures import SETTINGS_KEY, SUFFIX
from launch.commands import pack as pack_command
from launch.commands import tokenize as command
from launch.report.filters_page import write_page
from model.errors import UserError

MAXIMUM = 0.8
NGRAM = 5


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Whether data is flushed is tested in test_store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def edited(words: list[str], num_edits: int, rng: random.Random) -> list[str]:
    changed = list(words)
    for place in rng.sample(range(len(words)), num_edits):
        changed[place] = f"edit{rng.randrange(10**6)}"
    return changed


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """24 families: a text of 60 to 200 words, and copies in which 0 to 40 words are others."""
    rng = random.Random(5)
    found = []
    for family in range(24):
        words = [f"w{rng.randrange(500)}x{family}" for _ in range(rng.randrange(60, 200))]
        found += [" ".join(edited(words, edits, rng)) for edits in (0, 0, 1, 2, 5, 12, 40)]
    rng.shuffle(found)
    return [*found, "Too short.", "too short", "你好，世界。今天天气很好。", "你好世界今天天气很好", "", "  …"]


def word_sequences(written: str) -> set[tuple[str, ...]]:
    words = WORD.findall(written.casefold())
    length = min(NGRAM, len(words))
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)} if words else set()


def sample(*parts: Text | Pixels | str, key: str = "key", kind: str = "text") -> PreparedSample:
    return PreparedSample(key, kind, [Text(part) if isinstance(part, str) else part for part in parts])


def write_shards(folder: Path, samples: list[PreparedSample], num_shards: int, **settings: object) -> dict[str, Path]:
    """Token files of documents whose ids are their places in `samples`, spread over shards of two sources."""
    corpus, noted = Corpus(), NearDuplicates()
    documents = [corpus.document(text(6 + number % 5)) for number in range(len(samples))]
    sources = {name: folder / name for name in ("b", "a")}
    for number in range(num_shards):
        here = range(number, len(samples), num_shards)
        signatures = encode_array(np.concatenate([noted.signature(samples[place]) for place in here]))
        write_token_file(
            sources["ab"[number % 2]] / f"{number:06d}",
            [documents[place] for place in here],
            more={SUFFIX: signatures},
            **{SETTINGS_KEY: {"maximum": MAXIMUM} | noted.describe() | settings},
        )
    return {name: path for name, path in sources.items() if path.is_dir()}


def left_out(sources: dict[str, Path], removed: frozenset[int] = frozenset()) -> dict[int, Left]:
    """By id."""
    pool = Pool({name: [path] for name, path in sources.items()})
    choice = Choice(pool, removed, {}, rule_of(pool, None))
    return {int(choice.ids[number]): left for number, left in choice.left_out.items()}


def test_estimates_and_groups_are_those_of_brute_force(texts, tmp_path):
    noted = NearDuplicates()
    signatures = np.concatenate([noted.signature(sample(written)) for written in texts])
    pairs = np.array(list(itertools.combinations(range(len(texts)), 2)))
    exact, estimated = similarities(signatures[pairs[:, 0]], signatures[pairs[:, 1]])
    sets = [word_sequences(written) for written in texts]
    true = np.array([len(sets[one] & sets[other]) / max(1, len(sets[one] | sets[other])) for one, other in pairs])
    assert exact.tolist() == [texts[one] == texts[other] for one, other in pairs]
    assert np.abs(estimated - true).max() < 4 * np.sqrt(0.25 / 112)  # four standard deviations of 112 draws
    assert abs(float((estimated - true)[true > 0.2].mean())) < 0.01
    found = left_out(write_shards(tmp_path, [sample(written) for written in texts], 3))
    alike = {(int(one), int(other)) for one, other in pairs[estimated > MAXIMUM]}
    near = {(int(one), int(other)) for one, other in pairs[true > 0.9]}
    assert near <= alike
    for _, other in near:  # one of them at least is not there any more
        assert other in found
    for identity, left in found.items():  # and nothing is left out that is like nothing
        assert any((other, identity) in alike or (identity, other) in alike for other in range(len(texts)))
        assert left.like not in found
        assert left.like < identity
        assert (left.reason == "exact_duplicate") == (texts[identity] in texts[:identity])
    assert len(found) > 60


def test_the_choice_does_not_depend_on_shards_sources_or_memory(texts, tmp_path, monkeypatch):
    samples = [sample(written) for written in texts]
    expected = left_out(write_shards(tmp_path / "1", samples, 1))
    for num_shards in (2, 7):
        assert left_out(write_shards(tmp_path / str(num_shards), samples, num_shards)) == expected
    monkeypatch.setattr(duplicates, "_BAND_BYTES", 1)  # a pass over the files for every band
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 3)
    assert left_out({"other": tmp_path / "7" / "a", "name": tmp_path / "7" / "b"}) == expected


def photo(colour: tuple[int, int, int], shift: int = 0) -> np.ndarray:
    """A picture with structure everywhere, and a square of a colour."""
    rng = np.random.default_rng(shift)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((20, 20, 70, 70), fill=colour)
    return np.asarray(image)


def compressed(pixels: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=60)
    return np.asarray(Image.open(stream))


def test_pictures_count(tmp_path):
    caption, red, green = "a square of one colour in the middle of a photo", (220, 20, 20), (20, 220, 20)

    def pair(pixels: np.ndarray, words: str = caption) -> PreparedSample:
        return sample(words, Pixels(pixels, pixels.shape[:2]), kind="image_text")

    flat = np.full((96, 96, 3), 240, np.uint8)
    samples = [
        pair(photo(red)),
        pair(photo(green)),  # 1: the same words of another picture
        pair(photo(red, shift=1)),
        pair(compressed(photo(red))),  # 3: like 0
        pair(photo(red), "other words of the same picture, quite a few of them"),
        pair(photo(red)),  # 5: a copy of 0
        sample(caption),  # words alone
        pair(flat, ""),
        pair(flat, ""),  # 8: a copy of 7
        pair(compressed(photo(red, 3)), ""),
        pair(photo(red, 3), ""),  # no words: copies only
        sample(caption, *[Pixels(photo(red), (96, 96))] * 2, kind="image_text"),  # one picture more
    ]
    found = left_out(write_shards(tmp_path, samples, 4))
    assert found == {3: Left("near_duplicate", 0), 5: Left("exact_duplicate", 0), 8: Left("exact_duplicate", 7)}
    same_words = NearDuplicates(pictures=False)
    one, other = (same_words.signature(samples[number]) for number in (0, 1))
    assert similarities(one, other)[1].tolist() == [1.0]


def test_copies_of_removed_documents_stay(tmp_path):
    sources = write_shards(tmp_path, [sample("the very same words as before")] * 3, 2)
    assert left_out(sources) == {1: Left("exact_duplicate", 0), 2: Left("exact_duplicate", 0)}
    assert left_out(sources, frozenset([0])) == {0: Left("removed", None), 2: Left("exact_duplicate", 1)}


def test_packed_rows_manifest_and_report(texts, tmp_path):
    sources = write_shards(tmp_path / "tokens", [sample(written) for written in texts], 3)
    config = PackConfig(sequence_length=64, rows_per_shard=4, window_rows=4, seed=3)
    sets = {"probe": HeldOutSet(share=0.3)}
    summary = pack(sources, tmp_path / "packed", config, held_out=sets)
    found = left_out(sources)
    reasons = [left.reason for left in found.values()]
    assert summary.quarantined == {reason: reasons.count(reason) for reason in set(reasons)}
    listed = [json.loads(line) for line in (tmp_path / "packed/dataset.quarantine.jsonl").read_text().splitlines()]
    assert {entry["document"]: Left(entry["reason"], entry["like"]) for entry in listed} == found
    total = summary.held_out["probe"] + len(found)
    segments = np.concatenate([np.load(path) for path in (tmp_path / "packed").glob("0*.seg.npy")])
    packed = set(segments["document"][segments["kind"] != Kind.PAD].tolist())
    assert not packed & found.keys()
    assert len(packed) == len(texts) - total
    said = read_dataset_manifest(tmp_path / "packed")[SETTINGS_KEY]
    assert said["num_compared"] == said["num_documents"] == len(texts)
    assert said["max_similarity"] == MAXIMUM
    answer = write_page(tmp_path / "packed")
    assert answer["filters"] == {"near_duplicates": {"asked": len(texts), "refused": len(found)}}
    assert " like " in Path(answer["page"]).read_text()
    # What was found together is left out of sets that are packed apart: nothing else is alike in them.
    removed = read_removed(tmp_path / "packed/dataset.quarantine.jsonl")
    apart = [left_out({name: path}, removed) for name, path in sources.items()]
    assert apart[0] | apart[1] == dict.fromkeys(found, Left("removed", None))
    kept = pack(sources, tmp_path / "all", config, max_similarity=1.0)
    assert kept.quarantined == {}
    assert SETTINGS_KEY not in read_dataset_manifest(tmp_path / "all")
    with pytest.raises(UserError, match="another configuration"):
        pack(sources, tmp_path / "all", config)


def test_files_that_cannot_be_compared_are_refused(tmp_path):
    samples = [sample("some words"), sample("other words")]
    config = PackConfig(sequence_length=64)
    sources = write_shards(tmp_path / "one", samples, 2)
    other = write_shards(tmp_path / "two", samples, 1, maximum=0.7)["a"]
    with pytest.raises(UserError, match="do not agree on how far"):
        pack(sources | {"c": other}, tmp_path / "packed", config)
    pack(sources | {"c": other}, tmp_path / "packed", config, max_similarity=0.9)
    strange = write_shards(tmp_path / "three", samples, 1, ngram_words=7)["a"]
    with pytest.raises(UserError, match="cannot be compared"):
        pack(sources | {"c": strange}, tmp_path / "packed_2", config)
    write_token_file(tmp_path / "plain" / "000000", [Corpus().document(text(5))])
    with pytest.raises(UserError, match="no token file has signatures"):
        pack({"plain": tmp_path / "plain"}, tmp_path / "packed_2", config, max_similarity=0.5)
    pack(sources | {"plain": tmp_path / "plain"}, tmp_path / "packed_2", config)
    said = read_dataset_manifest(tmp_path / "packed_2")[SETTINGS_KEY]
    assert (said["num_compared"], said["num_documents"]) == (2, 3)


def test_how_the_filter_is_configured():
    with pytest.raises(UserError, match="at least one word"):
        NearDuplicates(ngram_words=0)
    twice = [FilterConfig("near_duplicates", maximum=0.8)] * 2
    with pytest.raises(UserError, match="one signature"):
        FilterChain(twice)
    with pytest.raises(UserError, match="minimum"):
        command.Config(
            target="t", text_tokenizer="t", input="i", filters=[FilterConfig("near_duplicates", minimum=0.1)]
        ).validate()
    with pytest.raises(UserError):
        make_filter("near_duplicates")  # it has no score


def shards_with_copies(folder: Path) -> str:
    """Five shards of six texts: the fifth is nearly one of the first shard (in two shards the same), the last one is in all."""
    rng = random.Random(1)
    names = [f"word{number}" for number in range(10)]
    written = [" ".join(rng.choices(names, k=40)) for _ in range(21)]
    for number in range(5):
        own = written[number * 4 : number * 4 + 4]
        with webdataset.TarWriter(str(folder / f"{number}.tar")) as sink:
            for place, words in enumerate([*own, f"{written[number % 4]} again", written[20]]):
                sink.write({"__key__": f"{number}-{place}", "txt": words})
    train_sentencepiece(topics["strings"].splitlines(), folder / "tokenizer", 400)
    return str(folder / "*.tar")


def test_the_whole_path_gives_the_same_bytes_whatever_the_tasks(tmp_path):
    """Shards to rows by the commands: in one task and in five, and after a loss of token files and of rows."""
    shards = shards_with_copies(tmp_path)

    def tokenize_and_pack(folder: Path, num_tasks: int) -> dict[str, bytes]:
        command.run(
            command.Config(
                input=shards,
                target=str(folder / "words"),
                text_tokenizer=str(tmp_path / "tokenizer"),
                filters=[FilterConfig("near_duplicates", maximum=0.7)],
                num_tasks=num_tasks,
            )
        )
        tokens = {"words": str(folder / "words")}
        summary = pack_command.run(
            pack_command.Config(tokens=tokens, target=str(folder / "rows"), sequence_length=256, rows_per_shard=4)
        )
        assert summary["quarantined"] == {"exact_duplicate": 5, "near_duplicate": 4}
        assert summary["num_rows"] > 8
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".npy", ".bin")
        }

    expected = tokenize_and_pack(tmp_path / "one", 1)
    assert "words/000003.signatures.npy" in expected
    assert tokenize_and_pack(tmp_path / "five", 5) == expected
    for lost in ("words/000002.json", "words/000003.signatures.npy", "rows/000001.json", "rows/dataset.json"):
        (tmp_path / "five" / lost).unlink()
    assert tokenize_and_pack(tmp_path / "five", 3) == expected
