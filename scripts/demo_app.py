"""The example app, which tells scripts/demo.py what happens in the server's process.

Every event is a line of JSON on standard output. Its time is that of ``time.monotonic``, which all
processes of a machine share.
"""

from __future__ import annotations

import json
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from docs.examples import orders
from fastapi_tasks import TaskEvent, TaskEventKind, task


def tell(who: str, what: str, detail: str = "", task_id: str = "") -> None:
    """Write down one event."""
    event = {"at": time.monotonic(), "who": who, "what": what, "detail": detail, "id": task_id}
    print(f"{json.dumps(event)}\n", end="", flush=True)


def observe(event: TaskEvent) -> None:
    """Tell of every task, and of the beginning and the end of the drain."""
    match event.kind:
        case TaskEventKind.DRAIN_STARTED:
            tell("drain", "started")
        case TaskEventKind.DRAIN_FINISHED:
            assert event.report is not None
            ends = f"{len(event.report.finished)} finished, {len(event.report.cancelled)} cancelled"
            tell("drain", "finished", ends)
        case (
            TaskEventKind.DRAIN_CANCELLING
            | TaskEventKind.DRAIN_WAITING
            | TaskEventKind.DRAIN_ABANDONING
        ):
            pass  # each of these tasks has an event of its own, or the report counts it
        case _:
            tell(event.task.name, event.kind, event.reason, event.task.id)


class Telling:
    """Tells when a response has been sent, and when the app has closed its connections.

    :param app: the example app
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a scope, as ASGI says."""

        async def sending(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                tell("response", "sent")
            elif message["type"] == "lifespan.shutdown.complete":
                tell("connections", "closed", "by the lifespan")

        await self._app(scope, receive, sending)


def shielded() -> ASGIApp:
    """Return the example app as it is."""
    return Telling(orders.create_app([observe]))


def unshielded() -> ASGIApp:
    """Return the example app with a payment that is like any other task."""
    task(shield=False)(orders.take_payment)
    return shielded()
