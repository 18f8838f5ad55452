"""Whether a job that has failed is attempted again, and when: the engines keep the wait."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import time
from typing import cast

from fastapi_tasks.config import Duration, Retry, in_seconds, is_wait
from fastapi_tasks.errors import InvalidSettingError

__all__ = ["wait_after"]


def wait_after(retry: Retry, error: Exception, *, attempt: int, due: float) -> float | None:
    """Return how many seconds pass before the next attempt, ``None`` if there is none.

    The waits are those of a task that is retried in its own process, which stamina makes:
    https://stamina.hynek.me/en/stable/api.html#stamina.retry

    :param error: what the attempt has raised
    :param attempt: which one that was; the first one is 1
    :param due: when the first one was due: seconds since the epoch
    :raises Exception: what the retry's own function raises, if it has one
    """
    is_late = retry.timeout is not None and time() - due >= in_seconds(retry.timeout)
    if is_late or attempt >= retry.attempts:
        return None
    answer = _answer_to(error, retry)
    if isinstance(answer, bool):
        return _growing_wait(retry, attempt) if answer else None
    return in_seconds(answer)


def _answer_to(error: Exception, retry: Retry) -> bool | Duration:
    """Return whether an error is worth another attempt, or when the retry's function wants it."""
    if retry.kinds is not None:
        return isinstance(error, retry.kinds)
    answer = cast("Callable[[Exception], bool | Duration]", retry.on)(error)
    if isinstance(answer, bool) or is_wait(answer):
        return answer
    raise InvalidSettingError(
        "on",
        answer,
        expected="True, False, or seconds or a timedelta, 0 or more, from the function",
        instead="Retry(on=lambda error: isinstance(error, ConnectionError))",
    )


def _growing_wait(retry: Retry, attempt: int) -> float:
    # Of many jobs that have failed at once, not all are to come back at once.
    jitter = random.uniform(0, in_seconds(retry.wait_jitter))  # noqa: S311 - nothing is kept secret
    longest = in_seconds(retry.wait_max)
    try:
        growing = in_seconds(retry.wait_initial) * retry.wait_exp_base ** (attempt - 1)
    except OverflowError:
        return longest
    return min(growing + jitter, longest)
