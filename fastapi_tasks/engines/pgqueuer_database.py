"""PostgreSQL by way of asyncpg, which has no types: whatever is untyped about it ends here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol, TypeAlias

__all__ = ["LOST", "REFUSED", "Connection", "Database", "Row", "end", "is_asyncpg"]

asyncpg: Any = import_module("asyncpg")

Row: TypeAlias = Mapping[str, Any]
"""One row of an answer, by the names of its columns."""

LOST: tuple[type[Exception], ...] = (
    OSError,  # a TimeoutError is one
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the connection ended in the middle of a statement
    asyncpg.OperatorInterventionError,  # the server shuts down, or begins to run
    asyncpg.ObjectNotInPrerequisiteStateError,  # the database takes no connections
    asyncpg.TooManyConnectionsError,
)
"""What is raised when a connection is lost, or cannot be made, and may be possible later."""

REFUSED: tuple[type[Exception], ...] = (*LOST, asyncpg.PostgresError)
"""What is raised when the server does not do what it was asked for."""


class Connection(Protocol):
    """As much of asyncpg's connection as is needed here."""

    async def fetch(self, query: str, *args: object) -> list[Row]:
        """Make a query."""
        ...

    async def execute(self, query: str, *args: object) -> str:
        """Make a query whose rows do not matter."""
        ...

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        """Listen to a channel."""
        ...

    def add_termination_listener(self, callback: Callable[..., None]) -> None:
        """Have a function called when the connection has ended."""
        ...

    def is_in_transaction(self) -> bool:
        """Return whether a transaction has begun."""
        ...

    async def close(self, *, timeout: float) -> None:  # noqa: ASYNC109 - asyncpg's
        """End the connection as the server likes it."""
        ...

    def terminate(self) -> None:
        """End the connection."""
        ...


def is_asyncpg(connection: object) -> bool:
    """Return whether something is a connection of asyncpg's, from a pool or not."""
    return isinstance(connection, asyncpg.Connection | asyncpg.pool.PoolConnectionProxy)


_CLOSING = 1.0
"""Seconds for connections to end as the server likes it."""


async def end(connection: Connection) -> None:
    """End a connection, in time."""
    with suppress(*LOST):
        await connection.close(timeout=_CLOSING)


class Database:
    """Connections to one database, opened as they are needed.

    :param dsn: its address
    :param size: how many there are at most, those of :meth:`connect` excepted
    :param timeout: seconds that it may take to open one
    """

    def __init__(self, dsn: str, *, size: int, timeout: float) -> None:
        self._dsn = dsn
        self._settings = {
            "timeout": timeout,
            "server_settings": {"application_name": "fastapi-tasks"},
        }
        # A pool that keeps connections on purpose logs each failure to do so.
        self._pool = asyncpg.create_pool(
            dsn, min_size=0, max_size=size, reset=_leave_as_it_is, **self._settings
        )

    async def open(self) -> None:
        """Make the pool usable; nothing is connected yet."""
        await self._pool

    async def connect(self) -> Connection:
        """Open a connection of one's own."""
        connection: Connection = await asyncpg.connect(self._dsn, **self._settings)
        return connection

    async def fetch(self, query: str, *args: object) -> list[Row]:
        """Make a query, on any connection."""
        connection = await self._pool.acquire()
        try:
            rows: list[Row] = await connection.fetch(query, *args)
        except BaseException as error:
            # To be released it would have to answer, and that is what it may not do any more.
            if isinstance(error, (asyncio.CancelledError, *LOST)):
                connection.terminate()
            raise
        finally:
            await self._pool.release(connection)
        return rows

    def terminate(self) -> None:
        """End all connections at once: what waits for an answer fails."""
        self._pool.terminate()

    async def close(self) -> None:
        """End all connections, in time."""
        with suppress(*LOST):
            async with asyncio.timeout(_CLOSING):
                await self._pool.close()
                return
        self._pool.terminate()


async def _leave_as_it_is(_connection: object) -> None:
    """Spare the server a query for each one: nothing here changes the state of a session."""
