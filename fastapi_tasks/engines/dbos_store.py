"""The database of a DBOS engine: what is written to it and read from it, in worker threads."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

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
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from fastapi_tasks.errors import EngineUnavailableError, InvalidSettingError
from fastapi_tasks.info import Progress

from .dbos_slots import AdvisorySlots, FileSlots, Slots
from .messages import Message

__all__ = ["OVER", "WORKFLOW", "Address", "Store"]

T = TypeVar("T")

WORKFLOW = "fastapi_tasks.run"
"""The one workflow, by which every job is run: its arguments are the job's message."""

OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
"""The states in which nothing becomes of a job any more."""

_CALLS = 4
_BATCH = 500
_BUSY = 5000  # milliseconds
_UNIXEPOCH = (3, 42)  # the version of SQLite that knows the argument which DBOS gives it


class Address:
    """Where the database is.

    :param url: as the user has written it
    :raises InvalidSettingError: it is not one that can be used
    """

    def __init__(self, url: object, *, connect_timeout: float) -> None:
        try:
            parsed = sqlalchemy.make_url(cast(str, url))
        except SQLAlchemyError:
            _refuse(url)
        kind = parsed.drivername.partition("+")[0]
        self.path: Path | None = None
        if kind == "sqlite":
            name = parsed.database or ""
            if parsed.drivername != kind or parsed.query or name in ("", ":memory:"):
                _refuse(url)
            self.path = Path(name)
        elif kind in ("postgresql", "postgres") and parsed.database:
            parsed = parsed.set(drivername="postgresql")
            if "connect_timeout" not in parsed.query:
                # libpq takes whole seconds, and 1 for 2.
                seconds = str(max(2, math.ceil(connect_timeout)))
                parsed = parsed.update_query_dict({"connect_timeout": seconds})
        else:
            _refuse(url)
        self.url = parsed.render_as_string(hide_password=False)

    def slots(self, label: str, name: str) -> Slots:
        """Return by what the processes of this database are told apart."""
        if self.path is None:
            return AdvisorySlots(label, name, self.url)
        return FileSlots(label, name, self.path)


def _refuse(url: object) -> NoReturn:
    raise InvalidSettingError(
        "url",
        # A URL may hold a password.
        url if not isinstance(url, str) or "@" not in url else None,
        expected="the path of a SQLite database, or the URL of a PostgreSQL one",
        instead='DBOSEngine("sqlite:///jobs.db") or DBOSEngine("postgresql://localhost/jobs")',
    )


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

    async def cancel(self, job_id: str) -> None:
        """Have a job cancelled, unless it is over."""
        await self.call(self.client.cancel_workflow, job_id)

    async def running_on(self, executor_id: str | None = None) -> list[WorkflowStatus]:
        """Read the jobs that some process has, or one."""
        return await self.call(
            partial(self._list, status="PENDING", queue_name=self.name, executor_id=executor_id)
        )

    async def give_back(self, job_ids: list[str]) -> None:
        """Let other processes take jobs that this one has taken, and does not run."""
        if job_ids:
            await self.call(
                partial(self.client.resume_workflows, job_ids, queue_name=self.name), abandon=False
            )

    async def purge(self, keep: float) -> int:
        """Forget jobs that have been over for long, and return how many there were.

        :param keep: seconds for which they are remembered
        """
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
        """DBOS's own, whose methods block."""
        assert self._client is not None
        return self._client

    def register_queue(self, concurrency: int, polling: float) -> None:
        """Write how jobs are handed out; it blocks."""
        self.client.register_queue(
            self.name, worker_concurrency=concurrency, polling_interval_sec=polling
        )

    def _open(self) -> None:
        if self.address.path is not None:
            _turn_on_wal(self.address.path)
            self.engine = _engine_of(self.address.url)
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

    def _list(self, *, load_output: bool = False, **conditions: Any) -> list[WorkflowStatus]:
        return self.client.list_workflows(
            name=WORKFLOW,
            application_name=self.name,
            load_input=False,
            load_output=load_output,
            **conditions,
        )


def _turn_on_wal(path: Path) -> None:
    """Let readers read while somebody writes. It is the file that remembers it."""
    deadline = time.monotonic() + _BUSY / 1000
    with closing(sqlite3.connect(path, timeout=_BUSY / 1000)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                # It does not wait for another process that does the same.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _now(_: object) -> float:
    return time.time()


def _engine_of(url: str) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(url, pool_size=_CALLS, max_overflow=20)

    def configure(connection: sqlite3.Connection, _: object) -> None:
        # What DBOS does to a connection of its own.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={_BUSY}")
        connection.execute("PRAGMA foreign_keys=ON")
        if sqlite3.sqlite_version_info < _UNIXEPOCH:
            connection.create_function("unixepoch", 1, _now)

    event.listen(engine, "connect", configure)
    return engine
