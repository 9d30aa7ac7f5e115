"""Classes by name: of a short registry, or by the dotted path of a class in anybody's package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

from model.errors import UserError

T = TypeVar("T")


def find_class(name: str, registry: Mapping[str, type[T]], base: type, what: str) -> type[T]:
    """`registry[name]`, or the class at the dotted path `name`, which must have the members of `base`.

    Raises `UserError` naming `what` is looked for.
    """
    if name in registry:
        return registry[name]
    known = f"one of {', '.join(registry)}, or the dotted path of a class"
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise UserError(f"unknown {what}", expected=known, got=repr(name))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the {what} cannot be imported",
            where=name,
            expected=known,
            got=str(error),
            fix="check the path, and that its package is installed or on PYTHONPATH",
        ) from error
    wanted = [member for member in dir(base) if not member.startswith("_")]
    wanted += [member for member in getattr(base, "__annotations__", {}) if not member.startswith("_")]
    missing = sorted({member for member in wanted if not hasattr(found, member)})
    if not isinstance(found, type) or missing:
        raise UserError(
            f"not a {what}",
            where=name,
            expected=f"a class like {base.__module__}.{base.__qualname__}",
            got=f"without {', '.join(missing)}" if missing else type(found).__name__,
        )
    return found
