"""The report's section on reinforcement learning, from a run folder written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.report.collect import collect
from launch.report.page import render_page

KEYS = (
    "reward_sft",
    "reward_final",
    "reward_max",
    "held_out_accuracy_sft",
    "held_out_accuracy_rl",
    "steps",
    "wall_seconds",
    "dropped_groups",
    "entropy_sft",
    "entropy_final",
)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def made(folder: Path, evaluations: dict[str, tuple[float, float]]) -> dict[str, Any]:
    summary = {"name": "rl", "objective": "grpo", "steps": 12, "loss_last": 0.0, "wall_seconds": 9.0}
    write(folder / "rl/summary.json", summary | {"dropped_groups": 3})
    lines = [
        {
            "step": step,
            "loss": 0.0,
            "reward_by_task": {"t2i": 5.0 + step},
            "entropy": {"image": 1.0 - 0.01 * step} if step != 5 else {},
            "clip_fraction": {"image": None},
            "groups_dropped": 1,
        }
        for step in range(1, 13)
    ]
    write(folder / "rl/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for name, (reward, accuracy) in evaluations.items():
        tasks = {"t2i_reward": {"accuracy": reward}, "t2i_sampled": {"accuracy": accuracy}}
        write(folder / f"evaluation/{name}.json", {"metrics": {}, "tasks": tasks})
    return collect(folder)


def test_every_figure_is_there(tmp_path: Path) -> None:
    report = made(tmp_path, {"rl_start": (0.6, 0.5), "rl": (0.9, 0.8)})
    rl = report["rl"]
    assert tuple(rl) == KEYS
    assert [rl[key] for key in KEYS[:9]] == [0.6, 0.9, 1.0, 0.5, 0.8, 12, 9.0, 3, 0.99]
    assert rl["entropy_final"] == sum(1 - 0.01 * step for step in (2, 3, 4, 6, 7, 8, 9, 10, 11, 12)) / 10
    assert "Share of tokens whose ratio was clipped" not in report["rl_curves"]
    page = render_page(report, tmp_path)
    assert "Reinforcement learning" in page
    assert "Groups without a lesson" in page
    assert '<td data-title="before">0.600</td><td data-title="after">0.900</td>' in page


def test_what_nobody_measured_is_null_and_no_stage_is_no_section(tmp_path: Path) -> None:
    assert made(tmp_path / "a", {})["rl"]["reward_final"] is None
    (tmp_path / "b").mkdir()
    report = collect(tmp_path / "b")
    assert report["rl"] is None
    assert "Reinforcement learning" not in render_page(report, tmp_path / "b")
