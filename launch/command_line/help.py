"""`nextstate COMMAND --help`, written from the command's dataclass: types, values, and the comments beside the fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.composition import compose as configs
from launch.composition import folders as places
from launch.composition import objective, registry
from model.registry import without_none
from training.objectives.registry import OBJECTIVES

KEY_WIDTH, VALUE_WIDTH = 40, 22


def command_help(command: str, overrides: list[str]) -> str:
    module = registry.load_command(command)
    tree = configs.compose_tree(command, overrides)
    lines = [module.HELP.strip(), "", f"usage: nextstate {command} [group=option ...] [key=value ...]"]
    folders = places.config_folders([configs.parse_override(text) for text in overrides])
    groups = config_groups(command, folders)
    if groups:
        lines += ["", "groups (chosen as group=option):"]
        for group, default in groups.items():
            options = ", ".join(places.group_options(folders, group))
            lines += textwrap.wrap(
                f"{options}  [default: {default}]", 110, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14
            )
    lines += ["", "keys (with the values of this call):"]
    if not configs.accepts_config_folder(module.Config):
        own = str(folders[0]) if len(folders) > 1 else None
        lines.append(key_line(places.KEY, "str | None", own, places.COMMENT))
    chosen = {objective.KEY: objective.schema_of(tree)} if objective.has_objective(module.Config) else {}
    lines += section_lines(module.Config, tree, "", chosen)
    return "\n".join(lines)


def config_groups(command: str, folders: Sequence[Path]) -> dict[str, str]:
    """Config groups of the command's primary YAML file and their defaults."""
    path = places.find_config(folders, command)
    if path is None:
        return {}
    entries = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(entries, dict)
    chosen = {}
    for entry in entries.get("defaults", []):
        if isinstance(entry, dict):
            for key, option in entry.items():
                chosen[str(key).removeprefix("optional ")] = str(option)
    return {group: option for group, option in chosen.items() if places.is_group(folders, group)}


def section_lines(schema: type, tree: DictConfig | None, prefix: str, chosen: Mapping[str, type]) -> list[str]:
    """One line a key: plain keys of the dataclass first, then its nested dataclasses under their own headings.

    `chosen` maps keys whose fields are decided by their `name` to the dataclass of these fields.
    """
    comments = field_comments(schema)
    hints = typing.get_type_hints(schema)
    plain, nested = [], []
    for field in dataclasses.fields(schema):
        inner = chosen.get(f"{prefix}{field.name}", without_none(hints[field.name]))
        value = None if tree is None else tree[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            heading = f"{prefix}{field.name}: {first_sentence(inner)}".rstrip(": ")
            nested += ["", f"  {heading}"]
            if prefix + field.name in chosen:
                assert value is not None, "its name has decided the fields"
                comment = f"{' | '.join(OBJECTIVES)} | package.module.Class"
                assert tree is not None
                name = OmegaConf.select(tree, f"{field.name}.name")
                nested.append(key_line(f"{prefix}{field.name}.name", "str", name, comment))
            nested += section_lines(inner, value, f"{prefix}{field.name}.", chosen)
        else:
            plain.append(key_line(prefix + field.name, type_name(hints[field.name]), value, comments.get(field.name)))
    return plain + nested


def key_line(key: str, kind: str, value: Any, comment: str | None) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    shown = "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)
    if len(shown) > VALUE_WIDTH - 1:
        shown = shown[: VALUE_WIDTH - 4] + "..."
    text = f"    {key:<{KEY_WIDTH}} {shown:<{VALUE_WIDTH}} {kind:<12}"
    return f"{text} {comment}" if comment else text.rstrip()


def type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(annotation))  # without the modules' names
    origin = typing.get_origin(annotation)
    if origin is dict:
        return f"{{name: {type_name(typing.get_args(annotation)[1])}}}"
    return text


def first_sentence(schema: type) -> str:
    text = inspect.getdoc(schema) or ""
    if text.startswith(f"{schema.__name__}("):  # the signature that dataclass() writes where there is no docstring
        return ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def field_comments(schema: type) -> dict[str, str]:
    """The trailing comment of every field, from the source of the dataclass and its bases."""
    comments: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                rest = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
                if rest.lstrip().startswith("#"):
                    comments[node.target.id] = rest.lstrip(" #").strip()
    return comments
