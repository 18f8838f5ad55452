"""What an API may show of a task: :class:`TaskInfo`, a model that holds nothing of the task itself.

The supervisor keeps what is over as a :data:`Record`, which is several times cheaper to make.
"""

import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from .callables import printable
from .config import is_amount
from .errors import InvalidSettingError

__all__ = [
    "TEXT_LENGTH",
    "Progress",
    "Record",
    "TaskInfo",
    "TaskStatus",
    "id_of",
    "info_of",
    "key_of",
    "progress_of",
    "shown_error",
]

TEXT_LENGTH = 1000
"""How many characters a text has at most that somebody else has written: an error's, a message."""

_CUT = "..."

_NUMBER = re.compile("[1-9][0-9]{0,18}")  # what a client sends may have a million digits

# One type in the schema, while whole numbers stay whole.
_Number = Annotated[int | float, WithJsonSchema({"type": "number", "minimum": 0})]


class TaskStatus(StrEnum):
    """Where a task is in its life; each member equals its lower-case name as a string."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Progress(BaseModel):
    """How far a task has come, as it says itself."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    done: _Number = Field(description="How much is done, in a unit of the task's own.")
    total: _Number | None = Field(
        None, description="How much there is to do, in the same unit, if that is known."
    )
    message: str | None = Field(None, description="What the task is doing, in words.")


class TaskInfo(BaseModel):
    """What a task is like at one moment."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    id: str = Field(description="What tells the task from every other one.")
    name: str = Field(description="What kind of task it is.")
    status: TaskStatus = Field(description="Where it is in its life.")
    attempt: int = Field(description="How often it was begun: 0 while it waits for that.")
    progress: Progress | None = Field(
        None, description="How far its latest attempt has come, if it says so."
    )
    created: datetime = Field(description="When it was scheduled.")
    started: datetime | None = Field(
        None, description="When its first attempt began, if there was one."
    )
    finished: datetime | None = Field(
        None, description="When it succeeded, failed or was cancelled, if it has."
    )
    error_type: str | None = Field(
        None, description="What kind of error has made it fail, if it failed."
    )
    error: str | None = Field(
        None, description="What the error says, shortened if it says too much."
    )


Record: TypeAlias = tuple[
    str,
    int,
    str,
    TaskStatus,
    int,
    Progress | None,
    float,
    float | None,
    float | None,
    str | None,
    str | None,
]
"""The fields of a :class:`TaskInfo`, in their order: the id in its two parts, times as floats.

It is flat, since each task that ends leaves one behind."""


def info_of(record: Record) -> TaskInfo:
    """Make a :class:`TaskInfo`."""
    run, number, name, status, attempt, progress, created, started, finished, kind, error = record
    return TaskInfo(
        id=id_of((run, number)),
        name=name,
        status=status,
        attempt=attempt,
        progress=progress,
        created=_moment(created),
        started=None if started is None else _moment(started),
        finished=None if finished is None else _moment(finished),
        error_type=kind,
        error=error,
    )


def id_of(key: tuple[str, int]) -> str:
    """Return a task's id from its two parts; that of an engine's job has one only."""
    run, number = key
    return f"{run}-{number}" if number else run


def key_of(task_id: str) -> tuple[str, int]:
    """Return the two parts of an id, be it a task's or a job's, which is its engine's affair."""
    run, _, number = task_id.rpartition("-")
    return (run, int(number)) if _NUMBER.fullmatch(number) else (task_id, 0)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def progress_of(done: object, total: object, message: object) -> Progress:
    """Check what ``set_progress`` was given.

    :raises InvalidSettingError: it cannot be a progress
    """
    if not is_amount(done):
        raise InvalidSettingError(
            "done",
            done,
            expected="a number, 0 or more, and finite",
            instead="task.set_progress(17, total=40)",
        )
    if total is not None and (not is_amount(total) or total == 0):
        raise InvalidSettingError(
            "total",
            total,
            expected="a number, more than 0 and finite, or None",
            instead="task.set_progress(17, total=40)",
        )
    if message is not None:
        if not isinstance(message, str):
            raise InvalidSettingError(
                "message",
                message,
                expected="a string or None",
                instead='task.set_progress(17, total=40, message="drawing the charts")',
            )
        message = _short(message)
    return Progress.model_validate({"done": done, "total": total, "message": message})


def shown_error(error: BaseException) -> tuple[str, str]:
    """Return the type and the text of an error, in what nothing of the error is left."""
    try:
        text = _short(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException:  # it was written by somebody who did not think of this
        text = "(its text cannot be had)"
    return printable(type(error).__name__), text


def _short(text: str) -> str:
    if len(text) > TEXT_LENGTH:
        text = text[: TEXT_LENGTH - len(_CUT)] + _CUT
    # Half a character, which the name of a file can have, is nothing that JSON could take. What
    # comes back is a plain string, whatever it was: a subclass may have more to it.
    return text.encode(errors="backslashreplace").decode()
