"""The IBQ tokenizer as a torch module: images to codes and back."""

from __future__ import annotations

import torch
from torch import nn

from model.vision_tokenizer.autoencoder import Decoder, Encoder
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.quantizer import IndexBackpropagationQuantizer, Quantized


class IBQ(nn.Module):
    """Encoder, quantizer and decoder under the published state-dict keys."""

    def __init__(self, config: VisionTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = IndexBackpropagationQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def channels_last(self) -> IBQ:
        """Store convolution weights channels last, in place: faster on CPUs with normalisation by pixel."""
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, H/f, W/f], before quantization, of images [B, 3, H, W] in [-1, 1]."""
        encode = self._encode_patches if self.config.patch_local_encoder else self.encoder
        latents: torch.Tensor = self.quant_conv(encode(images))
        return latents

    def _encode_patches(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder on each patch of f x f pixels alone: a code is a function of its own pixels."""
        batch, channels, height, width = images.shape
        side = self.config.factor
        rows, columns = height // side, width // side
        grid = images.reshape(batch, channels, rows, side, columns, side)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)
        result: torch.Tensor = self.encoder(patches).reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)
        return result

    def reconstruct(self, values: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h*f, w*f] of quantized or continuous latents [B, embed_dim, h, w]."""
        result: torch.Tensor = self.decoder(self.post_quant_conv(values))
        return result

    def reconstruct_with_features(self, values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `reconstruct`, and the decoder's feature maps (see `Decoder.features`)."""
        return self.decoder.features(self.post_quant_conv(values))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        quantized = self.quantize(self.latents(images))
        return self.reconstruct(quantized.values), quantized

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, H/f, W/f] of images [B, 3, H, W] in [-1, 1]."""
        return self.quantize.encode(self.latents(images))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h*f, w*f], nominally in [-1, 1], of codes int64 [B, h, w]."""
        return self.reconstruct(self.quantize.lookup(codes))
