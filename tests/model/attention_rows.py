"""Rows of documents with images, what may attend to what there by brute force, and attention by a dense mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st

from model.backbone.attention_plan import ImageCopies, append_image_copies, documents_with_image_copies
from model.backbone.context_parallel import held_tokens
from model.backbone.packed_attention import PackedAttention, prepare_attention
from model.parallel.megatron import TransformerConfig, parallel_state

HEADS, GROUPS, WIDTH, THETA = 4, 2, 8, 10_000.0


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a document; those of an image get a copy."""

    length: int
    is_image: bool


Document = tuple[Run, ...]
texts = st.integers(1, 7).map(lambda length: Run(length, False))
# An image begins with the last token of its header; each row of its grid ends with a token of its own.
images = st.tuples(st.integers(1, 3), st.integers(1, 4)).map(lambda grid: Run(1 + grid[0] * (grid[1] + 1), True))
rows_of_documents = st.lists(st.lists(texts | images, min_size=1, max_size=5).map(tuple), min_size=1, max_size=5)


def padded(documents: list[Document], multiple: int) -> list[Document]:
    """One more document of text, so that the row with copies divides by `multiple`."""
    missing = -layout_of(documents).num_tokens % multiple
    return [*documents, (Run(missing, False),)] if missing else documents


def layout_of(documents: list[Document]) -> ImageCopies:
    """The package's own description of the row with copies."""
    bounds = np.cumsum([0, *(sum(run.length for run in document) for document in documents)])
    runs = [run for document in documents for run in document]
    starts = np.cumsum([0, *(run.length for run in runs)])[:-1]
    is_image = np.array([run.is_image for run in runs])
    return append_image_copies(bounds, starts[is_image], np.array([run.length for run in runs])[is_image])


def tokens_by_hand(documents: list[Document]) -> tuple[list[tuple[int, int, int]], dict[int, int]]:
    """(document, copy or 0, position in the document) of each token, and where in its document each copy begins."""
    tokens, begins = [], {}
    numbers = itertools.count(1)
    for number, document in enumerate(documents):
        tokens += [(number, 0, position) for position in range(sum(run.length for run in document))]
        start = 0
        for run in document:
            if run.is_image:
                copy = next(numbers)
                begins[copy] = start
                tokens += [(number, copy, position) for position in range(start, start + run.length)]
            start += run.length
    return tokens, begins


def allowed(documents: list[Document]) -> np.ndarray:
    """bool [T, T] by the rule itself, token against token."""
    tokens, begins = tokens_by_hand(documents)
    mask = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for row, (document, copy, position) in enumerate(tokens):
        for column, (other_document, other_copy, other_position) in enumerate(tokens):
            if document != other_document:
                continue
            if copy == 0:
                mask[row, column] = other_copy == 0 and other_position <= position
            elif other_copy == 0:
                mask[row, column] = other_position < begins[copy]
            else:
                mask[row, column] = other_copy == copy
    return mask


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """[Q, heads, d] and [K, groups, d], bool [Q, K] -> [Q, heads * d]; q and k are rotated already."""
    key = key.repeat_interleave(HEADS // GROUPS, dim=1)
    value = value.repeat_interleave(HEADS // GROUPS, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    weights = scores.masked_fill(~torch.from_numpy(mask), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def random_heads(num_tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value and a gradient of the output, float64, for a whole row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)] + [(num_tokens, HEADS * WIDTH)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def packed_attention() -> PackedAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0
    )
    ranks = SimpleNamespace(cp=parallel_state.get_context_parallel_group())
    return PackedAttention(config, 1, None, "self", pg_collection=ranks)


def attend_as_rank(documents: list[Document], context_size: int) -> list[torch.Tensor]:
    """This rank's output and gradients of query, key, value for its tokens, and which tokens those are."""
    from model.parallel import groups

    if context_size > 1:
        groups.initialize(context=context_size)
    rank = parallel_state.get_context_parallel_rank()
    layout = layout_of(documents)
    held = torch.from_numpy(held_tokens(layout.num_tokens, rank, context_size))
    *heads, signal = (values[held] for values in random_heads(layout.num_tokens, seed=3))
    planned = prepare_attention(
        documents_with_image_copies(layout),
        torch.from_numpy(layout.source_tokens())[held],
        head_dim=WIDTH,
        rope_theta=THETA,
        dtype=torch.float64,
        context_rank=rank,
        context_size=context_size,
    )
    for values in heads:
        values.requires_grad_()
    output = packed_attention()(*heads, packed_seq_params=planned)
    output.backward(signal)
    return [output.detach(), *(values.grad for values in heads), held]
