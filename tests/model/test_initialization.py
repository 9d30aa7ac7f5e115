"""Initial weights: a function of (seed, name), whatever part is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.parallel import initialization
from model.parallel.initialization import initial_rows, standard_deviation

SHAPE = (97, 8)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 96), length=st.integers(1, 97), block_elements=st.sampled_from([8, 80, 1 << 24]))
def test_any_slice_is_the_slice_of_the_whole(start: int, length: int, block_elements: int) -> None:
    stop = min(start + length, 97)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "_BLOCK_ELEMENTS", block_elements)
        whole = initial_rows("some.weight", SHAPE, 0.02, 5, 0, 97)
        assert torch.equal(initial_rows("some.weight", SHAPE, 0.02, 5, start, stop), whole[start:stop])


def test_seed_and_name_decide() -> None:
    first = initial_rows("a.weight", SHAPE, 0.02, 1, 0, 97)
    assert torch.equal(first, initial_rows("a.weight", SHAPE, 0.02, 1, 0, 97))
    assert not torch.equal(first, initial_rows("b.weight", SHAPE, 0.02, 1, 0, 97))
    assert not torch.equal(first, initial_rows("a.weight", SHAPE, 0.02, 2, 0, 97))


@pytest.mark.usefixtures("single_process")
def test_the_model_has_the_documented_deviations() -> None:
    from model.backbone.transformer import build_model
    from model.parallel.sharding import logical_parameters

    config = ModelConfig(num_layers=2, init_std=0.05)
    model = build_model(config, seed=3)
    logical = logical_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.05 / math.sqrt(4) if residual else 0.05
        assert standard_deviation(logical[name].name, config) == expected
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert parameter.mean().item() == pytest.approx(0.0, abs=expected / 20), name
        whole = initial_rows(logical[name].name, tuple(parameter.shape), expected, 3, 0, parameter.shape[0])
        assert torch.equal(parameter.detach(), whole), name
