"""What ``docs/migrating.rst`` says of the first thing that changes, in a real server.

And what its lists promise of threads, of a shutdown and of errors. Its other promises are kept by
the blocks behind its diffs; see ``test_docs.py``.
"""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from . import asgi, clocks, diffs
from .servers import End, Server, serve


def register(server: Server) -> None:
    """Have a text sent that waits to be let go."""
    with closing(server.connect()) as connection:
        connection.request("POST", "/parcels/17")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"number":17}')
    server.said.wait_for("sending 17: on its way")


def stopped(app: str, waits_for: str) -> End:
    """Stop a server while a text is being sent, and let that go on once the server has begun."""
    with serve(f"moving:{app}") as server:
        register(server)

        def let_go() -> None:
            server.log.wait_for(waits_for)
            server.stdin.write("\n")
            server.stdin.flush()

        return server.stop(then=let_go)


def test_uvicorn_waits_for_background_tasks() -> None:
    """They belong to the request."""
    end = stopped("before", "Waiting for background tasks to complete")
    assert (end.said, end.ours) == (["sending 17: on its way", "sent"], [])


def test_with_a_grace_tasks_are_waited_for_as_well() -> None:
    """The diff has one, and so nothing is lost that was not lost before."""
    end = stopped("after", "Waiting for application shutdown")
    assert (end.said, end.ours) == (["sending 17: on its way", "sent"], [])


def test_without_a_grace_they_are_cancelled_and_named() -> None:
    """That is why the page begins with it."""
    end = stopped("forgotten", "Waiting for application shutdown")
    assert end.said == ["sending 17: on its way", "not sent"]
    assert end.ours == ["Shutdown: cancelling text_recipient"]


def test_each_diff_has_two_sides() -> None:
    """A page without a diff, or a diff without a change, would test nothing."""
    found = diffs.diffs_of("migrating")
    assert len(found) == 5
    for before, after in map(diffs.sides, found):
        assert before != after


@pytest.mark.parametrize("line", ["*a", "@@ -1 +1 @@"])
def test_a_line_that_belongs_to_no_side_is_no_part_of_a_diff(line: str) -> None:
    """A reader could not apply it."""
    with pytest.raises(AssertionError):
        diffs.sides(line)


FROM_BACKGROUND_TASKS, _, FROM_CREATE_TASK, *_ = map(diffs.sides, diffs.diffs_of("migrating"))


class SlowGateway:
    """Takes three seconds for a text, and sends none to number 13."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, text: str) -> None:
        """Send a text."""
        await anyio.sleep(3)
        if text.startswith("13:"):
            raise ConnectionError("no signal")
        self.sent.append(text)


class Kept(set[Any]):
    """A set that somebody has forgotten to empty."""

    def discard(self, element: Any) -> None:
        """Keep the element."""


def serve_for(seconds: float, app: FastAPI, path: str) -> None:
    """Start an app, send a request, and stop the app after so many seconds that take no time."""

    async def main() -> None:
        async with asgi.lifespan(app):
            exchange = await asgi.request(app, path, method="POST")
            assert exchange.status == 200
            await anyio.sleep(seconds)

    anyio.run(main, backend_options={"loop_factory": clocks.FakeClockLoop})


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the errors that were logged."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]


def test_functions_of_tasks_run_in_threads_that_are_not_those_of_endpoints() -> None:
    """One of Starlette's places is taken before, and none after."""
    taken: list[int] = []

    class BlockingGateway:
        def send(self, text: str) -> None:
            limiter = anyio.from_thread.run_sync(anyio.to_thread.current_default_thread_limiter)
            taken.append(limiter.borrowed_tokens)

    for source in FROM_BACKGROUND_TASKS:
        blocking = source.replace("async def text_", "def text_").replace(
            "await gateway", "gateway"
        )
        with TestClient(diffs.app_of(blocking, gateway=BlockingGateway())) as client:
            assert client.post("/parcels/17").json() == {"number": 17}
    assert taken == [1, 0]


def test_what_create_task_started_is_lost_at_shutdown_and_ours_is_waited_for() -> None:
    """The app stops a second after the request, and two seconds before the text is out."""
    sent: list[list[str]] = []
    for source in FROM_CREATE_TASK:
        gateway = SlowGateway()
        serve_for(1, diffs.app_of(source, gateway=gateway), "/parcels/17")
        sent.append(gateway.sent)
    assert sent == [[], ["17: on its way"]]


def test_an_error_of_create_task_is_told_to_nobody_and_ours_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is logged while somebody keeps the task; ours is logged when it fails."""
    before, after = FROM_CREATE_TASK
    kept = Kept()
    app = diffs.app_of(before.replace("= set()", "= kept"), gateway=SlowGateway(), kept=kept)
    serve_for(4, app, "/parcels/13")
    assert errors(caplog) == []
    (task,) = kept
    assert isinstance(task.exception(), ConnectionError)
    serve_for(4, diffs.app_of(after, gateway=SlowGateway()), "/parcels/13")
    (error,) = errors(caplog)
    assert error.startswith("Task text (")
