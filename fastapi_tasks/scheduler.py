"""WHEN tasks start: :class:`TasksScheduler`, one per request, and its two batches."""

# A batch is made of what its request has, which pyright does not know for one and the same thing.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import deque
from typing import Protocol

from .bound import BoundTasks, ImmediateTasks
from .config import INHERIT_ALL, RunIf, TaskConfig
from .supervisor import Supervisor
from .tasks import Moment, RequestEnd, Task

__all__ = ["TasksBatch", "TasksScheduler"]

_STARTING_AFTER_SUCCESS: tuple[RunIf | None, ...] = (None, "success", "always")
_STARTING_AFTER_FAILURE: tuple[RunIf | None, ...] = ("error", "always")


class TasksBatch(BoundTasks):
    """Tasks that wait for a moment of the request: ``tasks.after_route``, ``.after_response``.

    What is scheduled once the moment has passed starts at once.

    :param request: the tasks of the request
    :param moment: which moment that is
    """

    __slots__ = ("_failed", "_taken", "_waiting", "end")

    def __init__(self, request: TasksScheduler, moment: Moment) -> None:
        # A batch is the request's tasks at another moment, and so it has what they have; to put
        # that together again for each batch, as super().__init__() does, would cost twice as much.
        self._home = request._home
        self._inherited = request._inherited
        self._own = request._own
        self._endpoint = request._endpoint
        self._config = request._config
        self._moment = moment
        self.end = request.end
        """How the request ends; not the request itself, which leads back here. ``None`` once it has
        ended with an error, which would lead back here too."""
        self._waiting: deque[Task] = deque()
        self._taken: Task | None = None
        self._failed: bool | None = None

    def release(self, failed: bool) -> bool:
        """Start the tasks that wait and whose ``run_if`` fits, and drop the others.

        It may be called again and from any thread: each task starts once, and what the first
        call says of the request stays true.

        :param failed: whether the request went wrong
        :return: whether any task was started
        """
        if self._failed is None:
            self._failed = failed
        failed = self._failed
        starting = _STARTING_AFTER_FAILURE if failed else _STARTING_AFTER_SUCCESS
        started = False
        while self._waiting:  # asked before each, which is cheaper than an error after the last
            try:
                self._taken = self._waiting[0]  # for those who look meanwhile
                task = self._waiting.popleft()
            except IndexError:  # another thread was faster
                break
            if task.config.run_if in starting:
                self._home.submit(task)
                started = True
            else:
                self._drop_unfit(task, failed=failed)
        self._taken = None
        return started

    def has_waiting(self) -> bool:
        """Return whether tasks wait for the moment."""
        return bool(self._waiting)

    def waiting(self) -> tuple[Task, ...]:
        """Return them, and one that is being started just now, from any thread."""
        waiting = self._waiting.copy()
        taken = self._taken
        return tuple(waiting) if taken is None else (taken, *waiting)

    def drop(self, reason: str) -> None:
        """Give up the tasks that wait; a later release passes over them.

        :param reason: why, for the records
        """
        for task in self.waiting():
            self._home.drop(task, reason)

    def _drop_unfit(self, task: Task, *, failed: bool) -> None:
        run_if = task.config.run_if or "success"
        outcome = "failed" if failed else "succeeded"
        reason = f'the request {outcome}, and the task has run_if="{run_if}"'
        self._home.drop(task, reason, expected=run_if == "error")

    def _place(self, task: Task) -> None:
        task.request_end = self.end
        self._waiting.append(task)
        # Looked at afterwards: a release in another thread sees the task, or this one sees it.
        if self._failed is not None:
            self.release(self._failed)

    def _check(self, config: TaskConfig) -> None:
        return None


class Request(Protocol):
    """What a scheduler needs from the request that it belongs to."""

    def made_late(self) -> None:
        """Take note that tasks may come to wait though the route is over, from any thread."""
        ...


class TasksScheduler(ImmediateTasks):
    """The tasks of one request: what an endpoint's ``tasks: Tasks`` is.

    Tasks scheduled on it start now, beside the endpoint.

    :param supervisor: where the tasks run
    :param config: the app's configuration; by default the supervisor's
    :param endpoint: the endpoint that schedules them, if there is one
    """

    __slots__ = (
        "_owes_turn",
        "_response_failed",
        "_route_failed",
        "batches",
        "end",
        "is_over",
        "request",
    )

    _home: Supervisor

    def __init__(
        self,
        supervisor: Supervisor,
        config: TaskConfig | None = None,
        endpoint: object = None,
    ) -> None:
        # What super().__init__() would do with these; each request makes one, and pays for calls.
        self._home = supervisor
        self._inherited = self._config = supervisor.settings.config if config is None else config
        self._own = INHERIT_ALL
        self._endpoint = endpoint
        self._moment = "now"
        # Made when somebody asks: most requests have tasks for one moment at most.
        self.batches: dict[Moment, TasksBatch] = {}
        """Those that somebody has asked for."""
        self._route_failed: bool | None = None
        self._response_failed: bool | None = None
        self.is_over = False
        """Whether everything was released."""
        self.request: Request | None = None
        """Is told when tasks may come to wait though the route is over."""
        self.end: RequestEnd | None = RequestEnd()
        """How the request ends. ``None`` once it has ended with an error."""
        self._owes_turn = False

    @property
    def supervisor(self) -> Supervisor:
        """Where the tasks run."""
        return self._home

    @property
    def after_route(self) -> TasksBatch:
        """Tasks scheduled on it start when the endpoint has returned, before its value is
        serialized."""
        batch = self.batches.get("after_route")
        if batch is None:
            # Two threads may ask at once, and get the same one. A lock would cost ten times this.
            batch = self.batches.setdefault("after_route", TasksBatch(self, "after_route"))
            # Looked up after the assignment: the moment may come between the two, and then one of
            # both sees what the other did.
            if self._route_failed is not None:
                self._made_late(batch, self._route_failed)
        return batch

    @property
    def after_response(self) -> TasksBatch:
        """Tasks scheduled on it start when the response is over: it was sent, or the client is
        gone."""
        batch = self.batches.get("after_response")
        if batch is None:
            # As above.
            batch = self.batches.setdefault("after_response", TasksBatch(self, "after_response"))
            if self._route_failed is not None:
                self._made_late(batch, self._response_failed)
        return batch

    def _made_late(self, batch: TasksBatch, failed: bool | None) -> None:
        request = self.request
        if request is not None:
            request.made_late()
        if failed is not None:
            batch.release(failed)

    def route_over(self, failed: bool) -> bool:
        """Release the tasks that wait for the endpoint.

        :param failed: whether it raised
        :return: as of :meth:`takes_turn`
        """
        if self._route_failed is None:
            self._route_failed = failed
        batch = self.batches.get("after_route") if self.batches else None
        if batch is not None and batch.release(self._route_failed):
            self._owes_turn = True
        if not self._owes_turn:  # as takes_turn() does, without a call
            return False
        self._owes_turn = False
        return True

    def response_over(self, failed: bool) -> None:
        """Release the tasks that wait for the response, and those that wait for the endpoint.

        :param failed: whether the request went wrong anywhere
        """
        if self._route_failed is None:
            self._owes_turn = self.route_over(failed)
        if self._response_failed is None:
            self._response_failed = failed
        if self.batches:  # looked at after the assignments, as in after_route
            batch = self.batches.get("after_route")
            if batch is not None and batch._waiting:
                self._owes_turn = self.route_over(failed)
            batch = self.batches.get("after_response")
            if batch is not None and batch.release(self._response_failed):
                self._owes_turn = True
        # Last: whoever interrupts it leaves the rest to the next one who calls.
        self.is_over = True

    def close(self, failed: bool) -> None:
        """Release what is left, since the request is over.

        :param failed: whether it went wrong anywhere
        """
        if not self.is_over:
            self.response_over(failed)
        self.request = None
        if self.end is not None and self.end.error is not None:
            # Its tasks alone are to know it: it leads to the frames of the request, and those
            # lead here.
            self.end = None
            for batch in self._made():
                batch.end = None

    def takes_turn(self) -> bool:
        """Return, once each time, whether tasks were started that have not had the loop yet."""
        if not self._owes_turn:
            return False
        self._owes_turn = False
        return True

    def has_waiting(self) -> bool:
        """Return whether tasks wait for a moment of the request."""
        return any(batch.has_waiting() for batch in self._made())

    def waiting(self) -> tuple[Task, ...]:
        """Return them, from any thread."""
        return tuple(task for batch in self._made() for task in batch.waiting())

    def drop_waiting(self, reason: str) -> None:
        """Give up the tasks that wait for a moment of the request.

        :param reason: why, for the records
        """
        for batch in self._made():
            batch.drop(reason)

    def _made(self) -> tuple[TasksBatch, ...]:
        """Return the batches that somebody has asked for, from any thread."""
        return tuple(self.batches.values())

    def _place(self, task: Task) -> None:
        task.request_end = self.end
        self._home.submit(task)
        self._owes_turn = True
