"""``add_tasks``: what ties a supervisor to an app's lifespan and its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import SupervisorSettings, TaskConfig
from .connection import CONNECTION, Connection, current_connection
from .engine import Engine
from .errors import (
    AddTasksError,
    FastAPITasksUninitializedAppError,
    TooManyTasksError,
    UninitializedReason,
)
from .observer import TaskObserver, logger
from .overload import refuse
from .routing import TasksRoute
from .supervisor import Supervisor
from .tasks import find_current_task, owner_of

__all__ = ["add_tasks", "get_supervisor"]

_STATE = "fastapi_tasks_supervisor"


def add_tasks(
    app: FastAPI,
    *,
    config: TaskConfig | None = None,
    observers: Sequence[TaskObserver] = (),
    grace: float = 0.0,
    shutdown_timeout: float | None = None,
    threads: int = 40,
    max_tasks: int | None = None,
    history: int = 100,
    engines: Sequence[Engine] = (),
) -> None:
    r"""Let an app's endpoints take ``tasks: Tasks``.

    The app gets a supervisor, which starts before the app's own start-up and is drained before
    its own shutdown, and routes that are declared on the app from now on are
    :class:`TasksRoute`\ s. It may be called before or after routes, routers, middlewares and
    lifespans are added, but not once the app is being served. A second call with the same
    arguments does nothing.

    An app that is mounted in another one that has tasks too, is served by that one's supervisor:
    of its own arguments, ``config`` counts, over the outer one's.

    :param app: the app
    :param config: the configuration of every task whose function or call does not say otherwise
    :param observers: functions that are told what happens, after the log
    :param grace: seconds that the shutdown leaves all tasks to end by themselves, before it
        cancels the unshielded ones; 0 by default. The last 5 seconds of ``shutdown_timeout``, or
        its second half if that is shorter, are for cleaning up, however long the grace
    :param shutdown_timeout: seconds within which the tasks' shutdown is over, whatever still
        runs; ``None``, the default: it waits for shielded tasks without end
    :param threads: how many sync tasks run at once; 40 by default
    :param max_tasks: how many tasks may be live before a request that takes ``Tasks`` is answered
        with status 503, until some have ended; ``None``, the default: no request is
    :param history: how many tasks that are over the supervisor remembers in its ``recent``; 100
        by default, 0: none
    :param engines: what runs functions that are registered with it, durably or on other
        machines; started and stopped with the supervisor
    :raises AddTasksError: it is no FastAPI app, it is being served, or it has been given tasks
        with other arguments
    :raises InvalidSettingError: an argument has a value that it cannot have
    """
    _require_fastapi(app)
    supervisor = Supervisor(
        config=config,
        observers=observers,
        grace=grace,
        shutdown_timeout=shutdown_timeout,
        threads=threads,
        max_tasks=max_tasks,
        history=history,
        engines=engines,
    )
    known = _supervisor_of(app)
    if known is not None:
        if known.settings != supervisor.settings:
            raise AddTasksError(
                "it was called for this app before, with other arguments",
                instead="one add_tasks(app, ...) with all of them",
            )
        return
    try:
        app.add_middleware(TasksMiddleware, supervisor=supervisor)
    except RuntimeError:
        raise AddTasksError(
            "the app is being served already",
            instead="add_tasks(app) where the app is made, right after app = FastAPI()",
        ) from None
    if TooManyTasksError not in app.exception_handlers:
        handler: Any = refuse  # of both kinds, of which Starlette's type knows one at a time
        app.add_exception_handler(TooManyTasksError, handler)
    setattr(app.state, _STATE, supervisor)
    app.router.route_class = _tasks_route_class(app.router.route_class)


def get_supervisor(app: FastAPI | None = None) -> Supervisor:
    """Return the supervisor of an app, on which tasks can be scheduled from anywhere.

    :param app: the app; without one, that of the task or the request that the caller runs in
    :raises FastAPITasksUninitializedAppError: the app has none, or without an app, the caller
        runs neither in a task nor in a request that has taken ``Tasks``
    """
    if app is not None:
        supervisor = _supervisor_of(app)
        if supervisor is None:
            raise FastAPITasksUninitializedAppError(UninitializedReason.NO_ADD_TASKS)
        return supervisor
    task = find_current_task()
    if task is not None:
        owner = owner_of(task)
        assert isinstance(owner, Supervisor)
        return owner
    connection = current_connection()
    if connection is None:
        raise FastAPITasksUninitializedAppError(UninitializedReason.NO_CONTEXT)
    return connection.supervisor


class TasksMiddleware:
    """Starts and drains the supervisor with the lifespan, and tells connections of their end.

    :param app: the next ASGI application
    :param supervisor: the app's
    """

    def __init__(self, app: ASGIApp, *, supervisor: Supervisor) -> None:
        self._app = app
        self._supervisor = supervisor
        self._config = supervisor.settings.config
        self._noted_mounted = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a scope, as ASGI says."""
        kind = scope["type"]
        if kind != "http" and kind != "websocket":  # noqa: PLR1714 - a tuple takes twice as long
            serve = self._serve_lifespan if kind == "lifespan" else self._app
            await serve(scope, receive, send)
            return
        supervisor = self._supervisor
        outer: Connection | None = scope.get(CONNECTION)
        if outer is None or outer.supervisor is supervisor:
            connection = Connection(supervisor, self._config)
        else:
            connection = self._connect_mounted(outer)
        scope[CONNECTION] = connection
        if kind == "websocket":
            receive = _telling(receive, connection)

        async def sending(message: Message) -> None:
            step = message["type"]
            if step == "http.response.start" and connection.end is not None:
                connection.end.status = message["status"]
            try:
                await send(message)
            except OSError:
                # https://asgi.readthedocs.io/en/latest/specs/www.html#disconnected-client-send-exception
                if kind == "websocket":
                    connection.peer_left()
                else:
                    connection.client_gone = True
                raise
            except BaseException as error:
                connection.not_sent(error)
                raise
            if step == "http.response.body" and not message.get("more_body", False):
                connection.sent = True
                scheduler = connection.scheduler
                if (
                    connection.is_closed
                    and scheduler is not None
                    and "after_response" in scheduler.batches  # else it can wait for the close
                ):
                    connection.response_over()

        stand_in = connection.supervisor.stand_in
        if stand_in is not None:
            stand_in.begin_request()
        try:
            await self._app(scope, receive, sending)
        finally:
            connection.close()
            if stand_in is not None:
                # A test's WebSocket is cancelled when its block is left, and has ended well then.
                await stand_in.end_request(shield=kind == "websocket")

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        supervisor = self._supervisor
        is_ours = False

        async def drain() -> None:
            if is_ours and supervisor.is_running:
                await supervisor.drain()

        async def receiving() -> Message:
            nonlocal is_ours
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await supervisor.start()
                except Exception as error:
                    # Starlette lets it out as it is, and servers take that for an app without
                    # a lifespan, which they serve all the same.
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    raise
                is_ours = True
            else:  # lifespan.shutdown: there is no third
                await drain()
            return message

        async def sending(message: Message) -> None:
            # After this message the server ends, and with it the loop that tasks need.
            if message["type"] == "lifespan.startup.failed":
                await drain()
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except GeneratorExit:
            # Collected after its event loop was closed, where nothing can be awaited. By now the
            # supervisor may run in another one.
            is_ours = False
            raise
        finally:
            await drain()  # the server gave up the lifespan without a word

    def _connect_mounted(self, outer: Connection) -> Connection:
        """Return what a scope is to have if the app is mounted in one that has tasks too.

        :param outer: what the scope has from that one
        """
        self._note_mounted()
        config = outer.config.merge(self._config)
        return Connection(outer.supervisor, config)

    def _note_mounted(self) -> None:
        if self._noted_mounted:
            return
        self._noted_mounted = True
        settings = self._supervisor.settings
        if settings != SupervisorSettings(config=settings.config):
            logger.warning(
                "A mounted app's tasks are run by the outer app's supervisor: of the arguments "
                "of its add_tasks(), only config counts. Move the others to the outer "
                "add_tasks(app, ...)"
            )


def _telling(receive: Receive, connection: Connection) -> Receive:
    """Return what receives the same messages of a WebSocket, and tells when its peer has left."""

    async def receiving() -> Message:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            connection.peer_left()
        return message

    return receiving


def _require_fastapi(app: object) -> None:
    if not isinstance(app, FastAPI):
        got = f"the class {app.__name__}" if isinstance(app, type) else type(app).__name__
        raise AddTasksError(
            f"expected a FastAPI app, got {got}",
            instead="add_tasks(app)  # app = FastAPI()",
        )


def _supervisor_of(app: FastAPI) -> Supervisor | None:
    return getattr(getattr(app, "state", None), _STATE, None)


def _tasks_route_class(route_class: type[APIRoute]) -> type[APIRoute]:
    """Return the route class that does what the given one does, and is a :class:`TasksRoute`."""
    if issubclass(route_class, TasksRoute):
        return route_class
    if route_class is APIRoute:
        return TasksRoute
    return type(f"Tasks{route_class.__name__}", (TasksRoute, route_class), {})
