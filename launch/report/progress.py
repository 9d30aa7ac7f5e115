"""How far a training stage is, read from the files that it leaves: nothing is imported that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.report.run_folder import StageFolder

NUM_TIMED_STEPS = 20  # the time left is judged by as many last steps


def stage_progress(stage_folder: Path) -> dict[str, Any]:
    """{step, total, loss, tokens, eta_seconds}; empty for what is no stage or has not begun."""
    folder = StageFolder(stage_folder)
    lines = folder.last_metrics()
    if not lines:
        return {}
    last, stage = lines[-1], folder.settings()
    found: dict[str, Any] = {"step": last["step"], "loss": last.get("loss")}
    total = stage.get("steps")
    if not isinstance(total, int):
        return found
    seconds = [line["step_seconds"] for line in lines[-NUM_TIMED_STEPS:] if "step_seconds" in line]
    found |= {"total": total, "eta_seconds": None}
    if seconds:
        found["eta_seconds"] = round((total - last["step"]) * sum(seconds) / len(seconds), 1)
    found["tokens"] = num_tokens(folder, last, stage)
    return found


def num_tokens(folder: StageFolder, last: dict[str, Any], stage: dict[str, Any]) -> int | None:
    """Of a finished stage as it says itself; before that, samples times their length."""
    summary = folder.summary()
    if summary is not None and summary.tokens is not None:
        return summary.tokens
    objective = stage.get("objective")
    if not isinstance(objective, dict) or objective.get("name") != "next_token" or "consumed_samples" not in last:
        return None
    return int(last["consumed_samples"]) * int(stage["sequence_length"])
