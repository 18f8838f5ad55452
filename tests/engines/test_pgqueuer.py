"""What PgQueuerEngine does that is its own affair: transactions, tables, outages, the dead."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from datetime import timedelta
from socket import create_server
from typing import Any

import anyio
import pytest

from fastapi_tasks import (
    EngineUnavailableError,
    InvalidSettingError,
    JobCancelledError,
    JobFailedError,
    NoResultError,
    Progress,
    Retry,
    Supervisor,
    Task,
    TaskInfo,
    TaskStatus,
    current_task,
)
from fastapi_tasks.engines import JobOptions
from fastapi_tasks.engines.messages import Message
from tests.clocks import Backend
from tests.servers import ROOT

from .functions import fresh
from .services import PATIENCE, Proxy, postgresql_database, unique_name

engines = pytest.importorskip("fastapi_tasks.engines.pgqueuer", exc_type=ImportError)
asyncpg = pytest.importorskip("asyncpg")
psycopg = pytest.importorskip("psycopg")
sqlalchemy = pytest.importorskip("sqlalchemy.ext.asyncio")
database = pytest.importorskip("fastapi_tasks.engines.pgqueuer_database", exc_type=ImportError)
driver = pytest.importorskip("fastapi_tasks.engines.pgqueuer_driver", exc_type=ImportError)
queries = pytest.importorskip("fastapi_tasks.engines.pgqueuer_queries", exc_type=ImportError)
store = pytest.importorskip("fastapi_tasks.engines.pgqueuer_store", exc_type=ImportError)
waiting = pytest.importorskip("fastapi_tasks.engines.pgqueuer_waiting", exc_type=ImportError)

PgQueuerEngine = engines.PgQueuerEngine

SOON = 20.0
"""Seconds within which everything happens, on a machine that has other things to do, too."""


@pytest.fixture
def anyio_backend() -> Backend:
    """One event loop is enough, but for one test: the conformance suite has both."""
    return "asyncio", {}


@pytest.fixture(scope="module")
def dsn() -> Generator[str, None, None]:
    """A database of the module's own: each test has a prefix there."""
    with postgresql_database() as url:
        yield url


@pytest.fixture
def prefix() -> str:
    """What the test's tables are called."""
    return f"{unique_name()}_"


Make = Callable[..., Any]


@pytest.fixture
def make(dsn: str, prefix: str) -> Make:
    """Makes engines that share the test's tables."""
    return lambda **settings: PgQueuerEngine(dsn, **{"prefix": prefix, **settings})


class Held:
    """A job that holds until it is let go.

    :param engine: where it is registered
    """

    def __init__(self, engine: Any) -> None:
        self.began = asyncio.Event()
        self.open = asyncio.Event()
        self.was_cut_off = asyncio.Event()
        self.attempts: list[int] = []

        @engine.task(name="held")
        async def held() -> str:
            self.attempts.append(current_task().attempt)
            self.began.set()
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.was_cut_off.set()
                raise
            return "let go"

        self.func = held


def register_double(engine: Any) -> Callable[[int], Any]:
    """Register a function that is done at once."""

    @engine.task(name="double")
    async def double(number: int) -> int:
        return 2 * number

    return double


@asynccontextmanager
async def started(*engines: Any) -> AsyncGenerator[None, None]:
    """Start engines, and stop them, in time."""
    supervisor = Supervisor(engines=engines)
    with anyio.fail_after(SOON):
        await supervisor.start()
    try:
        yield
    finally:
        with anyio.fail_after(SOON):
            await supervisor.drain()


async def over(job: Any) -> Any:
    """Wait for a job, but not for ever."""
    with anyio.fail_after(PATIENCE):
        return await job.wait()


async def soon(event: asyncio.Event) -> None:
    """Wait for something, but not for ever."""
    with anyio.fail_after(SOON):
        await event.wait()


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """Wait until there is something that nobody is told of, and return it."""
    with anyio.fail_after(SOON):
        while not (found := await look()):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.05)
    return found


async def until_info(engine: Any, job_id: str, is_so: Callable[[TaskInfo], bool]) -> TaskInfo:
    """Wait until a job is as it should be, and return what it is like."""

    async def look() -> TaskInfo | None:
        info: TaskInfo | None = await engine.find(job_id)
        return info if info is not None and is_so(info) else None

    found: TaskInfo = await until(look)
    return found


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until something was logged."""

    async def look() -> bool:
        return text in caplog.text

    await until(look)


async def sql(dsn: str, query: str, *args: object) -> list[dict[str, Any]]:
    """Make a query, as somebody else might."""
    connection = await asyncpg.connect(dsn)
    try:
        return [dict(row) for row in await connection.fetch(query, *args)]
    finally:
        await connection.close()


@asynccontextmanager
async def tool(dsn: str, prefix: str) -> AsyncGenerator[Any, None]:
    """Give PgQueuer's own queries, as its tools make them."""
    builders = store.builders_for("public", prefix)
    connection = await asyncpg.connect(dsn)
    try:
        yield store.Queries(
            store.AsyncpgDriver(connection), builders.qbe, builders.qbq, builders.qbs
        )
    finally:
        await connection.close()


# The user's own transaction


class Transaction:
    """A user's connection in a transaction, and both ends that it can have."""

    def __init__(self, connection: Any, commit: Any, rollback: Any, execute: Any) -> None:
        self.connection = connection
        self.commit = commit
        self.rollback = rollback
        self.execute = execute


@asynccontextmanager
async def by_asyncpg(dsn: str) -> AsyncGenerator[Transaction, None]:
    """As users of asyncpg have it."""
    connection = await asyncpg.connect(dsn)
    try:
        transaction = connection.transaction()
        await transaction.start()
        yield Transaction(connection, transaction.commit, transaction.rollback, connection.execute)
    finally:
        await connection.close()


@asynccontextmanager
async def by_pool(dsn: str) -> AsyncGenerator[Transaction, None]:
    """As users of asyncpg's pool have it, with the codec that many of them set."""

    async def init(connection: Any) -> None:
        await connection.set_type_codec(
            "jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
        )

    async with (
        asyncpg.create_pool(dsn, min_size=0, max_size=1, init=init) as pool,
        pool.acquire() as connection,
    ):
        transaction = connection.transaction()
        await transaction.start()
        yield Transaction(connection, transaction.commit, transaction.rollback, connection.execute)


@asynccontextmanager
async def by_psycopg(dsn: str) -> AsyncGenerator[Transaction, None]:
    """As users of psycopg have it: the first statement begins the transaction."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield Transaction(connection, connection.commit, connection.rollback, connection.execute)


@asynccontextmanager
async def by_session(dsn: str) -> AsyncGenerator[Transaction, None]:
    """As users of SQLAlchemy's session have it, on asyncpg, before it has done anything."""
    engine = sqlalchemy.create_async_engine(dsn.replace("postgresql:", "postgresql+asyncpg:"))
    async with sqlalchemy.AsyncSession(engine) as session:

        async def execute(statement: str) -> None:
            await (await session.connection()).exec_driver_sql(statement)

        yield Transaction(session, session.commit, session.rollback, execute)
    await engine.dispose()


@asynccontextmanager
async def by_core(dsn: str) -> AsyncGenerator[Transaction, None]:
    """As users of SQLAlchemy's core have it, on psycopg."""
    engine = sqlalchemy.create_async_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
    async with engine.connect() as connection:
        yield Transaction(
            connection, connection.commit, connection.rollback, connection.exec_driver_sql
        )
    await engine.dispose()


Open = Callable[[str], AbstractAsyncContextManager[Transaction]]

on_each_connection = pytest.mark.parametrize(
    "begin", [by_asyncpg, by_pool, by_psycopg, by_session, by_core]
)


@on_each_connection
async def test_a_rolled_back_transaction_leaves_no_job(dsn: str, make: Make, begin: Open) -> None:
    """Who asks for it then is told so, and does not wait for ever."""
    engine = make()
    double = register_double(engine)
    async with started(engine):
        async with begin(dsn) as transaction:
            job = await engine.using(connection=transaction.connection).enqueue(double, 1)
            await transaction.rollback()
        with pytest.raises(NoResultError, match="does not know it"):
            await over(job)
        assert await engine.find(job.id) is None


@on_each_connection
async def test_a_committed_transaction_leaves_the_job(dsn: str, make: Make, begin: Open) -> None:
    """Until then nobody sees it, and who waits for it just waits, looking elsewhere for tables."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine):
        async with begin(dsn) as transaction:
            await transaction.execute("SET LOCAL search_path TO pg_catalog")
            job = await engine.using(connection=transaction.connection).enqueue(double, 17)
            result = asyncio.create_task(over(job))
            other = await engine.enqueue(double, 2)  # the worker has looked at the queue by then
            assert await over(other) == 4
            assert await engine.find(job.id) is None
            assert not result.done()
            await transaction.commit()
        assert await result == 34


async def test_waiting_ends_when_the_transaction_is_rolled_back(
    dsn: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told of that: it is looked at, now and then. Two who wait are told the same."""
    monkeypatch.setattr(waiting, "_RECHECK", 0.1)
    engine = make()
    double = register_double(engine)
    async with started(engine), by_asyncpg(dsn) as transaction:
        job = await engine.using(connection=transaction.connection).enqueue(double, 1)
        both = [asyncio.create_task(over(job)) for _ in range(2)]
        await engine.find(job.id)
        assert not any(task.done() for task in both)
        await transaction.rollback()
        for task in both:
            with pytest.raises(NoResultError):
                await task


async def test_a_key_that_is_there_does_not_end_the_transaction(dsn: str, make: Make) -> None:
    """The job that has it is returned, and the transaction goes on. A key is known for long."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine):
        first = await engine.using(key="order-17").enqueue(double, 1)
        assert await over(first) == 2
        async with by_asyncpg(dsn) as transaction:
            using = engine.using(key="order-17", connection=transaction.connection)
            again = await using.enqueue(double, 5)
            await transaction.execute("SELECT 1")
            await transaction.commit()
        assert again.id == first.id == "double:order-17"
        assert await over(again) == 2


async def test_few_open_transactions_are_remembered(
    dsn: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever never waits for such a job does not fill the memory."""
    monkeypatch.setattr(waiting, "_MAX_UNCOMMITTED", 1)
    engine = make()
    double = register_double(engine)
    async with started(engine), by_asyncpg(dsn) as transaction:
        using = engine.using(connection=transaction.connection)
        first, second = [await using.enqueue(double, number) for number in range(2)]
        with pytest.raises(NoResultError):
            await over(first)
        with anyio.move_on_after(0.2) as scope:
            await second.wait()
        assert scope.cancelled_caught


@asynccontextmanager
async def idle_asyncpg(dsn: str) -> AsyncGenerator[Any, None]:
    """A connection of asyncpg's, outside of a transaction."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def idle_psycopg(dsn: str) -> AsyncGenerator[Any, None]:
    """A connection of psycopg's that begins no transaction by itself."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        yield connection


@asynccontextmanager
async def autocommitting(dsn: str) -> AsyncGenerator[Any, None]:
    """A connection of SQLAlchemy's that begins none either."""
    engine = sqlalchemy.create_async_engine(
        dsn.replace("postgresql:", "postgresql+asyncpg:"), isolation_level="AUTOCOMMIT"
    )
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


@pytest.mark.parametrize("connect", [idle_asyncpg, idle_psycopg, autocommitting])
async def test_a_connection_has_to_be_in_a_transaction(
    dsn: str, make: Make, connect: Callable[[str], AbstractAsyncContextManager[Any]]
) -> None:
    """Else the job would be there at once, and stay when the request fails."""
    engine = make()
    double = register_double(engine)
    async with started(engine), connect(dsn) as connection:
        with pytest.raises(InvalidSettingError, match=r"in a transaction.*transaction\(\)"):
            await engine.using(connection=connection).enqueue(double, 1)


async def test_psycopg_may_begin_its_transaction_on_request(dsn: str, make: Make) -> None:
    """With ``autocommit``, it does so in ``connection.transaction()``."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine), idle_psycopg(dsn) as connection:
        async with connection.transaction():
            job = await engine.using(connection=connection).enqueue(double, 1)
        assert await over(job) == 2


@pytest.mark.parametrize("connection", [object(), "postgresql://localhost/jobs"])
async def test_what_is_no_connection(make: Make, connection: object) -> None:
    """The error names those that are."""
    engine = make()
    double = register_double(engine)
    async with started(engine):
        with pytest.raises(InvalidSettingError, match=r"asyncpg's.*psycopg's.*SQLAlchemy's"):
            await engine.using(connection=connection).enqueue(double, 1)


# Tables, and settings


async def test_the_environment_changes_no_name(
    dsn: str, make: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PgQueuer takes names from variables that anybody may have set for something else."""
    for name in ("CHANNEL", "FUNCTION", "TRIGGER", "QUEUE_TABLE", "QUEUE_TABLE_LOG"):
        monkeypatch.setenv(name, "evil")
        monkeypatch.setenv(f"PGQUEUER_{name}", "evil")
    for name in ("STATISTICS_TABLE", "SCHEDULES_TABLE", "QUEUE_STATUS_TYPE", "DURABILITY"):
        monkeypatch.setenv(name, "evil")
    monkeypatch.setenv("PGQUEUER_PREFIX", "evil_")
    monkeypatch.setenv("PGQUEUER_SCHEMA", "evil")
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine):
        assert await over(await engine.enqueue(double, 2)) == 4
    tables = await sql(
        dsn,
        "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public' "
        "AND (starts_with(tablename, $1) OR tablename LIKE '%evil%')",
        prefix,
    )
    names = ("jobs", "pgqueuer", "pgqueuer_log", "pgqueuer_schedules", "pgqueuer_statistics")
    assert {table["name"] for table in tables} == {f"{prefix}{name}" for name in names}


async def test_two_prefixes_in_one_process(make: Make, prefix: str) -> None:
    """Each has its own jobs, of functions of the same name."""
    one, other = (make(prefix=f"{prefix}{each}_", worker=True) for each in "ab")
    double = register_double(one)

    @other.task(name="double")
    async def twice(text: str) -> str:
        return text + text

    async with started(one, other):
        jobs = [await one.enqueue(double, 4), await other.enqueue(twice, "ab")]
        assert [await over(job) for job in jobs] == [8, "abab"]
        assert await one.find(jobs[1].id) is None


async def test_many_processes_start_at_once(make: Make) -> None:
    """One of them makes the tables that the others find, and so does one that starts later."""
    engines = [make() for _ in range(4)]
    supervisors = [Supervisor(engines=[engine]) for engine in engines]
    await asyncio.gather(*(supervisor.start() for supervisor in supervisors))
    assert all(engine.is_started for engine in engines)
    await asyncio.gather(*(supervisor.drain() for supervisor in supervisors))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prefix": "Shop_"}, "prefix='Shop_': expected up to 30 small letters"),
        ({"prefix": "shop; DROP"}, "prefix='shop; DROP'"),
        ({"prefix": "p" * 31}, "prefix="),
        ({"prefix": ""}, "prefix=''"),
        ({"prefix": None}, "prefix=None"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout=0: expected seconds or a timedelta"),
        ({"heartbeat_timeout": float("inf")}, "heartbeat_timeout=inf"),
        ({"keep": timedelta(0)}, "keep: expected"),
        ({"keep": "7 days"}, "keep='7 days'"),
        ({"max_deliveries": 0}, "max_deliveries=0: expected a whole number, 1 or more"),
        ({"max_deliveries": True}, "max_deliveries=True"),
        ({"connections": 1}, "connections=1: expected a whole number, 2 or more"),
        ({"connections": 2.5}, "connections=2.5"),
    ],
)
def test_settings_are_checked(make: Make, settings: dict[str, Any], expected: str) -> None:
    """A wrong one is noticed where it is written."""
    with pytest.raises(InvalidSettingError) as caught:
        make(**settings)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("dsn", ["postgresql+asyncpg://ada:hunter2@localhost/jobs", 5432])
def test_an_address_is_checked(dsn: Any) -> None:
    """SQLAlchemy's is another one. A password is not shown."""
    with pytest.raises(InvalidSettingError, match=r'PgQueuerEngine\("postgresql://') as caught:
        PgQueuerEngine(dsn)
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named() -> None:
    """And the line that installs it."""
    code = (
        "import sys\n"
        "for missing in ('asyncpg', 'pgqueuer'):\n"
        "    sys.modules[missing] = None\n"
        "    try:\n"
        "        from fastapi_tasks.engines import PgQueuerEngine\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
        "    del sys.modules[missing]\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    asyncpg_missing, pgqueuer_missing = ran.stdout.splitlines()
    assert "needs asyncpg, which is not installed" in asyncpg_missing
    assert "needs pgqueuer, which is not installed" in pgqueuer_missing
    for message in (asyncpg_missing, pgqueuer_missing):
        assert message.endswith("pip install 'fastapi-tasks[pgqueuer]'")


# What is stored


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_what_json_allows_and_postgresql_does_not(make: Make) -> None:
    """A result, an error and a progress with the character that no text there can have."""
    engine = make(worker=True)

    @engine.task
    async def echo(text: str) -> str:
        current_task().set_progress(1, message=text)
        return text

    @engine.task
    async def fail(text: str) -> None:
        raise ValueError(text)

    async with started(engine):
        job = await engine.enqueue(echo, "a\0b")
        assert await over(job) == "a\0b"
        assert (await job.info()).progress == Progress(done=1, total=None, message="a\0b")
        with pytest.raises(JobFailedError, match="ValueError: a\N{SYMBOL FOR NULL}b"):
            await over(await engine.enqueue(fail, "a\0b"))


async def test_ids_that_no_job_can_have(make: Make) -> None:
    """A client may send anything."""
    engine = make()
    async with started(engine):
        for job_id in ("a\0b", "\ud800"):
            assert await engine.find(job_id) is None
            assert not await engine.cancel(job_id)


async def test_waits_of_any_length(make: Make) -> None:
    """A job may be delayed longer than any calendar goes."""
    engine = make()
    double = register_double(engine)
    async with started(engine):
        job = await engine.using(delay=1e300).enqueue(double, 1)
        assert (await job.info()).status is TaskStatus.PENDING


async def test_failed_jobs_are_held(dsn: str, make: Make, prefix: str) -> None:
    """They can be looked at with PgQueuer's tools, payload included, and be put back."""
    engine = make(worker=True)
    failures = [ValueError("no")]

    @engine.task(name="fail")
    async def fail(number: int) -> int:
        for error in failures:
            raise error
        return number

    async with started(engine), tool(dsn, prefix) as pgqueuer:
        job = await engine.enqueue(fail, 17)
        with pytest.raises(JobFailedError):
            await over(job)
        failed = await pgqueuer.list_failed_jobs()
        assert [json.loads(each.payload)["arguments"] for each in failed] == [{"number": 17}]
        failures.clear()
        await pgqueuer.requeue_jobs([failed[0].id])
        info = await until_info(engine, job.id, lambda info: info.status is TaskStatus.SUCCEEDED)
        assert await over(job) == 17
        assert (info.attempt, info.error) == (1, None)
        statuses = [each.status for each in await pgqueuer.job_log_history(failed[0].id)]
    expected = ["queued", "picked", "failed", "queued", "picked", "successful"]
    assert statuses == expected


@pytest.mark.parametrize("payload", [b"\xff{ hunter2", None, b"{}"])
async def test_what_is_no_job_is_held(
    dsn: str,
    make: Make,
    prefix: str,
    payload: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever has put it there, with headers that PgQueuer could not read, the worker lives on."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine), tool(dsn, prefix) as pgqueuer:
        [number] = await pgqueuer.enqueue(store.ENTRYPOINT, payload)
        await pgqueuer.driver.execute(f"UPDATE {prefix}pgqueuer SET headers = '\"no\"'")
        info = await until_info(engine, str(number), lambda info: info.finished is not None)
        assert info.error_type == "MalformedMessageError"
        rows = await pgqueuer.driver.fetch(f"SELECT status, payload FROM {prefix}pgqueuer")
        assert rows == [{"status": "failed", "payload": payload}]
        assert await over(await engine.enqueue(double, 3)) == 6
    assert "hunter2" not in caplog.text


async def test_an_unregistered_function_is_held(dsn: str, make: Make, prefix: str) -> None:
    """Its message is kept as it came."""
    engine = make(worker=True)
    message = Message(name="os.system", arguments={"command": "true"}, created=1, due=1)
    async with started(engine), tool(dsn, prefix) as pgqueuer:
        await engine._enqueue("1" * 32, message, JobOptions())
        failed = await until(pgqueuer.list_failed_jobs)
        assert Message.model_validate_json(failed[0].payload) == message


async def test_a_job_that_a_tool_has_removed_was_cancelled(
    dsn: str, make: Make, prefix: str
) -> None:
    """Else one would wait for it for ever."""
    engine = make()
    double = register_double(engine)
    async with started(engine), tool(dsn, prefix) as pgqueuer:
        job = await engine.enqueue(double, 1)
        await pgqueuer.driver.execute(f"DELETE FROM {prefix}pgqueuer")
        with pytest.raises(JobCancelledError):
            await over(job)


async def test_what_is_over_for_long_is_removed(dsn: str, make: Make, prefix: str) -> None:
    """Jobs, results, failures and their logs; not what waits or runs."""
    engine = make(worker=True, keep=timedelta(days=1))
    held = Held(engine)
    double = register_double(engine)

    @engine.task(name="fail")
    async def fail() -> None:
        raise ValueError

    tables = {"jobs": "queue_id", "pgqueuer": "id", "pgqueuer_log": "job_id"}

    async def ids(table: str) -> set[int]:
        rows = await sql(dsn, f"SELECT {tables[table]} AS id FROM {prefix}{table}")
        return {row["id"] for row in rows}

    async def is_pruned() -> bool:
        return len(await ids("pgqueuer_log")) == 2  # the last table of the three

    async with started(engine):
        succeeded = await engine.enqueue(double, 1)
        failed = await engine.enqueue(fail)
        assert await over(succeeded) == 2
        with pytest.raises(JobFailedError):
            await over(failed)
        delayed = await engine.using(delay=3600).enqueue(double, 1)
    age = "now() - interval '2 days'"
    await sql(dsn, f"UPDATE {prefix}jobs SET created = {age}, finished = {age}")
    await sql(dsn, f"UPDATE {prefix}pgqueuer SET created = {age}, updated = {age}")
    await sql(dsn, f"UPDATE {prefix}pgqueuer_log SET created = {age}")
    async with started(engine):
        recent = await engine.enqueue(held.func)
        await until(is_pruned)
        assert await engine.find(failed.id) is None
        assert await engine.find(delayed.id)
        assert [len(await ids(table)) for table in tables] == [2, 2, 2]
        held.open.set()
        assert await over(recent) == "let go"


async def test_what_cannot_be_removed_is_logged(
    dsn: str, make: Make, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And jobs run all the same."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine):
        pass
    await sql(dsn, f"ALTER TABLE {prefix}jobs RENAME COLUMN finished TO ended")
    async with started(engine):
        await until_logged(caplog, "could not be removed")
        with pytest.raises(EngineUnavailableError, match="UndefinedColumnError"):
            await (await engine.enqueue(double, 1)).info()


# Who has a job


async def put_aside(dsn: str, prefix: str, *, deliveries: int) -> None:
    """Have the queue look as if a worker had died of its only job, for the so many-th time."""
    await sql(
        dsn,
        f"UPDATE {prefix}pgqueuer SET status = 'picked', queue_manager_id = gen_random_uuid(), "
        "heartbeat = now() - interval '1 hour'",
    )
    await sql(dsn, f"UPDATE {prefix}jobs SET status = 'running', deliveries = $1", deliveries)


@pytest.mark.parametrize(("deliveries", "is_handled"), [(2, True), (3, True), (4, False)])
async def test_a_job_that_kills_its_workers_is_given_up(
    dsn: str,
    make: Make,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    deliveries: int,
    is_handled: bool,
) -> None:
    """It has as many of them as was said, and then its error handler has as many."""
    engine = make(worker=False, max_deliveries=2)
    noted: list[str] = []

    def handle(task: Task, error: Exception) -> None:
        noted.append(f"{type(error).__name__} {task.attempt}")

    @engine.task(name="deadly", on_error=handle, retry=Retry(Exception))
    async def deadly() -> None:
        noted.append("ran")

    async with started(engine):
        job = await engine.enqueue(deadly)
        await put_aside(dsn, prefix, deliveries=deliveries)
    engine.worker = True
    async with started(engine):
        with pytest.raises(JobFailedError, match=f"WorkerLostError: Of the {deliveries} workers"):
            await over(job)
        assert (await job.info()).attempt == 1
        assert await over(await engine.enqueue(deadly)) is None
    assert noted == ["WorkerLostError 1"] * is_handled + ["ran"]
    untold = f"Job {job.id} has failed, and so did its error handler"
    assert (untold in caplog.text) is not is_handled


async def test_a_job_whose_worker_has_died_runs_elsewhere(
    dsn: str, make: Make, prefix: str
) -> None:
    """The attempt is the same one: the job was not at fault."""
    engine = make(worker=False, max_deliveries=2)
    held = Held(engine)
    async with started(engine):
        job = await engine.enqueue(held.func)
        await put_aside(dsn, prefix, deliveries=1)
    engine.worker = True
    held.open.set()
    async with started(engine):
        assert await over(job) == "let go"
    assert held.attempts == [1]


@pytest.mark.parametrize(
    "change", ["DELETE FROM {}", "UPDATE {} SET queue_manager_id = gen_random_uuid()"]
)
async def test_a_job_that_is_gone_is_stopped(
    dsn: str, make: Make, prefix: str, change: str
) -> None:
    """Cancelled while nobody heard of it, or taken by another worker: it does not run twice."""
    engine = make(worker=True, heartbeat_timeout=1)
    held = Held(engine)
    async with started(engine):
        job = await engine.enqueue(held.func)
        await soon(held.began)
        await sql(dsn, change.format(f"{prefix}pgqueuer"))
        await soon(held.was_cut_off)
        assert (await job.info()).finished is None


async def test_a_job_can_be_cancelled_between_claim_and_start(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it never begins."""
    engine = make(worker=True)
    held = Held(engine)
    double = register_double(engine)
    dequeue = queries.WorkerQueries.dequeue
    cancelled = asyncio.Event()

    async def dequeue_and_cancel(self: Any, *args: Any, **kwargs: Any) -> Any:
        jobs = await dequeue(self, *args, **kwargs)
        if jobs and not cancelled.is_set():
            assert await engine.cancel("held:only")
            cancelled.set()
        return jobs

    monkeypatch.setattr(queries.WorkerQueries, "dequeue", dequeue_and_cancel)
    async with started(engine):
        job = await engine.using(key="only").enqueue(held.func)
        with pytest.raises(JobCancelledError):
            await over(job)
        await soon(cancelled)
        assert await over(await engine.enqueue(double, 1)) == 2
    assert not held.attempts


async def test_a_job_is_cancelled_by_another_process(make: Make) -> None:
    """The worker is told, and its next attempt never comes."""
    worker, app = make(worker=True), make()
    held = Held(worker)
    double = register_double(app)
    async with started(worker, app):
        job = await worker.enqueue(held.func)
        await soon(held.began)
        assert await app.cancel(job.id)
        with anyio.fail_after(5):  # not by the next heartbeat
            await held.was_cut_off.wait()
        with pytest.raises(JobCancelledError):
            await over(job)
        assert not await app.cancel(job.id)
        assert not await app.cancel("0" * 32)
        assert (await (await app.enqueue(double, 1)).info()).name == "double"


async def test_a_job_may_cancel_itself(make: Make) -> None:
    """It is over then, and does not run again."""
    engine = make(worker=True)

    @engine.task
    async def give_up() -> None:
        raise asyncio.CancelledError

    async with started(engine):
        with pytest.raises(JobCancelledError):
            await over(await engine.enqueue(give_up))


async def test_a_shutdown_burns_no_attempt(dsn: str, make: Make, prefix: str) -> None:
    """Its job is free for others at once, and has no delivery against it."""
    engine = make(worker=True, max_deliveries=1)
    held = Held(engine)
    async with started(engine):
        job = await engine.enqueue(held.func)
        await soon(held.began)
    assert held.was_cut_off.is_set()
    rows = await sql(dsn, f"SELECT status, attempts FROM {prefix}pgqueuer")
    assert rows == [{"status": "queued", "attempts": 0}]
    held.open.set()
    async with started(engine):
        assert await over(job) == "let go"
    assert held.attempts == [1, 1]


async def test_an_attempt_that_failed_is_kept_by_the_database(
    dsn: str, make: Make, prefix: str
) -> None:
    """So is the wait until the next one: both survive the worker."""
    engine = make(worker=True)
    attempts: list[int] = []

    @engine.task(retry=Retry(ValueError, wait_initial=60, wait_max=60))
    async def flaky() -> None:
        attempts.append(current_task().attempt)
        raise ValueError

    async with started(engine):
        job = await engine.enqueue(flaky)
        info = await until_info(
            engine, job.id, lambda info: info.attempt == 1 and info.status is TaskStatus.PENDING
        )
    assert info.finished is None
    query = f"SELECT attempts, execute_after > now() + interval '30 s' AS waits FROM {prefix}"
    assert await sql(dsn, f"{query}pgqueuer") == [{"attempts": 1, "waits": True}]
    await sql(dsn, f"UPDATE {prefix}pgqueuer SET execute_after = now()")
    async with started(engine):
        await until_info(engine, job.id, lambda info: info.attempt == 2)
    assert attempts == [1, 2]


async def test_no_more_jobs_run_at_once_than_said(make: Make) -> None:
    """One worker has ``concurrency`` of them, and the next one when one is over."""
    engine = make(worker=True, concurrency=2)
    running, most = 0, 0

    @engine.task
    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.02)
        running -= 1

    async with started(engine):
        for job in [await engine.enqueue(count) for _ in range(8)]:
            await over(job)
    assert most == 2


# Outages


async def test_an_address_at_which_nobody_listens(make: Make) -> None:
    """The app does not start, and says why."""
    with create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    engine = PgQueuerEngine(f"postgresql://ada:hunter2@127.0.0.1:{port}/jobs")
    with pytest.raises(EngineUnavailableError, match=r"ConnectionRefusedError|OSError") as caught:
        await Supervisor(engines=[engine]).start()
    assert "hunter2" not in str(caught.value)


async def test_an_address_at_which_nobody_answers() -> None:
    """The app does not hang."""
    with create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Connections are accepted by the system, and nobody comes for them.
        engine = PgQueuerEngine(f"postgresql://ada@127.0.0.1:{port}/jobs", enqueue_timeout=0.5)
        with anyio.fail_after(SOON):
            with pytest.raises(EngineUnavailableError, match="TimeoutError"):
                await Supervisor(engines=[engine]).start()


async def test_a_database_that_does_not_exist(dsn: str) -> None:
    """PostgreSQL's own words are told."""
    with pytest.raises(EngineUnavailableError, match="does not exist"):
        await Supervisor(engines=[PgQueuerEngine(f"{dsn}_not")]).start()


async def test_connections_that_are_lost_under_load(dsn: str, make: Make) -> None:
    """No job is lost, and whoever waits is told all the same."""
    app, worker = make(), make(worker=True, heartbeat_timeout=2)
    count = 60
    done: list[int] = []
    progressed = asyncio.Event()

    @worker.task(name="work")
    async def work(number: int) -> int:
        await anyio.sleep(0.02)
        done.append(number)
        progressed.set()
        return number

    work_elsewhere = app.task(name="work")(fresh(work))

    async with started(app):
        jobs = [await app.enqueue(work_elsewhere, number) for number in range(count)]
        results = [asyncio.create_task(over(job)) for job in jobs]
        async with started(worker):
            for _ in range(3):
                progressed.clear()
                await soon(progressed)
                await sql(
                    dsn,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                    "datname = current_database() AND application_name = 'fastapi-tasks'",
                )
            assert [await result for result in results] == list(range(count))
            assert await over(await worker.enqueue(work, count)) == count
    assert set(done) == set(range(count + 1))


@pytest.fixture
def proxy(dsn: str) -> Generator[Proxy, None, None]:
    """The way to the database, which can be closed."""
    with closing(Proxy(dsn)) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: Proxy, prefix: str) -> Make:
    """Makes engines whose way to the database can be closed."""
    return lambda **settings: PgQueuerEngine(proxy.url, prefix=prefix, **settings)


async def test_waiting_outlasts_an_outage(
    proxy: Proxy, through: Make, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said meanwhile was not heard, so the job is looked at again."""
    monkeypatch.setattr(waiting, "_RECHECK", 0.1)
    app, worker = through(), make(worker=True)
    held = Held(worker)
    double = register_double(app)
    async with started(worker, app):
        job = await worker.using(key="held").enqueue(held.func)
        await soon(held.began)
        result = asyncio.create_task(app._until_over(job.id))
        with proxy.refusing():
            held.open.set()
            assert await over(job) == "let go"
            with pytest.raises(EngineUnavailableError):
                await app.enqueue(double, 1)
            assert not result.done()
        with anyio.fail_after(SOON):
            record = await result
    assert record.info.status is TaskStatus.SUCCEEDED


async def test_waiting_ends_when_the_server_does_not_come_back(
    proxy: Proxy, through: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for what is not there."""
    monkeypatch.setattr(waiting, "_RECHECK", 0.1)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.3)
    engine = through()
    double = register_double(engine)
    async with started(engine):
        job = await engine.enqueue(double, 1)
        with proxy.refusing(), pytest.raises(EngineUnavailableError):
            await over(job)


@pytest.mark.parametrize("kind", ["refusing", "silent"])
async def test_a_worker_stops_without_its_server(
    proxy: Proxy, through: Make, make: Make, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What has come of its job is not known then: it runs again when its heartbeat is old."""
    worker, other = through(worker=True), make()
    held = Held(worker)
    async with started(other):
        async with started(worker):
            job = await worker.enqueue(held.func)
            await soon(held.began)
            outage = getattr(proxy, kind)()
            outage.__enter__()
        outage.__exit__(None, None, None)
        info = await other.find(job.id)
    assert held.was_cut_off.is_set()
    assert info.status is TaskStatus.RUNNING
    assert "in the queue could not be stored" in caplog.text


async def test_an_app_stops_when_nobody_answers(proxy: Proxy, through: Make) -> None:
    """It ends the connections that would not end."""
    app = through()
    double = register_double(app)
    supervisor = Supervisor(engines=[app])
    await supervisor.start()
    await app.enqueue(double, 1)
    with proxy.silent():
        draining = asyncio.create_task(supervisor.drain())
        await asyncio.wait({draining}, timeout=SOON)
        assert draining.done()
    assert not app.is_started


async def test_a_worker_begins_again_when_it_has_stopped(
    dsn: str, make: Make, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has taken away the tables, and brings them back."""
    engine = make(worker=True)
    double = register_double(engine)
    async with started(engine):
        await sql(dsn, f"ALTER TABLE {prefix}pgqueuer RENAME TO {prefix}gone")
        await until_logged(caplog, "begins again")
        await sql(dsn, f"ALTER TABLE {prefix}gone RENAME TO {prefix}pgqueuer")
        assert await over(await engine.enqueue(double, 2)) == 4


async def test_a_worker_that_loses_its_server_at_its_end_does_not_begin_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it say so: what that means for a job, is said of the job."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def run(manager: Any, **_settings: object) -> None:
        began.set()
        await manager.shutdown.wait()
        ended.set()
        raise asyncpg.ConnectionDoesNotExistError("the server has gone away")

    monkeypatch.setattr("pgqueuer.core.qm.QueueManager.run", run)
    async with started(make(worker=True)):
        await soon(began)
    assert ended.is_set()
    assert "begins again" not in caplog.text


async def test_what_another_connection_would_not_help_is_not_repeated(dsn: str) -> None:
    """Only what is lost is, and not what is wrong."""
    connections = database.Database(dsn, size=1, timeout=5)
    await connections.open()
    steady = driver.SteadyDriver(connections, driver.Listener(connections.connect, lambda: None))
    with anyio.fail_after(SOON), pytest.raises(asyncpg.DataError, match="invalid input"):
        await steady.fetch("SELECT $1::integer", "seventeen")
    assert await steady.execute("SELECT 1") == ""
    assert not steady.tm.tasks
    steady.close()
    assert steady.shutdown.is_set()
    await connections.close()


async def test_a_channel_that_is_added_while_another_is_listened_to(dsn: str) -> None:
    """On the same connection, if there is one; else, and if it fails, on the next one."""
    connections = database.Database(dsn, size=1, timeout=5)
    await connections.open()
    connected = asyncio.Event()
    heard: asyncio.Queue[str] = asyncio.Queue()
    made: list[Any] = []

    async def connect() -> Any:
        made.append(await connections.connect())
        return made[-1]

    listener = driver.Listener(connect, connected.set)
    one, two, three = (unique_name() for _ in range(3))
    await listener.add(one, heard.put_nowait)
    await listener.add(two, heard.put_nowait)  # before there is a connection
    await soon(connected)
    made[0].terminate()  # which the listener has not been told yet
    connected.clear()
    await listener.add(three, heard.put_nowait)
    await soon(connected)
    for channel in (one, two, three):
        await connections.fetch("SELECT pg_notify($1, $1)", channel)
        with anyio.fail_after(SOON):
            assert await heard.get() == channel
    await listener.close()
    await connections.close()
