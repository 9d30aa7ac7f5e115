"""Text of users stays text: what a text key is given on the command line or in YAML arrives as it was written.

Hydra's grammar and YAML 1.1 both take some texts for numbers: `name=20260105_1200` is 202601051200, `time_limit: 12:00:00` is
43200, `account: 0123` is 83, `partition: on` is True. On the command line the value of a text key is quoted before Hydra sees
it; a YAML value that changed is refused with the quoting to use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
# What YAML 1.1 surely leaves as it is: most of a file. Parsing it scalar by scalar took a fifth of a composition.
_UNCHANGED = re.compile(r"(?!(?i:yes|no|on|off|true|false)$)[A-Za-z_/$].*|0|[1-9]\d{0,8}")


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


def check_yaml_text(tree: DictConfig, files: Sequence[YamlFile]) -> None:
    """Raises `UserError` for a text of `tree` that one of `files` wrote in another way than it arrived."""
    changed: dict[tuple[str, str], tuple[str, Path]] = {}
    for file in files:
        for key, written, value in _changed_scalars(file):
            changed.setdefault((key, value), (written, file.path))
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


class YamlFile(NamedTuple):
    """A file as it is now: what a cache of its content goes by."""

    path: Path
    modified_ns: int
    num_bytes: int


def files_of(folders: Sequence[Path]) -> list[YamlFile]:
    """Every YAML file, by folder and path."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            with contextlib.suppress(OSError):  # it went away; whoever needs it says so
                seen = path.stat()
                found.append(YamlFile(path, seen.st_mtime_ns, seen.st_size))
    return found


@functools.lru_cache(maxsize=1024)
def _changed_scalars(file: YamlFile) -> tuple[tuple[str, str, str], ...]:
    """(key, text, text that it becomes) of the plain scalars of a file that YAML changes; read again once it was changed."""
    try:
        content = file.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()  # whoever needs the file says so
    found = []
    for match in _SCALAR.finditer(content):
        value = _read_by_yaml(match[2])
        if isinstance(value, (bool, int, float)) and str(value) != match[2]:
            found.append((match[1], match[2], str(value)))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _read_by_yaml(text: str) -> Any:
    """The value of a plain scalar; None where YAML cannot read it."""
    if _UNCHANGED.fullmatch(text):
        return text
    try:
        return yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError:
        return None


@functools.cache
def _yaml_loader() -> Any:
    return get_yaml_loader()


def _texts(node: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, last part of it, value) of every text."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, str):
            yield name, str(key), value
        else:
            yield from _texts(value, name)
