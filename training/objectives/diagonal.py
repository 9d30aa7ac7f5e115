"""Images decoded by anti-diagonals (`model.generation.diagonals`): next tokens of documents, and copies of their images
that are read in the order of decoding.

A copy has the codes of its image, at its positions, diagonal by diagonal; a token sees its own step and the steps before,
as in decoding, and predicts the code behind it in its row. So the loss of a copy is exactly minus the log-probability of
the image under decoding, and each step of training learns all codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.backbone.attention_plan import AttentionPlan, ImageCopies, documents_with_image_copies, range_tokens
from model.generation.diagonals import DiagonalOrder
from training.config import TrainConfig
from training.objectives.copy_options import DiagonalOptions
from training.objectives.dida_rows import DidaBatch
from training.objectives.image_copies import ImageCopiesObjective, grids_seen


class Diagonal(ImageCopiesObjective):
    """See the module; and `training.contracts.objective` for what each method promises."""

    Options = DiagonalOptions

    def __init__(self, config: TrainConfig, options: DiagonalOptions):
        super().__init__(config, options)
        self._diagonal: dict[str, Any] = {}  # what a checkpoint says of it

    def look_at(self, images: Sequence[np.ndarray], num_references: int) -> None:
        self._diagonal = grids_seen(images)

    def sources(self, batch: DidaBatch, layout: ImageCopies) -> np.ndarray:
        sources = layout.source_tokens()
        copies = range_tokens(layout.copy_starts, layout.copy_lengths)
        shifts = [order.tokens - np.arange(order.tokens.size) for order in orders(batch)]
        sources[copies] += np.concatenate([*shifts, np.empty(0, np.int64)])
        return sources

    def plan(self, batch: DidaBatch, layout: ImageCopies) -> AttentionPlan:
        return documents_with_image_copies(layout, [order.lengths for order in orders(batch)])

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"diagonal": self._diagonal}


def orders(batch: DidaBatch) -> list[DiagonalOrder]:
    """Of each copy."""
    grids = zip(batch.images.heights.tolist(), batch.images.widths.tolist(), strict=True)
    return [DiagonalOrder.of(*grid) for grid in grids]
