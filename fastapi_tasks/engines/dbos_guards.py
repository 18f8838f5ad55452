"""What DBOS is kept from while one of our engines is started: to unpickle, and to say too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from typing import Any, NoReturn

__all__ = ["guarded"]

_logger = logging.getLogger("dbos")
# Else it would add one that writes to the console.
_logger.addHandler(logging.NullHandler())

_EXPECTED = (
    # What a job raises is told by this package, once, and with the job's name.
    "Exception encountered in asynchronous workflow",
    # Jobs are cancelled by whoever wants them to be, and when the app is shut down.
    "Asyncio task cancelled for workflow or step",
    # Each start registers it, with the engine's own limit of recoveries.
    "Duplicate registration of function 'fastapi_tasks.run'",
)

_lock = Lock()
_opened: list[Callable[[], None]] = []


@contextmanager
def guarded() -> Generator[None, None, None]:
    """Keep DBOS from both. May be entered several times at once, in any thread."""
    with _lock:
        if not _opened:
            _opened.append(_put_in_place())
        _opened.append(_nothing)
    try:
        yield
    finally:
        with _lock:
            _opened.pop()
            if len(_opened) == 1:
                _opened.pop()()


def _put_in_place() -> Callable[[], None]:
    # A row says itself in which form it is, and to unpickle is to execute: else whoever may write
    # to the database could run code here. DBOS has no public switch for it.
    kind: Any = import_module("dbos._serialization").DefaultSerializer
    deserialize = kind.deserialize
    kind.deserialize = _refuse
    _logger.addFilter(_is_news)

    def take_back() -> None:
        kind.deserialize = deserialize
        _logger.removeFilter(_is_news)

    return take_back


def _nothing() -> None:
    """Stand for one that is open."""


def _refuse(_: object, __: str) -> NoReturn:
    raise ValueError("it is a pickle, and nothing is unpickled here")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and not record.getMessage().startswith(_EXPECTED)
