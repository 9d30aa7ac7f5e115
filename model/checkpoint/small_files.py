"""Small text files from outside (configurations, indexes, tables), read with a limit and without surprises."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.errors import UserError

MAX_BYTES = 256 << 20  # an index of a million tensors has 100 MB
MAX_YAML_BYTES = 1 << 20  # configurations have kilobytes, and YAML is slow to read
MAX_YAML_DEPTH = 64  # the time to read grows with its square
INTERPOLATION = re.compile(r"\$\{")


def open_regular(path: Path, what: str) -> int:
    """A descriptor of a regular file. A folder, a pipe, a device or a link to itself is a `UserError`, never a wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{what} cannot be read", where=str(path), got=str(error.strerror)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{what} cannot be read", where=str(path), expected="a file", got=kind)
    return descriptor


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    with os.fdopen(open_regular(path, what), "rb") as file:
        try:
            content = file.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise UserError(f"{what} is too large", where=str(path), expected=f"at most {max_bytes:,} bytes")
            return content.decode()
        except OSError as error:
            raise UserError(f"{what} cannot be read", where=str(path), got=str(error.strerror)) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{what} is damaged", where=str(path), got=str(error)) from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Anything else, and nesting without end, is a `UserError`."""
    try:
        values = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged", where=str(path), got=f"{type(error).__name__}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} is damaged", where=str(path), expected="an object", got=type(values).__name__)
    return values


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML mapping of plain values: no alias (a few lines of them stand for billions of values) and bounded in size.

    Nothing is resolved: `${oc.env:HOME}` is text. Anything else is a `UserError`.
    """
    import yaml

    text = read_text(path, what, MAX_YAML_BYTES)
    try:
        _check_tokens(yaml.scan(text, yaml.SafeLoader), path, what)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{what} is not YAML", where=str(path), got=f"{type(error).__name__}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} is damaged", where=str(path), expected="a mapping", got=type(values).__name__)
    return values


def _check_tokens(tokens: Iterable[Any], path: Path, what: str) -> None:
    depth = 0
    for token in tokens:
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if name == "AliasToken" or depth > MAX_YAML_DEPTH:
            told = "an alias" if name == "AliasToken" else f"more than {MAX_YAML_DEPTH} levels"
            raise UserError(f"{what} has {told}", where=f"{path}, line {token.start_mark.line + 1}")


def check_resolved(values: Any, where: str, key: str = "") -> None:
    """Refuse `${...}` in a configuration that is not the user's own: resolving it would read this environment."""
    if isinstance(values, dict):
        for name, value in values.items():
            check_resolved(name, where, key)
            check_resolved(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            check_resolved(value, where, f"{key}[{index}]")
    elif isinstance(values, str) and INTERPOLATION.search(values):
        raise UserError(
            "a recorded configuration refers to something outside of it", where=f"{where}: {key}", got=values
        )
