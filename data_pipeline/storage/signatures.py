"""Signatures (`NNNNNN.signatures.npy`): what each document of a token file is like, one record a document in their order.

Two signatures say whether two documents are the same, and how much their texts have in common, without the texts.
The filter `near_duplicates` writes them (`data_pipeline.filters.near_duplicates`), `pack` compares them
(`data_pipeline.packing.duplicates`).
"""

from __future__ import annotations

import numpy as np

SUFFIX = ".signatures.npy"
SETTINGS_KEY = "near_duplicates"  # of a token file's manifest: how its signatures were made

# 14 bands of 8 hashes: as FineWeb (Penedo et al. 2024, arXiv 2406.17557). Two documents are compared when all hashes of some band
# are equal, which at a similarity s comes to 1 - (1 - s**8)**14 of the pairs: 92% at .8, 99.9% at .9, 5% at .5.
NUM_BANDS, HASHES_PER_BAND = 14, 8
NUM_HASHES = NUM_BANDS * HASHES_PER_BAND
NUM_PRINTS, PRINT_BYTES = 4, 24  # pictures of a document that are compared, and the bytes of a print

SIGNATURE_DTYPE = np.dtype(
    [
        ("exact", "<u8", (2,)),  # blake2b of texts and pictures
        ("num_shingles", "<u4"),  # word n-grams of the text; 0: no text, nothing but an exact copy is like it
        ("num_pictures", "<u2"),  # at most 65,535; 0 where pictures are not compared
        ("prints", "u1", (NUM_PRINTS, PRINT_BYTES)),  # of pictures spread evenly, the first one first
        # The low 16 bits of each minimum (b-bit minwise hashing, Li and König 2010): equal by chance once in 65,536.
        ("minhashes", "<u2", (NUM_HASHES,)),
        ("excerpt", "S64"),  # how the text begins, UTF-8, for reports
    ]
)
