"""What a row of DBOS's tells of a job."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from dbos import WorkflowStatus
from pydantic import BaseModel, ConfigDict, ValidationError

from fastapi_tasks.errors import WorkerLostError
from fastapi_tasks.info import Progress, TaskInfo, TaskStatus, shown_error

from .base import JobRecord

__all__ = [
    "OVER",
    "JobError",
    "Notes",
    "is_over",
    "lost_by",
    "noted_start",
    "notes_of",
    "record_of",
]

OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
"""The states in which nothing becomes of a job any more."""

_STATUSES = {
    "DELAYED": TaskStatus.PENDING,
    "ENQUEUED": TaskStatus.PENDING,
    "PENDING": TaskStatus.RUNNING,
    "SUCCESS": TaskStatus.SUCCEEDED,
    "CANCELLED": TaskStatus.CANCELLED,
}


class JobError(Exception):
    """What a job's workflow ends with, so that DBOS too takes it for a failed one.

    :param error_type: the name of the error's type
    :param error: its text
    """

    def __init__(self, error_type: str, error: str) -> None:
        super().__init__(f"{error_type}: {error}")
        self.data = {"error_type": error_type, "error": error}
        """What DBOS stores beside the text."""


class Notes(BaseModel):
    """What is written beside a job's state."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    created: float | None = None
    started: float | None = None
    attempt: int = 0
    """The latest one that has failed."""
    begun: int | None = None
    """The latest one, when somebody asked for the job to be cancelled."""
    due: float = 0.0
    """When the next one is."""
    progress: Progress | None = None
    lost: int = 0
    """How many processes have not survived it, if it is to run no more."""


class _Told(BaseModel):
    error_type: str
    error: str


def notes_of(row: WorkflowStatus) -> Notes:
    """Read what is written beside a job's state, if it is what this package writes."""
    try:
        return Notes.model_validate(row.attributes or {})
    except ValidationError:
        return Notes()


def is_over(row: WorkflowStatus) -> bool:
    """Return whether nothing becomes of the job any more."""
    return row.status in OVER


def record_of(row: WorkflowStatus) -> JobRecord:
    """Read a row, whoever has written it."""
    notes = notes_of(row)
    status = _STATUSES.get(row.status, TaskStatus.FAILED)
    attempt = notes.attempt
    if status is TaskStatus.CANCELLED and notes.begun is not None:
        attempt = notes.begun
    if row.status == "PENDING" and notes.due > time.time():
        status = TaskStatus.PENDING  # it waits to be attempted again
    elif status in (TaskStatus.RUNNING, TaskStatus.SUCCEEDED, TaskStatus.FAILED):
        attempt += 1
    created = notes.created or _seconds(row.created_at) or 0.0
    # Some versions of Python have DBOS write whole seconds.
    started = _later(created, notes.started or _seconds(row.dequeued_at))
    finished = _later(started or created, _seconds(row.completed_at))
    error_type, error = (None, None) if status is not TaskStatus.FAILED else _error_of(row)
    info = TaskInfo(
        id=row.workflow_id,
        name=notes.name,
        status=status,
        attempt=attempt,
        progress=notes.progress,
        created=datetime.fromtimestamp(created, UTC),
        started=None if started is None else datetime.fromtimestamp(started, UTC),
        finished=None if finished is None else datetime.fromtimestamp(finished, UTC),
        error_type=error_type,
        error=error,
    )
    return JobRecord(info, row.output if isinstance(row.output, str) else None)


def lost_by(row: WorkflowStatus) -> int:
    """Return how many processes have not survived a job."""
    # The last dispatch is the one of now, or the one that was refused.
    return max((row.recovery_attempts or 1) - 1, notes_of(row).lost)


def noted_start(row: WorkflowStatus) -> dict[str, float]:
    """Return what DBOS forgets when a job that has begun begins again, or is cancelled."""
    record = record_of(row)
    started = record.info.started
    return {} if started is None else {"started": started.timestamp()}


def _error_of(row: WorkflowStatus) -> tuple[str, str]:
    if row.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
        return shown_error(WorkerLostError(lost_by(row)))
    try:
        told = _Told.model_validate(getattr(row.error, "data", None))
    except ValidationError:
        if isinstance(row.error, Exception):
            kind, text = shown_error(row.error)
            return str(getattr(row.error, "name", kind)), text
        return "MalformedMessageError", "its row in the database is none of this package's"
    return told.error_type, told.error


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _later(earliest: float, moment: float | None) -> float | None:
    return None if moment is None else max(earliest, moment)
