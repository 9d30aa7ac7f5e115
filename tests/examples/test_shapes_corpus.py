"""The corpora as written: read back through webdataset, Pillow and PyAV, and compared with what was promised."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from examples.shapes_world import build, real_media
from examples.shapes_world.build import build_corpora, parse_arguments
from examples.shapes_world.datasets import CorpusConfig
from examples.shapes_world.judge import read_scene
from examples.shapes_world.media import mp4_frames
from examples.shapes_world.motion import NUM_RESTS
from examples.shapes_world.world import CAPTIONS, caption, is_held_out
from model.errors import UserError

TINY = CorpusConfig(seed=5, num_images=60, num_clips=16, num_captioned_clips=4, num_edits=30, samples_per_shard=25)
DIRECTIONS = {
    "moves right": (0, 1),
    "moves left": (0, -1),
    "moves up": (-1, 0),
    "moves down": (1, 0),
    "stays still": (0, 0),
}
TEXTS = ("txt", "words.json", "instruction.txt")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("corpora")
    build_corpora(target, TINY)
    return target


def samples(folder: Path) -> list[dict]:
    """All samples of a dataset in order, read by webdataset's own reader."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (96, 96)
        return np.asarray(picture.convert("RGB"))


def assert_seen_scene(picture: np.ndarray):
    scene = read_scene(picture)
    assert scene, "the judge cannot read a training picture"
    assert not any(is_held_out(item) for item in scene)
    return scene


def test_counts_kinds_and_extensions(corpora: Path):
    corpus = json.loads((corpora / "corpus.json").read_text())
    extensions = {
        "shapes_image_text": ({"png", "txt"}, {"jpg", "txt"}),
        "shapes_video": ({"mp4", "words.json"},),
        "shapes_video_text": ({"mp4", "txt"},),
        "shapes_edit": ({"instruction.txt", "source_0.png", "target.png"},),
        "real_photos": ({"png", "txt"}, {"jpg", "txt"}),
        "real_video": ({"mp4", "words.json", "json"},),
        "text_english": ({"txt"},),
        "text_chinese": ({"txt"},),
    }
    assert set(corpus["datasets"]) == set(extensions)
    for name, entry in corpus["datasets"].items():
        found = samples(corpora / name)
        assert len(found) == entry["num_samples"] > 0
        assert len(entry["shards"]) == -(-len(found) // TINY.samples_per_shard)
        assert entry["source"]
        for sample in found:
            keys = {key for key in sample if not key.startswith("__")}
            assert keys in extensions[name], (name, keys)


def test_pictures_match_captions_and_hold_nothing_held_out(corpora: Path):
    found = samples(corpora / "shapes_image_text")
    assert Counter("png" in sample for sample in found) == {True: 30, False: 30}
    sizes = Counter()
    for sample in found:
        scene = assert_seen_scene(pixels(sample.get("png") or sample["jpg"]))
        assert sample["txt"].decode() in {caption(scene, number) for number in range(len(CAPTIONS))}
        sizes[len(scene)] += 1
    assert sizes == {1: 24, 2: 33, 3: 3}


def test_edits_do_what_they_say_and_hold_nothing_held_out(corpora: Path):
    for sample in samples(corpora / "shapes_edit"):
        source = assert_seen_scene(pixels(sample["source_0.png"]))
        target = assert_seen_scene(pixels(sample["target.png"]))
        changed = [new for old, new in zip(source, target, strict=True) if old != new]
        words = sample["instruction.txt"].decode().split()
        assert [new.color for new in changed] == [words[-1]]
        assert changed[0].shape in words


def follow_law(sentence: str, scenes: list) -> None:
    """Each clause of the transcript says where its shape goes from one scene to the next."""
    clauses = sentence.split(" and ")
    assert len(clauses) == len(scenes[0])
    for clause in clauses:
        _, color, shape, law = clause.split(maxsplit=3)
        step = DIRECTIONS[law]
        path = [
            [(item.row, item.column) for item in scene if (item.shape, item.color) == (shape, color)]
            for scene in scenes
        ]
        assert all(len(places) == 1 for places in path)
        for (before,), (after,) in itertools.pairwise(path):
            assert (after[0] - before[0], after[1] - before[1]) == step


def test_videos_follow_their_transcripts_and_hold_nothing_held_out(corpora: Path):
    middles = [rest + 0.5 for rest in range(NUM_RESTS)]
    for name in ("shapes_video", "shapes_video_text"):
        for sample in samples(corpora / name):
            frames = mp4_frames(sample["mp4"], middles)
            scenes = [assert_seen_scene(frame) for frame in frames]
            if name == "shapes_video":
                words = [word["word"] for word in json.loads(sample["words.json"])]
                assert words[: len(words) // 2] == words[len(words) // 2 :]
                follow_law(" ".join(words[: len(words) // 2]), scenes)
            else:
                text = sample["txt"].decode()
                assert all(item.place in text for item in scenes[0])


def test_no_frame_between_rests_shows_a_held_out_combination(corpora: Path):
    """While shapes glide the judge reads nothing; if it does read a frame, it is a scene seen in training."""
    times = [number / 8 for number in range(24)]
    for sample in samples(corpora / "shapes_video"):
        for frame in mp4_frames(sample["mp4"], times):
            assert not any(is_held_out(item) for item in read_scene(frame) or ())


def test_real_media_are_the_shipped_bytes(corpora: Path):
    photos = samples(corpora / "real_photos")
    whole = [sample for sample in photos if sample["txt"].startswith(b"a photo of")]
    assert len(whole) == len(real_media.PHOTOS)
    for sample, photo in zip(whole, real_media.PHOTOS, strict=True):
        path = real_media.package_file(photo.package, photo.file)
        assert sample[path.suffix[1:]] == path.read_bytes()
    for sample in photos:
        with Image.open(io.BytesIO(sample.get("png") or sample["jpg"])) as picture:
            picture.load()
    (video,) = samples(corpora / "real_video")
    assert video["mp4"] == real_media.package_file(*real_media.VIDEO).read_bytes()
    words = json.loads(video["words.json"])
    assert all(word["start"] < word["end"] <= 10.0 for word in words)
    assert all(a["end"] <= b["start"] + 1e-6 for a, b in itertools.pairwise(words))


def test_texts_are_english_and_chinese(corpora: Path):
    english = [sample["txt"].decode() for sample in samples(corpora / "text_english")]
    assert sum(map(len, english)) > 300_000
    assert len(set(english)) == len(english)  # no document twice
    assert np.mean([" the " in text for text in english]) > 0.8
    chinese = [sample["txt"].decode() for sample in samples(corpora / "text_chinese")]
    assert len(chinese) == 64
    share = np.mean([("\u4e00" <= sign <= "\u9fff") for text in chinese for sign in text])
    assert share > 0.6


def test_cut_documents_keep_every_paragraph():
    text = "\n\n".join(f"paragraph {number} " + "x" * 300 for number in range(20))
    documents = real_media.cut_documents(text)
    assert "\n\n".join(documents) == text
    assert len(documents) == 4


def test_missing_package_file_is_the_users_to_mend():
    with pytest.raises(UserError, match="not installed"):
        real_media.package_file("skimage", "data/no_such_picture.png")
    with pytest.raises(UserError, match="no_such_package"):
        real_media.package_file("no_such_package", "a.txt")


def test_missing_packages_are_told_before_anything_is_drawn(tmp_path: Path, monkeypatch):
    there = real_media.importlib.util.find_spec
    monkeypatch.setattr(
        real_media.importlib.util, "find_spec", lambda name: None if name in ("skimage", "iching") else there(name)
    )
    with pytest.raises(UserError, match="iching, skimage"):
        build_corpora(tmp_path / "x", TINY)
    assert not (tmp_path / "x").exists()


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.tar"))}


def test_same_seed_same_bytes_other_seed_others(corpora: Path, tmp_path: Path):
    command = [sys.executable, "-m", "examples.shapes_world.build", f"target={tmp_path / 'again'}"]
    settings = [f"{key}={value}" for key, value in vars(TINY).items() if key != "shuffle_captions"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    assert "shapes_video" in done.stdout
    assert shard_bytes(tmp_path / "again") == shard_bytes(corpora)
    first, again = (folder / "corpus.json" for folder in (corpora, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    build_corpora(tmp_path / "other", replace(TINY, seed=6, num_clips=2, num_edits=2))
    name = "shapes_image_text/000000.tar"
    assert shard_bytes(tmp_path / "other")[name] != shard_bytes(corpora)[name]


def test_a_finished_corpus_is_kept_and_a_damaged_one_is_mended(corpora: Path, monkeypatch: pytest.MonkeyPatch):
    shard = corpora / "shapes_edit" / "000000.tar"
    content, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    num_built = []
    write_datasets = build.write_datasets
    monkeypatch.setattr(build, "write_datasets", lambda *args: num_built.append(1) or write_datasets(*args))
    build_corpora(corpora, TINY)
    assert num_built == []
    assert shard.stat().st_mtime_ns == stamp
    shard.write_bytes(content[:-1] + b"x")
    build_corpora(corpora, TINY)
    assert num_built == [1]
    assert shard.read_bytes() == content


def test_the_control_changes_pairings_only(corpora: Path, tmp_path: Path):
    build_corpora(tmp_path, replace(TINY, shuffle_captions=True))
    for name in ("shapes_image_text", "shapes_video", "shapes_video_text", "shapes_edit"):
        true, shuffled = samples(corpora / name), samples(tmp_path / name)
        moved = 0
        texts: tuple[list[bytes], list[bytes]] = ([], [])
        for one, other in zip(true, shuffled, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                if key in TEXTS:
                    texts[0].append(one[key])
                    texts[1].append(other[key])
                    moved += one[key] != other[key]
                elif not key.startswith("__") or key == "__key__":
                    assert one[key] == other[key]
        assert sorted(texts[0]) == sorted(texts[1])
        assert moved > 0.7 * len(true)
    for name in ("real_photos", "real_video", "text_english", "text_chinese"):
        assert shard_bytes(corpora / name) == shard_bytes(tmp_path / name)


def test_arguments(tmp_path: Path):
    target, config = parse_arguments([f"target={tmp_path}", "seed=3", "shuffle_captions=true"])
    assert target == tmp_path
    assert config == CorpusConfig(seed=3, shuffle_captions=True)
    with pytest.raises(UserError) as caught:
        parse_arguments(["num_image=3", "num_clips=many", "loose"])
    assert all(word in str(caught.value) for word in ("3 problems", "num_image=3", "num_clips=many"))
    with pytest.raises(UserError, match="samples_per_shard"):
        build_corpora(tmp_path / "x", replace(TINY, samples_per_shard=0))
    assert not (tmp_path / "x").exists()
