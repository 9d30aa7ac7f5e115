"""What a person at the terminal sees of a run: a banner, a line a step, a farewell. On stderr, made for rank 0."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from model.config import count_parameters
from training.callbacks.base import Callback
from training.contracts.run_view import RunView
from training.metrics import HELD_OUT, HELD_OUT_SECONDS, METRICS_NAME, StepRecord
from training.reliability.signals import COMMAND_VARIABLE

SECONDS_BETWEEN_LINES = 10.0  # where stderr is a file
SECONDS_OF_HISTORY = 60.0  # a terminal's line is rewritten in place, and kept so often


class ProgressLine(Callback):
    """Step, loss, rate, gradient norm, speed, memory, time left."""

    order = 30  # after the loggers, whose folders the banner names
    name = "progress"

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last_line_at = self._last_kept_at = -SECONDS_OF_HISTORY
        self._is_line_open = False
        self._last_width = 0
        self._num_steps = 0
        self._seconds = 0.0

    def on_start(self, run: RunView) -> None:
        self._write("\n".join(banner(run)))

    def on_step(self, run: RunView, record: StepRecord) -> None:
        self._num_steps += 1
        self._seconds += record.step_seconds
        is_last, now = record.step >= run.config.stage.steps, time.monotonic()
        is_due = is_last or bool(record.held_out) or self._is_terminal
        if not is_due and now - self._last_line_at < SECONDS_BETWEEN_LINES:
            return
        self._last_line_at = now
        is_kept = is_last or not self._is_terminal or now - self._last_kept_at >= SECONDS_OF_HISTORY
        if is_kept:
            self._last_kept_at = now
        if record.held_out:
            self._write(held_out_line(run, record))
        left = (run.config.stage.steps - record.step) * self._seconds / self._num_steps
        self._write(f"{step_line(run, record)}  {format_seconds(left)} left", is_open=not is_kept)

    def on_end(self, run: RunView, status: str) -> None:
        name, step = run.config.stage.name, run.state.step
        if status == "stopped":
            command = os.environ.get(COMMAND_VARIABLE, "the same command")
            self._write(f"{name}: stopped at step {step}, saved. Go on with:\n  {command}")
        elif status == "finished":
            self._write(f"{name}: done, step {step}, {format_seconds(run.state.wall_seconds)} in all")
        elif self._is_line_open:
            self._write("")

    def _write(self, text: str, *, is_open: bool = False) -> None:
        """An open line is overwritten by the next one, which hides all of it."""
        start, text = ("\r", text.ljust(self._last_width)) if self._is_line_open else ("", text)
        self._is_line_open, self._last_width = is_open, len(text.rstrip())
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            print(start + text, end="" if is_open else "\n", file=sys.stderr, flush=True)


def banner(run: RunView) -> list[str]:
    """What is trained, on what, where, from which step."""
    from training.engines.speed import device_name  # torch; `curriculum status` formats seconds without it

    config, stage, parallel = run.config, run.config.stage, run.config.parallel
    ranks = f"{parallel.world_size} rank{'s' * (parallel.world_size > 1)}"
    layout = " x ".join(f"{name} {getattr(parallel, name)}" for name in ("tensor", "pipeline", "context", "data"))
    lines = [f"{stage.name}: {stage.objective_name}, {stage.steps:,} steps of {stage.global_batch_size:,} samples"]
    (_, weights), *changes = stage.data.weights_by_step()
    if any(weights.values()):
        parameters = count_parameters(config.model)["total"]
        lines += [
            f"  data     {shares_text(weights)}; rows of {stage.sequence_length:,} tokens",
            *(f"           from step {step:,}: {shares_text(weights)}" for step, weights in changes),
            f"  model    {config.model.name}, {parameters:,} parameters",
        ]
    lines.append(f"  device   {device_name()}, {ranks} ({layout}), recompute {parallel.recompute}")
    origin = f"the weights of {stage.initialize_from}" if stage.initialize_from else "fresh weights"
    lines.append(f"  begins   {f'resumed from step {run.state.step:,}' if run.state.step else origin}")
    lines.append(
        f"  figures  {config.stage_folder / METRICS_NAME}{wandb_folder(config.stage_folder, config.logging.wandb_mode)}"
    )
    return lines


def shares_text(weights: dict[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in weights.items() if weight)


def wandb_folder(stage_folder: Path, mode: str) -> str:
    if mode == "disabled":
        return ""
    latest = stage_folder / "wandb" / "latest-run"
    where = f" {latest.resolve()}" if latest.exists() else ""
    return f"; W&B {mode}{where}" + (" (wandb sync uploads it)" if mode == "offline" and where else "")


def held_out_line(run: RunView, record: StepRecord) -> str:
    sets = record.held_out[HELD_OUT].items()
    parts = [f"{name} " + ", ".join(f"{kind} {loss:.4f}" for kind, loss in by_class.items()) for name, by_class in sets]
    took = f"  ({record.held_out[HELD_OUT_SECONDS]:.1f} s)"
    return f"{run.config.stage.name}: step {record.step} held-out loss  " + ";  ".join(parts) + took


def step_line(run: RunView, record: StepRecord) -> str:
    """Figures that a step does not have are left out."""
    result, speed = record.result, record.speed
    parts = [
        f"{run.config.stage.name}: step {record.step}/{run.config.stage.steps}",
        f"loss {result.loss:.4f}",
        f"rate {record.learning_rate:.2e}",
        f"grad {result.gradient_norm:.2f}",
    ]
    if result.num_tokens:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    if "tflops_per_second" in speed:
        rate = speed["tflops_per_second"]
        parts.append(f"{rate:.1f} TFLOP/s" if rate >= 1 else f"{1000 * rate:.1f} GFLOP/s")
    if "memory_bytes" in speed:
        parts.append(f"{speed['memory_bytes'] / 1e9:.1f} GB")
    return "  ".join([*parts, f"skipped: {record.skipped}"] if record.skipped else parts)


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
