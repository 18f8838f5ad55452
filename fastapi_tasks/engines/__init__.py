"""Engines, which run functions durably or on other machines, one to a module.

The core imports none of them, and each one's package is imported when the engine is named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastapi_tasks.engine import Engine

from .base import BoundEngine, EngineAdapter, JobOptions, JobRecord, Lifespan
from .job import Job

if TYPE_CHECKING:
    from .dbos import DBOSEngine
    from .docket import DocketEngine
    from .pgqueuer import PgQueuerEngine

__all__ = [
    "BoundEngine",
    "DBOSEngine",
    "DocketEngine",
    "Engine",
    "EngineAdapter",
    "Job",
    "JobOptions",
    "JobRecord",
    "Lifespan",
    "PgQueuerEngine",
]

_MODULES = {"DBOSEngine": "dbos", "DocketEngine": "docket", "PgQueuerEngine": "pgqueuer"}


def __getattr__(name: str) -> Any:
    # https://peps.python.org/pep-0562/
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    engine = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    engine.__module__ = __name__  # as below
    return engine


# Whoever meets one of the names in a traceback should find the one to import.
for _public in (BoundEngine, EngineAdapter, Job, JobOptions, JobRecord):
    _public.__module__ = __name__
