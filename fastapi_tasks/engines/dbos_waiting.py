"""Those who wait for jobs to be over: one question to the database for all of them at a time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress

from dbos import WorkflowStatus

from fastapi_tasks.errors import EngineStateError, EngineUnavailableError

from .dbos_records import is_over
from .dbos_store import Store

__all__ = ["Waiters"]


class Waiters:
    """Wait for jobs, wherever they run. In the event loop's thread only.

    :param store: the database
    :param polling: seconds between two questions
    """

    def __init__(self, store: Store, polling: float) -> None:
        self._store = store
        self._polling = polling
        self._waiting: defaultdict[str, set[asyncio.Future[WorkflowStatus | None]]] = defaultdict(
            set
        )
        self._asking: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    async def wait(self, job_id: str) -> WorkflowStatus | None:
        """Wait until a job is over, through outages too.

        :return: its row; ``None`` if there is none
        :raises EngineStateError: the engine is stopped meanwhile
        """
        future: asyncio.Future[WorkflowStatus | None] = asyncio.get_running_loop().create_future()
        self._waiting[job_id].add(future)
        self.hurry()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        try:
            return await future
        finally:
            self._waiting[job_id].discard(future)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def hurry(self) -> None:
        """Ask now: a job may have ended this moment."""
        self._hurry.set()

    async def close(self) -> None:
        """Let nobody wait any longer."""
        for future in [each for waiting in self._waiting.values() for each in waiting]:
            future.set_exception(
                EngineStateError(
                    f"{self._store.label} was stopped while a job was waited for, which goes on",
                    instead="await job.wait()  # once more, while the engine is started",
                )
            )
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        while self._waiting:
            self._hurry.clear()
            with suppress(EngineUnavailableError):  # one that is over when the database is back
                await self._ask_once()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._polling):
                    await self._hurry.wait()

    async def _ask_once(self) -> None:
        asked = {job_id: set(waiting) for job_id, waiting in self._waiting.items()}
        rows = {row.workflow_id: row for row in await self._store.rows(asked)}
        for job_id, waiting in asked.items():
            row = rows.get(job_id)
            if row is not None and not is_over(row):
                continue
            for future in waiting:
                if not future.done():
                    future.set_result(row)
