"""This package, and the released one of the same name, whose code for users looks the same."""

from __future__ import annotations

from typing import ClassVar

from fastapi import FastAPI
from fastapi.routing import APIRoute

import fastapi_tasks
from fastapi_tasks import Tasks, add_tasks

from .contender import Contender, Endpoint, Function


class Ours(Contender):
    """This package."""

    route_class = getattr(fastapi_tasks, "TasksRoute", None)  # the released one has none

    def install(self, app: FastAPI) -> None:
        """Let the app's endpoints take tasks."""
        add_tasks(app)

    def endpoint(self, how: str, function: Function, count: int) -> Endpoint:
        """Return an endpoint as a user writes it."""

        async def now(tasks: Tasks) -> int:
            for number in range(count):
                tasks.schedule(function, number)
            return 1

        async def after_route(tasks: Tasks) -> int:
            for number in range(count):
                tasks.after_route.schedule(function, number)
            return 1

        async def after_response(tasks: Tasks) -> int:
            for number in range(count):
                tasks.after_response.schedule(function, number)
            return 1

        async def shielded(tasks: Tasks) -> int:
            shielded = tasks.task(shield=True)
            for number in range(count):
                shielded.schedule(function, number)
            return 1

        async def configured(tasks: Tasks) -> int:
            for number in range(count):
                tasks.task(name="work", shield=True).schedule(function, number)
            return 1

        endpoints = (now, after_route, after_response, shielded, configured)
        return next(endpoint for endpoint in endpoints if endpoint.__name__ == how)


class Released(Ours):
    """The released package 0.1.0."""

    route_class: ClassVar[type[APIRoute] | None] = None
    not_comparable: ClassVar[dict[str, str]] = {"route": "It has no route class."}
    remarks: ClassVar[dict[str, str]] = {
        "busy": "Its sync tasks take their threads from those that sync endpoints need.",
    }
