"""What PgQueuer makes its queries by: they outlive the connections that they are made on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from pgqueuer.core.tm import TaskManager
from pgqueuer.ports.driver import NotifyCallback

from .pgqueuer_database import LOST, Connection, Database, end

__all__ = ["Listener", "SteadyDriver"]

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_QUERY_TIMEOUT = 10.0
"""Seconds after which a connection that does not answer is taken for lost."""
_STORING = 1.0
"""Seconds in which, at the end, queries are still repeated."""


class Listener:
    """Hears notifications on a connection of its own, which is renewed when it is lost.

    What was said between two connections is not heard.

    :param connect: opens a connection
    :param on_connected: is called whenever everything is listened to again
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Connection]], on_connected: Callable[[], None]
    ) -> None:
        self._connect = connect
        self._on_connected = on_connected
        self._callbacks: dict[str, NotifyCallback] = {}
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def add(self, channel: str, callback: NotifyCallback) -> None:
        """Have a function called with what is said on a channel, instead of an earlier one.

        This does not wait for the connection.
        """
        is_new = channel not in self._callbacks
        self._callbacks[channel] = callback
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        elif is_new:
            async with self._lock:
                if self._connection is not None:
                    with suppress(*LOST):  # then another one is about to listen to it
                        await self._listen(self._connection, channel)
                        self._on_connected()

    async def close(self) -> None:
        """Hear nothing any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with suppress(*LOST):
                connection = await self._connect()
                try:
                    await self._serve(connection)
                    pause = _FIRST_PAUSE
                finally:
                    self._connection = None
                    await end(connection)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _serve(self, connection: Connection) -> None:
        lost = asyncio.Event()

        def end(_connection: object) -> None:
            lost.set()

        connection.add_termination_listener(end)
        async with self._lock:
            for channel in tuple(self._callbacks):
                await self._listen(connection, channel)
            self._connection = connection
        self._on_connected()
        await lost.wait()

    async def _listen(self, connection: Connection, channel: str) -> None:
        def hear(_connection: object, _pid: int, _channel: str, payload: str) -> None:
            self._callbacks[channel](payload)

        async with asyncio.timeout(_QUERY_TIMEOUT):
            await connection.add_listener(channel, hear)


class SteadyDriver:
    """Repeats a query whose connection was lost, until it is answered or the driver is closed.

    So what is asked by it has to be harmless when it is done twice.

    :param database: where queries are made
    :param listener: hears notifications
    """

    def __init__(self, database: Database, listener: Listener) -> None:
        self._database = database
        self._listener = listener
        self._shutdown = asyncio.Event()
        self._deadline: float | None = None

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        """Make a query.

        :raises Exception: it was not answered, and the driver is closed
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(_QUERY_TIMEOUT):
                    return [dict(row) for row in await self._database.fetch(query, *args)]
            except LOST:
                if self._is_over:
                    raise
            if self._deadline is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._shutdown.wait(), pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                await asyncio.sleep(_FIRST_PAUSE)

    async def execute(self, query: str, *args: object) -> str:
        """Make a query whose rows do not matter."""
        await self.fetch(query, *args)
        return ""

    async def notify(self, channel: str, payload: str) -> None:
        """Say something on a channel."""
        await self.fetch("SELECT pg_notify($1, $2)", channel, payload)

    async def add_listener(self, channel: str, callback: NotifyCallback) -> None:
        """Have a function called with what is said on a channel."""
        await self._listener.add(channel, callback)

    def close(self) -> None:
        """Repeat queries for a moment only, from now on."""
        self._deadline = asyncio.get_running_loop().time() + _STORING
        self._shutdown.set()

    @property
    def _is_over(self) -> bool:
        return self._deadline is not None and asyncio.get_running_loop().time() > self._deadline

    @property
    def shutdown(self) -> asyncio.Event:
        """Is set when the driver is closed."""
        return self._shutdown

    @property
    def tm(self) -> TaskManager:
        """The driver's tasks: it has none."""
        return TaskManager()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc_info: object) -> None: ...
