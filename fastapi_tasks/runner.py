"""HOW one task runs.

In this order:

1. the ``delay`` passes;
2. each attempt waits for its place in the ``limiter``, a sync function else for a thread; then it
   begins, and its ``timeout`` with it;
3. an attempt that has failed is followed by the next one, if ``retry`` says so, after its wait;
4. the end of the last one settles the task, and is told to the observers, the log first;
5. whoever waits for the task goes on;
6. the error handler runs;
7. threads end whose attempts have run out of time.

A cancellation ends it at any point up to 3, whichever of them the task has come to.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Self, TypeVar, cast

import anyio
import anyio.to_thread

from . import spawn
from .callables import discard, is_async
from .config import in_seconds
from .errors import TaskTimeoutError
from .observer import Observers, TaskEvent, TaskEventKind
from .retries import Attempts
from .spawn import Handle, Over, Spawner, TimeIsUpError
from .tasks import (
    Task,
    TaskErrorHandler,
    TaskStatus,
    begin,
    enter,
    find_current_task,
    is_over,
    leave,
    settle,
)

__all__ = ["BY_OTHERS", "Runner"]

_ErrorT = TypeVar("_ErrorT", bound=BaseException)

BY_OTHERS = "by a cancellation that did not come from its supervisor"
"""The reason of a cancellation that nobody asked a supervisor for."""

_OWN_FILES = {__file__, spawn.__file__}

_SUCCEEDED = TaskStatus.SUCCEEDED


class Runner:
    """Runs tasks in one event loop.

    :param spawner: the loop's
    :param observers: who is told of it
    :param threads: how many sync functions run at once
    """

    __slots__ = ("_observers", "_spawner", "_threads")

    def __init__(self, spawner: Spawner, observers: Observers, threads: int) -> None:
        self._spawner = spawner
        self._observers = observers
        self._threads = anyio.CapacityLimiter(threads)

    async def run(self, task: Task, over: Over) -> None:
        """Run a task to its end, error handler included; only ``KeyboardInterrupt`` escapes.

        :param over: is called with the task's handle at the end, unless something escapes: then,
            as if the task never runs, the loop calls it
        """
        enter(task)
        is_plain = task.config.is_plain
        try:
            if not is_plain:
                result = await self._run_controlled(task)
            elif task.is_async:
                begin(task)
                if task.is_watched:
                    self._tell(TaskEventKind.STARTED, task)
                result = await (
                    task.func(*task.args)
                    if task.named_args is None  # as most have it, and at half the cost
                    else task.func(*task.args, **task.named_args)
                )
            else:
                result = await self._attempt_in_thread(task)
        except BaseException as error:
            try:
                await self._end_with(task, _from_users_code(error))
                if task.strays:
                    await self._wait_for_strays(task)
            finally:
                # By its error the task leads to the function's frames, and those must not lead
                # back: neither by this frame, the next one outwards on 3.12 and newer, nor by
                # this context, which trio's threads refer to.
                if find_current_task() is task:  # it is another's, if this is collected in one
                    enter(None)
                handle = task.handle
                del task
        else:
            settle(task, _SUCCEEDED, result)
            if task.is_watched:
                self._tell(TaskEventKind.FINISHED, task)
            if not is_plain and task.strays:
                await self._wait_for_strays(task)
            handle = task.handle
        if handle is not None:  # else it was forgotten before
            # The loop would do so in its next turn, for half the price of a task.
            over(handle)
            self._spawner.told(handle, over)
        del handle  # as above

    async def call(self, task: Task) -> Any:
        """Run a task's function again, in the caller, and return what it returns."""
        caller = find_current_task()
        is_own = caller is task
        token = enter(task)
        try:
            limiter = task.config.limiter
            if limiter is None or _is_held(limiter, caller):
                return await self._call(task, is_own=is_own)
            async with limiter:
                return await self._call(task, is_own=is_own)
        finally:
            leave(token)

    async def _call(self, task: Task, *, is_own: bool) -> Any:
        if task.is_async:
            return await task.func(*task.args, **task.kwargs)
        limiter = self._threads if task.config.limiter is None else _NO_LIMIT
        if is_own:
            return await self._run_in_thread(task, _call_of(task), limiter)
        # Somebody else calls it: the task's own cancellation has nothing to do with that.
        result = await _in_thread(_call_of(task), limiter)
        return await result if inspect.isawaitable(result) else result

    async def _run_controlled(self, task: Task) -> Any:
        """Run the function once or more often, as the task's configuration says."""
        config = task.config
        attempts: Attempts | None = None
        failure: Exception | None = None
        try:
            if config.delay:
                with suppress(TimeIsUpError):
                    async with self._spawner.within(in_seconds(config.delay)):
                        await anyio.Event().wait()
            if config.retries is None:
                return await self._attempt(task)
            attempts = Attempts(task, config.retries)
            await attempts.begin()
            while True:
                try:
                    return await self._attempt(task)
                except Exception as error:
                    failure = _from_users_code(error)
                if task.cancel_reason or not await attempts.is_left_after(
                    failure, functools.partial(self._tell_wait, task, failure)
                ):
                    raise failure
        finally:
            del task, attempts, failure  # as in run()

    async def _attempt(self, task: Task) -> Any:
        """Run the function once, when there is a place for it, and as long as it may take.

        :raises TaskTimeoutError: it took longer
        """
        seconds = task.config.time_limit
        cause: BaseException | None = None
        try:
            try:
                if task.is_async:
                    return await self._attempt_in_loop(task, seconds)
                if seconds == math.inf:
                    return await self._attempt_in_thread(task)
                return await self._attempt_in_thread_within(task, seconds)
            except TimeIsUpError as error:
                if task.is_async:  # else it tells nothing of where the function is
                    cause = _from_users_code(cast(BaseException, error.__cause__))
            raise TaskTimeoutError(task, seconds) from cause
        finally:
            task.has_place = False
            del task, cause  # as in run()

    async def _attempt_in_loop(self, task: Task, seconds: float) -> Any:
        try:
            async with task.config.limiter or nullcontext():
                self._begin(task)
                if seconds == math.inf:
                    return await task.func(*task.args, **task.kwargs)
                async with self._spawner.within(seconds):
                    return await task.func(*task.args, **task.kwargs)
        finally:
            del task  # as in run()

    async def _attempt_in_thread(self, task: Task) -> Any:
        limiter = task.config.limiter
        try:
            if limiter is None:
                async with self._threads:
                    self._begin(task)
                    result = await self._call_in_thread(task, _call_of(task))
                return await self._awaited(task, result)
            async with limiter:
                self._begin(task)
                result = await self._call_in_thread(task, _call_of(task))
                return await self._awaited(task, result)
        finally:
            del task  # as in run()

    async def _attempt_in_thread_within(self, task: Task, seconds: float) -> Any:
        """Do the same, and leave the thread alone when its time is up.

        It then goes on and keeps its place, while a loop's task of its own waits for it.
        """
        limiter = task.config.limiter
        call = _ThreadCall(limiter or self._threads, is_alone=limiter is None)
        try:
            try:
                await call.limiter.acquire_on_behalf_of(call)
                self._begin(task)
            except BaseException:
                # Older AnyIOs leave its place to one that is cancelled just when it gets it.
                if call in call.limiter.statistics().borrowers:
                    call.limiter.release_on_behalf_of(call)
                raise
            self._spawner.spawn(
                call.run(_call_of(task), _NO_LIMIT),
                name=task.name,
                context=copy_context(),
                over=call.end,
            )
            try:
                async with self._spawner.within(seconds):
                    task.in_threads += 1
                    try:
                        await call.over.wait()
                    finally:
                        task.in_threads -= 1
                    return await self._awaited(task, _result_of(call.outcome))
            finally:
                if not call.leave():
                    task.strays += (call,)
        finally:
            del task, call  # as in run()

    async def _awaited(self, task: Task, result: Any) -> Any:
        """Return what a sync function has returned, or what comes of that, if it can be awaited."""
        if not inspect.isawaitable(result):
            return result
        self._deliver_cancellation(task)
        try:
            return await result
        finally:
            del task  # as in run()

    async def _wait_for_strays(self, task: Task) -> None:
        """Wait for the threads whose attempts have run out of time: until then the task is live."""
        task.awaits_strays = True
        async with self._spawner.renewed(task.handle):
            for call in task.strays:
                await call.over.wait()

    def _begin(self, task: Task) -> None:
        begin(task)
        task.has_place = True
        if task.is_watched:
            self._tell(TaskEventKind.STARTED, task)

    async def _run_in_thread(
        self, task: Task, call: Callable[[], Any], limiter: anyio.CapacityLimiter
    ) -> Any:
        """Make a call for a task in a thread, when there is a place for it."""
        try:
            async with limiter:
                result = await self._call_in_thread(task, call)
        finally:
            self._deliver_cancellation(task)
        return await result if inspect.isawaitable(result) else result

    async def _call_in_thread(self, task: Task, call: Callable[[], Any]) -> Any:
        # Until the call is over, a cancellation is only noted. If it were delivered, the thread
        # would go on without anybody who waits for it, and its place would be given away.
        task.in_threads += 1
        try:
            return await _in_thread(call, _NO_LIMIT)
        finally:
            task.in_threads -= 1

    def _deliver_cancellation(self, task: Task) -> None:
        if task.cancel_pending and not task.in_threads:
            task.cancel_pending = False
            self._spawner.cancel(task.handle)

    async def _end_with(self, task: Task, error: BaseException) -> None:
        if is_over(task):
            return  # cancelled before it began, while it waited for that
        if self._is_cancellation(error):
            settle(task, TaskStatus.CANCELLED)
            if task.cancel_reason:
                self._tell(TaskEventKind.CANCELLED, task, reason=task.cancel_reason)
            else:
                self._tell(TaskEventKind.CANCELLED, task, error=error, reason=BY_OTHERS)
            return
        wait = task.next_attempt_in(error) if isinstance(error, Exception) else None
        somebody_waits = settle(task, TaskStatus.FAILED, error=error)
        if wait is not None:
            self._tell_wait(task, cast(Exception, error), wait)
            return
        self._tell(TaskEventKind.FAILED, task, error=error)
        self._let_interrupt_pass(task, error)
        handler = task.config.on_error
        if handler is not None and isinstance(error, Exception):
            async with self._spawner.renewed(task.handle):
                await self._handle(task, error, handler, somebody_waits=somebody_waits)

    async def _handle(
        self, task: Task, error: Exception, handler: TaskErrorHandler, *, somebody_waits: bool
    ) -> None:
        try:
            if somebody_waits:
                await self._spawner.turn()
            if is_async(handler):
                await cast("Awaitable[None]", handler(task, error))
            else:
                handling = functools.partial(handler, task, error)
                await self._run_in_thread(task, handling, self._threads)
        except BaseException as failure:
            self._tell(TaskEventKind.HANDLER_FAILED, task, error=_from_users_code(failure))
            self._let_interrupt_pass(task, failure)

    def _let_interrupt_pass(self, task: Task, error: BaseException) -> None:
        """Raise a ``KeyboardInterrupt`` again, which a group may have come to hold."""
        for leaf in _leaves(error):
            if isinstance(leaf, KeyboardInterrupt):
                self._spawner.let_interrupt_pass(task.handle)
                raise leaf

    def _is_cancellation(self, error: BaseException) -> bool:
        """Return whether an error is a cancellation, or a group of nothing else."""
        return all(isinstance(leaf, self._spawner.cancelled) for leaf in _leaves(error))

    def _tell_wait(self, task: Task, error: Exception, wait: float) -> None:
        event = TaskEvent(TaskEventKind.RETRYING, (task,), error=error, wait=wait)
        self._observers.tell(event)

    def _tell(
        self,
        kind: TaskEventKind,
        task: Task,
        *,
        error: BaseException | None = None,
        reason: str = "",
    ) -> None:
        self._observers.tell(TaskEvent(kind, (task,), error=error, reason=reason))


class _ThreadCall:
    """A call in a thread, which may go on when its attempt is over.

    :param limiter: where it has its place
    :param is_alone: whether the place is for the thread only, and not for what comes after it
    """

    __slots__ = ("_is_alone", "_is_left", "limiter", "outcome", "over")

    def __init__(self, limiter: anyio.CapacityLimiter, *, is_alone: bool) -> None:
        self._is_alone = is_alone
        self._is_left = False
        self.limiter = limiter
        """Where it has its place."""
        self.over = anyio.Event()
        """Is set when the thread is done."""
        # If somebody cancels the loop's task that waits for it before it has begun.
        self.outcome = _Outcome(error=asyncio.CancelledError())
        """What has come of it."""

    async def run(self, call: Callable[[], Any], limiter: anyio.CapacityLimiter) -> None:
        """Make the call, and keep what comes of it."""
        _thread_call.set(self)
        try:
            self.outcome = _Outcome(await _in_thread(call, limiter))
        except BaseException as error:
            self.outcome = _Outcome(error=_from_users_code(error))
        finally:
            enter(None)  # as in Runner.run()

    def end(self, _handle: Handle) -> None:
        """Note that the thread is done."""
        self.over.set()
        if self._is_alone or self._is_left:
            self.limiter.release_on_behalf_of(self)
        if self._is_left:
            self._drop()

    def leave(self) -> bool:
        """Note that nobody waits for it any more; return whether it is over."""
        self._is_left = True
        if not self.over.is_set():
            return False
        if not self._is_alone:
            self.limiter.release_on_behalf_of(self)
        self._drop()
        return True

    def _drop(self) -> None:
        discard(self.outcome.result)
        self.outcome = _Outcome()


_thread_call: ContextVar[_ThreadCall | None] = ContextVar("fastapi_tasks_thread_call", default=None)
"""Which call runs in the caller's thread, if its attempt has a limit of time."""


def _is_held(limiter: anyio.CapacityLimiter, caller: Task | None) -> bool:
    """Return whether the caller has a place, and would wait for itself if it took another one.

    The place may be that of a task which waits for the caller, in a thread or in a task group.
    """
    if caller is not None and caller.config.limiter is limiter:
        if caller.has_place:
            return True
        # A thread that goes on has its place still. What it has scheduled has copied its context.
        call = _thread_call.get()
        if call is not None and call in caller.strays and not call.over.is_set():
            return True
    borrowers = limiter.statistics().borrowers
    return anyio.get_current_task().id in map(id, borrowers)


class _NoLimit(anyio.CapacityLimiter):
    """Lets everybody in, and at once.

    A task has its place before it asks for a thread, to know when that begins, but AnyIO wants a
    limiter all the same, and to wait for its own costs each call a turn of the event loop.
    """

    __slots__ = ()

    def __new__(cls) -> Self:
        return object.__new__(cls)

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *error: object) -> None:
        return None

    # These two are what trio asks for.
    # https://trio.readthedocs.io/en/stable/reference-core.html#trio.to_thread.run_sync
    async def acquire_on_behalf_of(self, borrower: object) -> None:
        return None

    def release_on_behalf_of(self, borrower: object) -> None:
        return None


_NO_LIMIT = _NoLimit()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors of a group, and an error by itself.

    A group's own ``split`` would call what its class has made of ``derive``.
    """
    if isinstance(error, BaseExceptionGroup):
        for part in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(part)
    else:
        yield error


def _call_of(task: Task) -> Callable[[], Any]:
    return functools.partial(task.func, *task.args, **task.kwargs)


async def _in_thread(call: Callable[[], Any], limiter: anyio.CapacityLimiter) -> Any:
    # What comes of it is handed over in something: trio refuses a thread's result that is a
    # coroutine, and an error that passes through takes the frames of the thread's machinery along.
    calls = [call]
    del call
    return _result_of(await anyio.to_thread.run_sync(_outcome_of, calls, limiter=limiter))


class _Outcome:
    """What comes of a call; nothing of it is shown by asyncio's debug mode, unlike a tuple's."""

    __slots__ = ("error", "result")

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result = result
        self.error = error


def _result_of(outcome: _Outcome) -> Any:
    """Return what a function returned, or raise what it raised."""
    error = outcome.error
    if error is None:
        return outcome.result
    outcome.error = None
    try:
        raise error
    finally:
        del error  # its traceback refers to this frame


def _outcome_of(calls: list[Callable[[], Any]]) -> _Outcome:
    # The frames of the thread's machinery live as long as the error does. They refer to the call
    # and to this context, and those must not lead to the task that leads to the error.
    try:
        return _Outcome(calls.pop()())
    except BaseException as error:
        return _Outcome(error=error)
    finally:
        enter(None)


def _from_users_code(error: _ErrorT) -> _ErrorT:
    """Return an error without the frames of the runner, which its traceback begins with.

    They refer to the task that refers to the error, and would keep both until the garbage
    collector comes; and they tell nothing to whoever reads the traceback.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _OWN_FILES:
        traceback = traceback.tb_next
    return error.with_traceback(traceback)
