"""What a training step reads: arrays of one micro-batch, derived from packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    max_seqlen: int  # longest span
    num_real_tokens: int  # tokens that are not padding
