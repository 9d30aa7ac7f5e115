"""Rows of the objective `dida`: packed rows and which of their images get a copy. A pure function of seed and sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.loading.batch import MicroBatch
from data_pipeline.loading.loader import PackedDataSource
from model.vocabulary import Vocabulary
from training.contracts.inputs import ModelInput

MAX_COPIES_A_ROW = 1 << 16  # copies of a row have numbers below this, a power of two


@dataclass(frozen=True)
class Images:
    """Image blocks in flattened rows, those that the next-token loss learns; C of them, ascending."""

    starts: np.ndarray  # int64 [C], the last token of the header (IMG), whose label is the first code
    lengths: np.ndarray  # int64 [C], up to the last code; ends of rows lie between
    heights: np.ndarray  # int64 [C], in codes
    widths: np.ndarray  # int64 [C]
    # int64 [C], `starts` of the last image before it of its document and grid, whether that has loss or not; -1: none
    references: np.ndarray

    def select(self, chosen: np.ndarray) -> Images:
        return Images(*(values[chosen] for values in vars(self).values()))


@dataclass(eq=False)
class DidaBatch:
    """A micro-batch of packed rows, and the images that get copies; `numbers` make the noise."""

    rows: MicroBatch
    images: Images  # of the copies: an image is named once for each of its copies
    # int64 [C], one for each copy of the whole data: sample * MAX_COPIES_A_ROW + place in its row * copies an image + copy
    numbers: np.ndarray
    num_images: int  # those without a copy included: copies have no room for all
    prepared: ModelInput | None = None  # made once, by the objective


def find_images(rows: MicroBatch, vocabulary: Vocabulary) -> Images:
    """The complete image blocks of one document each whose codes have loss."""
    tokens, weights = rows.tokens.reshape(-1), rows.loss_weights.reshape(-1)
    starts = np.flatnonzero(tokens == vocabulary.img)
    ends: np.ndarray = np.append(np.flatnonzero(tokens == vocabulary.eoi), tokens.size)
    stops = ends[np.searchsorted(ends, starts)]
    visual = vocabulary.is_visual(tokens)
    visual_before = np.concatenate(([0], np.cumsum(visual)))
    places: np.ndarray = np.append(np.flatnonzero(visual), -1)  # -1 at the end: of rows without codes
    last_codes = places[visual_before[stops] - 1]
    bounds = np.asarray(rows.cu_seqlens, dtype=np.int64)
    documents = np.searchsorted(bounds, starts, "right")
    whole = (stops < tokens.size) & (documents == np.searchsorted(bounds, stops, "right")) & (last_codes > starts)
    starts, last_codes, documents = starts[whole], last_codes[whole], documents[whole]
    row_ends: np.ndarray = np.append(
        np.flatnonzero((tokens == vocabulary.eol) | (tokens == vocabulary.eoi)), tokens.size
    )
    widths = row_ends[np.searchsorted(row_ends, starts)] - starts - 1
    num_codes = visual_before[last_codes + 1] - visual_before[starts]
    heights = num_codes // np.maximum(widths, 1)
    references = _before_of_its_kind(starts, np.stack((documents, heights, widths)))
    found = Images(starts, last_codes + 1 - starts, heights, widths, references)
    return found.select(np.flatnonzero(weights[starts] > 0))


def _before_of_its_kind(starts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """int64 [C], of each image the start of the one before with equal `kinds` [n, C], -1: there is none."""
    found: np.ndarray = np.full_like(starts, -1)
    order = np.lexsort((starts, *kinds))
    alike = (kinds[:, order[1:]] == kinds[:, order[:-1]]).all(0)
    found[order[1:][alike]] = starts[order[:-1][alike]]
    return found


class RowsWithCopies:
    """Implements `training.objectives.offline_rows.Rows` over packed rows.

    `room` tokens behind each row take the copies of its images, in an order drawn from (seed, sample); those that do not
    fit any more are left out this time. With `clean_tokens` above 0 so many tokens are room for what copies see of their
    documents, up to each one's last copied image.
    """

    def __init__(
        self,
        rows: PackedDataSource,
        vocabulary: Vocabulary,
        seed: int,
        room: int,
        stride: int,
        offset: int,
        copies_an_image: int = 1,
        clean_tokens: int = 0,
    ):
        """Micro-batch m of a global batch begins `m * stride + offset` samples after its first one."""
        self.rows, self.vocabulary, self.seed, self.room = rows, vocabulary, seed, room
        self.copies_an_image, self.clean_tokens = copies_an_image, clean_tokens
        self.stride, self.offset = stride, offset
        self.fingerprint = rows.fingerprint

    def batch(self, first_sample: int) -> list[DidaBatch]:
        return [
            self._with_copies(rows, first_sample + number * self.stride + self.offset)
            for number, rows in enumerate(self.rows.batch(first_sample))
        ]

    def close(self) -> None:
        self.rows.close()

    def _with_copies(self, rows: MicroBatch, first_sample: int) -> DidaBatch:
        found = find_images(rows, self.vocabulary)
        images = found.select(np.repeat(np.arange(len(found.starts)), self.copies_an_image))
        in_row = images.starts // rows.tokens.shape[1]
        first_of_row = np.searchsorted(in_row, in_row)  # of each copy, the first of its row
        numbers = (first_sample + in_row) * MAX_COPIES_A_ROW + np.arange(len(in_row)) - first_of_row
        bounds = np.asarray(rows.cu_seqlens, dtype=np.int64)
        documents = np.searchsorted(bounds, images.starts, "right") - 1
        kept = [
            image
            for row in range(len(rows.tokens))
            for image in self._fitting(np.flatnonzero(in_row == row), images, bounds, documents, first_sample + row)
        ]
        chosen = np.array(sorted(kept), dtype=np.int64)
        return DidaBatch(rows, images.select(chosen), numbers[chosen], len(found.starts))

    def _fitting(
        self, candidates: np.ndarray, images: Images, bounds: np.ndarray, documents: np.ndarray, sample: int
    ) -> list[int]:
        """Those of one row's copies that fit, the first ones in an order of their own."""
        chosen, free, free_clean = [], self.room, self.clean_tokens
        seen: dict[int, int] = {}  # tokens of documents, from their beginning, that have a place already
        for image in np.random.default_rng([self.seed, sample]).permutation(candidates).tolist():
            document, length = int(documents[image]), int(images.lengths[image])
            before = int(images.starts[image] - bounds[document])
            more = max(0, before - seen.get(document, 0)) if self.clean_tokens else 0
            if length <= free and more <= free_clean:
                chosen.append(image)
                seen[document] = seen.get(document, 0) + more
                free, free_clean = free - length, free_clean - more
        return chosen
