"""This process among those that DBOS hands out jobs to: how it joins them, and how it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import anyio.to_thread
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from fastapi_tasks.errors import EngineStateError, EngineUnavailableError
from fastapi_tasks.observer import logger

from .dbos_runs import Runs
from .dbos_slots import Slots
from .dbos_store import WORKFLOW, Store
from .execution import Executor

__all__ = ["Worker"]

_GIVING_BACK = 5.0  # seconds to let other processes have the jobs that were cut off

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
        self._concurrency = concurrency
        self._polling = polling
        self._max_recoveries = max_recoveries
        self.runs = Runs(store, executor, max_recoveries=max_recoveries, on_over=on_over)
        """The jobs that this process has."""
        self._is_lost = False

    async def start(self) -> None:
        """Take the place of this process among the others, and jobs.

        :raises EngineStateError: DBOS runs in this process already
        :raises EngineUnavailableError: the database cannot be reached
        """
        await self._store.call(self._launch, abandon=False)

    async def stop(self) -> None:
        """Leave when what has come of all jobs is stored; give those back that were cut off."""
        await self.runs.close()
        executor_id = self._slots.executor_id
        await anyio.to_thread.run_sync(_destroy)
        try:
            async with asyncio.timeout(_GIVING_BACK):
                left = await self._store.running_on(executor_id)
                await self._store.give_back([row.workflow_id for row in left], self._store.name)
        except (EngineUnavailableError, TimeoutError):
            logger.warning(
                "Jobs that were cut off could not be given back: they wait for the next start, or "
                "for another process",
                exc_info=True,
            )
        finally:
            await self._store.call(self._slots.release, abandon=False)

    async def look_after_others(self) -> None:
        """Take over the jobs of processes that have died.

        :raises EngineUnavailableError: the database cannot be reached
        """
        was_lost, self._is_lost = self._is_lost, not await self._store.call(self._slots.is_held)
        if self._is_lost and not was_lost:
            logger.error(
                "The place of this process (%s) is somebody else's, since it had no connection to "
                "the database for a while: until it is free again, jobs may run twice",
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


async def _run(*args: Any, **kwargs: Any) -> str:
    """Do what every job's workflow does, whatever somebody has given it for arguments."""
    (worker,) = _workers
    job_id = DBOS.workflow_id
    assert job_id is not None
    text = args[0] if len(args) == 1 and not kwargs else None
    return await worker.runs.run(job_id, text if isinstance(text, str) else "")


def _launch(config: DBOSConfig, max_recoveries: int) -> None:
    # There is one of a process: a second one is the first, and what it was told is not heard.
    DBOS(config=config)
    if DBOS.executor_id != config.get("executor_id"):
        raise EngineStateError(
            "A DBOSEngine cannot run jobs here, as this process uses DBOS already",
            instead="DBOSEngine(url, worker=False), and a process of its own for its jobs",
        )
    # Past the user's own limit, only the error handler runs: as often, if it kills processes too.
    limit = 2 * max_recoveries + 1
    DBOS.workflow(name=WORKFLOW, max_recovery_attempts=limit)(_run)
    try:
        DBOS.launch()
    except BaseException:
        DBOS.destroy()
        raise


def _destroy() -> None:
    DBOS.destroy()
    _workers.clear()
