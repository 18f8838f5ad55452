"""The cheapest correct way to start, cancel and give up a task, on asyncio and on trio.

A task group would tie the tasks to one another and to the task that opened it, and costs several
times as much. So on asyncio each task is a native ``asyncio.Task``, and on trio a system task.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import Context
from types import TracebackType, coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import trio

__all__ = ["Handle", "Main", "Over", "Spawner", "TimeIsUpError", "current_spawner"]

Main = Coroutine[Any, Any, None]
"""What is spawned: a coroutine from which only ``KeyboardInterrupt`` escapes."""

Handle = Any
"""What tells a spawned task from the others; hashable."""

Over = Callable[[Handle], object]
"""Is called in the loop with the handle of each task that is over, whether it ever ran or not; once
or twice."""


class TimeIsUpError(Exception):
    """What :meth:`Spawner.within` ended; its cause is the cancellation that came out of it."""


class Spawner(Protocol):
    """How tasks are started in one running event loop."""

    cancelled: type[BaseException]
    """What the loop raises in a task that is cancelled."""

    def spawn(self, main: Main, name: str, context: Context | None, over: Over) -> Handle:
        """Start a task, which takes its first step when the loop is free, not before."""
        ...

    def told(self, handle: Handle, over: Over, /) -> object:
        """Take note that a task, which is about to end, has called ``over`` by itself."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Cancel a task in the loop's own manner."""
        ...

    def renewed(self, handle: Handle) -> AbstractAsyncContextManager[None]:
        """Let a task that was cancelled go on, within the context, until it is cancelled again."""
        ...

    def within(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Cancel what runs within the context when its time is up.

        :raises TimeIsUpError: that was why it ended; not if it swallowed the cancellation, raised
            something else instead, or was cancelled from outside as well
        """
        ...

    def abandon(self, handle: Handle) -> None:
        """See to it that the end of the loop does not wait for the task, where that is possible."""
        ...

    def let_interrupt_pass(self, handle: Handle) -> None:
        """Expect that a ``KeyboardInterrupt`` escapes from the task."""
        ...

    def call_soon(self, func: Callable[..., object], *args: object) -> None:
        """Call a function in the loop, from any thread.

        :raises RuntimeError: the loop is closed
        """
        ...

    def is_closed(self) -> bool:
        """Return whether the loop can run nothing any more."""
        ...

    def turn(self) -> Awaitable[None]:
        """Let every task that was spawned before run to its first await."""
        ...

    def turn_from_thread(self) -> None:
        """Do the same from a worker thread, when it schedules and returns in this order."""
        ...


@coroutine
def _turn() -> Generator[None, None, None]:
    """Do what ``asyncio.sleep(0)`` does, at half the cost: requests pay for it."""
    yield


_abandoned: set[asyncio.Task[None]] = set()


class AsyncioSpawner:
    """Starts native tasks in the running asyncio loop, uvloop's included."""

    cancelled: type[BaseException] = asyncio.CancelledError

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def spawn(self, main: Main, name: str, context: Context | None, over: Over) -> Handle:
        # Not loop.create_task: an eager task factory would run the first step at once.
        task = asyncio.Task(main, loop=self._loop, name=name, context=context)
        task.add_done_callback(over, context=context)
        return task

    # No function of ours, since each task ends with it.
    told = staticmethod(cast(Any, asyncio.Task).remove_done_callback)

    def cancel(self, handle: Handle) -> None:
        handle.cancel()

    @asynccontextmanager
    async def renewed(self, handle: Handle) -> AsyncGenerator[None, None]:
        # Each cancellation is delivered once. One that was asked for since the last await comes
        # now, unless there was none, and one that is asked for meanwhile is not to get lost.
        requests = handle.cancelling()
        if requests:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            if handle.cancelling() > requests:
                handle.cancel()
        yield

    def within(self, seconds: float) -> AbstractAsyncContextManager[None]:
        return _AsyncioLimit(seconds)

    def abandon(self, handle: Handle) -> None:
        # asyncio.run cancels and awaits all registered tasks at its end, and would never return.
        # https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support
        asyncio._unregister_task(handle)
        # It may go on, though nobody else refers to it, and is not to be complained of if it
        # never ends: asyncio.gather does that for its own tasks.
        _abandoned.add(handle)
        handle.add_done_callback(_abandoned.discard)
        handle._log_destroy_pending = False

    def let_interrupt_pass(self, handle: Handle) -> None:
        # The loop raises it, and would complain as well that nobody asked the task for it.
        handle.add_done_callback(_ask)

    def call_soon(self, func: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(func, *args)

    def is_closed(self) -> bool:
        return self._loop.is_closed()

    turn = staticmethod(_turn)

    def turn_from_thread(self) -> None:
        # The loop calls back in the order in which it was asked to: what the thread scheduled
        # takes its first step before the thread's own return value arrives.
        return None


class _AsyncioLimit:
    """What :meth:`AsyncioSpawner.within` returns.

    A generator in its place would pass the cancellation on, and from 3.12 on the frames that this
    leads through lead back to the error, by those that resumed them.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        when = asyncio.get_running_loop().time() + self._seconds
        # A timer keeps the context that it was made in, and all that is in there, until its time,
        # though it is cancelled.
        Context().run(self._timeout.reschedule, when)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise TimeIsUpError from error


def _ask(task: asyncio.Task[None]) -> None:
    task.exception()


class _TrioHandle:
    """A system task, by the scope that a cancellation of it has to cancel just now."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self.scope = scope


class _TrioLimit:
    """What :meth:`TrioSpawner.within` returns; no generator, as above."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope

    async def __aenter__(self) -> None:
        self._scope.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scope.__exit__(kind, error, traceback)
        if self._scope.cancelled_caught:
            raise TimeIsUpError from error


class TrioSpawner:
    """Starts system tasks in the running trio loop."""

    def __init__(self) -> None:
        import trio

        self.cancelled: type[BaseException] = trio.Cancelled
        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()

    def spawn(self, main: Main, name: str, context: Context | None, over: Over) -> Handle:
        handle = _TrioHandle(self._trio.CancelScope())
        self._trio.lowlevel.spawn_system_task(
            self._run, handle, main, over, name=name, context=context
        )
        return handle

    async def _run(self, handle: _TrioHandle, main: Main, over: Over) -> None:
        try:
            with handle.scope:
                await main
        except KeyboardInterrupt:
            # What escapes from a system task ends trio.run with an internal error. The signal
            # takes the way that it takes when it comes from outside: to the main task.
            signal.raise_signal(signal.SIGINT)
        finally:
            over(handle)

    def told(self, handle: Handle, over: Over, /) -> None:
        return None  # to call it twice does no harm

    def cancel(self, handle: Handle) -> None:
        handle.scope.cancel()

    @asynccontextmanager
    async def renewed(self, handle: Handle) -> AsyncGenerator[None, None]:
        cancelled = handle.scope
        if not cancelled.cancel_called:
            yield
            return
        try:
            with self._trio.CancelScope(shield=True) as handle.scope:
                yield
        finally:
            handle.scope = cancelled  # so that it can be renewed again

    def within(self, seconds: float) -> AbstractAsyncContextManager[None]:
        return _TrioLimit(self._trio.move_on_after(seconds))

    def abandon(self, handle: Handle) -> None:
        # trio.run cancels system tasks and waits for them: there is no way around it. Only the
        # shield of a renewed one can be taken down.
        handle.scope.cancel()

    def let_interrupt_pass(self, handle: Handle) -> None:
        return None

    def call_soon(self, func: Callable[..., object], *args: object) -> None:
        self._token.run_sync_soon(func, *args)

    def is_closed(self) -> bool:
        try:
            self._token.run_sync_soon(_nothing)
        except self._trio.RunFinishedError:
            return True
        return False

    async def turn(self) -> None:
        # One batch of runnable tasks runs in any order: after the second all have run.
        await self._trio.lowlevel.cancel_shielded_checkpoint()
        await self._trio.lowlevel.cancel_shielded_checkpoint()

    def turn_from_thread(self) -> None:
        self._trio.from_thread.run(self.turn)


def _nothing() -> None:
    return None


def current_spawner() -> Spawner:
    """Return the spawner for the event loop that runs the caller.

    :raises RuntimeError: no event loop runs the caller
    """
    trio = sys.modules.get("trio")
    if trio is not None:
        # Not in_trio_task(), which trio has since 0.29 only.
        with suppress(RuntimeError):
            trio.lowlevel.current_task()
            return TrioSpawner()
    return AsyncioSpawner()
