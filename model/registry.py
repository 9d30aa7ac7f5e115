"""Things by name: a short table of ours, or a dotted path to a class of the user's own; and their typed options."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from model.errors import Problems, UserError

Options = TypeVar("Options")


def find_class(kind: str, name: str, table: Mapping[str, str], key: str) -> Any:
    """The class that `name` means: an entry of `table` (name -> dotted path), or a dotted path itself.

    `kind` ("objective") and `key` (the configuration's key) are for the message. Raises `UserError` for an unknown
    name and for a path that leads to no class.
    """
    if name not in table and "." not in name:
        close = difflib.get_close_matches(name, table, n=1)
        raise UserError(
            f"there is no {kind} named {name!r}",
            where=key,
            expected=f"{', '.join(table)}, or package.module.Class of your own",
            fix=f"{key}={close[0]}" if close else "",
        )
    path = table.get(name, name)
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the {kind} cannot be imported",
            where=f"{key}={path}",
            expected="package.module.Class, importable where the run starts",
            got=str(error),
        ) from error
    if not isinstance(found, type):
        raise UserError(f"the {kind} is no class", where=f"{key}={path}", got=type(found).__name__)
    return found


def typed_options(schema: type[Options], values: Mapping[str, Any], key: str, owner: str) -> Options:
    """`values` as an object of the dataclass `schema`; keys left out keep their defaults.

    Every unknown key and the first value of a wrong type are a `UserError`. An object with `validate(problems, key)`
    is asked for the rest.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = Problems()
    known = list(getattr(schema, "__dataclass_fields__", {}))
    for name in values:
        close = difflib.get_close_matches(str(name), known, n=1)
        fix = f"did you mean {key}.{close[0]}?" if close else f"keys of {owner}: {', '.join(known) or 'none'}"
        problems.check(name in known, f"{key}.{name}", f"{owner} has no such key, it would have no effect", fix)
    problems.raise_if_any()
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)))
        options: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(
            f"the options do not fit {owner}",
            where=str(getattr(error, "full_key", "") and f"{key}.{error.full_key}") or key,
            got=str(error).splitlines()[0],
        ) from None
    if hasattr(options, "validate"):
        options.validate(problems, key)
        problems.raise_if_any()
    return options
