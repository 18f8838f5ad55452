"""What can be run as a task, and whether it has to be awaited or run in a thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from .errors import InvalidTaskError

__all__ = [
    "discard",
    "is_async",
    "is_coroutine_endpoint",
    "is_generator",
    "is_generator_endpoint",
    "parts",
    "printable",
    "qualified_name",
]


def is_async(func: object) -> bool:
    """Return whether calling ``func`` makes a coroutine; what does not, runs in a thread.

    :param func: what was given to ``schedule``
    :raises InvalidTaskError: it can be neither called nor awaited as a task
    """
    if not callable(func):
        raise _not_a_function(func)
    if is_generator(func):
        name = _short_name(_impartial(func))
        loop = "for" if inspect.isgeneratorfunction(_called(func)) else "async for"
        raise InvalidTaskError(
            f"the generator function {name}, whose body only runs when it is iterated over",
            instead=f"schedule(consume, ...)  # a function with {loop} item in {name}(...): ...",
        )
    return inspect.iscoroutinefunction(_called(func))


def is_generator(func: Callable[..., object]) -> bool:
    """Return whether calling ``func`` makes a generator, of either kind.

    :param func: any callable
    """
    called = _called(func)
    return inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)


def is_coroutine_endpoint(endpoint: Callable[..., object]) -> bool:
    """Return whether FastAPI awaits an endpoint: it looks through wrappers too.

    :param endpoint: any callable
    """
    return any(inspect.iscoroutinefunction(face) for face in _faces(endpoint))


def is_generator_endpoint(endpoint: Callable[..., object]) -> bool:
    """Return whether FastAPI streams what an endpoint yields: it looks through wrappers too.

    :param endpoint: any callable
    """
    return any(is_generator(face) for face in _faces(endpoint))


def _faces(endpoint: Callable[..., object]) -> tuple[Callable[..., object], ...]:
    called = _called(endpoint)
    return called, inspect.unwrap(called), inspect.unwrap(_impartial(endpoint))


def parts(func: Callable[..., object]) -> tuple[Callable[..., object], ...]:
    """Return what may carry the attributes of a callable: what it is, and what a call ends in.

    :param func: any callable; a ``functools.partial`` is looked through
    """
    return _impartial(func), _called(func)


def _impartial(func: Callable[..., object]) -> Callable[..., object]:
    while isinstance(func, functools.partial):
        func = func.func
    return func


def _called(func: Callable[..., object]) -> Callable[..., object]:
    """Return the function or method that a call ends in."""
    target: Any = _impartial(func)
    return target if inspect.isclass(target) or inspect.isroutine(target) else target.__call__


def qualified_name(func: Callable[..., object]) -> str:
    """Return what a callable is called in logs: its qualified name, or its class's.

    :param func: the callable; a ``functools.partial`` is looked through
    """
    if type(func) is FunctionType:
        return func.__qualname__
    func = _impartial(func)
    name = getattr(func, "__qualname__", None)
    return name if isinstance(name, str) else type(func).__qualname__


def printable(text: str) -> str:
    """Return a text with everything escaped that could end a line of a log or move a cursor.

    :param text: a name, which may be made from what a client has sent
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def discard(value: object) -> None:
    """Close what was given by mistake, if it is a coroutine.

    That it was never awaited would be warned about too, and far from here.

    :param value: anything
    """
    if inspect.iscoroutine(value):
        value.close()


def _short_name(func: object) -> str:
    return getattr(func, "__name__", type(func).__name__)


def _not_a_function(func: object) -> InvalidTaskError:
    if inspect.iscoroutine(func):
        discard(func)
        name = _short_name(func)
        return InvalidTaskError(
            f"a coroutine, the result of calling {name}",
            instead=f"schedule({name}, ...)  # the function, not its call",
        )
    return InvalidTaskError(
        f"{type(func).__name__}, which cannot be called",
        instead="schedule(send_receipt, order.id)",
    )
