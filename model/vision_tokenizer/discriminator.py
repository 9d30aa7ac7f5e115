"""The adversary of the tokenizer's training: a PatchGAN, its losses, and the weight that keeps it in balance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.loss_config import AdversarialConfig

# Of taming-transformers' VQGAN, whose losses the published tokenizer uses.
GRADIENT_FLOOR = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4
INITIAL_STD = 0.02
LECAM_DECAY = 0.999  # of the logits' moving averages, as the open IBQ has it


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
        result: torch.Tensor = self.main(images)
        return result


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


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The tokenizer's share: its reconstructions should look real."""
    return -fake_logits.mean()


def non_saturating_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid (arXiv 1406.2661, section 3) of each image's mean logit, as the open IBQ has it."""
    return F.softplus(-fake_logits.flatten(1).mean(dim=1)).mean()


def lecam_regularisation(
    real_logits: torch.Tensor, fake_logits: torch.Tensor, real_average: float, fake_average: float
) -> torch.Tensor:
    """Keeps each side's logits from leaving the other side's moving average behind (arXiv 2104.03310, equation 4)."""
    real = F.relu(real_logits - fake_average).square().mean()
    return real + F.relu(real_average - fake_logits).square().mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Scalar without gradient: the ratio of the two losses' gradient norms at the decoder's last weights."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    result: torch.Tensor = (norms[0] / (norms[1] + GRADIENT_FLOOR)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
    return result


GENERATOR_LOSSES = {"hinge": hinge_generator_loss, "non_saturating": non_saturating_generator_loss}
