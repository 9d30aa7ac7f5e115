"""The inputs in `cases/`, tokenized by the command: one job over all shards, and one for each tokenizer."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from handmade_vision import save_vision_tokenizer

from data_pipeline.documents.builder import describe
from data_pipeline.documents.prompts import EMPTY_PROMPTS
from data_pipeline.documents.tokenizers import TextTokenizer, load_text_tokenizer, train_sentencepiece
from data_pipeline.sources.image import decode_image
from data_pipeline.storage.segments import Kind
from data_pipeline.storage.token_files import TokenFileReader
from launch.command_line.cli import main
from launch.inspection.contents import vocabulary_of

CASES = Path(__file__).parent / "cases"
# By shard: documents as `describe` shows them, the picture's grid left out; then quarantined samples by key.
PICTURE = "<image>"
EXPECTED: dict[str, tuple[list[str], dict[str, str]]] = {
    "cjk_spacing/t": ([f"你好 我是小明 {PICTURE} 他说：“真的……吗？”——是的 {PICTURE}"], {}),
    "gray16_png/t": ([f"8 bits {PICTURE}", f"16 bits {PICTURE}"], {}),
    "non_square_pixels/t": ([f"a test picture {PICTURE}"], {}),
    "poison_epoch_transcript/t": ([f"a good one {PICTURE}"], {"bad": "bad_transcript"}),
    "poison_lone_surrogate/t": ([f"a good one {PICTURE}"], {"bad": "corrupt_text"}),
    "poison_time_stamp_jump/t": ([f"a good one {PICTURE}"], {"b": "bad_time_stamps"}),
    "poison_unknown_codec/t": ([f"a good one {PICTURE}", f"another good one {PICTURE}"], {"b": "undecodable_video"}),
    "srt_arrow_without_spaces/t": ([f"no space around arrow {PICTURE} normal cue {PICTURE}"], {}),
    "srt_without_blank_lines/t": (
        [f"first line here second {PICTURE} line here third line here {PICTURE}"],
        {},
    ),
    "tar_order_and_links/hardlinks": (
        [f"hardlinked picture 0 {PICTURE}"],
        {"./0001": "link_in_tar", "./0002": "link_in_tar"},
    ),
    "tar_order_and_links/symlinks": ([], dict.fromkeys(["./0000", "./0001", "./0002"], "link_in_tar")),
    "tar_order_and_links/unsorted": ([f"caption {number} {PICTURE}" for number in range(4)], {}),
    # The words at 2 s and 5.5 s come before the frame at 7 s: the video begins 5 s after the sound.
    "video_starts_late/t": ([f"early second {PICTURE} late"], {}),
    "whisperx_words_without_times/t": ([f"we paid $43,000. {PICTURE} {PICTURE} Then"], {}),
    "whitespace_line_in_cue/t": ([f"word after a line of one space {PICTURE} second {PICTURE}"], {}),
    "youtube_auto_vtt/t": (
        [f"good morning everyone today {PICTURE} we are going to bake a loaf of bread {PICTURE}"],
        {},
    ),
}  # fmt: skip
Tokenize = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, and `tokens/media`: all shards of pictures and video in one job."""
    folder = tmp_path_factory.mktemp("cases")
    train_sentencepiece([*dir(np), *EMPTY_PROMPTS] * 20, folder / "text", 420)
    save_vision_tokenizer(folder / "vision")
    shards = [str(CASES / f"{name}.tar") for name in sorted(EXPECTED)]
    arguments = [
        f"input=[{','.join(shards)}]",
        f"target={folder / 'tokens/media'}",
        f"text_tokenizer={folder / 'text'}",
    ]
    arguments += [f"vision_tokenizer={folder / 'vision'}", "image.max_area=4096", "max_quarantined_share=1"]
    assert main(["tokenize", *arguments]) == 0
    return folder


def documents(prefix: Path, tokenizer: TextTokenizer) -> list[str]:
    reader = TokenFileReader(prefix)
    vocabulary = vocabulary_of(reader.manifest)
    return [describe(reader.tokens(number), vocabulary, tokenizer) for number in range(len(reader))]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_shard_has_its_right_answer(folder: Path, name: str) -> None:
    prefix = folder / "tokens/media" / f"{sorted(EXPECTED).index(name):06d}"
    texts, quarantined = EXPECTED[name]
    found = documents(prefix, load_text_tokenizer(folder / "text"))
    without_grids = [
        " ".join("<image>" if "*" in word else word for word in text.replace("<image ", "").split()) for text in found
    ]
    assert without_grids == [f"<bos> {text} <eos>" for text in texts]
    path = prefix.with_name(f"{prefix.name}.quarantine.jsonl")
    listed = [json.loads(line) for line in path.read_text().splitlines()] if quarantined else []
    assert {entry["key"]: entry["reason"] for entry in listed} == quarantined
    assert TokenFileReader(prefix).manifest["quarantined"] == dict(Counter(quarantined.values()))


def images(folder: Path, name: str) -> np.ndarray:
    reader = TokenFileReader(folder / "tokens/media" / f"{sorted(EXPECTED).index(name):06d}")
    segments = reader.all_segments()
    return segments[segments["kind"] == Kind.IMAGE]


def test_pixels_that_are_not_square_are_shown_16_to_9(folder: Path) -> None:
    (image,) = images(folder, "non_square_pixels/t")
    assert image["grid_width"] / image["grid_height"] == pytest.approx(16 / 9, rel=0.1)


def test_frames_stand_at_their_times_of_presentation(folder: Path) -> None:
    (frame,) = images(folder, "video_starts_late/t")
    assert (
        5_500 < frame["time_ms"] < 8_500
    )  # the file's video lasts from 5 s on; "second" is said at 5.5 s, "late" at 8.5 s
    assert images(folder, "youtube_auto_vtt/t")["time_ms"].tolist() == [2400, 7400]


def test_documents_of_all_shards_have_ids_of_their_own(folder: Path) -> None:
    """Thirteen of these shards are called t.tar, and keys repeat."""
    ids = [
        int(segment["document"])
        for number in range(len(EXPECTED))
        for segment in TokenFileReader(folder / f"tokens/media/{number:06d}").all_segments()
        if segment["flags"] & 1
    ]
    assert len(ids) == len(set(ids)) == sum(len(texts) for texts, _ in EXPECTED.values())


def test_sixteen_bits_of_grey_are_the_ramp_that_ffmpeg_reads() -> None:
    with tarfile.open(CASES / "gray16_png/t.tar") as archive:
        data = archive.extractfile("sixteen.png").read()  # type: ignore[union-attr]
    with av.open(io.BytesIO(data)) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    found = decode_image(data)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len(np.unique(found)) > 40
    assert (np.diff(found[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize("saved", ["plain", "trunc", "pad"])
def test_saved_truncation_and_padding_change_no_text(folder: Path, tmp_path: Path, saved: str) -> None:
    case = CASES / "hf_tokenizer_truncation"
    file = case / saved / "tokenizer.json"
    assert main(["tokenize", f"input={case / 't.tar'}", f"target={tmp_path / 'out'}", f"text_tokenizer={file}"]) == 0
    with tarfile.open(case / "t.tar") as archive:
        texts = [archive.extractfile(name).read().decode() for name in archive.getnames()]  # type: ignore[union-attr]
    tokenizer = load_text_tokenizer(file)
    reader = TokenFileReader(tmp_path / "out/000000")
    bodies = [reader.tokens(number)[1:-1].tolist() for number in range(len(reader))]
    assert [tokenizer.decode(body) for body in bodies] == [text.strip() for text in texts]
    plain = load_text_tokenizer(case / "plain/tokenizer.json")
    assert bodies == [plain.encode(text.strip()) for text in texts]


def test_a_vocabulary_with_holes_has_room_for_its_largest_id(tmp_path: Path) -> None:
    case = CASES / "hf_tokenizer_with_holes"
    shutil.copytree(case, tmp_path / "case")
    file = tmp_path / "case/sparse/tokenizer.json"
    largest = max(json.loads(file.read_text())["model"]["vocab"].values())
    arguments = [f"input={tmp_path / 'case/t.tar'}", f"target={tmp_path / 'out'}", f"text_tokenizer={file}"]
    assert main(["tokenize", *arguments]) == 0
    reader = TokenFileReader(tmp_path / "out/000000")
    vocabulary = vocabulary_of(reader.manifest)
    assert vocabulary.text_size == largest + 1
    for number in range(len(reader)):
        body = reader.tokens(number)[1:-1]
        assert body.max() <= largest
        assert reader.tokens(number)[0] == vocabulary.bos > largest
