"""Waiting until jobs are over: what is said of them may get lost, so they are looked at, too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fastapi_tasks.errors import EngineUnavailableError
from fastapi_tasks.info import TaskStatus

from .base import JobRecord

__all__ = ["Waiters"]

_RECHECK = 5.0
"""How often a job is looked at of which nothing is said, in seconds."""
_PATIENCE = 30.0
"""Seconds without the server after which a job is not waited for any longer."""
_MAX_UNCOMMITTED = 10_000
"""Of how many jobs it is known that their transactions may not be over."""
_OVER = (TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED)


class Waiters:
    """Who waits for jobs to be over.

    :param look: returns what is known of a job
    :param transaction_status: returns what PostgreSQL says of a transaction
    """

    def __init__(
        self,
        look: Callable[[str], Awaitable[JobRecord | None]],
        transaction_status: Callable[[str], Awaitable[str | None]],
    ) -> None:
        self._look = look
        self._transaction_status = transaction_status
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._uncommitted: dict[str, str] = {}

    def note_uncommitted(self, job_id: str, transaction: str) -> None:
        """Note that a job is not to be seen until a transaction is committed."""
        while len(self._uncommitted) >= _MAX_UNCOMMITTED:  # whose jobs nobody waits for
            del self._uncommitted[next(iter(self._uncommitted))]
        self._uncommitted[job_id] = transaction

    async def until_over(self, job_id: str) -> JobRecord | None:
        """Wait until a job is over, and return what is known of it.

        :return: ``None`` if it is not known, and no open transaction will change that
        :raises EngineUnavailableError: the server was not there for too long
        """
        woken = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(woken)
        try:
            return await self._look_until_over(job_id, woken)
        finally:
            waiting = self._waiting[job_id]
            waiting.discard(woken)
            if not waiting:
                del self._waiting[job_id]

    def wake(self, job_id: str | bytes | bytearray) -> None:
        """Have those look who wait for a job."""
        for woken in self._waiting.get(str(job_id), ()):
            woken.set()

    def wake_all(self) -> None:
        """Have everybody look: something may have been said that was not heard."""
        for job_id in self._waiting:
            self.wake(job_id)

    async def _look_until_over(self, job_id: str, woken: asyncio.Event) -> JobRecord | None:
        clock = asyncio.get_running_loop().time
        answered = clock()
        while True:
            woken.clear()
            try:
                async with asyncio.timeout(_RECHECK):
                    may_come = await self._is_uncommitted(job_id)
                    record = await self._look(job_id)
            except (EngineUnavailableError, TimeoutError):
                if clock() - answered > _PATIENCE:
                    raise
            else:
                answered = clock()
                is_over = not may_come if record is None else record.info.status in _OVER
                if is_over:
                    return record
            with suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), _RECHECK)

    async def _is_uncommitted(self, job_id: str) -> bool:
        """Return whether a job is not to be seen since its transaction is not over."""
        transaction = self._uncommitted.get(job_id)
        if transaction is None:
            return False
        if await self._transaction_status(transaction) == "in progress":
            return True
        self._uncommitted.pop(job_id, None)  # another one who waits may have done so
        return False
