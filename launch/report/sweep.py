"""What a sweep found: a table and the loss curves, from what its runs left. `python -m launch.report.sweep FOLDER` writes it.

`FOLDER/sweep.json` says which runs there are. The page may be made at any time; runs that have not begun are empty.
"""

from __future__ import annotations

import html
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipeline.storage.file_errors import of_file_error
from launch.composition.compose import compose_tree
from launch.composition.secrets import without_secrets
from launch.report.charts import Series, line_chart
from launch.report.progress import stage_progress
from launch.report.run_folder import StageFolder
from model.durable import read_json_object, replace_file, write_json
from model.errors import UserError, visible

SWEEP_NAME, SUMMARY_NAME, PAGE_NAME = "sweep.json", "summary.json", "summary.html"
MAX_POINTS = 400  # of a curve
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def record_sweep(command: str, jobs: list[list[str]]) -> Path:
    """Write `sweep.json` beside the runs' folders and return its folder."""
    runs = []
    common = set(jobs[0]).intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    for index, overrides in enumerate(jobs):
        tree = compose_tree(command, overrides)
        run_folder = Path(str(OmegaConf.select(tree, "run_folder")))
        own = [text for text in overrides if text not in common and not text.startswith("run_folder=")]
        folder = run_folder / str(OmegaConf.select(tree, "stage.name"))
        runs.append({"run": index, "overrides": without_secrets(own), "stage_folder": str(folder.absolute())})
    target = Path(str(runs[0]["stage_folder"])).parent.parent
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / SWEEP_NAME, {"command": command, "runs": runs})
    return target


def publish_sweep(folder: Path) -> list[dict[str, Any]]:
    """Write `summary.json` and `summary.html`; the rows of the table, best loss first."""
    if not (folder / SWEEP_NAME).exists():
        raise UserError("there is no sweep here", where=str(folder), expected=SWEEP_NAME)
    damaged, fix = "the list of the sweep's runs is damaged", "start the sweep again: runs that are done are kept"
    sweep = read_json_object(folder / SWEEP_NAME, damaged=damaged, fix=fix)
    rows = [describe_run(run) for run in sweep["runs"]]
    rows.sort(key=lambda row: (row["loss"] is None, row["loss"] or 0.0))
    write_json(folder / SUMMARY_NAME, {"rows": rows})
    replace_file(folder / PAGE_NAME, page(rows, curves(sweep["runs"]), losses_by_value(rows)))
    return rows


def describe_run(run: dict[str, Any]) -> dict[str, Any]:
    """Figures of one run; `loss` is the mean of the last steps where the stage is finished."""
    folder = Path(run["stage_folder"])
    row = {"run": run["run"], "overrides": run["overrides"], "state": "not begun", "step": None, "loss": None}
    progress = stage_progress(folder)
    if progress:
        row |= {"state": "unfinished", "step": progress["step"], "loss": progress["loss"]}
    summary = StageFolder(folder).summary()
    if summary is not None:
        row |= {"state": "done", "step": summary.steps, "loss": summary.loss_last}
        row |= {name: summary.values[name] for name in ("tokens", "wall_seconds") if name in summary.values}
    return row


def curves(runs: list[dict[str, Any]]) -> Series:
    series: Series = {}
    for run in runs:
        lines = StageFolder(Path(run["stage_folder"])).metrics()
        points = [(float(line["step"]), float(line["loss"])) for line in lines if line.get("loss") is not None]
        if points:
            series[f"run_{run['run']}"] = points[:: max(1, len(points) // MAX_POINTS)]
    return series


def losses_by_value(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """For each swept key whose values are numbers: (value, loss), a line for each choice of the other keys."""
    charts: dict[str, Series] = {}
    for row in rows:
        for chosen in row["overrides"]:
            key, _, text = chosen.partition("=")
            with suppress(ValueError):
                value, others = float(text), [one for one in row["overrides"] if one != chosen]
                if row["loss"] is not None:
                    # A name that CSS takes as a class.
                    name = re.sub(r"[^\w]+", "_", " ".join(others)) or "all_runs"
                    charts.setdefault(key, {}).setdefault(name, []).append((value, row["loss"]))
    for series in charts.values():
        for points in series.values():
            points.sort()
    return charts


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal."""
    lines = [f"{'run':>4}  {'loss':>9}  {'step':>8}  {'state':<11} values"]
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        step = "" if row["step"] is None else row["step"]
        lines.append(f"{row['run']:>4}  {loss:>9}  {step:>8}  {row['state']:<11} {' '.join(row['overrides'])}")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]], series: Series, by_value: dict[str, Series]) -> str:
    """One HTML file that needs no network; the chart is SVG."""
    cells = ("run", "loss", "step", "state")
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(str('' if row[cell] is None else row[cell]))}</td>" for cell in cells)
        + f"<td><code>{html.escape(' '.join(row['overrides']))}</code></td></tr>"
        for row in rows
    )
    colours = "".join(
        f".line.{name}{{stroke:{colour}}}i.{name}{{background:{colour}}}"
        for lines in (series, *by_value.values())
        for index, name in enumerate(lines)
        for colour in [COLOURS[index % len(COLOURS)]]
    )
    chart = line_chart(series, x_label="step", y_label="loss")
    for key, lines in by_value.items():
        chart += f"<h2>{html.escape(key)}</h2>{line_chart(lines, x_label=key, y_label='loss')}"
    head = "".join(f"<th>{cell}</th>" for cell in (*cells, "values"))
    return (
        f'<!doctype html><meta charset="utf-8"><title>Sweep</title><style>{STYLE}{colours}</style>'
        f"<h1>Sweep</h1>{chart}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"
    )


STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "svg{width:100%}text{font-size:11px;fill:#555}.grid{stroke:#ddd}.line{fill:none;stroke-width:1.5}"
    ".legend{list-style:none;display:flex;flex-wrap:wrap;gap:1rem;padding:0}"
    ".legend i{display:inline-block;width:1rem;height:.25rem;margin-right:.4rem;vertical-align:middle}"
    "table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #ddd}"
)


def main() -> int:
    try:
        rows = publish_sweep(Path(sys.argv[1]))
    except (UserError, OSError) as error:
        told = error if isinstance(error, UserError) else of_file_error(error)
        if told is None:
            raise
        print(visible(f"error: {told}"), file=sys.stderr)
        return 2
    print(visible(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
