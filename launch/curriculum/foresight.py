"""What the plan says of the stages of a curriculum before any of them starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launch.cluster.named_files import refuse_absent_files
from launch.composition.compose import to_object
from launch.curriculum.agreement import disagreements
from launch.curriculum.entries import Composed, Curriculum, CurriculumConfig, due
from launch.plan.places import place_of
from launch.plan.preflight import Verdict, judge, judge_start
from model.errors import UserError


@dataclass
class Seen:
    """A stage of an entry, and what the plan says of it."""

    name: str  # of the entry
    verdict: Verdict


def foresee(curriculum: Curriculum, names: Iterable[str], *, starts: bool = True) -> list[Seen]:
    """Of every stage that these entries train; none of an entry that trains nothing, or insists (preflight=false).

    `starts`: the disk of the run folder counts too; a dry run may be made on another machine.
    """
    place = place_of(curriculum.config.cluster)
    stages = [
        (name, to_object(call))
        for name in names
        if curriculum.config.entries[name].command == "train"
        for call in curriculum.calls(name)
    ]
    ask = judge_start if starts else judge
    return [Seen(name, ask(stage, place)) for name, stage in stages if stage.preflight]


def refuse_impossible(config: CurriculumConfig) -> Composed:
    """Ask the plan of every stage that is to be trained, before the first entry starts. Inputs may still be made.

    The configurations that were composed for it, which a `Curriculum` of the same entries need not compose again.
    """
    curriculum = Curriculum(config)
    if config.preflight:
        impossible = [seen for seen in foresee(curriculum, due(curriculum)) if seen.verdict.problems]
        if impossible:
            raise UserError("\n".join(f"{seen.name}: {seen.verdict.error()}" for seen in impossible))
        other = disagreements(curriculum)
        if other:
            raise UserError(
                "entries of this curriculum do not fit one another",
                got="; ".join(other),
                fix="set these keys alike in all of them: set.ENTRY.KEY=VALUE. preflight=false starts it all the same",
            )
        if config.cluster.kind == "slurm":
            refuse_absent_files(config.cluster)
    return curriculum.composed


def forecast(config: CurriculumConfig) -> dict[str, Any]:
    """What a run would do: one item an entry in `planned`. Nothing is written and no queue is asked."""
    curriculum = Curriculum(config)
    names = due(curriculum)
    seen: dict[str, list[Verdict]] = {}
    for one in foresee(curriculum, names, starts=False):
        seen.setdefault(one.name, []).append(one.verdict)
    planned = [row(curriculum, name, name in names, seen.get(name, [])) for name in curriculum.order]
    return {"name": config.name, "run_folder": str(curriculum.folder), "ran": [], "entries": [], "planned": planned}


def row(curriculum: Curriculum, name: str, is_due: bool, verdicts: list[Verdict]) -> dict[str, Any]:
    """One entry. Hours are those of all its stages; nodes and memory those of the largest."""
    entry, cluster = curriculum.config.entries[name], curriculum.config.cluster
    found: dict[str, Any] = {
        "name": name,
        "what": entry.command or entry.module,
        "is_due": is_due,
        "needs": entry.needs,
        "calls": max(1, len(entry.each)) * entry.shares,
    }
    plans = [verdict.plan for verdict in verdicts if verdict.plan is not None]
    if plans:
        world_size = max(plan.layout.world_size for plan in plans)
        per_node = cluster.tasks_per_node or cluster.accelerators_per_node
        days = [verdict.days for verdict in verdicts]
        found |= {
            "ranks": world_size,
            "nodes": 1 if cluster.kind == "local" else -(-world_size // per_node),
            "hours": None if None in days else round(24 * sum(one or 0.0 for one in days), 2),
            "memory_bytes": round(max(verdict.memory_bytes for verdict in verdicts)),
            "fits": not any(verdict.problems for verdict in verdicts),
            "problems": [text for verdict in verdicts for text in verdict.problems],
        }
    return found


def render_forecast(answer: dict[str, Any]) -> list[list[str]]:
    """The lines of the table; hours on a CPU are the least that is possible."""
    titles = ["entry", "runs", "calls", "ranks", "nodes", "hours", "GB", "fits", "needs"]
    rows = []
    for one in answer["planned"]:
        hours, memory = one.get("hours"), one.get("memory_bytes")
        rows.append(
            [
                one["name"],
                one["what"] if one["is_due"] else "up to date",
                str(one["calls"]),
                str(one.get("ranks", "")),
                str(one.get("nodes", "")),
                "" if hours is None else f"{hours:,.1f}",
                "" if memory is None else f"{memory / 1e9:,.1f}",
                {True: "yes", False: "no", None: ""}[one.get("fits")],
                ", ".join(one["needs"]),
            ]
        )
    return [titles, *rows]
