"""The typed configuration of `nextstate train` and its validation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.checkpoint.small_files import check_resolved, read_yaml
from model.config import ModelConfig
from model.errors import Problems, UserError
from model.parallel.layout_rules import add_to, divided_sizes
from model.registry import merged_into
from training.contracts import zero
from training.contracts.layout import ParallelLayout, Rows

SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class OptimizerConfig:
    """AdamW. The presets hold the published values (Emu3.5 Table 2; section 4.1.3 for SFT)."""

    learning_rate: float = 3e-4  # the highest, after the warm-up
    min_learning_rate: float = 0.0  # where the schedule ends
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of squared gradients
    epsilon: float = 1e-8  # added to the root of the squared gradients
    weight_decay: float = 0.1  # decoupled from the gradient, as AdamW has it
    gradient_clip: float = 1.0  # largest global norm that is applied unscaled; 0: no clipping
    schedule: str = "cosine"  # cosine | constant | linear
    warmup_steps: int = 0  # first steps, in which the rate rises linearly


@dataclass
class DatasetEntry:
    """One packed dataset of the mixture."""

    path: str = ""  # folder of packed rows
    weight: float = 1.0  # 0 leaves the dataset out
    max_epochs: float = 0.0  # a stage that would read its rows more often, earlier stages included, is refused; 0: any


@dataclass
class WeightChange:
    """Other weights from a step of the stage on; a dataset that is not named keeps the weight it had."""

    from_step: int = 0  # the first step with these weights, counted from 0
    weights: dict[str, float] = field(default_factory=dict)  # of datasets of the mixture, by name


@dataclass
class DataConfig:
    datasets: dict[str, DatasetEntry] = field(default_factory=dict)  # the mixture, by any name
    weight_changes: dict[str, WeightChange] = field(default_factory=dict)  # of the mixture, by any name
    prefetch_batches: int = 2  # batches read ahead

    def weights_by_step(self) -> list[tuple[int, dict[str, float]]]:
        """(first step, weights of all datasets from it on), the first of them from step 0."""
        weights = {name: entry.weight for name, entry in self.datasets.items()}
        found = [(0, weights)]
        for change in sorted(self.weight_changes.values(), key=lambda change: change.from_step):
            weights = weights | change.weights
            found.append((change.from_step, weights))
        return found

    def datasets_in_use(self) -> dict[str, DatasetEntry]:
        """Those with a weight at some time: 0 leaves a dataset out, which then need not exist."""
        phases = self.weights_by_step()
        return {
            name: entry for name, entry in self.datasets.items() if any(weights[name] != 0 for _, weights in phases)
        }


@dataclass
class StageConfig:
    """One stage of a curriculum: objective, data, batch, optimizer, what it starts from."""

    name: str = "pretrain_1"  # of its folder below run_folder
    steps: int = 100  # optimizer steps, skipped ones included
    sequence_length: int = 512  # tokens of a row
    global_batch_size: int = 8  # rows
    micro_batch_size: int = 4  # rows of one data-parallel rank in one forward pass
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: dict[str, str] = field(default_factory=dict)  # held-out packed datasets by any name: their folders
    initialize_from: str | None = None  # a stage folder or checkpoint folder; null: fresh weights
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "next_token"})  # and its own keys beside `name`

    @property
    def objective_name(self) -> str:
        return str(self.objective["name"])

    @property
    def objective_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.objective.items() if key != "name"}


@dataclass
class ParallelConfig:
    """How ranks are laid out. World size = tensor * pipeline * context * data."""

    tensor: int = 1  # ranks that share every layer
    pipeline: int = 1  # groups of ranks with some of the layers each
    context: int = 1  # ranks that share the tokens of a row
    data: int = 1  # replicas with rows of their own
    sequence: bool = True  # sequence parallel norms and residuals; has effect with tensor > 1
    distributed_optimizer: bool = True  # shard optimizer state over data-parallel ranks
    recompute: str = "none"  # none | selective (attention) | full (layers); less memory, more compute

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class ValidationConfig:
    """How often, and on how much, the sets of `stage.validation` are measured."""

    every_steps: int = 500  # from one measurement to the next; the last step is measured always
    num_rows: int = 24  # of each set


@dataclass
class CheckpointConfig:
    every_steps: int = 100  # from one checkpoint to the next
    keep: int = 2  # newest complete checkpoints kept; the final one always
    allow_data_change: bool = False  # resume although the data are not those of the checkpoint


@dataclass
class LoggingConfig:
    every_steps: int = 1  # from one line of metrics to the next
    wandb_mode: str = "offline"  # offline | online | disabled
    wandb_project: str = "nextstate"  # of Weights & Biases
    tensorboard: bool = False  # event files in the stage folder too


@dataclass
class ReliabilityConfig:
    """What the loop does with a bad step: skip it, then roll back and skip its data, then stop."""

    max_consecutive_skips: int = 3  # bad steps in a row before a rollback
    max_rollbacks: int = 2  # before the run gives up
    spike_factor: float = 0.0  # a gradient norm above this times the running median is skipped; 0: off
    hang_timeout_seconds: float = 600.0  # without progress, then the run is ended; 0: never


@dataclass
class CallbackEntry:
    """A callback of the user's own: a `training.callbacks.base.Callback`, made with `options` as arguments."""

    path: str = ""  # package.module.Class
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class


@dataclass
class TrainConfig:
    name: str = "default"  # of the run; part of the default run_folder
    run_folder: str = "runs/default"  # the stage writes below run_folder/stage.name
    seed: int = 1234  # of weights, data order and dropout
    engine: str | None = None  # megatron | deepspeed | package.module.Class; null: the objective's own
    model: ModelConfig = field(default_factory=ModelConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: zero.DeepSpeedConfig = field(default_factory=zero.DeepSpeedConfig)  # read by that engine
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    callbacks: dict[str, CallbackEntry] = field(default_factory=dict)  # the user's own, by any name
    preflight: bool = True  # refuse before the start what the plan says cannot work; false: start it all the same
    json: bool = False  # print one JSON object on stdout at the end

    @property
    def stage_folder(self) -> Path:
        return Path(self.run_folder) / self.stage.name

    def validate_common(self, problems: Problems) -> None:
        """What holds whatever the objective is; `training.stage.validate` asks for all of it."""
        _validate_stage(self, problems)
        _validate_optimizer(self.stage, problems)
        _validate_reliability(self, problems)
        _validate_deepspeed(self, problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; `from_dict` is its inverse."""
        return asdict(self)

    def fingerprint(self) -> str:
        """Hash of everything that decides the weights after the last step, the layout excepted.

        Two runs with one fingerprint train the same thing; where, with how many ranks, how often it is saved and
        logged does not count.
        """
        values = results_of(self.to_dict())
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Build the typed config; keys left out keep their defaults, unknown keys and wrong types are a `UserError`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(merged_into(TrainConfig, values))
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            "the configuration does not fit its schema",
            where=str(getattr(error, "full_key", "") or ""),
            got=first_line,
            fix="see `nextstate train --help` for the keys",
        ) from None
    assert isinstance(config, TrainConfig)
    return config


RECORDED = ("versions", "machine")  # sections of a written config that are no settings


def save_yaml(config: TrainConfig, path: Path, recorded: dict[str, dict[str, str]] | None = None) -> None:
    """Write the resolved config, and `recorded` (sections of `RECORDED`: what ran it, and where), atomically."""
    from omegaconf import OmegaConf

    from model.durable import replace_file

    values = config.to_dict() | (recorded or {})
    replace_file(path, OmegaConf.to_yaml(OmegaConf.create(values)))


def load_yaml(path: Path) -> TrainConfig:
    """Read what `save_yaml` wrote, which holds no reference to the environment."""
    values = read_yaml(Path(path), "the config file")
    for name in RECORDED:
        values.pop(name, None)
    check_resolved(values, str(path))
    return from_dict(translated(values))


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """`values` in today's form: `stage.objective` was a name, and its options had places of their own in the stage."""
    stage = values.get("stage")
    if not isinstance(stage, dict) or not isinstance(stage.get("objective"), str):
        return values
    moved = ("options", "loss_weights", "document_attention")
    kept = {key: value for key, value in stage.items() if key not in moved}
    if stage["objective"] == "next_token":  # it never read `options`, and the others read nothing but them
        own = {key: stage[key] for key in moved[1:] if key in stage}
    else:
        own = stage.get("options") or {}
    return values | {"stage": kept | {"objective": {"name": stage["objective"]} | own}}


def results_of(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config dict that decides the trained weights (paths and prefetching do not)."""
    stage = {name: value for name, value in values["stage"].items() if name not in ("data", "validation")}
    data = values["stage"]["data"]
    stage["weights"] = {name: entry["weight"] for name, entry in data["datasets"].items()}
    if data.get("weight_changes"):  # without any the fingerprint is that of older versions
        stage["weight_changes"] = data["weight_changes"]
    return {
        "model": weights_of(values["model"]),
        "seed": values["seed"],
        "stage": stage,
        "reliability": {name: value for name, value in values["reliability"].items() if name != "hang_timeout_seconds"},
    }


def weights_of(model: dict[str, Any]) -> dict[str, Any]:
    """A model's config dict; without adapters as it was before there were any, so that older runs go on."""
    adapter = {
        name: value for name, value in (model.get("adapter") or {}).items() if (name, value) != ("tokens", "all")
    }
    others = {name: value for name, value in model.items() if name != "adapter"}
    return others | {"adapter": adapter} if adapter.get("rank") else others


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Lines `dotted.key: old -> new` for every leaf in which two plain structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys(), key=str):
            dotted = f"{key}.{name}" if key else str(name)
            lines += differences(old.get(name), new.get(name), dotted)
        return lines
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def _validate_stage(config: TrainConfig, problems: Problems) -> None:
    stage = config.stage
    problems.check(bool(config.run_folder), "run_folder", "must not be empty", "run_folder=runs/demo")
    problems.check(0 <= config.seed < 2**63, "seed", "must be in [0, 2**63)", "seed=1234")
    problems.check(
        re.fullmatch(r"[\w][\w.-]*", stage.name) is not None,
        "stage.name",
        f"{stage.name!r} cannot name a folder",
        "stage.name=pretrain_1",
    )
    for name in ("steps", "sequence_length", "global_batch_size", "micro_batch_size"):
        problems.check(getattr(stage, name) > 0, f"stage.{name}", "must be positive", f"stage.{name}=1")
    problems.check(stage.initialize_from != "", "stage.initialize_from", "is empty", "stage.initialize_from=null")


def _validate_optimizer(stage: StageConfig, problems: Problems) -> None:
    optimizer, key = stage.optimizer, "stage.optimizer"
    problems.check(optimizer.learning_rate > 0, f"{key}.learning_rate", "must be positive", f"{key}.learning_rate=3e-4")
    problems.check(
        0 <= optimizer.min_learning_rate <= optimizer.learning_rate,
        f"{key}.min_learning_rate",
        f"must be in [0, learning_rate], got {optimizer.min_learning_rate}",
        f"{key}.min_learning_rate=0",
    )
    for name in ("beta1", "beta2"):
        problems.check(0 <= getattr(optimizer, name) < 1, f"{key}.{name}", "must be in [0, 1)", f"{key}.{name}=0.9")
    problems.check(optimizer.epsilon > 0, f"{key}.epsilon", "must be positive", f"{key}.epsilon=1e-8")
    for name in ("weight_decay", "gradient_clip"):
        problems.check(getattr(optimizer, name) >= 0, f"{key}.{name}", "must not be negative", f"{key}.{name}=0")
    problems.check(
        optimizer.schedule in SCHEDULES,
        f"{key}.schedule",
        f"unknown value {optimizer.schedule!r}",
        f"{key}.schedule={'|'.join(SCHEDULES)}",
    )
    problems.check(
        0 <= optimizer.warmup_steps <= stage.steps,
        f"{key}.warmup_steps",
        f"{optimizer.warmup_steps} is not in [0, stage.steps = {stage.steps}]",
        f"{key}.warmup_steps=0",
    )


def _validate_reliability(config: TrainConfig, problems: Problems) -> None:
    reliability, logging, checkpoint = config.reliability, config.logging, config.checkpoint
    for name in ("max_consecutive_skips", "max_rollbacks", "spike_factor", "hang_timeout_seconds"):
        value = getattr(reliability, name)
        problems.check(value >= 0, f"reliability.{name}", f"must not be negative, got {value}", f"reliability.{name}=0")
    problems.check(
        reliability.spike_factor == 0 or reliability.spike_factor > 1,
        "reliability.spike_factor",
        "must be above 1 (or 0: off), or ordinary steps would be skipped",
        "reliability.spike_factor=10",
    )
    problems.check(
        logging.wandb_mode in ("offline", "online", "disabled"),
        "logging.wandb_mode",
        f"unknown value {logging.wandb_mode!r}",
        "logging.wandb_mode=offline|online|disabled",
    )
    for key, value in (
        ("logging.every_steps", logging.every_steps),
        ("checkpoint.every_steps", checkpoint.every_steps),
        ("validation.every_steps", config.validation.every_steps),
        ("validation.num_rows", config.validation.num_rows),
        ("checkpoint.keep", checkpoint.keep),
    ):
        problems.check(value > 0, key, f"must be positive, got {value}", f"{key}=1")


def _validate_deepspeed(config: TrainConfig, problems: Problems) -> None:
    """Its section is refused where another engine would not read it."""
    if config.engine == "deepspeed":
        zero.check(config.deepspeed, problems)
        problems.check(
            config.parallel.distributed_optimizer,
            "parallel.distributed_optimizer",
            "every stage of ZeRO cuts the optimizer's state",
            "parallel.distributed_optimizer=true",
        )
        return
    for line in differences(asdict(zero.DeepSpeedConfig()), asdict(config.deepspeed), "deepspeed"):
        changed = line.partition(":")[0]
        problems.add(changed, f"has no effect with engine={config.engine or 'megatron'}", "engine=deepspeed")


def check_data(config: TrainConfig, problems: Problems) -> None:
    """Of an objective that reads packed rows."""
    data, key = config.stage.data, "stage.data"
    problems.check(
        bool(data.datasets),
        f"{key}.datasets",
        "no dataset is named",
        f"+{key}.datasets.mine.path=runs/demo/packed/pretrain_1/mine",
    )
    for name, entry in data.datasets.items():
        problems.check(bool(entry.path), f"{key}.datasets.{name}.path", "is empty", f"{key}.datasets.{name}.path=...")
        problems.check(
            entry.weight >= 0,
            f"{key}.datasets.{name}.weight",
            f"must not be negative, got {entry.weight}",
            f"{key}.datasets.{name}.weight=1.0",
        )
        problems.check(
            entry.max_epochs >= 0,
            f"{key}.datasets.{name}.max_epochs",
            f"must not be negative, got {entry.max_epochs}",
            f"{key}.datasets.{name}.max_epochs=4",
        )
    for first_step, weights in data.weights_by_step() if data.datasets else ():
        problems.check(
            any(weight != 0 for weight in weights.values()),
            f"{key}.datasets",
            f"every weight is 0 from step {first_step} on: nothing would be read",
            f"{key}.datasets.{next(iter(data.datasets))}.weight=1.0",
        )
    _check_weight_changes(config, f"{key}.weight_changes", problems)
    for name, path in config.stage.validation.items():
        problems.check(bool(path), f"stage.validation.{name}", "is empty", f"stage.validation.{name}=PATH")
    problems.check(
        data.prefetch_batches >= 0, f"{key}.prefetch_batches", "must not be negative", f"{key}.prefetch_batches=2"
    )
    problems.check(
        config.stage.sequence_length <= config.model.max_sequence_length,
        "stage.sequence_length",
        f"{config.stage.sequence_length} is above model.max_sequence_length ({config.model.max_sequence_length})",
        f"model.max_sequence_length={config.stage.sequence_length}",
    )


def _check_weight_changes(config: TrainConfig, key: str, problems: Problems) -> None:
    data, last = config.stage.data, config.stage.steps - 1
    steps = [change.from_step for change in data.weight_changes.values()]
    for name, change in data.weight_changes.items():
        problems.check(
            change.from_step > 0 and steps.count(change.from_step) == 1,
            f"{key}.{name}.from_step",
            f"must be above 0 and that of no other change, got {change.from_step}",
            f"{key}.{name}.from_step=1000",
        )
        problems.check(
            change.from_step <= last,
            f"{key}.{name}.from_step",
            f"{change.from_step} is behind the stage's last step ({last}): the change would never take effect",
            f"{key}.{name}.from_step={max(1, last)}",
        )
        problems.check(
            bool(change.weights), f"{key}.{name}.weights", "names no dataset", f"{key}.{name}.weights.NAME=1"
        )
        for dataset, weight in change.weights.items():
            where = f"{key}.{name}.weights.{dataset}"
            known = dataset in data.datasets
            problems.check(known, where, f"no dataset {dataset!r}", f"stage.data.datasets.{dataset}.path=...")
            problems.check(weight >= 0, where, f"must not be negative, got {weight}", f"{where}=1.0")


def check_layout(config: TrainConfig, problems: Problems) -> None:
    """Of an objective that trains the transformer: asked of the one home of the question, as the engine's ranks do."""
    stage = config.stage
    rows = Rows(stage.sequence_length, stage.micro_batch_size, stage.global_batch_size)
    engine = config.engine or "megatron"
    add_to(problems, ParallelLayout.of(config.parallel).problems(divided_sizes(config.model), rows, engine=engine))
