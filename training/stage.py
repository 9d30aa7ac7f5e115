"""One stage of a curriculum, from its config to its summary. Importing this module is cheap."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.durable import replace_file
from model.errors import UserError
from training.config import TrainConfig, save_yaml

if TYPE_CHECKING:
    from training.engines.base import DataSource, Engine
    from training.loop import Run

CONFIG_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
LOCK_NAME = ".lock"
LOCK_PATIENCE_SECONDS = 5.0  # the ranks of a run that was just killed need a moment to go
EXIT_STOPPED = 3

# Modules with `build(config) -> Job`, whose steps the loop runs.
LOOPED_OBJECTIVES = {"next_token": "training.objectives.next_token", "vision_tokenizer": "training.tokenizers.vision"}
# Modules with `fit(config) -> dict`: done in one go, without steps.
FITTED_OBJECTIVES = {"text_tokenizer": "training.tokenizers.text"}


@dataclass
class Job:
    """What an objective gives to the loop. `metadata` is its share of each checkpoint's manifest."""

    engine: Engine
    data: DataSource
    metadata: dict[str, Any] = field(default_factory=dict)  # at least "kind"


class StoppedEarly(SystemExit):
    """The stage stopped on a signal after a complete checkpoint: exit code 3, start again to go on."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def run_stage(config: TrainConfig) -> dict[str, Any]:
    """Train one stage to its end and return its summary; go on where an earlier run was interrupted.

    Every rank calls it. A finished stage returns its summary at once. Raises `UserError`, and `StoppedEarly` after a
    signal.
    """
    config.validate()
    summary = finished_summary(config)
    if summary is not None:
        return summary
    folder = config.stage_folder
    with told_to_the_user(folder):
        folder.mkdir(parents=True, exist_ok=True)
    is_first_rank = int(os.environ.get("RANK", "0")) == 0
    with lock_stage(folder) if is_first_rank else contextlib.nullcontext():
        if is_first_rank:
            with told_to_the_user(folder):
                save_yaml(config, folder / CONFIG_NAME, versions())
        if config.stage.objective in FITTED_OBJECTIVES:
            module = importlib.import_module(FITTED_OBJECTIVES[config.stage.objective])
            summary = {"name": config.stage.name} | module.fit(config)
        else:
            module = importlib.import_module(LOOPED_OBJECTIVES[config.stage.objective])
            summary = train_job(config, module.build)
        summary |= {"objective": config.stage.objective, "config_fingerprint": config.fingerprint()}
        if is_first_rank:
            with told_to_the_user(folder):
                replace_file(folder / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    return summary


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a stage that ran to its end with this very config; None when there is work to do."""
    path = config.stage_folder / SUMMARY_NAME
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            "the stage's summary is damaged", where=str(path), got=str(error), fix="remove this file"
        ) from None
    return summary if summary.get("config_fingerprint") == config.fingerprint() else None


def train_job(config: TrainConfig, build: Any) -> dict[str, Any]:
    """Build the job with `build(config)`, resume it, run the loop; the figures of the summary."""
    from training.loop import train
    from training.reliability.signals import StopSignals
    from training.reliability.watchdog import Watchdog

    with StopSignals() as signals:
        job: Job = build(config)
        with told_to_the_user(config.stage_folder):
            run = assemble(config, job, signals)
        timeout = config.reliability.hang_timeout_seconds
        with Watchdog(run.heartbeat, run.events, job.engine.world_size, timeout):
            prepare(run)
            status = train(run)
            summary = summarize(run)
            run.heartbeat.enter("close")
            # Not after an error: an engine is closed by all ranks together, and the others may be gone.
            job.data.close()
            job.engine.barrier()
            job.engine.close()
        run.events.record(status, step=run.state.step)
        run.events.close()
    if status == "stopped":
        raise StoppedEarly
    return summary


def assemble(config: TrainConfig, job: Job, signals: Any) -> Run:
    """Put the loop's parts together for this rank. Files for people are written by rank 0 only."""
    from omegaconf import OmegaConf

    from training.callbacks.base import Callback, in_order
    from training.callbacks.metrics_file import MetricsFile
    from training.callbacks.progress import ProgressLine
    from training.callbacks.wandb_logger import WandbLogger
    from training.loop import Run
    from training.reliability.checkpoint import CheckpointStore
    from training.reliability.events import EventLog
    from training.reliability.guard import StepGuard
    from training.reliability.watchdog import Heartbeat

    folder, engine = config.stage_folder, job.engine
    events = EventLog(folder, engine.rank)
    heartbeat = Heartbeat(folder, engine.rank)
    callbacks: list[Callback] = []
    if engine.rank == 0:
        callbacks += [MetricsFile(folder, events, config.logging.every_steps), ProgressLine()]
        if config.logging.wandb_mode != "disabled":
            callbacks.append(WandbLogger(folder, events, config.logging))
    return Run(
        config=config,
        engine=engine,
        data=job.data,
        store=CheckpointStore(folder, engine, config.checkpoint.keep, heartbeat.enter),
        guard=StepGuard(config.reliability),
        callbacks=in_order(callbacks),
        signals=signals,
        events=events,
        heartbeat=heartbeat,
        metadata=job.metadata,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(config.to_dict())),
    )


def prepare(run: Run) -> None:
    """Resume, or start from the weights that `initialize_from` names, or from fresh ones."""
    from training.loop import resume

    if resume(run):
        return
    source = run.config.stage.initialize_from
    run.events.record("start", initialize_from=source, world_size=run.engine.world_size)
    if source is not None:
        load_weights(run.engine, Path(source))


def load_weights(engine: Engine, source: Path) -> None:
    """Weights of another stage or checkpoint folder, whatever layout wrote them; the optimizer stays fresh."""
    from model.checkpoint.reader import CheckpointReader
    from training.reliability.checkpoint import resolve_initial

    with CheckpointReader(resolve_initial(source)) as reader:
        engine.load_model(reader)


def summarize(run: Run) -> dict[str, Any]:
    """The stage's figures, of its whole life over all restarts; memory is summed over the ranks."""
    from model.checkpoint.reader import step_folder_name
    from training.metrics import first_and_last_loss
    from training.reliability.watchdog import read_heartbeats

    run.heartbeat.enter("summarize")
    run.heartbeat.write()
    run.engine.barrier()
    config, state = run.config, run.state
    beats = read_heartbeats(config.stage_folder, run.engine.world_size)
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
            "peak_memory_bytes": sum(beat["peak_memory_bytes"] for beat in beats),
            "skipped_steps": state.num_skipped_steps,
            "skipped_windows": state.skipped_windows,
            "checkpoint": str(run.store.folder / step_folder_name(state.step)),
        }
        | run.engine.final_metrics()
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
    """Hold the stage folder; a second run is refused. The system frees the lock of a process that died."""
    path = folder / LOCK_NAME
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        "another run is working on this stage",
                        where=str(folder),
                        got=file.read().strip(),
                        fix="wait for it, stop it, or choose another run_folder",
                    ) from None
                time.sleep(0.1)
        with told_to_the_user(folder):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that compute, and the commit where there is one."""
    found = {"python": platform.python_version()}
    for name in ("nextstate", "torch", "megatron-core", "numpy"):
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
