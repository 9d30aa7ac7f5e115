"""Small parts of inference: a vision tokenizer of grey patches, decoders without a network."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.documents.tokenizers import TextTokenizer
from model.vocabulary import Vocabulary, VocabularyConfig
from training.inference.model import InferenceModel
from training.inference.prompts import InferenceOptions

TEXTS = ["a red circle at top left", "make the circle blue", "it moves right"] * 40
TEXT_SIZE = 288
VOCABULARY_CONFIG = VocabularyConfig(text_size=TEXT_SIZE, visual_size=64, pad_multiple=64)
VOCABULARY = Vocabulary.from_config(VOCABULARY_CONFIG)


class GrayTokenizer:
    """A code is the mean brightness of an 8 x 8 patch, in 64 steps."""

    factor, codebook_size, fingerprint = 8, 64, "gray"

    def encode(self, images: np.ndarray) -> np.ndarray:
        batch, height, width, _ = images.shape
        patches = images.reshape(batch, height // 8, 8, width // 8, 8, 3)
        return (patches.mean(axis=(2, 4, 5)) / 4).astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        gray = (codes * 4).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        return np.stack([gray] * 3, axis=-1)


class RowsDecoder:
    """Keeps what it has read of each row; `row_logits` says what follows a row."""

    device = "cpu"

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        self.rows = [list(prompt) for prompt in prompts]
        return self._logits(self.rows)

    def step(
        self, ids: torch.Tensor, advances: torch.Tensor | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        read = [[*row, *new] for row, new in zip(self.rows, ids.view(len(ids), -1).tolist(), strict=True)]
        logits = self._logits(read)
        keeps = [True] * len(read) if advances is None else advances.tolist()
        self.rows = [new if kept else old for new, old, kept in zip(read, self.rows, keeps, strict=True)]
        return logits if columns is None else logits[:, columns]

    def _logits(self, rows: Sequence[list[int]]) -> torch.Tensor:
        return torch.stack([self.row_logits(row) for row in rows])

    def row_logits(self, row: list[int]) -> torch.Tensor:
        raise NotImplementedError


class HashDecoder(RowsDecoder):
    """A fixed random distribution behind every sequence; `text_weight` favours text over structure."""

    def __init__(self, text_weight: float = 0.0) -> None:
        super().__init__()
        self.text_weight = text_weight

    def row_logits(self, row: list[int]) -> torch.Tensor:
        rng = np.random.default_rng(zlib.crc32(np.array(row, np.int64).tobytes()))
        logits = torch.from_numpy(rng.normal(size=VOCABULARY.padded_size)).float()
        logits[:TEXT_SIZE] += self.text_weight
        return logits


def toy_model(text_tokenizer: TextTokenizer, decoder: Any = None, length: int = 2048, **options: Any) -> InferenceModel:
    return InferenceModel(
        decoder or HashDecoder(),
        VOCABULARY,
        text_tokenizer,
        GrayTokenizer(),
        max_sequence_length=length,
        options=InferenceOptions(**options),
    )
