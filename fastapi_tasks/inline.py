"""How a test runs tasks one after the other, each to its end, where no lifespan has to run."""

from __future__ import annotations

import math
from collections import deque
from contextvars import Context, ContextVar, Token
from dataclasses import replace
from threading import Event, get_ident
from typing import cast

import anyio
import anyio.from_thread

from .config import Duration, RetryOn, TaskConfig, is_wait
from .connection import current_connection
from .errors import MisusedTestToolError, TaskFailedError
from .observer import TaskEvent, TaskEventKind
from .spawn import current_spawner
from .supervisor import Supervisor
from .tasks import Task, find_current_task, is_over

__all__ = ["Inline"]


class _Request:
    """A request or WebSocket that is served, and those of its tasks that are not over."""

    def __init__(self) -> None:
        self.queue: deque[Task] = deque()
        self.live: set[Task] = set()
        self.idle = anyio.Event()
        self.is_over = False
        self.token: Token[_Request | None] = _request.set(self)


_request: ContextVar[_Request | None] = ContextVar("fastapi_tasks_inline_request", default=None)


class Inline:
    """Stands in for a supervisor, which it starts itself where no lifespan has done so.

    :param supervisor: what runs the tasks
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._requests: dict[Task, _Request] = {}
        self._configs: dict[Task, TaskConfig] = {}
        self._waiting: dict[Task, Event] = {}
        self._open: list[_Request] = []
        self._thread = get_ident()
        self._is_async = _has_loop()
        self._run_id: str | None = None
        self._is_closed = False
        self.failures: list[Exception] = []
        """What tasks and their error handlers have raised."""

    # What the supervisor asks

    def begin_request(self) -> None:
        """Take note of a request or WebSocket, in its context."""
        self._run_here()
        self._open.append(_Request())

    async def end_request(self, *, shield: bool) -> None:
        """Run what is left of its tasks, to their ends."""
        request = _request.get()
        assert request is not None
        try:
            with anyio.CancelScope(shield=shield):
                await self._settle(request)
        finally:
            request.is_over = True
            self._open.remove(request)
            _request.reset(request.token)
            # Somebody has cancelled the request, and that is nothing to the tasks.
            self._start_all(request)

    def require_running(self) -> None:
        """Do nothing: the supervisor was started when the request began."""

    def submit(self, task: Task) -> None:
        """Start a task, or let it wait for its turn; from any thread."""
        context = task.context
        request = None if context is None else context.get(_request)
        if context is None or request is None or request.is_over:
            self._submit_outside(task)
            return
        self._requests[task] = request
        if _has_turn(task, context):
            request.queue.append(task)
        else:
            self._start(task, request)

    def expect_waiter(self, task: Task) -> None:
        """Start a task that waits for its turn, and those before it."""
        request = self._requests.get(task)
        if request is not None and task in request.queue:
            self._start_all(request, task)

    def over(self, task: Task) -> None:
        """Take note of a task that is over."""
        if task in self._configs:
            task.config = self._configs.pop(task)
        request = self._requests.pop(task, None)
        if request is not None:
            request.live.discard(task)
            if not request.live:
                request.idle.set()
        waiting = self._waiting.pop(task, None)
        if waiting is not None:
            waiting.set()

    async def turn(self) -> None:
        """Run the request's tasks to their ends, as far as their moments have come."""
        await self._settle(_request.get())

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread that the event loop waits for."""
        anyio.from_thread.run(self._settle, _request.get())

    # What the test asks

    def observe(self, event: TaskEvent) -> None:
        """Keep what goes wrong: an observer."""
        error = event.error
        if error is None or event.kind is TaskEventKind.RETRYING:
            return
        if isinstance(error, Exception):
            self.failures.append(error)
            return
        # SystemExit would end the whole test run. A cancellation is one that nobody asked for.
        failure = TaskFailedError(event.task, error)
        failure.__cause__ = error
        self.failures.append(failure)

    def close(self) -> tuple[Task, ...]:
        """Stop the supervisor, unless it is a lifespan's; return the tasks that this cuts off."""
        self._is_closed = True
        for request in set(self._requests.values()):
            self._supervisor.wake(request.idle)  # what goes on, does so without us
        return () if self._run_id is None else self._supervisor.end(self._run_id)

    def _submit_outside(self, task: Task) -> None:
        """Start a task that no request waits for."""
        supervisor = self._supervisor
        if is_over(task):
            return  # cancelled before its moment came
        has_loop = _has_loop()
        if has_loop and not supervisor.has_loop:
            self._run_here()
        if not has_loop and not supervisor.has_loop:
            anyio.run(self._run_alone, task)
        elif has_loop or find_current_task() is not None:
            self._start(task)
        elif get_ident() != self._thread and self._open:
            # A thread of the app's own, which the event loop itself may be waiting for. Without a
            # lifespan the loop is gone after the request, so that has to wait for the task.
            request = self._requests[task] = self._open[-1]
            self._start(task, request)
        elif get_ident() != self._thread and self._is_async:
            self._start(task)  # so may this one, in an async test
        else:
            # A test that is not async: nothing but this would tell it when the task is over.
            waiting = self._waiting[task] = Event()
            self._start(task)
            waiting.wait()

    async def _run_alone(self, task: Task) -> None:
        run_id = self._supervisor.begin()
        self._start(task)
        await self._supervisor.is_idle_within(math.inf)
        self._supervisor.end(run_id)

    def _run_here(self) -> None:
        """See to it that the supervisor runs in this event loop."""
        supervisor = self._supervisor
        if supervisor.is_here and supervisor.has_loop:
            return
        if supervisor.has_loop:
            if self._run_id is None or self._run_id != supervisor.run_id or supervisor.running:
                raise MisusedTestToolError(
                    "the app's tasks run in another event loop than this request",
                    instead="with TestClient(app) as client: ...  # and every request by client",
                )
            supervisor.end(self._run_id)
        self._run_id = supervisor.begin()

    def _start(self, task: Task, request: _Request | None = None) -> None:
        if request is not None:
            request.live.add(task)
        if self._supervisor.is_here or not self._supervisor.call_in_loop(self._begin, task):
            self._begin(task)

    def _start_all(self, request: _Request, last: Task | None = None) -> None:
        while request.queue:
            task = request.queue.popleft()
            self._start(task, request)
            if task is last:
                return

    def _begin(self, task: Task) -> None:
        hurried = _hurried(task.config)
        if hurried is not task.config:
            self._configs[task] = task.config
            task.config = hurried
        if not self._supervisor.run_now(task):
            self.over(task)

    async def _settle(self, request: _Request | None) -> None:
        """Run a request's tasks one after the other, with those that they schedule."""
        if request is None:
            return  # it had begun before anybody stood in
        while (request.live or request.queue) and not self._is_closed:
            if request.live:
                request.idle = anyio.Event()
                await request.idle.wait()
            else:
                self._start(request.queue.popleft(), request)


def _has_turn(task: Task, context: Context) -> bool:
    """Return whether the request is still to come to a point at which it waits for the task."""
    if task.moment == "after_response":
        return True
    connection = context.run(current_connection)
    if connection is None or connection.endpoint is None:
        return False
    return task.moment == "after_route" or not connection.returned


def _has_loop() -> bool:
    try:
        current_spawner()
    except RuntimeError:
        return False
    return True


def _hurried(config: TaskConfig) -> TaskConfig:
    """Return the same configuration without anything to wait for."""
    if config.is_plain:
        return config
    retry = config.retry
    if retry is not None:
        retry = replace(
            retry, on=_without_wait(retry.on), wait_initial=0, wait_max=0, wait_jitter=0
        )
    return replace(config, delay=None, retry=retry)


def _without_wait(on: RetryOn) -> RetryOn:
    if isinstance(on, type | tuple):
        return cast(RetryOn, on)
    ask = on

    def answer(error: Exception) -> bool | Duration:
        wait = ask(error)
        return True if is_wait(wait) else wait

    return answer
