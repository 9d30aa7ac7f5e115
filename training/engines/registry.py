"""Engines by name. A dotted path to a class of the user's own is accepted in place of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.registry import find_class
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.contracts.engine import Engine

ENGINES = {
    "megatron": "training.engines.megatron.engine.MegatronEngine",
    "deepspeed": "training.engines.deepspeed.engine.DeepSpeedEngine",
    "replicated": "training.engines.replicated.ReplicatedEngine",
}


def make_engine(config: TrainConfig, objective: Any) -> Engine:
    """The engine that the configuration names, else the objective's own."""
    name = config.engine or objective.engine
    engine_class = find_class("engine", name, ENGINES, "engine")
    engine: Engine = engine_class(config, objective)
    return engine
