"""Who watches: the observer protocol with its one event, the fan-out that survives a bad
observer, and the first observer of every supervisor, which keeps the log."""

from __future__ import annotations

import logging
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from .callables import qualified_name
from .values import Value

if TYPE_CHECKING:
    from .drain import DrainReport
    from .tasks import Task

__all__ = [
    "Observers",
    "TaskEvent",
    "TaskEventKind",
    "TaskObserver",
    "describe",
    "logger",
    "report_bad_retry",
]

logger = logging.getLogger("fastapi_tasks")


class TaskEventKind(StrEnum):
    """What a :class:`TaskEvent` tells of."""

    SCHEDULED = "scheduled"
    STARTED = "started"
    FINISHED = "finished"
    RETRYING = "retrying"
    FAILED = "failed"
    HANDLER_FAILED = "handler_failed"
    CANCELLED = "cancelled"
    DROPPED = "dropped"
    DRAIN_STARTED = "drain_started"
    DRAIN_CANCELLING = "drain_cancelling"
    DRAIN_WAITING = "drain_waiting"
    DRAIN_ABANDONING = "drain_abandoning"
    DRAIN_FINISHED = "drain_finished"


class TaskEvent(Value):
    """Something that happened to a task, or to all of them."""

    kind: TaskEventKind
    """What happened."""
    tasks: tuple[Task, ...]
    """Whom it happened to: one task, or in the steps of a drain all that the step is about."""
    error: BaseException | None
    """What the function or its error handler raised."""
    reason: str
    """Why the task was cancelled or dropped."""
    wait: float
    """Seconds until the next attempt, if the task is retried."""
    expected: bool
    """Whether the task was dropped because its ``run_if`` asks for that."""
    report: DrainReport | None
    """What came of the drain, when it has finished."""

    def __init__(
        self,
        kind: TaskEventKind,
        tasks: tuple[Task, ...] = (),
        error: BaseException | None = None,
        reason: str = "",
        wait: float = 0.0,
        expected: bool = False,
        report: DrainReport | None = None,
    ) -> None:
        vars(self).update(
            kind=kind,
            tasks=tasks,
            error=error,
            reason=reason,
            wait=wait,
            expected=expected,
            report=report,
        )

    @property
    def task(self) -> Task:
        """The task, in an event about one."""
        (task,) = self.tasks
        return task


class TaskObserver(Protocol):
    """A function that is told what happens: ``add_tasks(app, observers=[observe])``.

    It is called at once and must not block. It is called in the event loop's thread, but for the
    events of tasks that are scheduled or dropped in another one, which come from there. What it
    raises is logged and goes no further.
    """

    def __call__(self, event: TaskEvent, /) -> None:
        """Take note of an event."""
        ...


class Observers:
    """The observers of one supervisor, the log first."""

    __slots__ = ("_observers", "is_watched")

    def __init__(self, observers: Sequence[TaskObserver]) -> None:
        self._set((keep_log, *observers))

    def join(self, observer: TaskObserver) -> None:
        """Tell one more observer, from now on, of everything.

        :param observer: one that has not joined
        """
        self._set((*self._observers, observer))

    def leave(self) -> None:
        """Tell the observer no more that joined last."""
        self._set(self._observers[:-1])

    def _set(self, observers: tuple[TaskObserver, ...]) -> None:
        self._observers = observers
        self.is_watched = len(observers) > 1
        """Whether others than the log want to hear of what happens to every task."""

    def tell(self, event: TaskEvent) -> None:
        """Tell every observer of an event, whatever the others do."""
        for observer in self._observers:
            try:
                observer(event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                _report_bad_observer(observer, error)


def _report_bad_observer(observer: TaskObserver, error: BaseException) -> None:
    try:
        logger.error(
            "The observer %s raised; the event goes on to the others",
            qualified_name(observer),
            exc_info=_exc_info(error),
        )
    except Exception:
        # It is the log that is broken, so there is nothing left but standard error.
        traceback.print_exc(file=sys.stderr)


def report_bad_retry(task: Task, error: BaseException) -> None:
    """Log what has kept a task from being retried: a function that was to decide about it."""
    logger.error(
        "Task %s is not retried: the function that was asked about it, or a hook, raised",
        _label(task),
        exc_info=_exc_info(error),
    )


def keep_log(event: TaskEvent) -> None:
    """Write the records of this package: one for each event, none with an argument's value."""
    match event.kind:
        case TaskEventKind.FAILED:
            _log_task(logging.ERROR, "Task %s failed in attempt %d", event, event.task.attempt)
        case TaskEventKind.RETRYING:
            message = "Task %s failed in attempt %d, the next one follows in %.3g s"
            _log_task(logging.WARNING, message, event, event.task.attempt, event.wait)
        case TaskEventKind.HANDLER_FAILED:
            _log_task(logging.ERROR, "on_error of task %s failed", event)
        case TaskEventKind.DROPPED:
            level = logging.DEBUG if event.expected else logging.WARNING
            _log_task(level, "Task %s was dropped: %s", event, event.reason)
        case TaskEventKind.CANCELLED:
            # One that comes with an error was not asked for by anybody.
            level = logging.INFO if event.error is None else logging.WARNING
            _log_task(level, "Task %s was cancelled: %s", event, event.reason)
        case TaskEventKind.DRAIN_STARTED:
            logger.info("Shutdown: draining %d tasks", len(event.tasks))
        case TaskEventKind.DRAIN_CANCELLING:
            logger.warning("Shutdown: cancelling %s", describe(event.tasks))
        case TaskEventKind.DRAIN_WAITING:
            logger.warning("Shutdown: still waiting for %s", describe(event.tasks))
        case TaskEventKind.DRAIN_ABANDONING:
            logger.warning(
                "Shutdown: abandoning %s, which did not end in time", describe(event.tasks)
            )
        case TaskEventKind.DRAIN_FINISHED:
            logger.info("Shutdown: drained, %s", event.report)
        case _:  # scheduled, started, finished: what every task goes through
            _log_task(logging.DEBUG, f"Task %s {event.kind}", event)


def _log_task(level: int, message: str, event: TaskEvent, *details: object) -> None:
    if logger.isEnabledFor(level):
        task = event.task
        fields = {"task_name": task.name, "task_id": task.id, "task_attempt": task.attempt}
        logger.log(
            level, message, _label(task), *details, exc_info=_exc_info(event.error), extra=fields
        )


def _exc_info(
    error: BaseException | None,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    # An error by itself would be asked whether it is true, which one without parts may deny.
    return None if error is None else (type(error), error, error.__traceback__)


def _label(task: Task) -> str:
    return f"{task.name} ({task.id})"


def describe(tasks: Iterable[Task]) -> str:
    """Name tasks for a log record that stays readable however many they are.

    :param tasks: the tasks; those of one name are counted, a single one is given with its id
    """
    tasks = tuple(tasks)
    names = [f"the thread of {t.name}" if t.awaits_strays else t.name for t in tasks]
    counts = Counter(names)
    ids = {name: task.id for name, task in zip(names, tasks, strict=True)}
    return ", ".join(
        f"{name} x{count}" if count > 1 else f"{name} ({ids[name]})"
        for name, count in counts.items()
    )
