"""What tests that need a service do where it is missing, and that it can be taken away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import closing, suppress

import pytest

from tests.clocks import Backend

from .services import Proxy, require_packages, require_service

NOBODY = "redis://127.0.0.1:9/0"


@pytest.fixture
def anyio_backend() -> Backend:
    """The event loop that the services' tests run on."""
    return "asyncio", {}


def test_without_a_service_tests_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contributor need not have every service, nor every package."""
    monkeypatch.delenv("FASTAPI_TASKS_REQUIRE_SERVICES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nobody listens at redis"):
        require_service(NOBODY)
    with pytest.raises(pytest.skip.Exception, match="no module 'not_there'"):
        require_packages("pytest", "not_there")


def test_where_all_have_to_be_there_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would notice that they were never run."""
    monkeypatch.setenv("FASTAPI_TASKS_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="nobody listens"):
        require_service(NOBODY)


@pytest.fixture
async def echo() -> AsyncGenerator[str, None]:
    """The address of a service that answers each line with the same line."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"echo://ada:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/path"


async def test_the_proxy_takes_a_service_away_and_gives_it_back(echo: str) -> None:
    """It passes on, hangs, cuts and refuses, as it is told."""
    with closing(Proxy(echo)) as proxy:
        assert proxy.url == f"echo://ada:secret@127.0.0.1:{proxy.port}/path"
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one\n")
        assert await reader.readline() == b"one\n"
        with proxy.silent():
            writer.write(b"two\n")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readline(), 0.1)
        assert await reader.readline() == b"two\n"
        await asyncio.to_thread(proxy.cut)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with proxy.refusing(), pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.close()
