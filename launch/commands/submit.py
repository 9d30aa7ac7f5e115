"""`nextstate submit`: one stage, or one command, as a job of a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster.profile import ClusterConfig
from launch.composition.folders import override_of
from model.errors import Problems, UserError
from training.config import TrainConfig
from training.stage import validate

if TYPE_CHECKING:
    from launch.cluster.submission import Work

HELP = """Submit one stage to a cluster: configuration, batch script, job id.

Script, resolved configuration, a copy of the code and the log are kept in <run_folder>/jobs/<stage.name>. The job
saves before its time limit, is queued again, and goes on; what is queued, running or done is not submitted twice.
What the plan says cannot work on cluster.num_accelerators of cluster.device is refused; preflight=false insists.
Other commands are submitted by command=NAME with their own overrides in arguments.

examples:
  nextstate submit dry_run=true cluster=slurm stage=pretrain_1 model=emu35_34b name=emu35   the script alone
  nextstate submit cluster=slurm cluster.partition=main stage=pretrain_1 model=emu35_34b name=emu35
  nextstate submit -m cluster=slurm name=sweep stage.optimizer.learning_rate=1e-3,2e-3
  nextstate submit cluster=slurm command=tokenize shares=64 'arguments=["input=raw/*.tar","target=tokens/raw","text_tokenizer=t"]'"""


@dataclass
class Config(TrainConfig):
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False  # print the batch script, write and submit nothing
    command: str = "train"  # another command runs as one task, with `arguments`
    arguments: list[str] = field(default_factory=list)  # overrides of that command
    calls: dict[str, list[str]] = field(default_factory=dict)  # of that command: a job array, one
    # task a name, each with these overrides added
    num_accelerators: int = 0  # of that command's job
    shares: int = 1  # of that command: a job array; each task does its share of the input shards
    config_folder: str | None = None  # your own configs, for that command too; left out: conf/ of the working folder

    def validate(self) -> None:
        """In a dry run a configuration that could not be trained is told, and its script shown all the same."""
        problems = Problems()
        self.cluster.validate(problems)
        problems.check(self.shares > 0, "shares", f"must be positive, got {self.shares}", "shares=1")
        problems.check(
            self.command != "train" or not (self.arguments or self.calls or self.shares > 1),
            "command",
            "train takes no arguments, calls or shares",
            "command=tokenize",
        )
        problems.check(
            self.shares == 1 or self.command == "tokenize",
            "shares",
            f"{self.command} has no shards to share",
            "calls.NAME=[...]",
        )
        problems.check(self.shares == 1 or not self.calls, "shares", "exclusive with calls")
        problems.check(
            self.command != "submit", "command", "a job that submits a job: submit that one", "command=train"
        )
        room = self.cluster.accelerators_per_node
        problems.check(
            0 <= self.num_accelerators <= room,
            "num_accelerators",
            f"the command runs on one node, which has {room}, got {self.num_accelerators}",
            "num_accelerators=0",
        )
        problems.raise_if_any()
        if self.command == "train":
            if self.dry_run:
                tell_refusal(lambda: validate(self))
            else:
                validate(self)


def tell_refusal(check: Callable[[], None]) -> None:
    """What would be refused is told, and the dry run goes on."""
    try:
        check()
    except UserError as error:
        print(f"warning: this would be refused: {error}", file=sys.stderr)


def run(config: Config) -> dict[str, Any]:
    from launch.cluster import submission as submit
    from launch.cluster.named_files import refuse_absent_files
    from launch.plan.preflight import refuse_impossible
    from training.stage import finished_summary

    work = work_of(config)
    if config.dry_run:
        if config.command == "train":
            tell_refusal(lambda: refuse_impossible(config, config.cluster))
        else:
            tell_refusal(lambda: refuse_unfit_calls(config))
        tell_refusal(lambda: refuse_absent_files(config.cluster))
        return {"script": submit.dry_run(work, config.cluster)}
    if config.command == "train":
        summary = finished_summary(config)
        if summary is not None:
            return {"name": work.name, "state": "done", "submitted": False, "summary": summary}
        refuse_impossible(config, config.cluster)
    elif config.preflight:
        refuse_unfit_calls(config)
    if config.preflight:
        refuse_absent_files(config.cluster)
    if config.cluster.kind == "local":
        return submit.run_here(work, config.cluster)
    return submit.submit(work, config.cluster)


def work_of(config: Config) -> Work:
    from launch.cluster.submission import command_work, training_work

    if config.command == "train":
        own = {one.name: getattr(config, one.name) for one in fields(TrainConfig)}
        return training_work(TrainConfig(**own))
    return command_work(
        config.command,
        arguments_of(config),
        config.calls,
        shares=config.shares,
        num_accelerators=config.num_accelerators,
        run_folder=Path(config.run_folder),
        name=config.command,
        title=f"{config.name}/{config.command}",
    )


def arguments_of(config: Config) -> list[str]:
    return [override_of(config.config_folder), *config.arguments] if config.config_folder else config.arguments


def refuse_unfit_calls(config: Config) -> None:
    """Raises `UserError` for what the command would refuse on the node, as far as its configuration and manifests say it."""
    from launch.composition.compose import compose_config
    from training.inference.choice import check_choice

    for own in config.calls.values() or [[]]:
        call = compose_config(config.command, [*arguments_of(config), *own])
        if getattr(call, "checkpoint", None):
            check_choice(
                Path(getattr(call, "run_folder", "")) / call.checkpoint,
                text_tokenizer=getattr(call, "text_tokenizer", None),
                vision_tokenizer=getattr(call, "vision_tokenizer", None),
            )
        if config.command in ("tokenize", "pack"):
            refuse_absent_inputs(config.command, call)


def refuse_absent_inputs(command: str, call: Any) -> None:
    """Of a job that makes data: raises `UserError` for shards, tokens and tokenizers that are not there yet."""
    from data_pipeline.sources.patterns import find_shards
    from data_pipeline.sources.remote import is_remote

    named = {f"tokens.{name}": folder for name, folder in call.tokens.items()} if command == "pack" else {}
    if command == "tokenize":
        patterns = [call.input] if isinstance(call.input, str) else [str(pattern) for pattern in call.input]
        local = [pattern for pattern in patterns if not is_remote(pattern)]
        if local:
            find_shards(local, "input")  # says which are not there
        named = {name: getattr(call, name) for name in ("text_tokenizer", "vision_tokenizer") if getattr(call, name)}
    absent = [f"{key}={path}" for key, path in named.items() if not Path(path).exists()]
    if absent:
        raise UserError(
            f"the job would not find what nextstate {command} reads",
            got=", ".join(absent),
            fix="make it first, or name what is there; preflight=false, where another job makes it before",
        )


def submit_sweep_summary(config: Config, folder: Path, after: list[str]) -> str:
    """The id of the job that writes the page of a sweep once its runs, the jobs `after`, have ended."""
    from launch.cluster.submission import submit_summary

    return submit_summary(folder, config.name, config.cluster, after)


def is_dry(answer: dict[str, Any]) -> bool:
    return list(answer) == ["script"]


def render(answer: dict[str, Any]) -> str:
    if is_dry(answer):
        return str(answer["script"]).rstrip("\n")
    if "job_id" not in answer:
        return f"{answer['name']}: {answer['state']}"
    what = "submitted as" if answer["submitted"] else f"{answer['state']} already, as"
    return f"{answer['name']}: {what} job {answer['job_id']}\nscript: {answer['script']}\nlog: {answer['log']}"
