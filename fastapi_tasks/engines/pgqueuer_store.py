# ruff: noqa: S608 - what is put into SQL are names, made from a prefix that is checked
"""The tables of PgQueuer's and one of our own beside them, and the statements that touch both.

A statement changes both or neither. PgQueuer knows a job by a number, and we by a text: the table
of our own has both, and what PgQueuer does not keep.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence import qb
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.domain.types import Channel
from pgqueuer.queries import Queries

from fastapi_tasks.info import Progress, TaskInfo, TaskStatus

from .base import JobRecord
from .pgqueuer_database import Connection, Row

__all__ = [
    "ENTRYPOINT",
    "Builders",
    "Statements",
    "builders_for",
    "install",
    "interval",
    "record_of",
]

ENTRYPOINT = "fastapi_tasks"
"""What PgQueuer calls every job of ours: what is run is said in its message."""

_LONGEST = 100 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Builders:
    """What PgQueuer writes its SQL with."""

    qbe: qb.QueryBuilderEnvironment
    qbq: qb.QueryQueueBuilder
    qbs: qb.QuerySchedulerBuilder


def builders_for(schema: str, prefix: str) -> Builders:
    """Return what PgQueuer writes its SQL with.

    :param schema: where the tables are
    :param prefix: what their names begin with
    """
    settings = _settings_for(schema, prefix)
    return Builders(
        qb.QueryBuilderEnvironment(settings),
        qb.QueryQueueBuilder(settings),
        qb.QuerySchedulerBuilder(settings),
    )


def _settings_for(schema: str, prefix: str) -> DBSettings:
    # Every one is given, since for what is not it looks at the environment, under names such as
    # CHANNEL. A channel belongs to the whole database, so that it has to tell schemas apart.
    return DBSettings(
        prefix=prefix,
        db_schema=schema,
        channel=Channel(f"{prefix}ch_pgqueuer_{zlib.crc32(schema.encode()):08x}"),
        function=f"{prefix}fn_pgqueuer_changed",
        statistics_table=f"{prefix}pgqueuer_statistics",
        queue_status_type=f"{prefix}pgqueuer_status",
        queue_table=f"{prefix}pgqueuer",
        queue_table_log=f"{prefix}pgqueuer_log",
        trigger=f"{prefix}tg_pgqueuer_changed",
        schedules_table=f"{prefix}pgqueuer_schedules",
        durability=Durability.durable,
        widen_id=True,
    )


class Statements:
    """Our SQL, for one set of tables.

    All tables are named with their schema: a user's connection may look for tables elsewhere.
    What is JSON is kept as text, since ``jsonb`` refuses what JSON allows.

    :param settings: the names of PgQueuer's tables
    """

    def __init__(self, settings: DBSettings) -> None:
        queue = settings.qualified.queue_table
        log = settings.qualified.queue_table_log
        self.jobs = jobs = settings.qualify(f"{settings.prefix}jobs")
        """The table of our own."""
        self.done = done = f"{settings.channel}_done"
        """The channel on which the ids of jobs are said that are over."""
        self.create = f"""
            CREATE TABLE {jobs} (
                id text PRIMARY KEY,
                queue_id bigint NOT NULL UNIQUE,
                name text NOT NULL,
                status text NOT NULL DEFAULT 'pending',
                attempt integer NOT NULL DEFAULT 0,
                deliveries integer NOT NULL DEFAULT 0,
                created timestamptz NOT NULL DEFAULT clock_timestamp(),
                started timestamptz,
                finished timestamptz,
                progress text,
                result text,
                error_type text,
                error text
            )"""
        # In a long transaction now() is long ago.
        self.enqueue = f"""
            WITH job AS (
                INSERT INTO {jobs} (id, queue_id, name)
                VALUES ($1::text, nextval(pg_get_serial_sequence('{queue}', 'id')), $2::text)
                ON CONFLICT (id) DO NOTHING RETURNING queue_id
            ), queued AS (
                INSERT INTO {queue} (id, priority, entrypoint, payload, execute_after, status)
                SELECT queue_id, 0, '{ENTRYPOINT}', $3::bytea, clock_timestamp() + $4::interval,
                    'queued' FROM job RETURNING id, entrypoint, priority
            ), logged AS ({_log(log, "queued", "queued")})
            SELECT pg_current_xact_id()::text AS transaction FROM job"""
        self.transaction_status = "SELECT pg_xact_status($1::text::xid8) AS status"
        # A job that somebody has removed with a tool of PgQueuer's is a cancelled one.
        self.record = f"""
            SELECT job.*, CASE WHEN queue.id IS NULL AND finished IS NULL THEN 'cancelled'
                ELSE job.status END AS state
            FROM {jobs} job LEFT JOIN {queue} queue ON queue.id = job.queue_id
            WHERE job.id = $1::text"""
        # The row is locked, so that a cancellation comes either before or after. A job that was
        # put into the queue by other means has no row of ours yet.
        mine = "id = $1::bigint AND status = 'picked' AND queue_manager_id = $2::uuid"
        self.begin = f"""
            WITH mine AS (SELECT id, attempts, created FROM {queue} WHERE {mine} FOR UPDATE)
            INSERT INTO {jobs} AS job
                (id, queue_id, name, status, attempt, deliveries, created, started)
            SELECT id::text, id, '', 'running', attempts + 1, 1, created, clock_timestamp()
            FROM mine
            ON CONFLICT (queue_id) DO UPDATE SET
                status = 'running', attempt = EXCLUDED.attempt, deliveries = job.deliveries + 1,
                started = COALESCE(job.started, EXCLUDED.started), finished = NULL,
                progress = NULL, error_type = NULL, error = NULL
            RETURNING id, deliveries"""
        self.note_progress = f"UPDATE {jobs} SET progress = $2::text WHERE queue_id = $1::bigint"
        delete = f"DELETE FROM {queue} WHERE {mine} RETURNING id, entrypoint, priority"
        hold = f"""UPDATE {queue} SET status = 'failed', updated = now(), queue_manager_id = NULL
                WHERE {mine} RETURNING id, entrypoint, priority"""

        def settle(change: str, logged: str, status: str) -> str:
            return f"""
            WITH settled AS ({change}),
            logged AS ({_log(log, "settled", logged)}),
            noted AS (
                UPDATE {jobs} job SET status = '{status}', finished = clock_timestamp(),
                    deliveries = 0, result = $3::text, error_type = $4::text, error = $5::text
                FROM settled WHERE job.queue_id = settled.id RETURNING job.id
            )
            SELECT pg_notify('{done}', id) FROM noted"""

        self.succeed = settle(delete, "successful", "succeeded")
        self.fail = settle(hold, "failed", "failed")
        self.drop = settle(delete, "canceled", "cancelled")
        changed = f"'operation', 'update', 'table', '{settings.queue_table}'"
        # PgQueuer tells workers of new jobs only, and not of those that are to run again.
        self.requeue = f"""
            WITH settled AS (
                UPDATE {queue} SET status = 'queued', updated = now(), queue_manager_id = NULL,
                    execute_after = clock_timestamp() + $3::interval, attempts = $4::integer
                WHERE {mine} RETURNING id, entrypoint, priority
            ), logged AS ({_log(log, "settled", "queued")}), noted AS (
                UPDATE {jobs} job SET status = 'pending', deliveries = deliveries - 1
                FROM settled WHERE job.queue_id = settled.id RETURNING job.id
            )
            SELECT {_event(settings, "table_changed_event", changed)} FROM noted"""
        self.cancel = f"""
            WITH settled AS (
                DELETE FROM {queue} queue USING {jobs} job
                WHERE job.id = $1::text AND queue.id = job.queue_id
                    AND queue.status IN ('queued', 'picked')
                RETURNING queue.id, queue.entrypoint, queue.priority
            ), logged AS ({_log(log, "settled", "canceled")}), noted AS (
                UPDATE {jobs} job SET status = 'cancelled', finished = clock_timestamp()
                FROM settled WHERE job.queue_id = settled.id RETURNING job.id, job.queue_id
            )
            SELECT pg_notify('{done}', id),
                {_event(settings, "cancellation_event", "'ids', json_build_array(queue_id)")}
            FROM noted"""
        self.heartbeat = f"""
            UPDATE {queue} SET heartbeat = now() WHERE id = ANY($1::bigint[])
                AND status = 'picked' AND queue_manager_id = $2::uuid RETURNING id"""
        old = "< now() - $1::interval"
        self.prune = (
            f"DELETE FROM {queue} WHERE status = 'failed' AND updated {old}",
            f"""DELETE FROM {jobs} job WHERE COALESCE(finished, created) {old}
                AND NOT EXISTS (SELECT FROM {queue} queue WHERE queue.id = job.queue_id)""",
            f"""DELETE FROM {log} log WHERE created {old}
                AND NOT EXISTS (SELECT FROM {queue} queue WHERE queue.id = log.job_id)""",
        )


def _log(log: str, source: str, status: str) -> str:
    return f"""INSERT INTO {log} (job_id, status, entrypoint, priority)
                SELECT id, '{status}', entrypoint, priority FROM {source}"""


def _event(settings: DBSettings, kind: str, fields: str) -> str:
    """Return what tells PgQueuer's workers that something has happened."""
    return f"""pg_notify('{settings.channel}', json_build_object('channel', '{settings.channel}',
                'type', '{kind}', 'sent_at', now(), {fields})::text)"""


async def install(connection: Connection, prefix: str) -> Builders:
    """Make the tables, or bring them up to date; return what SQL is written with from now on.

    :param connection: one that is closed afterwards, which ends the lock
    """
    rows = await connection.fetch("SELECT current_schema() AS name")
    builders = builders_for(rows[0]["name"], prefix)
    statements = Statements(builders.qbe.settings)
    # Many processes start at once, of which one makes what the others find.
    await connection.execute("SELECT pg_advisory_lock(hashtext($1))", statements.jobs)
    driver: Any = AsyncpgDriver
    queries = Queries(driver(connection), builders.qbe, builders.qbq, builders.qbs)
    await queries.upgrade()
    # "IF NOT EXISTS" asks for the right to make tables, whether there is one or not.
    rows = await connection.fetch("SELECT to_regclass($1) AS name", statements.jobs)
    if rows[0]["name"] is None:
        await connection.execute(statements.create)
    return builders


def interval(seconds: float) -> timedelta:
    """Return a time as PostgreSQL can add it to the present one."""
    return timedelta(seconds=min(seconds, _LONGEST))


def record_of(row: Row) -> JobRecord:
    """Return what a row of our table says."""
    progress = row["progress"]
    info = TaskInfo(
        id=row["id"],
        name=row["name"],
        status=TaskStatus(row["state"]),
        attempt=row["attempt"],
        progress=None if progress is None else Progress.model_validate_json(progress),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        error_type=row["error_type"],
        error=row["error"],
    )
    return JobRecord(info, row["result"])
