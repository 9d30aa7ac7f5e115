"""Loss and report of next-token prediction against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.vocabulary import TokenClass
from training.config import TrainConfig
from training.contracts.inputs import LocalInput
from training.objectives.next_token import CLASS_NAMES, NextToken

NUM_TOKENS, SOURCES = 200, ["first", "second", "third"]


class GivenScores:
    def __init__(self, log_probs: torch.Tensor):
        self.given = log_probs

    def log_probs(self, ids: torch.Tensor, allowed: object = None) -> torch.Tensor:
        return self.given

    def weighted_losses(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.dot(-self.given, weights), -self.given.detach()


def made(seed: int) -> tuple[NextToken, LocalInput, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    objective = NextToken(TrainConfig(), NextToken.Options())
    objective.source_names = SOURCES
    weights = torch.rand(NUM_TOKENS, generator=random) + 0.1
    weights[torch.rand(NUM_TOKENS, generator=random) < 0.4] = 0.0
    fields = {
        "class": torch.randint(0, len(TokenClass), (NUM_TOKENS,), generator=random),
        "source": torch.randint(0, 2, (NUM_TOKENS,), generator=random),
    }
    labels = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    return objective, LocalInput(labels, weights, fields), -torch.rand(NUM_TOKENS, generator=random)


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_sums_count_labels_with_weight_only(seed: int) -> None:
    objective, inputs, log_probs = made(seed)
    log_probs.requires_grad_()
    totals = torch.zeros(2 + len(TokenClass) + len(SOURCES), dtype=torch.float64)
    totals[0] = 50.0
    found = objective.loss(GivenScores(log_probs), inputs, totals)
    rows = list(zip((-log_probs).tolist(), inputs.weights.tolist(), strict=True))
    assert found.loss.item() == pytest.approx(sum(loss * weight for loss, weight in rows) / 50.0, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, log_probs)
    torch.testing.assert_close(gradient, -inputs.weights / 50.0)
    by_class, by_source = found.sums[1:].split([len(TokenClass), len(SOURCES)])
    for field, sums in (("class", by_class), ("source", by_source)):
        for kind in range(len(sums)):
            expected = sum(
                loss
                for (loss, weight), one in zip(rows, inputs.fields[field].tolist(), strict=True)
                if weight > 0 and one == kind
            )
            assert sums[kind].item() == pytest.approx(expected, rel=1e-6)


def test_the_report_names_classes_and_sources_that_have_labels() -> None:
    objective, _, _ = made(0)
    totals = np.array([4.0, 100.0, 2.0, 0.0, 3.0, 5.0, 0.0, 0.0])
    sums = np.array([8.0, 3.0, 0.0, 6.0, 10.0, 0.0, 0.0])
    result = objective.result(totals, sums, 0.5)
    assert (result.loss, result.gradient_norm, result.num_tokens, result.has_labels) == (2.0, 0.5, 100, True)
    assert result.metrics[f"loss_{CLASS_NAMES[0]}"] == 1.5
    assert f"loss_{CLASS_NAMES[1]}" not in result.metrics
    assert result.metrics["loss_by_source"] == {"first": 2.0}
    assert result.metrics["tokens_by_source"] == {"first": 5, "second": 0, "third": 0}


def test_without_weight_the_loss_is_zero_and_has_no_gradient() -> None:
    objective, inputs, log_probs = made(0)
    log_probs.requires_grad_()
    totals = torch.zeros(2 + len(TokenClass) + len(SOURCES), dtype=torch.float64)
    found = objective.loss(GivenScores(log_probs), inputs, totals)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert not log_probs.grad.any()
    assert not objective.result(totals.numpy(), found.sums.numpy(), 0.0).has_labels
