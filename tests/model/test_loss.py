"""Cross entropy against torch's, without the ids that pad the vocabulary; sums against loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from model.backbone.token_losses import sum_losses, token_losses
from model.vocabulary import Vocabulary, VocabularyConfig

pytestmark = pytest.mark.usefixtures("single_process")
VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=30, reserved_size=16, visual_size=20, pad_multiple=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_of_the_vocabulary_takes_no_part(dtype: torch.dtype) -> None:
    assert VOCABULARY.size < VOCABULARY.padded_size
    source = torch.randn(1, 50, VOCABULARY.padded_size).to(dtype)
    source[..., VOCABULARY.size :] = 40.0  # would win if it counted
    labels = torch.randint(0, VOCABULARY.size, (1, 50))
    weights = torch.rand(50)
    logits = source.clone().requires_grad_()
    losses = token_losses(logits * 1.0, labels, VOCABULARY)
    (losses.view(-1) @ weights).backward()

    reference = source[..., : VOCABULARY.size].float().requires_grad_()
    expected = functional.cross_entropy(reference[0], labels[0], reduction="none")
    (expected @ weights).backward()
    torch.testing.assert_close(losses[0], expected)
    assert logits.grad is not None
    assert reference.grad is not None
    assert bool((logits.grad[..., VOCABULARY.size :] == 0).all())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        logits.grad[..., : VOCABULARY.size].float(), reference.grad, atol=tolerance, rtol=tolerance
    )


def test_sums_by_class_and_source_count_labels_with_weight_only() -> None:
    losses = torch.rand(200)
    weights = torch.where(torch.rand(200) < 0.4, 0.0, torch.rand(200) + 0.1)
    classes, sources = torch.randint(0, 3, (200,)), torch.randint(0, 2, (200,))
    sums = sum_losses(losses, weights, classes, sources, 4)
    assert sums.weighted.item() == pytest.approx(sum((losses * weights).tolist()), rel=1e-6)
    for kind in range(3):
        expected = sum(losses[i].item() for i in range(200) if weights[i] > 0 and classes[i] == kind)
        assert sums.by_class[kind].item() == pytest.approx(expected, rel=1e-6)
    for source in range(4):
        expected = sum(losses[i].item() for i in range(200) if weights[i] > 0 and sources[i] == source)
        assert sums.by_source[source].item() == pytest.approx(expected, rel=1e-6)
