"""The worker of a docket engine: takes jobs from Redis, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

from docket import Worker

from fastapi_tasks.observer import logger

from .docket_attempts import Attempts
from .docket_screen import wait_at_most
from .docket_wire import JSONDocket, RedisError
from .execution import Executor

__all__ = ["DocketWorker"]

_CHECK_EVERY = timedelta(milliseconds=10)
"""How often a worker that is busy looks whether it has room: jobs per second and slot are few."""
_SCHEDULE_EVERY = timedelta(milliseconds=100)
"""How late a job begins at most that was to wait."""
_RECONNECT_AFTER = timedelta(seconds=1)
_RESTART_AFTER = 1.0
"""Seconds before a worker that has ended begins again; twice as many each time."""
_RESTART_WITHIN = 30.0
_RENEWALS = 4
"""How often a lease is renewed while it would last."""
_CANCEL_AFTER = 0.5
"""Seconds before docket's worker is cancelled, once more too: it asks Redis for more as it ends."""
_FORGOTTEN_AFTER = timedelta(hours=1) / timedelta(milliseconds=1)
"""Milliseconds after which somebody is forgotten who has not asked for messages."""


class DocketWorker:
    """Gives a docket's jobs to an executor.

    :param docket: the docket
    :param executor: runs the jobs
    :param concurrency: how many at once
    :param redelivery_timeout: seconds after which others take over a job whose worker is lost
    :param patience: seconds that storing something may take
    """

    def __init__(
        self,
        docket: JSONDocket,
        executor: Executor,
        *,
        concurrency: int,
        redelivery_timeout: float,
        patience: float,
    ) -> None:
        self._docket = docket
        self._concurrency = concurrency
        self._redelivery_timeout = redelivery_timeout
        self._patience = patience
        self._attempts = Attempts(
            docket, executor, store_within=redelivery_timeout, patience=patience
        )
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None, None]:
        """Take jobs, from entry until :meth:`pause`; what runs at the exit is left to others."""
        self._docket.run_job = self._attempts.run
        serving = asyncio.create_task(self._serve())
        renewing = asyncio.create_task(self._renew_leases())
        try:
            yield
        finally:
            self.pause()
            await self._end(serving)
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _end(self, serving: asyncio.Task[None]) -> None:
        """Wait until all was stored, but not for ever."""
        done, _ = await asyncio.wait([serving], timeout=self._patience)
        if not done:
            number = len(self._attempts.message_ids)
            logger.warning("What has become of %d jobs cannot be stored", number)
            self._attempts.give_up()
            done, _ = await asyncio.wait([serving], timeout=_CANCEL_AFTER)
        while not done:
            running = self._running
            (serving if running is None or running.done() else running).cancel()
            done, _ = await asyncio.wait([serving], timeout=_CANCEL_AFTER)

    def pause(self) -> None:
        """Take no more jobs."""
        self._docket.stopping.set()

    async def _serve(self) -> None:
        stopping = self._docket.stopping
        wait = _RESTART_AFTER
        await self._forget_consumers()
        while not stopping.is_set():
            try:
                await self._take_jobs()
            except Exception:
                logger.exception("The worker has failed, and begins again in %g s", wait)
                this_time, wait = wait, min(2 * wait, _RESTART_WITHIN)
                await wait_at_most(this_time, stopping)
        await self._forget_consumers()

    async def _take_jobs(self) -> None:
        # It keeps context variables, so one task has to enter and leave it. Leaving it is what
        # lets it end without a cancellation, in which it could lose messages.
        worker = Worker(
            self._docket,
            name=self._name,
            concurrency=self._concurrency,
            redelivery_timeout=timedelta(seconds=self._redelivery_timeout),
            reconnection_delay=_RECONNECT_AFTER,
            minimum_check_interval=_CHECK_EVERY,
            scheduling_resolution=_SCHEDULE_EVERY,
            schedule_automatic_tasks=False,
        )
        stopped = asyncio.create_task(self._docket.stopping.wait())
        try:
            async with worker:
                self._running = asyncio.create_task(worker.run_forever())
                await asyncio.wait([self._running, stopped], return_when=asyncio.FIRST_COMPLETED)
            await self._running
        finally:
            stopped.cancel()
        if not self._docket.stopping.is_set():
            raise RuntimeError("docket's worker has returned")

    async def _renew_leases(self) -> None:
        """Keep others from taking over what runs here.

        docket's worker does so too, but neither while it stops nor when it has lost Redis: it
        waits then for what runs.
        """
        while True:
            await asyncio.sleep(self._redelivery_timeout / _RENEWALS)
            if message_ids := self._attempts.message_ids:
                try:
                    async with self._docket.redis() as redis:
                        await redis.xclaim(
                            self._docket.stream_key,
                            self._docket.worker_group_name,
                            self._name,
                            min_idle_time=0,
                            message_ids=message_ids,
                            idle=0,
                            justid=True,
                        )
                except RedisError as error:
                    logger.warning("The leases of jobs could not be renewed: %s", error)

    async def _forget_consumers(self) -> None:
        """Remove from Redis who has read messages and is gone, this worker too when it stops."""
        stream, group = self._docket.stream_key, self._docket.worker_group_name
        try:
            async with asyncio.timeout(self._patience), self._docket.redis() as redis:
                for each in await redis.xinfo_consumers(stream, group):
                    is_gone = each["idle"] > _FORGOTTEN_AFTER or each["name"].decode() == self._name
                    if is_gone and each["pending"] == 0:
                        await redis.xgroup_delconsumer(stream, group, each["name"])
        except (RedisError, TimeoutError) as error:  # there is no stream yet, or no connection
            logger.debug("Consumers could not be forgotten: %s", error)
