"""Calls that other threads ask the event loop to make, none of which gets lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, TypeAlias

from .spawn import Spawner

__all__ = ["Inbox"]


Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]


class Inbox:
    """Hands calls from threads to the event loop, from its opening to its closing.

    A call that was accepted is made, in the loop's thread and in the order of acceptance, at the
    latest when the inbox is closed.
    """

    def __init__(self) -> None:
        # Whatever holds it may be interrupted by the garbage collector, and that by a __del__ that
        # schedules a task.
        self._lock = RLock()
        self._calls: list[Call] = []
        self._taken: list[Call] = []
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
            # Those who look see each of them until it was made.
            calls, self._calls = self._calls, []
            self._taken = calls
        try:
            for func, args in calls:
                func(*args)
        finally:
            self._taken = []

    def calls(self) -> list[Call]:
        """Return the calls that may not have been made, from any thread."""
        with self._lock:
            return self._taken + self._calls

    def close(self) -> None:
        """Make the calls that have come in, and accept no more. In the loop's thread only."""
        with self._lock:
            self._spawner = None
        self.take()
