"""Charts as inline SVG. Colours are the page's CSS variables, so that they follow the light or dark theme."""

from __future__ import annotations

import html
import math

Series = dict[str, list[tuple[float, float]]]

WIDTH, HEIGHT = 560, 240
NUM_COLOURS = 6  # of lines that have no colour of their own in the page's style
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 34


def line_chart(series: Series, *, x_label: str, y_label: str) -> str:
    """Lines over a shared linear x axis and a y axis from zero, or from below it; `series` is in legend order, names are CSS classes."""
    points = [point for line in series.values() for point in line]
    if not points:
        return '<p class="absent">nothing recorded</p>'
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = (bound(y for _, y in points) for bound in (min, max))
    y_high = nice_ceiling(y_high) if y_high > 0 or y_low >= 0 else 0.0
    y_low = -nice_ceiling(-y_low) if y_low < 0 else 0.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">']
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = y_low + (y_high - y_low) * fraction
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for x, anchor in {x_low: "start", (x_low + x_high) / 2: "middle", x_high: "end"}.items():
        parts.append(f'<text x="{place(x, y_low)[0]:.1f}" y="{HEIGHT - 16}" text-anchor="{anchor}">{short(x)}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(
            f'<polyline class="line s{number % NUM_COLOURS} {html.escape(name)}" points="{path}"><title>{html.escape(name)}</title></polyline>'
        )
    return "".join([*parts, "</svg>", legend(list(series))])


def short(value: float) -> str:
    """At most six characters, for a narrow axis: 75,000 is 75k, 0.000625 is 6.3e-4."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{letter}"
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= value)


def legend(names: list[str]) -> str:
    """Of several lines; one alone is what the chart's title says."""
    if len(names) == 1:
        return ""
    items = "".join(
        f'<li><i class="s{number % NUM_COLOURS} {html.escape(name)}"></i>{html.escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def share_bars(rows: list[tuple[str, float, float | None]]) -> str:
    """One bar a row: (name, share in [0, 1], wanted share or None, marked by a tick)."""
    height = 26 * len(rows) + 6
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="shares of the mixture">']
    start, span = 170, WIDTH - 170 - 70
    for index, (name, share, wanted) in enumerate(rows):
        y = 26 * index + 4
        parts.append(f'<text x="{start - 8}" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{start}" y="{y}" width="{max(0.0, share) * span:.1f}" height="18" rx="2"/>')
        if wanted is not None:
            x = start + wanted * span
            parts.append(f'<line class="wanted" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 21}"/>')
        parts.append(f'<text x="{start + max(share, wanted or 0) * span + 8:.1f}" y="{y + 14}">{share:.1%}</text>')
    return "".join([*parts, "</svg>"])
