"""How a task is to be run, as data: :class:`TaskConfig`, and :func:`task`, which ties one to a
function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from .callables import discard, is_async, is_generator, parts, qualified_name
from .errors import InvalidSettingError, InvalidTaskError

if TYPE_CHECKING:
    from .observer import TaskObserver
    from .tasks import TaskErrorHandler

__all__ = [
    "INHERIT_ALL",
    "RunIf",
    "SupervisorSettings",
    "TaskConfig",
    "as_config",
    "as_tuple",
    "policy_of",
    "task",
]

RunIf = Literal["success", "error", "always"]

_RUN_IF: tuple[RunIf, ...] = ("success", "error", "always")
_POLICY = "__fastapi_tasks_policy__"

_FuncT = TypeVar("_FuncT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, repr=False)
class TaskConfig:
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
    :raises InvalidSettingError: a field has a value of the wrong kind
    """

    name: str | None = None
    shield: bool | None = None
    on_error: TaskErrorHandler | None = None
    run_if: RunIf | None = None

    def __post_init__(self) -> None:
        # Checked at run time too: most callers are not type-checked, and a wrong value would
        # otherwise be noticed at a shutdown, when it is too late.
        if self.name is not None and not _is_text(self.name):
            raise InvalidSettingError(
                "name",
                self.name,
                expected="a string that is not empty, or None",
                instead='TaskConfig(name="send-receipt")',
            )
        if self.shield is not None and not _is_bool(self.shield):
            raise InvalidSettingError(
                "shield",
                self.shield,
                expected="True, False or None",
                instead="TaskConfig(shield=True)",
            )
        if self.on_error is not None and not _is_function(self.on_error):
            discard(self.on_error)
            raise InvalidSettingError(
                "on_error",
                self.on_error,
                expected="a function that takes the task and its error, or None",
                instead="TaskConfig(on_error=alert)  # def alert(task: Task, error: Exception)",
            )
        if self.run_if is not None and self.run_if not in _RUN_IF:
            raise InvalidSettingError(
                "run_if",
                self.run_if,
                expected='"success", "error", "always" or None',
                instead='TaskConfig(run_if="always")',
            )

    @property
    def shielded(self) -> bool:
        """Whether the app waits for the task at shutdown."""
        return self.shield is True

    def __repr__(self) -> str:
        # The repr of a function that is a partial or an object may hold what is private.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        shown = (
            f"{name}={qualified_name(value) if callable(value) else repr(value)}"
            for name, value in values.items()
            if value is not None
        )
        return f"TaskConfig({', '.join(shown)})"

    def merge(self, inner: TaskConfig) -> TaskConfig:
        """Return this configuration with the fields that ``inner`` sets in place of its own.

        :param inner: the configuration nearer to the call
        """
        if inner is INHERIT_ALL:
            return self
        if self is INHERIT_ALL:
            return inner
        return TaskConfig(
            name=self.name if inner.name is None else inner.name,
            shield=self.shield if inner.shield is None else inner.shield,
            on_error=self.on_error if inner.on_error is None else inner.on_error,
            run_if=self.run_if if inner.run_if is None else inner.run_if,
        )


INHERIT_ALL = TaskConfig()
"""The configuration that sets nothing: what there is before anybody configured anything."""


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """What ``add_tasks`` takes, checked; its meanings are told at :class:`Supervisor`.

    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    config: TaskConfig = INHERIT_ALL
    observers: tuple[TaskObserver, ...] = field(default=(), repr=False)
    grace: float = 0.0
    shutdown_timeout: float | None = None
    threads: int = 40
    max_tasks: int | None = None

    def __post_init__(self) -> None:
        if not _is_config(self.config):
            raise InvalidSettingError(
                "config",
                self.config,
                expected="a TaskConfig or None",
                instead="add_tasks(app, config=TaskConfig(on_error=alert))",
            )
        for observer in self.observers:
            if not _is_function(observer) or is_async(observer):
                raise InvalidSettingError(
                    "observers",
                    observer,
                    expected="functions, not coroutine functions, that take a TaskEvent",
                    instead="add_tasks(app, observers=[count_failures])",
                )
        if not _is_seconds(self.grace) or self.grace == math.inf:
            raise InvalidSettingError(
                "grace",
                self.grace,
                expected="seconds, 0 or more",
                instead="add_tasks(app, grace=10)",
            )
        limit = self.shutdown_timeout
        if limit is not None and (not _is_seconds(limit) or limit == 0 or limit < self.grace):
            raise InvalidSettingError(
                "shutdown_timeout",
                limit,
                expected=f"seconds, more than 0 and not less than grace={self.grace}, or None",
                instead="add_tasks(app, grace=10, shutdown_timeout=25)",
            )
        if not _is_count(self.threads):
            raise InvalidSettingError(
                "threads",
                self.threads,
                expected="a whole number, 1 or more",
                instead="add_tasks(app, threads=40)",
            )
        if self.max_tasks is not None and not _is_count(self.max_tasks):
            raise InvalidSettingError(
                "max_tasks",
                self.max_tasks,
                expected="a whole number, 1 or more, or None",
                instead="add_tasks(app, max_tasks=1000)",
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_function(value: object) -> bool:
    return callable(value) and not is_generator(value)


def _is_config(value: object) -> bool:
    return isinstance(value, TaskConfig)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


@overload
def task(config: TaskConfig, /) -> Callable[[_FuncT], _FuncT]: ...
@overload
def task(
    *,
    name: str | None = None,
    shield: bool | None = None,
    on_error: TaskErrorHandler | None = None,
    run_if: RunIf | None = None,
) -> Callable[[_FuncT], _FuncT]: ...
def task(config: TaskConfig | None = None, /, **fields: Any) -> Callable[[_FuncT], _FuncT]:
    """Tie a configuration to a function, which is returned unchanged.

    Wherever the function is scheduled, the configuration applies, over the app's and under the
    call's.

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
        try:
            setattr(target, _POLICY, policy)
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
        expected="a TaskConfig, or its fields as keyword arguments, not both",
        instead='task(name="send-receipt", shield=True)',
    )


def as_tuple(observers: object) -> tuple[TaskObserver, ...]:
    """Return what was given as ``observers`` as a tuple.

    :param observers: a sequence of observers
    :raises InvalidSettingError: it is none, but perhaps a single one
    """
    if not isinstance(observers, Iterable):
        raise InvalidSettingError(
            "observers",
            observers,
            expected="a sequence of functions that take a TaskEvent",
            instead="add_tasks(app, observers=[count_failures])",
        )
    return tuple(cast("Iterable[TaskObserver]", observers))


def policy_of(func: Callable[..., object]) -> TaskConfig | None:
    """Return the configuration that :func:`task` tied to a function, if any.

    :param func: a function, or a method, instance or ``functools.partial`` that calls one
    """
    policy = getattr(func, _POLICY, None)
    if policy is None and not isinstance(func, FunctionType):
        policies = (getattr(part, _POLICY, None) for part in parts(func))
        policy = next((found for found in policies if found is not None), None)
    return policy if isinstance(policy, TaskConfig) else None
