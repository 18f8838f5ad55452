"""Random plans of what may happen to a supervisor, and what must hold in whichever order it does.

A plan is made of a seed. It is carried out on a loop whose clock is fake and whose choices are made
by the same seed, so that a plan that fails once fails always. While it is carried out, a model of
the documented rules, which shares nothing with the package, says what must be so after every turn
of the loop::

    scripts/interleavings               # as many as fit in a minute, and those of preemptions.py
    scripts/interleavings --seed 17     # this plan, on every loop
    scripts/interleavings --every-line  # every stop of preemptions.py, which takes longer
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread
import trio

from fastapi_tasks import (
    DrainReport,
    Supervisor,
    Task,
    TaskCancelledError,
    TaskEvent,
    TaskEventKind,
    TaskFailedError,
    TaskNotFinishedError,
    TasksScheduler,
    TaskStatus,
    current_task,
)
from fastapi_tasks.errors import SupervisorStateError

from .clocks import FakeClockLoop, fake_trio_clock
from .preemptions import Interleaver, Scenario, draw, interleaver, scenarios

REQUESTS = 3
QUIET = 12  # turns of the loop in which everything that can happen without the clock has happened
EPSILON = 1e-6  # seconds: moments that are closer are the same one
FOREVER = 200.0  # seconds: longer than any finite deadline of a plan
THREADS = 2

ENDS = {
    TaskEventKind.FINISHED: TaskStatus.SUCCEEDED,
    TaskEventKind.FAILED: TaskStatus.FAILED,
    TaskEventKind.CANCELLED: TaskStatus.CANCELLED,
    TaskEventKind.DROPPED: TaskStatus.CANCELLED,
}
FORWARD = {
    TaskStatus.PENDING: set(TaskStatus),
    TaskStatus.RUNNING: set(TaskStatus) - {TaskStatus.PENDING},
    **{end: {end} for end in ENDS.values()},
}


class ProbeError(Exception):
    """What a task of a plan raises."""


class InterleavingError(AssertionError):
    """A plan broke a promise; the message has all that is needed to see it again."""


# Plans


@dataclass(frozen=True)
class Work:
    """What a task of a plan does."""

    waits: bool = True
    """Whether it waits for a ``finish``, or ends at once."""
    ending: str = "returns"
    """How it ends then: ``returns``, ``fails`` or ``exits``."""
    on_cancel: str = "obeys"
    """What it makes of a cancellation: ``obeys``, ``cleans up`` or ``swallows`` it."""
    cleanup: float = 0.0
    """For how many seconds it cleans up."""
    thread: str = ""
    """``sync`` for a function in a thread, ``awaitable`` for one that returns an awaitable."""
    shielded: bool = False
    on_error: str = ""
    """The error handler: ``ends``, ``waits``, ``fails``, ``again`` or ``sync``; or none."""
    run_if: str = ""
    child: Work | None = None
    """What it schedules before it ends."""

    def __repr__(self) -> str:
        changed = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if value != getattr(Work, name)
        )
        return f"Work({', '.join(changed)})"


@dataclass(frozen=True)
class Step:
    """One operation, and how many turns the loop gets before the next one."""

    operation: str
    arguments: tuple[Any, ...] = ()
    turns: int = 0


@dataclass(frozen=True)
class Plan:
    """Some steps, and the settings of the supervisor that they are taken on."""

    seed: int
    grace: float
    shutdown_timeout: float | None
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        steps = "".join(f"\n        {step}," for step in self.steps)
        settings = f"{self.seed}, {self.grace}, {self.shutdown_timeout}"
        return f"    Plan({settings}, (  # {len(self.steps)} steps{steps}\n    ))"


def make_plan(seed: int) -> Plan:
    """Make the plan of a seed."""
    rng = random.Random(seed)
    timeout = rng.choice([None, None, 1.0, 6.0, 12.0, 25.0])
    grace = rng.choice([0.0, 0.0, 0.5, 3.0, 12.0])
    if timeout is not None:
        grace = min(grace, timeout)
    length = rng.randint(4, 30)
    steps = [Step("start", (), rng.randint(0, 2))] if rng.random() < 0.9 else []
    moments = _moments(grace, timeout)
    steps += [_make_step(rng, moments, drain_is_likely=i > length / 2) for i in range(length)]
    if timeout is not None and rng.random() < 0.3:
        steps += _last_call(rng, moments[2])
    return Plan(seed, grace, timeout, tuple(steps))


def _last_call(rng: random.Random, last_call: float) -> list[Step]:
    """Return steps into the last seconds of a drain, which chance alone seldom takes."""
    stubborn = Work(shielded=True, on_cancel="swallows")
    return [
        Step("schedule", ("now", 0, stubborn), 3),
        Step("drain", (), 2),
        Step("advance", (last_call + rng.choice([-0.1, 0.0, 0.1]),)),
        Step("schedule", ("now", 0, replace(_make_work(rng, batch=False), shielded=True)), 2),
    ]


def _moments(grace: float, timeout: float | None) -> tuple[float, float, float, float]:
    """Return when a drain cancels and abandons: the unshielded tasks, and then all."""
    deadline = math.inf if timeout is None else timeout
    last_call = deadline if timeout is None else timeout - min(5.0, timeout / 2)
    cancel_at = min(grace, last_call)
    return cancel_at, min(cancel_at + 5.0, deadline), last_call, deadline


def _make_step(rng: random.Random, moments: tuple[float, ...], *, drain_is_likely: bool) -> Step:
    weights = {
        "schedule": 30,
        "endpoint_over": 5,
        "response_over": 7,
        "cancel": 12,
        "finish": 14,
        "finish_handler": 4,
        "wait": 8,
        "stop_waiting": 2,
        "advance": 6,
        "drain": 8 if drain_is_likely else 2,
        "interrupt_drain": 2,
        "start": 3,
        "be_quiet": 3,
    }
    (operation,) = rng.choices(list(weights), weights.values())
    number = rng.randrange(1000)
    arguments: tuple[Any, ...] = ()
    match operation:
        case "schedule":
            place = rng.choice(["now", "now", "route", "response"])
            arguments = (place, number % REQUESTS, _make_work(rng, batch=place != "now"))
        case "endpoint_over" | "response_over":
            arguments = (number % REQUESTS, rng.random() < 0.3)
        case "cancel" | "finish" | "finish_handler" | "wait" | "stop_waiting":
            arguments = (number,)
        case "advance":
            near = [moment + 0.1 for moment in moments if moment < math.inf]
            arguments = (
                rng.choice([0.1, 0.5, 1.0, 2.5, 3.0, 5.0, 7.0, 11.0, *moments[:1], *near]),
            )
    return Step(operation, arguments, rng.choice([0, 0, 0, 1, 1, 2, 3, 5]))


def _make_work(rng: random.Random, *, batch: bool, depth: int = 0) -> Work:
    ending = rng.choice(["returns", "returns", "returns", "fails", "fails", "exits"])
    on_cancel = rng.choice(["obeys", "obeys", "obeys", "cleans up", "swallows"])
    has_child = depth < 2 and rng.random() < 0.25
    return Work(
        waits=rng.random() < 0.75,
        ending=ending,
        on_cancel=on_cancel,
        cleanup=rng.choice([0.5, 2.0, 9.0]) if on_cancel == "cleans up" else 0.0,
        thread=rng.choice(["", "", "", "sync", "awaitable"]),
        shielded=rng.random() < 0.5,
        on_error="" if ending == "returns" else rng.choice(["", *_HANDLERS]),
        run_if=rng.choice(["", "", "error", "always"]) if batch else "",
        child=_make_work(rng, batch=False, depth=depth + 1) if has_child else None,
    )


_HANDLERS = ["ends", "waits", "fails", "again", "sync"]


# Tasks that tell the model what they see


class Probe:
    """The function of one task, and what is known of the task.

    :param world: where it runs
    :param work: what it does
    :param batch: whose moment it waits for, if any
    """

    def __init__(self, world: World, work: Work, batch: _Batch | None) -> None:
        self.world = world
        self.work = work
        self.batch = batch
        self.number = len(world.probes)
        self.gate = anyio.Event()
        self.handler_gate = anyio.Event()
        self.task: Task | None = None
        self.status = TaskStatus.PENDING
        self.events: list[TaskEventKind] = []
        self.place = "waiting"  # for its moment; then "live" or "dropped"
        self.order = -1
        self.in_drain = False  # whether it was submitted or dropped while a drain went on
        self.cancelled_by_user = False
        self.cancelled_again = False  # by the user, who may
        self.saw_cancellation = False
        self.outcome: TaskStatus | None = None
        self.handler_runs = 0
        self.in_handler = False

    @property
    def function(self) -> Callable[[], Any]:
        """What is scheduled."""
        return self._in_thread if self.work.thread else self._in_loop

    def finish(self) -> None:
        """Let it end, error handler included."""
        self.gate.set()
        self.handler_gate.set()

    async def _in_loop(self) -> int:
        if self.work.waits:
            await self._wait()
        if self.work.child is not None:
            self.world.schedule_child(self.work.child)
        return self._end()

    def _in_thread(self) -> Any:
        return self._in_loop() if self.work.thread == "awaitable" else self._end()

    def _end(self) -> int:
        if self.work.ending == "returns":
            self.outcome = TaskStatus.SUCCEEDED
            return self.number
        self.outcome = TaskStatus.FAILED
        raise ProbeError(self.number) if self.work.ending == "fails" else SystemExit(self.number)

    async def _wait(self) -> None:
        swallowed = False
        while not self.gate.is_set():
            try:
                with anyio.CancelScope(shield=swallowed):
                    await self.gate.wait()
            except anyio.get_cancelled_exc_class():
                self.saw_cancellation = True
                if self.work.on_cancel != "swallows":
                    await self._clean_up()
                    raise
                swallowed = True

    async def _clean_up(self) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self.work.cleanup)
        except anyio.get_cancelled_exc_class():
            self.world.claim(self.cancelled_again, self, "cancelled while it cleaned up")
            raise

    async def thread(self) -> None:
        """Last as long as the thread of the function, or of its handler, is busy."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
            if self.work.thread == "sync" and self.work.waits and self.outcome is None:
                await self.gate.wait()
            await anyio.lowlevel.checkpoint()

    async def handle(self, task: Task, error: Exception) -> None:
        """Be an error handler that is async."""
        with self._handling(task, error):
            if self.work.on_error == "waits":
                await self.handler_gate.wait()
            elif self.work.on_error == "again":
                with suppress(ProbeError):
                    await task()
            elif self.work.on_error == "fails":
                raise LookupError(self.number)

    def handle_in_thread(self, task: Task, error: Exception) -> None:
        """Be an error handler that is not."""
        with self._handling(task, error):
            return

    @contextmanager
    def _handling(self, task: Task, error: Exception) -> Iterator[None]:
        self.handler_runs += 1
        self.world.claim(isinstance(error, ProbeError), self, "a handler got another error")
        self.world.claim(task.status is TaskStatus.FAILED, self, "handled before it was over")
        self.in_handler = True
        try:
            yield
        finally:
            self.in_handler = False

    @property
    def status_now(self) -> TaskStatus:
        """What the task says of itself."""
        assert self.task is not None
        return self.task.status

    def asked_for_result(self) -> TaskStatus | None:
        """Return how the task ended, going by its ``result()``."""
        assert self.task is not None
        try:
            result = self.task.result()
        except TaskNotFinishedError:
            return None
        except TaskCancelledError:
            return TaskStatus.CANCELLED
        except (ProbeError, TaskFailedError):
            return TaskStatus.FAILED
        self.world.claim(result == self.number, self, f"has the result {result}")
        return TaskStatus.SUCCEEDED

    @property
    def has_handler(self) -> bool:
        """Whether a failure of it is handled."""
        return self.work.on_error != "" and self.work.ending == "fails"

    @property
    def is_over(self) -> bool:
        """Whether the last thing that was told of it is an end."""
        return any(kind in ENDS for kind in self.events)

    @property
    def has_started(self) -> bool:
        """Whether it was told that it has begun."""
        return TaskEventKind.STARTED in self.events

    def __repr__(self) -> str:
        happened = " ".join(self.events)
        return f"task {self.number} [{self.status}, {self.place}: {happened}] {self.work}"


@dataclass
class _Batch:
    """What the model knows of one batch of a request."""

    waiting: list[Probe] = field(default_factory=list)
    failed: bool | None = None


@dataclass
class _Waiter:
    """Somebody who waits for a task."""

    probe: Probe
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    has_returned: bool = False


# Carrying a plan out


class World:
    """A supervisor, some requests, and the model of what must become of their tasks.

    :param plan: the plan that is carried out
    :param make_supervisor: makes what is tested
    """

    def __init__(self, plan: Plan, make_supervisor: Callable[..., Supervisor]) -> None:
        self.plan = plan
        self.supervisor = make_supervisor(
            observers=[self._observe],
            grace=plan.grace,
            shutdown_timeout=plan.shutdown_timeout,
            threads=THREADS,
        )
        self.requests = [TasksScheduler(self.supervisor) for _ in range(REQUESTS)]
        self.batches = {
            (place, number): _Batch()
            for place in ("route", "response")
            for number in range(REQUESTS)
        }
        self.probes: list[Probe] = []
        self.waiters: list[_Waiter] = []
        self.records: Counter[tuple[str, int]] = Counter()
        self.violations: list[str] = []
        self.history: list[str] = []
        self.phase = "new"
        self.is_ending = False
        self.submissions = itertools.count()
        self.drains = 0
        self.drain_start = math.inf
        self.drain_scopes: list[anyio.CancelScope] = []
        self.is_interrupted = False
        self.counted: set[Probe] = set()
        self.may_be_counted: set[Probe] = set()
        moments = _moments(plan.grace, plan.shutdown_timeout)
        self.cancel_at, self.abandon_at, self.last_call, self.deadline = moments

    async def carry_out(self) -> None:
        """Take every step, then end everything, and check after each turn."""
        self.epoch = anyio.current_time()
        try:
            async with anyio.create_task_group() as self.group:
                for step in itertools.chain(self.plan.steps, self._epilogue()):
                    await self._take(step)
                self._check_the_end()
                self._raise_violations()
        finally:
            await self._do_finish_all()  # trio waits for every task

    async def _take(self, step: Step) -> None:
        self.history.append(f"{anyio.current_time() - self.epoch:6.2f} s  {step}")
        await getattr(self, f"_do_{step.operation}")(*step.arguments)
        self._check()
        await self._turn(step.turns)

    async def _turn(self, turns: int) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
            self._check()

    def _epilogue(self) -> Iterator[Step]:
        yield Step("be_quiet")
        if self.phase == "running":
            yield Step("drain", (), 2)
        yield Step("advance", (FOREVER,))
        yield Step("finish_all")
        yield Step("be_quiet")
        yield Step("advance", (FOREVER,))
        for number in range(REQUESTS):
            yield Step("response_over", (number, False))
        yield Step("be_quiet")

    # Steps

    async def _do_start(self) -> None:
        can_start = self.phase in ("new", "stopped")
        try:
            await self.supervisor.start()
        except SupervisorStateError:
            self.claim(not can_start, None, "start() was refused")
        else:
            self.claim(can_start, None, "start() was not refused")
            self.phase = "running"

    async def _do_drain(self) -> None:
        self.group.start_soon(self._drain)

    async def _drain(self) -> None:
        can_drain = self.phase == "running"
        self.is_interrupted &= not can_drain
        try:
            with anyio.CancelScope() as scope:
                self.drain_scopes.append(scope)
                report = await self.supervisor.drain()
                self.claim(report is self.report, None, "drain() returned another report")
        except SupervisorStateError:
            self.claim(not can_drain, None, "drain() was refused")
        else:
            self.claim(can_drain, None, "drain() was not refused")

    async def _do_interrupt_drain(self) -> None:
        """Lose patience, as a server does."""
        if self.phase == "draining":
            self.is_interrupted = True
            self.drain_scopes[-1].cancel()

    async def _do_schedule(self, place: str, number: int, work: Work) -> None:
        request = self.requests[number]
        if place == "now":
            self._schedule(request, work, None)
        else:
            batch = self.batches[place, number]
            self._schedule(getattr(request, f"after_{place}"), work, batch)

    def schedule_child(self, work: Work) -> None:
        """Schedule a task from a task."""
        self.claim(current_task() is not None, None, "a task is not the current one")
        self._schedule(self.supervisor, work, None)

    def _schedule(self, target: Any, work: Work, batch: _Batch | None) -> None:
        probe = Probe(self, work, batch)
        self.probes.append(probe)
        if self.is_ending:
            probe.finish()
        options: dict[str, Any] = {"shield": work.shielded, "name": f"task-{probe.number}"}
        if work.on_error:
            is_sync = work.on_error == "sync"
            options["on_error"] = probe.handle_in_thread if is_sync else probe.handle
        if work.run_if:
            options["run_if"] = work.run_if
        if batch is None:
            self._expect(probe)
        elif batch.failed is None:
            batch.waiting.append(probe)
        else:
            self._expect_release(probe, failed=batch.failed)
        task = target.task(**options).schedule(probe.function)
        self.claim(task is probe.task, probe, "nobody was told that it was scheduled")
        self._check_place(probe)

    def _expect_release(self, probe: Probe, *, failed: bool) -> None:
        wanted = probe.work.run_if or "success"
        if wanted == "always" or (wanted == "error") is failed:
            self._expect(probe)
        else:
            self._place(probe, "dropped")

    def _expect(self, probe: Probe) -> None:
        """Work out what becomes of a task that is submitted now."""
        passed = anyio.current_time() - self.drain_start
        if self.phase == "running":
            self._place(probe, "live")
        elif self.phase != "draining" or not probe.work.shielded:
            self._place(probe, "dropped")
        elif self.is_interrupted or abs(passed - self.last_call) < EPSILON:
            self._place(probe, "either")  # whoever comes first in this moment
        else:
            self._place(probe, "live" if passed < self.last_call else "dropped")

    def _place(self, probe: Probe, place: str) -> None:
        if probe.is_over:
            return  # cancelled before its moment
        probe.place = place
        probe.order = next(self.submissions)
        if self.phase == "draining":
            probe.in_drain = True
            self.counted.add(probe)

    def _check_place(self, probe: Probe) -> None:
        """Check that a task that was just submitted is where it belongs."""
        is_dropped = TaskEventKind.DROPPED in probe.events
        if probe.place == "either":
            probe.place = "dropped" if is_dropped else "live"
        if probe.place == "dropped":
            self.claim(is_dropped, probe, "it was to be dropped")
        else:
            self.claim(not is_dropped, probe, "it was dropped")

    async def _do_endpoint_over(self, number: int, failed: bool) -> None:
        self._release("route", number, failed)
        self.requests[number].route_over(failed=failed)
        self._check_release("route", number)

    async def _do_response_over(self, number: int, failed: bool) -> None:
        self._release("route", number, failed)
        self._release("response", number, failed)
        self.requests[number].response_over(failed=failed)
        self._check_release("route", number)
        self._check_release("response", number)

    def _release(self, place: str, number: int, failed: bool) -> None:
        batch = self.batches[place, number]
        if batch.failed is None:
            batch.failed = failed
        for probe in batch.waiting:
            self._expect_release(probe, failed=batch.failed)

    def _check_release(self, place: str, number: int) -> None:
        batch = self.batches[place, number]
        for probe in batch.waiting:
            self._check_place(probe)
        batch.waiting.clear()

    async def _do_cancel(self, number: int) -> None:
        if (probe := self._pick(number)) is None:
            return
        may_be_cancelled = not probe.is_over and not probe.task.abandoned
        answer = probe.task.cancel()
        self.claim(answer is may_be_cancelled, probe, f"cancel() said {answer}")
        if may_be_cancelled:
            probe.cancelled_again |= probe.cancelled_by_user or self._may_be_cancelling(probe)
            probe.cancelled_by_user = True
            if not probe.has_started:
                self.claim(probe.is_over, probe, "it was cancelled, and may begin all the same")

    async def _do_finish(self, number: int) -> None:
        if (probe := self._pick(number)) is not None:
            probe.gate.set()

    async def _do_finish_handler(self, number: int) -> None:
        if (probe := self._pick(number)) is not None:
            probe.handler_gate.set()

    async def _do_finish_all(self) -> None:
        self.is_ending = True
        for probe in self.probes:
            probe.finish()

    async def _do_wait(self, number: int) -> None:
        if (probe := self._pick(number)) is not None:
            waiter = _Waiter(probe)
            self.waiters.append(waiter)
            self.group.start_soon(self._wait, waiter)

    async def _wait(self, waiter: _Waiter) -> None:
        probe = waiter.probe
        with waiter.scope:
            try:
                result = await probe.task.wait()
            except ProbeError as error:
                self.claim(error.args == (probe.number,), probe, "wait() raised another error")
                self.claim(probe.outcome is TaskStatus.FAILED, probe, "wait() raised")
            except TaskFailedError:
                self.claim(probe.work.ending == "exits", probe, "wait() raised")
            else:
                ended_well = probe.status_now is TaskStatus.SUCCEEDED
                expected = probe.number if ended_well else None
                self.claim(result == expected, probe, f"wait() returned {result}")
            self.claim(probe.is_over, probe, "wait() returned before the end")
            waiter.has_returned = True

    async def _do_stop_waiting(self, number: int) -> None:
        if self.waiters:
            self.waiters.pop(number % len(self.waiters)).scope.cancel()

    async def _do_advance(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def _do_be_quiet(self) -> None:
        """Let all happen that can, and check what must have happened then."""
        await self._turn(QUIET)
        for waiter in self.waiters:
            probe = waiter.probe
            self.claim(waiter.has_returned is probe.is_over, probe, "its waiter waits, or does not")
        for probe in self.probes:
            work = probe.work
            if probe.place != "live" or probe.is_over:
                continue
            if not work.thread:
                self.claim(probe.has_started, probe, "it does not begin")
                if not work.waits or probe.gate.is_set():
                    is_cleaning = probe.saw_cancellation and work.on_cancel == "cleans up"
                    self.claim(is_cleaning, probe, "it does not end")
                elif probe.cancelled_by_user:
                    self.claim(work.on_cancel != "obeys", probe, "it was not cancelled")

    def _pick(self, number: int) -> Probe | None:
        return self.probes[number % len(self.probes)] if self.probes else None

    # What is told

    def _observe(self, event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DRAIN_STARTED:
            self._begin_drain(event.tasks)
        elif event.kind is TaskEventKind.DRAIN_FINISHED:
            assert event.report is not None
            self._end_drain(event.report)
        elif len(event.tasks) == 1 and not event.kind.startswith("drain"):
            probe: Probe = event.task.func.__self__
            if event.kind is TaskEventKind.SCHEDULED:
                probe.task = event.task
            self._check_event(probe, event)
            probe.events.append(event.kind)

    def _check_event(self, probe: Probe, event: TaskEvent) -> None:
        kind = event.kind
        now = anyio.current_time()
        if kind is TaskEventKind.SCHEDULED:
            self.claim(not probe.events, probe, "scheduled twice")
        elif kind is TaskEventKind.HANDLER_FAILED:
            is_legal = probe.events[-1] is TaskEventKind.FAILED and probe.has_handler
            self.claim(is_legal, probe, "an error handler failed that was not called")
            may_fail = probe.work.on_error == "fails" or self._may_be_cancelling(probe)
            self.claim(may_fail, probe, f"its handler failed with {event.error!r}")
        else:
            self.claim(not probe.is_over, probe, f"{kind} after its end")
        if kind is TaskEventKind.STARTED:
            self.claim(not probe.has_started, probe, "started twice")
            self.claim(probe.place in ("live", "either"), probe, "started before its moment")
            self.claim(not probe.cancelled_by_user, probe, "started after cancel()")
            self.claim(self.phase != "stopped", probe, "started when all was over")
            if self.phase == "draining" and not probe.work.shielded:
                self.claim(not probe.in_drain, probe, "started, but came during the drain")
                in_time = now - self.drain_start <= self.cancel_at + EPSILON
                self.claim(in_time, probe, "started after the grace")
        elif kind in ENDS:
            self._check_end(probe, event)

    def _check_end(self, probe: Probe, event: TaskEvent) -> None:
        kind = event.kind
        status = event.task.status
        self.claim(status is ENDS[kind], probe, f"told {kind}, but is {status}")
        if kind is TaskEventKind.DROPPED:
            self.claim(not probe.has_started, probe, "dropped when it had begun")
        elif kind is TaskEventKind.CANCELLED:
            asked = probe.cancelled_by_user or self._may_be_cancelling(probe)
            # cancel() tells of a task that has not begun before it returns.
            self.claim(asked or not probe.has_started, probe, "nobody cancelled it")
            if probe.has_started:
                self.claim(
                    probe.saw_cancellation or probe.work.thread == "awaitable",
                    probe,
                    "it did not see its cancellation",
                )
                self.claim(probe.outcome is None, probe, "it had ended otherwise")
        else:
            self.claim(probe.has_started, probe, f"{kind} before it began")
            self.claim(probe.outcome is status, probe, f"told {kind}, but it is {probe.outcome}")

    def _may_be_cancelling(self, probe: Probe) -> bool:
        """Return whether a drain may have cancelled a task by now."""
        if self.phase == "stopped" or self.is_interrupted or probe.task.abandoned:
            return True
        passed = anyio.current_time() - self.drain_start
        moment = self.last_call if probe.work.shielded else self.cancel_at
        return self.phase == "draining" and passed >= moment - EPSILON

    def _begin_drain(self, tasks: Sequence[Task]) -> None:
        self.claim(self.phase == "running", None, "a drain began")
        self.phase = "draining"
        self.drains += 1
        self.drain_start = anyio.current_time()
        live = [p for p in self.probes if p.place == "live" and not p.task.abandoned]
        self.counted = {p for p in live if not p.is_over or p.in_handler}
        # Its handler may not have begun yet, or be over.
        self.may_be_counted = {p for p in live if p.is_over and p.has_handler}
        told = {task.func.__self__ for task in tasks}
        self.claim(
            self.counted <= told <= self.counted | self.may_be_counted,
            None,
            f"drains {told}, and not {self.counted}",
        )

    def _end_drain(self, report: DrainReport) -> None:
        self.report = report
        self.claim(self.phase == "draining", None, "a drain ended")
        self.phase = "stopped"
        groups = {
            name: [task.func.__self__ for task in getattr(report, name)]
            for name in ("finished", "cancelled", "abandoned", "never_started")
        }
        told = [probe for group in groups.values() for probe in group]
        self.claim(len(told) == len(set(told)), None, f"reported twice: {report}")
        missing = self.counted - set(told)
        self.claim(not missing, None, f"not in the report {report}: {missing}")
        alien = set(told) - self.counted - self.may_be_counted
        self.claim(not alien, None, f"in the report {report}, but not of that drain: {alien}")
        for name, group in groups.items():
            for probe in group:
                self._check_group(probe, name)
        if not self.is_interrupted:
            shielded = [p for p in told if p.work.shielded]
            limit = self.deadline if shielded else self.abandon_at
            self.claim(report.duration <= limit + EPSILON, None, f"took too long: {report}")
            for probe in groups["abandoned"]:
                limit = self.deadline if probe.work.shielded else self.abandon_at
                self.claim(report.duration >= limit - EPSILON, probe, "abandoned too early")

    def _check_group(self, probe: Probe, name: str) -> None:
        status = probe.status_now
        match name:
            case "finished":
                fits = status in (TaskStatus.SUCCEEDED, TaskStatus.FAILED)
            case "cancelled":
                fits = status is TaskStatus.CANCELLED and probe.has_started
            case "never_started":
                fits = status is TaskStatus.CANCELLED and not probe.has_started
            case _:
                fits = probe.task.abandoned  # and may have ended since
        self.claim(fits, probe, f"reported as {name}")

    # What must be so

    def _check(self) -> None:
        running = self.supervisor.running
        self.claim(self.supervisor.is_running is (self.phase == "running"), None, "is_running")
        self.claim(self.phase != "stopped" or not running, None, f"still there: {running}")
        order = [task.func.__self__.order for task in running]
        self.claim(order == sorted(order), None, f"running is not in order: {running}")
        for probe in self.probes:
            status = probe.status_now
            self.claim(status in FORWARD[probe.status], probe, f"went to {status}")
            probe.status = status
            self._check_status(probe)
            if probe.place != "live" or probe.task.abandoned:
                is_there = [False]
            elif not probe.is_over or probe.in_handler:
                is_there = [True]
            else:
                is_there = [True, False] if probe.has_handler else [False]
            self.claim((probe.task in running) in is_there, probe, "in running, or not")
        self._raise_violations()

    def _check_status(self, probe: Probe) -> None:
        status = probe.status
        told = [ENDS[kind] for kind in probe.events if kind in ENDS]
        if told:
            self.claim(told == [status], probe, f"its ends: {told}")
        else:
            is_running = status is TaskStatus.RUNNING
            self.claim(is_running is probe.has_started, probe, "its status was not told")
        outcome = probe.asked_for_result()
        self.claim(outcome is (status if told else None), probe, f"its result() is {outcome}")

    def _check_the_end(self) -> None:
        self.claim(self.phase in ("new", "stopped"), None, "the drain does not end")
        for probe in self.probes:
            self.claim(probe.is_over, probe, "it got lost")
            counts = Counter(probe.events)
            was_handled = probe.handler_runs or counts[TaskEventKind.HANDLER_FAILED]
            is_failed = probe.status is TaskStatus.FAILED
            self.claim(
                bool(was_handled) is (is_failed and probe.has_handler),
                probe,
                "its failure was not handled, or what was is none",
            )
            self.claim(probe.handler_runs <= 1, probe, "it was handled twice")
            self._check_records(probe, counts)

    def _check_records(self, probe: Probe, counts: Counter[TaskEventKind]) -> None:
        failures = counts[TaskEventKind.FAILED] + counts[TaskEventKind.HANDLER_FAILED]
        told = {
            level: number
            for (task_id, level), number in self.records.items()
            if task_id == probe.task.id
        }
        self.claim(told.pop(logging.ERROR, 0) == failures, probe, "one record for each failure")
        is_expected = probe.work.run_if == "error" and probe.batch.failed is False
        losses = counts[TaskEventKind.CANCELLED]
        losses += counts[TaskEventKind.DROPPED] if not is_expected else 0
        self.claim(sum(told.values()) == losses, probe, f"one record for each loss, not {told}")

    def claim(self, holds: bool, probe: Probe | None, otherwise: str) -> None:
        """Note a violation unless something holds."""
        if not holds:
            self.violations.append(f"{otherwise}: {probe}" if probe else otherwise)

    def _raise_violations(self) -> None:
        if self.violations:
            raise InterleavingError("; ".join(self.violations))


# Loops


class TiesLoop(FakeClockLoop):
    """A loop on which timers of one moment come in any order, as on a real clock they do."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        """Ask for a call at some moment, a little later."""
        return super().call_at(when + self.rng.random() * EPSILON / 1000, *args, **kwargs)


class ShuffledLoop(TiesLoop):
    """A loop that makes the calls of one turn in any order.

    asyncio promises the order in which it was asked for them, so this is more than it may do. The
    package needs that order for one promise only, that of its moments, and no plan is about it.
    """

    def _run_once(self) -> None:
        calls = list(self._ready)
        self.rng.shuffle(calls)
        self._ready.clear()
        self._ready.extend(calls)
        super()._run_once()


Options = tuple[str, dict[str, Any]]
LOOPS: dict[str, Callable[[int], Options]] = {
    "asyncio": lambda seed: ("asyncio", {"loop_factory": FakeClockLoop}),
    "asyncio-ties": lambda seed: (
        "asyncio",
        {"loop_factory": lambda: TiesLoop(random.Random(seed))},
    ),
    "asyncio-shuffled": lambda seed: (
        "asyncio",
        {"loop_factory": lambda: ShuffledLoop(random.Random(seed))},
    ),
    "trio": lambda seed: ("trio", {"clock": fake_trio_clock()}),
}


async def _call_as_in_thread(func: Callable[..., Any], *args: Any, limiter: Any) -> Any:
    """Be ``to_thread.run_sync`` with a thread that is busy as long as the plan says."""
    await current_task().func.__self__.thread()
    return copy_context().run(func, *args)


class _Records(logging.Handler):
    """Counts the records of each task."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "task_id"):
            self.world.records[record.task_id, record.levelno] += 1
        else:
            self.world.claim("Shutdown" in record.msg, None, record.getMessage())


@contextmanager
def _deterministic(world: World, seed: int) -> Iterator[None]:
    logger = logging.getLogger("fastapi_tasks")
    handler = _Records(world)
    # Hypothesis' own way to make trio's choices repeatable.
    trio_run: Any = sys.modules["trio._core._run"]
    trio_run._r.seed(seed)
    with (
        mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(anyio.to_thread, "run_sync", _call_as_in_thread),
        mock.patch.multiple(logger, level=logging.INFO, propagate=False, handlers=[handler]),
    ):
        logger.manager._clear_cache()
        yield
    logger.manager._clear_cache()


def run(
    plan: Plan, loop: str, make_supervisor: Callable[..., Supervisor] = Supervisor
) -> InterleavingError | None:
    """Carry out a plan on one of the ``LOOPS``; return what went wrong."""
    backend, options = LOOPS[loop](plan.seed)
    world = World(plan, make_supervisor)

    async def main() -> None:
        with anyio.fail_after(100 * FOREVER):
            await world.carry_out()

    with _deterministic(world, plan.seed):
        try:
            # In a thread of its own: coverage loses track of the callers of a loop in which tasks
            # are cancelled before their first step.
            with ThreadPoolExecutor(1) as thread:
                if backend == "trio":  # older versions of anyio.run leave the clock out
                    running = thread.submit(trio.run, main, **options)
                else:
                    running = thread.submit(
                        anyio.run, main, backend=backend, backend_options=options
                    )
                running.result()
        except Exception as error:
            reasons = "; ".join(_reasons_of(error))
            history = "\n    ".join(world.history)
            return InterleavingError(
                f"{reasons}\n\non {loop}, plan\n{plan}\n\nwhat happened:\n    {history}\n\n"
                f"again: scripts/interleavings --loop {loop} --seed {plan.seed}"
            )
    return None


def _reasons_of(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [reason for part in error.exceptions for reason in _reasons_of(part)]
    return [str(error) if isinstance(error, InterleavingError) else repr(error)]


def shrink(
    plan: Plan, loop: str, make_supervisor: Callable[..., Supervisor] = Supervisor
) -> InterleavingError:
    """Leave out of a plan what it does not need to fail, and return what the rest fails with.

    :param plan: a plan that fails on the loop
    """
    error = run(plan, loop, make_supervisor)
    assert error is not None
    size = len(plan.steps)
    while size:
        start = 0
        while start < len(plan.steps):
            shorter = replace(plan, steps=plan.steps[:start] + plan.steps[start + size :])
            found = run(shorter, loop, make_supervisor)
            if found is None:
                start += size
            else:
                plan, error = shorter, found
        size //= 2
    return error


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out plans and orders until the time is up; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=f"{__doc__}".partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long")
    parser.add_argument("--seed", type=int, help="carry out the plan of this seed only")
    parser.add_argument("--loop", choices=LOOPS, help="on this loop only")
    parser.add_argument(
        "--every-line", action="store_true", help="stop threads and the loop at each line instead"
    )
    options = parser.parse_args(arguments)
    loops = [options.loop] if options.loop else list(LOOPS)
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    try:
        if options.every_line:
            interleave_threads(None)
        elif options.seed is not None:
            carry_out(first, loops)
        else:
            _say(f"From seed {first}:")
            carry_out(first, loops, time.monotonic() + options.seconds / 3)
            interleave_threads(random.Random(first), options.seconds * 2 / 3)
    except AssertionError as error:
        _say(str(error))
        return 1
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def carry_out(seed: int, loops: Sequence[str], until: float = 0.0) -> None:
    """Carry out plans on some loops, and print how many there were.

    :param seed: that of the first plan, which is carried out in any case
    :param until: when there is no time for another one
    :raises InterleavingError: one of them failed
    """
    counts: Counter[str] = Counter()
    steps = 0
    further = itertools.takewhile(lambda _: time.monotonic() < until, itertools.count(seed + 1))
    for each in itertools.chain([seed], further):
        plan = make_plan(each)
        for loop in loops:
            if run(plan, loop) is not None:
                raise shrink(plan, loop)
            counts[loop] += 1
            steps += len(plan.steps)
    per_loop = ", ".join(f"{number} on {loop}" for loop, number in counts.items())
    _say(f"{counts.total()} plans with {steps} steps: {per_loop}")


def interleave_threads(rng: random.Random | None, seconds: float = 0.0) -> None:
    """Interleave a thread with the loop, and print in how many orders.

    :param rng: what draws the orders; if there is none, every single stop is tried
    :param seconds: for how long orders are drawn
    :raises PreemptionError: one of them failed
    """
    logger = logging.getLogger("fastapi_tasks")
    for backend in ("asyncio", "trio"):
        until = time.monotonic() + seconds / 2
        with (
            interleaver(backend) as each,
            mock.patch.multiple(logger, propagate=False, handlers=[logging.NullHandler()]),
        ):
            left = list(scenarios())
            number = len(left)
            while left:
                scenario = left.pop()
                if rng is None:
                    for order in each.single_stops(scenario):
                        each.run(order)
                else:
                    now = time.monotonic()
                    _draw_orders(rng, each, scenario, now + (until - now) / (len(left) + 1))
            _say(
                f"{each.interleavings} orders of a thread and the loop on {backend}, "
                f"in {number} scenarios; in {each.blocked} one waited for the other's lock"
            )


def _draw_orders(rng: random.Random, each: Interleaver, scenario: Scenario, until: float) -> None:
    uninterrupted = each.uninterrupted(scenario)
    while time.monotonic() < until:
        each.run(draw(rng, scenario, uninterrupted))


if __name__ == "__main__":
    sys.exit(main())  # pragma: no cover - how scripts/interleavings comes in
