"""What all engines do alike: registering, enqueueing, looking, cancelling, starting, stopping."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from fastapi_tasks import (
    EngineStateError,
    EngineUnavailableError,
    InvalidSettingError,
    InvalidTaskError,
    JobCancelledError,
    JobFailedError,
    NoResultError,
    Retry,
    Supervisor,
    TaskConfig,
    TaskStatus,
    UnregisteredFunctionError,
    engines,
    task,
)
from fastapi_tasks.config import policy_of
from fastapi_tasks.engines import Job, JobOptions, JobRecord
from fastapi_tasks.engines.execution import Executor
from fastapi_tasks.engines.messages import Message, read_message
from tests.conftest import BACKENDS
from tests.recording import let_others_run, ours

from .clocks import on_fake_clock
from .functions import fresh
from .memory import MemoryEngine


class SunkError(Exception):
    """What goes wrong in this module."""


async def ship(parcel: int, *, by: str = "sea") -> str:
    """Succeed."""
    return f"{parcel} by {by}"


def weigh(parcel: int) -> float:
    """Succeed, in a thread."""
    return parcel / 10


class SilentEngine(MemoryEngine):
    """Never answers."""

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        return await asyncio.sleep(math.inf, job_id)

    async def _record(self, job_id: str) -> JobRecord | None:
        return await asyncio.sleep(math.inf, None)

    async def _cancel(self, job_id: str) -> bool:
        return await asyncio.sleep(math.inf, False)


class ForgetfulEngine(MemoryEngine):
    """Keeps no results."""

    async def _until_over(self, job_id: str) -> JobRecord | None:
        record = await super()._until_over(job_id)
        return None if record is None else JobRecord(record.info)


@pytest.fixture
def ship_it(jobs: MemoryEngine) -> Any:
    """A registered function."""
    return jobs.task(name="ship")(fresh(ship))


# Registering


@pytest.mark.parametrize("func", [ship, weigh])
def test_a_registered_function_is_returned_unchanged(
    jobs: MemoryEngine, func: Callable[..., Any]
) -> None:
    """Bare or called; and it can still be called."""
    first, second = fresh(func), fresh(func)

    assert jobs.task(first) is first
    assert jobs.task(name="other", retry=Retry(on=SunkError), timeout=3)(second) is second
    assert jobs.names == (f"{__name__}.{func.__qualname__}", "other")
    assert jobs.name_of(second) == "other"
    assert weigh(5) == 0.5


async def test_a_plain_function_is_scheduled_in_this_process(jobs: MemoryEngine) -> None:
    """Also if it has a configuration: no engine claims it."""
    async with Supervisor(engines=[jobs]) as supervisor:
        assert await supervisor.schedule(task(shield=True)(fresh(ship)), 1).wait() == "1 by sea"
    assert jobs.rows == {}


class Scale:
    """Has a method and can be called."""

    def weigh(self, parcel: int) -> float:
        """Be a method."""

    def __call__(self, parcel: int) -> float:
        """Be a callable object."""


@pytest.mark.parametrize(
    "func",
    [Scale().weigh, Scale(), functools.partial(weigh, 1), len, int, lambda: (yield), 42],
)
def test_only_functions_can_be_registered(jobs: MemoryEngine, func: Any) -> None:
    """A worker finds them by their names, and runs nothing else."""
    with pytest.raises(InvalidTaskError):
        jobs.task(func)
    assert jobs.names == ()


def test_a_function_belongs_to_one_engine(jobs: MemoryEngine) -> None:
    """Else nobody could tell where it runs."""
    func = jobs.task(fresh(ship))

    for engine in (jobs, MemoryEngine()):
        with pytest.raises(InvalidTaskError, match="registered with an engine already"):
            engine.task(name="again")(func)


def test_a_name_belongs_to_one_function(jobs: MemoryEngine) -> None:
    """Else the worker could not tell which one to run."""
    jobs.task(fresh(ship))

    with pytest.raises(InvalidSettingError, match="no other function of the engine"):
        jobs.task(fresh(ship))


@pytest.mark.parametrize(
    ("how", "name"), [(["shop.py"], "shop.ship"), (["-m", "shop"], "shop.ship")]
)
def test_what_python_runs_is_registered_under_its_own_name(
    tmp_path: Path, how: list[str], name: str
) -> None:
    """To a worker, which imports it, it is not ``__main__``."""
    root = Path(__file__).parents[2]
    (tmp_path / "shop.py").write_text(
        "import sys\n"
        f"sys.path.append({str(root)!r})\n"
        "from tests.engines.memory import MemoryEngine\n"
        "jobs = MemoryEngine()\n"
        "@jobs.task\n"
        "def ship() -> None: ...\n"
        "print(jobs.name_of(ship))\n"
    )
    run = subprocess.run(
        [sys.executable, *how], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == name


# What an engine is made of


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("concurrency", value) for value in (0, -1, 1.5, True, "10", None)),
        *(("enqueue_timeout", value) for value in (0, -1, math.inf, True, "5", None)),
    ],
)
def test_a_setting_has_to_make_sense(setting: str, value: Any) -> None:
    """Told by its own name, when the engine is made."""
    with pytest.raises(InvalidSettingError, match=rf"^{setting}[=:]"):
        MemoryEngine(**{setting: value})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://", "memory://"),
        ("redis://ada:hunter2@cache:6379/0", "redis://ada:***@cache:6379/0"),
        ("redis://:hunter2@cache", "redis://:***@cache"),
        ("redis://ada:@cache", "redis://ada:@cache"),
        ("postgresql:///jobs?user=ada&password=hunter2&a=b", "user=ada&password=***&a=b"),
    ],
)
def test_an_engine_is_called_by_its_place_and_without_its_password(
    jobs: MemoryEngine, url: str, shown: str
) -> None:
    """Its name is in errors and logs."""
    jobs.url = url

    assert shown in str(jobs)
    assert "hunter2" not in str(jobs)


@pytest.mark.parametrize("wrong", [MemoryEngine(), [42], [MemoryEngine]])
def test_a_supervisor_takes_engines(wrong: Any) -> None:
    """A sequence of them."""
    with pytest.raises(InvalidSettingError, match=r"^engines[=:]"):
        Supervisor(engines=wrong)


# Enqueueing


async def test_a_job_is_what_was_enqueued(jobs: MemoryEngine, ship_it: Any) -> None:
    """It has an id and a name, and comes back with what the function has returned."""
    async with Supervisor(engines=[jobs]):
        job: Job[str] = await jobs.enqueue(ship_it, 3, by="air")
        assert await job.wait() == "3 by air"

        info = await job.info()
        assert (info.id, info.name, info.status) == (job.id, job.name, TaskStatus.SUCCEEDED)
        assert info == await jobs.find(job.id)
    assert re.fullmatch("[0-9a-f]{32}", job.id)
    assert repr(job) == f"<Job ship {job.id}>"


async def test_a_sync_function_runs_in_a_thread(jobs: MemoryEngine) -> None:
    """As every sync task does."""
    func = jobs.task(fresh(weigh))
    async with Supervisor(engines=[jobs]):
        assert await (await jobs.enqueue(func, 5)).wait() == 0.5


async def test_a_partial_is_enqueued_as_its_function(jobs: MemoryEngine, ship_it: Any) -> None:
    """Wherever its arguments were given."""
    partly = functools.partial(functools.partial(ship_it, 3), by="air")
    async with Supervisor(engines=[jobs]) as supervisor:
        assert await (await jobs.enqueue(partly)).wait() == "3 by air"
        job = await supervisor.schedule(partly, by="rail").wait()
        assert await job.wait() == "3 by rail"


@on_fake_clock
async def test_options_are_for_what_is_enqueued_on_them(jobs: MemoryEngine, ship_it: Any) -> None:
    """The message says when it is due, and what counts in place of the function's own."""
    async with Supervisor(engines=[jobs]):
        later = jobs.using(
            delay=timedelta(minutes=1), retry=Retry(on=SunkError, attempts=2), timeout=3
        )
        job = await later.enqueue(ship_it, 3)
        message = read_message(jobs.rows[job.id].text)
        begun = anyio.current_time()
        assert await job.wait() == "3 by sea"

    assert anyio.current_time() - begun >= 60
    assert message.due - message.created == 60
    assert message.timeout == 3
    assert message.retry is not None
    assert message.retry.attempts == 2


@pytest.mark.parametrize(("given", "travels"), [(None, None), (math.inf, 0), (2.5, 2.5)])
async def test_a_limit_of_time_can_be_taken_away(
    jobs: MemoryEngine, ship_it: Any, given: float | None, travels: float | None
) -> None:
    """JSON has no infinity."""
    async with Supervisor(engines=[jobs]):
        job = await jobs.using(timeout=given).enqueue(ship_it, 3)
        assert read_message(jobs.rows[job.id].text).timeout == travels


@on_fake_clock
async def test_a_key_lasts_as_long_as_its_job_is_remembered(
    jobs: MemoryEngine, ship_it: Any
) -> None:
    """One that is over is not begun again, though it may be handed out once more."""
    async with Supervisor(engines=[jobs]) as supervisor:
        job = await jobs.using(key="order-7").enqueue(ship_it, 1)
        await job.wait()
        jobs.queue.put_nowait(job.id)
        await anyio.sleep(1)
        assert len(supervisor.recent) == 1


async def test_a_key_makes_one_job_of_two(jobs: MemoryEngine, ship_it: Any) -> None:
    """Of the same function; another one has keys of its own."""
    other = jobs.task(fresh(weigh))
    async with Supervisor(engines=[jobs]):
        bound = jobs.using(key="order-7")
        first, second = await bound.enqueue(ship_it, 1), await bound.enqueue(ship_it, 2)
        third = await bound.enqueue(other, 3)
        assert await second.wait() == "1 by sea"

    assert first.id == second.id == "ship:order-7" != third.id


async def test_a_job_is_found_among_the_tasks_that_run(jobs: MemoryEngine) -> None:
    """By its id, also if its key ends as the ids of tasks do."""
    release = anyio.Event()

    @jobs.task
    async def hold() -> None:
        await release.wait()

    async with Supervisor(engines=[jobs]) as supervisor:
        job = await jobs.using(key="order-7").enqueue(hold)
        while not supervisor.running:
            await let_others_run()
        found = supervisor.find(job.id)
        assert found is not None
        assert found.id == job.id
        release.set()
        await job.wait()
        await let_others_run()
        assert [info.id for info in supervisor.recent] == [job.id]


@pytest.mark.parametrize(
    "options",
    [
        *({"key": key} for key in ("", 7, "a\nb", "x" * 201)),
        {"delay": -1},
        {"timeout": 0},
        {"retry": 3},
        {"retry": Retry(on=lambda error: True)},
        {"connection": object()},
    ],
)
def test_an_option_has_to_make_sense(jobs: MemoryEngine, options: dict[str, Any]) -> None:
    """Told where it is given, by its name."""
    (name,) = options
    with pytest.raises(InvalidSettingError, match=rf"^{name}[=:]"):
        jobs.using(**options)


async def test_a_function_that_is_not_registered_is_refused(jobs: MemoryEngine) -> None:
    """Also one of another engine."""
    elsewhere = MemoryEngine().task(fresh(ship))
    async with Supervisor(engines=[jobs]):
        for func in (ship, elsewhere, functools.partial(ship, 1), len):
            with pytest.raises(UnregisteredFunctionError, match=r"@engine\.task"):
                await jobs.enqueue(func, 1)


# What has become of a job


async def test_a_failed_job_tells_its_error(jobs: MemoryEngine) -> None:
    """The error itself is in the worker's log."""

    @jobs.task
    async def sink() -> None:
        raise SunkError("off the Azores")

    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(sink)
        with pytest.raises(JobFailedError) as caught:
            await job.wait()
        info = await job.info()

    assert (caught.value.error_type, caught.value.error) == ("SunkError", "off the Azores")
    assert (info.status, info.error_type) == (TaskStatus.FAILED, "SunkError")


@on_fake_clock
async def test_a_job_that_waits_can_be_cancelled(jobs: MemoryEngine, ship_it: Any) -> None:
    """It never begins; once it is over, there is nothing to cancel."""
    async with Supervisor(engines=[jobs]) as supervisor:
        job = await jobs.using(delay=60).enqueue(ship_it, 1)
        assert await job.cancel() is True
        with pytest.raises(JobCancelledError, match=job.id):
            await job.wait()
        await anyio.sleep(61)
        assert supervisor.recent == ()

        assert await job.cancel() is False
        assert await jobs.cancel(job.id) is False
        assert (await job.info()).status is TaskStatus.CANCELLED


async def test_a_job_that_nobody_knows_has_no_result(jobs: MemoryEngine) -> None:
    """It may have been forgotten: engines do not keep for ever what is over."""
    async with Supervisor(engines=[jobs]):
        job: Job[str] = Job(jobs, "5c1f", "ship")
        with pytest.raises(NoResultError, match="does not know it"):
            await job.wait()
        with pytest.raises(NoResultError, match="does not know it"):
            await job.info()
        assert await job.cancel() is False
        assert await jobs.find(job.id) is None


async def test_an_engine_may_keep_no_results() -> None:
    """Then one hears of it, and does not get ``None``."""
    jobs = ForgetfulEngine(worker=True)
    func = jobs.task(fresh(ship))
    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(func, 1)
        with pytest.raises(NoResultError, match="not kept"):
            await job.wait()


@on_fake_clock
async def test_an_engine_that_does_not_answer_is_given_up() -> None:
    """Within its own limit, and in one's own words."""
    jobs = SilentEngine(enqueue_timeout=3)
    func = jobs.task(fresh(ship))
    async with Supervisor(engines=[jobs]):
        job: Job[str] = Job(jobs, "5c1f", "ship")
        for call in (lambda: jobs.enqueue(func, 1), job.info, job.cancel):
            begun = anyio.current_time()
            with pytest.raises(EngineUnavailableError, match=r"not answer within 3 s.*timeout=30"):
                await call()
            assert anyio.current_time() - begun == pytest.approx(3)


# Its life


async def test_an_engine_that_is_not_started_says_who_starts_it(
    jobs: MemoryEngine, ship_it: Any
) -> None:
    """Before its start, and after its stop."""
    job: Job[str] = Job(jobs, "5c1f", "ship")
    calls: list[Callable[[], Any]] = [
        lambda: jobs.enqueue(ship_it, 1),
        job.wait,
        job.info,
        job.cancel,
    ]
    for _ in range(2):
        assert not jobs.is_started
        for call in calls:
            with pytest.raises(EngineStateError, match=r"add_tasks\(app, engines="):
                await call()
        async with Supervisor(engines=[jobs]):
            assert jobs.is_started
    await jobs.stop()  # once more is no harm


async def test_an_engine_serves_one_supervisor(jobs: MemoryEngine) -> None:
    """The second one is not started either, and the first one goes on."""
    async with Supervisor(engines=[jobs]):
        second = Supervisor(engines=[MemoryEngine(), jobs])
        with pytest.raises(EngineStateError, match="one engine serves one app"):
            await second.start()
        assert not second.is_running
        assert jobs.is_started


@pytest.mark.parametrize("anyio_backend", [BACKENDS[-1]])
async def test_an_engine_is_for_asyncio(jobs: MemoryEngine) -> None:
    """On trio it says so, before anything is served."""
    with pytest.raises(EngineStateError, match="trio's"):
        await Supervisor(engines=[jobs]).start()
    assert not jobs.is_started


@pytest.mark.parametrize("worker", [True, False])
async def test_what_jobs_need_is_open_while_they_may_run(worker: bool) -> None:
    """In a process that runs none, it is not opened; a job may be enqueued to begin with."""
    happened: list[str] = []

    @asynccontextmanager
    async def resources() -> AsyncGenerator[None, None]:
        await jobs.enqueue(func, 1)
        happened.append("opened")
        yield
        happened.append("closed")

    jobs = MemoryEngine(worker=worker, lifespan=resources)
    func = jobs.task(fresh(ship))
    async with Supervisor(engines=[jobs]):
        (job_id,) = jobs.rows or {""}
        if worker:
            await Job(jobs, job_id, "").info()
            happened.append("served")
        assert (jobs.executor is not None) is worker

    assert happened == (["opened", "served", "closed"] if worker else [])


async def test_a_start_that_fails_leaves_nothing_behind() -> None:
    """Whatever was begun is ended, and it can be tried once more."""
    happened: list[str] = []

    @asynccontextmanager
    async def resources() -> AsyncGenerator[None, None]:
        happened.append("opened")
        try:
            yield
        finally:
            happened.append("closed")

    class Unreachable(MemoryEngine):
        @asynccontextmanager
        async def _loop_of(self, executor: Executor) -> AsyncGenerator[None, None]:
            if len(happened) == 1:
                raise EngineUnavailableError("It", "no answer", instead="Look at it")
            async with super()._loop_of(executor):
                yield

    jobs, other = Unreachable(worker=True, lifespan=resources), MemoryEngine()
    supervisor = Supervisor(engines=[other, jobs])
    with pytest.raises(EngineUnavailableError, match="no answer"):
        await supervisor.start()

    assert happened == ["opened", "closed"]
    assert not any(each for each in (other.is_started, jobs.is_started, supervisor.is_running))
    assert jobs.executor is None
    async with supervisor:
        assert jobs.is_started


class Faulty(MemoryEngine):
    """Can neither be paused nor stopped as it should."""

    def _pause(self) -> None:
        super()._pause()
        raise SunkError("on pause")

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None, None]:
        yield
        raise SunkError("on stop")


async def test_engines_are_stopped_whatever_becomes_of_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the shutdown goes on."""
    first, second, third = MemoryEngine(worker=True), Faulty(worker=True), MemoryEngine(worker=True)

    async with Supervisor(engines=[first, second, third]):
        pass

    assert not any(engine.is_started for engine in (first, second, third))
    assert second.executor is None
    assert [r.message for r in ours(caplog) if r.exc_info] == [
        f"An engine could not be paused as it should: {second}",
        f"An engine could not be stopped as it should: {second}",
    ]


async def test_an_engine_outlives_event_loops(jobs: MemoryEngine, ship_it: Any) -> None:
    """As an app does that is started again."""

    async def serve() -> str:
        async with Supervisor(engines=[jobs]):
            jobs.queue = asyncio.Queue()
            return await (await jobs.enqueue(ship_it, 1)).wait()

    for _ in range(2):
        assert await asyncio.to_thread(asyncio.run, serve()) == "1 by sea"


# The package


def test_the_core_imports_no_engine() -> None:
    """Nor does an app pay for what engines need."""
    code = "import fastapi_tasks, sys; print(*(m for m in sys.modules if 'fastapi_tasks.e' in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert set(run.stdout.split()) == {"fastapi_tasks.errors", "fastapi_tasks.engine"}


@pytest.mark.parametrize(
    ("name", "module"),
    [("DBOSEngine", "dbos"), ("DocketEngine", "docket"), ("PgQueuerEngine", "pgqueuer")],
)
def test_an_engine_is_imported_when_it_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    """By which its package is, too."""
    stand_in = ModuleType(module)
    vars(stand_in)[name] = MemoryEngine
    monkeypatch.setitem(sys.modules, f"fastapi_tasks.engines.{module}", stand_in)

    assert name in engines.__all__
    assert getattr(engines, name) is MemoryEngine


def test_an_engine_refuses_what_is_not_its_place() -> None:
    """When it is made."""
    with pytest.raises(InvalidSettingError, match="memory://"):
        OtherPlaceEngine()


class OtherPlaceEngine(MemoryEngine):
    """Is somewhere else than it says."""

    def _check_url(self, url: object) -> None:
        super()._check_url(f"{url}elsewhere")


def test_what_engines_does_not_have_is_an_attribute_error() -> None:
    """As in every module."""
    with pytest.raises(AttributeError, match="has no attribute 'SteamEngine'"):
        engines.SteamEngine  # noqa: B018


def test_a_test_of_a_function_needs_no_engine(jobs: MemoryEngine) -> None:
    """What is registered has its configuration, as any other function."""
    func = jobs.task(name="ship", timeout=3)(fresh(ship))

    assert policy_of(func) == TaskConfig(name="ship", timeout=3)
