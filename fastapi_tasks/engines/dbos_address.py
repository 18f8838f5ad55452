"""Where a DBOS engine keeps its jobs, and how one connects to it."""

from __future__ import annotations

import math
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NoReturn, cast

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from fastapi_tasks.errors import InvalidSettingError

from .dbos_slots import AdvisorySlots, FileSlots, Slots

__all__ = ["Address", "sqlite_engine", "turn_on_wal"]

_BUSY = 5000  # milliseconds
_CONNECTIONS = 4
_UNIXEPOCH = (3, 42)  # the version of SQLite that knows the argument which DBOS gives it


class Address:
    """Where the database is.

    :param url: as the user has written it
    :raises InvalidSettingError: it is not one that can be used
    """

    def __init__(self, url: object, *, connect_timeout: float) -> None:
        try:
            parsed = sqlalchemy.make_url(cast(str, url))
        except (SQLAlchemyError, ValueError):
            _refuse(url)
        kind = parsed.drivername.partition("+")[0]
        self.path: Path | None = None
        if kind == "sqlite":
            name = parsed.database or ""
            if parsed.drivername != kind or parsed.query or name in ("", ":memory:"):
                _refuse(url)
            self.path = Path(name)
        elif kind in ("postgresql", "postgres") and parsed.database:
            parsed = parsed.set(drivername="postgresql")
            if "connect_timeout" not in parsed.query:
                # libpq takes whole seconds, and 1 for 2.
                seconds = str(max(2, math.ceil(connect_timeout)))
                parsed = parsed.update_query_dict({"connect_timeout": seconds})
        else:
            _refuse(url)
        self.url = parsed.render_as_string(hide_password=False)

    def slots(self, label: str, name: str) -> Slots:
        """Return by what the processes of this database are told apart."""
        if self.path is None:
            return AdvisorySlots(label, name, self.url)
        return FileSlots(label, name, self.path)


def _refuse(url: object) -> NoReturn:
    raise InvalidSettingError(
        "url",
        # A URL may hold a password.
        url if not isinstance(url, str) or "@" not in url else None,
        expected="the path of a SQLite database, or the URL of a PostgreSQL one",
        instead='DBOSEngine("sqlite:///jobs.db") or DBOSEngine("postgresql://localhost/jobs")',
    )


def turn_on_wal(path: Path) -> None:
    """Let readers read while somebody writes. It is the file that remembers it."""
    deadline = time.monotonic() + _BUSY / 1000
    with closing(sqlite3.connect(path, timeout=_BUSY / 1000)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                # It does not wait for another process that does the same.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _now(_: object) -> float:
    return time.time()


def sqlite_engine(url: str) -> sqlalchemy.Engine:
    """Return what connects to a SQLite database, for DBOS too."""
    engine = sqlalchemy.create_engine(url, pool_size=_CONNECTIONS, max_overflow=20)

    def configure(connection: sqlite3.Connection, _: object) -> None:
        # What DBOS does to a connection of its own.
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={_BUSY}")
        connection.execute("PRAGMA foreign_keys=ON")
        if sqlite3.sqlite_version_info < _UNIXEPOCH:
            connection.create_function("unixepoch", 1, _now)

    event.listen(engine, "connect", configure)
    return engine
