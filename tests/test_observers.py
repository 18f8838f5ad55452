"""What observers are told, in which order, and what the log says of it."""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
from collections.abc import Callable
from typing import Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from fastapi_tasks import (
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskObserver,
    TasksScheduler,
    TaskStatus,
)

from .recording import Observed, idle, ours


class CrossedLinesError(Exception):
    """What goes wrong in this module's telephone exchange."""


async def connect() -> str:
    """Succeed."""
    return "connected"


def connect_in_thread() -> str:
    """Succeed in a thread."""
    return "connected"


async def cross() -> None:
    """Fail."""
    raise CrossedLinesError


async def hold() -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


async def misdial(task: Task, error: Exception) -> None:
    """Fail to handle the failure."""
    raise CrossedLinesError("again")


# One task


@pytest.mark.parametrize("function", [connect, connect_in_thread])
async def test_a_task_that_succeeds_is_scheduled_started_and_finished(
    observed: Observed, function: Callable[[], Any]
) -> None:
    """In this order, and each once."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.schedule(function)
        await idle(supervisor)

    assert observed.kinds(task) == ["scheduled", "started", "finished"]


async def test_a_failure_comes_with_its_error(observed: Observed) -> None:
    """So that an observer need not ask the task for it."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.schedule(cross)
        await idle(supervisor)

    assert observed.kinds(task) == ["scheduled", "started", "failed"]
    (failed,) = [event for event in observed.events if event.kind is TaskEventKind.FAILED]
    assert failed.error is task.exception() is not None


async def test_a_handlers_failure_is_an_event_of_its_own(observed: Observed) -> None:
    """With the handler's error, after the task's."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.task(on_error=misdial).schedule(cross)
        await idle(supervisor)

    assert observed.kinds(task) == ["scheduled", "started", "failed", "handler_failed"]
    errors = [event.error for event in observed.events if event.error is not None]
    assert [str(error) for error in errors] == ["", "again"]


async def test_a_cancelled_task_says_by_whom(observed: Observed) -> None:
    """A user's cancel() and a shutdown are told apart."""
    async with Supervisor(observers=[observed]) as supervisor:
        by_user, by_shutdown = supervisor.schedule(hold), supervisor.schedule(hold)
        await by_user.started.wait()
        await by_shutdown.started.wait()
        by_user.cancel()
        while by_user in supervisor.running:
            await anyio.lowlevel.checkpoint()

    assert observed.kinds(by_user) == ["scheduled", "started", "cancelled"]
    reasons = {
        event.task: event.reason
        for event in observed.events
        if event.kind is TaskEventKind.CANCELLED
    }
    assert reasons == {
        by_user: "its cancel() was called",
        by_shutdown: "the app is shutting down",
    }


async def test_a_task_that_is_cancelled_before_it_begins_has_not_started(
    observed: Observed,
) -> None:
    """Nobody is told of a start that never was."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.schedule(hold)
        task.cancel()
        await idle(supervisor)

    assert observed.kinds(task) == ["scheduled", "cancelled"]


async def test_a_dropped_task_says_why(observed: Observed) -> None:
    """Its request went wrong, or there is no supervisor to run it."""
    supervisor = Supervisor(observers=[observed])
    too_early = supervisor.schedule(connect)
    async with supervisor:
        batch = TasksScheduler(supervisor).after_response
        failed = batch.schedule(connect)
        batch.release(failed=True)

    dropped = [event for event in observed.events if event.kind is TaskEventKind.DROPPED]
    assert [event.task for event in dropped] == [too_early, failed]
    assert "not running" in dropped[0].reason
    assert dropped[1].reason == 'the request failed, and the task has run_if="success"'
    assert observed.kinds(failed) == ["scheduled", "dropped"]


@pytest.mark.parametrize(
    ("function", "kind", "status"),
    [
        (connect, TaskEventKind.FINISHED, TaskStatus.SUCCEEDED),
        (cross, TaskEventKind.FAILED, TaskStatus.FAILED),
    ],
)
async def test_the_task_is_what_the_event_says(
    function: Callable[[], Any], kind: TaskEventKind, status: TaskStatus
) -> None:
    """An observer that looks at the task sees the state after the event, result included."""
    seen: dict[str, tuple[TaskStatus, int]] = {}

    def observe(event: TaskEvent) -> None:
        if len(event.tasks) == 1:
            seen[event.kind] = event.task.status, event.task.attempt

    async with Supervisor(observers=[observe]) as supervisor:
        supervisor.schedule(function)
        await idle(supervisor)

    assert seen == {
        TaskEventKind.SCHEDULED: (TaskStatus.PENDING, 0),
        TaskEventKind.STARTED: (TaskStatus.RUNNING, 1),
        kind: (status, 1),
    }


async def test_whoever_waits_finds_the_event_told(observed: Observed) -> None:
    """When wait() returns, every observer knows of the end."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.schedule(connect)
        await task.wait()

        assert observed.kinds(task)[-1] == "finished"


# Observers


async def test_an_observer_is_any_function(observed: Observed) -> None:
    """One call, one event; a method or an instance will do."""
    kinds: list[TaskEventKind] = []

    def observe(event: TaskEvent) -> None:
        kinds.append(event.kind)

    observers: list[TaskObserver] = [observe, observed, observed.__call__]
    async with Supervisor(observers=observers) as supervisor:
        supervisor.schedule(connect)
        await idle(supervisor)

    assert observed.kinds() == [kind for kind in kinds for _ in range(2)]


async def test_observers_are_called_in_their_order() -> None:
    """Each event goes to all, before the next one."""
    calls: list[str] = []
    observers: list[TaskObserver] = [
        lambda event: calls.append(f"first {event.kind}"),
        lambda event: calls.append(f"second {event.kind}"),
    ]
    Supervisor(observers=observers).schedule(connect)

    assert calls == ["first scheduled", "second scheduled", "first dropped", "second dropped"]


async def test_the_log_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    """An observer that pages somebody can refer to a record that is there."""
    logged: list[int] = []

    def observe(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FAILED:
            logged.append(len(ours(caplog)))

    async with Supervisor(observers=[observe]) as supervisor:
        supervisor.schedule(cross)
        await idle(supervisor)

    assert logged == [1]


async def test_an_event_cannot_be_changed() -> None:
    """The next observer gets what the first one got."""
    event = TaskEvent(TaskEventKind.FINISHED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.kind = TaskEventKind.FAILED  # type: ignore[misc]


async def test_an_event_about_many_has_no_single_task() -> None:
    """Which one would it be?"""
    supervisor = Supervisor()
    tasks = supervisor.schedule(connect), supervisor.schedule(connect)

    assert TaskEvent(TaskEventKind.FINISHED, tasks[:1]).task is tasks[0]
    with pytest.raises(ValueError, match="too many"):
        _ = TaskEvent(TaskEventKind.DRAIN_CANCELLING, tasks).task


async def test_events_come_from_the_thread_that_makes_them() -> None:
    """Scheduling in a thread is told there, and everything else in the loop's."""
    threads: dict[str, int] = {}

    def observe(event: TaskEvent) -> None:
        threads[event.kind] = threading.get_ident()

    async with Supervisor(observers=[observe]) as supervisor:

        def schedule() -> tuple[Task, int]:
            return supervisor.schedule(connect_in_thread), threading.get_ident()

        task, thread = await anyio.to_thread.run_sync(schedule)
        await task.wait()

    assert threads.pop("scheduled") == thread
    assert set(threads.values()) == {threading.get_ident()}


async def test_an_observer_may_cancel_what_it_sees() -> None:
    """It is told in the middle of things, and may still use what it was given."""

    def veto(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.STARTED:
            event.task.cancel()

    async with Supervisor(observers=[veto]) as supervisor:
        tasks = [supervisor.schedule(hold), supervisor.schedule(anyio.Event().wait)]
        await idle(supervisor)

    assert [task.status for task in tasks] == [TaskStatus.CANCELLED] * 2


async def test_supervisors_have_their_own_observers() -> None:
    """What happens in one app is no news in another."""
    here, there = Observed(), Observed()
    async with Supervisor(observers=[here]) as supervisor, Supervisor(observers=[there]):
        task = supervisor.schedule(connect)
        await idle(supervisor)

    assert here.kinds(task) == ["scheduled", "started", "finished"]
    assert there.kinds() == ["drain_started", "drain_finished"]


# A drain


async def test_a_drain_tells_its_steps_and_its_report(observed: Observed) -> None:
    """Who was there, who is cancelled, and what came of it."""
    supervisor = Supervisor(observers=[observed])
    await supervisor.start()
    lost = supervisor.schedule(hold)
    await lost.started.wait()

    report = await supervisor.drain()

    steps = [event for event in observed.events if event.kind.startswith("drain_")]
    assert [event.kind for event in steps] == [
        "drain_started",
        "drain_cancelling",
        "drain_finished",
    ]
    started, cancelling, finished = steps
    assert started.tasks == (lost,)
    assert cancelling.tasks == (lost,)
    assert (finished.report, finished.tasks) == (report, ())
    assert report.cancelled == (lost,)


async def test_a_drain_with_nothing_to_do_tells_its_beginning_and_end(
    observed: Observed,
) -> None:
    """And nothing in between."""
    async with Supervisor(observers=[observed]):
        pass

    assert observed.kinds() == ["drain_started", "drain_finished"]
    assert observed.events[0].tasks == ()


async def test_what_happens_during_the_drain_lies_between_its_events(
    observed: Observed,
) -> None:
    """A task's end is told before the drain's."""
    async with Supervisor(observers=[observed]) as supervisor:
        await supervisor.schedule(hold).started.wait()

    assert observed.kinds()[2:] == [
        "drain_started",
        "drain_cancelling",
        "cancelled",
        "drain_finished",
    ]


# The log


async def test_each_event_is_one_record_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    """Servers show warnings: what somebody may have to act on is at least one."""
    caplog.set_level(logging.DEBUG, logger="fastapi_tasks")
    async with Supervisor(config=TaskConfig(on_error=misdial)) as supervisor:
        for function in (connect, cross):
            supervisor.schedule(function)
            await idle(supervisor)
        await supervisor.schedule(hold).started.wait()
    supervisor.schedule(connect)

    records = [
        f"{record.levelname} {re.sub(r' [(].*?[)]', '', record.getMessage())}"
        for record in ours(caplog)
    ]
    assert records[-2].startswith("DEBUG Task connect scheduled")
    assert records[-1].startswith("WARNING Task connect was dropped: its supervisor is not running")
    assert re.sub(r"in [0-9.]+ s$", "in S s", records[-3]) == (
        "INFO Shutdown: drained, 0 finished, 1 cancelled, 0 abandoned, 0 never started in S s"
    )
    assert records[:-3] == [
        "DEBUG Task connect scheduled",
        "DEBUG Task connect started",
        "DEBUG Task connect finished",
        "DEBUG Task cross scheduled",
        "DEBUG Task cross started",
        "ERROR Task cross failed in attempt 1",
        "ERROR on_error of task cross failed",
        "DEBUG Task hold scheduled",
        "DEBUG Task hold started",
        "INFO Shutdown: draining 1 tasks",
        "WARNING Shutdown: cancelling hold",
        "INFO Task hold was cancelled: the app is shutting down",
    ]


@pytest.mark.parametrize(
    ("run_if", "failed", "level"),
    [("error", False, logging.DEBUG), ("success", True, logging.WARNING)],
)
async def test_a_task_that_its_request_does_not_need_is_no_warning(
    run_if: Literal["success", "error"],
    failed: bool,
    level: int,
    observed: Observed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Work for an error is dropped all the time; work that an error has cost is to be noticed."""
    caplog.set_level(logging.DEBUG, logger="fastapi_tasks")
    async with Supervisor(observers=[observed]) as supervisor:
        batch = TasksScheduler(supervisor).after_response
        batch.task(run_if=run_if).schedule(connect)
        batch.release(failed=failed)

    (event,) = (event for event in observed.events if event.kind is TaskEventKind.DROPPED)
    (record,) = (record for record in ours(caplog) if "dropped" in record.getMessage())
    assert (event.expected, record.levelno) == (level == logging.DEBUG, level)


async def test_every_record_about_a_task_has_its_fields(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Logs are searched by them, whatever has happened."""
    caplog.set_level(logging.DEBUG, logger="fastapi_tasks")
    async with Supervisor() as supervisor:
        tasks = [supervisor.schedule(function) for function in (connect, cross, hold)]
        await tasks[2].started.wait()
        await tasks[1].started.wait()
        tasks[2].cancel()
        await idle(supervisor)

    for task in tasks:
        about_it = [record for record in ours(caplog) if f"({task.id})" in record.getMessage()]
        assert len(about_it) == 3
        for record in about_it:
            assert vars(record)["task_id"] == task.id
            assert vars(record)["task_name"] == task.name
        assert vars(about_it[-1])["task_attempt"] == 1


async def test_the_log_can_be_switched_off_without_losing_observers(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an observer among others."""
    caplog.set_level(logging.CRITICAL, logger="fastapi_tasks")
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.schedule(cross)
        await idle(supervisor)

    assert ours(caplog) == []
    assert observed.kinds(task)[-1] == "failed"


async def test_many_tasks_of_one_name_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A record stays readable, however many tasks it is about."""
    async with Supervisor() as supervisor:
        tasks = [supervisor.schedule(hold) for _ in range(100)]
        single = supervisor.task(name="switchboard").schedule(hold)
        for task in (*tasks, single):
            await task.started.wait()

    (record,) = ours(caplog)
    assert record.getMessage() == (f"Shutdown: cancelling hold x100, switchboard ({single.id})")
