"""Endpoints of several kinds with one body, so that a promise is tested on each of them."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from fastapi_tasks import Tasks, TasksScheduler

Kind = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A decorator that makes an endpoint of a function."""

Chunks = Callable[[], AsyncIterator[str]]
Schedule = Callable[[TasksScheduler], object]
AddStream = Callable[[APIRouter, Schedule, Chunks], None]
"""Adds ``GET /``, which schedules something and then streams what the chunks are."""


def in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the function as it is: FastAPI runs it in a worker thread."""
    return function


def in_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a coroutine function that does the same."""

    @functools.wraps(function)
    async def coroutine_function(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return coroutine_function


both_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(in_thread, id="def"), pytest.param(in_loop, id="async-def")]
)

_needs_yield = pytest.mark.skipif(
    not hasattr(APIRoute("/", in_thread), "is_json_stream"),
    reason="this FastAPI does not stream what endpoints yield",
)


def returned_stream(router: APIRouter, schedule: Schedule, chunks: Chunks) -> None:
    """Add an endpoint that returns a ``StreamingResponse``."""

    @router.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        schedule(tasks)
        return StreamingResponse(chunks())


def raw_stream(router: APIRouter, schedule: Schedule, chunks: Chunks) -> None:
    """Add an endpoint whose ``yield`` makes the body as it is."""
    _yielding(router, schedule, chunks, response_class=StreamingResponse)


def json_lines(router: APIRouter, schedule: Schedule, chunks: Chunks) -> None:
    """Add an endpoint whose ``yield`` makes a line of JSON."""
    _yielding(router, schedule, chunks)


def server_sent_events(router: APIRouter, schedule: Schedule, chunks: Chunks) -> None:
    """Add an endpoint whose ``yield`` makes a server-sent event."""
    sse = pytest.importorskip("fastapi.sse")
    _yielding(router, schedule, chunks, response_class=sse.EventSourceResponse)


def _yielding(router: APIRouter, schedule: Schedule, chunks: Chunks, **options: Any) -> None:
    @router.get("/", **options)
    async def endpoint(tasks: Tasks) -> AsyncIterator[str]:
        schedule(tasks)
        async for chunk in chunks():
            yield chunk


_YIELDING: list[AddStream] = [raw_stream, json_lines, server_sent_events]
_PARAMS = [pytest.param(add, id=add.__name__, marks=_needs_yield) for add in _YIELDING]

every_yield = pytest.mark.parametrize("add_stream", _PARAMS)
every_stream = pytest.mark.parametrize(
    "add_stream", [pytest.param(returned_stream, id="returned_stream"), *_PARAMS]
)
