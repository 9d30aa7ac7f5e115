"""The plain reference: against transformers' Qwen3, against the model that trains, against the grammar that samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen3_checkpoints import NUM_IDS, config_of, transformers_model

from model import reference
from model.backbone.attention_plan import packed_documents
from model.backbone.packed_attention import prepare_attention
from model.backbone.transformer import build_model
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.parallel.sharding import logical_parameters
from model.vocabulary import Vocabulary, VocabularyConfig

SHAPES = [(48, 4, 2, 32, 1e6), (32, 4, 4, 8, 1e4), (24, 6, 1, 10, 5e5), (40, 2, 2, 4, 1e6)]


@torch.no_grad()
def their_logits(model: Any, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([model(part[None]).logits[0] for part in tokens.split(lengths)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[120], [7, 1, 40, 19]])
def test_reference_agrees_with_transformers(shape: tuple, lengths: list[int]) -> None:
    config = config_of(*shape)
    model = transformers_model(config)
    tokens = torch.randint(0, NUM_IDS, (sum(lengths),))
    state = model.state_dict()
    assert set(reference.weight_names(config.num_layers)) == set(state)
    sizes = reference.Sizes.from_config(config)
    assert sizes == reference.Sizes.from_hugging_face(model.config.to_dict())
    expected = their_logits(model, tokens, lengths)
    got = reference.logits(state.__getitem__, sizes, tokens, lengths)
    assert expected.std() > 0.5
    assert (got - expected).abs().max() <= 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    exact = reference.logits(state.__getitem__, sizes, tokens, lengths, torch.float64)
    assert (exact - expected).abs().max() <= 1e-4


class ModelReader:
    """A `ShardReader` of a model in memory."""

    def __init__(self, model: Any):
        parameters = dict(model.named_parameters())
        self.tensors = {}
        for name, logical in logical_parameters(model).items():
            whole = torch.empty(logical.global_shape)
            for block in logical.blocks:
                place = tuple(slice(o, o + n) for o, n in zip(block.global_offset, block.shape, strict=True))
                whole[place] = block.of(parameters[name]).detach()
            self.tensors[f"model/{logical.name}"] = whole

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, offset: Any, shape: Any) -> torch.Tensor:
        return self.tensors[key][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_trained_model_agrees_with_the_reference(shape: tuple) -> None:
    config = config_of(*shape)
    model = build_model(config, seed=12).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
    lengths = [7, 1, 40, 19]
    tokens = torch.randint(0, NUM_IDS, (sum(lengths),))
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = prepare_attention(
        packed_documents(np.cumsum([0, *lengths])), positions, head_dim=config.head_dim, rope_theta=config.rope_theta
    )
    with torch.no_grad():
        got = model(tokens[None], None, None, packed_seq_params=packed)[0, :, :NUM_IDS]
    weight = reference.weights_of_checkpoint(ModelReader(model), config)
    expected = reference.logits(weight, reference.Sizes.from_config(config), tokens, lengths, torch.float64)
    assert expected.shape == (sum(lengths), NUM_IDS)
    assert (got - expected).abs().max() <= 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


SMALL = Vocabulary.from_config(VocabularyConfig(text_size=20, visual_size=5, pad_multiple=16))
DIGITS, STAR = list(range(3, 13)), 13


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        dict,
        max_images=st.sampled_from([None, 0, 1, 2]),
        stop_after_images=st.sampled_from([None, 1, 2]),
        begin_with_image=st.booleans(),
        repeat_grid=st.booleans(),
        max_side=st.sampled_from([3, 12, 120]),
        max_image_tokens=st.sampled_from([5, 30, 144]),
        emu3_format=st.booleans(),
    ),
    st.sampled_from([None, (1, 3), (2, 2), (12, 1), (1, 10)]),
    st.integers(0, 2**32),
)
def test_the_grammar_allows_what_the_reference_allows(options: dict, grid: Any, seed: int) -> None:
    grammar = ImageGrammar(SMALL, DIGITS, STAR, GrammarOptions(**options))
    rules = reference.ImageRules(**options)
    rng = np.random.default_rng(seed)
    state, ids = grammar.start([[]], [grid]), []
    for _ in range(60):
        allowed = reference.allowed_next(ids, SMALL, DIGITS, STAR, rules, grid)
        mask = grammar.mask(state)[0]
        assert torch.equal(mask, reference.padded_mask(allowed, SMALL)), (ids, allowed)
        # Structure is rare among the ids; without a thumb on the scale a walk would see little but text.
        rare = [token for token in allowed if token >= SMALL.text_size and rng.random() < 0.5]
        ids.append(int(rng.choice(sorted(rare or allowed))))
        state = grammar.advance(state, torch.tensor(ids[-1:]))
