"""The functions that every engine has to run, here and in workers, and what they note of it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias
from uuid import UUID

import anyio
from pydantic import BaseModel

from fastapi_tasks import Retry, Task, current_task
from fastapi_tasks.engines import EngineAdapter

from .services import PATIENCE

Jobs: TypeAlias = SimpleNamespace
"""The functions below, registered with one engine."""


class Colour(Enum):
    """An enumeration whose values are no names."""

    TEAL = 17


class Item(BaseModel):
    """A part of an order."""

    name: str
    price: Decimal


class Order(BaseModel):
    """A model with models in it."""

    items: list[Item]
    note: str | None = None


class Received(BaseModel):
    """What has arrived of the arguments that were given, and their types."""

    order: Order
    at: datetime
    day: date
    within: timedelta
    order_id: UUID
    colour: Colour
    tags: frozenset[str]
    types: list[str]


class FlakyError(Exception):
    """What passes after a while."""


@dataclass(frozen=True)
class Noted:
    """One thing that a job has noted."""

    what: str
    label: str
    attempt: int
    job_id: str
    pid: int
    at: float


class Trace:
    """What jobs have noted, in one file: each line is whole, whoever is killed.

    :param folder: the test's own
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "trace"
        self._path.touch()
        self._noted: list[Noted] = []
        self._read = 0

    def note(self, what: str, label: str, task: Task | None = None) -> None:
        """Add a line, from within a job."""
        task = task or current_task()
        noted = Noted(what, label, task.attempt, task.id, os.getpid(), time.time())
        # A single write to a file that is opened for appending is never mixed with another one.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, f"{json.dumps(asdict(noted))}\n".encode())
        finally:
            os.close(file)

    def all(self, what: str | None = None, label: str | None = None) -> list[Noted]:
        """Return what was noted, in order; of one kind, or by one job."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self._noted += [Noted(**json.loads(line)) for line in whole.splitlines()]
        return [
            each
            for each in self._noted
            if what in (None, each.what) and label in (None, each.label)
        ]

    async def until(
        self, what: str, label: str | None = None, times: int = 1, patience: float = PATIENCE
    ) -> Noted:
        """Wait until something was noted so many times, and return the last of them."""
        await eventually(
            lambda: len(self.all(what, label)) >= times, patience, lambda: f"{self.all()}"
        )
        return self.all(what, label)[times - 1]

    def gate(self, label: str) -> Path:
        """Return the file whose appearance lets a job end that holds."""
        return self.folder / f"open {label}"


async def eventually(
    condition: Callable[[], bool],
    patience: float = PATIENCE,
    tell: Callable[[], str] = lambda: "",
) -> None:
    """Wait until something holds in the file system, which tells nobody when it changes.

    :param tell: what there is instead, if it does not come to hold
    """
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:g} s: {tell()}"
        await asyncio.sleep(0.02)


def register(engine: EngineAdapter, trace: Trace) -> Jobs:
    """Register the functions with an engine, by names that are the same everywhere.

    :param trace: where they note that they have run
    """

    @engine.task(name="add")
    async def add(left: int, right: int = 2) -> int:
        trace.note("ran", f"{left}+{right}")
        return left + right

    @engine.task(name="add-in-thread")
    def add_in_thread(left: int, right: int) -> int:
        trace.note("ran", f"{left}+{right}")
        return left + right

    @engine.task(name="receive")
    async def receive(
        order: Order,
        at: datetime,
        day: date,
        *,
        within: timedelta,
        order_id: UUID,
        colour: Colour,
        tags: frozenset[str],
    ) -> Received:
        given = [order, at, day, within, order_id, colour, tags]
        return Received(
            order=order,
            at=at,
            day=day,
            within=within,
            order_id=order_id,
            colour=colour,
            tags=tags,
            types=[type(each).__name__ for each in given],
        )

    async def alert(task: Task, error: Exception) -> None:
        trace.note("alerted", f"{type(error).__name__}: {error}", task)

    @engine.task(
        name="flaky",
        retry=Retry(FlakyError, attempts=3, wait_initial=0.2, wait_exp_base=4, wait_jitter=0),
        on_error=alert,
    )
    async def flaky(failures: int) -> str:
        trace.note("tried", "flaky")
        attempt = current_task().attempt
        if attempt <= failures:
            raise FlakyError(f"attempt {attempt}")
        return f"attempt {attempt}"

    @engine.task(name="hold")
    async def hold(label: str) -> str:
        trace.note("began", label)
        try:
            await eventually(trace.gate(label).exists)
        except asyncio.CancelledError:
            trace.note("was cut off", label)
            raise
        trace.note("ended", label)
        return label

    @engine.task(name="report")
    async def report(label: str) -> None:
        current_task().set_progress(3, total=8, message="drawing")
        trace.note("began", label)
        await eventually(trace.gate(label).exists)

    @engine.task(name="count")
    async def count(number: int) -> int:
        trace.note("began", str(number))
        await anyio.sleep(0.05)  # a while in which its worker may be killed
        trace.note("ended", str(number))
        return number

    return Jobs(
        add=add,
        add_in_thread=add_in_thread,
        receive=receive,
        flaky=flaky,
        hold=hold,
        report=report,
        count=count,
    )
