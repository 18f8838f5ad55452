"""How a supervisor ends: when it cancels and gives up whom, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

import anyio

from .live import LiveTasks
from .observer import Observers, TaskEvent, TaskEventKind
from .tasks import Task, TaskStatus, is_over
from .values import Value

__all__ = ["SHUTTING_DOWN", "Drain", "DrainPlan", "DrainReport"]

SHUTTING_DOWN = "the app is shutting down"
"""Why a drain cancels tasks, for the record."""

_TOO_LATE = "the app was shut down before the moment of the request that it waited for"

CLEANUP = 5.0
"""Seconds that a cancelled task has to clean up, if the deadline leaves them."""

WARN_EVERY = 10.0
"""Seconds between two records of whom a drain still waits for."""


class DrainPlan:
    """The moments of a drain, in seconds from its start.

    :param grace: seconds in which every task may end by itself
    :param shutdown_timeout: seconds after which all is over; ``None``: for ever
    """

    def __init__(self, grace: float, shutdown_timeout: float | None) -> None:
        deadline = math.inf if shutdown_timeout is None else shutdown_timeout
        last_call = deadline if deadline == math.inf else deadline - min(CLEANUP, deadline / 2)
        cancel = min(grace, last_call)
        self.cancel_unshielded = cancel
        """When what may be lost is cancelled."""
        self.abandon_unshielded = min(cancel + CLEANUP, deadline)
        """When what may be lost and has not ended is given up."""
        self.cancel_shielded = last_call
        """When what must not be lost is cancelled all the same; infinite without a deadline."""
        self.abandon_all = deadline
        """The deadline; infinite without one."""


class DrainReport(Value):
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

    def __init__(
        self,
        finished: tuple[Task, ...],
        cancelled: tuple[Task, ...],
        abandoned: tuple[Task, ...],
        never_started: tuple[Task, ...],
        duration: float,
    ) -> None:
        vars(self).update(
            finished=finished,
            cancelled=cancelled,
            abandoned=abandoned,
            never_started=never_started,
            duration=duration,
        )

    def __str__(self) -> str:
        return (
            f"{len(self.finished)} finished, {len(self.cancelled)} cancelled, "
            f"{len(self.abandoned)} abandoned, {len(self.never_started)} never started "
            f"in {self.duration:.3f} s"
        )


class Drain:
    """One drain: sees tasks to their end, in the steps of its plan, and keeps count.

    :param live: the tasks that are there
    :param observers: who is told of each step
    :param plan: when the steps are taken
    :param on_last_call: is called when the shielded tasks are about to be cancelled
    """

    def __init__(
        self,
        live: LiveTasks,
        observers: Observers,
        plan: DrainPlan,
        on_last_call: Callable[[], None],
    ) -> None:
        self._live = live
        self._observers = observers
        self._plan = plan
        self._on_last_call = on_last_call
        self._start = anyio.current_time()
        self._finished: list[Task] = []
        self._cancelled: list[Task] = []
        self._abandoned: list[Task] = []
        self._never_started: list[Task] = []
        live.forget_ended()  # before anybody counts
        live.listeners.append(self.note_over)

    async def run(self) -> None:
        """Take the steps, until no task is live."""
        self._tell(TaskEventKind.DRAIN_STARTED, self._live.tasks())
        plan = self._plan
        steps: list[tuple[float, Callable[[], None]]] = [
            (plan.cancel_unshielded, lambda: self._cancel(shielded=False)),
            (plan.abandon_unshielded, self._give_up_unshielded),
            (plan.cancel_shielded, self._last_call),
            (plan.abandon_all, self._abandon),
        ]
        for seconds, step in sorted(steps, key=itemgetter(0)):
            if await self._is_empty_before(self._start + seconds):
                return
            step()

    def finish(self) -> DrainReport:
        """Give up what is left, tell the observers, and return what became of the tasks.

        Something is left only if the drain was cancelled, by a server that lost patience, or
        ends in this very moment.
        """
        self._live.drop_waiting(_TOO_LATE)
        self._cancel()
        self._live.forget_ended()
        self._abandon()
        report = DrainReport(
            tuple(self._finished),
            tuple(self._cancelled),
            tuple(self._abandoned),
            tuple(self._never_started),
            anyio.current_time() - self._start,
        )
        # Else both keep each other, and the tasks, until the garbage collector comes.
        self._live.listeners.remove(self.note_over)
        self._observers.tell(TaskEvent(TaskEventKind.DRAIN_FINISHED, report=report))
        return report

    def note_over(self, task: Task) -> None:
        """Count a task that is over."""
        if task.status is not TaskStatus.CANCELLED:
            self._finished.append(task)
        elif task.attempt:
            self._cancelled.append(task)
        else:
            self._never_started.append(task)

    async def _is_empty_before(self, moment: float) -> bool:
        """Wait for the live tasks until a moment, and say now and then for whom."""
        warn_at = self._next_warning()
        while warn_at < moment:
            if await self._live.wait_until_empty(warn_at):
                return True
            self._tell(TaskEventKind.DRAIN_WAITING, self._live.tasks())
            warn_at += WARN_EVERY
        return await self._live.wait_until_empty(moment)

    def _next_warning(self) -> float:
        passed = anyio.current_time() - self._start
        return self._start + (passed // WARN_EVERY + 1) * WARN_EVERY

    def _give_up_unshielded(self) -> None:
        # Requests that were cancelled have had their time, too: their tasks cannot begin any more.
        self._live.drop_waiting(_TOO_LATE)
        self._abandon(shielded=False)

    def _last_call(self) -> None:
        self._on_last_call()
        self._cancel()

    def _cancel(self, *, shielded: bool | None = None) -> None:
        live = self._live.tasks(shielded=shielded)
        tasks = tuple(task for task in live if not _is_ending(task))
        if tasks:
            self._tell(TaskEventKind.DRAIN_CANCELLING, tasks)
            self._live.cancel(tasks, SHUTTING_DOWN)

    def _abandon(self, *, shielded: bool | None = None) -> None:
        tasks = self._live.tasks(shielded=shielded)
        if tasks:
            self._tell(TaskEventKind.DRAIN_ABANDONING, tasks)
            self._live.abandon(tasks)
            self._abandoned.extend(tasks)

    def _tell(self, kind: TaskEventKind, tasks: tuple[Task, ...]) -> None:
        self._observers.tell(TaskEvent(kind, tasks))


def _is_ending(task: Task) -> bool:
    """Return whether a task was cancelled before; once more would break into its cleaning up.

    If only threads are left of it, there is nothing to cancel.
    """
    if task.awaits_strays:
        return True
    if is_over(task):  # its error handler runs, which an earlier cancellation did not reach
        return task.cancel_reason == SHUTTING_DOWN
    return task.cancel_reason != ""
