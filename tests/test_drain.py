"""A supervisor's end: who may go on, who is cancelled when, and what is reported."""

from __future__ import annotations

import anyio
import pytest

from fastapi_tasks import Supervisor, TaskStatus

from .conftest import FAKE_CLOCKS, Backend
from .recording import Observed

pytestmark = pytest.mark.anyio


@pytest.fixture(params=FAKE_CLOCKS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """Event loops on which an hour takes no time."""
    return request.param()


async def test_a_shielded_task_is_waited_for_and_an_unshielded_one_is_not() -> None:
    """The promise of the whole package, in the smallest form."""
    supervisor = Supervisor()
    await supervisor.start()
    lost = supervisor.schedule(anyio.sleep, 3600)
    kept = supervisor.task(shield=True).schedule(anyio.sleep, 3600)
    await lost.started.wait()
    start = anyio.current_time()

    report = await supervisor.drain()

    assert anyio.current_time() - start == pytest.approx(3600)
    assert (lost.status, kept.status) == (TaskStatus.CANCELLED, TaskStatus.SUCCEEDED)
    assert (report.finished, report.cancelled) == ((kept,), (lost,))


async def test_a_task_that_does_not_end_is_abandoned_when_its_time_is_up(
    observed: Observed,
) -> None:
    """Five seconds are left for cleaning up, and then the app goes on without the task."""
    supervisor = Supervisor(observers=[observed], grace=1)
    await supervisor.start()

    async def stubborn() -> None:
        try:
            await anyio.sleep(10)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(60)

    task = supervisor.schedule(stubborn)
    await task.started.wait()
    start = anyio.current_time()
    report = await supervisor.drain()
    assert anyio.current_time() - start == pytest.approx(6)
    assert report.abandoned == (task,)
