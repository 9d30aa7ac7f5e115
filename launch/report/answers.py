"""The JSON files that commands leave for people and scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.durable import replace_file
from model.errors import UserError


def publish_answer(path: Path, answer: dict[str, Any]) -> dict[str, Any]:
    """Write `answer` to `path`, whose folder is made, and return it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(answer, indent=1, ensure_ascii=False))
    except NotADirectoryError as error:
        raise UserError("the output folder is not a folder", where=str(path.parent)) from error
    return answer
