"""The jobs that DBOS has handed out to this process, on their way to the event loop of the app.

DBOS runs workflows in a thread and an event loop of its own. There is one workflow, whose steps
are a job's attempts: what has come of a step is recorded, and is not done again after a crash.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

from dbos import DBOS

from fastapi_tasks.errors import EngineUnavailableError
from fastapi_tasks.observer import logger

from .dbos_records import JobError, is_over, lost_by, noted_start, notes_of
from .dbos_store import Store
from .execution import Cancelled, Executor, Failed, Interrupted, Succeeded

__all__ = ["Runs"]

T = TypeVar("T")

_NOT_HERE = "not here"  # the job was cancelled, or is left to another process
_LONG = 2.0  # seconds that a job waits to be attempted again, and takes no other one's place
_STORING = 10.0  # seconds to write what has come of jobs that ended while the app was shut down
_ENDING = 1.0  # seconds for attempts whose tasks are over to come to their own ends


class Runs:
    """The jobs that run in this process, and those of them whose outcomes are not stored yet.

    :param store: the database
    :param executor: runs the jobs, in the event loop that is running now
    :param max_recoveries: how often a job is begun again whose process has died
    :param on_over: is told of each job that has ended here, in that loop
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        *,
        max_recoveries: int,
        on_over: Callable[[], None],
    ) -> None:
        self._store = store
        self._executor = executor
        self._max_recoveries = max_recoveries
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._is_paused = False
        self._attempts: set[asyncio.Task[Any]] = set()
        self._unstored: set[str] = set()
        self._is_stored = asyncio.Event()

    def pause(self) -> None:
        """Begin no more jobs."""
        # DBOS takes none once it has as many as run at once; those that come now are held.
        self._is_paused = True

    async def close(self) -> None:
        """Wait until what has come of jobs that have ended is stored, if that can be."""
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
            await self._rest(job_id, attempt, told["due"])
            attempt += 1

    async def _rest(self, job_id: str, attempt: int, due: float) -> None:
        """Wait until the next attempt is due; for long not among the jobs that run at once."""
        is_aside = await self._in_app(self._step_aside(job_id, attempt, due))
        if is_aside is None:
            raise asyncio.CancelledError
        # What is recorded is when it ends, so that after a crash only the rest is waited for. Of no
        # time at all nothing would be recorded, and the steps would not be the same again.
        await DBOS.sleep_async(max(0.001, due - time.time()))
        if is_aside and await self._in_app(self._come_back(job_id)):
            raise asyncio.CancelledError

    async def _attempt(self, job_id: str, text: str, attempt: int) -> dict[str, Any]:
        told = await self._in_app(self._execute(job_id, text, attempt))
        if told is None:
            await _until_the_end()
        elif _NOT_HERE in told:
            raise asyncio.CancelledError
        return told

    async def _in_app(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():  # before anybody has stopped the engine
            coroutine.close()
            await _until_the_end()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _in_loop(self, func: Callable[[str], None], job_id: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(func, job_id)

    # In the event loop of the app.

    async def _execute(self, job_id: str, text: str, attempt: int) -> dict[str, Any] | None:
        """Make one attempt, and return what is recorded; ``None``: nothing, and the app ends."""
        lost = await self._lost(job_id)
        if self._is_paused:
            return None
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)
        outcome = await self._executor.run(
            job_id,
            text,
            attempt=attempt,
            store_progress=partial(self._store.note_progress, job_id),
            lost=lost,
        )
        if isinstance(outcome, Interrupted):
            return None
        if isinstance(outcome, Cancelled):
            return {_NOT_HERE: True} if await self._cancel(job_id) else None
        self._unstored.add(job_id)
        if isinstance(outcome, Succeeded):
            return {"result": outcome.result}
        if isinstance(outcome, Failed):
            return {"error_type": outcome.error_type, "error": outcome.error}
        due = time.time() + outcome.wait
        await self._note_failure(job_id, attempt, due)
        return {"due": due}

    async def _lost(self, job_id: str) -> int:
        """Return how many processes have not survived a job, if it is to run no more."""
        # DBOS would end such a job where nobody can handle its error. It counts, and tells nobody.
        try:
            row = await self._store.row(job_id)
            lost = 0 if row is None else lost_by(row)
            if row is None or not (lost > self._max_recoveries or notes_of(row).lost):
                return 0
            await self._store.note(job_id, lost=lost)  # DBOS counts anew when it is given back
        except EngineUnavailableError:
            return 0
        return lost

    async def _cancel(self, job_id: str) -> bool:
        """Have a job that was cancelled here be cancelled everywhere; ``False`` if that failed."""
        try:
            row = await self._store.row(job_id)
            if row is not None and not is_over(row):
                await self._store.cancel(row)
        except EngineUnavailableError:
            return False
        return True

    async def _note_failure(self, job_id: str, attempt: int, due: float) -> None:
        try:
            row = await self._store.row(job_id)
            started = {} if row is None else noted_start(row)
            await self._store.note(job_id, **started, attempt=attempt, due=due, progress=None)
        except EngineUnavailableError as error:
            logger.warning("That job %s waits could not be noted: %s", job_id, error)

    async def _step_aside(self, job_id: str, attempt: int, due: float) -> bool | None:
        """Have a job wait in a queue that takes any number of them at once.

        :return: whether it is in there now; ``None`` if it is about to begin there
        """
        try:
            row = await self._store.row(job_id)
            if row is None or attempt < notes_of(row).attempt:
                return False  # all of this has happened before
            if row.queue_name == self._store.waiting_room:
                return True
            if due - time.time() < _LONG:
                return False
            await self._store.give_back([job_id], self._store.waiting_room)
        except EngineUnavailableError:
            return False
        return None

    async def _come_back(self, job_id: str) -> bool:
        """Have a job begin anew in the queue of those that run; ``False`` if that failed."""
        try:
            await self._store.give_back([job_id], self._store.name)
        except EngineUnavailableError:
            return False
        return True

    def _note_stored(self, job_id: str) -> None:
        self._unstored.discard(job_id)
        self._is_stored.set()

    def _note_over(self, job_id: str) -> None:
        self._note_stored(job_id)
        self._on_over()


async def _until_the_end() -> NoReturn:
    """Hold a job until DBOS is destroyed: it is no other process's as long as this one has it."""
    while True:
        await asyncio.Event().wait()
