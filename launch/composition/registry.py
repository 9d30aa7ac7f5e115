"""The commands: every module of `launch/commands` is one. Only this module imports them, one at a time and by name."""

from __future__ import annotations

import ast
import difflib
import importlib
import types
from pathlib import Path

from model.errors import UserError

COMMAND_FOLDER = Path(__file__).resolve().parents[1] / "commands"


def load_command(name: str) -> types.ModuleType:
    """The module of a command: `HELP: str`, `Config` (dataclass), `run(config) -> dict`."""
    return importlib.import_module(f"launch.commands.{name}")


def command_summaries() -> dict[str, str]:
    """First line of every command's `HELP`, read from the source so that no command is imported."""
    summaries = {}
    for path in sorted(COMMAND_FOLDER.glob("[a-z]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
                summaries[path.stem] = ast.literal_eval(node.value).strip().splitlines()[0]
    return summaries


def check_command(name: str, where: str = "") -> None:
    """Raises `UserError` that names the command that was probably meant."""
    known = list(command_summaries())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)  # "serve" is not "score"
        raise UserError(
            f"there is no command {name!r}",
            where=where,
            expected=", ".join(known),
            fix=f"nextstate {close[0]}" if close else "nextstate --help",
        )
