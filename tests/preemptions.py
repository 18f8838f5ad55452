"""A thread against the event loop, line by line.

A worker thread makes one call of the package, and the event loop does something else meanwhile.
Each of them is stopped before one of its lines of the package: the first one runs to its stop, the
second one to its own, then the first to its end and the second to its. Every line of each of them
is tried as its only stop, which takes no luck to find something; and pairs of lines at random.
"""

from __future__ import annotations

import itertools
import queue
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import anyio
import anyio.from_thread
import anyio.lowlevel

import fastapi_tasks
from fastapi_tasks import (
    DrainReport,
    Supervisor,
    Task,
    TaskEvent,
    TaskEventKind,
    TaskInfo,
    TasksScheduler,
    TaskStatus,
)
from fastapi_tasks.spawn import Handle, Spawner, current_spawner

PATIENCE = 10.0
NEVER = 10**9  # lines: more than any call has
MARGIN = 10  # lines that a call may have more if it is interrupted
MODULES = (
    "drain",
    "history",
    "inbox",
    "live",
    "runner",
    "scheduler",
    "spawn",
    "supervisor",
    "tasks",
)
FILES = {str(Path(fastapi_tasks.__file__).with_name(f"{name}.py")) for name in MODULES}
ENDS = {
    TaskEventKind.FINISHED: TaskStatus.SUCCEEDED,
    TaskEventKind.FAILED: TaskStatus.FAILED,
    TaskEventKind.CANCELLED: TaskStatus.CANCELLED,
    TaskEventKind.DROPPED: TaskStatus.CANCELLED,
}
LOCKS = tuple(
    f"fastapi_tasks.tasks.{name}" for name in ("_giving_up", "_making_events", "_making_rare")
)

_here = threading.local()


class ProbeError(Exception):
    """What a task of a scenario raises."""


class PreemptionError(AssertionError):
    """Two interleaved calls broke a promise."""


class Side:
    """One of the two that are interleaved.

    :param pause_at: before which of its lines it is stopped, counted from 1
    """

    def __init__(self, pause_at: int) -> None:
        self.pause_at = pause_at
        self.lines = 0
        self.where = "its end"
        self.error: BaseException | None = None
        self.is_over = False
        self.is_paused = False
        self._states: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._go_on = threading.Event()

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Count the lines of the calling thread, and stop it when it is time."""
        before = sys.gettrace()  # that of coverage, perhaps
        _here.side = self
        sys.settrace(self._trace_call)
        try:
            yield
        except BaseException as error:
            self.error = error
        finally:
            sys.settrace(before)
            _here.side = None
            self.tell("over")

    # What is called by the interpreter cannot be measured by it.
    def _trace_call(self, frame: FrameType, event: str, arg: Any) -> Any:  # pragma: no cover - so
        return self._trace_line if frame.f_code.co_filename in FILES else None

    def _trace_line(self, frame: FrameType, event: str, arg: Any) -> Any:  # pragma: no cover - so
        if event == "line":
            self.lines += 1
            if self.lines == self.pause_at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.tell("paused")
                self._go_on.wait(PATIENCE)
        return self._trace_line

    def tell(self, state: str) -> None:
        """Say that it is ``paused``, ``blocked`` by a lock that the other one has, or ``over``."""
        self._states.put(state)

    def wait(self) -> str:
        """Return what it says next."""
        try:
            state = self._states.get(timeout=PATIENCE)
        except queue.Empty:
            raise PreemptionError(f"stuck, stopped at {self.where}") from None
        self.is_over = state == "over"
        self.is_paused = state == "paused"
        return state

    def resume(self) -> None:
        """Let it run on, if it is paused."""
        self.is_paused = False
        self._go_on.set()


class WatchedLock:
    """A lock that tells when one side waits for the other one, which may be paused."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            if side := getattr(_here, "side", None):
                side.tell("blocked")
            if not self._lock.acquire(timeout=PATIENCE):
                raise PreemptionError("a lock was not released")

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


class OpenRequest(TasksScheduler):
    """The tasks of a request, as the supervisor of an app knows them."""

    def end_response(self) -> None:  # pragma: no cover - traced
        """Release what waits for the response."""
        self.response_over(failed=False)


class Case:
    """A supervisor in some state, with a task or without one.

    :param state: ``new``, ``running`` or ``stopped``
    :param has: ``none``, a task of a ``batch``, one of a ``request`` that is open, one that is
        ``live``, or such a one that is ``failing`` and has an error handler
    :param shielded: whether it is, or the one that will be scheduled
    """

    def __init__(self, state: str, has: str, *, shielded: bool) -> None:
        self.state = state
        self.has = has
        self.shielded = shielded
        self.events: list[TaskEvent] = []
        self.reports: list[DrainReport] = []
        self.answers: list[bool] = []
        self.found: list[TaskInfo | None] = []
        self.asked_to_cancel = False
        self.is_interrupted = False
        self.is_drained_live = False
        self.is_released = False
        self.supervisor = Supervisor(observers=[self._observe])
        self.supervisor._inbox._lock = WatchedLock()
        self.request = OpenRequest(self.supervisor)
        self.now = self.supervisor.task(shield=shielded)
        self.later = self.request.after_response.task(shield=shielded)
        self.tasks: list[Task] = []

    def _observe(self, event: TaskEvent) -> None:
        if event.report is not None:
            self.reports.append(event.report)
        self.events.append(event)

    async def set_up(self) -> None:
        """Bring everything into its first state."""
        self.gate, self.begin_waiting, self.has_waited = (anyio.Event() for _ in range(3))
        if self.state != "new":
            await self.supervisor.start()
        if self.state == "stopped":
            await self.supervisor.drain()
            self.reports.clear()
        if self.has == "request":
            self.supervisor.open_requests.add(self.request)
        if self.has in {"batch", "request"}:
            self.tasks.append(self.later.schedule(self.gate.wait))
        elif self.has != "none":
            live = self.gate.wait if self.has == "live" else self._fail
            self.tasks.append(self.now.task(on_error=self._handle).schedule(live))
            with anyio.fail_after(PATIENCE):
                await self.tasks[0].started.wait()

    async def _fail(self) -> None:  # pragma: no cover - traced
        await self.gate.wait()
        raise ProbeError

    async def _handle(self, task: Task, error: Exception) -> None:  # pragma: no cover - traced
        await turns(3)

    # What the worker thread does; these run in the loop too. They are traced, so not measured.

    def schedule(self) -> None:  # pragma: no cover - traced
        self.tasks.append(self.now.schedule(self.gate.wait))

    def schedule_and_find(self) -> None:  # pragma: no cover - traced
        self.schedule()
        self.found.append(self.supervisor.find(self.tasks[0].id))

    def schedule_later(self) -> None:  # pragma: no cover - traced
        self.tasks.append(self.later.schedule(self.gate.wait))

    def release(self) -> None:  # pragma: no cover - traced
        self.is_released = True
        self.request.response_over(failed=False)

    def cancel(self) -> None:  # pragma: no cover - traced
        self.asked_to_cancel = True
        self.answers.append(self.tasks[0].cancel())

    def look(self) -> None:  # pragma: no cover - traced
        self.supervisor.running  # noqa: B018 - it must not fail
        self.supervisor.recent  # noqa: B018 - it must not fail
        self.tasks[0].started.is_set()
        if self.has != "batch":  # of which the supervisor has not heard
            self.found.append(self.supervisor.find(self.tasks[0].id))

    # What the loop does beside these

    async def drain(self) -> None:  # pragma: no cover - traced
        self.is_drained_live = self.has == "live"
        self.gate.set()
        await self.supervisor.drain()

    async def interrupt(self) -> None:  # pragma: no cover - traced
        self.is_drained_live = self.has == "live"
        self.is_interrupted = True
        with anyio.CancelScope() as scope:
            scope.cancel()
            await self.supervisor.drain()

    async def finish(self) -> None:  # pragma: no cover - traced
        self.gate.set()
        await turns(4)

    async def start(self) -> None:  # pragma: no cover - traced
        await self.supervisor.start()
        await turns(4)

    async def start_and_release(self) -> None:  # pragma: no cover - traced
        await self.supervisor.start()
        self.release()
        await turns(4)

    async def restart(self) -> None:  # pragma: no cover - traced
        await self.drain()
        await self.supervisor.start()

    async def wait(self) -> None:  # pragma: no cover - traced
        self.begin_waiting.set()
        await turns(4)

    async def waiter(self) -> None:
        """Be somebody who waits for the task, in the loop, once ``wait`` says so."""
        await self.begin_waiting.wait()
        await self.tasks[0].wait()
        self.has_waited.set()

    # What must be so afterwards

    async def settle(self) -> None:
        """See everything to its end, and check it."""
        with anyio.fail_after(PATIENCE):
            await turns(6)
            if any(self.answers) and not self.gate.is_set():
                assert self.tasks[0].status is TaskStatus.CANCELLED, "its cancellation got lost"
            self.gate.set()
            await turns(6)
            # Once is enough: what comes later must not wait.
            if not self.is_released:
                self.release()
                await turns(6)
            if self.supervisor.is_running:
                await self.supervisor.drain()
            await turns(6)
            for task in self.tasks:
                with suppress(ProbeError):
                    await task.wait()
            if self.begin_waiting.is_set():
                await self.has_waited.wait()
        assert self.supervisor.running == ()
        for info in self.found:
            assert info is not None, "it was nowhere for a moment"
            has_begun, is_over = info.started is not None, info.finished is not None
            story = f"it was {info!r}"
            assert has_begun is (info.attempt > 0), story
            assert has_begun is (info.status != "pending") or is_over, story
            assert is_over is (info.status not in {"pending", "running"}), story
        for task in self.tasks:
            self._check(task)

    def _check(self, task: Task) -> None:
        told = [event.kind for event in self.events if task in event.tasks]
        told = [kind for kind in told if not kind.startswith("drain")]
        ends = [kind for kind in told if kind in ENDS]
        story = f"{task!r}: {' '.join(told)}"
        has_begun = TaskEventKind.STARTED in told
        assert len(ends) == 1, story
        assert told[0] is TaskEventKind.SCHEDULED, story
        assert ENDS[ends[0]] is task.status, story
        assert not (has_begun and ends == [TaskEventKind.DROPPED]), story
        assert has_begun or ends != [TaskEventKind.FINISHED], story
        assert TaskEventKind.HANDLER_FAILED not in told, story
        if has_begun and self.shielded and not (self.asked_to_cancel or self.is_interrupted):
            assert task.status is TaskStatus.SUCCEEDED, story
        reported = [name for report in self.reports for name in groups_of(report, task)]
        assert len(reported) <= 1, f"{story}, reported as {reported}"
        if self.is_drained_live and not self.asked_to_cancel:
            assert len(reported) == 1, f"{story}, not reported"
        reasons = [event.reason for event in self.events if task in event.tasks]
        assert any(self.answers) or "its cancel() was called" not in reasons, story


def groups_of(report: DrainReport, task: Task) -> list[str]:
    """Return under which names a task is in a report."""
    names = ("finished", "cancelled", "abandoned", "never_started")
    return [name for name in names for other in getattr(report, name) if other is task]


async def turns(number: int) -> None:
    """Give everybody else the loop."""
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


@dataclass(frozen=True)
class Scenario:
    """What is interleaved with what, from where."""

    state: str
    has: str
    shielded: bool
    worker: str
    loop: str


@dataclass(frozen=True)
class Order:
    """Where each side of a scenario is stopped, counted in its lines of the package."""

    scenario: Scenario
    worker_is_first: bool
    first_line: int
    second_line: int


def scenarios() -> Iterator[Scenario]:
    """Yield all that make sense."""
    for shielded in (False, True):
        yield from (
            Scenario(state, has, shielded, worker, loop)
            for state, has, workers, loops in _MATRIX
            for worker, loop in itertools.product(workers, loops)
        )


_MATRIX: list[tuple[str, str, list[str], list[str]]] = [
    ("running", "none", ["schedule"], ["drain", "interrupt", "restart"]),
    ("running", "none", ["schedule_and_find"], ["drain", "finish"]),
    ("running", "none", ["schedule_later"], ["drain", "release", "restart"]),
    (
        "running",
        "batch",
        ["cancel", "release"],
        ["drain", "interrupt", "restart", "release", "cancel", "wait"],
    ),
    ("running", "batch", ["schedule", "look"], ["release"]),
    ("running", "request", ["look"], ["release", "drain", "cancel"]),
    ("running", "live", ["cancel", "look"], ["drain", "interrupt", "restart", "finish", "cancel"]),
    ("running", "failing", ["cancel"], ["finish", "drain"]),
    ("new", "none", ["schedule", "schedule_later"], ["start"]),
    ("stopped", "none", ["schedule", "schedule_later"], ["start"]),
    ("new", "batch", ["cancel", "release"], ["cancel", "release", "start", "start_and_release"]),
    ("stopped", "batch", ["cancel", "release"], ["cancel", "release", "start_and_release"]),
    ("new", "batch", ["cancel", "release"], ["wait"]),
    ("stopped", "batch", ["cancel", "release"], ["wait"]),
]


class Interleaver:
    """Interleaves in one event loop.

    :param portal: into the loop
    """

    def __init__(self, portal: anyio.from_thread.BlockingPortal) -> None:
        self._portal = portal
        self._spawner: Spawner = portal.call(current_spawner)
        self.interleavings = 0
        self.blocked = 0

    @contextmanager
    def refusing_threads(self) -> Iterator[None]:
        """Refuse what only the loop's own thread may do, which the loops do not all notice."""
        spawner = type(self._spawner)
        cancel = spawner.cancel
        loop_thread = self._portal.call(threading.get_ident)

        def cancel_in_loop(spawner: Spawner, handle: Handle) -> None:  # pragma: no cover - traced
            if threading.get_ident() != loop_thread:
                raise PreemptionError("cancelled outside of the loop's thread")
            cancel(spawner, handle)

        with mock.patch.object(spawner, "cancel", cancel_in_loop):
            yield

    def single_stops(self, scenario: Scenario) -> list[Order]:
        """Return every order in which only one side is stopped, the other one's whole call long."""
        return [
            Order(scenario, worker_is_first, line, NEVER)
            for worker_is_first, (first, _) in self.uninterrupted(scenario).items()
            for line in range(1, first.lines + 1)
        ]

    def uninterrupted(self, scenario: Scenario) -> dict[bool, tuple[Side, Side]]:
        """Run one side after the other: the worker thread first, and the loop first."""
        return {each: self.run(Order(scenario, each, NEVER, NEVER)) for each in (True, False)}

    def run(self, order: Order) -> tuple[Side, Side]:
        """Run both sides in an order, and check what comes of it.

        :return: the first side and the second one
        """
        scenario = order.scenario
        first, second = Side(order.first_line), Side(order.second_line)
        worker, loop = (first, second) if order.worker_is_first else (second, first)
        case = Case(scenario.state, scenario.has, shielded=scenario.shielded)
        try:
            self._portal.call(case.set_up)
            if scenario.loop == "wait":
                self._portal.start_task_soon(case.waiter)
            begin_worker = self._worker(worker, getattr(case, scenario.worker))
            begin_loop = self._loop(loop, getattr(case, scenario.loop))
            begin_first, begin_second = (
                (begin_worker, begin_loop) if order.worker_is_first else (begin_loop, begin_worker)
            )
            begin_first()
            first.wait()
            begin_second()
            second.wait()
            self._to_the_end(first, second)
            self._to_the_end(second, first)
            for side in (first, second):
                if side.error is not None:
                    raise side.error
            self._portal.call(case.settle)
        except Exception as error:
            stops = f"stopped at {first.where}, {second.where}"
            raise PreemptionError(f"{error!r}\n{order}\n{stops}") from error
        self.interleavings += 1
        return first, second

    def _to_the_end(self, side: Side, other: Side) -> None:
        side.resume()
        while not side.is_over:
            if side.wait() == "blocked":
                self.blocked += 1
                other.resume()

    @staticmethod
    def _worker(side: Side, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with side.traced():
                call()  # pragma: no cover - traced

        return threading.Thread(target=run, daemon=True).start

    def _loop(self, side: Side, call: Callable[[], object]) -> Callable[[], object]:
        begin = anyio.Event()

        async def run() -> None:
            await begin.wait()
            with side.traced():
                result = call()  # pragma: no cover - traced
                if isinstance(result, Awaitable):  # pragma: no cover - traced
                    await result

        # From now on: a lock may be waited for before its first line.
        self._portal.call(setattr, _here, "side", side)
        self._portal.start_task_soon(run)
        # Unlike what the portal offers, this does not wait for the loop, which may be blocked.
        return lambda: self._spawner.call_soon(begin.set)


@contextmanager
def interleaver(backend: str) -> Iterator[Interleaver]:
    """Run an event loop in a thread, and interleave things in it."""
    with (
        mock.patch(LOCKS[0], WatchedLock()),
        mock.patch(LOCKS[1], WatchedLock()),
        anyio.from_thread.start_blocking_portal(backend) as portal,
    ):
        each = Interleaver(portal)
        with each.refusing_threads():
            yield each


def draw(
    rng: random.Random, scenario: Scenario, uninterrupted: dict[bool, tuple[Side, Side]]
) -> Order:
    """Return an order in which one side is stopped, or both."""
    worker_is_first = rng.random() < 0.5
    first, second = uninterrupted[worker_is_first]
    # The other one may have more to do if it comes in between.
    lines = rng.randint(1, first.lines), rng.randint(1, second.lines + MARGIN)
    return Order(scenario, worker_is_first, lines[0], rng.choice([lines[1], NEVER]))
