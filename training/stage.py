"""One stage of a curriculum, from its config to its summary. Importing this module is cheap."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from model.durable import lock, write_json
from model.errors import Problems, UserError
from model.registry import check_name
from training.config import TrainConfig, save_yaml

if TYPE_CHECKING:
    from training.contracts.batches import Ranks
    from training.contracts.job import Job
    from training.contracts.objective import Objective
    from training.contracts.shards import ShardStore
    from training.loop import Run
    from training.reliability.events import EventLog
    from training.reliability.signals import StopSignals
    from training.reliability.watchdog import Heartbeat

CONFIG_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
LOCK_NAME = ".lock"
LOCK_PATIENCE_SECONDS = 5.0  # the ranks of a run that was just killed need a moment to go
EXIT_STOPPED = 3


class StoppedEarly(SystemExit):
    """The stage stopped on a signal after a complete checkpoint: exit code 3, start again to go on."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def run_stage(config: TrainConfig) -> dict[str, Any]:
    """Train one stage to its end and return its summary; go on where an earlier run was interrupted.

    Every rank calls it, with a configuration that `validate` has passed. A finished stage returns its summary at
    once. Raises `UserError`, and `StoppedEarly` after a signal.
    """
    is_first_rank = int(os.environ.get("RANK", "0")) == 0
    finished = finished_summary(config) if is_first_rank else None
    if finished is not None and config.parallel.world_size == 1:
        return finished
    folder = config.stage_folder
    with told_to_the_user(folder):
        folder.mkdir(parents=True, exist_ok=True)
    writes = is_first_rank and finished is None
    with lock_stage(folder) if writes else contextlib.nullcontext():
        if writes:
            with told_to_the_user(folder):
                save_yaml(config, folder / CONFIG_NAME, {"versions": versions(), "machine": machine()})
        summary = {"name": config.stage.name} | learn(config, finished)
        summary |= {"objective": config.stage.objective_name, "config_fingerprint": config.fingerprint()}
        if writes:
            with told_to_the_user(folder):
                write_json(folder / SUMMARY_NAME, summary)
    return summary


def validate(config: TrainConfig) -> None:
    """Collect every problem of a stage, then raise one `UserError` that names the override mending each.

    Asked once, before anything starts or is queued. Imports no torch, unless a class of the user's own does.
    """
    from training.engines.registry import ENGINES
    from training.objectives.checks import check_objective

    problems = Problems()
    config.validate_common(problems)
    check_objective(config, problems)
    if config.engine is not None:
        check_name("engine", config.engine, ENGINES, "engine")
    if config.engine == "deepspeed":
        problems.check(
            importlib.util.find_spec("deepspeed") is not None,
            "engine",
            "deepspeed is not installed",
            "pip install 'nextstate[deepspeed]'",
        )
    for name, entry in config.callbacks.items():
        check_name("callback", entry.path, {}, f"callbacks.{name}.path")
    problems.raise_if_any()


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a stage that ran to its end with this very config; None when there is work to do.

    Raises `UserError` where the data are not those that it has read.
    """
    path = config.stage_folder / SUMMARY_NAME
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            "the stage's summary is damaged", where=str(path), got=str(error), fix="remove this file"
        ) from None
    if summary.get("config_fingerprint") != config.fingerprint():
        return None
    from training.objectives.rows_read import refuse_other_data

    refuse_other_data(config)
    return summary


def learn(config: TrainConfig, finished: dict[str, Any] | None) -> dict[str, Any]:
    """Fit, or train step by step, what the stage's objective says; the figures of the summary.

    finished: the summary that the first rank found; all ranks return it.
    """
    from training.contracts.objective import FittedObjective
    from training.objectives.registry import make_objective
    from training.reliability.events import EventLog
    from training.reliability.signals import StopSignals
    from training.reliability.watchdog import Heartbeat, Watchdog

    objective = make_objective(config)
    if isinstance(objective, FittedObjective):
        return finished or objective.fit()
    with StopSignals() as signals:  # a signal that comes while the parts are made is heard by the loop
        rank, world_size = int(os.environ.get("RANK", "0")), config.parallel.world_size
        heartbeat, events = Heartbeat(config.stage_folder, rank), EventLog(config.stage_folder, rank)
        with Watchdog(heartbeat, events, world_size, config.reliability.hang_timeout_seconds):
            heartbeat.enter("hear whether the stage is finished")
            finished = found_by_first_rank(config, finished)
            if finished is not None:
                return finished
            heartbeat.enter("build the engine and open the data")
            job = build(config, objective)
            with told_to_the_user(config.stage_folder):
                run = assemble(config, job, signals, heartbeat, events)
            return run_to_the_end(run)


def found_by_first_rank(config: TrainConfig, finished: dict[str, Any] | None) -> dict[str, Any] | None:
    """The summary that the first rank found, on every rank; None: the stage goes on, in the process group made here."""
    if config.parallel.world_size == 1:
        return finished
    from model.parallel import groups
    from training.engines.replicated import join_group
    from training.reliability.agreement import seen_by_first_rank

    known: dict[str, Any] | None = seen_by_first_rank(join_group(config), lambda: finished)
    if known is not None:
        groups.leave()
    return known


def build(config: TrainConfig, objective: Objective) -> Job:
    """Objective, engine and batches put together; neither of them knows the others' insides."""
    from training.contracts.job import Job
    from training.engines.registry import make_engine

    engine = make_engine(config, objective)
    return Job(engine, objective, objective.batches(engine.ranks))


def run_to_the_end(run: Run) -> dict[str, Any]:
    from training.loop import train

    engine = run.job.engine
    prepare(run)
    status = train(run)
    summary = summarize(run)
    run.heartbeat.enter("close")
    # Not after an error: an engine is closed by all ranks together, and the others may be gone.
    engine.ranks.barrier()
    engine.close()
    run.events.record(status, step=run.state.step)
    run.events.close()
    if status == "stopped":
        raise StoppedEarly
    return summary


def assemble(config: TrainConfig, job: Job, signals: StopSignals, heartbeat: Heartbeat, events: EventLog) -> Run:
    """Put the loop's parts together for this rank. Files for people are written by rank 0 only."""
    from omegaconf import OmegaConf

    from training.callbacks.base import in_order
    from training.callbacks.registry import make_callbacks
    from training.engines.speed import SpeedMeter
    from training.loop import Run
    from training.objectives.held_out import Validation
    from training.reliability.checkpoint import CheckpointStore
    from training.reliability.guard import StepGuard

    folder, ranks = config.stage_folder, job.engine.ranks
    heartbeat.enter("measure the device")
    speed = SpeedMeter(config, ranks) if ranks.rank == 0 else None
    heartbeat.enter("find checkpoints")
    return Run(
        config=config,
        job=job,
        store=CheckpointStore(folder, ranks, job.engine.shards, config.checkpoint.keep, heartbeat.enter),
        guard=StepGuard(config.reliability),
        callbacks=in_order(make_callbacks(config, events, ranks.rank)),
        signals=signals,
        events=events,
        heartbeat=heartbeat,
        validation=Validation(config, ranks) if config.stage.validation else None,
        speed=speed,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(config.to_dict())),
    )


def prepare(run: Run) -> None:
    """Resume, or start from the weights that `initialize_from` names, or from fresh ones."""
    from training.loop import resume

    if resume(run):
        return
    source = run.config.stage.initialize_from
    run.events.record("start", initialize_from=source, world_size=run.job.engine.ranks.world_size)
    if source is not None:
        run.heartbeat.enter("load the weights to start from")
        load_weights(run.job.engine.shards, Path(source), run.job.engine.ranks)


def load_weights(shards: ShardStore, source: Path, ranks: Ranks) -> None:
    """Weights of another stage or checkpoint folder, whatever layout wrote them; the optimizer stays fresh."""
    from model.checkpoint.reader import CheckpointReader
    from training.reliability.initial import resolve_initial

    with CheckpointReader(resolve_initial(source, ranks), verified=True) as reader:
        shards.load_model(reader)


def summarize(run: Run) -> dict[str, Any]:
    """The stage's figures, of its whole life over all restarts; memory is summed over the ranks."""
    from model.checkpoint.reader import step_folder_name
    from training.metrics import first_and_last_loss, last_held_out
    from training.reliability.watchdog import peak_memory_bytes, read_heartbeats

    run.heartbeat.enter("summarize")
    run.heartbeat.write()
    ranks = run.job.engine.ranks
    ranks.barrier()
    config, state = run.config, run.state
    peaks = {beat["rank"]: beat["peak_memory_bytes"] for beat in read_heartbeats(config.stage_folder, ranks.world_size)}
    peaks[ranks.rank] = peak_memory_bytes()
    loss_first, loss_last = first_and_last_loss(config.stage_folder)
    layout = {name: getattr(config.parallel, name) for name in ("tensor", "pipeline", "context", "data")}
    return (
        {"name": config.stage.name}
        | layout
        | {
            "steps": state.step,
            "tokens": state.num_tokens,
            "loss_first": loss_first,
            "loss_last": loss_last,
            "wall_seconds": round(state.wall_seconds, 3),
            "peak_memory_bytes": sum(peaks.values()),
            "skipped_steps": state.num_skipped_steps,
            "skipped_windows": state.skipped_windows,
            "checkpoint": str(run.store.folder / step_folder_name(state.step)),
        }
        | last_held_out(config.stage_folder)
        | run.job.objective.final_metrics()
    )


@contextlib.contextmanager
def told_to_the_user(folder: Path) -> Iterator[None]:
    """A stage folder that cannot be written (full disk, no permission) is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "the stage folder cannot be written",
            where=str(folder),
            got=str(error),
            fix="free space or give permission, then start the same command again",
        ) from None


@contextlib.contextmanager
def lock_stage(folder: Path) -> Iterator[None]:
    """Hold the stage folder; a second run is refused."""
    fix = "wait for it, stop it, or choose another run_folder"
    path, taken = folder / LOCK_NAME, "another run is working on this stage"
    with contextlib.ExitStack() as held:
        with told_to_the_user(folder):
            held.enter_context(lock(path, taken, fix=fix, waiting_seconds=LOCK_PATIENCE_SECONDS))
        yield


def refuse_taken(folder: Path) -> None:
    """Raises `UserError` where another run holds the stage folder; for a launcher, whose ranks beside the first would write there."""
    if (folder / LOCK_NAME).exists():
        with lock_stage(folder):
            pass


def machine() -> dict[str, str]:
    """Where the first rank runs: for people who compare runs. Asks no library, so that it costs nothing."""
    found = {"host": platform.node(), "system": f"{platform.system()} {platform.machine()}"}
    found["cores"] = str(os.cpu_count())
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.partition(":")[2].strip() for card in cards for line in card.read_text().splitlines()[:1]]
    found["accelerators"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
    return found


def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that compute, and the commit where there is one."""
    found = {"python": platform.python_version()}
    for name in ("nextstate", "torch", "megatron-core", "deepspeed", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    root = Path(__file__).resolve().parent.parent
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        found["commit"] = answer.stdout.strip() or "unknown"
    except FileNotFoundError:
        found["commit"] = "unknown"
    return found
