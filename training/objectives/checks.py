"""What an objective asks of a stage's configuration, asked before anything starts. Imports no torch for ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import Problems, UserError
from training.config import StageConfig, TrainConfig, differences, results_of, translated, weights_of
from training.objectives.registry import KEY, options_class, options_of

ALWAYS_READ = ("name", "objective")


def check_objective(config: TrainConfig, problems: Problems) -> None:
    """Its options, what it asks of the rest of the configuration, and keys of the stage that it would not read."""
    options = options_of(config)
    if hasattr(options, "validate"):
        options.validate(problems, KEY)
    if hasattr(options, "validate_run"):
        options.validate_run(problems, config)
    check_keys_are_read(config, problems)


def check_keys_are_read(config: TrainConfig, problems: Problems) -> None:
    """A key of the stage that its objective does not read, set to something else than its default, is a mistake."""
    name = config.stage.objective_name
    stage_keys = getattr(options_class(name), "stage_keys", None)
    if stage_keys is None:  # it says nothing: it may read all of them
        return
    plain, given = asdict(StageConfig()), asdict(config.stage)
    for key in sorted(given.keys() - {*stage_keys, *ALWAYS_READ}):
        for line in differences(plain[key], given[key], f"stage.{key}"):
            changed = line.partition(":")[0]
            problems.add(changed, f"has no effect with the objective {name}", f"leave {changed} out")


def complete(objective: dict[str, Any]) -> dict[str, Any]:
    """`stage.objective` with every key of its objective. Raises `UserError` for unknown keys and wrong types."""
    config = TrainConfig(stage=StageConfig(objective=objective))
    return {"name": config.stage.objective_name} | asdict(options_of(config))


def in_todays_form(values: dict[str, Any]) -> dict[str, Any]:
    """The config dict of a checkpoint, whenever it was written; today's keys of its objective included."""
    today = translated(values)
    if today is values:
        return values
    return today | {"stage": today["stage"] | {"objective": complete(today["stage"]["objective"])}}


def check_goes_on(config: TrainConfig, manifest: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` where the stage cannot go on from its checkpoint `folder`, as far as both configurations say it."""
    now, saved = config.to_dict(), in_todays_form(manifest["config"])
    changed = differences(fixed_of(saved), fixed_of(now))
    if changed:
        raise UserError(
            "the checkpoint of this stage was made with another configuration",
            where=str(folder),
            got="; ".join(changed),
            fix="set these back, or choose another run_folder or stage.name",
        )
    changed = differences(results_of(saved), results_of(now))
    step, steps = int(manifest["step"]), config.stage.steps
    if step > steps or (step == steps and changed):
        raise UserError(
            f"this stage is already trained to step {step}",
            where=str(folder),
            got=f"stage.steps={steps}; " + "; ".join(changed),
            fix="set the configuration back, ask for more steps, or choose another run_folder or stage.name",
        )


def fixed_of(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config dict that may not change between a checkpoint and the run that resumes from it."""
    stage = values["stage"]
    objective = stage["objective"]
    names = ("name", *getattr(options_class(objective["name"]), "fixed", ()))
    return {
        "model": weights_of(values["model"]),
        "seed": values["seed"],
        "stage": {
            "sequence_length": stage["sequence_length"],
            "objective": {name: objective.get(name) for name in names},
        },
    }
