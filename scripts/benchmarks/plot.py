"""The plot of the figures: bars of ratios, on a logarithmic axis, with a tick at each target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from .figures import Figure, Rounds, result
from .table import number

WIDTH = 900
LEFT = 400
RIGHT = 70
TOP = 64
BAR = 13
GAP = 14
TICKS = (1, 2, 5, 10, 20, 50, 100, 200)
COLOURS = ("#0a7d74", "#c77d1e", "#8a63b8")
"""Those of the contenders, readable on white and on black."""
# An image does not know whether the page around it is light or dark: these can be read on both.
STYLE = """\
  text { font: 12px system-ui, sans-serif; fill: #717a84 }
  .axis { stroke: #8b949e; stroke-opacity: .45 }
  .one { stroke: #8b949e }
  .target { stroke: #e5534b; stroke-width: 2 }"""


def plot(
    figures: Sequence[Figure], measured: Mapping[str, Rounds], titles: Mapping[str, str]
) -> str:
    """Return an SVG image.

    :param measured: what the rounds have measured, by contender, the first of which is us
    :param titles: what the contenders are called
    """
    # Ratios of what has a target in itself; milliseconds would need an axis of their own.
    shown = [figure for figure in figures if figure.target is not None and not figure.unit]
    spreads = {
        figure: {
            name: spread
            for name, rounds in measured.items()
            if (spread := result(figure, rounds)) is not None
        }
        for figure in shown
    }
    values = [each.median for row in spreads.values() for each in row.values()]
    low, high = min([0.5, *values]) * 0.9, max([3.0, *values]) * 1.1

    def x(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    colours = dict(zip(measured, COLOURS, strict=False))
    marks: list[str] = []
    y = TOP
    for figure, row in spreads.items():
        height = BAR * len(row)
        marks.append(_text(LEFT - 12, y + height / 2 + 4, figure.text, "end"))
        for line, (name, spread) in enumerate(row.items()):
            start, end = sorted((x(1), x(spread.median)))
            top = y + line * BAR
            marks.append(
                f'<rect x="{start}" y="{top}" width="{max(end - start, 1.5):.1f}" '
                f'height="{BAR - 2}" fill="{colours[name]}"/>'
            )
            if line == 0:
                target = x(figure.target or 1)
                marks.append(_line(target, y - 3, y + BAR + 1, "target"))
                end = max(end, target)
            marks.append(_text(end + 5, top + 10, number(spread.median, figure)))
        y += height + GAP
    axis = []
    for tick in TICKS:
        if low <= tick <= high:
            axis.append(_line(x(tick), TOP - 10, y, "one" if tick == 1 else "axis"))
            axis.append(_text(x(tick), y + 16, str(tick), "middle"))
    height = y + 28
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>What tasks cost, as ratios; less is better</title>",
            f"<style>\n{STYLE}\n</style>",
            *_legend(titles, colours),
            *axis,
            *marks,
            "</svg>\n",
        ]
    )


def _legend(titles: Mapping[str, str], colours: Mapping[str, str]) -> list[str]:
    marks, left = [], LEFT
    for name, colour in colours.items():
        marks.append(f'<rect x="{left}" y="14" width="11" height="11" fill="{colour}"/>')
        marks.append(_text(left + 16, 24, titles[name]))
        left += 32 + 7 * len(titles[name])
    marks.append(_line(LEFT + 5, 34, 47, "target"))
    marks.append(_text(LEFT + 16, 45, "our target; less is better"))
    return marks


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
