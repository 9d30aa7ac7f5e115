"""Options of the objectives on packed rows: `stage.objective.*`. Importing this module is cheap: no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import ClassVar

from model.errors import Problems
from training.config import TrainConfig, check_data, check_layout


@dataclass
class LossWeights:
    """Weight of each class of label in the loss (Emu3.5 Table 2: visual 0.5, text 1.0)."""

    text: float = 1.0  # text tokens
    visual: float = 0.5  # visual tokens
    structure: float = 1.0  # what frames images: begin, size, end of row and of image

    def validate(self, problems: Problems, key: str) -> None:
        for name, weight in asdict(self).items():
            problems.check(weight >= 0, f"{key}.{name}", f"must not be negative, got {weight}", f"{key}.{name}=1.0")
        problems.check(
            any(weight > 0 for weight in asdict(self).values()),
            key,
            "all weights are zero: nothing would be learned",
            f"{key}.text=1.0",
        )


@dataclass
class NextTokenOptions:
    """Cross entropy of the next token on packed rows."""

    fixed: ClassVar[tuple[str, ...]] = ("document_attention",)

    document_attention: str = "document"  # document: attention and positions restart; full: the whole row
    loss_weights: LossWeights = field(default_factory=LossWeights)

    def validate(self, problems: Problems, key: str) -> None:
        problems.check(
            self.document_attention in ("document", "full"),
            f"{key}.document_attention",
            f"unknown value {self.document_attention!r}",
            f"{key}.document_attention=document",
        )
        self.loss_weights.validate(problems, f"{key}.loss_weights")

    def validate_run(self, problems: Problems, config: TrainConfig) -> None:
        config.model.validate(problems, "model")
        problems.check(
            config.model.adapter.tokens == "all",
            "model.adapter.tokens",
            "there are no copies of images to adapt to",
            "model.adapter.tokens=all, or stage.objective.name=dida or diagonal",
        )
        check_data(config, problems)
        check_layout(config, problems)
