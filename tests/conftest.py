"""What all tests share: every one of them that is async runs on each event loop."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from fastapi import FastAPI

from fastapi_tasks import add_tasks

from .clocks import EAGER_TASKS, FakeClockLoop, asyncio_loop, fake_trio_clock
from .recording import Observed, Timeline

Backend = tuple[str, dict[str, Any]]

eager_loop = functools.partial(asyncio_loop, task_factory=EAGER_TASKS)
eager_fake_clock_loop = functools.partial(eager_loop, FakeClockLoop)


def _if_eager(*params: Any) -> tuple[Any, ...]:
    """Return the parameters that need eager tasks, if this Python has any."""
    return params if EAGER_TASKS else ()


ASYNCIO_BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("asyncio", {"debug": True, "loop_factory": asyncio_loop}), id="asyncio-debug"),
    *_if_eager(pytest.param(("asyncio", {"loop_factory": eager_loop}), id="asyncio-eager")),
]

BACKENDS = [*ASYNCIO_BACKENDS, pytest.param(("trio", {}), id="trio")]

FAKE_CLOCKS: list[Any] = [
    pytest.param(lambda: ("asyncio", {"loop_factory": FakeClockLoop}), id="asyncio-fake-clock"),
    *_if_eager(
        pytest.param(
            lambda: ("asyncio", {"loop_factory": eager_fake_clock_loop}),
            id="asyncio-eager-fake-clock",
        )
    ),
    pytest.param(lambda: ("trio", {"clock": fake_trio_clock()}), id="trio-fake-clock"),
]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """The event loop of an async test; modules about time put fake clocks in its place."""
    return request.param


@pytest.fixture
def observed() -> Observed:
    """An observer that keeps every event; give it to ``add_tasks`` or a supervisor."""
    return Observed()


@pytest.fixture
def app(observed: Observed) -> FastAPI:
    """An app with tasks, whose own routes are exact."""
    app = FastAPI()
    add_tasks(app, observers=[observed])
    return app


@pytest.fixture
def timeline() -> Timeline:
    """What happens in the test, in order."""
    return Timeline()
