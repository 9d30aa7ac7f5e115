"""Fresh weights of the tokenizer, and codes taken from latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.ibq import IBQ

RESIDUAL_GAIN = 0.5  # of the last convolution of a residual block: the sum of the branches stays small
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
    distance = torch.full((latents.shape[0],), float("inf"))
    chosen = int(torch.randint(latents.shape[0], (1,), generator=generator))
    codes = torch.empty(num_codes, latents.shape[1])
    for index in range(num_codes):
        codes[index] = latents[chosen]
        distance = torch.minimum(distance, (latents - codes[index]).square().sum(dim=1))
        # A floor keeps the draw possible when every latent is already a code.
        chosen = int(torch.multinomial(distance + 1e-9 * scale, 1, generator=generator))
    for _ in range(num_rounds):
        nearest = torch.cdist(latents, codes).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=num_codes)
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        codes = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codes)
    noise = torch.randn(codes.shape, generator=generator)
    return codes + 1e-3 * scale * noise


@torch.no_grad()
def flat_latents(model: IBQ, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, embed_dim] of images [B, 3, H, W], as the quantizer compares them."""
    latents = model.latents(images).permute(0, 2, 3, 1)
    flat = latents.reshape(-1, latents.shape[-1])
    return F.normalize(flat, dim=-1) if model.config.cosine_similarity else flat
