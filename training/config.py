"""The typed configuration of `nextstate train` and its validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from model.errors import Problems


@dataclass
class OptimizerConfig:
    """AdamW. The presets hold the published values (Emu3.5 Table 2; section 4.1.3 for SFT)."""

    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    schedule: str = "cosine"  # cosine | constant | linear
    warmup_steps: int = 0


@dataclass
class LossWeights:
    """Weight of each class of label in the loss (Emu3.5 Table 2: visual 0.5, text 1.0)."""

    text: float = 1.0
    visual: float = 0.5
    structure: float = 1.0


@dataclass
class DatasetEntry:
    """One packed dataset of the mixture."""

    path: str = ""
    weight: float = 1.0


@dataclass
class DataConfig:
    datasets: dict[str, DatasetEntry] = field(default_factory=dict)
    prefetch_batches: int = 2


@dataclass
class StageConfig:
    """One stage of a curriculum: objective, data, batch, optimizer, what it starts from."""

    name: str = "pretrain_1"
    objective: str = "next_token"  # next_token | vision_tokenizer | text_tokenizer
    steps: int = 100
    sequence_length: int = 512
    global_batch_size: int = 8  # rows
    micro_batch_size: int = 4  # rows of one data-parallel rank in one forward pass
    document_attention: str = "document"  # document: attention and positions restart; full: the whole row
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    data: DataConfig = field(default_factory=DataConfig)
    initialize_from: str | None = None  # a stage folder or checkpoint folder; null: fresh weights
    options: dict[str, Any] = field(default_factory=dict)  # read by the objective (see its own dataclass)


@dataclass
class ParallelConfig:
    """How ranks are laid out. World size = tensor * pipeline * context * data."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = True  # sequence parallel norms and residuals; has effect with tensor > 1
    distributed_optimizer: bool = True  # shard optimizer state over data-parallel ranks

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class CheckpointConfig:
    every_steps: int = 100
    keep: int = 2  # newest complete checkpoints kept; the final one always


@dataclass
class LoggingConfig:
    every_steps: int = 1
    wandb_mode: str = "offline"  # offline | online | disabled
    wandb_project: str = "nextstate"


@dataclass
class ReliabilityConfig:
    """What the loop does with a bad step: skip it, then roll back and skip its data, then stop."""

    max_consecutive_skips: int = 3
    max_rollbacks: int = 2
    spike_factor: float = 0.0  # a gradient norm above this times the running median is skipped; 0: off
    hang_timeout_seconds: float = 600.0


@dataclass
class TrainConfig:
    name: str = "default"
    run_folder: str = "runs/default"  # the stage writes below run_folder/stage.name
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    json: bool = False  # print one JSON object on stdout at the end

    def validate(self) -> None:
        """Collect every problem, then raise one `UserError` that names the override mending each."""
        problems = Problems()
        self.model.validate(problems, "model")
        self._validate_stage(problems)
        self._validate_layout(problems)
        problems.raise_if_any()

    def _validate_stage(self, problems: Problems) -> None:
        stage = self.stage
        for name in ("steps", "sequence_length", "global_batch_size", "micro_batch_size"):
            problems.check(getattr(stage, name) > 0, f"stage.{name}", "must be positive")
        problems.check(
            stage.document_attention in ("document", "full"), "stage.document_attention",
            f"unknown value {stage.document_attention!r}", "stage.document_attention=document",
        )  # fmt: skip
        rows_at_once = stage.micro_batch_size * self.parallel.data
        problems.check(
            rows_at_once > 0 and stage.global_batch_size % rows_at_once == 0, "stage.global_batch_size",
            f"{stage.global_batch_size} is not a multiple of micro_batch_size * parallel.data = {rows_at_once}",
            f"stage.global_batch_size={max(1, -(-stage.global_batch_size // max(1, rows_at_once))) * rows_at_once}",
        )  # fmt: skip

    def _validate_layout(self, problems: Problems) -> None:
        parallel, model = self.parallel, self.model
        for name in ("tensor", "pipeline", "context", "data"):
            problems.check(getattr(parallel, name) > 0, f"parallel.{name}", "must be positive")
        tensor = max(1, parallel.tensor)
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            problems.check(
                getattr(model, name) % tensor == 0, "parallel.tensor", f"{tensor} does not divide model.{name}"
            )
        problems.check(
            model.num_layers % max(1, parallel.pipeline) == 0, "parallel.pipeline",
            f"{parallel.pipeline} does not divide model.num_layers ({model.num_layers})",
        )  # fmt: skip
        problems.check(
            self.stage.sequence_length % (tensor * max(1, parallel.context)) == 0, "stage.sequence_length",
            f"{self.stage.sequence_length} is not a multiple of parallel.tensor * parallel.context",
        )  # fmt: skip
