"""WHEN tasks start: :class:`TasksScheduler`, one per request, and its two batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

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
        """How the request ends, until it is over; not the request itself, which leads back here."""
        self._waiting: deque[Task] = deque()
        self._taken: Task | None = None
        self._failed: bool | None = None

    def release(self, *, failed: bool) -> bool:
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
        while (task := self._take()) is not None:
            if task.config.run_if in starting:
                self._home.submit(task)
                started = True
            else:
                self._drop_unfit(task, failed=failed)
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
        """Give up the tasks that wait.

        :param reason: why, for the records
        """
        while (task := self._take()) is not None:
            self._home.drop(task, reason)

    def _take(self) -> Task | None:
        if not self._waiting:  # as at the end of each release, and cheaper than an error
            self._taken = None
            return None
        try:  # another thread may be faster
            self._taken = self._waiting[0]  # for those who look meanwhile
            return self._waiting.popleft()
        except IndexError:
            self._taken = None
            return None

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
            self.release(failed=self._failed)

    def _check(self, config: TaskConfig) -> None:
        return None


class TasksScheduler(ImmediateTasks):
    """The tasks of one request: what an endpoint's ``tasks: Tasks`` is.

    Tasks scheduled on it start now, beside the endpoint.

    :param supervisor: where the tasks run
    :param config: the app's configuration; by default the supervisor's
    :param endpoint: the endpoint that schedules them, if there is one
    """

    __slots__ = (
        "_batches",
        "_response_failed",
        "_route_failed",
        "_supervisor",
        "end",
        "is_over",
        "on_batch",
        "owes_turn",
    )

    def __init__(
        self,
        supervisor: Supervisor,
        config: TaskConfig | None = None,
        endpoint: object = None,
    ) -> None:
        inherited = supervisor.settings.config if config is None else config
        # Each request makes one, and super() alone costs as much as this.
        BoundTasks.__init__(self, supervisor, inherited, INHERIT_ALL, endpoint)
        self._supervisor = supervisor
        # Made when somebody asks: most requests have tasks for one moment at most.
        self._batches: dict[Moment, TasksBatch] = {}
        self._route_failed: bool | None = None
        self._response_failed: bool | None = None
        self.is_over = False
        """Whether everything was released."""
        self.on_batch: Callable[[], object] | None = None
        """Is called when there is a first task that may come to wait, from any thread."""
        self.end: RequestEnd | None = RequestEnd()
        """How the request ends, until it is over."""
        self.owes_turn = False
        """Whether tasks were started that have not had the event loop yet."""

    @property
    def supervisor(self) -> Supervisor:
        """Where the tasks run."""
        return self._supervisor

    @property
    def after_route(self) -> TasksBatch:
        """Tasks scheduled on it start when the endpoint has returned, before its value is
        serialized."""
        batch = self._batches.get("after_route")
        if batch is None:
            # Two threads may ask at once, and get the same one. A lock would cost ten times this.
            batch = self._batches.setdefault("after_route", TasksBatch(self, "after_route"))
            self._begin(batch, self._route_failed)
        return batch

    @property
    def after_response(self) -> TasksBatch:
        """Tasks scheduled on it start when the response is over: it was sent, or the client is
        gone."""
        batch = self._batches.get("after_response")
        if batch is None:
            # As above.
            batch = self._batches.setdefault("after_response", TasksBatch(self, "after_response"))
            self._begin(batch, self._response_failed)
        return batch

    def _begin(self, batch: TasksBatch, failed: bool | None) -> None:
        on_batch = self.on_batch
        if on_batch is not None:
            on_batch()
        # Looked up after the assignment: the moment may come between the two, and then one of
        # both sees what the other did.
        if failed is not None:
            batch.release(failed=failed)

    def route_over(self, *, failed: bool) -> None:
        """Release the tasks that wait for the endpoint.

        :param failed: whether it raised
        """
        if self._route_failed is None:
            self._route_failed = failed
        batch = self._batches.get("after_route")
        if batch is not None and batch.release(failed=self._route_failed):
            self.owes_turn = True

    def response_over(self, *, failed: bool) -> None:
        """Release the tasks that wait for the response, and those that wait for the endpoint.

        :param failed: whether the request went wrong anywhere
        """
        batch = self._batches.get("after_route")
        if self._route_failed is None or (batch is not None and batch.has_waiting()):
            self.route_over(failed=failed)
        if self._response_failed is None:
            self._response_failed = failed
        batch = self._batches.get("after_response")
        if batch is not None and batch.release(failed=self._response_failed):
            self.owes_turn = True
        # Last: whoever interrupts it leaves the rest to the next one who calls.
        self.is_over = True

    def let_go(self) -> None:
        """Forget the request, since it is over.

        Its tasks alone are to know how it has ended: the error leads to the frames of the
        request, and those lead here.
        """
        self.end = self.on_batch = None
        for batch in tuple(self._batches.values()):  # a thread may ask for one meanwhile
            batch.end = None

    def has_after_response(self) -> bool:
        """Whether somebody has asked for :attr:`after_response`."""
        return "after_response" in self._batches

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
        return tuple(self._batches.values())

    def _place(self, task: Task) -> None:
        task.request_end = self.end
        self._home.submit(task)
        self.owes_turn = True
