"""Documents that are there more than once: tokenize notes what each one is like, and pack leaves out all but the first.

Whether a document has a copy in another shard is not known while its own shard is read, so this filter has no score there. It has a
signature instead, which lies beside the token file and depends on the document alone.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.documents.builder import Text
from data_pipeline.documents.words import WORD
from data_pipeline.kinds.base import PreparedSample
from data_pipeline.storage.permutation import derive_key, keyed_hash
from data_pipeline.storage.signatures import NUM_HASHES, NUM_PRINTS, SIGNATURE_DTYPE
from model.errors import UserError

_VERSION = 1  # of signatures: others are not compared with them
_MOST_CHARACTERS = 1_000_000  # of a text whose words are looked at; exact copies are told by the whole text
_BLOCK = 1024  # shingles hashed at once: what they need stays in the processor's cache
_WORD_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHINGLE_KEY = derive_key("near_duplicates", "shingle")
# Hash i of a shingle x is the upper half of a_i x + b_i modulo 2**64, a_i odd (multiply-shift, Dietzfelbinger 1996).
_NUMBERS = np.arange(NUM_HASHES, dtype=np.uint64)[:, None]
_FACTORS = keyed_hash(_NUMBERS, derive_key("near_duplicates", "factor")) | np.uint64(1)
_SUMMANDS = keyed_hash(_NUMBERS, derive_key("near_duplicates", "summand"))


@dataclass
class NearDuplicates:
    """What two documents have in common: sequences of `ngram_words` words in both, of those in either (Jaccard), by MinHash.

    Words are compared in one case and without punctuation; every character of Chinese, Japanese and Thai is a word. With
    `pictures`, documents whose pictures differ have nothing in common, whatever their texts.
    """

    ngram_words: int = 5
    pictures: bool = True
    name = "near_duplicates"
    unit = "word sequences in both / in either"

    def __post_init__(self) -> None:
        if not isinstance(self.ngram_words, int) or self.ngram_words < 1:
            raise UserError(
                "a word sequence has at least one word", where="filters: near_duplicates", got=f"{self.ngram_words=}"
            )

    def describe(self) -> dict[str, Any]:
        """What signatures must share to be compared."""
        return {"version": _VERSION, "ngram_words": self.ngram_words, "pictures": self.pictures}

    def signature(self, sample: PreparedSample) -> np.ndarray:
        """`SIGNATURE_DTYPE` [1]; a function of the sample's texts and pictures alone."""
        found = np.zeros(1, SIGNATURE_DTYPE)
        text = "\n".join(sample.texts)
        shingles = shingles_of(text[:_MOST_CHARACTERS], self.ngram_words)
        found["exact"] = np.frombuffer(_digest(sample), "<u8")
        found["num_shingles"] = len(shingles)
        found["minhashes"] = minhashes(shingles)
        found["excerpt"] = text[:64].encode("utf-8", "replace")[:64]
        if self.pictures:
            pictures = sample.pictures
            found["num_pictures"] = min(len(pictures), 0xFFFF)
            for place, picture in enumerate(pictures[:: max(1, math.ceil(len(pictures) / NUM_PRINTS))]):
                found["prints"][0, place] = picture_print(picture.pixels)
        return found


def shingles_of(text: str, ngram_words: int) -> np.ndarray:
    """A hash, uint64, of every `ngram_words` words in a row; of all words where there are fewer; [0] without words."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    length = min(ngram_words, len(words))
    if not length:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    count = len(words) - length + 1
    mixed = np.zeros(count, np.uint64)
    for place in range(length):
        mixed = mixed * _WORD_FACTOR + hashes[place : place + count]
    return keyed_hash(mixed, _SHINGLE_KEY)


def minhashes(shingles: np.ndarray) -> np.ndarray:
    """The low 16 bits of the least of each hash of the shingles, uint64 [n]; uint16 [NUM_HASHES]."""
    least = np.full(NUM_HASHES, 0xFFFFFFFF, np.uint64)
    for first in range(0, len(shingles), _BLOCK):
        hashes = shingles[None, first : first + _BLOCK] * _FACTORS
        hashes += _SUMMANDS
        hashes >>= np.uint64(32)
        np.minimum(least, hashes.min(axis=1), out=least)
    return (least & np.uint64(0xFFFF)).astype(np.uint16)


def picture_print(pixels: np.ndarray) -> np.ndarray:
    """The difference hash of each colour of a picture uint8 [H, W, 3]: 192 bits, packed into uint8 [24]."""
    small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1])


def _digest(sample: PreparedSample) -> bytes:
    """Of kind, texts and pictures, each with its length, so that no two documents run into one another."""
    digest = hashlib.blake2b(sample.kind.encode(), digest_size=16)
    for part in sample.parts:
        if isinstance(part, Text):
            content = part.text.encode("utf-8", "surrogatepass")
            digest.update(b"text %d " % len(content))
            digest.update(content)
        else:
            digest.update(b"picture %d %d " % part.pixels.shape[:2])
            digest.update(np.ascontiguousarray(part.pixels).data)
    return digest.digest()
