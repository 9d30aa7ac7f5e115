"""The engine on DeepSpeed: ZeRO 1, 2 and 3 with offload to the host, over the transformer and layout of megatron-core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed

from model.backbone.transformer import build_model, new_model
from model.errors import UserError
from model.generation.decoder import CachedDecoder
from model.parallel import cpu_backend, groups
from model.parallel.initialization import InitialWeights
from model.parallel.megatron import GPTModel, parallel_state
from model.parallel.sharding import logical_parameters
from training.config import OptimizerConfig, TrainConfig
from training.contracts.engine import StepSums
from training.contracts.inputs import InputMaker
from training.contracts.objective import TokenObjective
from training.contracts.shards import ShardReader
from training.engines.deepspeed import library, zero_parts
from training.engines.deepspeed.host_memory import check_host_memory, ranks_of_this_host
from training.engines.deepspeed.scored_model import ScoredModel, ZeroForward
from training.engines.deepspeed.settings import zero_settings
from training.engines.deepspeed.zero_parts import forget_gathered
from training.engines.deepspeed.zero_shards import ZeroShards, held_parts
from training.engines.flat_ranges import read_weights
from training.engines.megatron.engine import join_layout, seed_everything


class FrozenModel:
    """A model that is only asked: its weights cut over the data-parallel ranks, no optimizer.

    For reference models beside a policy of either engine. Weights are the initial ones until `load` fills them. A layout
    that is already initialised is used as it is; all models of a process share one.
    """

    trained = False

    def __init__(self, config: TrainConfig):
        self.config = config
        self.ranks = join_layout(config)
        check_host_memory(config, ranks_of_this_host())
        library.join()
        self.device = torch.device("cuda" if cpu_backend.has_accelerator() else "cpu")
        self._build()

    def _build(self) -> None:
        config, layout = self.config, self.config.parallel
        build = partial(new_model, config.model, sequence_parallel=layout.sequence, recompute=layout.recompute)
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        settings = zero_settings(config, trained=self.trained)
        # Shapes are known before anything is allocated; a parameter that is cut does not show them.
        shapes = build_model(config.model, sequence_parallel=layout.sequence, recompute=layout.recompute, device="meta")
        self.logical = logical_parameters(shapes)
        is_cut = settings["zero_optimization"]["stage"] == 3
        if is_cut:
            with library.partitioned(settings):
                self.model = build()
        else:
            self.model = build().to(self.device)
        for name, parameter in self.model.named_parameters():
            # The gradient norm counts a parameter without the mark on the first tensor rank only.
            parameter.tensor_model_parallel = self.logical[name].is_split
            parameter.requires_grad_(self.trained and parameter.requires_grad)
        self._read(InitialWeights(self.logical.values(), config.model, config.seed))
        scored = ScoredModel(self.model, replicas)
        if is_cut:
            scored.share_output_weight()
        self.engine = library.initialize(scored, settings, self._optimizer() if self.trained else None)
        self.forward = ZeroForward(config.model, self.model, self.device, self.engine)

    def _optimizer(self) -> Any:
        raise AssertionError("a frozen model has no optimizer")

    def load(self, reader: ShardReader) -> None:
        """Weights from a checkpoint of any layout and engine; adapters that it lacks stay as they are."""
        forget_gathered(self.engine.optimizer)
        self._read(reader)

    def _read(self, reader: ShardReader) -> None:
        read_weights(reader, held_parts(self.model, self.logical))

    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        """See `training.contracts.batches.Policy`. Dropout is off."""
        with self._evaluating():
            return self.forward.log_probs(batches, objective)

    @contextmanager
    def decoder(self) -> Iterator[CachedDecoder]:
        """Over these weights. In stage 3 all of them are gathered for the time of the context.

        Gathered once they serve every token; a layer at a time, all weights would travel for every token. A device
        then holds model / parallel.tensor.
        """
        with self._evaluating(), self._gathered():
            yield CachedDecoder(self.model)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        offload = self._weights_offload()
        if offload is None:
            yield
            return
        with library.deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            # The hooks would give a layer's weights back after its first use.
            library.remove_hooks(offload)
            try:
                yield
            finally:
                library.add_hooks(offload)

    def _weights_offload(self) -> Any:
        """DeepSpeed's object that gathers and frees weights; None where they are not cut."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, library.DeepSpeedZeRoOffload):
            return optimizer
        return getattr(optimizer, "parameter_offload", None)

    def close(self) -> None:
        """The process groups stay: the policy beside it uses them."""
        library.end(self.engine)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.engine.training
        self.engine.eval()
        try:
            yield
        finally:
            self.engine.train(was_training)


class DeepSpeedEngine(FrozenModel):
    """Trains the transformer of a `TrainConfig`; see `training.contracts.engine.Engine` for what each method promises.

    Every rank of the layout makes one. The model is that of the configuration, whatever the objective.
    """

    trained = True

    def __init__(self, config: TrainConfig, objective: TokenObjective | None = None):
        super().__init__(config)
        seed_everything(config.seed)
        zero_parts.allocate_state(self.engine)
        sum_over_tensor_ranks(self.model)
        self.shards = ZeroShards(config, self.model, self.logical, self.engine, self.ranks)
        self.reference: FrozenModel | None = None  # the weights of a checkpoint, beside those in training
        self._read_from: ShardReader | None = None  # that checkpoint
        self._asks_reference = False

    def _optimizer(self) -> Any:
        spared = [
            parameter for name, parameter in self.model.named_parameters() if len(self.logical[name].global_shape) == 1
        ]
        make = library.compiled_adam if self.config.deepspeed.compiled_adam else fused_adam
        return partial(make_optimizer, make, self.config.stage.optimizer, spared)

    @contextmanager
    def weights_of(self, reader: ShardReader) -> Iterator[None]:
        """See `training.contracts.batches.Policy`. They are a frozen model beside the one in training, and stay there."""
        if self.reference is None:
            self.reference = FrozenModel(self.config)
        if self._read_from is not reader:
            self.reference.load(reader)
            self._read_from = reader
        self._asks_reference = True
        try:
            yield
        finally:
            self._asks_reference = False

    def offloaded(self) -> AbstractContextManager[None]:
        """Raises `UserError`: what DeepSpeed holds it moves itself."""
        raise UserError(
            "the engine deepspeed does not give the optimizer's memory away while answers are drawn",
            where="stage.objective.offload",
            fix="stage.objective.offload=false, and deepspeed.offload_optimizer=cpu for less memory on the device",
        )

    def log_probs(self, batches: Sequence[Any], objective: InputMaker) -> list[torch.Tensor]:
        if self.reference is not None and self._asks_reference:
            return self.reference.log_probs(batches, objective)
        return super().log_probs(batches, objective)

    @contextmanager
    def decoder(self) -> Iterator[CachedDecoder]:
        asked = self.reference if self._asks_reference else None
        with asked.decoder() if asked is not None else super().decoder() as found:
            yield found

    def forward_backward(self, batches: Sequence[Any], objective: TokenObjective) -> StepSums:
        """Reduced gradients and what the report needs; nothing is applied, and nothing read from the device, yet."""
        totals = torch.from_numpy(objective.totals(batches)).to(self.device)
        distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        self.engine.train()
        sums = self.forward.losses(batches, objective, totals)
        distributed.all_reduce(sums)
        return StepSums(totals, sums, zero_parts.gradient_norm(self.engine.optimizer).to(self.device) ** 2.0)

    def optimizer_step(self, learning_rate: float, gradient_norm: float) -> None:
        """DeepSpeed clips by the norm that it computes once more, by the functions that `forward_backward` asked."""
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def discard_gradients(self) -> None:
        zero_parts.discard_gradients(self.engine.optimizer)

    def close(self) -> None:
        """Every rank's last call; the ranks have waited for each other before it."""
        if self.reference is not None:
            self.reference.close()
        super().close()
        groups.destroy()


def fused_adam(groups_of_parameters: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW of torch, whose fused step is as fast on a CPU as DeepSpeed's own and needs no compiler."""
    return torch.optim.AdamW(groups_of_parameters, fused=True, **options)


def make_optimizer(
    make: Callable[..., torch.optim.Optimizer],
    config: OptimizerConfig,
    spared: list[torch.nn.Parameter],
    parameters: Any,
) -> torch.optim.Optimizer:
    """AdamW. Weight decay does not touch `spared`, the norms. What has no gradient, beside adapters, is left out."""
    spared_ids = {id(parameter) for parameter in spared}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decaying = [parameter for parameter in trained if id(parameter) not in spared_ids]
    sparing = [parameter for parameter in trained if id(parameter) in spared_ids]
    pairs = ((decaying, config.weight_decay), (sparing, 0.0))
    return make(
        [{"params": some, "weight_decay": decay} for some, decay in pairs if some],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def sum_over_tensor_ranks(model: GPTModel) -> None:
    """Sum the gradients of weights that tensor ranks hold alike but use on other tokens or heads.

    megatron-core does it in `finalize_model_grads`, of which DeepSpeed knows nothing: the copies would drift apart and
    the loss would hardly show it. Under sequence parallelism these are all norms, and of each adapter the matrix that is
    not split; norms of queries and keys always.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if distributed.get_world_size(group) == 1:
        return

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous()
        distributed.all_reduce(total, group=group)
        return total

    for name, parameter in model.named_parameters():
        is_of_heads = "q_layernorm" in name or "k_layernorm" in name
        if parameter.requires_grad and (
            is_of_heads or (model.config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        ):
            parameter.register_hook(summed)
