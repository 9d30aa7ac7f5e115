"""What the workers run: rollouts and updates of the tiny world in any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from training.config import TrainConfig
from training.contracts.run_view import LoopState
from training.objectives.grpo.parity import difference
from training.objectives.registry import make_objective


class Learner:
    def __init__(self, config: TrainConfig):
        from training.engines.registry import make_engine

        self.config, self.objective = config, make_objective(config)
        self.engine: Any = make_engine(config, self.objective)
        self.source = self.objective.batches(self.engine.ranks)
        self.state = LoopState()

    def rollout(self) -> list[Any]:
        return list(self.source.next(self.state, self.engine, lambda: False))

    def step(self) -> Any:
        result = self.objective.result(*self.engine.forward_backward(self.rollout(), self.objective).read())
        self.engine.optimizer_step(self.config.stage.optimizer.learning_rate, result.gradient_norm)
        self.state.next_sample += self.config.stage.global_batch_size
        return result


def steps(config: TrainConfig, num_steps: int) -> list[Any]:
    learner = Learner(config)
    return [learner.step() for _ in range(num_steps)]


def steps_with_a_guard(config: TrainConfig, num_steps: int) -> tuple[list[float], list[int], dict[str, Any]]:
    """Reward and number of alarms of each step, with windows of one step, and what a checkpoint would keep."""
    from training.rewards.alarm import HackingAlarm

    learner = Learner(config)
    learner.source.alarm = HackingAlarm(window_steps=1)
    metrics = [learner.step().metrics for _ in range(num_steps)]
    return [one["reward"] for one in metrics], [one["alarms"] for one in metrics], learner.source.state()["alarm"]


def one_rollout(config: TrainConfig) -> tuple[list[list[int]], Any]:
    """Every answer of the first rollout as ids, in the order of prompts, and the parity of trainer and sampler."""
    learner = Learner(config)
    fill_adapters(learner.engine.model)
    batches = learner.rollout()
    parity = difference(learner.engine.ranks, batches, learner.engine.log_probs(batches, learner.objective))
    answers = [batch.labels[place].tolist() for batch in batches for place in batch.answers]
    return answers, parity


def fill_adapters(model: torch.nn.Module) -> None:
    """As if they had learnt something; a part that all tensor-parallel ranks hold is the same on each."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))


def gradient_of_forced(config: TrainConfig) -> tuple[float, float, int]:
    """Gradient norms of a step in which only forced tokens count, of the same as it is, and the number of the former."""
    learner = Learner(config)
    batches = learner.rollout()
    plain = learner.engine.forward_backward(batches, learner.objective).read()[2]
    for batch in batches:
        places = np.concatenate(batch.answers)
        batch.learnt[places] = 1.0 - batch.learnt[places]
    num_forced = int(sum(batch.learnt.sum() for batch in batches))
    return learner.engine.forward_backward(batches, learner.objective).read()[2], plain, num_forced


def trained_by_the_conditional_alone(config: TrainConfig) -> str:
    """Sample with guidance, score without it: what the gate is for."""
    learner = Learner(config)
    options = learner.objective.options
    learner.objective.options = replace(options, sampling=replace(options.sampling, guidance_scale=1.0))
    return refusal(learner)


def refusal(learner: Learner) -> str:
    from model.errors import UserError

    try:
        learner.rollout()
    except UserError as error:
        return str(error)
    return "accepted"


def reference_is_the_start(config: TrainConfig) -> tuple[list[bool], bool]:
    """Weights of another model in place of those in training: log-probabilities change, and come back bit for bit."""
    learner = Learner(config)
    batches = learner.rollout()
    before = learner.engine.log_probs(batches, learner.objective)
    weights = {name: one.detach().clone() for name, one in learner.engine.model.named_parameters()}
    reader = Doubled(learner.engine.shards.model_shards())
    with learner.engine.weights_of(reader):
        other = learner.engine.log_probs(batches, learner.objective)
    same = [torch.equal(one, weights[name]) for name, one in learner.engine.model.named_parameters()]
    differs = not torch.equal(other[0], before[0])
    return [*same, torch.equal(learner.engine.log_probs(batches, learner.objective)[0], before[0])], differs


def offloaded_rollout(config: TrainConfig) -> tuple[list[int], bool]:
    """Behind one step: bytes of gradients and state while answers are drawn, and is the state the same afterwards?"""
    from training.engines.megatron.offload import optimizer_tensors

    learner = Learner(config)
    learner.step()
    state = optimizer_tensors(learner.engine.wrapped, learner.engine.optimizer)
    gradients = [buffer.grad_data for buffer in learner.engine.wrapped.buffers]
    before = [one.detach().clone() for one in state]
    with learner.engine.offloaded():
        held = [one.untyped_storage().nbytes() for one in [*state, *gradients]]
        learner.rollout()
    return held, all(torch.equal(one, was) for one, was in zip(state, before, strict=True))


class Doubled:
    """A checkpoint of one process with all weights times two."""

    def __init__(self, shards: list[Any]):
        self.tensors: dict[str, torch.Tensor] = {}
        for shard in shards:
            whole = self.tensors.setdefault(shard.key, torch.zeros(shard.global_shape))
            place = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.tensor.shape, strict=True))
            whole[place] = 2 * shard.tensor.detach()

    def keys(self) -> Any:
        return self.tensors.keys()

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, offset: Any, shape: Any) -> torch.Tensor:
        return self.tensors[key][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
