"""What lies in a folder, agreed on by all ranks.

A network file system shows a new name late. Ranks that each looked for themselves could see different files, and would then
stand at different collectives, or start from different weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from model.errors import UserError
from training.contracts.batches import Ranks


def seen_by_first_rank(ranks: Ranks, look: Callable[[], Any]) -> Any:
    """What `look` gives on the first rank, on every rank: JSON values. Called by all ranks together.

    A `UserError` of the first rank is raised on all; the others do not look.
    """
    mine: dict[str, Any] = {}
    if ranks.rank == 0:
        try:
            mine = {"seen": look()}
        except UserError as error:
            mine = {"error": [error.what, error.where, error.expected, error.got, error.fix]}
    told = json.loads(ranks.gather(json.dumps(mine).encode())[0])
    if "error" in told:
        what, *rest = told["error"]
        raise UserError(what, **dict(zip(("where", "expected", "got", "fix"), rest, strict=True)))
    return told["seen"]
