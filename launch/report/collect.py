"""Gathers a run folder's figures from the JSON and JSONL files that its parts left. What is absent stays null."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

CLASSES = ("text", "visual", "structure")
METRICS = (
    "reconstruction_accuracy",
    "t2i_accuracy_untrained",
    "t2i_accuracy",
    "next_state_accuracy",
    "edit_accuracy",
    "num_prompts",
)
STAGE_KEYS = (
    "name",
    "tensor",
    "pipeline",
    "context",
    "data",
    "steps",
    "tokens",
    "loss_first",
    "loss_last",
    "wall_seconds",
    "peak_memory_bytes",
)
MAX_CURVE_POINTS = 200


def collect(run_folder: Path) -> dict[str, Any]:
    """Every figure of the report. Seconds, bytes and counts are as their writers recorded them."""
    curriculum = read_json(run_folder / "curriculum.json")
    evaluations = read_evaluations(run_folder / "evaluation")
    tokenizer = read_json(run_folder / "vision_tokenizer" / "summary.json")
    stages = [collect_stage(folder) for folder in stage_folders(run_folder)]
    return {
        "name": curriculum.get("name", run_folder.name),
        "wall_seconds": curriculum.get("wall_seconds"),
        "peak_memory_bytes": curriculum.get("peak_memory_bytes"),
        "tokenizer": {key: tokenizer.get(key) for key in ("psnr_db", "codebook_use")},
        "packing": collect_packing(run_folder / "packed"),
        "tokens": collect_tokens(run_folder / "tokens"),
        "stages": stages,
        "metrics": {name: find_metric(evaluations, name) for name in METRICS},
        "samples": collect_samples(evaluations),
        "entries": [
            {"name": name, **{key: entry.get(key) for key in ("state", "wall_seconds", "peak_memory_bytes")}}
            for name, entry in curriculum.get("entries", {}).items()
        ],
    }


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def collect_samples(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of fresh weights last and in groups of their own."""
    found = []
    for name in sorted(evaluations, key=lambda name: name == "untrained"):
        for sample in evaluations[name].get("samples", []):
            group = str(sample.get("group", "samples"))
            found.append(sample | {"group": f"{group}, untrained" if name == "untrained" else group})
    return found


def find_metric(evaluations: dict[str, dict[str, Any]], name: str) -> Any:
    """A metric by name: `X_untrained` is X of the evaluation `untrained`, all others come from the other ones.

    `num_prompts` is the smallest number of prompts among the tasks that are reported.
    """
    if name.endswith("_untrained"):
        return evaluations.get("untrained", {}).get("metrics", {}).get(name.removesuffix("_untrained"))
    trained = [value for key, value in evaluations.items() if key != "untrained"]
    if name == "num_prompts":
        tasks = [(task, entry) for one in trained for task, entry in one.get("tasks", {}).items()]
        return min((entry["count"] for task, entry in tasks if task in METRICS), default=None)
    found = [one.get("metrics", {}).get(name) for one in trained]
    return next((value for value in found if value is not None), None)


def stage_folders(run_folder: Path) -> list[Path]:
    """Folders of transformer stages that finished, in the order in which they did."""
    summaries = [path for path in run_folder.glob("*/summary.json") if "loss_last" in read_json(path)]
    names = list(read_json(run_folder / "curriculum.json").get("entries", {}))
    found = [path.parent for path in summaries if path.parent.name != "vision_tokenizer"]
    return sorted(
        found, key=lambda folder: (names.index(folder.name) if folder.name in names else len(names), folder.name)
    )


def collect_stage(folder: Path) -> dict[str, Any]:
    summary = read_json(folder / "summary.json")
    lines = list(read_lines(folder / "metrics.jsonl"))
    config = read_yaml(folder / "config.yaml")
    datasets = config.get("stage", {}).get("data", {}).get("datasets", {})
    stage = {key: summary.get(key) for key in STAGE_KEYS}
    stage["curves"] = {
        name: curve(lines, key)
        for name, key in [("all", "loss")] + [(one, f"loss_{one}") for one in CLASSES]
        if any(line.get(key) is not None for line in lines)
    }
    datasets = {name: entry for name, entry in datasets.items() if entry.get("weight", 1.0) > 0}
    weights = {name: entry.get("weight", 1.0) for name, entry in datasets.items()}
    stage["mixture"] = mixture(lines, weights, sources_of(datasets))
    return stage


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def curve(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, mean loss) of up to MAX_CURVE_POINTS windows of equal width."""
    points = [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]
    width = max(1, -(-len(points) // MAX_CURVE_POINTS))
    windows = [points[start : start + width] for start in range(0, len(points), width)]
    return [(window[-1][0], sum(loss for _, loss in window) / len(window)) for window in windows]


def sources_of(datasets: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Packed tokens of each source by dataset: metrics count by source, and a packed dataset mixes one or more."""
    return {
        name: read_json(Path(entry.get("path", "")) / "dataset.json").get("sources", {})
        for name, entry in datasets.items()
    }


def mixture(
    lines: list[dict[str, Any]], weights: dict[str, float], sources: dict[str, dict[str, int]]
) -> list[dict[str, Any]]:
    """Tokens with loss that each source gave, their share, and the share that the configuration asked for."""
    tokens: dict[str, int] = defaultdict(int)
    for line in lines:
        for source, count in (line.get("tokens_by_source") or {}).items():
            tokens[source] += int(count)
    asked: dict[str, float] = defaultdict(float)
    for name, weight in weights.items():
        packed = sources.get(name) or {name: 1}
        for source, count in packed.items():
            asked[source] += weight / sum(weights.values()) * count / sum(packed.values())
    total = sum(tokens.values())
    return [
        {
            "source": name,
            "tokens": tokens.get(name, 0),
            "share": tokens.get(name, 0) / total if total else None,
            "weight": asked.get(name),
        }
        for name in dict.fromkeys([*asked, *tokens])
    ]


def manifests(folder: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(dataset, manifest) of every complete shard below `folder`."""
    for path in sorted(folder.rglob("[0-9]*.json")):
        manifest = read_json(path)
        if manifest.get("kind") in ("tokens", "packed"):
            yield path.parent.relative_to(folder).as_posix(), manifest


def collect_packing(folder: Path) -> dict[str, Any]:
    """`fill`: real tokens / all positions of all rows, over every packed dataset and for each."""
    real: dict[str, int] = defaultdict(int)
    positions: dict[str, int] = defaultdict(int)
    rows: dict[str, int] = defaultdict(int)
    for dataset, manifest in manifests(folder):
        rows[dataset] += manifest["num_rows"]
        positions[dataset] += manifest["num_rows"] * manifest["sequence_length"]
        real[dataset] += sum(manifest["tokens_by_source"].values())
    total = sum(positions.values())
    return {
        "fill": sum(real.values()) / total if total else None,
        "datasets": [
            {"dataset": name, "rows": rows[name], "tokens": real[name], "fill": real[name] / max(1, positions[name])}
            for name in rows
        ],
    }


def collect_tokens(folder: Path) -> list[dict[str, Any]]:
    """Documents, tokens by class and quarantined samples by reason of every tokenized dataset."""
    datasets: dict[str, dict[str, Any]] = {}
    for dataset, manifest in manifests(folder):
        entry = datasets.setdefault(
            dataset, {"dataset": dataset, "documents": 0, "tokens": 0, "by_class": {}, "quarantined": {}}
        )
        entry["documents"] += manifest.get("num_documents", 0)
        entry["tokens"] += manifest.get("num_tokens", 0)
        for source, target in (("counts_by_class", "by_class"), ("quarantined", "quarantined")):
            for name, count in (manifest.get(source) or {}).items():
                entry[target][name] = entry[target].get(name, 0) + count
    return list(datasets.values())
