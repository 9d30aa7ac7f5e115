"""How answers are decoded, as configuration. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from model.errors import Problems, UserError

STRATEGIES = ("ar", "dida", "diagonal", "sjd", "verified")


@dataclass
class DenoiseConfig:
    """How images are decoded in parallel. Temperatures multiply that of the visual tokens."""

    steps: int = 8  # forward passes of an image
    causal_steps: int = 0  # of the steps, the last: read as token by token, implausible codes drawn anew
    plausible: float = 0.1  # how likely a code must be there, as a share of the likeliest, to stay
    shift: float = 1.0  # of the times of the steps; below 1: finer at the end
    schedule: str = "linear"  # linear | cosine (of the mask path)
    temperature: float = 1.0  # of the first draws
    end_temperature: float = 0.5  # in the last `end_share` of the steps
    end_share: float = 0.2  # of the steps, at the end
    last_temperature: float = 0.3  # of the last step's draw, which is the image
    corrector: float = 0.8  # share of tokens that the predictor moves; the others are noised anew; 1: off
    corrector_share: float = 0.6  # of the steps, in the middle, that have the corrector
    guidance_until: float = 0.9  # time after which guidance is off

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(self.steps > 0, f"{key}.steps", "must be positive", f"{key}.steps=8")
        problems.check(
            0 <= self.causal_steps < max(1, self.steps),
            f"{key}.causal_steps",
            f"must be at least 0 and below {key}.steps={self.steps}",
            f"{key}.causal_steps={max(0, self.steps - 1)}",
        )
        problems.check(
            self.causal_steps > 0 or self.plausible == DenoiseConfig.plausible,
            f"{key}.plausible",
            f"has no effect with {key}.causal_steps=0",
            f"{key}.plausible={DenoiseConfig.plausible}, or {key}.causal_steps=1",
        )
        problems.check(self.shift > 0, f"{key}.shift", "must be positive", f"{key}.shift=1.0")
        problems.check(
            self.schedule in ("linear", "cosine"), f"{key}.schedule", f"unknown value {self.schedule!r}", "linear"
        )
        for name in ("temperature", "end_temperature", "last_temperature"):
            problems.check(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative", f"{key}.{name}=1.0")
        for name in ("plausible", "end_share", "corrector", "corrector_share", "guidance_until"):
            problems.check(0 <= getattr(self, name) <= 1, f"{key}.{name}", "must be in [0, 1]")

    def before_causal(self) -> DenoiseConfig:
        """The steps before the causal ones, alone."""
        return replace(self, steps=self.steps - self.causal_steps, causal_steps=0)

    def with_steps(self, steps: int) -> DenoiseConfig:
        """As many steps, of which the first at least is not causal."""
        return replace(self, steps=steps, causal_steps=min(self.causal_steps, steps - 1))


@dataclass
class DecodingConfig:
    """Which strategy decodes the images of an answer; text is always decoded token by token."""

    strategy: str = "ar"  # ar | dida | diagonal | sjd | verified
    dida: DenoiseConfig = field(default_factory=DenoiseConfig)  # read by dida and verified
    window: int = 16  # codes that sjd guesses at once

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.strategy in STRATEGIES,
            f"{key}.strategy",
            f"unknown value {self.strategy!r}",
            f"{key}.strategy={'|'.join(STRATEGIES)}",
        )
        self.dida.validate(problems, f"{key}.dida")
        problems.check(self.window > 0, f"{key}.window", "must be positive", f"{key}.window=16")

    def validate_read(self, problems: Problems, key: str) -> None:
        """Where one strategy decodes alone: keys of the others would change nothing."""
        readers = {"dida": ("dida", "verified"), "window": ("sjd",)}
        for name, strategies in readers.items():
            is_set = getattr(self, name) != getattr(DecodingConfig(), name)
            problems.check(
                self.strategy in strategies or not is_set,
                f"{key}.{name}",
                f"has no effect with {key}.strategy={self.strategy}",
                f"{key}.strategy={'|'.join(strategies)}",
            )


# The objective that a strategy needs the checkpoint to have been trained with; the others need none.
TRAINED_WITH = {"dida": "dida", "verified": "dida", "diagonal": "diagonal"}


def not_trained_for(strategy: str, objective: str) -> UserError:
    return UserError(
        f"the checkpoint was not trained for decoding.strategy={strategy}",
        expected=f"a checkpoint of a stage with the objective {objective}",
        fix=f"decoding.strategy=ar, or train a stage with stage.objective.name={objective}",
    )
