"""Everything that fastapi_tasks raises.

::

    FastAPITasksError
    ├── FastAPITasksUninitializedAppError   nothing runs tasks for this app (yet, or any more)
    ├── AddTasksError                       ``add_tasks`` was called in a way that cannot work
    ├── EngineStateError                    an engine was used while it does not run
    ├── EngineUnavailableError              an engine cannot be reached (a ConnectionError)
    ├── InvalidArgumentsError               arguments cannot travel to a worker (a TypeError)
    ├── InvalidSettingError                 a setting cannot have that value (a ValueError)
    ├── InvalidTaskError                    that cannot be run as a task (a TypeError)
    ├── JobCancelledError                   the result of a cancelled job was waited for
    ├── JobFailedError                      the job failed, in a worker
    ├── MalformedMessageError               a worker was sent what is no job (a ValueError)
    ├── MissingPackageError                 an extra was not installed (an ImportError)
    ├── MisusedTestToolError                a tool of ``testing`` was used in a way that cannot work
    ├── NoCurrentTaskError                  there is no current task here (a LookupError)
    ├── NoResultError                       the engine has no result of that job (a LookupError)
    ├── StillBusyError                      tasks did not end in the time of a test (a TimeoutError)
    ├── SupervisorStateError                a supervisor was started or drained at the wrong time
    ├── TaskCancelledError                  the result of a cancelled task was asked for
    ├── TaskFailedError                     the task ended with what must not end its caller
    ├── TaskNotFinishedError                the result was asked for before there was one
    ├── TaskTimeoutError                    an attempt took longer than it may (a TimeoutError)
    ├── TooManyTasksError                   the app has as many tasks as it may (an HTTPException)
    ├── UnregisteredFunctionError           the engine does not know the function (a LookupError)
    ├── UnsupportedFastAPIError             what the package stands on is not there
    ├── WorkerLostError                     a job has failed since no worker survives it
    └── WrongEventLoopError                 waiting takes place in another event loop

Each class builds its message from data: what came, what was expected, what to write instead.
"""

from __future__ import annotations

import inspect
from enum import Enum
from types import FunctionType
from typing import Any

from fastapi import exceptions

__all__ = [
    "AddTasksError",
    "EngineStateError",
    "EngineUnavailableError",
    "FastAPITasksError",
    "FastAPITasksUninitializedAppError",
    "InvalidArgumentsError",
    "InvalidSettingError",
    "InvalidTaskError",
    "JobCancelledError",
    "JobFailedError",
    "MalformedMessageError",
    "MissingPackageError",
    "MisusedTestToolError",
    "NoCurrentTaskError",
    "NoResultError",
    "StillBusyError",
    "SupervisorStateError",
    "TaskCancelledError",
    "TaskFailedError",
    "TaskNotFinishedError",
    "TaskTimeoutError",
    "TooManyTasksError",
    "UninitializedReason",
    "UnregisteredFunctionError",
    "UnsupportedFastAPIError",
    "WorkerLostError",
    "WrongEventLoopError",
]


class FastAPITasksError(Exception):
    """The base of all errors of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are copied by their arguments, which here are the message alone.
        return _copy, (type(self), self.args), self.__dict__


def _copy(kind: type[FastAPITasksError], args: tuple[Any, ...]) -> FastAPITasksError:
    error = kind.__new__(kind, *args)
    error.args = args  # an OSError, as a TimeoutError is, takes them in its __init__ only
    return error


class UninitializedReason(Enum):
    """Why nothing runs tasks for an app, as told by :exc:`FastAPITasksUninitializedAppError`."""

    NO_ADD_TASKS = (
        "Tasks cannot be scheduled: add_tasks() was never called for this app.\n"
        "Add one line where the app is made:\n"
        "    app = FastAPI()\n"
        "    add_tasks(app)"
    )
    NOT_STARTED = (
        "Tasks cannot be scheduled: add_tasks(app) was called, but the app's lifespan has\n"
        "not run, and it is the lifespan that starts the supervisor. How is the app served?\n"
        "  TestClient without a with block:  with TestClient(app) as client: ...\n"
        "  a test that needs no lifespan:    with fastapi_tasks.testing.run_inline(app): ...\n"
        "  ASGITransport on its own:         async with asgi_lifespan.LifespanManager(app): ...\n"
        "  app.router.lifespan_context:      async with get_supervisor(app): ...  around it\n"
        "  mounted in another app:           add_tasks(outer_app), whose lifespan is the one run\n"
        "  a server with lifespan off:       uvicorn --lifespan on"
    )
    STOPPED = (
        "Tasks cannot be scheduled: the app's lifespan has ended and its supervisor has been\n"
        "drained. Serve requests between start-up and shutdown only:\n"
        "    with TestClient(app) as client: ...  # every request inside the block"
    )
    NO_CONTEXT = (
        "get_supervisor() without an app works inside a request that takes Tasks, and inside a\n"
        "task. Elsewhere, name the app:\n"
        "    get_supervisor(app)"
    )


class FastAPITasksUninitializedAppError(FastAPITasksError, RuntimeError):
    """Nothing runs tasks here: no ``add_tasks``, no running lifespan, or no app to be told from.

    :param reason: which of them it is; its text says which line mends it
    """

    def __init__(self, reason: UninitializedReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class AddTasksError(FastAPITasksError):
    """``add_tasks`` was called in a way that cannot work.

    :param problem: what is wrong
    :param instead: the line to write instead
    """

    def __init__(self, problem: str, *, instead: str) -> None:
        super().__init__(f"add_tasks: {problem}. Write instead: {instead}")


class InvalidSettingError(FastAPITasksError, ValueError):
    """A setting has a value that it cannot have.

    :param setting: the name of the parameter
    :param value: what came
    :param expected: what was expected
    :param instead: the line to write instead
    """

    def __init__(self, setting: str, value: object, *, expected: str, instead: str) -> None:
        super().__init__(
            f"{setting}{_shown(value)}: expected {expected}, got {_kind(value)}. "
            f"Write for example: {instead}"
        )
        self.setting = setting


_SHOWN_BITS = 64


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return ""  # nobody reads so many digits, and Python may refuse to write them
    if isinstance(value, str | int | float | None):
        return f"={value!r}"
    if isinstance(value, FunctionType):
        return f"={value.__qualname__}"
    return ""  # the repr may hold what is private: a partial's has its arguments


def _kind(value: object) -> str:
    # That a type or a function came, does not say what was wrong with it.
    if isinstance(value, type):
        return f"the type {value.__name__}"
    if inspect.iscoroutinefunction(value):
        return "an async function"
    if inspect.isgeneratorfunction(value) or inspect.isasyncgenfunction(value):
        return "a generator function"
    return type(value).__name__


class InvalidTaskError(FastAPITasksError, TypeError):
    """What was given to ``schedule`` cannot be run as a task.

    :param got: what came, described without its arguments
    :param expected: what was expected
    :param instead: the line to write instead
    """

    def __init__(
        self,
        got: str,
        *,
        expected: str = "a function, and its arguments beside it",
        instead: str,
    ) -> None:
        super().__init__(f"Expected {expected}; got {got}. Write instead: {instead}")


class JobCancelledError(FastAPITasksError):
    """The result of a job was waited for that was cancelled.

    :param job_id: the job's
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Job {job_id} was cancelled, so there is no result")
        self.job_id = job_id


class JobFailedError(FastAPITasksError):
    """A job has failed, in a worker. The error itself is there, in the worker's log.

    :param job_id: the job's
    :param error_type: the name of the error's type
    :param error: its text
    """

    def __init__(self, job_id: str, error_type: str, error: str) -> None:
        super().__init__(f"Job {job_id} failed: {error_type}: {error}")
        self.job_id = job_id
        self.error_type = error_type
        self.error = error


class MalformedMessageError(FastAPITasksError, ValueError):
    """A worker was sent what is no job of this package, or not of this version of it.

    :param problem: what is wrong with it, and not what is in it
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"That is no job: {problem}. It was kept, and was not run")


class NoResultError(FastAPITasksError, LookupError):
    """An engine has no result of a job: it keeps none, or not for so long.

    :param job_id: the job's
    :param reason: why there is none
    """

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(f"There is no result of job {job_id}: {reason}")
        self.job_id = job_id


class UnregisteredFunctionError(FastAPITasksError, LookupError):
    """A function was to be enqueued, or run, that is not registered with the engine.

    :param name: the function's
    :param engine: the engine, by what it calls itself
    """

    def __init__(self, name: str, engine: str) -> None:
        super().__init__(
            f"{engine} does not know {name}. Register it where it is defined, in a module that "
            f"the worker imports too: @engine.task"
        )


class MissingPackageError(FastAPITasksError, ImportError):
    """A module was imported that needs a package which is not installed.

    :param module: the module
    :param package: what it needs
    :param extra: the extra of this package that brings it
    """

    def __init__(self, module: str, package: str, *, extra: str) -> None:
        super().__init__(
            f"{module} needs {package}, which is not installed, or too old. Install it: "
            f"pip install 'fastapi-tasks[{extra}]'"
        )


class EngineStateError(FastAPITasksError, RuntimeError):
    """An engine was used while it does not run, or was started in a way that cannot work.

    :param problem: what is wrong
    :param instead: the line to write instead
    """

    def __init__(self, problem: str, *, instead: str) -> None:
        super().__init__(f"{problem}. Write instead: {instead}")


class EngineUnavailableError(FastAPITasksError, ConnectionError):
    """What an engine stands on could not be reached, or did not answer in time.

    :param engine: the engine, by what it calls itself
    :param problem: what happened
    :param instead: what to look at, or the line to write instead
    """

    def __init__(self, engine: str, problem: str, *, instead: str) -> None:
        super().__init__(f"{engine}: {problem}. {instead}")


class InvalidArgumentsError(FastAPITasksError, TypeError):
    """The arguments of a registered function, or its result, do not fit its annotations.

    What they are is not told: they are private.

    :param name: the function's
    :param problem: which of them, and what is wrong with it
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"{name} cannot be called so by a worker: {problem}. Pass what its annotations say, "
            "and what JSON can hold: a key in place of a session, a file or a function"
        )


class MisusedTestToolError(FastAPITasksError, RuntimeError):
    """Something of :mod:`fastapi_tasks.testing` was used in a way that cannot work.

    :param problem: what is wrong
    :param instead: the line to write instead
    """

    def __init__(self, problem: str, *, instead: str) -> None:
        super().__init__(f"fastapi_tasks.testing: {problem}. Write instead: {instead}")


class NoCurrentTaskError(FastAPITasksError, LookupError):
    """:func:`~fastapi_tasks.current_task` was called outside of a task."""

    def __init__(self) -> None:
        super().__init__(
            "current_task() works inside a task only, that is in a function that was handed to "
            "schedule(). In an endpoint, keep what schedule() returned: "
            "task = tasks.schedule(func)"
        )


class StillBusyError(FastAPITasksError, TimeoutError):
    """Tasks had not ended when a test would not wait for them any longer.

    :param live: the live tasks, described
    :param requests: how many requests have tasks that wait for their moments
    :param seconds: how long it was waited for
    """

    def __init__(self, live: str, requests: int, seconds: float) -> None:
        super().__init__(
            f"After {seconds:g} s there are still tasks. Live: {live or 'none'}; "
            f"requests with tasks that wait for their moments: {requests}"
        )


class SupervisorStateError(FastAPITasksError, RuntimeError):
    """A supervisor was started while it runs, or drained while it does not.

    :param problem: what was tried, and in which state the supervisor is
    """

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}. A supervisor runs between start() and drain(), once at a time; "
            "add_tasks(app) calls both with the app's lifespan. By hand: "
            "async with Supervisor() as supervisor: ..."
        )


class TaskCancelledError(FastAPITasksError):
    """A cancelled or dropped task has no result.

    :param task: the task
    """

    def __init__(self, task: Any) -> None:
        super().__init__(
            f"{task.name} ({task.id}) was cancelled, it has no result. "
            "Look at task.status before you ask for it."
        )


class TaskFailedError(FastAPITasksError):
    """The task raised what is no ``Exception``: whoever waits for it must not be ended by it.

    What the function raised is the error's ``__cause__``, and ``task.exception()``.

    :param task: the task
    :param error: what it raised, ``SystemExit`` for example
    """

    def __init__(self, task: Any, error: BaseException) -> None:
        super().__init__(f"{task.name} ({task.id}) ended with {type(error).__name__}")


class TaskNotFinishedError(FastAPITasksError):
    """The task has neither a result nor an error yet.

    :param task: the task
    """

    def __init__(self, task: Any) -> None:
        super().__init__(
            f"{task.name} ({task.id}) is {task.status}, its result is not there yet. "
            "Wait for it: await task.wait()"
        )


class TaskTimeoutError(FastAPITasksError, TimeoutError):
    """An attempt took longer than the ``timeout`` of its task.

    Where an async function was cancelled, is told by the traceback of the error's ``__cause__``.

    :param task: the task
    :param seconds: how long it may take
    """

    def __init__(self, task: Any, seconds: float) -> None:
        super().__init__(f"{task.name} ({task.id}) did not end within {seconds:g} s")


class TooManyTasksError(FastAPITasksError, exceptions.HTTPException):
    """A request was refused, since as many tasks are live as ``max_tasks`` allows.

    It is an ``HTTPException`` with status 503 and a ``Retry-After``. Its text is for the log; what
    a client may read is its ``detail``.

    :param limit: the ``max_tasks`` that the supervisor has
    """

    def __init__(self, limit: int) -> None:
        super().__init__(
            503,
            detail="The server is busy. Try again in a moment.",
            headers={"Retry-After": "1"},
        )
        self.limit = limit
        message = (
            f"As many tasks are live as max_tasks={limit} allows, so the request was refused "
            "before its endpoint ran. If the process can carry more of them: "
            f"add_tasks(app, max_tasks={2 * limit})"
        )
        self.args = (message,)

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedFastAPIError(FastAPITasksError):
    """What the package stands on is not there: no FastAPI route, or one of another FastAPI.

    :param missing: what was looked for
    """

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"There is no {missing}, by which fastapi_tasks knows when a route and its response "
            "are over. Outside of FastAPI's routes, in a middleware for example, schedule on "
            "get_supervisor(app). Inside of one, install a supported FastAPI: "
            "pip install 'fastapi>=0.128'"
        )


class WorkerLostError(FastAPITasksError):
    """A job has failed, since the workers that it was given to were lost: it may have killed them.

    :param deliveries: how many there were
    """

    def __init__(self, deliveries: int) -> None:
        super().__init__(
            f"Of the {deliveries} workers that the job was given to, none has survived it or kept "
            "in touch: it is not run again"
        )
        self.deliveries = deliveries


class WrongEventLoopError(FastAPITasksError, RuntimeError):
    """A task was waited for outside of the event loop that runs it.

    :param task: the task
    """

    def __init__(self, task: Any) -> None:
        super().__init__(
            f"{task.name} ({task.id}) runs in another event loop, where it can be waited for: "
            "anyio.from_thread.run(task.wait) from a worker thread, "
            "client.portal.call(task.wait) beside a TestClient"
        )
