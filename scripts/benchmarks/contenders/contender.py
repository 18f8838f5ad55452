"""What the benchmark asks of a contender."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from fastapi import FastAPI
from fastapi.routing import APIRoute

Endpoint = Callable[..., Any]
Function = Callable[[int], Any]


class Contender(ABC):
    """A package that runs tasks, in the process that has it."""

    route_class: ClassVar[type[APIRoute] | None] = None
    """The class of its routes, if it has one."""

    not_comparable: ClassVar[dict[str, str]] = {}
    """By side: why the contender has nothing to compare there."""

    remarks: ClassVar[dict[str, str]] = {}
    """By side: what is to be known of what it is compared with there."""

    def has(self, side: str) -> bool:
        """Return whether a side can be measured."""
        return side not in self.not_comparable

    @abstractmethod
    def install(self, app: FastAPI) -> None:
        """Do with an app what must be done once, before it has routes."""

    @abstractmethod
    def endpoint(self, how: str, function: Function, count: int) -> Endpoint:
        """Return an endpoint that schedules a number of tasks, called with 0, 1 and so on.

        :param how: ``now``, ``after_route``, ``after_response``, ``shielded`` or ``configured``
        """
