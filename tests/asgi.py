"""An ASGI server in the test's own task, which sees every message and can fail on purpose."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.types import ASGIApp, Message

OnSend = Callable[[Message], Awaitable[None]]


@dataclass
class Exchange:
    """A request and what was sent back."""

    sent: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The response's status."""
        return next(m["status"] for m in self.sent if m["type"] == "http.response.start")

    @property
    def body(self) -> bytes:
        """The response's body, as far as it was sent."""
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    def json(self) -> Any:
        """The response's body, decoded."""
        return json.loads(self.body)


async def _nothing(message: Message) -> None:
    return None


async def request(
    app: ASGIApp,
    path: str,
    *,
    method: str = "GET",
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    on_send: OnSend = _nothing,
    disconnected: anyio.Event | None = None,
    spec_version: str = "2.4",
) -> Exchange:
    """Send one request to an app, and return when the app is done with it.

    :param on_send: is awaited with each message before its ``send`` returns; raise ``OSError``
        there to play a client that has gone
    :param disconnected: when it is set, ``receive`` says that the client has gone
    :param spec_version: the ASGI version that the server claims
    """
    exchange = Exchange()
    url, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (name.lower().encode(), value.encode()) for name, value in (headers or {}).items()
        ],
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 1),
    }
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await (disconnected or anyio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await on_send(message)
        exchange.sent.append(message)

    await app(scope, receive, send)
    return exchange


@dataclass
class Lifespan:
    """The lifespan of an app, run by hand."""

    shutdown: Callable[[], Awaitable[None]]
    """Send ``lifespan.shutdown`` and wait until the app has completed it."""


class LifespanFailedError(Exception):
    """The app answered ``lifespan.startup`` or ``lifespan.shutdown`` with a failure."""


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[Lifespan]:
    """Run an app between its start-up and its shutdown, as a server does.

    :param app: the app
    """
    to_app_send, to_app_receive = anyio.create_memory_object_stream[Message](2)
    from_app_send, from_app_receive = anyio.create_memory_object_stream[Message](2)
    over = False

    async def run() -> None:
        with from_app_send, to_app_receive:
            await app({"type": "lifespan", "state": {}}, to_app_receive.receive, from_app_send.send)

    async def tell(what: str) -> None:
        await to_app_send.send({"type": f"lifespan.{what}"})
        answer = await from_app_receive.receive()
        if answer["type"] != f"lifespan.{what}.complete":
            raise LifespanFailedError(answer.get("message", ""))

    async def shutdown() -> None:
        nonlocal over
        over = True
        await tell("shutdown")

    async with anyio.create_task_group() as group:
        with to_app_send, from_app_receive:
            group.start_soon(run)
            await tell("startup")
            yield Lifespan(shutdown)
            if not over:
                await shutdown()
