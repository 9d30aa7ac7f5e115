"""The reward of a run: several signals for each answer, each on [1, 10], weighted to one number.

*General* rewards judge the answers of all tasks, *task-specific* ones those of the tasks that they name. *Guards* are
judged and shown and never optimised: where the reward rises and they fall, the model learns to please its judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.durable import fingerprint_of
from model.errors import Problems, UserError
from training.rewards.base import Answer, Reward, Scores, scores_of
from training.rewards.registry import REWARDS, make_reward
from training.rewards.scale import LOWEST, Scale, Scales, fitted

Ask = Callable[[Reward, Sequence[Answer]], Scores]


@dataclass
class RewardEntry:
    """One signal."""

    path: str = "???"  # a name of ours, or package.module.Class of your own
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class
    weight: float = 1.0  # in the weighted mean; 0: shown, not optimised
    tasks: list[str] = field(default_factory=list)  # whose answers it judges; empty: all
    range: list[float] | None = None  # raw scores that are 1 and 10; null: quantiles of the file of scales
    guard: bool = False  # held out: never part of the reward, an alarm when it falls while the reward rises


@dataclass
class RewardsConfig:
    signals: dict[str, RewardEntry] = field(default_factory=dict)  # name -> what judges answers
    scales: str | None = None  # file of frozen quantiles; needed where a signal has no range
    max_missing_share: float = 0.1  # of all scores of a batch; above, the run stops: something is broken

    def validate(self, problems: Problems, key: str) -> None:
        learnt = [entry for entry in self.signals.values() if not entry.guard and entry.weight > 0]
        problems.check(bool(learnt), f"{key}.signals", "no signal has a weight: there is nothing to learn from")
        problems.check(0 <= self.max_missing_share < 1, f"{key}.max_missing_share", "must be in [0, 1)")
        for name, entry in self.signals.items():
            where = f"{key}.signals.{name}"
            problems.check(
                entry.path in REWARDS or "." in entry.path,
                f"{where}.path",
                f"there is no reward {entry.path!r}; choices are {', '.join(REWARDS)}, or package.module.Class",
            )
            problems.check(entry.weight >= 0, f"{where}.weight", "must not be negative")
            if entry.range is None:
                problems.check(self.scales is not None, f"{where}.range", f"needs a range, or {key}.scales=FILE")
            else:
                spread = len(entry.range) == 2 and entry.range[0] < entry.range[1]
                problems.check(
                    spread, f"{where}.range", "must be two numbers, the lower one first", f"{where}.range=[0,1]"
                )


@dataclass(frozen=True)
class Signal:
    """A reward as it is made, with its place in the system."""

    name: str
    reward: Reward
    entry: RewardEntry

    def judges(self, task: str) -> bool:
        return not self.entry.tasks or task in self.entry.tasks

    @property
    def weight(self) -> float:
        return 0.0 if self.entry.guard else self.entry.weight


@dataclass(frozen=True)
class Judgements:
    """Of n answers; NaN where a score is missing or a signal does not judge the answer's task."""

    totals: np.ndarray  # float64 [n] in [1, 10]; NaN: an answer to leave out of its group
    signals: dict[str, np.ndarray]  # name -> float64 [n] in [1, 10]
    raw: dict[str, np.ndarray]  # name -> float64 [n], in the reward's own unit
    weights: dict[str, np.ndarray]  # name -> float64 [n]; 0 where it does not judge, and of guards
    acceptable: np.ndarray  # bool [n]; False: no scorer was asked, every signal is the lowest
    faults: dict[str, dict[str, int]]  # name -> why scores are missing -> how many

    def metrics(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Means by task and signal, and what is missing, as they go to metrics.jsonl."""
        names = np.array(tasks, dtype=object)
        found: dict[str, Any] = {"reward": _mean(self.totals)}
        for task in sorted(set(tasks)):
            chosen = names == task
            found[f"reward/{task}"] = _mean(self.totals[chosen])
            for name, values in self.signals.items():
                if np.isfinite(values[chosen]).any():
                    found[f"signal/{task}/{name}"] = _mean(values[chosen])
        found["answers_refused"] = int((~self.acceptable).sum())
        found["scores_missing"] = {name: sum(reasons.values()) for name, reasons in self.faults.items()}
        return found


class RewardSystem:
    """Asks every signal, brings what it says to one scale and weighs it.

    `ask` puts a batch to one reward: in this process by default. Raises `UserError` for unknown rewards.
    """

    def __init__(self, config: RewardsConfig, key: str = "rewards", ask: Ask = scores_of):
        self.config = config
        self.scales = Scales.load(Path(config.scales)) if config.scales else Scales({})
        self._ask = ask
        self.signals = [
            Signal(name, make_reward(entry.path, entry.options, f"{key}.signals.{name}"), entry)
            for name, entry in config.signals.items()
        ]

    def describe(self) -> dict[str, Any]:
        """What decides every score: for the checkpoint's manifest, where a run that goes on finds it unchanged."""
        signals = {
            one.name: {
                "version": one.reward.version,
                "weight": one.weight,
                "tasks": one.entry.tasks,
                "range": one.entry.range,
            }
            for one in self.signals
        }
        described = {"signals": signals, "scales": self.scales.version}
        return described | {"version": fingerprint_of(described)}

    def check_unchanged(self, described: Mapping[str, Any]) -> None:
        """Raises `UserError` where a checkpoint was trained with other signals, weights or scales."""
        now = self.describe()
        if described.get("version") == now["version"]:
            return
        before = described.get("signals", {})
        changed = sorted(
            name for name in before.keys() | now["signals"] if before.get(name) != now["signals"].get(name)
        )
        if described.get("scales") != now["scales"]:
            changed.append("the file of scales")
        raise UserError(
            "the rewards are not those that this stage began with",
            where=", ".join(changed),
            expected="the same signals, weights, versions and scales from the first step to the last",
            got=f"version {now['version'][:8]} instead of {str(described.get('version'))[:8]}",
            fix="set them back, or begin a new stage",
        )

    def check_task(self, task: str) -> None:
        """Raises `UserError` where no signal that counts judges a task, or one has no scale for it: at start."""
        judges = [one for one in self.signals if one.judges(task)]
        if not task or not any(one.weight for one in judges):
            raise UserError(
                f"no reward judges the task {task!r}" if task else "a prompt has no task",
                where="prompts",
                expected="a task with at least one signal of positive weight",
                got=", ".join(f"{one.name}: {', '.join(one.entry.tasks) or 'all tasks'}" for one in self.signals),
            )
        for one in judges:
            self.scale_of(one, task)

    def scale_of(self, signal: Signal, task: str) -> Scale:
        if signal.entry.range is not None:
            low, high = signal.entry.range
            return Scale(low, high, signal.reward.version, num_answers=0)
        return self.scales.find(task, signal.name, signal.reward.version)

    def judge(self, answers: Sequence[Answer]) -> Judgements:
        """Raises `UserError` when more scores are missing than `max_missing_share`."""
        acceptable = np.array([is_acceptable(answer) for answer in answers], dtype=bool)
        raw, signals, weights, faults = {}, {}, {}, {}
        for signal in self.signals:
            judged = np.array([signal.judges(answer.task) for answer in answers], dtype=bool)
            asked = np.flatnonzero(judged & acceptable).tolist()
            scores = self._ask(signal.reward, [answers[index] for index in asked])
            raw[signal.name] = np.full(len(answers), np.nan)
            signals[signal.name] = np.where(judged & ~acceptable, LOWEST, np.nan)
            for index, value in zip(asked, scores.values, strict=True):
                if value is not None:
                    raw[signal.name][index] = value
                    signals[signal.name][index] = self.scale_of(signal, answers[index].task).applied(value)
            weights[signal.name] = np.where(judged, signal.weight, 0.0)
            faults[signal.name] = scores.faults
        self._refuse_too_many_missing(faults, sum(int(np.isfinite(values).sum()) for values in raw.values()))
        return Judgements(weighted_mean(signals, weights), signals, raw, weights, acceptable, faults)

    def _refuse_too_many_missing(self, faults: Mapping[str, Mapping[str, int]], num_present: int) -> None:
        num_missing = sum(sum(reasons.values()) for reasons in faults.values())
        if num_missing <= self.config.max_missing_share * (num_missing + num_present):
            return
        reasons = [f"{name}: {reason} ({n})" for name, found in faults.items() for reason, n in found.items()]
        raise UserError(
            "too many scores are missing to go on",
            where="; ".join(reasons),
            expected=f"at most {self.config.max_missing_share:.0%} of a batch",
            got=f"{num_missing} of {num_missing + num_present}",
            fix="mend the scorers and start again: nothing is lost",
        )

    def calibrated(self, answers: Sequence[Answer]) -> Scales:
        """New scales for every signal without a range, from answers of the model before training.

        Raises `UserError` for a task in which a signal's scores do not spread.
        """
        by_task: dict[str, dict[str, Scale]] = {}
        for task in sorted({answer.task for answer in answers}):
            chosen = [answer for answer in answers if answer.task == task and is_acceptable(answer)]
            for signal in self.signals:
                if signal.entry.range is None and signal.judges(task):
                    scores = self._ask(signal.reward, chosen)
                    where = f"reward {signal.name!r}, task {task!r}"
                    by_task.setdefault(task, {})[signal.name] = fitted(scores.values, signal.reward.version, where)
        return Scales(by_task)


def is_acceptable(answer: Answer) -> bool:
    """The gate before every scorer: the pictures asked for are there, whole, and not of one colour; no empty answer.

    A prompt asks for one picture; `fields["num_images"]` says otherwise (0: text only).
    """
    if any(image is None or is_blank(image) for image in answer.images):
        return False
    wanted = int(answer.fields.get("num_images", 1))
    return len(answer.images) >= wanted and (bool(answer.images) or bool(answer.text.strip()))


def is_blank(image: np.ndarray) -> bool:
    """Every pixel is the same."""
    return image.size == 0 or bool((image == image[:1, :1]).all())


def weighted_mean(signals: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [n]; NaN where a signal with weight is missing: a mean of the others would be another reward."""
    values = np.stack([signals[name] for name in signals])
    shares = np.stack([weights[name] for name in signals])
    counted = np.where(shares > 0, values, 0.0)
    total = shares.sum(axis=0)
    found: np.ndarray = np.full(len(total), np.nan)
    np.divide((counted * shares).sum(axis=0), total, out=found, where=total > 0)
    return found


def _mean(values: np.ndarray) -> float | None:
    """Of what is there; None where nothing is."""
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else None
