"""What others see of a task: its info and progress, and the supervisor that finds it by its id."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI, Request
from pydantic import ValidationError

from docs.examples import reports
from fastapi_tasks import (
    InvalidSettingError,
    Progress,
    Retry,
    Supervisor,
    Task,
    TaskEvent,
    TaskEventKind,
    TaskInfo,
    Tasks,
    TasksScheduler,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
)
from fastapi_tasks import tasks as tasks_module

from . import asgi, load
from .private import SECRET
from .recording import idle, until
from .servers import PATIENCE

NOON = datetime(2025, 5, 2, 12, tzinfo=UTC)


class SpilledError(Exception):
    """What goes wrong in this module's dairy."""


class Clock:
    """The machine's clock, put on by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now.timestamp()

    def pass_by(self, seconds: float) -> datetime:
        """Let some time pass, and return when that is."""
        self.now += timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that tasks look at."""
    clock = Clock()
    monkeypatch.setattr(tasks_module, "time", clock)
    return clock


async def churn() -> str:
    """Succeed."""
    await anyio.lowlevel.checkpoint()
    return "butter"


async def spill(what: str = "milk") -> None:
    """Fail."""
    raise SpilledError(f"the {what} is on the floor")


async def ripen() -> None:
    """Run until somebody cancels it."""
    await anyio.sleep_forever()


async def over(*tasks: Task) -> None:
    """Wait until tasks are over, whatever they became."""
    with anyio.fail_after(PATIENCE):
        for task in tasks:
            with suppress(SpilledError):
                await task.wait()


# The info of a task


async def test_the_info_follows_the_task(clock: Clock) -> None:
    """Each time is there once it has happened, in UTC."""
    gate = anyio.Event()
    async with Supervisor() as supervisor:
        task = supervisor.task(name="vat").schedule(gate.wait)
        pending = task.info()
        started_at = clock.pass_by(5)
        await task.started.wait()
        running = task.info()
        finished_at = clock.pass_by(7)
        gate.set()
        await over(task)

    common = {"id": task.id, "name": "vat", "created": NOON}
    assert pending == TaskInfo(**common, status=TaskStatus.PENDING, attempt=0)
    assert running == TaskInfo(**common, status=TaskStatus.RUNNING, attempt=1, started=started_at)
    assert task.info() == TaskInfo(
        **common,
        status=TaskStatus.SUCCEEDED,
        attempt=1,
        started=started_at,
        finished=finished_at,
    )
    assert pending.created.utcoffset() == timedelta(0)


async def test_a_failure_is_told_by_its_type_and_text() -> None:
    """There is nothing else of it."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(spill, "cream")
        await over(task)

    info = task.info()
    assert info.status is TaskStatus.FAILED
    assert (info.error_type, info.error) == ("SpilledError", "the cream is on the floor")
    assert info.finished is not None


async def test_the_first_attempt_is_when_a_task_has_started(clock: Clock) -> None:
    """The others are told by their number."""

    async def turn_sour() -> None:
        clock.pass_by(60)
        if current_task().attempt < 3:
            raise SpilledError

    async with Supervisor() as supervisor:
        retry = Retry(SpilledError, wait_initial=0, wait_jitter=0)
        task = supervisor.task(retry=retry).schedule(turn_sour)
        await over(task)

    assert task.info().attempt == 3
    assert task.info().started == NOON
    assert task.info().finished == NOON + timedelta(seconds=180)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_task_that_never_began_has_ended_all_the_same(
    clock: Clock, cancelled: bool
) -> None:
    """Whether it was cancelled or dropped."""
    supervisor = Supervisor()
    ended_at = clock.pass_by(0)
    if cancelled:
        async with supervisor:
            task = supervisor.schedule(churn)
            ended_at = clock.pass_by(3)
            task.cancel()
    else:
        task = supervisor.schedule(churn)

    info = task.info()
    assert (info.status, info.attempt, info.started) == (TaskStatus.CANCELLED, 0, None)
    assert info.finished == ended_at


class WordyError(Exception):
    """Whose text is made when somebody asks for it."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text()


class Word(str):
    """A text that has something with it."""

    __slots__ = ("luggage",)


def refuse() -> str:
    """Raise what no Exception is."""
    raise SystemExit


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (lambda: "", ""),
        (lambda: "a" * 1000, "a" * 1000),
        (lambda: "a" * 10**6, "a" * 997 + "..."),
        (lambda: "butter\n\udcff", "butter\n\\udcff"),
        (lambda: Word("butter"), "butter"),
        (lambda: 1 / 0, "(its text cannot be had)"),
        (refuse, "(its text cannot be had)"),
    ],
)
async def test_any_error_has_a_text_that_can_be_shown(text: Callable[[], str], shown: str) -> None:
    """It is bounded, and JSON takes it, whatever it was."""

    async def fail() -> None:
        raise WordyError(text)

    async with Supervisor() as supervisor:
        task = supervisor.schedule(fail)
        with load.silence():
            await idle(supervisor)
        (kept,) = supervisor.recent

    assert task.info() == kept
    assert (kept.error_type, kept.error) == ("WordyError", shown)
    assert type(kept.error) is str
    assert kept.model_dump_json()


async def test_a_keyboard_interrupt_passes_through_the_text_of_an_error() -> None:
    """It is for whoever started the process."""

    def interrupt() -> str:
        raise KeyboardInterrupt

    error = WordyError(str)

    async def fail() -> None:
        raise error

    async with Supervisor() as supervisor:
        task = supervisor.schedule(fail)
        await idle(supervisor)
    error.text = interrupt  # before, it would end the test
    with pytest.raises(KeyboardInterrupt):
        task.info()


def test_an_info_is_a_model_for_an_api() -> None:
    """Frozen, made of JSON and back, and each field of its schema is described."""
    info = Supervisor().schedule(churn).info()
    with pytest.raises(ValidationError):
        info.status = TaskStatus.RUNNING  # type: ignore[misc]
    assert TaskInfo.model_validate_json(info.model_dump_json()) == info
    for model in (TaskInfo, Progress):
        schema = model.model_json_schema()
        assert all(field["description"] for field in schema["properties"].values())


# Progress


async def test_a_task_says_how_far_it_has_come() -> None:
    """From its own code and from any thread, the latest counts."""
    seen: list[Progress | None] = []

    def skim() -> None:
        task = current_task()
        seen.append(task.progress)
        task.set_progress(1)
        seen.append(task.progress)
        task.set_progress(0.5, 2, "skimming")
        seen.append(task.progress)

    async with Supervisor() as supervisor:
        task = supervisor.schedule(skim)
        await over(task)
        (info,) = supervisor.recent

    last = Progress(done=0.5, total=2, message="skimming")
    assert seen == [None, Progress(done=1), last]
    assert task.progress == info.progress == last


async def test_whole_numbers_stay_whole() -> None:
    """Nobody wants to read of page 3.0."""
    task = Supervisor().schedule(churn)
    task.set_progress(3, 4)
    assert '"done":3,"total":4' in task.info().model_dump_json()


async def test_what_is_said_of_a_task_before_it_begins_is_kept() -> None:
    """Whoever schedules it may know how much there is to do."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(churn)
        task.set_progress(0, 40)
        await over(task)

    assert task.progress == Progress(done=0, total=40)


async def test_a_new_attempt_begins_without_progress() -> None:
    """As it begins the work anew."""
    seen: list[Progress | None] = []

    async def stir() -> None:
        task = current_task()
        seen.append(task.progress)
        if task.attempt == 1:
            task.set_progress(1, 2)
            raise SpilledError

    async with Supervisor() as supervisor:
        retry = Retry(SpilledError, wait_initial=0, wait_jitter=0)
        await over(supervisor.task(retry=retry).schedule(stir))

    assert seen == [None, None]


BAD_PROGRESS: list[tuple[str, tuple[Any, ...]]] = [
    ("done", ("1",)),
    ("done", (None,)),
    ("done", (True,)),
    ("done", (-1,)),
    ("done", (math.nan,)),
    ("done", (math.inf,)),
    ("done", (10**400,)),
    ("done", (Fraction(1, 2),)),
    ("total", (1, 0)),
    ("total", (1, -1)),
    ("total", (1, "2")),
    ("total", (1, math.nan)),
    ("total", (1, math.inf)),
    ("message", (1, 2, 3)),
    ("message", (1, 2, b"skimming")),
]


@pytest.mark.parametrize(("setting", "arguments"), BAD_PROGRESS)
def test_what_is_no_progress_is_refused(setting: str, arguments: tuple[Any, ...]) -> None:
    """The error says which it was; what was said before stays."""
    task = Supervisor().schedule(churn)
    task.set_progress(1)
    with pytest.raises(InvalidSettingError, match=r"set_progress\(") as caught:
        task.set_progress(*arguments)
    assert caught.value.setting == setting
    assert task.progress == Progress(done=1)


def test_a_progress_may_be_odd() -> None:
    """A wrong guess is no reason to lose a task, nor is a talkative message."""
    task = Supervisor().schedule(churn)
    task.set_progress(3, 2, "a" * 2000)
    assert task.progress == Progress(done=3, total=2, message="a" * 997 + "...")


# What a supervisor remembers


async def test_recent_has_those_that_are_over_and_running_has_the_others() -> None:
    """No task is in both, and none is in neither, in the very moment when it ends."""

    def look(event: TaskEvent) -> None:
        if event.kind in {TaskEventKind.FINISHED, TaskEventKind.FAILED, TaskEventKind.DROPPED}:
            check()

    def check() -> None:
        checked.append(
            (
                [info.id for info in supervisor.recent].count(task.id),
                [task.id for task in supervisor.running].count(task.id),
            )
        )

    checked: list[tuple[int, int]] = []
    gate = anyio.Event()
    supervisor = Supervisor(observers=[look])
    async with supervisor:
        task = supervisor.schedule(gate.wait)
        await task.started.wait()
        check()
        gate.set()
        await over(task)
        check()
        await idle(supervisor)
        check()
        task = supervisor.schedule(spill)
        await over(task)
        check()
    task = supervisor.schedule(churn)

    assert checked == [(0, 1)] + [(1, 0)] * 6


async def test_a_failed_task_is_recent_when_its_error_handler_is_over() -> None:
    """Until then it runs, though it has failed."""
    failed, gate = anyio.Event(), anyio.Event()

    async def handle(task: Task, error: Exception) -> None:
        failed.set()
        await gate.wait()

    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=handle).schedule(spill)
        await failed.wait()
        assert (supervisor.running, supervisor.recent) == ((task,), ())
        assert supervisor.find(task.id) == task.info()
        assert task.info().error_type == "SpilledError"
        gate.set()
        await idle(supervisor)
        assert supervisor.recent == (task.info(),)


async def test_tasks_of_every_fate_are_remembered() -> None:
    """The newest last, also those that never began."""
    supervisor = Supervisor()
    dropped = supervisor.schedule(churn)
    async with supervisor:
        succeeded, failed = supervisor.schedule(churn), supervisor.schedule(spill)
        await idle(supervisor)
        unbegun = supervisor.schedule(ripen)
        unbegun.cancel()
        await anyio.lowlevel.checkpoint()
        cancelled = supervisor.schedule(ripen)
        await cancelled.started.wait()

    recent = supervisor.recent
    tasks = [dropped, succeeded, failed, unbegun, cancelled]
    assert sorted(info.id for info in recent) == sorted(task.id for task in tasks)
    assert {info.id: info for info in recent} == {task.id: task.info() for task in tasks}
    assert recent[0].id == dropped.id
    assert recent[-1].id == cancelled.id


async def test_a_task_that_was_abandoned_is_remembered_as_it_was() -> None:
    """It may still be running."""
    gate = anyio.Event()

    async def cling() -> None:
        while not gate.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await gate.wait()

    supervisor = Supervisor(shutdown_timeout=0.01)
    await supervisor.start()
    task = supervisor.schedule(cling)
    await task.started.wait()
    report = await supervisor.drain()

    assert report.abandoned == (task,)
    assert [(info.id, info.status) for info in supervisor.recent] == [(task.id, "running")]
    assert supervisor.find(task.id) == supervisor.recent[0]
    assert not supervisor.cancel(task.id)
    gate.set()
    await over(task)
    await until(lambda: supervisor.recent == (task.info(),))
    assert task.status is not TaskStatus.RUNNING


def test_tasks_of_a_loop_that_was_closed_are_remembered() -> None:
    """Those that ran as cancelled, when the next one starts; those that had failed as that."""
    handling = asyncio.Event()

    async def handle(task: Task, error: Exception) -> None:
        handling.set()
        await anyio.sleep_forever()

    supervisor = Supervisor()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(supervisor.start())
    running, failed = supervisor.schedule(ripen), supervisor.task(on_error=handle).schedule(spill)
    loop.run_until_complete(handling.wait())
    loop.close()

    async def main() -> None:
        async with supervisor:
            assert supervisor.recent == (running.info(), failed.info())
            assert supervisor.find(running.id) == running.info()

    asyncio.run(main())
    assert [info.status for info in supervisor.recent] == ["cancelled", "failed"]
    assert all(info.finished is not None for info in supervisor.recent)


async def test_no_task_is_missed_while_the_loop_takes_what_threads_have_asked_for() -> None:
    """There are several of them, and one after the other gets its turn."""
    found: list[bool] = []

    def look(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.CANCELLED:
            found.append(supervisor.find(scheduled[0].id) is not None)

    def ask() -> None:
        waiting.cancel()
        scheduled.append(supervisor.schedule(churn))

    scheduled: list[Task] = []
    supervisor = Supervisor(observers=[look])
    async with supervisor:
        waiting = TasksScheduler(supervisor).after_response.schedule(churn)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()  # before the loop can take anything
        await over(waiting, *scheduled)

    assert found == [True]


@pytest.mark.parametrize("size", [0, 1, 3])
async def test_as_many_are_remembered_as_were_asked_for(size: int) -> None:
    """The oldest go first; with 0 there are none, not even for a moment."""
    async with Supervisor(history=size) as supervisor:
        tasks: list[Task] = []
        for _ in range(5):
            tasks.append(supervisor.schedule(churn))
            await over(tasks[-1])
        in_that_moment = supervisor.recent
        await idle(supervisor)
        await anyio.lowlevel.checkpoint()
        later = supervisor.recent
        found = [supervisor.find(task.id) is not None for task in tasks]

    ids = [task.id for task in tasks]
    assert [info.id for info in later] == ids[5 - size :]
    assert [info.id for info in in_that_moment] == ids[5 - size :]
    assert found == [False] * (5 - size) + [True] * size


def test_an_app_remembers_a_hundred_tasks() -> None:
    """Unless it is told otherwise."""
    app, other = FastAPI(), FastAPI()
    add_tasks(app)
    add_tasks(other, history=3)
    assert get_supervisor(app).settings.history == 100
    assert get_supervisor(other).settings.history == 3


async def test_nothing_of_a_task_is_kept() -> None:
    """Neither the task, nor its function, argument, error or progress-making."""

    class Milk:
        """What tasks get, and what they raise."""

    class SourError(Exception):
        pass

    def make_tasks(supervisor: Supervisor) -> list[Any]:
        milk = Milk()
        error = SourError(milk)

        async def fail(milk: Milk) -> None:
            raise error

        async def succeed(milk: Milk) -> Milk:
            return milk

        tasks = [supervisor.schedule(fail, milk), supervisor.schedule(succeed, milk)]
        return [weakref.ref(x) for x in (milk, error, fail, succeed, *tasks)]

    with load.silence():
        async with Supervisor() as supervisor:
            seen = make_tasks(supervisor)
            await idle(supervisor)
            await anyio.lowlevel.checkpoint()
            gc.collect()
            assert [each() for each in seen] == [None] * len(seen)
            assert {info.error_type for info in supervisor.recent} == {"SourError", None}


async def test_arguments_are_in_no_info() -> None:
    """Nor in what a model tells of itself."""
    with load.silence():
        async with Supervisor() as supervisor:
            supervisor.schedule(lambda secret: 1 / 0, SECRET)
            supervisor.schedule(lambda secret: secret, SECRET)
            await idle(supervisor)
            shown = "".join(f"{i!r} {i} {i.model_dump_json()}" for i in supervisor.recent)

    assert "ZeroDivisionError" in shown
    assert SECRET not in shown


# By its id


async def test_a_task_is_found_by_its_id_all_its_life() -> None:
    """From the moment on in which it was scheduled, by a thread too."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(churn)
        assert supervisor.find(task.id) == task.info()
        await task.started.wait()
        assert supervisor.find(task.id) == task.info()
        await over(task)
        assert supervisor.find(task.id) == task.info()
        await idle(supervisor)
        assert supervisor.find(task.id) == task.info()

        def schedule() -> bool:
            task = supervisor.schedule(churn)
            found = supervisor.find(task.id)
            return found is not None and found.id == task.id

        assert await anyio.to_thread.run_sync(schedule)

    assert supervisor.find(task.id) == task.info()


async def test_a_dropped_task_is_found_by_an_observer() -> None:
    """Whoever is told of something, finds it."""
    found: list[bool] = []

    def look(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DROPPED:
            found.append(supervisor.find(event.task.id) == event.task.info())

    supervisor = Supervisor(observers=[look])
    supervisor.schedule(churn)
    assert found == [True]


@pytest.mark.parametrize("batch", ["after_route", "after_response"])
@pytest.mark.parametrize("cancel", [True, False])
async def test_a_task_that_waits_for_its_moment_is_found_and_cancelled(
    app: FastAPI, batch: str, cancel: bool
) -> None:
    """As long as its request is open."""
    tasks_seen: list[Task] = []
    answers: list[object] = []

    @app.get("/")
    async def milk(tasks: Tasks) -> None:
        task = getattr(tasks, batch).schedule(churn)
        tasks_seen.append(task)
        supervisor = get_supervisor()
        answers.append(supervisor.find(task.id) == task.info())
        if cancel:
            answers.append(supervisor.cancel(task.id))
            answers.append(supervisor.cancel(task.id))

    async with asgi.lifespan(app):
        await asgi.request(app, "/")
        await over(*tasks_seen)
        (info,) = get_supervisor(app).recent

    assert answers == ([True, True, False] if cancel else [True])
    assert info.status == ("cancelled" if cancel else "succeeded")


@pytest.mark.parametrize("in_thread", [True, False])
async def test_a_running_task_is_cancelled_by_its_id(in_thread: bool) -> None:
    """Once, from the loop and from any thread."""
    async with Supervisor() as supervisor:
        task, other = supervisor.schedule(ripen), supervisor.schedule(ripen)
        await other.started.wait()
        if in_thread:
            assert await anyio.to_thread.run_sync(supervisor.cancel, task.id)
        else:
            assert supervisor.cancel(task.id)
        await over(task)
        assert task.status is TaskStatus.CANCELLED
        assert other.status is TaskStatus.RUNNING
        assert not supervisor.cancel(task.id)
        await until(lambda: supervisor.running == (other,))
        assert not supervisor.cancel(task.id)


@pytest.mark.parametrize(
    "wrong",
    ["", "-", "a", "1", "-1", "{run}", "{run}-", "{run}-0", "{run}-01", "{run}-2", "{run}-+1",
     "{run}-1 ", " {run}-1", "{run}-\u0661", "{run}--1", "0-{run}-1", "{run}-" + "1" * 10_000],
)  # fmt: skip
async def test_another_id_finds_and_cancels_nothing(wrong: str) -> None:
    """Whatever a client has sent."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(ripen)
        wrong = wrong.format(run=task.id.partition("-")[0])
        assert supervisor.find(wrong) is None
        assert not supervisor.cancel(wrong)
    assert supervisor.find(wrong) is None


@pytest.mark.parametrize("ask", [Supervisor.find, Supervisor.cancel])
def test_what_is_no_id_is_refused(ask: Callable[[Supervisor, Any], object]) -> None:
    """A task has a cancel of its own."""
    supervisor = Supervisor()
    with pytest.raises(InvalidSettingError, match=r"task_id.*got Task\. .*find\(task\.id\)"):
        ask(supervisor, supervisor.schedule(churn))


# In an app


def test_the_schema_of_an_app_describes_what_it_shows() -> None:
    """One model of ours for each, with their words."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/tasks/{task_id}")
    async def show(task_id: str) -> TaskInfo:
        """Show one."""

    schemas = app.openapi()["components"]["schemas"]
    assert {"TaskInfo", "Progress", "TaskStatus"} <= set(schemas)
    assert schemas["TaskInfo"]["properties"]["created"]["format"] == "date-time"
    assert schemas["Progress"]["properties"]["done"]["type"] == "number"


ORDER: dict[str, Any] = {
    "method": "POST",
    "body": b'{"month": "2025-04"}',
    "headers": {"content-type": "application/json"},
}


async def test_the_example_accepts_shows_and_cancels() -> None:
    """By the address that the answer names."""
    async with asgi.lifespan(reports.app):
        accepted = await asgi.request(reports.app, "/reports", **ORDER)
        location = dict(accepted.sent[0]["headers"])[b"location"].decode()
        shown = await asgi.request(reports.app, location)
        cancelled = await asgi.request(reports.app, location, method="DELETE")
        await over(*get_supervisor(reports.app).running)
        last = await asgi.request(reports.app, location)
        unknown = [
            await asgi.request(reports.app, "/tasks/none", method=method)
            for method in ("GET", "DELETE")
        ]

    assert [accepted.status, shown.status, cancelled.status] == [202, 200, 202]
    assert location == f"/tasks/{accepted.json()['id']}"
    assert shown.json()["status"] == "running"
    assert shown.json()["progress"] == {"done": 0, "total": 40, "message": "page 1"}
    assert last.json()["status"] == "cancelled"
    assert {answer.status for answer in unknown} == {404}
    assert unknown[0].json()["status"] == 404


async def test_a_sync_endpoint_shows_tasks_from_its_thread(app: FastAPI) -> None:
    """What is asked of the supervisor may be asked anywhere."""

    @app.get("/tasks/{task_id}")
    def show(task_id: str, request: Request) -> TaskInfo | None:
        return get_supervisor(request.app).find(task_id)

    async with asgi.lifespan(app):
        task = get_supervisor(app).schedule(ripen)
        answer = await asgi.request(app, f"/tasks/{task.id}")

    assert answer.json()["id"] == task.id
