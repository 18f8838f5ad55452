"""How tasks get into an endpoint: :class:`TasksRoute`, :func:`get_tasks` and :data:`Tasks`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeAlias, TypeGuard, cast, get_args
from weakref import WeakValueDictionary

from fastapi import Depends, Request, Response, WebSocket, params
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import ValidationException
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import BaseRoute
from starlette.types import Scope

from .callables import is_coroutine_endpoint, is_generator_endpoint, qualified_name
from .connection import (
    CONNECTION,
    Connection,
    Unserved,
    current_connection,
    leave_outer_connection,
)
from .errors import FastAPITasksUninitializedAppError, UninitializedReason
from .observer import logger
from .scheduler import TasksScheduler

__all__ = ["Tasks", "TasksRoute", "get_tasks"]

AnyConnection: TypeAlias = "HTTPConnection[Any]"

_WRAPPER = "__fastapi_tasks_wrapper__"
_TAKES_TASKS = "__fastapi_tasks_takes_tasks__"
_TAKEN = "fastapi_tasks_taken"
_PLAIN_RESPONSES = frozenset({HTMLResponse, JSONResponse, PlainTextResponse, Response})
"""They are there as a whole when they are sent: nothing but that can fail."""

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
    served: Connection | None = scope.get(CONNECTION)
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
        self._wrapper = _wrapped(endpoint)
        super().__init__(path, self._wrapper, **kwargs)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which knows when the response was made and when it is over.

        If nothing on the route can get at tasks, it is FastAPI's own, and the route costs nothing.
        """
        handler = super().get_route_handler()
        endpoint = self._wrapper
        takes_tasks = hasattr(endpoint, _TAKES_TASKS)
        is_wrapped = _is_wrapper(endpoint)
        users_endpoint = cast(Any, endpoint).__wrapped__ if is_wrapped else endpoint
        # FastAPI makes every response for its request, but for those of the endpoint, and copies
        # are spared. Another route class, or a wrapper of the user's that is not the function
        # below, may return one that serves other requests too.
        is_fastapis = cast(Any, super().get_route_handler).__func__ is APIRoute.get_route_handler
        is_fresh = is_fastapis and (is_wrapped or is_generator_endpoint(endpoint))
        dependant = _dependant_of(handler) if is_fastapis else None
        # Whether nobody's code comes between its endpoint and its response.
        is_direct = is_wrapped and dependant is not None and not dependant.dependencies
        if dependant is not None and is_wrapped:
            # "Integrations may wrap dependant.call while constructing the handler", FastAPI says.
            if is_direct and not takes_tasks and not _gets_connection(dependant):
                dependant.call = self.endpoint = users_endpoint
                return handler
            dependant.call = endpoint

        async def handle(request: Request) -> Response:
            scope = request.scope
            scope["endpoint"] = users_endpoint
            is_inner = current_connection() is not None
            if is_inner:
                leave_outer_connection(scope)
            connection: Connection = scope.get(CONNECTION) or cast(Connection, Unserved())
            outer, connection.endpoint = connection.endpoint, endpoint
            # Of an inner one, the exit stack has the last word: it leads back to the outer one.
            ends_at_once = is_direct and outer is None and not is_inner
            if not is_wrapped:
                connection.is_exact = False
            try:
                if takes_tasks:
                    # Here and not in the endpoint's wrapper, which may run in a thread. What is
                    # asked here is what _is_overridden() asks.
                    scope[_TAKEN] = (
                        await _take_tasks(request)
                        if get_tasks in getattr(scope.get("app"), "dependency_overrides", ())
                        else connection.take_scheduler(scope, not ends_at_once)
                    )
                response = await handler(request)
                if connection.scheduler is None:
                    return response
                if not is_wrapped and connection.endpoint_over():
                    # The wrapper would have done so, but a generator endpoint has none: it has
                    # returned as soon as the generator is there.
                    await connection.supervisor.turn()
                if (
                    ends_at_once
                    and type(response) in _PLAIN_RESPONSES
                    and response.background is None
                ):
                    connection.is_closed = True  # its last message tells all that an exit could
                else:
                    response = _releasing(response, connection, is_fresh, ends_at_once)
                connection.response = None  # tasks may keep the connection for long
                return response
            except BaseException as error:
                connection.watch_exit()
                connection.endpoint_over(error)
                _name_users_file(error, endpoint)
                raise
            finally:
                if outer is not None:
                    # An endpoint has called the app's router, and is still to return itself.
                    connection.endpoint = outer

        return handle


class _AfterResponse(BackgroundTasks):
    """Releases a request's tasks when its response was sent, before its background tasks run."""

    def __init__(self, connection: Connection, then: BackgroundTask | None) -> None:
        super().__init__(() if then is None else (then,))
        self._connection = connection

    async def __call__(self) -> None:
        connection = self._connection
        connection.response_over()
        if self.tasks:
            if connection.scheduler is not None and connection.scheduler.takes_turn():
                await connection.supervisor.turn()
            await super().__call__()


def _releasing(
    response: Response, connection: Connection, is_fresh: bool, ends_at_once: bool
) -> Response:
    """Return a response whose end releases the request's tasks, whatever that end is.

    :param is_fresh: whether it was made for this request, unless the endpoint has returned it
    :param ends_at_once: whether the exit stack is closed as soon as it was sent
    """
    assert connection.scheduler is not None
    connection.watch_exit()
    then = response.background
    waits = not connection.is_exact or "after_response" in connection.scheduler.batches
    if then is None and (ends_at_once or not waits):
        return response
    if response is not connection.response and not (is_fresh and connection.returned):
        response = copy.copy(response)
    response.background = _AfterResponse(connection, then)
    return response


def _wrapped(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return the endpoint in a wrapper of its own kind that knows when it has returned."""
    if _is_wrapper(endpoint) or is_generator_endpoint(endpoint):
        return endpoint
    wrap = _wrapped_coroutine if is_coroutine_endpoint(endpoint) else _wrapped_function
    parameter, signature = _without_dependency(endpoint)
    wrapper = wrap(endpoint, parameter)
    if signature is not None:
        setattr(wrapper, "__signature__", signature)  # noqa: B010 - functions are not known to have one
        setattr(wrapper, _TAKES_TASKS, True)
    if not hasattr(endpoint, "__name__"):
        # A partial or an instance, which FastAPI calls by the name of its class.
        wrapper.__name__ = type(endpoint).__name__
        wrapper.__qualname__ = type(endpoint).__qualname__
    # functools.wraps copies attributes, also from our wrapper to one that a user puts around it,
    # so that a mark alone would not tell the two apart.
    setattr(wrapper, _WRAPPER, wrapper)
    return wrapper


def _wrapped_coroutine(endpoint: Callable[..., Any], parameter: str | None) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = None if parameter is None else kwargs.get(parameter)
        # The first question decides nearly every call, and costs a fifth of the second one.
        if parameter is not None and (type(given) is Request or _is_connection(given)):
            taken = given.scope.get(_TAKEN)
            kwargs[parameter] = await _take_tasks(given) if taken is None else taken
        try:
            result = await endpoint(*args, **kwargs)
        except BaseException as error:
            _endpoint_failed(wrapper, given, error)
            raise
        connection = current_connection()
        if connection is None or connection.endpoint is not wrapper:
            return result
        if connection.endpoint_over():
            await connection.supervisor.turn()
        if isinstance(result, Response):
            result = connection.response = copy.copy(result)  # it may serve others too
        return result

    return wrapper


def _wrapped_function(endpoint: Callable[..., Any], parameter: str | None) -> Callable[..., Any]:
    from anyio import from_thread  # an app without sync endpoints has no use for it

    @functools.wraps(endpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = None if parameter is None else kwargs.get(parameter)
        if parameter is not None and _is_connection(given):
            taken = given.scope.get(_TAKEN)
            kwargs[parameter] = from_thread.run(_take_tasks, given) if taken is None else taken
        try:
            result = endpoint(*args, **kwargs)
        except BaseException as error:
            _endpoint_failed(wrapper, given, error)
            raise
        connection = current_connection()
        if connection is None or connection.endpoint is not wrapper:
            return result
        if connection.endpoint_over():
            connection.supervisor.turn_from_thread()
        if isinstance(result, Response):
            result = connection.response = copy.copy(result)  # it may serve others too
        return result

    return wrapper


def _without_dependency(
    endpoint: Callable[..., Any],
) -> tuple[str | None, inspect.Signature | None]:
    """Return which parameter takes ``Tasks``, and the signature with the connection in its place.

    For FastAPI to resolve a dependency costs half of what it does for a whole request; a
    connection costs it nothing. Whatever is not plain to see is left to FastAPI.
    """
    try:
        parameters = inspect.signature(endpoint, eval_str=True).parameters
    except Exception:  # its annotations are for FastAPI to understand, or to complain of
        return None, None
    names = [name for name, parameter in parameters.items() if _takes_tasks(parameter)]
    if len(names) != 1 or any(map(_takes_connection, parameters.values())):
        return None, None
    signature = inspect.signature(endpoint)
    replaced = [
        parameter.replace(annotation=HTTPConnection) if name == names[0] else parameter
        for name, parameter in signature.parameters.items()
    ]
    return names[0], signature.replace(parameters=replaced)


def _takes_tasks(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter is annotated with :data:`Tasks`, or says the same by itself."""
    if parameter.default is not inspect.Parameter.empty:
        return False
    kind, *marks = get_args(parameter.annotation) or (None,)
    return (
        kind is TasksScheduler
        and len(marks) == 1
        and type(marks[0]) is params.Depends
        and marks[0].dependency is get_tasks
    )


def _takes_connection(parameter: inspect.Parameter) -> bool:
    """Return whether FastAPI gives it the connection: it does so for one parameter only."""
    annotation, *_ = get_args(parameter.annotation) or (parameter.annotation,)
    return (
        isinstance(annotation, type)
        and issubclass(annotation, HTTPConnection)
        and not issubclass(annotation, Request | WebSocket)
    )


async def _take_tasks(connection: HTTPConnection) -> Any:
    """Return what FastAPI would give to a parameter that is annotated with :data:`Tasks`."""
    if _is_overridden(connection.scope):
        return await _ask_override(connection)
    return await get_tasks(connection)


async def _ask_override(connection: HTTPConnection) -> Any:
    """Have FastAPI do the same, as somebody has put another dependency in our place."""
    taken: Any = None

    async def take(tasks: Tasks) -> None:
        nonlocal taken
        taken = tasks

    # The override may have parameters of the path, too.
    path = "".join(f"/{{{name}}}" for name in connection.path_params)
    route = APIRoute(path, take, dependency_overrides_provider=connection.scope["app"])
    await route.get_route_handler()(cast(Request, connection))
    return taken


def _is_overridden(scope: Scope) -> bool:
    # FastAPI's app puts itself there; another one has no overrides.
    return get_tasks in getattr(scope.get("app"), "dependency_overrides", ())


def _is_connection(given: Any) -> TypeGuard[AnyConnection]:
    """Return whether FastAPI has given its connection, and not somebody else the tasks."""
    return isinstance(given, HTTPConnection)


def _endpoint_failed(wrapper: Callable[..., Any], given: Any, error: BaseException) -> None:
    """Tell the connection that its endpoint has raised.

    A user's own wrapper may call ours; then it is the user's that is the endpoint.
    """
    connection = current_connection()
    if connection is not None and connection.endpoint is wrapper:
        connection.endpoint_over(error)
    if _is_connection(given):
        given.scope.pop(_TAKEN, None)  # the endpoint may be attempted again, with other tasks


def _is_wrapper(endpoint: Callable[..., Any] | None) -> bool:
    return getattr(endpoint, _WRAPPER, None) is endpoint


def _dependant_of(handler: Callable[..., Any]) -> Dependant | None:
    """Return what FastAPI's handler resolves and calls, as far as one can see.

    The route does not know the dependencies of a router that it is included by.
    """
    closure = cast(Any, handler).__closure__ or ()
    cells = zip(cast(Any, handler).__code__.co_freevars, closure, strict=True)
    contents: list[object] = [cell.cell_contents for name, cell in cells if name == "dependant"]
    return next((each for each in contents if isinstance(each, Dependant)), None)


def _gets_connection(dependant: Dependant) -> bool:
    """Return whether FastAPI hands an endpoint its connection, by which it gets at tasks."""
    return (
        dependant.request_param_name is not None or dependant.http_connection_param_name is not None
    )


def _name_users_file(error: BaseException, endpoint: Callable[..., Any]) -> None:
    """Undo that FastAPI takes the wrapper's file for the endpoint's."""
    code = getattr(inspect.unwrap(endpoint), "__code__", None)
    if (
        code is not None
        and isinstance(error, ValidationException)
        and error.endpoint_file == __file__
    ):
        error.endpoint_file = code.co_filename


def _note_plain_route(scope: Scope) -> None:
    """Say once for each route that its moments are not exact."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    route = scope["route"]
    # Of one of ours, a handler of exceptions asks: there is no moment any more.
    if id(route) in _noted or isinstance(route, TasksRoute):
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
