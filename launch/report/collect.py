"""Gathers a run folder's figures from the JSON and JSONL files that its parts left. What is absent stays null."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.report.reinforcement import OBJECTIVE as REWARDED
from launch.report.reinforcement import collect_reinforcement
from launch.report.run_folder import CONFIG_NAME, METRICS_NAME, Damages, RunFolder, StageFolder, is_number, read_object
from training.config import RECORDED
from training.contracts.summary import StageSummary
from training.metrics import HELD_OUT
from training.reliability.events import EVENTS_NAME

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
# Evaluations of other weights than the run's result: fresh ones, and the last stage without those before it.
FROM_SCRATCH = "from_scratch"
OTHER_WEIGHTS = ("untrained", FROM_SCRATCH)
ALL_LOSSES = (("all", "loss"), *((name, f"loss_{name}") for name in CLASSES))
TOKENIZER_FIGURES = ("psnr_db", "codes_used")
FIGURES = ("learning_rate", "gradient_norm", "tokens_per_second", "mfu")
MAX_CURVE_POINTS = 200
# Of a shard's manifest, by its kind.
NEEDED = {"packed": ("num_rows", "sequence_length", "tokens_by_source"), "tokens": ()}


def collect(run_folder: Path) -> dict[str, Any]:
    """Every figure of the report. Seconds, bytes and counts are as their writers recorded them.

    `damaged` holds a line for each file of which something could not be read; what could is in the other figures.
    """
    run = RunFolder(run_folder)
    curriculum, evaluations, tokenizer = run.curriculum(), run.evaluations(), run.tokenizer()
    stages = run.stages()
    rl, rl_curves = collect_reinforcement(stages, evaluations, curve)
    report = {
        "name": curriculum.get("name", run_folder.name),
        "wall_seconds": curriculum.get("wall_seconds"),
        "peak_memory_bytes": curriculum.get("peak_memory_bytes"),
        "tokenizer": collect_tokenizer(tokenizer.values if tokenizer else {}),
        "tokenizer_curves": tokenizer_curves(run.tokenizer_metrics()),
        "packing": collect_packing(run_folder / "packed", run.damages),
        "tokens": collect_tokens(run_folder / "tokens", run.damages),
        "stages": [collect_stage(folder, summary) for folder, summary in stages],
        "metrics": collect_metrics(evaluations),
        "dida": collect_dida(evaluations, members(curriculum, "entries")),
        "rollout": collect_rollout(evaluations),
        "rl": rl,
        "rl_curves": rl_curves,
        "samples": collect_samples(evaluations),
        "entries": [
            {"name": name, **{key: entry.get(key) for key in ("state", "wall_seconds", "peak_memory_bytes")}}
            for name, entry in members(curriculum, "entries").items()
            if isinstance(entry, dict)
        ],
    }
    return report | {"damaged": run.damages.told()}


def collect_tokenizer(summary: dict[str, Any]) -> dict[str, Any]:
    """`colliding_captions`: by a view's area in pixels, pairs of captions whose pictures differ and have the same codes."""
    prefix = "colliding_captions_"
    areas = [key.removeprefix(prefix) for key in summary if key.startswith(prefix)]
    collisions = {}
    for area in sorted((area for area in areas if area.isdecimal()), key=int):
        names = summary.get(f"{prefix}{area}_names")
        collisions[area] = {
            "pairs": summary[f"{prefix}{area}"],
            "captions": summary.get(f"{prefix}{area}_of"),
            "names": [str(name) for name in names] if isinstance(names, list) else [],
        }
    return {key: summary.get(key) for key in ("psnr_db", "codebook_use")} | {"colliding_captions": collisions}


def tokenizer_curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """title -> name -> points: the losses of the vision tokenizer's stage together, other figures a chart each."""
    losses = dict.fromkeys(name for line in lines for name in line if name == "loss" or name.startswith("loss_"))
    charts = {"loss": {name.removeprefix("loss_") if name != "loss" else "all": curve(lines, name) for name in losses}}
    charts |= {name.replace("_", " "): {"all": curve(lines, name)} for name in TOKENIZER_FIGURES}
    found = {title: {name: points for name, points in chart.items() if points} for title, chart in charts.items()}
    return {title: chart for title, chart in found.items() if chart}


def collect_dida(evaluations: dict[str, dict[str, Any]], entries: dict[str, Any]) -> dict[str, Any] | None:
    """Parallel against token-by-token decoding, of the evaluation `dida`; None where a run has none.

    Ratios are of ar to dida: of forward passes and of seconds of one answer at batch 1. `ar_after_minus_before` is the
    change of token-by-token accuracies since the evaluation `final`, by task that both asked as many prompts.
    """
    evaluation, final = evaluations.get("dida", {}), evaluations.get("final", {})
    decoders = members(evaluation, "decoders")
    ar, dida = members(decoders, "ar"), members(decoders, "dida")
    if not ar or not dida:
        return None
    by_steps = members(dida, "by_steps")
    return {
        "joint_ar": ar.get("joint"),
        "joint_by_steps": {steps: one.get("joint") for steps, one in by_steps.items()},
        "entropy_ratio_by_steps": {steps: one.get("entropy_ratio") for steps, one in by_steps.items()},
        "accuracies_by_steps": {steps: members(one, "accuracies") for steps, one in by_steps.items()},
        "num_prompts_by_steps": {steps: members(one, "num_prompts") for steps, one in by_steps.items()},
        "chosen_steps": evaluation.get("dida_steps"),
        "accuracies": {name: members(one, "accuracies") for name, one in decoders.items()},
        "num_prompts": members(dida, "num_prompts"),
        "difference_from_ar": {name: members(one, "difference_from_ar") for name, one in decoders.items()},
        "forwards_ratio": ratio(ar.get("num_forwards"), dida.get("num_forwards")),
        "wall_ratio_batch1": ratio(ar.get("seconds"), dida.get("seconds")),
        "ar_after_minus_before": change_of_ar(ar, final),
        "wall_seconds": members(entries, "dida").get("wall_seconds"),
        "refinement": dida.get("refinement"),
    }


def change_of_ar(ar: dict[str, Any], final: dict[str, Any]) -> dict[str, float]:
    """Of more prompts, or fewer, an accuracy is another one without any change of the model."""
    before, asked, judged = members(final, "metrics"), members(ar, "num_prompts"), members(final, "tasks")
    return {
        task: value - before[task]
        for task, value in members(ar, "accuracies").items()
        if task in before and members(judged, task).get("count") == asked.get(task)
    }


def collect_rollout(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy after each step of world rollouts, of dida where it was compared, else of ar; `by_decoder` has all."""
    decoders = members(evaluations.get("dida", {}), "decoders")
    by_decoder = {name: found for name, one in decoders.items() if (found := members(one, "rollout"))}
    chosen = by_decoder.get("dida") or by_decoder.get("ar")
    if chosen is None:
        return None
    return {
        "accuracy_by_step": chosen.get("accuracy_by_step"),
        "strips": chosen.get("strips"),
        "by_decoder": by_decoder,
    }


def ratio(above: Any, below: Any) -> float | None:
    return above / below if isinstance(above, int | float) and isinstance(below, int | float) and below else None


def members(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def collect_samples(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of fresh weights last and in groups of their own."""
    found = []
    for name in sorted(evaluations.keys() - {FROM_SCRATCH}, key=lambda name: (name == "untrained", name)):
        for sample in evaluations[name].get("samples", []):
            group = str(sample.get("group", "samples"))
            found.append(sample | {"group": f"{group}, untrained" if name == "untrained" else group})
    return found


def collect_metrics(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whatever the evaluations measured; those of the shapes world are there, as null, before they are known.

    `X_untrained` is X of the evaluation `untrained`. Of a metric that several others have, the first counts.
    """
    found: dict[str, Any] = dict.fromkeys(METRICS)
    for name, evaluation in evaluations.items():
        if name == FROM_SCRATCH:
            continue
        ending = "_untrained" if name == "untrained" else ""
        for metric, value in members(evaluation, "metrics").items():
            if found.get(metric + ending) is None:
                found[metric + ending] = value
    found["baselines"] = collect_baselines(evaluations)
    seen: dict[str, float] = {}
    for name, evaluation in evaluations.items():
        for task, entry in accuracies(members(evaluation, "seen")) if name not in OTHER_WEIGHTS else ():
            seen.setdefault(task, entry["accuracy"])
    return found | {"seen_accuracy": seen, "num_prompts": num_prompts(evaluations)}


def collect_baselines(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """task -> name of a baseline -> accuracy, of several evaluations the first's.

    The same tasks by fresh weights, or by the last stage alone, are baselines too.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, evaluation in evaluations.items():
        if name in OTHER_WEIGHTS:
            for task, accuracy in members(evaluation, "metrics").items():
                if is_number(accuracy):
                    found[task][name] = accuracy
        for task in members(evaluation, "baselines") if name not in OTHER_WEIGHTS else ():
            for baseline, entry in accuracies(members(members(evaluation, "baselines"), task)):
                found[task].setdefault(baseline, entry["accuracy"])
    return dict(found)


def accuracies(entries: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Those that have an accuracy."""
    return [(name, one) for name, one in entries.items() if isinstance(one, dict) and is_number(one.get("accuracy"))]


def num_prompts(evaluations: dict[str, dict[str, Any]]) -> int | None:
    """The smallest number of prompts among the tasks of the headline, or among all where none of them is there."""
    counts = [
        (task, entry["count"])
        for name, evaluation in evaluations.items()
        if name not in OTHER_WEIGHTS
        for task, entry in members(evaluation, "tasks").items()
        if isinstance(entry, dict) and isinstance(entry.get("count"), int)
    ]
    named = [count for task, count in counts if task in METRICS]
    return min(named or [count for _, count in counts], default=None)


def collect_stage(folder: StageFolder, summary: StageSummary) -> dict[str, Any]:
    lines, stage = folder.metrics(), {key: summary.values.get(key) for key in STAGE_KEYS}
    configuration = folder.configuration()
    stage["run"] = how_it_ran(folder, configuration)
    data = members(folder.settings(), "data")
    # Under reinforcement learning the loss says nothing: it is zero on the mean where nothing has drifted.
    stage["curves"] = {
        name: curve(lines, key)
        for name, key in ([] if summary.objective == REWARDED else ALL_LOSSES)
        if any(line.get(key) is not None for line in lines)
    }
    stage["held_out"] = held_out_curves(lines)
    stage["figures"] = {name: found for name in FIGURES if (found := curve(lines, name))}
    shares = shares_asked(data, max([1, *(int(line["step"]) for line in lines if is_number(line.get("step")))]))
    datasets = {name: entry for name, entry in members(data, "datasets").items() if name in shares}
    stage["mixture"] = mixture(lines, shares, sources_of(datasets, folder.damages))
    stage["data_read"] = folder.data_read()
    return stage


def how_it_ran(folder: StageFolder, configuration: dict[str, Any]) -> dict[str, Any]:
    """What is needed to do it again. `files` are those of the stage's folder that say more."""
    files = (CONFIG_NAME, METRICS_NAME, EVENTS_NAME, "tensorboard", "wandb")
    return {
        "seed": configuration.get("seed"),
        "model": members(configuration, "model").get("name"),
        "dtype": members(configuration, "model").get("dtype"),
        "sequence_length": members(configuration, "stage").get("sequence_length"),
        "global_batch_size": members(configuration, "stage").get("global_batch_size"),
        "learning_rate": members(members(configuration, "stage"), "optimizer").get("learning_rate"),
        **{name: members(configuration, name) for name in RECORDED},
        "files": [f"{folder.path.name}/{name}" for name in files if (folder.path / name).exists()],
    }


def held_out_curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Of each set that was measured in the loop, by class of token."""
    measured = [line for line in lines if members(line, HELD_OUT)]
    sets = dict.fromkeys(name for line in measured for name in line[HELD_OUT])
    found = {}
    for name in sets:
        own = [{"step": line["step"]} | members(line[HELD_OUT], name) for line in measured]
        found[name] = {kind: points for kind in ("all", *CLASSES) if (points := curve(own, kind))}
    return found


def curve(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, mean value) of up to MAX_CURVE_POINTS windows of equal width."""
    points = [(float(line["step"]), float(line[key])) for line in lines if is_number(line.get(key))]
    width = max(1, -(-len(points) // MAX_CURVE_POINTS))
    windows = [points[start : start + width] for start in range(0, len(points), width)]
    return [(window[-1][0], sum(loss for _, loss in window) / len(window)) for window in windows]


def shares_asked(data: dict[str, Any], num_steps: int) -> dict[str, float]:
    """The share of each dataset that `stage.data` asked for, on the mean of so many steps; those with none are left out."""
    entries = {name: entry for name, entry in members(data, "datasets").items() if isinstance(entry, dict)}
    weights = {name: float(entry.get("weight", 1.0)) for name, entry in entries.items()}
    phases = [(0, weights)]
    for change in sorted(members(data, "weight_changes").values(), key=lambda change: int(change["from_step"])):
        weights = weights | {name: float(weight) for name, weight in change["weights"].items()}
        phases.append((int(change["from_step"]), weights))
    shares: dict[str, float] = defaultdict(float)
    for (first, weights), end in zip(phases, [*(first for first, _ in phases[1:]), num_steps], strict=True):
        during = max(0, min(end, num_steps) - first) / num_steps
        for name, weight in weights.items():
            shares[name] += during * weight / (sum(weights.values()) or 1.0)
    return {name: share for name, share in shares.items() if share > 0}


def sources_of(datasets: dict[str, dict[str, Any]], damages: Damages) -> dict[str, dict[str, int]]:
    """Packed tokens of each source by dataset: metrics count by source, and a packed dataset mixes one or more."""
    return {
        name: members(read_object(Path(entry.get("path", "")) / "dataset.json", damages), "sources")
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


def manifests(folder: Path, kind: str, damages: Damages) -> Iterable[tuple[str, dict[str, Any]]]:
    """(dataset, manifest) of every complete shard of that kind below `folder`."""
    for path in sorted(folder.rglob("[0-9]*.json")):
        manifest = read_object(path, damages)
        absent = [name for name in NEEDED[kind] if name not in manifest]
        if manifest.get("kind") != kind:
            continue
        if absent:
            damages.note(path, f"it has no {', '.join(absent)}")
        else:
            yield path.parent.relative_to(folder).as_posix(), manifest


def collect_packing(folder: Path, damages: Damages) -> dict[str, Any]:
    """`fill`: real tokens / all positions of all rows, over every packed dataset and for each."""
    real: dict[str, int] = defaultdict(int)
    positions: dict[str, int] = defaultdict(int)
    rows: dict[str, int] = defaultdict(int)
    for dataset, manifest in manifests(folder, "packed", damages):
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


def collect_tokens(folder: Path, damages: Damages) -> list[dict[str, Any]]:
    """Documents, tokens by class and quarantined samples by reason of every tokenized dataset."""
    datasets: dict[str, dict[str, Any]] = {}
    for dataset, manifest in manifests(folder, "tokens", damages):
        entry = datasets.setdefault(
            dataset, {"dataset": dataset, "documents": 0, "tokens": 0, "by_class": {}, "quarantined": {}}
        )
        entry["documents"] += manifest.get("num_documents", 0)
        entry["tokens"] += manifest.get("num_tokens", 0)
        for source, target in (("counts_by_class", "by_class"), ("quarantined", "quarantined")):
            for name, count in (manifest.get(source) or {}).items():
                entry[target][name] = entry[target].get(name, 0) + count
    return list(datasets.values())
