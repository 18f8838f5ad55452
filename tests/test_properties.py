"""What holds of every configuration, whatever its values are: laws, on values drawn at random."""

from __future__ import annotations

import ast
import enum
import heapq
import math
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, get_args
from unittest import mock

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastapi_tasks import (
    InvalidSettingError,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
)
from fastapi_tasks.config import RunIf, in_seconds
from fastapi_tasks.drain import CLEANUP, DrainPlan


def ring_bell(task: Task, error: Exception) -> None:
    """Be an error handler."""


async def hoist_flag(task: Task, error: Exception) -> None:
    """Be an async one."""


def is_worth_it(error: Exception) -> bool:
    """Decide about another attempt, which nobody asks for here."""


FIELDS = [each.name for each in fields(TaskConfig) if each.init]

# Drawn from few, so that two configurations are often equal.
waits = st.sampled_from([0, 0.5, 2, timedelta(0), timedelta(seconds=2)])
limits = st.sampled_from([0.5, 2, math.inf, timedelta(seconds=2)])
retries = st.builds(
    Retry,
    on=st.sampled_from([OSError, (KeyError, OSError), is_worth_it]),
    attempts=st.integers(1, 3),
    wait_initial=waits,
    wait_max=waits,
    wait_jitter=waits,
    wait_exp_base=st.sampled_from([1, 2.0]),
    timeout=st.none() | limits,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.text(min_size=1, max_size=1),
    "shield": st.booleans(),
    "on_error": st.sampled_from([ring_bell, hoist_flag]),
    "run_if": st.sampled_from(get_args(RunIf)),
    "retry": retries,
    "timeout": limits,
    "delay": waits,
    "limiter": st.sampled_from([anyio.CapacityLimiter(1), anyio.CapacityLimiter(math.inf)]),
}
configs = st.builds(TaskConfig, **{name: st.none() | values for name, values in VALUES.items()})


def values_of(config: TaskConfig) -> dict[str, Any]:
    """Return every field, whether it is set or not."""
    return {name: getattr(config, name) for name in FIELDS}


def set_in(config: Retry | TaskConfig) -> list[str]:
    """Return the names that the repr shows, which is Python."""
    call = ast.parse(repr(config), mode="eval").body
    assert isinstance(call, ast.Call)
    assert (ast.unparse(call.func), call.args) == (type(config).__name__, [])
    return [str(keyword.arg) for keyword in call.keywords]


def test_there_is_a_law_for_every_field() -> None:
    """A field that is added is to be drawn here, too."""
    assert list(VALUES) == FIELDS


# One configuration over another


@given(outer=configs, inner=configs)
def test_what_is_set_inside_wins_and_what_is_not_is_inherited(
    outer: TaskConfig, inner: TaskConfig
) -> None:
    """Field by field; and a merged configuration is like one that was made of these fields."""
    own, inherited = values_of(inner), values_of(outer)

    merged = outer.merge(inner)

    expected = {name: inherited[name] if own[name] is None else own[name] for name in FIELDS}
    assert values_of(merged) == expected
    assert merged == TaskConfig(**expected)
    assert merged.is_plain is TaskConfig(**expected).is_plain


@given(a=configs, b=configs, c=configs)
def test_it_does_not_matter_who_merges_first(a: TaskConfig, b: TaskConfig, c: TaskConfig) -> None:
    """The app with the function, or the function with the call."""
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(config=configs)
def test_what_sets_nothing_changes_nothing(config: TaskConfig) -> None:
    """Neither outside nor inside."""
    assert TaskConfig().merge(config) == config.merge(TaskConfig()) == config


@given(outer=configs, inner=configs)
def test_the_same_once_more_changes_nothing(outer: TaskConfig, inner: TaskConfig) -> None:
    """Nor does what has been merged already."""
    merged = outer.merge(inner)

    assert inner.merge(inner) == inner
    assert merged.merge(inner) == outer.merge(merged) == merged


@given(outer=configs, inner=configs)
def test_both_stay_what_they_were(outer: TaskConfig, inner: TaskConfig) -> None:
    """They are shared by every task of an app, and of a function."""
    before = values_of(outer), values_of(inner)

    outer.merge(inner)

    assert (values_of(outer), values_of(inner)) == before


@given(a=configs, b=configs)
def test_configurations_are_equal_if_all_of_their_fields_are(a: TaskConfig, b: TaskConfig) -> None:
    """And are one member of a set then."""
    are_equal = values_of(a) == values_of(b)

    assert (a == b) is are_equal
    assert TaskConfig(**values_of(a)) == a
    assert len({a, b, TaskConfig(**values_of(b))}) == (1 if are_equal else 2)


# What one says of itself


@given(config=configs)
def test_a_configuration_is_plain_if_it_asks_for_nothing_special(config: TaskConfig) -> None:
    """Whatever gives a task one attempt, at once, without a limit, may be run the cheap way."""
    once = config.retry is None or config.retry.attempts == 1
    at_once = config.delay in (None, 0, timedelta(0))
    without_limit = config.timeout in (None, math.inf)

    is_plain = once and at_once and without_limit and config.limiter is None

    assert config.is_plain is is_plain
    assert (config.retries is None) is once
    assert (config.time_limit == math.inf) is without_limit


@given(config=configs)
def test_a_configuration_shows_what_is_set_and_nothing_else(config: TaskConfig) -> None:
    """In the order of its parameters, as one would write it."""
    assert set_in(config) == [name for name in FIELDS if getattr(config, name) is not None]


@given(retry=retries)
def test_a_retry_shows_what_is_not_by_default_and_nothing_else(retry: Retry) -> None:
    """What it is about comes first."""
    usual = Retry(on=is_worth_it)
    others = [each.name for each in fields(Retry)][1:]

    changed = [name for name in others if getattr(retry, name) != getattr(usual, name)]

    assert set_in(retry) == ["on", *changed]


# Times


@given(microseconds=st.integers(-(10**15), 10**15))
def test_a_time_is_the_same_in_either_form(microseconds: int) -> None:
    """Seconds are left alone, a timedelta is its seconds."""
    seconds = microseconds / 10**6

    assert in_seconds(seconds) == seconds
    assert in_seconds(timedelta(microseconds=microseconds)) == seconds


@given(seconds=st.integers() | st.floats(allow_nan=False))
def test_seconds_are_left_alone(seconds: float) -> None:
    """An integer stays one, and infinity is a time."""
    assert in_seconds(seconds) is seconds


@given(
    grace=st.floats(0, 1e9),
    more=st.none() | st.floats(0, allow_nan=False, exclude_min=True),
)
@example(grace=0.0, more=5e-324)
@example(grace=0.0, more=math.inf)
@example(grace=1e9, more=1e300)
def test_the_moments_of_a_drain_come_in_order(grace: float, more: float | None) -> None:
    """All within the deadline; and what is cancelled has its time to clean up."""
    limit = None if more is None else grace + more
    deadline = math.inf if limit is None else limit

    plan = DrainPlan(grace, limit)

    assert 0 <= plan.cancel_unshielded <= plan.abandon_unshielded <= plan.abandon_all
    assert plan.cancel_unshielded <= plan.cancel_shielded <= plan.abandon_all == deadline
    assert plan.cancel_unshielded == min(grace, plan.cancel_shielded)
    assert plan.abandon_unshielded == min(plan.cancel_unshielded + CLEANUP, deadline)
    assert plan.cancel_shielded == math.inf or plan.cancel_shielded >= deadline / 2
    assert plan.cancel_shielded == math.inf or plan.cancel_shielded >= deadline - CLEANUP


# Values of every kind


class Seconds(float):
    """What numpy's float64 is."""


class Number(enum.IntEnum):
    """An integer that is something else as well."""

    NONE = 0
    TWO = 2


class Text(str):
    """A string that is something else as well."""

    __slots__ = ()


def array() -> Any:
    """Return what numpy's arrays are: whatever they are compared with, the answer is no truth."""
    answer = mock.NonCallableMagicMock()
    answer.__bool__.side_effect = ValueError("the truth value of an array is ambiguous")
    answer.__eq__ = answer.__ne__ = mock.Mock(return_value=answer)
    return answer


EDGES: list[Any] = [
    *(0, -0.0, 1, -1, 2, 0.5, -1e-9, 5e-324, 1e308, math.inf, -math.inf, math.nan),
    *(10**400, -(10**400), 10**5000, -(10**5000), 2**63, True, False, None),
    *(Seconds(1), Seconds(-1), Seconds("nan"), Number.NONE, Number.TWO, array()),
    *(Decimal(3), Decimal("NaN"), Fraction(1, 2), 1j, mock.MagicMock()),
    *(timedelta(0), timedelta(microseconds=-1), timedelta.min, timedelta.max),
    *("", "x", "success", "inf", Text("error"), Text(""), b"x", (), [], {}, ["success"], object()),
    *(OSError, (OSError,), (OSError, 1), (OSError, BaseException), [OSError], OSError("x")),
    *(BaseException, KeyboardInterrupt, ExceptionGroup, int, object, (((OSError,),),)),
    *(ring_bell, hoist_flag, is_worth_it, heapq.merge, print, Retry, TaskConfig()),
    *(Retry(on=OSError), anyio.CapacityLimiter(1), anyio.Semaphore(1), ...),
]
anything = (
    st.sampled_from(EDGES)
    | st.integers()
    | st.floats()
    | st.timedeltas()
    | st.text(max_size=2)
    | st.lists(st.sampled_from(EDGES), max_size=2).map(tuple)
)


def is_time(value: Any, *, may_be_zero: bool = True, may_be_infinite: bool = True) -> bool:
    """Return whether a value is a time, which a float can hold."""
    seconds = value / timedelta(seconds=1) if isinstance(value, timedelta) else value
    if type(seconds) is bool or not isinstance(seconds, int | float):
        return False
    if seconds in (0, math.inf):
        return may_be_infinite if seconds else may_be_zero
    return 0 < seconds < 2**1024


def is_count(value: Any) -> bool:
    """Return whether there can be as many of something."""
    return type(value) is not bool and isinstance(value, int) and 0 < value < 2**63


def is_error_type(value: Any) -> bool:
    """Return whether errors of that type can be retried."""
    return isinstance(value, type) and issubclass(value, Exception)


def is_function(value: Any) -> bool:
    """Return whether a call of it does something."""
    return callable(value) and value is not heapq.merge


def is_retry_on(value: Any) -> bool:
    """Return whether it says which errors are retried."""
    if isinstance(value, type | tuple):
        kinds = value if isinstance(value, tuple) else (value,)
        return kinds != () and all(map(is_error_type, kinds))
    return is_function(value) and value is not hoist_flag


def one_of(*kinds: type) -> Callable[[Any], bool]:
    """Return what tells instances of some types from everything else."""
    return lambda value: isinstance(value, kinds)


def or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what lets None pass, too."""
    return lambda value: value is None or fits(value)


def retry(**settings: Any) -> Retry:
    """Make a retry that has what it needs."""
    return Retry(**{"on": OSError, **settings})


is_wait = partial(is_time, may_be_infinite=False)
is_limit = or_none(partial(is_time, may_be_zero=False))

Make = Callable[..., object]
Fits = Callable[[Any], bool]

TAKEN: list[tuple[Make, str, Fits]] = [
    (TaskConfig, "name", or_none(lambda value: isinstance(value, str) and len(value) > 0)),
    (TaskConfig, "shield", or_none(one_of(bool))),
    (TaskConfig, "on_error", or_none(is_function)),
    (
        TaskConfig,
        "run_if",
        or_none(lambda value: isinstance(value, str) and value in get_args(RunIf)),
    ),
    (TaskConfig, "retry", or_none(one_of(Retry))),
    (TaskConfig, "timeout", is_limit),
    (TaskConfig, "delay", or_none(is_wait)),
    (TaskConfig, "limiter", or_none(one_of(anyio.CapacityLimiter))),
    (retry, "on", is_retry_on),
    (retry, "attempts", is_count),
    (retry, "wait_initial", is_wait),
    (retry, "wait_max", is_wait),
    (retry, "wait_jitter", is_wait),
    (
        retry,
        "wait_exp_base",
        lambda value: not isinstance(value, timedelta) and is_wait(value) and value >= 1,
    ),
    (retry, "timeout", is_limit),
    (Supervisor, "config", or_none(one_of(TaskConfig))),
    (Supervisor, "grace", lambda value: not isinstance(value, timedelta) and is_wait(value)),
    (
        Supervisor,
        "shutdown_timeout",
        lambda value: not isinstance(value, timedelta) and is_limit(value),
    ),
    (Supervisor, "threads", is_count),
]


@pytest.mark.parametrize(("make", "name", "fits"), TAKEN)
@settings(max_examples=50)  # the next one tries what is likely to go wrong
@given(value=anything)
def test_a_value_is_taken_or_refused_and_nothing_else(
    make: Make, name: str, fits: Fits, value: Any
) -> None:
    """Whatever it is: by an error that names the setting, and never by one of Python's own."""
    try_value(make, name, fits, value)


@pytest.mark.parametrize(("make", "name", "fits"), TAKEN)
def test_so_is_each_value_that_is_hard_to_tell(make: Make, name: str, fits: Fits) -> None:
    """Of which chance may leave one out."""
    for value in EDGES:
        try_value(make, name, fits, value)


def try_value(make: Make, name: str, fits: Fits, value: Any) -> None:
    """See what comes of a setting with a value."""
    if fits(value):
        assert repr(make(**{name: value}))
        return

    with pytest.raises(InvalidSettingError) as caught:
        make(**{name: value})

    assert caught.value.setting == name
    assert str(caught.value).startswith(name)
    assert len(str(caught.value)) < 400


@given(config=configs, wait=waits)
def test_what_is_taken_can_be_asked_for_its_seconds(config: TaskConfig, wait: Any) -> None:
    """They are numbers that every clock can add to its own."""
    assert 0 < config.time_limit <= math.inf
    assert 0 <= float(in_seconds(wait)) < math.inf
