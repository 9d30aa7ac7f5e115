"""Documents laid end to end, many at a time: what is done to a whole batch costs each of them little."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.documents.builder import Document
from data_pipeline.storage.segments import SEGMENT_DTYPE

TOKENS_AT_ONCE, DOCUMENTS_AT_ONCE = 1 << 17, 256  # at least the one or the other


class Batch(NamedTuple):
    tokens: np.ndarray  # int32 [n], of all documents
    segments: np.ndarray  # SEGMENT_DTYPE [k], of all documents; each counts from its own first token
    lengths: list[int]  # tokens of each document
    segment_counts: list[int]  # segments of each


def batches(documents: Iterable[Document]) -> Iterator[Batch]:
    waiting: list[Document] = []
    num_tokens = 0
    for document in documents:
        waiting.append(document)
        num_tokens += len(document.tokens)
        if num_tokens >= TOKENS_AT_ONCE or len(waiting) >= DOCUMENTS_AT_ONCE:
            yield laid_end_to_end(waiting)
            waiting, num_tokens = [], 0
    if waiting:
        yield laid_end_to_end(waiting)


def laid_end_to_end(documents: list[Document]) -> Batch:
    # Segments are joined as bytes: numpy would compare the record types of each pair.
    segments = np.frombuffer(b"".join([document.segments.tobytes() for document in documents]), SEGMENT_DTYPE)
    return Batch(
        np.concatenate([document.tokens for document in documents]),
        segments,
        [len(document.tokens) for document in documents],
        [len(document.segments) for document in documents],
    )
