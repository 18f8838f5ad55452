"""What a round of a group is given: a contender, how much there is to do, and in which order."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from fastapi import FastAPI
from fastapi.routing import APIRoute

from .client import PATH, Client
from .contenders.contender import Contender, Endpoint, Function


@dataclass(frozen=True)
class Size:
    """How much there is to do in a round."""

    requests: int = 100
    """Requests of a side in a slice: with fewer, the caches are cold, as in no server with load."""
    slices: int = 3
    """How often each side of short ones comes in a round."""
    tasks: int = 10_000
    few_live: int = 1_000
    many_live: int = 100_000
    threads: int = 1_000
    waits: int = 1_000

    def scaled(self, factor: float) -> Size:
        """Return a smaller size, of which the figures are no more than plausible."""
        return Size(*(max(2, int(getattr(self, each.name) * factor)) for each in fields(self)))


@dataclass(frozen=True)
class Round:
    """What a round is given."""

    contender: Contender
    size: Size
    dice: random.Random

    def client(
        self,
        endpoint: Endpoint,
        *,
        installed: bool = True,
        route_class: type[APIRoute] | None = None,
    ) -> Client:
        """Return a client of an app with one route.

        :param installed: whether the contender is there too
        """
        app = FastAPI()
        if installed:
            self.contender.install(app)
        app.router.add_api_route(PATH, endpoint, methods=["GET"], route_class_override=route_class)
        return Client(app)

    def scheduling(self, how: str, function: Function, count: int) -> Client:
        """Return a client of an app of the contender's, whose endpoint schedules tasks."""
        app = FastAPI()
        self.contender.install(app)
        app.get(PATH)(self.contender.endpoint(how, function, count))
        return Client(app)
