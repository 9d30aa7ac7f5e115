"""Segments: the one record type that says what each span of tokens is.

A token file or a packed row carries no per-token masks; loss weights, classes, document boundaries, positions and
image grids are derived from its segments (32 bytes each, about 29 in a row of 32,768 tokens).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

import numpy as np

from model.vocabulary import TokenClass


class Kind(IntEnum):
    PAD = 0
    TEXT = 1
    IMAGE = 2  # a whole image block, BOI to EOI
    TRANSCRIPT = 3  # text spoken in a video
    STRUCTURE = 4  # BOS, EOS, BSS, ESS...


class Flag(IntFlag):
    DOCUMENT_START = 1  # first segment of a document (or of a piece of one: see CUT)
    SPLITTABLE = 2  # plain text that the packer may cut anywhere to fill a hole
    NO_LOSS = 4  # context only: a chat prompt
    CUT = 8  # the segment continues a document whose beginning is elsewhere
    # The four bits above are the number of the document's task, see `tasks_of`.


TASK_SHIFT = 4
MAX_TASKS = 16


SEGMENT_DTYPE = np.dtype(
    [
        ("row", "<u4"),  # row of a packed file, document index of a token file
        ("start", "<u4"),  # first token, counted from the beginning of the row or document
        ("length", "<u4"),  # tokens
        ("kind", "u1"),
        ("flags", "u1"),
        ("grid_height", "<u2"),  # image rows in tokens, 0 for anything else
        ("grid_width", "<u2"),
        ("source", "<u2"),  # index into the manifest's `sources`
        ("document", "<u8"),  # stable id: blake2b of (source, sample key, shard)
        ("time_ms", "<u4"),  # time of a video frame or of the transcript's first word
    ]
)

_FIELDS = "IIIBBHHHQI"  # the same in one call, as most documents have three segments
_RECORDS = [struct.Struct("<" + _FIELDS * count) for count in range(8)]  # of so many at once
assert _RECORDS[1].size == SEGMENT_DTYPE.itemsize

_CLASS_OF_KIND = np.zeros(len(Kind), np.uint8)
_CLASS_OF_KIND[[Kind.PAD, Kind.IMAGE, Kind.STRUCTURE]] = TokenClass.STRUCTURE
_CLASS_OF_KIND[[Kind.TEXT, Kind.TRANSCRIPT]] = TokenClass.TEXT


def segments_of(records: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`SEGMENT_DTYPE` [k], of plain numbers in its order."""
    if len(records) < len(_RECORDS):
        packed = _RECORDS[len(records)].pack(*itertools.chain.from_iterable(records))
    else:
        packed = b"".join([_RECORDS[1].pack(*record) for record in records])
    return np.frombuffer(bytearray(packed), SEGMENT_DTYPE)


def tasks_of(segments: np.ndarray) -> np.ndarray:
    """uint8 [k]: the number of each segment's task (`data_pipeline.documents.prompts.TASK_NAMES`); 0 where it has none."""
    found: np.ndarray = segments["flags"] >> np.uint8(TASK_SHIFT)
    return found


def tile_exactly(segments: np.ndarray, lengths: Sequence[int], counts: Sequence[int]) -> bool:
    """Of documents with so many tokens and segments each, the latter laid end to end in `segments`: do those of each one
    follow one another without gap or overlap, from its token 0 to its end?
    """
    if len(segments) != sum(counts):
        return False
    ends = np.cumsum(lengths, dtype=np.int64)
    segment_ends = np.cumsum(segments["length"], dtype=np.int64)
    starts = segments["start"] + np.repeat(ends - lengths, counts)
    firsts = (np.cumsum(counts) - counts)[np.asarray(counts) > 0]
    return bool(
        segment_ends[-1:].sum() == ends[-1:].sum()
        and (starts == segment_ends - segments["length"]).all()
        and not segments["start"][firsts].any()
    )


def token_classes(tokens: np.ndarray, segments: np.ndarray, visual_start: int) -> np.ndarray:
    """The `TokenClass` of every token, uint8 [n].

    `segments` cover `tokens` [n] in order (those of several rows for the rows' tokens laid end to end). In an image
    block the codes are visual and everything else, the "H*W" header included, is structure.
    """
    kinds = np.repeat(segments["kind"], segments["length"])
    classes = _CLASS_OF_KIND[kinds]
    classes[(kinds == Kind.IMAGE) & (tokens >= visual_start)] = TokenClass.VISUAL
    return classes


def count_classes(tokens: np.ndarray, segments: np.ndarray, visual_start: int) -> dict[str, int]:
    """Tokens of each class and padding: {"text", "visual", "structure", "padding"}."""
    lengths = segments["length"].astype(np.int64)
    by_kind = np.bincount(segments["kind"], lengths, len(Kind)).astype(np.int64)
    ends = np.cumsum(lengths)
    visual = 0  # tokens are looked at in pictures only
    for image in np.flatnonzero(segments["kind"] == Kind.IMAGE).tolist():
        visual += int(np.count_nonzero(tokens[ends[image] - lengths[image] : ends[image]] >= visual_start))
    counts = dict.fromkeys((kind.name.lower() for kind in TokenClass), 0)
    for kind, count in enumerate(by_kind.tolist()):
        counts[TokenClass(_CLASS_OF_KIND[kind]).name.lower()] += count
    padding = int(by_kind[Kind.PAD])
    counts["structure"] -= visual + padding
    return counts | {"visual": visual, "padding": padding}
