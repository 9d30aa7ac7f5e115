"""Counts of parameters and floating-point operations: against torch's own counter and the reference's weights."""

from __future__ import annotations

import math

import pytest
import torch
from qwen3_checkpoints import NUM_IDS, config_of, transformers_model
from torch.utils.flop_counter import FlopCounterMode

from launch.inspection.contents import inspect_model
from model import reference
from model.config import ModelConfig, count_flops, count_parameters


@pytest.mark.parametrize("shape", [(48, 4, 2, 32), (24, 6, 1, 10)])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_flops_are_those_that_torch_counts(shape: tuple, num_tokens: int) -> None:
    config = config_of(*shape)
    weights = transformers_model(config).state_dict()
    sizes = reference.Sizes.from_config(config)
    with FlopCounterMode(display=False) as counter:
        reference.logits(weights.__getitem__, sizes, torch.zeros(num_tokens, dtype=torch.int64))
    assert counter.get_total_flops() == count_flops(config, [0, num_tokens], causal=False)["total"]


def test_flops_of_packed_documents_count_the_pairs_that_are_seen() -> None:
    config = config_of(48, 4, 2, 32)
    lengths = [3, 1, 6]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    pairs = int(((numbers[:, None] == numbers) & torch.ones(10, 10).tril().bool()).sum())
    flops = count_flops(config, [0, 3, 4, 10])
    # One multiplication-addition for each head, coordinate and pair, twice, in each of two layers.
    assert flops["attention_scores"] == 2 * 2 * (2 * pairs * 4 * 32)
    assert flops["total"] == sum(value for name, value in flops.items() if name != "total")
    assert flops["logits"] == 2 * 10 * 48 * NUM_IDS
    assert count_flops(config, [0, 10], padded=True)["logits"] == 2 * 10 * 48 * 128


def test_parameters_by_class_are_those_of_the_weights() -> None:
    config = config_of(24, 6, 1, 10)
    weights = transformers_model(config).state_dict()

    def count(*words: str) -> int:
        return sum(math.prod(w.shape) for n, w in weights.items() if any(word in n for word in words))

    assert count_parameters(config) == {
        "embeddings": count("embed_tokens", "lm_head"),
        "attention": count("_proj.weight") - count("mlp."),
        "mlp": count("mlp."),
        "norms": count("norm"),
        "layers": count("layers.", "model.norm"),
        "total": count(""),
    }


def test_inspect_shows_flops_with_their_convention() -> None:
    shown = inspect_model(ModelConfig())["flops_per_token"]
    assert "a multiplication and its addition count 2" in shown["convention"]
    # Of the toy: 2 * weights of the matrices, output included, and half of 2048 pairs a token.
    assert shown["attention_projections"] == 2 * 4 * (2 * 128 * 128 + 2 * 128 * 64)
    assert shown["attention_scores"] == round(4 * 4 * 128 * 2049 / 2)
    assert shown["document_tokens"] == 2048
