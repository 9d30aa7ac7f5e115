"""What may attend to what, as data: ranges of query tokens, each with the ranges of key tokens that it sees.

A plan says nothing about kernels or ranks. `packed_attention` computes it, `context_parallel` cuts it. Everything here
is numpy on the host, and no loop runs over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Pieces of attention over one flattened row of `num_tokens` tokens.

    A piece is a range of query tokens and one or more ranges of key tokens, laid one behind the other as its keys.
    Ranges are (first token, first token behind it). No token is a query of two pieces. In a causal piece the last
    query sees all keys and each query before it one key less; in a full piece every query sees all keys. The plan of
    a context-parallel rank has queries for the tokens of that rank only; its keys are still those of the whole row.
    """

    num_tokens: int
    queries: np.ndarray  # int64 [P, 2]
    keys: np.ndarray  # int64 [R, 2], R >= P, by piece
    key_pieces: np.ndarray  # int64 [R], the piece of each key range, ascending
    causal: np.ndarray  # bool [P]

    def __post_init__(self) -> None:
        assert (self.query_lengths > 0).all(), "a piece has no queries"
        assert (self.keys[:, 1] > self.keys[:, 0]).all(), "a key range is empty"
        assert (self.key_lengths > 0).all(), "a piece has no keys"
        assert (self.key_lengths >= self.query_lengths)[self.causal].all(), "a causal piece has queries without keys"

    @property
    def num_pieces(self) -> int:
        return len(self.queries)

    @property
    def query_lengths(self) -> np.ndarray:
        """int64 [P], query tokens of each piece."""
        result: np.ndarray = self.queries[:, 1] - self.queries[:, 0]
        return result

    @property
    def key_lengths(self) -> np.ndarray:
        """int64 [P], key tokens of each piece, over all its ranges."""
        return _sums(self.keys[:, 1] - self.keys[:, 0], self.key_pieces, self.num_pieces)

    def key_tokens(self) -> np.ndarray:
        """int64 [sum of key_lengths], the key tokens of all pieces one behind the other."""
        return range_tokens(self.keys[:, 0], self.keys[:, 1] - self.keys[:, 0])

    def only(self, kept: np.ndarray) -> AttentionPlan:
        """The plan of a row that has the `kept` tokens alone (bool [num_tokens]).

        What is left out of a causal piece must be the same number of its queries and of its keys, counted from the end.
        """
        places = np.concatenate(([0], np.cumsum(kept)))
        return _without_empty(int(places[-1]), places[self.queries], places[self.keys], self.key_pieces, self.causal)

    def with_document(self, num_tokens: int) -> AttentionPlan:
        """The plan of a row with one more causal document at its end."""
        document = packed_documents(np.array([0, num_tokens]))
        offset = self.num_tokens
        behind = replace(
            document, num_tokens=offset + num_tokens, queries=document.queries + offset, keys=document.keys + offset
        )
        return join_plans([replace(self, num_tokens=behind.num_tokens), behind])

    def of_queries(self, start: int, stop: int) -> AttentionPlan:
        """The plan of those queries that lie in [start, stop). Causal pieces lose the keys that only later ones see."""
        queries = np.clip(self.queries, start, stop)
        unseen = np.where(self.causal, self.queries[:, 1] - queries[:, 1], 0)
        lengths = self.keys[:, 1] - self.keys[:, 0]
        piece_starts = starts_of(self.key_lengths)[self.key_pieces]
        before = starts_of(lengths) - piece_starts  # of the piece's keys, ahead of each range
        seen = np.clip((self.key_lengths - unseen)[self.key_pieces] - before, 0, lengths)
        keys = np.stack((self.keys[:, 0], self.keys[:, 0] + seen), axis=1)
        return _without_empty(self.num_tokens, queries, keys, self.key_pieces, self.causal)

    def dense_mask(self) -> np.ndarray:
        """bool [T, T], true where a query (row) sees a key (column). For tests and rows of a few thousand tokens."""
        mask = np.zeros((self.num_tokens, self.num_tokens), dtype=bool)
        pieces = np.split(self.key_tokens(), np.cumsum(self.key_lengths)[:-1])
        for (start, stop), keys, causal in zip(self.queries, pieces, self.causal, strict=True):
            seen = np.ones((stop - start, len(keys)), dtype=bool)
            mask[start:stop, keys] = np.tril(seen, len(keys) - (stop - start)) if causal else seen
        return mask


def packed_documents(cu_seqlens: np.ndarray) -> AttentionPlan:
    """Causal attention within each document, nothing between documents.

    `cu_seqlens`: int [documents + 1], bounds of the documents in the flattened row. Where whole rows may attend,
    the bounds are those of the rows.
    """
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    documents = np.stack((bounds[:-1], bounds[1:]), axis=1)
    pieces = np.arange(len(documents))
    return _without_empty(int(bounds[-1]), documents, documents, pieces, np.ones(len(documents), dtype=bool))


@dataclass(frozen=True, eq=False)
class ImageCopies:
    """Where documents lie in a row once copies of their images stand behind them: document, its copies, and so on.

    Starts count the tokens of the row with copies.
    """

    document_starts: np.ndarray  # int64 [D]
    document_lengths: np.ndarray  # int64 [D], without copies
    image_starts: np.ndarray  # int64 [C], the token of the document that each copy begins with
    copy_starts: np.ndarray  # int64 [C]
    copy_lengths: np.ndarray  # int64 [C]
    documents: np.ndarray  # int64 [C], the document of each copy

    @property
    def num_tokens(self) -> int:
        return int(self.document_lengths.sum() + self.copy_lengths.sum())

    def source_tokens(self) -> np.ndarray:
        """int64 [T], which token of the row without copies each token stands for.

        Ids and positions of the row with copies are those of the row without, taken at these places.
        """
        sources = np.empty(self.num_tokens, dtype=np.int64)
        sources[range_tokens(self.document_starts, self.document_lengths)] = np.arange(self.document_lengths.sum())
        shifts = self.document_starts - starts_of(self.document_lengths)
        copied = range_tokens(self.image_starts - shifts[self.documents], self.copy_lengths)
        sources[range_tokens(self.copy_starts, self.copy_lengths)] = copied
        return sources

    def seen_tokens(self) -> np.ndarray:
        """bool [T], true for tokens of copies and for those of documents that some copy sees."""
        seen = np.zeros(self.num_tokens, dtype=bool)
        lengths = np.zeros(len(self.document_starts), dtype=np.int64)
        np.maximum.at(lengths, self.documents, self.image_starts - self.document_starts[self.documents])
        seen[range_tokens(self.document_starts, lengths)] = True
        seen[range_tokens(self.copy_starts, self.copy_lengths)] = True
        return seen

    def copy_numbers(self) -> np.ndarray:
        """int64 [T], the copy that each token belongs to, counted from 1; 0 for tokens of documents."""
        numbers = np.zeros(self.num_tokens, dtype=np.int64)
        copies = np.arange(1, len(self.copy_starts) + 1)
        numbers[range_tokens(self.copy_starts, self.copy_lengths)] = np.repeat(copies, self.copy_lengths)
        return numbers


def append_image_copies(cu_seqlens: np.ndarray, image_starts: np.ndarray, copy_lengths: np.ndarray) -> ImageCopies:
    """Where everything lies when each document of a packed row gets copies of its images appended.

    `cu_seqlens` int [D + 1] bounds the documents of the row without copies. `image_starts` int [C], never descending,
    and `copy_lengths` int [C] say which tokens of that row are copied; every image lies in one document. An image that
    is named several times has as many copies.
    """
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    starts, lengths = np.asarray(image_starts, dtype=np.int64), np.asarray(copy_lengths, dtype=np.int64)
    documents = np.searchsorted(bounds, starts, side="right") - 1
    assert (np.diff(starts) >= 0).all(), "image starts must not descend"
    assert (starts >= 0).all(), "an image begins before the row"
    assert (lengths > 0).all(), "an image has no tokens"
    assert (starts + lengths <= bounds[np.minimum(documents + 1, len(bounds) - 1)]).all(), (
        "an image leaves its document"
    )
    document_starts = bounds[:-1] + starts_of(_sums(lengths, documents, len(bounds) - 1))
    return ImageCopies(
        document_starts=document_starts,
        document_lengths=np.diff(bounds),
        image_starts=starts + (document_starts - bounds[:-1])[documents],
        copy_starts=bounds[1:][documents] + starts_of(lengths),
        copy_lengths=lengths,
        documents=documents,
    )


def documents_with_image_copies(layout: ImageCopies, steps: Sequence[np.ndarray] | None = None) -> AttentionPlan:
    """Causal documents, and copies of images that no document and no other copy sees (parallel decoding of images).

    Every token of a copy sees, of its document, the tokens before the image; and of the copy all tokens, or with `steps`
    (of each copy the number of tokens in each of its steps, int64) those of its own step and of the steps before.
    """
    document_ranges = np.stack((layout.document_starts, layout.document_starts + layout.document_lengths), axis=1)
    lengths = layout.copy_lengths if steps is None else np.concatenate([*steps, np.empty(0, np.int64)])
    copies = np.arange(len(layout.copy_starts))
    if steps is not None:
        copies = np.repeat(copies, [len(some) for some in steps])
        assert np.array_equal(_sums(lengths, copies, len(steps)), layout.copy_lengths), "the steps are not the copy"
    ends = np.cumsum(lengths) + (layout.copy_starts - starts_of(layout.copy_lengths))[copies]
    step_ranges = np.stack((ends - lengths, ends), axis=1)
    prefixes = np.stack((layout.document_starts[layout.documents], layout.image_starts), axis=1)[copies]
    seen_of_copies = np.stack((layout.copy_starts[copies], ends), axis=1)
    num_documents, num_steps = len(document_ranges), len(step_ranges)
    return _without_empty(
        layout.num_tokens,
        np.concatenate((document_ranges, step_ranges)),
        np.concatenate((document_ranges, np.stack((prefixes, seen_of_copies), axis=1).reshape(-1, 2))),
        np.concatenate((np.arange(num_documents), num_documents + np.repeat(np.arange(num_steps), 2))),
        np.arange(num_documents + num_steps) < num_documents,
    )


def join_plans(plans: Sequence[AttentionPlan]) -> AttentionPlan:
    """The pieces of several plans of one row, in their order."""
    offsets = starts_of(np.array([plan.num_pieces for plan in plans]))
    return AttentionPlan(
        num_tokens=plans[0].num_tokens,
        queries=np.concatenate([plan.queries for plan in plans]),
        keys=np.concatenate([plan.keys for plan in plans]),
        key_pieces=np.concatenate([plan.key_pieces + offset for plan, offset in zip(plans, offsets, strict=True)]),
        causal=np.concatenate([plan.causal for plan in plans]),
    )


def range_tokens(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [sum of lengths], the tokens of ranges one behind the other."""
    return np.repeat(starts - starts_of(lengths), lengths) + np.arange(lengths.sum())


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where ranges of these lengths begin when they lie one behind the other."""
    result: np.ndarray = np.cumsum(lengths) - lengths
    return result


def _sums(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """int64 [num_groups], sums of integer values by group."""
    sums = np.zeros(num_groups, dtype=np.int64)
    np.add.at(sums, groups, values)
    return sums


def _without_empty(
    num_tokens: int, queries: np.ndarray, keys: np.ndarray, key_pieces: np.ndarray, causal: np.ndarray
) -> AttentionPlan:
    """A plan of these ranges, those left out that hold no token."""
    kept = queries[:, 1] > queries[:, 0]
    kept_keys = (keys[:, 1] > keys[:, 0]) & kept[key_pieces]
    numbers = np.cumsum(kept) - 1
    return AttentionPlan(num_tokens, queries[kept], keys[kept_keys], numbers[key_pieces[kept_keys]], causal[kept])
