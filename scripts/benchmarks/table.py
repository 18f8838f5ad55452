"""The table of the figures, for the terminal and for the documentation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .figures import Figure, Rounds, Spread, result, target


@dataclass
class Table:
    """Rows of text, and the notes that they refer to.

    :param head: what stands above the columns
    """

    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> str:
        """Return the mark of a note, which is made if there is none of this text."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def for_terminal(self) -> str:
        """Return aligned columns."""
        rows = [list(self.head), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += ["", *(f"[{number}] {text}" for number, text in enumerate(self.notes, 1))]
        return "\n".join(lines).rstrip() + "\n"

    def for_documentation(self) -> str:
        """Return a table in reStructuredText."""
        lines = [".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
        for first, *cells in [self.head, *self.rows]:
            lines.append(f"   * - {first}".rstrip())
            lines += [f"     - {cell}".rstrip().replace("]", "]_") for cell in cells]
        lines += ["", *(f".. [{number}] {text}" for number, text in enumerate(self.notes, 1))]
        return "\n".join(lines).rstrip() + "\n"


def comparison(
    figures: Sequence[Figure],
    measured: Mapping[str, Rounds],
    titles: Mapping[str, str],
    remarks: Mapping[str, Mapping[str, str]],
) -> Table:
    """Return the table of figures.

    :param measured: what the rounds have measured, by contender, the first of which is us
    :param titles: what the contenders are called
    :param remarks: by contender and side: what is to be known of the comparison, or why there is
        none
    """
    table = Table(["", "target", *(titles[name] for name in measured), "met"])
    ours = next(iter(measured.values()))
    for figure in figures:
        limit, mine = target(figure, ours), result(figure, ours)
        cells = [figure.text, "" if limit is None else f"≤ {number(limit, figure)}"]
        for name, rounds in measured.items():
            spread, remark = result(figure, rounds), remarks[name].get(figure.over)
            text = "n/a" if spread is None else cell(spread, figure)
            cells.append(f"{text} {table.note(remark)}" if remark else text)
        met = limit is not None and mine is not None and mine.median <= limit
        table.rows.append([*cells, "" if limit is None else "yes" if met else "no"])
    return table


def cell(spread: Spread, figure: Figure) -> str:
    """Return the median, and the quartiles in brackets."""
    low, high = number(spread.low, figure, unit=""), number(spread.high, figure, unit="")
    return f"{number(spread.median, figure)} ({low}-{high})"


def number(value: float, figure: Figure, *, unit: str | None = None) -> str:
    """Return a number with what digits it has a right to."""
    digits = 0 if value >= 100 else 1 if value >= 10 or figure.unit else 2
    if figure.group == "routes":
        digits = 3
    return f"{value:.{digits}f}{figure.unit if unit is None else unit}"


def conditions(python: str, versions: Mapping[str, Mapping[str, str]]) -> str:
    """Return what the figures hold for.

    :param versions: by contender, the first of which is us: those of its packages
    """
    ours, *others = versions.values()
    shared = [f"{package} {version}" for package, version in ours.items()]
    apart = [
        f"{package} {version}"
        for other in others
        for package, version in other.items()
        if ours.get(package) != version
    ]
    beside = f" Beside: {', '.join(apart)}." if apart else ""
    cores = os.cpu_count()
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d} with Python {python}, asyncio, {cores} cores: "
        f"{', '.join(shared)}.{beside}"
    )
