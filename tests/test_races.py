"""Threads that schedule, cancel, release and look while the event loop does something else."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from fastapi_tasks import DrainReport, Supervisor, Task, TaskEventKind, TasksScheduler, TaskStatus

from . import preemptions
from .interleavings import main
from .preemptions import (
    NEVER,
    Order,
    PreemptionError,
    Scenario,
    Side,
    WatchedLock,
    interleaver,
    scenarios,
)
from .recording import Observed

PATIENCE = 30.0
THREADS = 8
ROUNDS = 15
TASKS = 12  # that each thread schedules in a round
EVERY = 16  # which stops the suite tries; scripts/interleavings --every-line tries all

on_asyncio_and_trio = pytest.mark.parametrize("backend", ["asyncio", "trio"])


async def nothing() -> None:
    """Be a task."""


async def some_time() -> None:
    """Be a task that the loop comes back to."""
    await anyio.sleep(0.001)


class Round:
    """Eight threads that do something at once with the loop, and what comes of it."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.supervisor = Supervisor(observers=[observed])
        self.barrier = threading.Barrier(THREADS + 1)
        self.tasks: list[Task] = []

    async def run(self, *works: Callable[[], None]) -> DrainReport:
        """Drain while threads work, each of them at one of some works, and see all to its end."""
        limiter = anyio.CapacityLimiter(THREADS + 1)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for work, _ in zip(itertools.cycle(works), range(THREADS), strict=False):
                    begin = partial(self._at_once, work)
                    group.start_soon(partial(anyio.to_thread.run_sync, begin, limiter=limiter))
                await anyio.to_thread.run_sync(self.barrier.wait, PATIENCE, limiter=limiter)
                report = await self.supervisor.drain()
        await self.observed.all_over()
        return report

    def _at_once(self, work: Callable[[], None]) -> None:
        self.barrier.wait(PATIENCE)
        work()

    def schedule(self) -> None:
        """Schedule shielded tasks and others."""
        for number in range(TASKS):
            place = self.supervisor.task(shield=number % 2 == 0)
            self.tasks.append(place.schedule([nothing, some_time][number % 3 == 0]))

    def check(self, report: DrainReport, caplog: pytest.LogCaptureFixture) -> None:
        """Check that every task has one end, one record if it was lost, and one place at most."""
        groups = [report.finished, report.cancelled, report.abandoned, report.never_started]
        reported = Counter(task for group in groups for task in group)
        assert set(reported.values()) <= {1}
        assert report.abandoned == ()
        assert set(reported) <= set(self.tasks)
        records = Counter(getattr(record, "task_id", None) for record in caplog.records)
        for task in self.tasks:
            first, *others = self.observed.kinds(task)
            is_lost = task.status is TaskStatus.CANCELLED
            assert first is TaskEventKind.SCHEDULED
            assert len([kind for kind in others if kind in preemptions.ENDS]) == 1
            assert records[task.id] == is_lost
            assert task in report.finished or task not in reported or is_lost


async def test_eight_threads_schedule_while_the_loop_drains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each task ends, or is dropped or cancelled with one record; what is shielded and begins,
    ends by itself."""
    for _ in range(ROUNDS):
        with caplog.at_level(logging.INFO, "fastapi_tasks"):
            caplog.clear()
            one = Round(Observed())
            await one.supervisor.start()
            report = await one.run(one.schedule)

        assert len(one.tasks) == THREADS * TASKS
        one.check(report, caplog)
        for task in one.tasks:
            began = TaskEventKind.STARTED in one.observed.kinds(task)
            if began and task.config.shield:
                assert task.status is TaskStatus.SUCCEEDED


async def test_threads_do_all_at_once_what_they_can(caplog: pytest.LogCaptureFixture) -> None:
    """Schedule now and later, cancel, wait and look, while the loop releases and drains."""
    for _ in range(ROUNDS):
        with caplog.at_level(logging.INFO, "fastapi_tasks"):
            caplog.clear()
            one = Round(Observed())
            await one.supervisor.start()
            request = TasksScheduler(one.supervisor)
            waiting = [request.after_response.schedule(some_time) for _ in range(TASKS)]
            one.tasks.extend(waiting)

            def schedule_later(one: Round = one, request: TasksScheduler = request) -> None:
                for _ in range(TASKS):
                    one.tasks.append(request.after_response.schedule(some_time))
                    request.response_over(failed=False)

            def cancel(waiting: list[Task] = waiting) -> None:
                for task in waiting:
                    task.cancel()

            def wait(waiting: list[Task] = waiting) -> None:
                for task in waiting:
                    anyio.from_thread.run(task.wait)

            def look(one: Round = one) -> None:
                for _ in range(10 * TASKS):
                    assert len(set(one.supervisor.running)) <= THREADS * TASKS

            report = await one.run(one.schedule, schedule_later, cancel, wait, look)

        one.check(report, caplog)
        assert one.supervisor.running == ()


# Line by line


@on_asyncio_and_trio
def test_a_thread_and_the_loop_stop_each_other_anywhere(backend: str) -> None:
    """Whichever line it is: no call raises, no task is lost, ends twice or starts after its end."""
    with interleaver(backend) as each:
        for offset, scenario in enumerate(scenarios()):
            for order in each.single_stops(scenario)[offset % EVERY :: EVERY]:
                each.run(order)


@on_asyncio_and_trio
@pytest.mark.parametrize("state", ["new", "stopped"])
def test_a_task_that_a_thread_cancels_does_not_begin_in_the_loop(backend: str, state: str) -> None:
    """Nor does it leave its final state, when the loop starts and releases it meanwhile."""
    scenario = Scenario(state, "batch", False, "cancel", "start_and_release")
    with interleaver(backend) as each:
        for order in each.single_stops(scenario)[::2]:
            each.run(order)


class Stolen(deque[Task]):
    """Tasks that another thread takes, just when somebody has seen that there are any."""

    def __init__(self, tasks: deque[Task], take: Callable[[], None]) -> None:
        super().__init__(tasks)
        self._take = take

    def __bool__(self) -> bool:
        is_seen, take, self._take = len(self) > 0, self._take, lambda: None
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return is_seen


async def test_of_two_who_release_a_task_one_starts_it(observed: Observed) -> None:
    """The other one finds it gone, in the middle of taking it."""
    async with Supervisor(observers=[observed]) as supervisor:
        tasks = TasksScheduler(supervisor)
        task = tasks.after_route.schedule(nothing)
        batch = tasks.after_route
        batch._waiting = Stolen(batch._waiting, lambda: tasks.route_over(failed=False))
        assert not batch.release(failed=False)
        assert batch._taken is None
        await task.wait()
    assert observed.kinds(task).count(TaskEventKind.STARTED) == 1


@on_asyncio_and_trio
@pytest.mark.parametrize("shielded", [False, True])
def test_a_thread_cancels_in_the_loop_only(backend: str, shielded: bool) -> None:
    """Even if the drain abandons the task and stops while the thread asks for its cancellation."""
    scenario = Scenario("running", "live", shielded, "cancel", "interrupt")
    with interleaver(backend) as each:
        for order in each.single_stops(scenario)[::2]:
            each.run(order)


def test_a_broken_promise_is_reported_with_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scenario, and the lines at which each side was stopped."""
    monkeypatch.setattr(Supervisor, "_drop", lambda *args: None)
    monkeypatch.setattr(preemptions, "PATIENCE", 1.0)
    scenario = Scenario("stopped", "batch", False, "release", "release")

    with interleaver("asyncio") as each, pytest.raises(PreemptionError) as raised:
        each.run(Order(scenario, True, 1, NEVER))

    told = str(raised.value)
    assert "first_line=1" in told
    assert "stopped at scheduler.py:" in told


def test_what_a_side_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the thread as well, which nobody else would hear of."""

    def fail(self: TasksScheduler, *, failed: bool) -> None:
        raise LookupError("no batch")  # pragma: no cover - traced

    monkeypatch.setattr(TasksScheduler, "response_over", fail)
    scenario = Scenario("new", "batch", False, "release", "cancel")

    with interleaver("asyncio") as each, pytest.raises(PreemptionError, match="no batch"):
        each.run(Order(scenario, True, 1, NEVER))


def test_a_side_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of hanging with it."""
    monkeypatch.setattr(preemptions, "PATIENCE", 0.01)

    with pytest.raises(PreemptionError, match="stuck, stopped at its end"):
        Side(1).wait()


def test_a_lock_that_is_not_released_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of waiting for it for ever, and outside of an order too."""
    monkeypatch.setattr(preemptions, "PATIENCE", 0.01)
    lock = WatchedLock()
    errors: list[PreemptionError] = []

    def take() -> None:
        with pytest.raises(PreemptionError) as raised, lock:
            pass  # pragma: no cover - the lock is taken
        errors.append(raised.value)

    with lock:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(PATIENCE)

    assert str(errors[0]) == "a lock was not released"


def test_the_script_tries_every_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both loops, and says how many orders that makes."""
    monkeypatch.setattr(preemptions, "_MATRIX", [("new", "none", ["schedule"], ["start"])])

    status = main(["--every-line"])

    on_asyncio, on_trio = capsys.readouterr().out.splitlines()
    assert status == 0
    assert int(on_asyncio.split()[0]) > 40
    assert "orders of a thread and the loop on trio, in 2 scenarios" in on_trio
