"""What is true of the engine on docket alone: no pickles, and what docket leaves to its users."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from fastapi_tasks import (
    EngineStateError,
    EngineUnavailableError,
    FastAPITasksError,
    InvalidSettingError,
    JobCancelledError,
    JobFailedError,
    NoResultError,
    Retry,
    Supervisor,
    Task,
    TaskStatus,
    current_task,
)
from fastapi_tasks.engines import Job
from tests.clocks import Backend

from .services import PATIENCE, REDIS, Proxy, redis_prefix

docket = pytest.importorskip("docket")
redis = pytest.importorskip("redis.asyncio")

from fastapi_tasks.engines import (  # noqa: E402 - optional packages
    DocketEngine,
    docket_attempts,
    docket_records,
    docket_screen,
    docket_wire,
    docket_worker,
)

GROUP = "docket-workers"
FUNCTION = "fastapi_tasks"
LONG = 60_000
"""Milliseconds after which a worker has been lost for sure."""


@pytest.fixture
def anyio_backend() -> Backend:
    """The event loop that engines are for."""
    return "asyncio", {}


@pytest.fixture
def prefix() -> Generator[str, None, None]:
    """What the keys of the test begin with."""
    with redis_prefix() as prefix:
        yield prefix


@pytest.fixture
async def server(prefix: str) -> AsyncGenerator[Any, None]:
    """The server, as anybody sees it who has access."""
    async with redis.Redis.from_url(REDIS) as server:
        yield server


@pytest.fixture
def proxy(prefix: str) -> Generator[Proxy, None, None]:
    """A way to the server that can be cut."""
    with closing(Proxy(REDIS)) as proxy:
        yield proxy


class Bench:
    """An engine with functions, and what they have done.

    :param prefix: the engine's name
    :param url: where it finds Redis
    """

    def __init__(self, prefix: str, url: str = REDIS, **settings: Any) -> None:
        self.engine = DocketEngine(
            url, **{"name": prefix, "worker": True, "redelivery_timeout": 1, **settings}
        )
        self.noted: list[str] = []
        self.open = asyncio.Event()

        async def handle(task: Task, error: Exception) -> None:
            self.noted.append(f"{type(error).__name__} {task.attempt}")

        @self.engine.task(name="add")
        async def add(left: int, right: int = 2) -> int:
            self.note("add")
            return left + right

        @self.engine.task(name="deadly", retry=Retry(Exception), on_error=handle)
        async def deadly() -> None:
            self.note("deadly")

        @self.engine.task(name="hold")
        async def hold() -> str:
            self.note("hold")
            current_task().set_progress(1, total=2)
            await self.open.wait()
            return "held"

        @self.engine.task(name="stubborn", retry=Retry(ValueError, wait_initial=0, wait_jitter=0))
        async def stubborn(outcome: str) -> str:
            self.note("stubborn")
            while not self.open.is_set():
                with suppress(asyncio.CancelledError):
                    await self.open.wait()
                self.note("told")
                if outcome != "stay":
                    break
            if outcome == "fail":
                raise ValueError(outcome)
            return outcome

        @self.engine.task(name="flaky", retry=Retry(ValueError, wait_initial=0.5, wait_jitter=0))
        async def flaky() -> int:
            self.note("flaky")
            if current_task().attempt == 1:
                raise ValueError("once")
            return current_task().attempt

        self.add, self.hold, self.stubborn, self.flaky = add, hold, stubborn, flaky
        self.deadly = deadly

    def note(self, what: str) -> None:
        """Note what a job does, and in which attempt."""
        self.noted.append(f"{what} {current_task().attempt}")

    def running(self, **settings: Any) -> Supervisor:
        """Start the engine on entry, and stop it on exit."""
        return Supervisor(engines=[self.engine], **settings)

    async def until_noted(self, *noted: str) -> None:
        """Wait until jobs have done all that, and nothing else."""
        await eventually(lambda: self.noted == list(noted), lambda: self.noted)


async def eventually(condition: Callable[[], Any], tell: Callable[[], object] = str) -> None:
    """Wait until something holds, in Redis or here, of which nobody tells."""
    deadline = time.monotonic() + PATIENCE
    while True:
        holds = condition()
        if isinstance(holds, Awaitable):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, tell()
        await asyncio.sleep(0.01)


async def over(job: Job[Any]) -> Any:
    """Wait for a job, but not for ever."""
    with anyio.fail_after(PATIENCE):
        return await job.wait()


async def pending(server: Any, prefix: str) -> int:
    """Return how many messages have been read, and are not done with."""
    summary = await server.xpending(f"{prefix}:stream", GROUP)
    count: int = summary["pending"]
    return count


async def lose_worker(server: Any, prefix: str, *, deliveries: int = 1) -> None:
    """Be a worker that takes a job and is killed, so many times."""
    stream = f"{prefix}:stream"
    await server.xgroup_create(stream, GROUP, id="0-0", mkstream=True)
    await server.xreadgroup(GROUP, "lost", {stream: ">"}, count=1)
    [(message_id, fields)] = await server.xrange(stream)
    await server.xclaim(stream, GROUP, "lost", 0, [message_id], idle=LONG, retrycount=deliveries)
    await server.hset(f"{prefix}:runs:{fields[b'key'].decode()}", "state", "running")


def message(**fields: bytes) -> dict[str, bytes]:
    """Return a message that is a job, but for some of its fields."""
    now = datetime.now(UTC)
    text = f'{{"name": "add", "arguments": {{"left": 1}}, "created": {now.timestamp()}, "due": 0}}'
    return {
        "key": b"job:anybody",
        "when": now.isoformat().encode(),
        "function": FUNCTION.encode(),
        "args": text.encode(),
        "kwargs": b"{}",
        "attempt": b"1",
        "generation": b"0",
        **fields,
    }


# No pickles


class Mine:
    """What makes a folder wherever it is unpickled.

    :param folder: the folder
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


async def mine_arguments(stock: Any, server: Any, mine: bytes) -> Callable[[], Awaitable[Any]]:
    """Lay it where workers find arguments."""
    await server.xadd(stock.stream_key, message(args=mine, kwargs=mine))
    await server.xadd(stock.stream_key, message(function=b"trace", args=mine, kwargs=mine))

    async def work() -> None:
        async with docket.Worker(stock) as worker:
            await worker.run_forever()

    return work


async def mine_strikes(stock: Any, server: Any, mine: bytes) -> Callable[[], Awaitable[Any]]:
    """Lay it where every process that enqueues looks for what is not to be run."""
    strike = {"direction": "strike", "function": FUNCTION, "parameter": "text", "operator": "=="}
    await server.xadd(f"{stock.name}:strikes", {**strike, "value": mine})
    return stock.wait_for_strikes_loaded  # it looks by itself


async def mine_records(stock: Any, server: Any, mine: bytes) -> Callable[[], Awaitable[Any]]:
    """Lay it where whoever asks for a job finds its arguments."""
    record = message(args=mine, kwargs=mine, when=b"0")
    await server.hset(f"{stock.name}:runs:job:anybody", mapping={**record, "state": "running"})
    return lambda: stock.get_execution("job:anybody")


async def mine_results(stock: Any, server: Any, mine: bytes) -> Callable[[], Awaitable[Any]]:
    """Lay it where whoever waits for a job finds its result."""
    await stock.result_storage.put("x", {"data": base64.b64encode(mine).decode()})
    record = {"state": "completed", "result_key": "x", **message()}
    await server.hset(f"{stock.name}:runs:job:anybody", mapping=record)

    async def ask() -> None:
        now = datetime.now(UTC)
        execution = docket.Execution(stock, asyncio.sleep, (), {}, "job:anybody", now, 1)
        await execution.get_result()

    return ask


@pytest.mark.parametrize("lay", [mine_arguments, mine_strikes, mine_records, mine_results])
async def test_pickles(lay: Any, prefix: str, server: Any, tmp_path: Path) -> None:
    """A pickle that somebody puts into Redis is loaded nowhere, though docket would load it."""
    folder = tmp_path / "made"
    async with docket.Docket(prefix, REDIS) as stock:
        loads = await lay(stock, server, pickle.dumps(Mine(folder)))
        loading = asyncio.create_task(loads())
        await eventually(folder.exists)
        loading.cancel()
        await asyncio.wait([loading])
        folder.rmdir()
        if lay is mine_arguments:
            await lay(stock, server, pickle.dumps(Mine(folder)))
    bench = Bench(prefix)
    async with bench.running():
        await bench.engine.find("anybody")
        if lay is mine_results:
            with suppress(FastAPITasksError):
                await over(Job(bench.engine, "anybody", "add"))
        assert await over(await bench.engine.enqueue(bench.add, 1)) == 3
        assert await bench.engine.cancel("anybody") is (lay is mine_records)
    assert not folder.exists()


async def test_only_json_is_written(prefix: str, server: Any) -> None:
    """What the engine itself writes holds no pickle either."""
    bench = Bench(prefix)
    async with bench.running():
        waiting = await bench.engine.using(delay=60).enqueue(bench.add, 1)
        job = await bench.engine.enqueue(bench.flaky)
        await bench.until_noted("flaky 1")
        await eventually(lambda: server.zcard(f"{prefix}:queue"))
        parked = await server.hgetall(f"{prefix}:job:{waiting.id}")
        assert await over(job) == 2
        record = await server.hgetall(f"{prefix}:runs:job:{job.id}")
        assert not await server.keys(f"{prefix}:results:*")
    for fields in (parked, record):
        assert b"arguments" in fields[b"args"]
        assert fields[b"kwargs"] == b"{}"
    assert record[b"result_key"] == b"2"


@pytest.mark.parametrize("package", ["docket", "redis"])
def test_package_is_missing(package: str) -> None:
    """Without the extra, naming the engine says what to install."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "try: from fastapi_tasks.engines import DocketEngine\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingPackageError fastapi_tasks.engines.docket needs pydocket")
    assert "fastapi-tasks[docket]" in done.stdout


# What is refused


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"function": b"sleep"}, "somebody else's"),
        ({"args": b"\xff"}, "not what it has to be"),
        ({"when": b"soon"}, "not what it has to be"),
        ({"attempt": b"first"}, "not what it has to be"),
        ({"attempt": b"0"}, "none of ours"),
        ({"key": b"stream"}, "none of ours"),
        ({"generation": b""}, "not what it has to be"),
        ({"args": b"{}"}, "MalformedMessageError"),
        ({"args": message()["args"].replace(b"add", b"gone")}, "UnregisteredFunctionError"),
        ({"args": message()["args"].replace(b"1", b"null", 1)}, "InvalidArgumentsError"),
    ],
)
async def test_refused(
    fields: dict[str, bytes], problem: str, prefix: str, server: Any, caplog: Any
) -> None:
    """What is no job is set aside with the reason, and the worker lives on."""
    bench = Bench(prefix)
    async with bench.running():
        await server.xadd(f"{prefix}:stream", message(**fields))
        await eventually(lambda: server.xlen(f"{prefix}:refused"))
        await eventually(lambda: is_done(server, prefix))
        assert await over(await bench.engine.enqueue(bench.add, 1)) == 3
    [(_, refused)] = await server.xrange(f"{prefix}:refused")
    assert problem in refused[b"refused"].decode()
    assert refused[b"args"] == message(**fields)["args"] or "args" not in fields
    assert bench.noted == ["add 1"]
    assert "refused" in caplog.text


async def is_done(server: Any, prefix: str) -> bool:
    """Return whether no message is left."""
    return not await server.xlen(f"{prefix}:stream") and not await pending(server, prefix)


async def test_refused_without_a_field(prefix: str, server: Any) -> None:
    """A message may have nothing of a job at all."""
    async with Bench(prefix).running():
        await server.xadd(f"{prefix}:stream", {"hello": "world"})
        await eventually(lambda: server.xlen(f"{prefix}:refused"))
    [(_, refused)] = await server.xrange(f"{prefix}:refused")
    assert refused == {b"hello": b"world", b"refused": refused[b"refused"]}
    assert b"the field function is missing" in refused[b"refused"]


async def test_refused_with_a_record(prefix: str, server: Any) -> None:
    """Whoever waits for a job whose message was spoilt is told."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix)
    async with producer.running():
        job = await producer.engine.enqueue(producer.add, 1)
        [(message_id, fields)] = await server.xrange(f"{prefix}:stream")
        await server.xdel(f"{prefix}:stream", message_id)
        await server.xadd(f"{prefix}:stream", {**fields, b"attempt": b"second"})
        async with worker.running():
            with pytest.raises(JobFailedError, match="MalformedMessageError: That is no job"):
                await over(job)
            assert await is_done(server, prefix)
    assert worker.noted == []


async def test_unreadable_records(prefix: str, server: Any) -> None:
    """A record that is none is not known, and one with a spoilt message still tells its end."""
    bench = Bench(prefix, worker=False)
    async with bench.running():
        await server.hset(f"{prefix}:runs:job:none", "hello", "world")
        assert await bench.engine.find("none") is None
        spoilt = {"state": "failed", "args": "{", "when": "1.5", "error": "OSError: a: b"}
        await server.hset(f"{prefix}:runs:job:spoilt", mapping=spoilt)
        info = await bench.engine.find("spoilt")
    assert info is not None
    assert (info.name, info.created) == ("(unreadable)", datetime.fromtimestamp(1.5, UTC))
    assert (info.error_type, info.error) == ("OSError", "a: b")


# Attempts


@pytest.mark.parametrize(("deliveries", "attempt"), [(1, 2), (2, 3)])
async def test_attempts_across_crashes(
    deliveries: int, attempt: int, prefix: str, server: Any
) -> None:
    """An attempt that a worker did not survive counts."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix)
    async with producer.running():
        job = await producer.engine.enqueue(producer.add, 1)
        await lose_worker(server, prefix, deliveries=deliveries)
        async with worker.running():
            assert await over(job) == 3
        assert (await job.info()).attempt == attempt
    assert worker.noted == [f"add {attempt}"]


@pytest.mark.parametrize("deliveries", [2, 3])
async def test_delivery_limit(deliveries: int, prefix: str, server: Any) -> None:
    """A job that no worker survives fails, and its error handler runs, if need be once more."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix, max_deliveries=2)
    async with producer.running():
        job = await producer.engine.enqueue(producer.deadly)
        await lose_worker(server, prefix, deliveries=deliveries)
        async with worker.running():
            with pytest.raises(JobFailedError, match=rf"WorkerLostError: Of the {deliveries} w"):
                await over(job)
            assert await is_done(server, prefix)
            assert (await job.info()).attempt == 2
            assert await over(await producer.engine.enqueue(producer.deadly)) is None
    assert worker.noted == ["WorkerLostError 2", "deadly 1"]


async def test_delivery_limit_of_the_error_handler(
    prefix: str, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A job whose error handler no worker survives either comes to an end, too."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix, max_deliveries=2)
    async with producer.running():
        job = await producer.engine.enqueue(producer.deadly)
        await lose_worker(server, prefix, deliveries=4)
        async with worker.running():
            with pytest.raises(JobFailedError, match="WorkerLostError: Of the 4 workers"):
                await over(job)
            assert await is_done(server, prefix)
    assert worker.noted == []
    assert f"Job {job.id} has failed, and so did its error handler" in caplog.text


async def test_delivery_limit_outlives_a_shutdown(
    prefix: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no worker survives is not run again since a worker ended before the error handler."""
    producer = Bench(prefix, worker=False)
    first, second = (Bench(prefix, max_deliveries=1) for _ in range(2))
    begin = docket_attempts.Attempts._begin

    async def begin_and_stop(self: docket_attempts.Attempts, execution: Any) -> Any:
        first.engine.pause()
        return await begin(self, execution)

    async with producer.running():
        job = await producer.engine.enqueue(producer.deadly)
        await lose_worker(server, prefix)
        with monkeypatch.context() as patch:
            patch.setattr(docket_attempts.Attempts, "_begin", begin_and_stop)
            async with first.running():
                await eventually(lambda: server.hexists(f"{prefix}:runs:job:{job.id}", "attempt"))
        async with second.running():
            with pytest.raises(JobFailedError, match="WorkerLostError"):
                await over(job)
    assert first.noted + second.noted == ["WorkerLostError 1"]


async def test_backoff_is_in_redis(prefix: str, server: Any) -> None:
    """The wait before a further attempt outlives the worker."""
    first, second = Bench(prefix), Bench(prefix)
    async with first.running():
        job = await first.engine.enqueue(first.flaky)
        await eventually(lambda: server.zcard(f"{prefix}:queue"))
        info = await job.info()
        assert (info.status, info.attempt) == (TaskStatus.PENDING, 1)
        assert await is_done(server, prefix)
    async with second.running():
        assert await over(Job(second.engine, job.id, "flaky")) == 2
    assert first.noted + second.noted == ["flaky 1", "flaky 2"]


async def test_shutdown_burns_no_attempt(prefix: str, server: Any) -> None:
    """A job that is cut off is taken by another worker at once, as the same attempt."""
    first, second = (Bench(prefix, redelivery_timeout=60) for _ in range(2))
    second.open.set()
    async with first.running():
        job = await first.engine.enqueue(first.hold)
        await first.until_noted("hold 1")
        await eventually(lambda: server.hexists(f"{prefix}:runs:job:{job.id}", "progress"))
        progress = (await job.info()).progress
    assert progress is not None
    assert (progress.done, progress.total) == (1, 2)
    assert await is_done(server, prefix) is False
    assert await pending(server, prefix) == 0
    async with second.running():
        assert await over(Job(second.engine, job.id, "hold")) == "held"
    assert second.noted == ["hold 1"]


async def test_abandoned_jobs(prefix: str, server: Any) -> None:
    """A job that does not let itself be cut off is run elsewhere too, as it was abandoned."""
    first, second = (Bench(prefix, redelivery_timeout=60) for _ in range(2))
    async with first.running(shutdown_timeout=0.2):
        job = await first.engine.enqueue(first.stubborn, "stay")
        await first.until_noted("stubborn 1")
    second.open.set()
    async with second.running():
        assert await over(Job(second.engine, job.id, "stubborn")) == "stay"
    assert second.noted == ["stubborn 1"]
    first.open.set()
    await first.until_noted("stubborn 1", "told 1", "told 1")


async def test_read_in_the_last_moment(
    prefix: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is read while the worker stops is put back, and not begun."""
    first, second = (Bench(prefix, redelivery_timeout=60) for _ in range(2))
    begin = docket_attempts.Attempts._begin

    async def begin_and_stop(self: docket_attempts.Attempts, execution: Any) -> Any:
        first.engine.pause()
        return await begin(self, execution)

    with monkeypatch.context() as patch:
        patch.setattr(docket_attempts.Attempts, "_begin", begin_and_stop)
        async with first.running():
            job = await first.engine.enqueue(first.add, 1)
            await eventually(lambda: server.hexists(f"{prefix}:runs:job:{job.id}", "attempt"))
    async with second.running():
        assert await over(Job(second.engine, job.id, "add")) == 3
    assert first.noted + second.noted == ["add 1"]


async def test_leases_while_stopping(
    prefix: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is waited for at a shutdown is not taken over, however long that takes.

    Others take over what is old, and here it is made so; docket would renew it in minutes only.
    """
    monkeypatch.setattr(docket_worker, "_RENEWALS", 60_000)
    bench = Bench(prefix, redelivery_timeout=600)
    stream = f"{prefix}:stream"

    async def lease() -> Any:
        (held,) = await server.xpending_range(stream, GROUP, "-", "+", 1)
        return held

    async def is_renewed() -> bool:
        renewed = await lease()
        assert (renewed["consumer"], renewed["times_delivered"]) == (held["consumer"], 1)
        return bool(renewed["time_since_delivered"] < LONG)

    async with bench.running(grace=PATIENCE, shutdown_timeout=2 * PATIENCE):
        job = await bench.engine.enqueue(bench.hold)
        await bench.until_noted("hold 1")
        bench.engine.pause()
        held = await lease()
        name, message_ids = held["consumer"], [held["message_id"]]
        await server.xclaim(stream, GROUP, name, 0, message_ids, idle=LONG, justid=True)
        await eventually(is_renewed)
        bench.open.set()
        assert await over(job) == "held"
    assert await pending(server, prefix) == 0
    assert bench.noted == ["hold 1"]


# Cancelling


async def test_cancel_is_kept_for_the_next_worker(prefix: str, server: Any) -> None:
    """A job that is cancelled while its worker is lost never runs again."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix)
    async with producer.running():
        job = await producer.engine.enqueue(producer.add, 1)
        await lose_worker(server, prefix)
        assert await job.cancel()
        assert (await job.info()).status is TaskStatus.RUNNING
        async with worker.running():
            with pytest.raises(JobCancelledError):
                await over(job)
    assert worker.noted == []


@pytest.mark.parametrize(
    ("outcome", "status"), [("succeed", TaskStatus.SUCCEEDED), ("fail", TaskStatus.FAILED)]
)
async def test_cancel_is_swallowed(outcome: str, status: TaskStatus, prefix: str) -> None:
    """A job that makes nothing of its cancellation ends as it does, but is not tried again."""
    bench = Bench(prefix)
    async with bench.running():
        job = await bench.engine.enqueue(bench.stubborn, outcome)
        await bench.until_noted("stubborn 1")
        assert await job.cancel()
        with suppress(JobFailedError):
            assert await over(job) == outcome
        assert (await job.info()).status is status
        assert not await job.cancel()
    assert bench.noted == ["stubborn 1", "told 1"]


async def test_cancel_is_not_heard(prefix: str, server: Any) -> None:
    """A job that fails before the worker hears of its cancellation is not tried again."""
    bench = Bench(prefix)
    async with bench.running():
        job = await bench.engine.enqueue(bench.stubborn, "fail")
        await bench.until_noted("stubborn 1")
        await server.hset(f"{prefix}:runs:job:{job.id}", docket_records.CANCELLING, "1")
        bench.open.set()
        with pytest.raises(JobCancelledError):
            await over(job)
    assert bench.noted == ["stubborn 1", "told 1"]


async def test_cancel_in_backoff(prefix: str, server: Any) -> None:
    """A job that waits for its next attempt does not make it."""
    bench = Bench(prefix)
    async with bench.running():
        job = await bench.engine.enqueue(bench.flaky)
        await eventually(lambda: server.zcard(f"{prefix}:queue"))
        assert await job.cancel()
        with pytest.raises(JobCancelledError):
            await over(job)
        assert not await server.zcard(f"{prefix}:queue")


async def test_cancel_of_nothing_leaves_nothing(prefix: str, server: Any) -> None:
    """Cancelling what there is not makes no record of it."""
    bench = Bench(prefix, worker=False)
    async with bench.running():
        assert not await bench.engine.cancel("nobody")
        assert await server.keys(f"{prefix}:*") == []


# Results, keys and waiting


async def test_results_expire(prefix: str, server: Any) -> None:
    """What was kept is gone in time, with all that there was of the job."""
    bench = Bench(prefix, keep=timedelta(seconds=1))
    async with bench.running():
        job = await bench.engine.enqueue(bench.add, 1)
        assert await over(job) == 3
        other = await bench.engine.enqueue(bench.flaky)
        await other.cancel()
        await eventually(lambda: has_no(server, f"{prefix}:*job:*"))
        with pytest.raises(NoResultError):
            await over(job)
        assert await bench.engine.find(job.id) is None
    left = {key.decode().removeprefix(prefix) for key in await server.keys(f"{prefix}*")}
    assert left <= {":stream", ":workers", ":leases:redelivery-sweep"}


async def has_no(server: Any, pattern: str) -> bool:
    """Return whether there is no such key."""
    return not await server.keys(pattern)


async def test_many_at_once(prefix: str) -> None:
    """More calls at once than there are connections wait for them."""
    bench = Bench(prefix, concurrency=20, redelivery_timeout=30, enqueue_timeout=PATIENCE)
    async with bench.running():
        jobs = await asyncio.gather(*(bench.engine.enqueue(bench.add, n) for n in range(120)))
        assert await asyncio.gather(*map(over, jobs)) == [n + 2 for n in range(120)]
    assert len(bench.noted) == 120


async def test_keys_of_any_kind(prefix: str) -> None:
    """No key of a user's is one of docket's own, and none is cut short."""
    bench = Bench(prefix)
    async with bench.running():
        for key in ("stream", "queue", "runs:job:x", "a b", "*", "ключ", '"'):
            job = await bench.engine.using(key=key, delay=0.01).enqueue(bench.add, 1)
            assert job.id == f"add:{key}"
            assert await over(job) == 3


async def test_far_future(prefix: str, server: Any) -> None:
    """What is to wait longer than dates go waits as long as they go."""
    bench = Bench(prefix, worker=False)
    async with bench.running():
        job = await bench.engine.using(delay=1e12).enqueue(bench.add, 1)
        assert (await job.info()).status is TaskStatus.PENDING
        assert await server.zcard(f"{prefix}:queue") == 1


async def test_waiting_without_news(
    proxy: Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for a job looks now and then by itself, and listens again when it can."""
    caplog.set_level(logging.DEBUG, "fastapi_tasks")
    monkeypatch.setattr(docket_records, "_LOOK_EVERY", 0.05)
    bench, producer = Bench(prefix), Bench(prefix, proxy.url, worker=False)
    record, looked = producer.engine._record, set()

    async def look(job_id: str) -> Any:
        found = await record(job_id)
        looked.add(job_id)
        return found

    monkeypatch.setattr(producer.engine, "_record", look)
    async with bench.running(), producer.running():
        jobs = [await producer.engine.enqueue(producer.hold) for _ in range(2)]
        results = [asyncio.create_task(over(job)) for job in jobs]
        await bench.until_noted("hold 1", "hold 1")
        await eventually(lambda: len(looked) == 2)
        with proxy.refusing():
            await eventually(lambda: "tells no news" in caplog.text)
        bench.open.set()
        assert await asyncio.gather(*results) == ["held", "held"]


async def test_waiting_without_redis(proxy: Proxy, prefix: str) -> None:
    """Who begins to wait for a job is told that Redis is gone."""
    producer = Bench(prefix, proxy.url, worker=False, enqueue_timeout=1.0)
    async with producer.running():
        job = await producer.engine.enqueue(producer.hold)
        with proxy.refusing(), pytest.raises(EngineUnavailableError, match="redis://127"):
            await over(job)


async def test_waiting_when_the_engine_stops(prefix: str) -> None:
    """Nobody waits for ever for what will never be told."""
    producer = Bench(prefix, worker=False)
    async with producer.running():
        job = await producer.engine.enqueue(producer.hold)
        waiting = asyncio.create_task(over(job))
        await eventually(lambda: asyncio.sleep(0, producer.engine._waiters._listening))
    with pytest.raises(EngineStateError, match="was stopped"):
        await waiting


# Outages


@pytest.fixture(params=["refusing", "silent"])
def outage(request: pytest.FixtureRequest) -> str:
    """In which way Redis is gone."""
    name: str = request.param
    return name


async def test_start_without_redis(proxy: Proxy, prefix: str, outage: str) -> None:
    """An app does not start without Redis, and says so in time; later it does."""
    bench = Bench(prefix, proxy.url, enqueue_timeout=0.5)
    with getattr(proxy, outage)():
        with pytest.raises(EngineUnavailableError, match=r'DocketEngine\("redis://127'):
            await bench.running().start()
        assert not bench.engine.is_started
    async with bench.running():
        assert bench.engine.is_started


async def test_enqueue_without_redis(proxy: Proxy, prefix: str, outage: str) -> None:
    """Enqueueing fails in time, and works as soon as Redis is back."""
    bench = Bench(prefix, proxy.url, enqueue_timeout=0.5)
    async with bench.running():
        with getattr(proxy, outage)(), pytest.raises(EngineUnavailableError):
            await bench.engine.enqueue(bench.add, 1)
        assert await over(await bench.engine.using(key="back").enqueue(bench.add, 1)) == 3


async def test_wrong_password(prefix: str) -> None:
    """Redis does not let everybody in, and the password is not shown."""
    bench = Bench(prefix, REDIS.replace("://", "://nobody:hunter2@"))
    with pytest.raises(EngineUnavailableError, match="password") as caught:
        await bench.running().start()
    assert "hunter2" not in str(caught.value)


async def test_job_that_outlasts_an_outage(
    proxy: Proxy, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that ends while Redis is gone is stored when it is back, and does not run again."""
    caplog.set_level(logging.INFO, "docket")
    bench = Bench(prefix, proxy.url, redelivery_timeout=10)
    async with bench.running():
        short = await bench.engine.enqueue(bench.hold)
        long = await bench.engine.enqueue(bench.stubborn, "stay")
        await eventually(lambda: sorted(bench.noted) == ["hold 1", "stubborn 1"])
        with proxy.refusing():
            await eventually(lambda: "so no jobs are taken" in caplog.text)
            bench.open.set()
            await eventually(lambda: "cannot be stored yet" in caplog.text)
        assert await over(short) == "held"
        assert await over(long) == "stay"
        await eventually(lambda: "can be reached again" in caplog.text)
    assert len(bench.noted) == 3
    assert "docket" not in {record.name.partition(".")[0] for record in caplog.records}


async def test_jobs_are_taken_while_one_runs(proxy: Proxy, prefix: str) -> None:
    """After an outage other jobs run, though one is not over that ran before it."""
    bench = Bench(prefix, proxy.url)
    async with bench.running():
        running = await bench.engine.enqueue(bench.hold)
        await bench.until_noted("hold 1")
        proxy.cut()
        job = await bench.engine.enqueue(bench.add, 1)
        assert await over(job) == 3
        bench.open.set()
        assert await over(running) == "held"
    assert bench.noted == ["hold 1", "add 1"]


async def test_job_that_outlasts_its_lease(
    proxy: Proxy, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If Redis is gone for longer, a job that has ended meanwhile runs again."""
    bench = Bench(prefix, proxy.url, enqueue_timeout=1.0)
    async with bench.running():
        job = await bench.engine.enqueue(bench.hold)
        await bench.until_noted("hold 1")
        with proxy.refusing():
            bench.open.set()
            await eventually(lambda: caplog.text.count("cannot be stored yet") >= 2)
            await eventually(lambda: "leases of jobs could not be renewed" in caplog.text)
            assert bench.engine._docket_worker is not None
            attempts = bench.engine._docket_worker._attempts
            await eventually(lambda: not attempts.message_ids)
        assert await over(job) == "held"
        assert (await job.info()).attempt == 2
    assert bench.noted == ["hold 1", "hold 2"]


@pytest.mark.parametrize("is_busy", [False, True])
async def test_stop_without_redis(
    is_busy: bool, outage: str, proxy: Proxy, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An app stops in time without Redis too, and what it could not store runs again."""
    first, second = Bench(prefix, proxy.url, enqueue_timeout=0.5), Bench(prefix)
    async with first.running():
        job = await first.engine.enqueue(first.hold)
        await first.until_noted("hold 1")
        if not is_busy:
            first.open.set()
            await over(job)
        gone = getattr(proxy, outage)()
        gone.__enter__()
    gone.__exit__(None, None, None)
    assert ("jobs cannot be stored" in caplog.text) or not is_busy
    second.open.set()
    async with second.running():
        assert await over(Job(second.engine, job.id, "hold")) == "held"
    assert second.noted == (["hold 2"] if is_busy else [])


# docket's worker


async def test_worker_that_fails(
    prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If docket's worker fails, or returns, it is started again, and the log says so."""
    monkeypatch.setattr(docket_worker, "_RESTART_AFTER", 0.01)
    run_forever = docket.Worker.run_forever
    ends = [RuntimeError("a bug"), None]

    async def run(self: Any) -> None:
        if not ends:
            await run_forever(self)
        elif (end := ends.pop(0)) is not None:
            raise end

    monkeypatch.setattr(docket.Worker, "run_forever", run)
    bench = Bench(prefix)
    async with bench.running():
        assert await over(await bench.engine.enqueue(bench.add, 1)) == 3
    assert caplog.text.count("The worker has failed, and begins again") == 2
    assert "a bug" in caplog.text
    assert "docket's worker has returned" in caplog.text


async def test_job_that_cannot_be_run(
    prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that is not the job's, but ours, has the job end as failed."""
    bench = Bench(prefix)
    async with bench.running():
        with monkeypatch.context() as patch:
            patch.setattr(type(bench.engine.executor), "run", None)
            with pytest.raises(JobFailedError, match="TypeError"):
                await over(await bench.engine.enqueue(bench.add, 1))
        assert await over(await bench.engine.enqueue(bench.add, 1)) == 3
    assert "could not be run" in caplog.text


async def test_worker_that_is_cancelled(prefix: str, server: Any) -> None:
    """If somebody cancels what docket runs while it stops, the job runs again elsewhere."""
    first, second = Bench(prefix), Bench(prefix)
    second.open.set()
    async with first.running(grace=PATIENCE, shutdown_timeout=2 * PATIENCE):
        job = await first.engine.enqueue(first.hold)
        await first.until_noted("hold 1")
        first.engine.pause()
        await eventually(lambda: not docket_tasks(prefix, "scheduler"))
        [task] = docket_tasks(prefix, f"task:job:{job.id}")
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert await pending(server, prefix) == 1
    async with second.running():
        assert await over(Job(second.engine, job.id, "hold")) == "held"
    assert second.noted == ["hold 2"]


def docket_tasks(prefix: str, name: str) -> list[asyncio.Task[Any]]:
    """Return those that docket has called so."""
    return [task for task in asyncio.all_tasks() if task.get_name() == f"{prefix} - {name}"]


async def test_consumers_are_forgotten(
    prefix: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis keeps no list of all the workers that there ever were."""
    producer, worker = Bench(prefix, worker=False), Bench(prefix)
    stream = f"{prefix}:stream"
    async with producer.running():
        await producer.engine.enqueue(producer.add, 1)
        await lose_worker(server, prefix)
        await server.xgroup_createconsumer(stream, GROUP, "idle")
        async with worker.running():
            await eventually(lambda: is_done(server, prefix))
        names = {each["name"] for each in await server.xinfo_consumers(stream, GROUP)}
        assert names == {b"lost", b"idle"}  # they may be there
        monkeypatch.setattr(docket_worker, "_FORGOTTEN_AFTER", -1)
        async with worker.running():
            await eventually(lambda: has_consumers(server, prefix, 0))
            await over(await producer.engine.enqueue(producer.add, 1))
            assert await has_consumers(server, prefix, 1)
    assert await server.xinfo_consumers(stream, GROUP) == []


async def has_consumers(server: Any, prefix: str, number: int) -> bool:
    """Return whether Redis knows so many workers."""
    return len(await server.xinfo_consumers(f"{prefix}:stream", GROUP)) == number


async def test_message_that_is_done_with_meanwhile(prefix: str) -> None:
    """What was taken over is left alone if its worker has ended it in this moment."""

    class Late:
        """A server on which it ends between the two questions."""

        async def xautoclaim(self, *args: Any, **kwargs: Any) -> Any:
            return b"0-0", [(b"1-0", {b"key": b"job:x"}), (b"2-0", None)], []

        async def xpending_range(self, *args: Any, min: bytes, **kwargs: Any) -> Any:
            pending = [{"message_id": b"2-0", "times_delivered": 2}]
            return pending if min == b"2-0" else []

    stock = docket_wire.JSONDocket(prefix, REDIS, keep=1, max_deliveries=1)
    screened = docket_screen.ScreenedRedis(Late(), stock)
    assert await screened.xautoclaim(start_id=b"0-0") == [b"0-0", []]


# Settings


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"url": "http://ada:hunter2@localhost"}, "url"),
        ({"url": "redis://ada:hunter2@localhost/?max_connections=many"}, "url"),
        ({"url": 6379}, "url"),
        ({"name": "a:b"}, "name"),
        ({"name": "*"}, "name"),
        ({"name": None}, "name"),
        ({"max_deliveries": 0}, "max_deliveries"),
        ({"max_deliveries": True}, "max_deliveries"),
        ({"max_deliveries": 1.5}, "max_deliveries"),
        ({"keep": 0.5}, "keep"),
        ({"keep": "1h"}, "keep"),
        ({"redelivery_timeout": timedelta(0)}, "redelivery_timeout"),
    ],
)
def test_settings(settings: dict[str, Any], setting: str) -> None:
    """A setting that cannot work is refused, and the right one is shown."""
    with pytest.raises(InvalidSettingError, match="Write for example") as caught:
        DocketEngine(**{"url": "redis://localhost", **settings})
    assert caught.value.setting == setting
    assert "hunter2" not in str(caught.value)


async def test_url_options_are_kept(prefix: str, server: Any) -> None:
    """What the address says of connections is what counts, for calls at once too."""
    bench = Bench(prefix, f"{REDIS}?max_connections=23&client_name={prefix}", concurrency=5)
    async with bench.running():
        jobs = await asyncio.gather(*(bench.engine.enqueue(bench.add, n) for n in range(50)))
        assert len(await asyncio.gather(*map(over, jobs))) == 50
        names = [each["name"] for each in await server.client_list()]
    assert 1 <= names.count(prefix) <= 3 * 23  # docket has three pools
