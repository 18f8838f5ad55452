"""What all engines have in common: registering, enqueueing, and the life of an engine.

An adapter tells how one engine stores a message, what has become of it, and how it is handed out
to workers.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import time
from typing import Any, ClassVar, ParamSpec, TypeAlias, TypeVar, overload
from urllib.parse import urlsplit

from fastapi_tasks.config import Duration, Retry, TaskConfig, in_seconds, is_amount
from fastapi_tasks.engine import Enqueueing
from fastapi_tasks.errors import (
    EngineStateError,
    EngineUnavailableError,
    InvalidSettingError,
    JobCancelledError,
    JobFailedError,
    NoResultError,
)
from fastapi_tasks.info import TaskInfo, TaskStatus
from fastapi_tasks.supervisor import Supervisor
from fastapi_tasks.tasks import TaskErrorHandler

from .execution import Executor
from .job import Job
from .messages import Message, RetryByName
from .registration import Registered, Registry
from .settings import check_count
from .trace import current_trace

__all__ = ["BoundEngine", "EngineAdapter", "JobOptions", "JobRecord", "Lifespan"]

_PASSWORD_FIELD = re.compile("(?<=[?&]password=)[^&]+")

P = ParamSpec("P")
T = TypeVar("T")
_FuncT = TypeVar("_FuncT", bound=Callable[..., Any])

Lifespan: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]
"""Opens what jobs need, and closes it: a function decorated with ``asynccontextmanager``."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What one call asks for, beside its arguments."""

    key: str | None = None
    """What tells this call from others of the same function: enqueued twice, it is one job."""
    delay: float = 0.0
    """Seconds before its first attempt."""
    retry: RetryByName | None = None
    timeout: float | None = None
    """Seconds that an attempt may take, in place of the function's; 0: no limit."""
    connection: Any = None
    """The user's own, whose transaction the job is to be a part of."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What an engine knows of a job."""

    info: TaskInfo
    result: str | None = None
    """What the function has returned, as JSON, if the job has succeeded and results are kept."""


class EngineAdapter(ABC):
    """The base of the engines.

    :param url: where the engine keeps its jobs
    :param worker: whether this process runs jobs too, and not only enqueues them
    :param concurrency: how many jobs run at once in a process that does; 10 by default
    :param enqueue_timeout: seconds after which an enqueueing has failed that got no answer; 5 by
        default
    :param lifespan: opens what the jobs need, before the first one, and closes it after the last:
        a function decorated with ``asynccontextmanager``
    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    in_transactions: ClassVar[bool] = False
    """Whether a job can be a part of the user's own transaction."""

    def __init__(
        self,
        url: str,
        *,
        worker: bool = False,
        concurrency: int = 10,
        enqueue_timeout: float = 5.0,
        lifespan: Lifespan | None = None,
    ) -> None:
        self._check_url(url)
        check_count("concurrency", concurrency, instead="concurrency=10")
        _check_timeout(enqueue_timeout)
        self.url = url
        """Where the engine keeps its jobs."""
        self.worker = worker
        """Whether this process runs jobs too, from the next start on."""
        self.concurrency = concurrency
        """How many jobs run at once in a process that does, from the next start on."""
        self.enqueue_timeout = enqueue_timeout
        """Seconds after which an enqueueing has failed that got no answer."""
        self.shield = False
        """Whether a shutdown waits for the jobs of this process until its deadline, from the next
        start on. If not, it cuts them off at once, so that they run again elsewhere."""
        self.executor: Executor | None = None
        """What runs the jobs of this process, while it does."""
        self._lifespan = lifespan
        self._registry = Registry(self, str(self))
        self._stack: AsyncExitStack | None = None

    # What users call

    @overload
    def task(self, func: _FuncT, /) -> _FuncT: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        on_error: TaskErrorHandler | None = None,
    ) -> Callable[[_FuncT], _FuncT]: ...
    def task(self, func: Callable[..., Any] | None = None, /, **fields: Any) -> Callable[..., Any]:
        """Register a function, which is returned unchanged.

        Wherever it is scheduled from now on, it is enqueued instead of run in this process.

        :param func: the function, async or not, if there is nothing else to say
        :param name: what it is called in messages; by default its module and qualified name. It
            has to stay the same as long as there are jobs of it
        :param retry: when a job is attempted again that has failed; by default it is not
        :param timeout: seconds or ``timedelta`` that each attempt may take; by default there is
            no limit
        :param on_error: called in the worker with the task and its error when the last attempt
            has failed, or, with a ``WorkerLostError``, when too many workers were lost by the job
        :raises InvalidTaskError: it cannot be registered, or one of its parameters cannot be
            written as JSON
        :raises InvalidSettingError: one of the others has a value that it cannot have
        """
        config = TaskConfig(**fields)

        def decorate(func: _FuncT) -> _FuncT:
            self._registry.add(func, config)
            return func

        return decorate if func is None else decorate(func)

    @overload
    async def enqueue(
        self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[T]: ...
    @overload
    async def enqueue(
        self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[T]: ...
    async def enqueue(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[Any]:
        """Enqueue a call of a registered function. When this returns, the job is durable.

        :param func: the function
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: the job
        :raises UnregisteredFunctionError: the function is not registered with this engine
        :raises InvalidArgumentsError: the arguments do not fit it, or JSON cannot hold them
        :raises EngineStateError: the engine is not started
        :raises EngineUnavailableError: the engine did not take the job in time; it may have it
            all the same
        """
        return await self.enqueue_with(JobOptions(), func, args, kwargs)

    def using(
        self,
        *,
        key: str | None = None,
        delay: Duration | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        connection: Any = None,
    ) -> BoundEngine:
        """Return the engine with options for what is enqueued on it.

        :param key: what tells this call from others of the same function: as long as the engine
            remembers a job with this key, enqueueing returns that one
        :param delay: seconds or ``timedelta`` before the first attempt; 0 by default
        :param retry: in place of the function's. Its ``on`` has to be a type, or several
        :param timeout: seconds or ``timedelta`` that each attempt may take, in place of the
            function's; ``math.inf``: there is no limit
        :param connection: the user's own connection to the same database, of whose transaction
            the job is to be a part
        :raises InvalidSettingError: one of them has a value that it cannot have
        """
        if key is not None:
            _check_key(key)
        config = TaskConfig(delay=delay, retry=retry, timeout=timeout)
        if connection is not None and not self.in_transactions:
            raise InvalidSettingError(
                "connection",
                connection,
                expected="no connection, since the engine's jobs are in no database of yours",
                instead="engine.using(key=...)",
            )
        options = JobOptions(
            key=key,
            delay=0.0 if delay is None else in_seconds(delay),
            retry=None if retry is None else RetryByName.of(retry),
            timeout=None
            if timeout is None
            else (0.0 if config.time_limit == math.inf else config.time_limit),
            connection=connection,
        )
        return BoundEngine(self, options)

    async def find(self, job_id: str) -> TaskInfo | None:
        """Return what a job is like now.

        :param job_id: the job's id
        :return: ``None`` if the engine does not know it, any more
        :raises EngineStateError: the engine is not started
        :raises EngineUnavailableError: it cannot be reached
        """
        self._require_started()
        async with self._within():
            record = await self._record(job_id)
        return None if record is None else record.info

    async def cancel(self, job_id: str) -> bool:
        """Ask for a job to be cancelled: one that waits never begins, one that runs is told.

        :param job_id: the job's id
        :return: ``False`` if it was over already, or the engine does not know it
        :raises EngineStateError: the engine is not started
        :raises EngineUnavailableError: it cannot be reached
        """
        self._require_started()
        async with self._within():
            return await self._cancel(job_id)

    # What jobs, batches and supervisors call

    @property
    def is_started(self) -> bool:
        """Whether jobs can be enqueued."""
        return self._stack is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions that are registered."""
        return self._registry.names

    def name_of(self, func: Callable[..., Any]) -> str:
        """Return the name by which a function was registered."""
        return self._registry.of(func).name

    def prepare(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        delay: float,
    ) -> Enqueueing:
        """Check a call, and return what enqueues it."""
        registered, arguments = self._checked(func, args, kwargs)
        return functools.partial(self._send, registered, arguments, JobOptions(delay=delay))

    async def enqueue_with(
        self,
        options: JobOptions,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Job[Any]:
        """Enqueue a call with options, as :meth:`enqueue` does."""
        registered, arguments = self._checked(func, args, kwargs)
        return await self._send(registered, arguments, options)

    def _checked(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Registered, dict[str, Any]]:
        """Return what is registered, and the arguments as they travel."""
        self._require_started()
        while isinstance(func, functools.partial):
            args, kwargs, func = func.args + args, func.keywords | kwargs, func.func
        registered = self._registry.of(func)
        return registered, registered.arguments.dump(args, kwargs)

    async def _send(
        self, registered: Registered, arguments: dict[str, Any], options: JobOptions
    ) -> Job[Any]:
        now = time()
        message = Message(
            name=registered.name,
            arguments=arguments,
            created=now,
            due=now + options.delay,
            retry=options.retry,
            timeout=options.timeout,
            trace=current_trace(),
        )
        if options.key is None:
            job_id = secrets.token_hex(16)
        else:
            job_id = f"{registered.name}:{options.key}"
        async with self._within():
            job_id = await self._enqueue(job_id, message, options)
        return Job(self, job_id, registered.name)

    async def wait_for(self, job: Job[Any]) -> Any:
        """Do what :meth:`Job.wait` says."""
        self._require_started()
        record = await self._until_over(job.id)
        if record is None:
            raise NoResultError(job.id, "the engine does not know it, or not any more")
        info = record.info
        if info.status is TaskStatus.FAILED:
            raise JobFailedError(job.id, info.error_type or "Exception", info.error or "")
        if info.status is TaskStatus.CANCELLED:
            raise JobCancelledError(job.id)
        if record.result is None:
            raise NoResultError(job.id, "it has succeeded, but its result was not kept")
        return self._registry.by_name(job.name).arguments.load_result(record.result)

    async def info_of(self, job: Job[Any]) -> TaskInfo:
        """Do what :meth:`Job.info` says."""
        info = await self.find(job.id)
        if info is None:
            raise NoResultError(job.id, "the engine does not know it, or not any more")
        return info

    # The life of the engine

    async def start(self, supervisor: Supervisor) -> None:
        """Connect, and begin to run jobs if this process is to do so.

        :param supervisor: what runs the jobs of this process
        :raises EngineUnavailableError: what the engine stands on cannot be reached
        :raises EngineStateError: it is started already, or the event loop is not asyncio's
        """
        if self._stack is not None:
            raise EngineStateError(
                f"{self} is started already, and one engine serves one app",
                instead=f"another {type(self).__name__} for the other app",
            )
        _require_asyncio(self)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._connected())
            self._stack = stack  # the first job, and the lifespan before it, may enqueue others
            try:
                if self.worker:
                    await self._begin_work(stack, supervisor)
                self._stack = stack.pop_all()
            except BaseException:
                self._stack = self.executor = None
                raise

    async def _begin_work(self, stack: AsyncExitStack, supervisor: Supervisor) -> None:
        if self._lifespan is not None:
            await stack.enter_async_context(self._lifespan())
        self.executor = Executor(self._registry, supervisor, shield=self.shield)
        await stack.enter_async_context(self._working(self.executor))

    def pause(self) -> None:
        """Take no more jobs, since the supervisor is about to be drained."""
        if self.executor is not None:
            self._pause()

    async def stop(self) -> None:
        """Disconnect, when no job runs in this process any more."""
        if self.executor is not None:
            self.executor.give_up()
        stack, self._stack = self._stack, None
        try:
            if stack is not None:
                await stack.aclose()
        finally:
            self.executor = None

    @asynccontextmanager
    async def _within(self) -> AsyncGenerator[None, None]:
        """Give up on an engine that does not answer in time."""
        limit = self.enqueue_timeout
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError:
            raise EngineUnavailableError(
                str(self),
                f"it did not answer within {limit:g} s, and may have done all the same what it "
                "was asked for",
                instead="Look whether it runs, or give it longer: enqueue_timeout=30",
            ) from None

    def _require_started(self) -> None:
        if self._stack is None:
            raise EngineStateError(
                f"{self} is not started: an app starts the engines that it is given, with its "
                "lifespan",
                instead="add_tasks(app, engines=[engine])",
            )

    def __str__(self) -> str:
        """Return what to call it: where it keeps its jobs, without a password."""
        place = _PASSWORD_FIELD.sub("***", self.url)
        password = urlsplit(place).password
        if password:
            place = place.replace(f":{password}@", ":***@", 1)
        return f'{type(self).__name__}("{place}")'

    # What an adapter tells

    @abstractmethod
    def _check_url(self, url: object) -> None:
        """Refuse what is no address of this engine.

        :raises InvalidSettingError: it is none
        """

    @abstractmethod
    def _connected(self) -> AbstractAsyncContextManager[None]:
        """Be connected, from entry to exit.

        :raises EngineUnavailableError: on entry, if it cannot be reached
        """

    @abstractmethod
    def _working(self, executor: Executor) -> AbstractAsyncContextManager[None]:
        """Give jobs to the executor, at most :attr:`concurrency` at once, from entry to exit.

        At the exit no job runs any more. What became of those that did is to be stored then.
        """

    @abstractmethod
    def _pause(self) -> None:
        """Give no more jobs to the executor, those that run excepted."""

    @abstractmethod
    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        """Store a message; return the id of its job, or of the one that has its key already.

        :raises EngineUnavailableError: it cannot be stored
        """

    @abstractmethod
    async def _record(self, job_id: str) -> JobRecord | None:
        """Return what the engine knows of a job."""

    @abstractmethod
    async def _until_over(self, job_id: str) -> JobRecord | None:
        """Wait until a job has succeeded, failed or was cancelled, and return what is known."""

    @abstractmethod
    async def _cancel(self, job_id: str) -> bool:
        """Cancel a job, wherever it is; return ``False`` if it was over, or is not known."""


class BoundEngine:
    """An engine with options for what is enqueued on it. Made by ``engine.using(...)``.

    :param engine: the engine
    :param options: the options
    """

    __slots__ = ("_engine", "_options")

    def __init__(self, engine: EngineAdapter, options: JobOptions) -> None:
        self._engine = engine
        self._options = options

    @overload
    async def enqueue(
        self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[T]: ...
    @overload
    async def enqueue(
        self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[T]: ...
    async def enqueue(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Job[Any]:
        """Enqueue a call with the options, as :meth:`EngineAdapter.enqueue` does."""
        return await self._engine.enqueue_with(self._options, func, args, kwargs)


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not key or not key.isprintable() or len(key) > MAX_KEY:
        raise InvalidSettingError(
            "key",
            key,
            expected=f"a printable string of 1 to {MAX_KEY} characters",
            instead='engine.using(key=f"order-{order.id}")',
        )


MAX_KEY = 200
"""How many characters a key has at most: engines have their limits."""


def _check_timeout(seconds: object) -> None:
    if not is_amount(seconds) or not seconds:
        raise InvalidSettingError(
            "enqueue_timeout",
            seconds,
            expected="seconds, more than 0",
            instead="enqueue_timeout=5",
        )


def _require_asyncio(engine: EngineAdapter) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise EngineStateError(
            f"{engine} runs on asyncio, and this event loop is trio's",
            instead="a server that runs on asyncio or uvloop, or tasks without engines",
        ) from None
