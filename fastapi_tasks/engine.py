"""The engine protocol: what runs functions that are registered with it, somewhere else.

A supervisor starts and stops the engines that it is given, and hands over to them what they claim.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from .callables import parts
from .observer import logger

if TYPE_CHECKING:
    from .supervisor import Supervisor

__all__ = ["Engine", "Enqueueing", "StartedEngines", "engine_of", "register"]

_ENGINE = "__fastapi_tasks_engine__"

Enqueueing = Callable[[], Awaitable[Any]]
"""Enqueues one call, whose arguments it holds in the form in which they travel."""


class Engine(Protocol):
    """Runs the functions that are registered with it, durably or on other machines."""

    @property
    def is_started(self) -> bool:
        """Whether jobs can be enqueued."""
        ...

    async def start(self, supervisor: Supervisor) -> None:
        """Connect, and begin to run jobs if this process is to do so.

        :param supervisor: what runs the jobs in this process
        :raises EngineUnavailableError: what the engine stands on cannot be reached
        """
        ...

    def pause(self) -> None:
        """Take no more jobs, since the supervisor is about to be drained."""
        ...

    async def stop(self) -> None:
        """Disconnect, when no job runs in this process any more."""
        ...

    def prepare(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        delay: float,
    ) -> Enqueueing:
        """Check a call of a registered function, and return what enqueues it.

        :param delay: seconds that the job waits before it begins
        :raises InvalidArgumentsError: they do not fit the function, or cannot travel
        :raises EngineStateError: the engine is not started
        """
        ...

    def name_of(self, func: Callable[..., Any]) -> str:
        """Return the name by which a function was registered."""
        ...


def register(func: Callable[..., Any], engine: Engine) -> None:
    """Let an engine claim a function, wherever it is scheduled.

    :param func: a function of Python's
    :param engine: the engine
    """
    setattr(func, _ENGINE, engine)


def engine_of(func: Callable[..., Any]) -> Engine | None:
    """Return the engine that claims a function, if one does.

    :param func: any callable; a ``functools.partial`` is looked through
    """
    return next((getattr(part, _ENGINE) for part in parts(func) if hasattr(part, _ENGINE)), None)


class StartedEngines:
    """The engines that a supervisor has started."""

    def __init__(self) -> None:
        self._engines: list[Engine] = []

    async def start(self, engines: Iterable[Engine], supervisor: Supervisor) -> None:
        """Start engines, one after the other.

        :raises EngineUnavailableError: what one of them stands on cannot be reached
        :raises EngineStateError: one of them cannot be started here
        """
        for engine in engines:
            await engine.start(supervisor)
            self._engines.append(engine)

    def pause(self) -> None:
        """Have them take no more jobs, whatever becomes of one of them."""
        for engine in self._engines:
            try:
                engine.pause()
            except Exception:
                logger.exception("An engine could not be paused as it should: %s", engine)

    async def stop(self) -> None:
        """Stop them, the last one first, whatever becomes of the others."""
        while self._engines:
            engine = self._engines.pop()
            try:
                await engine.stop()
            except Exception:
                logger.exception("An engine could not be stopped as it should: %s", engine)
