"""One task: its data and its state.

The functions at the end move a task from one state to the next. They belong to whoever runs
tasks, not to whoever schedules them, which is why they are no methods.
"""

# The functions at the end are the class's friends, which pyright does not know of.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar, Token
from threading import Lock, RLock
from time import time
from types import FunctionType, TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeAlias, cast, overload

import anyio
import anyio.lowlevel
from typing_extensions import ParamSpec, TypeVar

from .callables import printable, qualified_name
from .config import TaskConfig
from .errors import (
    NoCurrentTaskError,
    TaskCancelledError,
    TaskFailedError,
    TaskNotFinishedError,
)
from .info import Progress, Record, TaskInfo, TaskStatus, id_of, info_of, progress_of, shown_error

__all__ = [
    "GivenUp",
    "Moment",
    "RequestEnd",
    "Stray",
    "Task",
    "TaskErrorHandler",
    "TaskOwner",
    "TaskStatus",
    "begin",
    "continue_at",
    "current_task",
    "enter",
    "find_current_task",
    "has_key",
    "is_over",
    "is_pending",
    "leave",
    "new_task",
    "owner_of",
    "record_of",
    "settle",
    "settle_unbegun",
    "until_over",
]

P = ParamSpec("P", default=...)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True, default=Any)


Moment: TypeAlias = Literal["now", "after_route", "after_response"]
"""When a task starts: at once, or with one of a request's batches."""


# Read for every task, and a module's name is found faster than an enum's member.
_PENDING = TaskStatus.PENDING
_RUNNING = TaskStatus.RUNNING
_SUCCEEDED = TaskStatus.SUCCEEDED
_CANCELLED = TaskStatus.CANCELLED

_making_events = Lock()
# Who holds one of these may be interrupted by the garbage collector, and that by a __del__ which
# cancels.
_giving_up = RLock()
_making_rare = RLock()

_make = object.__new__


class Stray(Protocol):
    """A call in a thread for which its attempt does not wait any more."""

    over: anyio.Event
    """Is set when the thread is done."""


class TaskOwner(Protocol):
    """What a task needs from whoever runs it."""

    def cancel_task(self, task: Task) -> bool:
        """Ask for the task's cancellation; return ``False`` if it is over already."""
        ...

    async def call(self, task: Task) -> Any:
        """Run the task's function again, in the caller, and return what it returns."""
        ...

    def expect_waiter(self, task: Task) -> None:
        """Make sure that the caller will be woken up, if it waits for the task.

        :raises WrongEventLoopError: the caller runs in another event loop than tasks do
        """
        ...

    def wake(self, event: anyio.Event) -> None:
        """Set an event in the loop in which it is waited for, from any thread."""
        ...


class RequestEnd:
    """How a request ends, as far as that is known: what all tasks of the request share."""

    status: int | None = None
    """The status of the response, once the app has begun to send it."""
    error: BaseException | None = None
    """What went wrong, once it has."""


class _Rare(Generic[T]):
    """An attribute that few tasks have, and that costs the others nothing.

    There may be very many tasks at once, and the garbage collector visits all that each has.

    :param default: what it is until somebody sets it
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type[Task], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, task: None, owner: type[Task]) -> Self: ...
    @overload
    def __get__(self, task: Task, owner: type[Task]) -> T: ...
    def __get__(self, task: Task | None, owner: type[Task]) -> Self | T:
        if task is None:
            return self
        rare = task._rare
        return self._default if rare is None else rare.get(self._name, self._default)

    def __set__(self, task: Task, value: T) -> None:
        if task._rare is None:
            with _making_rare:  # two threads may want to at once
                if task._rare is None:
                    task._rare = {}
        task._rare[self._name] = value


class Task(Generic[P, T_co]):
    """A function that was scheduled, and what has become of it.

    Made by ``schedule``; never by hand.
    """

    __slots__ = (
        "__weakref__",
        "_attempt",
        "_begun_at",
        "_created_at",
        "_ended_at",
        "_finished",
        "_is_unclaimed",
        "_number",
        "_owner",
        "_rare",
        "_result",
        "_run_id",
        "_started",
        "_status",
        "_traceback",
        "args",
        "config",
        "context",
        "func",
        "handle",
        "is_async",
        "is_watched",
        "moment",
        "name",
        "named_args",
        "request_end",
    )

    has_place = _Rare(False)
    """Whether an attempt has its place in the limiter just now."""
    in_threads = _Rare(0)
    """How many threads are busy for the task just now; nothing can cancel them."""
    strays = _Rare[tuple[Stray, ...]](())
    """The calls that go on in threads, though their attempts have run out of time."""
    awaits_strays = _Rare(False)
    """Whether nothing is left of the task but such calls."""
    cancel_pending = _Rare(False)
    """Whether a cancellation waits for a thread to end before it can be delivered."""
    cancel_reason = _Rare("")
    """Why the task was asked to end, if it was; it may end otherwise all the same."""
    abandoned = _Rare(False)
    """Whether nobody waits any longer for the task to end."""
    _progress = _Rare[Progress | None](None)
    _error = _Rare[BaseException | None](None)

    func: Callable[P, Awaitable[T_co]] | Callable[P, T_co]
    """The function that was scheduled."""
    args: tuple[Any, ...]
    """The positional arguments that it is called with."""
    named_args: dict[str, Any] | None
    """The keyword arguments, if there are any: most have none, and live tasks may be many."""
    config: TaskConfig
    """The app's, the function's and the call's configuration, merged."""
    name: str
    """The configured name, else the function's qualified name; fit to be printed."""
    context: Context | None
    """The context variables at the moment of ``schedule``, until the task is over."""
    moment: Moment
    """The moment that the task was scheduled for, also if that had passed already."""
    is_async: bool
    """Whether the function is awaited; if not, it runs in a thread."""
    is_watched: bool
    """Whether somebody wants to hear of it even if it goes well."""
    handle: Any
    """The event loop's own task that runs this one, while it does."""
    request_end: RequestEnd | None
    """How the request ends that the task was scheduled on, until the task is over."""
    _owner: TaskOwner
    _run_id: str
    _number: int
    _status: TaskStatus
    # Whoever takes this away, decides whether the task begins: it is there once, and takes no lock.
    _is_unclaimed: bool
    _attempt: int
    _rare: dict[str, Any] | None
    # By the clock of the machine, in seconds: whoever reads them is elsewhere.
    _created_at: float
    _begun_at: float | None
    # Made when somebody looks: an event costs more than the rest of the task.
    _started: anyio.Event | None
    _finished: anyio.Event | None
    # There are none before the task is over, or has failed.
    _ended_at: float
    _result: Any
    _traceback: TracebackType | None

    @property
    def id(self) -> str:
        """What tells the task from every other one, in this process and elsewhere."""
        return id_of((self._run_id, self._number))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments that it is called with."""
        return self.named_args or {}

    @property
    def status(self) -> TaskStatus:
        """Pending, running, succeeded, failed or cancelled."""
        return self._status

    @property
    def attempt(self) -> int:
        """Which run of the function is the latest: 0 before the first one has begun."""
        return self._attempt

    @property
    def progress(self) -> Progress | None:
        """How far the latest attempt has come, by :meth:`set_progress`; ``None``: it says nothing.

        A new attempt begins without one, as it begins the work anew.
        """
        return self._progress

    def set_progress(
        self, done: float, total: float | None = None, message: str | None = None
    ) -> None:
        """Say how far the task has come, in place of what was said before; from any thread.

        :param done: how much is done, in any unit: files, bytes, a share; 0 or more. It may be
            more than ``total``: a wrong guess is no reason to fail
        :param total: how much there is to do, in the same unit, more than 0; ``None``, the
            default: nobody knows
        :param message: what the task is doing, for those who read its status; of more than 1000
            characters the first ones are kept
        :raises InvalidSettingError: one of them has a value that it cannot have
        """
        self._progress = progress_of(done, total, message)

    def info(self) -> TaskInfo:
        """Return what the task is like now, as a model for an API, from any thread.

        It has no argument, no result and no traceback. Of the text of an error it has the first
        1000 characters.
        """
        return info_of(record_of(self))

    @property
    def response_status(self) -> int | None:
        """The status of the response to the task's request: for the task itself, while it runs.

        ``None``: the app has not begun to respond; it never did, since nothing in it handles the
        request's error; the task was scheduled on no HTTP request; or the task is over.
        """
        end = self.request_end
        return None if end is None else end.status

    @property
    def route_error(self) -> BaseException | None:
        """What went wrong in the task's request: for the task itself, while it runs.

        If one exception was made into another, it is the latest that was seen. ``None``: nothing
        went wrong so far; the task was scheduled on no request; or the task is over.
        """
        end = self.request_end
        return None if end is None else end.error

    @property
    def started(self) -> anyio.Event:
        """Is set when the function begins to run; never for a task that is dropped before."""
        with _making_events:  # two threads may look at once, at one event
            event = self._started
            if event is None:
                event = self._started = anyio.Event()
                # After the assignment: the loop may begin the task between the two, and then
                # one of both sees what the other did.
                if self._begun_at is not None:
                    event.set()
        return event

    def result(self) -> T_co:
        """Return what the function returned.

        :raises TaskNotFinishedError: the task is pending or running
        :raises TaskCancelledError: the task was cancelled or dropped
        :raises Exception: what the function raised, if the task has failed
        :raises TaskFailedError: the function raised something that is no ``Exception``
        """
        if not is_over(self):
            raise TaskNotFinishedError(self)
        if self._status is _CANCELLED:
            raise TaskCancelledError(self)
        try:
            return self._outcome()
        finally:
            del self  # the traceback of an error refers to this frame, and the task to the error

    def exception(self) -> BaseException | None:
        """Return what the function raised, ``None`` if the task succeeded or was cancelled.

        :raises TaskNotFinishedError: the task is pending or running
        """
        if not is_over(self):
            raise TaskNotFinishedError(self)
        return self._error

    def cancel(self) -> bool:
        """Ask for the task to be cancelled; from any thread.

        A task that has not begun never begins. One that runs gets the event loop's own
        cancellation at its next ``await``. A sync function that runs in a thread cannot be
        cancelled: it goes on to its end, and the task then is what it became.

        :return: ``False`` if the task was over already
        """
        return self._owner.cancel_task(self)

    async def wait(self) -> T_co:
        """Wait until the task is over, and return what the function returned.

        A task that was cancelled or dropped is over too, and is no error here: the call then
        returns ``None``. Where that makes a difference, look at :attr:`status`, or ask for
        :meth:`result` after waiting, which raises for such a task.

        :raises Exception: what the function raised, if the task has failed
        :raises TaskFailedError: the function raised something that is no ``Exception``
        :raises WrongEventLoopError: the caller runs in another event loop than the task
        """
        if is_over(self):
            await anyio.lowlevel.checkpoint()
        else:
            await self._until_over()
        try:
            return self._outcome()
        finally:
            del self  # as in result()

    def next_attempt_in(self, error: Exception) -> float | None:
        """Return in how many seconds somebody else attempts it again, since it has failed.

        ``None``, as for every task that runs in this process alone: nobody does.
        """
        return None

    async def _until_over(self) -> None:
        self._owner.expect_waiter(self)
        event = self._finished
        if event is None:
            event = self._finished = anyio.Event()
        # Looked at again after the assignment: another thread may drop the task between the two,
        # and then one of both sees what the other did.
        if not is_over(self):
            await event.wait()

    def _outcome(self) -> T_co:
        error = self._error
        if error is None:
            return cast(T_co, self._result)
        try:
            # Without the frames of whoever asked before.
            error = error.with_traceback(self._traceback)
            if isinstance(error, Exception):
                raise error
            # SystemExit would end the server with the one who waits.
            raise TaskFailedError(self, error) from error
        finally:
            del self, error  # as in result()

    async def __call__(self) -> T_co:
        """Run the function again, here, with the same arguments, and return what it returns.

        Made for error handlers. The task's status, its ``on_error`` and its other waiters are
        left out of it; a sync function runs in a thread.

        :raises BaseException: what the function raises
        """
        return cast(T_co, await self._owner.call(self))

    def __repr__(self) -> str:
        # Arguments are private: they do not belong in whatever prints a task.
        return f"<Task {self.name} {self.id} {self._status}>"


_TaskT = TypeVar("_TaskT", bound=Task[..., Any])

TaskErrorHandler: TypeAlias = Callable[[Task[..., Any], Exception], Awaitable[None] | None]
"""What ``on_error`` takes: a function of the task and its error, sync or async."""

_current: ContextVar[Task | None] = ContextVar("fastapi_tasks_current_task", default=None)


# Each task and request asks, and a function of Python's would cost twice as much.
find_current_task: Callable[[], Task | None] = _current.get
"""Return the task that the caller runs in, or ``None``."""


def current_task() -> Task:
    """Return the task that the caller runs in, also from a sync task's thread.

    :raises NoCurrentTaskError: the caller runs in none
    """
    task = find_current_task()
    if task is None:
        raise NoCurrentTaskError
    return task


def new_task(
    kind: type[_TaskT],
    owner: TaskOwner,
    run_id: str,
    number: int,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: TaskConfig,
    context: Context,
    moment: Moment,
    is_async: bool,
) -> _TaskT:
    """Return a task that has not begun.

    By no ``__init__``: to have Python call one takes a tenth longer, for each task.

    :param kind: its class
    :param owner: who runs it
    :param run_id: what tells the owner's run from others
    :param number: what tells the task from the others of that run
    """
    task = _make(kind)
    task.func = func
    task.args = args
    task.named_args = kwargs or None
    task.config = config
    name = config.name or (
        func.__qualname__ if type(func) is FunctionType else qualified_name(func)
    )
    # Asked here too, as above, since it is so for nearly every task.
    task.name = name if name.isprintable() else printable(name)
    task.context = context
    task.moment = moment
    task.is_async = is_async
    task.is_watched = False
    task.handle = task.request_end = None
    task._owner = owner
    task._run_id = run_id
    task._number = number
    task._status = _PENDING
    task._is_unclaimed = True
    task._attempt = 0
    task._rare = None
    task._created_at = time()
    task._begun_at = task._started = task._finished = None
    return task


def owner_of(task: Task) -> TaskOwner:
    """Return who runs a task."""
    return task._owner


def has_key(task: Task, key: tuple[str, int]) -> bool:
    """Return whether a task has an id, by its two parts: cheaper than to put one together."""
    run_id, number = key
    return task._number == number and task._run_id == run_id


def record_of(task: Task) -> Record:
    """Return what a task is like now, without anything that leads to it."""
    if task._status is _SUCCEEDED:  # as most are that anybody keeps
        return (
            task._run_id,
            task._number,
            task.name,
            _SUCCEEDED,
            task._attempt,
            None if task._rare is None else task._progress,
            task._created_at,
            task._begun_at,
            task._ended_at,
            None,
            None,
        )
    # Looked at first. While the loop moves the task on, what belongs to a later status is left out.
    status = task._status
    attempt, started = task._attempt, task._begun_at
    ended: float | None = None
    error: BaseException | None = None
    if status is _PENDING:
        attempt, started = 0, None
    elif status is not _RUNNING:
        ended, error = task._ended_at, task._error
    kind, text = (None, None) if error is None else shown_error(error)
    return (
        task._run_id,
        task._number,
        task.name,
        status,
        attempt,
        task._progress,
        task._created_at,
        started,
        ended,
        kind,
        text,
    )


enter: Callable[[Task | None], Token[Task | None]] = _current.set
"""Make a task the current one of the calling context, or none of them."""

leave: Callable[[Token[Task | None]], None] = _current.reset
"""Take back what :func:`enter` did."""


class GivenUp(BaseException):
    """A task was given up before it began, and is told so by nothing but this."""


def begin(task: Task) -> None:
    """Note that the function begins to run. In the loop's thread only.

    :raises GivenUp: the task was given up before
    """
    if task._status is _RUNNING:  # in an attempt before
        task._progress = None
    else:
        try:
            del task._is_unclaimed
        except AttributeError:
            with _giving_up:  # who has claimed it, is done with that
                raise GivenUp from None
        task._begun_at = time()
    task._attempt += 1
    task._status = _RUNNING  # last, as in settle()
    if task._started is not None:
        task._started.set()


def continue_at(task: Task, attempt: int) -> None:
    """Note that attempts were made elsewhere.

    :param task: one that has not begun
    :param attempt: which one the next is
    """
    task._attempt = attempt - 1


async def until_over(task: Task) -> None:
    """Wait until a task is over, whatever comes of it."""
    if not is_over(task):
        await task._until_over()


def is_over(task: Task) -> bool:
    """Return whether a task has succeeded, failed or was cancelled."""
    return task._status is not _PENDING and task._status is not _RUNNING


def is_pending(task: Task) -> bool:
    """Return whether a task has not begun, nor was given up."""
    return task._status is _PENDING


def settle(
    task: Task, status: TaskStatus, result: object = None, error: BaseException | None = None
) -> bool:
    """Note that the task is over, and wake up whoever waits for it.

    :return: whether anybody was waiting
    """
    if task._rare is not None:
        task.cancel_pending = False
    task._result = result
    if error is not None:
        task._error = error
        task._traceback = error.__traceback__
    task._ended_at = time()
    task._status = status  # last: whoever sees it sees the rest, too
    event = task._finished
    if event is None:
        return False
    task._owner.wake(event)
    return True


def settle_unbegun(task: Task) -> bool:
    """Note that the task was cancelled before it began, from any thread.

    :return: ``False`` if it has begun, or was over already
    """
    with _giving_up:  # two threads may want to, and only one of them reports it
        if task._status is not _PENDING:
            return False
        try:
            del task._is_unclaimed
        except AttributeError:  # the loop has, this moment
            return False
        settle(task, _CANCELLED)
    return True
