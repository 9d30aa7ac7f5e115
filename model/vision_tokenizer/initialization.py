"""Fresh weights of the tokenizer, and codes taken from latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.quantizer import IndexBackpropagationQuantizer

RESIDUAL_GAIN = 0.5  # of the last convolution of a residual block: the sum of the branches stays small
LATENTS_AT_ONCE = 4096  # that are compared with all codes: bounds the memory
OUTPUT_GAIN = 0.3  # of the decoder's last convolution: the first images are near grey


@torch.no_grad()
def initialize_weights(model: IBQ, seed: int) -> None:
    """Fill all weights in place, as a function of the seed. Biases are zero, so that inputs decide, not biases.

    Published weights replace all of this; the gains are our choice.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            fan_in = parameter[0].numel()
            gain = 1.0
            if name.endswith("conv2.weight"):
                gain = RESIDUAL_GAIN
            elif name == "decoder.conv_out.weight":
                gain = OUTPUT_GAIN
            elif name == "post_quant_conv.weight" and model.config.cosine_similarity:
                gain = fan_in**0.5  # its input has length one, not one per channel
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (gain * fan_in**-0.5))
        elif name == "quantize.embedding.weight":
            draws = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draws * parameter.shape[1] ** -0.5)
        elif name.endswith(".weight"):  # norms
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)


@torch.no_grad()
def codes_from_latents(latents: torch.Tensor, num_codes: int, num_rounds: int, seed: int) -> torch.Tensor:
    """Starting codes [num_codes, C] spread over latents [N, C]: k-means++ seeding, then k-means rounds.

    Rare latents get codes too: each seed is drawn with probability proportional to its squared distance from the
    seeds before it. With fewer distinct latents than codes, the rest are copies with a little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = latents.square().mean().sqrt()
    first = int(torch.randint(latents.shape[0], (1,), generator=generator))
    codes = _far_apart(latents, torch.full((latents.shape[0],), float("inf")), first, num_codes, generator)
    for _ in range(num_rounds):
        nearest = torch.cdist(latents, codes).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=num_codes)
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        codes = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codes)
    noise = torch.randn(codes.shape, generator=generator)
    return codes + 1e-3 * scale * noise


@torch.no_grad()
def codes_restarted(latents: torch.Tensor, quantizer: IndexBackpropagationQuantizer, seed: int) -> torch.Tensor:
    """The quantizer's codes [K, C], those that no latent [N, C] takes moved to latents far from the others.

    The seeding is that of `codes_from_latents`. Codes that are taken stay as they are.
    """
    codes = quantizer.embedding.weight.detach().cpu()
    compared = quantizer.project(codes)
    nearest = torch.cat([(some @ compared.t()).argmax(dim=1) for some in latents.split(LATENTS_AT_ONCE)])
    free = torch.bincount(nearest, minlength=codes.shape[0]) == 0
    result = codes.clone()
    if free.any():
        generator = torch.Generator().manual_seed(seed)
        distance = (latents - compared[nearest]).square().sum(dim=1)
        first = _draw_far(latents, distance, generator)
        result[free] = _far_apart(latents, distance, first, int(free.sum()), generator)
    return result


def _far_apart(
    latents: torch.Tensor, distance: torch.Tensor, chosen: int, num: int, generator: torch.Generator
) -> torch.Tensor:
    """k-means++ seeding: [num, C] of latents [N, C], the first of them `chosen`.

    `distance` [N] is squared and to the nearest code that there is already.
    """
    found = torch.empty(num, latents.shape[1])
    for index in range(num):
        found[index] = latents[chosen]
        distance = torch.minimum(distance, (latents - found[index]).square().sum(dim=1))
        chosen = _draw_far(latents, distance, generator)
    return found


def _draw_far(latents: torch.Tensor, distance: torch.Tensor, generator: torch.Generator) -> int:
    # A floor keeps the draw possible when every latent is already a code.
    floor = 1e-9 * latents.square().mean().sqrt()
    return int(torch.multinomial(distance + floor, 1, generator=generator))


@torch.no_grad()
def flat_latents(model: IBQ, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, embed_dim] of images [B, 3, H, W], as the quantizer compares them."""
    latents = model.latents(images).permute(0, 2, 3, 1)
    flat = latents.reshape(-1, latents.shape[-1])
    return F.normalize(flat, dim=-1) if model.config.cosine_similarity else flat
