"""Typed configuration of the vision tokenizer's losses. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import Problems


@dataclass
class LossWeightsConfig:
    """Weights of the terms. Emu3.5 has not published its own; these are our choice."""

    l1: float = 1.0  # mean absolute difference of pixels
    l2: float = 1.0  # mean squared difference of pixels
    quantization: float = 1.0  # distance of latents and codes
    entropy: float = 0.0  # certain choices, even use of all codes
    sample_entropy: float = 1.0  # within the entropy term: certainty of each choice
    batch_entropy: float = 1.0  # within the entropy term: even use of all codes
    entropy_temperature: float = 1.0  # on the quantizer's logits
    consistency: float = 0.0  # a window encoded alone has the latents that it has within its image
    contrast: float = 0.0  # extra weight of pixels far from their image's median colour


@dataclass
class PerceptualConfig:
    """A distance between feature maps, as in LPIPS (arXiv 1801.03924). Weight 0: off."""

    weight: float = 0.0  # of this term; 0: off
    backbone: str = "model.vision_tokenizer.perceptual.vgg16"  # factory: () -> module, images to feature maps
    weights: str | None = None  # safetensors file: the backbone's keys, and lin0.weight, lin1.weight, ... per channel

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.weight >= 0, f"{key}.weight", "must not be negative")
        problems.check(
            self.weight == 0 or self.weights is not None,
            f"{key}.weights",
            "a perceptual loss needs the weights of its backbone",
            f"{key}.weights=FILE.safetensors",
        )


@dataclass
class DistillationConfig:
    """Features of a level of the decoder learn to predict a teacher's features of the image. Weight 0: off."""

    weight: float = 0.0  # of this term; 0: off
    teacher: str = ""  # dotted path of a factory: () -> module, images [B, 3, H, W] in [-1, 1] to [B, C, h, w]
    weights: str | None = None  # safetensors file of the teacher
    level: int = 1  # feature map of the decoder: 0 after the middle, then one a level, lowest resolution first

    def validate(self, problems: Problems, key: str, num_levels: int) -> None:
        problems.check(self.weight >= 0, f"{key}.weight", "must not be negative")
        problems.check(
            self.weight == 0 or bool(self.teacher),
            f"{key}.teacher",
            "names no teacher",
            f"{key}.teacher=package.module.function",
        )
        problems.check(0 <= self.level <= num_levels, f"{key}.level", f"must be in [0, {num_levels}]", f"{key}.level=1")


WEIGHTINGS = ("adaptive", "fixed")
GENERATORS = ("hinge", "non_saturating")


@dataclass
class AdversarialConfig:
    """Weight 0 trains without an adversary. Emu3.5 has not published its weight, start or sizes."""

    weight: float = 0.0  # of the adversarial term
    weighting: str = "adaptive"  # adaptive: times the ratio of gradient norms at the last layer; fixed: as it is
    generator: str = "hinge"  # hinge | non_saturating, the tokenizer's share; the discriminator's own is the hinge
    lecam_weight: float = 0.0  # of LeCam's regularisation of the discriminator (arXiv 2104.03310); 0: none
    start_step: int = 0  # optimizer steps before the adversary joins
    channels: int = 64  # of the discriminator's first level
    num_layers: int = 3  # stride-2 convolutions; each doubles the side of the patch that is judged
    learning_rate_ratio: float = 1.0  # the discriminator's learning rate / the tokenizer's

    def validate(self, problems: Problems, key: str) -> None:
        for name in ("weight", "start_step", "lecam_weight"):
            problems.check(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative")
        for name, choices in (("weighting", WEIGHTINGS), ("generator", GENERATORS)):
            value = getattr(self, name)
            known = f"choices are {', '.join(choices)}, got {value!r}"
            problems.check(value in choices, f"{key}.{name}", known, f"{key}.{name}={choices[0]}")
        for name in ("channels", "num_layers", "learning_rate_ratio"):
            problems.check(getattr(self, name) > 0, f"{key}.{name}", "must be positive")
