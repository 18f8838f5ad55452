"""Work that must not hold up a response: tasks for FastAPI.

An endpoint takes ``tasks: Tasks`` and starts work now, after the endpoint has returned, or after
the response; at shutdown a supervisor cancels what may be lost and waits for what must not be.
"""

from __future__ import annotations

from .app import add_tasks, get_supervisor
from .bound import BoundTasks
from .config import Retry, RunIf, TaskConfig, task
from .drain import DrainReport
from .errors import (
    AddTasksError,
    EngineStateError,
    EngineUnavailableError,
    FastAPITasksError,
    FastAPITasksUninitializedAppError,
    InvalidArgumentsError,
    InvalidSettingError,
    InvalidTaskError,
    JobCancelledError,
    JobFailedError,
    MalformedMessageError,
    MissingPackageError,
    MisusedTestToolError,
    NoCurrentTaskError,
    NoResultError,
    StillBusyError,
    SupervisorStateError,
    TaskCancelledError,
    TaskFailedError,
    TaskNotFinishedError,
    TaskTimeoutError,
    TooManyTasksError,
    UninitializedReason,
    UnregisteredFunctionError,
    UnsupportedFastAPIError,
    WorkerLostError,
    WrongEventLoopError,
)
from .info import Progress, TaskInfo
from .observer import TaskEvent, TaskEventKind, TaskObserver
from .request_bound import RequestBoundArgumentWarning
from .routing import Tasks, TasksRoute, get_tasks
from .scheduler import TasksBatch, TasksScheduler
from .supervisor import Supervisor
from .tasks import Moment, Task, TaskErrorHandler, TaskStatus, current_task

__all__ = [
    "AddTasksError",
    "BoundTasks",
    "DrainReport",
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
    "Moment",
    "NoCurrentTaskError",
    "NoResultError",
    "Progress",
    "RequestBoundArgumentWarning",
    "Retry",
    "RunIf",
    "StillBusyError",
    "Supervisor",
    "SupervisorStateError",
    "Task",
    "TaskCancelledError",
    "TaskConfig",
    "TaskErrorHandler",
    "TaskEvent",
    "TaskEventKind",
    "TaskFailedError",
    "TaskInfo",
    "TaskNotFinishedError",
    "TaskObserver",
    "TaskStatus",
    "TaskTimeoutError",
    "Tasks",
    "TasksBatch",
    "TasksRoute",
    "TasksScheduler",
    "TooManyTasksError",
    "UninitializedReason",
    "UnregisteredFunctionError",
    "UnsupportedFastAPIError",
    "WorkerLostError",
    "WrongEventLoopError",
    "add_tasks",
    "current_task",
    "get_supervisor",
    "get_tasks",
    "task",
]


def _show_public_module() -> None:
    # Whoever meets one of the names in a traceback should find the one to import.
    for name in __all__:
        value = globals()[name]
        if getattr(value, "__module__", "").startswith(f"{__name__}."):
            value.__module__ = __name__


_show_public_module()
