"""WHEN tasks start: :class:`TasksScheduler`, one per request, and its two batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from .bound import BoundTasks, ImmediateTasks
from .config import INHERIT_ALL, TaskConfig
from .supervisor import Supervisor
from .tasks import Moment, RequestEnd, Task

__all__ = ["TasksBatch", "TasksScheduler"]


class TasksBatch(BoundTasks):
    """Tasks that wait for a moment of the request: ``tasks.after_route``, ``.after_response``.

    What is scheduled once the moment has passed starts at once.

    :param supervisor: where the tasks run
    :param inherited: the app's configuration
    :param end: how the request ends
    :param moment: which moment that is
    :param endpoint: the endpoint that schedules them, if there is one
    """

    __slots__ = ("_end", "_failed", "_taken", "_waiting")

    def __init__(
        self,
        supervisor: Supervisor,
        inherited: TaskConfig,
        end: RequestEnd,
        moment: Moment,
        endpoint: object,
    ) -> None:
        super().__init__(supervisor, inherited, INHERIT_ALL, endpoint, moment)
        self._end: RequestEnd | None = end
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
        started = False
        for task in self._take():
            started |= self._start_or_drop(task, failed=self._failed)
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
        for task in self._take():
            self._home.drop(task, reason)

    def forget_end(self) -> None:
        """Let go of how the request has ended, which is no news for what is still scheduled."""
        self._end = None

    def _take(self) -> Iterator[Task]:
        # Asked for, not looked up before: another thread may be faster.
        try:
            with suppress(IndexError):
                while True:
                    self._taken = self._waiting[0]  # for those who look meanwhile
                    yield self._waiting.popleft()
        finally:
            self._taken = None

    def _start_or_drop(self, task: Task, *, failed: bool) -> bool:
        run_if = task.config.run_if or "success"
        if run_if == "always" or (run_if == "error") is failed:
            self._home.submit(task)
            return True
        outcome = "failed" if failed else "succeeded"
        reason = f'the request {outcome}, and the task has run_if="{run_if}"'
        self._home.drop(task, reason, expected=run_if == "error")
        return False

    def _place(self, task: Task) -> None:
        task.request_end = self._end
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

    __slots__ = ("_end", "_supervisor", "after_response", "after_route", "owes_turn")

    def __init__(
        self,
        supervisor: Supervisor,
        config: TaskConfig | None = None,
        endpoint: object = None,
    ) -> None:
        inherited = supervisor.settings.config if config is None else config
        super().__init__(supervisor, inherited, INHERIT_ALL, endpoint)
        self._supervisor = supervisor
        end = RequestEnd()
        self._end: RequestEnd | None = end
        self.after_route = TasksBatch(supervisor, inherited, end, "after_route", endpoint)
        """Tasks scheduled on it start when the endpoint has returned, before its value is
        serialized."""
        self.after_response = TasksBatch(supervisor, inherited, end, "after_response", endpoint)
        """Tasks scheduled on it start when the response is over: it was sent, or the client is
        gone."""
        self.owes_turn = False
        """Whether tasks were started that have not had the event loop yet."""

    @property
    def supervisor(self) -> Supervisor:
        """Where the tasks run."""
        return self._supervisor

    def route_over(self, *, failed: bool) -> None:
        """Release the tasks that wait for the endpoint.

        :param failed: whether it raised
        """
        if self.after_route.release(failed=failed):
            self.owes_turn = True

    def response_over(self, *, failed: bool) -> None:
        """Release the tasks that wait for the response, and those that wait for the endpoint.

        :param failed: whether the request went wrong anywhere
        """
        self.route_over(failed=failed)
        if self.after_response.release(failed=failed):
            self.owes_turn = True

    def note_status(self, status: int) -> None:
        """Let the tasks of the request know how the app answers.

        :param status: the response's
        """
        if self._end is not None:
            self._end.status = status

    def note_error(self, error: BaseException) -> None:
        """Let the tasks of the request know what went wrong.

        :param error: what was raised
        """
        if self._end is not None:
            self._end.error = error

    def forget_end(self) -> None:
        """Leave it to the tasks alone to know how the request has ended, since it has.

        The error leads to the frames of the request, and those lead here.
        """
        self._end = None
        self.after_route.forget_end()
        self.after_response.forget_end()

    def has_waiting(self) -> bool:
        """Return whether tasks wait for a moment of the request."""
        return self.after_route.has_waiting() or self.after_response.has_waiting()

    def waiting(self) -> tuple[Task, ...]:
        """Return them, from any thread."""
        return self.after_route.waiting() + self.after_response.waiting()

    def drop_waiting(self, reason: str) -> None:
        """Give up the tasks that wait for a moment of the request.

        :param reason: why, for the records
        """
        self.after_route.drop(reason)
        self.after_response.drop(reason)

    def _place(self, task: Task) -> None:
        task.request_end = self._end
        self._home.submit(task)
        self.owes_turn = True
