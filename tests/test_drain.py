"""A supervisor's end: who may go on, who is cancelled when, and what is reported."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastapi_tasks import (
    DrainReport,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TasksScheduler,
    TaskStatus,
    get_supervisor,
)

from .clocks import (
    FAKE_CLOCKS,
    Backend,
    FakeClockLoop,
    on_fake_clocks,  # noqa: F401 - it is this module's anyio_backend
)
from .conftest import ASYNCIO_BACKENDS, on_real_clocks
from .recording import Observed, let_others_run

SHIELD = TaskConfig(shield=True)


class SinkingError(Exception):
    """What goes wrong in this module's harbour."""


async def sink() -> None:
    """Fail."""
    raise SinkingError


class Ship:
    """Work that takes its time, and keeps a log of when it was cancelled and when it was over."""

    def __init__(self, voyage: float = math.inf, cleanup: float = 0) -> None:
        self.voyage = voyage
        self.cleanup = cleanup
        self.cancelled_at: float | None = None
        self.over_at: float | None = None

    async def __call__(self) -> None:
        """Be at sea, and if that is cancelled, take some time to come in."""
        try:
            await anyio.sleep(self.voyage)
        except anyio.get_cancelled_exc_class():
            self.cancelled_at = anyio.current_time()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self.cleanup)
            raise
        finally:
            self.over_at = anyio.current_time()


async def start(supervisor: Supervisor, *tasks: Callable[[], Any]) -> None:
    """Start a supervisor, and let it begin some unshielded tasks."""
    await supervisor.start()
    for function in tasks:
        await supervisor.schedule(function).started.wait()


async def drained(supervisor: Supervisor) -> tuple[DrainReport, float]:
    """Drain a supervisor, and return its report and the clock's opinion of how long it took."""
    began = anyio.current_time()
    report = await supervisor.drain()
    return report, anyio.current_time() - began


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what a server's operator gets to see."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "fastapi_tasks" and record.levelno >= logging.WARNING
    ]


# Grace, shielding, cancellation


async def test_a_shielded_task_is_waited_for_and_an_unshielded_one_is_not() -> None:
    """The promise of the whole package, in the smallest form."""
    supervisor = Supervisor()
    await supervisor.start()
    lost = supervisor.schedule(anyio.sleep, 3600)
    kept = supervisor.task(shield=True).schedule(anyio.sleep, 3600)
    await lost.started.wait()

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(3600)
    assert (lost.status, kept.status) == (TaskStatus.CANCELLED, TaskStatus.SUCCEEDED)
    assert (report.finished, report.cancelled) == ((kept,), (lost,))


async def test_a_drain_with_nothing_to_wait_for_takes_no_time() -> None:
    """Grace is a limit and not a delay."""
    supervisor = Supervisor(grace=60, shutdown_timeout=120)
    await supervisor.start()

    report, seconds = await drained(supervisor)

    assert (seconds, report) == (0, DrainReport((), (), (), (), duration=0))


async def test_every_task_may_end_by_itself_within_the_grace() -> None:
    """Shielded or not; the drain is over with the last of them."""
    supervisor = Supervisor(grace=10)
    await supervisor.start()
    tasks = [
        supervisor.task(shield=shield).schedule(anyio.sleep, seconds)
        for shield, seconds in ((False, 9), (True, 4), (False, 2))
    ]

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(9)
    assert set(report.finished) == set(tasks)
    assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}


@pytest.mark.parametrize("grace", [0, 3, 10.5])
async def test_unshielded_tasks_are_cancelled_when_the_grace_is_over(grace: float) -> None:
    """Then, and not when the shielded ones are done; those go on meanwhile."""
    supervisor = Supervisor(grace=grace)
    lost, kept = Ship(), Ship(voyage=100)
    await supervisor.start()
    supervisor.schedule(lost)
    task = supervisor.task(SHIELD).schedule(kept)
    await let_others_run()
    began = anyio.current_time()

    report = await supervisor.drain()

    assert lost.cancelled_at == pytest.approx(began + grace)
    assert kept.cancelled_at is None
    assert kept.over_at == pytest.approx(began + 100)
    assert report.finished == (task,)


async def test_without_a_limit_shielded_tasks_are_waited_for_as_long_as_it_takes() -> None:
    """A payment that takes a day is a payment."""
    supervisor = Supervisor(config=SHIELD)
    await supervisor.start()
    task = supervisor.schedule(anyio.sleep, 24 * 3600)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(24 * 3600)
    assert report.finished == (task,)


LIMITS = pytest.mark.parametrize(
    ("limit", "last_call"), [(25, 20), (11, 6), (10, 5), (8, 4), (4, 2), (0.5, 0.25)]
)


@LIMITS
async def test_shielded_tasks_are_cancelled_when_the_limit_is_near(
    limit: float, last_call: float
) -> None:
    """Five seconds before, or half of the time if there are less than ten."""
    supervisor = Supervisor(config=SHIELD, shutdown_timeout=limit)
    ship = Ship()
    await start(supervisor, ship)
    began = anyio.current_time()

    report = await supervisor.drain()

    assert ship.cancelled_at == pytest.approx(began + last_call)
    assert len(report.cancelled) == 1


@LIMITS
async def test_a_drain_is_over_within_its_limit(limit: float, last_call: float) -> None:
    """Whatever runs: it is abandoned then, and may go on for as long as it likes."""
    supervisor = Supervisor(config=SHIELD, shutdown_timeout=limit)
    ship = Ship(cleanup=1000)
    await start(supervisor, ship)

    report, seconds = await drained(supervisor)
    (task,) = report.abandoned
    status = task.status
    await task.wait()

    assert seconds == report.duration == pytest.approx(limit)
    assert ship.cancelled_at == pytest.approx(last_call)
    assert (status, task.status) == (TaskStatus.RUNNING, TaskStatus.CANCELLED)


@pytest.mark.parametrize("shield", [True, False])
async def test_a_cancelled_task_has_five_seconds_to_clean_up(shield: bool) -> None:
    """What ends within them is cancelled, in order."""
    supervisor = Supervisor(grace=20, shutdown_timeout=25)
    ship = Ship(cleanup=4.9)
    await supervisor.start()
    task = supervisor.task(shield=shield).schedule(ship)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(24.9)
    assert report.cancelled == (task,)


@pytest.mark.parametrize(
    ("grace", "limit", "end"), [(0, None, 5), (1, None, 6), (1, 20, 6), (1, 4, 4), (4, 4, 4)]
)
async def test_a_task_that_takes_longer_to_clean_up_is_abandoned(
    grace: float, limit: float | None, end: float
) -> None:
    """After five seconds, or at the limit if that is earlier."""
    supervisor = Supervisor(grace=grace, shutdown_timeout=limit)
    await start(supervisor, Ship(cleanup=60))

    report, seconds = await drained(supervisor)
    (task,) = report.abandoned
    await task.wait()

    assert seconds == pytest.approx(end)
    assert (report.finished, report.cancelled) == ((), ())


async def test_shielded_tasks_are_waited_for_after_others_were_abandoned() -> None:
    """Giving one up is not the end of the drain."""
    supervisor = Supervisor()
    await start(supervisor, Ship(cleanup=20))
    kept = supervisor.task(SHIELD).schedule(anyio.sleep, 60)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(60)
    assert (report.finished, len(report.abandoned)) == ((kept,), 1)


async def test_a_grace_beyond_the_last_call_ends_with_it() -> None:
    """With little time, unshielded and shielded tasks are cancelled together."""
    supervisor = Supervisor(grace=9, shutdown_timeout=10)
    ships = Ship(), Ship()
    await start(supervisor, ships[0])
    supervisor.task(SHIELD).schedule(ships[1])

    await supervisor.drain()

    assert [ship.cancelled_at for ship in ships] == [pytest.approx(5)] * 2


# Tasks that will not go


async def test_a_task_that_withstands_its_cancellation_once_may_end_well(
    observed: Observed,
) -> None:
    """It finishes what it must not leave half done, and is reported as finished."""
    supervisor = Supervisor(observers=[observed])

    async def moor() -> str:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep(math.inf)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(3)
        return "moored"

    await supervisor.start()
    task = supervisor.schedule(moor)
    await task.started.wait()

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(3)
    assert (task.result(), report.finished) == ("moored", (task,))
    assert "cancelled" not in observed.kinds(task)


async def test_a_task_that_withstands_every_cancellation_is_abandoned() -> None:
    """The drain does not wait for it, nor try for ever."""
    supervisor = Supervisor()
    freed = anyio.Event()

    async def drift() -> None:
        while not freed.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await freed.wait()

    await supervisor.start()
    task = supervisor.schedule(drift)
    await task.started.wait()

    report, seconds = await drained(supervisor)
    freed.set()
    await task.wait()

    assert seconds == pytest.approx(5)
    assert report.abandoned == (task,)
    assert task.status is TaskStatus.SUCCEEDED


async def test_a_task_that_was_cancelled_before_is_left_to_its_clean_up(
    observed: Observed,
) -> None:
    """The drain waits for it, and does not break in with a cancellation of its own."""
    supervisor = Supervisor(observers=[observed])
    ship = Ship(cleanup=3)
    await start(supervisor, ship)
    (task,) = supervisor.running
    task.cancel()
    await let_others_run()

    report, seconds = await drained(supervisor)

    assert (ship.cancelled_at, ship.over_at) == (pytest.approx(0), pytest.approx(3))
    assert (report.cancelled, seconds) == ((task,), pytest.approx(3))
    assert "drain_cancelling" not in observed.kinds()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": FakeClockLoop})])
async def test_an_abandoned_task_goes_on_though_nobody_refers_to_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The garbage collector does not end it, and the event loop has nothing to say of it."""

    class Cargo:
        pass

    held: list[weakref.ref[Cargo]] = []

    async def drift() -> None:
        cargo = Cargo()
        held.append(weakref.ref(cargo))
        while True:
            with suppress(asyncio.CancelledError):
                await anyio.Event().wait()

    supervisor = Supervisor(shutdown_timeout=1)
    await supervisor.start()
    await supervisor.schedule(drift).started.wait()
    await supervisor.drain()
    await let_others_run()
    gc.collect()

    assert held[0]() is not None
    assert {record.name for record in caplog.records} == {"fastapi_tasks"}


async def test_an_abandoned_task_cannot_be_cancelled() -> None:
    """It is on its own."""
    supervisor = Supervisor()
    await start(supervisor, Ship(cleanup=6))
    (task,) = supervisor.running
    await supervisor.drain()

    assert task.abandoned
    assert not task.cancel()
    await task.wait()


async def test_an_abandoned_task_lets_go_of_its_request_when_it_is_over() -> None:
    """Until then it may ask how that has ended."""
    supervisor = Supervisor()
    scheduler = TasksScheduler(supervisor)
    ship = Ship(cleanup=6)
    await supervisor.start()
    task = scheduler.schedule(ship)
    await task.started.wait()
    assert scheduler.end is not None
    scheduler.end.status = 404
    await supervisor.drain()

    assert (task.abandoned, task.response_status) == (True, 404)
    await task.wait()
    await let_others_run()
    assert (task.response_status, task.context, task.handle) == (None, None, None)


async def test_a_cancellation_is_the_loops_own(anyio_backend_name: str) -> None:
    """Delivered once on asyncio, where the clean-up may await, and for good on trio."""
    supervisor = Supervisor()
    steps: list[str] = []

    async def unload() -> None:
        try:
            await anyio.sleep(math.inf)
        finally:
            steps.append("cancelled")
            await anyio.sleep(1)
            steps.append("unloaded")

    await start(supervisor, unload)
    await supervisor.drain()

    assert steps == ["cancelled", "unloaded"][: 1 if anyio_backend_name == "trio" else 2]


# Tasks that have not begun


async def test_unshielded_tasks_that_have_not_begun_never_do() -> None:
    """What is scheduled in the last moment is told apart from what was interrupted."""
    supervisor = Supervisor()
    await start(supervisor, Ship())
    in_port = Ship()
    pending = supervisor.schedule(in_port)

    report, seconds = await drained(supervisor)
    await let_others_run()

    assert seconds == 0
    assert (report.never_started, len(report.cancelled)) == ((pending,), 1)
    assert (in_port.over_at, pending.attempt, pending.status) == (None, 0, TaskStatus.CANCELLED)


@pytest.mark.parametrize(
    ("grace", "config"), [(1, TaskConfig()), (0, SHIELD)], ids=["grace", "shielded"]
)
async def test_what_was_scheduled_before_the_drain_begins_if_there_is_time(
    grace: float, config: TaskConfig
) -> None:
    """From a thread as from the loop, though the loop has not heard of it yet."""
    supervisor = Supervisor(config=config, grace=grace)
    await supervisor.start()
    tasks: list[Task] = []

    def schedule() -> None:
        tasks.append(supervisor.schedule(anyio.sleep, 0.5))

    schedule()
    thread = threading.Thread(target=schedule)
    thread.start()
    thread.join()
    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(0.5)
    assert set(report.finished) == set(tasks)


async def test_sync_tasks_that_wait_for_a_thread_never_begin() -> None:
    """Those that have one end by themselves, and nobody takes their place."""
    supervisor = Supervisor(threads=1)
    gate = threading.Event()
    await supervisor.start()
    running = supervisor.schedule(gate.wait)
    await running.started.wait()
    waiting = [supervisor.schedule(gate.wait), supervisor.schedule(gate.wait)]
    reports: list[DrainReport] = []

    async def drain() -> None:
        reports.append(await supervisor.drain())

    async with anyio.create_task_group() as group:
        group.start_soon(drain)
        for task in waiting:
            await task.wait()
        gate.set()

    assert set(reports[0].never_started) == set(waiting)
    assert reports[0].finished + reports[0].abandoned == (running,)


# What is scheduled meanwhile


async def test_shielded_tasks_may_schedule_shielded_tasks() -> None:
    """And those again: a payment may be followed by a receipt, at whatever time."""
    supervisor = Supervisor(config=SHIELD)

    async def sail(legs: int) -> Task | None:
        await anyio.sleep(10)
        return get_supervisor().schedule(sail, legs - 1) if legs else None

    await supervisor.start()
    supervisor.schedule(sail, 3)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(40)
    assert len(report.finished) == 4
    assert {task.status for task in report.finished} == {TaskStatus.SUCCEEDED}


async def test_what_shielded_tasks_schedule_unshielded_is_dropped(observed: Observed) -> None:
    """Even within the grace: it would have been cancelled soon."""
    supervisor = Supervisor(grace=5, observers=[observed])
    dropped: list[Task] = []

    async def sail() -> None:
        await anyio.sleep(1)
        dropped.append(supervisor.schedule(anyio.sleep, 0))
        await dropped[0].wait()

    await supervisor.start()
    task = supervisor.task(SHIELD).schedule(sail)

    report = await supervisor.drain()

    assert (report.finished, report.never_started) == ((task,), tuple(dropped))
    assert observed.kinds(dropped[0]) == ["scheduled", "dropped"]
    (reason,) = [event.reason for event in observed.events if event.kind == "dropped"]
    assert "not shielded" in reason


async def test_threads_may_schedule_shielded_tasks_too() -> None:
    """A shielded sync task is no second-class citizen."""
    supervisor = Supervisor(config=SHIELD)
    gate = threading.Event()

    def sail() -> tuple[Task, Task]:
        gate.wait()
        place = get_supervisor()
        return place.schedule(anyio.sleep, 5), place.task(shield=False).schedule(anyio.sleep, 5)

    await supervisor.start()
    task = supervisor.schedule(sail)
    await task.started.wait()
    async with anyio.create_task_group() as group:
        group.start_soon(supervisor.drain)
        await let_others_run()
        gate.set()
    kept, lost = task.result()

    assert (kept.status, lost.status) == (TaskStatus.SUCCEEDED, TaskStatus.CANCELLED)


async def test_nothing_begins_after_the_last_call(observed: Observed) -> None:
    """The time that is left is for cleaning up."""
    supervisor = Supervisor(config=SHIELD, shutdown_timeout=10, observers=[observed])
    late: list[Task] = []

    async def sail() -> None:
        try:
            await anyio.sleep(math.inf)
        finally:
            late.append(supervisor.schedule(anyio.sleep, 0))

    await start(supervisor, sail)

    report = await supervisor.drain()

    assert report.never_started == tuple(late)
    assert [task.status for task in late] == [TaskStatus.CANCELLED]
    (reason,) = [event.reason for event in observed.events if event.kind == "dropped"]
    assert "no time left" in reason


async def test_a_batch_that_is_released_meanwhile_is_treated_alike() -> None:
    """The request's last tasks are in no better position than others."""
    supervisor = Supervisor()
    await supervisor.start()
    batch = TasksScheduler(supervisor).after_response
    lost, kept = batch.schedule(anyio.sleep, 5), batch.task(SHIELD).schedule(anyio.sleep, 5)

    async def respond() -> None:
        await anyio.sleep(1)
        batch.release(failed=False)

    supervisor.task(SHIELD).schedule(respond)
    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(6)
    assert kept in report.finished
    assert report.never_started == (lost,)


@pytest.mark.parametrize("shield", [True, False])
async def test_before_the_start_and_after_the_drain_everything_is_dropped(
    observed: Observed, shield: bool
) -> None:
    """On the supervisor or a scheduler that somebody holds, at each moment; never an error."""
    supervisor = Supervisor(config=TaskConfig(shield=shield), observers=[observed])
    tasks: list[Task] = []

    async def schedule() -> None:
        scheduler = TasksScheduler(supervisor)
        places = (supervisor, scheduler, scheduler.after_route, scheduler.after_response)
        tasks.extend(place.schedule(anyio.sleep, 0) for place in places)
        scheduler.response_over(failed=False)

    await schedule()
    await supervisor.start()
    held = TasksScheduler(supervisor)
    waiting = held.after_response.schedule(anyio.sleep, 0)
    await supervisor.drain()
    await schedule()
    held.response_over(failed=False)

    for task in (*tasks, waiting):
        await task.wait()
        assert (task.status, task.attempt) == (TaskStatus.CANCELLED, 0)
        assert observed.kinds(task) == ["scheduled", "dropped"]


# Error handlers


class Repair:
    """An error handler that takes its time."""

    def __init__(self, seconds: float, *, again: bool = False) -> None:
        self.seconds = seconds
        self.again = again
        self.done = False

    async def __call__(self, task: Task, error: Exception) -> None:
        await anyio.sleep(self.seconds)
        if self.again:
            await task()
        self.done = True


async def test_the_handler_of_a_shielded_task_is_waited_for() -> None:
    """It is shielded with its task, though that is over."""
    supervisor = Supervisor()
    repair = Repair(seconds=60)
    await supervisor.start()
    task = supervisor.task(shield=True, on_error=repair).schedule(sink)
    with pytest.raises(SinkingError):
        await task.wait()

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(60)
    assert repair.done
    assert report.finished == (task,)


async def test_the_handler_of_a_task_that_fails_during_the_drain_is_waited_for() -> None:
    """Also if it runs the function again, which has all the time it needs."""
    supervisor = Supervisor()
    repair = Repair(seconds=30, again=True)
    attempts: list[float] = []

    async def sail() -> None:
        attempts.append(anyio.current_time())
        await anyio.sleep(10)
        if len(attempts) == 1:
            raise SinkingError

    await supervisor.start()
    task = supervisor.task(shield=True, on_error=repair).schedule(sail)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(50)
    assert repair.done
    assert attempts == [pytest.approx(0), pytest.approx(40)]
    assert (report.finished, task.status) == ((task,), TaskStatus.FAILED)


@pytest.mark.parametrize(("config", "moment"), [(TaskConfig(), 3), (SHIELD, 15)])
async def test_a_handler_is_cancelled_with_its_kind(
    config: TaskConfig, moment: float, observed: Observed
) -> None:
    """Unshielded ones when the grace is over, shielded ones when the limit is near; it is told."""
    supervisor = Supervisor(config=config, grace=3, shutdown_timeout=20, observers=[observed])
    repair = Repair(seconds=math.inf)
    await supervisor.start()
    task = supervisor.task(on_error=repair).schedule(sink)

    report, seconds = await drained(supervisor)

    assert seconds == pytest.approx(moment)
    assert (report.finished, task.status) == ((task,), TaskStatus.FAILED)
    assert isinstance(task.exception(), SinkingError)
    assert not repair.done
    assert observed.kinds(task)[-1] == "handler_failed"


@on_real_clocks  # a fake one does not wait for a thread
async def test_a_handler_whose_function_runs_in_a_thread_is_cancelled_afterwards() -> None:
    """The cancellation cannot reach the thread, but must not get lost either."""
    supervisor = Supervisor()
    gate, entered = threading.Event(), threading.Event()
    calls: list[int] = []
    forgotten = anyio.Event()

    def sink_in_thread() -> None:
        calls.append(1)
        if len(calls) > 1:
            entered.set()
            gate.wait()
        raise SinkingError

    async def retry(task: Task, error: Exception) -> None:
        with suppress(SinkingError):
            await task()
        await forgotten.wait()

    await supervisor.start()
    task = supervisor.task(on_error=retry).schedule(sink_in_thread)
    await anyio.to_thread.run_sync(entered.wait)

    async def open_gate() -> None:
        gate.set()

    supervisor.task(SHIELD).schedule(open_gate)  # the drain begins before it does
    report = await supervisor.drain()
    forgotten.set()
    await let_others_run()

    assert task in report.finished


# Records


async def test_warnings_name_who_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """Servers hide less: this is what an operator has in hand after a deploy."""
    supervisor = Supervisor()
    await start(supervisor, Ship())
    task = supervisor.running[0]

    await supervisor.drain()

    assert warnings(caplog) == [f"Shutdown: cancelling Ship ({task.id})"]


async def test_warnings_name_who_was_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    """It is where to look for a task that does not end."""
    supervisor = Supervisor()
    await start(supervisor, Ship(cleanup=60))
    task = supervisor.running[0]

    await supervisor.drain()
    await task.wait()

    assert warnings(caplog) == [
        f"Shutdown: cancelling Ship ({task.id})",
        f"Shutdown: abandoning Ship ({task.id}), which did not end in time",
    ]


async def test_a_task_that_is_over_is_not_said_to_be_cancelled(
    caplog: pytest.LogCaptureFixture, observed: Observed
) -> None:
    """Not even if it ended just before the drain: a record that cries wolf hides the next."""
    supervisor = Supervisor(observers=[observed])
    await supervisor.start()
    task = supervisor.schedule(anyio.sleep, 0)
    await task.wait()

    await supervisor.drain()

    assert warnings(caplog) == []
    assert "drain_cancelling" not in observed.kinds(task)


async def test_every_ten_seconds_a_warning_names_whom_it_waits_for() -> None:
    """Counted from the start, through all steps; nothing is as unsettling as a silent wait."""
    waits: list[Any] = []

    def observe(event: TaskEvent) -> None:
        if event.kind == "drain_waiting":
            waits.append((anyio.current_time(), event.tasks))

    supervisor = Supervisor(grace=12, observers=[observe])
    await start(supervisor, Ship())
    lost = supervisor.running[0]
    short, long = (supervisor.task(SHIELD).schedule(anyio.sleep, seconds) for seconds in (25, 41))

    await supervisor.drain()

    assert waits == [
        (pytest.approx(10), (lost, short, long)),
        (pytest.approx(20), (short, long)),
        (pytest.approx(30), (long,)),
        (pytest.approx(40), (long,)),
    ]


async def test_the_waiting_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """With names, and how many there are of each."""
    supervisor = Supervisor(config=SHIELD)
    await supervisor.start()
    for _ in range(3):
        supervisor.task(name="ferry").schedule(anyio.sleep, 15)
    single = supervisor.task(name="tug").schedule(anyio.sleep, 15)

    await supervisor.drain()

    assert warnings(caplog) == [f"Shutdown: still waiting for ferry x3, tug ({single.id})"]


async def test_a_report_reads_as_a_sentence() -> None:
    """Numbers only: the names are in the warnings."""
    supervisor = Supervisor()
    await start(supervisor, Ship())
    supervisor.schedule(Ship())
    supervisor.task(SHIELD).schedule(anyio.sleep, 1.5)

    report = await supervisor.drain()

    assert str(report) == ("1 finished, 1 cancelled, 0 abandoned, 1 never started in 1.500 s")


# The report


@dataclass(frozen=True)
class Voyage:
    """A task of the hypothesis test, and what becomes of it."""

    shield: bool
    begun: bool
    work: float
    cleanup: float
    withstands: bool
    fails: bool

    async def run(self) -> None:
        """Work, and if that is cancelled, clean up."""
        try:
            await anyio.sleep(self.work)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self.cleanup)
            if not self.withstands:
                raise
        if self.fails:
            raise SinkingError

    def end(self, grace: float, limit: float) -> tuple[str, float]:
        """Return how and when it should end, in seconds from the start of the drain."""
        last_call = limit - min(5, limit / 2) if limit < math.inf else math.inf
        cancel = last_call if self.shield else min(grace, last_call)
        abandon = limit if self.shield else min(cancel + 5, limit)
        if not self.begun and cancel == 0:
            return "never_started", 0
        if self.work < cancel:
            return "finished", self.work
        if cancel + self.cleanup > abandon:
            return "abandoned", abandon
        return "finished" if self.withstands else "cancelled", cancel + self.cleanup


# No two moments fall together: what happens at the same time may happen in any order.
voyages = st.builds(
    Voyage,
    shield=st.booleans(),
    begun=st.booleans(),
    work=st.integers(0, 40).map(lambda seconds: seconds + 0.26),
    cleanup=st.sampled_from([0.01, 3.11, 4.61, 5.11, 20.11]),
    withstands=st.booleans(),
    fails=st.booleans(),
)


@pytest.mark.parametrize("clock", FAKE_CLOCKS)
@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(voyages, max_size=6),
    grace=st.integers(0, 12),
    more=st.none() | st.integers(0, 30),
)
@example(tasks=[], grace=0, more=None)
@example(
    tasks=[
        Voyage(shield, begun, work, cleanup, withstands=False, fails=False)
        for shield in (True, False)
        for begun in (True, False)
        for work in (1.26, 30.26)
        for cleanup in (0.01, 5.11)
    ],
    grace=0,
    more=25,
)
def test_the_report_adds_up(
    clock: Callable[[], Backend], tasks: list[Voyage], grace: int, more: int | None
) -> None:
    """Each task is in one list, the one it belongs to, and the drain ends with the last."""
    limit = None if more is None else max(1, grace + more)
    ends = [voyage.end(grace, math.inf if limit is None else limit) for voyage in tasks]

    async def main() -> None:
        supervisor = Supervisor(grace=grace, shutdown_timeout=limit)
        await supervisor.start()
        scheduled: dict[int, Task] = {}
        for begun in (True, False):
            for number, voyage in enumerate(tasks):
                if voyage.begun is begun:
                    place = supervisor.task(shield=voyage.shield)
                    scheduled[number] = place.schedule(voyage.run)
            if begun:
                await let_others_run()
        report, seconds = await drained(supervisor)

        for kind in ("finished", "cancelled", "abandoned", "never_started"):
            expected = {scheduled[number] for number, end in enumerate(ends) if end[0] == kind}
            found: tuple[Task, ...] = getattr(report, kind)
            assert (len(found), set(found)) == (len(expected), expected)
        assert report.duration == seconds == pytest.approx(max((end for _, end in ends), default=0))
        assert {task.status for task in report.cancelled} <= {TaskStatus.CANCELLED}
        assert supervisor.running == ()
        for task in report.abandoned:
            with suppress(SinkingError):
                await task.wait()

    backend, options = clock()
    if backend == "trio":
        trio.run(main, **options)  # older versions of anyio.run leave the clock out
    else:
        anyio.run(main, backend=backend, backend_options=options)


# Threads


async def test_a_sync_task_that_outlives_the_drain_is_abandoned_and_runs_on() -> None:
    """It keeps its thread and its status until its function ends: only then is it over."""
    supervisor = Supervisor(threads=1)
    gate = threading.Event()
    states: list[tuple[TaskStatus, TaskStatus]] = []

    async def look() -> None:
        await anyio.sleep(8)  # the sync task was abandoned at 5
        next_one = supervisor.task(SHIELD).schedule(lambda: "next")
        await anyio.sleep(1)
        states.append((task.status, next_one.status))
        gate.set()
        assert await next_one.wait() == "next"

    await supervisor.start()
    task = supervisor.schedule(gate.wait)
    await task.started.wait()
    supervisor.task(SHIELD).schedule(look)

    report = await supervisor.drain()

    assert states == [(TaskStatus.RUNNING, TaskStatus.PENDING)]
    assert report.abandoned == (task,)
    assert [end.status for end in report.finished] == [TaskStatus.SUCCEEDED] * 2
    assert await task.wait() is True
    assert task.status is TaskStatus.SUCCEEDED


@on_real_clocks
async def test_a_sync_task_runs_on_after_the_drain(observed: Observed) -> None:
    """On real loops the same; nobody has to wait here, since the drain itself is cancelled."""
    supervisor = Supervisor(observers=[observed])
    gate = threading.Event()
    await supervisor.start()
    task = supervisor.schedule(gate.wait)
    await task.started.wait()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await supervisor.drain()
    status = task.status
    gate.set()
    await task.wait()

    assert (status, task.status) == (TaskStatus.RUNNING, TaskStatus.SUCCEEDED)
    assert [event.report.abandoned for event in observed.events if event.report] == [(task,)]


# The drain itself


async def test_a_drain_can_be_cancelled(observed: Observed) -> None:
    """A server that loses patience gets its way: all are cancelled, and none is waited for."""
    supervisor = Supervisor(config=SHIELD, observers=[observed])
    ships = Ship(), Ship(cleanup=2)
    await start(supervisor, *ships)
    tasks = supervisor.running

    with anyio.move_on_after(7) as scope:
        await supervisor.drain()

    assert scope.cancelled_caught
    assert anyio.current_time() == pytest.approx(7)
    assert (supervisor.running, supervisor.is_running) == ((), False)
    (report,) = [event.report for event in observed.events if event.report]
    assert report.abandoned == tasks
    for task in tasks:
        await task.wait()
    assert [ship.cancelled_at for ship in ships] == [pytest.approx(7)] * 2


async def test_a_supervisor_whose_drain_was_cancelled_can_be_started_again() -> None:
    """And what came of its last life does not get in the way."""
    supervisor = Supervisor(config=SHIELD)
    await start(supervisor, Ship(cleanup=1))
    (old,) = supervisor.running
    with anyio.move_on_after(1):
        await supervisor.drain()
    await supervisor.start()
    new = supervisor.schedule(anyio.sleep, 5)

    report = await supervisor.drain()
    await old.wait()

    assert (old.status, report.finished) == (TaskStatus.CANCELLED, (new,))


@pytest.mark.parametrize("backend", ASYNCIO_BACKENDS)
def test_the_end_of_asyncio_does_not_wait_for_an_abandoned_task(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio.run cancels what is left and waits for it: the drain has been through that."""
    tasks: list[Task] = []

    async def drift() -> None:
        with suppress(asyncio.CancelledError):
            await anyio.Event().wait()
        await anyio.Event().wait()  # a second cancellation would end it

    async def main() -> None:
        supervisor = Supervisor()
        await start(supervisor, drift)
        tasks.extend(supervisor.running)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await supervisor.drain()
        await let_others_run()

    anyio.run(main, backend=backend[0], backend_options=backend[1])

    assert tasks[0].status is TaskStatus.RUNNING
    caplog.clear()
    tasks.clear()
    gc.collect()  # the coroutine goes here, and not in the middle of another test
    # Who was abandoned, was reported then; asyncio has a word of its own to say about it.
    assert [record for record in caplog.records if record.name == "fastapi_tasks"] == []
