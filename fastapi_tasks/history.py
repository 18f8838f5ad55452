"""What a supervisor remembers of tasks that are over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from .info import Record, TaskInfo, info_of
from .tasks import Task, record_of

__all__ = ["History"]


class History:
    """The latest tasks that are over, as records: no task, function, argument or error is kept.

    It is written in the event loop's thread, and in threads that give a task up; it is read in
    any.

    :param size: how many there are at most; 0: none
    """

    def __init__(self, size: int) -> None:
        self._records: deque[Record] = deque(maxlen=size)
        # No method of ours, since each task ends here.
        self.remember: Callable[[Record], None] = self._records.append
        """Remember a task as it is, by its record."""

    def infos(self, ended: Iterable[Task]) -> tuple[TaskInfo, ...]:
        """Return the latest tasks, newest last.

        :param ended: those that are over, too, and will be noted in a moment
        """
        # One that was given up and has ended after all was noted twice: the latest is true.
        latest = {record[:2]: record for record in self._records.copy()}
        if self._records.maxlen:
            latest |= {record[:2]: record for record in map(record_of, ended)}
        size = self._records.maxlen or 0
        return tuple(map(info_of, list(latest.values())[-size:]))

    def find(self, key: tuple[str, int]) -> TaskInfo | None:
        """Return one of them by the two parts of its id, or ``None``."""
        for record in reversed(self._records.copy()):
            if record[:2] == key:
                return info_of(record)
        return None
