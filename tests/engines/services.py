"""The services that engines stand on, a place of one's own on each, and their outages."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

T = TypeVar("T")

POSTGRESQL = os.environ.get("FASTAPI_TASKS_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432")
"""Where PostgreSQL is, without a database: one is made for each test."""
REDIS = os.environ.get("FASTAPI_TASKS_REDIS", "redis://127.0.0.1:6379/0")
"""Where Redis is: each test has a prefix of its own there."""
PATIENCE = 40.0
"""Seconds after which a test fails that waits for something; none takes half of it."""


def require_packages(*names: str) -> None:
    """Skip the test if a module cannot be imported: old versions are tested without engines."""
    for name in names:
        if find_spec(name) is None:
            pytest.skip(f"there is no module {name!r} here")


def require_service(url: str) -> None:
    """Skip the test, or fail it where no service may be missing, if nobody listens there."""
    try:
        socket.create_connection(address_of(url), timeout=5).close()
    except OSError as error:
        reason = f"nobody listens at {url}: {error}"
        if os.environ.get("FASTAPI_TASKS_REQUIRE_SERVICES"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def address_of(url: str) -> tuple[str, int]:
    """Return the host and the port of an address."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def unique_name() -> str:
    """Return what nobody else has called anything."""
    return f"ftt_{secrets.token_hex(6)}"


@contextmanager
def postgresql_database() -> Generator[str, None, None]:
    """Make a database, give its address, and drop it with all connections to it."""
    require_packages("psycopg")
    require_service(POSTGRESQL)
    import psycopg

    name = unique_name()
    with psycopg.connect(f"{POSTGRESQL}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield f"{POSTGRESQL}/{name}"
    finally:
        with psycopg.connect(f"{POSTGRESQL}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextmanager
def redis_prefix() -> Generator[str, None, None]:
    """Give a prefix for keys, and remove every key that begins with it."""
    require_packages("redis")
    require_service(REDIS)
    import redis

    prefix = unique_name()
    try:
        yield prefix
    finally:
        with redis.Redis.from_url(REDIS) as client:
            keys = list(client.scan_iter(match=f"*{prefix}*", count=1000))
            if keys:
                client.unlink(*keys)


@contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Hold a SQLite file's lock, so that nobody else writes to it."""
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


class Proxy:
    """Passes TCP connections on to a service, as long as it is not told otherwise.

    It has a thread of its own: nobody who blocks the test's event loop blocks it.

    :param url: the service's address
    """

    def __init__(self, url: str) -> None:
        self._service = address_of(url)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._call(self._listen(0))
        parts = urlsplit(url)
        netloc = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{netloc[0]}{netloc[1]}127.0.0.1:{self.port}").geturl()
        """The service's address, by way of the proxy."""

    @contextmanager
    def refusing(self) -> Generator[None, None, None]:
        """Cut every connection, and refuse new ones, until exit: the service is down."""
        self._call(self._close())
        try:
            yield
        finally:
            self._call(self._listen(self.port))

    @contextmanager
    def silent(self) -> Generator[None, None, None]:
        """Pass nothing on until exit, but keep connections open: the service hangs."""
        self._loop.call_soon_threadsafe(self._is_open.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._is_open.set)

    def cut(self) -> None:
        """Cut every connection, while new ones are let through: the service was restarted."""
        self._call(self._cut())

    def close(self) -> None:
        """End the proxy, and all connections through it."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _listen(self, port: int) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        address: tuple[str, int] = self._server.sockets[0].getsockname()
        return address[1]

    async def _close(self) -> None:
        assert self._server is not None
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        for _ in range(3):  # in which what was accepted is served: asyncio would else leak it
            await asyncio.sleep(0)
        self._server.close()
        await self._cut()

    async def _cut(self) -> None:
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # in which aborted connections are closed

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.create_task(self._connect(reader, writer))
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._drop(writer)

        task.add_done_callback(end)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            service_reader, service_writer = await asyncio.open_connection(*self._service)
            self._writers.add(service_writer)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(reader, service_writer))
                    both.create_task(self._pass_on(service_reader, writer))
            finally:
                self._drop(service_writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._is_open.wait()
                writer.write(data)
                await writer.drain()
        with suppress(OSError, RuntimeError):
            writer.close()

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()


Outage = Callable[[], AbstractContextManager[None]]
"""Takes a service away from entry to exit, from one test alone."""
