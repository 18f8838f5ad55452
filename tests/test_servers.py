"""What is promised, kept by every server that users run us on, or known not to be, and why."""

from __future__ import annotations

import fcntl
import http.client
import itertools
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, StreamEnded

from .promises import Promises
from .servers import (
    GRANIAN,
    GUNICORN,
    GUNICORN_ASGI,
    HYPERCORN,
    HYPERCORN_TRIO,
    KINDS,
    PATIENCE,
    ROOT,
    UVICORN_WORKERS,
    End,
    Kind,
    Output,
    Server,
    serve,
    unmeasured,
)

T = TypeVar("T")
EventType = TypeVar("EventType", bound=Event)

ENOUGH = 50
"""How many requests are answered before the server is told to stop."""


# What is promised, and by whom


promised = Promises(KINDS)
PROMISES = promised.rows
"""By the name of the test."""


# What tests learn from one process, and share


@dataclass(frozen=True)
class Noted:
    """An event that an app noted in its file."""

    process: str
    who: str
    what: str
    resource: str


def read_events(path: Path) -> list[Noted]:
    """Return what an app has noted."""
    return [Noted(*line.split()) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Drained:
    """How a server ended that was told to stop while it was busy."""

    end: End
    answered: list[int]
    """The requests whose whole response came."""
    held: bytes
    """The answer to the request that was open when the signal came."""
    idle: bytes
    """What came on the idle connection, which the client left open: nothing, if it was closed."""
    events: list[Noted]

    def who(self, what: str) -> set[str]:
        """Return whom something happened to."""
        return {event.who for event in self.events if event.what == what}


Shared = Callable[[Callable[[Kind, Path], T], Kind], T]


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared[Any]:
    """Returns what a function returns, called once for each server in all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == "master" else base.parent

    def call_once(function: Callable[[Kind, Path], T], kind: Kind) -> T:
        path = folder / f"{function.__name__} {kind.name}"
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            if not known:
                known = pickle.dumps(function(kind, path.with_suffix(".events")))
                file.write(known)
        result: T = pickle.loads(known)
        return result

    return call_once


def stop_plain(kind: Kind, events: Path) -> End:
    """Stop a server whose app has nothing to do with us."""
    with serve("idle:plain", kind=kind) as server:
        assert server.get("/openapi.json")[0] == 200
        return server.stop()


class Load:
    """Clients that send requests as fast as they are answered, until nobody answers any more.

    :param connect: returns a new connection
    """

    def __init__(self, connect: Callable[[], http.client.HTTPConnection]) -> None:
        self.answered: list[int] = []
        self._connect = connect
        self._numbers = itertools.count()
        self._is_enough = threading.Event()
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def wait_until_enough(self) -> None:
        """Wait until so many requests were answered that the server has a lot to do."""
        assert self._is_enough.wait(PATIENCE), f"only {len(self.answered)} answers came"

    def wait_until_over(self) -> None:
        """Wait until no client gets an answer any more."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _send(self) -> None:
        with closing(self._connect()) as connection, suppress(OSError, http.client.HTTPException):
            while True:
                number = next(self._numbers)
                connection.request("GET", f"/work/{number}")
                assert connection.getresponse().read() == str(number).encode()
                self.answered.append(number)
                if len(self.answered) >= ENOUGH:
                    self._is_enough.set()


def send_half(connection: http.client.HTTPConnection) -> None:
    """Send the first half of a request."""
    connection.putrequest("POST", "/held")
    connection.putheader("Content-Length", "2")
    connection.endheaders(b"o")


def leave_idle(connection: http.client.HTTPConnection, path: str = "/openapi.json") -> None:
    """Send a request, and leave the connection open for more."""
    connection.request("GET", path)
    assert connection.getresponse().read()


def wait_for_hang_up(connection: http.client.HTTPConnection) -> bytes:
    """Wait until a server closes an idle connection, which it does when it stops."""
    assert isinstance(connection.sock, socket.socket)
    return connection.sock.recv(1)


def drain(kind: Kind, events: Path) -> Drained:
    """Stop a server while many tasks run, requests come, one is open and a connection is idle."""
    with (
        serve("loaded:app", kind=kind, events=events) as server,
        closing(server.connect()) as open_,
        closing(server.connect()) as idle,
    ):
        send_half(open_)
        server.said.wait_for("held")
        leave_idle(idle)
        load = Load(server.connect)
        load.wait_until_enough()
        answer = hang_up = b""

        def finish() -> None:
            nonlocal answer, hang_up
            hang_up = wait_for_hang_up(idle)
            open_.send(b"k")
            answer = open_.getresponse().read()
            load.wait_until_over()

        end = server.stop(then=finish)
    return Drained(end, load.answered, answer, hang_up, read_events(events))


@dataclass(frozen=True)
class Visited:
    """What a client and the app of a server saw."""

    answered: list[str]
    """What had happened when the response to a request with three tasks had come."""
    abandoned: list[str]
    """What had happened in the end, after two streams were left that never end."""


THREE_MOMENTS = [
    "now started",
    "returning",
    "after_route started",
    "serialized",
    "sent",
    "after_response started",
]


def lines_until(said: Output, pattern: str, times: int = 1) -> list[str]:
    """Return what an app has said when a line has come so many times."""
    said.wait_for(pattern, times)
    return said.so_far()


def visit(kind: Kind, events: Path) -> Visited:
    """Send a request with tasks at all three moments, and leave the streams of two others.

    One sends nothing more, so that only the server sees it; one does, and might be told.
    """
    with serve("moments:app", kind=kind) as server:
        assert server.get("/coroutine")[0] == 200
        answered = lines_until(server.said, "after_response started")
        for path in ("/endless", "/ticking"):
            with closing(server.connect()) as connection:
                connection.request("GET", path)
                with connection.getresponse() as response:
                    assert response.read(10) == b"first part"
        return Visited(answered, lines_until(server.said, "after_response started", times=3))


# The promises


@promised()
def test_three_moments(kind: Kind, shared: Shared[Visited]) -> None:
    """Tasks start at their three moments, in order, and the response waits for none of them."""
    assert shared(visit, kind).answered == THREE_MOMENTS


@promised()
def test_abandoned_stream(kind: Kind, shared: Shared[Visited]) -> None:
    """A client that leaves in the middle of a stream ends the response: ``after_response`` runs."""
    assert shared(visit, kind).abandoned == [*THREE_MOMENTS, *["after_response started"] * 2]


class Http2:
    """A connection to a server that speaks HTTP/2 from its first byte.

    :param port: where the server listens
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._protocol = H2Connection(H2Configuration(header_encoding="utf-8"))
        self._protocol.initiate_connection()

    def get(self, path: str) -> int:
        """Send a request, and return its stream."""
        stream: int = self._protocol.get_next_available_stream_id()
        headers = {":method": "GET", ":scheme": "http", ":authority": "localhost", ":path": path}
        self._protocol.send_headers(stream, list(headers.items()), end_stream=True)
        self._socket.sendall(self._protocol.data_to_send())
        return stream

    def wait_for(self, event_type: type[EventType], stream: int) -> EventType:
        """Return the first such event of a stream from now on."""
        while True:
            data = self._socket.recv(65536)
            assert data, f"the connection was closed before a {event_type.__name__} came"
            for event in self._protocol.receive_data(data):
                if isinstance(event, event_type) and event.stream_id == stream:
                    return event

    def reset(self, stream: int) -> None:
        """Give up a stream, and leave the connection open."""
        self._protocol.reset_stream(stream)
        self._socket.sendall(self._protocol.data_to_send())

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@promised(kinds=[HYPERCORN, HYPERCORN_TRIO, GRANIAN])
def test_http_2(kind: Kind) -> None:
    """Both hold over HTTP/2 too, where a stream is reset and its connection goes on."""
    with serve("moments:app", kind=kind) as server:
        with closing(server.connect()) as first:
            port = first.port
        with closing(Http2(port)) as connection:
            connection.wait_for(StreamEnded, connection.get("/coroutine"))
            assert lines_until(server.said, "after_response started") == THREE_MOMENTS
            stream = connection.get("/endless")
            assert connection.wait_for(DataReceived, stream).data == b"first part"
            connection.reset(stream)
            said = lines_until(server.said, "after_response started", times=2)
            assert said == [*THREE_MOMENTS, "after_response started"]
            connection.wait_for(StreamEnded, connection.get("/release"))


@promised()
def test_shielded_tasks_finish(kind: Kind, shared: Shared[Drained]) -> None:
    """After SIGTERM under load, every shielded task that has started finishes, threads too."""
    drained = shared(drain, kind)
    kept = {who for who in drained.who("started") if ".kept" in who}
    assert len(kept) >= 6 * ENOUGH
    assert kept <= drained.who("finished")


@promised()
def test_answered_requests(kind: Kind, shared: Shared[Drained]) -> None:
    """Every shielded task that an answered request has scheduled runs to its end, too."""
    drained = shared(drain, kind)
    assert len(drained.answered) >= ENOUGH
    assert drained.who("finished") >= {
        f"{number}.{moment}.{task}"
        for number in drained.answered
        for moment in ("now", "after_route", "after_response")
        for task in ("kept", "kept_in_thread")
    }


@promised()
def test_open_request(kind: Kind, shared: Shared[Drained]) -> None:
    """A request that is open when the signal comes is answered, and then its tasks run."""
    drained = shared(drain, kind)
    assert drained.held == b'"ok"'
    assert "held.after_response.kept" in drained.who("finished")


@promised()
def test_idle_connection(kind: Kind, shared: Shared[Drained]) -> None:
    """A connection that is kept alive and idle is closed by the server, and holds nothing up."""
    drained = shared(drain, kind)
    assert drained.idle == b""
    assert [event.who for event in drained.events].count("lifespan") == 2 * kind.workers


@promised()
def test_unshielded_tasks_are_cancelled(kind: Kind, shared: Shared[Drained]) -> None:
    """Unshielded tasks are cancelled, and none goes on; those in threads are waited for."""
    drained = shared(drain, kind)
    lost = {who for who in drained.who("started") if who.endswith(".lost")}
    assert len(lost) >= 3 * ENOUGH
    assert lost == drained.who("cancelled")
    in_threads = {who for who in drained.who("started") if who.endswith(".lost_in_thread")}
    assert in_threads
    ends = [event.who for event in drained.events if event.what in {"finished", "cancelled"}]
    assert len(ends) == len(set(ends))
    assert lost | in_threads <= set(ends)


@promised()
def test_resources_stay_open(kind: Kind, shared: Shared[Drained]) -> None:
    """What the lifespan holds is open in every task to its end, and is closed last of all."""
    events = shared(drain, kind).events
    last = {event.process: f"{event.who} {event.what}" for event in events}
    assert list(last.values()) == ["lifespan ended"] * kind.workers
    assert {event.resource for event in events if event.who != "lifespan"} == {"open"}


@promised()
def test_exit_status(kind: Kind, shared: Shared[Any]) -> None:
    """The server exits with the status that it has without us."""
    assert shared(drain, kind).end.status == shared(stop_plain, kind).status


@promised()
def test_standard_error(kind: Kind, shared: Shared[Any]) -> None:
    """On standard error there is nothing but its log, and one record of ours from each process."""
    assert shared(stop_plain, kind).ours == []
    drained = shared(drain, kind)
    records = drained.end.ours
    cancelling = r"Shutdown: cancelling lost( x\d+)?, lost_in_thread( x\d+)?"
    processes = {event.process for event in drained.events if event.what == "cancelled"}
    assert len([line for line in records if re.fullmatch(cancelling, line)]) == len(processes)
    late = r"Task lost(_in_thread)? was dropped: the app is shutting down, .*"
    assert all(re.fullmatch(f"{cancelling}|{late}", line) for line in records)


def be_patient(
    kind: Kind,
    events: Path,
    *options: str,
    app: str = "loaded:app",
    seconds: float = 0,
    number: signal.Signals = signal.SIGTERM,
    to_all: bool = False,
    then: Callable[[Server], object] = lambda server: None,
) -> End:
    """Stop a server while one shielded task is running.

    :param seconds: how long that goes on after the shutdown has begun
    :param number: which signal to send
    :param to_all: to all processes of the server
    :param then: is called after the signal was sent
    """
    # A worker that hears of its end twice, from us and from its parent, would be interrupted while
    # coverage writes down what it has measured, as it does at a SIGTERM.
    environment = unmeasured() if to_all else os.environ
    with serve(app, *options, kind=kind, events=events, environment=environment) as server:
        assert server.get(f"/patient/{seconds}")[0] == 200
        return server.stop(number, lambda: then(server), to_all=to_all)


def fate(events: Path) -> list[str]:
    """Return what became of the patient task, and of the lifespan that it ran in."""
    noted = read_events(events)
    (process,) = {event.process for event in noted if event.who == "patient"}
    return [f"{event.who} {event.what}" for event in noted if event.process == process]


FINISHED = ["lifespan opened", "patient started", "patient finished", "lifespan ended"]
CANCELLED = ["lifespan opened", "patient started", "patient cancelled", "lifespan ended"]


@promised(
    limits=dict.fromkeys(
        [HYPERCORN, HYPERCORN_TRIO],
        "Hypercorn's worker processes leave SIGTERM at its default, which is to die at once; they "
        "are to hear of a shutdown from their parent alone (``hypercorn/asyncio/run.py``: signal "
        "handlers are installed only if there is no parent). Set ``KillMode=mixed`` in systemd.",
    )
)
def test_signal_to_all_processes(kind: Kind, tmp_path: Path) -> None:
    """Shielded tasks finish, too, if SIGTERM goes to every process, as it does from systemd."""
    end = be_patient(kind, tmp_path / "events", to_all=True)
    assert fate(tmp_path / "events") == FINISHED
    assert end.ours == []


@promised(
    limits={
        GRANIAN: "granian waits for open requests without end, and has no setting for that; "
        "``--workers-kill-timeout`` kills the worker before its app has heard of the shutdown.",
        GUNICORN_ASGI: "gunicorn's ``asgi`` worker waits for open connections as long as "
        "``graceful_timeout``, and at that moment it is killed (``gunicorn/workers/gasgi.py``, "
        "``_shutdown``; ``gunicorn/arbiter.py``, ``stop``).",
    },
)
def test_endless_request(kind: Kind, tmp_path: Path) -> None:
    """A request that never ends does not keep tasks from being waited for, with these settings."""
    events = tmp_path / "events"
    with (
        serve("loaded:app", *kind.request_limit, kind=kind, events=events) as server,
        closing(server.connect()) as connection,
    ):
        leave_idle(connection, "/patient/0")
        send_half(connection)
        server.said.wait_for("held")
        server.stop()
    assert fate(events) == FINISHED


@promised(
    limits={
        GUNICORN_ASGI: "gunicorn's ``asgi`` worker takes SIGINT and SIGQUIT for a quick end, and "
        "skips the app's shutdown (``gunicorn/workers/gasgi.py``, ``_shutdown``)."
    }
)
def test_second_interrupt(kind: Kind, tmp_path: Path) -> None:
    """After Ctrl+C, a second one while tasks are waited for does not harm shielded ones."""

    def interrupt_again(server: Server) -> None:
        server.said.wait_for("patient takes its time")
        server.signal_all(signal.SIGINT)

    be_patient(
        kind,
        tmp_path / "events",
        seconds=0.5,
        number=signal.SIGINT,
        to_all=True,
        then=interrupt_again,
    )
    assert fate(tmp_path / "events") == FINISHED


@promised(
    limits={
        GRANIAN: "A second signal, while granian waits for open requests, can make its worker hang "
        "for ever, with or without us; then ``--workers-kill-timeout`` kills it.",
        GUNICORN: "gunicorn gives SIGINT back its default in a worker, and uvicorn, when it is "
        "forced to end, raises the SIGINT that it has caught: the worker is dead before a task is "
        "cancelled (``uvicorn_worker/_workers.py``, ``init_signals``; ``uvicorn/server.py``, "
        "``capture_signals``).",
        UVICORN_WORKERS: "A worker of uvicorn's, when it is forced to end, raises the SIGTERM of "
        "its parent that it has caught, and is dead before a task is cancelled "
        "(``uvicorn/server.py``, ``capture_signals``).",
    }
)
def test_forced_end(kind: Kind, tmp_path: Path) -> None:
    """After Ctrl+C, a second one while a request is open cuts no task off without a record."""
    events = tmp_path / "events"
    with (
        serve("loaded:app", *kind.limited(5), kind=kind, events=events) as server,
        closing(server.connect()) as connection,
        closing(server.connect()) as idle,
    ):
        leave_idle(connection, "/patient/0")
        send_half(connection)
        server.said.wait_for("held")
        leave_idle(idle)

        def interrupt_again() -> None:
            wait_for_hang_up(idle)
            server.log.wait_for(kind.passes_on)
            with suppress(ProcessLookupError):  # one was enough for it
                server.signal_all(signal.SIGINT)

        end = server.stop(signal.SIGINT, interrupt_again, to_all=True)
    record = "Task patient was cancelled: by a cancellation that did not come from its supervisor"
    assert fate(events) == FINISHED or record in end.ours


@promised()
def test_limit_of_ours(kind: Kind, tmp_path: Path) -> None:
    """A ``shutdown_timeout`` below the server's own limit ends in good order and in a report."""
    end = be_patient(kind, tmp_path / "events", *kind.limited(10), app="loaded:brief", seconds=60)
    assert fate(tmp_path / "events") == CANCELLED
    assert end.ours == ["Shutdown: cancelling patient"]


@promised(
    limits={
        **dict.fromkeys(
            [HYPERCORN, HYPERCORN_TRIO],
            "Hypercorn cancels the app's shutdown after its ``shutdown_timeout``, by default 60 s.",
        ),
        **dict.fromkeys(
            [GUNICORN, GUNICORN_ASGI],
            "gunicorn kills its workers ``graceful_timeout`` after the signal, by default 30 s.",
        ),
        GRANIAN: "granian kills its workers after ``--workers-kill-timeout``, if that is set.",
    }
)
def test_limit_of_the_server(kind: Kind, tmp_path: Path) -> None:
    """Without a ``shutdown_timeout``, shielded tasks may outlast the server's own limit."""
    be_patient(kind, tmp_path / "events", *kind.limited(2), seconds=2.5)
    assert fate(tmp_path / "events") == FINISHED


@pytest.mark.parametrize("kind", [HYPERCORN, HYPERCORN_TRIO], ids=lambda kind: kind.name)
def test_a_server_that_cancels_the_shutdown_is_reported(kind: Kind, tmp_path: Path) -> None:
    """Who is cut off by a server that does not wait, is named before the server ends.

    By the drain or by the task, whichever the event loop happens to cancel first at its end.
    """
    end = be_patient(kind, tmp_path / "events", *kind.limited(2), seconds=60)
    assert re.match(r"Shutdown: cancelling patient|Task patient was cancelled: ", end.ours[0])


# The documentation


def expected_outcomes() -> dict[tuple[str, str], str | None]:
    """Return what has to come of each test, by its name and its server's: why it has to fail."""
    return {
        (test, kind.name): promise.limits.get(kind)
        for test, promise in PROMISES.items()
        for kind in promise.kinds
    }


def test_the_table_is_up_to_date() -> None:
    """The page for those who deploy has each server, each promise and each limit."""
    script = runpy.run_path(str(ROOT / "scripts" / "servers.py"))
    rows = {test: promise.text for test, promise in PROMISES.items()}
    names = [kind.name for kind in KINDS]
    table = script["render"](rows, names, expected_outcomes())
    assert script["TABLE"].read_text(encoding="utf-8").partition("\n")[2] == table


def test_the_table_says_which_versions_were_measured() -> None:
    """So readers can tell how old it is."""
    script = runpy.run_path(str(ROOT / "scripts" / "servers.py"))
    heading = script["TABLE"].read_text(encoding="utf-8").partition("\n")[0]
    measured = re.findall(r"([a-z][a-z0-9-]*) \d+\.\d+", heading)
    assert set(measured) == {package for kind in KINDS for package in kind.packages}


@pytest.mark.parametrize("server", ["gunicorn", "hypercorn", "granian"])
def test_the_settings_exist(server: str) -> None:
    """The servers know the options that the page for those who deploy tells readers to give."""
    page = (ROOT / "docs" / "servers.rst").read_text(encoding="utf-8")
    commands = re.findall(rf"^ +\$ {server} (.*)$", page, re.MULTILINE)
    options = {word for command in commands for word in command.split() if word.startswith("--")}
    assert options
    known = subprocess.run(
        [sys.executable, "-m", server, "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert options <= set(re.findall(r"--[a-z-]+", known.stdout))
