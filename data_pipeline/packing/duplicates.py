"""Documents that are alike, whatever shards they are in: which ones are left out, and which one stays in their place.

Two documents are compared when they agree in one band of their signatures; they are alike when they are exact copies, or when
their texts have more in common than allowed and their pictures look the same. Documents that are alike, directly or through
others, are one group. Of a group the document with the lowest id stays (of equal ids the first in the pool), so the choice depends
on the documents alone: not on the order of sources, files or tasks.

Memory: 8 bytes a document for every band that is looked at in one pass over the files, of which there are as many as fit in
`_BAND_BYTES`, and about 40 bytes a document besides. Signatures are read again for those that are compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.packing.pool import Pool
from data_pipeline.storage.permutation import derive_key, keyed_hash
from data_pipeline.storage.signatures import HASHES_PER_BAND, NUM_BANDS, NUM_HASHES, SETTINGS_KEY, SIGNATURE_DTYPE
from model.errors import UserError

NAME = "near_duplicates"  # of the filter
NEAREST = 12  # pairs on either side of the bound that the report shows
_MAX_BITS = 18  # of 192 in which prints of one picture may differ: as many as 6 of 64
_PRINT_BITS_PER_BAND = 13  # of the first picture: 14 bands look at 182 of its 192
_EXACT = NUM_BANDS  # number of the band that compares whole documents
_BAND_BYTES = 1 << 30
_PAIRS_AT_ONCE = 1 << 15  # compared at once: two signatures of 470 bytes each


@dataclass(frozen=True)
class Rule:
    """How far documents may be alike; `settings` as their token files have them, in `SETTINGS_KEY`."""

    max_similarity: float
    settings: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        return {"max_similarity": self.max_similarity} | self.settings


class Left(NamedTuple):
    """Why a document is left out."""

    reason: str  # removed | exact_duplicate | near_duplicate
    like: int | None  # id of the document that stays in its place


@dataclass
class Duplicates:
    """What a pool has more than once."""

    left_out: dict[int, Left] = field(default_factory=dict)  # by number in the pool
    num_compared: int = 0  # documents that have a signature
    record: dict[str, Any] | None = None  # in the form of `data_pipeline.filters.record.FilterRecord`


def rule_of(pool: Pool, max_similarity: float | None) -> Rule | None:
    """The rule of a pool: `max_similarity`, or where it is None what its token files say; None where nothing is to be left out.

    Raises `UserError` when their signatures cannot be compared, or when they do not agree on the bound.
    """
    said = [file.manifest[SETTINGS_KEY] for file in pool.files if SETTINGS_KEY in file.manifest]
    if max_similarity is None:
        bounds = sorted({one["maximum"] for one in said})
        if len(bounds) > 1:
            raise UserError(
                "the token files do not agree on how far documents may be alike",
                got=f"filter {NAME} with maximum {', '.join(map(str, bounds))}",
                fix=f"max_similarity={bounds[0]}",
            )
        max_similarity = bounds[0] if bounds else 1.0
    if max_similarity >= 1:
        return None
    settings = [{key: value for key, value in one.items() if key != "maximum"} for one in said]
    if not settings:
        raise UserError(
            "no token file has signatures to compare",
            where=f"max_similarity={max_similarity}",
            fix=f"tokenize with the filter {{name: {NAME}, maximum: {max_similarity}}}",
        )
    if any(one != settings[0] for one in settings):
        raise UserError(
            "the signatures of the token files cannot be compared",
            got="; ".join(sorted({str(one) for one in settings})),
            fix=f"tokenize all sources with the same options of the filter {NAME}, or max_similarity=1 to leave out nothing",
        )
    return Rule(max_similarity, settings[0])


def find_duplicates(pool: Pool, ids: np.ndarray, removed: np.ndarray, rule: Rule) -> Duplicates:
    """ids: of all documents, uint64 [N]. removed: those that are left out anyway, and stand for nobody; bool [N]."""
    return _Search(pool, ids, removed, rule).run()


class _Search:
    """Documents are numbered by their ids here (`ranks`): the lowest number of a group stays."""

    def __init__(self, pool: Pool, ids: np.ndarray, removed: np.ndarray, rule: Rule):
        self.pool, self.rule, self.ids = pool, rule, ids
        lengths, _ = pool.load_index()
        self.by_rank = np.argsort(ids, kind="stable")  # number in the pool of each rank
        self.ranks = np.empty(len(ids), np.int64)
        self.ranks[self.by_rank] = np.arange(len(ids))
        self.taking_part = ~removed & (lengths > 0)  # by number in the pool
        self.parents = array("q", range(len(ids)))
        self.num_compared = 0
        self.exact: set[int] = set()  # ranks that are an exact copy of a lower one
        self.nearest: tuple[dict[tuple[int, int], float], ...] = (
            {},
            {},
        )  # similarities of pairs that stay, that do not

    def run(self) -> Duplicates:
        bands = [_EXACT, *range(NUM_BANDS)]  # exact copies first: what is one group already is not compared again
        at_once = max(1, _BAND_BYTES // (8 * max(1, len(self.ids))))
        for first in range(0, len(bands), at_once):
            part = bands[first : first + at_once]
            for keys, ranks in self.keys_of(part):
                for lower, higher in _candidates(keys, ranks):
                    self.join(lower, higher)
        left: dict[int, Left] = {}
        for rank in range(len(self.ids)):
            first_rank = self.find(rank)
            if first_rank != rank:
                reason = "exact_duplicate" if rank in self.exact else "near_duplicate"
                left[int(self.by_rank[rank])] = Left(reason, int(self.ids[self.by_rank[first_rank]]))
        return Duplicates(left, self.num_compared, self.record(len(left)))

    def keys_of(self, bands: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each band the key and the rank of every document that has one, by rank."""
        keys = np.zeros((len(bands), len(self.ids)), np.uint64)
        has_key = np.zeros((2, len(self.ids)), bool)  # in the bands of hashes, in the exact one
        number = self.num_compared = 0
        for file in self.pool.files:
            here = slice(number, number + len(file))
            number += len(file)
            signatures = file.all_signatures()
            if signatures is None:
                continue
            ranks, part = self.ranks[here], self.taking_part[here]
            self.num_compared += int(part.sum())
            has_key[0, ranks] = part & (signatures["num_shingles"] > 0)
            has_key[1, ranks] = part
            for row, band in zip(keys, bands, strict=True):
                row[ranks] = band_keys(signatures, band)
        for row, band in zip(keys, bands, strict=True):
            ranks = np.flatnonzero(has_key[int(band == _EXACT)])
            yield row[ranks], ranks

    def join(self, lower: np.ndarray, higher: np.ndarray) -> None:
        """Compare pairs of ranks that are not in one group yet, and join those that are alike."""
        apart = [place for place in range(len(lower)) if self.find(int(lower[place])) != self.find(int(higher[place]))]
        pairs = np.stack([lower[apart], higher[apart]])
        signatures = self.signatures(np.unique(pairs))
        similar = similarities(signatures(pairs[0]), signatures(pairs[1]))
        for one, other, exact, similarity in zip(*pairs.tolist(), *(found.tolist() for found in similar), strict=True):
            alike = similarity > self.rule.max_similarity
            if exact:
                self.exact.add(other)
            else:
                self.nearest[alike][one, other] = similarity
            if alike:
                roots = self.find(one), self.find(other)
                self.parents[max(roots)] = min(roots)
        self.forget_far_ones()

    def find(self, rank: int) -> int:
        parents = self.parents
        while parents[rank] != rank:
            parents[rank] = rank = parents[parents[rank]]
        return rank

    def signatures(self, ranks: np.ndarray) -> Any:
        """Reads the signatures of some ranks, ascending; returns what gives those of any of them."""
        numbers = self.by_rank[ranks]
        found = np.zeros(len(ranks), SIGNATURE_DTYPE)
        order = np.argsort(numbers)
        for place in order.tolist():
            file, index = self.pool.locate(int(numbers[place]))
            found[place] = self.pool.files[file].signature(index)
        return lambda wanted: found[np.searchsorted(ranks, wanted)]

    def forget_far_ones(self) -> None:
        for pairs, sign in zip(self.nearest, (-1, 1), strict=True):
            for pair in sorted(pairs, key=lambda pair: (sign * pairs[pair], pair))[NEAREST:]:
                del pairs[pair]

    def record(self, num_refused: int) -> dict[str, Any]:
        """The pairs nearest to the bound; `similarity` of a pair is an estimate from 112 hashes."""
        kept, refused = (
            [self.shown(pair, pairs[pair]) for pair in sorted(pairs, key=lambda pair: (sign * pairs[pair], pair))]
            for pairs, sign in zip(self.nearest, (-1, 1), strict=True)
        )
        return {
            "filter": NAME,
            "unit": "word sequences in both / in either",
            "minimum": None,
            "maximum": self.rule.max_similarity,
            "asked": self.num_compared,
            "refused": num_refused,
            "nearest_kept": kept,
            "nearest_refused": refused,
        }

    def shown(self, pair: tuple[int, int], similarity: float) -> dict[str, Any]:
        ids = [int(self.ids[self.by_rank[rank]]) for rank in pair]
        read = self.signatures(np.array(sorted(pair)))
        texts = [bytes(read(np.array([rank]))["excerpt"][0]).decode("utf-8", "ignore") for rank in pair]
        return {"key": f"{ids[1]} like {ids[0]}", "score": similarity, "text": " | ".join(texts), "thumbnail": None}


def band_keys(signatures: np.ndarray, band: int) -> np.ndarray:
    """uint64 [n]: equal where documents are to be compared. A band's hashes, how many pictures, and some bits of the first."""
    if band == _EXACT:
        exact: np.ndarray = signatures["exact"][:, 0]
        return exact
    hashes = signatures["minhashes"][:, band * HASHES_PER_BAND : (band + 1) * HASHES_PER_BAND]
    halves = np.ascontiguousarray(hashes).view("<u8")  # four hashes of 16 bits in each of two
    first_bit = band * _PRINT_BITS_PER_BAND
    bits = np.unpackbits(signatures["prints"][:, 0], axis=1)[:, first_bit : first_bit + _PRINT_BITS_PER_BAND]
    pictures = signatures["num_pictures"].astype(np.uint64) << np.uint64(_PRINT_BITS_PER_BAND)
    pictures |= bits @ (np.uint64(1) << np.arange(_PRINT_BITS_PER_BAND, dtype=np.uint64))
    key = derive_key(NAME, "band", band)
    return keyed_hash(keyed_hash(keyed_hash(halves[:, 0], key) ^ halves[:, 1], key) ^ pictures, key)


def similarities(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs of signatures [n]: whether they are exact copies (bool), and what they have in common (float64, 0 to 1)."""
    exact = (one["exact"] == other["exact"]).all(axis=1)
    shared = (one["minhashes"] == other["minhashes"]).sum(axis=1) / NUM_HASHES
    bits = np.unpackbits(one["prints"] ^ other["prints"], axis=2).sum(axis=2)  # [n, pictures]
    same_pictures = (one["num_pictures"] == other["num_pictures"]) & (bits <= _MAX_BITS).all(axis=1)
    has_text = (one["num_shingles"] > 0) & (other["num_shingles"] > 0)
    return exact, np.where(exact, 1.0, np.where(same_pictures & has_text, shared, 0.0))


def _candidates(keys: np.ndarray, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of ranks with equal keys, lower and higher: each with the lowest of its key and with the one before it."""
    order = np.argsort(keys, kind="stable")  # ranks ascend, and stay so among equal keys
    keys, ranks = keys[order], ranks[order]
    place = np.arange(len(keys))
    is_first = np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]])
    first = np.maximum.accumulate(np.where(is_first, place, 0))
    for before in (first, np.maximum(place - 1, first)):
        # What comes right behind the first has it as the one before: once is enough.
        wanted = np.flatnonzero(~is_first & ((before is first) | (before != first)))
        for start in range(0, len(wanted), _PAIRS_AT_ONCE):
            chosen = wanted[start : start + _PAIRS_AT_ONCE]
            yield ranks[before[chosen]], ranks[chosen]
