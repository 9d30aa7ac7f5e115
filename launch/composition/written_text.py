"""Text of users stays text: what a text key is given on the command line or in YAML arrives as it was written.

Hydra's grammar and YAML 1.1 both take some texts for numbers: `name=20260105_1200` is 202601051200, `time_limit: 12:00:00` is
43200, `account: 0123` is 83, `partition: on` is True. On the command line the value of a text key is quoted before Hydra sees
it; a YAML value that changed is refused with the quoting to use.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from model.errors import UserError
from model.registry import without_none

_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.\-]*)=(.*)", re.DOTALL)
# A plain scalar on the line of its key, a comment after it left out.
_SCALAR = re.compile(
    r"^[ \t-]*([A-Za-z_][\w\-]*):[ \t]+([^\s'\"\[\]{}&*!|>%@`#,][^#\n]*?)[ \t]*(?:[ \t]#.*)?$", re.MULTILINE
)


def quoted_text(schema: type, override: str) -> str:
    """`key=value` with the value in quotes where the key takes text and the user wrote none; `null` stays null."""
    match = _OVERRIDE.fullmatch(override)
    if match is None or not _takes_text(schema, match[2].split(".")):
        return override
    plus, key, value = match.groups()
    if value == "null" or value[:1] in ("'", '"'):
        return override
    return f"{plus}{key}={in_quotes(value)}"


def in_quotes(text: str) -> str:
    """A text in Hydra's grammar, whatever is in it."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))  # before the closing quote
    return f"'{escaped}{chr(92) * trailing}'"


def _takes_text(schema: Any, path: Sequence[str]) -> bool:
    """Is the key's field text, or text or null? Names of mappings are passed."""
    current = schema
    for part in path:
        if dataclasses.is_dataclass(current):
            current = without_none(typing.get_type_hints(current).get(part))
        elif typing.get_origin(current) is dict:
            current = without_none(typing.get_args(current)[1])
        else:
            return False
    return current is str


def check_yaml_text(tree: DictConfig, folders: Sequence[Path]) -> None:
    """Raises `UserError` for a text of `tree` that a file of `folders` wrote in another way than it arrived."""
    changed: dict[tuple[str, str], tuple[str, Path]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            for key, written, value in _changed_scalars(path):
                changed.setdefault((key, value), (written, path))
    for where, key, value in _texts(OmegaConf.to_container(tree), "") if changed else ():
        if (key, value) in changed:
            written, path = changed[key, value]
            raise UserError(
                "YAML takes a text for something else",
                where=f"{where}, in {path}",
                expected=f"the text {written}",
                got=value,
                fix=f"put it in quotes: {key}: '{written}'",
            )


def _changed_scalars(path: Path) -> Iterator[tuple[str, str, str]]:
    """(key, text, text that it becomes) of the plain scalars of a file that YAML changes."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # whoever needs the file says so
    loader = get_yaml_loader()
    for match in _SCALAR.finditer(content):
        try:
            value = yaml.load(match[2], Loader=loader)
        except yaml.YAMLError:
            continue
        if isinstance(value, (bool, int, float)) and str(value) != match[2]:
            yield match[1], match[2], str(value)


def _texts(node: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, last part of it, value) of every text."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, str):
            yield name, str(key), value
        else:
            yield from _texts(value, name)
