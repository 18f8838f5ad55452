"""A process of an app with a DBOSEngine, which ends as processes end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastapi_tasks import Retry, Supervisor, Task, current_task
from fastapi_tasks.engines import DBOSEngine

from .jobs import Jobs, Trace, eventually


def engine_at(url: str, trace: Trace, **settings: Any) -> tuple[DBOSEngine, Jobs]:
    """Return an engine, and its functions.

    :param trace: where they note that they have run
    """
    engine = DBOSEngine(url, **{"polling": 0.05, **settings})

    @engine.task(name="add")
    async def add(left: int, right: int) -> int:
        trace.note("added", f"{left}+{right}")
        return left + right

    async def handle(task: Task, error: Exception) -> None:
        trace.note("was told", f"{type(error).__name__}", task)

    @engine.task(name="deadly", on_error=handle, retry=Retry(Exception))
    async def deadly() -> None:
        trace.note("began", "deadly")
        await eventually(trace.gate("deadly").exists)

    @engine.task(name="hold")
    async def hold(label: str) -> str:
        trace.note("began", label)
        try:
            await eventually(trace.gate(label).exists)
        except asyncio.CancelledError:
            trace.note("was cut off", label)
            raise
        return label

    @engine.task(name="stumble", retry=Retry(OSError, attempts=9, wait_initial=0.3, wait_jitter=0))
    async def stumble(label: str) -> int:
        attempt = current_task().attempt
        trace.note("began", label)
        if attempt == 1:
            raise OSError("it was the first attempt")
        await eventually(trace.gate(label).exists)
        return attempt

    @engine.task(name="wait-long", retry=Retry(lambda error: float(str(error)), attempts=9))
    async def wait_long(*waits: float) -> int:
        attempt = current_task().attempt
        trace.note("began", "wait-long")
        if attempt <= len(waits):
            raise OSError(waits[attempt - 1])
        return attempt

    @engine.task(name="fail")
    async def fail() -> None:
        raise KeyError("it fails")

    @engine.task(name="cancel-itself")
    async def cancel_itself(label: str) -> str:
        trace.note("began", label)
        if not trace.gate(label).exists():
            current_task().cancel()
            await asyncio.Event().wait()
        return label

    return engine, Jobs(
        add=add,
        deadly=deadly,
        hold=hold,
        stumble=stumble,
        wait_long=wait_long,
        fail=fail,
        cancel_itself=cancel_itself,
    )


async def _serve(url: str, folder: Path, settings: dict[str, Any]) -> None:
    engine, _ = engine_at(url, Trace(folder), **settings)
    async with Supervisor(engines=[engine]):
        sys.stdout.write(f"{os.getpid()} works\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))
