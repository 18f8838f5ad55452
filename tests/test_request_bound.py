"""Arguments that belong to a request: whoever hands one to a task is warned."""

import functools
import io
import math
import sqlite3
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import AsyncMock, MagicMock

import pytest
import sqlalchemy
from fastapi import APIRouter, Depends, FastAPI, Request, Response, UploadFile, WebSocket
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from fastapi_tasks import (
    BoundTasks,
    RequestBoundArgumentWarning,
    Supervisor,
    Tasks,
    TasksRoute,
    TasksScheduler,
    get_supervisor,
    request_bound,
)

from . import asgi
from .conftest import ASYNCIO_BACKENDS
from .endpoints import Kind, both_kinds
from .recording import Observed
from .servers import PATIENCE

URL = "sqlite+aiosqlite://"

Warned = list[warnings.WarningMessage]


async def weigh(parcel: Any, *more: Any, **labels: Any) -> None:
    """Take whatever comes."""


def a_request() -> Request:
    """Return a request as it is in an endpoint."""
    return Request({"type": "http", "method": "GET", "path": "/", "headers": []})


@contextmanager
def warned() -> Iterator[Warned]:
    """Collect the warnings of a block, in which they are no errors."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as a process does."""
    monkeypatch.setattr(request_bound, "_warned", type(request_bound._warned)())


@pytest.fixture
def tasks() -> TasksScheduler:
    """Tasks of no endpoint; use a batch that nobody releases, and nothing is run."""
    return TasksScheduler(Supervisor())


# What is warned of


def a_connection(stack: ExitStack) -> sqlalchemy.Connection:
    """Return an open connection to a database in memory."""
    engine = sqlalchemy.create_engine("sqlite://")
    stack.callback(engine.dispose)
    return stack.enter_context(engine.connect())


BOUND: list[tuple[str, Callable[[ExitStack], Any], str, str]] = [
    ("a Request", lambda _: a_request(), "body cannot be read", "request.url.path"),
    (
        "an HTTPConnection",
        lambda _: HTTPConnection({"type": "http"}),
        "dependencies have opened is closed",
        "connection.url.path",
    ),
    (
        "a WebSocket",
        lambda _: WebSocket({"type": "websocket"}, AsyncMock(), AsyncMock()),
        "closed when its handler has returned",
        "websocket.url.path",
    ),
    ("a Response", lambda _: Response(), "reaches the client", "response.status_code"),
    (
        "a Response (JSONResponse)",
        lambda _: JSONResponse({}),
        "reaches the client",
        "response.status_code",
    ),
    (
        "an UploadFile",
        lambda _: UploadFile(io.BytesIO()),
        "closed when the request is over",
        "await file.read()",
    ),
    ("a Session", lambda _: Session(), "closes it", "open a session in the task"),
    (
        "a scoped_session",
        lambda _: scoped_session(sessionmaker()),
        "closes it",
        "open a session in the task",
    ),
    ("an AsyncSession", lambda _: AsyncSession(), "closes it", "open a session in the task"),
    (
        "an async_scoped_session",
        lambda _: async_scoped_session(async_sessionmaker(), scopefunc=int),
        "closes it",
        "open a session in the task",
    ),
    ("a Connection", a_connection, "back to its pool", "open a connection in the task"),
    (
        "an AsyncConnection",
        lambda _: create_async_engine(URL).connect(),
        "back to its pool",
        "open a connection in the task",
    ),
]


@pytest.mark.parametrize(
    ("shown", "make", "fate", "instead"), [pytest.param(*case, id=case[0]) for case in BOUND]
)
def test_what_belongs_to_a_request_is_warned_of(
    tasks: TasksScheduler, shown: str, make: Callable[[ExitStack], Any], fate: str, instead: str
) -> None:
    """The text has what is scheduled, with what, what becomes of that, and what to pass."""
    with ExitStack() as stack:
        value = make(stack)
        with pytest.warns(RequestBoundArgumentWarning) as seen:
            tasks.after_response.schedule(weigh, value)

    text = str(seen.pop().message)
    assert not seen.list
    assert text.startswith(f"weigh is scheduled with {shown} as its argument 'parcel'. ")
    assert fate in text
    assert instead in text


class ParcelSession(AsyncSession):
    """A session of one's own."""


class DepotSession(ParcelSession):
    """And one that is made of it."""


def test_a_class_of_ones_own_is_warned_of(tasks: TasksScheduler) -> None:
    """It is named, and what it is."""
    with pytest.warns(RequestBoundArgumentWarning, match=r"an AsyncSession \(DepotSession\)"):
        tasks.after_route.schedule(weigh, DepotSession())


@dataclass
class Connection:
    """Has the name of what is warned of."""

    number: int


class LoudProxy:
    """Stands for something else, and minds being asked for what."""

    __class__ = property(int)  # raises a TypeError


def test_what_only_looks_like_it_is_not(tasks: TasksScheduler) -> None:
    """Nothing but a value's own class decides, and no code of the value's runs for it."""
    with sqlite3.connect(":memory:") as connection:
        tasks.after_route.schedule(
            weigh,
            connection,
            Connection(17),
            type("Response", (), {"__module__": None})(),
            LoudProxy(),
            MagicMock(spec=Request),
            async_sessionmaker(),
            Request,
            (a_request(),),
            parcel_label="17",
            on={"request": a_request()},
        )
    connection.close()


@pytest.mark.parametrize("code", ["", "supervisor.schedule(print, object(), key=object())"])
def test_sqlalchemy_is_not_imported_for_it(code: str) -> None:
    """Nor is anything else that an app may not have."""
    code = (
        "import sys, fastapi_tasks; supervisor = fastapi_tasks.Supervisor();"
        f"{code or 'pass'}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert "fastapi_tasks" in imported
    assert not {"sqlalchemy", "sqlmodel", "greenlet"} & set(imported)


# Which argument


def sort_out(first: Any, /, second: Any, *others: Any, van: Any = None, **labels: Any) -> None:
    """Have a parameter of each kind."""


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "shown"),
    [
        (sort_out, (None,), {}, "its argument 'first'"),
        (sort_out, (1, None), {}, "its argument 'second'"),
        (sort_out, (1, 2, None), {}, "its argument 3"),
        (sort_out, (1, 2), {"van": None}, "its argument 'van'"),
        (sort_out, (1, 2), {"Jane Doe": None}, "one of its keyword arguments"),
        (functools.partial(sort_out, 1), (None,), {}, "its argument 'second'"),
        (print, (1, None), {}, "its argument 2"),
        (print, (), {"file": None}, "its argument 'file'"),
        (math.hypot, (None,), {}, "its argument 1"),  # has no signature on all of our Pythons
        (type("", (), {"__call__": sort_out, "__signature__": 3})(), (None,), {}, "its argument 1"),
    ],
)
def test_the_argument_is_named(
    tasks: TasksScheduler,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shown: str,
) -> None:
    """By the parameter that the code has, and never by what came: a client may have sent that."""

    def fill(value: Any) -> Any:
        return a_request() if value is None else value

    with pytest.warns(RequestBoundArgumentWarning) as seen:
        tasks.after_response.schedule(
            func, *map(fill, args), **{key: fill(value) for key, value in kwargs.items()}
        )

    (text,) = [str(warning.message) for warning in seen]
    assert f"with a Request as {shown}. " in text
    assert "Jane Doe" not in text


class Told(Response):
    """Would tell its content to everybody who prints it, and raises instead."""

    __repr__ = __str__ = __format__ = None


def test_the_value_is_not_shown(tasks: TasksScheduler) -> None:
    """A warning ends in a log, where no argument belongs."""
    with pytest.warns(RequestBoundArgumentWarning, match=r"a Response \(Told\)"):
        tasks.after_response.schedule(weigh, parcel=Told("4000-0566"))


# Where, and how often

PLACES: list[Any] = [
    pytest.param(lambda tasks: tasks, id="now"),
    pytest.param(lambda tasks: tasks.after_route, id="after_route"),
    pytest.param(lambda tasks: tasks.after_response, id="after_response"),
    pytest.param(lambda tasks: tasks.task(name="scale"), id="configured"),
    pytest.param(
        lambda tasks: tasks.after_response.task(name="scale").task(shield=True), id="twice"
    ),
]


@both_kinds
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_exact", [True, False], ids=["TasksRoute", "APIRoute"])
async def test_each_endpoint_is_warned_of_once(
    app: FastAPI,
    observed: Observed,
    kind: Kind,
    place: Callable[[TasksScheduler], BoundTasks],
    is_exact: bool,
) -> None:
    """Two of one name are two. The tasks run all the same."""
    router = APIRouter(route_class=TasksRoute) if is_exact else APIRouter()

    def add(path: str) -> None:
        def register(request: Request, tasks: Tasks) -> None:
            place(tasks).schedule(weigh, request)

        router.get(path)(kind(register))

    add("/one")
    add("/other")
    app.include_router(router)

    with warned() as seen:
        async with asgi.lifespan(app):
            for path in ("/one", "/one", "/other", "/one", "/other"):
                await asgi.request(app, path)
            await observed.all_over()

    texts = [str(warning.message) for warning in seen]
    endpoint = "test_each_endpoint_is_warned_of_once.<locals>.add.<locals>.register"
    assert [text.partition(" as ")[0] for text in texts] == [
        f"{endpoint} schedules weigh with a Request"
    ] * 2
    assert observed.kinds().count("finished") == 5


async def test_each_kind_of_argument_is_warned_of(app: FastAPI, observed: Observed) -> None:
    """An endpoint that was told of its request may not know about its file."""

    @app.get("/")
    async def register(request: Request, response: Response, tasks: Tasks) -> None:
        tasks.schedule(weigh, request, UploadFile(io.BytesIO()))
        tasks.after_response.schedule(weigh, 17, response=response, request=request)

    with warned() as seen:
        async with asgi.lifespan(app):
            for _ in range(2):
                await asgi.request(app, "/")
            await observed.all_over()

    shown = [str(warning.message).split(" with ")[1].partition(".")[0] for warning in seen]
    assert shown == [
        "a Request as its argument 'parcel'",
        "an UploadFile as its argument 2",
        "a Response as one of its keyword arguments",
    ]


def test_a_websocket_is_warned_of(app: FastAPI) -> None:
    """Its handler has Tasks, too."""

    @app.websocket("/")
    async def track(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        tasks.schedule(weigh, websocket)
        await websocket.close()

    with (
        pytest.warns(RequestBoundArgumentWarning, match=r"track schedules weigh with a WebSocket"),
        TestClient(app) as client,
        client.websocket_connect("/"),
    ):
        pass


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
async def test_a_session_of_a_dependency_is_warned_of(app: FastAPI, observed: Observed) -> None:
    """It is closed by the time the task runs: SQLAlchemy itself would open it again, silently."""
    engine = create_async_engine(URL)
    make_session = async_sessionmaker(engine)
    used: list[bool] = []

    async def open_session() -> AsyncIterator[AsyncSession]:
        async with make_session() as session:
            await session.execute(sqlalchemy.text("select 1"))
            yield session

    async def count(session: AsyncSession) -> None:
        used.append(session.in_transaction())

    @app.get("/")
    async def register(
        session: Annotated[AsyncSession, Depends(open_session, scope="function")], tasks: Tasks
    ) -> None:
        tasks.schedule(count, session)
        tasks.after_response.schedule(count, session)

    with warned() as seen:
        async with asgi.lifespan(app):
            await asgi.request(app, "/")
            await observed.all_over()
    await engine.dispose()

    assert used == [True, False]
    (warning,) = seen
    assert "schedules" in str(warning.message)
    assert "with an AsyncSession as its argument 'session'" in str(warning.message)


@pytest.mark.parametrize("place", PLACES)
def test_the_warning_is_about_the_line_that_schedules(
    tasks: TasksScheduler, place: Callable[[TasksScheduler], BoundTasks]
) -> None:
    """That is the one to change."""
    here = place(tasks)
    with warned() as seen:
        here.schedule(weigh, a_request())
        here.schedule(sort_out, 17, second=a_request())

    line = test_the_warning_is_about_the_line_that_schedules.__code__.co_firstlineno
    assert [(w.filename, w.lineno - line) for w in seen] == [(__file__, 7), (__file__, 8)]


async def test_outside_of_an_endpoint_each_function_is_warned_of_once() -> None:
    """A start-up hook, a thread or a task has a supervisor and no endpoint."""

    class Scale:
        def weigh(self, parcel: Any) -> None:
            """Be a method, which is a new object each time it is asked for."""

        __call__ = weigh

    def make() -> Callable[..., None]:
        def weigh_inside(parcel: Any) -> None:
            """Be a new function each time."""

        return weigh_inside

    scale = Scale()
    async with Supervisor() as supervisor:
        with warned() as seen:
            for _ in range(3):
                supervisor.schedule(weigh, a_request())
                supervisor.schedule(Scale().weigh, a_request())
                supervisor.schedule(functools.partial(make()), a_request())
                supervisor.schedule(scale, a_request())
                for task in supervisor.running:
                    await task.wait()

    method = "test_outside_of_an_endpoint_each_function_is_warned_of_once.<locals>.Scale"
    assert [str(w.message).partition(" is ")[0].removeprefix(method) for w in seen] == [
        "weigh",
        ".weigh",
        f"{method.removesuffix('Scale')}make.<locals>.weigh_inside",
        "",
    ]


async def test_the_supervisor_of_an_endpoint_warns_too(app: FastAPI) -> None:
    """What is scheduled on it knows no request, but may be handed one."""

    @app.get("/")
    async def register(request: Request) -> None:
        get_supervisor(app).schedule(weigh, request)

    with pytest.warns(RequestBoundArgumentWarning, match=r"^weigh is scheduled with a Request"):
        async with asgi.lifespan(app):
            await asgi.request(app, "/")


async def test_where_warnings_are_errors_nothing_is_scheduled(
    app: FastAPI, observed: Observed
) -> None:
    """And each call is an error, so that a test fails whichever ran before it."""
    raised: list[str] = []

    @app.get("/")
    async def register(request: Request, tasks: Tasks) -> None:
        for place in (tasks, tasks.after_route, tasks.after_response, tasks.task(shield=True)):
            with pytest.raises(RequestBoundArgumentWarning) as error:
                place.schedule(weigh, request)
            raised.append(str(error.value))

    async with asgi.lifespan(app):
        await asgi.request(app, "/")
        assert get_supervisor(app).running == ()

    assert len(raised) == 4
    assert len(set(raised)) == 1
    assert "scheduled" not in observed.kinds()


def test_it_can_be_silenced(tasks: TasksScheduler) -> None:
    """For whoever awaits the task within the endpoint, and so knows better."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequestBoundArgumentWarning)
        tasks.after_response.schedule(weigh, a_request())


def test_what_cannot_be_scheduled_is_no_matter_for_a_warning(tasks: TasksScheduler) -> None:
    """The error comes first: it is about the same line."""
    with pytest.raises(TypeError):
        tasks.schedule(None, a_request())  # type: ignore[arg-type]


# Memory and threads


class Endpoint:
    """An endpoint that is no function, and can be neither hashed nor compared."""

    __eq__ = __hash__ = None


class SlottedEndpoint:
    """One that has no room for a weak reference."""

    __slots__ = ()


def test_an_endpoint_is_not_kept_alive() -> None:
    """Tests make apps by the thousand. One that has a former one's place in memory is another."""
    for _ in range(100):
        endpoint = Endpoint()
        gone = weakref.ref(endpoint)
        tasks = TasksScheduler(Supervisor(), endpoint=endpoint)
        with pytest.warns(RequestBoundArgumentWarning, match=r"^Endpoint schedules weigh"):
            tasks.after_route.schedule(weigh, a_request())
        tasks.after_route.schedule(weigh, a_request())
        del endpoint, tasks
        assert gone() is None


def test_an_endpoint_that_cannot_be_followed_is_known_by_its_class() -> None:
    """It is warned of, and not each time."""
    with warned() as seen:
        for _ in range(2):
            tasks = TasksScheduler(Supervisor(), endpoint=SlottedEndpoint())
            tasks.after_route.schedule(weigh, a_request())

    assert [str(w.message).partition(" with ")[0] for w in seen] == [
        "SlottedEndpoint schedules weigh"
    ]


def test_of_two_threads_at_once_one_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync endpoints run in threads, and their first requests may well come together."""
    tasks = TasksScheduler(Supervisor(), endpoint=weigh)
    shown: list[str] = []

    def schedule() -> None:
        tasks.after_route.schedule(weigh, a_request())

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        shown.append(str(message))
        other = threading.Thread(target=schedule, daemon=True)
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        schedule()

    assert len(shown) == 1


def test_a_finalizer_may_schedule_while_it_is_decided_who_warns(
    monkeypatch: pytest.MonkeyPatch, tasks: TasksScheduler
) -> None:
    """The garbage collector runs when it likes, in the thread that it likes."""

    class Collected(weakref.WeakValueDictionary[Any, Any]):
        def __contains__(self, key: object) -> bool:
            monkeypatch.setattr(request_bound, "_warned", ordinary)
            tasks.after_response.schedule(sort_out, 17, 18, van=a_request())
            return False

    ordinary = request_bound._warned
    monkeypatch.setattr(request_bound, "_warned", Collected())

    with warned() as seen:
        thread = threading.Thread(
            target=lambda: tasks.after_response.schedule(weigh, a_request()), daemon=True
        )
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()

    assert [str(w.message).partition(" ")[0] for w in seen] == ["sort_out", "weigh"]
