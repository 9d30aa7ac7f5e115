"""Parallel image decoding (DiDA of Emu3.5, arXiv 2510.26583, 4.3): next tokens of documents, and noisy copies of images.

Each row is followed by copies of its images. A copy is the last token of the header, then the codes as a path's noise
makes them; ends of rows stay as they are, and positions are those of the image. It sees the document before the image and
all of itself, nothing sees it (`model.backbone.attention_plan`), so the clean stream is what it was without. The token
before a code predicts it, as in the clean stream: loss = mean cross entropy of the copies' codes + clean_weight * the
loss of the next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.backbone.attention_plan import ImageCopies, append_image_copies, documents_with_image_copies
from model.errors import UserError
from model.generation.calibration import calibrate_path, told
from model.generation.paths import NUM_UNIFORMS, DiscretePath, MaskPath, MetricPath, UniformPath, shifted, state_ids
from model.generation.sampling import uniform_numbers
from training.config import TrainConfig
from training.contracts.batches import Ranks
from training.contracts.inputs import LocalInput, LossSums, ModelInput, TokenScores
from training.contracts.results import StepResult
from training.objectives.dida_options import DidaOptions
from training.objectives.dida_rows import DidaBatch, RowsWithCopies, find_images
from training.objectives.next_token import NextToken
from training.objectives.offline_rows import OfflineRows

CALIBRATION_ROWS, WINDOW_CODES = (
    64,
    4,
)  # what calibration reads, and the neighbouring codes whose joint structure counts
NUMBERS_OF_AN_IMAGE = 3  # before those of its codes: time, whether it has a clean prefix, how long that is


class Dida(NextToken):
    """See the module; and `training.contracts.objective` for what each method promises."""

    Options = DidaOptions
    engine = "megatron"

    def __init__(self, config: TrainConfig, options: DidaOptions):
        super().__init__(config, options)
        self.dida_options = options
        self.path: DiscretePath | None = None
        self._dida: dict[str, Any] = {}  # what a checkpoint says of it

    @property
    def num_sums(self) -> int:
        return super().num_sums + 1

    def batches(self, ranks: Ranks) -> OfflineRows:
        stage = self.config.stage
        rows = self.packed_rows(ranks.data_parallel_rank, ranks.data_parallel_size)
        self.set_path(self._seen())
        return OfflineRows(
            RowsWithCopies(
                rows,
                self.vocabulary,
                self.config.seed,
                self.dida_options.room(stage.sequence_length),
                stride=stage.micro_batch_size * ranks.data_parallel_size,
                offset=stage.micro_batch_size * ranks.data_parallel_rank,
                copies_an_image=self.dida_options.copies_an_image,
            )
        )

    def _seen(self) -> list[np.ndarray]:
        """Codes [H, W] of the images in the first rows of the mixture, the same on every rank."""
        rows = self.packed_rows(0, 1, num_rows=CALIBRATION_ROWS)
        try:
            found = []
            for batch in rows.batch(rows.mixture.first_sample):
                images, tokens = find_images(batch, self.vocabulary), batch.tokens.reshape(-1)
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
                expected=f"images with loss in the first {CALIBRATION_ROWS} rows",
                fix="name datasets with images, or use the objective next_token",
            )
        return found

    def set_path(self, images: Sequence[np.ndarray]) -> None:
        """The path of the options; calibrated on codes [H, W] of images where they do not say."""
        options, num_codes = self.dida_options, self.vocabulary.visual_size
        table: list[dict[str, Any]] = []
        if options.path == "uniform":
            self.path = UniformPath(num_codes)
        elif options.path == "mask":
            self.path = MaskPath(num_codes)
        elif options.c is not None:
            self.path = MetricPath(self._codebook(), options.c, options.alpha)
        else:
            width = min(WINDOW_CODES, max(codes.shape[1] for codes in images))
            views = [
                np.lib.stride_tricks.sliding_window_view(codes, width, axis=1).reshape(-1, width)
                for codes in images
                if codes.shape[1] >= width
            ]
            chosen = torch.from_numpy(np.concatenate(views))
            self.path, candidates = calibrate_path(chosen, self._codebook(), options.decoding_steps)
            table = told(candidates)
        heights, widths = zip(*(codes.shape for codes in images), strict=True)
        self._dida = self.path.describe() | {
            "calibration": table,
            "heights": [min(heights), max(heights)],
            "widths": [min(widths), max(widths)],
            "clean_prefix_share": options.clean_prefix_share,
        }

    def _codebook(self) -> torch.Tensor:
        """float32 [codes, D] of the vision tokenizer that made the data."""
        from model.vision_tokenizer import load_vision_tokenizer

        recorded, folder = self._data.get("vision_tokenizer"), self.dida_options.vision_tokenizer
        if folder is None:
            if recorded is None:
                raise UserError(
                    "the data name no vision tokenizer; the metric path needs its codebook",
                    where="stage.objective.vision_tokenizer",
                    fix="stage.objective.vision_tokenizer=FOLDER, or stage.objective.path=uniform",
                )
            # A fingerprint alone, or a place that is gone, is that of a tokenizer at its usual place.
            place = recorded["path"] if isinstance(recorded, dict) else "vision_tokenizer"
            run_folder = Path(self.config.run_folder)
            folder = str(run_folder / (place if (run_folder / place).exists() else "vision_tokenizer"))
        tokenizer = load_vision_tokenizer(folder)
        expected = recorded["fingerprint"] if isinstance(recorded, dict) else recorded
        if expected not in (None, tokenizer.fingerprint):
            raise UserError(
                "the vision tokenizer is not the one that made the data",
                where=folder,
                expected=f"fingerprint {expected}",
                got=tokenizer.fingerprint,
                fix="stage.objective.vision_tokenizer=FOLDER of the right one",
            )
        return tokenizer.codebook()

    def inputs(self, batch: DidaBatch) -> ModelInput:  # type: ignore[override]
        """Documents, copies behind each, and one more document of padding up to the stage's room."""
        if batch.prepared is None:
            batch.prepared = self._with_copies(batch)
        return batch.prepared

    def _with_copies(self, batch: DidaBatch) -> ModelInput:
        clean, num_rows = super().inputs(batch.rows), len(batch.rows.tokens)
        room = self.dida_options.room(self.config.stage.sequence_length) * num_rows
        num_padding = room - int(batch.images.lengths.sum())
        bounds = np.asarray(batch.rows.cu_seqlens, dtype=np.int64)
        layout = append_image_copies(
            np.append(bounds, bounds[-1] + num_padding) if num_padding else bounds,
            batch.images.starts,
            batch.images.lengths,
        )
        sources = layout.source_tokens()

        def spread(values: np.ndarray, padding: int) -> np.ndarray:
            found: np.ndarray = np.concatenate((values, np.full(num_padding, padding, values.dtype)))[sources]
            return found

        tokens, labels = spread(clean.tokens, self.vocabulary.pad), spread(clean.labels, self.vocabulary.pad)
        weights = spread(clean.weights, 0)
        in_copy = layout.copy_numbers() > 0
        learnt = self._add_noise(batch, layout, tokens)
        weights[in_copy] = (learnt & self.vocabulary.is_visual(labels))[in_copy]
        return ModelInput(
            tokens=tokens,
            position_ids=np.where(sources < bounds[-1], spread(clean.position_ids, 0), sources - bounds[-1]),
            plan=documents_with_image_copies(layout),
            labels=labels,
            weights=weights,
            fields={name: spread(values, 0) for name, values in clean.fields.items()}
            | {"noisy": in_copy.astype(np.int64)},
        )

    def _add_noise(self, batch: DidaBatch, layout: ImageCopies, tokens: np.ndarray) -> np.ndarray:
        """Replaces the codes of the copies in `tokens`; bool [T], which tokens of copies predict something noisy."""
        assert self.path is not None, "the path is set when the batches are opened"
        learnt: np.ndarray = np.ones(tokens.size, dtype=bool)
        if not len(batch.numbers):
            return learnt
        options = self.dida_options
        places = [
            start + np.flatnonzero(self.vocabulary.is_visual(tokens[start : start + length]))
            for start, length in zip(layout.copy_starts, layout.copy_lengths, strict=True)
        ]
        sizes = np.array([len(some) for some in places])
        numbers = uniform_numbers(
            self.config.seed, batch.numbers, NUMBERS_OF_AN_IMAGE + NUM_UNIFORMS * int(sizes.max())
        )
        # The copies of one image have a time each from equal parts of the way.
        parts = (numbers[:, 0] + batch.numbers % options.copies_an_image) / options.copies_an_image
        times = shifted(torch.from_numpy(parts * options.latest_time), options.time_shift)
        of_codes = numbers[:, NUMBERS_OF_AN_IMAGE:].reshape(len(numbers), NUM_UNIFORMS, -1)
        uniforms = np.concatenate([of_codes[image, :, :size] for image, size in enumerate(sizes)], axis=1)
        at = np.concatenate(places)
        codes = torch.from_numpy(self.vocabulary.ids_to_codes(tokens[at]))[None]
        of_each_code = times.repeat_interleave(torch.from_numpy(sizes))[None]
        noisy = self.path.corrupt(codes, of_each_code, torch.from_numpy(uniforms)[:, None])[0].numpy()
        cuts = np.where(numbers[:, 1] < options.clean_prefix_share, numbers[:, 2] * sizes, 0).astype(np.int64)
        order = np.concatenate([np.arange(size) for size in sizes])
        is_noisy = order >= np.repeat(cuts, sizes)
        tokens[at[is_noisy]] = state_ids(noisy, self.path, self.vocabulary)[is_noisy]
        for start, some, cut in zip(layout.copy_starts, places, cuts, strict=True):
            learnt[start : some[cut] - 1 if cut else start] = False
        return learnt

    def totals(self, batches: Sequence[DidaBatch]) -> np.ndarray:  # type: ignore[override]
        """As of next-token stages, then: codes learnt in copies, images, copies."""
        of_rows = super().totals([batch.rows for batch in batches])
        inputs = [self.inputs(batch) for batch in batches]
        of_rows[1] = sum(one.tokens.size for one in inputs)
        num_learnt = sum(float(one.weights[one.fields["noisy"] > 0].sum()) for one in inputs)
        num_images, num_copies = (sum(b.num_images for b in batches), sum(len(b.numbers) for b in batches))
        return np.concatenate((of_rows, [num_learnt, num_images, num_copies]))

    def loss(self, scores: TokenScores, inputs: LocalInput, totals: torch.Tensor) -> LossSums:
        of_copies = torch.where(inputs.fields["noisy"] > 0, inputs.weights, 0.0)
        clean = LocalInput(inputs.labels, inputs.weights - of_copies, inputs.fields)
        scales = torch.where(totals > 0, 1.0 / totals, 0.0).to(inputs.weights.dtype)
        weights = of_copies * scales[-3] + clean.weights * scales[0] * self.dida_options.clean_weight
        loss, losses = self.weighted_losses(scores, inputs, weights)
        values = losses.detach().double()
        return LossSums(loss, torch.cat((self._sums(values, clean), torch.dot(values, of_copies.double())[None])))

    def result(self, totals: np.ndarray, sums: np.ndarray, gradient_norm: float) -> StepResult:
        clean = super().result(totals[:-3], sums[:-1], gradient_norm)
        num_learnt, num_images, num_copies = totals[-3:]
        of_copies = float(sums[-1] / num_learnt) if num_learnt else 0.0
        metrics = clean.metrics | {
            "loss_next_token": clean.loss,
            "loss_copies": of_copies if num_learnt else None,
            "images": int(num_images),
            "image_copies": int(num_copies),
        }
        loss = of_copies + self.dida_options.clean_weight * clean.loss
        has_labels = num_learnt > 0 or clean.has_labels
        return StepResult(loss, gradient_norm, clean.num_tokens, has_labels, metrics)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"dida": self._dida}
