"""Engines are for asyncio: their tests run on its two event loops."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.clocks import Backend

from .memory import MemoryEngine

# Lanes of old versions have no engines; the conformance tests say so.
collect_ignore = [] if find_spec("dbos") else ["test_dbos.py"]


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
