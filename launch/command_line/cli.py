"""`nextstate COMMAND [key=value ...]`: finds the command, composes its configuration, runs it, answers.

Exit codes: 0 done; 1 a defect (traceback); 2 the user's mistake (one message); 3 stopped early after a safe
checkpoint, to be started again. Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from data_pipeline.storage.file_errors import of_file_error
from launch.composition import registry
from launch.composition.secrets import without_secrets
from model.errors import UserError, escapes_shown
from training.reliability.signals import COMMAND_VARIABLE

# What a word without "=" is most likely meant for.
USUAL_WORDS = ("run_folder", "checkpoint", "input", "target")


@dataclass
class Call:
    """One command line, taken apart."""

    command: str
    overrides: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # arguments without "=": an action or a path
    help: bool = False
    show_config: bool = False
    multirun: bool = False

    @property
    def json(self) -> bool:
        """Known before composition, so that a composition error is answered in JSON too."""
        return any(text.lower() in ("json=true", "json=1", "json=yes") for text in self.overrides)


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:  # the ranks and entries that this process starts name the command to go on with
        os.environ.setdefault(COMMAND_VARIABLE, shlex.join(["nextstate", *without_secrets(sys.argv[1:])]))
    with escapes_shown():
        return answer_to(list(sys.argv[1:] if arguments is None else arguments))


def answer_to(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("nextstate"))
        return 0
    call = None
    try:
        call = read_call(arguments)
        return execute(call)
    except UserError as error:
        return refuse(error, as_json=call is not None and call.json)
    except BrokenPipeError:  # the reader of our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, RuntimeError, ImportError) as error:
        told = of_file_error(error)
        if told is None:
            raise
        return refuse(told, as_json=call is not None and call.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def refuse(error: UserError, *, as_json: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": str(error)}))
    return 2


def overview() -> str:
    lines = ["usage: nextstate COMMAND [group=option ...] [key=value ...] [--help] [--cfg job] [-m]", "", "commands:"]
    lines += [f"  {name:<12} {summary}" for name, summary in registry.command_summaries().items()]
    lines += [
        "",
        "nextstate COMMAND --help   keys, groups and examples of one command",
        "nextstate COMMAND --cfg job   the resolved configuration, as YAML",
        "nextstate COMMAND -m key=a,b   one run for each value, each in a run folder of its own",
        "json=true   one JSON object on stdout; everything else goes to stderr",
        "",
        "exit codes: 0 done, 1 a defect, 2 a mistake in configuration or input, 3 stopped early after a checkpoint",
    ]
    return "\n".join(lines)


def read_call(arguments: list[str]) -> Call:
    command, *rest = arguments
    registry.check_command(command)
    call = Call(command)
    remaining = iter(rest)
    for text in remaining:
        if text in ("-h", "--help"):
            call.help = True
        elif text in ("-m", "--multirun"):
            call.multirun = True
        elif text in ("-c", "--cfg") or text.startswith("--cfg="):
            what = text.partition("=")[2] or next(remaining, "")
            if what != "job":
                raise UserError("--cfg shows one thing only", expected="--cfg job", got=f"--cfg {what}")
            call.show_config = True
        elif text.startswith("-"):
            raise UserError(f"unknown option {text}", expected="--help, --cfg job, -m, or key=value")
        elif "=" in text or text.startswith("~"):
            call.overrides.append(text)
        else:
            call.words.append(text)
    return call


def execute(call: Call) -> int:
    from launch.composition import compose as configs

    module = registry.load_command(call.command)
    place_words(call, getattr(module, "POSITIONAL", None))
    if call.help:
        from launch.command_line.help import command_help

        print(command_help(call.command, call.overrides))
        return 0
    if call.multirun:
        from launch.command_line.multirun import plan_jobs, run_all

        jobs = plan_jobs(call.command, call.overrides)
        if not call.show_config:
            return run_all(call.command, jobs, as_json=call.json)
    else:
        jobs = [call.overrides]
    if call.show_config:
        from omegaconf import OmegaConf

        trees = [configs.compose_tree(call.command, overrides) for overrides in jobs]
        print("---\n".join(OmegaConf.to_yaml(tree) for tree in trees), end="")
        return 0
    config = configs.compose_config(call.command, call.overrides)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    quiet_libraries()
    with stdout_kept_clean(call.json):
        answer = module.run(config)
    exit_code = int(answer.pop("exit_code", 0))
    if call.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        render = getattr(module, "render", render_plainly)
        print(render(answer))
    return exit_code


def place_words(call: Call, key: str | None) -> None:
    """`nextstate curriculum status` is `action=status`; which key takes the word stands in the command's module."""
    if len(call.words) > (1 if key else 0):
        extra = call.words[1 if key else 0]
        keys = {one.name for one in fields(registry.load_command(call.command).Config)}
        meant = next((name for name in USUAL_WORDS if name in keys), None) if extra != "help" else None
        raise UserError(
            f"{extra!r} is not of the form key=value",
            fix=f"nextstate {call.command} {meant}={extra}" if meant else f"nextstate {call.command} --help",
        )
    for word in call.words:
        quoted = word.replace("\\", "\\\\").replace("'", "\\'")
        call.overrides.append(f"{key}='{quoted}'")


def quiet_libraries() -> None:
    """Libraries' warnings hide a run's own lines, here and in its child processes; PYTHONWARNINGS brings them back."""
    if "PYTHONWARNINGS" not in os.environ:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter and every setting


@contextlib.contextmanager
def stdout_kept_clean(enabled: bool) -> Iterator[None]:
    """Whatever libraries and child processes write to stdout goes to stderr, at the level of file descriptors."""
    if not enabled:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def render_plainly(answer: dict[str, Any], indent: str = "") -> str:
    """Nested `key: value` lines."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", render_plainly(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
