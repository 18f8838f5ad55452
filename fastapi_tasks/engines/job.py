"""A job: what was enqueued, as the one who has enqueued it, or knows its id, sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from fastapi_tasks.info import TaskInfo

if TYPE_CHECKING:
    from .base import EngineAdapter

__all__ = ["Job"]

T_co = TypeVar("T_co", covariant=True)


class Job(Generic[T_co]):
    """A call that an engine has taken. Made by ``enqueue``, never by hand.

    :param engine: the engine
    :param job_id: its id
    :param name: the name of the function
    """

    __slots__ = ("_engine", "_id", "_name")

    def __init__(self, engine: EngineAdapter, job_id: str, name: str) -> None:
        self._engine = engine
        self._id = job_id
        self._name = name

    @property
    def id(self) -> str:
        """What tells the job from every other one of its engine."""
        return self._id

    @property
    def name(self) -> str:
        """The name by which its function was registered."""
        return self._name

    async def wait(self) -> T_co:
        """Wait until the job is over, wherever it runs, and return what the function returned.

        Give it a limit by ``anyio.fail_after()``: a job may wait for a worker for ever.

        :raises JobFailedError: its last attempt has failed
        :raises JobCancelledError: it was cancelled
        :raises NoResultError: the engine keeps no results, or does not know the job any more
        :raises EngineUnavailableError: the engine cannot be reached
        """
        result: T_co = await self._engine.wait_for(self)
        return result

    async def info(self) -> TaskInfo:
        """Return what the job is like now.

        :raises NoResultError: the engine does not know the job any more
        :raises EngineUnavailableError: the engine cannot be reached
        """
        return await self._engine.info_of(self)

    async def cancel(self) -> bool:
        """Ask for the job to be cancelled: one that waits never begins, one that runs is told.

        :return: ``False`` if it was over already, or the engine does not know it
        :raises EngineUnavailableError: the engine cannot be reached
        """
        return await self._engine.cancel(self._id)

    def __repr__(self) -> str:
        return f"<Job {self._name} {self._id}>"
