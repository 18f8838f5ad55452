"""The apps that servers serve: one route with a task, and one that tells how many have run.

``BENCH_CONTENDER`` names a contender as peers.toml does, or is empty for ``BackgroundTasks``;
``BENCH_HOW`` says when the task starts, or which of the plain endpoints it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI

from .client import PATH
from .contenders.baselines import background, bare
from .contenders.contender import Endpoint, Function
from .worker import contender_of

RAN_PATH = "/ran"

PLAIN: dict[str, Callable[[Function, int], Endpoint]] = {
    "nothing": lambda function, count: bare,
    "background": background,
    "awaiting": partial(background, takes_turn=True),
}
"""The endpoints that know nothing of the contenders."""


def create() -> FastAPI:
    """Return the app."""
    app, ran = FastAPI(), 0

    async def work(number: int) -> None:
        nonlocal ran
        ran += 1

    name, how = os.environ["BENCH_CONTENDER"], os.environ["BENCH_HOW"]
    if name:
        contender = contender_of(name)
        contender.install(app)
        app.get(PATH)(contender.endpoint(how, work, 1))
    else:
        app.get(PATH)(PLAIN[how](work, 1))

    @app.get(RAN_PATH)
    async def tell() -> int:
        return ran

    return app
