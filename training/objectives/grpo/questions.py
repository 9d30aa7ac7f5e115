"""The prompts of reinforcement learning: where they come from, and in which order they are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.sources.image import decode_image
from data_pipeline.sources.samples import SampleError
from model.durable import fingerprint_of
from model.errors import UserError
from model.registry import find_class, made_with
from training.inference.prompts import FORMATS, Prompt, is_unicode
from training.objectives.grpo.grpo_options import PromptsEntry

KEY = "stage.objective.prompts"
SOURCES = {"file": "training.objectives.grpo.questions.PromptFile"}


@dataclass
class Question:
    """A prompt, and what its rewards know of the answer that is wanted (JSON values)."""

    prompt: Prompt
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return self.prompt.text or " ".join(part for part in self.prompt.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[np.ndarray]:
        return self.prompt.images or [part for part in self.prompt.parts if not isinstance(part, str)]


class QuestionSource(Protocol):
    """What a class named by dotted path has."""

    def questions(self) -> Sequence[Question]:
        """The same list for the same arguments."""
        ...


@dataclass
class PromptFile:
    """JSON lines: {"text": ..., "format": "t2i", "images": [paths], "image_size": [h, w], "task": ..., "fields": {}}.

    Of these only `text` is needed. Paths are relative to the file. With `task`, other tasks' lines are left out, and
    every line must name its own.
    """

    path: str
    task: str | None = None
    image_size: tuple[int, int] = (0, 0)  # height and width in pixels, of lines without one

    def questions(self) -> list[Question]:
        """Raises `UserError` that names the line."""
        file = Path(self.path)
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the prompts cannot be read", where=str(file), got=str(error)) from error
        read = [self._read(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        return [question for question in read if question is not None]

    def _read(self, file: Path, number: int, line: str) -> Question | None:
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError("not a JSON object", where=where, got=str(error)) from error
        known = {"text", "format", "images", "image_size", "task", "fields"}
        if not isinstance(values, dict) or not isinstance(values.get("text"), str) or not values["text"].strip():
            raise UserError("not a prompt", where=where, expected='{"text": "..."}', got=line[:80])
        if values.keys() - known:
            expected = ", ".join(sorted(known))
            raise UserError("unknown keys", where=where, expected=expected, got=", ".join(values.keys() - known))
        if self.task is not None:
            if not values.get("task"):
                raise UserError("a prompt without a task", where=where, fix='"task": "t2i", or no task= of the file')
            if values["task"] != self.task:
                return None
        if values.get("format", "t2i") not in FORMATS[:2]:
            raise UserError("unknown format", where=where, expected="t2i, x2i", got=str(values["format"]))
        size, fields, names = (
            values.get("image_size", list(self.image_size)),
            values.get("fields", {}),
            values.get("images", []),
        )
        is_size = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side >= 0 for side in size)
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not is_size or not are_names or not isinstance(fields, dict) or not is_unicode(values):
            expected = '"image_size": [height, width], "images": [paths], "fields": {...}, all texts Unicode'
            raise UserError("a value does not fit", where=where, expected=expected, got=line[:80])
        images = [_picture(file.parent / name, where) for name in names]
        prompt = Prompt(values.get("format", "t2i"), values["text"], images, image_size=(size[0], size[1]))
        return Question(prompt, fields)


def _picture(path: Path, where: str) -> np.ndarray:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError, SampleError) as error:  # ValueError: a name with a zero byte
        raise UserError("a picture of a prompt cannot be read", where=f"{where}: {path}", got=str(error)) from error


@dataclass(frozen=True)
class Place:
    """One prompt in the order of asking."""

    task: str
    question: Question


class QuestionOrder:
    """All tasks' prompts in one endless order: prompt k is a function of (seed, k).

    Tasks take turns by their weights, so that any stretch holds all of them; within a task every prompt comes once
    before one comes again, in another order each time.
    """

    def __init__(self, entries: Mapping[str, PromptsEntry], seed: int):
        used = {task: entry for task, entry in entries.items() if entry.weight > 0}
        self.questions = {task: load_questions(task, entry) for task, entry in used.items()}
        total = sum(entry.weight for entry in used.values())
        self._shares = {task: entry.weight / total for task, entry in used.items()}
        self._seed = seed
        self._turns: list[tuple[str, int]] = []  # (task, how many of it came before)
        self._counts = dict.fromkeys(used, 0)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        words = {task: [one.words for one in questions] for task, questions in self.questions.items()}
        return fingerprint_of([words, self._shares])

    def take(self, first: int, count: int) -> list[Place]:
        return [self._place(number) for number in range(first, first + count)]

    def _place(self, number: int) -> Place:
        while len(self._turns) <= number:
            behind = {task: share * (len(self._turns) + 1) - self._counts[task] for task, share in self._shares.items()}
            task = max(behind, key=lambda name: behind[name])
            self._turns.append((task, self._counts[task]))
            self._counts[task] += 1
        task, index = self._turns[number]
        questions = self.questions[task]
        lap, place = divmod(index, len(questions))
        return Place(task, questions[int(self._order(task, lap)[place])])

    def _order(self, task: str, lap: int) -> np.ndarray:
        key = list(self.questions).index(task), lap
        if key not in self._orders:
            self._orders[key] = np.random.default_rng([self._seed, *key]).permutation(len(self.questions[task]))
        return self._orders[key]


def load_questions(task: str, entry: PromptsEntry, prompts_key: str = KEY) -> list[Question]:
    """The prompts of one task; `prompts_key` is where the configuration names them, for messages."""
    key = f"{prompts_key}.{task}"
    source: QuestionSource = made_with(
        find_class("source of prompts", entry.path, SOURCES, f"{key}.path"), "source of prompts", entry.options, key
    )
    questions = list(source.questions())
    if not questions:
        fix = f"{key}.weight=0" if prompts_key == KEY else ""
        raise UserError("a task has no prompts", where=key, got=f"{entry.path} gave none", fix=fix)
    return questions
