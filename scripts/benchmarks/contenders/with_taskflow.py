"""fastapi-taskflow, in memory and without its dashboard: as cheap as it can be had."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import Depends, FastAPI
from fastapi_taskflow import TaskManager

from .baselines import background
from .contender import Contender, Endpoint, Function

NO_DRAIN = "Its shutdown leaves eager tasks alone, and its other ones belong to a response."
EAGER = "With eager=True; the time includes the record that it keeps of every task."
THREADS = f"{EAGER[:-1]}. With max_sync_threads=40, as many threads as the others have."


class Taskflow(Contender):
    """fastapi-taskflow: ``add_task``, and ``eager=True`` where tasks start at once.

    It is injected by a dependency: what puts it in the place of ``BackgroundTasks`` does so in
    the whole process, and would reach those that it is compared with.
    """

    not_comparable: ClassVar[dict[str, str]] = {
        "route": "It has no route class.",
        "after_route": "It has no such moment.",
        "shielded": "It shields nothing.",
        "configured": "It has no such configuration for each call.",
        "drain": NO_DRAIN,
    }

    remarks: ClassVar[dict[str, str]] = {
        "now": EAGER,
        "flood": EAGER,
        "live": EAGER,
        "growth": EAGER,
        "threads": THREADS,
        "busy": THREADS,
    }

    def __init__(self) -> None:
        self._manager = TaskManager()

    def install(self, app: FastAPI) -> None:
        """Tie a manager to the app's lifespan."""
        # A new one each time, since it keeps a record of every task.
        self._manager = TaskManager(max_sync_threads=40)
        self._manager.init_app(app)

    def endpoint(self, how: str, function: Function, count: int) -> Endpoint:
        """Return an endpoint as a user writes it."""
        manager = self._manager

        eager = how == "now"

        async def endpoint(tasks: Any = Depends(manager.get_tasks)) -> int:  # noqa: B008
            for number in range(count):
                tasks.add_task(function, number, eager=eager)
            return 1

        return endpoint


class TaskflowInPlace(Taskflow):
    """fastapi-taskflow in the place of ``BackgroundTasks``, as it is meant to be used."""

    def install(self, app: FastAPI) -> None:
        """Do so in the whole process."""
        super().install(app)
        self._manager.install(app)

    def endpoint(self, how: str, function: Function, count: int) -> Endpoint:
        """Return an endpoint as a user has it already."""
        return background(function, count)
