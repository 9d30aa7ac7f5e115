"""The adversary of the tokenizer's training: a PatchGAN, its hinge loss, and the weight that keeps it in balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.errors import Problems

# Of taming-transformers' VQGAN, whose losses the published tokenizer uses.
GRADIENT_FLOOR = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4
INITIAL_STD = 0.02


@dataclass
class AdversarialConfig:
    """Weight 0 trains without an adversary. Emu3.5 has not published its weight, start or sizes."""

    weight: float = 0.0  # of the adversarial term, on top of the adaptive weight
    start_step: int = 0  # optimizer steps before the adversary joins
    channels: int = 64
    num_layers: int = 3  # stride-2 convolutions; each doubles the side of the patch that is judged
    learning_rate_ratio: float = 1.0  # the discriminator's learning rate / the tokenizer's

    def validate(self, problems: Problems, key: str) -> None:
        for name in ("weight", "start_step"):
            problems.check(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative")
        for name in ("channels", "num_layers", "learning_rate_ratio"):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive")


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to one logit a patch [B, 1, h, w]: high where it looks real.

    Structure and keys are those of pix2pix's PatchGAN (arXiv 1611.07004, section 3.2.2). Its batch norms keep no
    running statistics: it is never used outside of training, and a refused step leaves no trace in it.
    """

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=1, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images)


@torch.no_grad()
def initialize_discriminator(model: PatchDiscriminator, seed: int) -> None:
    """Fill all weights in place, as a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * INITIAL_STD)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            draws = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(1.0 + INITIAL_STD * draws)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: real patches above 1, reconstructed ones below -1 cost nothing."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The tokenizer's share: its reconstructions should look real."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Scalar without gradient: the ratio of the two losses' gradient norms at the decoder's last weights."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + GRADIENT_FLOOR)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
