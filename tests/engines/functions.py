"""Copies of functions, since each one belongs to one engine for ever."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def fresh(func: Callable[..., Any]) -> Any:
    """Return a copy of a function, which nobody has registered."""
    assert isinstance(func, FunctionType)
    copy = FunctionType(
        func.__code__, func.__globals__, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__, copy.__annotations__ = func.__kwdefaults__, func.__annotations__
    copy.__qualname__ = func.__qualname__
    return copy
