"""Parallel image decoding (DiDA of Emu3.5, arXiv 2510.26583, 4.3): next tokens of documents, and noisy copies of images.

Each row is followed by copies of its images. A copy is the last token of the header, then the codes as a path's noise
makes them (from noise, or with `start=reference` from the image before); ends of rows stay as they are, and positions are
those of the image. It sees the document before the image and all of itself, nothing sees it
(`model.backbone.attention_plan`), so the clean stream is what it was without. The token before a code predicts it, as in
the clean stream: loss = mean cross entropy of the copies' codes + clean_weight * the loss of the next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.backbone.attention_plan import ImageCopies
from model.errors import UserError
from model.generation.calibration import calibrate_path, told
from model.generation.paths import (
    NUM_UNIFORMS,
    DiscretePath,
    FromReferencePath,
    MaskPath,
    MetricPath,
    UniformPath,
    behind,
    shifted,
    state_ids,
)
from model.generation.sampling import uniform_numbers
from training.config import TrainConfig
from training.objectives.dida_options import DidaOptions
from training.objectives.dida_rows import DidaBatch
from training.objectives.image_copies import ROWS_LOOKED_AT, ImageCopiesObjective, grids_seen

WINDOW_CODES = 4  # neighbouring codes whose joint structure counts in calibration
NUMBERS_OF_AN_IMAGE = 3  # before those of its codes: time, whether it has a clean prefix, how long that is


class Dida(ImageCopiesObjective):
    """See the module; and `training.contracts.objective` for what each method promises."""

    Options = DidaOptions

    def __init__(self, config: TrainConfig, options: DidaOptions):
        super().__init__(config, options)
        self.dida_options = options
        self.copies_an_image = options.copies_an_image
        self.path: DiscretePath | None = None
        self._dida: dict[str, Any] = {}  # what a checkpoint says of it

    def look_at(self, images: Sequence[np.ndarray], num_references: int) -> None:
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
        if options.start == "reference":
            self.path = FromReferencePath(self.path)
            if not num_references:
                raise UserError(
                    "no image has another one of its size before it in its document",
                    where="stage.objective.start=reference",
                    expected=f"edits, films or other pairs of images in the first {ROWS_LOOKED_AT} rows",
                    fix="stage.objective.start=noise, or name datasets that have them",
                )
        self._dida = (
            self.path.describe()
            | {"calibration": table, "clean_prefix_share": options.clean_prefix_share}
            | grids_seen(images)
        )

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

    def change_copies(self, batch: DidaBatch, layout: ImageCopies, tokens: np.ndarray) -> np.ndarray:
        """Noise in place of the codes; learnt is what predicts something noisy."""
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
        path = behind(self.path, torch.from_numpy(self._references(batch, layout, at, sizes))[None])
        noisy = path.corrupt(codes, of_each_code, torch.from_numpy(uniforms)[:, None])[0].numpy()
        cuts = np.where(numbers[:, 1] < options.clean_prefix_share, numbers[:, 2] * sizes, 0).astype(np.int64)
        order = np.concatenate([np.arange(size) for size in sizes])
        is_noisy = order >= np.repeat(cuts, sizes)
        tokens[at[is_noisy]] = state_ids(noisy, self.path, self.vocabulary)[is_noisy]
        for start, some, cut in zip(layout.copy_starts, places, cuts, strict=True):
            learnt[start : some[cut] - 1 if cut else start] = False
        return learnt

    def _references(self, batch: DidaBatch, layout: ImageCopies, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """int64 [codes of copies], for those at `at` the code at their place of the image's reference, -1: none."""
        within = at - np.repeat(layout.copy_starts, sizes)
        references = np.repeat(batch.images.references, sizes)
        found = self.vocabulary.ids_to_codes(batch.rows.tokens.reshape(-1)[references + within])
        return np.where(references >= 0, found, -1)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"dida": self._dida}
