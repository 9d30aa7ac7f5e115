"""What the workers run: the vision tokenizer's stage on some replicas, step by step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.checkpoint.reader import CheckpointReader
from training import stage
from training.callbacks.base import Callback
from training.config import TrainConfig
from training.contracts.job import Job
from training.contracts.results import StepResult
from training.contracts.run_view import RunView
from training.objectives.registry import make_objective
from training.reliability.checkpoint import CheckpointStore

RATE = 1e-3


class Trained(NamedTuple):
    results: list[StepResult]
    gradients: list[torch.Tensor]  # of all trained parameters and of the adversary's, before clipping, of each step
    weights: dict[str, torch.Tensor]  # weights and optimizer state by key; empty but on rank 0
    final: dict[str, Any]


def open_job(config: TrainConfig, checkpoint: Path | None = None) -> Job:
    job = stage.build(config, make_objective(config))
    if checkpoint is not None:
        with CheckpointReader(checkpoint) as reader:
            job.engine.shards.load_model(reader)
            job.engine.shards.load_optimizer(reader)
    return job


def save(job: Job, folder: Path, step: int) -> Path:
    store = CheckpointStore(folder, job.engine.ranks, job.engine.shards, 2, lambda phase: None)
    return store.save(step, job.objective.metadata(), "")


def train(
    config: TrainConfig, first: int, last: int, checkpoint: Path | None = None, save_at: tuple[int, ...] = ()
) -> Trained:
    """Steps `first` to `last`, with checkpoints in the stage's folder after `save_at` steps."""
    job = open_job(config, checkpoint)
    engine, objective = job.engine, job.objective
    results, gradients = [], []
    for step in range(first, last):
        if step in save_at:
            save(job, config.stage_folder, step)
        batches = objective.images.batch(step * config.stage.global_batch_size)
        result = objective.result(*engine.forward_backward(batches, objective).read())
        parameters = [*engine.trained.parameters(), *objective.other_parameters()]
        found = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        gradients.append(torch.cat(found).clone())
        results.append(result)
        engine.optimizer_step(RATE, result.gradient_norm)
    shards = engine.shards.model_shards() + engine.shards.optimizer_shards()
    weights = {shard.key: shard.tensor.clone() for shard in shards}
    final = objective.final_metrics()
    job.batches.close()
    return Trained(results, gradients, weights, final)


def one_bad_rank(config: TrainConfig, bad_rank: int) -> tuple[float, bool, list[float]]:
    """(gradient norm, do other ranks see it too?, LeCam's averages after the refused step), one rank's pixels being NaN."""
    job = open_job(config)
    objective, ranks = job.objective, job.engine.ranks
    if ranks.rank == bad_rank:
        whole = objective._pixels
        objective._pixels = lambda images: whole(images) * float("nan")
    result = objective.result(*job.engine.forward_backward(objective.images.batch(0), objective).read())
    job.engine.discard_gradients()
    job.batches.close()
    return result.gradient_norm, result.loss != result.loss, objective.adversary.average_logits.tolist()


class ToldModules(Callback):
    """Leaves the names of the modules that a rank has imported in the stage's folder."""

    name = "told"

    def on_end(self, run: RunView, status: str) -> None:
        path = run.config.stage_folder / f"modules_{os.environ['RANK']}"
        path.write_text("\n".join(sys.modules))
