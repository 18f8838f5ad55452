"""The database of a DBOS engine: what is written to it and read from it, in worker threads."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import psycopg
import sqlalchemy
from dbos import (
    DBOS,
    DBOSClient,
    DBOSPortableJSONSerializer,
    EnqueueOptions,
    WorkflowHandle,
    WorkflowStatus,
)
from sqlalchemy.exc import SQLAlchemyError

from fastapi_tasks.errors import EngineUnavailableError
from fastapi_tasks.info import Progress

from .dbos_address import Address, sqlite_engine, turn_on_wal
from .dbos_records import OVER, noted_start, notes_of, record_of
from .messages import Message

__all__ = ["WORKFLOW", "Store"]

T = TypeVar("T")

WORKFLOW = "fastapi_tasks.run"
"""The one workflow, by which every job is run: its arguments are the job's message."""

_CALLS = 4
_BATCH = 500


class Store:
    """Writes jobs and reads what has become of them, without holding up the event loop.

    :param label: what the engine calls itself
    :param address: where the database is
    :param name: of the engine's jobs
    :param version: of the application
    """

    def __init__(self, label: str, address: Address, *, name: str, version: str) -> None:
        self.label = label
        self.address = address
        self.name = name
        self.waiting_room = f"{name}-waiting"
        """The queue of jobs that wait to be attempted again."""
        self.version = version
        self.engine: sqlalchemy.Engine | None = None
        """Of SQLite: connected as DBOS does it, and better; DBOS makes one of PostgreSQL."""
        self._client: DBOSClient | None = None
        self._limiter = anyio.CapacityLimiter(_CALLS)

    async def open(self) -> None:
        """Connect, and make the tables if they are not there.

        :raises EngineUnavailableError: the database cannot be reached
        """
        await self.call(self._open, abandon=False)

    async def close(self) -> None:
        """Disconnect."""
        await self.call(self._close, abandon=False)

    async def call(self, func: Callable[..., T], *args: Any, abandon: bool = True) -> T:
        """Call a function that blocks.

        :param abandon: whether to leave it alone when the caller is cancelled
        :raises EngineUnavailableError: the database cannot be reached
        """
        try:
            return await anyio.to_thread.run_sync(
                func, *args, abandon_on_cancel=abandon, limiter=self._limiter
            )
        except (SQLAlchemyError, sqlite3.Error, psycopg.Error, OSError) as error:
            cause = getattr(error, "orig", None) or error
            raise EngineUnavailableError(
                self.label,
                f"the database cannot be used ({str(cause).partition(chr(10))[0]})",
                instead=self._advice(),
            ) from error

    def _advice(self) -> str:
        if self.address.path is None:
            return "Look whether PostgreSQL runs there, and lets this user in"
        return f"Look whether {self.address.path.absolute().parent} is a directory to write to"

    async def enqueue(self, job_id: str, message: Message, delay: float) -> str:
        """Write a job, unless one with its id is there; return the id."""
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": self.name,
            "workflow_id": job_id,
            "app_version": self.version,
            "attributes": {"name": message.name, "created": message.created},
        }
        if delay > 0:
            options["delay_seconds"] = delay
        return await self.call(self._enqueue, options, message.model_dump_json())

    async def rows(self, job_ids: Iterable[str]) -> list[WorkflowStatus]:
        """Read jobs; those that there are none of are left out."""
        ids = list(job_ids)
        found: list[WorkflowStatus] = []
        for start in range(0, len(ids), _BATCH):
            list_them = partial(
                self._list, workflow_ids=ids[start : start + _BATCH], load_output=True
            )
            found += await self.call(list_them)
        return found

    async def row(self, job_id: str) -> WorkflowStatus | None:
        """Read a job."""
        return next(iter(await self.rows((job_id,))), None)

    async def note(self, job_id: str, **attributes: Any) -> None:
        """Write what is told of a job beside its state."""
        await self.call(
            partial(self.client.update_workflow_attributes, job_id, attributes, merge=True)
        )

    async def note_progress(self, job_id: str, progress: Progress) -> None:
        """Write how far a job has come."""
        await self.note(job_id, progress=progress.model_dump(mode="json"))

    async def cancel(self, row: WorkflowStatus) -> None:
        """Have a job cancelled, unless it is over."""
        job_id, attempt = row.workflow_id, record_of(row).info.attempt
        # First what tells it from a job that was only cut off, in case that it is both.
        await self.note(job_id, **noted_start(row), begun=attempt)
        await self.call(self.client.cancel_workflow, job_id)

    async def running_on(self, executor_id: str | None = None) -> list[WorkflowStatus]:
        """Read the jobs that some process has, or one."""
        return await self.call(
            partial(
                self._list,
                status="PENDING",
                queue_name=[self.name, self.waiting_room],
                executor_id=executor_id,
            )
        )

    async def give_back(self, job_ids: list[str], queue: str) -> None:
        """Let any process take jobs that this one has taken, and does not run.

        :param queue: the one from which they are to be taken
        """
        await self.call(self._give_back, job_ids, queue)

    async def purge(self, keep: float) -> int:
        """Forget jobs that have been over for long, and return how many there were.

        :param keep: seconds for which they are remembered
        """
        if keep == math.inf:
            return 0
        before = datetime.fromtimestamp(time.time() - keep, UTC).isoformat()
        purged = 0
        while found := await self.call(
            partial(self._list, status=list(OVER), completed_before=before, limit=_BATCH)
        ):
            await self.call(self.client.delete_workflows, [each.workflow_id for each in found])
            purged += len(found)
        return purged

    @property
    def client(self) -> DBOSClient:
        """DBOS's own, whose methods block.

        :raises EngineUnavailableError: the store is closed
        """
        if self._client is None:
            raise EngineUnavailableError(
                self.label, "it was stopped", instead="Ask while the app runs"
            )
        return self._client

    def register_queue(self, concurrency: int, polling: float) -> None:
        """Write how jobs are handed out; it blocks."""
        self.client.register_queue(
            self.name, worker_concurrency=concurrency, polling_interval_sec=polling
        )
        self.client.register_queue(self.waiting_room, polling_interval_sec=max(polling, 1.0))

    def _open(self) -> None:
        if self.address.path is not None:
            turn_on_wal(self.address.path)
            self.engine = sqlite_engine(self.address.url)
        DBOS.migrate(self.address.url)
        self._client = DBOSClient(
            system_database_url=self.address.url if self.engine is None else None,
            system_database_engine=self.engine,
            serializer=DBOSPortableJSONSerializer(),
            system_database_pool_size=_CALLS,
            application_name=self.name,
            lazy=True,
            retry_connection_errors=False,
        )

    def _close(self) -> None:
        if self._client is not None:
            self._client.destroy()
        if self.engine is not None:
            self.engine.dispose()
        self._client = self.engine = None

    def _enqueue(self, options: EnqueueOptions, text: str) -> str:
        handle: WorkflowHandle[str] = self.client.enqueue(options, text)
        return handle.get_workflow_id()

    def _give_back(self, job_ids: list[str], queue: str) -> None:
        if not job_ids:
            return
        self.client.resume_workflows(job_ids, queue_name=queue)
        # It takes those too that were cancelled a moment ago.
        rows = self._list(workflow_ids=job_ids)
        cancelled = [row.workflow_id for row in rows if notes_of(row).begun is not None]
        if cancelled:
            self.client.cancel_workflows(cancelled)

    def _list(self, *, load_output: bool = False, **conditions: Any) -> list[WorkflowStatus]:
        return self.client.list_workflows(
            name=WORKFLOW,
            application_name=self.name,
            load_input=False,
            load_output=load_output,
            **conditions,
        )
