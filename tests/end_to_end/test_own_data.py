"""docs/own_data.md and docs/fine_tune.md from their first line to their last, as a reader does it, at smaller sizes."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from documented_files import FENCE, standing_in, write_shown_files
from handmade_vision import save_vision_tokenizer
from PIL import Image
from skimage import data

from launch.command_line import cli
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import initialize_weights

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "own_data.md"
NUM_PHOTOS, NUM_HELD_OUT, FRAMES_PER_SECOND = 20, 4, 4
CUES = "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{}\n\n00:00:01.000 --> 00:00:02.000\n{}\n"
# What makes it short: the commands that train, by a word of theirs.
SHORTER = {
    "stage=small_vision_tokenizer": ["stage.steps=4", "stage.optimizer.warmup_steps=0", "stage.global_batch_size=2"]
    + ["stage.micro_batch_size=2", "stage.objective.continuous_steps=2", "stage.objective.min_codebook_use=0.0"]
    + ["stage.objective.data.views=[{area: 4096}]"],
    "image.max_area=16384": ["image.max_area=4096"],
    "stage=mine": ["stage.steps=4", "stage.optimizer.warmup_steps=0", "stage.global_batch_size=1"]
    + ["stage.micro_batch_size=1"],
    "image_size=128": ["image_size=64"],
    "evaluation=mine": ["tasks.like_its_photo.side=64"],
}


def sentences() -> list[str]:
    """Captions of many words: those of our own pages."""
    text = " ".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    return re.findall(r"[A-Z][a-z]+ [a-z ,]{30,100}\.", text)


def make_media(folder: Path) -> None:
    """Photos with captions and clips with subtitles, cut out of photographs."""
    photographs, captions = [data.astronaut(), data.coffee(), data.chelsea()], sentences()
    places = np.random.default_rng(0).integers(0, 150, (NUM_PHOTOS + NUM_HELD_OUT, 2))
    for number, (top, left) in enumerate(places):
        home = folder / ("photos" if number < NUM_PHOTOS else "photos_held_out")
        home.mkdir(exist_ok=True)
        photo = photographs[number % 3][top : top + 130, left : left + 150]
        Image.fromarray(photo).save(home / f"{number:04d}.jpg")
        (home / f"{number:04d}.txt").write_text(captions[number], encoding="utf-8")
    (folder / "clips").mkdir()
    for number, photograph in enumerate(photographs[:2]):
        with av.open(folder / "clips" / f"walk_{number}.mp4", "w") as file:
            stream = file.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
            stream.width = stream.height = 128
            for step in range(2 * FRAMES_PER_SECOND):
                view = np.ascontiguousarray(photograph[20 * step :][:128, 20 * step :][:, :128])
                file.mux(stream.encode(av.VideoFrame.from_ndarray(view)))
            file.mux(stream.encode())
        (folder / "clips" / f"walk_{number}.vtt").write_text(CUES.format(*captions[-2 - number :][:2]))


# The released model and its training at toy size, by a word of the page's command.
SMALL_RELEASE = {
    "model=emu35_34b": ["model=toy", "model.vocabulary.text_size=320", "model.vocabulary.visual_size=64"],
    "vocabulary.preset=emu35": ["vocabulary.preset=compact", "image.max_area=2304"],
    "sequence_length=4096": ["sequence_length=512"],
    "train": [
        "stage.steps=2",
        "stage.sequence_length=512",
        "stage.global_batch_size=2",
        "stage.optimizer.warmup_steps=0",
    ]
    + ["parallel.tensor=1", "parallel.data=1"],
    "convert": ["verify=none"],
    "image_size=512": ["image_size=48"],
}


RELEASED_VISION = VisionTokenizerConfig(
    ch=32,
    ch_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    attn_resolutions=[6],
    resolution=48,
    z_channels=8,
    embed_dim=8,
    n_embed=64,
)


def released(folder: Path) -> None:
    """What a reader has downloaded: a model with its text tokenizer, and a vision tokenizer; and chats of his own."""
    small = SMALL_RELEASE["model=emu35_34b"]
    run("convert", "init", *small, f"target={folder / 'fresh'}", "seed=3", "verify=none")
    run(
        "convert",
        "to_hf",
        f"source={folder / 'fresh'}",
        f"target={folder / 'released/Emu3.5'}",
        "layout=emu35",
        "verify=none",
    )
    shutil.rmtree(folder / "released/Emu3.5/nextstate")  # ours only
    (folder / "texts").mkdir()
    shard = folder / "texts/000000.tar"
    with tarfile.open(shard, "w") as tar:
        for number, sentence in enumerate(sentences() * 3):
            member = tarfile.TarInfo(f"{number:04d}.txt")
            member.size = len(sentence.encode())
            tar.addfile(member, io.BytesIO(sentence.encode()))
    corpora = f'stage.objective.corpora=["{shard}"]'
    run("train", "stage=text_tokenizer", f"run_folder={folder}", corpora, "stage.objective.size=320")
    shutil.copy(folder / "text_tokenizer/tokenizer.model", folder / "released/Emu3.5")
    vision = IBQ(RELEASED_VISION)
    initialize_weights(vision, 0)
    save_vision_tokenizer(folder / "codes", vision)
    target = f"target={folder / 'released/Emu3.5-VisionTokenizer'}"
    run("convert", "to_hf", f"source={folder / 'codes'}", target, "layout=ibq", "verify=none")
    (folder / "pictures").mkdir()
    chats = []
    for number in range(24):
        Image.fromarray(np.full((48, 48, 3), 10 * number, np.uint8)).save(folder / f"pictures/{number}.png")
        turns = [{"role": "user", "content": f"draw grey {number}"}, {"role": "assistant", "content": "<image>"}]
        chats.append({"messages": turns, "images": [f"{number}.png"], "task": "t2i"})
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))


def smaller(words: list[str]) -> list[str]:
    """A line of the page: words with a value are replaced, a command is followed by more."""
    replaced = [one for word in words for one in (SMALL_RELEASE.get(word, [word]) if "=" in word else [word])]
    return [*replaced, *SMALL_RELEASE.get(words[0], [])]


def run(*words: str) -> None:
    assert cli.main(list(words)) == 0, words


@pytest.fixture
def own_folder(tmp_path):
    with standing_in(tmp_path):
        yield tmp_path


def test_a_released_checkpoint_is_tuned_and_exported(own_folder, capsys):
    released(own_folder)
    page = PAGE.with_name("fine_tune.md")
    write_shown_files(page, own_folder)
    for language, marks, body in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in body.splitlines() if language == "console" and not marks.strip() else ():
            run(*smaller(shlex.split(line)[2:]))
    exported = json.loads((own_folder / "tuned_export/config.json").read_text())
    assert exported["num_hidden_layers"] == 4
    assert list((own_folder / "pictures_made").rglob("*.png"))


def test_the_page_leads_from_a_folder_of_photos_to_a_picture(own_folder, capsys):
    make_media(own_folder)
    write_shown_files(PAGE, own_folder)
    for language, marks, body in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        for line in body.splitlines():
            if language == "bash" and not marks.strip():
                subprocess.run(shlex.split(line), check=True)
            elif language == "console" and line.startswith("$ nextstate "):
                words = shlex.split(line)[2:]
                shorter = [key for word in words for key in SHORTER.get(word, ())]

                assert cli.main([*words, *shorter]) == 0, (line, capsys.readouterr().err)
    picture = Image.open(next((own_folder / "pictures").rglob("*.png")))
    assert picture.size == (64, 64)
    report = (own_folder / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "<dt>like its photo</dt>" in report
    assert report.count('<div class="wanted"') == NUM_HELD_OUT
    assert '"held_out_loss"' in (own_folder / "runs" / "mine" / "mine" / "metrics.jsonl").read_text()
    assert len(list((own_folder / "pictures").rglob("*.png"))) == 4
