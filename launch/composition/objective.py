"""`stage.objective` while a configuration is composed: its keys are those of the objective that is chosen there.

`stage.objective=NAME` chooses one, as an option of a group is chosen: where the stage's preset names another, the new
one starts from its own defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from model.registry import find_class, known_keys
from training.config import TrainConfig
from training.objectives.checks import complete
from training.objectives.registry import KEY, OPTIONS, options_class

# Keys that were the stage's own before objectives had theirs.
FORMER_NAMES = {
    "stage.options": KEY,
    "stage.loss_weights": f"{KEY}.loss_weights",
    "stage.document_attention": f"{KEY}.document_attention",
}
FORM = "in a file: `objective: {name: next_token}` and its keys; on the command line: stage.objective=next_token"


def has_objective(schema: type) -> bool:
    return issubclass(schema, TrainConfig)


def named(override: Override) -> Override:
    """`stage.objective=NAME` as `stage.objective.name=NAME`; any other override as it is."""
    if override.key_or_group not in (KEY, KEY.replace(".", "/")) or override.is_delete():
        return override
    text, value = str(override.input_line), override.value()
    if not isinstance(value, str):
        return override
    return OverridesParser.create().parse_override(f"{KEY}.name={text.partition('=')[2]}")


def start_over_for_another(tree: DictConfig, given: Sequence[dict[str, Any]]) -> None:
    """Forget the options that the preset gives to its objective when the command line names another one."""
    chosen = OmegaConf.select(OmegaConf.merge({}, *given), f"{KEY}.name")
    if chosen is not None and chosen != tree.stage.objective.name:
        tree.stage.objective = {"name": chosen}


def fill_in(tree: DictConfig) -> None:
    """Every key of the objective, with its default where none is given. Raises `UserError` for keys of no effect."""
    values: Any = OmegaConf.to_container(tree.stage.objective)
    tree.stage.objective = complete(values)


def schema_of(tree: DictConfig) -> Any:
    """The dataclass of the keys of the objective in `tree`."""
    return options_class(tree.stage.objective.name)


def all_known_keys() -> list[str]:
    """Keys of our own objectives, for messages about a key that nobody knows."""
    classes = [find_class("objective", name, OPTIONS, KEY) for name in OPTIONS]
    return [f"{KEY}.{key}" for options in classes for key in known_keys(options)]
