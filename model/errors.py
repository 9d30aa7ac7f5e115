"""Errors that are the user's to mend, and the collector that gathers all of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field


class UserError(Exception):
    """A mistake in configuration or input: the command prints it without a traceback and exits 2.

    The message says what is wrong, where, what was expected and what was found, and how to mend it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = ""):
        parts = [what]
        for label, text in (("where", where), ("expected", expected), ("got", got), ("fix", fix)):
            if text:
                parts.append(f"  {label + ':':<10}{text}")
        super().__init__("\n".join(parts))
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix


@dataclass
class Problems:
    """Collects every problem of a configuration before anything starts.

    `add` takes the dotted key, what is wrong with it and the override that mends it; `raise_if_any` raises one
    `UserError` that lists them all.
    """

    found: list[str] = field(default_factory=list)

    def add(self, key: str, message: str, fix: str = "") -> None:
        self.found.append(f"{key}: {message}" + (f" (fix: {fix})" if fix else ""))

    def check(self, holds: bool, key: str, message: str, fix: str = "") -> None:
        if not holds:
            self.add(key, message, fix)

    def raise_if_any(self) -> None:
        if self.found:
            count = len(self.found)
            noun = "problem" if count == 1 else "problems"
            lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(self.found, 1))
            raise UserError(f"the configuration has {count} {noun}:\n{lines}")
