"""What a training step reads: arrays of one micro-batch, derived from packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.storage.segments import Flag, Kind, token_classes
from model.vocabulary import TokenClass, Vocabulary


@dataclass
class MicroBatch:
    """Rows of one micro-batch. B rows of S tokens; arrays are C-contiguous numpy.

    `labels[b, t]` is `tokens[b, t + 1]`; where there is no next token in the same document (end of a row, next
    token starts another document, padding, `NO_LOSS` segments) `loss_weights` is 0.
    """

    tokens: np.ndarray  # int64 [B, S]
    labels: np.ndarray  # int64 [B, S]
    loss_weights: np.ndarray  # float32 [B, S]; the stage's weight of the label's class, 0 for no loss
    loss_classes: np.ndarray  # uint8 [B, S]; model.vocabulary.TokenClass of the label
    sources: np.ndarray  # uint16 [B, S]; index of the label's source dataset in the loader's `source_names`
    position_ids: np.ndarray  # int64 [B, S]; restart with each attention span
    cu_seqlens: np.ndarray  # int32 [spans + 1]; attention spans over the flattened B * S tokens, never across rows


def build_micro_batch(
    tokens: np.ndarray, segments: np.ndarray, class_weights: np.ndarray, document_attention: str, vocabulary: Vocabulary
) -> MicroBatch:
    """Derive everything a step reads from rows and their segments.

    tokens: int64 [B, S]. segments: `SEGMENT_DTYPE` of all rows, one row after the other, each tiling its row.
    class_weights: float32, by `TokenClass`. document_attention: "document" or "full" (see `MicroBatch`).
    """
    shape, flat = tokens.shape, tokens.ravel()
    lengths = segments["length"].astype(np.int64)
    assert int(lengths.sum()) == flat.size, "segments do not tile the rows"
    padding = segments["kind"] == Kind.PAD
    # A label has no loss when its segment has none, and when it is the first token of a document or of a row.
    silent = padding | ((segments["flags"] & Flag.NO_LOSS) != 0)
    begins_row = segments["start"] == 0
    begins_document = begins_row | padding | ((segments["flags"] & Flag.DOCUMENT_START) != 0)
    first_tokens = np.cumsum(lengths) - lengths
    classes = token_classes(flat, segments, vocabulary.visual_start)
    weights = class_weights[classes]
    weights[np.repeat(silent, lengths)] = 0.0
    weights[first_tokens[begins_document]] = 0.0
    # In "full" mode only padding is kept apart from the row's tokens.
    begins_span = begins_document if document_attention == "document" else begins_row | padding
    span_starts = first_tokens[begins_span]
    cu_seqlens = np.append(span_starts, flat.size)
    span_lengths = np.diff(cu_seqlens)
    positions = np.arange(flat.size) - np.repeat(span_starts, span_lengths)
    return MicroBatch(
        tokens=tokens,
        labels=_next(flat, shape, vocabulary.pad),
        loss_weights=_next(weights, shape, 0.0),
        loss_classes=_next(classes, shape, TokenClass.STRUCTURE),
        sources=_next(np.repeat(segments["source"], lengths), shape, 0),
        position_ids=positions.reshape(shape),
        cu_seqlens=cu_seqlens.astype(np.int32),
    )


def _next(values: np.ndarray, shape: tuple[int, ...], last: float) -> np.ndarray:
    """At each position the value of the next one in its row; `last` at the row's end. [B * S] -> [B, S]."""
    shifted = np.empty_like(values)
    shifted[:-1] = values[1:]
    shifted = shifted.reshape(shape)
    shifted[:, -1] = last
    return shifted
