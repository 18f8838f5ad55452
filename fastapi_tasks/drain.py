"""The end of a supervisor as data: when it cancels and gives up whom, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


from .task import Task, TaskStatus

__all__ = ["CLEANUP", "WARN_EVERY", "DrainLog", "DrainPlan", "DrainReport"]

CLEANUP = 5.0
"""Seconds that a cancelled task has to clean up, if the deadline leaves them."""

WARN_EVERY = 10.0
"""Seconds between two records of whom a drain still waits for."""


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """The moments of a drain, in seconds from its start."""

    cancel_unshielded: float
    """When what may be lost is cancelled."""
    abandon_unshielded: float
    """When what may be lost and has not ended is given up."""
    cancel_shielded: float
    """When what must not be lost is cancelled all the same; infinite without a deadline."""
    abandon_all: float
    """The deadline; infinite without one."""

    @classmethod
    def of(cls, grace: float, shutdown_timeout: float | None) -> DrainPlan:
        """Work out the moments.

        :param grace: seconds in which every task may end by itself
        :param shutdown_timeout: seconds after which all is over; ``None``: for ever
        """
        deadline = math.inf if shutdown_timeout is None else shutdown_timeout
        last_call = deadline if deadline == math.inf else deadline - min(CLEANUP, deadline / 2)
        cancel = min(grace, last_call)
        return cls(cancel, min(cancel + CLEANUP, deadline), last_call, deadline)


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the tasks that were there when a drain began, or came while it went on."""

    finished: tuple[Task, ...]
    """Those that ran to their end, well or with an error."""
    cancelled: tuple[Task, ...]
    """Those that were cancelled while they ran."""
    abandoned: tuple[Task, ...]
    """Those that had not ended when their time was up; they may still be running."""
    never_started: tuple[Task, ...]
    """Those that were dropped before they began."""
    duration: float
    """How long the drain took, in seconds."""

    def __str__(self) -> str:
        return (
            f"{len(self.finished)} finished, {len(self.cancelled)} cancelled, "
            f"{len(self.abandoned)} abandoned, {len(self.never_started)} never started "
            f"in {self.duration:.3f} s"
        )


class DrainLog:
    """The notes that a report is made from, while the drain goes on."""

    def __init__(self) -> None:
        self._finished: list[Task] = []
        self._cancelled: list[Task] = []
        self._abandoned: list[Task] = []
        self._never_started: list[Task] = []

    def note_over(self, task: Task) -> None:
        """Note that a task is over."""
        if task.status is not TaskStatus.CANCELLED:
            self._finished.append(task)
        elif task.attempt:
            self._cancelled.append(task)
        else:
            self._never_started.append(task)

    def note_abandoned(self, task: Task) -> None:
        """Note that a task is not over, and is not waited for any longer."""
        self._abandoned.append(task)

    def report(self, duration: float) -> DrainReport:
        """Return what was noted.

        :param duration: how long the drain took, in seconds
        """
        return DrainReport(
            tuple(self._finished),
            tuple(self._cancelled),
            tuple(self._abandoned),
            tuple(self._never_started),
            duration,
        )
