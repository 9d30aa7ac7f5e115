"""What cannot run is refused by every command that could start it, in the same words, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.command_line import cli

DATA = "stage.data.datasets.one.path=somewhere"
# name: overrides, what the message says, commands that are told them
ILLEGAL = {
    "heads": (["parallel.tensor=3"], "3 does not divide", "train submit plan score reshard"),
    "groups": (["parallel.tensor=4"], "4 does not divide", "train submit plan score reshard"),
    "layers": (["parallel.pipeline=3"], "3 does not divide", "train submit plan score reshard"),
    "none": (["parallel.tensor=0"], "must be positive, got 0", "train submit plan score reshard"),
    "less than none": (["parallel.context=-1"], "must be positive, got -1", "train submit plan score"),
    "recompute": (["parallel.recompute=some"], "choices are none, selective, full", "train submit plan score"),
    "chunks": (
        [
            "parallel.context=2",
            "stage.sequence_length=578",
            "stage.micro_batch_size=1",
            "model.max_sequence_length=578",
        ],
        "its 578 tokens are not a multiple of 4",
        "train submit plan",
    ),
    "rows": (
        ["parallel.context=3", "stage.sequence_length=512"],
        "512 is not a multiple of parallel.tensor * parallel.context = 3",
        "train submit plan",
    ),
    "batch": (
        ["parallel.data=3", "stage.global_batch_size=8"],
        "8 is not a multiple of micro_batch_size * parallel.data",
        "train submit",  # plan says so of the stage's own layout, and offers others
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "fresh"
    assert cli.main(["convert", "init", "model=toy", f"target={folder}"]) == 0
    return folder


def arguments(command: str, overrides: list[str], checkpoint: Path, folder: Path) -> list[str]:
    if command == "score":
        return ["score", f"checkpoint={checkpoint}", "text=a", *overrides]
    if command == "reshard":
        own = [text.removeprefix("parallel.") for text in overrides]
        return ["convert", "reshard", f"source={checkpoint}", f"target={folder / 'out'}", *own]
    own = [
        "model=toy",
        "stage=toy_pretrain_1",
        f"run_folder={folder / 'run'}",
        "parallel.data=1",
        "parallel.tensor=1",
        *overrides,
    ]
    if command == "submit":
        own += ["cluster=slurm", DATA]
    return [command, *own, *([DATA] if command == "train" else [])]


CASES = [(name, command) for name, (_, _, commands) in ILLEGAL.items() for command in commands.split()]


@pytest.mark.parametrize(("name", "command"), CASES)
def test_an_illegal_layout_is_refused_alike(name, command, checkpoint, tmp_path, capsys, monkeypatch):
    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("subprocess.Popen", started)
    overrides, message, _ = ILLEGAL[name]
    assert cli.main([*arguments(command, overrides, checkpoint, tmp_path), "json=true"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_plan_tells_that_the_own_batch_does_not_divide(capsys):
    overrides = ["model=toy", "stage=toy_pretrain_1", *ILLEGAL["batch"][0], "json=true"]
    assert cli.main(["plan", *overrides]) == 0
    own = json.loads(capsys.readouterr().out)["stage_layout"]
    assert not own["possible"]
    assert any(ILLEGAL["batch"][1] in text for text in own["problems"])
