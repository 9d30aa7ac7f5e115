"""What `nextstate distill` reads before the model: the prompts and their judges. A mistake in them is told before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from training.objectives.grpo.grpo_options import PromptsEntry
from training.objectives.grpo.questions import Question, load_questions
from training.rewards.system import RewardsConfig, RewardSystem

TaskedQuestion = tuple[str, Question]  # task, question


def load_prompts(entries: Mapping[str, PromptsEntry]) -> list[TaskedQuestion]:
    """(task, question) of every prompt, task by task."""
    return [(task, question) for task, entry in entries.items() for question in load_questions(task, entry, "prompts")]


def load_judges(rewards: RewardsConfig, prompts: Sequence[TaskedQuestion]) -> RewardSystem | None:
    """None where nothing judges. Raises `UserError` for a task of the prompts that no signal judges."""
    if not rewards.signals:
        return None
    system = RewardSystem(rewards)
    for task in sorted({task for task, _ in prompts}):
        system.check_task(task)
    return system
