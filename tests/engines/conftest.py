"""Engines are for asyncio: their tests run on its two event loops."""

from __future__ import annotations

import pytest

from tests.clocks import Backend

from .memory import MemoryEngine


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """The event loop of an async test."""
    backend: Backend = request.param
    return backend


@pytest.fixture
def jobs() -> MemoryEngine:
    """An engine that runs its jobs in this process."""
    return MemoryEngine(worker=True)
