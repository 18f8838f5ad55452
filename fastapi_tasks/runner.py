"""HOW one task runs.

In this order: a sync function waits for a thread; the function runs; its end settles the task and
is told to the observers, the log first; whoever waits for the task goes on; the error handler
runs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import anyio
import anyio.to_thread

from .callables import is_async
from .observer import Observers, TaskEvent, TaskEventKind
from .spawn import Spawner
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

BY_OTHERS = "by a cancellation that did not come from its supervisor"
"""The reason of a cancellation that nobody asked a supervisor for."""

_SUCCEEDED = TaskStatus.SUCCEEDED


class Runner:
    """Runs tasks in one event loop.

    :param spawner: the loop's
    :param observers: who is told of it
    :param threads: how many sync functions run at once
    """

    __slots__ = ("_observers", "_spawner", "_threads", "_unlimited")

    def __init__(self, spawner: Spawner, observers: Observers, threads: int) -> None:
        self._spawner = spawner
        self._observers = observers
        self._threads = anyio.CapacityLimiter(threads)
        # anyio insists on a limiter too; ours comes before it, to know when the thread begins.
        self._unlimited = anyio.CapacityLimiter(math.inf)

    async def run(self, task: Task) -> None:
        """Run a task to its end, error handler included; only ``KeyboardInterrupt`` escapes."""
        enter(task)
        try:
            if task.is_async:
                if not self._begin(task):
                    return  # cancelled before its first step, which trio takes all the same
                result = await task.func(*task.args, **task.kwargs)
            else:
                async with self._threads:
                    if not self._begin(task):
                        return  # cancelled while it waited, which trio may find out too late
                    result = await self._call_in_thread(task, _call_of(task))
                if inspect.isawaitable(result):
                    self._deliver_cancellation(task)
                    result = await result
        except BaseException as error:
            try:
                await self._end_with(task, _from_users_code(error))
            finally:
                # By its error the task leads to the function's frames, and those must not lead
                # back: neither by this frame, the next one outwards on 3.12 and newer, nor by
                # this context, which trio's threads refer to.
                if find_current_task() is task:  # it is another's, if this is collected in one
                    enter(None)
                del task
        else:
            settle(task, _SUCCEEDED, result=result)
            if self._observers.watch_routine:
                self._tell(TaskEventKind.FINISHED, task)

    async def call(self, task: Task) -> Any:
        """Run a task's function again, in the caller, and return what it returns."""
        is_own = find_current_task() is task
        token = enter(task)
        try:
            if task.is_async:
                return await task.func(*task.args, **task.kwargs)
            if is_own:
                return await self._run_in_thread(task, _call_of(task))
            # Somebody else calls it: the task's own cancellation has nothing to do with that.
            result = await _in_thread(_call_of(task), self._threads)
            return await result if inspect.isawaitable(result) else result
        finally:
            leave(token)

    def _begin(self, task: Task) -> bool:
        if not begin(task):
            return False
        if self._observers.watch_routine:
            self._tell(TaskEventKind.STARTED, task)
        return True

    async def _run_in_thread(self, task: Task, call: Callable[[], Any]) -> Any:
        """Make a call for a task in a thread of its kind, when there is one."""
        try:
            async with self._threads:
                result = await self._call_in_thread(task, call)
        finally:
            self._deliver_cancellation(task)
        return await result if inspect.isawaitable(result) else result

    async def _call_in_thread(self, task: Task, call: Callable[[], Any]) -> Any:
        # Until the call is over, a cancellation is only noted. If it were delivered, the thread
        # would go on without anybody who waits for it, and its place would be given away.
        task.in_threads += 1
        try:
            return await _in_thread(call, self._unlimited)
        finally:
            task.in_threads -= 1

    def _deliver_cancellation(self, task: Task) -> None:
        if task.cancel_pending and not task.in_threads:
            task.cancel_pending = False
            self._spawner.cancel(task.handle)

    async def _end_with(self, task: Task, error: BaseException) -> None:
        if is_over(task):
            return  # cancelled while it waited for a thread
        if self._is_cancellation(error):
            settle(task, TaskStatus.CANCELLED)
            if task.cancel_reason:
                self._tell(TaskEventKind.CANCELLED, task, reason=task.cancel_reason)
            else:
                self._tell(TaskEventKind.CANCELLED, task, error=error, reason=BY_OTHERS)
            return
        somebody_waits = settle(task, TaskStatus.FAILED, error=error)
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
                await self._run_in_thread(task, functools.partial(handler, task, error))
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

    def _tell(
        self,
        kind: TaskEventKind,
        task: Task,
        *,
        error: BaseException | None = None,
        reason: str = "",
    ) -> None:
        self._observers.tell(TaskEvent(kind, (task,), error=error, reason=reason))


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
    outcome = await anyio.to_thread.run_sync(_outcome_of, calls, limiter=limiter)
    error = outcome.error
    if error is None:
        return outcome.result
    outcome.error = None
    try:
        raise error
    finally:
        del error  # its traceback refers to this frame


class _Outcome:
    """What comes of a call; nothing of it is shown by asyncio's debug mode, unlike a tuple's."""

    __slots__ = ("error", "result")

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result = result
        self.error = error


def _outcome_of(calls: list[Callable[[], Any]]) -> _Outcome:
    # The frames of the thread's machinery live as long as the error does. They refer to the call
    # and to this context, and those must not lead to the task that leads to the error.
    try:
        return _Outcome(calls.pop()())
    except BaseException as error:
        return _Outcome(error=error)
    finally:
        enter(None)


def _from_users_code(error: BaseException) -> BaseException:
    """Return an error without the frames of this module, which its traceback begins with.

    They refer to the task that refers to the error, and would keep both until the garbage
    collector comes; and they tell nothing to whoever reads the traceback.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return error.with_traceback(traceback)
