"""The tasks that a supervisor has started and that are not over: its running set.

And the requests that are being served, since some of their tasks may still wait for their moments.
"""

# Each task's end comes here, and pays for every call: its status is looked at without one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio

from .history import History
from .observer import Observers, TaskEvent, TaskEventKind
from .runner import BY_OTHERS, Runner
from .spawn import Handle, Over, Spawner
from .tasks import Task, TaskStatus, is_over, is_pending, record_of, settle, settle_unbegun

__all__ = ["LOST", "LiveTasks", "OpenRequest", "give_up"]

LOST = "the event loop was closed before the app was shut down"
"""The reason of what becomes of tasks whose event loop is no more."""

_PENDING = TaskStatus.PENDING


class OpenRequest(Protocol):
    """A request that is being served, as the drain sees it."""

    def has_waiting(self) -> bool:
        """Return whether tasks wait for one of its moments."""
        ...

    def waiting(self) -> tuple[Task, ...]:
        """Return them, from any thread."""
        ...

    def end_response(self) -> None:
        """Release what waits for the response, if that has begun: the server is done with it."""
        ...

    def drop_waiting(self, reason: str) -> None:
        """Give up the tasks that wait."""
        ...


class LiveTasks:
    """Starts tasks in one event loop, keeps them from being collected, and forgets them at once.

    All of it happens in the loop's thread.

    :param spawner: the loop's
    :param runner: what runs each task
    :param observers: who is told
    :param history: what remembers those that are over
    :param listeners: are called with each task that is over
    :param requests: those whose tasks may come to wait
    """

    def __init__(
        self,
        spawner: Spawner,
        runner: Runner,
        observers: Observers,
        history: History,
        listeners: list[Callable[[Task], None]],
        requests: set[OpenRequest],
    ) -> None:
        self._spawner = spawner
        self._runner = runner
        self._observers = observers
        self._history = history
        self._tasks: dict[Handle, Task] = {}
        self._abandoned: dict[Handle, Task] = {}
        self._requests = requests
        self._waits_for_requests = True
        self.empty: anyio.Event | None = None
        """What :meth:`wake_if_empty` sets, if somebody has waited for that."""
        self.listeners = listeners
        """Are called with each task that is over: those who keep count."""

    def tasks(self, *, shielded: bool | None = None) -> tuple[Task, ...]:
        """Return the tasks that have something left to do, the oldest first.

        :param shielded: only those that are, or only those that are not
        """
        return tuple(
            task
            # A copy, since threads ask for it too, in the middle of the loop's changes.
            for task in self._tasks.copy().values()
            if (shielded is None or task.config.shielded is shielded) and not _has_ended(task)
        )

    def ended(self) -> tuple[Task, ...]:
        """Return the other ones, which only wait for the loop to say that they are over."""
        return tuple(task for task in self._tasks.copy().values() if _has_ended(task))

    def all(self) -> tuple[Task, ...]:
        """Return the tasks of both kinds, from any thread."""
        return tuple(self._tasks.copy().values())

    def waiting(self) -> tuple[Task, ...]:
        """Return the tasks that wait for a moment of an open request, from any thread."""
        return tuple(task for request in self._requests.copy() for task in request.waiting())

    def __len__(self) -> int:
        """Return how many tasks there are, with those that only wait for the loop to say so."""
        return len(self._tasks)

    def start(self, over: Over, task: Task) -> None:
        """Start a task, or drop it if the event loop is closed.

        :param over: our own :meth:`over`, which is bound once for all tasks
        """
        main = self._runner.run(task, over)
        try:
            handle = self._spawner.spawn(main, task.name, task.context, over)
        except RuntimeError:
            main.close()
            give_up(task, TaskEventKind.DROPPED, LOST, self._observers, history=self._history)
            return
        task.handle = handle
        self._tasks[handle] = task

    def cancel(self, tasks: tuple[Task, ...], reason: str) -> None:
        """Cancel tasks, error handlers included.

        :param tasks: live ones
        :param reason: why, for the record
        """
        for task in tasks:
            task.cancel_reason = reason
            if is_pending(task):
                give_up(task, TaskEventKind.CANCELLED, reason, self._observers)
            if task.in_threads:
                task.cancel_pending = True
            else:
                self._spawner.cancel(task.handle)

    def wake_if_empty(self) -> None:
        """Wake up who waits until no task is live or waits, if it is so."""
        if self.empty is not None and self._is_empty():
            self.empty.set()

    def end_responses(self) -> None:
        """Release what waits for responses that the server is done with."""
        for request in self._requests.copy():
            request.end_response()

    def waiting_requests(self) -> int:
        """Return how many requests have tasks that wait for a moment, from any thread."""
        return sum(request.has_waiting() for request in self._requests.copy())

    def drop_waiting(self, reason: str) -> None:
        """Give up what still waits for a moment of its request, and wait for no request more."""
        self._waits_for_requests = False
        for request in self._requests.copy():
            request.drop_waiting(reason)

    def abandon(self, tasks: tuple[Task, ...]) -> None:
        """Forget tasks that do not end.

        :param tasks: live ones
        """
        for task in tasks:
            self._history.remember(record_of(task))  # first, as below
            self._abandoned[task.handle] = self._tasks.pop(task.handle)
            self._spawner.abandon(task.handle)
            task.abandoned = True

    def forget_ended(self) -> None:
        """Forget the tasks that only wait for the loop to say that they are over."""
        for handle, task in self._tasks.copy().items():
            if _has_ended(task):
                self.over(handle)

    def lose(self, reason: str) -> None:
        """Give up all tasks, begun or not, since the event loop is closed.

        :param reason: why, for the records
        """
        for task in self.all():
            is_lost = not is_over(task)
            if is_lost:
                settle(task, TaskStatus.CANCELLED)
                _let_go(task)
            self._history.remember(record_of(task))
            if is_lost:
                event = TaskEvent(TaskEventKind.DROPPED, (task,), reason=reason)
                self._observers.tell(event)

    async def wait_until_empty(self, moment: float) -> bool:
        """Wait until no task is live or waits, or until a moment; return whether none does.

        :param moment: on the event loop's clock, in seconds
        """
        while not self._is_empty():
            left = moment - anyio.current_time()
            if left <= 0:
                return False
            if self.empty is None or self.empty.is_set():
                self.empty = anyio.Event()  # others may wait for the one that there is
            with anyio.move_on_after(left):
                await self.empty.wait()
        return True

    def over(self, handle: Handle) -> None:
        """Forget a task that is over, whether it ever ran or not."""
        task = self._tasks.get(handle)
        if task is None:
            abandoned = self._abandoned.pop(handle, None)
            if abandoned is not None:  # else it was forgotten before
                self._history.remember(record_of(abandoned))  # once more, as what it has become
                _let_go(abandoned)
            return
        # Somebody else may have cancelled it before its first step, which on asyncio then never
        # comes.
        try:
            if task._status is _PENDING:
                give_up(task, TaskEventKind.CANCELLED, BY_OTHERS, self._observers)
            # First: threads that look for it look here and then there.
            self._history.remember(record_of(task))
        finally:
            del self._tasks[handle]
        task.handle = task.context = task.request_end = None  # as _let_go() does, without a call
        for listener in self.listeners:
            listener(task)
        if self.empty is not None:
            self.wake_if_empty()

    def _is_empty(self) -> bool:
        if self._tasks:
            return False
        return not self._waits_for_requests or not any(
            request.has_waiting() for request in self._requests.copy()
        )


def _let_go(task: Task) -> None:
    """Take from a task what it needed to run.

    The context refers to the task, and so may the request's error, by the endpoint's frame: they
    would wait for the garbage collector.
    """
    task.handle = task.context = task.request_end = None


def _has_ended(task: Task) -> bool:
    """Return whether a live task only waits for the loop to say that it is over."""
    may_handle = (
        task.status is TaskStatus.FAILED
        and task.config.on_error is not None
        and isinstance(task.exception(), Exception)
    )
    return is_over(task) and not may_handle and all(call.over.is_set() for call in task.strays)


def give_up(
    task: Task,
    kind: TaskEventKind,
    reason: str,
    observers: Observers,
    *,
    expected: bool = False,
    history: History | None = None,
) -> bool:
    """Settle a task that has not begun and never will, from any thread.

    :param task: a pending task
    :param kind: whether it was cancelled or dropped
    :param reason: why, for the record
    :param observers: who is told
    :param expected: whether that is what its configuration asks for
    :param history: what remembers it, if it is no live one, which is remembered later
    :return: ``False`` if it has begun, or was over already
    """
    if not settle_unbegun(task):
        return False
    task.context = task.request_end = None
    if history is not None:
        history.remember(record_of(task))
    observers.tell(TaskEvent(kind, (task,), reason=reason, expected=expected))
    return True
