"""How tasks get into an endpoint: :class:`TasksRoute`, :func:`get_tasks` and :data:`Tasks`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeAlias
from weakref import WeakKeyDictionary

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import ValidationException
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from .callables import is_coroutine_endpoint, is_generator_endpoint
from .connection import Connection, connection_of, exit_stacks
from .errors import FastAPITasksUninitializedAppError, UninitializedReason
from .observer import logger
from .scheduler import TasksScheduler, current_scheduler, make_current, restore_current

__all__ = ["Tasks", "TasksRoute", "get_tasks"]

_WRAPPER = "__fastapi_tasks_wrapper__"

_noted: WeakKeyDictionary[FastAPI, set[str]] = WeakKeyDictionary()


async def get_tasks(connection: HTTPConnection) -> TasksScheduler:
    """Return the scheduler of a request or WebSocket: the dependency behind :data:`Tasks`.

    In tests, ``app.dependency_overrides[get_tasks]`` puts another one in its place.

    :param connection: the request or WebSocket
    :return: the same one, however often it is asked for in a request
    :raises FastAPITasksUninitializedAppError: there is no ``add_tasks``, or the app's lifespan
        is not running
    """
    scope = connection.scope
    served = connection_of(scope)
    if served is None:
        raise FastAPITasksUninitializedAppError(UninitializedReason.NO_ADD_TASKS)
    if served.scheduler is not None:
        return served.scheduler
    if not served.is_exact:
        _note_plain_route(scope)
    return served.open_scheduler(scope)


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
        endpoint = _original(self.endpoint)

        async def handle(request: Request) -> Response:
            if current_scheduler() is not None:
                _leave_outer_request(request.scope)
            connection = connection_of(request.scope)
            if connection is not None:
                connection.is_exact = True
            try:
                response = await handler(request)
            except BaseException as error:
                if connection is not None:
                    connection.fail()
                if isinstance(error, ValidationException):
                    _name_users_file(error, endpoint)
                raise
            if connection is not None and connection.scheduler is not None:
                await _response_made(connection, connection.scheduler, response)
            return response

        return handle

    # Not async itself: every request would pay for one more coroutine.
    def handle(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, scope: Scope, receive: Receive, send: Send
    ) -> Coroutine[Any, Any, None]:
        """Handle a request that matched, with the user's own endpoint in the scope."""
        scope["endpoint"] = _original(self.endpoint)
        return super().handle(scope, receive, send)


class _AfterResponse(BackgroundTasks):
    """Releases a request's tasks when its response was sent, before its background tasks run."""

    def __init__(self, scheduler: TasksScheduler, then: BackgroundTask | None) -> None:
        super().__init__(None if then is None else [then])
        self._scheduler = scheduler

    async def __call__(self) -> None:
        self._scheduler.response_over(failed=False)
        await super().__call__()


async def _response_made(
    connection: Connection, scheduler: TasksScheduler, response: Response
) -> None:
    connection.returned = True
    # The endpoint's wrapper has done so, but a generator endpoint has none: it has returned when
    # the generator is there.
    scheduler.route_over(failed=False)
    await _give_turn(scheduler)
    response.background = _AfterResponse(scheduler, response.background)


async def _give_turn(scheduler: TasksScheduler) -> None:
    if scheduler.owes_turn:
        scheduler.owes_turn = False
        await scheduler.supervisor.turn()


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
        except BaseException:
            _route_over(failed=True)
            raise
        scheduler = _route_over(failed=False)
        if scheduler is None:
            return result
        await _give_turn(scheduler)
        return _own(result)

    return wrapper


def _wrapped_function(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            result = endpoint(*args, **kwargs)
        except BaseException:
            _route_over(failed=True)
            raise
        scheduler = _route_over(failed=False)
        if scheduler is None:
            return result
        if scheduler.owes_turn:
            scheduler.owes_turn = False
            scheduler.supervisor.turn_from_thread()
        return _own(result)

    return wrapper


def _is_wrapper(endpoint: Callable[..., Any]) -> bool:
    return getattr(endpoint, _WRAPPER, None) is endpoint


def _original(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    return endpoint.__wrapped__ if _is_wrapper(endpoint) else endpoint  # type: ignore[attr-defined]


def _route_over(*, failed: bool) -> TasksScheduler | None:
    scheduler = current_scheduler()
    if scheduler is not None:
        scheduler.route_over(failed=failed)
    return scheduler


def _own(result: Any) -> Any:
    """Return a response that this request may change: the endpoint's may serve others too."""
    return copy.copy(result) if isinstance(result, Response) else result


def _leave_outer_request(scope: Scope) -> None:
    """Forget, until this request is over, the one from within which it was made."""
    request_stack, _ = exit_stacks(scope)
    request_stack.callback(restore_current, make_current(None))


def _name_users_file(error: ValidationException, endpoint: Callable[..., Any]) -> None:
    code = getattr(inspect.unwrap(endpoint), "__code__", None)
    if error.endpoint_file == __file__ and code is not None:
        error.endpoint_file = code.co_filename
        error.endpoint_line = code.co_firstlineno


def _note_plain_route(scope: Scope) -> None:
    """Say once for each route that its moments are not exact."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    route, noted = scope["route"], _noted.setdefault(scope["app"], set())
    if route.path in noted:
        return
    noted.add(route.path)
    logger.debug(
        "%s is a %s: after_route starts when its response was made, after_response when its "
        "dependencies are closed. APIRouter(route_class=TasksRoute) makes the moments exact.",
        route.path,
        type(route).__name__,
    )
