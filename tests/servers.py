"""uvicorn in a process of its own, as in production, serving one of the apps in ``tests/apps``."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
PATIENCE = 20.0
"""Seconds after which a test fails that waits for something; none takes a tenth of it."""


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

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match in the lines, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(pattern) or self._is_closed, PATIENCE)
            match = self._find(pattern)
            assert match, f"{pattern!r} did not come, but {self._lines}"
            return match

    def so_far(self) -> list[str]:
        """Return the lines that have come."""
        with self._changed:
            return list(self._lines)

    def all(self) -> list[str]:
        """Return every line, once the process is over."""
        self._thread.join(PATIENCE)
        assert self._is_closed
        return self._lines

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next(filter(None, (re.search(pattern, line) for line in self._lines)), None)

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

    status: int
    """Its exit status, as :mod:`subprocess` gives it."""
    said: list[str]
    """What its app wrote to standard output."""
    log: list[str]
    """What stands on its standard error."""


class Server:
    """A uvicorn process that serves an app.

    :param app: where the app is, below ``tests.apps``
    :param options: more options of uvicorn's
    """

    def __init__(self, app: str, *options: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "uvicorn", f"tests.apps.{app}"]
        command += ["--host", "127.0.0.1", "--port", "0"]
        command += ["--no-access-log", "--no-use-colors", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin = self.process.stdin
        self.said = Output(self.process.stdout)
        self.log = Output(self.process.stderr)

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, once the server listens."""
        port = int(self.log.wait_for(r"running on http://127\.0\.0\.1:(\d+)")[1])
        return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def get(self, path: str) -> tuple[int, bytes]:
        """Send a request, and return the response's status and body."""
        with closing(self.connect()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def stop(
        self, number: signal.Signals = signal.SIGTERM, then: Callable[[], object] | None = None
    ) -> End:
        """Send a signal, and return how the server has ended.

        :param then: is called after the signal was sent
        """
        self.process.send_signal(number)
        if then is not None:
            then()
        status = self.process.wait(PATIENCE)
        return End(status, self.said.all(), self.log.all())


@contextmanager
def serve(app: str, *options: str) -> Generator[Server, None, None]:
    """Run a server as long as the block runs.

    :param app: where the app is, below ``tests.apps``
    :param options: more options of uvicorn's
    """
    server = Server(app, *options)
    try:
        yield server
    finally:
        server.process.terminate()  # a killed one could not write down what of it was covered
        try:
            server.process.wait(PATIENCE)
        finally:
            server.process.kill()
        server.stdin.close()
        server.said.all()
        server.log.all()
