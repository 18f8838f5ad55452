"""Calls that other threads ask the event loop to make, none of which gets lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any

from .spawn import Spawner

__all__ = ["Inbox"]


class Inbox:
    """Hands calls from threads to the event loop, from its opening to its closing.

    A call that was accepted is made, in the loop's thread and in the order of acceptance, at the
    latest when the inbox is closed.
    """

    def __init__(self) -> None:
        # Whatever holds it may be interrupted by the garbage collector, and that by a __del__ that
        # schedules a task.
        self._lock = RLock()
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._spawner: Spawner | None = None

    def open(self, spawner: Spawner) -> None:
        """Begin to accept calls.

        :param spawner: the event loop that makes them
        """
        with self._lock:
            self._spawner = spawner

    def put(self, func: Callable[..., object], *args: object) -> bool:
        """Ask for a call, from any thread and at any time.

        :return: whether it was accepted; it is not while the inbox or its event loop is closed
        """
        with self._lock:
            if self._spawner is None:
                return False
            if not self._calls:  # else the loop has been woken up already
                try:
                    self._spawner.call_soon(self.take)
                except RuntimeError:
                    return False
            self._calls.append((func, args))
            return True

    def take(self) -> None:
        """Make the calls that have come in. In the loop's thread only."""
        with self._lock:
            calls, self._calls = self._calls, []
        for func, args in calls:
            func(*args)

    def close(self) -> None:
        """Make the calls that have come in, and accept no more. In the loop's thread only."""
        with self._lock:
            self._spawner = None
        self.take()
