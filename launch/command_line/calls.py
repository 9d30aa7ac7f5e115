"""`python -m launch.command_line.calls COMMAND key=value ... --call key=value ... --call ...`: one command several times in one process.

Each `--call` starts a call with the common overrides and its own. The imports are paid once; the first call that does
not end well ends the batch with its exit code.
"""

from __future__ import annotations

import sys

from launch.command_line import cli

CALL = "--call"


def split_calls(arguments: list[str]) -> list[list[str]]:
    """The overrides of each call; without `--call` there is one call."""
    groups: list[list[str]] = [[]]
    for text in arguments:
        if text == CALL:
            groups.append([])
        else:
            groups[-1].append(text)
    common, *own = groups
    return [common + group for group in own] or [common]


def main() -> int:
    command, *arguments = sys.argv[1:]
    for overrides in split_calls(arguments):
        exit_code = cli.main([command, *overrides])
        if exit_code != 0:
            return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
