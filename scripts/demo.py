"""Shows on a real server what starts when, and what a SIGTERM does to it.

``python scripts/demo.py`` exits with 0, because the payment outlives the signal. With
``--without-shield`` the same payment is like any other task: it is lost, and the exit status is 1.
If the server cannot be run, it is 2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from threading import Timer
from types import MappingProxyType, TracebackType
from typing import Self

ROOT = Path(__file__).parents[1]
ORDER = {"item": "teapot", "cents": 4200, "email": "ada@example.org"}
PATIENCE = 40.0  # seconds: more than the app takes to shut down, whatever its tasks do
ENDS = {"finished", "failed", "cancelled", "dropped"}
INTRODUCTION = """\
A shop takes orders. The fraud check of one starts at once, the audit record when the endpoint
has returned, the payment and the email after the response. The payment is {}.
"""
MOMENTS = {
    "check_fraud": "at once, beside the endpoint",
    "drain": "the server takes no more requests",
    "record_audit": "the endpoint has returned",
    "take_payment": "the response is over",
    "send_email": "the response is over",
}


@dataclass(frozen=True)
class Event:
    """Something that happened, here or in the server."""

    at: float
    who: str
    what: str
    detail: str = ""
    id: str = ""


class Server:
    """A uvicorn process on a free port of the loopback interface.

    :param factory: what makes the app, and the module that it is in
    :param environment: more environment variables
    """

    def __init__(self, factory: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", factory]
        command += ["--app-dir", str(ROOT), "--host", "127.0.0.1", "--port", "0"]
        command += ["--log-level", "info", "--no-access-log", "--no-use-colors"]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._log: list[str] = []
        # Its output is read without a time limit: should it hang, its death ends the reading.
        self._watchdog = Timer(PATIENCE, self._process.kill)
        self._watchdog.daemon = True

    def __enter__(self) -> Self:
        self._watchdog.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Which process it is."""
        return self._process.pid

    def wait_until_it_listens(self) -> str:
        """Return the port, as soon as the server answers there."""
        events: list[Event] = []
        self.watch(events, until=lambda events: len(events) > 0)
        return events[0].detail

    def watch(self, events: list[Event], until: Callable[[Sequence[Event]], bool]) -> None:
        """Collect what happens in the server until it is enough."""
        while not until(events):
            event = self._next_event()
            if event is None:
                sys.exit(failure("The server has ended, or it hung. Its log:", *self._log))
            events.append(event)

    def terminate(self, events: list[Event]) -> None:
        """Send the server a SIGTERM, and collect what happens until it is gone."""
        self._send(signal.SIGTERM, events)

    def kill(self, events: list[Event]) -> None:
        """Kill the server, as a power cut does, and collect what happened until it is gone."""
        self._send(signal.SIGKILL, events)

    def _send(self, number: signal.Signals, events: list[Event]) -> None:
        events.append(Event(time.monotonic(), number.name, "sent", f"to process {self.pid}"))
        self._process.send_signal(number)
        while (event := self._next_event()) is not None:
            events.append(event)
        status = self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        events.append(Event(time.monotonic(), "server", "ended", how))

    def _next_event(self) -> Event | None:
        """Return what happens next, and ``None`` when the server is gone."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return Event(**json.loads(line))
            self._log.append(line.rstrip())
            if listens := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                return Event(time.monotonic(), "server", "listens", listens[1])
        return None


def place_order(port: str) -> Event:
    """Send an order, wait for the answer, and return when the order was sent."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    sent_at = time.monotonic()
    try:
        connection.request("POST", "/orders", json.dumps(ORDER), headers)
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    if response.status != 202:
        sys.exit(failure(f"The order was answered with {response.status} {response.reason}."))
    waited = f"the answer came after {(time.monotonic() - sent_at) * 1000:.0f} ms"
    return Event(sent_at, "POST /orders", "sent", waited)


def everything_is_over(events: Sequence[Event]) -> bool:
    """Return whether the response was sent and every task that was scheduled has ended."""
    scheduled = {event.id for event in events if event.what == "scheduled"}
    ended = {event.id for event in events if event.what in ENDS}
    return any(event.who == "response" for event in events) and scheduled == ended


def payment_and_email_run(events: Sequence[Event]) -> bool:
    """Return whether both tasks have started."""
    return {"take_payment", "send_email"} <= {e.who for e in events if e.what == "started"}


def show(title: str, events: Sequence[Event]) -> None:
    """Print a timeline."""
    requested_at = _moment("POST /orders", events)
    signal_at = _moment("SIGTERM", events)
    print(f"\n{title}\n")
    if signal_at == math.inf:
        print("      ms since", "       request", sep="\n")
    else:
        print("      ms since   ms since", "       request    SIGTERM", sep="\n")
    for event in sorted(events, key=attrgetter("at")):
        if event.what == "scheduled":
            continue
        since_request = f"{(event.at - requested_at) * 1000:.1f}"
        since_signal = f"{(event.at - signal_at) * 1000:.1f}" if event.at >= signal_at else ""
        detail = MOMENTS[event.who] if event.what == "started" else event.detail
        line = f"{since_request:>14} {since_signal:>10}   {event.who:<13} {event.what:<10} {detail}"
        print(line.rstrip())


def judge(events: Sequence[Event]) -> int:
    """Print what became of the payment, and return the exit status that goes with it."""
    ends = [event for event in events if event.who == "take_payment" and event.what in ENDS]
    end = ends[0] if ends else Event(events[-1].at, "take_payment", "gone with the server")
    after = (end.at - _moment("SIGTERM", events)) * 1000
    if after < 0:
        return failure("This machine is too slow: the payment was over before the SIGTERM.")
    if end.what != "finished":
        print(f"\nThe payment is LOST: {end.what} {after:.0f} ms after the SIGTERM.")
        return 1
    print(f"\nThe payment is SAFE: finished {after:.0f} ms after the SIGTERM, and then the server")
    print("ended. Run the demo with --without-shield to see it lost.")
    return 0


def failure(*lines: str) -> int:
    """Say why nothing can be shown, and return the exit status that goes with it."""
    print(*lines, sep="\n", file=sys.stderr)
    return 2


def _moment(who: str, events: Sequence[Event]) -> float:
    """Return when something happened first; if it did not, that is never."""
    return min((event.at for event in events if event.who == who), default=math.inf)


def main() -> int:
    """Run the demo, and return its exit status."""
    parser = argparse.ArgumentParser(description="Show when tasks start, and who outlives SIGTERM.")
    parser.add_argument(
        "--without-shield", action="store_true", help="lose the payment: it is not shielded then"
    )
    without_shield: bool = parser.parse_args().without_shield
    print(INTRODUCTION.format("not shielded" if without_shield else "shielded"))
    factory = "unshielded" if without_shield else "shielded"
    with Server(f"scripts.demo_app:{factory}") as server:
        port = server.wait_until_it_listens()
        print(f"uvicorn serves docs/examples/orders.py on 127.0.0.1:{port}, process {server.pid}.")

        quiet = [place_order(port)]
        server.watch(quiet, until=everything_is_over)
        show("The first order, on a quiet day", quiet)

        disturbed = [place_order(port)]
        server.watch(disturbed, until=payment_and_email_run)
        server.terminate(disturbed)
        show("The second order, and a SIGTERM during its payment and its email", disturbed)
    return judge(disturbed)


if __name__ == "__main__":
    sys.exit(main())
