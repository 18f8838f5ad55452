"""Servers in processes of their own, as in production, that serve one of ``tests/apps``."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
PATIENCE = 30.0
"""Seconds after which a test fails that waits for something; none takes a tenth of it."""


@dataclass(frozen=True)
class Kind:
    """A way to serve an app: which server, and with which options."""

    name: str
    """What tests and tables call it."""
    packages: tuple[str, ...]
    """Which packages it is made of."""
    command: tuple[str, ...]
    """The module that Python runs, and its options; ``{port}`` stands for a free port."""
    ready: str
    """The line of its log that each worker writes when it serves."""
    log: str
    """What the lines of its log look like."""
    limit: tuple[str, ...]
    """The options that set its own limit to how long it takes to stop, to ``{seconds}``."""
    request_limit: tuple[str, ...]
    """Those that limit how long it waits for open requests, or come closest to that."""
    workers: int = 1
    """How many processes serve the app."""
    passes_on: str = ""
    """The line of its log, if there is one, that says that its workers were told to stop."""

    def limited(self, seconds: int) -> tuple[str, ...]:
        """Return the options with which its own limit is so many seconds."""
        return tuple(option.format(seconds=seconds) for option in self.limit)

    def is_log(self, line: str) -> bool:
        """Return whether a line belongs to the server's own log."""
        return re.match(self.log, line) is not None


def _uvicorn(
    name: str,
    *options: str,
    packages: tuple[str, ...] = (),
    workers: int = 1,
    passes_on: str = "",
) -> Kind:
    command = ("uvicorn", "--host", "127.0.0.1", "--port", "0", "--no-access-log")
    return Kind(
        name,
        ("uvicorn", *packages),
        (*command, "--no-use-colors", *options),
        ready="Application startup complete",
        # With workers it leaves it to Python to close a socket and standard input.
        log=r"(INFO|WARNING|ERROR): {2,5}\S|Exception ignored in: <(socket|_io)|ResourceWarning:",
        limit=("--timeout-graceful-shutdown", "{seconds}"),
        request_limit=("--timeout-graceful-shutdown", "1"),
        workers=workers,
        passes_on=passes_on,
    )


UVICORN = _uvicorn("uvicorn")
UVICORN_H11 = _uvicorn(
    "uvicorn, h11, asyncio", "--http", "h11", "--loop", "asyncio", packages=("h11",)
)
UVICORN_HTTPTOOLS = _uvicorn(
    "uvicorn, httptools, uvloop, --timeout-graceful-shutdown",
    *("--http", "httptools", "--loop", "uvloop", "--timeout-graceful-shutdown", "20"),
    packages=("httptools", "uvloop"),
)
UVICORN_WORKERS = _uvicorn(
    "uvicorn, httptools, asyncio, --workers 2",
    *("--http", "httptools", "--loop", "asyncio", "--workers", "2"),
    packages=("httptools",),
    workers=2,
    passes_on="Waiting for child process",
)
_STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[[A-Z]+\] "
HYPERCORN = Kind(
    "hypercorn, asyncio",
    ("hypercorn",),
    ("hypercorn", "--bind", "127.0.0.1:0"),
    ready="Running on",
    log=_STAMP,
    limit=("--config", "tests/apps/hypercorn.toml"),  # 2 seconds, always: it has no option
    request_limit=("--graceful-timeout", "1"),
)
HYPERCORN_TRIO = replace(
    HYPERCORN,
    name="hypercorn, trio",
    packages=("hypercorn", "trio"),
    command=(*HYPERCORN.command, "--worker-class", "trio"),
)
GRANIAN = Kind(
    "granian",
    ("granian",),
    (
        *("granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}"),
        *("--log-config", "tests/apps/granian.json"),  # else it goes to standard output
    ),
    ready="Started worker",
    log=r"\[[A-Z]+\] ",
    limit=("--workers-kill-timeout", "{seconds}"),
    request_limit=("--workers-kill-timeout", "2"),
)
GUNICORN = Kind(
    "gunicorn, uvicorn-worker",
    ("gunicorn", "uvicorn-worker", "uvicorn"),
    (
        *("gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket"),
        *("--worker-class", "uvicorn_worker.UvicornWorker"),
    ),
    ready="Application startup complete",
    log=_STAMP,
    limit=("--graceful-timeout", "{seconds}"),
    request_limit=("--worker-class", "tests.apps.bounded_worker.BoundedWorker"),
)
GUNICORN_ASGI = Kind(
    "gunicorn, asgi",
    ("gunicorn",),
    ("gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--worker-class", "asgi"),
    ready="ASGI server listening",
    log=_STAMP,
    limit=("--graceful-timeout", "{seconds}"),
    request_limit=("--graceful-timeout", "2"),
)

KINDS = [
    UVICORN_H11,
    UVICORN_HTTPTOOLS,
    UVICORN_WORKERS,
    HYPERCORN,
    HYPERCORN_TRIO,
    GRANIAN,
    GUNICORN,
    GUNICORN_ASGI,
]
"""Every one for which it is measured what it keeps."""


class Output:
    """The lines that a process writes to a pipe, as they come.

    :param pipe: the end to read from
    """

    def __init__(self, pipe: IO[str]) -> None:
        self._lines: list[str] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Return the first match in the lines, once there are so many."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._find(pattern)) >= times or self._is_closed, PATIENCE
            )
            matches = self._find(pattern)
            assert len(matches) >= times, f"{pattern!r} did not come, but {self._lines}"
            return matches[0]

    def so_far(self) -> list[str]:
        """Return the lines that have come."""
        with self._changed:
            return list(self._lines)

    def all(self) -> list[str]:
        """Return every line, once the process is over."""
        self._thread.join(PATIENCE)
        assert self._is_closed
        return self._lines

    def _find(self, pattern: str) -> list[re.Match[str]]:
        return [match for line in self._lines if (match := re.search(pattern, line))]

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._put(line.rstrip("\n"))
        self._put(None)

    def _put(self, line: str | None) -> None:
        with self._changed:
            if line is None:
                self._is_closed = True
            else:
                self._lines.append(line)
            self._changed.notify_all()


@dataclass(frozen=True)
class End:
    """What a server leaves behind."""

    kind: Kind
    """Which server it was."""
    status: int
    """Its exit status, as :mod:`subprocess` gives it."""
    said: list[str]
    """What its app wrote to standard output."""
    log: list[str]
    """What stands on its standard error."""

    @property
    def ours(self) -> list[str]:
        """What stands on standard error beside the server's log, without the tasks' ids."""
        lines = [line for line in self.log if not self.kind.is_log(line)]
        return [re.sub(r" \([0-9a-f]+-\d+\)", "", line) for line in lines]


def unmeasured() -> dict[str, str]:
    """Return the environment of a process in which nobody measures which lines run."""
    return {name: value for name, value in os.environ.items() if "COVERAGE" not in name}


class Server:
    """A process that serves an app.

    :param app: where the app is, below ``tests.apps``
    :param options: more options of the server's
    :param kind: which server it is
    :param events: where the app notes what happens
    :param environment: its environment variables
    """

    def __init__(
        self,
        app: str,
        *options: str,
        kind: Kind = UVICORN,
        events: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.kind = kind
        # It is kept from others, and left to servers that share their port with other processes.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        port = self._reserved.getsockname()[1]
        arguments = [argument.format(port=port) for argument in kind.command]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *arguments, *options, f"tests.apps.{app}"],
            cwd=ROOT,
            env={**environment, "EVENTS": str(events or os.devnull)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin = self.process.stdin
        self.said = Output(self.process.stdout)
        self.log = Output(self.process.stderr)

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, once every worker serves."""
        self.log.wait_for(self.kind.ready, self.kind.workers)
        port = int(self.log.wait_for(r"http://127\.0\.0\.1:(\d+)")[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        give_up_at = time.monotonic() + PATIENCE
        while connection.sock is None:
            assert time.monotonic() < give_up_at, f"nobody listens: {self.log.so_far()}"
            with suppress(ConnectionRefusedError):  # granian is ready a moment after it says so
                connection.connect()
        return connection

    def get(self, path: str) -> tuple[int, bytes]:
        """Send a request, and return the response's status and body."""
        with closing(self.connect()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to each of the server's processes, as a terminal does."""
        os.killpg(self.process.pid, number)

    def stop(
        self,
        number: signal.Signals = signal.SIGTERM,
        then: Callable[[], object] | None = None,
        *,
        to_all: bool = False,
    ) -> End:
        """Send a signal, and return how the server has ended.

        :param then: is called after the signal was sent
        :param to_all: to each of the server's processes, and not to the first alone
        """
        if to_all:
            self.signal_all(number)
        else:
            self.process.send_signal(number)
        if then is not None:
            then()
        status = self.process.wait(PATIENCE)
        return End(self.kind, status, self.said.all(), self.log.all())

    def close(self) -> None:
        """End the process, if it has not ended, and all those that it has started."""
        self.process.terminate()  # a killed one could not write down what of it was covered
        try:
            self.process.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                self.signal_all(signal.SIGKILL)
        self.stdin.close()
        self.said.all()
        self.log.all()
        self._reserved.close()


@contextmanager
def serve(app: str, *options: str, **settings: Any) -> Generator[Server, None, None]:
    """Run a server as long as the block runs.

    :param app: where the app is, below ``tests.apps``
    :param options: more options of the server's
    :param settings: what else :class:`Server` takes
    """
    with closing(Server(app, *options, **settings)) as server:
        yield server
