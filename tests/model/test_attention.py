"""Packed attention against a dense computation with an explicit mask; the arrays for the flash kernel, emulated."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_rows import (
    GROUPS,
    HEADS,
    THETA,
    WIDTH,
    Document,
    Run,
    allowed,
    attend_as_rank,
    dense_attention,
    layout_of,
    packed_attention,
    padded,
    random_heads,
    rows_of_documents,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.backbone import packed_attention as packed_attention_module
from model.backbone import varlen_pieces
from model.backbone.attention_plan import documents_with_image_copies, packed_documents
from model.backbone.context_parallel import held_tokens, slice_plan
from model.backbone.packed_attention import PackedAttention, PlannedAttention, prepare_attention, takes_flash
from model.backbone.rotary import apply_rotary, rotary_tables

pytestmark = pytest.mark.usefixtures("single_process")
ROW = [
    (Run(9, False), Run(7, True), Run(7, True), Run(3, False)),
    (Run(13, True),),
    (Run(20, False),),
    (Run(5, False), Run(5, True), Run(2, False)),
]


@pytest.fixture(scope="module")
def attention() -> PackedAttention:
    return packed_attention()


def prepared(cu_seqlens: np.ndarray, positions: torch.Tensor) -> PlannedAttention:
    return prepare_attention(packed_documents(cu_seqlens), positions, head_dim=WIDTH, rope_theta=THETA)


def rotate(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as complex rotation of (first half, second half) pairs."""
    frequency = 1.0 / THETA ** (torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, None] * frequency)
    pairs = torch.complex(heads[..., : WIDTH // 2], heads[..., WIDTH // 2 :]) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def dense(query: Any, key: Any, value: Any, lengths: list[int], positions: torch.Tensor) -> torch.Tensor:
    query, key = rotate(query.double(), positions), rotate(key.double(), positions)
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = (document[:, None] == document) & np.tri(len(document), dtype=bool)
    return dense_attention(query, key, value.double(), seen)


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
    output = attention(query, key, value, packed_seq_params=prepared(cu_seqlens, positions))
    expected = dense(query, key, value, lengths, positions.double())
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    signal = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad(output, (query, key, value), signal, retain_graph=True)
    wanted = torch.autograd.grad(expected, (query, key, value), signal.double())
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_rows_of_one_length_are_not_moved() -> None:
    pieces = prepared(np.array([0, 16, 32]), torch.arange(32) % 16).sdpa
    assert pieces.moves is None
    assert len(pieces.batches) == 1


def test_few_calls_serve_many_documents() -> None:
    lengths = np.random.default_rng(0).integers(20, 80, 150)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    batches = prepared(bounds, torch.zeros(bounds[-1], dtype=torch.int64)).sdpa.batches
    assert len(batches) <= 8
    assert sum(batch.num_pieces * batch.query_length for batch in batches) < 1.25 * bounds[-1]


def dense_results(documents: list[Document]) -> list[torch.Tensor]:
    """Output and gradients of query, key and value in float64, with the mask of the rule."""
    layout = layout_of(documents)
    query, key, value, signal = random_heads(layout.num_tokens, seed=3)
    for values in (query, key, value):
        values.requires_grad_()
    cos, sin = rotary_tables(torch.from_numpy(layout.source_tokens()), WIDTH, THETA, torch.float64)
    cos, sin = cos[:, None], sin[:, None]
    output = dense_attention(apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value, allowed(documents))
    output.backward(signal)
    return [output.detach(), query.grad, key.grad, value.grad]


@given(rows_of_documents)
@settings(max_examples=25, deadline=None)
@example(ROW)
def test_image_copies_agree_with_a_dense_mask(documents: list[Document]) -> None:
    *results, _ = attend_as_rank(documents, context_size=1)
    for result, expected in zip(results, dense_results(documents), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("context_size", [2, 4])
def test_context_ranks_attend_to_image_copies_as_one(context_size: int, pool: Any) -> None:
    documents = padded(ROW, 2 * context_size)
    ranks = pool.run(attend_as_rank, documents, context_size, ranks=context_size)
    whole = [torch.zeros_like(values) for values in dense_results(documents)]
    for *results, held in ranks:
        for values, result in zip(whole, results, strict=True):
            values[held] = result
    for values, expected in zip(whole, dense_results(documents), strict=True):
        torch.testing.assert_close(values, expected, atol=1e-12, rtol=1e-12)


# --- the flash kernel: its inputs, with its documented semantics in plain torch ---------------------------------------


def emulated_varlen(given: dict[str, Any]) -> torch.Tensor:
    """Sequence n is rows cu_seq[n] to cu_seq[n + 1]; a window of (-1, 0) is causal, aligned to the last key."""
    query, key, value, cu_q, cu_k = (given[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (given["max_q"], given["max_k"]) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(query), len(key))
    assert given["enable_gqa"]
    assert given["num_splits"] == 1
    query_lengths, key_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    sequences = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    outputs = []
    for queries, keys, values in sequences:
        mask = np.ones((len(queries), len(keys)), dtype=bool)
        if given["window_size"] == (-1, 0):
            mask = np.tril(mask, len(keys) - len(queries))
        else:
            assert given["window_size"] == (-1, -1)
        outputs.append(dense_attention(queries, keys, values, mask))
    return torch.cat(outputs).view(query.shape)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash kernel's path on the CPU; arguments are bound to the signature of the real kernel."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def emulated(*arguments: Any, **options: Any) -> torch.Tensor:
        return emulated_varlen(signature.bind(*arguments, **options).arguments)

    monkeypatch.setattr(varlen, "varlen_attn", emulated)
    monkeypatch.setattr(packed_attention_module, "takes_flash", lambda query: True)


@given(documents=rows_of_documents, context_size=st.sampled_from([1, 2, 3]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flash_calls_cover_the_plan(flash: None, documents: list[Document], context_size: int) -> None:
    documents = padded(documents, 2 * context_size)
    plan = documents_with_image_copies(layout_of(documents))
    query, key, value, _ = random_heads(plan.num_tokens, seed=5)
    expected = dense_attention(query, key, value, allowed(documents))
    for rank in range(context_size):
        held = held_tokens(plan.num_tokens, rank, context_size)
        pieces = varlen_pieces.prepare(slice_plan(plan, rank, context_size), held, torch.device("cpu"))
        assert len(pieces.calls) <= 2
        output = varlen_pieces.attend(query[held], key, value, pieces, None, 0.0)
        torch.testing.assert_close(output, expected[held], atol=1e-12, rtol=1e-12)


def test_the_flash_path_has_the_gradients_of_a_dense_mask(flash: None) -> None:
    *results, _ = attend_as_rank(ROW, context_size=1)
    for result, expected in zip(results, dense_results(ROW), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


def test_packed_documents_reach_the_flash_kernel_as_they_lie() -> None:
    pieces = prepared(np.array([0, 5, 6, 40]), torch.arange(40)).varlen
    (call,) = pieces.calls
    assert call.causal
    assert call.query_rows is call.key_rows is pieces.home_rows is None
    assert call.cu_seqlens_q.tolist() == call.cu_seqlens_k.tolist() == [0, 5, 6, 40]
    assert call.max_q == call.max_k == 34


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_real_flash_operators_take_these_arguments(dropout: float) -> None:
    """On torch's meta device, where kernels and their gradients give shapes only."""
    plan = documents_with_image_copies(layout_of(ROW))
    pieces = varlen_pieces.prepare(plan, np.arange(plan.num_tokens), torch.device("meta"))
    heads = [
        torch.empty(plan.num_tokens, number, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for number in (HEADS, GROUPS, GROUPS)
    ]
    output = varlen_pieces.attend(*heads, pieces, None, dropout)
    assert output.shape == (plan.num_tokens, HEADS * 64)
    gradients = torch.autograd.grad(output, heads, torch.empty_like(output))
    assert [gradient.shape for gradient in gradients] == [values.shape for values in heads]


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "taken"),
    [
        (True, torch.bfloat16, True),
        (True, torch.float16, True),
        (True, torch.float32, False),
        (False, torch.bfloat16, False),
    ],
)
def test_the_flash_kernel_is_taken_where_it_can_run(is_cuda: bool, dtype: torch.dtype, taken: bool) -> None:
    query: Any = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    assert takes_flash(query) is taken


def test_rotary_tables_are_exact_at_far_positions() -> None:
    cos, sin = rotary_tables(torch.tensor([0, 32_767]), 128, 1_000_000.0)
    assert cos.shape == (2, 128)
    angle = 32_767 / 1_000_000.0 ** (np.arange(64) / 64)
    np.testing.assert_allclose(cos[1, :64], np.cos(angle), atol=3e-3)
    np.testing.assert_allclose(sin[1, 64:], np.sin(angle), atol=3e-3)
    assert torch.equal(cos[0], torch.ones(128))
