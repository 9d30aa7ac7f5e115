"""What a rollout says of itself, as it goes to metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.inference.model import Asked
from training.objectives.grpo.bank import Round
from training.rewards.system import Judgements


def counts_of(
    asked: Sequence[Asked], judged: Judgements, rollout_seconds: float, reward_seconds: float
) -> dict[str, Any]:
    """Of one replica's round; `joined` adds them up over replicas and rounds."""
    return {
        "tokens": sum(len(one.generation.ids) for one in asked),
        "unfinished": sum(not one.generation.finished for one in asked),
        "refused": int((~judged.acceptable).sum()),
        "rollout_seconds": rollout_seconds,
        "reward_seconds": reward_seconds,
    } | {f"missing/{name}": sum(reasons.values()) for name, reasons in judged.faults.items()}


def metrics_of(whole: Round, signal_names: Sequence[str], num_dropped: int, num_replicas: int) -> dict[str, Any]:
    """Of all answers drawn, those of dropped groups included. Rewards are on [1, 10]."""
    tasks, about = np.array(whole.tasks, dtype=object), whole.about
    names = sorted(set(whole.tasks))
    signals = {
        f"{task}/{name}": _mean(whole.signals[tasks == task, column])
        for task in names
        for column, name in enumerate(signal_names)
        if np.isfinite(whole.signals[tasks == task, column]).any()
    }
    seconds = about.get("rollout_seconds", 0.0) / num_replicas  # they draw at the same time
    return {
        "reward": _mean(whole.totals),
        "reward_by_task": {task: _mean(whole.totals[tasks == task]) for task in names},
        "signals": signals,
        "answers": len(whole.samples),
        "answers_unfinished": about.get("unfinished", 0),
        "answers_refused": about.get("refused", 0),
        "scores_missing": {name: about.get(f"missing/{name}", 0) for name in signal_names},
        "groups_dropped": num_dropped,
        "rollout_seconds": seconds,
        "reward_seconds": about.get("reward_seconds", 0.0) / num_replicas,
        "rollout_tokens_per_second": about.get("tokens", 0) / seconds if seconds > 0 else 0.0,
    }


def _mean(values: np.ndarray) -> float:
    """Of what is there; NaN (null in the file) where nothing is."""
    present = values[np.isfinite(values)]
    return float(present.mean()) if len(present) else float("nan")
