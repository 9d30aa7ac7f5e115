"""Index backpropagation quantization: every code gets gradient at every step (arXiv 2412.02692)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.vision_tokenizer.config import VisionTokenizerConfig


@dataclass
class Quantized:
    """Training output of the quantizer."""

    values: torch.Tensor  # [B, C, h, w]; the chosen codes, differentiable in latents and in every code
    codes: torch.Tensor  # int64 [B, h, w]
    loss: torch.Tensor  # scalar, published quantisation loss
    logits: torch.Tensor  # [B * h * w, n_embed]


class IndexBackpropagationQuantizer(nn.Module):
    """Nearest code by dot product (or cosine), with a straight-through one-hot over the full softmax."""

    def __init__(self, config: VisionTokenizerConfig):
        super().__init__()
        self.beta = config.beta
        self.cosine_similarity = config.cosine_similarity
        self.logit_scale = config.logit_scale
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [N, C] as they are compared: on the unit sphere with cosine similarity, else unchanged."""
        return F.normalize(vectors, dim=-1) if self.cosine_similarity else vectors

    def forward(self, latents: torch.Tensor) -> Quantized:
        """Quantize latents [B, C, h, w] for training."""
        batch, channels, height, width = latents.shape
        flat = self.project(latents.permute(0, 2, 3, 1).reshape(-1, channels))
        table = self.project(self.embedding.weight)
        logits = self.logit_scale * flat @ table.t()
        soft = torch.softmax(logits, dim=-1)
        codes = logits.argmax(dim=-1)
        hard = F.one_hot(codes, table.shape[0]).to(soft.dtype)
        # The value is the one-hot; the gradient is the softmax's, which reaches every code.
        chosen = (hard + (soft - soft.detach())) @ table
        plain = F.embedding(codes, table)
        loss = (
            (chosen - flat).square().mean()
            + (plain.detach() - flat).square().mean()
            + self.beta * (plain - flat.detach()).square().mean()
        )
        values = chosen.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return Quantized(values, codes.view(batch, height, width), loss, logits)

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, h, w] of latents [B, C, h, w]. The scale does not move the argmax."""
        batch, channels, height, width = latents.shape
        flat = self.project(latents.permute(0, 2, 3, 1).reshape(-1, channels))
        return (flat @ self.project(self.embedding.weight).t()).argmax(dim=-1).view(batch, height, width)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Values [B, C, h, w] of codes int64 [B, h, w]."""
        return self.project(self.embedding(codes)).permute(0, 3, 1, 2)
