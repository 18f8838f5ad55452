"""A supervisor to which everything happens that its users can do, and what must hold meanwhile.

Where interleavings.py tries the orders in which a few things can happen, this tries what tasks can
be: retried, limited in time, delayed, waiting for places, in threads. Hypothesis chooses the steps.
Each of them is taken in a loop that stands still in between, and whose clock moves on only when
nothing else can: not while a thread is at work, either. After every turn of that loop a model,
which knows what is documented and nothing of the package's inside, says what must be so.
"""

from __future__ import annotations

import gc
import logging
import math
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fastapi_tasks import (
    DrainReport,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskFailedError,
    TasksScheduler,
    TaskStatus,
    TaskTimeoutError,
)
from fastapi_tasks.config import in_seconds
from fastapi_tasks.errors import SupervisorStateError

from .clocks import FakeClockLoop, fake_trio_clock
from .servers import PATIENCE

REQUESTS = 2
THREADS = 2
PLACES = (1, 2)
"""How many places each of the limiters has."""

QUIET = 12  # turns of the loop without anything new, after which nothing comes without the clock
LOOKS = 200  # at who is kept, while a thread may be about to let go
DELIVERY = 6  # turns in which a loop has noticed what a thread has asked of it
EPSILON = 1e-6  # seconds: moments that are closer are the same one
FOREVER = 200.0  # seconds: longer than anything takes that ends
WAIT, BASE, LONGEST, ASKED_WAIT = 0.55, 3.0, 1.4, 0.85

LETTERS = {
    TaskEventKind.SCHEDULED: "S",
    TaskEventKind.STARTED: "B",
    TaskEventKind.RETRYING: "R",
    TaskEventKind.FINISHED: "F",
    TaskEventKind.FAILED: "X",
    TaskEventKind.HANDLER_FAILED: "H",
    TaskEventKind.CANCELLED: "C",
    TaskEventKind.DROPPED: "D",
}
"""A task's life is a word, with a letter for each event."""

FOLLOWERS = {
    "": "S",
    "S": "BCD",
    "B": "RFXC",
    "R": "BC",
    "X": "H",
    **dict.fromkeys("FHCD", ""),
}
"""Which events may follow which; so the word has one end, and nothing but a handler's failure
comes after it."""

ENDS = set("FXCD")

STATUSES = {
    "S": TaskStatus.PENDING,
    **dict.fromkeys("BR", TaskStatus.RUNNING),
    "F": TaskStatus.SUCCEEDED,
    **dict.fromkeys("XH", TaskStatus.FAILED),
    **dict.fromkeys("CD", TaskStatus.CANCELLED),
}
LEVELS = {
    **dict.fromkeys("SBF", logging.DEBUG),
    "C": logging.INFO,
    **dict.fromkeys("RD", logging.WARNING),
    **dict.fromkeys("XH", logging.ERROR),
}


class ProbeError(Exception):
    """What a function raises that may be worth another attempt."""


ERRORS: dict[str, type[BaseException]] = {
    "fails": ProbeError,
    "errs": LookupError,
    "exits": SystemExit,
}

RETRY_ON: dict[str, Any] = {
    "one": ProbeError,
    "two": (ProbeError, TimeoutError),
    "any": lambda error: True,
    "asks": lambda error: ASKED_WAIT if isinstance(error, ProbeError) else False,
}
RETRIED: dict[str, tuple[type[BaseException], ...]] = {
    "one": (ProbeError,),
    "two": (ProbeError, TaskTimeoutError),
    "any": (ProbeError, LookupError, TaskTimeoutError),
    "asks": (ProbeError,),
}


@dataclass(frozen=True)
class Work:
    """What a task does, and how it is configured."""

    sync: bool = False
    waits: str = ""
    """``gate``: each attempt waits to be let go; ``ever``: for what nobody else knows of."""
    endings: tuple[str, ...] = ("returns",)
    """How each attempt ends, and the last one all that follow."""
    on_cancel: str = "obeys"
    """What it makes of a cancellation: ``obeys``, ``cleans up``, ``swallows`` or ``ignores`` it."""
    cleanup: float = 0.4
    shield: bool | None = None
    attempts: int = 0
    """How many a ``Retry`` gives it; none without one."""
    retry_on: str = "one"
    timeout: float | timedelta | None = None
    delay: float | timedelta | None = None
    limiter: int | None = None
    on_error: str = ""
    """The error handler: ``ends``, ``waits``, ``fails``; or none."""
    run_if: str = ""

    def __repr__(self) -> str:
        changed = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if value != getattr(Work, name)
        )
        return f"Work({', '.join(changed)})"

    @property
    def obeys(self) -> bool:
        """Whether a cancellation ends it at once."""
        return self.on_cancel == "obeys" and not self.sync

    @property
    def time_limit(self) -> float:
        """How long an attempt may take."""
        return math.inf if self.timeout is None else in_seconds(self.timeout)


def _draw_works(*, on_batch: bool) -> st.SearchStrategy[Work]:
    def pick(*values: Any) -> st.SearchStrategy[Any]:
        return st.sampled_from(values)

    return st.builds(
        Work,
        sync=pick(False, False, False, True),
        waits=pick("gate", "gate", "", "ever"),
        endings=st.lists(
            pick("returns", "fails", "fails", "errs", "exits"), min_size=1, max_size=3
        ).map(tuple),
        on_cancel=pick("obeys", "obeys", "cleans up", "swallows", "ignores"),
        cleanup=pick(0.4, 2.3, 9.1),
        shield=pick(None, True),
        attempts=pick(0, 0, 1, 2, 3),
        retry_on=st.sampled_from(sorted(RETRY_ON)),
        timeout=pick(None, 1.3, 1.3, timedelta(seconds=2.6), math.inf),
        delay=pick(None, None, 0, 0.7, timedelta(seconds=1.9)),
        limiter=pick(None, None, *range(len(PLACES))),
        on_error=pick("", "", "ends", "waits", "fails"),
        run_if=pick("", "error", "always", "success") if on_batch else st.just(""),
    )


class Probe:
    """The function of one task, and what is known of the task, which it does not keep alive.

    :param world: where it runs
    :param work: what it does
    """

    def __init__(self, world: World, work: Work, batch: _Batch | None) -> None:
        self.world = world
        self.work = work
        self.batch = batch
        self.number = len(world.probes)
        self.ref: Callable[[], Task | None] = lambda: None
        self.id = ""
        self.events = ""
        self.levels: list[int] = []
        # For its moment; then "live", "dropped", one of both ("either"), or "cancelled" before it.
        self.place = "waiting"
        self.life = 0  # of which of the supervisor's lives it is a part
        self.order = -1
        self.due = math.inf  # when the next attempt may begin
        self.began = math.inf  # when the latest one did
        self.runs: list[Any] = []  # what each has come to: None, an error's type, or INSIDE
        self.gates: list[Any] = []  # at which its runs wait
        self.handler_gate = anyio.Event()
        self.handlings = 0
        self.in_handler = False
        self.waiters = 0
        self.asked = False  # to end, by a user
        self.told = False  # so, when the loop knows of it
        self.timed_out = False
        self.abandoned = False

    INSIDE = "inside"

    @property
    def config(self) -> TaskConfig:
        """What it is scheduled with."""
        work = self.work
        return TaskConfig(
            name=f"task-{self.number}",
            shield=work.shield,
            retry=self._retry() if work.attempts else None,
            timeout=work.timeout,
            delay=work.delay,
            limiter=None if work.limiter is None else self.world.limiters[work.limiter],
            on_error=self.handle if work.on_error else None,
            run_if=work.run_if or None,  # type: ignore[arg-type]
        )

    def _retry(self) -> Retry:
        return Retry(
            RETRY_ON[self.work.retry_on],
            attempts=self.work.attempts,
            wait_initial=WAIT,
            wait_exp_base=BASE,
            wait_max=LONGEST,
            wait_jitter=0,
        )

    @property
    def function(self) -> Callable[[], Any]:
        """What is scheduled."""
        return self._in_thread if self.work.sync else self._in_loop

    async def _in_loop(self) -> int:
        with self._run():
            await self._wait()
            return self._end()

    def _in_thread(self) -> int:
        with self._run():
            gate = threading.Event()
            with self.world.lock:
                waits = self.work.waits and not self.world.is_ending
                self.gates += [gate] if waits else []
            assert not waits or gate.wait(PATIENCE)
            return self._end()

    @contextmanager
    def _run(self) -> Iterator[None]:
        with self.world.lock:
            number = len(self.runs)
            self.runs.append(self.INSIDE)
            self.world.activity += 1
        outcome: Any = None
        try:
            yield
        except BaseException as error:
            outcome = type(error)
            raise
        finally:
            with self.world.lock:
                self.runs[number] = outcome
                self.world.activity += 1

    def _end(self) -> int:
        endings = self.work.endings
        ending = endings[min(len(self.runs), len(endings)) - 1]
        if ending == "returns":
            return self.number
        raise ERRORS[ending](self.number)

    async def _wait(self) -> None:
        gate = anyio.Event()
        if not self.work.waits or self.world.is_ending:
            gate.set()
        elif self.work.waits == "gate":
            self.gates.append(gate)
        swallowed = False
        while not gate.is_set():
            try:
                # A scope would keep its task, and not every task has one.
                with anyio.CancelScope(shield=True) if swallowed else nullcontext():
                    await gate.wait()
            except anyio.get_cancelled_exc_class():
                if self.work.on_cancel == "cleans up":
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(self.work.cleanup)
                if self.work.on_cancel in ("obeys", "cleans up"):
                    raise
                swallowed = True
                if self.work.on_cancel == "swallows" or self.work.waits == "ever":
                    gate.set()

    def let_go(self) -> None:
        """Let its runs end, and its handler."""
        with self.world.lock:
            gates, self.gates = self.gates, []
            for gate in gates:
                gate.set()
        self.handler_gate.set()
        self.world.busy.set()

    async def handle(self, task: Task, error: Exception) -> None:
        """Be the error handler."""
        self.handlings += 1
        self.world.activity += 1
        self.world.claim(task.status is TaskStatus.FAILED, self, "handled before it was over")
        self.world.claim(task.func.__self__ is self, self, "it is another task's handler")
        del task, error
        self.in_handler = True
        try:
            if self.work.on_error == "waits" and not self.world.is_ending:
                await self.handler_gate.wait()
            if self.work.on_error == "fails":
                raise LookupError(self.number)
        finally:
            self.in_handler = False
            self.world.activity += 1

    # What is known of it

    @property
    def shielded(self) -> bool:
        """Whether it was shielded."""
        return self.work.shield is True

    @property
    def is_over(self) -> bool:
        """Whether it was told that it has ended."""
        return not ENDS.isdisjoint(self.events)

    @property
    def attempts(self) -> int:
        """How often it was told that it began."""
        return self.events.count("B")

    @property
    def inside(self) -> int:
        """How many of its runs go on."""
        return self.runs.count(self.INSIDE)

    @property
    def outcome(self) -> Any:
        """What the latest run has come to."""
        return self.runs[-1] if self.runs else self.INSIDE

    @property
    def may_handle(self) -> bool:
        """Whether its end is one that is handled."""
        return "X" in self.events and self.work.on_error != "" and self.outcome is not SystemExit

    @property
    def waits_for_place(self) -> bool:
        """Whether the next thing that happens to it is an attempt, or its cancellation."""
        return self.place == "live" and self.events[-1] in "SR" and not self.abandoned

    def __repr__(self) -> str:
        return f"task {self.number} [{self.events}, {self.place}, {self.runs}] {self.work}"


@dataclass
class _Batch:
    """What the model knows of one batch of a request."""

    waiting: list[Probe] = field(default_factory=list)
    failed: bool | None = None


class _Request:
    """One request: its scheduler, and what is known of its batches."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.scheduler = TasksScheduler(supervisor)
        self.batches = {"route": _Batch(), "response": _Batch()}


class World:
    """A supervisor in a loop, and the model of what becomes of its tasks. In the loop's thread.

    :param grace: the supervisor's
    :param shutdown_timeout: the supervisor's
    :param make: makes the supervisor
    """

    def __init__(
        self, grace: float, shutdown_timeout: float | None, make: Callable[..., Supervisor]
    ) -> None:
        self.supervisor = make(
            observers=[self._observe],
            grace=grace,
            shutdown_timeout=shutdown_timeout,
            threads=THREADS,
        )
        self.deadline = math.inf if shutdown_timeout is None else shutdown_timeout
        self.last_call = self.deadline - (
            0 if shutdown_timeout is None else min(5.0, shutdown_timeout / 2)
        )
        self.cancel_at = min(grace, self.last_call)
        self.abandon_at = min(self.cancel_at + 5.0, self.deadline)
        self.limiters = [anyio.CapacityLimiter(places) for places in PLACES]
        self.requests = [_Request(self.supervisor) for _ in range(REQUESTS)]
        self.probes: list[Probe] = []
        self.records: defaultdict[str, list[int]] = defaultdict(list)
        self.violations: list[str] = []
        self.lock = threading.RLock()
        self.activity = 0
        self.calls = 0  # in threads, parked ones included
        self.busy = anyio.Event()
        self.is_ending = False
        self.phase = "new"
        self.lives = 0
        self.order = 0
        self.drain_start = math.inf
        self.counted: set[Probe] = set()
        self.may_be_counted: set[Probe] = set()

    # The loop

    async def live(self, commands: queue.SimpleQueue[Any]) -> None:
        """Take steps, as they are asked for by another thread; in between, stand still."""
        real = anyio.to_thread.run_sync

        async def run_sync(*args: Any, **options: Any) -> Any:
            self.calls += 1
            self.busy.set()
            try:
                return await real(*args, **options)
            finally:
                self.calls -= 1

        with mock.patch.object(anyio.to_thread, "run_sync", run_sync):
            async with anyio.create_task_group() as self.group:
                self.group.start_soon(self._hold_clock)
                while (command := commands.get()) is not None:
                    await self._take(*command)
                self.group.cancel_scope.cancel()

    async def _take(self, future: Future[None], step: Callable[..., Any], *args: Any) -> None:
        try:
            await step(*args)
            while not self._is_at_rest():
                await self._turn()
            self._check()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _is_at_rest(self) -> bool:
        """Return whether all threads wait to be let go."""
        with self.lock:
            return self.calls == sum(len(p.gates) for p in self.probes if p.work.sync)

    async def _hold_clock(self) -> None:
        """Keep the clock from jumping while a thread is at work, by being busy meanwhile."""
        while True:
            await self.busy.wait()
            self.busy = anyio.Event()
            while not self._is_at_rest():
                await anyio.lowlevel.checkpoint()

    async def _turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
            self._check()

    async def _deliver(self) -> None:
        for _ in range(DELIVERY):
            await anyio.lowlevel.checkpoint()

    # Steps

    async def start(self) -> None:
        """Start the supervisor, for the first time or again."""
        await self.supervisor.start()
        self.phase = "running"
        self.lives += 1

    async def drain_or_start(self, turns: int) -> None:
        """Drain the supervisor if it runs, and start it if it does not."""
        if self.phase == "running":
            self.group.start_soon(self._drain)
        elif self.phase != "draining":
            await self.start()
        await self._turn(turns)

    async def _drain(self) -> None:
        with suppress(SupervisorStateError):  # two were begun before the first could begin
            await self.supervisor.drain()

    async def schedule(
        self, place: str, number: int, work: Work, turns: int, in_thread: bool
    ) -> None:
        """Schedule a task."""
        request = self.requests[number]
        batch = request.batches.get(place)
        probe = Probe(self, work, batch)
        self.probes.append(probe)
        if batch is None:
            self._expect(probe, in_thread=in_thread)
        elif batch.failed is None:
            batch.waiting.append(probe)
        else:
            self._expect_release(probe, in_thread=in_thread)
        target = getattr(request.scheduler, f"after_{place}", request.scheduler)
        await self._call(in_thread, self._schedule, target, probe)
        self._check_place(probe)
        await self._turn(turns)

    def _schedule(self, target: Any, probe: Probe) -> None:
        probe.ref = weakref.ref(target.task(probe.config).schedule(probe.function))

    async def _call(self, in_thread: bool, func: Callable[..., None], *args: Any) -> None:
        if not in_thread:
            func(*args)
            return
        with ThreadPoolExecutor(1) as thread:
            thread.submit(func, *args).result(PATIENCE)
        await self._deliver()

    async def release(self, place: str, number: int, failed: bool, turns: int) -> None:
        """Come to a moment of a request; after the last one, another request takes its place."""
        request = self.requests[number]
        moments = ["route"] if place == "route" else ["route", "response"]
        batches = [request.batches[moment] for moment in moments]
        released = []
        for batch in batches:
            batch.failed = failed if batch.failed is None else batch.failed
            released += batch.waiting
            for probe in batch.waiting:
                self._expect_release(probe)
            batch.waiting.clear()
        getattr(request.scheduler, f"{place}_over")(failed=failed)
        for probe in released:
            self._check_place(probe)
        await self._turn(turns)

    async def renew(self, number: int, turns: int) -> None:
        """Let a request be over, and begin another one."""
        await self.release("response", number, False, turns)
        self.requests[number] = _Request(self.supervisor)

    async def cancel(self, number: int, turns: int, in_thread: bool) -> None:
        """Cancel a task."""
        probe = self._pick(number)
        if probe is None or (task := probe.ref()) is None:
            return
        was_over = probe.is_over or probe.abandoned
        probe.asked |= not was_over
        answers: list[bool] = []
        await self._call(in_thread, lambda: answers.append(task.cancel()))
        self.claim(answers == [not was_over], probe, f"cancel() said {answers}")
        probe.told |= not was_over
        self.claim(probe.attempts > 0 or probe.is_over or was_over, probe, "it may begin still")
        await self._turn(turns)

    async def let_go(self, number: int, turns: int) -> None:
        """Let a task end that waits for that."""
        probe = self._pick(number)
        if probe is not None:
            probe.let_go()
        await self._turn(turns)

    async def wait(self, number: int) -> None:
        """Wait for a task."""
        probe = self._pick(number)
        if probe is not None and (task := probe.ref()) is not None:
            probe.waiters += 1
            self.group.start_soon(self._wait, probe, task.wait)

    async def _wait(self, probe: Probe, wait: Callable[[], Awaitable[Any]]) -> None:
        outcome: Any = None
        try:
            result = await wait()
        except Exception as error:
            outcome = type(error)
        else:
            self.claim(result == (probe.number if "F" in probe.events else None), probe, "result")
        expected: Any = None
        if "X" in probe.events:
            expected = TaskTimeoutError if probe.timed_out else probe.outcome
            expected = TaskFailedError if expected is SystemExit else expected
        self.claim(outcome is expected, probe, f"wait() raised {outcome}, not {expected}")
        self.claim(probe.is_over, probe, "wait() returned before the end")
        probe.waiters -= 1
        self.activity += 1

    async def advance(self, seconds: float) -> None:
        """Let time pass."""
        await anyio.sleep(seconds)

    async def be_quiet(self) -> None:
        """Let everything happen that can without the clock, and see that it has."""
        calm = 0
        while calm < QUIET:
            before = self.activity
            await self._turn()
            calm = calm + 1 if before == self.activity and self._is_at_rest() else 0
        now = anyio.current_time()
        for probe in self.probes:
            self._check_quiet(probe, now)
        running = self._numbers(self.supervisor.running)
        self.claim(running == [p.number for p in self._expected_to_run()], None, f"{running} run")
        for number, limiter in enumerate(self.limiters):
            inside = sum(p.inside for p in self.probes if p.work.limiter == number)
            places = f"{limiter.borrowed_tokens} places of {number} are taken, by {inside} runs"
            self.claim(limiter.borrowed_tokens == inside, None, places)
        self._raise_violations()

    async def collect(self) -> None:
        """See that what is live is kept, and nothing else."""
        await self.be_quiet()
        # A thread that has handed over its result is still about to let go of its call.
        any(map(self._collect, range(LOOKS)))
        for probe in self.probes:
            self.claim(probe.ref() or not self._is_live(probe), probe, "nobody keeps it")
        self.claim(not self._wrongly_kept(), None, f"somebody keeps {self._wrongly_kept()}")
        await self.be_quiet()

    def _collect(self, _look: int) -> bool:
        gc.collect()
        time.sleep(0.002 * bool(self._wrongly_kept()))
        return not self._wrongly_kept()

    def _is_live(self, probe: Probe) -> bool:
        return bool(not probe.is_over or probe.in_handler or probe.waiters or probe.inside)

    def _wrongly_kept(self) -> list[Probe]:
        # A drain keeps those that it will report, and a request those that wait for it.
        reported = self._reported() if self.phase == "draining" else set()
        over = [p for p in self.probes if p.place != "waiting" and not self._is_live(p)]
        return [probe for probe in over if probe.ref() and probe not in reported]

    async def end(self) -> None:
        """End everything, and see that nothing is left."""
        await self.be_quiet()
        if self.phase == "running":
            await self.drain_or_start(2)
        await self.advance(FOREVER)
        await self.let_all_go()
        await self.be_quiet()
        await self.advance(FOREVER)
        for number in range(REQUESTS):
            await self.release("response", number, False, 1)
        await self.collect()
        self.claim(self.phase in ("new", "stopped"), None, "the drain does not end")
        for probe in self.probes:
            self.claim(probe.is_over, probe, "it got lost")
            self.claim(probe.handlings <= 1, probe, "it was handled twice")
        places = [limiter.borrowed_tokens for limiter in self.limiters]
        self.claim(places == [0] * len(PLACES), None, f"places that were not given back: {places}")
        self._raise_violations()

    async def let_all_go(self) -> None:
        """Let all end, whatever they wait for."""
        self.is_ending = True
        for probe in self.probes:
            probe.let_go()
            task = probe.ref()
            if task is not None and probe.work.waits == "ever" and not probe.work.sync:
                probe.asked = True
                task.cancel()

    def _pick(self, number: int) -> Probe | None:
        # Counted from the last one: those that are there are more interesting.
        return self.probes[-1 - number % len(self.probes)] if self.probes else None

    # What is expected of a task that comes to its moment

    def _expect_release(self, probe: Probe, *, in_thread: bool = False) -> None:
        assert probe.batch is not None
        wanted = probe.work.run_if or "success"
        if wanted == "always" or (wanted == "error") is probe.batch.failed:
            self._expect(probe, in_thread=in_thread)
        else:
            self._put(probe, "dropped")

    def _expect(self, probe: Probe, *, in_thread: bool = False) -> None:
        passed = anyio.current_time() - self.drain_start
        if self.phase == "running":
            # From a thread, it may come when the drain has begun.
            self._put(probe, "either" if in_thread else "live")
        elif self.phase != "draining" or not probe.shielded:
            self._put(probe, "dropped")
        elif in_thread or abs(passed - self.last_call) < EPSILON:
            self._put(probe, "either")
        else:
            self._put(probe, "live" if passed < self.last_call else "dropped")

    def _put(self, probe: Probe, place: str) -> None:
        if probe.is_over:
            probe.place = "cancelled"  # before its moment
            return
        probe.place = place
        probe.life = self.lives
        self.order += 1
        probe.order = self.order
        probe.due = anyio.current_time() + in_seconds(probe.work.delay or 0)
        if self.phase == "draining":
            (self.may_be_counted if place == "either" else self.counted).add(probe)

    def _check_place(self, probe: Probe) -> None:
        is_dropped = "D" in probe.events
        if probe.place == "either":
            probe.place = "dropped" if is_dropped else "live"
        self.claim(is_dropped is (probe.place == "dropped"), probe, "it was dropped, or not")

    # What is told

    def _observe(self, event: TaskEvent) -> None:
        self.activity += 1
        if event.kind in LETTERS:
            probe: Probe = event.task.func.__self__
            letter = LETTERS[event.kind]
            latest = probe.events[-1:]
            self.claim(letter in FOLLOWERS[latest], probe, f"{event.kind} cannot follow")
            getattr(self, f"_on_{event.kind}", self._on_end)(probe, event)
            probe.events += letter
            is_expected = letter == "D" and probe.work.run_if == "error"
            is_expected &= probe.batch is not None and probe.batch.failed is False
            probe.levels.append(logging.DEBUG if is_expected else LEVELS[letter])
        else:
            probes = [task.func.__self__ for task in event.tasks]
            getattr(self, f"_on_{event.kind}", lambda *_: None)(probes, event)

    def _on_scheduled(self, probe: Probe, event: TaskEvent) -> None:
        probe.id = event.task.id
        probe.ref = weakref.ref(event.task)

    def _on_started(self, probe: Probe, event: TaskEvent) -> None:
        now = anyio.current_time()
        self.claim(now >= probe.due - EPSILON, probe, f"began at {now}, before {probe.due}")
        self.claim(probe.place in ("live", "either"), probe, "began before its moment")
        self.claim(not probe.told, probe, "began after cancel()")
        self.claim(not self._was_cut(probe, now), probe, "began after the drain cancelled it")
        self.claim(probe.attempts < max(1, probe.work.attempts), probe, "too many attempts")
        if probe.work.limiter is not None:
            limiter = self.limiters[probe.work.limiter]
            inside = sum(p.inside for p in self.probes if p.work.limiter == probe.work.limiter)
            self.claim(inside < limiter.total_tokens, probe, "no place is free")
        elif probe.work.sync:
            self.claim(self._threads_of(probe.life) < THREADS, probe, "no thread is free")
        probe.began = now

    def _on_retrying(self, probe: Probe, event: TaskEvent) -> None:
        now = anyio.current_time()
        self._check_error(probe, event.error)
        work = probe.work
        self.claim(isinstance(event.error, RETRIED[work.retry_on]), probe, "retried for that")
        self.claim(probe.attempts < work.attempts, probe, "retried too often")
        self.claim(not probe.told, probe, "retried after cancel()")
        self.claim(not self._was_cut(probe, now), probe, "retried after the drain cancelled it")
        wait = min(WAIT * BASE ** (probe.attempts - 1), LONGEST)
        wait = ASKED_WAIT if work.retry_on == "asks" else wait
        self.claim(abs(event.wait - wait) < EPSILON, probe, f"waits {event.wait}, not {wait}")
        probe.due = now + wait

    def _on_failed(self, probe: Probe, event: TaskEvent) -> None:
        self._check_error(probe, event.error)
        work = probe.work
        may_go_on = work.attempts > probe.attempts
        if may_go_on and isinstance(event.error, RETRIED[work.retry_on]):
            self.claim(self._may_be_cut(probe), probe, "was not retried")
        self._on_end(probe, event)

    def _check_error(self, probe: Probe, error: BaseException | None) -> None:
        now = anyio.current_time()
        probe.timed_out = isinstance(error, TaskTimeoutError)
        if not probe.timed_out:
            self.claim(probe.outcome is type(error), probe, f"failed with {error!r}")
            return
        passed = now - probe.began
        limit = probe.work.time_limit
        slack = probe.work.cleanup if probe.work.on_cancel == "cleans up" else 0.0
        is_in_time = limit - EPSILON <= passed <= limit + slack + EPSILON
        self.claim(is_in_time, probe, f"took {passed}, not {limit}")
        is_cut = probe.work.sync or probe.outcome not in (None, ProbeError, probe.INSIDE)
        self.claim(is_cut, probe, "was out of time, but not cancelled")

    def _on_cancelled(self, probe: Probe, event: TaskEvent) -> None:
        # Above all: a shielded task that has begun is not cancelled before the last call.
        self.claim(self._may_be_cut(probe), probe, "nobody cancelled it")
        ended = (None, *ERRORS.values())
        if probe.events[-1] == "B" and not probe.work.sync:
            self.claim(probe.outcome not in ended, probe, "it had ended otherwise")
        self._on_end(probe, event)

    def _on_finished(self, probe: Probe, event: TaskEvent) -> None:
        self.claim(probe.outcome is None, probe, "it has not returned")
        in_time = anyio.current_time() - probe.began <= probe.work.time_limit + EPSILON
        may_take_longer = probe.work.on_cancel in ("swallows", "ignores") and not probe.work.sync
        self.claim(in_time or may_take_longer, probe, "it took longer than it may")
        self._on_end(probe, event)

    def _on_handler_failed(self, probe: Probe, event: TaskEvent) -> None:
        may_fail = probe.work.on_error == "fails" or self._may_be_cut(probe)
        self.claim(may_fail, probe, f"its handler failed with {event.error!r}")

    def _on_end(self, probe: Probe, event: TaskEvent) -> None:
        expected = STATUSES[LETTERS[event.kind]]
        self.claim(event.task.status is expected, probe, f"{event.kind}, but {event.task.status}")

    def _may_be_cut(self, probe: Probe) -> bool:
        """Return whether somebody may have cancelled it by now."""
        return probe.asked or probe.abandoned or self._drain_is_past(probe, -EPSILON)

    def _was_cut(self, probe: Probe, now: float) -> bool:
        """Return whether a drain has cancelled it for certain."""
        return self._drain_is_past(probe, EPSILON) or (
            self.phase == "stopped" and probe.life == self.lives
        )

    def _drain_is_past(self, probe: Probe, tolerance: float) -> bool:
        passed = anyio.current_time() - self.drain_start
        moment = self.last_call if probe.shielded else self.cancel_at
        return self.phase == "draining" and passed > moment + tolerance

    def _on_drain_started(self, probes: Sequence[Probe], event: TaskEvent) -> None:
        self.claim(self.phase == "running", None, "a drain began")
        self.phase = "draining"
        self.drain_start = anyio.current_time()
        self.counted, self.may_be_counted = set(), set()
        for probe in self.probes:
            is_lasting = self._is_lasting(probe)
            if is_lasting is not False:
                (self.counted if is_lasting else self.may_be_counted).add(probe)
        self._check_counted(probes, "drained")

    def _on_drain_abandoning(self, probes: Sequence[Probe], event: TaskEvent) -> None:
        passed = anyio.current_time() - self.drain_start
        for probe in probes:
            moment = self.deadline if probe.shielded else self.abandon_at
            self.claim(passed >= moment - EPSILON, probe, "abandoned too early")
            probe.abandoned = True

    def _on_drain_finished(self, probes: Sequence[Probe], event: TaskEvent) -> None:
        assert event.report is not None
        self.claim(self.phase == "draining", None, "a drain ended")
        self.phase = "stopped"
        self._check_report(event.report)

    def _check_report(self, report: DrainReport) -> None:
        told: list[Probe] = []
        for name in ("finished", "cancelled", "abandoned", "never_started"):
            for task in getattr(report, name):
                probe = task.func.__self__
                told.append(probe)
                self.claim(self._group_of(probe) == name, probe, f"reported as {name}")
        self.claim(len(set(told)) == len(told), None, f"reported twice: {told}")
        self._check_counted(told, "reported")
        shielded = any(probe.shielded for probe in told)
        longest = self.deadline if shielded else self.abandon_at
        self.claim(report.duration <= longest + EPSILON, None, f"took {report.duration} s")

    def _check_counted(self, probes: Sequence[Probe], what: str) -> None:
        lost = self.counted.difference(probes)
        alien = set(probes) - self._reported()
        self.claim(not lost and not alien, None, f"not {what}: {lost}; {what}, but not: {alien}")

    def _reported(self) -> set[Probe]:
        """Return whom the report of this drain may name."""
        return self.counted | self.may_be_counted

    def _group_of(self, probe: Probe) -> str:
        if probe.abandoned:
            return "abandoned"
        if "F" in probe.events or "X" in probe.events:
            return "finished"
        return "cancelled" if probe.attempts else "never_started"

    # What must be so

    def _is_lasting(self, probe: Probe) -> bool | None:
        """Return whether it has something left to do; None, if that may be over by now."""
        if probe.place == "either":
            return None
        if probe.place != "live" or probe.abandoned:
            return False
        if not probe.is_over or probe.in_handler or (probe.work.sync and probe.inside):
            return True
        return None if probe.may_handle or probe.timed_out or len(probe.runs) > 1 else False

    def _expected_to_run(self) -> list[Probe]:
        """Return who runs when nothing else can happen, the oldest first."""
        lasting = [probe for probe in self.probes if self._is_lasting(probe)]
        return sorted(lasting, key=lambda probe: probe.order)

    def _check(self) -> None:
        running = self._numbers(self.supervisor.running)
        self.claim(self.supervisor.is_running is (self.phase == "running"), None, "is_running")
        order = [self.probes[number].order for number in running]
        self.claim(order == sorted(set(order)), None, f"running is not in order: {running}")
        for probe in self.probes:
            is_lasting = self._is_lasting(probe)
            is_there = probe.number in running
            self.claim(is_lasting in (None, is_there), probe, f"in {running}, or not")
            self.claim(self.records[probe.id] == probe.levels, probe, f"{self.records[probe.id]}")
            self._check_task(probe)
        for limiter in self.limiters:
            are_enough = limiter.borrowed_tokens <= limiter.total_tokens
            self.claim(are_enough, None, f"{limiter.borrowed_tokens} places are taken")
        self._raise_violations()

    def _check_task(self, probe: Probe) -> None:
        task = probe.ref()
        if task is None:
            self.claim(probe.is_over, probe, "it is gone before its end")
            return
        expected = STATUSES[probe.events[-1]]
        self.claim(task.status is expected, probe, f"{task.status}, not {expected}")
        self.claim(task.attempt == probe.attempts, probe, f"attempt {task.attempt}")
        self.claim(task.abandoned is probe.abandoned, probe, "it is abandoned, or not")

    def _check_quiet(self, probe: Probe, now: float) -> None:
        self.claim(not (probe.is_over and probe.waiters), probe, "its waiter waits")
        if probe.may_handle and not self._may_be_cut(probe):
            self.claim(probe.handlings == 1, probe, "it was not handled")
        if probe.place != "live" or probe.is_over or probe.abandoned:
            return
        is_told = probe.told or self._drain_is_past(probe, EPSILON)
        if is_told:
            self.claim(probe.inside > 0, probe, "it was cancelled, and does not end")
            self.claim(not probe.work.obeys, probe, "it was cancelled, and goes on")
        elif probe.waits_for_place and now > probe.due + EPSILON:
            self.claim(self._is_full(probe), probe, "it does not begin")
        elif probe.events[-1] == "B":
            is_late = now > probe.began + probe.work.time_limit + EPSILON
            may_be_late = probe.work.on_cancel == "obeys" or probe.work.sync
            self.claim(not (is_late and may_be_late), probe, "its time is up, and it goes on")
            self.claim(probe.inside > 0, probe, "it has ended, and nobody says so")

    def _is_full(self, probe: Probe) -> bool:
        if probe.work.limiter is not None:
            limiter = self.limiters[probe.work.limiter]
            return limiter.borrowed_tokens == limiter.total_tokens
        return probe.work.sync and self._threads_of(probe.life) == THREADS

    def _threads_of(self, life: int) -> int:
        """Return how many of the supervisor's threads are busy."""
        mine = [p for p in self.probes if p.work.sync and p.work.limiter is None]
        return sum(p.inside for p in mine if p.life == life)

    def _numbers(self, tasks: Sequence[Task]) -> list[int]:
        return [task.func.__self__.number for task in tasks]

    def claim(self, holds: object, probe: Probe | None, otherwise: str) -> None:
        """Note a violation unless something holds."""
        if not holds:
            self.violations.append(f"{otherwise}: {probe}" if probe else otherwise)

    def _raise_violations(self) -> None:
        if self.violations:
            raise AssertionError("; ".join(self.violations))


class _Records(logging.Handler):
    """Keeps the level of each record of each task."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.DEBUG)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "task_id"):
            self.world.records[record.task_id].append(record.levelno)
        else:
            is_known = "Shutdown" in record.msg
            self.world.claim(is_known, None, record.getMessage())


def _run_asyncio(main: Callable[..., Awaitable[None]], *args: Any) -> None:
    anyio.run(main, *args, backend_options={"loop_factory": FakeClockLoop})


def _run_trio(main: Callable[..., Awaitable[None]], *args: Any) -> None:
    trio.run(main, *args, clock=fake_trio_clock())  # older versions of anyio.run leave it out


LOOPS: dict[str, Callable[..., None]] = {"asyncio": _run_asyncio, "trio": _run_trio}

turns = st.sampled_from([QUIET, 0, 1, 2, 3])
numbers = st.integers(0, 7)
requests = st.integers(0, REQUESTS - 1)


class Machine(RuleBasedStateMachine):
    """Asks a world for steps.

    :param loop: one of ``LOOPS``
    :param make: makes the supervisor
    """

    def __init__(self, loop: str, make: Callable[..., Supervisor] = Supervisor) -> None:
        super().__init__()
        self._run_loop = LOOPS[loop]
        self._make = make
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._patience = ExitStack()
        self._is_sound = True

    @initialize(
        grace=st.sampled_from([0.0, 0.45, 3.05]),
        more=st.sampled_from([None, 1.0, 6.0, 25.0]),
        starts=st.sampled_from([True, True, True, False]),
        order=st.sampled_from([0.0, 1.0]),
    )
    def begin(self, grace: float, more: float | None, starts: bool, order: float) -> None:
        """Make a supervisor, and perhaps start it."""
        gc.collect()
        gc.freeze()  # what was there before is not looked at again by each collection
        self._world: World
        # Trio tosses a coin for each turn, and how many there are depends on the threads. Here it
        # falls on one side, always.
        coin = mock.patch("trio._core._run._r", mock.Mock(**{"random.return_value": order}))
        self._patience.enter_context(coin)
        self._patience.enter_context(
            mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
        )
        ready = threading.Event()

        async def main() -> None:
            self._world = World(grace, None if more is None else grace + more, self._make)
            ready.set()
            await self._world.live(self._commands)

        self._thread = threading.Thread(target=self._run_loop, args=(main,), daemon=True)
        self._thread.start()
        assert ready.wait(PATIENCE)
        logger = logging.getLogger("fastapi_tasks")
        handlers = [_Records(self._world)]
        self._patience.enter_context(
            mock.patch.multiple(logger, level=logging.DEBUG, propagate=False, handlers=handlers)
        )
        self._patience.enter_context(mock.patch.object(logging.getLogger("stamina"), "disabled", 1))
        logger.manager._clear_cache()
        self._patience.callback(logger.manager._clear_cache)
        if starts:
            self._do(self._world.start)

    def _do(self, step: Callable[..., Any], *args: Any) -> None:
        future: Future[None] = Future()
        self._commands.put((future, step, *args))
        try:
            future.result(PATIENCE)
        except BaseException:
            self._is_sound = False
            raise

    def teardown(self) -> None:
        """End everything, with a last look if all has been well so far."""
        try:
            self._do(self._world.end if self._is_sound else self._world.let_all_go)
        finally:
            self._commands.put(None)
            self._thread.join(PATIENCE)
            self._patience.close()
            gc.unfreeze()

    @rule(work=_draw_works(on_batch=False), turns=turns, in_thread=st.booleans())
    def schedule(self, work: Work, turns: int, in_thread: bool) -> None:
        """Schedule a task that starts now."""
        self._do(self._world.schedule, "now", 0, work, turns, in_thread)

    @rule(works=st.lists(_draw_works(on_batch=False), min_size=2, max_size=3), turns=turns)
    def schedule_several(self, works: list[Work], turns: int) -> None:
        """Schedule some tasks that start now."""
        for work in works:
            self._do(self._world.schedule, "now", 0, work, 0, False)
        self._do(self._world.schedule, "now", 0, works[0], turns, False)

    @rule(
        place=st.sampled_from(["route", "response"]),
        number=requests,
        work=_draw_works(on_batch=True),
        turns=turns,
        in_thread=st.booleans(),
    )
    def schedule_for_later(
        self, place: str, number: int, work: Work, turns: int, in_thread: bool
    ) -> None:
        """Schedule a task for a moment of a request."""
        self._do(self._world.schedule, place, number, work, turns, in_thread)

    @rule(
        place=st.sampled_from(["route", "response"]),
        number=requests,
        failed=st.booleans(),
        turns=turns,
    )
    def release(self, place: str, number: int, failed: bool, turns: int) -> None:
        """Come to that moment."""
        self._do(self._world.release, place, number, failed, turns)

    @rule(number=requests, turns=turns)
    def renew(self, number: int, turns: int) -> None:
        """Begin another request."""
        self._do(self._world.renew, number, turns)

    @rule(number=numbers, turns=turns, in_thread=st.booleans())
    def cancel(self, number: int, turns: int, in_thread: bool) -> None:
        """Cancel a task."""
        self._do(self._world.cancel, number, turns, in_thread)

    @rule(number=numbers, turns=turns)
    def let_go(self, number: int, turns: int) -> None:
        """Let a task end."""
        self._do(self._world.let_go, number, turns)

    @rule(number=numbers)
    def wait(self, number: int) -> None:
        """Wait for a task."""
        self._do(self._world.wait, number)

    @rule(seconds=st.sampled_from([0.35, 0.6, 1.15, 2.2, 3.4, 6.3, 12.7]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._do(self._world.advance, seconds)

    @rule(seconds=st.sampled_from([0.0, 0.9, 1.7, 2.8]))
    def be_quiet(self, seconds: float) -> None:
        """Let time pass, and then all happen that can."""
        self._do(self._world.advance, seconds)
        self._do(self._world.be_quiet)

    @rule()
    def collect(self) -> None:
        """Collect what nobody refers to."""
        self._do(self._world.collect)

    @rule(turns=turns)
    def drain_or_start(self, turns: int) -> None:
        """Begin to drain the supervisor; once that has been done, start it again."""
        self._do(self._world.drain_or_start, turns)

    @rule(on_cancel=st.sampled_from(["obeys", "ignores"]), turns=turns)
    def drain_for_long(self, on_cancel: str, turns: int) -> None:
        """Begin to drain it, with a task that gives all others the time to come to their ends."""
        work = Work(waits="gate", on_cancel=on_cancel, shield=True)
        self._do(self._world.schedule, "now", 0, work, turns, False)
        self._do(self._world.drain_or_start, turns)
