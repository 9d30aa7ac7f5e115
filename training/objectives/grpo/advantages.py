"""Advantages: how much better an answer is than the other answers to the same prompt. Plain numpy, no model.

A group is the answers to one prompt. Rewards are float64 [samples, rewards]; NaN is a reward that is missing. An answer
that misses a reward with a weight is not learnt from; it is never taken for a bad one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.errors import Problems

EPSILON = 1e-6  # added to a standard deviation (verl's; TRL and Megatron take 1e-4)


@dataclass
class AdvantageOptions:
    """How rewards become advantages."""

    scale: str = "std"  # std: by the group's standard deviation (GRPO, arXiv 2402.03300) | none (Dr.GRPO, 2503.20783)
    # separate is GDPO's (arXiv 2601.05242): a reward of a large scale, or one that all answers earn, does not drown others.
    rewards: str = "sum"  # sum: their weighted mean is compared | separate: each is compared, then weighed
    clip: float = 5.0  # largest absolute advantage; 0: no limit. Nearly tied groups would give huge ones
    min_scored: int = 2  # answers of a group with all rewards; with fewer the group is dropped

    def validate(self, problems: Problems, key: str) -> None:
        choices = {"scale": ("std", "none"), "rewards": ("sum", "separate")}
        for name, known in choices.items():
            value = getattr(self, name)
            problems.check(
                value in known, f"{key}.{name}", f"unknown value {value!r}", f"{key}.{name}={'|'.join(known)}"
            )
        problems.check(self.clip >= 0, f"{key}.clip", "must not be negative", f"{key}.clip=5")
        problems.check(
            self.min_scored >= 2, f"{key}.min_scored", "one answer compares with none", f"{key}.min_scored=2"
        )


def is_scored(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bool [samples]: no reward with a weight is missing. `weights` [rewards], or [samples, rewards]."""
    found: np.ndarray = ~(np.isnan(rewards) & (weights != 0)).any(axis=1)
    return found


def teaches(rewards: np.ndarray, weights: np.ndarray, options: AdvantageOptions) -> bool:
    """Is there something to learn from a group [G, rewards]? Not from one whose answers are all as good."""
    scored = rewards[is_scored(rewards, weights)]
    if len(scored) < options.min_scored:
        return False
    compared = scored[:, weights != 0] if options.rewards == "separate" else _means(scored, weights)[:, None]
    return bool((np.ptp(compared, axis=0) > EPSILON).any())


def advantages_of(rewards: np.ndarray, weights: np.ndarray, group_size: int, options: AdvantageOptions) -> np.ndarray:
    """float64 [samples]: of whole groups of a global batch, one behind the other; 0 where a reward is missing.

    `rewards` and `weights` [samples, rewards]; the answers of a group share their weights. With `rewards=separate` the sums are divided by their standard
    deviation over the batch, as GDPO does, so that their size does not grow with the number of rewards.
    """
    scored = is_scored(rewards, weights)
    found = np.zeros(len(rewards))
    for start in range(0, len(rewards), group_size):
        group = np.arange(start, start + group_size)[scored[start : start + group_size]]
        if len(group):
            found[group] = _compared(rewards[group], weights[group[0]], options)
    if options.rewards == "separate" and scored.any():
        found /= found[scored].std() + EPSILON
    return found if options.clip == 0 else found.clip(-options.clip, options.clip)


def _compared(rewards: np.ndarray, weights: np.ndarray, options: AdvantageOptions) -> np.ndarray:
    """[G] of a group whose rewards are all known."""
    if options.rewards == "sum":
        return _above_the_mean(_means(rewards, weights), options)
    columns = [weight * _above_the_mean(rewards[:, k], options) for k, weight in enumerate(weights) if weight != 0]
    found: np.ndarray = np.sum(columns, axis=0)
    return found


def _means(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[G]: weighted means; a reward of weight 0 may be missing."""
    means: np.ndarray = np.where(weights != 0, rewards, 0.0) @ weights / weights.sum()
    return means


def _above_the_mean(values: np.ndarray, options: AdvantageOptions) -> np.ndarray:
    found: np.ndarray = values - values.mean()
    if options.scale == "std" and len(values) > 1:
        found = found / (values.std(ddof=1) + EPSILON)
    return found
