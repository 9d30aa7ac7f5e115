"""`report.html`: one file, no scripts, pictures as data URIs; readable in a light and a dark theme."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from launch.report.charts import Series, line_chart, share_bars
from launch.report.collect import members
from launch.report.reinforcement import reinforcement_section
from launch.report.run_folder import is_number
from launch.report.tables import table
from training.config import RECORDED

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
METRIC_TITLES = {
    "t2i_accuracy": "text to image",
    "next_state_accuracy": "next state",
    "edit_accuracy": "edit",
    "reconstruction_accuracy": "ceiling: reconstructions",
    "t2i_accuracy_untrained": "text to image, untrained",
}
MAX_SAMPLES_SHOWN = 24
MAX_PAIRS_SHOWN = 5
WANTED_NOTE = "<p>Behind the arrow what was made, behind the line what was wanted; below it what the judge says.</p>"


def render_page(report: dict[str, Any], run_folder: Path) -> str:
    title = html.escape(str(report["name"]))
    sections = [
        headline(report),
        section("Accuracies and what they stand beside", baseline_table(report["metrics"])),
        section("Stages", stage_table(report["stages"])),
        section("How it was run", run_table(report["stages"])),
        section("Captions that share all codes", collision_table(report["tokenizer"]["colliding_captions"])),
        section("Tokenizer", charts_of(list(report["tokenizer_curves"].items()), "")),
        section("Loss by class of token", curves(report["stages"])),
        section("Held-out loss", charts_of(held_out(report["stages"]), "loss")),
        section("Rate, gradient norm, speed", charts_of(figures(report["stages"]), "")),
        section("Reinforcement learning", reinforcement_section(report["rl"], report["rl_curves"])),
        section("Mixture as consumed", mixtures(report["stages"])),
        section("Data read", data_read_table(report["stages"])),
        section("Images in parallel", dida_tables(report["dida"], run_folder)),
        section("World rollout", rollout(report["rollout"], run_folder)),
        samples(report["samples"], run_folder),
        section("Data", token_table(report["tokens"]) + packing_table(report["packing"]["datasets"])),
        section("Time and memory", entry_table(report["entries"])),
        section("Could not be read", damage_list(report["damaged"])),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} - nextstate</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{''.join(sections)}</main></body></html>\n"
    )


def damage_list(damaged: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in damaged)}</ul>" if damaged else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def headline(report: dict[str, Any]) -> str:
    """The few figures that say whether the run was good."""
    metrics = report["metrics"].items()
    measured = {name: value for name, value in metrics if isinstance(value, int | float) and name != "num_prompts"}
    names = [name for name in METRIC_TITLES if name in measured]
    names += [name for name in measured if name not in METRIC_TITLES]
    figures = [(METRIC_TITLES.get(name, name.replace("_", " ")), percent(measured[name])) for name in names]
    tokenizer = report["tokenizer"]
    figures += [
        ("tokenizer PSNR", unit(tokenizer["psnr_db"], "dB", 1)),
        ("codes in use", percent(tokenizer["codebook_use"])),
        ("packing fill", percent(report["packing"]["fill"], 2)),
        ("wall time", unit(minutes(report["wall_seconds"]), "min", 1)),
        ("peak memory", unit(gibibytes(report["peak_memory_bytes"]), "GiB", 2)),
    ]
    items = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures)
    prompts = report["metrics"].get("num_prompts")
    note = f"<p>Accuracies on {prompts} held-out prompts a task at least.</p>" if isinstance(prompts, int) else ""
    return f'<dl class="figures">{items}</dl>{note}'


def baseline_table(metrics: dict[str, Any]) -> str:
    """A row a task: the model on what is held out and on what it has seen, then each baseline."""
    baselines, seen = metrics.get("baselines") or {}, metrics.get("seen_accuracy") or {}
    tasks = [task for task in metrics if task in baselines or task in seen]
    names = list(dict.fromkeys(name for task in tasks for name in baselines.get(task, {})))
    header = ["task", "held out", "seen in training", *(name.replace("_", " ") for name in names)]
    rows = [
        [METRIC_TITLES.get(task, task.replace("_", " ")), percent(metrics[task]), percent(seen.get(task))]
        + [percent(baselines.get(task, {}).get(name)) for name in names]
        for task in tasks
    ]
    return table(header, rows)


def rollout(found: dict[str, Any] | None, run_folder: Path) -> str:
    """The accuracy after each step, and strips of frames."""
    if found is None:
        return ""
    rows = [
        [name, *(percent(share, 0) for share in one.get("accuracy_by_step") or [])]
        for name, one in found["by_decoder"].items()
    ]
    steps = [str(number) for number in range(1, len(found["accuracy_by_step"] or []) + 1)]
    strips = "".join(picture(run_folder / "evaluation" / name) for name in found["strips"] or [])
    note = "<p>Each frame is made from the one before it and words; right means that all shapes are where they should be.</p>"
    return note + table(["decoder", *steps], rows) + f'<div class="strips">{strips}</div>'


def fewer_prompts(counts: dict[str, int], most: dict[str, int]) -> str:
    """A note where accuracies are of the first prompts alone."""
    few = sorted({count for task, count in counts.items() if count < most.get(task, 0)})
    return f" (accuracies of {few[0]} prompts)" if few else ""


def dida_tables(dida: dict[str, Any] | None, run_folder: Path) -> str:
    """Quality against steps, what is saved, and pictures on their way from noise."""
    if dida is None:
        return ""
    tasks = sorted({task for accuracies in dida["accuracies"].values() for task in accuracies})

    def right(accuracies: dict[str, Any]) -> list[str]:
        return [percent(accuracies.get(task)) for task in tasks]

    steps = [
        [
            steps + fewer_prompts(dida["num_prompts_by_steps"][steps], dida["num_prompts"]),
            *right(dida["accuracies_by_steps"][steps]),
            percent(joint),
            percent(dida["entropy_ratio_by_steps"].get(steps)),
        ]
        for steps, joint in dida["joint_by_steps"].items()
    ]
    ar = dida["accuracies"].get("ar", {})
    steps.append(["token by token", *right(ar), percent(dida["joint_ar"]), percent(1.0)])
    rows = [
        [
            name,
            *(percent(values.get(task)) + against(members(dida["difference_from_ar"][name], task)) for task in tasks),
        ]
        for name, values in dida["accuracies"].items()
    ]
    note = (
        f"<p>{html.escape(str(dida['chosen_steps']))} steps an image: {unit(dida['forwards_ratio'], 'times', 1)} fewer forward "
        f"passes and {unit(dida['wall_ratio_batch1'], 'times', 1)} faster than token by token, for one answer at a time. "
        "In brackets: the difference from token by token on the same prompts, and its 95% interval. "
        "Joint: agreement of neighbouring codes with a second sample of token-by-token decoding.</p>"
    )
    headers = [METRIC_TITLES.get(task, task.replace("_", " ")) for task in tasks]
    strips = "".join(picture(run_folder / "evaluation" / name) for name in dida["refinement"] or [])
    told = "<p>Pictures before each step, from noise, and the finished ones.</p>" if strips else ""
    return (
        note
        + table(["steps", *headers, "joint", "entropy"], steps)
        + table(["decoder", *headers], rows)
        + told
        + f'<div class="strips">{strips}</div>'
    )


def against(difference: dict[str, Any]) -> str:
    """What stands behind an accuracy in brackets; nothing where no difference is known."""
    mean, interval = difference.get("mean"), difference.get("interval")
    if not is_number(mean):
        return ""
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
        return f" ({mean:+.1%})"
    low, high = interval
    return f" ({mean:+.1%}, {low:+.1%} to {high:+.1%})"


def percent(value: Any, digits: int = 1) -> str:
    return f"{value:.{digits}%}" if isinstance(value, int | float) else "-"


def unit(value: Any, name: str, digits: int) -> str:
    return f"{value:.{digits}f} {name}" if isinstance(value, int | float) else "-"


def minutes(seconds: Any) -> float | None:
    return seconds / 60 if isinstance(seconds, int | float) else None


def gibibytes(num_bytes: Any) -> float | None:
    return num_bytes / 2**30 if isinstance(num_bytes, int | float) else None


def stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(stage["name"]),
            " x ".join(f"{name} {stage[key]}" for name, key in LAYOUT if (stage[key] or 1) > 1) or "1 process",
            whole(stage["steps"]),
            whole(stage["tokens"]),
            unit(stage["loss_first"], "", 3),
            unit(stage["loss_last"], "", 3),
            unit(stage["wall_seconds"], "s", 0),
        ]
        for stage in stages
    ]
    return table(["stage", "layout", "steps", "tokens", "first loss", "last loss", "time"], rows)


def run_table(stages: list[dict[str, Any]]) -> str:
    """What is needed to do it again, and links to the files that say more; they are relative to the run folder."""
    names = ("seed", "model", "dtype", "sequence_length", "global_batch_size", "learning_rate")
    header = ["stage", *(name.replace("_", " ") for name in names), "versions", "machine"]
    rows = [
        [str(stage["name"]), *("-" if stage["run"][name] is None else str(stage["run"][name]) for name in names)]
        + [", ".join(f"{key} {value}" for key, value in stage["run"][part].items()) or "-" for part in RECORDED]
        for stage in stages
    ]
    paths = [path for stage in stages for path in stage["run"]["files"]]
    links = " ".join(f'<a href="{html.escape(quote(path))}">{html.escape(path)}</a>' for path in paths)
    return table(header, rows) + (f"<p>{links}</p>" if links else "")


def collision_table(collisions: dict[str, dict[str, Any]]) -> str:
    """Pictures that nothing behind the vision tokenizer can tell apart, by the size of the pictures."""
    rows = [
        [f"{area} pixels", whole(one["pairs"]), whole(one["captions"]), "; ".join(one["names"][:MAX_PAIRS_SHOWN])]
        for area, one in collisions.items()
    ]
    return table(["pictures of", "pairs", "captions compared", "which"], rows)


LAYOUT = (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"), ("DP", "data"))


def whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def curves(stages: list[dict[str, Any]]) -> str:
    return charts_of([(str(stage["name"]), stage["curves"]) for stage in stages if stage["curves"]], "loss")


def held_out(stages: list[dict[str, Any]]) -> list[tuple[str, Series]]:
    return [(f"{stage['name']}: {name}", series) for stage in stages for name, series in stage["held_out"].items()]


def figures(stages: list[dict[str, Any]]) -> list[tuple[str, Series]]:
    """A chart a figure: their scales differ."""
    return [
        (f"{stage['name']}: {name.replace('_', ' ')}", {"all": points})
        for stage in stages
        for name, points in stage["figures"].items()
    ]


def charts_of(charts: list[tuple[str, Series]], y_label: str) -> str:
    shown = [
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f"{line_chart(series, x_label='step', y_label=y_label or title)}</figure>"
        for title, series in charts
    ]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def mixtures(stages: list[dict[str, Any]]) -> str:
    charts = []
    for stage in stages:
        rows = [(one["source"], one["share"], one["weight"]) for one in stage["mixture"] if one["share"] is not None]
        if rows:
            charts.append(
                f"<figure><figcaption>{html.escape(str(stage['name']))}</figcaption>{share_bars(rows)}</figure>"
            )
    note = "<p>Bars: share of the tokens that carried loss. Ticks: share of the packed tokens that the configuration asks for.</p>"
    return f'{note}<div class="charts">{"".join(charts)}</div>' if charts else ""


def data_read_table(stages: list[dict[str, Any]]) -> str:
    """How far each stage has brought the reading of its datasets; past one epoch rows repeat."""
    rows = [
        [str(stage["name"]), dataset, whole(read["num_rows"]), whole(read["rows_read"]), unit(read["epochs"], "", 2)]
        for stage in stages
        for dataset, read in stage["data_read"].items()
    ]
    return table(["after stage", "packed dataset", "rows", "rows read so far", "epochs"], rows)


def samples(entries: list[dict[str, Any]], run_folder: Path) -> str:
    """Grids of pictures with their prompts, one grid a group, in the order of the evaluation's file."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[str(entry.get("group", "samples"))].append(entry)
    parts = []
    for name, shown in groups.items():
        cards = "".join(sample_card(one, run_folder) for one in shown[:MAX_SAMPLES_SHOWN])
        note = WANTED_NOTE if any(one.get("wanted_images") for one in shown) else ""
        parts.append(section(name.replace("_", " ").capitalize(), f'{note}<div class="samples">{cards}</div>'))
    return "".join(parts)


def sample_card(entry: dict[str, Any], run_folder: Path) -> str:
    """The pictures of the prompt, the pictures of the answer, and the words of the prompt."""
    folder = run_folder / "evaluation"
    kinds = {"given": "prompt_images", "made": "images", "wanted": "wanted_images"}
    groups = {kind: "".join(picture(folder / path) for path in entry.get(key) or []) for kind, key in kinds.items()}
    shown = "".join(f'<div class="{kind}" title="{kind}">{group}</div>' for kind, group in groups.items() if group)
    correct = entry.get("correct")
    verdict = "" if correct is None else ' class="right"' if correct else ' class="wrong"'
    words = html.escape(str(entry.get("prompt", "")))
    reason = f"<br><b>{html.escape(str(entry['reason']))}</b>" if entry.get("reason") else ""
    return f'<figure{verdict}><div class="pictures">{shown}</div><figcaption>{words}{reason}</figcaption></figure>'


def picture(path: Path) -> str:
    if not path.is_file():
        return f'<span class="absent">{html.escape(path.name)} is missing</span>'
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}">'


def token_table(datasets: list[dict[str, Any]]) -> str:
    rows = [
        [
            one["dataset"],
            whole(one["documents"]),
            whole(one["tokens"]),
            ", ".join(f"{name} {count:,}" for name, count in one["by_class"].items()),
            ", ".join(f"{name} {count:,}" for name, count in one["quarantined"].items()) or "none",
        ]
        for one in datasets
    ]
    return table(["tokenized dataset", "documents", "tokens", "by class", "quarantined"], rows)


def packing_table(datasets: list[dict[str, Any]]) -> str:
    rows = [[one["dataset"], whole(one["rows"]), whole(one["tokens"]), percent(one["fill"], 2)] for one in datasets]
    return table(["packed dataset", "rows", "tokens", "fill"], rows)


def entry_table(entries: list[dict[str, Any]]) -> str:
    rows = [
        [
            one["name"],
            str(one["state"]),
            unit(one["wall_seconds"], "s", 1),
            unit(gibibytes(one["peak_memory_bytes"]), "GiB", 2),
        ]
        for one in entries
    ]
    return table(["entry", "state", "time", "peak memory"], rows)
