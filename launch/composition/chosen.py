"""What Hydra makes of the YAML files, kept for all calls of this process that choose the same options of groups.

Most of a composition is Hydra's reading and merging of files. A curriculum composes dozens of calls that differ in values
only. Hydra's own settings (a dozen files that no command reads) are left out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
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
            return compose(primary, [str(one.input_line) for one in overrides])
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
        return compose(primary, list(options))


def compose(primary: str, overrides: list[str]) -> Any:
    """`hydra.compose` without Hydra's own settings, which took half of its time; the pieces are those that it calls."""
    loader: Any = GlobalHydra.instance().config_loader()
    try:
        parsed, repository = loader._parse_overrides_and_create_caching_repo(primary, overrides)
        loader.validate_sweep_overrides_legal(parsed, run_mode=RunMode.RUN, from_shell=False)
        defaults = create_defaults_list(repository, primary, parsed, prepend_hydra=False, skip_missing=False)
        tree = loader._compose_config_from_defaults_list(defaults.defaults, repository)
        OmegaConf.set_struct(tree, True)
        ConfigLoaderImpl._apply_overrides_to_config(defaults.config_overrides, tree)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException() from error
    return tree
