"""Segments: the one record type that says what each span of tokens is.

A token file or a packed row carries no per-token masks; loss weights, classes, document boundaries, positions and
image grids are derived from its segments (32 bytes each, about 29 in a row of 32,768 tokens).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np


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
        ("document", "<u8"),  # stable id: blake2b of (source, sample key)
        ("time_ms", "<u4"),  # time of a video frame or of the transcript's first word
    ]
)
