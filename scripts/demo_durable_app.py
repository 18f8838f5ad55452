"""A shop that charges cards, durably or not, and tells scripts/demo_durable.py of every charge."""

from __future__ import annotations

import os

import anyio
from fastapi import FastAPI
from starlette.types import ASGIApp

from fastapi_tasks import (
    TaskConfig,
    TaskInfo,
    Tasks,
    add_tasks,
    current_task,
    get_supervisor,
)
from scripts.demo_app import tell

SECONDS = 1.0
"""How long a charge takes."""
AT_ONCE = 2
"""How many of them are made at a time."""


async def charge(order_id: int) -> str:
    """Charge the card with which an order is paid."""
    name = f"charge {order_id}"
    tell(name, "begun", f"attempt {current_task().attempt}")
    await anyio.sleep(SECONDS)  # so long the payment provider takes
    tell(name, "completed")
    return f"receipt {order_id}"


def durable() -> ASGIApp:
    """Return an app whose charges are jobs in the SQLite file that ``JOBS`` names."""
    from fastapi_tasks.engines import DBOSEngine

    engine = DBOSEngine(os.environ["JOBS"], worker=True, concurrency=AT_ONCE)
    engine.task(name="charge")(charge)
    app = FastAPI()
    add_tasks(app, engines=[engine])

    @app.post("/charges/{order_id}", status_code=202)
    async def place(order_id: int) -> str:
        job = await engine.using(key=f"order-{order_id}").enqueue(charge, order_id)
        return job.id

    @app.get("/charges/{job_id}")
    async def show(job_id: str) -> TaskInfo | None:
        return await engine.find(job_id)

    return app


def in_memory() -> ASGIApp:
    """Return an app whose charges are tasks of its process."""
    app = FastAPI()
    add_tasks(app)
    charges = TaskConfig(limiter=anyio.CapacityLimiter(AT_ONCE), shield=True)

    @app.post("/charges/{order_id}", status_code=202)
    async def place(order_id: int, tasks: Tasks) -> str:
        return tasks.after_response.task(charges).schedule(charge, order_id).id

    @app.get("/charges/{task_id}")
    async def show(task_id: str) -> TaskInfo | None:
        return get_supervisor(app).find(task_id)

    return app
