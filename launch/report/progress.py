"""How far the entries of a curriculum are, read from the files that they leave: nothing is imported that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.sources.patterns import find_shards
from data_pipeline.sources.remote import is_remote
from launch.report.run_folder import METRICS_NAME, Damages, StageFolder, is_number, read_object
from model.errors import UserError
from training.metrics import HELD_OUT

NUM_TIMED_STEPS = 20  # the time left is judged by as many last steps
NUM_TIMED_SHARDS = 200  # and by as many last shards
TAIL_BYTES = 8_192  # of a log


def entry_progress(command: str, calls: Sequence[Mapping[str, Any]], outputs: Sequence[Path]) -> dict[str, Any]:
    """{step, total, unit, tokens, rate, rate_unit, eta_seconds, loss, figures}, as far as there are such figures.

    `calls`: the values on the command line of each call. Empty for what has not begun, and for commands that count nothing.
    """
    if command == "train":
        stages = [one for path in outputs for one in (path, path.parent) if (one / METRICS_NAME).is_file()]
        newest = max(stages, key=lambda stage: (stage / METRICS_NAME).stat().st_mtime, default=None)
        return {} if newest is None else stage_progress(newest)
    if command == "tokenize":
        return shards_progress(calls)
    if command == "pack":
        return rows_progress([Path(str(call["target"])) for call in calls if "target" in call])
    if command == "evaluate":
        metrics = [read_object(path, Damages()).get("metrics") for path in outputs if path.suffix == ".json"]
        found = {name: value for one in metrics if isinstance(one, dict) for name, value in one.items()}
        figures = {name: value for name, value in found.items() if is_number(value) and name != "num_prompts"}
        return {"figures": figures} if figures else {}
    return {}


def stage_progress(stage_folder: Path) -> dict[str, Any]:
    """Of a training stage; empty for what is no stage or has not begun."""
    folder = StageFolder(stage_folder)
    lines = folder.last_metrics()
    if not lines:
        return {}
    last, stage = lines[-1], folder.settings()
    found: dict[str, Any] = {
        "step": last["step"],
        "unit": "steps",
        "loss": last.get("loss"),
        "figures": stage_figures(lines),
    }
    rates = [line["tokens_per_second"] for line in lines[-NUM_TIMED_STEPS:] if is_number(line.get("tokens_per_second"))]
    if rates:
        found |= {"rate": round(sum(rates) / len(rates), 1), "rate_unit": "tokens/s"}
    total = stage.get("steps")
    if not isinstance(total, int):
        return found
    seconds = [line["step_seconds"] for line in lines[-NUM_TIMED_STEPS:] if "step_seconds" in line]
    found |= {"total": total, "eta_seconds": None}
    if seconds:
        found["eta_seconds"] = round((total - last["step"]) * sum(seconds) / len(seconds), 1)
    found["tokens"] = num_tokens(folder, last, stage)
    return found


def stage_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What tells how well a stage does: its reward where it has one, else its loss; held-out losses, the last measured."""
    last = lines[-1]
    names = ("reward",) if is_number(last.get("reward")) else ("loss", "psnr_db")
    found = {name: last[name] for name in names if is_number(last.get(name))}
    sets: dict[str, Any] = next(
        (line[HELD_OUT] for line in reversed(lines) if isinstance(line.get(HELD_OUT), dict)), {}
    )
    held_out = {f"held-out {name}": one.get("all") for name, one in sets.items() if isinstance(one, dict)}
    return found | {name: value for name, value in held_out.items() if is_number(value)}


def num_tokens(folder: StageFolder, last: dict[str, Any], stage: dict[str, Any]) -> int | None:
    """Of a finished stage as it says itself; before that, samples times their length."""
    summary = folder.summary()
    if summary is not None and summary.tokens is not None:
        return summary.tokens
    objective = stage.get("objective")
    if not isinstance(objective, dict) or objective.get("name") != "next_token" or "consumed_samples" not in last:
        return None
    return int(last["consumed_samples"]) * int(stage["sequence_length"])


def shards_progress(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Token files of all calls, and the shards that they are made of. Only names and times of files are read."""
    done = [prefix for call in calls for prefix in published(Path(str(call.get("target", ""))))]
    if not done:
        return {}
    totals = [num_shards(call.get("input")) for call in calls]
    total = None if None in totals else sum(one or 0 for one in totals)
    found: dict[str, Any] = {"step": len(done), "total": total, "unit": "shards", "eta_seconds": None}
    times = sorted(prefix.with_name(f"{prefix.name}.json").stat().st_mtime for prefix in done)[-NUM_TIMED_SHARDS:]
    if times[-1] > times[0]:
        rate = (len(times) - 1) / (times[-1] - times[0])
        found |= {"rate": round(rate * 3600, 1), "rate_unit": "shards/h"}
        if total is not None:
            found["eta_seconds"] = round(max(0, total - len(done)) / rate, 1)
    return found


def num_shards(patterns: Any) -> int | None:
    """How many shards these patterns mean; None where only a server knows, and before they are there."""
    wanted = [str(one) for one in (patterns if isinstance(patterns, list) else [patterns])]
    if patterns is None or any(map(is_remote, wanted)):
        return None
    try:
        return len(find_shards(wanted, "input"))
    except UserError:
        return None


def rows_progress(targets: Sequence[Path]) -> dict[str, Any]:
    """Packed rows that are published, and all of them once every target is whole."""
    from data_pipeline.storage.packed_files import DATASET_NAME  # numpy, a tenth of a second

    whole = [one for target in targets if (one := read_object(target / DATASET_NAME, Damages()))]
    if targets and len(whole) == len(targets):
        num_rows = total_of("num_rows", whole)
        return {"step": num_rows, "total": num_rows, "unit": "rows", "tokens": total_of("num_tokens", whole)}
    files = [prefix.with_name(f"{prefix.name}.json") for target in targets for prefix in published(target)]
    num_rows = total_of("num_rows", [read_object(path, Damages()) for path in files])
    return {"step": num_rows, "total": None, "unit": "rows"} if num_rows else {}


def total_of(key: str, manifests: Sequence[Mapping[str, Any]]) -> int:
    return sum(one[key] for one in manifests if isinstance(one.get(key), int))


def published(folder: Path) -> list[Path]:
    from data_pipeline.storage.format import published_prefixes

    return published_prefixes(folder) if folder.is_dir() else []


def last_words(logs: Sequence[Path]) -> str:
    """The last line of the newest log, or its last `error:`, which says why a command ended; empty where none was written."""
    newest = max((path for path in logs if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    with newest.open("rb") as stream:
        stream.seek(max(0, newest.stat().st_size - TAIL_BYTES))
        lines = [line.strip() for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")] or lines
    return told[-1] if told else ""
