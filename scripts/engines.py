"""Measures what each engine keeps of what is promised, and writes the table for the documentation.

The tests in ``tests/engines/test_conformance.py`` are the measurement, here with a thousand jobs
whose workers are killed at random. PostgreSQL and Redis have to run. The table is written only if
each test came out as it says itself: a promise that is kept, or a limit with its reason.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys

from scripts.promises import ROOT, measure, render, versions

TABLE = ROOT / "docs" / "engines_table.txt"
JOBS = os.environ.get("FASTAPI_TASKS_JOBS", "1000")
KILLS = "test_random_kills"


def services() -> str:
    """Return the versions of what the engines stand on."""
    import psycopg
    import redis

    from tests.engines.services import POSTGRESQL, REDIS

    with psycopg.connect(f"{POSTGRESQL}/postgres") as connection:
        number = connection.info.server_version
    with redis.Redis.from_url(REDIS) as client:
        redis_version = client.info("server")["redis_version"]
    return (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"PostgreSQL {number // 10000}.{number % 10000}, Redis {redis_version}"
    )


def main() -> int:
    """Measure, write the table, print the counts, and return the exit status."""
    from tests.engines import test_conformance
    from tests.engines.kinds import DURABLE

    is_expected, outcomes, measurements = measure(
        "tests/engines/test_conformance.py",
        *("-o", "faulthandler_timeout=1200"),  # so many jobs take their time
        environment={"FASTAPI_TASKS_JOBS": JOBS, "FASTAPI_TASKS_REQUIRE_SERVICES": "1"},
    )
    print(f"Workers killed at random, {int(JOBS):,} jobs:")
    for kind in DURABLE:
        print(f"  {kind.name:<28} {measurements.get((KILLS, kind.name), 'FAILED')}")
    if not is_expected:
        print("The table is as it was.", file=sys.stderr)
        return 1
    packages = versions([package for kind in DURABLE for package in kind.packages])
    promises = {test: promise.text for test, promise in test_conformance.PROMISES.items()}
    table = render(promises, [kind.name for kind in DURABLE], outcomes, measurements)
    heading = f"Measured with {packages}; {services()}; {os.cpu_count()} cores.\n"
    TABLE.write_text(f"{heading}{table}", encoding="utf-8")
    print(f"Written: {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
