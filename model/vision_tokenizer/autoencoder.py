"""VQGAN encoder and decoder with the published structure and state-dict keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.layers import AttnBlock, Downsample, Middle, Normalize, ResnetBlock, Upsample, convolution


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the config asks for it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        config: VisionTokenizerConfig,
        *,
        attention: bool,
        kernel_size: int = 3,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels, config, kernel_size) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(out_channels, config) for _ in range(num_blocks if attention else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


def has_attention(config: VisionTokenizerConfig, level: int) -> bool:
    return config.resolution // 2**level in config.attn_resolutions


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to latents [B, z_channels, H/f, W/f]."""

    def __init__(self, config: VisionTokenizerConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        kernels = config.encoder_kernel_sizes or [3] * len(widths)
        self.conv_in = convolution(config.in_channels, config.ch, config)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(
                widths[index - 1] if index else config.ch,
                width,
                config.num_res_blocks,
                config,
                attention=has_attention(config, index),
                kernel_size=kernels[index],
            )
            if index < len(widths) - 1:
                level.downsample = Downsample(width, config)
            self.down.append(level)
        self.mid = Middle(widths[-1], config, kernels[-1])
        self.norm_out = Normalize(widths[-1], config)
        self.conv_out = convolution(widths[-1], config.z_channels, config, kernels[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(images)
        for level in self.down:
            hidden = level(hidden)
        result: torch.Tensor = self.conv_out(F.silu(self.norm_out(self.mid(hidden))))
        return result


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] to images [B, 3, h*f, w*f], nominally in [-1, 1]."""

    def __init__(self, config: VisionTokenizerConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = convolution(config.z_channels, widths[-1], config)
        self.mid = Middle(widths[-1], config)
        levels: list[Level] = []
        previous = widths[-1]
        for index in reversed(range(len(widths))):
            level = Level(
                previous, widths[index], config.num_res_blocks + 1, config, attention=has_attention(config, index)
            )
            if index:
                level.upsample = Upsample(widths[index], config)
            previous = widths[index]
            levels.append(level)
        # Published keys count levels from the highest resolution, although the decoder runs from the lowest.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = Normalize(widths[0], config)
        self.conv_out = convolution(widths[0], config.out_ch, config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.features(latents)[0]

    def features(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The images, and the feature maps after the middle and after each level (lowest resolution first)."""
        hidden = self.mid(self.conv_in(latents))
        maps = [hidden]
        for level in reversed(self.up):
            hidden = level(hidden)
            maps.append(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden))), maps
