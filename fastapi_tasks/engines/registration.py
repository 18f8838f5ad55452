"""The functions that are registered with an engine: nothing else is ever run by its workers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from fastapi_tasks.callables import is_async, parts, qualified_name
from fastapi_tasks.config import Retry, TaskConfig, task
from fastapi_tasks.engine import Engine, engine_of, register
from fastapi_tasks.errors import (
    InvalidSettingError,
    InvalidTaskError,
    UnregisteredFunctionError,
)
from fastapi_tasks.tasks import TaskErrorHandler

from .arguments import Arguments

__all__ = ["Registered", "Registry"]


@dataclass(frozen=True, slots=True)
class Registered:
    """A function, and how its jobs are to be run."""

    func: Callable[..., Any]
    name: str
    """What it is called in messages: the same in every process."""
    arguments: Arguments
    retry: Retry | None
    timeout: float | None
    """Seconds that each attempt may take."""
    on_error: TaskErrorHandler | None


class Registry:
    """The functions of one engine, by their names.

    :param engine: the engine
    :param label: what it calls itself in messages
    """

    def __init__(self, engine: Engine, label: str) -> None:
        self._engine = engine
        self._label = label
        self._by_name: dict[str, Registered] = {}
        self._by_func: dict[Callable[..., Any], Registered] = {}

    def add(self, func: Callable[..., Any], config: TaskConfig) -> None:
        """Register a function.

        :param func: the function
        :param config: its name, retry, limit of time and error handler
        :raises InvalidTaskError: it is no function, or another engine has it, or its annotations
            say nothing that can be written as JSON
        :raises InvalidSettingError: another function has its name
        """
        is_async(func)  # raises for what cannot be a task
        if type(func) is not FunctionType:
            raise InvalidTaskError(
                f"a {type(func).__name__}, which a worker could not find by its name",
                instead="@engine.task above a function of a module",
            )
        name = config.name or f"{_module_of(func)}.{qualified_name(func)}"
        if engine_of(func) is not None:
            raise InvalidTaskError(
                f"{name}, which is registered with an engine already",
                instead="one @engine.task above it",
            )
        if name in self._by_name:
            raise InvalidSettingError(
                "name",
                name,
                expected="one that no other function of the engine has",
                instead='@engine.task(name="charge-card")',
            )
        limit = config.time_limit
        registered = Registered(
            func,
            name,
            Arguments(func),
            config.retry,
            None if limit == math.inf else limit,
            config.on_error,
        )
        self._by_name[name] = self._by_func[func] = registered
        task(config)(func)  # in a test, which has no engine, it runs as any other function does
        register(func, self._engine)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions."""
        return tuple(self._by_name)

    def by_name(self, name: str) -> Registered:
        """Return a function by its name.

        :raises UnregisteredFunctionError: there is none
        """
        registered = self._by_name.get(name)
        if registered is None:
            raise UnregisteredFunctionError(f"the function {name!r}", self._label)
        return registered

    def of(self, func: Callable[..., Any]) -> Registered:
        """Return what is known of a function.

        :raises UnregisteredFunctionError: nothing
        """
        registered = self._by_func.get(parts(func)[0])
        if registered is None:
            raise UnregisteredFunctionError(qualified_name(func), self._label)
        return registered


def _module_of(func: Callable[..., Any]) -> str:
    """Return the module's name, also if it is what Python runs: a worker imports it by its own."""
    if func.__module__ != "__main__":
        return func.__module__
    main = sys.modules["__main__"]
    spec = main.__spec__
    return Path(str(main.__file__)).stem if spec is None else spec.name
