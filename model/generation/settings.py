"""How tokens are drawn, as configuration. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.errors import Problems


@dataclass
class PhaseSampling:
    """How one kind of token is drawn. Defaults: the plain distribution of the model."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k most likely ids; 0: all
    top_p: float = 1.0  # keep the smallest set of most likely ids with at least this probability

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.temperature >= 0, f"{key}.temperature", "must not be negative", f"{key}.temperature=0")
        problems.check(self.top_k >= 0, f"{key}.top_k", "must not be negative", f"{key}.top_k=0 (all)")
        problems.check(0 < self.top_p <= 1, f"{key}.top_p", "must be in (0, 1]", f"{key}.top_p=1.0")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass
class SamplingConfig:
    """Separate settings for text and for visual tokens (Emu3.5's "differential sampling")."""

    text: PhaseSampling = field(default_factory=PhaseSampling)
    image: PhaseSampling = field(default_factory=PhaseSampling)
    guidance_scale: float = 1.0  # classifier-free guidance of visual tokens; 1: off
    max_new_tokens: int = 512  # of one sequence, forced tokens included

    def validate(self, problems: Problems, key: str = "sampling") -> None:
        self.text.validate(problems, f"{key}.text")
        self.image.validate(problems, f"{key}.image")
        problems.check(self.guidance_scale >= 0, f"{key}.guidance_scale", "must not be negative")
        problems.check(self.max_new_tokens > 0, f"{key}.max_new_tokens", "must be positive")
