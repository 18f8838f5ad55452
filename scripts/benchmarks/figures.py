"""The figures: what is divided by what, and what we want to come out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IMPORT = "import"
"""The group whose one figure is measured in fresh processes, in milliseconds."""


@dataclass(frozen=True)
class Figure:
    """Two sides of a group, and the quotient of their times."""

    group: str
    over: str
    under: str
    text: str
    target: float | None = None
    """What ours may be at most."""
    spread_of: str | None = None
    """Whose upper quartile it may be at most, instead: another figure's ``over``, of the group."""
    unit: str = ""


FIGURES = [
    Figure(
        "routes", "plain_again", "plain", "A against A: APIRoute ÷ APIRoute, the same app twice"
    ),
    Figure(
        "routes",
        "route",
        "plain",
        "Request on a TasksRoute that doesn't use Tasks ÷ on an APIRoute",
        spread_of="plain_again",
    ),
    Figure("routes", "plain", "without", "The same request, the package added ÷ not there"),
    Figure(
        "requests",
        "background_again",
        "background",
        "A against A: one BackgroundTasks task ÷ one BackgroundTasks task",
    ),
    Figure(
        "requests",
        "raw",
        "background",
        "Request with a bare create_task ÷ one with BackgroundTasks",
    ),
    Figure(
        "requests",
        "raw_turn",
        "background",
        "Request with one, and a turn of the loop ÷ one with BackgroundTasks",
    ),
    Figure(
        "requests", "now", "background", "Request with a task now ÷ one with BackgroundTasks", 1.35
    ),
    Figure(
        "requests",
        "after_route",
        "background",
        "Request with one after_route ÷ one with BackgroundTasks",
        1.35,
    ),
    Figure(
        "requests",
        "after_response",
        "background",
        "Request with one after_response ÷ one with BackgroundTasks",
        1.35,
    ),
    Figure("flood", "flood", "raw", "10,000 tasks in a request ÷ create_task", 2.0),
    Figure("flood", "shielded", "raw", "10,000 shielded ones ÷ create_task", 2.5),
    Figure("flood", "configured", "raw", "10,000 configured by each call ÷ create_task", 2.5),
    Figure("memory", "live", "raw", "Memory of a live task ÷ create_task", 1.7),
    Figure(
        "growth",
        "growth",
        "raw_growth",
        "Growth of time from 1,000 to 100,000 live ÷ create_task's",
        1.5,
    ),
    Figure("drain", "drain", "raw", "Drain of 10,000 tasks ÷ cancel and gather", 2.0),
    Figure("threads", "threads", "raw_threads", "1,000 sync tasks ÷ to_thread.run_sync", 1.1),
    Figure(
        "latency",
        "busy",
        "calm",
        "p99 beside 1,000 blocking sync tasks ÷ alone (wall clock)",
        1.5,
    ),
    Figure("latency", "raw_busy", "calm", "p99 beside 1,000 such to_thread.run_sync ÷ alone"),
    Figure(IMPORT, "import", "", "Import, after FastAPI's (wall clock)", 15.0, unit=" ms"),
]

ROUNDS = {
    "routes": 40,
    "requests": 40,
    "flood": 12,
    "memory": 1,
    "growth": 5,
    "drain": 10,
    "threads": 16,
    "latency": 8,
    IMPORT: 25,
}
"""How many rounds there are of each group."""

OF_PEERS = {"growth": 1}
"""How many rounds of a group the peers have, at most, that take minutes for one."""

QUICK = {
    "routes": 12,
    "requests": 12,
    "flood": 5,
    "memory": 1,
    "growth": 1,
    "drain": 3,
    "threads": 5,
    "latency": 2,
    IMPORT: 7,
}
"""The same, for a first look."""


@dataclass(frozen=True)
class Spread:
    """What came out of the rounds: the median and the quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return that of some values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, statistics.median(values), high)


Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""By group: what each round has measured, by side."""


def result(figure: Figure, rounds: Rounds) -> Spread | None:
    """Return what came out of a figure, if it was measured."""
    values = [
        each[figure.over] / (each[figure.under] if figure.under else 1.0)
        for each in rounds.get(figure.group, ())
        if figure.over in each
    ]
    return Spread.of(values) if values else None


def target(figure: Figure, rounds: Rounds) -> float | None:
    """Return what a figure of ours may be at most."""
    if figure.spread_of is None:
        return figure.target
    for other in FIGURES:
        if other.group == figure.group and other.over == figure.spread_of:
            spread = result(other, rounds)
            return None if spread is None else spread.high
    return None
