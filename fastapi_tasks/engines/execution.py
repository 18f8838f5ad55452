"""HOW one attempt of a job runs: as a task of this process's supervisor.

So a job has what tasks have: a limit of threads, records, observers, a place in the drain.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import anyio.to_thread

from fastapi_tasks.callables import is_async
from fastapi_tasks.config import TaskConfig
from fastapi_tasks.drain import SHUTTING_DOWN
from fastapi_tasks.errors import (
    InvalidArgumentsError,
    MalformedMessageError,
    UnregisteredFunctionError,
    WorkerLostError,
)
from fastapi_tasks.info import Progress, key_of, shown_error
from fastapi_tasks.observer import logger, report_bad_retry
from fastapi_tasks.supervisor import Supervisor
from fastapi_tasks.tasks import (
    Task,
    TaskErrorHandler,
    TaskStatus,
    continue_at,
    current_task,
    is_over,
    new_task,
    until_over,
)

from .backoff import wait_after
from .messages import Message, read_message
from .registration import Registered
from .trace import context_of

if TYPE_CHECKING:
    from .registration import Registry

__all__ = [
    "Again",
    "Cancelled",
    "Executor",
    "Failed",
    "Interrupted",
    "Outcome",
    "StoreProgress",
    "Succeeded",
]

StoreProgress = Callable[[Progress], Awaitable[None]]
"""Stores how far a job has come, where those see it who ask for the job."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The function has returned."""

    result: str
    """What, as JSON."""


@dataclass(frozen=True, slots=True)
class Again:
    """The function has failed, and is to run again."""

    wait: float
    """Seconds until then."""
    error_type: str
    error: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The job has failed: no attempt is left, or it could not be run at all."""

    error_type: str
    error: str
    refused: bool = False
    """Whether it is no job that this worker could run, and nothing was run."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody has cancelled the job."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The process is about to end: the job is to run again elsewhere, with the same attempt."""


Outcome: TypeAlias = Succeeded | Again | Failed | Cancelled | Interrupted
"""What has come of one attempt."""


class Executor:
    """Runs jobs of one engine in this process. In the event loop's thread only.

    :param registry: the engine's functions
    :param supervisor: where the jobs run
    :param shield: whether a shutdown waits for them
    """

    def __init__(self, registry: Registry, supervisor: Supervisor, *, shield: bool) -> None:
        self._registry = registry
        self._supervisor = supervisor
        self._shield = shield
        self._tasks: dict[str, JobTask] = {}
        self._waiting: dict[JobTask, asyncio.Future[None]] = {}
        self.interrupted = 0
        """How many jobs were cut off by the shutdown."""

    @property
    def running(self) -> tuple[str, ...]:
        """The ids of the jobs that run now."""
        return tuple(self._tasks)

    async def run(
        self,
        job_id: str,
        text: str | bytes,
        *,
        attempt: int,
        store_progress: StoreProgress | None,
        lost: int = 0,
    ) -> Outcome:
        """Make one attempt, error handler included, and return what has come of it.

        Cancelled from outside, it cancels the attempt, and ends when that has ended.

        :param job_id: the job's
        :param text: its message
        :param attempt: which one it is; the first one is 1
        :param store_progress: by what its progress is stored, if it is
        :param lost: how many workers have not survived the job, if there are to be no more of
            them: it fails, and only its error handler runs
        """
        try:
            message = read_message(text)
            registered = self._registry.by_name(message.name)
            args, kwargs = registered.arguments.load(message.arguments)
        except (MalformedMessageError, UnregisteredFunctionError, InvalidArgumentsError) as error:
            logger.error("Job %s was refused: %s", job_id, error)
            return Failed(*shown_error(error), refused=True)
        handled = _Handled(registered.on_error or self._supervisor.settings.config.on_error)
        task = self._task_of(job_id, message, registered, args, kwargs, attempt, handled)
        if lost:
            _fail_in_place_of(task, lost)
        progress = None if store_progress is None else _ProgressWriter(task, store_progress)
        task.on_progress = None if progress is None else self._in_loop(progress.write)
        self._tasks[job_id] = task
        try:
            await self._until_over(task, handled)
            if progress is not None:
                await progress.close()
            return self._outcome_of(task, registered)
        finally:
            # It may have been handed out once more meanwhile, if the engine took it for lost.
            if self._tasks.get(job_id) is task:
                del self._tasks[job_id]

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that runs here, as somebody has asked for.

        :return: ``False`` if it does not run here
        """
        task = self._tasks.get(job_id)
        return task is not None and task.cancel()

    def give_up(self) -> None:
        """Wait no longer for jobs that the shutdown has abandoned: they are to run elsewhere."""
        for task, waiting in self._waiting.items():
            if task.abandoned:
                waiting.cancel()

    def _task_of(
        self,
        job_id: str,
        message: Message,
        registered: Registered,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        attempt: int,
        handled: _Handled,
    ) -> JobTask:
        supervisor = self._supervisor
        retry = registered.retry if message.retry is None else message.retry.as_retry()
        timeout = registered.timeout if message.timeout is None else message.timeout or None
        config = TaskConfig(
            name=registered.name,
            shield=self._shield or None,
            on_error=None if handled.handler is None else handled,
            timeout=timeout,
        )
        context = context_of(message.trace, Context())
        task = context.run(
            lambda: new_task(
                JobTask,
                supervisor,
                *key_of(job_id),
                registered.func,
                args,
                kwargs,
                config,
                copy_context(),
                "now",
                is_async(registered.func),
            )
        )
        task.on_progress = task.next_wait = task.wait_after = None
        task.was_cut_off = False
        continue_at(task, attempt)
        if retry is not None:
            task.wait_after = functools.partial(wait_after, retry, attempt=attempt, due=message.due)
        if supervisor.is_watched:
            context.run(supervisor.announce, task)
        return task

    async def _until_over(self, task: JobTask, handled: _Handled) -> None:
        self._supervisor.submit(task)
        if task.handle is not None:
            # A cancellation may come between the failure and its handler, which then never runs.
            task.handle.add_done_callback(handled.close)
        over = self._waiting[task] = asyncio.ensure_future(self._wait(task, handled))
        try:
            await asyncio.wait({over})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({over})
            raise
        finally:
            over.cancel()  # if it is not over, somebody has cancelled the caller twice
            del self._waiting[task]

    async def _wait(self, task: JobTask, handled: _Handled) -> None:
        await until_over(task)
        is_handled = handled.handler is not None and isinstance(task.exception(), Exception)
        if task.status is TaskStatus.FAILED and is_handled and task.next_wait is None:
            await handled.over.wait()

    def _outcome_of(self, task: JobTask, registered: Registered) -> Outcome:
        if self._is_interrupted(task):
            self.interrupted += task.started.is_set()
            return Interrupted()
        if task.status is TaskStatus.CANCELLED:
            return Cancelled()
        error = task.exception()
        if error is not None:
            told = shown_error(error)
            return Failed(*told) if task.next_wait is None else Again(task.next_wait, *told)
        try:
            return Succeeded(registered.arguments.dump_result(task.result()))
        except InvalidArgumentsError as problem:
            logger.error("Job %s has a result that cannot be kept: %s", task.id, problem)
            return Failed(*shown_error(problem))

    def _is_interrupted(self, task: JobTask) -> bool:
        """Return whether the shutdown has kept a job from its end, and not somebody else."""
        if task.status is not TaskStatus.CANCELLED:
            return task.was_cut_off or not is_over(task)  # given up, while it still runs
        if task.cancel_reason:
            return task.cancel_reason == SHUTTING_DOWN
        # Dropped, since the supervisor takes nothing any more; else it has cancelled itself.
        return not self._supervisor.is_running

    def _in_loop(self, func: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            if self._supervisor.is_here:
                func()
            else:
                self._supervisor.call_in_loop(func)

        return call


class JobTask(Task):
    """One attempt of a job: a task whose id is the job's."""

    __slots__ = ("next_wait", "on_progress", "wait_after", "was_cut_off")

    on_progress: Callable[[], None] | None
    """Is called when it has said how far it has come, in any thread."""
    next_wait: float | None
    """Seconds until the next attempt, once this one has failed, if there is one."""
    wait_after: Callable[[Exception], float | None] | None
    """Tells how long to wait after an error."""
    was_cut_off: bool
    """Whether it has failed since the shutdown had cancelled it."""

    def set_progress(
        self, done: float, total: float | None = None, message: str | None = None
    ) -> None:
        super().set_progress(done, total, message)
        if self.on_progress is not None:
            self.on_progress()

    def next_attempt_in(self, error: Exception) -> float | None:
        """Return what the engine is to wait before the next attempt, ``None`` if there is none."""
        if self.cancel_reason == SHUTTING_DOWN:
            self.was_cut_off = True  # whatever it has made of that
            self.next_wait = 0.0
        elif self.wait_after is not None and not self.cancel_reason:
            try:
                self.next_wait = self.wait_after(error)
            except Exception as failure:
                report_bad_retry(self, failure)
        return self.next_wait


def _fail_in_place_of(task: JobTask, lost: int) -> None:
    """Have a task fail for good instead of running its function.

    :param lost: how many workers have not survived that
    """
    func, is_async = task.func, task.is_async

    async def fail(*_args: Any, **_kwargs: Any) -> NoReturn:
        current = current_task()
        current.func, current.is_async = func, is_async  # as its error handler expects them
        del current  # by the error's traceback, the task would lead to itself
        raise WorkerLostError(lost)

    task.func, task.is_async = fail, True
    task.wait_after = None


class _Handled:
    """An error handler of a user's that tells when it is done.

    :param handler: the user's, if there is one
    """

    def __init__(self, handler: TaskErrorHandler | None) -> None:
        self.handler = handler
        self.over = asyncio.Event()

    def close(self, _handle: object) -> None:
        """Note that it will not be called any more."""
        self.over.set()

    async def __call__(self, task: Task, error: Exception) -> None:
        assert self.handler is not None
        try:
            if is_async(self.handler):
                done = self.handler(task, error)
                assert done is not None
                await done
            else:
                await anyio.to_thread.run_sync(self.handler, task, error)
        finally:
            self.over.set()


class _ProgressWriter:
    """Stores a task's progress, one after the other, and of several that wait only the latest.

    :param task: the task
    :param store: stores one
    """

    def __init__(self, task: Task, store: StoreProgress) -> None:
        self._task = task
        self._store = store
        self._writing: asyncio.Task[None] | None = None
        self._is_stale = False

    def write(self) -> None:
        """Have the task's progress stored soon."""
        self._is_stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write())

    async def close(self) -> None:
        """Wait until it was stored."""
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        while self._is_stale:
            self._is_stale = False
            progress = self._task.progress
            assert progress is not None  # it was said, and is not taken back
            try:
                await self._store(progress)
            except Exception:
                logger.warning(
                    "The progress of job %s could not be stored", self._task.id, exc_info=True
                )
