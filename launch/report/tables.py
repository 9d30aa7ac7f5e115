"""Tables of the report."""

from __future__ import annotations

import html


def table(header: list[str], rows: list[list[str]]) -> str:
    """Empty without rows. The page's style turns it into blocks where the page is narrow."""
    if not rows:
        return ""
    titles = [html.escape(name) for name in header]
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = [
        "".join(f'<td data-title="{title}">{html.escape(cell)}</td>' for title, cell in zip(titles, row, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
