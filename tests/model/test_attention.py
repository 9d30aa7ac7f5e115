"""Packed attention against a dense computation with an explicit document mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backbone.packed_attention import PackedAttention, _pieces, context_token_ids, pack_documents, rotary_tables

HEADS, GROUPS, WIDTH, THETA = 4, 2, 8, 10_000.0
pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def attention() -> PackedAttention:
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0
    )
    return PackedAttention(config, 1, None, "self")


def rotate(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as complex rotation of (first half, second half) pairs."""
    frequency = 1.0 / THETA ** (torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, None] * frequency)
    pairs = torch.complex(heads[..., : WIDTH // 2], heads[..., WIDTH // 2 :]) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def dense(query: Any, key: Any, value: Any, lengths: list[int], positions: torch.Tensor) -> torch.Tensor:
    query, key = rotate(query.double(), positions), rotate(key.double(), positions)
    key = key.repeat_interleave(HEADS // GROUPS, dim=1)
    value = value.double().repeat_interleave(HEADS // GROUPS, dim=1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None]) & torch.ones(len(document), len(document)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(len(document), -1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.booleans())
def test_documents_agree_with_a_dense_mask(attention: PackedAttention, lengths: list[int], shifted: bool) -> None:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    query, key, value = (
        torch.randn(total, n, WIDTH, generator=generator, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)
    )
    positions = torch.cat([torch.arange(n) for n in lengths]) + (17 if shifted else 0)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    packed = pack_documents(cu_seqlens, positions, head_dim=WIDTH, rope_theta=THETA)
    output = attention(query, key, value, packed_seq_params=packed)
    expected = dense(query, key, value, lengths, positions.double())
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    signal = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad(output, (query, key, value), signal, retain_graph=True)
    wanted = torch.autograd.grad(expected, (query, key, value), signal.double())
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_rows_of_one_length_are_not_moved() -> None:
    packed = pack_documents(np.array([0, 16, 32]), torch.arange(32) % 16, head_dim=WIDTH, rope_theta=THETA)
    assert packed.moves is None
    assert len(packed.batches) == 1


def test_few_calls_serve_many_documents() -> None:
    lengths = np.random.default_rng(0).integers(20, 80, 150)
    total = int(lengths.sum())
    packed = pack_documents(
        np.concatenate(([0], np.cumsum(lengths))), torch.zeros(total, dtype=torch.int64), head_dim=8, rope_theta=THETA
    )
    assert len(packed.batches) <= 8
    assert sum(batch.num_spans * batch.query_length for batch in packed.batches) < 1.25 * total


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_context_ranks_see_each_query_with_all_keys_before_it(lengths: list[int], context_size: int) -> None:
    padding = -sum(lengths) % (2 * context_size)
    bounds = np.concatenate(([0], np.cumsum(lengths + ([padding] if padding else []))))
    total = int(bounds[-1])
    seen_tokens = []
    for rank in range(context_size):
        held = context_token_ids(total, rank, context_size)
        for (start, length), (key_start, key_length) in zip(*_pieces(bounds, held, context_size), strict=True):
            tokens = held[start : start + length]
            span_start = bounds[np.searchsorted(bounds, tokens[0], side="right") - 1]
            assert np.array_equal(tokens, np.arange(tokens[0], tokens[0] + length))
            assert (key_start, key_start + key_length) == (span_start, tokens[-1] + 1)
            seen_tokens += tokens.tolist()
    assert sorted(seen_tokens) == list(range(total))


def test_rotary_tables_are_exact_at_far_positions() -> None:
    cos, sin = rotary_tables(torch.tensor([0, 32_767]), 128, 1_000_000.0)
    assert cos.shape == (2, 128)
    angle = 32_767 / 1_000_000.0 ** (np.arange(64) / 64)
    np.testing.assert_allclose(cos[1, :64], np.cos(angle), atol=3e-3)
    np.testing.assert_allclose(sin[1, 64:], np.sin(angle), atol=3e-3)
    assert torch.equal(cos[0], torch.ones(128))
