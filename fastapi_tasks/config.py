"""How a task is to be run, as data: :class:`TaskConfig`, with :class:`Retry`, and :func:`task`,
which ties one to a function."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from datetime import timedelta
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

import anyio

from .callables import discard, is_async, is_generator, parts, qualified_name
from .errors import InvalidSettingError, InvalidTaskError
from .values import Value

if TYPE_CHECKING:
    from .engine import Engine
    from .observer import TaskObserver
    from .tasks import TaskErrorHandler

__all__ = [
    "INHERIT_ALL",
    "Duration",
    "Retry",
    "RetryOn",
    "RunIf",
    "SupervisorSettings",
    "TaskConfig",
    "as_config",
    "as_tuple",
    "in_seconds",
    "is_amount",
    "is_count",
    "is_wait",
    "policy_of",
    "task",
]

RunIf = Literal["success", "error", "always"]

Duration: TypeAlias = float | timedelta
"""A time: seconds, or a ``timedelta``."""

RetryOn: TypeAlias = (
    type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool | Duration]
)
"""Which errors are worth another attempt: their types, or a function that is asked each time."""

_RUN_IF: tuple[RunIf, ...] = ("success", "error", "always")
POLICY = "__fastapi_tasks_policy__"

_FuncT = TypeVar("_FuncT", bound=Callable[..., Any])


class Retry(Value):
    """When a task that has failed is run again, and how long it waits before.

    The waits are stamina's: before retry number *n* it is ``wait_initial * wait_exp_base ** (n -
    1)`` plus a random share of ``wait_jitter``, and never more than ``wait_max``.
    https://stamina.hynek.me/en/stable/api.html#stamina.retry

    :param on: the type of the errors that are worth another attempt, a tuple of types, or a
        function that is given the error: it returns ``True`` or ``False``, or how long to wait
        before the next attempt, as the error may say itself
    :param attempts: how many attempts there are, the first one included; 3 by default
    :param wait_initial: seconds or ``timedelta`` before the second attempt; 0.1 by default
    :param wait_max: seconds or ``timedelta`` that a wait has at most; 5 by default
    :param wait_jitter: seconds or ``timedelta`` that are added to a wait at most, at random; 1
        by default
    :param wait_exp_base: by what each wait is longer than the one before; 2 by default
    :param timeout: seconds or ``timedelta`` after which a failed attempt is the last one, counted
        from when the first one was due, and so with its wait for a place in the limiter;
        ``None``, the default: only ``attempts`` count
    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    on: RetryOn
    attempts: int = 3
    wait_initial: Duration = 0.1
    wait_max: Duration = 5.0
    wait_jitter: Duration = 1.0
    wait_exp_base: float = 2.0
    timeout: Duration | None = None

    if not TYPE_CHECKING:  # who knows the fields knows what this takes

        def __init__(
            self,
            on: RetryOn | None = None,  # so that what is missing gets an error of ours
            attempts: int = 3,
            wait_initial: Duration = 0.1,
            wait_max: Duration = 5.0,
            wait_jitter: Duration = 1.0,
            wait_exp_base: float = 2.0,
            timeout: Duration | None = None,
        ) -> None:
            vars(self).update(
                on=on,
                attempts=attempts,
                wait_initial=wait_initial,
                wait_max=wait_max,
                wait_jitter=wait_jitter,
                wait_exp_base=wait_exp_base,
                timeout=timeout,
            )
            self._check()

    def _check(self) -> None:
        if not _is_retry_on(self.on):
            raise InvalidSettingError(
                "on",
                self.on,
                expected="a type of Exception, a tuple of them, or a function of the error, not "
                "async, that returns a bool or a wait",
                instead="Retry(on=ConnectionError)",
            )
        if not is_count(self.attempts):
            raise InvalidSettingError(
                "attempts",
                self.attempts,
                expected="a whole number, 1 or more",
                instead="Retry(on=ConnectionError, attempts=3)",
            )
        for name in ("wait_initial", "wait_max", "wait_jitter"):
            if not is_wait(getattr(self, name)):
                raise InvalidSettingError(
                    name,
                    getattr(self, name),
                    expected="seconds or a timedelta, 0 or more",
                    instead=f"Retry(on=ConnectionError, {name}=0.5)",
                )
        base = self.wait_exp_base
        if not _is_seconds(base) or not 1 <= base < math.inf:
            raise InvalidSettingError(
                "wait_exp_base",
                base,
                expected="a number, 1 or more",
                instead="Retry(on=ConnectionError, wait_exp_base=2)",
            )
        if self.timeout is not None and not _is_duration(self.timeout, is_positive=True):
            raise InvalidSettingError(
                "timeout",
                self.timeout,
                expected="seconds or a timedelta, more than 0, or None",
                instead="Retry(on=ConnectionError, timeout=60)",
            )

    @property
    def kinds(self) -> tuple[type[Exception], ...] | None:
        """The types of ``on``, ``None`` if that is a function."""
        on: Any = self.on
        if isinstance(on, type):
            on = (on,)
        return cast("tuple[type[Exception], ...]", on) if isinstance(on, tuple) else None

    def __repr__(self) -> str:
        changed = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != each.default
        }
        return f"Retry({_shown(changed)})"


class TaskConfig(Value):
    """How a task is to be run; ``None`` means: as the next outer configuration says.

    Configurations merge field by field: the app's (``add_tasks(config=)``), then the function's
    (:func:`task`), then the call's (``tasks.task(...)``).

    :param name: what the task is called in logs; by default the function's qualified name
    :param shield: ``True``: at shutdown the app waits for the task; ``False``, the default: the
        task is cancelled then
    :param on_error: called with the task and its error when the task has failed, sync or async;
        it is shielded with its task
    :param run_if: for a task that waits for a moment of the request: start it if the request
        went well (``"success"``, the default), if it did not (``"error"``), or ``"always"``
    :param retry: when the function is run again after it has failed; by default it is not
    :param timeout: seconds or ``timedelta`` that each attempt may take, counted from the
        function's start; then it is cancelled and has failed with a
        :exc:`~fastapi_tasks.TaskTimeoutError`. A sync function cannot be cancelled: it has failed
        all the same, while its thread goes on. ``math.inf`` is how a call takes back the
        function's; by default there is no limit
    :param delay: seconds or ``timedelta`` between the task's moment and its first attempt; 0 by
        default
    :param limiter: each attempt waits for a place in it; shared by all tasks that name it. It
        takes the place of the limit of threads for a sync function
    :raises InvalidSettingError: a field has a value of the wrong kind
    """

    name: str | None = None
    shield: bool | None = None
    on_error: TaskErrorHandler | None = None
    run_if: RunIf | None = None
    retry: Retry | None = None
    timeout: Duration | None = None
    delay: Duration | None = None
    limiter: anyio.CapacityLimiter | None = None
    is_plain: bool = field(default=True, init=False, repr=False, compare=False)
    """Whether a task is run once and at once, without a limiter or a limit of time."""

    def __init__(
        self,
        name: str | None = None,
        shield: bool | None = None,
        on_error: TaskErrorHandler | None = None,
        run_if: RunIf | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        delay: Duration | None = None,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> None:
        # Checked at run time too: most callers are not type-checked, and a wrong value would
        # otherwise be noticed at a shutdown, when it is too late.
        values = self.__dict__  # gets what is set alone, so that to merge is to update
        if name is not None:
            if not _is_text(name):
                raise InvalidSettingError(
                    "name",
                    name,
                    expected="a string that is not empty, or None",
                    instead='TaskConfig(name="send-receipt")',
                )
            values["name"] = name
        if shield is not None:
            if not _is_bool(shield):
                raise InvalidSettingError(
                    "shield",
                    shield,
                    expected="True, False or None",
                    instead="TaskConfig(shield=True)",
                )
            values["shield"] = shield
        if on_error is not None:
            if not _is_function(on_error):
                discard(on_error)
                raise InvalidSettingError(
                    "on_error",
                    on_error,
                    expected="a function that takes the task and its error, or None",
                    instead="TaskConfig(on_error=alert)  # def alert(task: Task, error: Exception)",
                )
            values["on_error"] = on_error
        if run_if is not None:
            if not _is_run_if(run_if):
                raise InvalidSettingError(
                    "run_if",
                    run_if,
                    expected='"success", "error", "always" or None',
                    instead='TaskConfig(run_if="always")',
                )
            values["run_if"] = run_if
        if not (retry is None and timeout is None and delay is None and limiter is None):
            self._set_control(retry, timeout, delay, limiter)

    def _set_control(
        self,
        retry: Retry | None,
        timeout: Duration | None,
        delay: Duration | None,
        limiter: anyio.CapacityLimiter | None,
    ) -> None:
        """Check and set the fields of which most configurations have none."""
        values = self.__dict__
        if retry is not None:
            if not _is_retry(retry):
                raise InvalidSettingError(
                    "retry",
                    retry,
                    expected="a Retry or None",
                    instead="TaskConfig(retry=Retry(on=ConnectionError))",
                )
            values["retry"] = retry
        if timeout is not None:
            if not _is_duration(timeout, is_positive=True):
                raise InvalidSettingError(
                    "timeout",
                    timeout,
                    expected="seconds or a timedelta, more than 0, or None",
                    instead="TaskConfig(timeout=30)",
                )
            values["timeout"] = timeout
        if delay is not None:
            if not is_wait(delay):
                raise InvalidSettingError(
                    "delay",
                    delay,
                    expected="seconds or a timedelta, 0 or more, or None",
                    instead="TaskConfig(delay=60)",
                )
            values["delay"] = delay
        if limiter is not None:
            if not _is_limiter(limiter):
                raise InvalidSettingError(
                    "limiter",
                    limiter,
                    expected="an anyio.CapacityLimiter or None",
                    instead="TaskConfig(limiter=anyio.CapacityLimiter(5))",
                )
            values["limiter"] = limiter
        values["is_plain"] = self._has_no_control()

    def _has_no_control(self) -> bool:
        """Return whether these fields do nothing."""
        return (
            self.retries is None
            and self.time_limit == math.inf
            and not self.delay
            and self.limiter is None
        )

    @property
    def retries(self) -> Retry | None:
        """``retry``, if it gives the task more than one attempt."""
        return None if self.retry is None or self.retry.attempts == 1 else self.retry

    @property
    def time_limit(self) -> float:
        """Seconds that each attempt may take; infinite if there is no limit."""
        return math.inf if self.timeout is None else in_seconds(self.timeout)

    @property
    def shielded(self) -> bool:
        """Whether the app waits for the task at shutdown."""
        return self.shield is True

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        set_ones = {name: value for name, value in values.items() if value is not None}
        return f"TaskConfig({_shown(set_ones)})"

    def merge(self, inner: TaskConfig) -> TaskConfig:
        """Return this configuration with the fields that ``inner`` sets in place of its own.

        :param inner: the configuration nearer to the call
        """
        if inner is INHERIT_ALL:
            return self
        if self is INHERIT_ALL:
            return inner
        # Not by its class, which would check again what both have checked, for every task that is
        # scheduled with a configuration of its own.
        merged = object.__new__(TaskConfig)
        values = merged.__dict__
        values |= self.__dict__
        values |= inner.__dict__
        if "is_plain" in values:
            values["is_plain"] = merged._has_no_control()
        return merged


INHERIT_ALL = TaskConfig()
"""The configuration that sets nothing: what there is before anybody configured anything."""


class SupervisorSettings(Value):
    """What ``add_tasks`` takes, checked; its meanings are told at :class:`Supervisor`.

    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    config: TaskConfig
    observers: tuple[TaskObserver, ...] = field(repr=False)
    grace: float
    shutdown_timeout: float | None
    threads: int
    max_tasks: int | None
    history: int
    engines: tuple[Engine, ...] = field(repr=False)

    def __init__(
        self,
        config: TaskConfig = INHERIT_ALL,
        observers: tuple[TaskObserver, ...] = (),
        grace: float = 0.0,
        shutdown_timeout: float | None = None,
        threads: int = 40,
        max_tasks: int | None = None,
        history: int = 100,
        engines: tuple[Engine, ...] = (),
    ) -> None:
        if not _is_config(config):
            raise InvalidSettingError(
                "config",
                config,
                expected="a TaskConfig or None",
                instead="add_tasks(app, config=TaskConfig(on_error=alert))",
            )
        for observer in observers:
            if not _is_function(observer) or is_async(observer):
                raise InvalidSettingError(
                    "observers",
                    observer,
                    expected="functions, not coroutine functions, that take a TaskEvent",
                    instead="add_tasks(app, observers=[count_failures])",
                )
        for engine in engines:
            if isinstance(engine, type) or not callable(getattr(engine, "prepare", None)):
                expected, instead = _SEQUENCES["engines"]
                raise InvalidSettingError("engines", engine, expected=expected, instead=instead)
        if not _is_seconds(grace) or grace == math.inf:
            raise InvalidSettingError(
                "grace",
                grace,
                expected="seconds, 0 or more",
                instead="add_tasks(app, grace=10)",
            )
        limit = shutdown_timeout
        if limit is not None and (not _is_seconds(limit) or limit == 0 or limit < grace):
            raise InvalidSettingError(
                "shutdown_timeout",
                limit,
                expected=f"seconds, more than 0 and not less than grace={grace}, or None",
                instead="add_tasks(app, grace=10, shutdown_timeout=25)",
            )
        if not is_count(threads):
            raise InvalidSettingError(
                "threads",
                threads,
                expected="a whole number, 1 or more",
                instead="add_tasks(app, threads=40)",
            )
        if max_tasks is not None and not is_count(max_tasks):
            raise InvalidSettingError(
                "max_tasks",
                max_tasks,
                expected="a whole number, 1 or more, or None",
                instead="add_tasks(app, max_tasks=1000)",
            )
        if not is_count(history, least=0):
            raise InvalidSettingError(
                "history",
                history,
                expected="a whole number, 0 or more",
                instead="add_tasks(app, history=100)",
            )
        vars(self).update(
            config=config,
            observers=observers,
            grace=grace,
            shutdown_timeout=shutdown_timeout,
            threads=threads,
            max_tasks=max_tasks,
            history=history,
            engines=engines,
        )


def in_seconds(duration: Duration) -> float:
    """Return a time in seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def is_wait(value: object) -> bool:
    """Return whether something is a time that can be waited for."""
    return _is_duration(value, is_finite=True)


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_shown_value(value)}" for name, value in values.items())


def _shown_value(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown_value, cast('tuple[object, ...]', value)))})"
    if isinstance(value, anyio.CapacityLimiter):
        return f"CapacityLimiter({value.total_tokens:g})"
    # The repr of a function that is a partial or an object may hold what is private.
    return qualified_name(value) if callable(value) else repr(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_function(value: object) -> bool:
    if type(value) is FunctionType:  # as nearly every one, and ten times as fast
        return not value.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
    return callable(value) and not is_generator(value)


def _is_config(value: object) -> bool:
    return isinstance(value, TaskConfig)


def _is_run_if(value: object) -> bool:
    # Not everything can be asked whether it equals a string: an array can't.
    return isinstance(value, str) and value in _RUN_IF


def is_count(value: object, *, least: int = 1) -> bool:
    """Return whether something is a whole number, of a size that a counter can have."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= sys.maxsize


def is_amount(value: object) -> bool:
    """Return whether something is a number, 0 or more and finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # An integer may be too large for a float, which clocks and others than Python have.
    return 0 <= value <= sys.float_info.max


def _is_seconds(value: object) -> bool:
    return is_amount(value) or (isinstance(value, float) and value == math.inf)


def _is_duration(value: object, *, is_positive: bool = False, is_finite: bool = False) -> bool:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not _is_seconds(seconds):
        return False
    return not (is_positive and seconds == 0) and not (is_finite and seconds == math.inf)


def _is_retry(value: object) -> bool:
    return isinstance(value, Retry)


def _is_retry_on(value: object) -> bool:
    if isinstance(value, tuple):
        kinds = cast("tuple[object, ...]", value)
        return bool(kinds) and all(map(_is_error_type, kinds))
    if isinstance(value, type):
        return _is_error_type(cast(object, value))
    return _is_function(value) and not is_async(value)


def _is_error_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _is_limiter(value: object) -> bool:
    return isinstance(value, anyio.CapacityLimiter)


@overload
def task(config: TaskConfig, /) -> Callable[[_FuncT], _FuncT]: ...
@overload
def task(
    *,
    name: str | None = None,
    shield: bool | None = None,
    on_error: TaskErrorHandler | None = None,
    run_if: RunIf | None = None,
    retry: Retry | None = None,
    timeout: Duration | None = None,
    delay: Duration | None = None,
    limiter: anyio.CapacityLimiter | None = None,
) -> Callable[[_FuncT], _FuncT]: ...
def task(config: TaskConfig | None = None, /, **fields: Any) -> Callable[[_FuncT], _FuncT]:
    """Tie a configuration to a function, which is returned unchanged.

    Wherever the function is scheduled, the configuration applies, over the app's and under the
    call's. If the function has one already, this one goes over that.

    :param config: a whole configuration, or
    :param fields: its fields, as :class:`TaskConfig` takes them
    :return: the decorator
    :raises InvalidSettingError: a field has a value of the wrong kind
    :raises InvalidTaskError: the decorated object cannot carry a configuration
    """
    policy = as_config(config, fields)

    def decorate(func: _FuncT) -> _FuncT:
        target: Any = func
        if isinstance(target, staticmethod | classmethod):
            target = cast(Any, target).__func__  # what is found on the class in their place
        is_async(target)
        inner = policy_of(target) or INHERIT_ALL
        try:
            setattr(target, POLICY, inner.merge(policy))
        except AttributeError:
            raise InvalidTaskError(
                f"a {type(func).__name__}, which cannot carry a configuration",
                instead="tasks.task(shield=True).schedule(func)",
            ) from None
        return func

    return decorate


def as_config(config: object, fields: dict[str, Any]) -> TaskConfig:
    """Return the configuration that was given whole or as fields, in the manner of ``task``.

    :param config: the whole configuration, or ``None``
    :param fields: its fields
    :raises InvalidSettingError: it is not a configuration, or both were given
    """
    if config is None:
        return TaskConfig(**fields) if fields else INHERIT_ALL
    if isinstance(config, TaskConfig) and not fields:
        return config
    raise InvalidSettingError(
        "config",
        config,
        expected="a TaskConfig, or its fields as keyword arguments"
        + (", not both" if fields else ""),
        instead='task(name="send-receipt", shield=True)',
    )


_SEQUENCES = {
    "observers": (
        "a sequence of functions that take a TaskEvent",
        "add_tasks(app, observers=[count_failures])",
    ),
    "engines": ("a sequence of engines", "add_tasks(app, engines=[jobs])"),
}


def as_tuple(setting: str, value: object) -> tuple[Any, ...]:
    """Return what was given as ``observers`` or ``engines`` as a tuple.

    :param setting: which of them it is
    :param value: a sequence
    :raises InvalidSettingError: it is none, but perhaps a single one
    """
    if not isinstance(value, Iterable):
        expected, instead = _SEQUENCES[setting]
        raise InvalidSettingError(setting, value, expected=expected, instead=instead)
    return tuple(cast(Any, value))


def policy_of(func: Callable[..., object]) -> TaskConfig | None:
    """Return the configuration that :func:`task` tied to a function, if any.

    :param func: a function, or a method, instance or ``functools.partial`` that calls one
    """
    policy = getattr(func, POLICY, None)
    if policy is None:
        if isinstance(func, FunctionType):
            return None
        policies = (getattr(part, POLICY, None) for part in parts(func))
        policy = next((found for found in policies if found is not None), None)
    return policy if isinstance(policy, TaskConfig) else None
