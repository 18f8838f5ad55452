"""Event loops of every kind, among them some whose time passes when nothing else can happen, so
that no test has to sleep."""

from __future__ import annotations

import asyncio
import functools
import math
import selectors
from collections.abc import Callable
from typing import Any

import pytest
import trio.testing

Backend = tuple[str, dict[str, Any]]
"""The event loop of a test, as AnyIO's plugin takes it."""

EAGER_TASKS: Any = getattr(asyncio, "eager_task_factory", None)
"""asyncio's way to take a task's first step at once, where this Python has it."""


def asyncio_loop(
    make: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    *,
    task_factory: Any = None,
) -> asyncio.AbstractEventLoop:
    """Return an asyncio loop that says of no step that it was slow, not in debug mode either.

    :param make: what makes it
    :param task_factory: what makes its tasks
    """
    loop = make()
    loop.slow_callback_duration = math.inf
    loop.set_task_factory(task_factory)
    return loop


class FakeClockLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that jumps to its next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: FakeClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        # Without a timeout there is no timer to jump to: only a thread can wake the loop up.
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self._loop.now += timeout
        return ready


def fake_trio_clock() -> trio.testing.MockClock:
    """Return a trio clock that jumps to its next deadline instead of waiting for it."""
    return trio.testing.MockClock(autojump_threshold=0)


eager_loop = functools.partial(asyncio_loop, task_factory=EAGER_TASKS)
eager_fake_clock_loop = functools.partial(eager_loop, FakeClockLoop)


def if_eager(*params: Any) -> tuple[Any, ...]:
    """Return the parameters that need eager tasks, if this Python has any."""
    return params if EAGER_TASKS else ()


FAKE_CLOCKS: list[Any] = [
    pytest.param(lambda: ("asyncio", {"loop_factory": FakeClockLoop}), id="asyncio-fake-clock"),
    *if_eager(
        pytest.param(
            lambda: ("asyncio", {"loop_factory": eager_fake_clock_loop}),
            id="asyncio-eager-fake-clock",
        )
    ),
    pytest.param(lambda: ("trio", {"clock": fake_trio_clock()}), id="trio-fake-clock"),
]


@pytest.fixture(name="anyio_backend", params=FAKE_CLOCKS)
def on_fake_clocks(request: pytest.FixtureRequest) -> Backend:
    """The event loop in a module that imports this: one on which an hour takes no time."""
    backend: Backend = request.param()
    return backend
