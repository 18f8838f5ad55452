"""One connection as ``add_tasks`` sees it: which supervisor serves it, and how it ends.

The middleware puts a :class:`Connection` into the scope and tells it what the server says; the
route tells it what the endpoint did. Out of both it decides when the batches are released.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Never, TypeAlias, TypeVar

import anyio
from fastapi.exceptions import ResponseValidationError
from starlette.responses import Response
from starlette.types import Scope
from starlette.websockets import WebSocketDisconnect

from .config import TaskConfig
from .errors import (
    FastAPITasksUninitializedAppError,
    UninitializedReason,
    UnsupportedFastAPIError,
)
from .scheduler import TasksScheduler
from .supervisor import RUNNING, Supervisor
from .tasks import RequestEnd, Task, enter, find_current_task, leave

__all__ = [
    "CONNECTION",
    "Connection",
    "Unserved",
    "current_connection",
    "leave_outer_connection",
]

T = TypeVar("T")

CONNECTION = "fastapi_tasks"
"""Where the middleware puts the :class:`Connection` into a scope, which middlewares may copy."""

# Where FastAPI's routes put their exit stacks: without its documentation, but since 0.121.
_REQUEST_STACK = "fastapi_inner_astack"
_FUNCTION_STACK = "fastapi_function_astack"

ExitStack: TypeAlias = "AsyncExitStack[bool | None]"


class Connection:
    """A request or WebSocket that is being served.

    :param supervisor: where its tasks run
    :param config: the app's configuration
    """

    __slots__ = (
        "_failed",
        "_request_stack",
        "_token",
        "_watches_exit",
        "client_gone",
        "config",
        "end",
        "endpoint",
        "is_closed",
        "is_exact",
        "response",
        "returned",
        "scheduler",
        "sent",
        "supervisor",
    )

    def __init__(self, supervisor: Supervisor, config: TaskConfig) -> None:
        self.supervisor = supervisor
        self.config = config
        self.scheduler: TasksScheduler | None = None
        """The scheduler, once ``Tasks`` was taken."""
        self.end: RequestEnd | None = None
        """What tells the tasks how the request ends, from then on until it is over."""
        self.endpoint: Callable[..., Any] | None = None
        """The endpoint's wrapper, if a :class:`TasksRoute` serves the connection."""
        self.is_exact = True
        """Whether the wrapper, if there is one, tells when the endpoint has returned."""
        self.returned = False
        """Whether the endpoint has returned."""
        self.response: Response | None = None
        """What it has returned, if that was a response: a copy, which may be changed."""
        self.client_gone = False
        """Whether the server refused to send, or said that the peer has disconnected."""
        self.sent = False
        """Whether the server has taken the last of the response."""
        self.is_closed = False
        """Whether the route is done with it."""
        self._failed = False
        self._watches_exit = False
        # Those below are there when tasks were taken, and most requests take none.
        self._request_stack: ExitStack
        self._token: Token[Connection | None] | None

    def take_scheduler(self, scope: Scope, watch_exit: bool = True) -> TasksScheduler:
        """Return the scheduler, and see to it that it hears of the end of the route.

        :param scope: the connection's
        :param watch_exit: whether :meth:`watch_exit` is called; if not, the route does so where
            something can go wrong between its endpoint and the end of the response
        :raises UnsupportedFastAPIError: the route has no exit stacks
        :raises FastAPITasksUninitializedAppError: the supervisor is not running
        :raises TooManyTasksError: it has as many tasks as it may, and the request has no scheduler
        """
        request_stack: ExitStack
        function_stack: ExitStack
        try:
            request_stack, function_stack = scope[_REQUEST_STACK], scope[_FUNCTION_STACK]
        except KeyError as error:
            raise UnsupportedFastAPIError(f'scope["{error.args[0]}"]') from None
        supervisor = self.supervisor
        if self.scheduler is not None:
            if not self._is_attempted_again(request_stack):
                return self.scheduler
            self.close()
        if supervisor.state is not RUNNING or supervisor.stand_in is not None:
            supervisor.require_running()
        if self.scheduler is None and supervisor.settings.max_tasks is not None:
            supervisor.require_room()  # once: a request that was let in stays so
        if self._failed or self.scheduler is not None:  # there was an attempt before this one
            self.returned = self._failed = self.is_closed = self._watches_exit = False
        self._request_stack = request_stack
        endpoint = scope.get("endpoint")
        scheduler = self.scheduler = TasksScheduler(supervisor, self.config, endpoint)
        self.end = scheduler.end
        scheduler.request = self
        supervisor.open_requests.add(self)
        if find_current_task() is not None:
            # The request was made from within a task, and is not a part of it.
            request_stack.callback(_restore, leave, enter(None))
        self._token = _current.set(self)
        if watch_exit:
            self.watch_exit()
        if self.endpoint is None:
            function_stack.push(self._exit_function_stack)
        if self.client_gone:
            scheduler.response_over(False)  # a WebSocket's peer, before anybody asked
        return scheduler

    def endpoint_over(self, error: BaseException | None = None) -> bool:
        """Release what waits for the endpoint, since it has returned or the route has raised.

        :param error: what was raised, if it was that
        :return: whether tasks were started that have not had the loop yet; it is said once
        """
        if error is None:
            self.returned = True
        else:
            self._fail(error)
        scheduler = self.scheduler
        return scheduler is not None and scheduler.route_over(error is not None)

    def not_sent(self, error: BaseException) -> None:
        """Take note that the server has failed to send a message, though the client is there.

        :param error: what it has raised
        """
        if self.is_closed and self._is_failure(error):  # before that, the exit stack tells
            self._fail(error)

    def response_over(self) -> None:
        """Release what waits for the response, since it was sent."""
        # After an error an exception handler is yet to send the response: what waits for that,
        # waits until the connection is closed.
        scheduler = self.scheduler
        if scheduler is None or scheduler.is_over:
            return
        if self.returned and not self._failed:
            scheduler.response_over(False)

    def peer_left(self) -> None:
        """Release everything, since the WebSocket's peer has disconnected."""
        self.client_gone = True
        if self.scheduler is not None:
            self.scheduler.response_over(False)

    def close(self) -> None:
        """Release what is left, since the app is done with the connection."""
        scheduler = self.scheduler
        if scheduler is None:
            return
        scheduler.close(self._failed or not self.returned)
        self.end = None
        supervisor = self.supervisor
        supervisor.open_requests.discard(self)
        if supervisor.live is not None and supervisor.live.empty is not None:
            supervisor.live.wake_if_empty()
        token = self._token
        if token is not None:
            self._token = None
            _restore(_current.reset, token)

    def has_waiting(self) -> bool:
        """Return whether tasks wait for one of the connection's moments."""
        assert self.scheduler is not None
        return self.scheduler.has_waiting()

    def waiting(self) -> tuple[Task, ...]:
        """Return them, from any thread."""
        assert self.scheduler is not None
        return self.scheduler.waiting()

    def end_response(self) -> None:
        """Release what waits for the response, if that has begun: the server is done with it."""
        if self.returned:
            self.client_gone = True
            self.response_over()

    def drop_waiting(self, reason: str) -> None:
        """Give up the tasks that wait for one of the connection's moments."""
        assert self.scheduler is not None
        self.scheduler.drop_waiting(reason)

    def made_late(self) -> None:
        """Take note that tasks may come to wait though the endpoint is over, from any thread."""
        if self.supervisor.is_draining:
            self.end_response()  # as the drain did with the other ones
        elif self.endpoint is not None and self.is_exact and self.returned:
            # The response may know nothing of it. What is pushed last, hears of the end first,
            # before dependencies are closed.
            self._push_exit()

    def watch_exit(self) -> None:
        """Have the request's exit stack tell when and how it is closed, if ``Tasks`` was taken."""
        if self.scheduler is not None and not self._watches_exit:
            self._push_exit()

    def _push_exit(self) -> None:
        self._watches_exit = True
        stack: Any = self._request_stack  # its type wants an __enter__, too, which it never calls
        stack.push(self)

    def _fail(self, error: BaseException) -> None:
        self._failed = True
        # Before anything is released, so that whoever asks finds it.
        if self.end is not None:
            self.end.error = error

    def _exit_function_stack(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the closing of the stack for the endpoint's end, on a route that is not ours."""
        # Of all that can go wrong after the endpoint, it is the one that can be told apart.
        is_late = isinstance(exc, ResponseValidationError)
        is_failure = exc is not None and self._is_failure(exc) and not is_late
        self.endpoint_over(exc if is_failure else None)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Be the safety net under every way in which a response can end."""
        token = self._token
        if token is not None:  # else it has been called, or the connection is closed
            self._token = None
            _restore(_current.reset, token)
        self.is_closed = True
        if exc is not None and self._is_failure(exc):
            self._fail(exc)
        self.response_over()

    def _is_attempted_again(self, request_stack: ExitStack) -> bool:
        """Return whether the request is handled once more, with moments of its own.

        A route class may do so within the route, after an error; a middleware around the route,
        which then has another exit stack. An exception handler that asks for the tasks finds the
        same one, closed.
        """
        if self.is_closed:
            return request_stack is not self._request_stack
        return self._failed

    def _is_failure(self, exc: BaseException) -> bool:
        if self.sent or self.client_gone or isinstance(exc, WebSocketDisconnect):
            return False
        # Whoever cancels a response that is being sent, takes nothing back of what the endpoint
        # has done: a middleware does so when its client has left.
        return not (self.returned and isinstance(exc, anyio.get_cancelled_exc_class()))


class Unserved:
    """What stands in for the connection where there is no ``add_tasks``: it has no tasks."""

    endpoint: Callable[..., Any] | None = None
    is_exact = True
    scheduler = None

    def take_scheduler(self, scope: Scope, watch_exit: bool) -> Never:
        """Refuse to.

        :raises FastAPITasksUninitializedAppError: always
        """
        raise FastAPITasksUninitializedAppError(UninitializedReason.NO_ADD_TASKS)

    def watch_exit(self) -> None:
        """Do nothing: no task hears of the end."""

    def endpoint_over(self, error: BaseException | None = None) -> bool:
        """Do nothing, and owe no task a turn of the loop."""
        return False


_current: ContextVar[Connection | None] = ContextVar("fastapi_tasks_connection", default=None)


# Each request asks several times, and a function of Python's would cost twice as much.
current_connection: Callable[[], Connection | None] = _current.get
"""Return the connection that the caller serves, if ``Tasks`` was taken in it."""


def leave_outer_connection(scope: Scope) -> None:
    """Forget, until this connection is over, one from within which it was made.

    :param scope: the scope of a request, which may have been sent from within another one
    """
    request_stack: ExitStack = scope[_REQUEST_STACK]
    request_stack.callback(_restore, _current.reset, _current.set(None))


def _restore(reset: Callable[[Token[T]], None], token: Token[T]) -> None:
    """Take back that a context variable was set, if the context is still there.

    A route class may run its handler in a task of its own, whose context goes with it.
    """
    try:
        reset(token)
    except ValueError:
        return
