"""Words of a text in any script, for comparing texts."""

from __future__ import annotations

import re

# A word, or one character of a script that is written without spaces (Chinese, Japanese, Thai).
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]+"
)
