"""The chunked head against brute force in float64, against full logits, and inside megatron-core's data-parallel wrapper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.full_logits import token_losses
from model.backbone.attention_plan import packed_documents
from model.backbone.head import EXCLUDED, AllowedSets, TokenScores
from model.backbone.packed_attention import prepare_attention
from model.backbone.transformer import build_model
from model.config import ModelConfig
from model.generation.grammar import ImageGrammar
from model.parallel import groups
from model.parallel.megatron import DistributedDataParallel, DistributedDataParallelConfig, parallel_state
from model.vocabulary import Vocabulary, VocabularyConfig


@dataclass(frozen=True)
class Case:
    num_tokens: int
    hidden_size: int
    pad_multiple: int  # 256: the second of two tensor-parallel ranks holds nothing but padding
    chunk_tokens: int | None
    num_sets: int  # 0: all ids are allowed
    sequence_parallel: bool
    seed: int

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_config(
            VocabularyConfig(text_size=30, reserved_size=16, visual_size=20, pad_multiple=self.pad_multiple)
        )


def cases(tokens_multiple: int, sequence_parallel: st.SearchStrategy[bool]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        num_tokens=st.integers(1, 12).map(lambda n: n * tokens_multiple),
        hidden_size=st.integers(1, 9),
        pad_multiple=st.sampled_from([2, 32, 256]),
        chunk_tokens=st.one_of(st.none(), st.integers(1, 13)),
        num_sets=st.integers(0, 4),
        sequence_parallel=sequence_parallel,
        seed=st.integers(0, 2**31 - 1),
    )


@dataclass
class Inputs:
    hidden: torch.Tensor  # [T, h]
    weight: torch.Tensor  # [padded vocabulary, h]
    ids: torch.Tensor
    allowed: AllowedSets | None
    mask: torch.Tensor  # bool [T, padded vocabulary]
    outside: torch.Tensor  # bool [T]: the id is not allowed
    grad_log_probs: torch.Tensor
    grad_entropy: torch.Tensor


def inputs_of(case: Case) -> Inputs:
    """The same on every rank. Set 0 has one id; one token in ten has an id outside its set."""
    random = torch.Generator().manual_seed(case.seed)
    size, padded = case.vocabulary.size, case.vocabulary.padded_size
    mask = torch.zeros(case.num_tokens, padded, dtype=torch.bool)
    mask[:, :size] = True
    allowed = None
    if case.num_sets:
        sets = torch.rand(case.num_sets, padded, generator=random) < 0.3
        sets[:, size:] = False
        sets[:, 5] = True
        sets[0] = torch.arange(padded) == 40
        index = torch.randint(-1, case.num_sets, (case.num_tokens,), generator=random)
        allowed = AllowedSets(sets, index)
        mask = torch.where((index >= 0)[:, None], sets[index], mask)
    ids = torch.multinomial(mask.float(), 1, generator=random)[:, 0]
    outside = torch.rand(case.num_tokens, generator=random) < 0.1
    ids[outside] = padded - 1 if padded > size else -1
    grads = torch.randn(2, case.num_tokens, generator=random)
    grads[0, outside] = 0.0
    return Inputs(
        hidden=torch.randn(case.num_tokens, case.hidden_size, generator=random),
        weight=torch.randn(padded, case.hidden_size, generator=random),
        ids=ids,
        allowed=allowed,
        mask=mask,
        outside=outside,
        grad_log_probs=grads[0],
        grad_entropy=grads[1],
    )


def brute_force(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies, gradients of hidden states and weight in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    log_probs = torch.log_softmax((hidden @ weight.T).masked_fill(~inputs.mask, -torch.inf), 1)
    finite = log_probs.masked_fill(~inputs.mask, 0.0)
    entropy = -(finite.exp() * finite * inputs.mask).sum(1)
    given_ids = finite.gather(1, inputs.ids.clamp(min=0)[:, None])[:, 0]
    ((given_ids * inputs.grad_log_probs).sum() + (entropy * inputs.grad_entropy).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return given_ids.detach().masked_fill(inputs.outside, -torch.inf), entropy.detach(), hidden.grad, weight.grad


def chunked(case: Case, together: bool) -> tuple[torch.Tensor, ...]:
    """The same by `TokenScores`, of this rank's parts, put together over ranks by `assembled`."""
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(tensor=torch.distributed.get_world_size())
    inputs = inputs_of(case)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    hidden = inputs.hidden.chunk(size)[rank] if case.sequence_parallel else inputs.hidden
    hidden = hidden[:, None].clone().requires_grad_()
    weight = inputs.weight.chunk(size)[rank].clone().requires_grad_()
    scores = TokenScores(
        hidden, weight, case.vocabulary, sequence_parallel=case.sequence_parallel, chunk_tokens=case.chunk_tokens
    )
    if together:
        log_probs, entropy = scores.log_probs_and_entropy(inputs.ids, inputs.allowed)
    else:
        log_probs, entropy = scores.log_probs(inputs.ids, inputs.allowed), scores.entropy(inputs.allowed)
    torch.autograd.backward([log_probs, entropy], [inputs.grad_log_probs, inputs.grad_entropy])
    assert hidden.grad is not None
    assert weight.grad is not None
    return log_probs.detach(), entropy.detach(), hidden.grad[:, 0], weight.grad


def check(case: Case, by_rank: list[tuple[torch.Tensor, ...]]) -> None:
    expected = brute_force(inputs_of(case))
    hidden_gradient = torch.cat([one[2] for one in by_rank]) if case.sequence_parallel else by_rank[0][2]
    weight_gradient = torch.cat([one[3] for one in by_rank])
    for one in by_rank:
        torch.testing.assert_close(one[0], by_rank[0][0], rtol=0, atol=0)
        torch.testing.assert_close(one[1], by_rank[0][1], rtol=0, atol=0)
    found = (by_rank[0][0], by_rank[0][1], hidden_gradient, weight_gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    padding = weight_gradient[case.vocabulary.size :]
    assert bool((padding == 0).all())


@pytest.mark.usefixtures("single_process")
@given(case=cases(1, st.booleans()), together=st.booleans())
@settings(max_examples=150, deadline=None)
def test_one_rank_against_brute_force(case: Case, together: bool) -> None:
    check(case, [chunked(case, together)])


@given(case=cases(2, st.booleans()), together=st.booleans())
@settings(max_examples=12, deadline=None)
def test_two_tensor_ranks_against_brute_force(pool: Any, case: Case, together: bool) -> None:
    check(case, pool.run(chunked, case, together, ranks=2))


@pytest.mark.usefixtures("single_process")
def test_forced_tokens_are_exact() -> None:
    """A set of one id: log-probability 0, entropy 0, gradient 0, whatever the logits."""
    vocabulary = Case(1, 1, 32, None, 0, False, 0).vocabulary
    hidden = (100 * torch.randn(7, 1, 5)).requires_grad_()
    weight = torch.randn(vocabulary.padded_size, 5, requires_grad=True)
    ids = torch.randint(0, vocabulary.size, (7,))
    allowed = AllowedSets.from_masks(torch.nn.functional.one_hot(ids, vocabulary.padded_size).bool())
    scores = TokenScores(hidden, weight, vocabulary, chunk_tokens=3)
    log_probs, entropy = scores.log_probs_and_entropy(ids, allowed)
    (log_probs.sum() + entropy.sum()).backward()
    for values in (log_probs, entropy, hidden.grad, weight.grad):
        assert values is not None
        assert bool((values == 0).all())


@pytest.mark.usefixtures("single_process")
def test_allowed_sets_of_a_grammar() -> None:
    """Along a generated sequence: few sets, and the distribution that a sampler with the grammar's mask draws from."""
    vocabulary = Case(1, 1, 32, None, 0, False, 0).vocabulary
    grammar = ImageGrammar(vocabulary, digit_ids=range(10), star_id=10)
    state = grammar.start([[]], [(2, 3)])
    row = [vocabulary.visual_start + code for code in (1, 2, 3)]
    ids = [20, vocabulary.boi, 2, 10, 3, vocabulary.img, *row, vocabulary.eol, *row, vocabulary.eoi, 21, vocabulary.eos]
    masks = []
    for one in ids:
        masks.append(grammar.mask(state)[0])
        state = grammar.advance(state, torch.tensor([one]))
    mask = torch.stack(masks)
    allowed = AllowedSets.from_masks(mask)
    assert len(allowed.sets) == 8  # text, "2", "*", "3", IMG, visual codes, EOL, EOI
    hidden, weight = torch.randn(len(ids), 1, 4), torch.randn(vocabulary.padded_size, 4)
    found = TokenScores(hidden, weight, vocabulary).log_probs(torch.tensor(ids), allowed)
    logits = (hidden[:, 0] @ weight.T).masked_fill(~mask, -torch.inf)
    expected = torch.log_softmax(logits, 1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    assert int((found == 0).sum()) == 6


def full_logits_beside_chunks(dtype: torch.dtype, chunk_tokens: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(losses, hidden gradient, weight gradient) of this tensor-parallel rank: full logits, chunks, gradients forward."""
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(tensor=torch.distributed.get_world_size())
    vocabulary = Case(1, 1, 32, None, 0, False, 0).vocabulary
    random = torch.Generator().manual_seed(3)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    ids = torch.randint(0, vocabulary.size, (101,), generator=random)
    weights = torch.rand(101, generator=random)
    source_hidden = torch.randn(101, 1, 48, generator=random).to(dtype)
    source_weight = torch.randn(vocabulary.padded_size, 48, generator=random).to(dtype).chunk(size)[rank]
    results = []
    for way in ("full", "log_probs", "weighted_losses"):
        hidden, weight = source_hidden.clone().requires_grad_(), source_weight.clone().requires_grad_()
        scores = TokenScores(hidden, weight, vocabulary, chunk_tokens=chunk_tokens)
        if way == "weighted_losses":
            loss, losses = scores.weighted_losses(ids, weights)
        elif way == "log_probs":
            losses = -scores.log_probs(ids)
            loss = losses @ weights
        else:
            losses = token_losses(torch.matmul(hidden, weight.t()), ids[:, None], vocabulary)[:, 0]
            loss = losses @ weights
        loss.backward()
        assert hidden.grad is not None
        gradient = hidden.grad.clone()
        if way == "full":  # megatron's output layer sums it over the ranks; so does `gathered_hidden`
            torch.distributed.all_reduce(gradient)
        results.append((losses.detach(), gradient, weight.grad))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_losses_and_gradients_as_full_logits(pool: Any, dtype: torch.dtype, ranks: int) -> None:
    for chunk_tokens in (None, 16):
        for losses, hidden, weight in pool.run(full_logits_beside_chunks, dtype, chunk_tokens, ranks=ranks):
            # In 16 bits logits of about 7 are rounded to steps of 1 / 32, and sums differ in their order.
            is_exact = dtype == torch.float32
            for way in (1, 2):
                torch.testing.assert_close(losses[way], losses[0], rtol=0, atol=1e-6 if is_exact else 0.05)
                for found in (hidden, weight):
                    close = 1e-5 if is_exact else 0.02
                    torch.testing.assert_close(found[way], found[0], rtol=close, atol=close)


@pytest.mark.usefixtures("single_process")
@given(case=cases(1, st.just(False)))
@settings(max_examples=60, deadline=None)
def test_gradients_made_in_the_forward_pass_are_those_of_the_backward_pass(case: Case) -> None:
    inputs = inputs_of(replace(case, num_sets=0))
    ids, weights = inputs.ids.masked_fill(inputs.outside, 3), inputs.grad_log_probs
    results = []
    for ahead in (False, True):
        hidden, weight = inputs.hidden[:, None].clone().requires_grad_(), inputs.weight.clone().requires_grad_()
        scores = TokenScores(hidden, weight, case.vocabulary, chunk_tokens=case.chunk_tokens)
        if ahead:
            loss, losses = scores.weighted_losses(ids, weights)
        else:
            losses = -scores.log_probs(ids)
            loss = torch.dot(losses, weights)
        loss.backward()
        results.append((loss.detach(), losses.detach(), hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.usefixtures("single_process")
def test_a_factor_behind_weighted_losses_is_an_error() -> None:
    inputs = inputs_of(Case(9, 4, 32, None, 0, False, 1))
    scores = TokenScores(
        inputs.hidden[:, None].requires_grad_(), inputs.weight, Case(9, 4, 32, None, 0, False, 1).vocabulary
    )
    loss, losses = scores.weighted_losses(inputs.ids.clamp(min=0), inputs.grad_log_probs)
    assert not losses.requires_grad
    with pytest.raises(RuntimeError, match="as it is"):
        (2 * loss).backward()


MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=16,
    vocabulary=VocabularyConfig(text_size=70, reserved_size=16, visual_size=30, pad_multiple=64),
)


def gradients_in_the_wrapper(sequence_parallel: bool, dtype: str) -> list[dict[str, torch.Tensor]]:
    """`main_grad` of every parameter after two micro-batches: by full logits, by chunks, by gradients made forward."""
    groups.initialize(tensor=torch.distributed.get_world_size())
    groups.seed_random_streams(1)
    config = replace(MODEL, dtype=dtype)
    model = build_model(config, seed=5, sequence_parallel=sequence_parallel)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    vocabulary = Vocabulary.from_config(config.vocabulary)
    tokens = torch.randint(0, vocabulary.size, (2, 1, 24), generator=torch.Generator().manual_seed(2))
    packed = prepare_attention(
        packed_documents(np.array([0, 10, 24])),
        torch.cat((torch.arange(10), torch.arange(14))),
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        dtype=next(model.parameters()).dtype,
    )
    results = []
    for way in ("full", "log_probs", "weighted_losses"):
        wrapped.zero_grad_buffer()
        model.post_process = way == "full"
        for micro_batch in tokens:
            labels = micro_batch.roll(-1)
            output = wrapped(micro_batch, None, None, packed_seq_params=packed)
            if way == "full":
                loss = token_losses(output, labels, vocabulary).sum()
            else:
                weight = model.output_layer.weight
                scores = TokenScores(output, weight, vocabulary, sequence_parallel=sequence_parallel, chunk_tokens=7)
                ones = torch.ones(labels.numel())
                by_weights = way == "weighted_losses"
                loss = scores.weighted_losses(labels[0], ones)[0] if by_weights else -scores.log_probs(labels[0]).sum()
            loss.backward()
        results.append({name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
        assert all(parameter.grad is None for parameter in model.parameters())
    return results


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_arrive_in_the_data_parallel_wrapper(
    pool: Any, ranks: int, sequence_parallel: bool, dtype: str
) -> None:
    for full, *others in pool.run(gradients_in_the_wrapper, sequence_parallel, dtype, ranks=ranks):
        for name, expected in full.items():
            assert expected.dtype == torch.float32
            assert expected.abs().max() > 0, name
            close = 2e-5 if dtype == "float32" else 0.03
            limit = close * float(expected.abs().max())
            for found in others:
                torch.testing.assert_close(found[name], expected, rtol=close, atol=limit, msg=name)


def peak_bytes(recorded: Any) -> int:
    """The most that was allocated at once, of what the profiler saw."""
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    ("dtype", "with_entropy", "chunks"),
    [(torch.float32, False, 1.0), (torch.bfloat16, False, 1.5), (torch.float32, True, 2.0)],
)
def test_one_chunk_of_logits_exists_at_once(dtype: torch.dtype, with_entropy: bool, chunks: float) -> None:
    """`chunks`: float32 logits of a chunk, and its bfloat16 copy or the second tensor that an entropy needs."""
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=20_000, visual_size=20_000))
    hidden = torch.randn(200, 1, 4).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary.padded_size, 4).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary.size, (200,))
    # What oneDNN packs a product's factors into is its own, differs between processors and is large only for so narrow a model.
    without_packing = torch.backends.mkldnn.flags(enabled=False)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with without_packing, torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        scores = TokenScores(hidden, weight, vocabulary, chunk_tokens=20)
        log_probs, entropy = scores.log_probs_and_entropy(ids) if with_entropy else (scores.log_probs(ids), 0.0)
        (log_probs + entropy).sum().backward()
    chunk_bytes = 20 * vocabulary.padded_size * 4
    # The gradient of the weight is [vocabulary, 4] in float32, then in its own dtype, and a block of it.
    weight_bytes = 3 * vocabulary.padded_size * 4 * 4
    assert chunk_bytes < peak_bytes(recorded) <= chunks * chunk_bytes + weight_bytes + 2**16


@pytest.mark.usefixtures("single_process")
def test_a_single_chunk_is_kept_and_a_second_backward_pass_computes_it_again() -> None:
    case = Case(9, 4, 32, None, 0, False, 1)
    inputs = inputs_of(case)
    hidden = inputs.hidden[:, None].clone().requires_grad_()
    losses = -TokenScores(hidden, inputs.weight, case.vocabulary).log_probs(inputs.ids.clamp(0, 65))
    (first,) = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(second, first)


@pytest.mark.usefixtures("single_process")
def test_scores_without_gradients() -> None:
    case = Case(9, 4, 32, 4, 2, False, 1)
    inputs = inputs_of(case)
    with torch.inference_mode():
        scores = TokenScores(inputs.hidden[:, None], inputs.weight, case.vocabulary, chunk_tokens=4)
        log_probs = scores.log_probs(inputs.ids, inputs.allowed)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs.double(), brute_force(inputs)[0], rtol=1e-5, atol=1e-5)
    assert bool((log_probs > EXCLUDED).any())


@pytest.mark.usefixtures("single_process")
def test_a_broken_token_is_nan_and_the_others_are_not() -> None:
    case = Case(9, 4, 32, 4, 0, False, 1)
    inputs = inputs_of(case)
    hidden = inputs.hidden[:, None].clone()
    hidden[3, 0, 0] = torch.nan
    scores = TokenScores(hidden, inputs.weight, case.vocabulary, chunk_tokens=4)
    for values in scores.log_probs_and_entropy(inputs.ids.clamp(0, 65)):
        assert torch.nonzero(~values.isfinite()).flatten().tolist() == [3]
        assert bool(values[3].isnan())
