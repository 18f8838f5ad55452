"""The engines that are put to the same tests, each with a place of its own for every test."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi_tasks import Supervisor
from fastapi_tasks.engines import EngineAdapter

from .jobs import Jobs, Trace, register
from .memory import MemoryEngine
from .services import (
    REDIS,
    Outage,
    Proxy,
    locked,
    redis_prefix,
    require_packages,
    unique_name,
)

UNUSED = "127.0.0.1:9"
"""Where nobody listens."""


Database = Callable[[], str]
"""Returns the address of a database that several tests have in common."""


@dataclass(frozen=True)
class Place:
    """Where one test's jobs are kept."""

    url: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else tells this place from others."""
    outages: Mapping[str, Outage] = field(default_factory=dict)
    """In what ways it can be taken away."""
    cut: Callable[[], None] | None = None
    """Cuts every connection to it, if there are any."""


@dataclass(frozen=True)
class Kind:
    """An engine, and what it stands on."""

    name: str
    """What tests and tables call it."""
    packages: tuple[str, ...]
    """What it is made of: the names of distributions."""
    make: Callable[..., EngineAdapter]
    """Makes one, from an address and what else engines take."""
    place: Callable[[Path, Database], AbstractContextManager[Place]]
    """Makes a place for one test's jobs in a folder, or in a database, and removes it."""
    unreachable: str = ""
    """An address at which there is nothing."""

    def engine_at(self, place: Place, **settings: Any) -> EngineAdapter:
        """Return an engine that keeps its jobs there."""
        return self.make(place.url, **place.settings, **settings)

    @asynccontextmanager
    async def running(
        self, place: Place, trace: Trace, **settings: Any
    ) -> AsyncGenerator[tuple[EngineAdapter, Jobs], None]:
        """Start an engine and give it with its functions, and stop it.

        :param trace: where the functions note that they have run
        """
        engine = self.engine_at(place, **{"worker": False, **settings})
        jobs = register(engine, trace)
        async with Supervisor(engines=[engine]):
            yield engine, jobs


@contextmanager
def _nowhere(folder: Path, database: Database) -> Generator[Place, None, None]:
    yield Place("memory://")


@contextmanager
def _file(folder: Path, database: Database) -> Generator[Place, None, None]:
    require_packages("dbos")
    path = folder / "jobs.db"
    yield Place(f"sqlite:///{path}", outages={"locked": partial(locked, path)})


@contextmanager
def _dbos_jobs(folder: Path, database: Database) -> Generator[Place, None, None]:
    require_packages("dbos")
    with closing(Proxy(database())) as proxy:
        yield _behind(proxy, name=unique_name())


@contextmanager
def _pgqueuer_tables(folder: Path, database: Database) -> Generator[Place, None, None]:
    require_packages("pgqueuer", "asyncpg")
    with closing(Proxy(database())) as proxy:
        yield _behind(proxy, prefix=f"{unique_name()}_")


@contextmanager
def _keys(folder: Path, database: Database) -> Generator[Place, None, None]:
    require_packages("docket")
    with redis_prefix() as prefix, closing(Proxy(REDIS)) as proxy:
        yield _behind(proxy, name=prefix)


def _behind(proxy: Proxy, **settings: Any) -> Place:
    outages = {"refused": proxy.refusing, "silent": proxy.silent}
    return Place(proxy.url, settings, outages, proxy.cut)


def _memory(url: str, **settings: Any) -> EngineAdapter:
    return MemoryEngine(**settings)


def _dbos(url: str, **settings: Any) -> EngineAdapter:
    from fastapi_tasks.engines import DBOSEngine

    return DBOSEngine(url, **settings)


def _docket(url: str, **settings: Any) -> EngineAdapter:
    from fastapi_tasks.engines import DocketEngine

    return DocketEngine(url, redelivery_timeout=2, **settings)


def _pgqueuer(url: str, **settings: Any) -> EngineAdapter:
    from fastapi_tasks.engines import PgQueuerEngine

    return PgQueuerEngine(url, heartbeat_timeout=2, **settings)


MEMORY = Kind("memory", (), _memory, _nowhere)
DBOS_SQLITE = Kind(
    "DBOSEngine, SQLite", ("dbos",), _dbos, _file, unreachable="sqlite:////nowhere/jobs.db"
)
DBOS_POSTGRESQL = Kind(
    "DBOSEngine, PostgreSQL",
    ("dbos", "psycopg"),
    _dbos,
    _dbos_jobs,
    unreachable=f"postgresql://ada:hunter2@{UNUSED}/jobs",
)
DOCKET = Kind(
    "DocketEngine, Redis",
    ("pydocket", "redis"),
    _docket,
    _keys,
    unreachable=f"redis://ada:hunter2@{UNUSED}/0",
)
PGQUEUER = Kind(
    "PgQueuerEngine, PostgreSQL",
    ("pgqueuer", "asyncpg"),
    _pgqueuer,
    _pgqueuer_tables,
    unreachable=f"postgresql://ada:hunter2@{UNUSED}/jobs",
)

DURABLE = [DBOS_SQLITE, DBOS_POSTGRESQL, DOCKET, PGQUEUER]
"""Every one that users have."""
KINDS = [MEMORY, *DURABLE]


def kind_named(name: str) -> Kind:
    """Return a kind by its name."""
    return next(kind for kind in KINDS if kind.name == name)
