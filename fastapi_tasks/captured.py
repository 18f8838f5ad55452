"""What a test was told of the tasks that were scheduled in it, and what it can assert of them."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast, overload

from .callables import parts, qualified_name
from .observer import TaskEvent, TaskEventKind
from .scheduler import TasksScheduler
from .supervisor import Supervisor
from .tasks import Moment, Task

__all__ = ["CapturedTasks", "TasksOfMoment"]

P = ParamSpec("P")
T = TypeVar("T")

_MOMENTS: tuple[Moment, ...] = ("now", "after_route", "after_response")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class _Record:
    """All tasks, and why some of them never begin."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.dropped: dict[Task, str] = {}


class TasksOfMoment(Sequence[Task]):
    """The tasks that were scheduled for some moment, without those that were dropped.

    A sequence, in the order in which they were scheduled.
    """

    def __init__(self, record: _Record, moments: tuple[Moment, ...]) -> None:
        self._record = record
        self._moments = moments

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        return self._tasks()[index]

    def __len__(self) -> int:
        return len(self._tasks())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._tasks()}>"

    @overload
    def of(self, func: Callable[P, Awaitable[T]], /) -> Sequence[Task[P, T]]: ...
    @overload
    def of(self, func: Callable[P, T], /) -> Sequence[Task[P, T]]: ...
    def of(self, func: Callable[P, Any], /) -> Sequence[Task]:
        """Return the tasks of a function, whatever their arguments.

        :param func: what was given to ``schedule``
        """
        return [task for task in self._tasks() if _is_of(task, func)]

    @overload
    def assert_scheduled(
        self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[P, T]: ...
    @overload
    def assert_scheduled(
        self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[P, T]: ...
    def assert_scheduled(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task:
        """Check that a call was scheduled, once or more often.

        Whether an argument was given by its name or its place, or left to its default, makes no
        difference.

        :param func: what was given to ``schedule``
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: the task; the first one, if there are several
        :raises AssertionError: it was not; the text lists what was, with all arguments
        """
        wanted = _call_of(func, args, kwargs)
        for task in self._tasks():
            if _is_equal(_call_of(task.func, task.args, task.kwargs), wanted):
                return task
        raise AssertionError(
            f"{_shown_call(func, args, kwargs)} was not scheduled{self._where()}.\n{self._listed()}"
        )

    def assert_not_scheduled(self, func: Callable[..., object], /) -> None:
        """Check that no call of a function was scheduled, whatever its arguments.

        :param func: what could have been given to ``schedule``
        :raises AssertionError: one was; the text lists what was, with all arguments
        """
        if any(_is_of(task, func) for task in self._tasks()):
            raise AssertionError(
                f"{qualified_name(func)} was scheduled{self._where()}.\n{self._listed()}"
            )

    def _tasks(self) -> list[Task]:
        record = self._record
        return [
            task
            for task in record.tasks
            if task not in record.dropped and task.moment in self._moments
        ]

    def _where(self) -> str:
        return f" for {self._moments[0]}" if len(self._moments) == 1 else ""

    def _listed(self) -> str:
        record = self._record
        lines = [
            f"  {task.moment:14}  {_shown_call(task.func, task.args, task.kwargs)}"
            + (f"  # dropped: {record.dropped[task]}" if task in record.dropped else "")
            for task in record.tasks
        ]
        return "\n".join(["Scheduled were:", *lines]) if lines else "Nothing was scheduled."


class CapturedTasks(TasksOfMoment):
    """All tasks that were scheduled in a test, without those that were dropped.

    :param supervisor: what they were scheduled on
    """

    def __init__(self, supervisor: Supervisor) -> None:
        record = _Record()
        super().__init__(record, _MOMENTS)
        self.tasks = TasksScheduler(supervisor)
        """A place to schedule on: for services and endpoints that a test calls itself."""
        self.now = TasksOfMoment(record, ("now",))
        """Those that start at once."""
        self.after_route = TasksOfMoment(record, ("after_route",))
        """Those that start when the endpoint has returned."""
        self.after_response = TasksOfMoment(record, ("after_response",))
        """Those that start when the response is over."""

    @property
    def dropped(self) -> Sequence[Task]:
        """Those that never begin: the request ended in a way that their ``run_if`` excludes, or
        somebody has cancelled them before their moment came."""
        return list(self._record.dropped)

    def observe(self, event: TaskEvent) -> None:
        """Take note of what happens to tasks: an observer."""
        if event.kind is TaskEventKind.SCHEDULED:
            self._record.tasks.append(event.task)
        elif event.kind is TaskEventKind.DROPPED or (
            event.kind is TaskEventKind.CANCELLED and not event.task.attempt
        ):
            self._record.dropped[event.task] = event.reason


def _plain(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the call that a call of partials ends in."""
    while isinstance(func, functools.partial):
        part = cast(Any, func)
        func, args, kwargs = part.func, part.args + args, part.keywords | kwargs
    return func, args, kwargs


def _call_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], object]:
    """Return what equals the same of another call, if both do the same."""
    func, args, kwargs = _plain(func, args, kwargs)
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
    except (TypeError, ValueError):  # it does not fit, or it is a builtin of which nothing is known
        return func, (args, kwargs)
    bound.apply_defaults()
    return func, bound.arguments


def _is_equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # an array's answer is an array, which is neither true nor false
        return False


def _is_of(task: Task, func: Callable[..., object]) -> bool:
    return task.func == func or parts(task.func)[0] == func


def _shown_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    # In a test's own failure, and nowhere else: there the arguments are what it is about.
    func, args, kwargs = _plain(func, args, kwargs)
    shown = [_SHORT.repr(arg) for arg in args]
    shown += [f"{name}={_SHORT.repr(value)}" for name, value in kwargs.items()]
    return f"{qualified_name(func)}({', '.join(shown)})"
