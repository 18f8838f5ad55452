"""An engine that keeps its jobs in memory: what engines have in common, without a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi_tasks import InvalidSettingError, TaskInfo
from fastapi_tasks.engines import EngineAdapter, JobOptions, JobRecord
from fastapi_tasks.engines.execution import Again, Cancelled, Executor, Failed, Interrupted, Outcome
from fastapi_tasks.engines.messages import Message
from fastapi_tasks.info import Progress, TaskStatus


@dataclass
class Row:
    """One job."""

    text: str
    info: TaskInfo
    result: str | None = None
    attempt: int = 1
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self, **fields: Any) -> None:
        """Note what has become of it."""
        self.info = self.info.model_copy(update=fields)


class MemoryEngine(EngineAdapter):
    """Keeps jobs in a dictionary, and forgets none."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("memory://", **settings)
        self.rows: dict[str, Row] = {}
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self._loop: asyncio.Task[None] | None = None

    def _check_url(self, url: object) -> None:
        if url != "memory://":
            raise InvalidSettingError("url", url, expected="memory://", instead="memory://")

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None, None]:
        yield

    def _working(self, executor: Executor) -> AbstractAsyncContextManager[None]:
        return self._loop_of(executor)

    @asynccontextmanager
    async def _loop_of(self, executor: Executor) -> AsyncGenerator[None, None]:
        self._loop = asyncio.create_task(self._work(executor))
        try:
            yield
        finally:
            await asyncio.wait([self._loop])

    async def _work(self, executor: Executor) -> None:
        running: set[asyncio.Task[None]] = set()
        with suppress(asyncio.CancelledError):
            while True:
                job_id = await self.queue.get()
                task = asyncio.create_task(self._run(executor, job_id))
                running.add(task)
                task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)

    def _pause(self) -> None:
        assert self._loop is not None
        self._loop.cancel()

    async def _run(self, executor: Executor, job_id: str) -> None:
        row = self.rows[job_id]
        if row.over.is_set():
            return

        async def store(progress: Progress) -> None:
            row.change(progress=progress)

        row.change(status=TaskStatus.RUNNING, attempt=row.attempt, started=_now())
        outcome = await executor.run(job_id, row.text, attempt=row.attempt, store_progress=store)
        self._note(row, job_id, outcome)

    def _note(self, row: Row, job_id: str, outcome: Outcome) -> None:
        if isinstance(outcome, Interrupted):
            row.change(status=TaskStatus.PENDING)
            self.queue.put_nowait(job_id)
            return
        if isinstance(outcome, Again):
            row.attempt += 1
            row.change(status=TaskStatus.PENDING)
            asyncio.get_running_loop().call_later(outcome.wait, self.queue.put_nowait, job_id)
            return
        if isinstance(outcome, Cancelled):
            row.change(status=TaskStatus.CANCELLED)
        elif isinstance(outcome, Failed):
            row.change(status=TaskStatus.FAILED, error_type=outcome.error_type, error=outcome.error)
        else:
            row.result = outcome.result
            row.change(status=TaskStatus.SUCCEEDED)
        row.change(finished=_now())
        row.over.set()

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        if job_id not in self.rows:
            info = TaskInfo(
                id=job_id, name=message.name, status=TaskStatus.PENDING, attempt=0, created=_now()
            )
            self.rows[job_id] = Row(message.model_dump_json(), info)
            asyncio.get_running_loop().call_later(options.delay, self.queue.put_nowait, job_id)
        return job_id

    async def _record(self, job_id: str) -> JobRecord | None:
        row = self.rows.get(job_id)
        return None if row is None else JobRecord(row.info, row.result)

    async def _until_over(self, job_id: str) -> JobRecord | None:
        row = self.rows.get(job_id)
        if row is None:
            return None
        await row.over.wait()
        return JobRecord(row.info, row.result)

    async def _cancel(self, job_id: str) -> bool:
        row = self.rows.get(job_id)
        if row is None or row.over.is_set():
            return False
        if self.executor is None or not self.executor.cancel(job_id):
            self._note(row, job_id, Cancelled())
        return True


def _now() -> datetime:
    return datetime.now(UTC)
