"""Quality filters: each gives a prepared sample a score, and a range says which scores stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.kinds.base import PreparedSample
from data_pipeline.sources.samples import SampleError
from model.errors import Problems, UserError
from model.registry import find_class


class Filter(Protocol):
    """A filter never changes a sample. `name` is its name in configurations."""

    name: str
    unit: str

    def score(self, sample: PreparedSample) -> float | None:
        """The sample's score, None when the filter has nothing to say about such a sample."""
        ...


FILTERS = {
    "min_size": "data_pipeline.filters.basic.MinSize",
    "aspect_ratio": "data_pipeline.filters.basic.AspectRatio",
    "blank_image": "data_pipeline.filters.basic.BlankImage",
    "text_length": "data_pipeline.filters.basic.TextLength",
}


def make_filter(name: str) -> Filter:
    """Raises `UserError` for an unknown name, or a class that is no filter."""
    found = find_class("filter", name, FILTERS, "filters.name")
    missing = [member for member in ("name", "unit", "score") if not hasattr(found, member)]
    if missing:
        raise UserError(
            "not a filter",
            where=name,
            expected="a class like data_pipeline.filters.base.Filter",
            got=f"without {', '.join(missing)}",
        )
    made: Filter = found()
    return made


@dataclass
class FilterConfig:
    """Keeps samples with minimum <= score <= maximum; a bound that is null does not bind."""

    name: str = ""  # one of FILTERS, or the dotted path of a class like `Filter`
    minimum: float | None = None  # lowest score that stays
    maximum: float | None = None  # highest score that stays

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.name in FILTERS or "." in self.name,
            f"{key}.name",
            f"unknown filter {self.name!r}",
            f"one of {', '.join(FILTERS)}, or the dotted path of a class",
        )
        problems.check(
            self.minimum is not None or self.maximum is not None,
            key,
            "a filter needs a bound",
            f"{key}.minimum=... or {key}.maximum=...",
        )


class FilterChain:
    """The filters of a configuration, in its order."""

    def __init__(self, configs: Sequence[FilterConfig]):
        self.filters = [(make_filter(config.name), config) for config in configs]

    def check(self, sample: PreparedSample) -> None:
        """Raises `SampleError("filter_<name>")` at the first filter that refuses the sample; `<name>` is the class's."""
        for quality, config in self.filters:
            score = quality.score(sample)
            if score is None:
                continue
            too_low = config.minimum is not None and score < config.minimum
            too_high = config.maximum is not None and score > config.maximum
            if too_low or too_high:
                raise SampleError(f"filter_{quality.name}", f"{score:.4g} {quality.unit}")
