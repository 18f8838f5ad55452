"""``schedule`` and ``task``: what everything that takes tasks has in common."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import FunctionType
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import anyio

from .callables import is_async
from .config import (
    INHERIT_ALL,
    POLICY,
    Duration,
    Retry,
    RunIf,
    TaskConfig,
    as_config,
    in_seconds,
    policy_of,
)
from .engine import Engine, engine_of
from .errors import InvalidSettingError
from .request_bound import PLAIN, check_arguments
from .tasks import Moment, Task, TaskErrorHandler, TaskOwner

__all__ = ["BoundTasks", "ConfiguredTasks", "ImmediateTasks", "TaskHome"]

_CO_COROUTINE = inspect.CO_COROUTINE  # a module's name is found faster than another module's

P = ParamSpec("P")
T = TypeVar("T")


class TaskHome(TaskOwner, Protocol):
    """Where tasks are made and run: the supervisor, as those know it that decide when."""

    @property
    def hands_over(self) -> bool:
        """Whether functions that an engine claims are enqueued with it; not in a test."""
        ...

    def create(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: TaskConfig,
        moment: Moment,
        is_async: bool,
    ) -> Task:
        """Make a task of a call, with the context variables of this moment."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task, from any thread."""
        ...

    def drop(self, task: Task, reason: str, *, expected: bool = False) -> None:
        """Give up a task that has not begun, from any thread."""
        ...


class BoundTasks(ABC):
    """Something that tasks can be scheduled on: the type for services that schedule.

    The ``Tasks`` of a request, its ``after_route`` and ``after_response``, the supervisor, and
    what ``.task(...)`` returns on each of them.
    """

    __slots__ = ("_config", "_endpoint", "_home", "_inherited", "_moment", "_own")

    def __init__(
        self,
        home: TaskHome,
        inherited: TaskConfig,
        own: TaskConfig = INHERIT_ALL,
        endpoint: object = None,
        moment: Moment = "now",
    ) -> None:
        self._home = home
        self._inherited = inherited
        self._own = own
        # Whose tasks they are, if they are a request's.
        self._endpoint = endpoint
        self._moment: Moment = moment
        # The merged configuration of every function that has none of its own.
        self._config = inherited if own is INHERIT_ALL else inherited.merge(own)

    @abstractmethod
    def _place(self, task: Task) -> None:
        """See to it that the task starts at the right moment."""

    @abstractmethod
    def _check(self, config: TaskConfig) -> None:
        """Refuse a configuration that makes no sense here."""

    @overload
    def schedule(
        self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[P, T]: ...
    @overload
    def schedule(
        self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Task[P, T]: ...
    def schedule(self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Schedule a call, and return at once; from the event loop or any thread.

        :param func: the function: a coroutine function is awaited, any other runs in a thread
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: the task
        :raises InvalidTaskError: ``func`` cannot be run as a task
        :raises InvalidSettingError: ``func`` has a ``run_if``, and would start at once
        :raises InvalidArgumentsError: an engine claims ``func``, and the arguments cannot travel
        :raises EngineStateError: an engine claims ``func``, and is not started
        """
        if type(func) is FunctionType and func.__code__.co_flags & _CO_COROUTINE:
            # As nearly every one is. The functions below would say the same, but a call of each
            # costs more than all that is asked here.
            awaited, policy = True, getattr(func, POLICY, None)
        else:
            awaited, policy = is_async(func), policy_of(func)
        if policy is None:
            config = self._config
        else:
            engine = engine_of(func)
            if engine is not None and self._home.hands_over:
                return self._schedule_enqueueing(engine, func, args, kwargs)
            self._check(policy)
            config = self._inherited.merge(policy).merge(self._own)
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) not in PLAIN:  # as hardly one is
                check_arguments(func, args, kwargs, self._endpoint)
                break
        task = self._home.create(func, args, kwargs, config, self._moment, awaited)
        self._place(task)
        return task

    def _schedule_enqueueing(
        self,
        engine: Engine,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Task:
        """Schedule that a call is enqueued: of the configuration, the delay is the job's."""
        own = self._own
        delay = 0.0 if own.delay is None else in_seconds(own.delay)
        enqueue = engine.prepare(func, args, kwargs, delay=delay)
        # What was promised is not to be lost: a shutdown waits, if nobody says otherwise.
        config = self._inherited.merge(TaskConfig(name=engine.name_of(func), shield=True))
        config = replace(config.merge(own), delay=None)
        task = self._home.create(enqueue, (), {}, config, self._moment, True)
        self._place(task)
        return task

    @overload
    def task(self, config: TaskConfig, /) -> BoundTasks: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        shield: bool | None = None,
        on_error: TaskErrorHandler | None = None,
        run_if: RunIf | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        delay: Duration | None = None,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> BoundTasks: ...
    def task(self, config: TaskConfig | None = None, /, **fields: Any) -> BoundTasks:
        """Return the same place with a configuration for what is scheduled on it.

        :param config: a whole configuration, or
        :param fields: its fields, as :class:`TaskConfig` takes them
        :raises InvalidSettingError: a field has a value of the wrong kind, or one that makes no
            sense here: ``run_if`` where tasks start at once
        """
        own = as_config(config, fields)
        self._check(own)
        return ConfiguredTasks(self, own)


class ImmediateTasks(BoundTasks):
    """Where tasks start at once."""

    __slots__ = ()

    def _check(self, config: TaskConfig) -> None:
        if config.run_if is not None:
            raise InvalidSettingError(
                "run_if",
                config.run_if,
                expected="no run_if, since a task that starts now cannot know how the request ends",
                instead=f'tasks.after_response.task(run_if="{config.run_if}").schedule(...)',
            )


class ConfiguredTasks(BoundTasks):
    """What ``.task(...)`` returns: another place, with a configuration of its own."""

    __slots__ = ("_origin",)

    def __init__(self, origin: BoundTasks, own: TaskConfig) -> None:
        # What super().__init__() would do with these; each call may make one, and pays for calls.
        self._home = origin._home
        self._inherited = origin._inherited
        self._own = origin._own.merge(own)
        self._endpoint = origin._endpoint
        self._moment = origin._moment
        self._config = origin._inherited.merge(self._own)
        self._origin = origin

    def _place(self, task: Task) -> None:
        self._origin._place(task)

    def _check(self, config: TaskConfig) -> None:
        self._origin._check(config)
