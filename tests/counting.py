"""Counts what code costs, where that can be counted exactly: no clock is asked."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import fastapi_tasks

_PACKAGE = str(Path(fastapi_tasks.__file__).parent)
# An event of AnyIO's has one of asyncio's in it, and may make it twice.
_EVENTS = {asyncio.Event.__init__.__code__, threading.Event.__init__.__code__}

T = TypeVar("T")


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts the callbacks that it is given."""

    callbacks = 0

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        """Count one more callback: each step of a task is one."""
        self.callbacks += 1
        return super().call_soon(*args, **kwargs)


@dataclass
class Cost:
    """What was done while somebody counted."""

    callbacks: int = 0
    """How many callbacks the event loop was given."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each function of the package was entered; a coroutine, with each resumption."""
    events: int = 0
    """How many ``Event`` objects were made, by anybody."""
    builtins: Counter[str] = field(default_factory=Counter)
    """How often each function written in C was called."""


@contextmanager
def counted() -> Iterator[Cost]:
    """Count what is done in the event loop's thread, in the running :class:`CountingLoop`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, CountingLoop)
    cost = Cost()

    # What the interpreter calls while it profiles is not measured by it.
    def profile(frame: FrameType, event: str, arg: Any) -> None:  # pragma: no cover - so
        if event == "c_call":
            cost.builtins[arg.__qualname__] += 1
        elif event == "call":
            code = frame.f_code
            if code.co_filename.startswith(_PACKAGE):
                cost.calls[code.co_qualname] += 1
            elif code in _EVENTS:
                cost.events += 1

    gc.collect()  # what earlier tests have left may run code when it goes
    before = loop.callbacks
    sys.setprofile(profile)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        cost.callbacks = loop.callbacks - before


def census() -> Counter[str]:
    """Return how many objects there are of each class, that the garbage collector knows of."""
    gc.collect()
    classes = map(type, gc.get_objects())
    return Counter(f"{each.__module__}.{each.__qualname__}" for each in classes)


async def turns(count: int) -> None:
    """Let the event loop come round a number of times: each is one callback."""
    for _ in range(count):
        await asyncio.sleep(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop that counts."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        return runner.run(main)
