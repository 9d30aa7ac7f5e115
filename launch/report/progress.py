"""How far a training stage is, read from the files that it leaves: nothing is imported that trains."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

TAIL_BYTES = 40_000
NUM_TIMED_STEPS = 20  # the time left is judged by as many last steps


def stage_progress(stage_folder: Path) -> dict[str, Any]:
    """{step, total, loss, tokens, eta_seconds}; empty for what is no stage or has not begun."""
    lines = last_lines(stage_folder / "metrics.jsonl")
    if not lines:
        return {}
    last, stage = lines[-1], stage_settings(stage_folder)
    found: dict[str, Any] = {"step": last.get("step"), "loss": last.get("loss")}
    total = stage.get("steps")
    if total is None:
        return found
    seconds = [line["step_seconds"] for line in lines[-NUM_TIMED_STEPS:] if "step_seconds" in line]
    found |= {"total": total, "eta_seconds": None}
    if seconds:
        found["eta_seconds"] = round((total - last["step"]) * sum(seconds) / len(seconds), 1)
    found["tokens"] = num_tokens(stage_folder, last, stage)
    return found


def num_tokens(stage_folder: Path, last: dict[str, Any], stage: dict[str, Any]) -> int | None:
    """Of a finished stage as it says itself; before that, samples times their length."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads((stage_folder / "summary.json").read_text(encoding="utf-8"))["tokens"])
    if stage.get("objective") != "next_token" or "consumed_samples" not in last:
        return None
    return int(last["consumed_samples"]) * int(stage["sequence_length"])


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The last complete lines of a file of JSON objects."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return complete_lines(stream.read())


def all_lines(path: Path) -> list[dict[str, Any]]:
    return complete_lines(path.read_bytes()) if path.exists() else []


def complete_lines(raw: bytes) -> list[dict[str, Any]]:
    found = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError):  # the first may be cut, the last be written right now
            found.append(json.loads(line))
    return found


def stage_settings(stage_folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, yaml.YAMLError):
        values = yaml.safe_load((stage_folder / "config.yaml").read_text(encoding="utf-8"))
        return dict(values.get("stage", {}))
    return {}
