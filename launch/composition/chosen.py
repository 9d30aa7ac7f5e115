"""What Hydra makes of the YAML files, kept for all calls of this process that choose the same options of groups.

Most of a composition is Hydra's reading and merging of files, its own among them. A curriculum composes dozens of calls that
differ in values only.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.composition import folders as places
from launch.composition.written_text import YamlFile


def compose_files(
    primary: str, schema: type, overrides: Sequence[Override], folders: Sequence[Path], files: Sequence[YamlFile]
) -> Any:
    """As `hydra.compose(primary, overrides)` in these folders. Raises what that raises."""
    values = [one for one in overrides if is_value(one, folders)]
    options = [str(one.input_line) for one in overrides if one not in values]
    tree = copy.deepcopy(with_options(primary, schema, tuple(options), tuple(folders), tuple(files)))
    try:
        for one in values:
            OmegaConf.update(tree, one.key_or_group, one.value())
    except OmegaConfBaseException:  # Hydra says it in its own words
        with places.hydra_in(folders):
            return compose(primary, overrides=[str(one.input_line) for one in overrides])
    return tree


def is_value(override: Override, folders: Sequence[Path]) -> bool:
    """True for `key=value` that sets a key; False for the choice of a file, and for anything unusual."""
    return (
        override.type is OverrideType.CHANGE
        and override.package is None
        and not override.is_sweep_override()
        and not override.is_hydra_override()
        and "/" not in override.key_or_group
        and not places.is_group(folders, override.key_or_group)
    )


@functools.lru_cache(maxsize=64)
def with_options(
    primary: str, schema: type, options: tuple[str, ...], folders: tuple[Path, ...], files: tuple[YamlFile, ...]
) -> Any:
    """The tree of these options. `schema` and `files` are what else it depends on; a caller changes a copy of it."""
    with places.hydra_in(folders):
        return compose(primary, overrides=list(options))
