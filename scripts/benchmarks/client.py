"""Requests that are put straight into an ASGI app: no server, no client library, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

Message = MutableMapping[str, Any]

PATH = "/work"
"""The path of an app's only route."""


class RequestFailedError(Exception):
    """A request was not answered with status 200, or a start-up or shutdown failed."""


class Client:
    """Sends requests to an app, after it has started up as a server would have it do.

    :param app: the app
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self._lifespan: asyncio.Task[None] | None = None

    async def request(self) -> None:
        """Send a request, and return when the app is done with it.

        :raises RequestFailedError: its status is not 200
        """
        status = None

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"accept", b"*/*")],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
            "state": self._state.copy(),
        }
        await self._app(scope, receive, send)
        if status != 200:
            raise RequestFailedError(f"the status is {status}")

    async def start_up(self) -> None:
        """Have the app start up, in a task of its own."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        serving = self._app(scope, self._to_app.get, self._from_app.put)
        self._lifespan = asyncio.create_task(serving)
        await self._tell("startup")

    async def shut_down(self) -> None:
        """Have the app shut down, unless it has done so."""
        lifespan, self._lifespan = self._lifespan, None
        if lifespan is not None:
            await self._tell("shutdown", lifespan)
            await lifespan

    async def _tell(self, what: str, lifespan: asyncio.Task[None] | None = None) -> None:
        await self._to_app.put({"type": f"lifespan.{what}"})
        answer = asyncio.create_task(self._from_app.get())
        over = lifespan or self._lifespan
        assert over is not None
        await asyncio.wait([answer, over], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() or answer.result()["type"] != f"lifespan.{what}.complete":
            answer.cancel()
            raise RequestFailedError(f"the {what} failed")


@asynccontextmanager
async def serving(*clients: Client) -> AsyncIterator[None]:
    """Let apps run between their start-ups and their shutdowns."""
    try:
        for client in clients:
            await client.start_up()
        yield
    finally:
        for client in clients:
            await client.shut_down()
