"""Evaluation: tasks give prompts and judge what the model answers; this module asks, counts and keeps samples.

A task is any class with the shape of `EvaluationTask`; a configuration names it by dotted path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from model.generation.settings import SamplingConfig
from model.registry import find_class, made_with
from training.inference.prompts import Output, Prompt
from training.reliability.events import tell

WILSON_Z = 1.959964  # of a 95% interval


@dataclass
class EvaluationPrompt:
    """One question of a task. Pictures are uint8 [H, W, 3]."""

    format: str  # t2i | x2i | interleaved | reconstruction
    text: str = ""  # t2i, x2i: the caption or instruction
    images: list[np.ndarray] = field(default_factory=list)  # x2i: sources; reconstruction: the pictures
    parts: list[str | np.ndarray] = field(default_factory=list)  # interleaved: what came so far, in order
    target: Any = None  # read by the task's `judge` only
    image_size: tuple[int, int] = (0, 0)  # height and width in pixels of the pictures to make

    @property
    def pictures(self) -> list[np.ndarray]:
        """What it shows, in order."""
        if self.format != "interleaved":
            return list(self.images)
        return [part for part in self.parts if not isinstance(part, str)]


class EvaluationTask(Protocol):
    """What a task answers for. `judge` returns True/False or a score in [0, 1].

    A task may also have `wanted(prompt) -> list of pictures`, what a right answer looks like, and
    `reason(prompt, images, text) -> str`, why the judge says what it says. Both are asked for answers that are kept to be shown.
    """

    name: str

    def prompts(self) -> Sequence[EvaluationPrompt]: ...
    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool | float: ...


class EvaluationModel(Protocol):
    """What evaluation asks of a model; `training.inference.model.InferenceModel` is one."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, first_index: int = 0
    ) -> list[Output]: ...

    def reconstruct(self, images: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]: ...


def load_task(path: str, arguments: Mapping[str, Any]) -> EvaluationTask:
    """The task of class `package.module.Class`, made with `arguments`."""
    return AskedAgain(made_with(find_class("evaluation task", path, {}, "path"), "evaluation task", arguments, path))


class AskedAgain:
    """A task whose prompts are made once, however many decoders and baselines answer them: frames of videos are dear."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task, self.name = task, getattr(task, "name", "")
        self._prompts: Sequence[EvaluationPrompt] | None = None

    def __getattr__(self, name: str) -> Any:
        """What a task may have beside: `wanted`, `reason`, `rollouts`."""
        return getattr(self.task, name)

    def prompts(self) -> Sequence[EvaluationPrompt]:
        if self._prompts is None:
            self._prompts = list(self.task.prompts())
        return self._prompts

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool | float:
        return self.task.judge(prompt, images, text)


def interval_of(scores: Sequence[float]) -> list[float] | None:
    """95% interval of the share of right answers; None where answers are graded, which a proportion's does not fit."""
    if any(score not in (0.0, 1.0) for score in scores):
        return None
    return list(wilson_interval(sum(scores) / max(1, len(scores)), len(scores)))


def paired_difference(scores: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """How much better `scores` are than `others` on the same prompts: `mean`, and its 95% `interval` (normal; null of less than two prompts).

    Much narrower than the two accuracies' own intervals where the answers agree on most prompts.
    """
    differences, count = np.subtract(scores, others), len(scores)
    mean = float(differences.sum()) / max(1, count)
    if count < 2:
        return {"mean": mean, "interval": None}
    half = WILSON_Z * float(differences.std(ddof=1)) / math.sqrt(count)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if count == 0:
        return 0.0, 1.0
    spread = WILSON_Z**2 / count
    center = (mean + spread / 2) / (1 + spread)
    half = WILSON_Z * math.sqrt(mean * (1 - mean) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def evaluate(
    model: EvaluationModel,
    tasks: Mapping[str, EvaluationTask],
    sampling: SamplingConfig,
    *,
    own_sampling: Mapping[str, SamplingConfig] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    samples_folder: Path | None = None,
    num_samples: int = 8,
    most_prompts: int | None = None,
) -> dict[str, dict[str, Any]]:
    """For each task: `accuracy` (mean score), `count`, `interval` (95%, Wilson; null for graded scores), `seconds`, `scores` and `samples`.

    `scores` has one of each prompt, in their order.
    `own_sampling` is that of the tasks that it names; the others have `sampling`. `most_prompts`: the first of each task, all by default.
    With `samples_folder`, the pictures of the first `num_samples` answers of each task are kept there as PNG files;
    `samples` names them (relative to that folder) with their prompts and scores.
    """
    own = own_sampling or {}
    results: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        started = time.monotonic()
        scores: list[float] = []
        samples: list[dict[str, Any]] = []
        prompts = list(task.prompts())[:most_prompts]
        for prompt, images, text in _answers(model, prompts, own.get(name, sampling), batch_size, seed):
            score = float(task.judge(prompt, images, text))
            assert 0.0 <= score <= 1.0, f"{name}: a score must be in [0, 1], got {score}"
            if samples_folder is not None and len(samples) < num_samples:
                stem = f"{name}_{len(scores):03d}"
                record = _save_sample(samples_folder, stem, prompt, images, text, score)
                samples.append({"group": name} | record | _explained(samples_folder, stem, task, prompt, images, text))
            scores.append(score)
            if len(scores) % batch_size == 0 or len(scores) == len(prompts):
                tell(f"evaluate {name}: {len(scores)} of {len(prompts)}, {np.mean(scores):.3f} so far")
        accuracy = float(np.mean(scores)) if scores else 0.0
        results[name] = {
            "accuracy": accuracy,
            "count": len(scores),
            "interval": interval_of(scores),
            "seconds": time.monotonic() - started,
            "scores": scores,
            "samples": samples,
        }
    return results


def pictures_of(
    model: EvaluationModel, prompts: Sequence[EvaluationPrompt], sampling: SamplingConfig, batch_size: int, seed: int
) -> list[list[np.ndarray]]:
    """The pictures that the model answers to each prompt."""
    return [images for _, images, _ in _answers(model, list(prompts), sampling, batch_size, seed)]


def _answers(
    model: EvaluationModel, prompts: list[EvaluationPrompt], sampling: SamplingConfig, batch_size: int, seed: int
) -> Iterator[tuple[EvaluationPrompt, list[np.ndarray], str]]:
    """Each prompt with the pictures and the text of its answer, asked batch by batch."""
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        for prompt, answer in zip(batch, _answer(model, batch, sampling, seed, first), strict=True):
            yield prompt, *answer


def _answer(
    model: EvaluationModel, prompts: list[EvaluationPrompt], sampling: SamplingConfig, seed: int, first_index: int
) -> list[tuple[list[np.ndarray], str]]:
    """Images and text for each prompt. Reconstructions ask the vision tokenizer only."""
    reconstructions = [prompt.format == "reconstruction" for prompt in prompts]
    if any(reconstructions):
        assert all(reconstructions), "a task asks for reconstructions only, or for none"
        return [(model.reconstruct(prompt.images, prompt.image_size), "") for prompt in prompts]
    questions = [
        Prompt(prompt.format, prompt.text, prompt.images, prompt.parts, prompt.image_size) for prompt in prompts
    ]
    return [(output.images, output.text) for output in model.generate(questions, sampling, seed, first_index)]


def _save_sample(
    folder: Path, stem: str, prompt: EvaluationPrompt, images: list[np.ndarray], text: str, score: float
) -> dict[str, Any]:
    """Writes the pictures of one answer and of its prompt; the record that describes them."""
    words = prompt.text
    if prompt.format == "interleaved":
        words = " ".join(part for part in prompt.parts if isinstance(part, str))
    return {
        "format": prompt.format,
        "prompt": words,
        "prompt_images": _save_pictures(folder, f"{stem}_prompt", prompt.pictures),
        "images": _save_pictures(folder, f"{stem}_answer", images),
        "text": text,
        "score": score,
        "correct": score >= 0.5,
    }


def _explained(
    folder: Path, stem: str, task: EvaluationTask, prompt: EvaluationPrompt, images: list[np.ndarray], text: str
) -> dict[str, Any]:
    """What was wanted and why the judge said so, of tasks that tell."""
    wanted, reason = getattr(task, "wanted", None), getattr(task, "reason", None)
    return {
        "wanted_images": _save_pictures(folder, f"{stem}_wanted", wanted(prompt)) if wanted else [],
        "reason": str(reason(prompt, images, text)) if reason else "",
    }


def _save_pictures(folder: Path, stem: str, pictures: Sequence[np.ndarray]) -> list[str]:
    """The names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}_{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return names
