"""Objectives by name. A dotted path to a class of the user's own is accepted in place of a name."""

from __future__ import annotations

from typing import Any

from model.registry import find_class, typed_options
from training.config import TrainConfig

OBJECTIVES = {
    "next_token": "training.objectives.next_token.NextToken",
    "vision_tokenizer": "training.tokenizers.vision.VisionTokenizer",
    "text_tokenizer": "training.tokenizers.text.TextTokenizer",
}


def make_objective(config: TrainConfig) -> Any:
    """The objective of a stage with its typed options. Raises `UserError` for a key that it does not own."""
    name = config.stage.objective
    objective_class = find_class("objective", name, OBJECTIVES, "stage.objective")
    options = typed_options(objective_class.Options, config.stage.options, "stage.options", f"the objective {name}")
    return objective_class(config, options)
