"""The callbacks of a run: ours as the configuration switches them, and the user's own by dotted path."""

from __future__ import annotations

from model.registry import find_class, made_with
from training.callbacks.base import Callback
from training.callbacks.metrics_file import MetricsFile
from training.callbacks.progress import ProgressLine
from training.callbacks.wandb_logger import WandbLogger
from training.config import TrainConfig
from training.reliability.events import EventLog


def make_callbacks(config: TrainConfig, events: EventLog, rank: int) -> list[Callback]:
    """Ours write files for people, on rank 0 only; the user's are made on every rank."""
    callbacks: list[Callback] = []
    if rank == 0:
        callbacks += [MetricsFile(config.stage_folder, events, config.logging.every_steps), ProgressLine()]
        if config.logging.wandb_mode != "disabled":
            callbacks.append(WandbLogger(config.stage_folder, events, config.logging))
        if config.logging.tensorboard:
            from training.callbacks.tensorboard import TensorBoard

            callbacks.append(TensorBoard(config.stage_folder, config.logging.every_steps))
    for name, entry in config.callbacks.items():
        callback_class = find_class("callback", entry.path, {}, f"callbacks.{name}.path")
        callbacks.append(made_with(callback_class, "callback", entry.options, f"callbacks.{name}.options"))
    return callbacks
