"""Losses on features of another network: LPIPS-type distance, and distillation into the decoder.

The network comes from outside: a factory by its dotted path and a safetensors file with its weights. No weights are
shipped, so both losses are off unless configured.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model.errors import UserError
from model.vision_tokenizer.loss_config import DistillationConfig, PerceptualConfig

NORM_FLOOR = 1e-10


def load_network(path: str, weights: str | None, key: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A frozen network and the tensors of the file that are not its own. Raises `UserError` naming `key`."""
    module_name, _, name = path.rpartition(".")
    try:
        network = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("there is no such network", where=key, got=f"{path}: {error}") from None
    rest: dict[str, torch.Tensor] = {}
    if weights is not None:
        try:
            tensors = load_file(Path(weights))
        except (OSError, SafetensorError) as error:
            raise UserError("the network's weights cannot be read", where=weights, got=str(error)) from None
        expected = network.state_dict()
        problems = [
            f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing'}"
            for name, tensor in expected.items()
            if name not in tensors or tensors[name].shape != tensor.shape
        ]
        if problems:
            raise UserError("the weights are not of this network", where=weights, got="; ".join(problems))
        network.load_state_dict({name: tensors[name] for name in expected})
        rest = {name: tensor for name, tensor in tensors.items() if name not in expected}
    return network.eval().requires_grad_(False), rest


class PerceptualLoss(nn.Module):
    """Mean squared distance of channel-normalised features, summed over the backbone's maps.

    `channel_weights` [C] of each map weigh its channels (LPIPS learns them); by default all alike.
    """

    def __init__(self, backbone: nn.Module, channel_weights: list[torch.Tensor] | None = None):
        super().__init__()
        self.backbone = backbone
        self.channel_weights = nn.ParameterList(
            nn.Parameter(weight.flatten(), requires_grad=False) for weight in channel_weights or []
        )

    @classmethod
    def load(cls, config: PerceptualConfig, key: str) -> PerceptualLoss:
        backbone, rest = load_network(config.backbone, config.weights, key)
        linear = sorted((name for name in rest if name.startswith("lin")), key=lambda name: int(name[3]))
        return cls(backbone, [rest[name].abs() for name in linear])

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            targets = self.backbone(images)
        total = images.new_zeros(())
        for index, (found, target) in enumerate(zip(self.backbone(reconstructions), targets, strict=True)):
            difference = (_unit_channels(found) - _unit_channels(target)).square()
            if len(self.channel_weights):
                weights = self.channel_weights[index][None, :, None, None]
                total = total + (weights * difference).sum(dim=1).mean()
            else:
                total = total + difference.sum(dim=1).mean()
        return total


def _unit_channels(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + NORM_FLOOR).sqrt()


class Distillation(nn.Module):
    """One minus the cosine between the teacher's features and a projection of the decoder's, over all positions.

    The projection is trained with the tokenizer and thrown away after.
    """

    def __init__(self, teacher: nn.Module, decoder_channels: int, teacher_channels: int, seed: int):
        super().__init__()
        self.teacher = teacher
        self.projection = nn.Conv2d(decoder_channels, teacher_channels, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            draws = torch.randn(self.projection.weight.shape, generator=generator)
            self.projection.weight.copy_(draws * decoder_channels**-0.5)
            assert self.projection.bias is not None
            nn.init.zeros_(self.projection.bias)

    @classmethod
    def load(cls, config: DistillationConfig, decoder_channels: int, seed: int, key: str) -> Distillation:
        teacher, _ = load_network(config.teacher, config.weights, key)
        with torch.no_grad():
            teacher_channels = teacher(torch.zeros(1, 3, 64, 64)).shape[1]
        return cls(teacher, decoder_channels, teacher_channels, seed)

    def forward(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W]; features [B, C, h, w] of the decoder, brought to the teacher's size."""
        with torch.no_grad():
            target = self.teacher(images)
        resized = F.interpolate(features, target.shape[-2:], mode="bilinear", antialias=True)
        return 1.0 - F.cosine_similarity(self.projection(resized), target, dim=1).mean()


class VGG16Features(nn.Module):
    """The convolutions of VGG-16 under torchvision's keys; the five maps that LPIPS compares."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    # LPIPS's scaling of [-1, 1] to the statistics of ImageNet.
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block, widths in enumerate(self.WIDTHS):
            layers += [nn.MaxPool2d(2)] if block else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        shift = images.new_tensor(self.SHIFT)[:, None, None]
        scale = images.new_tensor(self.SCALE)[:, None, None]
        hidden, maps = (images - shift) / scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(hidden)
            hidden = layer(hidden)
        return [*maps, hidden]


def vgg16() -> nn.Module:
    """The backbone of LPIPS; its weights come from a file."""
    return VGG16Features()
