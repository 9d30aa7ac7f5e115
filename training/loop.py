"""The step loop: batch, forward and backward, verdict, optimizer step, callbacks, checkpoint."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from training.callbacks.base import Callback
from training.config import TrainConfig, differences, results_of
from training.contracts.job import Job
from training.contracts.results import StepResult
from training.contracts.run_view import LoopState
from training.engines.speed import SpeedMeter
from training.metrics import StepRecord
from training.objectives.checks import check_goes_on, in_todays_form
from training.objectives.held_out import Validation
from training.objectives.rows_read import data_changes
from training.reliability.checkpoint import CheckpointFailed, CheckpointStore, NotFinite
from training.reliability.events import EventLog, tell
from training.reliability.guard import Decision, StepGuard, Verdict
from training.reliability.signals import StopSignals
from training.reliability.watchdog import Heartbeat
from training.schedule import learning_rate


@dataclass
class Run:
    """All that takes part in one run of the loop; what callbacks are shown."""

    config: TrainConfig
    job: Job
    store: CheckpointStore
    guard: StepGuard
    callbacks: list[Callback]  # in order
    signals: StopSignals
    events: EventLog
    heartbeat: Heartbeat
    validation: Validation | None = None  # where the stage names held-out sets
    speed: SpeedMeter | None = None  # on the rank that writes figures for people
    config_yaml: str = ""  # goes into each checkpoint folder
    state: LoopState = field(default_factory=LoopState)
    saved_step: int = -1  # of the newest checkpoint known to be complete
    loop_started: float = 0.0  # monotonic time at which the run would have begun without a restart


def train(run: Run) -> str:
    """Run the loop from the state in `run` to the last step; "finished", or "stopped" after a signal.

    Raises `UserError` when the run cannot go on. No error path uses a collective: the other ranks may be gone.
    """
    status, enter = "failed", run.heartbeat.enter
    try:
        enter("callbacks at the start", run.state.step)
        for callback in run.callbacks:
            callback.on_start(run)
        run.heartbeat.is_starting = False
        status = _run_steps(run)
        return status
    finally:
        enter("close the data")
        run.job.batches.close()
        if run.validation is not None:
            run.validation.close()
        enter("callbacks at the end")
        for callback in run.callbacks:
            callback.on_end(run, status)


def _run_steps(run: Run) -> str:
    state, engine, objective, enter = run.state, run.job.engine, run.job.objective, run.heartbeat.enter
    run.loop_started = time.monotonic() - state.wall_seconds
    while state.step < run.config.stage.steps:
        started = time.monotonic()
        enter("wait for data", state.step)
        batches = run.job.batches.next(state, engine, lambda: run.signals.received is not None)
        data_seconds = time.monotonic() - started
        enter("agree on stopping")
        if engine.ranks.any_rank(run.signals.received is not None):
            return _stop(run)
        enter("forward and backward")
        sums = engine.forward_backward(batches, objective)
        enter("read the step's figures")
        result = objective.result(*sums.read())
        decision = run.guard.judge(result)
        rate = learning_rate(run.config.stage.optimizer, state.step + 1, run.config.stage.steps)
        enter(f"optimizer: {decision.verdict.value}")
        if decision.verdict is Verdict.APPLY:
            engine.optimizer_step(rate, result.gradient_norm)
        else:
            engine.discard_gradients()
            if decision.verdict is not Verdict.SKIP:
                _roll_back_or_end(run, _with_state_of_weights(run, decision))
                continue
        record = _count_step(run, result, decision, rate, time.monotonic() - started)
        if run.speed is not None:
            record.speed.update(run.speed.figures(batches, result.num_tokens, record.step_seconds, data_seconds))
        if run.validation is not None and run.validation.is_due(state.step):
            enter("validation")
            record.held_out.update(run.validation.measure(engine))
        enter("callbacks")
        for callback in run.callbacks:
            callback.on_step(run, record)
        if state.step % run.config.checkpoint.every_steps == 0 or state.step == run.config.stage.steps:
            _save_or_roll_back(run)
    return "finished"


def _count_step(run: Run, result: StepResult, decision: Decision, rate: float, seconds: float) -> StepRecord:
    state = run.state
    state.step += 1
    state.next_sample += run.config.stage.global_batch_size
    state.num_tokens += result.num_tokens
    state.wall_seconds = time.monotonic() - run.loop_started
    if decision.verdict is Verdict.SKIP:
        state.num_skipped_steps += 1
        _announce(run, "skip", f"step {state.step} is skipped: {decision.reason}", decision.reason)
    return StepRecord(
        state.step,
        result,
        rate,
        state.next_sample,
        seconds,
        skipped=decision.reason if decision.verdict is Verdict.SKIP else "",
    )


def _stop(run: Run) -> str:
    with contextlib.suppress(NotFinite):  # told; the next start goes on from the checkpoint before
        save(run)
    run.events.record("stopped", step=run.state.step, signal=run.signals.received or "on another rank")
    return "stopped"


def _save_or_roll_back(run: Run) -> None:
    try:
        save(run)
    except NotFinite as error:
        _roll_back_or_end(run, run.guard.judge_weights(str(error)), num_refused_steps=0)


def _with_state_of_weights(run: Run, decision: Decision) -> Decision:
    """The reason why steps failed one after another may be that the weights themselves are not finite."""
    non_finite = run.store.find_non_finite()
    return replace(decision, reason=f"{decision.reason}; {non_finite}") if non_finite else decision


def _roll_back_or_end(run: Run, decision: Decision, num_refused_steps: int = 1) -> None:
    """Load the last checkpoint and go on behind the data that led here, or end the run with a `UserError`.

    The whole window since that checkpoint is left out, not only the batch that failed: bad steps are never applied,
    so repeating the same good ones would lead to the same place. `num_refused_steps` are not counted in the state.
    """
    before, reason = replace(run.state), decision.reason
    failed_step = before.step + num_refused_steps
    folder = None
    if decision.verdict is Verdict.ROLL_BACK:
        folder = run.store.find_usable(lambda folder, damage: report_damage(run, folder, damage))
    if folder is None:
        run.events.record("stop", step=failed_step, reason=reason)
        raise UserError(
            f"training does not recover at step {failed_step}: {reason}",
            got=f"{run.guard.num_consecutive_skips} skipped steps in a row, {run.guard.num_rollbacks} rollbacks"
            + ("" if decision.verdict is Verdict.STOP else ", no checkpoint to go back to"),
            where=str(run.events.path),
            fix="look at the data of the skipped steps, or lower stage.optimizer.learning_rate",
        )
    num_rollbacks = run.guard.num_rollbacks + 1
    _load(run, folder)
    run.guard.has_rolled_back(num_rollbacks)
    num_refused_samples = num_refused_steps * run.config.stage.global_batch_size
    window = [run.state.next_sample, before.next_sample + num_refused_samples]
    run.state.next_sample = window[1]
    run.state.skipped_windows = [*before.skipped_windows, window]
    run.state.wall_seconds = before.wall_seconds
    _announce(
        run,
        "roll_back",
        f"step {failed_step} failed ({reason}): back to step {run.state.step}, leaving out samples {window}",
        reason,
        failed_step=failed_step,
        window=window,
        checkpoint=folder.name,
    )
    for callback in run.callbacks:
        callback.on_roll_back(run)


def save(run: Run) -> None:
    """Write a checkpoint of the present state, unless there is one already.

    A failure costs no more than the interval since the last complete one: training goes on if there is one and
    steps are left, otherwise it is a `UserError`. While steps are being skipped older checkpoints are kept: the fault
    may be older than the newest ones. Raises `NotFinite` when the weights or moments are not finite.
    """
    state = run.state
    if state.step == run.saved_step:
        return
    try:
        is_failing = run.guard.num_consecutive_skips > 0
        folder = run.store.save(state.step, manifest_metadata(run), run.config_yaml, keep_older=is_failing)
    except NotFinite as error:
        run.events.record("not_finite", step=state.step, reason=str(error), folder=error.folder.name)
        if run.job.engine.ranks.rank == 0:
            tell(f"no checkpoint of step {state.step}: {error}; kept aside in {error.folder}")
        raise
    except CheckpointFailed as error:
        run.events.record("checkpoint_failed", step=state.step, error=str(error))
        is_last = state.step >= run.config.stage.steps or run.signals.received is not None
        is_last = run.job.engine.ranks.any_rank(is_last)
        if is_last or not run.store.has_checkpoint():
            raise UserError(
                f"the checkpoint of step {state.step} cannot be written",
                where=str(run.store.folder),
                got=str(error),
                fix="free space on that disk and start the same command again",
            ) from None
        if run.job.engine.ranks.rank == 0:
            tell(f"the checkpoint of step {state.step} failed: {error}; training goes on")
        return
    run.saved_step = state.step
    run.events.record("checkpoint", step=state.step, folder=folder.name)
    for callback in run.callbacks:
        callback.on_checkpoint(run, folder)


def manifest_metadata(run: Run) -> dict[str, Any]:
    state = run.state
    callback_states = {callback.name: callback.state() for callback in run.callbacks}
    return run.job.objective.metadata() | {
        "step": state.step,
        "consumed_samples": state.next_sample,
        "data_fingerprint": run.job.batches.fingerprint,
        "config": run.config.to_dict(),
        "wandb_run_id": callback_states.get("wandb", {}).get("run_id"),
        "state": {
            "train": asdict(state),
            "guard": run.guard.state(),
            "callbacks": callback_states,
            "batches": run.job.batches.state(),
        },
    }


def resume(run: Run) -> bool:
    """Load the newest usable checkpoint of the stage, if there is one."""
    folder = run.store.find_usable(lambda folder, damage: report_damage(run, folder, damage))
    if folder is None:
        return False
    _load(run, folder)
    run.events.record("resume", step=run.state.step, checkpoint=folder.name)
    return True


def _load(run: Run, folder: Path) -> None:
    from model.checkpoint.reader import read_manifest

    check_compatible(run, read_manifest(folder), folder)
    manifest = run.store.load(folder).manifest
    saved = manifest["state"]
    for name, value in saved["train"].items():
        setattr(run.state, name, value)
    run.guard.load_state(saved["guard"])
    run.job.batches.load(saved.get("batches", {}))
    for callback in run.callbacks:
        if callback.name in saved["callbacks"]:
            callback.load_state(saved["callbacks"][callback.name])
    run.saved_step = run.state.step


def check_compatible(run: Run, manifest: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from a checkpoint of another model, seed or data; layout, length and rates may change."""
    check_goes_on(run.config, manifest, folder)
    if manifest["data_fingerprint"] != run.job.batches.fingerprint:
        if not run.config.checkpoint.allow_data_change:
            raise UserError(
                "the data are not those that the checkpoint was trained on",
                where=str(folder),
                expected=f"data fingerprint {manifest['data_fingerprint']}",
                got=run.job.batches.fingerprint,
                fix="bring the data or the mixture back, or say checkpoint.allow_data_change=true",
            )
        changes = data_changes(manifest, run.job.objective.metadata())
        run.events.record("data_changed", checkpoint=folder.name, changes=changes)
        if run.job.engine.ranks.rank == 0:
            tell("; ".join([f"the data are not those that {folder.name} was trained on", *changes]))
    changed = differences(results_of(in_todays_form(manifest["config"])), results_of(run.config.to_dict()))
    if changed:
        run.events.record("config_changed", changes=changed)


def report_damage(run: Run, folder: Path, damage: str) -> None:
    run.events.record("damaged_checkpoint", checkpoint=folder.name, damage=damage)
    if run.job.engine.ranks.rank == 0:
        tell(f"checkpoint {folder} is damaged ({damage}); the one before it is used")


def _announce(run: Run, event: str, message: str, reason: str, **details: Any) -> None:
    if run.job.engine.ranks.rank == 0:
        run.events.record(event, step=run.state.step, reason=reason, **details)
        tell(message)
