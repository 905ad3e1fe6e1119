"""The building blocks of a report: sections of text, tables and figures, and the page around them. Escapes all text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from onetrain.launcher.console import format_value

plotly.io.templates.default = "none"  # the others are copied into each figure, which takes as long as all the rest

# Okabe and Ito's palette, which people with any colour vision can tell apart
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, "#000000", GREY)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SHORT = 30  # characters of a cell that is not broken into lines
STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 {FONT}; color: #1b1f24; background: #fff; margin: 0 auto; max-width: 1180px; padding: 24px; }}
h1 {{ font-size: 26px; margin: 0 0 2px; }}
h2 {{ font-size: 19px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #d8dee4; }}
p.note, figcaption {{ color: #57606a; margin: 4px 0 10px; max-width: 110ch; }}
nav a {{ display: inline-block; margin-right: 14px; color: {BLUE}; text-decoration: none; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 10px; }}
.tile {{ border: 1px solid #d8dee4; border-radius: 8px; padding: 8px 14px; min-width: 118px; }}
.tile b {{ display: block; font-size: 20px; font-variant-numeric: tabular-nums; }}
.tile span {{ color: #57606a; font-size: 13px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 8px 0 14px; font-size: 14px; }}
th, td {{ text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #eaeef2; vertical-align: top; }}
td {{ overflow-wrap: anywhere; }}
th {{ border-bottom: 1px solid #8c959f; white-space: nowrap; }}
.s {{ white-space: nowrap; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
pre {{ background: #f6f8fa; padding: 10px 12px; overflow-x: auto; font-size: 12.5px; border-radius: 6px; }}
details {{ margin: 6px 0; }} summary {{ cursor: pointer; }}
.swatch {{ display: inline-block; width: 12px; height: 12px; margin-right: 7px; border: 1px solid #8c959f; }}
.bad {{ color: #a40e26; }}
figure {{ margin: 6px 0 14px; }}
"""


@dataclass
class Section:
    """One part of the report; its methods add to it, in order. `name` is the anchor of its title."""

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For links inside the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    def note(self, text: str) -> None:
        """A sentence or two."""
        self.parts.append(f'<p class="note">{escape(text)}</p>')

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        swatches: Sequence[str] = (),
        right: Sequence[int] = (),
    ) -> None:
        """Numbers to the right, and the columns `right`; `swatches` are colours for the first column."""
        numeric = [
            i in right
            or (
                any(isinstance(row[i], int | float) for row in rows)
                and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
            )
            for i in range(len(columns))
        ]
        short = [all(len(format_value(row[i])) <= SHORT for row in rows) for i in range(len(columns))]
        kinds = [
            ' class="n"' if number else ' class="s"' if fits else ""
            for number, fits in zip(numeric, short, strict=True)
        ]
        head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        body = []
        for index, row in enumerate(rows):
            colour = f'<i class="swatch" style="background:{swatches[index]}"></i>' if swatches else ""
            cells = [escape(format_value(value)) for value in row]
            cells[0] = colour + cells[0]
            body.append("".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells, kinds, strict=True)))
        lines = "".join(f"<tr>{line}</tr>" for line in body)
        self.parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        )

    def folded(self, summary: str, text: str) -> None:
        """Long text that opens at a click."""
        self.parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def figure(self, figure: go.Figure, caption: str = "") -> None:
        """A plotly figure, styled like all of them."""
        figure.update_layout(
            font={"family": FONT, "size": 13, "color": "#1b1f24"},
            margin={"l": 70, "r": 20, "t": 34, "b": 48},
            legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
            hoverlabel={"align": "left"},
        )
        lines = {"showline": True, "linecolor": "#8c959f", "gridcolor": "#eaeef2", "zeroline": False}
        ticks = {"ticks": "outside", "tickcolor": "#8c959f", "automargin": True}
        figure.update_xaxes(**lines, **ticks, title_standoff=8)
        figure.update_yaxes(**lines, **ticks, title_standoff=10, exponentformat="power")
        config = {"displayModeBar": False, "responsive": True}  # drag to zoom, double click to go back
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self.parts.append(f"<figure>{drawn}{below}</figure>")

    def html(self) -> str:
        """The whole section."""
        return f'<section><h2 id="{self.name}">{escape(self.title)}</h2>{"".join(self.parts)}</section>'


def page(title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """One HTML document that needs nothing else. `tiles`: (what, value)."""
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for what, value in tiles
    )
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections)
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f'<h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p>'
        f'<div class="tiles">{boxes}</div><nav>{links}</nav>'
        f"{''.join(section.html() for section in sections)}"
        f'<p class="note">Made by onetrain report, {made}.</p></body></html>'
    )


def in_figure(text: str, width: int = 90) -> str:
    """Text for a figure's labels: escaped, because plotly reads tags in them, and wrapped into lines."""
    lines, line = [], ""
    for word in text.split():
        word = word if len(word) <= width else word[: width - 3] + "..."
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join(escape(part) for part in [*lines, line])
