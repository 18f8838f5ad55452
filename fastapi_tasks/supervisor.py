"""WHERE tasks run unless an engine takes them: in this process, watched over by a supervisor.

It knows every live task, starts them from any thread, and sees them to their end at shutdown.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from enum import Enum, auto
from threading import get_ident
from types import TracebackType
from typing import Any, Self

import anyio

from .bound import ImmediateTasks
from .config import INHERIT_ALL, SupervisorSettings, TaskConfig, as_tuple
from .drain import Drain, DrainPlan, DrainReport
from .errors import (
    FastAPITasksUninitializedAppError,
    SupervisorStateError,
    TooManyTasksError,
    UninitializedReason,
    WrongEventLoopError,
)
from .inbox import Inbox
from .live import LiveTasks, OpenRequest, give_up
from .observer import Observers, TaskEvent, TaskEventKind, TaskObserver, logger
from .runner import Runner
from .spawn import Spawner, current_spawner
from .tasks import Moment, Task, is_over

__all__ = ["Supervisor"]

_BY_USER = "its cancel() was called"
_NOT_RUNNING = "its supervisor is not running; it does from the app's start-up to its shutdown"
_LOST = "the event loop was closed before the app was shut down"


class _State(Enum):
    NEW = auto()
    RUNNING = auto()
    DRAINING = auto()  # takes shielded tasks only
    CLOSING = auto()  # takes none; what is left has been cancelled
    STOPPED = auto()


_REFUSALS = {
    _State.NEW: _NOT_RUNNING,
    _State.DRAINING: "the app is shutting down, and the task is not shielded",
    _State.CLOSING: "the app is shutting down, and has no time left to run it",
    _State.STOPPED: _NOT_RUNNING,
}


class Supervisor(ImmediateTasks):
    """Runs tasks in this process, from its start to its drain.

    ``add_tasks(app)`` makes one for an app and ties it to the app's lifespan. By hand it is an
    asynchronous context manager: started on entry, drained on exit. After a drain it may be
    started again, on another event loop too.

    :param config: the configuration of every task whose function or call does not say otherwise
    :param observers: functions that are told what happens, after the log
    :param grace: seconds that a drain leaves all tasks to end by themselves, before it cancels
        the unshielded ones; 0 by default. The last 5 seconds of ``shutdown_timeout``, or its
        second half if that is shorter, are for cleaning up, however long the grace
    :param shutdown_timeout: seconds within which a drain is over, counted from its start,
        whatever still runs; ``None``, the default: it waits for shielded tasks without end
    :param threads: how many sync tasks run at once; 40 by default
    :param max_tasks: how many tasks may be live before a request that takes ``Tasks`` is refused
        with status 503; ``None``, the default: no request is. What is scheduled on the supervisor
        itself, and by a request that was let in, is never refused
    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    def __init__(
        self,
        *,
        config: TaskConfig | None = None,
        observers: Sequence[TaskObserver] = (),
        grace: float = 0.0,
        shutdown_timeout: float | None = None,
        threads: int = 40,
        max_tasks: int | None = None,
    ) -> None:
        self.settings = SupervisorSettings(
            INHERIT_ALL if config is None else config,
            as_tuple(observers),
            grace,
            shutdown_timeout,
            threads,
            max_tasks,
        )
        """What the supervisor was made with."""
        super().__init__(self, self.settings.config, INHERIT_ALL)
        self._observers = Observers(self.settings.observers)
        self._numbers = itertools.count(1)
        self._state = _State.NEW
        self._run_id = _new_run_id()
        self._spawner: Spawner | None = None
        self._runner: Runner | None = None
        self._inbox = Inbox()
        self._thread: int | None = None
        self._live: LiveTasks | None = None
        self._drain: Drain | None = None
        self._is_refusing = False

    # Making and starting tasks

    def create(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: TaskConfig,
        moment: Moment,
        *,
        is_async: bool,
    ) -> Task:
        """Make a task of a call, with the context variables of this moment."""
        task: Task = Task(
            self,
            (self._run_id, next(self._numbers)),
            func,
            args,
            kwargs,
            config,
            copy_context(),
            moment,
            is_async=is_async,
        )
        if self._observers.watch_routine:
            self._observers.tell(TaskEvent(TaskEventKind.SCHEDULED, (task,)))
        return task

    def submit(self, task: Task) -> None:
        """Start a task, from any thread; what cannot run any more is dropped.

        :param task: one that has not been started
        """
        if get_ident() == self._thread:
            self._admit(task)
        elif not self._inbox.put(self._admit, task):
            self._drop(task, self._refusal())

    def drop(self, task: Task, reason: str, *, expected: bool = False) -> None:
        """Give up a task that has not begun, from any thread.

        :param task: one that has not been started
        :param reason: why, for the record
        :param expected: whether that is what its configuration asks for
        """
        if not self._is_handed_over(self._drop, task, reason, expected):
            self._drop(task, reason, expected)

    def cancel(self, task: Task) -> bool:
        """Do what :meth:`Task.cancel` says."""
        if is_over(task) or task.abandoned:
            return False
        if not self._is_handed_over(self._cancel_one, task):
            self._cancel_one(task)
        return True

    async def call(self, task: Task) -> Any:
        """Do what :meth:`Task.__call__` says.

        :raises FastAPITasksUninitializedAppError: the supervisor was never started
        """
        if self._runner is None:
            raise FastAPITasksUninitializedAppError(UninitializedReason.NOT_STARTED)
        return await self._runner.call(task)

    def expect_waiter(self, task: Task) -> None:
        """Make sure that the caller will be woken up, if it waits for a task.

        :raises WrongEventLoopError: the caller runs in another event loop than the tasks
        """
        if self._thread is None:
            self._spawner = current_spawner()  # the task can still be dropped, in a thread
        elif get_ident() != self._thread:
            raise WrongEventLoopError(task)

    def wake(self, event: anyio.Event) -> None:
        """Set an event in the event loop of the tasks, from any thread."""
        if self._spawner is None or get_ident() == self._thread:
            event.set()
            return
        # Its loop may be closed, and then nobody is left to be woken up.
        with suppress(RuntimeError):
            self._spawner.call_soon(event.set)

    @property
    def running(self) -> tuple[Task, ...]:
        """The tasks that were started and are not over, the oldest first."""
        return () if self._live is None else self._live.tasks()

    @property
    def is_running(self) -> bool:
        """Whether the supervisor takes every task: it was started, and no drain has begun."""
        return self._state is _State.RUNNING

    def require_running(self) -> None:
        """Do nothing while the supervisor takes tasks.

        :raises FastAPITasksUninitializedAppError: it does not, yet or any more
        """
        if self._state is _State.NEW:
            raise FastAPITasksUninitializedAppError(UninitializedReason.NOT_STARTED)
        if self._state is _State.STOPPED:
            raise FastAPITasksUninitializedAppError(UninitializedReason.STOPPED)

    def require_room(self) -> None:
        """Do nothing while fewer tasks are live than there may be. In the loop's thread only.

        :raises TooManyTasksError: as many are live, or more
        """
        limit, live = self.settings.max_tasks, self._live
        if limit is None:
            return
        assert live is not None
        # Those that have ended may still be there for a turn of the event loop. To leave them out
        # takes a look at each one, so it is done only if it makes a difference.
        most = len(live)
        if most < limit or len(live.tasks()) < limit:
            # Not as soon as one is let in: at the limit, that and a refusal take turns.
            if 2 * most <= limit:
                self._is_refusing = False
            return
        if not self._is_refusing:
            self._is_refusing = True
            logger.warning(
                "As many tasks are live as max_tasks=%d allows: requests that take Tasks are "
                "refused with status 503 until some have ended. This is said again when their "
                "number has been down to half",
                limit,
            )
        raise TooManyTasksError(limit)

    async def turn(self) -> None:
        """Let every task that was started before run to its first await."""
        assert self._spawner is not None
        await self._spawner.turn()

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread that the event loop waits for."""
        assert self._spawner is not None
        self._spawner.turn_from_thread()

    # From start to drain

    async def start(self) -> None:
        """Begin to take tasks, in the running event loop.

        :raises SupervisorStateError: the supervisor is running already
        """
        if self._state not in (_State.NEW, _State.STOPPED):
            if self._spawner is not None and not self._spawner.is_closed():
                raise SupervisorStateError("start() was called while the supervisor is running")
            self._lose_loop()
        self._run_id = _new_run_id()
        self._spawner = current_spawner()
        self._runner = Runner(self._spawner, self._observers, self.settings.threads)
        self._live = LiveTasks(self._spawner, self._runner, self._observers)
        self._thread = get_ident()
        self._state = _State.RUNNING
        self._inbox.open(self._spawner)  # last: until then, threads have their tasks dropped

    async def drain(self) -> DrainReport:
        """Stop taking unshielded tasks, see all tasks to their end, and stop.

        For ``grace`` seconds every task may end by itself. Then the unshielded ones are
        cancelled, while the shielded ones are waited for. Shortly before ``shutdown_timeout``
        those are cancelled too. A cancelled task has five seconds to clean up, if the deadline
        leaves them; after that it is abandoned.

        :return: what became of the tasks
        :raises SupervisorStateError: the supervisor is not running
        """
        live = self._live
        if self._state is not _State.RUNNING or live is None:
            raise SupervisorStateError("drain() was called while the supervisor is not running")
        # What was scheduled before is not to be dropped, and what waits for a response that the
        # server is done with has come to its moment: it closes connections before it shuts down.
        # https://asgi.readthedocs.io/en/latest/specs/lifespan.html#shutdown-receive-event
        self._inbox.take()
        live.end_responses()
        self._state = _State.DRAINING
        plan = DrainPlan.of(self.settings.grace, self.settings.shutdown_timeout)
        drain = self._drain = Drain(live, self._observers, plan, self._close)
        try:
            await drain.run()
        finally:
            self._stop()
            report = drain.finish()
        return report

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.drain()

    # What happens in the loop's thread

    def open(self, request: OpenRequest) -> None:
        """Take note of a request that has taken tasks, until :meth:`close`."""
        assert self._live is not None
        self._live.open(request)

    def close(self, request: OpenRequest) -> None:
        """Forget a request that is over."""
        assert self._live is not None
        self._live.close(request)

    def _place(self, task: Task) -> None:
        self.submit(task)

    def _is_handed_over(self, func: Callable[..., object], *args: object) -> bool:
        """Hand a call to the event loop, unless this is its thread or there is none that runs."""
        return get_ident() != self._thread and self._inbox.put(func, *args)

    def _admit(self, task: Task) -> None:
        if is_over(task):
            return  # cancelled before its moment came
        state = self._state
        if state is _State.RUNNING or (state is _State.DRAINING and task.config.shielded):
            assert self._live is not None
            try:
                self._live.start(task)
            except RuntimeError:
                self._drop(task, _LOST)
        else:
            self._drop(task, _REFUSALS[state])

    def _refusal(self) -> str:
        """Return why the inbox takes nothing."""
        if self.is_running and self._spawner is not None and self._spawner.is_closed():
            return _LOST
        return _REFUSALS.get(self._state, _NOT_RUNNING)  # not there while it is being started

    def _drop(self, task: Task, reason: str, expected: bool = False) -> None:
        kind = TaskEventKind.DROPPED
        if not give_up(task, kind, reason, self._observers, expected=expected):
            return  # cancelled before its moment came
        drain = self._drain  # asked for once: it may end while another thread is here
        if drain is not None:
            drain.note_over(task)

    def _cancel_one(self, task: Task) -> None:
        if is_over(task):
            return  # it ended while another thread asked for this
        if task.handle is None:  # it waits for its moment
            if not give_up(task, TaskEventKind.CANCELLED, _BY_USER, self._observers):
                self.cancel(task)  # or did: the loop has begun it while a thread was here
        elif get_ident() == self._thread:
            assert self._live is not None
            self._live.cancel((task,), _BY_USER)
        else:
            # The loop has started it while a thread was here. If it takes nothing any more, it is
            # stopping, and gives the task up itself.
            self._is_handed_over(self._cancel_one, task)

    def _close(self) -> None:
        self._state = _State.CLOSING

    def _stop(self) -> None:
        self._state = _State.STOPPED
        self._thread = None
        self._inbox.close()
        self._drain = None

    def _lose_loop(self) -> None:
        """Give up what ran in a loop that was closed before anybody drained the supervisor."""
        live, self._live = self._live, None
        self._stop()
        assert live is not None
        live.lose(_LOST)


def _new_run_id() -> str:
    # Task ids are unique beyond this process: workers write to one log.
    return secrets.token_hex(4)
