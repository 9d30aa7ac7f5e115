"""Choosing (c, alpha) of the metric path for a codebook: they are not portable from one codebook to another.

No model is needed: windows of codes from real images define a distribution whose denoiser is known exactly (the
posterior over the windows). What the sampler makes with it at the target number of steps shows what a path costs: the
share of windows that exist (joint structure) and the entropy of the codes (diversity). A large c is consistent early but
narrows the codes, a small one needs many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.generation.decoding_config import DenoiseConfig
from model.generation.denoise import Denoiser, denoise
from model.generation.paths import MetricPath

CANDIDATES = ((1.0, 0.9), (3.0, 0.9), (10.0, 0.9), (30.0, 0.9), (100.0, 0.9))
ENTROPY_FLOOR = 0.98  # of the entropy of the data's codes
MAX_WINDOWS, MAX_IMAGES = 1024, 1024
ELEMENTS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Candidate:
    """What one (c, alpha) gives."""

    c: float
    alpha: float
    consistency: float  # share of sampled windows that are windows of the data
    entropy_ratio: float  # of the sampled codes, to that of the data's windows


def calibrate_path(
    windows: torch.Tensor,
    codebook: torch.Tensor,
    steps: int,
    candidates: Sequence[tuple[float, float]] = CANDIDATES,
    seed: int = 0,
) -> tuple[MetricPath, list[Candidate]]:
    """The most consistent path at `steps` steps whose entropy is at least `ENTROPY_FLOOR`, and the whole table.

    `windows` int64 [n, W]: neighbouring codes of teacher images, e.g. parts of rows. Where no candidate reaches the
    floor, the one of the highest entropy is taken.
    """
    assert windows.ndim == 2, "windows are [n, W]"
    assert len(windows), "calibration needs windows"
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator).to(windows.device)
    windows = windows[order[:MAX_WINDOWS]]
    table = [measure_path(windows, MetricPath(codebook, c, alpha), steps, seed) for c, alpha in candidates]
    fit = [one for one in table if one.entropy_ratio >= ENTROPY_FLOOR]
    best = max(fit, key=lambda one: one.consistency) if fit else max(table, key=lambda one: one.entropy_ratio)
    return MetricPath(codebook, best.c, best.alpha), table


def measure_path(windows: torch.Tensor, path: MetricPath, steps: int, seed: int = 0) -> Candidate:
    """Samples windows with the exact denoiser, without temperatures and corrector."""
    width, device = windows.shape[1], windows.device
    num_images = min(MAX_IMAGES, max(16, ELEMENTS_AT_ONCE // (width * path.num_codes)))
    generator = torch.Generator().manual_seed(seed)

    def numbers(step: int, count: int) -> torch.Tensor:
        return torch.rand((count, num_images, width), generator=generator, dtype=torch.float64).to(device)

    config = DenoiseConfig(steps=steps, end_temperature=1.0, last_temperature=1.0, corrector=1.0)
    sampled, _ = denoise(windows_denoiser(windows, path), path, config, numbers)
    known = {tuple(window) for window in windows.tolist()}
    consistency = sum(tuple(window) in known for window in sampled.tolist()) / num_images
    ratio = code_entropy(sampled) / max(code_entropy(windows), 1e-9)
    return Candidate(path.c, path.alpha, consistency, ratio)


def windows_denoiser(windows: torch.Tensor, path: MetricPath) -> Denoiser:
    """Log-probabilities of the clean code of each token if the clean image is one of `windows`, all alike."""
    codes, places = windows.unique(return_inverse=True)  # places: [n, W] into codes

    def logits(state: torch.Tensor, time: float) -> torch.Tensor:
        sharpness = float(path.sharpness(torch.tensor(time, dtype=torch.float64)))
        log_total = torch.cat(
            [(-sharpness * path.distances(some)).logsumexp(-1) for some in codes.split(4096)]
        )  # of each clean code
        result = torch.full((*state.shape, path.num_codes), -math.inf, device=state.device)
        distances = path.distances(state.reshape(-1))[:, codes].view(*state.shape, -1)
        evidence = -sharpness * distances - log_total
        columns = torch.arange(state.shape[1], device=state.device)
        log_posterior = torch.zeros((len(state), len(windows)), device=state.device)
        for column in columns.tolist():
            log_posterior += evidence[:, column][:, places[:, column]]
        posterior = log_posterior.softmax(-1)
        for column in columns.tolist():
            weights = torch.zeros((len(state), len(codes)), device=state.device)
            weights.index_add_(1, places[:, column], posterior)
            result[:, column, codes] = weights.log()
        return result

    return logits


def code_entropy(codes: torch.Tensor) -> float:
    """Of the codes' distribution, in nats."""
    _, counts = codes.unique(return_counts=True)
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log()).sum())


def told(table: Sequence[Candidate]) -> list[dict[str, Any]]:
    return [asdict(one) for one in table]
