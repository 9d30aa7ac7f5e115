"""Asked before anything starts or is queued: can this stage run there at all? Imports no torch.

What the plan says of memory and time is held against where the ranks will be. What cannot work is refused with the
figures and the nearest layouts that fit; `preflight=false` starts it all the same.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from typing import Any

from launch.cluster.profile import ClusterConfig
from launch.plan.inputs import is_planned, missing_inputs
from launch.plan.layout import Layout, candidates, nearest, violations
from launch.plan.memory import MASTER_BYTES, MOMENT_BYTES, stage_memory
from launch.plan.places import PROCESS_BYTES, Place, place_of
from launch.plan.search import Plan, Problem, plan_layout
from launch.plan.shape import ModelShape
from launch.plan.stage import layout_of, problem_of
from launch.plan.zero import ZeroChoice, ZeroPlan
from model.checkpoint.manifest import list_checkpoints, read_manifest
from model.errors import UserError
from training.config import TrainConfig
from training.contracts.layout import RECOMPUTE
from training.objectives.checks import check_goes_on

LONGEST_DAYS = 365.0  # a stage that takes longer is taken for a mistake
NUM_OFFERS = 3
INSIST = "preflight=false starts it all the same"


@dataclass
class Verdict:
    """What the plan says of one stage in one place."""

    place: Place
    plan: Plan | None = None  # None: the plan does not know what the stage computes
    memory_bytes: float = 0.0  # of one accelerator, or of the whole host
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # inputs that are not there yet
    offers: list[str] = field(default_factory=list)  # overrides of layouts that fit, the nearest first

    @property
    def days(self) -> float | None:
        return None if self.plan is None else days_of(self.plan, self.place)

    def to_dict(self) -> dict[str, Any]:
        if self.plan is None:
            return {"problems": self.problems}
        return {
            "ranks": self.plan.layout.world_size,
            "memory_bytes": round(self.memory_bytes),
            "usable_memory_bytes": round(self.place.usable_bytes),
            "days": None if self.days is None else round(self.days, 3),
            "fits": not self.problems,
            "problems": self.problems,
        }

    def error(self) -> UserError:
        lines = "\n".join(f"  {number}. {text}" for number, text in enumerate([*self.problems, *self.missing], 1))
        got = ""
        if self.plan is not None:
            days = "" if self.days is None else f", {told_days(self.days, self.place)}"
            ranks = self.plan.layout.world_size
            got = f"{ranks:,} rank{'s' * (ranks > 1)}{days}: {self.plan.layout.overrides()}"
        fixes = ["make first what is missing"] if self.missing else []
        if self.offers:
            fixes.append("the nearest that fit: " + "; or ".join(self.offers))
        elif self.problems:
            fixes.append(self.place.fits_with)
        fix = "; ".join(fixes)
        return UserError(
            f"this stage cannot run here:\n{lines}", where=self.place.title, got=got, fix=f"{fix}. {INSIST}"
        )


def refuse_impossible(config: TrainConfig, cluster: ClusterConfig | None = None) -> None:
    """Raises `UserError` for a stage that cannot run on this cluster; None is this machine. Nothing with preflight=false."""
    if config.preflight:
        verdict = judge_start(config, place_of(cluster))
        verdict.missing = missing_inputs(config)
        if verdict.problems or verdict.missing:
            raise verdict.error()
        refuse_other_configuration(config)


def refuse_other_configuration(config: TrainConfig) -> None:
    """Raises `UserError` where the stage's newest checkpoint is one that it cannot go on from."""
    for folder in list_checkpoints(config.stage_folder)[:1]:
        try:
            manifest = read_manifest(folder)
        except UserError:
            return  # damaged: the one before it may serve, which is found out when the stage begins
        if isinstance(manifest.get("config"), dict):
            check_goes_on(config, manifest, folder)


def judge(config: TrainConfig, place: Place) -> Verdict:
    """Layouts that fit are looked for only where the stage's own does not."""
    if not is_planned(config):
        problems = too_many_ranks(config.parallel.world_size, place)
        return Verdict(place, problems=problems, offers=["parallel.data=1"] if problems else [])
    problem, layout = problem_of(config, place.cluster, place.device), layout_of(config)
    illegal = violations(layout, problem.shape, problem.batch)
    if illegal:
        return Verdict(place, problems=illegal, offers=nearest_that_fit(config, problem, layout, place))
    plan, host_bytes = planned(config, problem, layout, place)
    verdict = Verdict(place, plan, memory_of(plan, place) + (host_bytes if place.is_host else 0.0))
    world_size = plan.layout.world_size
    verdict.problems += too_many_ranks(world_size, place)
    if verdict.memory_bytes > place.usable_bytes:
        whose = "the rank" if world_size == 1 else f"all {world_size:,} ranks together"
        whose = whose if place.is_host else "an accelerator"
        verdict.problems.append(
            f"{whose} would need {verdict.memory_bytes / 1e9:,.1f} GB, {place.usable_bytes / 1e9:,.1f} GB can be used"
        )
    host_gigabytes = place.cluster.host_memory_gigabytes
    if not place.is_host and host_bytes > host_gigabytes * 1e9:
        verdict.problems.append(
            f"what is offloaded takes {host_bytes / 1e9:,.1f} GB of a host, {host_gigabytes:,.1f} GB are there"
        )
    if verdict.days is not None and verdict.days > LONGEST_DAYS:
        verdict.problems.append(f"it would take {told_days(verdict.days, place)}")
    if verdict.problems:
        verdict.offers = nearest_that_fit(config, problem, plan.layout, place)
    return verdict


def too_many_ranks(world_size: int, place: Place) -> list[str]:
    """Of a place with accelerators; ranks on a host share its cores."""
    room = place.cluster.num_accelerators
    if place.is_host or world_size <= room:
        return []
    return [f"{world_size:,} ranks are asked for, {room:,} accelerators are there"]


def planned(config: TrainConfig, problem: Problem, layout: Layout, place: Place) -> tuple[Plan, float]:
    """Of a legal layout under the stage's engine, and the bytes that each host holds for its ranks."""
    if config.engine != "deepspeed":
        return plan_layout(problem, layout), 0.0
    zero = ZeroPlan(problem, layout, ZeroChoice.of(config.deepspeed), config.deepspeed)
    return zero.plan, zero.rank_host_bytes * layout.world_size if place.is_host else zero.host_bytes


def judge_start(config: TrainConfig, place: Place) -> Verdict:
    """`judge`, and the disk of the run folder, which is at hand when a stage is started or queued."""
    verdict = judge(config, place)
    if verdict.plan is not None:
        verdict.problems += full_disk(verdict.plan.problem.shape, config)
    return verdict


def memory_of(plan: Plan, place: Place) -> float:
    """Of the accelerator that needs most, or of all ranks together where they share one memory."""
    if not place.is_host:
        return plan.memory.total
    layout, problem = plan.layout, plan.problem
    if layout.pipeline == 1:
        return layout.world_size * (PROCESS_BYTES + plan.memory.total)
    needed = sum(stage_memory(problem.shape, layout, problem.batch, stage).total for stage in range(layout.pipeline))
    return layout.world_size * PROCESS_BYTES + needed * layout.world_size / layout.pipeline


def days_of(plan: Plan, place: Place) -> float | None:
    """Of the whole stage. On a host the least that its cores could take; None for a device of unknown speed."""
    if not place.has_known_speed:
        return None
    if not place.is_host:
        return plan.seconds / 86_400
    problem = plan.problem
    flops = problem.shape.flops_per_token(problem.batch.attended_tokens) * problem.batch.tokens * problem.num_steps
    return flops / place.device.bf16_flops_per_second / 86_400


def told_days(days: float, place: Place) -> str:
    amount = f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
    return f"at least {amount}" if place.is_host else amount


def nearest_that_fit(config: TrainConfig, problem: Problem, layout: Layout, place: Place) -> list[str]:
    """Overrides of up to three layouts near this one that fit and end within the time."""
    room, largest_tensor = place.cluster.num_accelerators, place.cluster.accelerators_per_fast_domain
    model_ranks = max(1, layout.tensor * layout.pipeline * layout.context)
    wanted = replace(layout, data=max(1, room // model_ranks))
    legal = candidates(problem.shape, problem.batch, room, largest_tensor=largest_tensor)
    if config.engine == "deepspeed":
        legal = [one for one in legal if one.pipeline == 1]
    offers: list[str] = []
    for one in nearest(wanted, legal, len(legal)):
        plans = [planned(config, problem, replace(one, recompute=choice), place) for choice in RECOMPUTE]
        fitting = [plan for plan, host_bytes in plans if fits_in_time(plan, host_bytes, place)]
        if fitting and place.fills_nodes(one.world_size):
            offers.append(min(fitting, key=lambda plan: plan.step.total).layout.overrides())
        if len(offers) == NUM_OFFERS:
            break
    return offers


def fits_in_time(plan: Plan, host_bytes: float, place: Place) -> bool:
    days = days_of(plan, place)
    if place.is_host:
        has_room = memory_of(plan, place) + host_bytes <= place.usable_bytes
    else:
        has_room = plan.memory.total <= place.usable_bytes
        has_room = has_room and host_bytes <= place.cluster.host_memory_gigabytes * 1e9
    return has_room and (days is None or days <= LONGEST_DAYS)


def full_disk(shape: ModelShape, config: TrainConfig) -> list[str]:
    """One checkpoint has to find room where the run folder is."""
    master = MASTER_BYTES if shape.dtype_bytes != 4 else 0
    needed = shape.total_parameters() * shape.dtype_bytes + shape.trained_parameters() * (master + MOMENT_BYTES)
    folder = config.stage_folder.absolute()
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    return [f"one checkpoint takes {told_bytes(needed)}, {told_bytes(free)} are free at {existing}"]


def told_bytes(amount: float) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e9 else f"{amount / 1e6:,.1f} MB"
