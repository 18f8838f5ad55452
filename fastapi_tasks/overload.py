"""How a request is refused while too many tasks are live."""

from __future__ import annotations

from fastapi import Request, Response, WebSocket
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from starlette.websockets import WebSocketState

__all__ = ["refuse"]

_TRY_AGAIN_LATER = 1013  # https://www.iana.org/assignments/websocket/websocket.xhtml


async def refuse(connection: Request | WebSocket, error: Exception) -> Response | None:
    """Answer a request that was refused: the exception handler of ``TooManyTasksError``.

    A WebSocket is refused in its handshake where the server can do so, else by closing it.

    :param connection: the request or WebSocket
    :param error: the ``TooManyTasksError``
    :return: the response to a request; a WebSocket is done with
    """
    assert isinstance(error, HTTPException)
    response = _problem(error)
    if not isinstance(connection, WebSocket):
        return response
    state = connection.application_state
    extensions = connection.scope.get("extensions", {})
    if state is WebSocketState.CONNECTING and "websocket.http.response" in extensions:
        await connection.send_denial_response(response)
    elif state is not WebSocketState.DISCONNECTED:  # a dependency may have closed it
        await connection.close(_TRY_AGAIN_LATER)
    return None


def _problem(error: HTTPException) -> Response:
    # https://www.rfc-editor.org/rfc/rfc9457#section-4.2.1: a problem that is no more than its
    # status has this type, and the title that the status has.
    return JSONResponse(
        {
            "type": "about:blank",
            "title": "Service Unavailable",
            "status": error.status_code,
            "detail": error.detail,
        },
        error.status_code,
        error.headers,
        media_type="application/problem+json",
    )
