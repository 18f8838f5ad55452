"""A process that runs an engine's jobs, and nothing else, until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drain import SHUTTING_DOWN, DrainReport
from .errors import FastAPITasksError
from .observer import describe, logger
from .signals import StopSignals
from .supervisor import Supervisor

if TYPE_CHECKING:
    from .engines import EngineAdapter

__all__ = ["CannotStartError", "WorkerOptions", "run_worker"]

_CUT_OFF = 1
"""The exit status if something was cut off."""

_LEAVING = 2.0
"""Seconds to store what has come of the last jobs, and to leave, at the end of the deadline."""


class CannotStartError(Exception):
    """A worker cannot be started as it was asked for; its text says why."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker was asked for."""

    engine: str
    """Where the engine is: ``package.module:engine``."""
    observers: tuple[str, ...] = ()
    """Where observers are."""
    concurrency: int | None = None
    """How many jobs run at once; ``None``: as the engine was made."""
    shutdown_timeout: float = 25.0
    """Seconds from the signal to the end of the process, at most."""


def run_worker(options: WorkerOptions, stop: StopSignals) -> int:
    """Run an engine's jobs until a signal comes, and return the exit status.

    :param options: what was asked for
    :param stop: the signals
    :raises CannotStartError: it cannot be started
    """
    sys.path.insert(0, str(Path.cwd()))  # the installed command has its own folder there
    engine = _engine_at(options.engine)
    engine.worker = engine.shield = True
    if options.concurrency is not None:
        engine.concurrency = options.concurrency
    observers = [_object_at(place, "observer") for place in options.observers]
    try:
        supervisor = Supervisor(
            engines=[engine],
            observers=observers,
            shutdown_timeout=options.shutdown_timeout - _leaving(options.shutdown_timeout),
        )
    except FastAPITasksError as error:
        raise CannotStartError(error) from None
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Worker(engine, supervisor, options, stop).serve())


class _Worker:
    def __init__(
        self,
        engine: EngineAdapter,
        supervisor: Supervisor,
        options: WorkerOptions,
        stop: StopSignals,
    ) -> None:
        self._engine = engine
        self._supervisor = supervisor
        self._options = options
        self._stop = stop

    async def serve(self) -> int:
        """Run jobs until the signal comes, and return the exit status."""
        self._stop.listen()
        stopping = asyncio.ensure_future(self._stop.wait())
        return await self._work(stopping) if await self._start(stopping) else 0

    async def _work(self, stopping: asyncio.Future[None]) -> int:
        executor = self._engine.executor
        assert executor is not None
        await stopping
        logger.info("%s: no more jobs, and %d to end", self._stop.name, len(executor.running))
        self._limit_the_end()
        report = await self._supervisor.drain()
        return _status_of(report, executor.interrupted)

    async def _start(self, stopping: asyncio.Future[None]) -> bool:
        """Start the engine; return ``False`` if the signal came first.

        :raises CannotStartError: it cannot be started
        """
        starting = asyncio.ensure_future(self._supervisor.start())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            logger.info("%s: the worker had not started yet", self._stop.name)
            return False
        except FastAPITasksError as error:
            raise CannotStartError(error) from None
        except Exception as error:
            raise _raised(f"the start of {self._engine}", error) from None
        logger.info(
            "Worker %d runs the jobs of %s, %d at once, of %d functions",
            os.getpid(),
            self._engine,
            self._engine.concurrency,
            len(self._engine.names),
        )
        return True

    def _limit_the_end(self) -> None:
        """End the process at its deadline, whatever keeps it: a thread cannot be cancelled."""
        limit = threading.Timer(self._options.shutdown_timeout, _leave)
        limit.daemon = True
        limit.start()


def _leave() -> None:
    logger.critical("The worker has not ended in time, and leaves what is left")
    os._exit(_CUT_OFF)


def _status_of(report: DrainReport, interrupted: int) -> int:
    cut_off = report.abandoned + tuple(
        task for task in report.cancelled if task.cancel_reason == SHUTTING_DOWN
    )
    if not cut_off and not interrupted:
        logger.info("Worker %d ends, and nothing was cut off", os.getpid())
        return 0
    logger.warning(
        "Worker %d ends; cut off: %s; jobs that are to run again elsewhere: %d",
        os.getpid(),
        describe(cut_off) or "nobody, but what has failed of it",
        interrupted,
    )
    return _CUT_OFF


def _leaving(shutdown_timeout: float) -> float:
    return min(_LEAVING, shutdown_timeout / 5)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's loops, if that is installed; servers choose so too."""
    with suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


def _engine_at(place: str) -> EngineAdapter:
    from .engines import EngineAdapter  # an app without engines does not import them either

    engine = _object_at(place, "engine")
    if not isinstance(engine, EngineAdapter):
        got = f"the class {engine.__name__}" if isinstance(engine, type) else type(engine).__name__
        raise CannotStartError(
            f'expected an engine at "{place}", such as DBOSEngine("sqlite:///jobs.db"); got {got}'
        )
    if not engine.names:
        module = place.partition(":")[0]
        raise CannotStartError(
            f"no function is registered with {engine}. Import the modules that register some, by "
            f"@engine.task, in {module}; or name one of them that imports the engine: "
            "fastapi-tasks worker package.jobs:engine"
        )
    return engine


def _object_at(place: str, what: str) -> Any:
    """Import what is at ``package.module:name``.

    :param what: what it is to be, for the error
    """
    module_name, _, attributes = place.partition(":")
    if not all(part.isidentifier() for part in f"{module_name}.{attributes}".split(".")):
        raise CannotStartError(
            f'expected where the {what} is, as "package.module:{what}"; got "{place}"'
        )
    found: Any = _module(module_name)
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise CannotStartError(
                f'expected the {what} at "{place}", but {module_name} has no {attributes!r}. '
                f'Name what is there: "{module_name}:{what}"'
            ) from None
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _raised(f"the import of {name}", error) from None
        raise CannotStartError(
            f'expected a module "{name}", but there is no "{error.name}" in {Path.cwd()}, nor '
            "among what is installed. Start the worker in the folder that holds the package, or "
            "put that into PYTHONPATH"
        ) from None
    except Exception as error:
        raise _raised(f"the import of {name}", error) from None


def _raised(what: str, error: Exception) -> CannotStartError:
    # It is the user's own code that raised, and only its traceback says where.
    return CannotStartError(f"{what} raised:\n{''.join(traceback.format_exception(error))}")
