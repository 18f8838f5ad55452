"""What travels from whoever enqueues a job to the worker that runs it: JSON, and nothing else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from fastapi_tasks.config import Retry, in_seconds
from fastapi_tasks.errors import InvalidSettingError, MalformedMessageError

__all__ = ["Message", "RetryByName", "read_message"]

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RetryByName(BaseModel):
    """A :class:`~fastapi_tasks.Retry` whose errors are named: the worker imports nothing for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: tuple[str, ...]
    attempts: Annotated[int, Field(ge=1)]
    wait_initial: _Seconds
    wait_max: _Seconds
    wait_jitter: _Seconds
    wait_exp_base: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    timeout: _Seconds | None

    @classmethod
    def of(cls, retry: Retry) -> RetryByName:
        """Name the errors of a retry.

        :raises InvalidSettingError: it asks a function about errors, which cannot travel
        """
        kinds = retry.kinds
        if kinds is None:
            raise InvalidSettingError(
                "retry",
                retry,
                expected="a Retry on types of errors, since a function cannot travel",
                instead="engine.using(retry=Retry(on=ConnectionError)), or with a function, "
                "@engine.task(retry=Retry(on=is_worth_it))",
            )
        return cls(
            on=tuple(map(_name_of, kinds)),
            attempts=retry.attempts,
            wait_initial=in_seconds(retry.wait_initial),
            wait_max=in_seconds(retry.wait_max),
            wait_jitter=in_seconds(retry.wait_jitter),
            wait_exp_base=retry.wait_exp_base,
            timeout=None if retry.timeout is None else in_seconds(retry.timeout),
        )

    def as_retry(self) -> Retry:
        """Return the retry again, which tells errors by the names of their classes."""
        names = frozenset(self.on)
        return Retry(
            on=lambda error: any(_name_of(kind) in names for kind in type(error).__mro__),
            attempts=self.attempts,
            wait_initial=self.wait_initial,
            wait_max=self.wait_max,
            wait_jitter=self.wait_jitter,
            wait_exp_base=self.wait_exp_base,
            timeout=self.timeout or None,
        )


class Message(BaseModel):
    """One job, as it travels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    name: str
    """Of the function, as it is registered."""
    arguments: dict[str, JsonValue]
    """By the names of the function's parameters."""
    created: _Seconds
    """When it was enqueued: seconds since the epoch."""
    due: _Seconds
    """When its first attempt may begin."""
    retry: RetryByName | None = None
    """In place of the function's own."""
    timeout: _Seconds | None = None
    """In place of the function's own; 0: no limit."""
    trace: dict[str, str] = {}
    """OpenTelemetry's context, as its propagators write it."""


def read_message(text: str | bytes) -> Message:
    """Read a message.

    :raises MalformedMessageError: it is none, and what is wrong with it; not what is in it
    """
    try:
        return Message.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        raise MalformedMessageError(
            "; ".join(f"{_path(each['loc'])}{each['type']}" for each in problems)
        ) from None


def _path(location: tuple[int | str, ...]) -> str:
    # Of the arguments the names alone: what is below them belongs to whoever has sent them.
    return "".join(f"{part}: " for part in location[:1])


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
