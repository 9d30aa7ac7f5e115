"""Training losses of the tokenizer. Each term is a plain function; `ReconstructionTerm` is where others join."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from model.vision_tokenizer.loss_config import LossWeightsConfig
from model.vision_tokenizer.quantizer import Quantized


class ReconstructionTerm(Protocol):
    """A further term on images and reconstructions [B, 3, H, W]: returns a scalar."""

    def __call__(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor: ...


def pixel_weights(images: torch.Tensor, contrast: float) -> torch.Tensor:
    """Weights [B, 1, H, W] that raise pixels unlike their image's median colour, those of that colour have one.

    Pictures that are mostly one flat colour otherwise teach little but that colour.
    """
    median = images.flatten(2).median(dim=2).values[:, :, None, None]
    difference = (images - median).abs().amax(dim=1, keepdim=True).clamp(max=1.0)
    return 1.0 + contrast * difference


def entropy_terms(logits: torch.Tensor, config: LossWeightsConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, entropy of a choice, entropy of the batch's mean choice) in nats, of logits [N, n_embed].

    The loss wants each choice certain and all codes used alike (arXiv 2310.05737, section 3).
    """
    logits = logits / config.entropy_temperature
    log_probabilities = torch.log_softmax(logits, dim=-1)
    probabilities = log_probabilities.exp()
    of_choice = -(probabilities * log_probabilities).sum(dim=-1).mean()
    mean = probabilities.mean(dim=0)
    of_batch = -(mean * torch.log(mean.clamp_min(1e-12))).sum()
    return config.sample_entropy * of_choice - config.batch_entropy * of_batch, of_choice, of_batch


def tokenizer_loss(
    images: torch.Tensor,
    reconstructions: torch.Tensor,
    quantized: Quantized | None,
    config: LossWeightsConfig,
    extra_terms: Mapping[str, tuple[float, ReconstructionTerm]] | None = None,
    mean_weight: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum and each term unweighted. `quantized` is None while training without the quantizer.

    images, reconstructions: [B, 3, H, W] in [-1, 1]; `extra_terms` maps a name to (weight, term). `mean_weight` is that
    of the pixels of the whole batch that these images are a part of; None: they are all of it.
    """
    weights = pixel_weights(images, config.contrast) if config.contrast else None
    if weights is not None:
        weights = weights / (weights.mean() if mean_weight is None else mean_weight)
    error = reconstructions - images

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.mean() if weights is None else (weights * values).mean()

    terms = {"l1": mean(error.abs()), "l2": mean(error.square())}
    total = config.l1 * terms["l1"] + config.l2 * terms["l2"]
    if quantized is not None:
        terms["quantization"] = quantized.loss
        total = total + config.quantization * quantized.loss
        if config.entropy:
            terms["entropy"], terms["choice_entropy"], terms["batch_entropy"] = entropy_terms(quantized.logits, config)
            total = total + config.entropy * terms["entropy"]
    for name, (weight, term) in (extra_terms or {}).items():
        terms[name] = term(images, reconstructions)
        total = total + weight * terms[name]
    return total, terms


def latent_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean squared distance, on the unit sphere, of latents [B, C, h, w]: 0 for the same directions, 2 for unrelated ones.

    Asked of a window encoded alone and within its image it makes codes depend less on what lies around them. Latents that
    keep to a transformation of the image are easier to model: EQ-VAE (arXiv 2502.09509) asks it of scale and rotation.
    """
    difference = torch.nn.functional.normalize(one, dim=1) - torch.nn.functional.normalize(other, dim=1)
    return difference.square().sum(dim=1).mean()


def psnr_db(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over all pixels, both in [-1, 1] (reconstructions clamped)."""
    error = (reconstructions.clamp(-1, 1) - images).square().mean()
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))
