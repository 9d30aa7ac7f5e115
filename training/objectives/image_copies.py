"""What the objectives of parallel image decoding share: documents learn their next tokens, copies of their images behind
them learn what parallel decoding asks of them.

A copy is an image block from the last token of its header to its last code. Nothing sees it but itself, so the clean stream
is what it was without; it sees its document before the image. loss = mean cross entropy of the copies' codes +
clean_weight * the loss of the next tokens. Where that weight is 0, what no copy sees can be left out of the rows
(`clean_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model.backbone.attention_plan import AttentionPlan, ImageCopies, append_image_copies, documents_with_image_copies
from model.errors import UserError
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.inputs import LocalInput, LossSums, ModelInput, TokenScores
from training.contracts.results import StepResult
from training.objectives.copy_options import CopyOptions
from training.objectives.dida_rows import DidaBatch, RowsWithCopies, find_images
from training.objectives.next_token import NextToken
from training.objectives.offline_rows import OfflineRows

ROWS_LOOKED_AT = 64  # of the stage's data, for the sizes of its images


class ImageCopiesObjective(NextToken):
    """See the module; and `training.contracts.objective` for what each method promises."""

    engine = "megatron"
    copies_an_image = 1

    def __init__(self, config: TrainConfig, options: CopyOptions):
        super().__init__(config, options)
        self.copy_options = options

    @property
    def num_sums(self) -> int:
        return super().num_sums + 1

    def batches(self, ranks: Ranks) -> OfflineRows:
        stage = self.config.stage
        self.hear_history(ranks)
        rows = self.packed_rows(ranks.data_parallel_rank, ranks.data_parallel_size)
        self.look_at(*self._seen())
        return OfflineRows(
            RowsWithCopies(
                rows,
                self.vocabulary,
                self.config.seed,
                self.copy_options.room(stage.sequence_length),
                stride=stage.micro_batch_size * ranks.data_parallel_size,
                offset=stage.micro_batch_size * ranks.data_parallel_rank,
                copies_an_image=self.copies_an_image,
                clean_tokens=self.copy_options.clean_tokens,
            )
        )

    def look_at(self, images: Sequence[np.ndarray], num_references: int) -> None:
        """Settle what depends on the data, the same on every rank: codes int64 [H, W] of images, and how many of these
        have another one of their grid before them in their document."""
        raise NotImplementedError

    def _seen(self) -> tuple[list[np.ndarray], int]:
        """What `look_at` is told: of the first rows of the mixture."""
        rows = self.packed_rows(0, 1, num_rows=ROWS_LOOKED_AT)
        try:
            found, num_references = [], 0
            for batch in rows.batch(rows.mixture.first_sample):
                images, tokens = find_images(batch, self.vocabulary), batch.tokens.reshape(-1)
                num_references += int((images.references >= 0).sum())
                for start, length, width in zip(images.starts, images.lengths, images.widths, strict=True):
                    block = tokens[start : start + length]
                    found.append(
                        self.vocabulary.ids_to_codes(block[self.vocabulary.is_visual(block)]).reshape(-1, width)
                    )
        finally:
            rows.close()
        if not found:
            raise UserError(
                "the stage's data hold no image to learn from",
                where="stage.data.datasets",
                expected=f"images with loss in the first {ROWS_LOOKED_AT} rows",
                fix="name datasets with images, or use the objective next_token",
            )
        return found, num_references

    def inputs(self, batch: DidaBatch) -> ModelInput:  # type: ignore[override]
        """Documents, copies behind each, and one more document of padding up to the stage's room."""
        if batch.prepared is None:
            batch.prepared = self._with_copies(batch)
        return batch.prepared

    def _with_copies(self, batch: DidaBatch) -> ModelInput:
        options, clean = self.copy_options, super().inputs(batch.rows)
        layout = append_image_copies(batch.rows.cu_seqlens, batch.images.starts, batch.images.lengths)
        sources = self.sources(batch, layout)
        tokens, labels, in_copy = clean.tokens[sources], clean.labels[sources], layout.copy_numbers() > 0
        learnt = self.change_copies(batch, layout, tokens) & self.vocabulary.is_visual(labels)
        made = ModelInput(
            tokens=tokens,
            position_ids=clean.position_ids[sources],
            plan=self.plan(batch, layout),
            labels=labels,
            weights=np.where(in_copy, learnt, clean.weights[sources]).astype(clean.weights.dtype),
            fields={name: values[sources] for name, values in clean.fields.items()}
            | {"noisy": in_copy.astype(np.int64)},
        )
        if options.clean_tokens:
            made = only_tokens(made, layout.seen_tokens())
            made.weights[made.fields["noisy"] == 0] = 0
        room = options.row_length(self.config.stage.sequence_length) * len(batch.rows.tokens)
        return with_padding(made, room - made.tokens.size, self.vocabulary.pad)

    def sources(self, batch: DidaBatch, layout: ImageCopies) -> np.ndarray:
        """int64 [T], which token of the row without copies each token stands for."""
        return layout.source_tokens()

    def plan(self, batch: DidaBatch, layout: ImageCopies) -> AttentionPlan:
        return documents_with_image_copies(layout)

    def change_copies(self, batch: DidaBatch, layout: ImageCopies, tokens: np.ndarray) -> np.ndarray:
        """May replace codes of copies in `tokens`; bool [T], which tokens of copies have something to learn."""
        return np.ones(tokens.size, dtype=bool)

    def totals(self, batches: Sequence[DidaBatch]) -> np.ndarray:  # type: ignore[override]
        """As of next-token stages, then: codes learnt in copies, images, copies."""
        of_rows = super().totals([batch.rows for batch in batches])
        inputs = [self.inputs(batch) for batch in batches]
        if self.copy_options.clean_tokens:
            of_rows[:] = 0  # no next token has loss
        of_rows[1] = sum(one.tokens.size for one in inputs)
        num_learnt = sum(float(one.weights[one.fields["noisy"] > 0].sum()) for one in inputs)
        num_images, num_copies = (sum(b.num_images for b in batches), sum(len(b.numbers) for b in batches))
        return np.concatenate((of_rows, [num_learnt, num_images, num_copies]))

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        if self.copy_options.clean_tokens:  # most tokens only stand there to be seen
            places = torch.nonzero(inputs.weights).squeeze(-1)
            fields = {name: values[places] for name, values in inputs.fields.items()}
            scores = scores.only(places)
            inputs = LocalInput(inputs.labels[places], inputs.weights[places], fields)
        of_copies = torch.where(inputs.fields["noisy"] > 0, inputs.weights, 0.0)
        clean = LocalInput(inputs.labels, inputs.weights - of_copies, inputs.fields)
        scales = torch.where(totals > 0, 1.0 / totals, 0.0).to(inputs.weights.dtype)
        weights = of_copies * scales[-3] + clean.weights * scales[0] * self.copy_options.clean_weight
        loss, losses = self.weighted_losses(scores, inputs, weights)
        values = losses.detach().double()
        return LossSums(loss, torch.cat((self._sums(values, clean), torch.dot(values, of_copies.double())[None])))

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        clean = super().result(totals[:-3], sums[:-1], gradient_norm)
        num_learnt, num_images, num_copies = totals[-3:]
        of_copies = float(sums[-1] / num_learnt) if num_learnt else 0.0
        metrics: dict[str, Any] = clean.metrics | {
            "loss_next_token": clean.loss if clean.has_labels else None,
            "loss_copies": of_copies if num_learnt else None,
            "images": int(num_images),
            "image_copies": int(num_copies),
        }
        loss = of_copies + self.copy_options.clean_weight * clean.loss
        has_labels = num_learnt > 0 or clean.has_labels
        return StepResult(loss, gradient_norm, clean.num_tokens, has_labels, metrics)


def only_tokens(inputs: ModelInput, kept: np.ndarray) -> ModelInput:
    """The `kept` tokens alone (bool [T]); those that are left out are seen by none of them."""
    return ModelInput(
        tokens=inputs.tokens[kept],
        position_ids=inputs.position_ids[kept],
        plan=inputs.plan.only(kept),
        labels=inputs.labels[kept],
        weights=inputs.weights[kept],
        fields={name: values[kept] for name, values in inputs.fields.items()},
    )


def with_padding(inputs: ModelInput, num_padding: int, pad: int) -> ModelInput:
    """One more document, of padding."""
    assert num_padding >= 0, "what was chosen fits the row"
    if num_padding == 0:
        return inputs

    def extended(values: np.ndarray, padding: Any) -> np.ndarray:
        return np.concatenate((values, np.broadcast_to(np.asarray(padding, values.dtype), num_padding)))

    return ModelInput(
        tokens=extended(inputs.tokens, pad),
        position_ids=extended(inputs.position_ids, np.arange(num_padding)),
        plan=inputs.plan.with_document(num_padding),
        labels=extended(inputs.labels, pad),
        weights=extended(inputs.weights, 0),
        fields={name: extended(values, 0) for name, values in inputs.fields.items()},
    )


def grids_seen(images: Sequence[np.ndarray]) -> dict[str, list[int]]:
    """Smallest and largest heights and widths, in codes: what a checkpoint says that it was trained on."""
    heights, widths = zip(*(codes.shape for codes in images), strict=True)
    return {"heights": [min(heights), max(heights)], "widths": [min(widths), max(widths)]}
