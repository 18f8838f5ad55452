"""What belongs to a request, and is closed or used up by the time a task needs it.

Whoever hands such a thing to a task is warned, and told what to pass instead.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from threading import RLock
from typing import Any, cast
from weakref import WeakValueDictionary, ref

from .callables import parts, qualified_name

__all__ = ["PLAIN", "RequestBoundArgumentWarning", "check_arguments"]


class RequestBoundArgumentWarning(UserWarning):
    """A task was scheduled with an argument that its request closes or uses up.

    It is a request, a WebSocket, a response, an uploaded file, or a session or connection of
    SQLAlchemy's. The text says what becomes of it and what to pass instead. Each endpoint is
    warned of once for each kind of argument; what no endpoint schedules, once for each function.
    """


class _Kind:
    """Instances of one class, which belong to a request.

    :param package: where the class comes from
    :param shown: its name, with the article
    :param fate: what becomes of them
    :param instead: what to pass
    """

    def __init__(self, package: str, shown: str, fate: str, instead: str) -> None:
        self.package = package
        self.shown = shown
        self.fate = fate
        self.instead = instead


def _starlette(shown: str, fate: str, instead: str) -> _Kind:
    return _Kind("starlette", shown, fate, instead)


def _session(shown: str) -> _Kind:
    return _Kind(
        "sqlalchemy",
        shown,
        "The request closes it, maybe while the task uses it, and it is not made for two at once",
        "the keys of the rows, and open a session in the task",
    )


def _connection(shown: str) -> _Kind:
    return _Kind(
        "sqlalchemy",
        shown,
        "The request gives it back to its pool, maybe while the task uses it",
        "the keys of the rows, and open a connection in the task",
    )


# Classes are known by their names: nothing is imported for it, and it does not matter whether
# another thread is just importing them.
_KINDS = {
    "HTTPConnection": _starlette(
        "an HTTPConnection",
        "When it is over, what its dependencies have opened is closed",
        "what the task needs of it, connection.url.path for example",
    ),
    "Request": _starlette(
        "a Request",
        "When it is over, its body cannot be read, and what its dependencies have opened is closed",
        "what the task needs of it, request.url.path for example",
    ),
    "WebSocket": _starlette(
        "a WebSocket",
        "It is closed when its handler has returned, and until then both would use it at once",
        "what the task needs of it, websocket.url.path for example",
    ),
    "Response": _starlette(
        "a Response",
        "When it is sent, nothing that the task does to it reaches the client",
        "what the task needs of it, response.status_code for example",
    ),
    "UploadFile": _starlette(
        "an UploadFile",
        "It is closed when the request is over",
        "its content, await file.read(), or the path of a copy",
    ),
    "Session": _session("a Session"),
    "scoped_session": _session("a scoped_session"),
    "AsyncSession": _session("an AsyncSession"),
    "async_scoped_session": _session("an async_scoped_session"),
    "Connection": _connection("a Connection"),
    "AsyncConnection": _connection("an AsyncConnection"),
}

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

PLAIN = frozenset({bool, bytes, dict, float, int, list, set, str, tuple, type(None)})
"""What most arguments are: nobody needs to be warned of these."""

# Who was warned of what, without keeping anybody alive. What cannot be hashed has an id too.
_warned: WeakValueDictionary[tuple[int, _Kind], object] = WeakValueDictionary()
# Under it objects are made, so that a finalizer may run, and schedule.
_lock = RLock()


def check_arguments(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], endpoint: object
) -> None:
    """Warn of arguments that belong to a request, at the line that calls our caller.

    :param func: what is to be scheduled
    :param args: its positional arguments; what is in them is not looked at
    :param kwargs: its keyword arguments
    :param endpoint: the endpoint that schedules it, if there is one
    """
    arguments: Iterable[tuple[int | str, Any]] = (*enumerate(args), *kwargs.items())
    for key, value in arguments:
        # By its class itself: isinstance() asks a proxy what it stands for, and so runs its code.
        cls = cast("type[object]", type(value))
        kind = _kind_of(cls)
        if kind is not None:
            _warn_once(func, key, kind, cls.__name__, endpoint)


def _kind_of(cls: type) -> _Kind | None:
    for base in cls.__mro__:
        kind = _KINDS.get(base.__name__)
        # Anybody may have set the name of the module, and to anything.
        if kind is not None and str(base.__module__).partition(".")[0] == kind.package:
            return kind
    return None


def _warn_once(
    func: Callable[..., Any], key: int | str, kind: _Kind, name: str, endpoint: Any
) -> None:
    owner = _owner(func, endpoint)
    said = (id(owner), kind)
    with _lock:
        if said in _warned:
            return
        _warned[said] = owner
    who = f"{qualified_name(func)} is scheduled"
    if endpoint is not None:
        who = f"{qualified_name(endpoint)} schedules {qualified_name(func)}"
    what = kind.shown if kind.shown.endswith(f" {name}") else f"{kind.shown} ({name})"
    text = f"{who} with {what} as {_place(func, key)}. {kind.fate}. Pass {kind.instead}."
    try:
        warnings.warn(text, RequestBoundArgumentWarning, stacklevel=4)
    except RequestBoundArgumentWarning:
        # Where warnings are errors, the next call is one as well.
        del _warned[said]
        raise


def _owner(func: Callable[..., Any], endpoint: object) -> object:
    """Return the object that is warned of once: its like may be made anew for each call."""
    if endpoint is None:
        impartial, _ = parts(func)
        endpoint = getattr(impartial, "__code__", impartial)
    try:
        ref(endpoint)
    except TypeError:
        return type(endpoint)
    return endpoint


def _place(func: Callable[..., Any], key: int | str) -> str:
    """Return which argument it is, by the parameter's name: any other may come from a client."""
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):  # some functions of C modules have no signature
        parameters = inspect.signature(func).parameters
    if isinstance(key, int):
        names = [name for name, p in parameters.items() if p.kind in _BY_POSITION]
        return f"its argument {names[key]!r}" if key < len(names) else f"its argument {key + 1}"
    return f"its argument {key!r}" if key in parameters else "one of its keyword arguments"
