"""Reinforcement learning in seconds: a tiny model with fresh weights that is to draw bright pictures.

The objective, rollouts, bank, engine and loop are the real ones. Stand-ins: a vision tokenizer whose code is a
brightness, and a reward that reads it. Workers and child processes import this module by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents.tokenizers import load_text_tokenizer, train_sentencepiece
from model.config import ModelConfig
from model.errors import Problems
from model.vocabulary import Vocabulary, VocabularyConfig
from training.config import OptimizerConfig, ParallelConfig, StageConfig, TrainConfig
from training.contracts.batches import Ranks
from training.inference.model import InferenceModel
from training.inference.prompts import Prompt
from training.objectives.grpo.grpo import Grpo
from training.objectives.grpo.grpo_options import GrpoOptions
from training.objectives.grpo.questions import Question
from training.objectives.grpo.rollouts import Rollouts
from training.rewards.base import Answer

VOCABULARY = VocabularyConfig(text_size=288, visual_size=8, pad_multiple=64)
WORDS = ("a red circle", "a picture of a blue square at top left", "there is a green cross")


class LevelTokenizer:
    """A code is one of 8 levels of brightness of an 8 x 8 patch."""

    factor, codebook_size, fingerprint = 8, 8, "levels"

    def encode(self, images: np.ndarray) -> np.ndarray:
        batch, height, width, _ = images.shape
        return (images.reshape(batch, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4, 5)) / 32).astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        gray = (codes * 32 + 16).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        return np.stack([gray] * 3, axis=-1)


class Bright:
    """Mean brightness of the first picture, 0 to 1; asks whoever is named in `calls` to count it."""

    name, version = "bright", "1"
    num_calls = 0

    def __init__(self, sign: float = 1.0, missing_every: int = 0):
        self.sign, self.missing_every = sign, missing_every

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        Bright.num_calls += 1
        found: list[float | None] = []
        for number, answer in enumerate(answers):
            is_missing = self.missing_every and number % self.missing_every == 0
            image = answer.images[0] if answer.images else None
            found.append(None if is_missing or image is None else self.sign * float(image.mean()) / 255)
        return found


@dataclass
class Words:
    """Prompts for pictures of `height` x `width` tokens."""

    height: int = 2
    width: int = 3
    with_picture: bool = False

    def questions(self) -> list[Question]:
        size = (8 * self.height, 8 * self.width)
        sources = [np.full((*size, 3), 100, np.uint8)] if self.with_picture else []
        kind = "x2i" if self.with_picture else "t2i"
        return [Question(Prompt(kind, text, sources, image_size=size)) for text in WORDS]


@dataclass
class ToyOptions(GrpoOptions):
    tokenizer: str = ""  # folder of the text tokenizer

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        """Nothing is asked of the rest: fresh weights may start this stage."""


class ToyGrpo(Grpo):
    """`stage.objective.name=rl_world.ToyGrpo`."""

    Options = ToyOptions

    def batches(self, ranks: Ranks) -> Rollouts:
        answering = InferenceModel(
            None,
            Vocabulary.from_config(VOCABULARY),
            load_text_tokenizer(Path(self.options.tokenizer)),
            LevelTokenizer(),
            max_sequence_length=self.config.model.max_sequence_length,
            options=self.options.answers,
        )
        self.rollouts = Rollouts(self.config, self.options, ranks, answering, None, self)
        return self.rollouts


def write_tokenizer(folder: Path) -> Path:
    template = "You are a helpful assistant for t2i task. USER:  ASSISTANT: 3*3 2*3 x2i"
    train_sentencepiece([*WORDS, *[template] * 50] * 20, folder / "text_tokenizer", VOCABULARY.text_size, seed=1)
    return folder / "text_tokenizer"


def rl_config(tokenizer: Path, run_folder: Path, **options: Any) -> TrainConfig:
    """8 answers a step, 4 to each of 2 prompts."""
    objective: dict[str, Any] = {
        "name": "rl_world.ToyGrpo",
        "tokenizer": str(tokenizer),
        "group_size": 4,
        "prompts": {"t2i": {"path": "rl_world.Words"}},
        "rewards": {"signals": {"bright": {"path": "rl_world.Bright", "range": [0.0, 1.0]}}},
        "sampling": {"max_new_tokens": 24},
    }
    stage = StageConfig(
        name="rl",
        steps=4,
        sequence_length=160,
        global_batch_size=8,
        micro_batch_size=2,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.0),
        objective=objective | options,
    )
    model = ModelConfig(
        name="tiny",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        init_std=0.2,
        max_sequence_length=160,
        dropout=0.0,
        vocabulary=VOCABULARY,
    )
    config = TrainConfig(run_folder=str(run_folder), model=model, stage=stage)
    config.logging.wandb_mode = "disabled"
    config.checkpoint.every_steps = 2
    return config


def with_layout(config: TrainConfig, micro_batch_size: int = 2, **layout: Any) -> TrainConfig:
    config.parallel = ParallelConfig(**layout)
    config.stage.micro_batch_size = micro_batch_size
    return config
