"""A shop that confirms an order first, and does at its side what the customer need not wait for.

Run it with ``uvicorn --app-dir docs/examples orders:app``, then order something::

    curl --json '{"item": "teapot", "cents": 4200, "email": "ada@example.org"}' \
        http://127.0.0.1:8000/orders
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, PositiveInt

from fastapi_tasks import Task, TaskObserver, Tasks, TasksRoute, add_tasks, task

logger = logging.getLogger("orders")


class Order(BaseModel):
    """What a customer sends."""

    item: str
    cents: PositiveInt
    email: str


class Confirmation(BaseModel):
    """What the customer gets back."""

    order_id: int


class Services:
    """The database and the services of others, of which only the latency is real."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._is_open = True

    async def call(self, seconds: float) -> None:
        """Make a call that takes some seconds."""
        if not self._is_open:
            raise ConnectionError("the connections are closed")
        await anyio.sleep(seconds)

    async def save(self, order: Order) -> int:
        """Store an order, and return its number."""
        await self.call(0.04)
        return next(self._ids)

    def close(self) -> None:
        """Close the connections."""
        self._is_open = False


def get_services(request: Request) -> Services:
    """Return the connections that the lifespan holds open, while tasks end too."""
    services: Services = request.state.services
    return services


async def check_fraud(order: Order, services: Services) -> None:
    """Have the order looked at; what looks odd is held back in the warehouse."""
    await services.call(0.12)


async def record_audit(order_id: int, services: Services) -> None:
    """Put on record that the order was accepted."""
    await services.call(0.03)


async def send_email(order_id: int, order: Order, services: Services) -> None:
    """Write to the customer, by a mail server that takes its time."""
    await services.call(1.0)


def alert_support(task: Task, error: Exception) -> None:
    """Have somebody look at a payment that failed."""
    logger.critical("%s failed, task %s: call the customer", task.name, task.id)


@task(shield=True, on_error=alert_support)
async def take_payment(order_id: int, order: Order, services: Services) -> None:
    """Reserve the money, then take it: between the two the app must not go away."""
    await services.call(0.4)
    await services.call(0.3)


router = APIRouter(route_class=TasksRoute)


@router.post("/orders", status_code=202)
async def place_order(
    order: Order, services: Annotated[Services, Depends(get_services)], tasks: Tasks
) -> Confirmation:
    """Accept an order."""
    tasks.schedule(check_fraud, order, services)
    order_id = await services.save(order)
    tasks.after_route.schedule(record_audit, order_id, services)
    tasks.after_response.schedule(take_payment, order_id, order, services)
    tasks.after_response.schedule(send_email, order_id, order, services)
    return Confirmation(order_id=order_id)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Services], None]:
    """Hold the connections open as long as the app runs."""
    services = Services()
    yield {"services": services}
    services.close()


def create_app(observers: Sequence[TaskObserver] = ()) -> FastAPI:
    """Make the app.

    :param observers: who else is told of what the tasks do: metrics, a monitor
    """
    app = FastAPI(title="Orders", lifespan=lifespan)
    # Whoever runs containers usually kills them 30 seconds after the SIGTERM.
    add_tasks(app, observers=observers, shutdown_timeout=25)
    app.include_router(router)
    return app


app = create_app()
