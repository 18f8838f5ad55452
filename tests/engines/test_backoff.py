"""Whether a failed job is attempted again, and when: what an engine is told to wait."""

from __future__ import annotations

import sys
from datetime import timedelta
from time import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastapi_tasks import InvalidSettingError, Retry
from fastapi_tasks.engines.backoff import wait_after

SECONDS = st.floats(0, 1e6)


class BusyError(Exception):
    """What goes wrong in this module."""


def wait(retry: Retry, error: Exception | None = None, *, attempt: int = 1, ago: float = 0) -> Any:
    """Return the wait after an attempt, of a job that was due some seconds ago."""
    return wait_after(retry, error or BusyError(), attempt=attempt, due=time() - ago)


@given(
    initial=SECONDS,
    longest=SECONDS,
    jitter=SECONDS,
    base=st.floats(1, 100),
    attempt=st.integers(1, 10_000),
)
@example(initial=1e-300, longest=5, jitter=0, base=100, attempt=10_000)
@example(initial=0, longest=5, jitter=1, base=100, attempt=10_000)
def test_a_wait_grows_from_its_first_to_its_longest(
    initial: float, longest: float, jitter: float, base: float, attempt: int
) -> None:
    """Whatever the settings are, it stays within what they say."""
    retry = Retry(
        on=BusyError,
        attempts=sys.maxsize,
        wait_initial=initial,
        wait_max=longest,
        wait_jitter=jitter,
        wait_exp_base=base,
    )

    waits = wait(retry, attempt=attempt)

    assert 0 <= waits <= longest
    assert waits >= min(initial, longest)
    try:
        growing = initial * base ** (attempt - 1)
    except OverflowError:
        growing = sys.float_info.max
    assert min(growing, longest) <= waits <= max(growing, growing + jitter)


def test_without_jitter_it_is_exact() -> None:
    """Each one is twice as long as the one before, by default."""
    retry = Retry(on=BusyError, attempts=9, wait_initial=timedelta(seconds=1), wait_jitter=0)

    assert [wait(retry, attempt=n) for n in range(1, 5)] == [1, 2, 4, 5]


def test_jitter_makes_them_differ() -> None:
    """Of a thousand jobs that have failed at once, not all come back at once."""
    retry = Retry(on=BusyError, attempts=9, wait_initial=1, wait_jitter=3)

    waits = {wait(retry) for _ in range(20)}

    assert len(waits) > 1
    assert min(waits) >= 1
    assert max(waits) <= 4


def test_the_last_attempt_is_the_last() -> None:
    """The first one counts too."""
    retry = Retry(on=BusyError, attempts=3)

    assert wait(retry, attempt=2) is not None
    assert wait(retry, attempt=3) is None
    assert wait(retry, attempt=4) is None


@pytest.mark.parametrize("on", [BusyError, (LookupError, BusyError), lambda e: True])
def test_only_errors_that_are_worth_it_are_retried(on: Any) -> None:
    """By their types, or by what a function says of them."""
    assert wait(Retry(on=on)) is not None


@pytest.mark.parametrize("on", [LookupError, (LookupError, OSError), lambda e: False])
def test_others_are_not(on: Any) -> None:
    """An attempt would not make them better."""
    assert wait(Retry(on=on)) is None


@pytest.mark.parametrize(("answer", "seconds"), [(7, 7), (0, 0), (timedelta(minutes=2), 120)])
def test_a_function_may_say_how_long_to_wait(answer: Any, seconds: float) -> None:
    """As the error has, perhaps, in a header; the growing wait is left out of it."""
    assert wait(Retry(on=lambda error: answer, wait_max=1)) == seconds


@pytest.mark.parametrize("answer", [None, -1, "soon", float("nan")])
def test_a_function_has_to_say_something_sensible(answer: Any) -> None:
    """The error names the setting, and what was expected."""
    with pytest.raises(InvalidSettingError, match=r"^on[=:]"):
        wait(Retry(on=lambda error: answer))


def test_a_job_that_has_waited_long_enough_is_not_retried() -> None:
    """Counted from when it was due, wherever it has been since."""
    retry = Retry(on=BusyError, timeout=timedelta(minutes=1))

    assert wait(retry, ago=59) is not None
    assert wait(retry, ago=60) is None
    assert wait(Retry(on=BusyError), ago=1e6) is not None
