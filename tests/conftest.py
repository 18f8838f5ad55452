"""What all tests share: every one of them that is async runs on each event loop."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from fastapi_tasks import add_tasks

from .clocks import Backend, asyncio_loop, eager_loop, if_eager
from .recording import Observed, Timeline

ASYNCIO_BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("asyncio", {"debug": True, "loop_factory": asyncio_loop}), id="asyncio-debug"),
    *if_eager(pytest.param(("asyncio", {"loop_factory": eager_loop}), id="asyncio-eager")),
]

BACKENDS = [*ASYNCIO_BACKENDS, pytest.param(("trio", {}), id="trio")]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """The event loop of an async test; modules about time import on_fake_clocks in its place."""
    return request.param


on_real_clocks = pytest.mark.parametrize("anyio_backend", BACKENDS)
on_asyncio = pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)


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
