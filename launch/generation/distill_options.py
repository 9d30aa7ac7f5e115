"""The options of `nextstate distill`; imports nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.errors import Problems
from model.generation.settings import SamplingConfig
from training.rewards.system import RewardsConfig


@dataclass
class DistillOptions:
    """Which answers are drawn and kept: everything that decides the documents."""

    source: str = ""  # the dataset's name; empty: that of the target folder
    answers_a_prompt: int = 1  # drawn
    kept_a_prompt: int = 1  # of these at most, the best ones
    rewards: RewardsConfig = field(default_factory=RewardsConfig)  # no signals: whole answers are kept, unjudged
    smallest_reward: float = 1.0  # of an answer that is kept, from 1 (the lowest there is) to 10
    prompts_a_file: int = 1000  # answered together; what a killed job loses at the most
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0  # of the answers

    def validate_distill(self, problems: Problems) -> None:
        for name in ("answers_a_prompt", "kept_a_prompt", "prompts_a_file"):
            problems.check(getattr(self, name) > 0, name, "must be positive", f"{name}=1")
        problems.check(
            self.kept_a_prompt <= self.answers_a_prompt, "kept_a_prompt", "more than are drawn", "kept_a_prompt=1"
        )
        problems.check(1 <= self.smallest_reward <= 10, "smallest_reward", "must be in [1, 10]", "smallest_reward=8")
        if self.rewards.signals:
            self.rewards.validate(problems, "rewards")
        else:
            problems.check(
                self.smallest_reward == 1,
                "smallest_reward",
                "nothing judges the answers",
                "rewards.signals.NAME.path=..., or smallest_reward=1",
            )
        self.sampling.validate(problems)
