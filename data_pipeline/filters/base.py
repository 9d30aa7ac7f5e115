"""Quality filters: each gives a prepared sample a score, and a range says which scores stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_pipeline.filters.near_duplicates import NearDuplicates
from data_pipeline.filters.record import FilterRecord
from data_pipeline.kinds.base import PreparedSample
from data_pipeline.sources.samples import SampleError
from data_pipeline.storage.signatures import SIGNATURE_DTYPE
from model.errors import Problems, UserError
from model.registry import find_class


class Filter(Protocol):
    """A filter never changes a sample. `name` stands for it in reasons and reports.

    One that is quicker with many samples at once also has `score_batch(samples) -> list[float | None]`. The
    class takes the `options` of its configuration as arguments.
    """

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
    "sharpness": "data_pipeline.filters.appearance.Sharpness",
    "clipped_share": "data_pipeline.filters.appearance.ClippedShare",
    "repeated_frames": "data_pipeline.filters.appearance.RepeatedFrames",
    "duration": "data_pipeline.filters.appearance.Duration",
    "speechless_share": "data_pipeline.filters.appearance.SpeechlessShare",
    "printed_share": "data_pipeline.filters.printed.PrintedShare",
    "letter_share": "data_pipeline.filters.texts.LetterShare",
    "repeated_text": "data_pipeline.filters.texts.RepeatedText",
    "language": "data_pipeline.filters.texts.Language",
    "http_scorer": "data_pipeline.filters.scorer.HttpScorer",
}
NEAR_DUPLICATES = (
    "near_duplicates"  # has signatures in place of scores: what it takes is known when `pack` sees all shards
)
NAMES = (*FILTERS, NEAR_DUPLICATES)


def make_filter(name: str, options: Mapping[str, Any] | None = None) -> Filter:
    """Raises `UserError` for an unknown name, a class that is no filter, and options that it does not take."""
    found = find_class("filter", name, FILTERS, "filters.name")
    missing = [member for member in ("name", "unit", "score") if not hasattr(found, member)]
    if missing:
        raise UserError(
            "not a filter",
            where=name,
            expected="a class like data_pipeline.filters.base.Filter",
            got=f"without {', '.join(missing)}",
        )
    made: Filter = _with_options(found, name, options or {})
    return made


def _with_options(found: Any, name: str, options: Mapping[str, Any]) -> Any:
    try:
        return found(**options)
    except TypeError as error:
        raise UserError(
            "options that the filter does not take", where=f"filters: {name}", got=f"{dict(options)}: {error}"
        ) from error


@dataclass
class FilterConfig:
    """Keeps samples with minimum <= score <= maximum; a bound that is null does not bind. Without a score they stay."""

    name: str = ""  # one of NAMES, or the dotted path of a class like `Filter`
    minimum: float | None = None  # lowest score that stays
    maximum: float | None = None  # highest score that stays
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.name in NAMES or "." in self.name,
            f"{key}.name",
            f"unknown filter {self.name!r}",
            f"one of {', '.join(NAMES)}, or the dotted path of a class",
        )
        problems.check(
            self.minimum is not None or self.maximum is not None,
            key,
            "a filter needs a bound",
            f"{key}.minimum=... or {key}.maximum=...",
        )
        if self.name == NEAR_DUPLICATES:
            fine = self.minimum is None and self.maximum is not None and 0 <= self.maximum <= 1
            problems.check(
                fine, key, "takes a maximum in [0, 1] and no minimum", f"{{name: {NEAR_DUPLICATES}, maximum: 0.8}}"
            )


class Signatures:
    """The signatures of a shard's documents, in their order; `taken` gives them and begins anew."""

    def __init__(self, made: NearDuplicates, maximum: float):
        self.made, self.maximum = made, maximum
        self._found: list[np.ndarray] = []

    def note(self, sample: PreparedSample) -> None:
        self._found.append(self.made.signature(sample))

    def taken(self) -> np.ndarray:
        """`SIGNATURE_DTYPE` [documents]."""
        found, self._found = self._found, []
        return np.concatenate(found) if found else np.zeros(0, SIGNATURE_DTYPE)

    def describe(self) -> dict[str, Any]:
        return {"maximum": self.maximum} | self.made.describe()


def _signatures(configs: Sequence[FilterConfig]) -> Signatures | None:
    if len(configs) > 1:
        raise UserError("documents have one signature", where="filters", got=f"{len(configs)} times {NEAR_DUPLICATES}")
    for config in configs:
        assert config.maximum is not None, "validated"
        return Signatures(_with_options(NearDuplicates, config.name, config.options), config.maximum)
    return None


class FilterChain:
    """The filters of a configuration, in its order. `record` has what they said of the shard at hand.

    Those up to the first that scores batches are asked sample by sample (`check`), the others with many samples at once
    (`check_batch`). `duplicates` refuses nothing here; it has the signatures of what the others leave (`Signatures`), None
    where it is not configured.
    """

    def __init__(self, configs: Sequence[FilterConfig]):
        self.duplicates = _signatures([config for config in configs if config.name == NEAR_DUPLICATES])
        configs = [config for config in configs if config.name != NEAR_DUPLICATES]
        made = [(make_filter(config.name, config.options), config) for config in configs]
        first = next((place for place, (one, _) in enumerate(made) if hasattr(one, "score_batch")), len(made))
        self.single, self.batched = made[:first], made[first:]
        self.names = [one.name for one, _ in made]
        self.record = FilterRecord(self.names)

    def check(self, sample: PreparedSample) -> None:
        """Raises `SampleError("filter_<name>")` at the first filter that refuses the sample; `<name>` is the class's."""
        for quality, config in self.single:
            refusal = self._judge(quality, config, sample, quality.score(sample))
            if refusal is not None:
                raise refusal

    def check_batch(self, samples: Sequence[PreparedSample]) -> list[SampleError | None]:
        """Why each sample is refused by a filter behind those of `check`; None where it stays."""
        refusals: list[SampleError | None] = [None] * len(samples)
        for quality, config in self.batched:
            left = [place for place, refusal in enumerate(refusals) if refusal is None]
            asked = [samples[place] for place in left]
            batch = getattr(quality, "score_batch", None)
            scores = batch(asked) if batch is not None and asked else [quality.score(sample) for sample in asked]
            for place, sample, score in zip(left, asked, scores, strict=True):
                refusals[place] = self._judge(quality, config, sample, score)
        return refusals

    def _judge(
        self, quality: Filter, config: FilterConfig, sample: PreparedSample, score: float | None
    ) -> SampleError | None:
        if score is None:
            return None
        too_low = config.minimum is not None and score < config.minimum
        too_high = config.maximum is not None and score > config.maximum
        self.record.note(quality.name, quality.unit, config.minimum, config.maximum, sample, score)
        refused = too_low or too_high
        return SampleError(f"filter_{quality.name}", f"{score:.4g} {quality.unit}") if refused else None
