"""A pytest plugin that gives AnyIO 4.10 what 4.11 has: ``anyio_mode = "auto"``."""

from __future__ import annotations

from inspect import iscoroutinefunction

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``pyproject.toml`` have the setting."""
    parser.addini("anyio_mode", "which coroutine functions AnyIO runs", default="strict")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> None:
    """Give each test that is a coroutine function the fixture by which AnyIO knows its own."""
    if collector.istestfunction(obj, name) and iscoroutinefunction(obj):
        pytest.mark.usefixtures("anyio_backend")(obj)
