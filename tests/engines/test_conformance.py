"""What is promised of jobs, kept by every engine on the real service, or known not to be."""

from __future__ import annotations

import asyncio
import os
import random
import re
import runpy
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import anyio.lowlevel
import pytest

from fastapi_tasks import (
    EngineUnavailableError,
    JobCancelledError,
    JobFailedError,
    Progress,
    Retry,
    Supervisor,
    TaskStatus,
    UnregisteredFunctionError,
)
from fastapi_tasks.engines import EngineAdapter, Job, JobOptions
from fastapi_tasks.engines.messages import Message
from tests.clocks import Backend
from tests.promises import Promises
from tests.servers import ROOT

from .jobs import Colour, FlakyError, Item, Order, Trace, eventually
from .kinds import DURABLE, KINDS, Database, Kind, Place
from .services import PATIENCE, postgresql_database
from .workers import Worker, working

NUMBER_OF_JOBS = int(os.environ.get("FASTAPI_TASKS_JOBS", "100"))
"""How many jobs run while workers are killed."""
NUMBER_OF_KILLS = max(3, NUMBER_OF_JOBS // 50)


# What is promised, and by whom


promised = Promises(KINDS)
PROMISES = promised.rows
"""By the name of the test."""


# What tests have in common


@pytest.fixture
def anyio_backend() -> Backend:
    """The event loop that engines are for."""
    return "asyncio", {}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """What the test's jobs note."""
    return Trace(tmp_path)


@pytest.fixture(scope="session")
def database() -> Generator[Database, None, None]:
    """A database that is made when it is needed first: that takes longer than most tests."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(postgresql_database()))


@pytest.fixture
def place(kind: Kind, tmp_path: Path, database: Database) -> Generator[Place, None, None]:
    """Where the test's jobs are kept, apart from all others."""
    with kind.place(tmp_path, database) as place:
        yield place


Measured = Callable[[str], None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Notes what was measured, for the table in the documentation."""
    return lambda text: record_property("measured", text)


async def over(job: Job[Any]) -> Any:
    """Wait for a job, but not for ever."""
    with anyio.fail_after(PATIENCE):
        return await job.wait()


async def until_status(job: Job[Any], status: TaskStatus) -> None:
    """Wait until the engine says that a job has a status."""
    deadline = time.monotonic() + PATIENCE
    found = None
    while found is not status:
        assert time.monotonic() < deadline, f"{found}, and not {status}"
        await anyio.sleep(0.05)
        found = (await job.info()).status


class Enqueueing:
    """Enqueues one call after the other, each of them until the engine takes it."""

    def __init__(self) -> None:
        self.failures = 0
        """How often the engine did not."""

    async def until_taken(self, enqueue: Callable[[], Awaitable[Job[Any]]]) -> Job[Any]:
        """Enqueue a call, and return its job."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await enqueue()
            except EngineUnavailableError:
                self.failures += 1
                assert time.monotonic() < deadline
                await anyio.sleep(0.05)  # or it would be as busy as the service that comes back


async def put(engine: EngineAdapter, job_id: str, message: Message) -> Job[Any]:
    """Store a message as it is, as somebody else might who has access to the service."""
    return Job(engine, await engine._enqueue(job_id, message, JobOptions()), message.name)


# What becomes of a job


@promised()
async def test_result(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """A job runs once, in a thread if it is not async, and ``wait()`` returns its result."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        began = time.monotonic()
        job = await engine.enqueue(jobs.add, 1)
        assert await over(job) == 3
        measured(f"{time.monotonic() - began:.2f} s")
        assert await over(await engine.enqueue(jobs.add_in_thread, 20, right=30)) == 50
        info = await job.info()
    assert [each.label for each in trace.all()] == ["1+2", "20+30"]
    assert (info.id, info.name, info.status) == (job.id, "add", TaskStatus.SUCCEEDED)
    assert info.attempt == 1
    assert info.started is not None
    assert info.finished is not None
    assert info.created <= info.finished


@promised()
async def test_arguments(kind: Kind, place: Place, trace: Trace) -> None:
    """Models, datetimes, UUIDs, enums and sets arrive as what they were, and return so."""
    order = Order(items=[Item(name="teapot ☕", price=Decimal("42.00"))])
    at = datetime(2026, 2, 28, 23, 59, 59, 999999, tzinfo=UTC)
    given: dict[str, Any] = {
        "within": timedelta(days=1, microseconds=1),
        "order_id": UUID(int=17),
        "colour": Colour.TEAL,
        "tags": frozenset({"tea", "pot"}),
    }
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        job = await engine.enqueue(jobs.receive, order, at, date(2026, 3, 1), **given)
        received = await over(job)
    assert (received.order, received.at, received.day) == (order, at, date(2026, 3, 1))
    assert {name: getattr(received, name) for name in given} == given
    kinds = ["Order", "datetime", "date", "timedelta", "UUID", "Colour", "frozenset"]
    assert received.types == kinds


@promised()
async def test_retry(kind: Kind, place: Place, trace: Trace) -> None:
    """A job that fails runs again, with its next number, after a wait that grows."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        job = await engine.enqueue(jobs.flaky, 2)
        assert await over(job) == "attempt 3"
        assert (await job.info()).attempt == 3
    tried = trace.all()
    assert [each.attempt for each in tried] == [1, 2, 3]
    first, second, third = (each.at for each in tried)
    assert second - first >= 0.2
    assert third - second >= 0.8
    assert {each.job_id for each in tried} == {job.id}


@promised()
async def test_last_attempt(kind: Kind, place: Place, trace: Trace) -> None:
    """When no attempt is left, ``on_error`` runs in the worker, once, and the job has failed."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        job = await engine.using(retry=Retry(FlakyError, attempts=2, wait_jitter=0)).enqueue(
            jobs.flaky, 5
        )
        with pytest.raises(JobFailedError, match="FlakyError"):
            await over(job)
        info = await job.info()
    assert (info.status, info.attempt) == (TaskStatus.FAILED, 2)
    assert (info.error_type, info.error) == ("FlakyError", "attempt 2")
    assert [each.what for each in trace.all()] == ["tried", "tried", "alerted"]
    assert trace.all("alerted")[0].label == "FlakyError: attempt 2"


@promised()
async def test_timeout(kind: Kind, place: Place, trace: Trace) -> None:
    """An attempt that takes longer than its ``timeout`` is cut off, and has failed."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        job = await engine.using(timeout=0.3).enqueue(jobs.hold, "long")
        with pytest.raises(JobFailedError, match="TaskTimeoutError"):
            await over(job)
        assert (await job.info()).error_type == "TaskTimeoutError"
    assert [each.what for each in trace.all()] == ["began", "was cut off"]


@promised()
async def test_delay(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """A job with a ``delay`` does not begin before."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        asked = time.time()
        job = await engine.using(delay=1).enqueue(jobs.add, 1)
        assert (await job.info()).status is TaskStatus.PENDING
        assert await over(job) == 3
    waited = trace.all()[0].at - asked
    assert waited >= 1
    measured(f"1 s took {waited:.2f} s")


@promised()
async def test_key(kind: Kind, place: Place, trace: Trace) -> None:
    """While a job with a key is not over, enqueueing with the key returns that job."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        first = await engine.using(key="order-17").enqueue(jobs.hold, "first")
        queued_again = await engine.using(key="order-17").enqueue(jobs.hold, "second")
        await trace.until("began", "first")
        running_again = await engine.using(key="order-17").enqueue(jobs.hold, "third")
        other = await engine.using(key="order-18").enqueue(jobs.add, 1)
        assert await over(other) == 3
        trace.gate("first").touch()
        results = [await over(job) for job in (first, queued_again, running_again)]
    assert {first.id, queued_again.id, running_again.id} == {first.id}
    assert results == ["first"] * 3
    assert len(trace.all("began")) == 1


@promised()
async def test_cancel_queued(kind: Kind, place: Place, trace: Trace) -> None:
    """A job that is cancelled while it waits never begins."""
    async with kind.running(place, trace, worker=True, concurrency=1) as (engine, jobs):
        running = await engine.using(delay=0).enqueue(jobs.hold, "running")
        delayed = await engine.using(delay=1).enqueue(jobs.add, 1)
        assert await delayed.cancel()
        with pytest.raises(JobCancelledError):
            await over(delayed)
        assert (await delayed.info()).status is TaskStatus.CANCELLED
        trace.gate("running").touch()
        await over(running)
        assert not await delayed.cancel()
        assert await over(await engine.using(delay=1.2).enqueue(jobs.add, 5)) == 7
    assert [each.label for each in trace.all("ran")] == ["5+2"]


@promised()
async def test_cancel_running(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """A job that is cancelled while it runs is cut off, without a further attempt."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        retry = Retry(Exception, attempts=3, wait_jitter=0)
        job = await engine.using(retry=retry).enqueue(jobs.hold, "long")
        await trace.until("began")
        await until_status(job, TaskStatus.RUNNING)
        asked = time.time()
        assert await job.cancel()
        with pytest.raises(JobCancelledError):
            await over(job)
        await trace.until("was cut off")
        assert (await job.info()).status is TaskStatus.CANCELLED
        assert not await job.cancel()
        assert await over(await engine.enqueue(jobs.add, 1)) == 3
    assert [each.what for each in trace.all()] == ["began", "was cut off", "ran"]
    measured(f"{trace.all('was cut off')[0].at - asked:.2f} s")


@promised()
async def test_progress(kind: Kind, place: Place, trace: Trace) -> None:
    """How far a job has come is seen by whoever asks for it."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        job = await engine.enqueue(jobs.report, "drawing")
        await trace.until("began")
        deadline = time.monotonic() + PATIENCE
        progress = None
        while progress is None:
            assert time.monotonic() < deadline
            await anyio.sleep(0.05)
            progress = (await job.info()).progress
        trace.gate("drawing").touch()
        await over(job)
    assert progress == Progress(done=3, total=8, message="drawing")


@promised()
async def test_unknown(kind: Kind, place: Place, trace: Trace) -> None:
    """Of a job that it does not know, the engine says so: it neither waits nor fails."""
    async with kind.running(place, trace) as (engine, _):
        assert await engine.find("0" * 32) is None
        assert not await engine.cancel("0" * 32)


# What is no job


@promised()
async def test_unregistered(kind: Kind, place: Place, trace: Trace) -> None:
    """A function that is not registered is refused where it is enqueued, and in the worker."""
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        with pytest.raises(UnregisteredFunctionError, match="checkpoint"):
            await engine.enqueue(anyio.lowlevel.checkpoint)
        now = time.time()
        message = Message(name="os.system", arguments={"command": "true"}, created=now, due=now)
        job = await put(engine, "1" * 32, message)
        with pytest.raises(JobFailedError, match="UnregisteredFunctionError"):
            await over(job)
        assert (await job.info()).error_type == "UnregisteredFunctionError"
        assert await over(await engine.enqueue(jobs.add, 1)) == 3


class Garbage(Message):
    """A message that is written as something else."""

    def model_dump_json(self, **settings: Any) -> str:
        """Return what is not even JSON."""
        return '{"version": \x00 hunter2'


@promised()
async def test_malformed(
    kind: Kind, place: Place, trace: Trace, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that cannot be read is refused and kept, is not shown, and the worker lives on."""
    now = time.time()
    unfit = Message(name="add", arguments={"left": "hunter2"}, created=now, due=now)
    future = unfit.model_copy(update={"version": 2})
    garbage = Garbage(name="add", arguments={}, created=now, due=now)
    async with kind.running(place, trace, worker=True) as (engine, jobs):
        messages = {"2": unfit, "3": future, "4": garbage}
        refused = [await put(engine, key * 32, each) for key, each in messages.items()]
        for job in refused:
            with pytest.raises(JobFailedError):
                await over(job)
        assert await over(await engine.enqueue(jobs.add, 1)) == 3
        infos = [await job.info() for job in refused]
    assert [info.status for info in infos] == [TaskStatus.FAILED] * 3
    assert [info.error_type for info in infos] == [
        "InvalidArgumentsError",
        "MalformedMessageError",
        "MalformedMessageError",
    ]
    assert [each.label for each in trace.all()] == ["1+2"]
    assert "hunter2" not in caplog.text
    assert not any("hunter2" in (info.error or "") for info in infos)


# What becomes of the engine


@promised(kinds=DURABLE)
async def test_start_without_service(kind: Kind, place: Place) -> None:
    """If there is nothing at its address, the app does not start, and no password is shown."""
    engine = kind.make(kind.unreachable, **place.settings)
    began = time.monotonic()
    with pytest.raises(EngineUnavailableError) as caught:
        await Supervisor(engines=[engine]).start()
    assert time.monotonic() - began < 10
    assert "hunter2" not in str(caught.value)
    assert not engine.is_started


@promised(kinds=DURABLE)
async def test_enqueue_without_service(
    kind: Kind, place: Place, trace: Trace, measured: Measured
) -> None:
    """Enqueueing fails in time when the service is gone, and succeeds when it is back."""
    limit = 1.0
    took = {}
    async with kind.running(place, trace, worker=False, enqueue_timeout=limit) as (engine, jobs):
        await engine.enqueue(jobs.add, 1)
        for name, outage in place.outages.items():
            with outage():
                began = time.monotonic()
                with pytest.raises(EngineUnavailableError):
                    await engine.using(key=name).enqueue(jobs.add, 1)
                took[name] = time.monotonic() - began
            await Enqueueing().until_taken(lambda: engine.using(key="after").enqueue(jobs.add, 1))
    assert max(took.values()) < limit + 1
    measured(", ".join(f"{name}: {seconds:.2f} s" for name, seconds in took.items()))


def has_failed(enqueueing: Enqueueing, before: int) -> bool:
    """Return whether an enqueueing has failed since there were so many."""
    return enqueueing.failures > before


@promised(kinds=DURABLE)
async def test_restarted_service(
    kind: Kind, place: Place, trace: Trace, measured: Measured
) -> None:
    """When the service goes away under load and comes back, no job is lost."""
    enqueueing = Enqueueing()
    numbers = count()
    outages_are_over = False
    async with kind.running(place, trace, worker=True, enqueue_timeout=2) as (engine, jobs):

        async def enqueue_many() -> None:
            while not outages_are_over:
                number = next(numbers)
                bound = engine.using(key=f"{number}")
                await enqueueing.until_taken(partial(bound.enqueue, jobs.count, number))
                await anyio.sleep(0.02)  # no more than the worker can run

        sending = asyncio.create_task(enqueue_many())
        for times, outage in enumerate(place.outages.values(), 1):
            await trace.until("began", times=10 * times)
            before = enqueueing.failures
            with outage():
                await eventually(partial(has_failed, enqueueing, before))
            if place.cut is not None:
                await trace.until("began", times=10 * times + 5)
                place.cut()
        outages_are_over = True
        await sending
        labels = {str(number) for number in range(next(numbers))}
        await eventually(
            lambda: {each.label for each in trace.all("ended")} == labels,
            2 * PATIENCE,  # whoever lost its connection waits longer each time before the next one
            tell=lambda: f"{labels - {each.label for each in trace.all('ended')}} have not ended",
        )
        back = time.monotonic()
        assert await over(await engine.enqueue(jobs.add, 1)) == 3
        took = time.monotonic() - back
    twice = len(trace.all("ended")) - len(labels)
    measured(f"{len(labels)} jobs, {twice} of them twice; the next one took {took:.2f} s")


# What becomes of workers


@promised(kinds=DURABLE)
async def test_sigterm(kind: Kind, place: Place, trace: Trace) -> None:
    """A worker that gets SIGTERM finishes what it runs, takes no other job, and exits with 0."""
    async with kind.running(place, trace) as (engine, jobs):
        running = await engine.enqueue(jobs.hold, "running")
        with working(kind, place, trace, concurrency=1) as worker:
            await worker.until_ready()
            await trace.until("began", "running")
            waiting = await engine.enqueue(jobs.add, 1)
            worker.terminate()
            trace.gate("running").touch()
            assert await worker.status() == 0, worker.log.all()
        assert await over(running) == "running"
        assert (await waiting.info()).status is TaskStatus.PENDING
    assert [each.what for each in trace.all()] == ["began", "ended"]


@promised(kinds=DURABLE)
async def test_sigterm_deadline(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """A job that outlasts the deadline runs again elsewhere, its attempt not counted; exit 1."""
    async with kind.running(place, trace) as (engine, jobs):
        job = await engine.enqueue(jobs.hold, "long")
        with working(kind, place, trace, shutdown_timeout=1) as worker:
            await worker.until_ready()
            await trace.until("began")
            worker.terminate()
            assert await worker.status() == 1, worker.log.all()
        ended = time.time()
        with working(kind, place, trace) as other:
            await other.until_ready()
            again = await trace.until("began", times=2)
            trace.gate("long").touch()
            assert await over(job) == "long"
        assert await other.status() == 0, other.log.all()
    assert [each.what for each in trace.all()] == ["began", "was cut off", "began", "ended"]
    assert {each.attempt for each in trace.all()} == {1}
    assert again.pid == other.pid
    measured(f"{again.at - ended:.1f} s after the exit, start of the other worker included")


@promised(kinds=DURABLE)
async def test_kill(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """The job of a worker that is killed runs again, in another one that was there already."""
    async with kind.running(place, trace) as (engine, jobs):
        with working(kind, place, trace) as first, working(kind, place, trace) as second:
            workers = {first.pid: first, second.pid: second}
            for worker in workers.values():
                await worker.until_ready()
            job = await engine.enqueue(jobs.hold, "long")
            killed = workers[(await trace.until("began", "long")).pid]
            at = time.time()
            killed.kill()
            again = await trace.until("began", "long", times=2)
            trace.gate("long").touch()
            assert await over(job) == "long"
    assert again.pid in workers
    assert again.pid != killed.pid
    assert len(trace.all("ended", "long")) == 1
    measured(f"{again.at - at:.1f} s")


@promised(kinds=DURABLE)
async def test_random_kills(kind: Kind, place: Place, trace: Trace, measured: Measured) -> None:
    """Jobs whose workers are killed at random all run at least once, and none is lost."""
    generator = random.Random(17)
    with ExitStack() as stack:

        def add_worker() -> Worker:
            return stack.enter_context(working(kind, place, trace))

        async def enqueue_all() -> list[Job[int]]:
            return [await engine.enqueue(jobs.count, number) for number in range(NUMBER_OF_JOBS)]

        async with kind.running(place, trace, enqueue_timeout=PATIENCE) as (engine, jobs):
            workers = [add_worker(), add_worker()]
            for worker in workers:
                await worker.until_ready()
            enqueueing = asyncio.create_task(enqueue_all())
            for kill in range(NUMBER_OF_KILLS):
                done = (kill + generator.random()) * NUMBER_OF_JOBS / (NUMBER_OF_KILLS + 1)
                await trace.until("ended", times=1 + int(done), patience=3 * PATIENCE)
                workers.pop(generator.randrange(len(workers))).kill()
                workers.append(add_worker())
            for number, job in enumerate(await enqueueing):
                assert await over(job) == number
            for worker in workers:
                await worker.until_ready()
                worker.terminate()
            statuses = [await worker.status() for worker in workers]
    ended = Counter(each.label for each in trace.all("ended"))
    began = Counter(each.label for each in trace.all("began"))
    assert set(ended) == {str(number) for number in range(NUMBER_OF_JOBS)}
    assert statuses == [0, 0]
    again = sum(times > 1 for times in began.values())
    twice = sum(times > 1 for times in ended.values())
    measured(
        f"{len(ended):,} of {NUMBER_OF_JOBS:,} ran, {NUMBER_OF_KILLS} workers were killed; "
        f"{again} jobs were begun again, {twice} ran to the end more than once"
    )


# The documentation


def test_the_table_is_up_to_date() -> None:
    """The page on engines has each engine, each promise and each limit."""
    script = runpy.run_path(str(ROOT / "scripts" / "engines.py"))
    expected = script["render"](
        {test: promise.text for test, promise in PROMISES.items()},
        [kind.name for kind in DURABLE],
        {
            (test, kind.name): promise.limits.get(kind)
            for test, promise in PROMISES.items()
            for kind in promise.kinds
        },
    )
    table = script["TABLE"].read_text(encoding="utf-8").partition("\n")[2]
    assert re.sub(r"(?<=- kept):.*", "", table) == expected


def test_the_table_says_what_was_measured() -> None:
    """So readers can tell how old it is, and of how many jobs none was lost."""
    script = runpy.run_path(str(ROOT / "scripts" / "engines.py"))
    heading, _, table = script["TABLE"].read_text(encoding="utf-8").partition("\n")
    measured = re.findall(r"([A-Za-z][A-Za-z0-9-]*) \d+\.\d+", heading)
    assert {package for kind in DURABLE for package in kind.packages} <= set(measured)
    assert {"Python", "SQLite", "PostgreSQL", "Redis"} <= set(measured)
    assert table.count("1,000 of 1,000 ran") == len(DURABLE)
