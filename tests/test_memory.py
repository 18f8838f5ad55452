"""What is over leaves nothing behind: memory does not grow with the number of requests."""

from __future__ import annotations

import faulthandler
import gc
import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from fastapi_tasks import Supervisor, Task, TaskEventKind

from . import asgi, load
from .recording import Observed, idle
from .servers import PATIENCE, unmeasured

SLACK = 500
"""How many objects may be there that belong to nobody's request: threads and what they need."""

OURS = ("fastapi_tasks", "tests")
RUNNING = 10
"""Of how many frames that run asyncio's debug mode may make objects, which it does now and then."""
THEIRS = {"_asyncio.Task", "builtins.coroutine", "builtins.frame", "builtins.traceback"}


def check(growth: dict[str, int]) -> None:
    """Fail if there are more tasks than before, ours or the loop's, or many more of anything."""
    assert {
        kind: more
        for kind, more in growth.items()
        if kind.partition(".")[0] in OURS or kind in THEIRS
        if more > (RUNNING if kind == "builtins.frame" else 0)
    } == {}
    assert sum(growth.values()) < SLACK, growth


async def test_the_load_has_tasks_of_every_fate(observed: Observed) -> None:
    """What follows says something only if they were scheduled, and became what they should."""
    app = load.port(observed)
    async with asgi.lifespan(app):
        with load.silence():
            await load.send_requests(app, 100)

    kinds = Counter(observed.kinds())
    ends = [kinds[end] for end in ("finished", "failed", "cancelled", "dropped")]
    assert sum(ends) == kinds[TaskEventKind.SCHEDULED] > 300
    assert min(ends) >= 10
    assert {event.task.name for event in observed.events if event.kind == "failed"} == {
        "drop",
        "drop_all",
        "drop_in_thread",
    }


async def test_requests_leave_nothing_behind() -> None:
    """Whatever became of their tasks, and without any help by the garbage collector."""
    check(await load.growth_of_requests(1000))


async def test_starts_and_drains_leave_nothing_behind() -> None:
    """A supervisor that is drained lets go of the tasks that it has reported."""
    check(await load.growth_of_cycles(1000))


async def wait_for(tasks: list[Task]) -> None:
    """Wait for a task that nobody else knows."""
    await tasks.pop().wait()


async def look_at(tasks: list[Task]) -> None:
    """Look at the result of a task that nobody else knows."""
    tasks.pop().result()


@pytest.mark.parametrize("ask", [wait_for, look_at])
async def test_who_asks_for_a_failure_does_not_keep_it(
    ask: Callable[[list[Task]], Awaitable[None]],
) -> None:
    """The error has passed through the task's own methods, and leads back to it by none."""
    with load.silence():
        async with Supervisor() as supervisor:
            tasks = [supervisor.schedule(load.drop)]
            task = weakref.ref(tasks[0])
            gc.disable()
            try:
                await idle(supervisor)
                with pytest.raises(load.DroppedError):
                    await ask(tasks)
                await anyio.lowlevel.checkpoint()
                assert task() is None
            finally:
                gc.enable()


@pytest.mark.parametrize(
    ("what", "count"), [("growth_of_requests", 20_000), ("growth_of_cycles", 2_000)]
)
def test_memory_does_not_grow_with_the_days(what: str, count: int) -> None:
    """The same for long, in a process where nobody measures which lines run."""
    program = (
        "import json, anyio; from tests import load; "
        f"print(json.dumps(anyio.run(load.{what}, {count})))"
    )
    faulthandler.cancel_dump_traceback_later()  # the process has a longer limit of its own
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=unmeasured(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=10 * PATIENCE,
    )

    check(json.loads(done.stdout))
