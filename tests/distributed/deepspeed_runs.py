"""What the workers run under the deepspeed engine: `layout_runs` with another engine, and what only ZeRO has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_runs import MemoryReader, Trainer, gather_shards, train_config

from model.config import count_parameters
from model.parallel.initialization import InitialWeights
from training.config import OptimizerConfig, TrainConfig
from training.contracts.zero import DeepSpeedConfig

# A weight whose gradient is only rounding must not move by it: an epsilon well above the rounding.
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, gradient_clip=0.5, weight_decay=0.1, epsilon=1e-5)


def megatron_config(
    dtype: str = "float32", *, dropout: float = 0.0, adapter_rank: int = 0, **layout: Any
) -> TrainConfig:
    """Two layers, and two micro-batches a step or more: gradients add up."""
    config = train_config(dtype, dropout, adapter_rank, **layout)
    model = replace(config.model, num_layers=2, hidden_size=32, ffn_hidden_size=48, head_dim=16)
    return replace(config, model=model, stage=replace(config.stage, optimizer=OPTIMIZER))


def zero_config(
    stage: int,
    dtype: str = "float32",
    *,
    offload: str = "none",
    weights: str = "none",
    keeps: bool = False,
    compiled_adam: bool = False,
    **changes: Any,
) -> TrainConfig:
    """Everything is cut that can be cut, however small; `keeps`: what is gathered stays, as small models have it."""
    options = DeepSpeedConfig(
        zero_stage=stage, offload_optimizer=offload, offload_weights=weights, compiled_adam=compiled_adam
    )
    if not keeps:
        options = replace(options, live_elements=0, persistent_elements=0)
    config = megatron_config(dtype, **changes)
    return replace(config, engine="deepspeed", deepspeed=options)


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole state, each element from its one owner."""
    reader = MemoryReader(gather_shards(trainer))
    assert all(bool((count == 1).all()) for count in reader.covered.values()), "each element has one owner"
    return reader.tensors


def largest_difference_of_copies(trainer: Trainer) -> float:
    """Between tensor ranks, of the weights that all of them hold alike."""
    import torch.distributed as distributed

    from model.parallel.megatron import parallel_state
    from training.engines.deepspeed.zero_parts import held_weights

    largest = torch.zeros(())
    for name, parameter in trainer.engine.model.named_parameters():
        if not trainer.engine.logical[name].is_split:
            _, mine = held_weights(parameter)
            lowest, highest = mine.clone(), mine.clone()
            group = parallel_state.get_tensor_model_parallel_group()
            distributed.all_reduce(lowest, op=distributed.ReduceOp.MIN, group=group)
            distributed.all_reduce(highest, op=distributed.ReduceOp.MAX, group=group)
            largest = torch.maximum(largest, (highest - lowest).abs().max() if mine.numel() else largest)
    return float(largest)


def train_each(configs: list[TrainConfig], num_steps: int) -> list[Any]:
    """(results, whole state, difference of copies) of each run, one after the other in one layout."""
    runs = []
    for config in configs:
        trainer = Trainer(config)
        results = trainer.steps(0, num_steps)
        copies = largest_difference_of_copies(trainer) if config.engine == "deepspeed" else 0.0
        runs.append((results, tensors_of(trainer), copies))
        end(trainer)
    return runs


def end(trainer: Trainer) -> None:
    """Without the process groups, which the next engine of this job uses."""
    if trainer.config.engine == "deepspeed":
        from training.engines.deepspeed import library

        library.end(trainer.engine.engine)


def threads_before_a_layout(config: TrainConfig) -> int:
    """Of an engine that is left behind with its layout, as after a failed test."""
    before = len(list(Path("/proc/self/task").iterdir()))
    Trainer(config).steps(0, 1)
    return before


def save_and_go_on(config: TrainConfig, num_steps: int) -> tuple[MemoryReader, list[Any], dict[str, torch.Tensor]]:
    """Train, save in memory, go on: the checkpoint, the steps after it and the state after them."""
    trainer = Trainer(config)
    trainer.steps(0, num_steps)
    reader = MemoryReader([replace(shard, tensor=shard.tensor.clone()) for shard in gather_shards(trainer)])
    later = trainer.steps(num_steps, num_steps + 3)
    end_state = tensors_of(trainer)
    end(trainer)
    return reader, later, end_state


def go_on(
    config: TrainConfig, reader: MemoryReader, num_steps: int
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """From a checkpoint: the steps after it, the state as it was loaded, and the state after the steps.

    The engine has done a step of its own before, so that nothing of it may be left.
    """
    trainer = Trainer(config)
    trainer.steps(50, 51)
    trainer.shards.load_model(reader)
    trainer.shards.load_optimizer(reader)
    loaded = {key: tensor.clone() for key, tensor in tensors_of(trainer).items()}
    later = trainer.steps(num_steps, num_steps + 3)
    end_state = tensors_of(trainer)
    end(trainer)
    return later, loaded, end_state


def resume_each(configs: list[TrainConfig], num_steps: int) -> list[Any]:
    """For each: what `save_and_go_on` and `go_on` from its checkpoint found."""
    runs = []
    for config in configs:
        reader, later, end_state = save_and_go_on(config, num_steps)
        runs.append((reader.tensors, later, end_state, *go_on(config, reader, num_steps)))
    return runs


def refuse_each(configs: list[TrainConfig]) -> list[Any]:
    """For each: two steps with a refused one between them, two without, and the norm of a gradient that is no number."""
    runs = []
    for config in configs:
        trainer = Trainer(config)
        refused = trainer.steps(0, 1)
        trainer.forward_backward(99)
        trainer.engine.discard_gradients()
        refused += trainer.steps(1, 2)
        handle = trainer.engine.model.decoder.final_layernorm.weight.register_hook(
            lambda gradient: gradient * torch.nan
        )
        broken = trainer.forward_backward(3).gradient_norm
        handle.remove()
        trainer.engine.discard_gradients()
        refused += trainer.steps(3, 4)
        end(trainer)
        clean = Trainer(config)
        results = clean.steps(0, 2) + clean.steps(3, 4)
        end(clean)
        runs.append((refused, results, broken))
    return runs


def resident_elements(engine: Any) -> int:
    """Elements of the weights that this rank holds now, gathered ones included."""
    return sum(
        parameter.numel() + (parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0)
        for parameter in engine.model.parameters()
    )


def ask(config: TrainConfig) -> dict[str, Any]:
    """What a policy and a frozen model of the same weights answer, and what they hold between uses."""
    trainer = Trainer(config)
    batches = trainer.batches(0)
    found = {
        "log_probs": [values.clone() for values in trainer.engine.log_probs(batches, trainer.objective)],
        "resident": [resident_elements(trainer.engine)] if config.engine == "deepspeed" else [],
    }
    with trainer.engine.decoder() as decoder:
        logits = [decoder.start([[1, 2, 3], [4, 5]], 4)]
        for _ in range(3):
            logits.append(decoder.step(logits[-1].argmax(-1)))
    found["logits"] = logits
    if config.engine == "deepspeed":
        found["resident"].append(resident_elements(trainer.engine))
        found["step"] = trainer.steps(0, 2)[-1].loss
        found["resident"].append(resident_elements(trainer.engine))
        found["elements"] = count_parameters(config.model, padded=True)["total"]
        trained = trainer.engine.log_probs(batches, trainer.objective)
        start = InitialWeights(trainer.engine.logical.values(), config.model, config.seed)
        with trainer.engine.weights_of(start):
            found["start_log_probs"] = trainer.engine.log_probs(batches, trainer.objective)
        again = trainer.engine.log_probs(batches, trainer.objective)
        found["came_back"] = all(torch.equal(one, other) for one, other in zip(trained, again, strict=True))
        found["frozen_resident"] = resident_elements(trainer.engine.reference)
    else:
        found["step"] = trainer.steps(0, 2)[-1].loss
    return found
