"""Requests over loopback: uvicorn as in production, and wrk as what asks it."""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.request import urlopen

from .environments import PEERS, ROOT, US, Environment, MeasurementFailedError
from .table import Table

SECONDS = 3
CONNECTIONS = 16
ROUNDS = 5
QUICK_ROUNDS = 2
PATIENCE = 30.0
MISSING = (
    "wrk is not on PATH: SKIPPED what it measures over a real server. Install it (Debian calls "
    "the package wrk, and so do most) and run this again."
)
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
"""How many milliseconds each is."""


@dataclass(frozen=True)
class Served:
    """An app that is served."""

    title: str
    environment: str
    contender: str
    how: str


APPS = [
    Served("no task", US, "", "nothing"),
    Served("BackgroundTasks", US, "", "background"),
    Served("BackgroundTasks, in an endpoint that awaits once", US, "", "awaiting"),
    *(
        Served(f"{PEERS[US]['title']}, {how}", US, PEERS[US]["contender"], how)
        for how in ("now", "after_route", "after_response")
    ),
    Served(
        f"{PEERS['released']['title']}, after_response",
        "released",
        PEERS["released"]["contender"],
        "after_response",
    ),
    Served(
        f"{PEERS['taskflow']['title']}, in the place of BackgroundTasks",
        "taskflow",
        "with_taskflow:TaskflowInPlace",
        "after_response",
    ),
]


@dataclass(frozen=True)
class Load:
    """What came out of one run of wrk."""

    rate: float
    """Requests per second."""
    p50: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""


@dataclass
class Server:
    """A server of one app, in a process of its own."""

    app: Served
    loads: list[Load] = field(default_factory=list)

    def start(self) -> None:
        """Start it, and wait until it serves.

        :raises MeasurementFailedError: it does not
        """
        command = [Environment(self.app.environment).python, "-P", "-m", "uvicorn", "--factory"]
        command += ["benchmarks.server_app:create", "--host", "127.0.0.1", "--port", "0"]
        command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
        # Else it looks for packages in this folder, and finds ours in the place of every other one.
        command += ["--app-dir", str(ROOT / "scripts")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "scripts"),
            "BENCH_CONTENDER": self.app.contender,
            "BENCH_HOW": self.app.how,
        }
        self._process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        log = []
        for line in self._process.stderr:
            log.append(line)
            if found := re.search(r"running on (http://[\d.:]+)", line):
                self._url = found[1]
                return
        raise MeasurementFailedError(f"{self.app.title} is not served:\n{''.join(log)}")

    def load(self, seconds: int = SECONDS) -> Load:
        """Send requests for some seconds, and wait for their tasks.

        :raises MeasurementFailedError: a request failed, or its task did not run
        """
        before = self._ran()
        command = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--latency"]
        command += ["--duration", f"{seconds}s", f"{self._url}/work"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        count = int(_find(r"(\d+) requests in", output))
        if "Non-2xx" in output or "Socket errors" in output:
            raise MeasurementFailedError(f"{self.app.title}: {output}")
        if self.app.how != "nothing":
            self._wait_for(before + count)
        return Load(
            float(_find(r"Requests/sec: +([\d.]+)", output)),
            _milliseconds(_find(r"50% +([\d.]+\w+)", output)),
            _milliseconds(_find(r"99% +([\d.]+\w+)", output)),
        )

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ran(self) -> int:
        with urlopen(f"{self._url}/ran", timeout=PATIENCE) as response:
            return int(response.read())

    def _wait_for(self, expected: int) -> None:
        end = time.monotonic() + PATIENCE
        while (ran := self._ran()) < expected:
            if time.monotonic() > end:
                raise MeasurementFailedError(
                    f"{self.app.title}: {ran} of {expected} tasks have run"
                )
            time.sleep(0.1)


def measure(apps: Sequence[Served], rounds: int) -> Mapping[Served, Sequence[Load]]:
    """Load servers in turns, each time in another order.

    :raises MeasurementFailedError: one of them could not be measured
    """
    dice, servers = random.Random(1), [Server(app) for app in apps]
    started: list[Server] = []
    try:
        for server in servers:
            server.start()
            started.append(server)
            server.load(seconds=1)
        for _ in range(rounds):
            dice.shuffle(servers)
            for server in servers:
                server.loads.append(server.load())
            print(".", end="", flush=True)
    finally:
        for server in started:
            server.stop()
    return {server.app: server.loads for server in started}


def is_possible() -> bool:
    """Return whether wrk is there."""
    return shutil.which("wrk") is not None


def comparison(loads: Mapping[Served, Sequence[Load]]) -> Table:
    """Return the table of what came out: medians of all rounds."""
    table = Table(
        [
            "One task per request, over a server",
            "requests/s",
            "÷ BackgroundTasks",
            "p50",
            "p99",
        ]
    )
    base = next(each for app, each in loads.items() if app.how == "background")
    for app, each in loads.items():
        ratios = [mine.rate / other.rate for mine, other in zip(each, base, strict=True)]
        table.rows.append(
            [
                app.title,
                f"{statistics.median(load.rate for load in each):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(load.p50 for load in each):.1f} ms",
                f"{statistics.median(load.p99 for load in each):.1f} ms",
            ]
        )
    return table


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise MeasurementFailedError(f"wrk does not say {pattern!r}:\n{text}")
    return found[1]


def _milliseconds(text: str) -> float:
    number = _find(r"([\d.]+)", text)
    return float(number) * UNITS[text.removeprefix(number)]
