"""What users import in their tests: capture_tasks, run_inline and the two ways to wait."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, nullcontext
from contextvars import Context, copy_context
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from fastapi_tasks import (
    FastAPITasksUninitializedAppError,
    InvalidSettingError,
    MisusedTestToolError,
    Retry,
    StillBusyError,
    Supervisor,
    Task,
    TaskFailedError,
    Tasks,
    TasksScheduler,
    add_tasks,
    current_task,
    get_supervisor,
    get_tasks,
)
from fastapi_tasks.testing import (
    CapturedTasks,
    capture_tasks,
    run_inline,
    wait_until_idle,
    wait_until_idle_from_thread,
)

from .asgi import lifespan, request
from .endpoints import Kind, both_kinds
from .recording import Observed, Timeline, let_others_run, until
from .servers import PATIENCE


class Desk(list[str]):
    """What tasks have done, in order; each of them takes a while."""

    async def take(self, parcel: str, *, copies: int = 1) -> None:
        self.append(f"{parcel} begins")
        await let_others_run()
        self.append(f"{parcel} ends")

    def label(self, parcel: str) -> None:
        self.append(f"{parcel} label")

    def schedule(self, tasks: TasksScheduler) -> None:
        """Schedule one task for each moment, the latest first."""
        tasks.after_response.schedule(self.take, "response")
        tasks.after_route.schedule(self.take, "route")
        tasks.schedule(self.take, "now")
        tasks.schedule(self.label, "thread")


@pytest.fixture
def desk() -> Desk:
    """What tasks have done."""
    return Desk()


async def fail(what: str = "lost") -> None:
    """Be a task that fails."""
    raise ConnectionError(what)


def add_endpoint(app: FastAPI, desk: Desk, kind: Kind) -> None:
    """Declare an endpoint that schedules for each moment, and fails if it is told to."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks, fails: bool = False) -> str:
        desk.schedule(tasks)
        if fails:
            raise HTTPException(418)
        desk.append("endpoint returns")
        return "booked in"


# capture_tasks


@both_kinds
def test_a_plain_client_captures_and_runs_nothing(kind: Kind, app: FastAPI, desk: Desk) -> None:
    """No lifespan has to run; each moment has its own tasks, all of them in order."""
    add_endpoint(app, desk, kind)
    with capture_tasks(app) as captured:
        assert TestClient(app).get("/").json() == "booked in"
        assert len(captured) == 4
    assert desk == ["endpoint returns"]
    assert [task.moment for task in captured] == ["after_response", "after_route", "now", "now"]
    assert captured.now[0] is captured.now.assert_scheduled(desk.take, "now")
    assert captured.now[1:] == [captured.assert_scheduled(desk.label, "thread")]
    assert [*captured.after_route] == [captured.after_route.assert_scheduled(desk.take, "route")]
    assert [*captured.after_response] == captured.after_response.of(desk.take)
    assert captured.dropped == []


@both_kinds
async def test_it_captures_in_async_tests(kind: Kind, app: FastAPI, desk: Desk) -> None:
    """With a lifespan around it, and without."""
    add_endpoint(app, desk, kind)
    with capture_tasks(app) as captured:
        await request(app, "/")
    assert len(captured) == 4
    async with lifespan(app):
        with capture_tasks(app) as again:
            await request(app, "/")
            await wait_until_idle(app)
        assert len(again) == 4
        assert desk == ["endpoint returns"] * 2
        await request(app, "/")
        await wait_until_idle(app)
    assert "response ends" in desk  # the app is as it was before


def test_it_captures_a_client_with_a_lifespan(app: FastAPI, desk: Desk) -> None:
    """Whichever of the two blocks is the outer one."""

    @app.get("/")
    def endpoint(tasks: Tasks) -> None:
        desk.schedule(tasks)

    with TestClient(app) as client, capture_tasks(app) as inner:
        client.get("/")
    with capture_tasks(app) as outer, TestClient(app) as client:
        client.get("/")
    assert len(inner) == len(outer) == 4
    assert desk == []


@both_kinds
def test_what_a_failed_request_drops_was_not_scheduled(
    kind: Kind, app: FastAPI, desk: Desk
) -> None:
    """It is listed, as dropped, with the reason."""
    add_endpoint(app, desk, kind)
    with capture_tasks(app) as captured:
        assert TestClient(app).get("/?fails=1").status_code == 418
    assert {task.moment for task in captured} == {"now"}
    assert sorted(task.moment for task in captured.dropped) == ["after_response", "after_route"]
    captured.after_response.assert_not_scheduled(desk.take)
    with pytest.raises(AssertionError, match=r"take\('route'\)  # dropped: the request failed"):
        captured.assert_scheduled(desk.take, "route")


def test_run_if_is_asked(app: FastAPI, desk: Desk) -> None:
    """A task for errors is scheduled by a request that failed, and dropped by one that did not."""

    @app.get("/")
    async def endpoint(tasks: Tasks, fails: bool) -> None:
        tasks.after_response.task(run_if="error").schedule(desk.take, "sorry")
        if fails:
            raise HTTPException(418)

    with capture_tasks(app) as captured:
        TestClient(app).get("/?fails=1")
        assert len(captured) == 1
        TestClient(app).get("/?fails=0")
    assert len(captured) == len(captured.dropped) == 1


def test_what_was_cancelled_before_it_began_was_not_scheduled(app: FastAPI, desk: Desk) -> None:
    """Somebody took it back."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(desk.take, "17").cancel()

    with capture_tasks(app) as captured:
        TestClient(app).get("/")
    captured.assert_not_scheduled(desk.take)


def parcel(number: int, *, size: str = "small") -> None:
    """Have a signature that can be called in several ways."""


WAYS: list[Callable[[TasksScheduler], Task]] = [
    lambda tasks: tasks.schedule(parcel, 17),
    lambda tasks: tasks.schedule(parcel, number=17),
    lambda tasks: tasks.schedule(parcel, 17, size="small"),
    lambda tasks: tasks.schedule(functools.partial(parcel, 17)),
    lambda tasks: tasks.schedule(functools.partial(parcel, size="small"), 17),
]


@pytest.mark.parametrize("schedule", WAYS)
def test_calls_are_compared_by_what_they_do(schedule: Callable[[TasksScheduler], Task]) -> None:
    """By place or by name, by default or by partial: only another argument is another call."""
    with capture_tasks() as captured:
        task = schedule(captured.tasks)
    assert captured.assert_scheduled(parcel, 17) is task
    assert captured.assert_scheduled(parcel, size="small", number=17) is task
    assert captured.assert_scheduled(functools.partial(parcel, 17)) is task
    assert captured.of(parcel) == captured.of(task.func) == [task]
    for args, kwargs in [((18,), {}), ((17,), {"size": "large"}), ((), {}), ((17, 18), {})]:
        with pytest.raises(AssertionError):
            captured.assert_scheduled(parcel, *args, **kwargs)
    with pytest.raises(AssertionError):
        captured.assert_scheduled(print, 17)
    with pytest.raises(AssertionError, match="parcel was scheduled"):
        captured.now.assert_not_scheduled(parcel)
    captured.after_route.assert_not_scheduled(parcel)


def test_builtins_without_a_signature_can_be_captured() -> None:
    """They are compared as they were called."""
    with capture_tasks() as captured:
        captured.tasks.schedule(dict, a=1)
    captured.assert_scheduled(dict, a=1)
    with pytest.raises(AssertionError):
        captured.assert_scheduled(dict, a=2)


def test_a_failed_assertion_lists_what_was_scheduled() -> None:
    """With its arguments, which nothing else of the package shows."""
    with capture_tasks() as captured:
        with pytest.raises(AssertionError) as empty:
            captured.assert_scheduled(parcel, 17)
        captured.tasks.after_response.schedule(parcel, 18, size="x" * 1000)
        captured.tasks.schedule(functools.partial(parcel, 19))
    assert str(empty.value) == "parcel(17) was not scheduled.\nNothing was scheduled."
    with pytest.raises(AssertionError) as other:
        captured.now.assert_scheduled(parcel, 17)
    first, *rest = str(other.value).splitlines()
    assert first == "parcel(17) was not scheduled for now."
    assert rest[0] == "Scheduled were:"
    assert rest[1].startswith("  after_response  parcel(18, size='xxx")
    assert len(rest[1]) < 200
    assert rest[2] == "  now             parcel(19)"
    assert "18" not in repr(captured)
    assert repr(captured.now).startswith("<TasksOfMoment [<Task parcel")


def test_a_captured_task_cannot_be_awaited(app: FastAPI, desk: Desk) -> None:
    """The test gets an error instead of hanging, and after it the task is over."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        await tasks.schedule(desk.take, "17").wait()

    with capture_tasks(app) as captured, pytest.raises(MisusedTestToolError, match="run_inline"):
        TestClient(app).get("/")
    (task,) = captured
    assert anyio.run(task.wait) is None
    assert (task.status, task.context) == ("cancelled", None)


def test_tasks_from_anywhere_are_captured(app: FastAPI, desk: Desk) -> None:
    """Outside of requests, from a thread, on a supervisor of one's own, on an override."""
    with capture_tasks(app) as captured:
        get_supervisor(app).schedule(desk.take, "script")
        thread = threading.Thread(target=get_supervisor(app).schedule, args=(desk.take, "thread"))
        thread.start()
        thread.join(PATIENCE)
        app.dependency_overrides[get_tasks] = lambda: TasksScheduler(get_supervisor(app))

        @app.get("/")
        async def endpoint(tasks: Tasks) -> None:
            tasks.after_response.schedule(desk.take, "override")

        TestClient(app).get("/")
    assert [task.args for task in captured] == [("script",), ("thread",), ("override",)]
    captured.after_response.assert_scheduled(desk.take, "override")
    supervisor = Supervisor()
    with capture_tasks(supervisor) as captured:
        supervisor.task(shield=True).schedule(desk.take, "own")
    assert captured.assert_scheduled(desk.take, "own").config.shielded


def test_a_mounted_apps_tasks_are_the_outer_apps(app: FastAPI, desk: Desk) -> None:
    """As everywhere, captured and run."""
    inner = FastAPI()
    add_tasks(inner)
    add_endpoint(inner, desk, lambda function: function)
    app.mount("/inner", inner)
    with capture_tasks(app) as captured, capture_tasks(inner) as nothing:
        TestClient(app).get("/inner/")
    assert (len(captured), len(nothing)) == (4, 0)
    with run_inline(app) as ran:
        TestClient(app).get("/inner/")
        assert desk[-1] == "response ends"
    assert len(ran) == 4


def test_a_full_app_can_be_tested(desk: Desk) -> None:
    """Nothing is live, so nobody is refused."""
    app = FastAPI()
    add_tasks(app, max_tasks=1)
    add_endpoint(app, desk, lambda function: function)
    with capture_tasks(app):
        for _ in range(2):
            assert TestClient(app).get("/").status_code == 200


@pytest.mark.parametrize("tool", [capture_tasks, run_inline])
def test_what_cannot_work_is_refused(app: FastAPI, tool: Callable[[Any], Any]) -> None:
    """Before anything happens, with the line to write instead."""
    for nested in (capture_tasks(app), run_inline(app)):
        with tool(app), pytest.raises(MisusedTestToolError, match="already"):
            nested.__enter__()
    with pytest.raises(FastAPITasksUninitializedAppError, match="add_tasks"):
        tool(FastAPI()).__enter__()
    with pytest.raises(InvalidSettingError, match="FastAPI app"):
        tool("app").__enter__()
    with tool(app):  # all blocks before have cleaned up
        assert get_supervisor(app).stand_in is not None


def test_without_a_tool_the_lifespan_is_asked_for(app: FastAPI, desk: Desk) -> None:
    """And the error names the tool."""
    add_endpoint(app, desk, lambda function: function)
    with capture_tasks(app):
        TestClient(app).get("/")
    with pytest.raises(FastAPITasksUninitializedAppError, match=r"fastapi_tasks\.testing"):
        TestClient(app).get("/")


# run_inline

IN_ORDER = [
    "endpoint returns",
    *("now begins", "now ends", "thread label", "route begins", "route ends"),
    *("response begins", "response ends"),
]


@both_kinds
def test_a_plain_client_returns_when_all_is_over(kind: Kind, app: FastAPI, desk: Desk) -> None:
    """One after the other; a second request, in another event loop, does the same."""
    add_endpoint(app, desk, kind)
    with run_inline(app) as ran:
        for number in (1, 2):
            assert TestClient(app).get("/").json() == "booked in"
            assert desk == IN_ORDER * number
    assert {task.status for task in ran} == {"succeeded"}
    with TestClient(app) as client, run_inline(app):
        client.get("/")
        assert desk == IN_ORDER * 3


@both_kinds
async def test_tasks_run_at_their_moments(
    kind: Kind, app: FastAPI, desk: Desk, timeline: Timeline
) -> None:
    """Those after the route before the response, the others behind it; in any async test."""
    add_endpoint(app, desk, kind)

    async def on_send(message: Any) -> None:
        desk.append(message["type"])

    expected = [*IN_ORDER]
    expected[6:6] = ["http.response.start", "http.response.body"]
    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/", on_send=on_send)
        assert desk == expected
    async with lifespan(app):
        with run_inline(app), anyio.fail_after(PATIENCE):
            await request(app, "/", on_send=on_send)
            assert desk == expected * 2


async def test_those_after_the_response_run_one_after_the_other(app: FastAPI, desk: Desk) -> None:
    """As those before it do."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        for number in (17, 18):
            tasks.after_response.schedule(desk.take, f"{number}")

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk == ["17 begins", "17 ends", "18 begins", "18 ends"]


async def test_background_tasks_come_after_ours(app: FastAPI, desk: Desk) -> None:
    """As in production."""

    @app.get("/")
    async def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(desk.append, "background")
        tasks.after_response.schedule(desk.take, "ours")

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk == ["ours begins", "ours ends", "background"]


async def test_an_endpoint_may_wait_for_its_tasks(app: FastAPI, desk: Desk) -> None:
    """Those before it run then, too; those behind it when their turn comes."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(desk.take, "first")
        second = tasks.schedule(desk.take, "second")
        tasks.schedule(desk.take, "third")
        await second.wait()
        desk.append("endpoint returns")

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk.index("second ends") < desk.index("endpoint returns") < desk.index("third begins")
    assert desk.index("first begins") < desk.index("endpoint returns")


async def test_on_a_plain_route_a_task_runs_while_it_is_awaited(desk: Desk, app: FastAPI) -> None:
    """It was started at once, so there is nothing to be done for it."""
    router = APIRouter()

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        await tasks.schedule(desk.take, "17").wait()
        desk.append("endpoint returns")

    app.include_router(router)
    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk == ["17 begins", "17 ends", "endpoint returns"]


async def test_a_request_may_begin_before_the_block(app: FastAPI, desk: Desk) -> None:
    """Its tasks are run, though nobody waits for them."""
    entered, held = anyio.Event(), anyio.Event()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        entered.set()
        await held.wait()
        desk.schedule(tasks)

    with anyio.fail_after(PATIENCE):
        async with lifespan(app), anyio.create_task_group() as group:
            group.start_soon(request, app, "/")
            await entered.wait()
            with run_inline(app):
                held.set()
                await let_others_run()
                await wait_until_idle(app)
            await wait_until_idle(app)
    assert sorted(desk) == sorted(IN_ORDER[1:])


async def test_a_request_may_end_after_the_block(app: FastAPI, desk: Desk) -> None:
    """From then on its tasks run as always."""
    entered, held = anyio.Event(), anyio.Event()

    async def hold() -> None:
        entered.set()
        await held.wait()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(hold)
        tasks.schedule(desk.take, "17")
        tasks.after_response.schedule(desk.take, "18")

    with anyio.fail_after(PATIENCE):
        async with lifespan(app), anyio.create_task_group() as group:
            with run_inline(app):
                group.start_soon(request, app, "/")
                await entered.wait()
                await let_others_run()
                assert desk == []
            await until(lambda: len(desk) == 4)
            held.set()
    assert sorted(desk) == ["17 begins", "17 ends", "18 begins", "18 ends"]


async def test_a_task_may_wait_for_one_behind_it(app: FastAPI, desk: Desk) -> None:
    """It would wait for ever, if that one had to wait for its turn."""

    async def wait_for(others: list[Task]) -> None:
        await others[0].wait()
        desk.append("waited")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        others: list[Task] = []
        tasks.schedule(wait_for, others)
        others.append(tasks.schedule(desk.take, "17"))

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk == ["17 begins", "17 ends", "waited"]


async def test_what_a_task_schedules_is_waited_for_with_it(app: FastAPI, desk: Desk) -> None:
    """From the loop and from a thread, before the request is over."""

    async def from_loop() -> None:
        get_supervisor().schedule(desk.take, "loop")

    def from_a_thread() -> None:
        get_supervisor().schedule(desk.take, "thread")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(from_loop)
        tasks.after_response.schedule(from_a_thread)

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
        assert desk == ["loop begins", "loop ends", "thread begins", "thread ends"]


@both_kinds
def test_the_end_of_a_plain_route_waits_for_its_tasks(kind: Kind, app: FastAPI, desk: Desk) -> None:
    """Also for those that were scheduled without ``Tasks``."""
    router = APIRouter()

    @router.get("/plain")
    @kind
    def plain(tasks: Tasks) -> None:
        desk.schedule(tasks)

    @app.get("/without")
    @kind
    def without() -> None:
        get_supervisor(app).schedule(desk.take, "17")

    app.include_router(router)
    with run_inline(app):
        TestClient(app).get("/plain")
        assert sorted(desk) == sorted(IN_ORDER[1:])
        assert desk[-2:] == ["response begins", "response ends"]
        TestClient(app).get("/without")
        assert desk[-2:] == ["17 begins", "17 ends"]


def test_a_websocket_and_its_tasks_may_work_hand_in_hand(app: FastAPI, desk: Desk) -> None:
    """They start as always, and the end of the connection waits for them."""

    async def say(websocket: WebSocket) -> None:
        await websocket.send_text("hello")

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        with pytest.warns(UserWarning, match="WebSocket"):
            tasks.schedule(say, websocket)
        tasks.after_response.schedule(desk.take, "17")
        await websocket.receive_text()

    with run_inline(app):
        with TestClient(app).websocket_connect("/") as session:
            assert session.receive_text() == "hello"
            session.send_text("bye")
        assert desk == ["17 begins", "17 ends"]


async def test_what_a_stream_schedules_starts_as_always(app: FastAPI, desk: Desk) -> None:
    """The endpoint has returned by then, and the stream may need it."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            told = anyio.Event()

            async def tell() -> None:
                told.set()

            tasks.schedule(tell)
            await told.wait()
            yield "told"

        return StreamingResponse(parts())

    with run_inline(app), anyio.fail_after(PATIENCE):
        assert (await request(app, "/")).body == b"told"


def test_a_failed_task_fails_the_test(app: FastAPI) -> None:
    """With its own error, when the block is left; ``on_error`` has run by then."""
    told: list[str] = []

    async def tell(task: Task, error: Exception) -> None:
        await let_others_run()
        told.append(f"{task.name}: {error}")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> str:
        tasks.task(on_error=tell).schedule(fail)
        return "booked in"

    def test() -> None:
        with run_inline(app):
            assert TestClient(app).get("/").json() == "booked in"
            assert told == ["fail: lost"]

    with pytest.raises(ConnectionError, match="lost"):
        test()


def test_several_failures_are_a_group(app: FastAPI) -> None:
    """What ``on_error`` raises is one of them, and so is ``SystemExit``, which ends no test run."""

    def broken(task: Task, error: Exception) -> None:
        raise ValueError("no line")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.task(on_error=broken).schedule(fail)
        tasks.schedule(sys.exit, 3)

    with pytest.raises(ExceptionGroup, match="3 failures") as group, run_inline(app):
        TestClient(app).get("/")
    kinds = [type(error) for error in group.value.exceptions]
    assert kinds == [ConnectionError, ValueError, TaskFailedError]
    assert isinstance(group.value.exceptions[2].__cause__, SystemExit)


def test_the_error_of_the_block_counts(app: FastAPI) -> None:
    """It may well be the consequence, so the failure is a note on it, unless it is the failure."""

    @app.get("/")
    async def endpoint(tasks: Tasks, waits: bool = False) -> None:
        task = tasks.schedule(fail)
        if waits:
            await task.wait()

    def test() -> None:
        with run_inline(app):
            TestClient(app).get("/")
            raise KeyError("17")

    with pytest.raises(KeyError) as error:
        test()
    assert error.value.__notes__ == ["A task had failed: ConnectionError: lost"]
    with pytest.raises(ConnectionError) as failure, run_inline(app):
        TestClient(app).get("/?waits=1")
    assert not hasattr(failure.value, "__notes__")


async def test_nothing_is_waited_for(app: FastAPI, observed: Observed) -> None:
    """No delay, and no wait between attempts, whoever says how long; the configuration stays."""
    attempts: list[str] = []
    asked: list[Exception] = []

    async def try_in_vain(name: str) -> None:
        attempts.append(name)
        if attempts.count(name) < 3:
            raise ConnectionError(name)

    def in_an_hour(error: Exception) -> timedelta:
        asked.append(error)
        return timedelta(hours=1)

    def always(error: Exception) -> bool:
        return True

    retries = {
        "type": Retry(ConnectionError, wait_initial=3600, wait_max=3600),
        "wait": Retry(in_an_hour),
        "answer": Retry(always, wait_initial=3600, wait_max=3600),
    }

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        for name, retry in retries.items():
            tasks.task(retry=retry, delay=3600, timeout=100).schedule(try_in_vain, name)
        tasks.task(delay=3600).schedule(try_in_vain, "wait")

    with run_inline(app) as ran, anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert [task.attempt for task in ran] == [3, 3, 3, 1]
    assert [task.config.retry for task in ran] == [*retries.values(), None]
    assert {task.config.delay for task in ran} == {3600}
    assert len(asked) == 2


async def test_a_task_that_is_cancelled_in_the_queue_never_runs(app: FastAPI, desk: Desk) -> None:
    """And nobody waits for it."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(desk.take, "17").cancel()
        tasks.schedule(desk.take, "18")
        tasks.after_route.schedule(desk.take, "19").cancel()

    with run_inline(app) as ran, anyio.fail_after(PATIENCE):
        await request(app, "/")
    assert desk == ["18 begins", "18 ends"]
    assert len(ran.dropped) == 2


async def test_a_request_that_is_cancelled_leaves_its_tasks_alone(app: FastAPI, desk: Desk) -> None:
    """They start as they do in production, and what runs goes on."""
    scope = anyio.CancelScope()

    async def cancel() -> None:
        scope.cancel()
        await let_others_run()
        desk.append("cancelled the request")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(cancel)
        tasks.after_response.schedule(desk.take, "17")

    with run_inline(app), anyio.fail_after(PATIENCE):
        with scope:
            await request(app, "/")
        await wait_until_idle(app)
    assert sorted(desk) == ["17 begins", "17 ends", "cancelled the request"]


def test_outside_of_requests_a_task_is_over_at_once(app: FastAPI, desk: Desk) -> None:
    """In a test that is not async, with a lifespan and without."""
    supervisor = get_supervisor(app)
    with run_inline(app) as ran:
        supervisor.schedule(desk.take, "script")
        assert desk == ["script begins", "script ends"]
        assert not supervisor.is_running
        with TestClient(app):
            supervisor.schedule(desk.label, "served")
            assert desk[2:] == ["served label"]
        cancelled = ran.tasks.after_response.schedule(desk.take, "17")
        cancelled.cancel()
        ran.tasks.after_response.release(failed=False)
    assert len(desk) == 3
    with pytest.raises(ConnectionError), run_inline(supervisor):
        supervisor.schedule(fail)


@pytest.mark.parametrize("has_lifespan", [True, False])
def test_an_endpoint_may_wait_for_a_thread_that_schedules(
    has_lifespan: bool, app: FastAPI, desk: Desk
) -> None:
    """The thread is not held up by a loop that waits for it, and the request waits for the task."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        thread = threading.Thread(target=tasks.schedule, args=(desk.take, "17"), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        desk.append("held up" if thread.is_alive() else "scheduled")

    client = TestClient(app)
    with run_inline(app), client if has_lifespan else nullcontext():
        client.get("/")
        assert desk == ["scheduled", "17 begins", "17 ends"]


async def test_an_async_test_may_wait_for_a_thread_that_schedules(app: FastAPI, desk: Desk) -> None:
    """Also where there is no request, and the loop is the one that waits."""
    supervisor = get_supervisor(app)
    with run_inline(app):
        async with supervisor:
            schedule = functools.partial(supervisor.schedule, desk.take, "17")
            thread = threading.Thread(target=schedule, daemon=True)
            thread.start()
            thread.join(PATIENCE)
            assert not thread.is_alive()
            await wait_until_idle(app)
    assert desk == ["17 begins", "17 ends"]


def test_the_end_of_a_websocket_waits_for_its_tasks(app: FastAPI, desk: Desk) -> None:
    """Though the client's block cancels it."""

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        tasks.after_response.schedule(take_in_thread)
        await websocket.send_text("hello")
        await websocket.close()

    async def take_in_thread() -> None:
        await anyio.to_thread.run_sync(let_go.wait)
        desk.append("taken")

    let_go = threading.Event()
    with run_inline(app):
        with TestClient(app).websocket_connect("/") as session:
            assert session.receive_text() == "hello"
            threading.Timer(0.05, let_go.set).start()
        assert desk == ["taken"]


@pytest.mark.parametrize("has_lifespan", [True, False])
def test_a_task_that_nobody_asked_to_end_fails_the_test(has_lifespan: bool, app: FastAPI) -> None:
    """What it was to do was not done."""

    async def vanish() -> None:
        raise anyio.get_cancelled_exc_class()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(vanish)

    client = TestClient(app)
    with (
        pytest.raises(TaskFailedError, match="vanish"),
        run_inline(app),
        client if has_lifespan else nullcontext(),
    ):
        assert client.get("/").status_code == 200


def test_what_cannot_be_compared_is_not_equal(app: FastAPI) -> None:
    """An assertion still tells what was scheduled."""

    class Array:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        def __repr__(self) -> str:
            return "Array()"

    with capture_tasks(app) as captured:
        get_supervisor(app).schedule(id, Array())
        with pytest.raises(AssertionError, match=r"id\(Array\(\)\)"):
            captured.assert_scheduled(id, Array())


def test_a_tasks_own_thread_is_not_held_up(desk: Desk) -> None:
    """It may have the only place for threads."""
    app = FastAPI()
    add_tasks(app, threads=1)
    supervisor = get_supervisor(app)

    def unpack() -> None:
        supervisor.schedule(desk.label, current_task().name)

    with run_inline(app), TestClient(app):
        supervisor.schedule(unpack)
        wait_until_idle_from_thread(app)
    assert len(desk) == 1


async def test_outside_of_requests_async_code_waits_itself(app: FastAPI, desk: Desk) -> None:
    """A test that does not is told."""
    with run_inline(app), anyio.fail_after(PATIENCE):
        get_supervisor(app).schedule(desk.take, "17")
        await anyio.to_thread.run_sync(get_supervisor(app).schedule, desk.label, "thread")
        await wait_until_idle(app)
        assert sorted(desk) == ["17 begins", "17 ends", "thread label"]
    with pytest.raises(MisusedTestToolError, match="wait_until_idle"), run_inline(app):
        task = get_supervisor(app).schedule(anyio.sleep_forever)
    with anyio.fail_after(PATIENCE):
        await let_others_run()
    assert task.status == "cancelled"

    def test() -> None:
        with run_inline(app):
            get_supervisor(app).schedule(anyio.sleep_forever)
            raise KeyError("17")

    with pytest.raises(KeyError):
        test()
    assert not get_supervisor(app).is_running


async def test_a_task_that_was_cancelled_while_it_ran_was_scheduled(app: FastAPI) -> None:
    """Only one that never begins is dropped."""
    with run_inline(app) as ran, anyio.fail_after(PATIENCE):
        task = get_supervisor(app).schedule(anyio.sleep_forever)
        await task.started.wait()
        task.cancel()
        await wait_until_idle(app)
    assert ([*ran], ran.dropped) == ([task], [])


async def test_what_a_thread_has_scheduled_is_waited_for(desk: Desk) -> None:
    """Though the loop has not heard of it yet."""
    async with Supervisor() as supervisor:
        thread = threading.Thread(target=supervisor.schedule, args=(desk.take, "17"))
        thread.start()
        thread.join(PATIENCE)
        await wait_until_idle(supervisor)
        assert desk == ["17 begins", "17 ends"]


async def test_what_outlives_its_request_starts_as_always(app: FastAPI, desk: Desk) -> None:
    """Somebody has kept the request's tasks."""
    kept: list[tuple[TasksScheduler, Context]] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        kept.append((tasks, copy_context()))

    with run_inline(app), anyio.fail_after(PATIENCE):
        await request(app, "/")
        tasks, context = kept[0]
        context.run(tasks.after_response.schedule, desk.take, "17")
        await wait_until_idle(app)
    assert desk == ["17 begins", "17 ends"]


async def test_a_sync_client_works_in_an_async_test(app: FastAPI, desk: Desk) -> None:
    """Its event loop is another one. Where tasks run in the test's own, that is said."""
    add_endpoint(app, desk, lambda function: function)
    with run_inline(app):
        await request(app, "/")
        TestClient(app).get("/")
        assert desk == IN_ORDER * 2
        held = anyio.Event()
        get_supervisor(app).schedule(held.wait)
        with pytest.raises(MisusedTestToolError, match="another event loop"):
            TestClient(app).get("/")
        held.set()
        await wait_until_idle(app)
    async with lifespan(app):
        with run_inline(app), pytest.raises(MisusedTestToolError, match="another event loop"):
            TestClient(app).get("/")


def test_a_loop_that_is_gone_is_no_obstacle(app: FastAPI, desk: Desk) -> None:
    """A plain client's is gone with each request; a lifespan may come next."""
    add_endpoint(app, desk, lambda function: function)
    with run_inline(app):
        TestClient(app).get("/")
        with TestClient(app) as client:
            client.get("/")
            assert desk == IN_ORDER * 2
    with TestClient(app) as client:
        with run_inline(app):
            client.get("/")
        assert get_supervisor(app).is_running  # it is the lifespan's
    with ExitStack() as stack:
        with run_inline(app):
            TestClient(app).get("/")
            stack.enter_context(TestClient(app))
        assert get_supervisor(app).is_running


# Waiting


async def test_wait_until_idle_waits_for_handlers_and_moments(app: FastAPI) -> None:
    """Several may wait at once."""
    held = anyio.Event()
    over: list[str] = []

    async def handle(task: Task, error: Exception) -> None:
        await held.wait()
        over.append("handled")

    async def wait() -> None:
        await wait_until_idle(app)
        over.append("idle")

    async with lifespan(app), anyio.create_task_group() as group:
        get_supervisor(app).task(on_error=handle).schedule(fail)
        for _ in range(2):
            group.start_soon(wait)
        await let_others_run()
        assert over == []
        held.set()
    assert over == ["handled", "idle", "idle"]


async def test_wait_until_idle_names_who_is_left(app: FastAPI) -> None:
    """Live tasks by name, and how many requests have tasks that wait."""
    held = anyio.Event()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(fail, "secret")
        await held.wait()

    async with lifespan(app), anyio.create_task_group() as group:
        get_supervisor(app).task(name="holding").schedule(held.wait)
        group.start_soon(request, app, "/")
        await let_others_run()
        with pytest.raises(StillBusyError, match=r"After 0.01 s .* holding \(.*moments: 1"):
            await wait_until_idle(app, timeout=timedelta(seconds=0.01))
        held.set()
        await wait_until_idle(app)
        with pytest.raises(MisusedTestToolError, match="await wait_until_idle"):
            wait_until_idle_from_thread(app)
        with pytest.raises(MisusedTestToolError, match="from_thread"):
            await anyio.to_thread.run_sync(anyio.run, wait_until_idle, app)


def test_wait_until_idle_from_thread_does_the_same(app: FastAPI, desk: Desk) -> None:
    """Beside a client whose loop is in another thread."""
    entered = threading.Event()
    held = threading.Event()

    def hold_loop() -> None:
        entered.set()
        held.wait(PATIENCE)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        desk.schedule(tasks)

    with TestClient(app) as client:
        client.get("/")
        wait_until_idle_from_thread(app)
        assert "response ends" in desk
        forever = get_supervisor(app).task(name="forever").schedule(anyio.sleep_forever)
        with pytest.raises(StillBusyError, match="Live: forever"):
            wait_until_idle_from_thread(app, timeout=0)
        forever.cancel()
        get_supervisor(app).call_in_loop(hold_loop)
        assert entered.wait(PATIENCE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastapi_tasks.testing._LOOP_TIME", 0.01)
            with pytest.raises(StillBusyError):
                wait_until_idle_from_thread(app, timeout=0)
        held.set()
        wait_until_idle_from_thread(app)


async def test_where_nothing_runs_nothing_is_waited_for(app: FastAPI) -> None:
    """Before a start, and after a drain; a time that is none is refused all the same."""
    await wait_until_idle(app)
    wait_until_idle_from_thread(app)
    async with Supervisor(grace=10) as supervisor:
        supervisor.schedule(fail)
        await wait_until_idle(supervisor)
        assert supervisor.running == ()
    await wait_until_idle(supervisor)
    with pytest.raises(InvalidSettingError, match="timeout=-1"):
        await wait_until_idle(app, timeout=-1)
    with pytest.raises(InvalidSettingError, match="timeout"):
        wait_until_idle_from_thread(app, timeout="5")  # type: ignore[arg-type]


# Elsewhere

WITH_PYTEST_ASYNCIO = """
import httpx2
import pytest
from fastapi import FastAPI
from fastapi_tasks import Tasks, add_tasks
from fastapi_tasks.testing import capture_tasks, run_inline

app = FastAPI()
add_tasks(app)
done = []

async def note(number: int) -> None:
    done.append(number)

@app.get("/")
async def endpoint(tasks: Tasks) -> None:
    tasks.after_response.schedule(note, 17)

@pytest.mark.MARK
async def test_both() -> None:
    done.clear()
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        with capture_tasks(app) as captured:
            await client.get("/")
        captured.after_response.assert_scheduled(note, 17)
        assert done == []
        with run_inline(app):
            await client.get("/")
            assert done == [17]
"""


@pytest.mark.parametrize(
    ("plugin", "mark", "options"),
    [
        ("pytest_asyncio", "asyncio", ["-o", "asyncio_default_fixture_loop_scope=function"]),
        ("anyio", "anyio", ["-p", "no:asyncio"]),
    ],
)
def test_it_works_with_both_pytest_plugins(
    plugin: str, mark: str, options: list[str], tmp_path: Path
) -> None:
    """In a test run of its own, as a user has it."""
    pytest.importorskip(plugin, reason=f"{plugin} is not installed")
    test = tmp_path / "test_app.py"
    test.write_text(WITH_PYTEST_ASYNCIO.replace("MARK", mark))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    command += ["--rootdir", str(tmp_path), *options, str(test)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


def test_the_package_does_not_import_it() -> None:
    """Whoever serves an app does not pay for its tests."""
    code = "import fastapi_tasks, sys; print([m for m in sys.modules if m.startswith('fastapi_t')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("testing", "captured", "inline"):
        assert f"'fastapi_tasks.{name}'" not in run.stdout


def test_its_names_report_its_module() -> None:
    """A traceback shows the line to write."""
    assert CapturedTasks.__module__ == capture_tasks.__module__ == "fastapi_tasks.testing"
