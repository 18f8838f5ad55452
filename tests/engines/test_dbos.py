"""What is DBOSEngine's own: its processes, its rows, and the traps that DBOS sets."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
import sqlalchemy

from fastapi_tasks import (
    EngineStateError,
    EngineUnavailableError,
    InvalidSettingError,
    JobCancelledError,
    JobFailedError,
    MissingPackageError,
    Progress,
    Supervisor,
    TaskStatus,
)
from fastapi_tasks.engines import DBOSEngine, Job, dbos_address, dbos_runs, dbos_slots
from fastapi_tasks.engines import dbos as dbos_engine
from fastapi_tasks.engines.dbos_slots import AdvisorySlots, FileSlots, Slots
from fastapi_tasks.engines.dbos_store import Store
from tests.clocks import Backend
from tests.servers import ROOT, Output

from .dbos_process import engine_at
from .jobs import Jobs, Trace, eventually
from .services import PATIENCE, Proxy, locked, postgresql_database


@pytest.fixture
def anyio_backend() -> Backend:
    """The event loop that engines are for."""
    return "asyncio", {}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """What the test's jobs note."""
    return Trace(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database's file, which is not there yet."""
    return tmp_path / "jobs.db"


@pytest.fixture
def url(path: Path) -> str:
    """The file's address."""
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def template() -> Generator[str, None, None]:
    """A PostgreSQL database with DBOS's tables, which take seconds to make."""
    from dbos import DBOS

    with postgresql_database() as url:
        DBOS.migrate(url)
        yield url


@pytest.fixture
def postgresql(template: str) -> Generator[str, None, None]:
    """A PostgreSQL database of the test's own."""
    with postgresql_database() as url:
        server, _, name = url.rpartition("/")
        model = template.rpartition("/")[2]
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name}".encode())
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {model}".encode())
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def any_url(request: pytest.FixtureRequest) -> str:
    """Either."""
    return str(request.getfixturevalue("url" if request.param == "sqlite" else "postgresql"))


@asynccontextmanager
async def running(
    url: str, trace: Trace, **settings: Any
) -> AsyncGenerator[tuple[DBOSEngine, Jobs], None]:
    """Start an engine, and stop it."""
    engine, jobs = engine_at(url, trace, **settings)
    async with Supervisor(engines=[engine]):
        yield engine, jobs


def store_of(engine: DBOSEngine) -> Store:
    """Return what an engine that is started reads and writes."""
    assert engine._store is not None
    return engine._store


@contextmanager
def process(
    url: str, trace: Trace, **settings: Any
) -> Generator[subprocess.Popen[str], None, None]:
    """Run an engine in another process, until the block ends or somebody kills it."""
    command = [sys.executable, "-W", "error", "-m", "tests.engines.dbos_process", url]
    with subprocess.Popen(
        [*command, str(trace.folder), json.dumps(settings)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        output = Output(child.stdout)
        try:
            output.wait_for(f"{child.pid} works")
            yield child
        finally:
            if child.poll() is None:
                child.stdin.close()
                child.wait(PATIENCE)
            output.all()
            with suppress(BrokenPipeError):
                child.stdin.close()


async def until_row(engine: DBOSEngine, job_id: str, **fields: str) -> None:
    """Wait until a job's row has these fields, which tells nobody when it changes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        row = await store_of(engine).row(job_id)
        if row is not None and {name: getattr(row, name) for name in fields} == fields:
            return
        assert time.monotonic() < deadline, row
        await asyncio.sleep(0.02)


async def until_gone(engine: DBOSEngine, job_id: str) -> None:
    """Wait until an engine does not know a job any more."""
    deadline = time.monotonic() + PATIENCE
    while await engine.find(job_id) is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def change(path: Path, statement: str, *parameters: object) -> None:
    """Change a SQLite database as anybody could who may write to it."""
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection, connection:
        assert connection.execute(statement, parameters).rowcount > 0


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        17,
        "jobs.db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///jobs.db?mode=ro",
        "sqlite+aiosqlite:///jobs.db",
        "mysql://localhost/jobs",
        "postgresql://localhost",
        "postgresql://localhost:x/jobs",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(wrong: Any) -> None:
    """Nothing is durable in memory, and nothing is written to where nobody looks for it."""
    with pytest.raises(InvalidSettingError, match="the path of a SQLite database"):
        DBOSEngine(wrong)


def test_a_refused_url_does_not_show_its_password() -> None:
    """An error's text ends up in logs."""
    with pytest.raises(InvalidSettingError) as caught:
        DBOSEngine("mysql://ada:hunter2@localhost/jobs")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "Jobs"},
        {"name": 17},
        {"application_version": ""},
        {"application_version": 1},
        {"max_recoveries": -1},
        {"max_recoveries": True},
        {"max_recoveries": 1.5},
        {"polling": 0},
        {"polling": "1"},
        {"keep": -1},
        {"keep": timedelta(0)},
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(url: str, settings: dict[str, Any]) -> None:
    """Most callers are not type-checked."""
    with pytest.raises(InvalidSettingError, match=next(iter(settings))):
        DBOSEngine(url, **settings)


def test_times_may_be_timedeltas(url: str) -> None:
    """As the error says that a wrong one gets; there may be no end to one of them."""
    engine = DBOSEngine(
        url,
        polling=timedelta(seconds=1),  # type: ignore[arg-type]
        keep=timedelta(hours=1),
    )
    assert (engine.polling, engine.keep) == (1, 3600)
    assert DBOSEngine(url, keep=math.inf).keep == math.inf


def test_a_connection_to_postgresql_is_not_waited_for_without_end() -> None:
    """A host that swallows packets is noticed; what the user has set stays."""
    address = dbos_address.Address("postgres://localhost/jobs", connect_timeout=0.5)
    assert address.url == "postgresql://localhost/jobs?connect_timeout=2"
    own = "postgresql+asyncpg://ada:hunter2@localhost/jobs?connect_timeout=7"
    assert dbos_address.Address(own, connect_timeout=0.5).url == own.replace("+asyncpg", "")


def test_without_dbos_its_name_says_what_to_install() -> None:
    """The extra is not there: the error's last words mend it."""
    code = """
import sys
sys.modules["dbos"] = None
try:
    from fastapi_tasks.engines import DBOSEngine
except ImportError as error:
    print(type(error).__name__, error)
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(f"{MissingPackageError.__name__} fastapi_tasks.engines.dbos")
    assert "pip install 'fastapi-tasks[dbos]'" in printed


# Slots


@pytest.fixture(params=["files", "advisory"])
def make_slots(request: pytest.FixtureRequest, path: Path) -> Any:
    """Make slots of one database, as processes do."""
    if request.param == "files":
        return lambda name="app": FileSlots("engine", name, path)
    url = request.getfixturevalue("postgresql")
    return lambda name="app": AdvisorySlots("engine", name, url)


def taken(slots: Slots) -> Any:
    """Take a slot, until the block ends."""
    slots.take()

    @contextmanager
    def held() -> Generator[str, None, None]:
        try:
            yield slots.executor_id
        finally:
            slots.release()
            slots.release()  # once more does no harm
            if isinstance(slots, AdvisorySlots):
                wait_until_free(slots, slots._dsn)

    return held()


def test_a_slot_is_one_holders_alone_and_the_lowest_that_is_free(make_slots: Any) -> None:
    """So a process that starts again after a crash has the name that it had."""
    with taken(make_slots()) as first:
        with taken(make_slots()) as second, taken(make_slots("other")) as other:
            assert (first, second, other) == ("app-1", "app-2", "other-1")
        with taken(make_slots()) as again:
            assert again == "app-2"


def test_only_a_dead_process_is_inherited_from(make_slots: Any) -> None:
    """Whoever asks keeps its slot from others meanwhile."""
    slots, other = make_slots(), make_slots()
    with taken(slots), taken(other):
        for executor_id in ("app-1", "app-2", "app-", "app-x", "app-0", "local", "other-1"):
            with slots.adopting(executor_id) as is_dead:
                assert not is_dead
        with slots.adopting("app-3") as is_dead:
            assert is_dead
            with taken(make_slots()) as third:
                assert third == "app-4"
        with taken(make_slots()) as third:
            assert third == "app-3"


def test_there_are_only_so_many_slots(make_slots: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody searches for ever."""
    monkeypatch.setattr(dbos_slots, "_MOST", 1)
    with taken(make_slots()):
        late = make_slots()
        with pytest.raises(EngineStateError, match="worker=False"):
            late.take()
        late.release()


def test_files_that_cannot_be_locked_are_no_slots(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flock() two processes could have one name, and run each other's jobs."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(EngineStateError, match="postgresql"):
        FileSlots("engine", "app", path)


def test_a_slot_is_taken_again_after_an_outage(postgresql: str) -> None:
    """It ends with its connection, when PostgreSQL starts anew for example."""
    with closing(Proxy(postgresql)) as proxy:
        slots = AdvisorySlots("engine", "app", proxy.url)
        with taken(slots):
            assert slots.is_held()
            proxy.cut()
            wait_until_free(slots, postgresql)
            assert slots.is_held()  # nobody has taken it meanwhile
            proxy.cut()
            wait_until_free(slots, postgresql)
            late = AdvisorySlots("engine", "app", postgresql)
            with taken(late) as stolen:
                assert stolen == "app-1"
                assert not slots.is_held()
                assert not slots.is_held()  # although it is connected again
            assert slots.is_held()


def wait_until_free(slots: AdvisorySlots, url: str) -> None:
    """Wait until PostgreSQL has noticed that the holder of a slot is gone."""
    slot = (slots._space, slots._number)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s, %s)", slot)
        # The end of this session would be noticed as late.
        connection.execute("SELECT pg_advisory_unlock(%s, %s)", slot)


# Processes


async def test_two_processes_share_the_jobs(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one has its own name, and runs as many as it may; neither takes what the other has."""
    monkeypatch.setattr(dbos_engine, "_LOOK", 0.05)
    async with running(url, trace, concurrency=1) as (engine, jobs):
        with process(url, trace, concurrency=1) as other:
            handles = [await engine.enqueue(jobs.hold, label) for label in "ab"]
            await trace.until("began", times=2)
            assert {each.pid for each in trace.all("began")} == {os.getpid(), other.pid}
            rows = await store_of(engine).rows(each.id for each in handles)
            assert {row.executor_id for row in rows} == {"fastapi-tasks-1", "fastapi-tasks-2"}
            for label in "ab":
                trace.gate(label).touch()
            assert [await each.wait() for each in handles] == ["a", "b"]


async def test_a_job_whose_process_is_killed_runs_again_in_a_live_one(
    any_url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The attempt that was cut off is made again under the same number: it has not failed."""
    monkeypatch.setattr(dbos_engine, "_LOOK", 0.2)
    with process(any_url, trace) as doomed:
        async with running(any_url, trace, worker=False) as (engine, jobs):
            job = await engine.enqueue(jobs.stumble, "a")
            await trace.until("began", "a", times=2)
        async with running(any_url, trace) as (engine, jobs):
            doomed.send_signal(signal.SIGKILL)
            await trace.until("began", "a", times=3)
            assert [each.attempt for each in trace.all("began")] == [1, 2, 2]
            assert "The jobs of a process that has died (fastapi-tasks-1) run again" in caplog.text
            trace.gate("a").touch()
            assert await engine.wait_for(job) == 2


async def test_a_job_whose_process_is_killed_runs_again_at_the_next_start(
    url: str, trace: Trace
) -> None:
    """So it does without any other process."""
    with process(url, trace) as doomed:
        async with running(url, trace, worker=False) as (engine, jobs):
            job = await engine.enqueue(jobs.hold, "a")
            await trace.until("began", "a")
            doomed.send_signal(signal.SIGKILL)
            doomed.wait(PATIENCE)
    trace.gate("a").touch()
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(job) == "a"
        assert (await job_info(engine, job.id)).attempt == 1


async def job_info(engine: DBOSEngine, job_id: str) -> Any:
    """Return what a job is like, which is known."""
    info = await engine.find(job_id)
    assert info is not None
    return info


async def test_a_job_that_kills_its_process_each_time_is_given_up(
    any_url: str, trace: Trace
) -> None:
    """Else it would kill one process after the other, for ever. Its error handler is told."""
    with process(any_url, trace) as doomed:
        async with running(any_url, trace, worker=False) as (engine, jobs):
            job = await engine.enqueue(jobs.deadly)
            await trace.until("began")
            doomed.send_signal(signal.SIGKILL)
            doomed.wait(PATIENCE)
    async with running(any_url, trace, max_recoveries=0) as (engine, jobs):
        with pytest.raises(JobFailedError, match="WorkerLostError: Of the 1 workers"):
            await engine.wait_for(job)
        info = await job_info(engine, job.id)
        assert (info.status, info.attempt) == (TaskStatus.FAILED, 1)
    assert len(trace.all("began")) == 1
    (told,) = trace.all("was told")
    assert (told.label, told.attempt, told.job_id) == ("WorkerLostError", 1, job.id)


async def enqueue_deadly(url: str, path: Path, trace: Trace, *, lost: int) -> str:
    """Enqueue a job of which so many processes have died, and return its id."""
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.deadly)
    change(path, "UPDATE workflow_status SET recovery_attempts = ?", lost)
    return job.id


@pytest.mark.parametrize(("lost", "is_told"), [(2, True), (3, True), (4, False)])
async def test_an_error_handler_that_kills_its_process_each_time_is_given_up(
    url: str, path: Path, trace: Trace, lost: int, is_told: bool
) -> None:
    """It is called as often as the job was begun, at most."""
    job_id = await enqueue_deadly(url, path, trace, lost=lost)
    async with running(url, trace, max_recoveries=1) as (engine, _):
        with pytest.raises(JobFailedError, match=f"WorkerLostError: Of the {lost} workers"):
            await Job(engine, job_id, "deadly").wait()
    assert trace.all("began") == []
    assert len(trace.all("was told")) == is_told


async def test_a_job_that_was_given_up_is_not_begun_after_a_shutdown(
    url: str, path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may come before its error handler: DBOS then forgets how often the job was begun."""
    job_id = await enqueue_deadly(url, path, trace, lost=1)
    look = dbos_runs.Runs._lost

    async def look_and_pause(self: dbos_runs.Runs, job_id: str) -> int:
        lost = await look(self, job_id)
        self.pause()
        return lost

    with monkeypatch.context() as patch:
        patch.setattr(dbos_runs.Runs, "_lost", look_and_pause)
        async with running(url, trace, max_recoveries=0) as (engine, _):
            await until_noted(engine, job_id, lost=1)
    assert trace.all() == []
    async with running(url, trace, max_recoveries=0) as (engine, _):
        with pytest.raises(JobFailedError, match="WorkerLostError: Of the 1 workers"):
            await Job(engine, job_id, "deadly").wait()
    assert trace.all("began") == []
    assert len(trace.all("was told")) == 1


async def until_noted(engine: DBOSEngine, job_id: str, **notes: Any) -> None:
    """Wait until something is written beside a job's state."""
    deadline = time.monotonic() + PATIENCE
    while True:
        row = await store_of(engine).row(job_id)
        if row is not None and notes.items() <= (row.attributes or {}).items():
            return
        assert time.monotonic() < deadline, row
        await asyncio.sleep(0.02)


async def test_a_job_runs_if_nobody_can_tell_how_often_it_was_begun(
    url: str, path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may be gone for a moment, and DBOS waits for it."""
    trace.gate("deadly").touch()
    job_id = await enqueue_deadly(url, path, trace, lost=1)

    async def row(self: Store, job_id: str) -> Any:
        raise EngineUnavailableError("jobs", "it is gone", instead="Wait")

    monkeypatch.setattr(Store, "row", row)
    async with running(url, trace, max_recoveries=0) as (engine, _):
        job: Job[None] = Job(engine, job_id, "deadly")
        await job.wait()
    assert len(trace.all("began")) == 1


async def test_a_job_is_run_by_the_version_that_it_was_enqueued_under(
    url: str, trace: Trace
) -> None:
    """And by default that is the same one after a deploy."""
    async with running(url, trace, worker=False, application_version="2") as (engine, jobs):
        new = await engine.enqueue(jobs.add, 1, 1)
    async with running(url, trace) as (engine, jobs):
        old = await engine.enqueue(jobs.add, 1, 2)
        assert await old.wait() == 3
        assert (await job_info(engine, new.id)).status is TaskStatus.PENDING
    async with running(url, trace, application_version="2") as (engine, jobs):
        assert await engine.wait_for(new) == 2


async def test_names_part_the_apps_of_one_database(url: str, trace: Trace) -> None:
    """Neither sees, runs or purges what is the other's."""
    async with running(url, trace, name="one", worker=False) as (one, jobs):
        job = await one.enqueue(jobs.add, 1, 1)
        async with running(url, trace, name="two", keep=0.001) as (two, others):
            assert await (await two.enqueue(others.add, 1, 2)).wait() == 3
            assert await two.find(job.id) is None
            assert (await job_info(one, job.id)).status is TaskStatus.PENDING


async def test_two_engines_cannot_run_jobs_in_one_process(
    url: str, tmp_path: Path, trace: Trace
) -> None:
    """There is one DBOS in a process, and a second one would quietly be the first."""
    async with running(url, trace) as (engine, jobs):
        second, _ = engine_at(f"sqlite:///{tmp_path}/other.db", trace)
        with pytest.raises(EngineStateError, match="another DBOSEngine of this process"):
            await Supervisor(engines=[second]).start()
        second.worker = False
        async with Supervisor(engines=[second]):  # in which jobs can be enqueued all the same
            assert await second.find("unknown") is None
        assert await (await engine.enqueue(jobs.add, 1, 2)).wait() == 3


async def test_a_process_that_uses_dbos_itself_cannot_run_jobs(
    url: str, tmp_path: Path, trace: Trace
) -> None:
    """Its own DBOS goes on."""
    from dbos import DBOS, DBOSConfig

    config: DBOSConfig = {"name": "theirs", "system_database_url": f"sqlite:///{tmp_path}/their.db"}
    engine, _ = engine_at(url, trace)
    DBOS(config=config)
    try:
        await asyncio.to_thread(DBOS.launch)
        with pytest.raises(EngineStateError, match="uses DBOS already"):
            await Supervisor(engines=[engine]).start()
        assert await asyncio.to_thread(DBOS.list_workflows) == []
    finally:
        await asyncio.to_thread(DBOS.destroy)
    async with running(url, trace) as (engine, jobs):
        assert await (await engine.enqueue(jobs.add, 1, 2)).wait() == 3


# Starting and stopping


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The error says what to look at."""
    engine = DBOSEngine(f"sqlite:///{tmp_path}/nowhere/jobs.db")
    with pytest.raises(EngineUnavailableError, match=f"{tmp_path}/nowhere is a directory"):
        await Supervisor(engines=[engine]).start()
    assert not engine.is_started


def test_a_file_that_is_no_database_is_refused(path: Path, url: str) -> None:
    """Nothing is written to it."""
    path.write_text("Dear diary, " * 100)
    with pytest.raises(EngineUnavailableError, match="not a database"):
        asyncio.run(Supervisor(engines=[DBOSEngine(url)]).start())
    assert path.read_text().startswith("Dear diary")


async def test_a_port_that_nobody_listens_at_is_told_in_time() -> None:
    """The password is not."""
    began = time.monotonic()
    engine = DBOSEngine("postgresql://ada:hunter2@127.0.0.1:9/jobs")
    with pytest.raises(EngineUnavailableError, match="PostgreSQL runs there") as caught:
        await Supervisor(engines=[engine]).start()
    assert "hunter2" not in str(caught.value)
    assert time.monotonic() - began < 5


async def test_a_failed_launch_leaves_nothing_behind(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start has the same slot, and DBOS to itself."""
    from dbos import DBOS

    def fail() -> None:
        raise sqlite3.OperationalError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(DBOS, "launch", fail)
        with pytest.raises(EngineUnavailableError, match="the disk is full"):
            await Supervisor(engines=[DBOSEngine(url)]).start()
    async with running(url, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 2)
        assert await job.wait() == 3
        row = await store_of(engine).row(job.id)
        assert row is not None
        assert row.executor_id == "fastapi-tasks-1"


def test_an_engine_starts_again_on_another_event_loop(any_url: str, trace: Trace) -> None:
    """Nothing is tied to the first one, and no thread outlives either."""
    engine, jobs = engine_at(any_url, trace)
    before = threading.active_count()

    async def once() -> int:
        async with Supervisor(engines=[engine]):
            result: int = await (await engine.enqueue(jobs.add, 1, 2)).wait()
            # DBOS would put its own one in its place, and shut that down.
            assert asyncio.get_running_loop()._default_executor is None  # type: ignore[attr-defined]
        return result + await asyncio.to_thread(lambda: 1)

    for _ in range(2):
        assert asyncio.run(once()) == 4
    # AnyIO's own ones are told to end, and nobody waits for that, nor for those of earlier tests.
    asyncio.run(eventually(lambda: threading.active_count() <= before))


async def test_jobs_that_a_stop_cuts_off_are_given_back(any_url: str, trace: Trace) -> None:
    """They have lost no attempt and no recovery, and are any process's at once."""
    async with running(any_url, trace, concurrency=1, max_recoveries=0) as (engine, jobs):
        cut = await engine.enqueue(jobs.hold, "a")
        await trace.until("began", "a")
        waiting = await engine.enqueue(jobs.add, 1, 2)
    async with running(any_url, trace, worker=False) as (engine, jobs):
        for job in (cut, waiting):
            assert (await job_info(engine, job.id)).status is TaskStatus.PENDING
    trace.gate("a").touch()
    async with running(any_url, trace, max_recoveries=0) as (engine, jobs):
        assert await engine.wait_for(cut) == "a"
        assert await engine.wait_for(waiting) == 3
    assert [each.attempt for each in trace.all("began", "a")] == [1, 1]


async def test_what_comes_after_the_stop_has_begun_is_not_begun(url: str, trace: Trace) -> None:
    """It is held until it can be given back: DBOS cannot be told to take no more."""
    engine, jobs = engine_at(url, trace)
    supervisor = Supervisor(engines=[engine], grace=5)
    await supervisor.start()
    await engine.enqueue(jobs.hold, "a")
    await trace.until("began", "a")
    draining = asyncio.create_task(supervisor.drain())
    await asyncio.sleep(0)
    late = await engine.enqueue(jobs.add, 1, 2)
    await until_row(engine, late.id, status="PENDING")
    trace.gate("a").touch()
    report = await draining
    assert len(report.finished) == 1
    assert trace.all("added") == []
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(late) == 3


async def test_what_has_come_of_a_job_is_stored_before_the_engine_stops(
    url: str, trace: Trace
) -> None:
    """A job that ends while the app is shut down is not run again."""
    engine, jobs = engine_at(url, trace)
    supervisor = Supervisor(engines=[engine], grace=PATIENCE)
    await supervisor.start()
    job = await engine.enqueue(jobs.hold, "a")
    await trace.until("began", "a")
    trace.gate("a").touch()
    await supervisor.drain()
    async with running(url, trace, worker=False) as (engine, jobs):
        assert (await job_info(engine, job.id)).status is TaskStatus.SUCCEEDED


async def test_a_database_that_takes_nothing_does_not_hold_the_stop_for_ever(
    path: Path,
    url: str,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two records say which jobs run again, and they do."""
    monkeypatch.setattr(dbos_runs, "_STORING", 0.3)
    monkeypatch.setattr("fastapi_tasks.engines.dbos_worker._GIVING_BACK", 0.3)
    monkeypatch.setattr(dbos_address, "_BUSY", 200)
    engine, jobs = engine_at(url, trace)
    supervisor = Supervisor(engines=[engine], grace=PATIENCE)
    await supervisor.start()
    job = await engine.enqueue(jobs.hold, "a")
    await trace.until("began", "a")
    with locked(path):
        trace.gate("a").touch()
        await supervisor.drain()
    assert "What has come of 1 jobs could not be stored" in caplog.text
    assert "Jobs that were cut off could not be given back" in caplog.text
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(job) == "a"


async def test_a_thread_that_does_not_end_is_not_waited_for(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drain has abandoned it, and its job is given back."""
    monkeypatch.setattr(dbos_runs, "_ENDING", 0.1)
    engine, _ = engine_at(url, trace)
    begun, end = threading.Event(), threading.Event()

    @engine.task(name="block")
    def block() -> None:
        begun.set()
        end.wait(PATIENCE)

    supervisor = Supervisor(engines=[engine], shutdown_timeout=0.2)
    await supervisor.start()
    job = await engine.enqueue(block)
    await asyncio.to_thread(begun.wait, PATIENCE)
    report = await supervisor.drain()
    end.set()
    assert len(report.abandoned) == 1
    async with running(url, trace, worker=False) as (engine, _):
        assert (await job_info(engine, job.id)).status is TaskStatus.PENDING


def test_jobs_of_an_event_loop_that_was_closed_are_held() -> None:
    """They have not failed: they run again at the next start."""
    told: list[None] = []

    async def make() -> dbos_runs.Runs:
        return dbos_runs.Runs(
            cast(Any, None), cast(Any, None), max_recoveries=3, on_over=lambda: told.append(None)
        )

    async def attempt(runs: dbos_runs.Runs) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await runs._attempt("a", "", 1)
        runs._in_loop(runs._note_over, "a")

    asyncio.run(attempt(asyncio.run(make())))
    assert told == []


async def test_who_waits_when_the_engine_stops_is_told(url: str, trace: Trace) -> None:
    """The job goes on another day, and nobody waits for it in vain."""
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 2)
        waiting = asyncio.create_task(job.wait())
        await asyncio.sleep(0)
    with pytest.raises(EngineStateError, match="was stopped while a job was waited for"):
        await waiting


async def test_a_store_that_is_closed_says_so(url: str, trace: Trace) -> None:
    """Whoever comes late has an error that can be understood."""
    async with running(url, trace, worker=False) as (engine, _):
        store = store_of(engine)
    with pytest.raises(EngineUnavailableError, match="it was stopped"):
        await store.row("some")
    await store.close()  # once more does no harm


def test_nothing_is_left_of_a_process_that_ends(url: str, trace: Trace) -> None:
    """No warning is raised, and nothing is said, with every check of Python's turned on."""
    code = f"""
import asyncio, threading
from pathlib import Path
from fastapi_tasks import Supervisor
from tests.engines.dbos_process import engine_at
from tests.engines.jobs import Trace

engine, jobs = engine_at({url!r}, Trace(Path({str(trace.folder)!r})))

async def main() -> None:
    async with Supervisor(engines=[engine]):
        print(await (await engine.enqueue(jobs.add, 1, 2)).wait())
        await engine.enqueue(jobs.hold, "a")
        await asyncio.sleep(0.2)

asyncio.run(main())
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join({PATIENCE})  # AnyIO's are told to end, and nobody waits for that
print(threading.active_count())
"""
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["3", "1"]
    said = [line for line in ended.stderr.splitlines() if "Shutdown: cancelling" not in line]
    assert [line for line in said if "Error" in line or "Warning" in line] == []


# Rows that somebody else has written


class Exploit:
    """What executes code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def was_executed(folder: Path) -> bool:
    """Return whether somebody has unpickled it."""
    return (folder / "executed").exists()


async def test_nothing_is_unpickled(
    path: Path, url: str, trace: Trace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To unpickle is to execute, and a row says itself whether it is to be unpickled."""
    pickled = base64.b64encode(pickle.dumps(Exploit(tmp_path / "executed"))).decode()
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 1)
        done = await engine.enqueue(jobs.add, 1, 1)
        change(path, "UPDATE workflow_input SET inputs = ?", pickled)
        change(path, "UPDATE workflow_status SET serialization = 'py_pickle'")
        change(
            path,
            "UPDATE workflow_status SET status = 'SUCCESS', output = ? WHERE workflow_uuid = ?",
            pickled,
            done.id,
        )
        info = await done.info()
        assert info.status is TaskStatus.SUCCEEDED
    async with running(url, trace) as (engine, jobs):
        with pytest.raises(JobFailedError, match="none of this package's"):
            await engine.wait_for(job)
        assert await (await engine.enqueue(jobs.add, 1, 2)).wait() == 3
    assert not was_executed(tmp_path)
    pickle.loads(base64.b64decode(pickled))  # which does what it says
    assert was_executed(tmp_path)
    from dbos import _serialization

    theirs = _serialization.DefaultSerializer()  # which others may use again
    assert theirs.deserialize(theirs.serialize([1])) == [1]


async def test_malformed_rows_are_kept_and_the_worker_lives_on(
    path: Path, url: str, trace: Trace
) -> None:
    """Each has failed, and says why."""
    async with running(url, trace, worker=False) as (engine, jobs):
        store = store_of(engine)

        async def broken(inputs: str) -> str:
            job = await engine.enqueue(jobs.add, 1, 1)
            change(
                path, "UPDATE workflow_input SET inputs = ? WHERE workflow_uuid = ?", inputs, job.id
            )
            return job.id

        rows = {
            await broken("{"): "JSONDecodeError",
            await broken('{"positionalArgs": []}'): "MalformedMessageError",
            await broken('{"positionalArgs": [{}]}'): "MalformedMessageError",
            await broken('{"positionalArgs": ["{}"]}'): "MalformedMessageError",
            await broken('{"namedArgs": {"text": ""}}'): "MalformedMessageError",
        }
        strange = await engine.enqueue(jobs.add, 1, 1)
        await store.note(strange.id, progress="far", created=[])
        change(
            path, "UPDATE workflow_status SET created_at = 0 WHERE workflow_uuid = ?", strange.id
        )
        info = await strange.info()
        assert (info.name, info.created.year, info.progress) == ("", 1970, None)
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(strange) == 2
        for job_id, error_type in rows.items():
            await until_row(engine, job_id, status="ERROR")
            info = await job_info(engine, job_id)
            assert (info.status, info.error_type, info.attempt) == ("failed", error_type, 1)


async def test_rows_of_others_are_no_jobs(path: Path, url: str, trace: Trace) -> None:
    """A workflow of somebody else's in the same database is left alone."""
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 1)
        change(path, "UPDATE workflow_status SET name = 'theirs'")
        assert await engine.find(job.id) is None
        assert not await engine.cancel(job.id)
        assert not await engine.cancel("unknown")


# Attempts and cancelling


async def test_jobs_that_wait_long_hold_up_no_others(any_url: str, trace: Trace) -> None:
    """They wait elsewhere."""
    async with running(any_url, trace, concurrency=1) as (engine, jobs):
        job = await engine.enqueue(jobs.wait_long, 3600)
        await trace.until("began", "wait-long")
        assert await (await engine.enqueue(jobs.add, 1, 2)).wait() == 3
        room = store_of(engine).waiting_room
        await until_row(engine, job.id, status="PENDING", queue_name=room)
        info = await job.info()
        assert (info.status, info.attempt) == (TaskStatus.PENDING, 1)
        assert await job.cancel()


async def test_jobs_that_wait_shortly_stay_where_they_are(url: str, trace: Trace) -> None:
    """To go and to come back would take longer."""
    trace.gate("a").touch()
    async with running(url, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.stumble, "a")
        assert await job.wait() == 2
        row = await store_of(engine).row(job.id)
        assert row is not None
        assert row.recovery_attempts == 1
        assert row.queue_name == store_of(engine).name


async def test_jobs_that_have_waited_long_come_back(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often, each attempt is made once."""
    monkeypatch.setattr(dbos_runs, "_LONG", 0.1)
    async with running(url, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.wait_long, 0.5, 0, 0.5)
        assert await job.wait() == 4
        steps = store_of(engine).client.list_workflow_steps
        names = [step["function_name"] for step in await asyncio.to_thread(steps, job.id)]
        assert names == ["attempt", "DBOS.sleep"] * 3 + ["attempt"]
    assert [each.attempt for each in trace.all("began")] == [1, 2, 3, 4]


async def test_a_job_that_waits_for_its_next_attempt_survives_a_stop(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the second one."""
    monkeypatch.setattr(dbos_runs, "_LONG", 0.2)
    async with running(url, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.wait_long, 1)
        await until_row(engine, job.id, queue_name=store_of(engine).waiting_room)
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(job) == 2
    assert [each.attempt for each in trace.all("began")] == [1, 2]


async def test_waiting_goes_on_where_it_is_if_the_database_is_away(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No attempt is lost by what was only to be polite."""
    monkeypatch.setattr(dbos_runs, "_LONG", 0.2)

    async def fail(*_: Any, **__: Any) -> None:
        raise EngineUnavailableError("engine", "it is away", instead="Wait")

    async with running(url, trace) as (engine, jobs):
        with monkeypatch.context() as patched:
            for name in ("note", "give_back"):
                patched.setattr(store_of(engine), name, fail)
            job = await engine.enqueue(jobs.wait_long, 1)
            assert await job.wait() == 2
        assert f"That job {job.id} waits could not be noted" in caplog.text
        with monkeypatch.context() as patched:
            job = await engine.enqueue(jobs.wait_long, 2)
            room = store_of(engine).waiting_room
            await until_row(engine, job.id, status="PENDING", queue_name=room)
            patched.setattr(store_of(engine), "give_back", fail)
            assert await job.wait() == 2  # in the place where it has waited


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_running_job_is_cancelled(url: str, trace: Trace, where: str) -> None:
    """Its row says so at once, and another process notices within a second or two."""
    async with running(url, trace, worker=where == "here") as (engine, jobs):
        with process(url, trace) if where == "elsewhere" else nullcontext():
            job = await engine.enqueue(jobs.hold, "a")
            await trace.until("began", "a")
            assert await job.cancel()
            with pytest.raises(JobCancelledError):
                await job.wait()
            info = await job.info()
            assert (info.status, info.attempt) == (TaskStatus.CANCELLED, 1)
            assert info.started is not None
            assert info.finished is not None
            assert info.created <= info.started <= info.finished
            assert not await job.cancel()
            await trace.until("was cut off", "a")


async def test_a_job_that_is_cancelled_while_it_is_given_back_stays_cancelled(
    url: str, trace: Trace
) -> None:
    """To give a job back is to resume it, as DBOS has it, and it resumes cancelled ones too."""
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 1)
        assert await job.cancel()
        store = store_of(engine)
        await store.give_back([job.id], store.name)
        assert (await job.info()).status is TaskStatus.CANCELLED


async def test_a_job_that_cancels_itself_is_cancelled(url: str, trace: Trace) -> None:
    """So its row says, and it does not run again."""
    async with running(url, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.cancel_itself, "a")
        with pytest.raises(JobCancelledError):
            await job.wait()
        info = await job.info()
        assert (info.status, info.attempt) == (TaskStatus.CANCELLED, 1)


async def test_a_job_whose_end_cannot_be_told_is_held(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the stop, after which it runs again."""

    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("engine", "it is away", instead="Wait")

    async with running(url, trace) as (engine, jobs):
        with monkeypatch.context() as patched:
            patched.setattr(store_of(engine), "cancel", fail)
            job = await engine.enqueue(jobs.cancel_itself, "a")
            await trace.until("began", "a")
            executor = engine.executor
            assert executor is not None
            await eventually(lambda: job.id not in executor.running)
            await until_row(engine, job.id, status="PENDING")
    trace.gate("a").touch()
    async with running(url, trace) as (engine, jobs):
        assert await engine.wait_for(job) == "a"


# Outages, purging, logs


async def test_waiters_wait_through_an_outage(postgresql: str, trace: Trace) -> None:
    """One who waits has nothing better to do."""
    with closing(Proxy(postgresql)) as proxy:
        async with running(proxy.url, trace, worker=False) as (engine, jobs):
            jobs_of_two = [await engine.enqueue(jobs.add, 1, each) for each in (1, 2)]
            waiting = [asyncio.create_task(job.wait()) for job in jobs_of_two]
            again = asyncio.create_task(jobs_of_two[0].wait())
            with proxy.refusing():
                with pytest.raises(EngineUnavailableError):
                    await engine.enqueue(jobs.add, 1, 3)
                again.cancel()
                await asyncio.wait([again])
            async with running(postgresql, trace):
                assert [await each for each in waiting] == [2, 3]


async def test_an_outage_is_told_once(
    postgresql: str,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And when it is over the slot is taken again, and jobs run."""
    monkeypatch.setattr(dbos_engine, "_LOOK", 0.05)
    with closing(Proxy(postgresql)) as proxy:
        async with running(proxy.url, trace) as (engine, jobs):
            asked: list[float] = []
            original = AdvisorySlots.is_held

            def is_held(self: AdvisorySlots) -> bool:
                asked.append(time.monotonic())
                return original(self)

            monkeypatch.setattr(AdvisorySlots, "is_held", is_held)
            with proxy.refusing():
                asked.clear()
                await eventually(lambda: len(asked) > 3)
            asked.clear()
            await eventually(lambda: len(asked) > 1)  # so it can be reached again
            assert await (await engine.enqueue(jobs.add, 1, 2)).wait() == 3
    ours = [each for each in caplog.records if each.name == "fastapi_tasks"]
    told = [each for each in ours if "the database cannot be used" in each.getMessage()]
    assert len(told) == 1


async def test_a_lost_slot_and_a_mistake_are_told_and_end_nothing(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Housekeeping goes on."""
    monkeypatch.setattr(dbos_engine, "_LOOK", 0.05)
    answers = iter([False, ZeroDivisionError()])

    def is_held(_: FileSlots) -> bool:
        answer = next(answers, True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(FileSlots, "is_held", is_held)
    async with running(url, trace):
        await eventually(lambda: "cannot look after its database" in caplog.text)
    assert "The place of this process (fastapi-tasks-1) is somebody else's" in caplog.text


async def test_old_jobs_are_forgotten(
    url: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them go their results and their keys; those that are not over stay."""
    monkeypatch.setattr(dbos_engine, "_LOOK", 0.05)
    async with running(url, trace, keep=math.inf) as (engine, jobs):
        old = await engine.using(key="a").enqueue(jobs.add, 1, 1)
        failed = await engine.enqueue(jobs.fail)
        assert await old.wait() == 2
        with pytest.raises(JobFailedError, match="KeyError: 'it fails'"):
            await failed.wait()
        waiting = await engine.using(delay=3600).enqueue(jobs.add, 1, 2)
        await asyncio.sleep(1.1)  # rows may be dated by whole seconds
        assert await store_of(engine).purge(engine.keep) == 0
        assert await engine.find(old.id) is not None
    async with running(url, trace, keep=0.05) as (engine, jobs):
        for job in (old, failed):
            await until_gone(engine, job.id)
        assert (await job_info(engine, waiting.id)).status is TaskStatus.PENDING
        assert await (await engine.using(key="a").enqueue(jobs.add, 1, 3)).wait() == 4


async def test_a_failed_job_is_told_once(
    url: str, trace: Trace, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """By this package; DBOS tells what else goes wrong, and writes to no console itself."""
    with caplog.at_level(logging.DEBUG):
        async with running(url, trace) as (engine, jobs):
            job = await engine.enqueue(jobs.fail)
            with pytest.raises(JobFailedError):
                await job.wait()
            await job.cancel()
            logging.getLogger("dbos").warning("The roof is on fire")
    errors = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [each.getMessage() for each in errors if each.name == "dbos"] == ["The roof is on fire"]
    assert len([each for each in errors if each.name == "fastapi_tasks"]) == 1
    assert "roof" not in capfd.readouterr().err


async def test_progress_is_there_for_everybody(url: str, trace: Trace) -> None:
    """In another process too."""
    async with running(url, trace, worker=False) as (engine, jobs):
        job = await engine.enqueue(jobs.add, 1, 1)
        progress = Progress(done=3, total=8, message="drawing")
        await store_of(engine).note_progress(job.id, progress)
        assert (await job.info()).progress == progress


# SQLite


async def test_readers_and_writers_of_a_file_wait_for_each_other(
    path: Path, url: str, trace: Trace
) -> None:
    """It has a write-ahead log, and the file remembers that."""
    async with running(url, trace, worker=False):
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_in_use_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite does not wait by itself when the log is turned on."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE theirs (x)")
    monkeypatch.setattr(dbos_address, "_BUSY", 50)
    with locked(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        dbos_address.turn_on_wal(path)
    monkeypatch.setattr(dbos_address, "_BUSY", 1000 * PATIENCE)
    waiting = locked(path)
    waiting.__enter__()

    def let_go(_: float) -> None:
        waiting.__exit__(None, None, None)

    real = sqlite3.connect

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return real(*args, **{**kwargs, "timeout": 0.01})

    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(time, "sleep", let_go)
    dbos_address.turn_on_wal(path)


@pytest.mark.parametrize("version", [(3, 40, 1), (3, 42, 0)])
def test_an_old_sqlite_knows_the_time(
    url: str, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    """DBOS asks it in a way that it learned in 3.42, on newer versions of Python."""
    is_new = sqlite3.sqlite_version_info >= (3, 42)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    engine = dbos_address.sqlite_engine(url)
    with engine.connect() as connection:
        now = connection.execute(sqlalchemy.text("SELECT unixepoch('subsec')")).scalar()
    engine.dispose()
    if is_new or version < (3, 42):
        assert isinstance(now, float)
        assert now == pytest.approx(time.time(), abs=60)
    else:
        assert now is None
