"""docs/own_data.md from its first line to its last, as a reader does it, with fewer steps."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import av
import numpy as np
from documented_files import FENCE, write_shown_files
from PIL import Image
from skimage import data

from launch.command_line import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "own_data.md"
NUM_PHOTOS, NUM_HELD_OUT, FRAMES_PER_SECOND = 20, 4, 4
CUES = "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{}\n\n00:00:01.000 --> 00:00:02.000\n{}\n"
# What makes it short: the commands that train, by a word of theirs.
SHORTER = {
    "stage=small_vision_tokenizer": ["stage.steps=4", "stage.optimizer.warmup_steps=0", "stage.global_batch_size=2"]
    + ["stage.micro_batch_size=2", "stage.objective.continuous_steps=2", "stage.objective.min_codebook_use=0.0"],
    "stage=mine": ["stage.steps=4", "stage.optimizer.warmup_steps=0", "stage.global_batch_size=1"]
    + ["stage.micro_batch_size=1"],
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


def test_the_page_leads_from_a_folder_of_photos_to_a_picture(tmp_path, monkeypatch, capsys):
    make_media(tmp_path)
    write_shown_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    for language, marks, body in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        for line in body.splitlines():
            if language == "bash" and not marks.strip():
                subprocess.run(shlex.split(line), check=True)
            elif language == "console" and line.startswith("$ nextstate "):
                words = shlex.split(line)[2:]
                shorter = [key for word in words for key in SHORTER.get(word, ())]

                assert cli.main([*words, *shorter]) == 0, (line, capsys.readouterr().err)
    picture = Image.open(next((tmp_path / "pictures").rglob("*.png")))
    assert picture.size == (128, 128)
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert '"held_out_loss"' in (tmp_path / "runs" / "mine" / "mine" / "metrics.jsonl").read_text()
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 4
