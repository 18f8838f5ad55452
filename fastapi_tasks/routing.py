"""How tasks get into an endpoint: :class:`TasksRoute`, :func:`get_tasks` and :data:`Tasks`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Annotated, Any, TypeAlias, cast
from weakref import WeakValueDictionary

from fastapi import Depends, Request, Response
from fastapi.exceptions import ValidationException
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from .callables import is_coroutine_endpoint, is_generator_endpoint, qualified_name
from .connection import (
    Connection,
    connection_of,
    current_connection,
    leave_outer_connection,
)
from .errors import FastAPITasksUninitializedAppError, UninitializedReason
from .observer import logger
from .scheduler import TasksScheduler

__all__ = ["Tasks", "TasksRoute", "get_tasks"]

_WRAPPER = "__fastapi_tasks_wrapper__"

# Routes cannot be hashed, so they are known by their ids, as long as they live.
_noted: WeakValueDictionary[int, BaseRoute] = WeakValueDictionary()


async def get_tasks(connection: HTTPConnection) -> TasksScheduler:
    """Return the scheduler of a request or WebSocket: the dependency behind :data:`Tasks`.

    In tests, ``app.dependency_overrides[get_tasks]`` puts another one in its place.

    :param connection: the request or WebSocket
    :return: the same one, however often it is asked for in a request; the batches of another
        one, that an override returns, are released by nobody but the test
    :raises FastAPITasksUninitializedAppError: there is no ``add_tasks``, or the app's lifespan
        is not running
    """
    scope = connection.scope
    served = connection_of(scope)
    if served is None:
        raise FastAPITasksUninitializedAppError(UninitializedReason.NO_ADD_TASKS)
    scheduler = served.take_scheduler(scope)
    if served.endpoint is None:
        _note_plain_route(scope)
    return scheduler


Tasks: TypeAlias = Annotated[TasksScheduler, Depends(get_tasks)]
"""The type of an endpoint's parameter that takes the request's tasks: ``tasks: Tasks``."""


class TasksRoute(APIRoute):
    """A route whose tasks start exactly at their moments.

    ``APIRouter(route_class=TasksRoute)`` makes a router's routes such; ``add_tasks(app)`` those
    that are declared on the app from then on. In everything else it is what it inherits from:
    combine it with other route classes by inheritance, itself first.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, _wrapped(endpoint), **kwargs)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which knows when the response was made and when it is over."""
        handler = super().get_route_handler()
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            leave_outer_connection(request.scope)
            connection = connection_of(request.scope)
            outer = None
            if connection is not None:
                outer, connection.endpoint = connection.endpoint, endpoint
            try:
                response = await handler(request)
                if connection is None or connection.scheduler is None:
                    return response
                return await _release_after(response, connection)
            except BaseException as error:
                if connection is not None:
                    connection.endpoint_over(error)
                if isinstance(error, ValidationException):
                    _name_users_file(error, endpoint)
                raise
            finally:
                if connection is not None and outer is not None:
                    # An endpoint has called the app's router, and is still to return itself.
                    connection.endpoint = outer

        return handle

    # Not async itself: every request would pay for one more coroutine.
    def handle(self, scope: Scope, receive: Receive, send: Send) -> CoroutineType[Any, Any, None]:
        """Handle a request that matched, with the user's own endpoint in the scope."""
        scope["endpoint"] = _original(self.endpoint)
        # Which kind of coroutine it is, mypy and pyright do not agree about.
        handling: CoroutineType[Any, Any, None] = cast(Any, super().handle(scope, receive, send))
        return handling


class _AfterResponse(BackgroundTasks):
    """Releases a request's tasks when its response was sent, before its background tasks run."""

    def __init__(self, connection: Connection, then: BackgroundTask | None) -> None:
        super().__init__(None if then is None else [then])
        self._connection = connection

    async def __call__(self) -> None:
        self._connection.response_over()
        if self.tasks:
            await _give_turn(self._connection)
            await super().__call__()


async def _release_after(response: Response, connection: Connection) -> Response:
    """Return a response that releases the request's tasks when it was sent."""
    if not _is_wrapper(connection.endpoint):
        # The wrapper would have done so, but a generator endpoint has none: it has returned as
        # soon as the generator is there.
        connection.endpoint_over()
        await _give_turn(connection)
    if response is not connection.response:
        response = copy.copy(response)
    connection.response = None  # tasks may keep the connection for long
    response.background = _AfterResponse(connection, response.background)
    return response


async def _give_turn(connection: Connection) -> None:
    if connection.takes_turn():
        await connection.supervisor.turn()


def _give_turn_from_thread(connection: Connection) -> None:
    if connection.takes_turn():
        connection.supervisor.turn_from_thread()


def _wrapped(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return the endpoint in a wrapper of its own kind that knows when it has returned."""
    if _is_wrapper(endpoint) or is_generator_endpoint(endpoint):
        return endpoint
    wrap = _wrapped_coroutine if is_coroutine_endpoint(endpoint) else _wrapped_function
    wrapper = wrap(endpoint)
    if not hasattr(endpoint, "__name__"):
        # A partial or an instance, which FastAPI calls by the name of its class.
        wrapper.__name__ = type(endpoint).__name__
        wrapper.__qualname__ = type(endpoint).__qualname__
    # functools.wraps copies attributes, also from our wrapper to one that a user puts around it,
    # so that a mark alone would not tell the two apart.
    setattr(wrapper, _WRAPPER, wrapper)
    return wrapper


def _wrapped_coroutine(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            result = await endpoint(*args, **kwargs)
        except BaseException as error:
            _endpoint_over(wrapper, error)
            raise
        connection = _endpoint_over(wrapper)
        if connection is None:
            return result
        await _give_turn(connection)
        return _own(result, connection)

    return wrapper


def _wrapped_function(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            result = endpoint(*args, **kwargs)
        except BaseException as error:
            _endpoint_over(wrapper, error)
            raise
        connection = _endpoint_over(wrapper)
        if connection is None:
            return result
        _give_turn_from_thread(connection)
        return _own(result, connection)

    return wrapper


def _endpoint_over(
    wrapper: Callable[..., Any], error: BaseException | None = None
) -> Connection | None:
    """Tell the connection that its endpoint is over, and return it, if it has taken tasks.

    A user's own wrapper may call ours; then it is the user's that is the endpoint.
    """
    connection = current_connection()
    if connection is None or connection.endpoint is not wrapper:
        return None
    connection.endpoint_over(error)
    return connection


def _is_wrapper(endpoint: Callable[..., Any] | None) -> bool:
    return getattr(endpoint, _WRAPPER, None) is endpoint


def _original(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    return endpoint.__wrapped__ if _is_wrapper(endpoint) else endpoint  # type: ignore[attr-defined]


def _own(result: Any, connection: Connection) -> Any:
    """Return a response that this request may change: the endpoint's may serve others too."""
    if isinstance(result, Response):
        result = connection.response = copy.copy(result)
    return result


def _name_users_file(error: ValidationException, endpoint: Callable[..., Any]) -> None:
    """Undo that FastAPI takes the wrapper's file for the endpoint's."""
    code = getattr(inspect.unwrap(endpoint), "__code__", None)
    if error.endpoint_file == __file__ and code is not None:
        error.endpoint_file = code.co_filename


def _note_plain_route(scope: Scope) -> None:
    """Say once for each route that its moments are not exact."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    route = scope["route"]
    if id(route) in _noted:
        return
    _noted[id(route)] = route
    moments = (
        "both batches start when it has returned or its peer has disconnected"
        if scope["type"] == "websocket"
        else "after_route starts when its response was made, after_response when its dependencies "
        "are closed; APIRouter(route_class=TasksRoute) makes the moments exact"
    )
    logger.debug(
        "%s takes tasks on a %s (%s): %s",
        qualified_name(scope["endpoint"]),
        type(route).__name__,
        route.path,
        moments,
    )
