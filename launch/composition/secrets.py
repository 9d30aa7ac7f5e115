"""Which settings are secrets, by their names; what is written or shown of a command line has no values of theirs."""

from __future__ import annotations

import re

# Names of variables whose values are secrets: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM,
# nor token_file, which says where one is.
SECRET_NAME = re.compile(
    r"(?i)^(?!.*_(file|path)$)(.*_)?(key|apikey|token|secret|password|passwd|passphrase|credentials?|auth)(_|$)"
)
HIDDEN = "***"


def without_secrets(overrides: list[str]) -> list[str]:
    """Overrides with `***` for what they give to a secret; of a mapping with a secret in it, for all of it."""
    return [_without_secret(text) for text in overrides]


def _without_secret(text: str) -> str:
    key, sign, value = text.partition("=")
    # `cluster.environment.HF_TOKEN=...`, or `cluster.environment={HF_TOKEN: ...}`.
    names = [key.rpartition(".")[2], *re.findall(r"[{,]\s*['\"]?(\w+)['\"]?\s*:", value)]
    return f"{key}={HIDDEN}" if sign and any(map(SECRET_NAME.search, names)) else text
