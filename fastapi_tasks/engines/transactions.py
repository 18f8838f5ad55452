"""The user's own connection, in whose transaction a job is enqueued."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from fastapi_tasks.errors import InvalidSettingError

from .pgqueuer_database import Row, is_asyncpg

__all__ = ["Fetch", "fetch_by"]

Fetch: TypeAlias = Callable[..., Awaitable[list[Row]]]
"""Makes a query, whose parameters are ``$1``, ``$2``..."""


async def fetch_by(connection: object) -> Fetch:
    """Return what makes queries in the transaction of a connection.

    :param connection: asyncpg's or psycopg's, or SQLAlchemy's session or connection
    :raises InvalidSettingError: it is none of these, or not in a transaction
    """
    raw = connection
    if _is_a(connection, "sqlalchemy.ext.asyncio", "AsyncSession", "AsyncConnection"):
        raw = await _raw_connection(connection)
    if is_asyncpg(raw):
        return _fetch_by_asyncpg(connection, raw)
    if _is_a(raw, "psycopg", "AsyncConnection"):
        return _fetch_by_psycopg(connection, raw)
    raise InvalidSettingError(
        "connection",
        connection,
        expected="a connection of asyncpg's, an AsyncConnection of psycopg's, or an AsyncSession "
        "or AsyncConnection of SQLAlchemy's on one of them",
        instead="engine.using(connection=session).enqueue(...)  # session: AsyncSession",
    )


def _is_a(value: object, module: str, *names: str) -> bool:
    # Whoever has such an object has imported its module; nobody else has to have it.
    found = sys.modules.get(module)
    return found is not None and isinstance(value, tuple(getattr(found, name) for name in names))


async def _raw_connection(connection: Any) -> object:
    if _is_a(connection, "sqlalchemy.ext.asyncio", "AsyncSession"):
        connection = await connection.connection()
    # SQLAlchemy begins the transaction with the first statement that it makes itself.
    await connection.exec_driver_sql("SELECT 1")
    pooled = await connection.get_raw_connection()  # pragma: no cover - unseen after a greenlet
    return pooled.driver_connection  # pragma: no cover - as well


def _fetch_by_asyncpg(connection: object, raw: Any) -> Fetch:
    if not raw.is_in_transaction():
        raise _not_in_transaction(connection)
    fetch: Fetch = raw.fetch
    return fetch


def _fetch_by_psycopg(connection: object, raw: Any) -> Fetch:
    import psycopg
    from psycopg.rows import dict_row

    if raw.autocommit and raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        raise _not_in_transaction(connection)

    async def fetch(query: str, *args: object) -> list[Row]:
        async with psycopg.AsyncRawCursor(raw, row_factory=dict_row) as cursor:
            await cursor.execute(query.encode(), args)
            return [*await cursor.fetchall()]

    return fetch


def _not_in_transaction(connection: object) -> InvalidSettingError:
    return InvalidSettingError(
        "connection",
        connection,
        expected="one in a transaction, of which the job is to be a part",
        instead="async with connection.transaction(): await engine.using(connection=connection)"
        ".enqueue(...)",
    )
