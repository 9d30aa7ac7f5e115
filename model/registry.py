"""Things by name: a short table of ours, or a dotted path to a class of the user's own; and their typed options."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from model.errors import Problems, UserError

Options = TypeVar("Options")


def check_name(kind: str, name: str, table: Mapping[str, str], key: str) -> None:
    """Raises `UserError` for a name that is neither in `table` nor a dotted path. Imports nothing."""
    if name in table or "." in name:
        return
    close = difflib.get_close_matches(name, table, n=1)
    raise UserError(
        f"there is no {kind} named {name!r}",
        where=key,
        expected=", ".join([*table, "package.module.Class of your own"]),
        fix=f"{key}={close[0]}" if close else "",
    )


def find_class(kind: str, name: str, table: Mapping[str, str], key: str) -> Any:
    """The class that `name` means: an entry of `table` (name -> dotted path), or a dotted path itself.

    A user's own is looked for wherever Python imports from, then in the working folder. `kind` ("objective") and
    `key` (the configuration's key) are for the message. Raises `UserError` for an unknown name and for a path that
    leads to no class.
    """
    check_name(kind, name, table, key)
    path = table.get(name, name)
    if name not in table:
        import_from_working_folder()
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the {kind} cannot be imported",
            where=f"{key}={path}",
            expected="package.module.Class, installed or below the working folder",
            got=str(error),
        ) from error
    if not isinstance(found, type):
        raise UserError(f"the {kind} is no class", where=f"{key}={path}", got=type(found).__name__)
    return found


def absent_class(kind: str, path: str, key: str) -> str:
    """A line for a class of the user's own that `path` cannot lead to, or "".

    For whoever does not need the class yet: of all modules only the packages above its own are imported.
    """
    import_from_working_folder()
    module_name, _, class_name = path.rpartition(".")
    try:
        spec = importlib.util.find_spec(module_name)
        reason = "" if spec else f"No module named {module_name!r}"
    except (ImportError, ValueError) as error:
        spec, reason = None, str(error)
    if spec is not None and str(spec.origin).endswith(".py"):
        source = Path(str(spec.origin)).read_text(encoding="utf-8", errors="replace")
        if class_name not in source and "import *" not in source:
            reason = f"module {module_name!r} has no attribute {class_name!r}"
    return f"the {kind} cannot be imported ({key}={path}): {reason}" if reason else ""


def import_from_working_folder() -> None:
    """Last of all places: a folder of the user's hides neither our packages nor installed ones."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def made_with(found: Any, kind: str, arguments: Mapping[str, Any], key: str) -> Any:
    """An object of a user's class. Raises `UserError` where the class does not take these arguments."""
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"the {kind} does not take these arguments",
            where=key,
            got=str(error),
            fix="give only arguments that the class has",
        ) from error
    return found(**arguments)


def checked_options(schema: type[Options], values: Mapping[str, Any], key: str, owner: str) -> Options:
    """`typed_options`, and what the dataclass itself refuses: its `validate(problems, key)`, where it has one."""
    options: Any = typed_options(schema, values, key, owner)
    if hasattr(options, "validate"):
        problems = Problems()
        options.validate(problems, key)
        problems.raise_if_any()
    result: Options = options
    return result


def typed_options(schema: type[Options], values: Mapping[str, Any], key: str, owner: str) -> Options:
    """`values` as an object of the dataclass `schema`; keys left out keep their defaults.

    Every unknown key, however deep, and the first value of a wrong type are a `UserError`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = Problems()
    known = known_keys(schema)
    for wrong in unknown_keys(schema, values):
        guess, level = near_miss(wrong, known), wrong.rpartition(".")[0]
        beside = [one for one in known if one.rpartition(".")[0] == level]
        fix = f"did you mean {key}.{guess}?" if guess else f"its keys: {', '.join(beside) or 'none'}"
        problems.add(f"{key}.{wrong}", f"{owner} has no such key, it would have no effect", fix)
    problems.raise_if_any()
    try:
        options: Any = OmegaConf.to_object(merged_into(schema, dict(values)))
    except OmegaConfBaseException as error:
        raise UserError(
            f"the options do not fit {owner}",
            where=f"{key}.{error.full_key}" if getattr(error, "full_key", "") else key,
            got=str(error).splitlines()[0],
        ) from None
    result: Options = options
    return result


def merged_into(schema: type, values: Any) -> Any:
    """OmegaConf's tree of `schema` with these values (a dict). Raises its errors for unknown keys and wrong types."""
    from omegaconf import OmegaConf

    return OmegaConf.unsafe_merge(copy.deepcopy(_tree_of(schema)), values)


@functools.cache
def _tree_of(schema: type) -> Any:
    """Making it takes five times as long as copying it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def without_none(annotation: Any) -> Any:
    """`X` of `X | None`; anything else unchanged."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return members[0] if is_union and len(members) == 1 else annotation


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted keys of a dataclass and of the dataclasses in it."""
    keys = []
    for field, annotation in fields_of(schema).items():
        keys.append(prefix + field)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            keys += known_keys(annotation, f"{prefix}{field}.")
    return keys


def fields_of(schema: type) -> dict[str, Any]:
    """Types of a dataclass's fields, without `| None`."""
    hints = typing.get_type_hints(schema)
    return {field.name: without_none(hints[field.name]) for field in dataclasses.fields(schema)}


def unknown_keys(annotation: Any, values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of `values` for which a dataclass, or one in its lists and mappings, has no field."""
    inner = typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) and isinstance(values, Mapping):
        fields = fields_of(annotation)
        for name, value in values.items():
            if name not in fields:
                yield f"{prefix}{name}"
            else:
                yield from unknown_keys(fields[name], value, f"{prefix}{name}.")
    elif typing.get_origin(annotation) is dict and isinstance(values, Mapping):
        for name, value in values.items():
            yield from unknown_keys(inner[1], value, f"{prefix}{name}.")
    elif typing.get_origin(annotation) is list and isinstance(values, list):
        for index, value in enumerate(values):
            yield from unknown_keys(inner[0], value, f"{prefix}{index}.")


def near_miss(wrong: str, candidates: list[str]) -> str:
    """The candidate that was probably meant: a key beside it, the whole dotted key, then the same last part elsewhere."""
    level, _, last = wrong.rpartition(".")
    beside = [key for key in candidates if key.rpartition(".")[0] == level]
    by_name = {key.rpartition(".")[2]: key for key in beside}
    close = nearest_name(last, list(by_name), level.rpartition(".")[2])
    if close:
        return by_name[close]
    others = [key for key in candidates if not wrong.startswith(f"{key}.")]  # not what it stands below itself
    # Below a level that is right, what all keys there begin with makes any two alike.
    whole = [] if level and beside else difflib.get_close_matches(wrong, others, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    by_last_part = {key.rpartition(".")[2]: key for key in reversed(others)}
    close = nearest_name(last, list(by_last_part))
    return by_last_part[close] if close else ""


def nearest_name(wrong: str, names: list[str], level: str = "") -> str:
    """Of names like `learning_rate` the one nearest to a misspelt or shortened one (`learning_rat`, `lr`, `rate`), or "".

    level: the name that these stand below, which people take into their own: `tp` is `tensor` of `parallel`.
    """
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.75)
    if close:
        return close[0]
    fitting = [
        name for name in names if is_short_for(wrong, name) or (level and is_short_for(wrong, f"{name}_{level}"))
    ]
    return fitting[0] if len(fitting) == 1 else ""


def is_short_for(short: str, name: str) -> bool:
    """`lr`, `learn_rate`, `rate` for `learning_rate`; one letter says too little."""
    words, parts = name.lower().split("_"), short.lower().split("_")
    if len(short) < 2:
        return False
    if short.lower() == "".join(word[:1] for word in words):
        return True
    places = range(len(words) - len(parts) + 1)
    return any(all(word.startswith(part) for word, part in zip(words[first:], parts, strict=False)) for first in places)
