"""How many attempts run at once that share a limiter, and who is next."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI

from fastapi_tasks import (
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    Tasks,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
    task,
)

from . import asgi
from .clocks import FAKE_CLOCKS
from .conftest import BACKENDS
from .recording import Observed, idle, let_others_run, until
from .servers import PATIENCE

on_fake_clocks = pytest.mark.parametrize("anyio_backend", FAKE_CLOCKS, indirect=True)


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The event loop of each test, made anew where it has a fake clock."""
    return request.param() if callable(request.param) else request.param


class LockError(Exception):
    """What goes wrong in this module's canal."""


# Before 4.15, AnyIO may let somebody in between whom it has called and that one's coming.
MAY_LET_IN_MORE = tuple(map(int, version("anyio").split(".")[:2])) < (4, 15)


class Lock:
    """A function, sync or not, that counts how many of its calls run at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.order: list[Any] = []
        self.gate = threading.Event()
        self._guard = threading.Lock()

    def was_full(self, places: int) -> bool:
        """Return whether as many calls as there are places were inside, and never more."""
        return self.most == places or (MAY_LET_IN_MORE and self.most > places)

    def was_no_fuller(self, places: int) -> bool:
        """Return whether no more calls were inside than there are places."""
        return self.most <= places or MAY_LET_IN_MORE

    def enter(self, ship: object) -> None:
        """Come in."""
        with self._guard:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.order.append(ship)

    def leave(self) -> None:
        """Go out."""
        with self._guard:
            self.inside -= 1

    async def pass_through(self, ship: object = None) -> None:
        """Be inside for a while."""
        self.enter(ship)
        try:
            await let_others_run()
        finally:
            self.leave()

    def pass_through_in_thread(self, ship: object = None) -> None:
        """Be inside until the gate is opened."""
        self.enter(ship)
        self.gate.wait()
        self.leave()


def nothing() -> None:
    """Be a sync function."""


async def stay() -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


def returned(function: Callable[[], Awaitable[None]]) -> Awaitable[None]:
    """Be a sync function that returns what is to be awaited."""
    return function()


# How many


@pytest.mark.parametrize("places", [1, 2, 5])
async def test_no_more_run_at_once_than_there_are_places(places: int) -> None:
    """And no fewer, if there are enough of them."""
    lock, limiter = Lock(), anyio.CapacityLimiter(places)
    async with Supervisor(config=TaskConfig(limiter=limiter, shield=True)) as supervisor:
        for _ in range(20):
            supervisor.schedule(lock.pass_through)

    assert lock.was_full(places)
    assert len(lock.order) == 20
    assert limiter.borrowed_tokens == 0


async def test_no_more_threads_run_at_once_than_there_are_places() -> None:
    """A sync function takes its place before it takes a thread."""
    lock, limiter = Lock(), anyio.CapacityLimiter(3)
    async with Supervisor(config=TaskConfig(limiter=limiter, shield=True)) as supervisor:
        for _ in range(9):
            supervisor.schedule(lock.pass_through_in_thread)
        await until(lambda: lock.inside == 3)
        await let_others_run()
        assert limiter.statistics().tasks_waiting == 6
        lock.gate.set()

    assert lock.was_full(3)
    assert len(lock.order) == 9


async def test_all_functions_that_name_a_limiter_share_it() -> None:
    """Async, sync and timed ones, wherever they are scheduled: one upstream, one limit."""
    lock, limiter = Lock(), anyio.CapacityLimiter(2)
    shared = task(limiter=limiter, shield=True)

    @shared
    async def by_sail() -> None:
        await lock.pass_through()

    @shared
    def by_steam() -> None:
        anyio.from_thread.run(lock.pass_through)

    async with Supervisor() as first, Supervisor() as second:
        for supervisor in (first, second) * 3:
            supervisor.schedule(by_sail)
            supervisor.schedule(by_steam)
            supervisor.task(timeout=3600).schedule(by_steam)
            supervisor.task(timeout=3600).schedule(by_sail)
            supervisor.task(limiter=limiter, shield=True).schedule(lock.pass_through)

    assert lock.was_no_fuller(2)  # in threads, two may not happen to meet
    assert (len(lock.order), limiter.borrowed_tokens) == (30, 0)


@pytest.mark.parametrize("limit", [None, 3600])
async def test_what_a_sync_function_returns_to_be_awaited_is_within_its_place(
    limit: float | None,
) -> None:
    """A partial, or a lambda, that calls an async function is no way around the limit."""
    lock, limiter = Lock(), anyio.CapacityLimiter(2)
    config = TaskConfig(limiter=limiter, shield=True, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        for _ in range(10):
            supervisor.schedule(returned, lock.pass_through)

    assert lock.was_no_fuller(2)
    assert (len(lock.order), limiter.borrowed_tokens) == (10, 0)


@pytest.mark.parametrize("limit", [None, 3600])
async def test_what_a_sync_function_returns_to_be_awaited_holds_no_thread(
    limit: float | None,
) -> None:
    """Without a limiter of its own, the place is that of a thread, which is free by then."""
    async with Supervisor(threads=1) as supervisor:
        task = supervisor.task(timeout=limit).schedule(returned, stay)
        await until(lambda: task.in_threads == 0 and task.attempt == 1)
        await supervisor.schedule(nothing).wait()
        task.cancel()


@pytest.mark.parametrize("limit", [None, 3600])
async def test_a_task_with_a_limiter_gets_its_arguments(limit: float | None) -> None:
    """Those by name, too."""
    lock = Lock()
    config = TaskConfig(limiter=anyio.CapacityLimiter(1), timeout=limit)
    async with Supervisor(config=config) as supervisor:
        await supervisor.schedule(lock.pass_through, ship="Argo").wait()

    assert lock.order == ["Argo"]


async def test_a_limiter_takes_the_place_of_the_limit_of_threads() -> None:
    """More threads or fewer than that: the limiter alone decides."""
    lock, limiter = Lock(), anyio.CapacityLimiter(3)
    config = TaskConfig(shield=True)
    async with Supervisor(threads=1, config=config) as supervisor:
        for limit in (None, 3600, None):
            supervisor.task(limiter=limiter, timeout=limit).schedule(lock.pass_through_in_thread)
        await until(lambda: lock.inside == 3)
        await supervisor.schedule(nothing).wait()  # the one thread of the others is free
        lock.gate.set()


async def test_a_limiter_may_be_changed_while_tasks_wait_for_it() -> None:
    """The next ones begin at once when it grows."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    async with Supervisor(config=TaskConfig(limiter=limiter, shield=True)) as supervisor:
        for _ in range(4):
            supervisor.schedule(lock.pass_through_in_thread)
        await until(lambda: lock.inside == 1)
        limiter.total_tokens = 3
        await until(lambda: lock.inside == 3)
        lock.gate.set()

    assert lock.was_full(3)
    assert len(lock.order) == 4


async def test_a_place_may_be_taken_by_others() -> None:
    """By an endpoint, for example, that asks the same service."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    app = FastAPI()
    add_tasks(app, config=TaskConfig(limiter=limiter))

    @app.get("/")
    async def endpoint(tasks: Tasks) -> str:
        async with limiter:
            waiting = tasks.schedule(lock.pass_through)
            await let_others_run()
            return waiting.status

    async with asgi.lifespan(app):
        assert (await asgi.request(app, "/")).json() == "pending"
        for task in get_supervisor(app).running:
            await task.wait()

    assert lock.order == [None]


def import_time_limiter(places: int) -> anyio.CapacityLimiter:
    """Return a limiter that was made as a module's are: in no event loop."""
    made: list[anyio.CapacityLimiter] = []
    thread = threading.Thread(target=lambda: made.append(anyio.CapacityLimiter(places)))
    thread.start()
    thread.join()
    return made[0]


@pytest.mark.parametrize("limit", [None, 3600])
async def test_a_limiter_may_be_made_before_there_is_an_event_loop(limit: float | None) -> None:
    """A decorator has to name it at import."""
    lock, limiter = Lock(), import_time_limiter(2)
    config = TaskConfig(limiter=limiter, shield=True, timeout=limit)
    assert repr(config.merge(TaskConfig(timeout=1))) == (
        "TaskConfig(shield=True, timeout=1, limiter=CapacityLimiter(2))"
    )
    async with Supervisor(config=config) as supervisor:
        for _ in range(5):
            supervisor.schedule(lock.pass_through)
            supervisor.schedule(nothing)

    assert lock.was_no_fuller(2)
    assert (len(lock.order), limiter.borrowed_tokens) == (5, 0)


def test_a_limiter_may_be_used_in_one_event_loop_after_the_other() -> None:
    """As a module's is, when the tests of an app start it again and again."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)

    async def main() -> None:
        async with Supervisor(config=TaskConfig(limiter=limiter, shield=True)) as supervisor:
            for _ in range(3):
                supervisor.schedule(lock.pass_through)

    for _ in range(2):
        asyncio.run(main())

    assert lock.was_full(1)
    assert len(lock.order) == 6


# Who waits


async def test_a_task_that_waits_for_a_place_is_pending(observed: Observed) -> None:
    """Nothing of it has begun."""
    limiter = anyio.CapacityLimiter(1)
    async with Supervisor(observers=[observed]) as supervisor:
        limited = supervisor.task(limiter=limiter)
        first = limited.schedule(stay)
        await first.started.wait()
        waiting = [limited.schedule(stay)]
        await let_others_run()
        waiting.append(limited.schedule(nothing))
        await let_others_run()
        assert [task.status for task in waiting] == [TaskStatus.PENDING] * 2
        assert not waiting[0].started.is_set()
        assert observed.kinds(waiting[1]) == [TaskEventKind.SCHEDULED]
        assert supervisor.running == (first, *waiting)
        first.cancel()
        await waiting[0].started.wait()
        waiting[0].cancel()
        await waiting[1].wait()

    assert waiting[1].status is TaskStatus.SUCCEEDED


@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("kind", ["async", "sync", "mixed"])
async def test_who_has_waited_longest_is_next(limit: float | None, kind: str) -> None:
    """On trio this is said of tasks that came in different turns of the event loop only."""
    limiter, order = anyio.CapacityLimiter(1), list[int]()

    async def note(number: int) -> None:
        order.append(number)

    functions: dict[str, list[Callable[[int], Any]]] = {
        "async": [note],
        "sync": [order.append],
        "mixed": [note, order.append],
    }
    config = TaskConfig(limiter=limiter, timeout=limit, shield=True)
    async with Supervisor(config=config) as supervisor, limiter:
        for number in range(6):
            kinds = functions[kind]
            supervisor.schedule(kinds[number % len(kinds)], number)
            await let_others_run()

    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("function", [stay, nothing])
async def test_a_task_that_is_cancelled_while_it_waits_takes_no_place(
    function: Callable[[], Any], limit: float | None
) -> None:
    """Those behind it move up."""
    limiter = anyio.CapacityLimiter(1)
    config = TaskConfig(limiter=limiter, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        async with limiter:
            first = supervisor.schedule(function)
            await let_others_run()
            second = supervisor.schedule(nothing)
            await let_others_run()
            first.cancel()
            await first.wait()
        await second.wait()

    assert (first.status, first.attempt) == (TaskStatus.CANCELLED, 0)
    assert (second.status, limiter.borrowed_tokens) == (TaskStatus.SUCCEEDED, 0)


@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("function", [stay, nothing])
async def test_a_task_that_is_cancelled_as_it_gets_its_place_gives_it_to_the_next(
    function: Callable[[], Any], limit: float | None
) -> None:
    """It has the place, but does not know it yet; on trio the cancellation comes too late then."""
    limiter = anyio.CapacityLimiter(1)
    config = TaskConfig(limiter=limiter, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        await limiter.acquire_on_behalf_of("somebody else")
        task = supervisor.schedule(function)
        await let_others_run()
        limiter.release_on_behalf_of("somebody else")
        task.cancel()
        with anyio.fail_after(10):
            await task.wait()
            await supervisor.schedule(nothing).wait()

    assert (task.status, task.attempt) == (TaskStatus.CANCELLED, 0)
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("function", [stay, nothing])
async def test_whenever_a_task_is_cancelled_no_place_is_lost(
    function: Callable[[], Any], limit: float | None, steps: int
) -> None:
    """Before it has one, as it gets one, and while it has one."""
    limiter = anyio.CapacityLimiter(1)
    config = TaskConfig(limiter=limiter, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        await limiter.acquire_on_behalf_of("somebody else")
        task = supervisor.schedule(function)
        for step in range(steps):
            if step == 4:
                limiter.release_on_behalf_of("somebody else")
            await anyio.lowlevel.checkpoint()
        task.cancel()
        if steps <= 4:
            limiter.release_on_behalf_of("somebody else")
        with anyio.fail_after(10):
            await task.wait()
            await supervisor.schedule(nothing).wait()

    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("function", [stay, nothing])
async def test_whenever_a_task_is_cancelled_a_free_place_stays_free(
    function: Callable[[], Any], limit: float | None, steps: int
) -> None:
    """The same for a place for which nobody has to wait."""
    limiter = anyio.CapacityLimiter(1)
    config = TaskConfig(limiter=limiter, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(function)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with anyio.fail_after(10):
            await task.wait()
            await supervisor.schedule(nothing).wait()

    assert limiter.borrowed_tokens == 0


async def test_a_drain_gives_up_the_unshielded_ones_that_wait() -> None:
    """They never start; the shielded ones get their places one after the other."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    supervisor = Supervisor()
    await supervisor.start()
    limited = supervisor.task(limiter=limiter)
    running = limited.schedule(stay)
    await running.started.wait()
    lost = [limited.schedule(lock.pass_through), limited.schedule(nothing)]
    kept = [limited.task(shield=True).schedule(lock.pass_through, ship) for ship in ("a", "b")]
    await let_others_run()

    report = await supervisor.drain()

    assert (set(report.never_started), report.cancelled) == (set(lost), (running,))
    assert (set(report.finished), set(lock.order)) == (set(kept), {"a", "b"})


# When a place is free again


async def fail() -> None:
    """Fail."""
    raise LockError


def fail_in_thread() -> None:
    """Fail in a thread."""
    raise LockError


@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("function", [anyio.lowlevel.checkpoint, nothing, fail, fail_in_thread])
async def test_a_place_is_free_when_the_attempt_is_over(
    function: Callable[[], Any], limit: float | None
) -> None:
    """However it ended, and before the error handler runs."""
    limiter = anyio.CapacityLimiter(1)
    taken: list[int] = []

    def note(event: TaskEvent) -> None:
        if event.kind in (TaskEventKind.FINISHED, TaskEventKind.FAILED):
            taken.append(limiter.borrowed_tokens)

    async with Supervisor(observers=[note]) as supervisor:
        task = supervisor.task(limiter=limiter, timeout=limit).schedule(function)
        with suppress(LockError):
            await task.wait()

    assert taken == [0]


@on_fake_clocks
@pytest.mark.parametrize("function", [fail, fail_in_thread, stay])
async def test_a_place_is_free_between_the_attempts(function: Callable[[], Any]) -> None:
    """Who backs off asks for nothing just now; a failure and a timeout are alike in this."""
    limiter = anyio.CapacityLimiter(1)
    retry = Retry(on=Exception, attempts=2, wait_initial=3600, wait_max=3600, wait_jitter=0)
    async with Supervisor() as supervisor:
        limited = supervisor.task(limiter=limiter)
        limit = 5 if function is stay else None
        task = limited.task(retry=retry, timeout=limit).schedule(function)
        if function is fail_in_thread:
            await until(lambda: task.attempt == 1 and limiter.borrowed_tokens == 0)
        await anyio.sleep(100)
        assert (task.status, task.attempt, limiter.borrowed_tokens) == (TaskStatus.RUNNING, 1, 0)
        await limited.schedule(nothing).wait()
        task.cancel()


# Calls of tasks


@pytest.mark.parametrize("limit", [None, 3600])
async def test_a_call_of_a_task_waits_for_a_place(limit: float | None) -> None:
    """It asks the same service."""
    lock, limiter = Lock(), anyio.CapacityLimiter(2)
    config = TaskConfig(limiter=limiter, shield=True, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(lock.pass_through)
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(task)

    assert lock.was_full(2)
    assert (len(lock.order), limiter.borrowed_tokens) == (7, 0)


async def test_a_call_of_a_sync_task_waits_for_a_place_and_for_no_thread() -> None:
    """As the task itself does."""
    lock, limiter = Lock(), anyio.CapacityLimiter(2)
    lock.gate.set()
    gate = threading.Event()
    async with Supervisor(threads=1) as supervisor:
        await supervisor.schedule(gate.wait).started.wait()
        task = supervisor.task(limiter=limiter).schedule(lock.pass_through_in_thread)
        await task.wait()
        await task()
        gate.set()

    assert (len(lock.order), limiter.borrowed_tokens) == (2, 0)


def in_the_same(function: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Call from the event loop's task that runs the caller."""
    return function


def in_a_child(function: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Call from one that the caller starts and waits for."""

    async def call() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(function)

    return call


def in_a_thread(function: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Call from a thread, by way of the event loop."""
    return functools.partial(anyio.from_thread.run, function)


@pytest.mark.parametrize("limit", [None, 3600])
@pytest.mark.parametrize("place", [in_the_same, in_a_child, in_a_thread])
async def test_who_has_a_place_can_call_a_task_that_needs_one(
    place: Callable[[Callable[[], Awaitable[None]]], Callable[[], Any]], limit: float | None
) -> None:
    """It would wait for itself, and is not let wait; nor is it told that it has a place."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    config = TaskConfig(limiter=limiter, timeout=limit)
    async with Supervisor(config=config) as supervisor:
        other = supervisor.schedule(lock.pass_through)
        await other.wait()
        outer = supervisor.schedule(place(other))
        with anyio.fail_after(10):
            await outer.wait()

    assert (outer.status, len(lock.order), limiter.borrowed_tokens) == (TaskStatus.SUCCEEDED, 2, 0)


async def stray(supervisor: Supervisor, go_on: Callable[[], None]) -> threading.Event:
    """Have a thread that is left alone by its task, and goes on when the event is set."""
    gate = threading.Event()

    def work() -> None:
        gate.wait()
        go_on()

    late = supervisor.task(timeout=0.01).schedule(work)
    with anyio.fail_after(PATIENCE), suppress(TimeoutError):
        await late.wait()
    assert supervisor.running == (late,)
    return gate


async def test_a_thread_that_goes_on_can_call_a_task_that_needs_its_place() -> None:
    """It has it still, though its task is over, and would wait for itself."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    async with Supervisor(config=TaskConfig(limiter=limiter)) as supervisor:
        other = supervisor.schedule(lock.pass_through)
        await other.wait()
        gate = await stray(supervisor, functools.partial(anyio.from_thread.run, other))
        gate.set()
        await idle(supervisor)

    assert (len(lock.order), limiter.borrowed_tokens) == (2, 0)


async def test_what_a_thread_that_goes_on_has_scheduled_waits_for_a_place() -> None:
    """It has copied the thread's context, and has no part in its place."""
    lock, limiter, gate = Lock(), anyio.CapacityLimiter(2), threading.Event()
    waiting: list[int] = []

    def take(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FAILED and event.task.name == "fail":
            limiter.acquire_on_behalf_of_nowait("somebody else")

    async def call(task: Task, error: Exception) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(other)
            await let_others_run()
            waiting.append(limiter.statistics().tasks_waiting)
            limiter.release_on_behalf_of("somebody else")

    def go_on() -> None:
        supervisor.task(name="fail", on_error=call).schedule(fail)
        gate.wait()

    async with Supervisor(config=TaskConfig(limiter=limiter), observers=[take]) as supervisor:
        other = supervisor.schedule(lock.pass_through)
        await other.wait()
        (await stray(supervisor, go_on)).set()
        await until(lambda: bool(waiting))
        gate.set()
        await idle(supervisor)

    assert (waiting, len(lock.order), limiter.borrowed_tokens) == ([1], 2, 0)


async def test_what_a_thread_that_went_on_has_left_in_the_loop_waits_for_a_place() -> None:
    """The thread has given its own away, when it came to its end."""
    lock, limiter, late = Lock(), anyio.CapacityLimiter(1), anyio.Event()

    async def call() -> None:
        await late.wait()
        await other()

    async with (
        Supervisor(config=TaskConfig(limiter=limiter)) as supervisor,
        anyio.create_task_group() as group,
    ):
        other = supervisor.schedule(lock.pass_through)
        await other.wait()
        leave = functools.partial(anyio.from_thread.run_sync, group.start_soon, call)
        (await stray(supervisor, leave)).set()
        await idle(supervisor)
        limiter.acquire_on_behalf_of_nowait("somebody else")
        late.set()
        await let_others_run()
        assert limiter.statistics().tasks_waiting == 1
        limiter.release_on_behalf_of("somebody else")

    assert (len(lock.order), limiter.borrowed_tokens) == (2, 0)


async def test_who_has_taken_a_place_by_hand_can_call_a_task_that_needs_one() -> None:
    """An endpoint, for example, that holds it for its own request."""
    lock, limiter = Lock(), anyio.CapacityLimiter(1)
    async with Supervisor(config=TaskConfig(limiter=limiter)) as supervisor:
        task = supervisor.schedule(lock.pass_through)
        await task.wait()
        async with limiter:
            await task()

    assert (len(lock.order), limiter.borrowed_tokens) == (2, 0)


async def test_a_task_that_calls_itself_does_not_wait_for_itself() -> None:
    """Its own place is enough for both."""
    limiter, calls = anyio.CapacityLimiter(1), list[int]()

    async def turn() -> None:
        calls.append(limiter.borrowed_tokens)
        if len(calls) < 3:
            await current_task()()

    async with Supervisor() as supervisor:
        with anyio.fail_after(10):
            await supervisor.task(limiter=limiter).schedule(turn).wait()

    assert calls == [1, 1, 1]


@pytest.mark.parametrize("function", [fail, fail_in_thread])
@pytest.mark.parametrize("limit", [None, 3600])
async def test_an_error_handler_that_calls_its_task_waits_for_a_place(
    function: Callable[[], Any], limit: float | None
) -> None:
    """The attempt that failed has given its own away."""
    limiter, taken = anyio.CapacityLimiter(1), list[int]()

    async def retry(task: Task, error: Exception) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(call, task)
            await let_others_run()
            taken.append(limiter.statistics().tasks_waiting)
            limiter.release_on_behalf_of("somebody else")

    async def call(task: Task) -> None:
        with suppress(LockError):
            await task()

    def take(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FAILED:
            limiter.acquire_on_behalf_of_nowait("somebody else")

    async with Supervisor(observers=[take], config=TaskConfig(shield=True)) as supervisor:
        config = TaskConfig(limiter=limiter, timeout=limit, on_error=retry)
        supervisor.task(config).schedule(function)

    assert (taken, limiter.borrowed_tokens) == ([1], 0)
