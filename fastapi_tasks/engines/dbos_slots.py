"""Who is who among the processes that run jobs of one database: each one holds a slot.

DBOS gives the jobs of a process that has died to the next one of the same name. So a name has to
come back after a crash, and no two processes may have it at once: a lock on a number does both.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, LiteralString, Protocol
from zlib import crc32

import psycopg

from fastapi_tasks.errors import EngineStateError

__all__ = ["AdvisorySlots", "FileSlots", "Slots"]

_MOST = 1000


class Slots(Protocol):
    """Numbers, each of which one process has at a time. Its methods block."""

    @property
    def executor_id(self) -> str:
        """The name of the process, as DBOS is to know it, once a slot was taken."""
        ...

    def take(self) -> str:
        """Take the lowest number that nobody has, until :meth:`release`.

        :return: the executor's id
        :raises EngineStateError: there is none
        """
        ...

    def is_held(self) -> bool:
        """Return whether the slot is still this process's, and take it again if it was lost."""
        ...

    def adopting(self, executor_id: str) -> AbstractContextManager[bool]:
        """Tell whether that executor's process has died; if so, none takes its place meanwhile."""
        ...

    def release(self) -> None:
        """Give the slot back, if one was taken."""
        ...


class _Named:
    """What the two kinds of slots have in common: names.

    :param label: what the engine calls itself
    :param name: of the engine's jobs
    """

    def __init__(self, label: str, name: str) -> None:
        self._label = label
        self._name = name
        self._number = 0

    @property
    def executor_id(self) -> str:
        return f"{self._name}-{self._number}"

    def _number_of(self, executor_id: str) -> int | None:
        found = re.fullmatch(rf"{re.escape(self._name)}-([1-9][0-9]{{0,3}})", executor_id)
        return None if found is None else int(found[1])

    def _none_left(self) -> EngineStateError:
        return EngineStateError(
            f"{self._label}: {_MOST} processes run its jobs already",
            instead="worker=False in those that only enqueue",
        )


class FileSlots(_Named):
    """Locks on files beside a SQLite database, which end with the process that holds them.

    :param label: what the engine calls itself
    :param name: of the engine's jobs
    :param database: the file that the locks lie beside
    :raises EngineStateError: the system has no such locks
    """

    def __init__(self, label: str, name: str, database: Path) -> None:
        super().__init__(label, name)
        self._database = database
        self._file: IO[bytes] | None = None
        try:
            import fcntl
        except ImportError:
            raise EngineStateError(
                f"{label} keeps its processes apart by flock(), which this system does not have",
                instead='DBOSEngine("postgresql://...")',
            ) from None
        self._fcntl = fcntl

    def take(self) -> str:
        for self._number in range(1, _MOST + 1):
            self._file = self._locked(self._number)
            if self._file is not None:
                return self.executor_id
        raise self._none_left()

    def is_held(self) -> bool:
        return True

    @contextmanager
    def adopting(self, executor_id: str) -> Generator[bool, None, None]:
        number = self._number_of(executor_id)
        file = None if number is None else self._locked(number)
        try:
            yield file is not None
        finally:
            if file is not None:
                file.close()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _locked(self, number: int) -> IO[bytes] | None:
        # A descriptor of its own, since a lock belongs to that and not to the process. The file
        # stays: whoever had opened it before it was unlinked would lock another one.
        path = self._database.with_name(f"{self._database.name}-{self._name}-{number}.lock")
        file = path.open("ab")
        try:
            self._fcntl.flock(file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


class AdvisorySlots(_Named):
    """Advisory locks of a PostgreSQL session, which end with its connection, on any host.

    :param label: what the engine calls itself
    :param name: of the engine's jobs
    :param dsn: the database
    """

    def __init__(self, label: str, name: str, dsn: str) -> None:
        super().__init__(label, name)
        self._dsn = dsn
        # Others take locks too: two numbers of 32 bits with a sign make one key.
        self._space = crc32(f"fastapi_tasks:{name}".encode()) - 2**31
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._is_lost = False

    def take(self) -> str:
        self._connection = self._connect()
        for self._number in range(1, _MOST + 1):
            if self._is_locked_now(self._number):
                return self.executor_id
        raise self._none_left()

    def is_held(self) -> bool:
        assert self._connection is not None
        try:
            self._connection.execute("SELECT 1")
        except psycopg.Error:
            self._connection.close()
            self._connection = self._connect()
            self._is_lost = True
        # PostgreSQL may take the session that is gone for one that goes on, for a while.
        self._is_lost = self._is_lost and not self._is_locked_now(self._number)
        return not self._is_lost

    @contextmanager
    def adopting(self, executor_id: str) -> Generator[bool, None, None]:
        number = self._number_of(executor_id)
        # A session may have a lock twice, so it would find its own one free.
        if number is None or number == self._number or not self._is_locked_now(number):
            yield False
            return
        try:
            yield True
        finally:
            self._ask("SELECT pg_advisory_unlock(%s, %s)", number)

    def release(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self._dsn, autocommit=True, application_name="fastapi_tasks slot")

    def _is_locked_now(self, number: int) -> bool:
        return self._ask("SELECT pg_try_advisory_lock(%s, %s)", number)

    def _ask(self, question: LiteralString, number: int) -> bool:
        assert self._connection is not None
        return self._connection.execute(question, (self._space, number)).fetchone() == (True,)
