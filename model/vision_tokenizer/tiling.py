"""Large images in tiles, so that memory does not grow with them.

A tile is computed with a margin of its surroundings. Where the network sees no farther than the margin, the result is
that of the whole image: with `norm_scope: pixel` and without attention, `exact_margin` says how far that is. The
published structure has attention and normalises over the whole picture, so no margin is enough: tiles then differ a
little in tone, and decoded tiles are blended over their margins, which leaves no edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.vision_tokenizer.autoencoder import has_attention
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ

DEFAULT_MARGIN = 8  # codes, where no margin is exact


@dataclass(frozen=True)
class Span:
    """Of one side, in codes: the tile [start, stop) and what is computed for it [outer_start, outer_stop)."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """Tiles of at most `tile` codes that cover `length`, nearly equal, each with its margin inside the image."""
    count = -(-length // tile)
    bounds = [round(index * length / count) for index in range(count + 1)]
    return [
        Span(start, stop, max(0, start - margin), min(length, stop + margin))
        for start, stop in itertools.pairwise(bounds)
    ]


def exact_margin(config: VisionTokenizerConfig) -> int | None:
    """Codes around a tile that decide its codes and its pixels; None when all of the image does."""
    levels = range(len(config.ch_mult))
    attends = config.mid_attention or any(has_attention(config, level) for level in levels)
    if attends or config.norm_scope != "pixel":
        return None
    encoder, decoder = _encoder_reach(config), _decoder_reach(config)
    return -(-max(encoder, decoder) // config.factor)


def _encoder_reach(config: VisionTokenizerConfig) -> int:
    """Pixels to one side of a code's own that it depends on."""
    kernels = config.encoder_kernel_sizes or [3] * len(config.ch_mult)
    reach, pixel = 1, 1  # conv_in; how many image pixels one pixel of the level is
    for level, kernel in enumerate(kernels):
        reach += 2 * config.num_res_blocks * (kernel // 2) * pixel
        if level < len(kernels) - 1:
            reach += 2 * pixel  # the stride-2 convolution looks at three pixels, to the right
            pixel *= 2
    return reach + (4 + 1) * (kernels[-1] // 2) * pixel  # two middle blocks, conv_out


def _decoder_reach(config: VisionTokenizerConfig) -> int:
    """Pixels around a pixel whose codes it depends on."""
    reach, pixel = 1, 1  # conv_out
    for level in range(len(config.ch_mult)):
        reach += 2 * (config.num_res_blocks + 1) * pixel
        if level < len(config.ch_mult) - 1:
            reach += 2 * pixel  # the convolution after the doubling, and the doubling's rounding
            pixel *= 2
    return reach + (4 + 1) * pixel  # two middle blocks, conv_in


def _tiles(height: int, width: int, tile: int, margin: int) -> Iterator[tuple[Span, Span]]:
    for row in spans(height, tile, margin):
        for column in spans(width, tile, margin):
            yield row, column


@torch.no_grad()
def encode_tiled(model: IBQ, images: torch.Tensor, tile: int, margin: int | None = None) -> torch.Tensor:
    """Codes int64 [B, H/f, W/f] of images [B, 3, H, W], `tile` codes a side at a time.

    `margin` in codes; by default the exact one, or `DEFAULT_MARGIN`.
    """
    factor = model.config.factor
    height, width = images.shape[2] // factor, images.shape[3] // factor
    if max(height, width) <= tile:
        return model.encode(images)
    codes = torch.empty(len(images), height, width, dtype=torch.int64, device=images.device)
    for row, column in _tiles(height, width, tile, _margin(model.config, margin)):
        part = images[
            :,
            :,
            row.outer_start * factor : row.outer_stop * factor,
            column.outer_start * factor : column.outer_stop * factor,
        ]
        found = model.encode(part)
        codes[:, row.start : row.stop, column.start : column.stop] = found[
            :,
            row.start - row.outer_start : row.stop - row.outer_start,
            column.start - column.outer_start : column.stop - column.outer_start,
        ]
    return codes


@torch.no_grad()
def decode_tiled(model: IBQ, codes: torch.Tensor, tile: int, margin: int | None = None) -> torch.Tensor:
    """Images [B, 3, h*f, w*f] of codes int64 [B, h, w], `tile` codes a side at a time.

    Exact where a margin can be; otherwise neighbouring tiles are blended linearly over both their margins.
    """
    if max(codes.shape[1:]) <= tile:
        return model.decode(codes)
    factor = model.config.factor
    blends = exact_margin(model.config) is None
    margin = _margin(model.config, margin)
    height, width = codes.shape[1] * factor, codes.shape[2] * factor
    dtype = model.quantize.embedding.weight.dtype
    images = torch.zeros(len(codes), model.config.out_ch, height, width, dtype=dtype, device=codes.device)
    total = torch.zeros(height, width, dtype=dtype, device=codes.device)
    for row, column in _tiles(codes.shape[1], codes.shape[2], tile, margin):
        part = model.decode(codes[:, row.outer_start : row.outer_stop, column.outer_start : column.outer_stop])
        rows, columns = (_weights(span, factor, blends).to(part) for span in (row, column))
        weight = rows[:, None] * columns[None]
        place = (
            slice(row.outer_start * factor, row.outer_stop * factor),
            slice(column.outer_start * factor, column.outer_stop * factor),
        )
        images[:, :, *place] += part * weight
        total[place] += weight
    return images / total


def _margin(config: VisionTokenizerConfig, margin: int | None) -> int:
    exact = exact_margin(config)
    return margin if margin is not None else DEFAULT_MARGIN if exact is None else exact


def _weights(span: Span, factor: int, blends: bool) -> torch.Tensor:
    """Of the pixels of a tile with its margins: one inside; falling to zero, or zero, towards other tiles."""
    position = torch.arange(span.outer_start * factor, span.outer_stop * factor) + 0.5
    if not blends:
        inside = (position > span.start * factor) & (position < span.stop * factor)
        return inside.float()
    weight = torch.ones(len(position))
    for width, distance in (
        (span.start - span.outer_start, position - span.outer_start * factor),
        (span.outer_stop - span.stop, span.outer_stop * factor - position),
    ):
        if width:  # the ramp spans the margin on both sides of the border
            weight = weight * (distance / (2 * width * factor)).clamp(max=1.0)
    return weight
