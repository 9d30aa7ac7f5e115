"""Which files of a sample count, and which field of its metadata is the caption: layouts of other tools as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.sources.samples import SampleError


@dataclass
class PartsConfig:
    """The default takes every file and has captions from `KEY.txt`."""

    caption: str = ""  # field of KEY.json in place of KEY.txt: caption, windows.0.text, windows.*.text
    ignore: list[str] = field(default_factory=list)  # extensions of files that are passed over: [pickle, m4a]


def counted(parts: Mapping[str, bytes], config: PartsConfig) -> dict[str, bytes]:
    """The files that count, in their order."""
    if not config.ignore:
        return dict(parts)
    ignored = {extension.lower().lstrip(".") for extension in config.ignore}
    return {extension: data for extension, data in parts.items() if extension not in ignored}


def named_caption(metadata: Mapping[str, Any], path: str) -> str:
    """The text at `path`: names and numbers of items, separated by dots; `*` is every item, one a line.

    Raises `SampleError` `no_caption` where the field is missing, empty or no text.
    """
    found = list(_values(metadata, path.split(".")))
    if not found or not all(isinstance(value, str) and value.strip() for value in found):
        raise SampleError("no_caption", f"{path}: {str(found)[:100] if found else 'no such field'}")
    return "\n".join(value.strip() for value in found)


def _values(value: Any, names: list[str]) -> Iterator[Any]:
    if not names:
        yield value
        return
    name, rest = names[0], names[1:]
    if name == "*" and isinstance(value, list):
        for item in value:
            yield from _values(item, rest)
    elif isinstance(value, Mapping) and name in value:
        yield from _values(value[name], rest)
    elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
        yield from _values(value[int(name)], rest)
