"""One connection as ``add_tasks`` sees it: which supervisor serves it, and how it ends.

The middleware puts a :class:`Connection` into the scope and tells it what the server says; the
route tells it what the endpoint did. Out of both it decides when the batches are released.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from contextvars import Token
from types import TracebackType
from typing import TypeAlias, cast

import anyio
from starlette.types import Scope
from starlette.websockets import WebSocketDisconnect

from .config import TaskConfig
from .errors import UnsupportedFastAPIError
from .scheduler import TasksScheduler, make_current, restore_current
from .supervisor import Supervisor

__all__ = ["Connection", "connection_of", "exit_stacks"]

_KEY = "fastapi_tasks"


class Connection:
    """A request or WebSocket that is being served.

    :param supervisor: where its tasks run
    :param config: the app's configuration
    """

    __slots__ = (
        "_failed",
        "_token",
        "client_gone",
        "config",
        "is_exact",
        "returned",
        "scheduler",
        "supervisor",
    )

    def __init__(self, supervisor: Supervisor, config: TaskConfig) -> None:
        self.supervisor = supervisor
        self.config = config
        self.scheduler: TasksScheduler | None = None
        """The scheduler, once ``Tasks`` was taken."""
        self.is_exact = False
        """Whether a :class:`TasksRoute` serves the connection."""
        self.returned = False
        """Whether the endpoint returned and its response could be made."""
        self.client_gone = False
        """Whether the server refused to send, or said that the peer has disconnected."""
        self._failed = False
        self._token: Token[TasksScheduler | None] | None = None

    def open_scheduler(self, scope: Scope) -> TasksScheduler:
        """Make the scheduler, and see to it that it hears of the end of the route.

        :param scope: the connection's
        :raises FastAPITasksUninitializedAppError: the supervisor is not running
        """
        self.supervisor.require_running()
        request_stack, function_stack = exit_stacks(scope)
        scheduler = self.scheduler = TasksScheduler(self.supervisor, self.config)
        self._token = make_current(scheduler)
        request_stack.push(self._response_over)
        if not self.is_exact:
            function_stack.push(self._route_over)
        return scheduler

    def fail(self) -> None:
        """Note that the route raised."""
        self._failed = True

    def peer_left(self) -> None:
        """Release everything, since the WebSocket's peer has disconnected."""
        self.client_gone = True
        if self.scheduler is not None:
            self.scheduler.response_over(failed=False)

    def close(self) -> None:
        """Release what is left, since the app is done with the connection."""
        if self.scheduler is not None:
            self.scheduler.response_over(failed=self._failed)

    def _route_over(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Exit the function-scoped stack, on a route that is not ours."""
        assert self.scheduler is not None
        if self._is_failure(exc):
            self._failed = True
        else:
            self.returned = True
        self.scheduler.route_over(failed=self._failed)

    def _response_over(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Exit the request-scoped stack: the safety net under every way a response can end."""
        assert self.scheduler is not None and self._token is not None
        restore_current(self._token)
        if self._failed or self._is_failure(exc):
            self._failed = True
            # The error's response is yet to be sent, by an exception handler: until the
            # connection is closed, it is not over.
            self.scheduler.route_over(failed=True)
        else:
            self.scheduler.response_over(failed=False)

    def _is_failure(self, exc: BaseException | None) -> bool:
        if exc is None or self.client_gone or isinstance(exc, WebSocketDisconnect):
            return False
        # Whoever cancels a response that is being sent, takes nothing back of what the endpoint
        # has done: a middleware does so when its client has left.
        return not (self.returned and isinstance(exc, anyio.get_cancelled_exc_class()))


def connection_of(scope: Scope) -> Connection | None:
    """Return what the middleware of ``add_tasks`` put into a scope, if there is one.

    :param scope: the scope of a request or WebSocket
    """
    return scope.get(_KEY)


def connect(scope: Scope, connection: Connection) -> None:
    """Put a connection into its scope.

    :param scope: the scope of a request or WebSocket
    :param connection: the connection
    """
    # Middlewares copy scopes, so the object in there has to be one that all copies share.
    scope[_KEY] = connection


ExitStack: TypeAlias = "AsyncExitStack[bool | None]"


def exit_stacks(scope: Scope) -> tuple[ExitStack, ExitStack]:
    """Return the request-scoped and the function-scoped exit stack of a FastAPI route.

    They are the one thing that the package takes from FastAPI without its documentation; they
    have been there since 0.121.

    :param scope: the scope of a request or WebSocket
    :raises UnsupportedFastAPIError: there are none
    """
    return _stack(scope, "fastapi_inner_astack"), _stack(scope, "fastapi_function_astack")


def _stack(scope: Scope, key: str) -> ExitStack:
    stack = scope.get(key)
    if not isinstance(stack, AsyncExitStack):
        raise UnsupportedFastAPIError(f'scope["{key}"]')
    return cast(ExitStack, stack)
