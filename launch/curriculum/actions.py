"""What `nextstate curriculum` and `nextstate demo` do: run, status, cancel, resume, logs; and the table they print."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from launch.curriculum.entries import STATE_NAME, Curriculum, CurriculumConfig, alive, logs_of, summary
from launch.curriculum.running import run_curriculum
from model.errors import UserError
from training.callbacks.progress import format_seconds

SAID = {"status": "show", "cancel": "cancel", "logs": "show logs of", "resume": "resume"}


def act(config: CurriculumConfig) -> dict[str, Any]:
    """The answer of the action that the configuration names."""
    if config.action != "run":
        refuse_unknown(config)
    action = {"status": status, "cancel": cancel, "logs": logs}.get(config.action, start)
    return action(config)


def refuse_unknown(config: CurriculumConfig) -> None:
    """Raises `UserError` where no curriculum has run: a misspelt name would look like one that waits."""
    folder = Path(config.run_folder)
    if (folder / STATE_NAME).exists():
        return
    beside = sorted(path.parent for path in folder.parent.glob(f"*/{STATE_NAME}"))
    raise UserError(
        f"there is no curriculum to {SAID[config.action]}",
        where=str(folder),
        expected=", ".join(f"run_folder={path}" for path in beside),
        got="a folder in which none has run" if folder.is_dir() else "no such folder",
        fix=f"{'one of these, or ' if beside else ''}start it: nextstate curriculum curriculum=NAME run_folder={folder}",
    )


def start(config: CurriculumConfig) -> dict[str, Any]:
    """Run it here or submit it, once the plan agrees; or show what would happen."""
    from launch.curriculum.chain import run_chain, scripts_of
    from launch.curriculum.foresight import forecast, refuse_impossible

    if not config.entries:
        raise UserError("the curriculum has no entries", fix="nextstate curriculum curriculum=demo")
    if config.dry_run:
        return forecast(config) | ({"scripts": scripts_of(config)} if config.scripts else {})
    composed = refuse_impossible(config)
    return run_curriculum(config, composed) if config.cluster.kind == "local" else run_chain(config, composed)


def status(config: CurriculumConfig) -> dict[str, Any]:
    if not has_jobs(config):
        return summary(Curriculum(config))
    from launch.cluster import slurm
    from launch.curriculum.chain import read_chain, report

    return report(read_chain(config, slurm.queue()))


def cancel(config: CurriculumConfig) -> dict[str, Any]:
    """On this machine: the running entry gets SIGTERM, saves, and the curriculum ends with it."""
    if has_jobs(config):
        from launch.curriculum.chain import cancel_chain

        return cancel_chain(config)
    curriculum = Curriculum(config)
    for record in curriculum.records.values():
        if record.state == "running" and alive(record.process):
            os.kill(int(record.process[0]), signal.SIGTERM)
    return summary(curriculum)


def has_jobs(config: CurriculumConfig) -> bool:
    """True when entries were given to a cluster, whatever the configuration of this call says."""
    curriculum = Curriculum(config)
    if any(record.state == "submitted" for record in curriculum.records.values()):
        return True
    known = [(curriculum.folder / "jobs" / name / "job.json").exists() for name in curriculum.order]
    return any(known) and shutil.which("squeue") is not None


def logs(config: CurriculumConfig) -> dict[str, Any]:
    folder = Path(config.run_folder)
    names = [config.entry] if config.entry else Curriculum(config).order
    tails = {
        str(path): path.read_text("utf-8", "replace").splitlines()[-config.num_lines :]
        for name in names
        for path in logs_of(folder, name)
    }
    if not tails:
        raise UserError("nothing has been logged yet", where=str(folder), got=", ".join(names))
    return {"name": config.name, "logs": tails}


def render(answer: dict[str, Any]) -> str:
    if "logs" in answer:
        return "\n".join("\n".join([f"== {path}", *lines]) for path, lines in answer["logs"].items())
    if "planned" in answer:
        return forecast(answer)
    titles = ("entry", "state", "done", "tokens", "rate", "left", "seconds", "GiB", "jobs", "restarts", "figures")
    rows = [titles, *(row(entry) for entry in answer["entries"])]
    if not any(entry["job_ids"] for entry in answer["entries"]):
        rows = [(*line[:8], line[-1]) for line in rows]  # nothing is a job of a cluster
    ends = [f"{entry['name']}: {entry['last_words']}" for entry in answer["entries"] if entry["last_words"]]
    return "\n".join([table(rows, words=(0, 1, len(rows[0]) - 1)), *ends])


def forecast(answer: dict[str, Any]) -> str:
    """The table of a dry run, what does not fit and why, and the scripts where they are asked for."""
    from launch.curriculum.foresight import render_forecast

    parts = [table(render_forecast(answer), words=(0, 1, 8))]
    parts += [f"{one['name']}: {text}" for one in answer["planned"] for text in one.get("problems", [])]
    parts += [f"== {name}\n{script}" for name, script in answer.get("scripts", {}).items()]
    return "\n".join(parts)


def table(rows: Sequence[Sequence[str]], *, words: Collection[int]) -> str:
    """Columns below each other; those of `words` begin on the left, those of figures end on the right."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in words else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in rows
    )


def row(entry: dict[str, Any]) -> tuple[str, ...]:
    step, total, rate = entry.get("step"), entry.get("total"), entry.get("rate")
    tokens, left = entry.get("tokens"), entry.get("eta_seconds")
    is_over = entry["state"] not in ("running", "queued")
    so_far = "" if step is None else f"{step:,}" + ("" if total is None else f"/{total:,}")
    figures = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in entry.get("figures", {}).items())
    return (
        entry["name"],
        entry["state"],
        so_far and f"{so_far} {entry['unit']}",
        "" if tokens is None else f"{tokens:,}",
        "" if rate is None else f"{rate:,.0f} {entry['rate_unit']}",
        "" if left is None or is_over else format_seconds(left),
        f"{entry['wall_seconds']:,.1f}",
        f"{entry['peak_memory_bytes'] / 2**30:.2f}" if entry["peak_memory_bytes"] else "",
        ",".join(entry["job_ids"]),
        str(entry["restarts"]),
        ", ".join(figures),
    )
