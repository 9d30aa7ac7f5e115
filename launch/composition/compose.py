"""Composition: the YAML tree `conf/`, the typed schema of a command and the overrides of one call become one object.

Hydra's compose API does the composing, so nothing is written to disk. Every failure becomes a `UserError` that names
the key and, where one is near, the key that was probably meant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.composition import folders as places
from launch.composition import objective, registry
from launch.composition.chosen import compose_files
from launch.composition.written_text import check_yaml_text, files_of, quoted_text
from model.errors import Problems, UserError
from model.registry import known_keys, merged_into, near_miss, without_none


def compose_tree(command: str, overrides: list[str]) -> DictConfig:
    """The composed configuration of `command`, typed by its `Config`, interpolations still unresolved."""
    schema = registry.load_command(command).Config
    store_schema(command, schema)
    parsed = [objective.named(parse_override(quoted_text(schema, text))) for text in overrides]
    folders = places.config_folders(parsed)
    own_file = places.find_config(folders, command)
    primary = command if own_file else f"{command}_schema"
    parsed = [one for one in parsed if one.key_or_group != places.KEY or accepts_config_folder(schema)]
    parsed = choose_options(schema, parsed, {} if own_file is None else default_groups(own_file), folders)
    mappings = [one for one in parsed if adds_to_mapping(schema, one) or is_plain_text(schema, one, folders)]
    given = [nested(one) for one in mappings]
    plain = [one for one in parsed if one not in mappings and one.input_line]
    files = files_of(folders)
    try:
        tree: Any = compose_files(primary, schema, plain, folders, files)
        OmegaConf.set_struct(tree, False)
        if objective.has_objective(schema):
            objective.start_over_for_another(tree, given)
        tree = OmegaConf.unsafe_merge(tree, *given) if given else tree
        # Merging into a fresh schema refuses what `+key=value` or a YAML file added outside of it.
        tree = merged_into(schema, OmegaConf.to_container(tree))
        check_yaml_text(tree, files)
        OmegaConf.resolve(tree)
        if objective.has_objective(schema):
            objective.fill_in(tree)
    except (HydraException, OmegaConfBaseException, MissingConfigException) as error:
        raise explain(error, command, schema, folders) from error
    except UnicodeDecodeError as error:
        raise UserError(
            "a configuration file is no text in UTF-8",
            where=", ".join(str(one.path) for one in files if not is_utf8(one.path)),
            got=str(error),
            fix="save it in UTF-8",
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        raise UserError(
            "a configuration file cannot be read as YAML",
            where=f"{place.name}, line {place.line + 1}" if place else ", ".join(str(one) for one in folders),
            got="values nested too deeply"
            if isinstance(error, RecursionError)
            else str(getattr(error, "problem", error)),
            fix="mend or remove the file",
        ) from error
    assert isinstance(tree, DictConfig)
    return tree


@functools.cache
def store_schema(command: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{command}_schema", node=schema)


def compose_config(command: str, overrides: list[str]) -> Any:
    """The validated `Config` object of `command`. Raises `UserError` that lists every problem."""
    tree = compose_tree(command, overrides)
    refuse_endless(OmegaConf.to_container(tree))
    config = to_object(tree)
    if hasattr(config, "validate"):
        config.validate()
    return config


def refuse_endless(values: Any) -> None:
    """Raises `UserError` for every number that is none: a rate, a weight or a limit that is infinite or not a number."""
    problems = Problems()

    def look(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, below in value.items():
                look(below, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for index, below in enumerate(value):
                look(below, f"{key}[{index}]")
        elif isinstance(value, float):
            problems.check(math.isfinite(value), key, f"must be a finite number, got {value}")

    look(values, "")
    problems.raise_if_any()


def default_groups(path: Path) -> dict[str, str | None]:
    """The groups in the defaults list of a command's file, with the option that each starts with.

    Of a file that cannot be read none: composing it says why.
    """
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("defaults", []), list):
        raise UserError(
            "the file of a command is no mapping with a list of defaults",
            where=str(path),
            expected=f"as {places.CONFIG_FOLDER / path.name} has it",
            fix="mend or remove the file",
        )
    entries = content.get("defaults", [])
    return {str(key): value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}


def choose_options(
    schema: type, parsed: list[Override], defaults: dict[str, str | None], folders: Sequence[Path]
) -> list[Override]:
    """Overrides of optional groups (`model`, `vision_tokenizer`), refused where Hydra would end with an assertion.

    A key of a group needs an option to change; `NAME=null` asks for none.
    """
    hints = typing.get_type_hints(schema)
    optional = {
        name
        for name, annotation in hints.items()
        if dataclasses.is_dataclass(without_none(annotation)) and without_none(annotation) is not annotation
    }
    chosen = {name for name in optional if defaults.get(name) or defaults.get(f"{name}@{name}")}
    kept = []
    for one in parsed:
        name = one.key_or_group
        if name in optional and not one.is_sweep_override():
            value = one.value()
            if value is None and name not in chosen:
                continue
            if not isinstance(value, str):
                raise no_option(name, f"{name}={value}", folders)
            chosen.add(name)
        kept.append(one)
    for one in kept:
        group, _, rest = one.key_or_group.partition(".")
        if rest and group in optional - chosen:
            raise no_option(group, one.input_line or group, folders)
    return kept


def no_option(group: str, got: str, folders: Sequence[Path]) -> UserError:
    options = places.group_options(folders, group)
    return UserError(
        f"{group} has no values to change: no option of it is chosen",
        expected=f"{group}=NAME, and then {group}.KEY=VALUE; NAME one of {', '.join(options)}",
        got=got,
        fix=f"add {group}={options[0] if options else 'NAME'}",
    )


def to_object(tree: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError("a required value is missing", got=first_line(error)) from error


def parse_override(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(
            "an override cannot be read",
            got=text,
            expected="key=value",
            fix=f"quote values with special characters: {_quoted_example(text)}",
        ) from error


def _quoted_example(text: str) -> str:
    """The override as it can be typed in a shell, its value in quotes."""
    key, _, value = text.partition("=")
    return shlex.quote(f'{key}="{value}"') if '"' not in value else """'key="a=b"'"""


def adds_to_mapping(schema: type, override: Override) -> bool:
    """True when the key lies inside a mapping field (`stage.data.datasets.NAME.weight`): new names are welcome there."""
    if override.is_delete() or override.is_sweep_override():
        return False
    current: Any = schema
    for part in override.key_or_group.split("."):
        if not dataclasses.is_dataclass(current):
            return False
        current = without_none(typing.get_type_hints(current).get(part))
        if typing.get_origin(current) is dict:
            return True
    return False


def accepts_config_folder(schema: type) -> bool:
    """Commands that start other commands hand it on to them."""
    return places.KEY in {field.name for field in dataclasses.fields(schema)}


def is_plain_text(schema: type, override: Override, folders: Sequence[Path]) -> bool:
    """True for a text field that has the name of a config group of other commands (`vision_tokenizer=FOLDER`).

    Hydra would look for an option of the group.
    """
    if override.is_delete() or override.is_sweep_override():
        return False
    annotation = typing.get_type_hints(schema).get(override.key_or_group)
    return without_none(annotation) is str and places.is_group(folders, override.key_or_group)


def nested(override: Override) -> dict[str, Any]:
    value: Any = override.value()
    for part in reversed(override.key_or_group.split(".")):
        value = {part: value}
    return value


def is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def explain(error: Exception, command: str, schema: type, folders: Sequence[Path]) -> UserError:
    """Hydra's and OmegaConf's errors in our words. `folders` are those in which presets were looked for."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        options = sorted(name for name in error.options if name != "base")
        guess = near_miss(option, options)
        return UserError(
            f"there is no {group or 'configuration'} named {option!r}",
            where=", ".join(map(str, folders)),
            expected=", ".join(options),
            fix=f"{group}={guess}"
            if guess
            else f"{places.KEY}=FOLDER where your own are elsewhere ({places.OWN_NAME}/ of "
            f"the working folder is looked at by itself)",
        )
    texts = [str(one) for one in (error, error.__cause__) if one is not None]
    unknown = unknown_key(texts)
    if unknown:
        known = [*known_keys(schema), places.KEY]
        former = dict(getattr(schema, "former_names", {}))
        if objective.has_objective(schema):
            former |= objective.FORMER_NAMES
            known += objective.all_known_keys()
        refusal = renamed(unknown, former)
        if refusal is not None:
            return refusal
        first, _, below = unknown.partition(".")
        if below.partition(".")[0] == first and places.is_group(folders, first):
            return UserError(
                f"the keys of a file of {first} are one level too deep",
                where=unknown,
                expected=f"`# @package _global_` as the first line of a file that begins with `{first}:`",
                fix=f"add that line to the file that {first}=NAME names",
            )
        guess = near_miss(unknown, known)
        return UserError(
            f"unknown key {unknown!r}",
            where=f"configuration of nextstate {command}",
            fix=f"did you mean {guess}?" if guess else f"{takers(first)}nextstate {command} --help lists the keys",
        )
    key = re.search(r"full_key: (\S+)", "\n".join(texts))
    where = key.group(1) if key else f"configuration of nextstate {command}"
    return UserError(
        "a value of the configuration does not fit",
        where=where,
        got=first_line(error.__cause__ or error).removesuffix(":"),
        fix=objective.FORM if where == objective.KEY else f"nextstate {command} --help lists keys and types",
    )


def takers(name: str) -> str:
    """For a message: the commands that have a key of this name."""
    modules = {command: registry.load_command(command) for command in registry.command_summaries()}
    found = [command for command, module in modules.items() if name in known_keys(module.Config)]
    return f"{name} is a key of nextstate {', '.join(found)}; " if found else ""


def renamed(key: str, former_names: dict[str, str]) -> UserError | None:
    """The refusal of a key, or of one below it, under its former name."""
    for old, new in former_names.items():
        if key == old or key.startswith(f"{old}."):
            now = new + key.removeprefix(old)
            return UserError(f"{key} is called {now} now", where=key, fix=now)
    return None


def unknown_key(texts: list[str]) -> str:
    """The dotted key in the messages of an unknown key; empty when they say something else."""
    for text in texts:
        found = re.search(r"Could not (?:override|append to config).*?'([^']+)'", text)
        if found:
            return found.group(1)
        if re.search(r"Key '[^']*' (?:not in|is not in struct)", text):
            full_key = re.search(r"full_key: (\S+)", text)
            return full_key.group(1) if full_key else ""
    return ""
