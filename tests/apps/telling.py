"""What the apps have in common: they tell on standard output what happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def tell(what: str) -> None:
    """Write a line that the test can wait for."""
    # In one piece with its end: tasks in threads write too.
    print(f"{what}\n", end="", flush=True)


class Resource:
    """Something that the lifespan opens and closes."""

    state = "closed"


resource = Resource()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Hold the resource open while the app runs."""
    resource.state = "open"
    yield
    resource.state = "closed"
    tell("resource closed")


class TellingWhenSent:
    """Tells when the server has taken the last part of a response.

    :param app: the app that responds
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a scope, as ASGI says."""

        async def sending(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                tell("sent")

        await self._app(scope, receive, sending)
