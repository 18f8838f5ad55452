"""Shows what a ``kill -9`` does to charges that are jobs: nothing that a restart does not mend.

``make demo-durable`` exits with 0, because each charge is completed after the restart. With
``--without-engine`` the same charges are tasks of the process: those that were not completed are
lost with it, and the exit status is 1. If the server cannot be run, it is 2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from operator import attrgetter

from scripts.demo import PATIENCE, Event, Server, failure

ORDERS = range(1, 7)
AT_ONCE = 2
INTRODUCTION = """\
A shop charges {} cards, {} at a time, for a second each. A charge is {}.
"""


def place(port: str, order_id: int) -> tuple[str, Event]:
    """Send an order, and return the id of its charge, and when it was accepted."""
    status, text = _ask(port, "POST", f"/charges/{order_id}")
    if status != 202:
        sys.exit(failure(f"The order was answered with {status}: {text}"))
    job_id: str = json.loads(text)
    return job_id, Event(time.monotonic(), f"charge {order_id}", "accepted", f"as {job_id}")


def wait_until_over(port: str, job_ids: Sequence[str]) -> None:
    """Ask for charges until each of them is over, or nobody knows it."""
    give_up_at = time.monotonic() + PATIENCE
    while any(_is_live(port, job_id) for job_id in job_ids):
        if time.monotonic() > give_up_at:
            break
        time.sleep(0.1)


def _is_live(port: str, job_id: str) -> bool:
    _, text = _ask(port, "GET", f"/charges/{job_id}")
    info = json.loads(text)
    return info is not None and info["finished"] is None


def _ask(port: str, method: str, path: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)) as peer:
        peer.request(method, path, headers={"Connection": "close"})
        response = peer.getresponse()
        return response.status, response.read().decode()


def completed(events: Sequence[Event]) -> set[str]:
    """Return the charges that were completed."""
    return {event.who for event in events if event.what == "completed"}


def in_the_middle(events: Sequence[Event]) -> set[str]:
    """Return the charges that were begun, and not completed."""
    return {event.who for event in events if event.what == "begun"} - completed(events)


def is_busy(events: Sequence[Event]) -> bool:
    """Return whether some charges are completed, some are being made, and others wait."""
    return len(completed(events)) == AT_ONCE and len(in_the_middle(events)) == AT_ONCE


def show(events: Sequence[Event]) -> None:
    """Print a timeline."""
    start = min(event.at for event in events)
    print("\n   seconds\n")
    for event in sorted(events, key=attrgetter("at")):
        line = f"{event.at - start:>10.2f}   {event.who:<9} {event.what:<9} {event.detail}"
        print(line.rstrip())


def judge(before: Sequence[Event], after: Sequence[Event]) -> int:
    """Print what became of each charge, and return the exit status that goes with it."""
    print()
    started_at = after[0].at
    lost = 0
    for order_id in ORDERS:
        name = f"charge {order_id}"
        done = [event.at for event in after if (event.who, event.what) == (name, "completed")]
        if name in completed(before):
            print(f"{name}: completed before the kill")
        elif done:
            how = "it was cut off, and began anew" if name in in_the_middle(before) else "it waited"
            print(f"{name}: completed {done[0] - started_at:.2f} s after the restart: {how}")
        else:
            lost += 1
            print(f"{name}: LOST")
    if lost:
        print(f"\n{lost} of {len(ORDERS)} charges are LOST.")
        return 1
    print(f"\nEach of the {len(ORDERS)} charges was COMPLETED. To see some of them lost, run")
    print("python -m scripts.demo_durable --without-engine")
    return 0


def main() -> int:
    """Run the demo, and return its exit status."""
    parser = argparse.ArgumentParser(description="Show what jobs survive.")
    parser.add_argument(
        "--without-engine", action="store_true", help="lose charges: they are in memory only then"
    )
    without_engine: bool = parser.parse_args().without_engine
    what = "a task of the process" if without_engine else "a job in a SQLite file"
    print(INTRODUCTION.format(len(ORDERS), AT_ONCE, what))
    factory = "in_memory" if without_engine else "durable"
    before: list[Event] = []
    after: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JOBS": f"sqlite:///{folder}/jobs.db"}
        with Server(f"scripts.demo_durable_app:{factory}", environment) as server:
            port = server.wait_until_it_listens()
            placed = [place(port, order_id) for order_id in ORDERS]
            before += [event for _, event in placed]
            server.watch(before, until=is_busy)
            server.kill(before)
        after.append(Event(time.monotonic(), "server", "started", "again"))
        with Server(f"scripts.demo_durable_app:{factory}", environment) as server:
            port = server.wait_until_it_listens()
            after.append(Event(time.monotonic(), "server", "listens", port))
            wait_until_over(port, [job_id for job_id, _ in placed])
            server.terminate(after)
    show([*before, *after])
    return judge(before, after)


if __name__ == "__main__":
    sys.exit(main())
