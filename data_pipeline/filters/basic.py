"""Filters that need no model."""

from __future__ import annotations

from data_pipeline.kinds.base import PreparedSample


class MinSize:
    """The shorter side of the smallest picture as it is in its file."""

    name = "min_size"
    unit = "pixels"

    def score(self, sample: PreparedSample) -> float | None:
        return min((min(picture.original_size) for picture in sample.pictures), default=None)


class AspectRatio:
    """The longer side over the shorter one, of the most elongated picture."""

    name = "aspect_ratio"
    unit = "longer side / shorter side"

    def score(self, sample: PreparedSample) -> float | None:
        sizes = [picture.original_size for picture in sample.pictures]
        return max((max(size) / min(size) for size in sizes), default=None)


class BlankImage:
    """How much the pixels of the emptiest picture vary: 0 for a picture of one colour."""

    name = "blank_image"
    unit = "standard deviation of 255"

    def score(self, sample: PreparedSample) -> float | None:
        spreads = [picture.pixels.std(axis=(0, 1)).max() for picture in sample.pictures]
        return float(min(spreads)) if spreads else None


class TextLength:
    """The characters of all texts together."""

    name = "text_length"
    unit = "characters"

    def score(self, sample: PreparedSample) -> float | None:
        return float(sum(map(len, sample.texts)))
