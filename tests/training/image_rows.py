"""Packed rows with images, made here; the objective `dida` on them, in any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.batch import MicroBatch, build_micro_batch
from data_pipeline.storage.segments import SEGMENT_DTYPE, Flag, Kind
from model.config import AdapterConfig, ModelConfig
from model.generation.paths import MetricPath, UniformPath
from model.vocabulary import Vocabulary, VocabularyConfig
from training.config import OptimizerConfig, ParallelConfig, StageConfig, TrainConfig
from training.contracts.inputs import ModelInput
from training.objectives.diagonal import Diagonal
from training.objectives.dida import Dida
from training.objectives.dida_rows import DidaBatch, RowsWithCopies
from training.objectives.image_copies import ImageCopiesObjective

ROW_TOKENS, ROWS, ROOM = 64, 4, 32
VOCABULARY = VocabularyConfig(text_size=30, reserved_size=16, visual_size=18, pad_multiple=64)
IDS = Vocabulary.from_config(VOCABULARY)
CLASS_WEIGHTS = np.array([1.0, 0.5, 0.25], np.float32)
GRIDS = ((1, 1), (2, 2), (2, 3), (3, 1), (1, 4))  # ragged


def dida_config(adapter: AdapterConfig | None = None, **layout: Any) -> TrainConfig:
    model = ModelConfig(
        adapter=adapter or AdapterConfig(),
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        init_std=0.2,
        vocabulary=VOCABULARY,
        dropout=0.0,
    )
    optimizer = OptimizerConfig(learning_rate=3e-3, gradient_clip=0.5)
    stage = StageConfig(
        sequence_length=ROW_TOKENS, global_batch_size=ROWS, micro_batch_size=2, optimizer=optimizer, steps=4
    )
    return TrainConfig(model=model, stage=stage, parallel=ParallelConfig(**layout))


def make_dida(config: TrainConfig, **options: Any) -> Dida:
    objective = Dida(config, Dida.Options(**({"path": "uniform", "copy_tokens": ROOM} | options)))
    objective.source_names = ["first"]
    codebook = torch.randn((18, 4), generator=torch.Generator().manual_seed(0))
    objective.path = MetricPath(codebook, 3.0, 0.9) if objective.options.path == "metric" else UniformPath(18)
    return objective


def make_diagonal(config: TrainConfig, **options: Any) -> Diagonal:
    objective = Diagonal(config, Diagonal.Options(**({"copy_tokens": ROOM} | options)))
    objective.source_names = ["first"]
    return objective


def image_block(rng: np.random.Generator, height: int, width: int) -> list[int]:
    rows = [(IDS.visual_start + rng.integers(0, 18, width)).tolist() for _ in range(height)]
    codes = [token for row in rows for token in [*row, IDS.eol]][:-1]
    return [IDS.boi, 3 + height, 13, 3 + width, IDS.img, *codes, IDS.eoi]


def random_row(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [ROW_TOKENS] and segments: documents of text and images, some without loss; padding at the end."""
    tokens: list[int] = []
    parts: list[tuple[int, int, int]] = []  # kind, flags, length
    begins = True
    while True:
        is_image = bool(rng.random() < 0.5)
        part = image_block(rng, *GRIDS[rng.integers(len(GRIDS))]) if is_image else rng.integers(0, 30, 3).tolist()
        if len(tokens) + len(part) > ROW_TOKENS:
            break
        flags = (Flag.DOCUMENT_START if begins else 0) | (Flag.NO_LOSS if rng.random() < 0.2 else 0)
        parts.append((Kind.IMAGE if is_image else Kind.TEXT, flags, len(part)))
        tokens += part
        begins = bool(rng.random() < 0.35)
    if len(tokens) < ROW_TOKENS:
        parts.append((Kind.PAD, 0, ROW_TOKENS - len(tokens)))
        tokens += [IDS.pad] * (ROW_TOKENS - len(tokens))
    segments = np.zeros(len(parts), SEGMENT_DTYPE)
    kinds, flags_of, lengths = (np.array(values) for values in zip(*parts, strict=True))
    segments["kind"], segments["flags"], segments["length"] = kinds, flags_of, lengths
    segments["start"] = np.cumsum(lengths) - lengths
    return np.array(tokens, np.int64), segments


def micro_batch(seed: int, num_rows: int = 2) -> MicroBatch:
    rng = np.random.default_rng(seed)
    tokens, segments = zip(*(random_row(rng) for _ in range(num_rows)), strict=True)
    return build_micro_batch(np.stack(tokens), np.concatenate(segments), CLASS_WEIGHTS, "document", IDS)


def copy_places(inputs: ModelInput, batch: DidaBatch) -> list[np.ndarray]:
    """Where each copy lies in the row."""
    copies = np.flatnonzero(inputs.fields["noisy"] > 0)
    found: list[np.ndarray] = np.split(copies, np.cumsum(batch.images.lengths)[:-1])
    return found


class Forward:
    """Logits [T, padded vocabulary] of whole inputs, as in training, by a fresh model or by one with adapters on copies."""

    def __init__(self, config: ModelConfig) -> None:
        from model.backbone.transformer import build_model

        self.config, self.model = config, build_model(config, seed=3).eval()
        adapter = AdapterConfig(rank=2, tokens="copies")
        self.adapted = build_model(replace(config, adapter=adapter), seed=3).eval()
        for name, parameter in self.adapted.named_parameters():
            if name.endswith("lora.b"):  # zero at the start
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def __call__(self, inputs: ModelInput, model: Any = None) -> torch.Tensor:
        from model.backbone.packed_attention import prepare_attention

        packed = prepare_attention(
            inputs.plan,
            torch.from_numpy(inputs.position_ids),
            head_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            copies=torch.from_numpy(inputs.fields["noisy"] > 0) if "noisy" in inputs.fields else None,
        )
        used = model or self.model
        logits: torch.Tensor = used(torch.from_numpy(inputs.tokens)[None], None, None, packed_seq_params=packed)
        return logits[0].float()


class MadeRows:
    """Stands for a `PackedDataSource`: sample n is a function of n."""

    fingerprint = "made"

    def __init__(self, config: TrainConfig) -> None:
        self.rows_at_once, self.num = config.stage.micro_batch_size, config.stage.global_batch_size

    def batch(self, first_sample: int) -> list[MicroBatch]:
        starts = range(first_sample, first_sample + self.num, self.rows_at_once)
        return [micro_batch(start, self.rows_at_once) for start in starts]

    def close(self) -> None: ...


def batches_of(
    config: TrainConfig, first_sample: int, room: int = ROOM, copies: int = 1, clean_tokens: int = 0
) -> list[DidaBatch]:
    stride = config.stage.micro_batch_size
    rows = RowsWithCopies(MadeRows(config), IDS, 7, room, stride, 0, copies, clean_tokens)  # type: ignore[arg-type]
    return rows.batch(first_sample)


def train_dida(config: TrainConfig, num_steps: int) -> list[tuple[float, float, float]]:
    return train_copies(config, num_steps, make_dida(config, path="metric"))


def train_copies_alone(config: TrainConfig, num_steps: int, clean_tokens: int) -> list[tuple[float, float, float]]:
    """No next token is learnt; with `clean_tokens` only what copies see of documents is computed."""
    return train_copies(
        config, num_steps, make_dida(config, path="metric", clean_weight=0.0, clean_tokens=clean_tokens)
    )


def train_diagonal(config: TrainConfig, num_steps: int) -> list[tuple[float, float, float]]:
    return train_copies(config, num_steps, make_diagonal(config))


def train_copies(
    config: TrainConfig, num_steps: int, objective: ImageCopiesObjective
) -> list[tuple[float, float, float]]:
    """Loss, loss of copies and gradient norm of each step, by the real engine."""
    from training.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(config)
    found = []
    for step in range(num_steps):
        batches = batches_of(config, step * ROWS, clean_tokens=objective.copy_options.clean_tokens)
        result = objective.result(*engine.forward_backward(batches, objective).read())
        engine.optimizer_step(config.stage.optimizer.learning_rate, result.gradient_norm)
        found.append((result.loss, result.metrics["loss_copies"], result.gradient_norm))
    return found
