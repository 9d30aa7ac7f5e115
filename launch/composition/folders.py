"""Where configurations are looked for: a folder of the user's own first, then ours.

The user's own is `config_folder=PATH`, a key of every command, else `conf/` of the working folder, if there is one.
`config_folder=null` asks for ours alone. A name that is in both means the user's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override

from model.errors import UserError

KEY = "config_folder"
COMMENT = "your own configs, looked for before ours; left out: conf/ of the working folder, where there is one"
CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "conf"
OWN_NAME = "conf"


def config_folders(overrides: Sequence[Override]) -> list[Path]:
    """In the order in which they are searched. Raises `UserError` for a folder that is not there."""
    given = [one.value() for one in overrides if one.key_or_group == KEY]
    if not given:
        own = Path.cwd() / OWN_NAME
        return [own, CONFIG_FOLDER] if own.is_dir() and not own.samefile(CONFIG_FOLDER) else [CONFIG_FOLDER]
    if given[-1] is None:
        return [CONFIG_FOLDER]
    own = Path(str(given[-1])).absolute()
    if not own.is_dir():
        raise UserError("there is no such folder of configs", where=KEY, got=str(own), fix=f"{KEY}=PATH of a folder")
    return [own, CONFIG_FOLDER]


@contextlib.contextmanager
def hydra_in(folders: Sequence[Path]) -> Iterator[None]:
    """Hydra, ready to compose from these folders."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        if len(folders) > 1:
            search_path = create_config_search_path(str(CONFIG_FOLDER))
            for folder in folders[:-1]:
                search_path.prepend("own", f"file://{folder}", anchor="main")
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(task_name="nextstate", config_search_path=search_path)
        yield


def find_config(folders: Sequence[Path], name: str) -> Path | None:
    """The file of a primary configuration."""
    return next((path for folder in folders if (path := folder / f"{name}.yaml").exists()), None)


def is_group(folders: Sequence[Path], name: str) -> bool:
    return any((folder / name).is_dir() for folder in folders)


def group_options(folders: Sequence[Path], group: str) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def override_of(folder: str) -> str:
    """`folder` as an argument of another command."""
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    return f"{KEY}='{quoted}'"
