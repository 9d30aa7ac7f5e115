"""What a run leaves in its folder, read leniently: what is missing is absent, what is damaged is left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint.small_files import read_yaml
from model.errors import UserError
from training.config import translated
from training.contracts.summary import StageSummary
from training.objectives.rows_read import coverage_of_stage

CURRICULUM_NAME, SUMMARY_NAME, METRICS_NAME, CONFIG_NAME = (
    "curriculum.json",
    "summary.json",
    "metrics.jsonl",
    "config.yaml",
)
TAIL_BYTES = 1_000_000  # of metrics.jsonl: long enough for the newest line that measured held-out rows


class Damages:
    """What could not be read: a line a file, in the order of reading."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def note(self, path: Path, what: object) -> None:
        self.found[str(path)] = " ".join(str(what).split())

    def told(self) -> list[str]:
        return [f"{path}: {what}" for path, what in self.found.items()]


def read_object(path: Path, damages: Damages) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    if path.exists() and not path.is_file():  # a pipe would be waited on
        damages.note(path, "not a file")
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        damages.note(path, error)
        return {}
    if not isinstance(value, dict):
        damages.note(path, f"a JSON object is expected, not {type(value).__name__}")
        return {}
    return value


def parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many complete lines are none; the last may be being written."""
    *complete, last = content.split(b"\n")
    values = [value for line in complete if (value := parse_object(line)) is not None]
    unfinished = parse_object(last)
    return values + ([unfinished] if unfinished is not None else []), len(complete) - len(values)


def parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class StageFolder:
    """The files of one training stage."""

    def __init__(self, path: Path, damages: Damages | None = None):
        self.path, self.damages = path, Damages() if damages is None else damages

    def summary(self) -> StageSummary | None:
        """None where the stage has not ended, or its summary is damaged."""
        values = read_object(self.path / SUMMARY_NAME, self.damages)
        try:
            return StageSummary.of(values) if values else None
        except ValueError as error:
            self.damages.note(self.path / SUMMARY_NAME, error)
            return None

    def metrics(self) -> list[dict[str, Any]]:
        """A line a logged step, those with a step and a loss that are numbers or null."""
        path = self.path / METRICS_NAME
        if not path.is_file():
            return []
        lines, num_damaged = parse_lines(path.read_bytes())
        good = [line for line in lines if is_step(line)]
        num_damaged += len(lines) - len(good)
        if num_damaged:
            self.damages.note(path, f"{num_damaged} of {len(good) + num_damaged} lines are damaged and left out")
        return good

    def last_metrics(self) -> list[dict[str, Any]]:
        """The newest lines only; the first of them may be cut."""
        path = self.path / METRICS_NAME
        if not path.is_file():
            return []
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines, _ = parse_lines(stream.read())
        return [line for line in lines if is_step(line)]

    def data_read(self) -> dict[str, dict[str, float]]:
        """What the curriculum had read of each dataset at the newest checkpoint; empty where none says so."""
        try:
            return coverage_of_stage(self.path)
        except (UserError, KeyError, TypeError, ValueError) as error:
            self.damages.note(self.path, error)
            return {}

    def configuration(self) -> dict[str, Any]:
        """As it was written when the stage started last, with what ran it and where; empty where there is none."""
        path = self.path / CONFIG_NAME
        try:
            values = read_yaml(path, "the stage's configuration")
        except UserError as error:
            if path.exists():
                self.damages.note(path, error.what + (f": {error.got}" if error.got else ""))
            return {}
        return translated(values)

    def settings(self) -> dict[str, Any]:
        """The section `stage` of its configuration; empty where there is none."""
        stage = self.configuration().get("stage")
        return stage if isinstance(stage, dict) else {}


def is_step(line: dict[str, Any]) -> bool:
    """A step, and losses that are numbers or null."""
    losses = [value for name, value in line.items() if name.startswith("loss") and not name.startswith("loss_by_")]
    return isinstance(line.get("step"), int) and all(is_number(value) or value is None for value in losses)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class RunFolder:
    """A curriculum's folder: its state, its stages, its evaluations."""

    def __init__(self, path: Path):
        self.path, self.damages = path, Damages()

    def curriculum(self) -> dict[str, Any]:
        return read_object(self.path / CURRICULUM_NAME, self.damages)

    def stages(self) -> list[tuple[StageFolder, StageSummary]]:
        """Transformer stages that finished, in the order of the curriculum's entries, then by name."""
        found = []
        for path in self.path.glob(f"*/{SUMMARY_NAME}"):
            folder = StageFolder(path.parent, self.damages)
            summary = folder.summary()
            is_transformer = path.parent.name != "vision_tokenizer"
            if summary is not None and is_transformer and "loss_last" in summary.values:
                found.append((folder, summary))
        entries = self.curriculum().get("entries")
        names = list(entries) if isinstance(entries, dict) else []

        def place(stage: tuple[StageFolder, StageSummary]) -> tuple[int, str]:
            name = stage[0].path.name
            return (names.index(name) if name in names else len(names), name)

        return sorted(found, key=place)

    def tokenizer(self) -> StageSummary | None:
        return StageFolder(self.path / "vision_tokenizer", self.damages).summary()

    def tokenizer_metrics(self) -> list[dict[str, Any]]:
        return StageFolder(self.path / "vision_tokenizer", self.damages).metrics()

    def evaluations(self) -> dict[str, dict[str, Any]]:
        return {
            path.stem: read_object(path, self.damages) for path in sorted((self.path / "evaluation").glob("*.json"))
        }
