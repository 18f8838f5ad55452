"""Tasks that are run again after they have failed: when, how often, and what is told of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import subprocess
import sys
import threading
import traceback
import types
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import pytest
import stamina
import stamina.instrumentation
import tenacity
from fastapi import FastAPI

from fastapi_tasks import (
    InvalidSettingError,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskFailedError,
    TaskObserver,
    Tasks,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
    task,
)

from . import asgi, load
from .clocks import (
    Backend,
    on_fake_clocks,  # noqa: F401 - it is this module's anyio_backend
)
from .conftest import on_real_clocks
from .recording import Observed, collect_within_a_task, idle, let_others_run, ours, until
from .servers import PATIENCE, unmeasured


@pytest.fixture(autouse=True)
def stamina_as_it_was() -> Iterator[None]:
    """What a test has asked of stamina is over with it."""
    yield
    stamina.instrumentation.set_on_retry_hooks(None)
    stamina.set_active(True)
    stamina.set_testing(False)


@pytest.fixture
def supervisor(observed: Observed) -> Supervisor:
    """A supervisor that is watched; it is started where its tasks run."""
    return Supervisor(observers=[observed])


class BusyError(Exception):
    """The line is engaged."""


class WrongNumberError(Exception):
    """It will not get better."""


class Line:
    """A number to call: the first calls fail, and each notes what it was and when."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.called_at: list[float] = []
        self.attempts: list[int] = []
        self.seen: list[TaskStatus] = []

    async def dial(self) -> str:
        """Call once."""
        self.called_at.append(anyio.current_time())
        return self.dial_in_thread()

    def dial_in_thread(self) -> str:
        """Call once, from wherever that is."""
        self.attempts.append(current_task().attempt)
        self.seen.append(current_task().status)
        if self.failures:
            raise self.failures.pop(0)
        return "hello"

    @property
    def waits(self) -> list[float]:
        """The seconds between the calls."""
        pairs = zip(self.called_at, self.called_at[1:], strict=False)
        return [pytest.approx(later - earlier) for earlier, later in pairs]


def engaged(times: int = 100) -> Line:
    """Return a line that is engaged for some calls."""
    return Line(*(BusyError(f"call {number}") for number in range(1, times + 1)))


METHODS = pytest.mark.parametrize("method", [Line.dial, Line.dial_in_thread])

AT_ONCE = {"wait_initial": 0, "wait_jitter": 0}
REDIAL = Retry(BusyError, **AT_ONCE)
"""Three calls, one at once after the other."""
LATER = Retry(BusyError, attempts=2, wait_initial=3600, wait_max=3600, wait_jitter=0)
"""Two calls, with an hour between them."""


def bound(method: Callable[[Line], Any], line: Line) -> Callable[[], Any]:
    """Return a line's method."""
    return getattr(line, method.__name__)  # type: ignore[no-any-return]


async def backing_off(task: Task) -> None:
    """Let others run until a task waits for its second attempt."""
    await task.started.wait()
    await let_others_run()
    assert (task.status, task.attempt) == ("running", 1)


async def over(supervisor: Supervisor, *tasks: Task) -> None:
    """Wait until all tasks are over, their error handlers included, however they end."""
    for each in tasks:
        with suppress(Exception):
            await each.wait()
    await idle(supervisor)


def is_worth_it(error: Exception) -> bool:
    """Say yes."""
    return True


class DeafError(Exception):
    """Whoever was asked has not understood the question."""


def fail(error: object) -> NoReturn:
    """Raise an error of one's own."""
    raise DeafError("what?")


def leave(error: object) -> NoReturn:
    """Want an end of everything."""
    sys.exit("enough")


# How often


@on_real_clocks
@METHODS
async def test_a_task_is_run_again_until_it_succeeds(
    method: Callable[[Line], Any], supervisor: Supervisor
) -> None:
    """Its result is that of the last run, and its waiter wakes up for nothing less."""
    line = engaged(2)
    async with supervisor:
        dialled = supervisor.task(retry=REDIAL).schedule(bound(method, line))
        with anyio.fail_after(PATIENCE):
            assert await dialled.wait() == "hello"

    assert (dialled.status, dialled.attempt, dialled.exception()) == ("succeeded", 3, None)
    assert line.attempts == [1, 2, 3]
    assert line.seen == ["running"] * 3


@on_real_clocks
@METHODS
async def test_a_task_fails_with_its_last_error_when_its_attempts_are_used_up(
    method: Callable[[Line], Any], supervisor: Supervisor
) -> None:
    """Three, if nothing else was asked for."""
    line = engaged()
    async with supervisor:
        dialled = supervisor.task(retry=REDIAL).schedule(bound(method, line))
        with anyio.fail_after(PATIENCE), pytest.raises(BusyError, match="call 3"):
            await dialled.wait()

    assert (dialled.status, dialled.attempt) == ("failed", 3)
    assert line.attempts == [1, 2, 3]


@pytest.mark.parametrize("attempts", [1, 2, 7])
async def test_attempts_count_the_first_one_too(attempts: int, supervisor: Supervisor) -> None:
    """One attempt is no retry."""
    line = engaged()
    async with supervisor:
        retry = Retry(BusyError, attempts=attempts)
        dialled = supervisor.task(retry=retry).schedule(line.dial)
        await over(supervisor, dialled)

    assert (dialled.attempt, len(line.called_at)) == (attempts, attempts)


async def test_a_task_without_retry_is_run_once(supervisor: Supervisor) -> None:
    """To run a function twice is for whoever has written it to allow."""
    line = engaged(1)
    async with supervisor:
        dialled = supervisor.schedule(line.dial)
        await over(supervisor, dialled)

    assert (dialled.status, dialled.attempt) == ("failed", 1)


async def test_a_wait_begins_when_the_attempt_has_failed_and_the_next_one_after_it(
    supervisor: Supervisor,
) -> None:
    """Meanwhile the task is running, has no error, and nobody who waits for it is woken up."""
    line = engaged(1)
    async with supervisor:
        dialled = supervisor.task(retry=LATER).schedule(line.dial)
        await backing_off(dialled)
        began = anyio.current_time()
        with anyio.move_on_after(3599) as patience:
            await dialled.wait()
        assert patience.cancelled_caught
        assert (dialled.status, dialled.attempt) == ("running", 1)
        assert dialled in supervisor.running

        assert await dialled.wait() == "hello"
        assert anyio.current_time() - began == pytest.approx(3600)


async def test_started_is_set_by_the_first_attempt(supervisor: Supervisor) -> None:
    """And stays what it is: one event for the task."""
    line = engaged(1)
    async with supervisor:
        dialled = supervisor.task(retry=LATER).schedule(line.dial)
        started = dialled.started
        await backing_off(dialled)
        assert started.is_set()
        await dialled.wait()
        assert dialled.started is started


# After which errors


def is_busy(error: Exception) -> bool:
    """Look at the error itself."""
    return str(error) == "busy"


@pytest.mark.parametrize(
    ("on", "attempts"),
    [
        (BusyError, 3),
        (Exception, 3),
        ((WrongNumberError, BusyError), 3),
        (is_busy, 3),
        (WrongNumberError, 1),
        ((WrongNumberError, ValueError), 1),
        (lambda error: False, 1),
    ],
)
@on_real_clocks
@METHODS
async def test_an_error_is_worth_another_attempt_if_the_retry_says_so(
    on: Any, attempts: int, method: Callable[[Line], Any], supervisor: Supervisor
) -> None:
    """By its type, by one of several, or by a function that is asked."""
    line = Line(*[BusyError("busy") for _ in range(9)])
    async with supervisor:
        dialled = supervisor.task(retry=Retry(on, **AT_ONCE)).schedule(bound(method, line))
        await over(supervisor, dialled)

    assert (dialled.status, dialled.attempt) == ("failed", attempts)
    assert isinstance(dialled.exception(), BusyError)


async def test_each_error_is_looked_at(supervisor: Supervisor) -> None:
    """One that is not worth it ends the task, whatever came before."""
    line = Line(BusyError(), WrongNumberError(), BusyError())
    async with supervisor:
        dialled = supervisor.task(retry=Retry(BusyError, attempts=9)).schedule(line.dial)
        await over(supervisor, dialled)

    assert dialled.attempt == 2
    assert isinstance(dialled.exception(), WrongNumberError)


async def test_the_function_that_is_asked_gets_each_error_in_the_tasks_own_context(
    supervisor: Supervisor,
) -> None:
    """So it can look at the task and at the request's variables."""
    exchange = ContextVar("exchange", default="")
    asked: list[tuple[Exception, int, str]] = []

    def is_worth_it(error: Exception) -> bool:
        asked.append((error, current_task().attempt, exchange.get()))
        return True

    line = engaged()
    errors = line.failures[:3]
    async with supervisor:
        exchange.set("Whitehall")
        dialled = supervisor.task(retry=Retry(is_worth_it)).schedule(line.dial)
        await over(supervisor, dialled)

    assert asked == [(error, number, "Whitehall") for number, error in enumerate(errors, 1)]


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit()])
async def test_what_is_no_exception_is_not_retried(
    error: BaseException, supervisor: Supervisor
) -> None:
    """The function did not fail; it wanted an end."""
    line = Line(error)
    async with supervisor:
        dialled = supervisor.task(retry=Retry(lambda error: True)).schedule(line.dial)
        await over(supervisor, dialled)
        with pytest.raises(TaskFailedError):
            await dialled.wait()

    assert (dialled.attempt, dialled.exception()) == (1, error)


def test_an_interrupt_is_not_retried(anyio_backend: Backend) -> None:
    """Whoever presses Ctrl-C wants all of it to end."""
    line = Line(KeyboardInterrupt())

    async def main() -> None:
        async with Supervisor() as supervisor:
            supervisor.task(retry=Retry(lambda error: True)).schedule(line.dial)
            await anyio.sleep(1)

    backend, options = anyio_backend
    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend, backend_options=options)

    assert len(line.called_at) == 1


# How long it waits


async def waits_of(supervisor: Supervisor, retry: Retry) -> list[float]:
    """Return how long a task has waited before each retry, as its function sees it."""
    line = engaged()
    dialled = supervisor.task(retry=retry).schedule(line.dial)
    await over(supervisor, dialled)
    return line.waits


def as_timedelta(value: float) -> timedelta:
    """Return a time in the other way of writing it."""
    return timedelta(seconds=value)


@pytest.mark.parametrize("unit", [float, as_timedelta])
@pytest.mark.parametrize(
    ("fields", "base", "waits"),
    [
        ({}, 2.0, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]),
        ({"wait_initial": 1, "wait_max": 6}, 2.0, [1, 2, 4, 6, 6, 6, 6, 6]),
        ({"wait_initial": 2, "wait_max": 60}, 3, [2, 6, 18, 54, 60, 60, 60, 60]),
        ({"wait_initial": 7, "wait_max": 9}, 1, [7] * 8),
        ({"wait_initial": 7, "wait_max": 3}, 2.0, [3] * 8),
        ({"wait_initial": 0}, 2.0, [0] * 8),
    ],
)
async def test_waits_grow_up_to_a_limit(
    unit: Callable[[float], Any],
    fields: dict[str, float],
    base: float,
    waits: list[float],
    supervisor: Supervisor,
) -> None:
    """Whatever they are given in."""
    given: Any = {name: unit(value) for name, value in fields.items()}
    retry = Retry(BusyError, attempts=9, wait_jitter=unit(0), wait_exp_base=base, **given)
    async with supervisor:
        assert await waits_of(supervisor, retry) == waits


@pytest.mark.parametrize("unit", [float, as_timedelta])
async def test_waits_have_a_random_share(
    unit: Callable[[float], Any], supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the jitter that was asked for; the limit holds all the same."""
    jitters: list[tuple[float, float]] = []

    def most(low: float, high: float) -> float:
        jitters.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", most)
    retry = Retry(BusyError, attempts=5, wait_initial=1, wait_max=6, wait_jitter=unit(3))
    async with supervisor:
        assert await waits_of(supervisor, retry) == [4, 5, 6, 6]

    assert set(jitters) == {(0, 3)}


async def test_the_waits_of_two_tasks_differ(supervisor: Supervisor) -> None:
    """If nothing else was asked for: or they would all come back at the same moment."""
    async with supervisor:
        retry = Retry(BusyError)
        assert await waits_of(supervisor, retry) != await waits_of(supervisor, retry)


@pytest.mark.parametrize("answer", [3600, 0.25, timedelta(minutes=2), 0, timedelta(0)])
async def test_a_function_may_say_how_long_to_wait(answer: Any, supervisor: Supervisor) -> None:
    """As the server's Retry-After would have it: without jitter, over the limit too."""
    wait = answer.total_seconds() if isinstance(answer, timedelta) else answer
    async with supervisor:
        waits = await waits_of(supervisor, Retry(lambda error: answer))

    assert waits == [wait, wait]


async def test_a_function_may_answer_differently_each_time(supervisor: Supervisor) -> None:
    """Yes, a wait, yes: the waits go on growing where they were."""
    answers = iter([True, 30.0, True, False])
    retry = Retry(lambda error: next(answers), attempts=9, wait_initial=1, wait_jitter=0)
    async with supervisor:
        assert await waits_of(supervisor, retry) == [1, 30, 4]


# Not longer than


@pytest.fixture
def loops_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamina measures by the event loop's clock, whose time passes at once."""
    clock = types.SimpleNamespace(monotonic=anyio.current_time)
    monkeypatch.setattr(tenacity, "time", clock)


@pytest.mark.usefixtures("loops_clock")
@pytest.mark.parametrize("unit", [float, as_timedelta])
@pytest.mark.parametrize(("seconds", "calls"), [(9.5, 2), (10, 2), (10.5, 3), (29, 4)])
async def test_an_attempt_that_fails_after_the_timeout_is_the_last_one(
    unit: Callable[[float], Any], seconds: float, calls: int, supervisor: Supervisor
) -> None:
    """It counts from the first attempt on; none is cut short by it."""
    retry = Retry(
        BusyError, attempts=9, timeout=unit(seconds), wait_initial=10, wait_max=10, wait_jitter=0
    )
    line = engaged()
    async with supervisor:
        dialled = supervisor.task(retry=retry).schedule(line.dial)
        await over(supervisor, dialled)

    assert len(line.called_at) == calls


@pytest.mark.usefixtures("loops_clock")
async def test_the_delay_of_a_task_is_not_part_of_the_timeout(supervisor: Supervisor) -> None:
    """Its first attempt comes after it."""
    line = engaged(1)
    async with supervisor:
        configured = supervisor.task(delay=3600, retry=Retry(BusyError, timeout=60))
        assert await configured.schedule(line.dial).wait() == "hello"


# What is told


async def test_each_failed_attempt_is_one_record_with_the_wait_that_follows(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """For people in the message and for machines as fields, and the last one as an error."""
    retry = Retry(BusyError, wait_initial=1.5, wait_jitter=0)
    line = engaged()
    async with supervisor:
        dialled = supervisor.task(name="operator", retry=retry).schedule(line.dial)
        await over(supervisor, dialled)

    label = f"Task operator ({dialled.id}) failed in attempt"
    assert [(each.levelname, each.getMessage()) for each in ours(caplog)] == [
        ("WARNING", f"{label} 1, the next one follows in 1.5 s"),
        ("WARNING", f"{label} 2, the next one follows in 3 s"),
        ("ERROR", f"{label} 3"),
    ]
    for number, record in enumerate(ours(caplog), 1):
        fields = {name: vars(record)[f"task_{name}"] for name in ("name", "id", "attempt")}
        assert fields == {"name": "operator", "id": dialled.id, "attempt": number}
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == f"call {number}"


async def test_observers_are_told_of_each_attempt_and_each_wait(
    supervisor: Supervisor, observed: Observed
) -> None:
    """And of the end once."""
    line = engaged()
    errors = line.failures[:3]
    async with supervisor:
        retry = Retry(BusyError, wait_initial=1, wait_jitter=0)
        dialled = supervisor.task(retry=retry).schedule(line.dial)
        await over(supervisor, dialled)

    about_it = [event for event in observed.events if dialled in event.tasks]
    assert [event.kind for event in about_it] == [
        TaskEventKind.SCHEDULED,
        TaskEventKind.STARTED,
        TaskEventKind.RETRYING,
        TaskEventKind.STARTED,
        TaskEventKind.RETRYING,
        TaskEventKind.STARTED,
        TaskEventKind.FAILED,
    ]
    told = [(each.error, each.wait) for each in about_it if each.error is not None]
    assert told == [(errors[0], 1.0), (errors[1], 2.0), (errors[2], 0.0)]


async def test_a_wait_is_told_when_it_begins(supervisor: Supervisor, observed: Observed) -> None:
    """Nobody has to wait for it, to know of it."""
    async with supervisor:
        dialled = supervisor.task(retry=LATER).schedule(engaged().dial)
        await backing_off(dialled)
        assert observed.kinds(dialled)[-1] == "retrying"
        dialled.cancel()


@METHODS
@pytest.mark.parametrize("ask", [is_worth_it, fail])
async def test_the_traceback_begins_in_the_function(
    ask: Callable[[Exception], bool], method: Callable[[Line], Any]
) -> None:
    """How it came to be called again tells nothing: neither of ours nor of stamina's."""
    seen: list[list[str]] = []

    def look(event: TaskEvent) -> None:
        if event.error is not None:
            frames = traceback.extract_tb(event.error.__traceback__)
            seen.append([frame.name for frame in frames])
            assert (event.error.__context__, event.error.__cause__) == (None, None)

    async with Supervisor(observers=[look]) as supervisor:
        dialled = supervisor.task(retry=Retry(ask)).schedule(bound(method, engaged()))
        await over(supervisor, dialled)

    names = ["dial", "dial_in_thread"] if dialled.is_async else ["dial_in_thread"]
    assert seen == [names] * (3 if ask is is_worth_it else 1)


async def test_the_error_handler_is_called_once_when_nothing_is_left(
    supervisor: Supervisor,
) -> None:
    """With the last error."""
    handled: list[tuple[Task, Exception, int]] = []

    def complain(task: Task, error: Exception) -> None:
        handled.append((task, error, task.attempt))

    async with supervisor:
        dialled = supervisor.task(retry=REDIAL, on_error=complain).schedule(engaged().dial)
        await over(supervisor, dialled)

    assert handled == [(dialled, dialled.exception(), 3)]


async def test_the_error_handler_is_not_called_for_a_task_that_succeeds_in_the_end(
    supervisor: Supervisor,
) -> None:
    """It has not failed."""
    handled: list[Task] = []
    async with supervisor:
        configured = supervisor.task(retry=REDIAL, on_error=lambda task, _: handled.append(task))
        await over(supervisor, configured.schedule(engaged(2).dial))
        assert handled == []
        failed = configured.schedule(engaged(3).dial)
        await over(supervisor, failed)

    assert handled == [failed]


async def test_calling_the_task_again_is_not_retried(supervisor: Supervisor) -> None:
    """A handler that does so wants to see what comes of it."""
    line = engaged()
    seen: list[str] = []

    async def once_more(task: Task, error: Exception) -> None:
        with pytest.raises(BusyError) as caught:
            await task()
        seen.extend([str(error), str(caught.value)])

    async with supervisor:
        dialled = supervisor.task(retry=REDIAL, on_error=once_more).schedule(line.dial)
        await over(supervisor, dialled)

    assert seen == ["call 3", "call 4"]
    assert (dialled.attempt, len(line.called_at)) == (3, 4)


async def test_a_context_variable_that_an_attempt_has_set_is_there_in_the_next(
    supervisor: Supervisor,
) -> None:
    """One task, one context: that of its schedule(), which its scheduler's is not."""
    exchange = ContextVar("exchange", default="nobody")
    seen: list[str] = []

    async def dial() -> None:
        seen.append(exchange.get())
        exchange.set(f"attempt {current_task().attempt}")
        raise BusyError

    async with supervisor:
        exchange.set("Whitehall")
        await over(supervisor, supervisor.task(retry=REDIAL).schedule(dial))

    assert seen == ["Whitehall", "attempt 1", "attempt 2"]
    assert exchange.get() == "Whitehall"


# Cancellations


async def test_a_shutdown_cancels_a_task_that_waits_for_its_next_attempt(
    supervisor: Supervisor, observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, and that is no failed attempt: there is one record of the failure before."""
    caplog.set_level(logging.INFO)
    handled: list[Task] = []
    line = engaged()
    await supervisor.start()
    configured = supervisor.task(retry=LATER, on_error=lambda task, _: handled.append(task))
    dialled = configured.schedule(line.dial)
    await backing_off(dialled)
    began = anyio.current_time()
    report = await supervisor.drain()

    assert anyio.current_time() == began
    assert (report.cancelled, report.finished, report.abandoned) == ((dialled,), (), ())
    assert (dialled.status, dialled.attempt, dialled.exception()) == ("cancelled", 1, None)
    assert (len(line.called_at), handled) == (1, [])
    kinds = ["scheduled", "started", "retrying", "cancelled"]
    assert [kind for kind in observed.kinds(dialled) if not kind.startswith("drain")] == kinds
    assert sum("failed in attempt" in record.getMessage() for record in ours(caplog)) == 1


async def test_the_grace_is_for_waits_too(observed: Observed) -> None:
    """What is left of it is a chance for the next attempt."""
    line = engaged(1)
    supervisor = Supervisor(grace=4000, observers=[observed])
    await supervisor.start()
    dialled = supervisor.task(retry=LATER).schedule(line.dial)
    await backing_off(dialled)
    report = await supervisor.drain()

    assert (dialled.status, report.cancelled) == ("succeeded", ())


async def test_a_shielded_task_goes_on_waiting_while_the_app_shuts_down(
    supervisor: Supervisor,
) -> None:
    """And has its next attempt."""
    line = engaged(1)
    await supervisor.start()
    dialled = supervisor.task(retry=LATER, shield=True).schedule(line.dial)
    await backing_off(dialled)
    report = await supervisor.drain()

    assert (dialled.status, dialled.attempt, report.finished) == ("succeeded", 2, (dialled,))
    assert line.waits == [3600]


async def test_a_shielded_task_waits_no_longer_than_the_shutdown_may_take() -> None:
    """Then it is cancelled like the others, in its wait."""
    line = engaged(1)
    supervisor = Supervisor(shutdown_timeout=1000)
    await supervisor.start()
    dialled = supervisor.task(retry=LATER, shield=True).schedule(line.dial)
    await backing_off(dialled)
    began = anyio.current_time()
    report = await supervisor.drain()

    assert anyio.current_time() - began == pytest.approx(995)
    assert (dialled.status, dialled.attempt, report.cancelled) == ("cancelled", 1, (dialled,))


async def test_a_task_can_be_cancelled_while_it_waits_for_its_next_attempt(
    supervisor: Supervisor,
) -> None:
    """Its wait ends at once, and no other attempt follows."""
    line = engaged()
    async with supervisor:
        dialled = supervisor.task(retry=LATER).schedule(line.dial)
        await backing_off(dialled)
        began = anyio.current_time()
        assert dialled.cancel()
        assert await dialled.wait() is None
        assert anyio.current_time() == began

    assert (dialled.status, dialled.attempt, len(line.called_at)) == ("cancelled", 1, 1)


@pytest.mark.parametrize("retry", [REDIAL, LATER])
@METHODS
async def test_an_observer_can_cancel_a_task_that_is_to_be_retried(
    retry: Retry, method: Callable[[Line], Any]
) -> None:
    """Before the wait has begun, and when there is none."""

    def hang_up(event: TaskEvent) -> None:
        if event.kind == "retrying":
            assert event.task.cancel()

    line = engaged()
    async with Supervisor(observers=[hang_up]) as supervisor:
        dialled = supervisor.task(retry=retry).schedule(bound(method, line))
        assert await dialled.wait() is None

    assert (dialled.status, dialled.attempt, len(line.attempts)) == ("cancelled", 1, 1)


@METHODS
async def test_a_cancelled_task_whose_function_makes_an_error_of_that_is_not_retried(
    method: Callable[[Line], Any], supervisor: Supervisor
) -> None:
    """It has failed, and that was its last attempt: somebody wanted it to end."""
    asked = threading.Event()

    async def until_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise BusyError

    def until_asked() -> None:
        asked.wait(PATIENCE)
        raise BusyError

    function: Any = until_cancelled if method is Line.dial else until_asked
    async with supervisor:
        dialled = supervisor.task(retry=REDIAL).schedule(function)
        await dialled.started.wait()
        await anyio.lowlevel.checkpoint()
        dialled.cancel()
        asked.set()
        await over(supervisor, dialled)

    assert (dialled.status, dialled.attempt) == ("failed", 1)
    assert isinstance(dialled.exception(), BusyError)


# Who is asked, and does not answer


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (fail, DeafError),
        (leave, SystemExit),
        *[
            (lambda error, answer=answer: answer, InvalidSettingError)
            for answer in (None, float("nan"), float("inf"), -1, -0.5, "soon", timedelta(-1), [])
        ],
    ],
)
async def test_a_function_without_a_sensible_answer_does_not_hide_the_error(
    ask: Any, kind: type[BaseException], supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """The task fails with its own, is not retried, is handled; a record says what went wrong."""
    handled: list[Exception] = []
    line = Line(BusyError("call 1"))
    async with supervisor:
        configured = supervisor.task(retry=Retry(ask), on_error=lambda _, e: handled.append(e))
        dialled = configured.schedule(line.dial)
        await over(supervisor, dialled)

    error = dialled.exception()
    assert isinstance(error, BusyError)
    assert (dialled.status, dialled.attempt, handled) == ("failed", 1, [error])
    why, end = ours(caplog)
    assert why.levelno == logging.ERROR
    assert why.getMessage() == (
        f"Task {dialled.name} ({dialled.id}) is not retried: the function that was asked about it, "
        "or a hook, raised"
    )
    assert why.exc_info is not None
    assert why.exc_info[0] is kind
    assert end.getMessage() == f"Task {dialled.name} ({dialled.id}) failed in attempt 1"


async def test_the_record_of_a_senseless_answer_says_what_to_write_instead(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error like that of any other wrong setting."""
    ask: Any = lambda error: "soon"  # noqa: E731
    async with supervisor:
        await over(supervisor, supervisor.task(retry=Retry(ask)).schedule(engaged().dial))

    assert (
        "on='soon': expected True, False, or seconds or a timedelta, 0 or more, from the function, "
        "got str. Write for example: Retry(on=lambda error: isinstance(error, ConnectionError))"
    ) in caplog.text


def test_an_interrupt_of_who_is_asked_passes(anyio_backend: Backend) -> None:
    """Whatever the event loop happened to do when Ctrl-C was pressed."""

    def interrupt(error: Exception) -> bool:
        raise KeyboardInterrupt

    async def main() -> None:
        async with Supervisor() as supervisor:
            supervisor.task(retry=Retry(interrupt)).schedule(engaged().dial)
            await anyio.sleep(1)

    backend, options = anyio_backend
    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend, backend_options=options)


# Stamina, on which it is built

Details = stamina.instrumentation.RetryDetails


@on_real_clocks
async def test_the_hooks_of_stamina_get_the_tasks_name_and_no_argument(
    supervisor: Supervisor,
) -> None:
    """What they show is made for functions whose arguments are nobody's secret."""
    details: list[Details] = []
    stamina.instrumentation.set_on_retry_hooks([details.append])

    async def dial(number: str, *, pin: int) -> None:
        raise BusyError(current_task().attempt)

    async with supervisor:
        configured = supervisor.task(name="operator", retry=REDIAL)
        dialled = configured.schedule(dial, "1212", pin=4711)
        await over(supervisor, dialled)

    assert [(each.name, each.args, each.kwargs) for each in details] == [("operator", (), {})] * 2
    assert [each.retry_num for each in details] == [1, 2]
    assert [str(each.caused_by) for each in details] == ["1", "2"]


async def test_what_stamina_logs_by_itself_has_the_tasks_name_and_no_argument(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """One record of its own for each wait, from the logger ``stamina``."""

    async def dial(number: str) -> None:
        raise BusyError

    async with supervisor:
        dialled = supervisor.task(name="operator", retry=REDIAL).schedule(dial, "Whitehall")
        await over(supervisor, dialled)

    theirs = [vars(record) for record in caplog.records if record.name == "stamina"]
    assert [each["stamina.callable"] for each in theirs] == ["operator"] * 2
    assert "Whitehall" not in str(theirs)


def not_callable() -> Any:
    """Make no hook."""
    raise DeafError("no hook today")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param([], id="emptied"),
        pytest.param(None, id="reset"),
        pytest.param([str], id="replaced"),
    ],
)
async def test_whoever_sets_the_hooks_anew_does_not_keep_us_from_knowing(
    change: Any, supervisor: Supervisor, observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first task, between two, and between two attempts of one."""

    async def dial() -> None:
        stamina.instrumentation.set_on_retry_hooks(change)
        raise BusyError

    async with supervisor:
        for _ in range(2):
            stamina.instrumentation.set_on_retry_hooks(change)
            dialled = supervisor.task(retry=REDIAL).schedule(dial)
            await over(supervisor, dialled)
            assert observed.kinds(dialled).count(TaskEventKind.RETRYING) == 2

    assert len(ours(caplog)) == 6


async def test_hooks_of_others_stay(supervisor: Supervisor) -> None:
    """Ours is the last one, however often tasks are retried, and there is one of it."""
    details: list[Details] = []
    mine = details.append
    stamina.instrumentation.set_on_retry_hooks([mine])
    async with supervisor:
        for _ in range(3):
            await over(supervisor, supervisor.task(retry=REDIAL).schedule(engaged().dial))
        hooks = stamina.instrumentation.get_on_retry_hooks()
        stamina.instrumentation.set_on_retry_hooks([*hooks, mine])
        await over(supervisor, supervisor.task(retry=REDIAL).schedule(engaged().dial))

    assert len(details) == 3 * 2 + 2 * 2
    assert stamina.instrumentation.get_on_retry_hooks() == (mine, mine, hooks[-1])


@pytest.mark.parametrize(
    "hook", [fail, leave, stamina.instrumentation.RetryHookFactory(not_callable)]
)
async def test_a_hook_that_raises_ends_the_task_with_its_own_error(
    hook: Any, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """Stamina does not survive it; the task and its record do, and no wait is told."""
    stamina.instrumentation.set_on_retry_hooks([hook])
    async with supervisor:
        dialled = supervisor.task(retry=REDIAL).schedule(engaged().dial)
        await over(supervisor, dialled)

    assert (dialled.status, dialled.attempt) == ("failed", 1)
    assert isinstance(dialled.exception(), BusyError)
    assert ["is not retried" in record.getMessage() for record in ours(caplog)] == [True, False]


async def test_what_a_function_retries_by_itself_is_its_own_affair(
    supervisor: Supervisor, observed: Observed
) -> None:
    """Whether it uses stamina in the task, when it is asked, or in a hook."""
    inner = stamina.RetryingCaller(attempts=2, wait_initial=0, wait_jitter=0)

    def retry_inside(error: object = None) -> bool:
        with pytest.raises(WrongNumberError):
            inner(WrongNumberError, misdial)
        return True

    def misdial() -> NoReturn:
        raise WrongNumberError

    async def dial() -> None:
        retry_inside()
        raise BusyError

    def hook(details: Details) -> None:
        if isinstance(details.caused_by, BusyError):
            retry_inside()

    stamina.instrumentation.set_on_retry_hooks([hook])
    async with supervisor:
        configured = supervisor.task(retry=Retry(retry_inside, wait_initial=7, wait_jitter=0))
        dialled = configured.schedule(dial)
        await over(supervisor, dialled)

    waits = [event.wait for event in observed.events if event.kind == "retrying"]
    assert waits == [5, 5]
    assert all(e.wait == 0 or isinstance(e.error, BusyError) for e in observed.events)


async def test_in_its_testing_mode_stamina_does_not_wait(
    supervisor: Supervisor, observed: Observed
) -> None:
    """And the attempts are those that the test asks for."""
    line = engaged()
    began = anyio.current_time()
    async with supervisor:
        with stamina.set_testing(True, attempts=4):
            dialled = supervisor.task(retry=LATER).schedule(line.dial)
            await over(supervisor, dialled)
        with stamina.set_testing(True):
            once = supervisor.task(retry=LATER).schedule(line.dial)
            await over(supervisor, once)

    assert (dialled.attempt, once.attempt) == (4, 1)
    assert anyio.current_time() == pytest.approx(began)
    assert [e.wait for e in observed.events if e.kind == "retrying"] == [0] * 3


async def test_where_stamina_is_not_active_nothing_is_retried(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    """The one attempt is told like that of a task without retry."""
    stamina.set_active(False)
    async with supervisor:
        dialled = supervisor.task(retry=REDIAL).schedule(engaged().dial)
        await over(supervisor, dialled)
        assert await supervisor.task(retry=REDIAL).schedule(engaged(0).dial).wait() == "hello"

    assert (dialled.status, dialled.attempt) == ("failed", 1)
    assert [record.levelname for record in ours(caplog)] == ["ERROR"]


def test_stamina_is_imported_when_a_task_is_to_be_retried() -> None:
    """Not by the package, nor by a task without retry: it takes several times as long as all
    the rest."""
    program = """
import sys, anyio
from fastapi_tasks import Retry, Supervisor, task

@task(retry=Retry(ValueError, wait_initial=0, wait_jitter=0))
async def flaky(): raise ValueError

async def main():
    async with Supervisor() as supervisor:
        once = {"retry": Retry(ValueError, attempts=1), "timeout": 9}
        for function, fields in ((int, {}), (flaky, once)):
            task = supervisor.task(**fields).schedule(function)
            while supervisor.running: await anyio.sleep(0)
            print(task.status, "stamina" in sys.modules)
        task = supervisor.schedule(flaky)
        while supervisor.running: await anyio.sleep(0)
        print(task.status, task.attempt, "stamina" in sys.modules)

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=unmeasured(),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )

    assert done.stdout.splitlines() == ["succeeded False", "failed False", "failed 3 True"]


# Side by side


async def test_tasks_are_retried_beside_one_another(supervisor: Supervisor) -> None:
    """Each with its own attempts, waits and records."""
    lines = [engaged(number) for number in range(6)]
    async with supervisor:
        dialled = [
            supervisor.task(retry=Retry(BusyError, attempts=4)).schedule(line.dial)
            for line in lines
        ]
        await over(supervisor, *dialled)

    assert [each.attempt for each in dialled] == [1, 2, 3, 4, 4, 4]
    assert [each.status for each in dialled] == ["succeeded"] * 4 + ["failed"] * 2


def test_event_loops_in_two_threads_are_apart() -> None:
    """Two supervisors whose tasks wait at the same time are told of their own waits."""
    barrier = threading.Barrier(2, timeout=PATIENCE)
    told: dict[str, list[tuple[str, float]]] = {"asyncio": [], "trio": []}
    stamina.instrumentation.set_on_retry_hooks([])

    async def main(backend: str, wait: float) -> None:
        def watch(event: TaskEvent) -> None:
            if event.kind == "retrying":
                told[backend].append((event.task.name, event.wait))

        async def dial() -> None:
            barrier.wait()
            raise BusyError

        async with Supervisor(observers=[watch]) as supervisor:
            retry = Retry(lambda error: wait, attempts=5)
            task = supervisor.task(name=backend, retry=retry).schedule(dial)
            await over(supervisor, task)

    threads = [
        threading.Thread(target=anyio.run, args=(main, name, wait), kwargs={"backend": name})
        for name, wait in (("asyncio", 0), ("trio", 0.001))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert told == {"asyncio": [("asyncio", 0)] * 4, "trio": [("trio", 0.001)] * 4}


# Nothing stays


class Secret:
    """What a function has in its hands."""


@asynccontextmanager
async def silent_supervisor(observer: TaskObserver) -> AsyncIterator[Supervisor]:
    """Start a supervisor of whose tasks nobody keeps a record."""
    with load.silence():
        async with Supervisor(observers=[observer]) as supervisor:
            yield supervisor


FATES: list[Any] = [
    pytest.param(Retry(BusyError, **AT_ONCE), 9, id="exhausted"),
    pytest.param(Retry(BusyError, **AT_ONCE), 1, id="succeeded"),
    pytest.param(Retry(WrongNumberError), 9, id="not-worth-it"),
    pytest.param(Retry(fail), 9, id="who-is-asked-fails"),
    pytest.param(Retry(leave), 9, id="who-is-asked-leaves"),
]


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(("retry", "failures"), FATES)
async def test_a_task_is_forgotten_without_the_garbage_collector(
    retry: Retry, failures: int, in_thread: bool
) -> None:
    """With its errors, and with what its function had in its frames."""
    secrets: list[weakref.ref[Secret]] = []

    def dial() -> None:
        secret = Secret()
        secrets.append(weakref.ref(secret))
        if current_task().attempt <= failures:
            raise BusyError

    async def dial_in_loop() -> None:
        dial()

    ended = anyio.Event()

    def watch(event: TaskEvent) -> None:
        if event.kind in ("failed", "finished"):
            ended.set()

    async with silent_supervisor(watch) as supervisor:
        gc.disable()
        try:
            function: Any = dial if in_thread else dial_in_loop
            task = weakref.ref(supervisor.task(retry=retry).schedule(function))
            await ended.wait()
            await idle(supervisor)
            await until(lambda: task() is None)  # a thread lets go of its call after it has ended
            assert [secret() for secret in secrets] == [None] * len(secrets)
        finally:
            gc.enable()


async def test_a_task_that_is_cancelled_between_attempts_is_forgotten_before_the_wait_is_over() -> (
    None
):
    """Though the event loop keeps the timer until it has nothing earlier to do."""
    async with Supervisor() as supervisor:
        supervisor.task(shield=True).schedule(anyio.sleep, 60)
        gc.disable()
        try:
            dialled = supervisor.task(retry=LATER).schedule(engaged().dial)
            await backing_off(dialled)
            dialled.cancel()
            await dialled.wait()
            task = weakref.ref(dialled)
            del dialled
            await let_others_run()
            assert task() is None
        finally:
            gc.enable()


def test_a_task_of_a_closed_loop_is_collected_in_its_wait_without_a_trace_in_another_task() -> None:
    """Whichever task runs when the garbage collector comes, is the current one before and after."""
    lost = Supervisor()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(lost.start())
    loop.run_until_complete(backing_off(lost.task(retry=LATER).schedule(engaged().dial)))
    loop.close()
    del lost, loop

    collect_within_a_task()


async def test_the_current_task_is_known_after_a_wait(supervisor: Supervisor) -> None:
    """In the next attempt, in what is asked then, and in the error handler."""
    seen: list[Task] = []

    def look(*_: object) -> bool:
        seen.append(current_task())
        return True

    async def dial() -> None:
        look()
        raise BusyError

    async def handle(task: Task, error: Exception) -> None:
        look()

    async with supervisor:
        configured = supervisor.task(retry=Retry(look), on_error=handle)
        dialled = configured.schedule(dial)
        await over(supervisor, dialled)

    assert seen == [dialled] * 7


# App, function, call


class Switchboard:
    """An app whose endpoint calls a line in one of many ways."""

    def __init__(self, retry: Retry) -> None:
        self.line = engaged()
        self.app = FastAPI()
        add_tasks(self.app, config=TaskConfig(retry=retry))

    async def attempts(self, schedule: Callable[[Tasks, Line], object]) -> int:
        """Return how often one request has called."""

        @self.app.get("/")
        async def connect(tasks: Tasks) -> None:
            schedule(tasks, self.line)

        async with asgi.lifespan(self.app):
            await asgi.request(self.app, "/")
            await over(get_supervisor(self.app), *get_supervisor(self.app).running)
        return len(self.line.attempts)


def only(attempts: int) -> Retry:
    """Return a retry that can be told from others by its attempts."""
    return Retry(BusyError, attempts=attempts, **AT_ONCE)


@task(retry=only(3))
async def dial_three_times(line: Line) -> None:
    """Have a retry of its own."""
    await line.dial()


@pytest.mark.parametrize(
    ("schedule", "attempts"),
    [
        pytest.param(lambda tasks, line: tasks.schedule(line.dial), 2, id="app"),
        pytest.param(lambda tasks, line: tasks.schedule(dial_three_times, line), 3, id="function"),
        pytest.param(
            lambda tasks, line: tasks.task(retry=only(4)).schedule(dial_three_times, line),
            4,
            id="call",
        ),
        pytest.param(
            lambda tasks, line: tasks.after_route.task(retry=only(4)).schedule(line.dial),
            4,
            id="after_route",
        ),
        pytest.param(
            lambda tasks, line: tasks.after_response.task(retry=only(4)).schedule(line.dial),
            4,
            id="after_response",
        ),
        pytest.param(
            lambda tasks, line: tasks.after_response.task(
                retry=only(4), run_if="always", limiter=anyio.CapacityLimiter(1), timeout=1, delay=1
            ).schedule(line.dial),
            4,
            id="with-everything",
        ),
        pytest.param(
            lambda tasks, line: tasks.task(retry=only(1)).schedule(dial_three_times, line),
            1,
            id="taken-back",
        ),
    ],
)
async def test_a_retry_is_for_an_app_a_function_or_a_call(
    schedule: Callable[[Tasks, Line], object], attempts: int
) -> None:
    """The nearest to the call counts, as a whole; at each of the three moments."""
    assert await Switchboard(only(2)).attempts(schedule) == attempts


async def test_an_attempt_that_waits_leaves_its_place_to_others(supervisor: Supervisor) -> None:
    """A limiter counts the calls that are made, not those that may be made again."""
    limiter = anyio.CapacityLimiter(1)
    line, other = engaged(1), engaged(0)
    async with supervisor:
        configured = supervisor.task(limiter=limiter)
        dialled = configured.task(retry=LATER).schedule(line.dial)
        await backing_off(dialled)
        began = anyio.current_time()
        await configured.schedule(other.dial).wait()
        assert anyio.current_time() == began
        assert await dialled.wait() == "hello"
