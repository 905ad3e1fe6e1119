"""Line charts as SVG text, without a plotting library: what the figures of docs/ need, and no more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5a99", "#b8860b")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 430, 300, 56, 34, 46, 24
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: named lines on a common scale, y from 0 to 1."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    log_x: bool = False
    level: float | None = None  # a dashed horizontal line
    mark: float | None = None  # a dashed vertical line
    x_ticks: Sequence[float] = field(default_factory=tuple)
    dots: bool = False


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side; a name has the same colour in all, and one legend."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colour = dict(zip(names, COLOURS, strict=False))
    width, height = len(panels) * (WIDTH + GAP), HEIGHT + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * (WIDTH + GAP)} 0)">', *_panel(panel, colour), "</g>"]
    for number, name in enumerate(names):
        x = LEFT + number * 210
        parts.append(f'<path d="M{x} {HEIGHT + 12}h24" stroke="{colour[name]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 30}" y="{HEIGHT + 16}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, colour: Mapping[str, str]) -> list[str]:
    xs = [x for points in panel.lines.values() for x, _ in points] + list(panel.x_ticks)
    low, high = (math.log(min(xs)), math.log(max(xs))) if panel.log_x else (min(xs), max(xs))
    bottom = HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        share = ((math.log(x) if panel.log_x else x) - low) / ((high - low) or 1)
        return round(LEFT + share * (WIDTH - LEFT), 1), round(bottom - min(max(y, 0), 1) * (bottom - TOP), 1)

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{panel.title}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = place(xs[0], tick)[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in panel.x_ticks:
        x = place(tick, 0)[0]
        parts.append(f'<path d="M{x} {bottom}v5" stroke="#555"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{panel.x_label}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{panel.y_label}</text>'
    )
    dashed = 'stroke="#555" stroke-dasharray="4 3"'
    if panel.level is not None:
        parts.append(f'<path d="M{LEFT} {place(xs[0], panel.level)[1]}H{WIDTH}" {dashed}/>')
    if panel.mark is not None:
        parts.append(f'<path d="M{place(panel.mark, 0)[0]} {TOP}V{bottom}" {dashed}/>')
    for name, points in panel.lines.items():
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour[name]}" stroke-width="2"/>')
        if panel.dots:
            parts += [
                f'<circle cx="{x}" cy="{y}" r="3" fill="{colour[name]}"/>' for x, y in (place(*p) for p in points)
            ]
    return parts
