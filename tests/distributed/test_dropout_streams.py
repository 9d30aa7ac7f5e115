"""Who shares dropout masks: tensor-parallel ranks draw their own where heads or tokens are split, the same elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layout_runs import Trainer, train, train_config

from training.config import TrainConfig

NUM_LAYERS = 4


def dropout_of_one_step(config: TrainConfig) -> dict[str, list[torch.Tensor]]:
    """What dropout let through on this rank, in order of the calls.

    `attention`: its outputs where every value is 1 and all keys weigh the same, so that they show the mask alone.
    `embedding`: which elements are not zero. `layers`: their outputs.
    """
    trainer = Trainer(config)
    model = trainer.engine.model
    found: dict[str, list[torch.Tensor]] = {"attention": [], "embedding": [], "layers": []}

    def feed_ones(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *others = arguments
        return (torch.zeros_like(query), torch.zeros_like(key), torch.ones_like(value), *others)

    def keep(place: str) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            tensor = (output[0] if isinstance(output, tuple) else output).detach()
            found[place].append(tensor != 0 if place == "embedding" else tensor.clone())

        return hook

    model.embedding.register_forward_hook(keep("embedding"))
    for layer in model.decoder.layers:
        layer.register_forward_hook(keep("layers"))
        layer.self_attention.core_attention.register_forward_pre_hook(feed_ones)
        layer.self_attention.core_attention.register_forward_hook(keep("attention"))
    trainer.forward_backward(0)
    return found


@pytest.mark.parametrize("sequence", [True, False])
def test_masks_differ_inside_split_regions_and_agree_outside(pool: Any, sequence: bool) -> None:
    first, second = pool.run(dropout_of_one_step, train_config(dropout=0.2, tensor=2, sequence=sequence), ranks=2)
    assert len(first["attention"]) == len(first["layers"]) == NUM_LAYERS * len(first["embedding"])
    for mine, theirs in zip(first["attention"], second["attention"], strict=True):
        assert mine.shape == theirs.shape
        assert not torch.equal(mine, theirs), "each rank has heads of its own, hence masks of its own"
    for one, next_one in zip(first["attention"], first["attention"][1:], strict=False):
        assert not torch.equal(one, next_one), "the stream goes on from layer to layer"
    for place in ("embedding", "layers"):  # hidden dropout: ranks hold parts of the tokens, or all of them alike
        for mine, theirs in zip(first[place], second[place], strict=True):
            assert torch.equal(mine, theirs) != sequence, place


@pytest.mark.parametrize("sequence", [True, False])
def test_recomputation_draws_the_same_masks(pool: Any, sequence: bool) -> None:
    def results(recompute: str) -> list[Any]:
        config = train_config(dropout=0.2, tensor=2, sequence=sequence, recompute=recompute)
        return pool.run(train, config, 2, ranks=2)[0]

    expected = results("none")
    for recompute in ("selective", "full"):
        for result, want in zip(results(recompute), expected, strict=True):
            assert result.loss == pytest.approx(want.loss, rel=1e-6)
            assert result.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-5)
