"""WHERE tasks run unless an engine takes them: in this process, watched over by a supervisor.

It knows every live task, starts them from any thread, and sees them to their end at shutdown.
"""

from __future__ import annotations

import functools
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from logging import DEBUG
from threading import get_ident
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias

import anyio

from .bound import ImmediateTasks
from .config import INHERIT_ALL, SupervisorSettings, TaskConfig, as_tuple
from .drain import Drain, DrainPlan, DrainReport
from .engine import Engine, StartedEngines
from .errors import (
    FastAPITasksUninitializedAppError,
    InvalidSettingError,
    SupervisorStateError,
    TooManyTasksError,
    UninitializedReason,
    WrongEventLoopError,
)
from .history import History
from .inbox import Inbox
from .info import TaskInfo, key_of
from .live import LOST, LiveTasks, OpenRequest, give_up
from .observer import Observers, TaskEvent, TaskEventKind, TaskObserver, logger
from .runner import Runner
from .spawn import Spawner, current_spawner
from .tasks import Moment, Task, has_key, is_over, new_task

__all__ = ["RUNNING", "StandIn", "Supervisor"]

_BY_USER = "its cancel() was called"
_NOT_RUNNING = "its supervisor is not running; it does from the app's start-up to its shutdown"


# Names in place of an enum's members, which take longer to find: each task and request asks.
State: TypeAlias = Literal["new", "running", "draining", "closing", "stopped"]

_NEW: State = "new"
RUNNING: State = "running"
_DRAINING: State = "draining"
"""Takes shielded tasks only."""
_CLOSING: State = "closing"
"""Takes none; what is left has been cancelled."""
_STOPPED: State = "stopped"

_REFUSALS = {
    _NEW: _NOT_RUNNING,
    _DRAINING: "the app is shutting down, and the task is not shielded",
    _CLOSING: "the app is shutting down, and has no time left to run it",
    _STOPPED: _NOT_RUNNING,
}


class StandIn(Protocol):
    """What decides in a supervisor's place about its tasks: for tests, see ``testing``.

    It is asked only if there is one, so that tasks cost the same without.
    """

    def begin_request(self) -> None:
        """Take note of a request or WebSocket, in its context."""
        ...

    async def end_request(self, *, shield: bool) -> None:
        """Take note of its end, whatever has ended it; the server waits for this.

        :param shield: whether it waits even if it was cancelled
        """
        ...

    def require_running(self) -> None:
        """Refuse a request that takes tasks, if they cannot be taken."""
        ...

    def submit(self, task: Task) -> None:
        """Take a task whose moment has come, from any thread."""
        ...

    def expect_waiter(self, task: Task) -> None:
        """Make sure that whoever is about to wait for a task does not do so in vain."""
        ...

    def over(self, task: Task) -> None:
        """Take note of a task that is over, error handler included."""
        ...

    async def turn(self) -> None:
        """Do what is due between an endpoint and its response."""
        ...

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread that the event loop waits for."""
        ...


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
    :param history: how many tasks that are over :attr:`recent` has at most; 100 by default, 0:
        none
    :param engines: what runs functions that are registered with it, instead of the supervisor.
        They are started with it, before any task, and stopped when its tasks are over
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
        history: int = 100,
        engines: Sequence[Engine] = (),
    ) -> None:
        self.settings = SupervisorSettings(
            INHERIT_ALL if config is None else config,
            as_tuple("observers", observers),
            grace,
            shutdown_timeout,
            threads,
            max_tasks,
            history,
            as_tuple("engines", engines),
        )
        """What the supervisor was made with."""
        super().__init__(self, self.settings.config)
        self._observers = Observers(self.settings.observers)
        self._history = History(history)
        self._numbers = itertools.count(1)
        self.state: State = _NEW
        """How far it has come."""
        self._run_id = _new_run_id()
        self._spawner: Spawner | None = None
        self._runner: Runner | None = None
        self._inbox = Inbox()
        self._thread: int | None = None
        self.live: LiveTasks | None = None
        """What runs in the event loop, once the supervisor was started in one."""
        self._start: Callable[[Task], None] | None = None
        self._drain: Drain | None = None
        self._is_refusing = False
        self._listeners: list[Callable[[Task], None]] = []
        self.open_requests: set[OpenRequest] = set()
        """Those that have taken tasks and are not over; written in the loop's thread only."""
        self._engines = StartedEngines()
        self.stand_in: StandIn | None = None
        """What decides in its place, in a test."""

    # Making and starting tasks

    @property
    def hands_over(self) -> bool:
        """Whether functions that an engine claims are enqueued with it; not in a test."""
        return self.stand_in is None

    def create(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: TaskConfig,
        moment: Moment,
        is_async: bool,
    ) -> Task:
        """Make a task of a call, with the context variables of this moment."""
        task: Task = new_task(
            Task,
            self,
            self._run_id,
            next(self._numbers),
            func,
            args,
            kwargs,
            config,
            copy_context(),
            moment,
            is_async,
        )
        # Asked once for each task: who begins to watch meanwhile, hears of the next ones.
        if self._observers.is_watched or logger.isEnabledFor(DEBUG):
            self.announce(task)
        return task

    @property
    def is_watched(self) -> bool:
        """Whether anybody wants to hear of what happens to every task that goes well."""
        return self._observers.is_watched or logger.isEnabledFor(DEBUG)

    def announce(self, task: Task) -> None:
        """Tell the observers of a task that was made, and have them told of all that follows."""
        task.is_watched = True
        self._observers.tell(TaskEvent(TaskEventKind.SCHEDULED, (task,)))

    def submit(self, task: Task) -> None:
        """Start a task, from any thread; what cannot run any more is dropped.

        :param task: one that has not been started
        """
        if self.stand_in is not None:
            self.stand_in.submit(task)
        elif get_ident() != self._thread:
            if not self._inbox.put(self._admit, task):
                self._drop(task, self._refusal())
        elif self.state is RUNNING and task.context is not None and self._start is not None:
            self._start(task)  # as _admit() does with nearly every task, without a call
        else:
            self._admit(task)

    def drop(self, task: Task, reason: str, *, expected: bool = False) -> None:
        """Give up a task that has not begun, from any thread.

        :param task: one that has not been started
        :param reason: why, for the record
        :param expected: whether that is what its configuration asks for
        """
        if not self._is_handed_over(self._drop, task, reason, expected):
            self._drop(task, reason, expected)

    def cancel_task(self, task: Task) -> bool:
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
        if self.stand_in is not None:
            self.stand_in.expect_waiter(task)
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
        return () if self.live is None else self.live.tasks()

    @property
    def recent(self) -> tuple[TaskInfo, ...]:
        """The latest tasks that are over, at most ``history`` of them, the newest last.

        One that was dropped, or cancelled before it began, is there too. One that was abandoned at
        a shutdown is there too, with the status that it had then until it ends. They
        are no tasks but what there was to tell of them: what tasks got and returned is let go.
        """
        live = self.live
        ended = () if live is None else live.ended()  # first: they become the others
        return self._history.infos(ended)

    def find(self, task_id: str) -> TaskInfo | None:
        """Return what a task is like now, from any thread.

        :param task_id: the task's id
        :return: ``None`` if no such task runs, waits for a moment of an open request, or is one of
            the :attr:`recent` ones
        :raises InvalidSettingError: it is no string
        """
        key = _key_of(task_id)
        task = self._find(key)
        return self._history.find(key) if task is None else task.info()

    def cancel(self, task_id: str) -> bool:
        """Ask for a task to be cancelled, as :meth:`Task.cancel` does, from any thread.

        :param task_id: the task's id
        :return: ``False`` if there is no such task, or it is over already
        :raises InvalidSettingError: it is no string
        """
        task = self._find(_key_of(task_id))
        return task is not None and self.cancel_task(task)

    @property
    def is_running(self) -> bool:
        """Whether the supervisor takes every task: it was started, and no drain has begun."""
        return self.state is RUNNING

    @property
    def is_draining(self) -> bool:
        """Whether a drain has begun, and is not over."""
        return self.state is _DRAINING or self.state is _CLOSING

    def require_running(self) -> None:
        """Do nothing while the supervisor takes tasks.

        :raises FastAPITasksUninitializedAppError: it does not, yet or any more
        """
        if self.stand_in is not None:
            self.stand_in.require_running()
        elif self.state is _NEW:
            raise FastAPITasksUninitializedAppError(UninitializedReason.NOT_STARTED)
        elif self.state is _STOPPED:
            raise FastAPITasksUninitializedAppError(UninitializedReason.STOPPED)

    def require_room(self) -> None:
        """Do nothing while fewer tasks are live than there may be. In the loop's thread only.

        :raises TooManyTasksError: as many are live, or more
        """
        limit, live = self.settings.max_tasks, self.live
        if limit is None or live is None:  # nothing is live in a supervisor that never ran
            return
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

    # Not async itself, nor are spawners', since requests pay for each coroutine.
    def turn(self) -> Awaitable[None]:
        """Let every task that was started before run to its first await."""
        if self.stand_in is not None:
            return self.stand_in.turn()
        assert self._spawner is not None
        return self._spawner.turn()

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread that the event loop waits for."""
        if self.stand_in is not None:
            self.stand_in.turn_from_thread()
            return
        assert self._spawner is not None
        self._spawner.turn_from_thread()

    # From start to drain

    async def start(self) -> None:
        """Begin to take tasks, in the running event loop.

        :raises SupervisorStateError: the supervisor is running already
        :raises EngineUnavailableError: what an engine stands on cannot be reached
        :raises EngineStateError: an engine cannot be started here
        """
        self.begin()
        try:
            await self._engines.start(self.settings.engines, self)
        except BaseException:
            await self.drain()
            raise

    def begin(self) -> str:
        """Do what :meth:`start` does, and return what tells this run from others.

        :raises SupervisorStateError: the supervisor is running already
        """
        if self.state not in (_NEW, _STOPPED):
            if self.has_loop:
                raise SupervisorStateError("start() was called while the supervisor is running")
            self._lose_loop()
        self._run_id = _new_run_id()
        self._spawner = current_spawner()
        self._runner = Runner(self._spawner, self._observers, self.settings.threads)
        self.open_requests = set()
        self.live = LiveTasks(
            self._spawner,
            self._runner,
            self._observers,
            self._history,
            self._listeners,
            self.open_requests,
        )
        # Bound once for all tasks, and here, since what refers to itself is left to the collector.
        self._start = functools.partial(self.live.start, self.live.over)
        self._thread = get_ident()
        self.state = RUNNING
        self._inbox.open(self._spawner)  # last: until then, threads have their tasks dropped
        return self._run_id

    async def drain(self) -> DrainReport:
        """Stop taking unshielded tasks, see all tasks to their end, and stop.

        For ``grace`` seconds every task may end by itself. Then the unshielded ones are
        cancelled, while the shielded ones are waited for. Shortly before ``shutdown_timeout``
        those are cancelled too. A cancelled task has five seconds to clean up, if the deadline
        leaves them; after that it is abandoned.

        :return: what became of the tasks
        :raises SupervisorStateError: the supervisor is not running
        """
        live = self.live
        if self.state is not RUNNING or live is None:
            raise SupervisorStateError("drain() was called while the supervisor is not running")
        # What was scheduled before is not to be dropped, and what waits for a response that the
        # server is done with has come to its moment: it closes connections before it shuts down.
        # https://asgi.readthedocs.io/en/latest/specs/lifespan.html#shutdown-receive-event
        self._inbox.take()
        live.end_responses()
        self.state = _DRAINING
        plan = DrainPlan(self.settings.grace, self.settings.shutdown_timeout)
        drain = self._drain = Drain(live, self._observers, plan, self._close)
        self._engines.pause()
        try:
            await drain.run()
        finally:
            self._stop()
            report = drain.finish()
            await self._engines.stop()
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

    # For tests, which no lifespan has to run

    def replace(self, stand_in: StandIn, observer: TaskObserver) -> None:
        """Let somebody else decide about the tasks, and hear of everything, until :meth:`restore`.

        :param stand_in: who decides
        :param observer: is told of each event
        """
        self.stand_in = stand_in
        self._listeners.append(stand_in.over)
        self._observers.join(observer)

    def restore(self) -> None:
        """Decide about the tasks again."""
        assert self.stand_in is not None
        self._listeners.remove(self.stand_in.over)
        self.stand_in = None
        self._observers.leave()

    def run_now(self, task: Task) -> bool:
        """Start a task as if nobody stood in. In the loop's thread only, if there is one.

        :return: whether it was started; else it was dropped, or was over already
        """
        self._admit(task)
        return task.handle is not None

    def call_in_loop(self, func: Callable[..., object], *args: object) -> bool:
        """Have a function called in the loop's thread, from any other one.

        :return: whether there is a loop that will do so
        """
        return self._inbox.put(func, *args)

    @property
    def run_id(self) -> str:
        """What tells this run of the supervisor from others, as :meth:`begin` returns it."""
        return self._run_id

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in the thread of the supervisor's event loop."""
        return get_ident() == self._thread

    @property
    def has_loop(self) -> bool:
        """Whether the supervisor was started in an event loop that is still there."""
        spawner = self._spawner
        return self._thread is not None and spawner is not None and not spawner.is_closed()

    async def is_idle_within(self, seconds: float) -> bool:
        """Wait until no task is live or waits for its moment. In the supervisor's loop only.

        :param seconds: how long to wait at most
        :return: whether that came in time
        """
        self._inbox.take()
        assert self.live is not None
        return await self.live.wait_until_empty(anyio.current_time() + seconds)

    @property
    def waiting_requests(self) -> int:
        """How many requests have tasks that wait for one of their moments."""
        return 0 if self.live is None else self.live.waiting_requests()

    def end(self, run_id: str) -> tuple[Task, ...]:
        """Stop what :meth:`begin` has begun, without a drain; return the tasks that are cut off.

        :param run_id: what ``begin`` has returned; another run than this one is left alone
        """
        if run_id != self._run_id or self._thread is None:
            return ()
        left = self.running
        if self.has_loop:
            assert self.live is not None
            self.live.cancel(left, "its test is over")
            self._stop()
        else:
            self._lose_loop()
        return left

    # What happens in the loop's thread

    def _place(self, task: Task) -> None:
        self.submit(task)

    def _find(self, key: tuple[str, int]) -> Task | None:
        return next((task for task in self._known() if has_key(task, key)), None)

    def _known(self) -> Iterator[Task]:
        """Yield every task that is not over, in the order in which tasks go from place to place."""
        live = self.live
        if live is not None:
            yield from live.waiting()
        yield from (
            arg for _, args in self._inbox.calls() for arg in args[:1] if isinstance(arg, Task)
        )
        if live is not None:
            yield from live.all()

    def _is_handed_over(self, func: Callable[..., object], *args: object) -> bool:
        """Hand a call to the event loop, unless this is its thread or there is none that runs."""
        return not self.is_here and self._inbox.put(func, *args)

    def _admit(self, task: Task) -> None:
        if task.context is None:
            return  # given up before its moment came
        state = self.state
        if state is RUNNING or (state is _DRAINING and task.config.shielded):
            assert self._start is not None
            self._start(task)
        else:
            self._drop(task, _REFUSALS[state])

    def _refusal(self) -> str:
        """Return why the inbox takes nothing."""
        if self.is_running and self._spawner is not None and self._spawner.is_closed():
            return LOST
        return _REFUSALS.get(self.state, _NOT_RUNNING)  # not there while it is being started

    def _drop(self, task: Task, reason: str, expected: bool = False) -> None:
        kind = TaskEventKind.DROPPED
        if not give_up(
            task, kind, reason, self._observers, expected=expected, history=self._history
        ):
            return  # cancelled before its moment came
        drain = self._drain  # asked for once: it may end while another thread is here
        if drain is not None:
            drain.note_over(task)

    def _cancel_one(self, task: Task) -> None:
        if is_over(task):
            return  # it ended while another thread asked for this
        if task.handle is None:  # it waits for its moment
            kind, history = TaskEventKind.CANCELLED, self._history
            if not give_up(task, kind, _BY_USER, self._observers, history=history):
                self.cancel_task(task)  # or did: the loop has begun it while a thread was here
        elif self.is_here:
            assert self.live is not None
            self.live.cancel((task,), _BY_USER)
        else:
            # The loop has started it while a thread was here. If it takes nothing any more, it is
            # stopping, and gives the task up itself.
            self._is_handed_over(self._cancel_one, task)

    def _close(self) -> None:
        self.state = _CLOSING

    def _stop(self) -> None:
        self.state = _STOPPED
        self._thread = None
        self._inbox.close()
        self._drain = None

    def _lose_loop(self) -> None:
        """Give up what ran in a loop that was closed before anybody drained the supervisor."""
        live = self.live
        self._stop()
        assert live is not None
        live.lose(LOST)
        self.live = self._start = None


def _key_of(task_id: object) -> tuple[str, int]:
    """Return the two parts of an id."""
    if not isinstance(task_id, str):
        raise InvalidSettingError(
            "task_id",
            task_id,
            expected="the id of a task, a string",
            instead="get_supervisor().find(task.id)",
        )
    return key_of(task_id)


def _new_run_id() -> str:
    # Task ids are unique beyond this process: workers write to one log.
    return secrets.token_hex(4)
