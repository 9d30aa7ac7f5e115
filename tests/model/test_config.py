"""Parameter counts: the published model, and the count of what is really built."""

from __future__ import annotations

import pytest

from model.config import ModelConfig, count_parameters
from model.errors import Problems, UserError
from model.vocabulary import VocabularyConfig


def emu35_34b() -> ModelConfig:
    return ModelConfig(
        name="emu35_34b",
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=25600,
        num_attention_heads=64,
        num_query_groups=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        max_sequence_length=32_768,
        dropout=0.1,
        dtype="bfloat16",
        vocabulary=VocabularyConfig(preset="emu35", pad_multiple=1024),
    )


def test_the_published_counts() -> None:
    counts = count_parameters(emu35_34b())
    assert counts == {
        "layers": 31_206_298_624,
        "embeddings": 2_897_162_240,
        "total": 34_103_460_864,
        # Of a layer, hidden 5120: 5120 * (8192 + 2 * 1024) + 8192 * 5120; 3 * 5120 * 25600; 2 * 5120 + 2 * 128.
        "attention": 64 * 94_371_840,
        "mlp": 64 * 393_216_000,
        "norms": 64 * 10_496 + 5120,
    }


@pytest.mark.usefixtures("single_process")
def test_the_published_model_is_built_with_exactly_these_parameters() -> None:
    from model.backbone.transformer import build_model

    model = build_model(emu35_34b(), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embeddings = sizes["embedding.word_embeddings.weight"] + sizes["output_layer.weight"]
    padded = count_parameters(emu35_34b(), padded=True)
    assert embeddings == padded["embeddings"]
    assert sum(sizes.values()) == padded["total"]
    assert sum(sizes.values()) - embeddings == 31_206_298_624
    padding_rows = 283_648 - 282_926  # the next multiple of 1,024
    assert sum(sizes.values()) - 2 * padding_rows * 5120 == 34_103_460_864


@pytest.mark.usefixtures("single_process")
def test_the_toy_model_is_counted_exactly() -> None:
    from model.backbone.transformer import build_model

    built = sum(parameter.numel() for parameter in build_model(ModelConfig(), device="meta").parameters())
    assert built == count_parameters(ModelConfig(), padded=True)["total"]


def test_all_problems_are_named_at_once() -> None:
    problems = Problems()
    ModelConfig(head_dim=31, num_query_groups=3, dropout=1.0, dtype="float8").validate(problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    for key in ("model.head_dim", "model.num_query_groups", "model.dropout", "model.dtype"):
        assert key in str(caught.value)
