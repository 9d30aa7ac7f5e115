"""A world whose denoiser is known exactly: rows of cells, the colour of each cell given, one hidden texture a row.

`Rows` gives the posterior of a path's noise; what a sampler makes with it measures the sampler alone. Codes are
colour * TEXTURES + texture; the codebook has clusters by colour, with the numbers of a published study of samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from model.generation.decoding_config import DenoiseConfig
from model.generation.denoise import denoise
from model.generation.paths import DiscretePath, MetricPath

COLOURS, TEXTURES = 6, 4
CODES = COLOURS * TEXTURES


def clustered_codebook() -> torch.Tensor:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(COLOURS, 8))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = np.repeat(centres, TEXTURES, 0) + 0.35 * rng.normal(size=(CODES, 8)) / np.sqrt(8) * 1.5
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def likelihood(path: DiscretePath, time: float) -> torch.Tensor:
    """float64 [state, clean code], written down from the definitions and not with the path's own code."""
    if isinstance(path, MetricPath):
        vectors = path.codebook.double()
        distances = (vectors[:, None] - vectors[None]).square().sum(-1)
        return torch.softmax(-path.c * (time / (1 - time)) ** path.alpha * distances, dim=0)
    if path.name == "mask":
        return torch.cat((torch.eye(CODES) * time, torch.full((1, CODES), 1 - time))).double()
    return (torch.eye(CODES) * time + (1 - time) / CODES).double()


@dataclass
class Rows:
    """B images of `rows_an_image` rows of `width` cells."""

    width: int
    num_images: int
    rows_an_image: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_images, self.rows_an_image * self.width)
        self.colours = torch.randint(COLOURS, shape, generator=self.generator)

    def numbers(self, step: int, count: int) -> torch.Tensor:
        return torch.rand((count, *self.colours.shape), generator=self.generator, dtype=torch.float64)

    def denoiser(self, path: DiscretePath) -> Callable[[torch.Tensor, float], torch.Tensor]:
        textures = torch.arange(TEXTURES)

        def logits(state: torch.Tensor, time: float) -> torch.Tensor:
            table = likelihood(path, time).clamp_min(1e-300).log()
            candidates = self.colours[..., None] * TEXTURES + textures  # [B, N, textures]
            evidence = table[state[..., None], candidates].unflatten(1, (self.rows_an_image, self.width)).sum(2)
            posterior = evidence.repeat_interleave(self.width, 1)  # [B, N, textures]
            result = torch.full((*state.shape, CODES), -math.inf, dtype=torch.float64)
            return result.scatter_(-1, candidates, posterior)

        return logits

    def sample(self, path: DiscretePath, config: DenoiseConfig, temperature: float = 1.0) -> tuple[float, float]:
        """Share of rows with one texture in the right colours, and entropy of the textures (1: uniform)."""
        codes, _ = denoise(self.denoiser(path), path, config, self.numbers, temperature=temperature)
        textures = (codes % TEXTURES).unflatten(1, (self.rows_an_image, self.width))
        coloured = (codes // TEXTURES == self.colours).unflatten(1, (self.rows_an_image, self.width))
        consistent = ((textures == textures[..., :1]) & coloured).all(-1)
        counts = torch.bincount(textures[..., 0].flatten(), minlength=TEXTURES).double()
        shares = counts / counts.sum()
        return float(consistent.double().mean()), float(
            -(shares * shares.clamp_min(1e-12).log()).sum() / math.log(TEXTURES)
        )
