"""Options of the objectives that train tokenizers: `stage.objective.*`. Importing this module is cheap: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from data_pipeline.kinds.named_parts import PartsConfig
from data_pipeline.sources.patterns import find_shards
from model.durable import absent
from model.errors import Problems, UserError
from model.parallel.layout_rules import add_to
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.loss_config import (
    AdversarialConfig,
    DistillationConfig,
    LossWeightsConfig,
    PerceptualConfig,
)
from training.config import TrainConfig
from training.contracts.layout import ParallelLayout, Rows

RESTARTS_SHARE = 0.6  # of a stage's steps, within which codes restart: what is put anew has the rest to settle


@dataclass
class TextTokenizerOptions:
    """A SentencePiece model with byte fallback, trained on the texts of raw shards."""

    stage_keys: ClassVar[tuple[str, ...]] = ()  # it has no steps and no batches

    corpora: list[str] = field(default_factory=list)  # patterns of raw .tar shards
    size: int = 1024  # pieces, the 256 bytes among them
    character_coverage: float = 0.9995  # share of the characters that get pieces, if they fit
    max_bytes: int = 1 << 30  # of text; beyond it the rest of the corpora is not read
    template_copies: int = 200  # how often the chat template is counted
    extra_texts: list[str] = field(default_factory=list)  # trained on as well, before the corpora
    kinds: list[str] = field(default_factory=list)  # of samples, names or dotted paths; empty: all of the project's
    parts: PartsConfig = field(default_factory=PartsConfig)  # which files count, where captions stand

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            bool(self.corpora), f"{key}.corpora", "is required", f"{key}.corpora=['runs/demo/corpora/*/*.tar']"
        )
        problems.check(self.size > 300, f"{key}.size", "must exceed 300 (256 are bytes)")
        problems.check(0.9 <= self.character_coverage <= 1.0, f"{key}.character_coverage", "must be in [0.9, 1]")
        problems.check(self.max_bytes > 0, f"{key}.max_bytes", "must be positive")

    def missing_inputs(self, key: str) -> list[str]:
        return missing_shards({f"{key}.corpora": self.corpora})


def missing_shards(patterns: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong with the patterns of raw shards, by the key that names them."""
    found = []
    for key, own in patterns.items():
        try:
            find_shards(own, key)
        except UserError as error:
            found.append(f"{error.what} ({error.where}): {error.got}")
    return found


@dataclass
class ImageCorpus:
    """Shards to take images from: pictures of every kind of sample, and key frames of videos."""

    path: str = ""  # glob of tar shards
    weight: float = 1.0  # share of the training images
    max_images: int = 4000  # kept in memory; without streaming
    kinds: list[str] = field(default_factory=list)  # of samples, without streaming: names or dotted paths; empty: ours
    parts: PartsConfig = field(
        default_factory=PartsConfig
    )  # without streaming: which files count, where captions stand
    random_squares: int = 0  # take this many random squares of each picture instead of the whole of it


@dataclass
class View:
    """One size at which images are trained on. All images of a step have the same view."""

    area: int = 48 * 48  # pixels; sides are multiples of the factor, the aspect is kept
    share: float = 1.0  # of the steps
    crop: int = 0  # side of the squares cut out of an image, on a grid of this step; 0: the whole image
    crops_per_image: int = 1  # the squares with the largest spread of values


@dataclass
class ImageDataOptions:
    """The images that are trained on, and those that are held back."""

    corpora: dict[str, ImageCorpus] = field(default_factory=dict)  # by any name
    views: list[View] = field(default_factory=lambda: [View()])  # sizes at which images are trained on
    keyframe_seconds: float = 1.0  # of a video, from one picture taken to the next
    num_held_back: int = 64  # images, over all corpora, never trained on: the stage's figures come from them
    streaming: bool = False  # read images when they are needed instead of holding all in memory
    cache_bytes: int = 1 << 30  # streaming: of decoded images that are kept
    num_readers: int = 4  # streaming: threads that read and decode

    def validate(self, problems: Problems, key: str, factor: int) -> None:
        problems.check(bool(self.corpora), f"{key}.corpora", "no corpus given")
        problems.check(self.cache_bytes >= 0, f"{key}.cache_bytes", "must not be negative")
        problems.check(self.num_readers > 0, f"{key}.num_readers", "must be positive")
        problems.check(self.num_held_back > 0, f"{key}.num_held_back", "must be positive")
        for name, corpus in self.corpora.items():
            problems.check(corpus.weight > 0, f"{key}.corpora.{name}.weight", "must be positive")
            problems.check(corpus.max_images > 1, f"{key}.corpora.{name}.max_images", "must be above one")
        problems.check(bool(self.views), f"{key}.views", "no view given")
        for index, view in enumerate(self.views):
            where = f"{key}.views.{index}"
            problems.check(view.area >= factor**2, f"{where}.area", f"must be at least {factor} squared")
            problems.check(view.share > 0, f"{where}.share", "must be positive")
            problems.check(
                view.crop >= 0 and view.crop % factor == 0,
                f"{where}.crop",
                f"must be a multiple of {factor}",
                f"{where}.crop={factor}",
            )
            problems.check(view.crops_per_image > 0, f"{where}.crops_per_image", "must be positive")


@dataclass
class TermsConfig:
    """The terms of the loss beside the pixels', the quantizer's and the entropy."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def validate(self, problems: Problems, key: str, num_levels: int) -> None:
        self.perceptual.validate(problems, f"{key}.perceptual")
        self.adversarial.validate(problems, f"{key}.adversarial")
        self.distillation.validate(problems, f"{key}.distillation", num_levels)


@dataclass
class VisionTokenizerOptions:
    """An IBQ vision tokenizer, trained on the images of raw shards."""

    stage_keys: ClassVar[tuple[str, ...]] = (
        "steps",
        "global_batch_size",
        "micro_batch_size",
        "optimizer",
        "initialize_from",
    )

    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    losses: LossWeightsConfig = field(default_factory=LossWeightsConfig)
    terms: TermsConfig = field(default_factory=TermsConfig)
    data: ImageDataOptions = field(default_factory=ImageDataOptions)
    continuous_steps: int = 0  # first steps without the quantizer; then the codes start from latents
    restart_codes_every_steps: int = 0  # codes that no latent takes move to latents, until 60% of the steps; 0: never
    average_decay: float = 0.0  # of the moving average of the weights; 0: none is kept
    num_threads: int = 1  # of torch; small models gain nothing from more
    min_codebook_use: float = 0.01  # share of codes used on the held-back images, below which the stage fails

    def validate(self, problems: Problems, key: str) -> None:
        self.model.validate(problems, f"{key}.model")
        self.terms.validate(problems, f"{key}.terms", len(self.model.ch_mult))
        self.data.validate(problems, f"{key}.data", self.model.factor)
        problems.check(self.continuous_steps >= 0, f"{key}.continuous_steps", "must not be negative")
        every = self.restart_codes_every_steps
        problems.check(every >= 0, f"{key}.restart_codes_every_steps", "must not be negative")
        problems.check(0 <= self.average_decay < 1, f"{key}.average_decay", "must be in [0, 1)")
        problems.check(self.num_threads > 0, f"{key}.num_threads", "must be positive")
        problems.check(0 <= self.min_codebook_use <= 1, f"{key}.min_codebook_use", "must be in [0, 1]")

    def starts_codes(self, num_updates: int) -> bool:
        """The codes are put on latents before the step after `num_updates`."""
        return self.continuous_steps > 0 and num_updates == self.continuous_steps

    def restarts_codes(self, num_updates: int, num_steps: int) -> bool:
        """Codes that no latent takes are moved before the step after `num_updates` of a stage of `num_steps`."""
        every = self.restart_codes_every_steps
        last = RESTARTS_SHARE * num_steps
        return every > 0 and self.continuous_steps < num_updates <= last and num_updates % every == 0

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        stage, every = config.stage, self.restart_codes_every_steps
        if every > 0 and not any(self.restarts_codes(step, stage.steps) for step in range(0, stage.steps, every)):
            key = "stage.objective.restart_codes_every_steps"
            problems.add(
                key,
                f"has no effect: codes restart after stage.objective.continuous_steps={self.continuous_steps} and within "
                f"the first {RESTARTS_SHARE:.0%} of {stage.steps} steps",
                f"{key}=0",
            )
        rows = Rows(stage.sequence_length, stage.micro_batch_size, stage.global_batch_size)
        layout = ParallelLayout.of(config.parallel)
        add_to(problems, layout.problems({}, rows, engine=config.engine or "replicated"))

    def missing_inputs(self, key: str) -> list[str]:
        corpora = {f"{key}.data.corpora.{name}.path": [corpus.path] for name, corpus in self.data.corpora.items()}
        weights = {
            f"{key}.terms.{name}.weights": getattr(self.terms, name).weights for name in ("perceptual", "distillation")
        }
        return missing_shards(corpora) + absent(weights)
