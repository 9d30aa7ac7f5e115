"""`filters.html`: what each filter of a tokenized dataset took away, with those nearest to its bound on both sides."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.packing.pack import FILTERS_NAME
from data_pipeline.storage.format import published_prefixes, suffixed
from data_pipeline.tokenize import FILTERS_SUFFIX
from launch.report.page import STYLE, section, table
from model.errors import UserError

NEAREST_SHOWN = 12  # samples on either side of a bound


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """By filter of a folder of token or packed files: counts of all shards, and their samples nearest to the bound, nearest first."""
    found: dict[str, dict[str, Any]] = {}
    paths = [suffixed(prefix, FILTERS_SUFFIX) for prefix in published_prefixes(folder)]
    for path in [*paths, folder / FILTERS_NAME]:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            record = json.loads(line)
            total = found.setdefault(
                record["filter"],
                {key: record[key] for key in ("unit", "minimum", "maximum")}
                | {"asked": 0, "refused": 0, "nearest_kept": [], "nearest_refused": []},
            )
            for key in ("asked", "refused", "nearest_kept", "nearest_refused"):
                total[key] += record[key]
    for total in found.values():
        bounds = [bound for bound in (total["minimum"], total["maximum"]) if bound is not None]
        for key in ("nearest_kept", "nearest_refused"):
            total[key].sort(key=lambda shown: min(abs(shown["score"] - bound) for bound in bounds))
            del total[key][NEAREST_SHOWN:]
    return found


def write_page(folder: Path) -> dict[str, Any]:
    """Write the page; returns its path and by filter {"asked", "refused"}. Raises `UserError` where no filter was asked."""
    found = read_records(folder)
    if not found:
        raise UserError(
            "no filter was asked about these token files",
            where=str(folder),
            expected=f"files NNNNNN{FILTERS_SUFFIX}, as `tokenize` writes them where filters are configured, or {FILTERS_NAME} "
            "of `pack` where documents had signatures",
            fix="filter_tier=basic, or filters=[...]",
        )
    title = f"Filters of {html.escape(folder.name)}"
    body = section("What each filter took", _table(found)) + "".join(
        section(html.escape(f"{name} ({_bounds(total)} {total['unit']})"), _borderline(total))
        for name, total in found.items()
    )
    path = folder / "filters.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n",
        encoding="utf-8",
    )
    return {
        "page": str(path),
        "filters": {name: {key: total[key] for key in ("asked", "refused")} for name, total in found.items()},
    }


def _table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{_bounds(total)} {total['unit']}",
            f"{total['asked']:,}",
            f"{total['refused']:,}",
            f"{share_of(total):.1%}",
        ]
        for name, total in found.items()
    ]
    return table(["filter", "stays", "asked", "refused", "share"], rows)


def share_of(total: dict[str, Any]) -> float:
    return float(total["refused"] / total["asked"])


def _bounds(total: dict[str, Any]) -> str:
    names = (("minimum", "at least"), ("maximum", "at most"))
    return ", ".join(f"{word} {total[name]:g}" for name, word in names if total[name] is not None)


def _borderline(total: dict[str, Any]) -> str:
    return "".join(
        f'<h3>{title}</h3><div class="samples">{"".join(_figures(total[key]))}</div>'
        for title, key in (("Just kept", "nearest_kept"), ("Just refused", "nearest_refused"))
        if total[key]
    )


def _figures(shown: Iterable[dict[str, Any]]) -> Iterable[str]:
    for one in shown:
        picture = (
            f'<img alt="" src="data:image/jpeg;base64,{html.escape(one["thumbnail"])}">' if one["thumbnail"] else ""
        )
        label = f"{one['score']:.4g} · {one['key']}"
        yield f"<figure>{picture}<figcaption>{html.escape(label)}<br>{html.escape(one['text'])}</figcaption></figure>"
