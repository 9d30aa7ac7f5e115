"""Objectives by name. A dotted path to a class of the user's own is accepted in place of a name."""

from __future__ import annotations

from typing import Any

from model.registry import checked_options, find_class, typed_options
from training.config import TrainConfig

KEY = "stage.objective"
OBJECTIVES = {
    "next_token": "training.objectives.next_token.NextToken",
    "dida": "training.objectives.dida.Dida",
    "diagonal": "training.objectives.diagonal.Diagonal",
    "grpo": "training.objectives.grpo.grpo.Grpo",
    "vision_tokenizer": "training.tokenizers.vision.VisionTokenizer",
    "text_tokenizer": "training.tokenizers.text.TextTokenizer",
}
# The `Options` of each, from modules that need no torch: commands that compute nothing ask for these only.
OPTIONS = {
    "next_token": "training.objectives.token_options.NextTokenOptions",
    "dida": "training.objectives.dida_options.DidaOptions",
    "diagonal": "training.objectives.copy_options.DiagonalOptions",
    "grpo": "training.objectives.grpo.grpo_options.GrpoOptions",
    "vision_tokenizer": "training.tokenizers.tokenizer_options.VisionTokenizerOptions",
    "text_tokenizer": "training.tokenizers.tokenizer_options.TextTokenizerOptions",
}


def options_class(name: str) -> Any:
    """The dataclass of an objective's keys; of a class of the user's own it is the member `Options`."""
    found = find_class("objective", name, OPTIONS, f"{KEY}.name")
    return found if name in OPTIONS else found.Options


def options_of(config: TrainConfig) -> Any:
    """The typed options of the stage's objective, not validated. Raises `UserError` for a key that it does not own."""
    name, values = config.stage.objective_name, config.stage.objective_options
    return typed_options(options_class(name), values, KEY, f"the objective {name}")


def make_objective(config: TrainConfig) -> Any:
    """The objective of a stage with its typed, validated options."""
    name, values = config.stage.objective_name, config.stage.objective_options
    objective_class = find_class("objective", name, OBJECTIVES, f"{KEY}.name")
    options = checked_options(objective_class.Options, values, KEY, f"the objective {name}")
    return objective_class(config, options)
