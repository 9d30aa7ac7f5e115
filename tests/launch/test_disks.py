"""A target that is full or cannot be written: one message that names it, exit code 2, and what was there stays."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_disk import read_only_disk, small_disk
from toy_inference import TEXT_SIZE, TEXTS

from data_pipeline.documents.tokenizers import train_sentencepiece
from data_pipeline.storage.file_errors import check_writable
from launch.command_line import cli
from model.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "why? " * 300}, {"role": "assistant", "content": "so! " * 300}]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tokenizer, a shard of texts, lines of chats."""
    folder = tmp_path_factory.mktemp("inputs")
    train_sentencepiece(TEXTS, folder / "text", TEXT_SIZE)
    (folder / "a.txt").write_text(" ".join(TEXTS) * 400)
    with tarfile.open(folder / "0.tar", "w") as archive:
        archive.add(folder / "a.txt", "a.txt")
    (folder / "chats.jsonl").write_text(f"{json.dumps(CHAT)}\n" * 60)
    return folder


def calls(inputs: Path, disk: Path) -> dict[str, list[str]]:
    tokenize = ["tokenize", f"input={inputs}/0.tar", f"text_tokenizer={inputs}/text"]
    return {
        "tokenize": [*tokenize, f"target={disk}/tokens"],
        "chats": ["chats", f"input={inputs}/chats.jsonl", f"target={disk}/chats"],
        "report": ["report", f"run_folder={disk}"],
        "convert": ["convert", "init", "model=toy", f"target={disk}/fresh"],
        "train": [
            "train",
            "stage=toy_text_tokenizer",
            f"run_folder={disk}",
            f"stage.objective.corpora=[{inputs}/0.tar]",
            "stage.objective.size=320",
        ],
    }


@pytest.mark.parametrize("name", ["tokenize", "chats", "report", "convert", "train"])
def test_a_read_only_target(name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with read_only_disk(tmp_path / "disk") as is_read_only:
        if not is_read_only:
            pytest.skip("nothing can be mounted here")
        assert cli.main(calls(inputs, tmp_path / "disk")[name]) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert str(tmp_path / "disk") in told


@pytest.mark.parametrize("name", ["tokenize", "chats", "report"])
def test_a_full_target(name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 4 if name == "report" else 16) as disk:
        (disk / "report.json").write_text("old")
        assert cli.main(calls(inputs, disk)[name]) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        assert str(disk) in told
        assert (disk / "report.json").read_text() == "old" or not disk.is_mount()
        assert not [path for path in disk.rglob("*.tmp-*") if name == "chats"]


def vision_tokenizer_stage(folder: Path, disk: Path) -> list[str]:
    """Four steps of a small one, a checkpoint every second step."""
    generator = np.random.default_rng(3)
    with tarfile.open(folder / "pictures.tar", "w") as archive:
        for number in range(24):
            Image.fromarray(generator.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / "a.png")
            archive.add(folder / "a.png", f"{number}.png")
            (folder / "a.txt").write_text("noise")
            archive.add(folder / "a.txt", f"{number}.txt")
    names = ("shapes_image_text", "shapes_edit", "shapes_video", "real_photos", "real_video")
    return [
        "train",
        "stage=toy_vision_tokenizer",
        "parallel.data=1",
        f"run_folder={disk}",
        *(f"stage.objective.data.corpora.{name}.path={folder}/pictures.tar" for name in names),
        "stage.objective.data.num_held_back=2",
        "stage.objective.continuous_steps=1",
        "stage.objective.restart_codes_every_steps=0",
        "stage.objective.min_codebook_use=0",
        "stage.objective.model.ch=8",
        "stage.objective.model.ch_mult=[1,1,1,2]",
        "stage.objective.model.n_embed=64",
        "stage.steps=4",
        "stage.optimizer.warmup_steps=0",
        "checkpoint.every_steps=2",
        "logging.wandb_mode=disabled",
    ]


def test_a_vision_tokenizer_goes_on_once_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 2000) as disk:
        if not disk.is_mount():
            pytest.skip("nothing can be mounted here")
        call = vision_tokenizer_stage(tmp_path, disk)
        assert cli.main(call) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        assert "No space left on device" in told
        folder = disk / "vision_tokenizer" / "checkpoints"
        assert [path.name for path in folder.iterdir()] == ["step_00000002"]
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert cli.main(call) == 0
        assert "resumed from step 2" in capsys.readouterr().err
        assert (folder / "step_00000004" / "manifest.json").exists()


def test_what_cannot_be_written_is_asked_without_making_anything(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="Not a directory") as refused:
            check_writable(place)
        assert refused.value.where == str(place)
