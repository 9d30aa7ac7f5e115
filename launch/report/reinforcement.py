"""Reinforcement learning in the report: what it set out from, what it reached, and the curves between."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from launch.report.charts import Series, line_chart
from launch.report.run_folder import StageFolder, is_number
from launch.report.tables import table
from training.contracts.summary import StageSummary

OBJECTIVE = "grpo"
NUM_LAST_STEPS = 10  # whose mean is a final figure
REWARD_TASK, ACCURACY_TASK = "t2i_reward", "t2i_sampled"  # of the evaluations before and after
BEFORE, AFTER = "rl_start", "rl"
# What a chart shows: title, and the metrics whose values by name are its lines.
CHARTS = {
    "Reward by task": ("reward_by_task",),
    "Reward by task and scorer": ("signals",),
    "Entropy": ("entropy",),
    "KL to the start": ("kl",),
    "Share of tokens whose ratio was clipped": ("clip_fraction",),
    "Importance weight": ("importance_weight",),
}
COUNTS = {
    "Groups without a lesson": "groups_dropped",
    "Tokens a second, rollout": "rollout_tokens_per_second",
    "Tokens a second, training": "training_tokens_per_second",
}
Curve = Callable[[list[dict[str, Any]], str], list[tuple[float, float]]]


def collect_reinforcement(
    stages: list[tuple[StageFolder, StageSummary]], evaluations: Mapping[str, dict[str, Any]], curve: Curve
) -> tuple[dict[str, Any] | None, dict[str, Series]]:
    """Figures and curves of the last such stage; None where there is none. Figures that nobody measured are null.

    Rewards are those of held-out prompts, answers drawn as in rollouts, in the unit of the evaluation (0 to 1).
    """
    found = [(folder, summary) for folder, summary in stages if summary.objective == OBJECTIVE]
    if not found:
        return None, {}
    folder, summary = found[-1]
    lines = folder.metrics()
    values = [by_name(line, "entropy").get("image") for line in lines]
    entropies = [float(value) for value in values if isinstance(value, int | float)]
    figures = {
        "reward_sft": accuracy(evaluations, BEFORE, REWARD_TASK),
        "reward_final": accuracy(evaluations, AFTER, REWARD_TASK),
        "reward_max": 1.0,
        "held_out_accuracy_sft": accuracy(evaluations, BEFORE, ACCURACY_TASK),
        "held_out_accuracy_rl": accuracy(evaluations, AFTER, ACCURACY_TASK),
        "steps": summary.steps,
        "wall_seconds": summary.wall_seconds,
        "dropped_groups": summary.values.get("dropped_groups"),
        "entropy_sft": entropies[0] if entropies else None,
        "entropy_final": sum(entropies[-NUM_LAST_STEPS:]) / len(entropies[-NUM_LAST_STEPS:]) if entropies else None,
    }
    return figures, curves_of(lines, curve)


def curves_of(lines: list[dict[str, Any]], curve: Curve) -> dict[str, Series]:
    """title -> name -> points."""
    charts: dict[str, Series] = {}
    for title, keys in CHARTS.items():
        for key in keys:
            names = sorted({name for line in lines for name in by_name(line, key)})
            rows = [{"step": line["step"]} | by_name(line, key) for line in lines]
            charts[title] = {name: points for name in names if (points := curve(numbers_of(rows, name), name))}
    for title, key in COUNTS.items():
        charts[title] = {"all": curve(numbers_of(lines, key), key)}
    return {title: series for title, series in charts.items() if any(series.values())}


def numbers_of(lines: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [line for line in lines if is_number(line.get(key))]


def by_name(line: dict[str, Any], key: str) -> dict[str, Any]:
    """Figures by name; empty where there are none."""
    found = line.get(key)
    return found if isinstance(found, dict) else {}


def accuracy(evaluations: Mapping[str, dict[str, Any]], name: str, task: str) -> float | None:
    value = by_name(by_name(evaluations.get(name, {}), "tasks"), task).get("accuracy")
    return value if is_number(value) else None


def reinforcement_section(found: dict[str, Any] | None, curves: dict[str, Series]) -> str:
    """The figures before and after, and the charts."""
    if found is None:
        return ""
    rows = [
        ["reward on held-out prompts", shown(found["reward_sft"]), shown(found["reward_final"])],
        ["accuracy on held-out prompts", shown(found["held_out_accuracy_sft"]), shown(found["held_out_accuracy_rl"])],
        ["entropy of a visual token, nats", shown(found["entropy_sft"]), shown(found["entropy_final"])],
    ]
    charts = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f"{line_chart(series, x_label='step', y_label=title)}</figure>"
        for title, series in curves.items()
    )
    note = "<p>Answers drawn as in rollouts: no guidance, temperature 1. The reward goes up to 1.</p>"
    return table(["figure", "before", "after"], rows) + f'{note}<div class="charts">{charts}</div>'


def shown(value: Any) -> str:
    return f"{value:.3f}" if is_number(value) else "-"
