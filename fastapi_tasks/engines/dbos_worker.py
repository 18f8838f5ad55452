"""The jobs that DBOS hands out to this process, on their way to the event loop of the app.

DBOS runs workflows in a thread and an event loop of its own. There is one workflow, whose steps
are a job's attempts: what has come of a step is recorded, and is not done again after a crash.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NoReturn, cast

import anyio.to_thread
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from fastapi_tasks.errors import EngineStateError, EngineUnavailableError
from fastapi_tasks.observer import logger

from .dbos_records import JobError, noted_start
from .dbos_slots import Slots
from .dbos_store import WORKFLOW, Store
from .execution import Again, Cancelled, Executor, Failed, Interrupted, Succeeded

__all__ = ["Worker"]

_NOT_HERE = "not here"  # the job was cancelled, or is left to another process
_STORING = 10.0  # seconds to write what has come of jobs that ended while the app was shut down
_ENDING = 1.0  # seconds for attempts whose tasks are over to come to their own ends

_claim = Lock()
_workers: list[Worker] = []


class Worker:
    """The one of this process, as there is one DBOS in it.

    :param store: the database
    :param slots: by what this process is told from others
    :param executor: runs the jobs
    :param concurrency: how many of them at once
    :param polling: seconds between two questions for jobs that wait
    :param max_recoveries: how often a job is begun again whose process has died
    :param on_over: is told of each job that has ended here, in the event loop
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        executor: Executor,
        *,
        concurrency: int,
        polling: float,
        max_recoveries: int,
        on_over: Callable[[], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._executor = executor
        self._concurrency = concurrency
        self._polling = polling
        self._max_recoveries = max_recoveries
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._is_paused = False
        self._attempts: set[asyncio.Task[Any]] = set()
        self._unstored: set[str] = set()
        self._is_stored = asyncio.Event()

    async def start(self) -> None:
        """Take the place of this process among the others, and jobs.

        :raises EngineStateError: DBOS runs in this process already
        :raises EngineUnavailableError: the database cannot be reached
        """
        await self._store.call(self._launch, abandon=False)

    def pause(self) -> None:
        """Begin no more jobs."""
        # DBOS takes none once it has as many as run at once; those that come now are held.
        self._is_paused = True

    async def stop(self) -> None:
        """Leave when what has come of all jobs is stored; give those back that were cut off."""
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=_ENDING)
        try:
            async with asyncio.timeout(_STORING):
                while self._unstored:
                    self._is_stored.clear()
                    await self._is_stored.wait()
        except TimeoutError:
            logger.error(
                "What has come of %d jobs could not be stored: they will run again",
                len(self._unstored),
            )
        executor_id = self._slots.executor_id
        await anyio.to_thread.run_sync(_destroy)
        try:
            left = await self._store.running_on(executor_id)
            await self._store.give_back([row.workflow_id for row in left])
        except EngineUnavailableError as error:
            logger.warning(
                "Jobs that were cut off wait for the next start, or another process: %s", error
            )
        finally:
            await self._store.call(self._slots.release, abandon=False)

    async def look_after_others(self) -> None:
        """Take over the jobs of processes that have died.

        :raises EngineUnavailableError: the database cannot be reached
        """
        if not await self._store.call(self._slots.is_held):
            logger.error(
                "Another process has taken the place of this one (%s) while it had no connection "
                "to the database: jobs may run twice. Restart this one",
                self._slots.executor_id,
            )
        mine = self._slots.executor_id
        others = {row.executor_id for row in await self._store.running_on()} - {mine, None}
        for executor_id in cast("set[str]", others):
            await self._store.call(self._adopt, executor_id)

    def _adopt(self, executor_id: str) -> None:
        with self._slots.adopting(executor_id) as is_dead:
            if is_dead:
                # The public way to give a job back forgets how often it has killed a process.
                DBOS._recover_pending_workflows([executor_id])  # pyright: ignore[reportPrivateUsage]
                logger.warning("The jobs of a process that has died (%s) run again", executor_id)

    # In a thread of its own, as DBOS would else run workflows in the event loop of the app.

    def _launch(self) -> None:
        executor_id = self._slots.take()
        try:
            self._store.register_queue(self._concurrency, self._polling)
            with self._as_the_worker():
                _launch(self._config(executor_id), self._max_recoveries)
        except BaseException:
            self._slots.release()
            raise

    def _config(self, executor_id: str) -> DBOSConfig:
        config: DBOSConfig = {
            "name": self._store.name,
            "serializer": DBOSPortableJSONSerializer(),
            "application_version": self._store.version,
            "executor_id": executor_id,
            "log_level": "WARNING",
            "enable_otlp": False,
            # Nothing is scheduled by it, and a stop waits for the next of these moments.
            "scheduler_polling_interval_sec": 3600.0,
            "notification_listener_polling_interval_sec": 0.1,
        }
        if self._store.engine is None:
            config["system_database_url"] = self._store.address.url
        else:
            config["system_database_engine"] = self._store.engine
        return config

    @contextmanager
    def _as_the_worker(self) -> Generator[None, None, None]:
        with _claim:
            if _workers:
                raise EngineStateError(
                    f"{self._store.label} cannot run jobs here, as another DBOSEngine of this "
                    "process does, and there is one DBOS in a process",
                    instead="worker=False in one of the two, and a process of its own for its jobs",
                )
            _workers.append(self)
        try:
            yield
        except BaseException:
            _workers.clear()
            raise

    # In the event loop of DBOS.

    async def run(self, job_id: str, text: str) -> str:
        """Make all attempts of a job, and return what its function has returned, as JSON."""
        running = cast("asyncio.Task[Any]", asyncio.current_task())
        running.add_done_callback(lambda _: self._in_loop(self._note_over, job_id))
        attempt = 1
        while True:
            told = await DBOS.run_step_async(
                {"name": "attempt", "preemptible": True}, self._attempt, job_id, text, attempt
            )
            if "result" in told:
                return cast(str, told["result"])
            if "error" in told:
                raise JobError(told["error_type"], told["error"])
            self._in_loop(self._note_stored, job_id)
            await DBOS.sleep_async(told["wait"])
            attempt += 1

    async def _attempt(self, job_id: str, text: str, attempt: int) -> dict[str, Any]:
        future = asyncio.run_coroutine_threadsafe(self._execute(job_id, text, attempt), self._loop)
        told = await asyncio.wrap_future(future)
        if told is None:
            await _until_the_end()
        elif _NOT_HERE in told:
            raise asyncio.CancelledError
        return told

    def _in_loop(self, func: Callable[[str], None], job_id: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(func, job_id)

    # In the event loop of the app.

    async def _execute(self, job_id: str, text: str, attempt: int) -> dict[str, Any] | None:
        """Make one attempt, and return what is recorded; ``None``: nothing, and the app ends."""
        if self._is_paused:
            return None
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)
        outcome = await self._executor.run(
            job_id, text, attempt=attempt, store_progress=partial(self._store.note_progress, job_id)
        )
        if isinstance(outcome, Cancelled):
            return {_NOT_HERE: True}
        if isinstance(outcome, Interrupted):
            return await self._interrupted(job_id)
        self._unstored.add(job_id)
        if isinstance(outcome, Succeeded):
            return {"result": outcome.result}
        if isinstance(outcome, Failed):
            return {"error_type": outcome.error_type, "error": outcome.error}
        await self._note_failure(job_id, attempt, outcome)
        return {"wait": outcome.wait}

    async def _interrupted(self, job_id: str) -> dict[str, Any] | None:
        if self._is_paused:
            return None
        await self._store.give_back([job_id])
        return {_NOT_HERE: True}

    async def _note_failure(self, job_id: str, attempt: int, outcome: Again) -> None:
        due = time.time() + outcome.wait
        try:
            row = await self._store.row(job_id)
            started = {} if row is None else noted_start(row)
            await self._store.note(job_id, **started, attempt=attempt, due=due, progress=None)
        except EngineUnavailableError as error:
            logger.warning("That job %s waits could not be noted: %s", job_id, error)

    def _note_stored(self, job_id: str) -> None:
        self._unstored.discard(job_id)
        self._is_stored.set()

    def _note_over(self, job_id: str) -> None:
        self._note_stored(job_id)
        self._on_over()


async def _run(*args: Any, **kwargs: Any) -> str:
    """Do what every job's workflow does, whatever somebody has given it for arguments."""
    (worker,) = _workers
    job_id = DBOS.workflow_id
    assert job_id is not None
    text = args[0] if len(args) == 1 and not kwargs else None
    return await worker.run(job_id, text if isinstance(text, str) else "")


async def _until_the_end() -> NoReturn:
    """Hold a job until DBOS is destroyed: it is no other process's as long as this one has it."""
    while True:
        await asyncio.Event().wait()


def _launch(config: DBOSConfig, max_recoveries: int) -> None:
    # There is one of a process: a second one is the first, and what it was told is not heard.
    DBOS(config=config)
    if DBOS.executor_id != config.get("executor_id"):
        raise EngineStateError(
            "A DBOSEngine cannot run jobs here, as this process uses DBOS already",
            instead="DBOSEngine(url, worker=False), and a process of its own for its jobs",
        )
    DBOS.workflow(name=WORKFLOW, max_recovery_attempts=max_recoveries)(_run)
    try:
        DBOS.launch()
    except BaseException:
        DBOS.destroy()
        raise


def _destroy() -> None:
    DBOS.destroy()
    _workers.clear()
