"""WHERE tasks run unless an engine takes them: in this process, watched over by a supervisor.

It knows every live task, starts them from any thread, and sees them to their end at shutdown.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from contextvars import copy_context
from enum import Enum, auto
from operator import itemgetter
from threading import get_ident
from types import TracebackType
from typing import Any, Self

import anyio

from .bound import ImmediateTasks
from .callables import is_async
from .config import INHERIT_ALL, SupervisorSettings, TaskConfig
from .drain import WARN_EVERY, DrainLog, DrainPlan, DrainReport
from .errors import (
    FastAPITasksUninitializedAppError,
    SupervisorStateError,
    UninitializedReason,
)
from .inbox import Inbox
from .observer import Observers, TaskEvent, TaskEventKind, TaskObserver
from .runner import BY_OTHERS, Runner
from .spawn import Handle, Spawner, current_spawner
from .task import Task, TaskStatus, is_over, settle

__all__ = ["Supervisor"]

_BY_USER = "its cancel() was called"
_BY_DRAIN = "the app is shutting down"
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
        the unshielded ones; 0 by default
    :param shutdown_timeout: seconds within which a drain is over, counted from its start,
        whatever still runs; ``None``, the default: it waits for shielded tasks without end
    :param threads: how many sync tasks run at once; 40 by default
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
    ) -> None:
        self.settings = SupervisorSettings(
            INHERIT_ALL if config is None else config,
            tuple(observers),
            grace,
            shutdown_timeout,
            threads,
        )
        """What the supervisor was made with."""
        super().__init__(self, self.settings.config, INHERIT_ALL)
        self._observers = Observers(self.settings.observers)
        self._numbers = itertools.count(1)
        self._state = _State.NEW
        self._run_id = _new_run_id()
        self._inbox = Inbox()
        self._thread: int | None = None
        self._live: dict[Handle, Task] = {}
        self._idle: anyio.Event | None = None
        self._drain_log: DrainLog | None = None

    # Making and starting tasks

    def create(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: TaskConfig,
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
            is_async=is_async(func),
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
        else:
            self._in_loop(self._admit, task)

    def drop(self, task: Task, reason: str) -> None:
        """Give up a task that has not begun, from any thread.

        :param task: one that has not been started
        :param reason: why, for the record
        """
        if get_ident() == self._thread:
            self._drop(task, reason)
        else:
            self._in_loop(self._drop, task, reason)

    def cancel(self, task: Task) -> bool:
        """Do what :meth:`Task.cancel` says."""
        if is_over(task):
            return False
        if get_ident() == self._thread:
            self._cancel(task, _BY_USER)
        else:
            self._in_loop(self._cancel, task, _BY_USER)
        return True

    async def call(self, task: Task) -> Any:
        """Do what :meth:`Task.__call__` says."""
        return await self._runner.call(task)

    @property
    def running(self) -> tuple[Task, ...]:
        """The tasks that were started and are not over, the oldest first."""
        return tuple(self._live.values())

    def require_running(self) -> None:
        """Do nothing while the supervisor takes tasks.

        :raises FastAPITasksUninitializedAppError: it does not, yet or any more
        """
        if self._state is _State.NEW:
            raise FastAPITasksUninitializedAppError(UninitializedReason.NOT_STARTED)
        if self._state is _State.STOPPED:
            raise FastAPITasksUninitializedAppError(UninitializedReason.STOPPED)

    async def turn(self) -> None:
        """Let every task that was started before run to its first await."""
        await self._spawner.turn()

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread that the event loop waits for."""
        self._spawner.turn_from_thread()

    # From start to drain

    async def start(self) -> None:
        """Begin to take tasks, in the running event loop.

        :raises SupervisorStateError: the supervisor is running already
        """
        if self._state not in (_State.NEW, _State.STOPPED):
            if not self._spawner.is_closed():
                raise SupervisorStateError("start() was called while the supervisor is running")
            self._lose_loop()
        self._run_id = _new_run_id()
        self._spawner = current_spawner()
        self._runner = Runner(self._spawner, self._observers, self.settings.threads)
        self._thread = get_ident()
        self._state = _State.RUNNING
        self._inbox.open(self._spawner)

    async def drain(self) -> DrainReport:
        """Stop taking unshielded tasks, see all tasks to their end, and stop.

        For ``grace`` seconds every task may end by itself. Then the unshielded ones are
        cancelled, while the shielded ones are waited for. Shortly before ``shutdown_timeout``
        those are cancelled too. A cancelled task has five seconds to clean up, if the deadline
        leaves them; after that it is abandoned.

        :return: what became of the tasks
        :raises SupervisorStateError: the supervisor is not running
        """
        if self._state is not _State.RUNNING:
            raise SupervisorStateError("drain() was called while the supervisor is not running")
        self._inbox.take()
        self._state = _State.DRAINING
        start = anyio.current_time()
        log = self._drain_log = DrainLog()
        self._observers.tell(TaskEvent(TaskEventKind.DRAIN_STARTED, self.running))
        try:
            await self._see_to_the_end(start)
        finally:
            # Something is left only if the drain was cancelled, by a server that lost patience.
            self._cancel_live()
            self._abandon_live()
            self._state = _State.STOPPED
            self._thread = None
            self._inbox.close()
            self._drain_log = None
            report = log.report(anyio.current_time() - start)
            self._observers.tell(TaskEvent(TaskEventKind.DRAIN_FINISHED, report=report))
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

    def _place(self, task: Task) -> None:
        self.submit(task)

    def _in_loop(self, func: Callable[..., object], *args: object) -> None:
        if not self._inbox.put(func, *args):
            # There is no loop that could do it, so there is none to get in the way of either.
            func(*args)

    def _admit(self, task: Task) -> None:
        if is_over(task):
            return  # cancelled before its moment came
        state = self._state
        if state is _State.RUNNING or (state is _State.DRAINING and task.config.shielded):
            self._spawn(task)
        else:
            self._drop(task, _REFUSALS[state])

    def _spawn(self, task: Task) -> None:
        main = self._runner.run(task)
        try:
            handle = self._spawner.spawn(
                main, name=task.name, context=task.context, over=self._over
            )
        except RuntimeError:
            main.close()
            self._drop(task, _LOST)
            return
        task.handle = handle
        self._live[handle] = task

    def _over(self, handle: Handle) -> None:
        task = self._live.pop(handle, None)
        if task is None:
            return  # abandoned before
        if not is_over(task):
            # Somebody else cancelled it before its first step, which on asyncio then never comes.
            self._settle_as_cancelled(task, TaskEventKind.CANCELLED, BY_OTHERS)
        # The context refers to the task, and both would wait for the garbage collector.
        task.handle = task.context = None
        if self._drain_log is not None:
            self._drain_log.note_over(task)
        if self._idle is not None and not self._live:
            self._idle.set()

    def _drop(self, task: Task, reason: str) -> None:
        if is_over(task):
            return  # cancelled before its moment came
        self._settle_as_cancelled(task, TaskEventKind.DROPPED, reason)
        task.context = None
        if self._drain_log is not None:
            self._drain_log.note_over(task)

    def _settle_as_cancelled(self, task: Task, kind: TaskEventKind, reason: str) -> None:
        settle(task, TaskStatus.CANCELLED)
        self._observers.tell(TaskEvent(kind, (task,), reason=reason))

    def _cancel(self, task: Task, reason: str) -> None:
        if not is_over(task):
            task.cancel_reason = reason
            if task.status is TaskStatus.PENDING:
                self._settle_as_cancelled(task, TaskEventKind.CANCELLED, reason)
            self._cancel_handle(task)

    def _cancel_handle(self, task: Task) -> None:
        if task.handle is not None and not task.in_thread:
            self._spawner.cancel(task.handle)

    # The steps of a drain

    async def _see_to_the_end(self, start: float) -> None:
        plan = DrainPlan.of(self.settings.grace, self.settings.shutdown_timeout)
        steps: list[tuple[float, Callable[[], None]]] = [
            (plan.cancel_unshielded, lambda: self._cancel_live(shielded=False)),
            (plan.abandon_unshielded, lambda: self._abandon_live(shielded=False)),
            (plan.cancel_shielded, self._close),
            (plan.abandon_all, self._abandon_live),
        ]
        self._warn_at = start + WARN_EVERY
        for seconds, step in sorted(steps, key=itemgetter(0)):
            if await self._idle_before(start + seconds):
                return
            step()

    async def _idle_before(self, moment: float) -> bool:
        """Wait until no task is live, or it is ``moment``; return whether none is."""
        while self._live:
            now = anyio.current_time()
            if now >= self._warn_at:
                self._observers.tell(TaskEvent(TaskEventKind.DRAIN_WAITING, self.running))
                self._warn_at += WARN_EVERY
            if now >= moment:
                return False
            self._idle = anyio.Event()
            with anyio.move_on_after(min(moment, self._warn_at) - now):
                await self._idle.wait()
        return True

    def _close(self) -> None:
        self._state = _State.CLOSING
        self._cancel_live()

    def _live_tasks(self, shielded: bool | None) -> list[Task]:
        return [
            task
            for task in self._live.values()
            if shielded is None or task.config.shielded is shielded
        ]

    def _cancel_live(self, shielded: bool | None = None) -> None:
        tasks = self._live_tasks(shielded)
        if not tasks:
            return
        self._observers.tell(TaskEvent(TaskEventKind.DRAIN_CANCELLING, tuple(tasks)))
        for task in tasks:
            if is_over(task):
                self._cancel_handle(task)  # its error handler
            else:
                self._cancel(task, _BY_DRAIN)

    def _abandon_live(self, shielded: bool | None = None) -> None:
        tasks = self._live_tasks(shielded)
        if not tasks:
            return
        self._observers.tell(TaskEvent(TaskEventKind.DRAIN_ABANDONING, tuple(tasks)))
        for task in tasks:
            del self._live[task.handle]
            self._spawner.abandon(task.handle)
            if self._drain_log is not None:
                self._drain_log.note_abandoned(task)

    def _lose_loop(self) -> None:
        """Give up what ran in a loop that was closed before anybody drained the supervisor."""
        self._state = _State.STOPPED
        self._thread = None
        self._inbox.close()
        lost, self._live = tuple(self._live.values()), {}
        for task in lost:
            if not is_over(task):
                self._settle_as_cancelled(task, TaskEventKind.DROPPED, _LOST)


def _new_run_id() -> str:
    # Task ids are unique beyond this process: workers write to one log.
    return secrets.token_hex(4)
