"""Plans of attention against the rule itself, token by token."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from attention_rows import Document, Run, allowed, layout_of, padded, rows_of_documents, tokens_by_hand
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.backbone.attention_plan import (
    AttentionPlan,
    append_image_copies,
    documents_with_image_copies,
    packed_documents,
)
from model.backbone.context_parallel import gathered_order, held_tokens, slice_plan

TEXT, IMAGE = Run(4, False), Run(7, True)


@given(rows_of_documents)
@settings(max_examples=60, deadline=None)
@example([(IMAGE,)])  # nothing before the image
@example([(TEXT, IMAGE, IMAGE, TEXT), (TEXT,), (IMAGE, IMAGE)])
def test_copies_see_their_prefix_and_themselves(documents: list[Document]) -> None:
    plan = documents_with_image_copies(layout_of(documents))
    assert np.array_equal(plan.dense_mask(), allowed(documents))


@given(rows_of_documents, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
@example([(IMAGE, TEXT)], Random(0))
def test_copies_in_steps_see_no_later_step(documents: list[Document], random: Random) -> None:
    layout = layout_of(documents)
    of_token = np.zeros(layout.num_tokens, np.int64)
    steps = []
    for start, length in zip(layout.copy_starts, layout.copy_lengths, strict=True):
        own = np.sort([random.randrange(4) for _ in range(length)])
        of_token[start : start + length] = own
        steps.append(np.unique(own, return_counts=True)[1])
    in_copy = layout.copy_numbers() > 0
    is_later = in_copy[:, None] & in_copy & (of_token > of_token[:, None])
    assert np.array_equal(documents_with_image_copies(layout, steps).dense_mask(), allowed(documents) & ~is_later)


@given(rows_of_documents)
@settings(max_examples=60, deadline=None)
def test_copies_stand_for_the_tokens_of_their_image(documents: list[Document]) -> None:
    layout = layout_of(documents)
    tokens, _ = tokens_by_hand(documents)
    lengths = [sum(run.length for run in document) for document in documents]
    first = np.cumsum([0, *lengths])
    assert layout.source_tokens().tolist() == [first[document] + position for document, _, position in tokens]
    assert layout.copy_numbers().tolist() == [copy for _, copy, _ in tokens]


@given(rows_of_documents)
@settings(max_examples=60, deadline=None)
@example([(IMAGE, TEXT), (TEXT,)])
def test_without_what_no_copy_sees_copies_see_the_same(documents: list[Document]) -> None:
    layout = layout_of(documents)
    mask, seen, in_copy = allowed(documents), layout.seen_tokens(), layout.copy_numbers() > 0
    assert np.array_equal(seen, in_copy | mask[in_copy].any(axis=0))
    plan = documents_with_image_copies(layout)
    if seen.any():
        assert np.array_equal(plan.only(seen).dense_mask(), mask[seen][:, seen])
    longer = plan.with_document(3).dense_mask()
    assert np.array_equal(longer[:-3, :-3], mask)
    assert np.array_equal(longer[-3:, -3:], np.tri(3, dtype=bool))
    assert not longer[:-3, -3:].any()
    assert not longer[-3:, :-3].any()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any))
@settings(max_examples=60, deadline=None)
def test_documents_without_images_are_causal_and_apart(lengths: list[int]) -> None:
    bounds = np.cumsum([0, *lengths])
    document = np.repeat(np.arange(len(lengths)), lengths)
    expected = (document[:, None] == document) & np.tri(len(document), dtype=bool)
    nothing = np.empty(0, dtype=np.int64)
    assert np.array_equal(packed_documents(bounds).dense_mask(), expected)
    with_none = documents_with_image_copies(append_image_copies(bounds, nothing, nothing))
    assert np.array_equal(with_none.dense_mask(), expected)


def test_an_image_may_have_several_copies() -> None:
    """As often as it is named; each is alone with the prefix."""
    bounds, starts, lengths = np.array([0, 3, 9]), np.array([4, 4, 7]), np.array([2, 2, 1])
    layout = append_image_copies(bounds, starts, lengths)
    assert layout.source_tokens().tolist() == [*range(9), 4, 5, 4, 5, 7]
    mask = documents_with_image_copies(layout).dense_mask()
    assert [np.flatnonzero(row).tolist() for row in mask[9:]] == [[3, 9, 10]] * 2 + [[3, 11, 12]] * 2 + [
        [3, 4, 5, 6, 13]
    ]


def test_images_must_lie_inside_one_document() -> None:
    for starts, lengths in (([3], [3]), ([8], [3]), ([3, 2], [1, 1]), ([4], [0]), ([-1], [2]), ([12], [1])):
        with pytest.raises(AssertionError):
            append_image_copies(np.array([0, 5, 10]), np.array(starts), np.array(lengths))


@given(rows_of_documents, st.sampled_from([2, 3, 4]))
@settings(max_examples=60, deadline=None)
@example([(Run(40, False), IMAGE)], 4)
def test_slices_of_all_ranks_are_the_whole_plan(documents: list[Document], context_size: int) -> None:
    documents = padded(documents, 2 * context_size)
    plan = documents_with_image_copies(layout_of(documents))
    whole = np.zeros((plan.num_tokens, plan.num_tokens), dtype=int)
    for rank in range(context_size):
        part = slice_plan(plan, rank, context_size)
        mask = part.dense_mask()
        queries = np.concatenate([np.arange(start, stop) for start, stop in part.queries])
        assert sorted(queries) == held_tokens(plan.num_tokens, rank, context_size).tolist()
        last_seen = [np.flatnonzero(mask[stop - 1])[-1] for _, stop in part.queries[part.causal]]
        last_key = [part.keys[part.key_pieces == piece].max() - 1 for piece in np.flatnonzero(part.causal)]
        assert last_seen == last_key, "keys that no query of this rank sees"
        whole += mask
    assert np.array_equal(whole, allowed(documents))


@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_every_token_is_held_once_and_gathered_in_order(context_size: int) -> None:
    held = [held_tokens(48, rank, context_size) for rank in range(context_size)]
    assert sorted(itertools.chain(*held)) == list(range(48))
    assert np.concatenate(held)[gathered_order(48, context_size)].tolist() == list(range(48))


def test_a_causal_piece_may_have_several_key_ranges() -> None:
    """Cutting it takes the last keys first, whole ranges too."""
    plan = AttentionPlan(
        num_tokens=12,
        queries=np.array([[4, 10]]),
        keys=np.array([[0, 2], [3, 7], [8, 10]]),
        key_pieces=np.zeros(3, dtype=np.int64),
        causal=np.array([True]),
    )
    whole = plan.dense_mask()
    assert np.flatnonzero(whole[4]).tolist() == [0, 1, 3]
    for start, stop in itertools.combinations(range(4, 11), 2):
        part = plan.of_queries(start, stop)
        assert np.array_equal(part.dense_mask()[start:stop], whole[start:stop])
        assert not part.dense_mask()[:start].any()
        assert not part.dense_mask()[stop:].any()
        assert part.key_lengths[0] == whole[stop - 1].sum()
